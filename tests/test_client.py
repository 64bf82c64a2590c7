"""The client: limits, faults, redirects, lost answers. Each request is really sent."""

from __future__ import annotations

import base64
import re
import threading
from pathlib import Path
from typing import Any

import pytest
from conftest import DISPATCH, TARGET, FakeClock, World
from standin import Fault

import runner as runner_module
from runner import LABELS, ApiRefused, GitHub, Stopping, Unreachable

ISSUES = f"/repos/{DISPATCH}/issues"


class Client:
    """A client with a clock of its own, and what it waited for."""

    def __init__(self, world: World, **env: str) -> None:
        self.clock, self.stop = FakeClock(), threading.Event()
        self.github = GitHub(world.config(**env), self.clock, self.stop)

    def comment(self, number: int, run: str = "r1") -> int:
        marker = f"<!-- agent-runner run={run} step=end -->"
        return self.github.comment(number, f"Done.\n\n{marker}", marker, again=False)


@pytest.fixture
def client(world: World) -> Client:
    return Client(world)


def test_nothing_is_sent_for_as_long_as_retry_after_says(world: World, client: Client) -> None:
    world.github.faults.append(Fault(status=403, headers={"retry-after": "7"}))
    client.github.request("GET", "/user")
    assert client.clock.waits == [7]
    assert [r.status for r in world.requests()] == [403, 200]


