"""The stand-in's own behaviour. It is trusted by all other tests, so it is tested first."""

from __future__ import annotations

import base64
import contextlib
import gzip
import http.client
import itertools
import json
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from openapi_check import check_request
from standin import GRAPHQL, Fault, RecordedRequest, StandIn
from standin_graphql import answer_query

REPO = "acme/dispatch"
ISSUES = f"/repos/{REPO}/issues"
TOKEN = "ghp_0123456789abcdefghijklmnopqrstuvwxyz"


class Clock:
    """A clock that stands until it is moved."""

    time = 1_760_000_000.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def github(tmp_path: Path, clock: Clock) -> Iterator[StandIn]:
    with StandIn(tmp_path / "github", check=check_request, graphql=answer_query, now=clock) as standin:
        standin.add_repository(REPO)
        yield standin


class Reply:
    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.headers = {name.lower(): value for name, value in response.getheaders()}
        self.raw = response.read()
        self.json: Any = json.loads(self.raw) if self.raw else None

    @property
    def links(self) -> dict[str, str]:
        parts = [part.split(">; rel=") for part in self.headers.get("link", "").split(", ") if part]
        return {rel.strip('"'): url.strip("<") for url, rel in parts}


def headers_of(token: str = TOKEN) -> dict[str, str]:
    return {
        "Authorization": f"Bearer {token}",
        "Accept": "application/vnd.github+json",
        "X-GitHub-Api-Version": "2022-11-28",
        "User-Agent": "test",
    }


def send(github: StandIn, method: str, path: str, body: Any = None, **changed: str | None) -> Reply:
    """One request on a connection of its own; `changed` replaces headers (None: leaves out)."""
    headers = headers_of() | {key.replace("_", "-"): value for key, value in changed.items()}
    raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    path = path if path.startswith("http") else github.api_url + path
    connection = http.client.HTTPConnection("127.0.0.1", github.port, timeout=20)
    try:
        split = urlsplit(path)
        target = f"{split.path}?{split.query}" if split.query else split.path
        sent = {key: value for key, value in headers.items() if value is not None}
        connection.request(method, target, raw, sent)
        return Reply(connection.getresponse())
    finally:
        connection.close()


def get(github: StandIn, path: str, **changed: str | None) -> Reply:
    return send(github, "GET", path, **changed)


def post(github: StandIn, path: str, body: Any) -> Reply:
    return send(github, "POST", path, body)


def open_issues(github: StandIn, count: int) -> None:
    for number in range(1, count + 1):
        github.open_issue(REPO, title=f"Task {number}", body=f"Do {number}")


# Who may ask.


@pytest.mark.parametrize("value", [None, "Bearer wrong", "Basic abc", "token"])
def test_a_request_without_the_token_is_401_and_no_problem(github: StandIn, value: str | None) -> None:
    assert send(github, "GET", "/user", Authorization=value).status == 401
    assert github.problems == []
    assert github.rate_remaining == 5000


def test_both_schemes_for_the_token_are_taken(github: StandIn) -> None:
    assert get(github, "/user").json["type"] == "User"
    assert get(github, "/user", Authorization=f"token {TOKEN}").status == 200


def test_a_request_without_user_agent_is_403(github: StandIn) -> None:
    assert get(github, "/user", User_Agent=None).status == 403


@pytest.mark.parametrize(
    ("header", "value", "status"),
    [
        ("Accept", "application/json", 200),
        ("X_GitHub_Api_Version", None, 200),
        ("X_GitHub_Api_Version", "2020-01-01", 400),
    ],
)
def test_a_header_that_github_wants_is_a_problem_when_it_lacks(
    github: StandIn, header: str, value: str | None, status: int
) -> None:
    assert get(github, "/user", **{header: value}).status == status
    assert len(github.problems) == 1


def test_an_unknown_route_is_404_and_a_problem(github: StandIn) -> None:
    assert get(github, f"/repos/{REPO}/milestones").status == 404
    assert "no such route" in github.problems[0]


def test_a_hidden_and_an_unknown_repository_are_404(github: StandIn) -> None:
    github.hidden.add(REPO)
    assert get(github, f"/repos/{REPO}").status == 404
    assert get(github, "/repos/acme/none").status == 404
    assert get(github, "/repositories/7/issues").status == 404
    assert github.problems == []


# What is sent.


def test_a_body_that_is_not_json_is_400(github: StandIn) -> None:
    answer = send(github, "POST", ISSUES, b"{title")
    assert (answer.status, answer.json["message"]) == (400, "Problems parsing JSON")


def test_a_body_key_that_github_does_not_know_is_a_problem(github: StandIn) -> None:
    assert post(github, ISSUES, {"title": "x", "lables": []}).status == 422
    assert "lables" in github.problems[0]


def test_a_query_parameter_that_is_not_served_is_a_problem(github: StandIn) -> None:
    assert get(github, f"{ISSUES}?label=x").status == 422
    assert "label" in github.problems[0]


def test_strictness_does_not_need_the_check(tmp_path: Path) -> None:
    with StandIn(tmp_path) as github:
        github.add_repository(REPO)
        assert get(github, f"{ISSUES}?mentioned=octocat").status == 422
        assert post(github, ISSUES, {"title": "x", "type": "Bug"}).status == 422
        assert len(github.problems) == 2


def test_what_the_check_refuses_is_a_problem_and_has_no_effect(github: StandIn) -> None:
    assert post(github, ISSUES, {"title": "x", "labels": "bug"}).status == 422
    assert "bug" in github.problems[0]
    assert github.repository(REPO).issues == {}


def test_a_bug_in_a_handler_is_500_and_a_problem(github: StandIn) -> None:
    github.repository(REPO).labels = None  # type: ignore[assignment]
    assert get(github, f"/repos/{REPO}/labels").status == 500
    assert "Traceback" in github.problems[0]


# Quota and conditional requests.


def test_each_answer_tells_the_quota(github: StandIn) -> None:
    headers = get(github, "/user").headers
    assert headers["x-ratelimit-remaining"] == "4999"
    assert headers["x-ratelimit-used"] == "1"
    assert headers["x-ratelimit-resource"] == "core"
    assert "x-github-request-id" in headers
    assert get(github, "/rate_limit").json["resources"]["core"]["remaining"] == 4999


def test_an_empty_quota_is_403_until_its_reset(github: StandIn, clock: Clock) -> None:
    github.rate_remaining = 0
    refused = get(github, "/user")
    assert refused.status == 403
    assert refused.headers["x-ratelimit-remaining"] == "0"
    assert "rate limit exceeded" in refused.json["message"]
    assert get(github, "/rate_limit").status == 200
    clock.time = github.rate_reset
    assert get(github, "/user").headers["x-ratelimit-remaining"] == "4999"
    assert github.rate_reset == clock.time + 3600


