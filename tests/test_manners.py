"""How a pull request looks: draft, labels, reviewers, title, branch, and who is its co-author."""

from __future__ import annotations

import re

import pytest
from conftest import DISPATCH, PATCH, TARGET, FastClock, World
from standin import Fault
from test_task import dispatch_body

from runner import is_branch_name


def test_a_pull_request_may_be_a_draft(world: World) -> None:
    world.open()
    world.run_once(AGENT_PR_DRAFT="yes")
    assert world.pull().draft is True
    assert "Not finished" not in world.pull_body()
    assert world.labels() == ["agent-done", "copilot-agent"]


def test_a_draft_stays_one_in_a_second_run(world: World) -> None:
    world.open()
    world.run_once(AGENT_PR_DRAFT="yes")
    world.github.remove_label(DISPATCH, 1, "agent-done")
    world.run_once(AGENT_PR_DRAFT="yes")
    assert world.pull().draft is True
    assert not [request for request in world.requests("POST", "graphql") if "mutation" in request.json["query"]]


def test_where_there_are_no_drafts_the_task_is_done_all_the_same(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.github.repository(TARGET).has_drafts = False
    world.open()
    world.run_once(AGENT_PR_DRAFT="yes")
    assert world.pull().draft is False
    assert "no draft: GitHub answered 422" in caplog.text
    assert world.labels() == ["agent-done", "copilot-agent"]


def test_a_pull_request_gets_labels_and_reviewers(world: World) -> None:
    world.github.permissions |= {"alice": "write", "bob": "read"}
    world.github.repository(TARGET).teams.add("core")
    world.open()
    world.run_once(AGENT_PR_LABELS="agent, needs review", AGENT_PR_REVIEWERS="alice,acme/core,bob")
    pull = world.pull()
    assert pull.labels == ["agent", "needs review"]
    assert (sorted(pull.reviewers), pull.team_reviewers) == (["alice", "bob"], ["core"])
    assert "none:" not in world.last_comment()


def test_what_is_not_wanted_is_not_asked_for(world: World) -> None:
    world.open()
    world.run_once()
    assert not world.requests("POST", "requested_reviewers")
    assert not world.requests("POST", f"/repos/{TARGET}/issues")


def test_reviewers_whom_github_refuses_are_told_and_labels_given(world: World) -> None:
    world.open()
    world.run_once(AGENT_PR_LABELS="agent", AGENT_PR_REVIEWERS="stranger")
    assert world.pull().labels == ["agent"]
    assert world.labels() == ["agent-done", "copilot-agent"]
    assert re.search(r"\| Reviewers \| none: `GitHub answered 422 .*may only be requested", world.last_comment())


def test_labels_that_github_refuses_are_told_and_reviewers_asked(world: World) -> None:
    world.github.permissions["alice"] = "write"
    world.github.faults.append(Fault("POST", f"/repos/{TARGET}/issues/.*/labels", status=403))
    world.open()
    world.run_once(AGENT_PR_LABELS="agent", AGENT_PR_REVIEWERS="alice")
    assert world.pull().reviewers == ["alice"]
    assert "| Labels | none: `GitHub answered 403" in world.last_comment()


def test_labels_wait_for_a_github_that_is_away(world: World) -> None:
    world.github.faults.append(Fault("POST", f"/repos/{TARGET}/issues/.*/labels", status=502, times=3))
    world.open()
    world.runner(FastClock(), AGENT_PR_LABELS="agent").run_once()
    assert world.pull().labels == ["agent"]


def test_labels_and_reviewers_are_given_after_a_crash_too(world: World) -> None:
    world.open(dispatch_body())
    world.run_once()
    world.issue().comments.pop()
    world.github.remove_label(DISPATCH, 1, "agent-done")
    world.run_once(AGENT_PR_LABELS="agent")
    assert world.pull().labels == ["agent"]
    assert world.labels() == ["agent-done", "copilot-agent"]


def test_title_and_branch_follow_their_templates(world: World) -> None:
    world.open(dispatch_body(task_id="a/b"), title="Make more widgets")
    world.run_once(AGENT_PR_TITLE="feat: {title} (#{issue}, {task_id})", AGENT_BRANCH="agents/{issue}/{task_id}")
    pull = world.pull()
    assert re.fullmatch(r"agents/1/x[0-9a-f]{16}", pull.head)
    assert pull.title == f"feat: Make more widgets (#1, {pull.head.rpartition('/')[2]})"
    assert world.github.git(TARGET, "log", "-1", "--format=%s", pull.head) == pull.title


def test_a_branch_of_another_template_runs_again_and_crashes_alike(world: World) -> None:
    world.open(dispatch_body())
    world.run_once(AGENT_BRANCH="agents/{task_id}")
    world.github.remove_label(DISPATCH, 1, "agent-done")
    world.run_once(AGENT_BRANCH="agents/{task_id}")
    assert world.labels() == ["agent-done", "copilot-agent"]
    assert world.pull().head.startswith("agents/")


def test_who_asked_is_co_author(world: World) -> None:
    world.open(PATCH)
    world.run_once()
    (trailer,) = re.findall(
        r"Co-authored-by: (.+)", world.github.git(TARGET, "log", "-1", "--format=%B", world.pull().head)
    )
    assert re.fullmatch(r"octocat <\d+\+octocat@users\.noreply\.127\.0\.0\.1>", trailer)


def test_an_app_that_asked_is_co_author_by_its_full_name(world: World) -> None:
    world.open(PATCH, author="helper[bot]", association="NONE")
    world.run_once(AGENT_ALLOWED_AUTHORS="helper[bot]")
    log = world.github.git(TARGET, "log", "-1", "--format=%(trailers:key=Co-authored-by,valueonly)", world.pull().head)
    assert re.fullmatch(r"helper\[bot\] <\d+\+helper\[bot\]@users\.noreply\.127\.0\.0\.1>", log.strip())


@pytest.mark.parametrize(
    ("template", "task_id"),
    [("a.{task_id}", ".b"), ("{task_id}", "-x"), ("{task_id}", "HEAD"), ("x" * 150 + "{task_id}", "b" * 64)],
)
def test_an_id_that_makes_no_branch_with_its_template_gets_a_stand_in(
    world: World, template: str, task_id: str
) -> None:
    world.open(dispatch_body(task_id=task_id))
    world.runner(FastClock(), AGENT_BRANCH=template).run_once()
    assert world.labels() == ["agent-done", "copilot-agent"]
    assert is_branch_name(world.pull().head)
    assert world.pull().head.startswith(template.removesuffix("{task_id}"))


def test_a_template_that_leaves_no_room_for_ids_is_told_before_the_agent_runs(world: World) -> None:
    world.open(dispatch_body())
    world.runner(FastClock(), AGENT_BRANCH="x" * 195 + "{task_id}").run_once()
    assert "is not a valid branch name" in world.last_comment()


def test_secrets_are_in_no_commit_message(world: World) -> None:
    world.open(PATCH, title="Use s3cret-s3cret")
    world.run_once(AGENT_ENV="GIVEN", GIVEN="s3cret-s3cret")
    assert "s3cret-s3cret" not in world.github.git(TARGET, "log", "-1", "--format=%B", world.pull().head)


def test_another_refusal_of_a_draft_is_no_reason_to_do_without_one(world: World) -> None:
    body = {"message": "Validation Failed", "errors": [{"message": "Something else"}]}
    world.github.faults.append(Fault("POST", f"/repos/{TARGET}/pulls", status=422, body=body, times=1))
    world.open()
    world.run_once(AGENT_PR_DRAFT="yes")
    assert world.labels() == ["agent-failed", "copilot-agent"]
    assert not world.github.pulls(TARGET)


def test_a_pull_request_of_this_run_is_not_written_again(world: World) -> None:
    """The answer to its creation was lost: what people have changed in it since stays."""
    world.github.faults.append(Fault("POST", f"/repos/{TARGET}/pulls", drop="after"))
    world.open()
    world.runner(FastClock()).run_once()
    assert world.labels() == ["agent-done", "copilot-agent"]
    assert not world.requests("PATCH", f"/repos/{TARGET}/pulls")