def test_a_limit_stops_the_other_threads_too(world: World, client: Client) -> None:
    world.github.faults.append(Fault(path="/user", status=429, headers={"retry-after": "30"}))
    threads = [threading.Thread(target=client.github.request, args=("GET", "/user")) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert client.clock.waits == [30]
    assert len(world.requests()) == 5


def test_a_limit_without_headers_is_waited_out_twice_as_long_each_time(world: World, client: Client) -> None:
    world.github.faults.append(Fault(status=429, times=3))
    client.github.request("GET", "/user")
    assert client.clock.waits == [60, 120, 240]
    client.clock.waits.clear()
    world.github.faults.append(Fault(status=429))
    client.github.request("GET", "/user")
    assert client.clock.waits == [60]


def test_a_used_up_quota_is_waited_out_by_the_servers_clock(world: World, client: Client) -> None:
    client.clock.at -= 86_400  # a clock that is a day off
    world.github.rate_remaining = 0
    world.github.rate_reset = int(world.github.now()) + 500

    def refill() -> None:
        world.github.rate_remaining = 100

    world.github.faults.append(Fault(after=1, action=refill))
    client.github.request("GET", "/user")
    (waited,) = client.clock.waits
    assert 499 <= waited <= 502


def test_the_last_request_of_the_quota_is_the_last_one_sent(world: World, client: Client) -> None:
    world.github.rate_remaining = 1
    world.github.rate_reset = int(world.github.now()) + 500
    client.github.request("GET", "/user")
    assert client.clock.waits == []
    client.stop.set()
    with pytest.raises(Stopping):
        client.github.request("GET", "/user")
    assert len(world.requests()) == 1


def test_a_refusal_is_not_taken_for_a_limit(world: World, client: Client) -> None:
    message = {"message": "Resource not accessible by personal access token"}
    world.github.faults.append(Fault(status=403, body=message))
    with pytest.raises(ApiRefused, match="not accessible") as refused:
        client.github.request("GET", "/user")
    assert "permissions" in refused.value.advice
    assert client.clock.waits == []


def test_writes_are_spaced_and_reads_are_not(world: World) -> None:
    client, number = Client(world, AGENT_WRITE_INTERVAL="1.5"), world.open()
    for run in ("a", "b", "c"):
        client.comment(number, run)
        client.github.issue(number)
    assert client.clock.waits == [1.5, 1.5]


def test_a_question_to_graphql_is_no_write(world: World) -> None:
    client, number = Client(world, AGENT_WRITE_INTERVAL="1.5"), world.open()
    issue = client.github.issue(number)
    for run in ("a", "b"):
        client.github.history(issue)
        client.comment(number, run)
        client.github.history(issue)
    assert client.clock.waits == [1.5]


@pytest.mark.parametrize(
    ("api", "graphql"),
    [
        ("https://api.github.com", "https://api.github.com/graphql"),
        ("https://api.acme.ghe.com/", "https://api.acme.ghe.com/graphql"),
        ("https://ghe.example.com/api/v3", "https://ghe.example.com/api/graphql"),
        ("https://ghe.example.com/api/v3/", "https://ghe.example.com/api/graphql"),
    ],
)
def test_graphql_has_an_address_of_its_own(world: World, api: str, graphql: str) -> None:
    assert Client(world, GITHUB_API_URL=api).github._http.graphql == graphql


def test_a_read_is_repeated_until_github_is_back(world: World, client: Client) -> None:
    number = world.open()
    world.github.faults += [Fault(status=502), Fault(status=500), Fault(drop="before")]
    assert client.github.issue(number)["number"] == number
    assert client.clock.waits == [1, 2, 4]


def test_patience_ends(world: World, client: Client) -> None:
    world.github.faults.append(Fault(status=503, times=None))
    with pytest.raises(Unreachable, match="503"):
        client.github.issue(1)
    assert 800 < sum(client.clock.waits) <= 900


def test_stopping_ends_patience(world: World, client: Client) -> None:
    world.github.faults.append(Fault(status=503, times=None))
    client.stop.set()
    with pytest.raises(Stopping):
        client.github.issue(1)
    assert len(world.requests()) == 1


@pytest.mark.parametrize("fault", [{"drop": "before"}, {"drop": "after"}, {"status": 500}, {"status": 502}])
def test_a_comment_is_made_once_whatever_becomes_of_the_answer(
    world: World, client: Client, fault: dict[str, Any]
) -> None:
    number = world.open()
    world.github.faults.append(Fault(method="POST", path=".*/comments", **fault))
    comment = client.comment(number)
    assert [c.id for c in world.issue(number).comments] == [comment]


def test_a_comment_is_found_on_a_later_page(world: World, client: Client) -> None:
    number = world.open()
    for index in range(120):
        world.github.comment(DISPATCH, number, f"comment {index}")
    world.github.faults.append(Fault(method="POST", path=".*/comments", drop="after"))
    client.comment(number)
    assert len(world.issue(number).comments) == 121
    assert any(r.path.startswith("/repositories/") for r in world.requests("GET"))


def test_another_runs_comment_is_not_taken_for_this_ones(world: World, client: Client) -> None:
    number = world.open()
    client.comment(number, "r1")
    world.github.faults.append(Fault(method="POST", path=".*/comments", drop="before"))
    client.comment(number, "r2")
    assert len(world.issue(number).comments) == 2


def test_an_edit_and_a_label_are_repeated_without_looking(world: World, client: Client) -> None:
    number = world.open()
    comment = client.comment(number)
    world.github.faults += [Fault(method=m, drop="after") for m in ("PATCH", "POST", "DELETE")]
    client.github.edit_comment(comment, "Better.")
    client.github.add_label(number, "agent-done", LABELS["done"])
    client.github.remove_label(number, "agent-done")
    assert world.issue(number).comments[0].body == "Better."
    assert world.labels(number) == ["copilot-agent"]


def test_a_label_that_the_repository_lacks_gets_colour_and_description(world: World, client: Client) -> None:
    first, second = world.open(), world.open()
    for number in (first, second):
        client.github.add_label(number, "agent-done", LABELS["done"])
    label = client.github.request("GET", f"/repos/{DISPATCH}/labels/agent-done").data
    assert (label["color"], label["description"]) == LABELS["done"]
    assert len(world.requests("PATCH")) == 1


def test_a_label_that_somebody_made_is_left_as_it_is(world: World, client: Client) -> None:
    body = {"name": "Agent-Done", "color": "123456", "description": "mine"}
    client.github.request("POST", f"/repos/{DISPATCH}/labels", body)
    client.github.add_label(world.open(), "agent-done", LABELS["done"])
    assert world.requests("PATCH") == []


def test_taking_off_a_label_that_is_not_there_is_no_error(world: World, client: Client) -> None:
    client.github.remove_label(world.open(), "no such: label/with signs")
    assert [r.status for r in world.requests("DELETE")] == [404]


def test_taking_off_a_label_without_permission_is_one(world: World, client: Client) -> None:
    world.github.faults.append(Fault(method="DELETE", status=403))
    with pytest.raises(ApiRefused, match="403"):
        client.github.remove_label(world.open(), "copilot-agent")


@pytest.fixture
def branch(world: World) -> str:
    world.github.git(TARGET, "branch", "agent-task-1", "main")
    world.github.commit(TARGET, {"new.txt": "new\n"}, branch="agent-task-1")
    return "agent-task-1"


MARKER = "<!-- agent-runner run=r1 step=pull -->"


def open_pull(client: Client, branch: str, marker: str = MARKER, again: bool = False) -> dict[str, Any]:
    fields = {"title": "Agent task: x", "base": "main", "head": branch, "body": f"text {marker}"}
    return client.github.open_pull(TARGET, fields, False, marker, again)


@pytest.mark.parametrize("fault", [{}, {"drop": "before"}, {"drop": "after"}, {"status": 500}])
def test_a_pull_request_is_opened_once_whatever_becomes_of_the_answer(
    world: World, client: Client, branch: str, fault: dict[str, Any]
) -> None:
    if fault:
        world.github.faults.append(Fault(method="POST", path=".*/pulls", **fault))
    pull = open_pull(client, branch)
    assert pull["number"] == world.pull().number


def test_an_open_pull_request_is_adopted(world: World, client: Client, branch: str) -> None:
    first = open_pull(client, branch)
    again = open_pull(client, branch)
    assert first["number"] == again["number"] == world.pull().number


def test_a_closed_pull_request_is_not_adopted(world: World, client: Client, branch: str) -> None:
    first = open_pull(client, branch)
    client.github.request("PATCH", f"/repos/{TARGET}/pulls/{first['number']}", {"state": "closed"})
    other = open_pull(client, branch, MARKER.replace("r1", "r2"), again=True)
    assert other["number"] != first["number"]
    assert open_pull(client, branch, again=True)["number"] == first["number"]  # but the run's own is


def test_an_open_pull_request_of_another_run_gets_the_new_text(world: World, client: Client, branch: str) -> None:
    first = open_pull(client, branch)
    marker = MARKER.replace("r1", "r2")
    assert open_pull(client, branch, marker, again=True)["number"] == first["number"]
    assert world.pull_body() == f"text {marker}"


def test_what_else_is_wrong_with_a_pull_request_is_told(world: World, client: Client) -> None:
    world.github.commit(TARGET, {"x": "y"})
    world.github.git(TARGET, "branch", "same", "main")
    with pytest.raises(ApiRefused, match="No commits between"):
        open_pull(client, "same")


def test_a_moved_repository_is_followed_with_method_and_body(world: World, client: Client) -> None:
    number = world.open()
    world.github.repository(DISPATCH).moved_to = "acme/elsewhere"
    client.comment(number)
    assert [r.status for r in world.requests("POST")] == [307, 201]
    assert client.github.request("GET", ISSUES).data[0]["number"] == number


def test_a_redirect_to_another_host_is_refused_and_the_token_stays(world: World, client: Client) -> None:
    elsewhere = world.github.api_url.replace("127.0.0.1", "localhost") + "/user"
    world.github.faults.append(Fault(status=307, headers={"Location": elsewhere}))
    with pytest.raises(ApiRefused, match="another host, localhost"):
        client.github.request("GET", "/user")
    assert len(world.requests()) == 1


def test_a_redirect_without_end_is_an_error(world: World, client: Client) -> None:
    here = world.github.api_url + "/user"
    world.github.faults.append(Fault(status=301, headers={"Location": here}, times=None))
    with pytest.raises(ApiRefused, match="without end"):
        client.github.request("GET", "/user")


def test_an_issue_that_is_not_there_any_more_is_refused(world: World, client: Client) -> None:
    moved, deleted = world.open(), world.open()
    world.github.open_issue(TARGET, title="It is here now", body="")
    world.issue(moved).transferred_to = f"{TARGET}#1"
    world.issue(deleted).deleted = True
    for number, status in ((moved, 301), (deleted, 410), (99, 404)):
        with pytest.raises(ApiRefused) as refused:
            client.github.issue(number)
        assert refused.value.status == status


def test_an_issue_of_a_renamed_repository_is_found(world: World, client: Client) -> None:
    number = world.open()
    world.github.repository(DISPATCH).moved_to = "acme/elsewhere"
    assert client.github.issue(number)["number"] == number


def test_a_pause_of_no_seconds_is_one_all_the_same(world: World, client: Client) -> None:
    world.github.faults.append(Fault(status=429, headers={"retry-after": "0"}, times=3))
    client.github.request("GET", "/user")
    assert client.clock.waits == [1, 2, 3]


def test_waiting_for_a_limit_does_not_use_up_patience(world: World, client: Client) -> None:
    number = world.open()
    limit = Fault(status=429, headers={"retry-after": "1200"})
    world.github.faults += [limit, Fault(status=502)]
    assert client.github.issue(number)["number"] == number
    assert client.clock.waits == [1200, 1]


def test_a_label_whose_looks_may_not_be_set_is_put_all_the_same(world: World, client: Client) -> None:
    number = world.open()
    world.github.faults.append(Fault(method="PATCH", status=403))
    client.github.add_label(number, "agent-done", LABELS["done"])
    assert "agent-done" in world.labels(number)


@pytest.mark.parametrize("body", [b"", b"null", b'"ok"', b"7"])
def test_an_answer_without_content_is_no_answer(world: World, client: Client, body: bytes) -> None:
    world.github.faults.append(Fault(method="GET", status=200, body=body))
    with pytest.raises(Unreachable):
        client.github.request("GET", "/user")


def test_a_comment_whose_answer_is_empty_is_looked_for(world: World, client: Client) -> None:
    number = world.open()
    world.github.faults.append(Fault(method="POST", path=".*/comments", status=201, body=b""))
    client.comment(number)
    assert len(world.issue(number).comments) == 1


def test_a_comment_that_may_be_there_is_looked_for_first(world: World, client: Client) -> None:
    number = world.open()
    first = client.comment(number)
    marker = "<!-- agent-runner run=r1 step=end -->"
    again = client.github.comment(number, f"Done.\n\n{marker}", marker, again=True)
    assert again == first
    assert len(world.issue(number).comments) == 1


def test_secrets_are_masked_in_what_is_sent(world: World) -> None:
    client, number = Client(world, MODEL_KEY='sk-"quoted"-key', AGENT_ENV="MODEL_KEY"), world.open()
    login = base64.b64encode(f"x-access-token:{world.github.token}".encode()).decode()
    text = f'{world.github.token} {login} sk-"quoted"-key'
    client.github.edit_comment(client.comment(number), text)
    assert world.last_comment(number) == "*** *** ***"


def test_a_netrc_file_does_not_replace_the_token(
    world: World, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login somebody password else\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    client.github.request("GET", "/user")
    assert world.requests()[0].headers["authorization"] == f"Bearer {world.github.token}"


def test_a_request_without_an_answer_ends(world: World, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "HTTP_TIMEOUT", (0.2, 0.2))
    world.github.faults.append(Fault(delay=1))
    with pytest.raises(Unreachable, match="timed out"):
        client.github.request("GET", "/user")


def test_github_being_away_is_told_in_a_few_words(world: World, client: Client) -> None:
    world.github.stop()
    with pytest.raises(Unreachable) as away:
        client.github.request("GET", "/user")
    assert re.fullmatch(r"no answer to GET /user: .*Connection refused", str(away.value))


def test_an_answer_that_is_not_json_is_a_fault_of_github(world: World, client: Client) -> None:
    world.github.faults.append(Fault(status=502, body=b"<html>"))
    with pytest.raises(Unreachable, match="502"):
        client.github.request("GET", "/user")


def test_a_page_that_a_proxy_sends_in_place_of_github_is_no_answer(world: World, client: Client) -> None:
    world.github.faults.append(Fault(status=200, body=b"<html>Sign in</html>"))
    with pytest.raises(Unreachable, match="not GitHub's"):
        client.github.request("GET", "/user")


def test_polls_become_rarer_when_little_quota_is_left(world: World, client: Client) -> None:
    assert client.github.poll_pause(60) == 60
    for left, factor in ((2000, 1), (1000, 1), (500, 2), (100, 10)):
        world.github.rate_remaining = left + 1
        client.github.request("GET", "/user")
        assert client.github.poll_pause(60) == pytest.approx(60 * factor, rel=0.05)
    world.github.rate_remaining = 2
    client.github.request("GET", "/user")
    until_reset = world.github.rate_reset - world.github.now()
    assert client.github.poll_pause(60) == pytest.approx(until_reset, abs=2)
    client.clock.at += until_reset
    assert client.github.poll_pause(60) == 60