def test_an_unchanged_list_is_304_and_free(github: StandIn) -> None:
    open_issues(github, 2)
    etag = get(github, ISSUES).headers["etag"]
    assert etag.startswith('W/"')
    same = get(github, ISSUES, If_None_Match=etag)
    assert (same.status, same.raw, same.headers["x-ratelimit-remaining"]) == (304, b"", "4999")
    github.add_label(REPO, 1, "new")
    assert get(github, ISSUES, If_None_Match=etag).status == 200


# Issues.


def test_a_list_is_paged_with_links_that_name_the_repository_by_number(github: StandIn) -> None:
    open_issues(github, 5)
    first = get(github, f"{ISSUES}?per_page=2&sort=created&direction=asc&state=all")
    assert [issue["number"] for issue in first.json] == [1, 2]
    assert set(first.links) == {"next", "last"}
    repo_id = github.repository(REPO).id
    assert first.links["next"].startswith(f"{github.api_url}/repositories/{repo_id}/issues?")
    second = get(github, first.links["next"])
    assert [issue["number"] for issue in second.json] == [3, 4]
    assert set(second.links) == {"prev", "next", "last", "first"}
    last = get(github, second.links["last"])
    assert [issue["number"] for issue in last.json] == [5]
    assert set(last.links) == {"prev", "first"}
    assert github.problems == []


def test_a_list_that_fits_has_no_links(github: StandIn) -> None:
    open_issues(github, 3)
    assert get(github, f"{ISSUES}?per_page=3").links == {}


def test_per_page_is_100_at_most(github: StandIn) -> None:
    open_issues(github, 103)
    assert len(get(github, f"{ISSUES}?per_page=500").json) == 100
    assert len(get(github, ISSUES).json) == 30


def test_a_thousand_issues_are_listed_quickly(github: StandIn) -> None:
    open_issues(github, 1000)
    start = time.monotonic()
    seen, url = 0, f"{ISSUES}?per_page=100"
    while url:
        page = get(github, url)
        seen, url = seen + len(page.json), page.links.get("next", "")
    assert seen == 1000
    assert time.monotonic() - start < 2


def test_labels_filter_with_and_and_without_regard_to_case(github: StandIn) -> None:
    github.open_issue(REPO, title="one", body=None, labels=["copilot-agent"])
    github.open_issue(REPO, title="two", body=None, labels=["copilot-agent", "agent-done"])
    numbers = [issue["number"] for issue in get(github, f"{ISSUES}?labels=Copilot-Agent").json]
    assert numbers == [2, 1]
    both = get(github, f"{ISSUES}?labels=copilot-agent,agent-done").json
    assert [issue["number"] for issue in both] == [2]


def test_since_is_inclusive_and_every_change_counts_as_an_update(github: StandIn, clock: Clock) -> None:
    open_issues(github, 6)
    clock.time += 60
    github.add_label(REPO, 1, "extra")
    github.remove_label(REPO, 2, "copilot-agent")
    github.comment(REPO, 3, "hello")
    github.close_issue(REPO, 4)
    github.edit_issue(REPO, 5, title="Other")
    changed = get(github, f"{ISSUES}?since=2025-10-09T08:54:20Z&state=all&direction=asc").json
    assert [issue["number"] for issue in changed] == [1, 2, 3, 4, 5]
    assert {issue["updated_at"] for issue in changed} == {"2025-10-09T08:54:20Z"}


def test_closed_issues_are_listed_only_when_asked_for(github: StandIn) -> None:
    open_issues(github, 2)
    github.close_issue(REPO, 1)
    assert [issue["number"] for issue in get(github, ISSUES).json] == [2]
    closed = get(github, f"{ISSUES}?state=closed").json
    assert [(issue["number"], issue["state_reason"]) for issue in closed] == [(1, "completed")]


def test_issues_can_be_sorted_and_filtered_by_their_author(github: StandIn, clock: Clock) -> None:
    open_issues(github, 2)
    github.open_issue(REPO, title="x", body=None, author="hubot")
    github.comment(REPO, 2, "hello")
    clock.time += 1
    github.add_label(REPO, 1, "extra")
    for query, numbers in {
        "sort=comments": [2, 3, 1],
        "sort=updated": [1, 3, 2],
        "direction=asc": [1, 2, 3],
        "creator=hubot": [3],
    }.items():
        assert [issue["number"] for issue in get(github, f"{ISSUES}?{query}").json] == numbers


def test_a_repository_without_issues_answers_410(github: StandIn) -> None:
    github.repository(REPO).has_issues = False
    assert get(github, ISSUES).status == 410
    assert get(github, f"/repos/{REPO}").json["has_issues"] is False


def test_pull_requests_are_in_the_issue_list(github: StandIn) -> None:
    number = github.open_issue(REPO, title="A pull", body="", pull_request=True)
    assert get(github, ISSUES).json[0]["pull_request"]["url"].endswith(f"/pulls/{number}")
    assert "pull_request" not in post(github, ISSUES, {"title": "An issue"}).json


def test_one_issue_looks_as_it_does_in_the_list(github: StandIn) -> None:
    github.open_issue(REPO, title="x", body=None, author="helper[bot]", association="NONE")
    issue = get(github, f"{ISSUES}/1").json
    assert issue == get(github, ISSUES).json[0]
    assert issue["user"]["type"] == "Bot"
    assert issue["author_association"] == "NONE"
    assert issue["html_url"] == f"{github.server_url}/{REPO}/issues/1"


def test_deleted_and_transferred_issues_answer_as_documented(github: StandIn) -> None:
    open_issues(github, 3)
    github.add_repository("acme/other")
    github.open_issue("acme/other", title="moved here", body=None)
    github.issue(REPO, 1).deleted = True
    github.issue(REPO, 2).transferred_to = "acme/other#1"
    github.issue(REPO, 3).transferred_to = "acme/secret#1"
    moved = get(github, f"{ISSUES}/2")
    assert (get(github, f"{ISSUES}/1").status, moved.status) == (410, 301)
    assert get(github, moved.headers["location"]).json["title"] == "moved here"
    assert get(github, f"{ISSUES}/3").status == get(github, f"{ISSUES}/4").status == 404
    assert get(github, ISSUES).json == []


def test_a_renamed_repository_redirects_and_keeps_the_method(github: StandIn) -> None:
    repo = github.repository(REPO)
    repo.moved_to = "acme/new"
    moved = get(github, f"{ISSUES}?state=all")
    assert moved.status == 301
    assert moved.headers["location"] == f"{github.api_url}/repositories/{repo.id}/issues?state=all"
    assert post(github, ISSUES, {"title": "x"}).status == 307
    assert get(github, moved.headers["location"]).json == []
    assert get(github, "/repos/acme/new").json["full_name"] == "acme/new"


