"""The audit log: a line for each write, push, agent and refusal."""

from __future__ import annotations

import errno
import json
import os
import resource
import stat
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from conftest import DISPATCH, PATCH, TARGET, FastClock, World, make_config
from standin import Fault
from test_cli import finish
from test_task import agent

from runner import Git, RefMoved, SignIn, audit


def lines_of(file: Path) -> list[dict[str, Any]]:
    """The events of an audit log."""
    return [json.loads(line) for line in file.read_text().splitlines() if line]


def told(world: World, event: str, **env: str) -> list[dict[str, Any]]:
    """The lines of one kind that a run of the queue brings."""
    file = world.folder / "audit.jsonl"
    world.runner(FastClock(), AGENT_AUDIT_LOG=str(file), **env).run_once()
    return [line for line in lines_of(file) if line["event"] == event]


def test_a_task_can_be_followed_from_line_to_line(world: World) -> None:
    world.open("Do something.")
    file = world.folder / "audit.jsonl"
    world.run_once(AGENT_AUDIT_LOG=str(file), AGENT_COMMAND=agent(world.home, 'open("new", "w")'))
    lines = lines_of(file)
    assert all(list(line)[:2] == ["time", "event"] for line in lines)
    assert all(len(line["time"]) == len("2026-01-05T09:00:00Z") and line["time"].endswith("Z") for line in lines)
    claim, about = f"refs/agent-runner/claims/{DISPATCH}/1", {"dispatch": DISPATCH, "issue": 1}
    assert all(about.items() <= line.items() for line in lines)
    phases = dict.fromkeys((line.get("task", ""), line.get("attempt", 0), line["phase"]) for line in lines)
    attempts = [("issue-1", 1, phase) for phase in ("checking", "working", "publishing", "reporting")]
    assert [*phases] == [("", 0, "claiming"), *attempts]
    made = world.github.git(TARGET, "rev-parse", world.pull().head)
    shown = []
    for line in lines:
        what = line.get("method", ""), line.get("path", "").removeprefix("/api/v3"), line.get("status", "")
        shown.append(" ".join(map(str, (line["event"], *filter(None, what), *line.get("refs", ())))))
    branch = f"refs/heads/{world.pull().head}"
    assert shown == [
        f"push {claim}",
        f"write POST /repos/{DISPATCH}/issues/1/labels 200",
        f"write PATCH /repos/{DISPATCH}/labels/agent-processing 200",
        f"write POST /repos/{DISPATCH}/issues/1/comments 201",
        "agent started",
        "agent ended",
        f"push {claim} {branch}",
        f"write POST /repos/{TARGET}/pulls 201",
        f"write POST /repos/{DISPATCH}/issues/1/comments 201",
        f"write POST /repos/{DISPATCH}/issues/1/labels 200",
        f"write PATCH /repos/{DISPATCH}/labels/agent-done 200",
        f"write DELETE /repos/{DISPATCH}/issues/1/labels/agent-processing 200",
        f"push {claim}",
    ]
    started, ended = (line for line in lines if line["event"].startswith("agent"))
    assert started == {"time": started["time"], "event": "agent started"} | {
        **about,
        "task": "issue-1",
        "attempt": 1,
        "phase": "working",
        "repo": TARGET,
        "program": Path(sys.executable).name,
    }
    assert ended.pop("seconds") >= 0
    assert ended == started | {"time": ended["time"], "event": "agent ended", "outcome": "status 0"}
    first, publication, last = (line for line in lines if line["event"] == "push")
    assert (first["repo"], first["outcome"], first["refs"][claim][0]) == (TARGET, "done", "")
    assert publication["refs"] == {claim: [first["refs"][claim][1], last["refs"][claim][0]], branch: ["", made]}
    assert last["refs"][claim][1] == ""


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        ("import sys; sys.exit(3)", "status 3"),
        ("import os; os.kill(os.getpid(), 9)", "status -9"),
        ("import time; time.sleep(600)", "timeout"),
    ],
    ids=["status", "signal", "time"],
)
def test_how_an_agent_ended_is_told(world: World, code: str, outcome: str) -> None:
    world.open("Do something.")
    (ended,) = told(world, "agent ended", AGENT_COMMAND=agent(world.home, code), AGENT_TASK_TIMEOUT="1")
    assert ended["outcome"] == outcome


def test_an_agent_that_is_stopped_is_told(world: World) -> None:
    world.open("Do something.")
    file, runner = world.folder / "audit.jsonl", world.runner
    code = f"import os, time; open('{world.home}/started', 'w'); time.sleep(600)"
    one = runner(AGENT_COMMAND=agent(world.home, code), AGENT_AUDIT_LOG=str(file))
    thread = threading.Thread(target=one.run_once)
    thread.start()
    while not (world.home / "started").exists():
        threading.Event().wait(0.02)
    one.request_stop(now=True)
    thread.join()
    assert [line["outcome"] for line in lines_of(file) if line["event"] == "agent ended"] == ["Stopping"]


def test_writes_that_fail_are_told(world: World) -> None:
    world.open(PATCH)
    comments = Fault(method="POST", path=".*/comments", drop="before", times=1)
    world.github.faults += [comments, Fault(method="POST", path=".*/pulls", status=422)]
    writes = told(world, "write")
    statuses = {path: [w["status"] for w in writes if w["path"].endswith(path)] for path in ("comments", "pulls")}
    assert statuses == {"comments": [0, 201, 201], "pulls": [422]}