def test_a_persons_permission_is_told(github: StandIn) -> None:
    people = f"/repos/{REPO}/collaborators"
    github.permissions["octocat"] = "write"
    told = get(github, f"{people}/octocat/permission")
    assert (told.json["permission"], told.json["user"]["login"]) == ("write", "octocat")
    assert get(github, f"{people}/nobody/permission").status == 404
    github.push_denied.add(REPO)
    assert get(github, f"{people}/octocat/permission").status == 403


# GraphQL.

ACTOR = "{ __typename login }"
EDITS = f"userContentEdits(first: 2) {{ pageInfo {{ hasNextPage }} nodes {{ editedAt editor {ACTOR} }} }}"
LABELED = f"... on LabeledEvent {{ createdAt actor {ACTOR} label {{ name }} }}"
RENAMED = f"... on RenamedTitleEvent {{ createdAt actor {ACTOR} }}"
TIMELINE = (
    f"timelineItems(last: 2, itemTypes: [LABELED_EVENT, RENAMED_TITLE_EVENT]) {{ nodes {{ {LABELED} {RENAMED} }} }}"
)


def ask(github: StandIn, wanted: str, number: int = 1, repo: str = "dispatch", **changed: str | None) -> Reply:
    """A query about an issue."""
    query = 'query($name: String!, $number: Int!) { repository(owner: "acme", name: $name) { issue(number: $number)'
    body = {"query": f"{query} {{ {wanted} }} }} }}", "variables": {"name": repo, "number": number}}
    return send(github, "POST", github.server_url + GRAPHQL, body, **changed)


def asked(github: StandIn, wanted: str) -> Any:
    return ask(github, wanted).json["data"]["repository"]["issue"]


def test_graphql_wants_the_token_and_a_post(github: StandIn) -> None:
    open_issues(github, 1)
    assert ask(github, "updatedAt", Authorization=None).status == 401
    assert ask(github, "updatedAt", Authorization="Bearer wrong").json["message"] == "Bad credentials"
    assert send(github, "POST", github.server_url + GRAPHQL, b"{").status == 400
    assert github.problems == []
    assert get(github, github.server_url + GRAPHQL).status == 404
    assert post(github, "/graphql", {}).status == 404
    assert len(github.problems) == 2


def test_graphql_has_a_limit_of_its_own_which_it_tells_with_200(github: StandIn) -> None:
    open_issues(github, 1)
    github.graphql_remaining = 1
    last, late = ask(github, "updatedAt"), ask(github, "updatedAt")
    assert (last.headers["x-ratelimit-resource"], last.headers["x-ratelimit-remaining"]) == ("graphql", "0")
    assert (late.status, late.json["errors"][0]["type"]) == (200, "RATE_LIMITED")
    assert github.rate_remaining == 5000


def test_edits_are_told_the_newest_first_with_the_text_that_they_began_with(github: StandIn, clock: Clock) -> None:
    open_issues(github, 1)
    assert asked(github, EDITS)["userContentEdits"] == {"pageInfo": {"hasNextPage": False}, "nodes": []}
    clock.time += 60
    github.edit_issue(REPO, 1, body="better", by="helper[bot]")
    began = {"editedAt": "2025-10-09T08:53:20Z", "editor": {"__typename": "User", "login": "octocat"}}
    edit = {"editedAt": "2025-10-09T08:54:20Z", "editor": {"__typename": "Bot", "login": "helper"}}
    assert asked(github, EDITS)["userContentEdits"] == {"pageInfo": {"hasNextPage": False}, "nodes": [edit, began]}
    github.edit_issue(REPO, 1, body="best", by=None)
    edits = asked(github, EDITS)["userContentEdits"]
    assert [node["editor"] for node in edits["nodes"]] == [None, edit["editor"]]
    assert edits["pageInfo"]["hasNextPage"] is True


def test_the_timeline_tells_of_labels_and_titles_the_oldest_first(github: StandIn, clock: Clock) -> None:
    github.open_issue(REPO, title="x", body="y", author="helper[bot]")
    clock.time += 60
    github.edit_issue(REPO, 1, title="z", by="imported[mannequin]")
    helper, imported = {"__typename": "Bot", "login": "helper"}, {"__typename": "Mannequin", "login": "imported"}
    label = {"createdAt": "2025-10-09T08:53:20Z", "actor": helper, "label": {"name": "copilot-agent"}}
    title = {"createdAt": "2025-10-09T08:54:20Z", "actor": imported}
    assert asked(github, TIMELINE)["timelineItems"]["nodes"] == [label, title]
    post(github, f"{ISSUES}/1/labels", {"labels": ["agent-done"]})
    send(github, "PATCH", f"/repos/{REPO}/labels/agent-done", {"new_name": "over"})
    nodes = asked(github, TIMELINE)["timelineItems"]["nodes"]
    assert [node.get("label") for node in nodes] == [None, {"name": "over"}]
    assert asked(github, TIMELINE.replace(", RENAMED_TITLE_EVENT", ""))["timelineItems"]["nodes"][0] == label


def test_what_graphql_does_not_find_is_an_error_and_no_problem(github: StandIn) -> None:
    github.open_issue(REPO, title="A pull", body="", pull_request=True)
    for answer in (ask(github, "updatedAt", 1), ask(github, "updatedAt", 2), ask(github, "updatedAt", 1, "other")):
        assert (answer.status, answer.json["errors"][0]["type"]) == (200, "NOT_FOUND")
    assert github.problems == []


@pytest.mark.parametrize(
    "wanted",
    [
        "title",  # GitHub has it, the stand-in does not
        "labels_",
        "userContentEdits { nodes { editedAt } }",
        "userContentEdits(first: 101) { nodes { editedAt } }",
        'userContentEdits(first: 2, after: "x") { nodes { editedAt } }',
        "timelineItems(last: 2) { nodes { __typename } }",
        "timelineItems(last: 2, skip: 1, itemTypes: [LABELED_EVENT]) { nodes { __typename } }",
        "timelineItems(last: 2, itemTypes: [LABELLED_EVENT]) { nodes { __typename } }",
    ],
)
def test_a_query_that_is_not_served_is_a_problem(github: StandIn, wanted: str) -> None:
    open_issues(github, 1)
    answer = ask(github, wanted)
    assert answer.status == 200
    assert answer.json["errors"]
    assert len(github.problems) == 1


def test_a_key_that_graphql_does_not_know_is_a_problem(github: StandIn) -> None:
    send(github, "POST", github.server_url + GRAPHQL, {"query": "{ __typename }", "params": {}})
    assert "not served: params" in github.problems[0]


def test_an_issue_is_as_old_as_its_first_labels(github: StandIn) -> None:
    """It is opened with them in one act, however long that takes."""
    times = itertools.count(1_760_000_000.0)
    github.now = lambda: next(times)
    github.open_issue(REPO, title="x", body="y", labels=["a", "b"])
    issue = github.issue(REPO, 1)
    assert {issue.updated_at, *(event.at for event in issue.events)} == {issue.created_at}


# Comments.


def test_a_comment_is_created_edited_and_listed(github: StandIn) -> None:
    open_issues(github, 1)
    made = post(github, f"{ISSUES}/1/comments", {"body": "started"})
    assert made.status == 201
    assert made.json["user"]["login"] == github.login
    path = f"{ISSUES}/comments/{made.json['id']}"
    assert send(github, "PATCH", path, {"body": "done"}).json["body"] == "done"
    assert [row["body"] for row in get(github, f"{ISSUES}/1/comments").json] == ["done"]
    assert get(github, f"{ISSUES}/1").json["comments"] == 1
    assert github.problems == []


def test_a_comment_that_is_too_long_or_blank_is_422(github: StandIn) -> None:
    open_issues(github, 1)
    path = f"{ISSUES}/1/comments"
    refused = post(github, path, {"body": "é" * 65_537})
    assert refused.status == 422
    assert refused.json["errors"][0] == {
        "resource": "IssueComment",
        "field": "data",
        "code": "unprocessable",
        "message": "Body is too long (maximum is 65536 characters)",
    }
    assert post(github, path, {"body": " \n"}).status == 422
    assert post(github, path, {"body": "é" * 65_536}).status == 201
    assert len(github.issue(REPO, 1).comments) == 1


# Labels.


def test_a_label_the_repository_lacks_is_made_grey(github: StandIn) -> None:
    github.open_issue(REPO, title="x", body=None)
    labels = post(github, f"{ISSUES}/1/labels", {"labels": ["agent-done"]}).json
    assert [label["name"] for label in labels] == ["copilot-agent", "agent-done"]
    assert (labels[1]["color"], labels[1]["description"]) == ("ededed", None)
    assert labels[0]["color"] != "ededed"


def test_labels_are_found_without_regard_to_case(github: StandIn) -> None:
    github.open_issue(REPO, title="x", body=None)
    post(github, f"{ISSUES}/1/labels", {"labels": ["COPILOT-agent"]})
    assert github.issue(REPO, 1).labels == ["copilot-agent"]
    assert get(github, f"/repos/{REPO}/labels/Copilot-Agent").status == 200
    assert send(github, "DELETE", f"{ISSUES}/1/labels/COPILOT-AGENT").json == []


def test_a_label_with_a_slash_travels_encoded(github: StandIn) -> None:
    github.open_issue(REPO, title="x", body=None, labels=["state/a b"])
    assert send(github, "DELETE", f"{ISSUES}/1/labels/state%2Fa%20b").status == 200
    assert github.issue(REPO, 1).labels == []
    assert github.problems == []
    assert github.log[-1].path.endswith("/labels/state%2Fa%20b")


def test_removing_a_label_that_is_not_there_is_404(github: StandIn) -> None:
    open_issues(github, 1)
    missing = send(github, "DELETE", f"{ISSUES}/1/labels/none")
    assert (missing.status, missing.json["message"]) == (404, "Label does not exist")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"name": "x" * 51}, "name"),
        ({"name": "bug", "color": "#aabbcc"}, "color"),
        ({"name": "bug", "description": "x" * 101}, "description"),
        ({"name": "Copilot-Agent"}, "name"),
    ],
)
def test_labels_have_limits(github: StandIn, body: dict[str, str], field: str) -> None:
    open_issues(github, 1)
    refused = post(github, f"/repos/{REPO}/labels", body)
    assert refused.status == 422
    assert refused.json["errors"][0]["field"] == field


def test_an_issue_takes_no_label_that_is_too_long(github: StandIn) -> None:
    open_issues(github, 1)
    assert post(github, f"{ISSUES}/1/labels", {"labels": ["x" * 51]}).status == 422
    assert post(github, f"{ISSUES}/1/labels", {"labels": ["x" * 50]}).status == 200


def test_only_the_looks_of_a_label_can_change(github: StandIn) -> None:
    open_issues(github, 1)
    path = f"/repos/{REPO}/labels/copilot-agent"
    assert send(github, "PATCH", path, {"description": "new"}).json["color"] == "d4c5f9"
    assert get(github, path).json["description"] == "new"


def test_a_label_is_renamed_everywhere(github: StandIn) -> None:
    open_issues(github, 1)
    path = f"/repos/{REPO}/labels/copilot-agent"
    changed = send(github, "PATCH", path, {"new_name": "agent", "color": "0E8A16"}).json
    assert (changed["name"], changed["color"]) == ("agent", "0e8a16")
    assert changed["description"] == "Made by a person"
    assert [label["name"] for label in get(github, f"{ISSUES}/1").json["labels"]] == ["agent"]


# Pull requests.

PULLS = f"/repos/{REPO}/pulls"
PULL = {"title": "A change", "head": "work", "base": "main", "body": "Because"}


def test_a_pull_request_is_opened_and_found_by_its_head(github: StandIn) -> None:
    open_issues(github, 1)
    sha = branch_off(github, "work")
    made = post(github, PULLS, PULL)
    assert made.status == 201
    assert made.json["number"] == 2
    assert made.json["head"]["sha"] == sha
    assert made.json["head"]["label"] == "acme:work"
    assert made.json["html_url"] == f"{github.server_url}/{REPO}/pull/2"
    assert [pull["number"] for pull in get(github, f"{PULLS}?head=acme:work").json] == [2]
    assert get(github, f"{PULLS}?head=acme:other").json == []
    assert get(github, f"{PULLS}?base=other").json == []
    assert len(get(github, f"{PULLS}?head=other").json) == 1  # GitHub ignores that form
    assert [pull.head for pull in github.pulls(REPO)] == ["work"]
    assert github.problems == []


def branch_off(github: StandIn, branch: str) -> str:
    github.git(REPO, "branch", branch, "main")
    return github.commit(REPO, {f"{branch}.txt": "new"}, branch=branch)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"head": "none"}, {"field": "head", "code": "invalid"}),
        ({"head": "other:work"}, {"field": "head", "code": "invalid"}),
        ({"base": "none"}, {"field": "base", "code": "invalid"}),
        ({"head": "main"}, {"code": "custom", "message": "No commits between main and main"}),
        ({"head": "stray"}, {"message": "The stray branch has no history in common with main"}),
        ({"body": "x" * 65_537}, {"field": "body", "code": "custom"}),
        ({"title": ""}, {"field": "title", "code": "missing_field"}),
    ],
)
def test_a_pull_request_that_cannot_be_is_422(
    github: StandIn, change: dict[str, str], expected: dict[str, str]
) -> None:
    branch_off(github, "work")
    github.commit(REPO, {"x": "x"}, branch="stray")
    refused = post(github, PULLS, PULL | change)
    assert refused.status == 422
    assert refused.json["message"] == "Validation Failed"
    error = refused.json["errors"][0]
    assert expected.items() <= error.items()
    assert error["resource"] == "PullRequest"
    assert github.pulls(REPO) == []