def test_a_push_that_fails_is_told(world: World) -> None:
    world.github.push_denied.add(TARGET)
    world.open(PATCH)
    assert all("the token may not" in push["outcome"] for push in told(world, "push"))


def test_a_push_that_came_too_late_is_told(world: World, tmp_path: Path) -> None:
    git = Git(SignIn(world.config(AGENT_AUDIT_LOG=str(tmp_path / "audit"))))
    other = world.github.commit(TARGET, {"other.txt": "x"}, branch="other")
    with pytest.raises(RefMoved):
        git.push(TARGET, {"refs/heads/main": ("", other)}, world.github.repository(TARGET).path)
    (line,) = lines_of(tmp_path / "audit")
    assert line["outcome"] == f"{TARGET} has got refs/heads/main from somebody else meanwhile"
    assert line["refs"] == {"refs/heads/main": ["", other]}


def test_refusals_are_told_with_who_asked(world: World) -> None:
    world.open(PATCH, author="mallory", association="NONE")
    world.open("Do something.")
    code = 'import os; os.symlink("/etc/passwd", "link")'
    stranger, change = told(world, "refused", AGENT_COMMAND=agent(world.home, code))
    assert (stranger["issue"], stranger["author"]) == (1, "mallory")
    assert stranger["reason"] == "`mallory` may not give work to this runner."
    assert (change["issue"], change["author"]) == (2, "octocat")
    assert change["reason"] == "`link` is a link that leads out of the repository."


def test_what_merely_fails_is_no_refusal(world: World) -> None:
    world.open("No patch.")
    assert told(world, "refused") == []


def test_secrets_are_masked(tmp_path: Path) -> None:
    secrets = {"GITHUB_TOKEN": "ghp_0123456789", "KEY": 'a "quoted" \\ kéy', "AGENT_ENV": "KEY"}
    config = make_config({**secrets, "AGENT_AUDIT_LOG": str(tmp_path / "audit")})
    audit(config, "test", text=f"{config.token} {secrets['KEY']}", refs={f"refs/{config.token}": ["", ""]})
    (line,) = lines_of(tmp_path / "audit")
    assert (line["text"], line["refs"]) == ("*** ***", {"refs/***": ["", ""]})


def test_a_new_file_is_its_owners_alone_and_an_old_one_is_added_to(tmp_path: Path) -> None:
    file = tmp_path / "audit"
    for _ in range(2):
        audit(make_config({"AGENT_AUDIT_LOG": str(file)}), "test")
    assert len(lines_of(file)) == 2
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_file_that_is_moved_away_is_begun_anew(tmp_path: Path) -> None:
    file = tmp_path / "audit"
    config = make_config({"AGENT_AUDIT_LOG": str(file)})
    audit(config, "first")
    file.rename(tmp_path / "audit.1")
    audit(config, "second")
    assert [line["event"] for line in (*lines_of(tmp_path / "audit.1"), *lines_of(file))] == ["first", "second"]


def test_many_threads_write_whole_lines(tmp_path: Path) -> None:
    config = make_config({"AGENT_AUDIT_LOG": str(tmp_path / "audit")})

    def write() -> None:
        for _ in range(50):
            audit(config, "test", text="x" * 5000)

    threads = [threading.Thread(target=write) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(lines_of(tmp_path / "audit")) == 400


def test_a_full_disk_is_told_once_and_costs_no_task(world: World, caplog: pytest.LogCaptureFixture) -> None:
    file = world.folder / "audit"
    world.open(PATCH)
    runner = world.runner(AGENT_AUDIT_LOG=str(file))
    file.unlink()
    file.symlink_to("/dev/full")
    runner.run_once()
    assert runner.outcomes == {"done": 1}
    assert caplog.text.count(f"AGENT_AUDIT_LOG cannot be written to: {os.strerror(errno.ENOSPC)}") == 1
    lost = runner.config.unaudited.total()
    file.unlink()
    audit(runner.config, "test")
    assert f"AGENT_AUDIT_LOG can be written to again; it lacks {lost} events" in caplog.text
    assert [line["event"] for line in lines_of(file)] == ["test"]
    file.unlink()
    file.symlink_to("/dev/full")
    audit(runner.config, "test")
    assert caplog.text.count("AGENT_AUDIT_LOG cannot be written to") == 2


def test_a_line_that_was_cut_short_spoils_no_other(tmp_path: Path) -> None:
    config = make_config({"AGENT_AUDIT_LOG": str(tmp_path / "audit")})
    audit(config, "first")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "audit").stat().st_size + 10, hard))
    try:
        audit(config, "second")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    audit(config, "third")
    first, cut, third = (tmp_path / "audit").read_text().splitlines()
    assert (json.loads(first)["event"], len(cut), json.loads(third)["event"]) == ("first", 10, "third")


@pytest.mark.parametrize("arguments", [[], ["--once"]], ids=str)
def test_a_place_that_cannot_be_written_to_stops_the_start(world: World, arguments: list[str]) -> None:
    code, _, err = finish(world.start(*arguments, AGENT_AUDIT_LOG="/nonexistent/audit.jsonl"))
    assert code == 2
    assert "  - AGENT_AUDIT_LOG names the file '/nonexistent/audit.jsonl', which cannot be written to: No such" in err


def test_without_the_variable_nothing_is_written(world: World) -> None:
    world.open(PATCH)
    before = set(world.folder.iterdir())
    world.run_once()
    assert set(world.folder.iterdir()) - before == {world.folder / "state"}