def test_a_second_pull_request_for_a_branch_is_422_until_the_first_is_closed(
    github: StandIn,
) -> None:
    branch_off(github, "work")
    post(github, PULLS, PULL)
    error = post(github, PULLS, PULL).json["errors"][0]
    assert error["code"] == "custom"
    assert error["message"] == "A pull request already exists for acme:work."
    assert send(github, "PATCH", f"{PULLS}/1", {"state": "closed"}).json["state"] == "closed"
    assert get(github, PULLS).json == []
    assert post(github, PULLS, PULL).status == 201


def test_of_many_who_open_the_same_pull_request_one_wins(github: StandIn) -> None:
    branch_off(github, "work")
    statuses: list[int] = []
    racers = [threading.Thread(target=lambda: statuses.append(post(github, PULLS, PULL).status)) for _ in range(8)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert sorted(statuses) == [201] + [422] * 7
    assert github.rate_remaining == 5000 - 8


def test_a_pull_request_may_be_a_draft(github: StandIn) -> None:
    branch_off(github, "work")
    made = post(github, PULLS, PULL | {"draft": True})
    assert (made.status, made.json["draft"]) == (201, True)
    assert github.pulls(REPO)[0].draft is True
    shown = get(github, f"{ISSUES}/1").json
    assert (shown["draft"], shown["node_id"]) == (True, made.json["node_id"])
    branch_off(github, "other")
    assert post(github, PULLS, PULL | {"head": "other"}).json["draft"] is False


def test_a_repository_may_have_no_drafts(github: StandIn) -> None:
    branch_off(github, "work")
    github.repository(REPO).has_drafts = False
    refused = post(github, PULLS, PULL | {"draft": True})
    message = "Draft pull requests are not supported in this repository."
    assert (refused.status, refused.json["message"], "errors" in refused.json) == (422, message, False)
    assert github.pulls(REPO) == []
    assert post(github, PULLS, PULL | {"draft": False}).status == 201
    assert github.problems == []


def test_a_pull_request_is_labelled_as_an_issue_is(github: StandIn) -> None:
    number = open_pull(github)
    labels = post(github, f"{ISSUES}/{number}/labels", {"labels": ["agent"]}).json
    assert [label["name"] for label in labels] == ["agent"]
    assert [label["name"] for label in get(github, f"{PULLS}/{number}").json["labels"]] == ["agent"]
    assert github.pulls(REPO)[0].labels == ["agent"]
    assert github.problems == []


def open_pull(github: StandIn, **changed: Any) -> int:
    branch_off(github, "work")
    return int(post(github, PULLS, PULL | changed).json["number"])


# Reviews.


@pytest.fixture
def asking(github: StandIn) -> str:
    """The path to ask for reviews of a pull request at."""
    github.permissions |= {"Octocat": "write", "hubot": "read", "gone": "none"}
    github.repository(REPO).teams |= {"core", "docs"}
    return f"{PULLS}/{open_pull(github)}/requested_reviewers"


def test_reviews_are_requested_from_users_and_teams(github: StandIn, asking: str) -> None:
    asked_for = post(github, asking, {"reviewers": ["octocat", "hubot"], "team_reviewers": ["CORE"]})
    assert asked_for.status == 201
    assert [user["login"] for user in asked_for.json["requested_reviewers"]] == ["Octocat", "hubot"]
    assert [team["slug"] for team in asked_for.json["requested_teams"]] == ["core"]
    assert post(github, asking, {"reviewers": ["hubot"]}).status == 201
    assert post(github, asking, {"team_reviewers": ["docs"]}).status == 201
    (pull,) = github.pulls(REPO)
    assert (pull.reviewers, pull.team_reviewers) == (["Octocat", "hubot"], ["core", "docs"])
    assert len(get(github, f"{PULLS}/1").json["requested_reviewers"]) == 2
    assert github.problems == []


@pytest.mark.parametrize(
    "body",
    [
        {"reviewers": ["octocat", "stranger"]},
        {"reviewers": ["octocat", "gone"]},
        {"reviewers": ["octocat"], "team_reviewers": ["other"]},
        {"reviewers": ["octocat"], "team_reviewers": ["acme/core"]},  # a slug is wanted
    ],
    ids=str,
)
def test_one_who_is_no_collaborator_spoils_the_request_for_all(github: StandIn, asking: str, body: Any) -> None:
    refused = post(github, asking, body)
    assert refused.status == 422
    assert refused.json["message"] == (
        "Reviews may only be requested from collaborators. One or more of the users or teams you specified is not a"
        " collaborator of the acme/dispatch repository."
    )
    assert github.pulls(REPO)[0].reviewers == []
    assert github.problems == []


def test_the_author_is_not_asked_for_a_review(github: StandIn, asking: str) -> None:
    github.permissions["agent-runner"] = "write"
    refused = post(github, asking, {"reviewers": ["octocat", "Agent-Runner"]})
    assert (refused.status, refused.json["message"]) == (422, "Review cannot be requested from pull request author.")
    assert github.pulls(REPO)[0].reviewers == []


def test_to_ask_nobody_for_a_review_is_a_problem(github: StandIn, asking: str) -> None:
    assert post(github, asking, {"reviewers": [], "team_reviewers": []}).status == 422
    assert "nobody" in github.problems[0]


def test_reviews_are_for_pull_requests_and_for_who_may_push(github: StandIn, asking: str) -> None:
    number = github.open_issue(REPO, title="x", body=None)
    assert post(github, f"{PULLS}/{number}/requested_reviewers", {"reviewers": ["octocat"]}).status == 404
    github.push_denied.add(REPO)
    assert post(github, asking, {"reviewers": ["octocat"]}).status == 403


# Drafts become ready, and the other way round.

READY, DRAFT = "markPullRequestReadyForReview", "convertPullRequestToDraft"


def mutate(github: StandIn, name: str, node: str, wanted: str = "id isDraft number", **changed: str | None) -> Reply:
    query = f"mutation($id: ID!) {{ {name}(input: {{pullRequestId: $id}}) {{ pullRequest {{ {wanted} }} }} }}"
    body = {"query": query, "variables": {"id": node}}
    return send(github, "POST", github.server_url + GRAPHQL, body, **changed)


def test_a_draft_becomes_ready_and_a_draft_again(github: StandIn, clock: Clock) -> None:
    node = get(github, f"{PULLS}/{open_pull(github, draft=True)}").json["node_id"]
    (pull,) = github.pulls(REPO)
    for name, draft in [(READY, False), (DRAFT, True)]:
        clock.time += 60
        shown = {"id": node, "isDraft": draft, "number": 1}
        assert mutate(github, name, node).json == {"data": {name: {"pullRequest": shown}}}
        assert get(github, f"{PULLS}/1").json["draft"] is draft
        assert mutate(github, name, node).json == {"data": {name: None}}  # nothing is left to do
        assert pull.draft is draft
    assert pull.updated_at > pull.created_at
    assert github.problems == []


@pytest.mark.parametrize("name", [READY, DRAFT])
def test_a_stage_that_cannot_change_is_an_error_and_no_problem(github: StandIn, name: str) -> None:
    number, draft = open_pull(github, draft=name == READY), name == READY
    node = get(github, f"{PULLS}/{number}").json["node_id"]
    unknown = mutate(github, name, "PR_1")
    assert (unknown.status, unknown.json["errors"][0]["type"], unknown.json["data"]) == (200, "NOT_FOUND", {name: None})
    assert unknown.json["errors"][0]["message"] == "Could not resolve to a node with the global id of 'PR_1'"
    github.push_denied.add(REPO)
    denied = mutate(github, name, node).json["errors"][0]
    assert (denied["type"], denied["path"]) == ("FORBIDDEN", [name])
    assert (
        f"agent-runner does not have permission to {'mark' if draft else 'convert'} the pull request {node}"
        in (denied["message"])
    )
    github.push_denied.clear()
    github.close_issue(REPO, number)
    assert mutate(github, name, node).json["errors"][0]["type"] == "UNPROCESSABLE"
    assert github.pulls(REPO)[0].draft is draft
    assert github.problems == []


def test_a_repository_without_drafts_converts_none(github: StandIn) -> None:
    node = get(github, f"{PULLS}/{open_pull(github)}").json["node_id"]
    github.repository(REPO).has_drafts = False
    (error,) = mutate(github, DRAFT, node).json["errors"]
    message = f"agent-runner does not have permission to convert the pull request {node} to draft."
    assert (error["type"], error["message"]) == ("FORBIDDEN", message)
    assert github.pulls(REPO)[0].draft is False


@pytest.mark.parametrize(
    ("name", "wanted"),
    [(READY, "title"), ("closePullRequest", "id"), (DRAFT, "id } clientMutationId pullRequest { id")],
)
def test_a_mutation_that_is_not_served_is_a_problem(github: StandIn, name: str, wanted: str) -> None:
    node = get(github, f"{PULLS}/{open_pull(github)}").json["node_id"]
    assert mutate(github, name, node, wanted).json["errors"]
    assert len(github.problems) == 1


def test_faults_come_between_as_everywhere(github: StandIn, asking: str) -> None:
    github.faults.append(Fault(path=".*/requested_reviewers", status=502))
    assert post(github, asking, {"reviewers": ["octocat"]}).status == 502
    node = get(github, f"{PULLS}/1").json["node_id"]
    github.faults.append(Fault(kind="graphql", where=lambda request: DRAFT in request.json["query"], drop="after"))
    with pytest.raises((http.client.RemoteDisconnected, ConnectionResetError)):
        mutate(github, DRAFT, node)
    (pull,) = github.pulls(REPO)
    assert (pull.draft, pull.reviewers) == (True, [])
    assert mutate(github, READY, node).status == 200
    assert pull.draft is False


def test_a_token_that_may_not_push_may_not_open_a_pull_request(github: StandIn) -> None:
    branch_off(github, "work")
    github.push_denied.add(REPO)
    assert post(github, PULLS, PULL).status == 403
    assert get(github, f"/repos/{REPO}").json["permissions"]["push"] is False


# Faults.


def test_a_fault_answers_without_the_effect_and_only_so_often(github: StandIn) -> None:
    github.faults.append(Fault(path=ISSUES, status=502, after=1, headers={"Retry-After": "7"}))
    statuses = [post(github, ISSUES, {"title": "x"}) for _ in range(3)]
    assert [answer.status for answer in statuses] == [201, 502, 201]
    assert statuses[1].headers["retry-after"] == "7"
    assert len(github.repository(REPO).issues) == 2
    assert [request.status for request in github.rest()] == [201, 502, 201]


@pytest.mark.parametrize(("drop", "effects"), [("before", 0), ("after", 1)])
def test_an_answer_can_be_lost_before_and_after_the_effect(github: StandIn, drop: str, effects: int) -> None:
    github.faults.append(Fault(method="POST", drop=drop))
    with pytest.raises((http.client.RemoteDisconnected, ConnectionResetError)):
        post(github, ISSUES, {"title": "x"})
    assert len(github.repository(REPO).issues) == effects
    assert github.log[-1].status == 0


def test_a_fault_can_change_the_world_while_pages_are_read(github: StandIn) -> None:
    open_issues(github, 2)
    github.faults.append(Fault(action=lambda: github.close_issue(REPO, 2)))
    assert [issue["number"] for issue in get(github, ISSUES).json] == [1]


def test_a_fault_can_look_at_the_effect_before_the_answer_is_sent(github: StandIn) -> None:
    seen: list[int] = []

    def look() -> None:
        seen.extend([len(github.repository(REPO).issues), github.log[-1].status])

    github.faults.append(Fault(method="POST", after_effect=look))
    assert post(github, ISSUES, {"title": "x"}).status == 201
    assert seen == [1, 0]


def test_a_fault_can_be_one_of_some_requests_only(github: StandIn) -> None:
    github.faults.append(Fault(status=500, times=None, where=lambda request: request.json == {"title": "bad"}))
    statuses = [post(github, ISSUES, {"title": title}).status for title in ("good", "bad", "good", "bad")]
    assert statuses == [201, 500, 201, 500]


def test_a_slow_answer_does_not_hold_up_others(github: StandIn) -> None:
    github.faults.append(Fault(path="/user", delay=0.5))
    slow = threading.Thread(target=get, args=(github, "/user"))
    start = time.monotonic()
    slow.start()
    time.sleep(0.05)
    assert get(github, f"/repos/{REPO}").status == 200
    assert time.monotonic() - start < 0.4
    slow.join()
    assert time.monotonic() - start >= 0.5


# Life.


def test_it_goes_away_and_comes_back_at_the_same_port(github: StandIn) -> None:
    open_issues(github, 1)
    idle = http.client.HTTPConnection("127.0.0.1", github.port)
    idle.request("GET", "/api/v3/user", headers=headers_of())
    assert idle.getresponse().read()
    before = threading.active_count()
    start = time.monotonic()
    github.stop()
    assert time.monotonic() - start < 0.5
    assert threading.active_count() == before - 2  # the server's and the idle connection's
    with pytest.raises(ConnectionRefusedError):
        get(github, "/user")
    github.start()
    assert get(github, f"{ISSUES}/1").status == 200
    idle.close()


def test_another_one_may_take_the_port_at_once(github: StandIn, tmp_path: Path) -> None:
    assert get(github, "/user").status == 200
    github.stop()
    with StandIn(tmp_path / "second", port=github.port) as second:
        assert second.api_url == github.api_url
        assert get(second, "/user").status == 200


def test_a_stop_cuts_a_delayed_answer_short(github: StandIn) -> None:
    github.faults.append(Fault(delay=30))
    cut: list[BaseException] = []

    def wait() -> None:
        try:
            get(github, "/user")
        except OSError as error:
            cut.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    while not github.log:
        time.sleep(0.01)
    start = time.monotonic()
    github.stop()
    assert time.monotonic() - start < 1
    waiting.join(2)
    assert cut
    assert not waiting.is_alive()


def test_a_fault_can_take_github_away(github: StandIn) -> None:
    github.faults.append(Fault(action=github.stop))
    with pytest.raises(OSError, match=r"closed|reset|disconnected"):
        get(github, "/user")
    github.start()
    assert get(github, "/user").status == 200
    assert github.problems == []


def test_one_connection_carries_many_requests_quickly(github: StandIn) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", github.port)
    start = time.monotonic()
    for _ in range(100):
        connection.request("GET", f"/api/v3/repos/{REPO}", headers=headers_of())
        assert connection.getresponse().read()
    connection.close()
    assert time.monotonic() - start < 2  # delayed acknowledgements would take 4 s


# git.


def git(github: StandIn, *args: str, cwd: Path | None = None, token: str = TOKEN) -> str:
    """Run git as a client with the token in a header of its own; RuntimeError if it fails."""
    settings = {"credential.helper": "", "core.askPass": "true"}
    options = [part for item in settings.items() for part in ("-c", "=".join(item))]
    env = github.git_env() | {"GIT_TERMINAL_PROMPT": "0"}
    if token:
        helper = f"!f() {{ echo username=x-access-token; echo password={token}; }}; f"
        options += ["-c", f"credential.helper={helper}"]
    command = ["git", *options, *args]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout.strip()


@pytest.fixture
def clone(github: StandIn, tmp_path: Path) -> Path:
    path = tmp_path / "clone"
    git(github, "clone", "--quiet", github.url(REPO), str(path))
    return path


def commit(github: StandIn, clone: Path, name: str = "new.txt", content: str = "new") -> str:
    (clone / name).write_text(content)
    git(github, "add", name, cwd=clone)
    git(github, "commit", "--quiet", "-m", "A commit", cwd=clone)
    return git(github, "rev-parse", "HEAD", cwd=clone)


def test_a_clone_and_a_push_work_with_the_token(github: StandIn, clone: Path) -> None:
    assert (clone / "README.md").exists()
    sha = commit(github, clone)
    git(github, "push", "--quiet", "origin", "HEAD:refs/heads/work", cwd=clone)
    assert github.git(REPO, "rev-parse", "work") == sha
    assert {request.kind for request in github.log} == {"git"}
    assert github.problems == []


def test_an_empty_repository_can_be_cloned(github: StandIn, tmp_path: Path) -> None:
    github.add_repository("acme/empty", files=None, default_branch="trunk")
    git(github, "clone", "--quiet", github.url("acme/empty"), str(tmp_path / "empty"))
    assert git(github, "symbolic-ref", "HEAD", cwd=tmp_path / "empty") == "refs/heads/trunk"


@pytest.mark.parametrize("token", ["", "ghp_wrong"])
def test_git_without_the_token_is_401(github: StandIn, token: str) -> None:
    with pytest.raises(RuntimeError, match="Authentication failed"):
        git(github, "ls-remote", github.url(REPO), token=token)
    assert {request.status for request in github.log} == {401}


def test_git_does_not_find_hidden_and_unknown_repositories(github: StandIn) -> None:
    github.hidden.add(REPO)
    for name in (REPO, "acme/none"):
        with pytest.raises(RuntimeError, match="Repository not found"):
            git(github, "ls-remote", github.url(name))


def test_a_token_that_may_not_push_may_still_clone(github: StandIn, clone: Path) -> None:
    github.push_denied.add(REPO)
    commit(github, clone)
    with pytest.raises(RuntimeError, match="403"):
        git(github, "push", "origin", "HEAD:refs/heads/work", cwd=clone)
    assert git(github, "ls-remote", github.url(REPO), "refs/heads/*").endswith("refs/heads/main")


def test_an_atomic_push_with_a_lost_lease_changes_nothing(github: StandIn, clone: Path) -> None:
    sha = commit(github, clone)
    claim = "refs/agent-runner/claims/acme/dispatch/1"
    git(github, "push", f"--force-with-lease={claim}:", "origin", f"{sha}:{claim}", cwd=clone)
    assert github.git(REPO, "rev-parse", claim) == sha
    lease = f"--force-with-lease={claim}:"
    refs = [f"{sha}:refs/heads/work", f"{sha}~1:{claim}"]
    with pytest.raises(RuntimeError, match="stale info"):
        git(github, "push", "--atomic", lease, "origin", *refs, cwd=clone)
    assert "work" not in github.heads(github.repository(REPO))


def test_of_many_who_push_one_claim_one_wins(github: StandIn, clone: Path) -> None:
    sha = commit(github, clone)
    won: list[str] = []

    def race(number: int) -> None:
        tip = git(github, "commit-tree", f"{sha}^{{tree}}", "-m", str(number), cwd=clone)
        push = ("push", "--force-with-lease=refs/claims/1:", "origin", f"{tip}:refs/claims/1")
        with contextlib.suppress(RuntimeError):
            git(github, *push, cwd=clone)
            won.append(tip)

    racers = [threading.Thread(target=race, args=(number,)) for number in range(8)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert won == [github.git(REPO, "rev-parse", "refs/claims/1")]


def test_the_refs_of_pull_requests_are_githubs_own(github: StandIn, clone: Path) -> None:
    with pytest.raises(RuntimeError, match="hidden ref"):
        git(github, "push", "origin", "HEAD:refs/pull/1/head", cwd=clone)


def test_a_large_push_comes_in_chunks_and_a_partial_clone_works(github: StandIn, clone: Path, tmp_path: Path) -> None:
    noise = "".join(f"{hash((number, 'x'))}\n" for number in range(200_000))
    sha = commit(github, clone, "big.txt", noise)
    git(github, "push", "--quiet", "origin", "HEAD:main", cwd=clone)
    assert github.git(REPO, "rev-parse", "main") == sha
    assert any("chunked" in request.headers.get("transfer-encoding", "") for request in github.log)
    options = ("--quiet", "--bare", "--filter=blob:none")
    git(github, "clone", *options, github.url(REPO), str(tmp_path / "partial"))
    missing = git(github, "rev-list", "--objects", "--all", "--missing=print", cwd=tmp_path / "partial")
    assert "?" in missing


def test_a_gzipped_git_request_is_understood(github: StandIn) -> None:
    sha = github.git(REPO, "rev-parse", "main")
    lines = f"0032want {sha}\n00000009done\n".encode()
    connection = http.client.HTTPConnection("127.0.0.1", github.port)
    headers = {
        "Authorization": "Basic " + base64.b64encode(f"x:{TOKEN}".encode()).decode(),
        "Content-Type": "application/x-git-upload-pack-request",
        "Content-Encoding": "gzip",
    }
    connection.request("POST", f"/{REPO}.git/git-upload-pack", gzip.compress(lines), headers)
    answer = connection.getresponse()
    assert answer.status == 200
    assert b"PACK" in answer.read()
    connection.close()


def test_a_lost_answer_to_a_push_leaves_the_push_done(github: StandIn, clone: Path) -> None:
    sha = commit(github, clone)
    github.faults.append(Fault(kind="git", method="POST", drop="after"))
    with pytest.raises(RuntimeError):
        git(github, "push", "origin", "HEAD:refs/heads/work", cwd=clone)
    assert github.git(REPO, "rev-parse", "work") == sha


def test_a_push_is_done_before_its_answer_is_sent(github: StandIn, clone: Path) -> None:
    sha, seen = commit(github, clone), []
    look = Fault(kind="git", method="POST", after_effect=lambda: seen.append(github.git(REPO, "rev-parse", "work")))
    github.faults.append(look)
    git(github, "push", "origin", "HEAD:refs/heads/work", cwd=clone)
    assert seen == [sha]


def test_a_refused_push_leaves_the_connection_usable(github: StandIn) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", github.port)
    connection.request("POST", f"/{REPO}.git/git-receive-pack", b"x" * 100_000)
    answer = connection.getresponse()
    assert answer.status == 401
    assert answer.read()
    connection.request("GET", "/api/v3/user", headers=headers_of())
    assert connection.getresponse().read()
    connection.close()
    assert [request.status for request in github.log] == [401, 200]


def test_a_fault_can_refuse_git(github: StandIn) -> None:
    github.faults.append(Fault(kind="git", status=503))
    with pytest.raises(RuntimeError, match="503"):
        git(github, "ls-remote", github.url(REPO))


def test_git_finds_a_renamed_repository_under_both_names(github: StandIn) -> None:
    github.repository(REPO).moved_to = "acme/new"
    for name in (REPO, "acme/new"):
        assert "refs/heads/main" in git(github, "ls-remote", github.url(name))


def test_a_pull_request_follows_its_branch_and_closes_without_it(github: StandIn, clone: Path) -> None:
    commit(github, clone)
    git(github, "push", "--quiet", "origin", "HEAD:refs/heads/work", cwd=clone)
    post(github, PULLS, PULL)
    sha = commit(github, clone, content="newer")
    git(github, "push", "--quiet", "origin", "HEAD:refs/heads/work", cwd=clone)
    assert get(github, f"{PULLS}/1").json["head"]["sha"] == sha
    git(github, "push", "--quiet", "origin", ":refs/heads/work", cwd=clone)
    assert get(github, f"{PULLS}/1").json["state"] == "closed"


def test_this_machines_git_settings_do_not_reach_it(
    github: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tmp_path / "gitconfig"
    settings.write_text("[http]\n    receivepack = false\n[user]\n    name = Somebody\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(settings))
    github.commit(REPO, {"a": "a"})
    assert github.git(REPO, "log", "-1", "--format=%an") == "octocat"
    assert github.git(REPO, "config", "http.receivepack") == "true"


# The check against GitHub's description.


def recorded(method: str, path: str, body: Any = None, **query: str) -> RecordedRequest:
    return RecordedRequest("rest", method, path, query, {}, body)


@pytest.mark.parametrize(
    "request_",
    [
        recorded("POST", f"{ISSUES}/1/comments", {"body": 5}),
        recorded("POST", f"{ISSUES}/1/comments", {}),
        recorded("POST", f"{ISSUES}/1/comments"),
        recorded("POST", f"{ISSUES}/1/comments", {"body": "x", "text": "y"}),
        recorded("POST", f"{ISSUES}/1/labels", {"labels": []}),
        recorded("POST", PULLS, {"title": "x", "head": "y"}),
        recorded("PATCH", f"{PULLS}/1", {"state": "merged"}),
        recorded("PATCH", f"{PULLS}/1", {"draft": False}),
        recorded("POST", PULLS, {"title": "x", "head": "y", "base": "z", "draft": "yes"}),
        recorded("POST", f"{PULLS}/1/requested_reviewers", {"reviewers": "octocat"}),
        recorded("POST", f"{PULLS}/1/requested_reviewers", {"teams": ["core"]}),
        recorded("GET", ISSUES, since="yesterday"),
        recorded("GET", ISSUES, state="opened"),
        recorded("GET", ISSUES, per_page="many"),
        recorded("GET", ISSUES, label="x"),
        recorded("GET", f"{ISSUES}/one"),
        recorded("GET", f"{ISSUES}/1", {"body": "x"}),
        recorded("GET", "/repositories/7/milestones"),
        recorded("PUT", "/user"),
        recorded("GET", f"/repos/{REPO}/collaborators/octocat/permissions"),
        recorded("POST", "/app/installations/7/access_tokens", {"permissions": {"issues": "admin"}}),
    ],
    ids=lambda request: f"{request.method} {request.path} {request.query} {request.json}",
)
def test_a_request_that_github_does_not_describe_is_refused(request_: RecordedRequest) -> None:
    with pytest.raises(AssertionError, match=request_.path):
        check_request(request_)


@pytest.mark.parametrize(
    "request_",
    [
        recorded("DELETE", f"{ISSUES}/1/labels/state%2Fa%20b"),
        recorded("GET", f"/repos/{REPO}/labels/a%2Fb"),
        recorded("GET", "/repositories/7/issues", page="2", since="2025-10-09T08:54:20Z"),
        recorded("POST", "/repositories/7/issues/1/comments", {"body": "x"}),
        recorded("PATCH", f"/repos/{REPO}/labels/bug", {"new_name": "b", "description": "c"}),
        recorded("GET", PULLS, head="acme:agent-task-1", state="all"),
        recorded("POST", f"{PULLS}/1/requested_reviewers", {"reviewers": ["octocat"], "team_reviewers": ["core"]}),
        recorded("GET", "/user"),
        recorded("GET", f"/repos/{REPO}/collaborators/octocat/permission"),
        recorded("GET", "/repositories/7/installation"),
        recorded("POST", "/app/installations/7/access_tokens"),
    ],
    ids=lambda request: f"{request.method} {request.path}",
)
def test_a_request_that_github_describes_passes(request_: RecordedRequest) -> None:
    check_request(request_)


def test_the_refusal_names_the_field() -> None:
    with pytest.raises(AssertionError, match="colour"):
        check_request(recorded("POST", f"/repos/{REPO}/labels", {"name": "x", "colour": "y"}))
