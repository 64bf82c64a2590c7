"""The loop: what is admitted when, what ends it, and that nothing stops it but that."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
from conftest import DISPATCH, PATCH, TARGET, Daemon, FakeClock, FastClock, World, wait_until
from standin import Fault

from runner import Runner


def patch(number: int) -> str:
    """An instruction with a task id of its own."""
    return f'{PATCH}\n<!-- agent_task_metadata {{"task_id": "t{number}"}} -->'


def sleeper(world: World, seconds: float = 600) -> str:
    """An agent that says that it runs, and goes on doing so; a shell command."""
    return f'touch "{world.home}/started-$AGENT_TASK_ID"; sleep {seconds}; echo x > new.txt'


def daemon_of(world: World, **env: str) -> Daemon:
    return Daemon(world.runner(None, AGENT_POLL_INTERVAL="1", **env))


@pytest.mark.race
def test_three_hundred_issues_are_each_done_once_while_the_list_shifts(world: World) -> None:
    code = 'import os\nopen(os.environ["AGENT_TASK_ID"], "w")\n'
    program = world.home / "agent.py"
    program.write_text(code)
    idle = [world.open(labels=["copilot-agent", "agent-done"]) for _ in range(20)]
    numbers = [world.open(patch(n), title=f"Task {n}") for n in range(1, 301)]
    gone = iter(idle)
    world.github.faults.append(
        Fault(path=".*/issues", times=15, action=lambda: world.github.close_issue(DISPATCH, next(gone)))
    )
    with daemon_of(world, AGENT_MAX_CONCURRENT="4") as daemon:
        wait_until(lambda: daemon.runner.outcomes["done"] >= 300, 180)
        daemon.end(seconds=60)
    assert daemon.runner.outcomes == {"done": 300}
    heads = [pull.head for pull in world.github.pulls(TARGET)]
    assert len(heads) == len(set(heads)) == 300
    for number in numbers:
        assert world.labels(number) == ["agent-done", "copilot-agent"]
        assert len(world.issue(number).comments) == 2


def test_the_oldest_issues_come_first_and_only_so_many_at_once(world: World) -> None:
    for number in range(1, 6):
        world.open(patch(number))
    with daemon_of(world, AGENT_COMMAND=sleeper(world), AGENT_SHELL="1", AGENT_MAX_CONCURRENT="2"):
        wait_until(lambda: len(list(world.home.glob("started-*"))) == 2)
        assert world.labels(1) == world.labels(2) == ["agent-processing", "copilot-agent"]
        assert world.labels(3) == ["copilot-agent"]
    assert sorted(p.name for p in world.home.glob("started-*")) == ["started-t1", "started-t2"]


def test_a_free_worker_takes_the_next_issue_without_another_poll(world: World) -> None:
    for number in range(3):
        world.open(patch(number))
    with Daemon(world.runner(AGENT_POLL_INTERVAL="3600")) as daemon:
        wait_until(lambda: daemon.runner.outcomes["done"] == 3)
        daemon.end()
    assert len(world.requests("GET", "/issues")) == 1 + 3  # the list, and each issue


def test_a_request_to_poll_is_followed_at_once(world: World) -> None:
    with Daemon(world.runner(AGENT_POLL_INTERVAL="3600")) as daemon:
        wait_until(lambda: world.requests())
        world.open(PATCH)
        daemon.runner.request_poll()
        wait_until(lambda: daemon.runner.outcomes["done"] == 1)
        daemon.end()


def test_stopping_lets_work_finish_and_takes_no_more(world: World) -> None:
    for number in (1, 2):
        world.open(patch(number))
    with daemon_of(world, AGENT_COMMAND=sleeper(world, 1), AGENT_SHELL="1") as daemon:
        wait_until((world.home / "started-t1").exists)
        daemon.end()
    assert daemon.runner.outcomes == {"done": 1}
    assert world.labels(1) == ["agent-done", "copilot-agent"]
    assert world.labels(2) == ["copilot-agent"]


@pytest.mark.parametrize(("drain", "again"), [("0", False), ("600", True)])
def test_work_that_does_not_finish_in_time_is_ended_and_queued_again(world: World, drain: str, again: bool) -> None:
    world.open(patch(1))
    env = {"AGENT_DRAIN_SECONDS": drain, "AGENT_SHELL": "1", "AGENT_COMMAND": sleeper(world)}
    with daemon_of(world, **env) as daemon:
        wait_until((world.home / "started-t1").exists)
        daemon.runner.request_stop()
        daemon.end(now=again)
    assert daemon.runner.outcomes == {"stopped": 1}
    assert world.labels(1) == ["copilot-agent"]
    assert "The runner was stopped" in world.last_comment(1)
    assert world.github.pulls(TARGET) == []
    world.run_once()
    assert world.labels(1) == ["agent-done", "copilot-agent"]


def test_stopping_while_github_is_away_ends_soon(world: World) -> None:
    world.open(patch(1))
    with daemon_of(world, AGENT_COMMAND=sleeper(world, 1), AGENT_SHELL="1") as daemon:
        wait_until((world.home / "started-t1").exists)
        world.github.stop()
        daemon.end()
    assert daemon.runner.outcomes == {"stopped": 1}


@pytest.mark.parametrize("fault", [{"status": 502}, {"drop": "before"}])
def test_one_fault_while_stopping_leaves_no_label_behind(world: World, fault: dict[str, str]) -> None:
    world.open(patch(1))
    env = {"AGENT_DRAIN_SECONDS": "0", "AGENT_SHELL": "1", "AGENT_COMMAND": sleeper(world)}
    with daemon_of(world, **env) as daemon:
        wait_until((world.home / "started-t1").exists)
        world.github.faults += [Fault(method=m, **fault) for m in ("PATCH", "DELETE")]  # type: ignore[arg-type]
        daemon.end()
    assert world.labels(1) == ["copilot-agent"]


def test_being_told_to_stop_now_ends_git_too(world: World) -> None:
    world.open(patch(1))
    slow = Fault(
        kind="git", where=lambda r: "git-receive-pack" in (r.query.get("service"), r.path), delay=30, times=None
    )
    world.github.faults.append(slow)
    with daemon_of(world) as daemon:
        wait_until(lambda: slow.seen)
        daemon.end(now=True, seconds=20)
    assert daemon.runner.outcomes == {"stopped": 1}
    assert world.github.pulls(TARGET) == []


def test_a_failed_poll_is_repeated_less_and_less_soon(world: World) -> None:
    clock = FakeClock()
    runner = world.runner(clock)
    world.github.faults.append(Fault(path=".*/issues", status=502, times=8))
    times = []
    for _ in range(9):
        runner.tick()
        times.append(runner.next_poll - clock.at)
        clock.at = runner.next_poll
    assert times == [2, 4, 8, 16, 32, 60, 60, 60, 60]
    assert runner._polls_failed == 0


def test_a_poll_that_is_refused_is_told_with_what_to_do(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.runner(FakeClock(), GITHUB_TOKEN="ghp_wrong").tick()
    assert "answered 401" in caplog.text
    assert "check GITHUB_TOKEN" in caplog.text


def test_a_fault_in_a_tick_does_not_end_the_daemon(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, calls = Runner._admit, []

    def faulty(self: Runner) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise ZeroDivisionError
        real(self)

    monkeypatch.setattr(Runner, "_admit", faulty)
    world.open(PATCH)
    with Daemon(world.runner(FastClock(), AGENT_POLL_INTERVAL="1")) as daemon:
        wait_until(lambda: daemon.runner.outcomes["done"] == 1)
        daemon.end()
    assert "a fault of the runner; it goes on" in caplog.text


def test_a_fault_in_a_worker_is_logged_and_the_task_left(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("runner.Attempt._read_again", lambda _: 1 / 0)
    world.open(PATCH)
    runner = world.run_once()
    assert runner.outcomes == {"failed": 1}
    assert "a fault of the runner" in caplog.text


def test_an_issue_that_cannot_be_read_is_tried_again_with_the_next_poll(world: World) -> None:
    world.open(PATCH)
    runner = world.runner(FastClock())
    world.github.faults.append(Fault(path=".*/issues/1", status=500, times=None))
    runner.run_once()
    assert runner.outcomes == {"failed": 1}
    world.github.faults.clear()
    assert world.run_once().outcomes == {"done": 1}


def test_one_log_line_tells_each_step(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    world.open(patch(1))
    world.run_once()
    lines = [record.getMessage() for record in caplog.records]
    assert [re.sub(r"[0-9a-f]{40}|http\S+", "…", line) for line in lines] == [
        f"begun in {TARGET}",
        "made commit …",
        "done: …",
    ]


def test_nothing_of_the_token_is_written_anywhere_by_a_task(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    world.open(patch(1))
    world.open("No patch.")
    world.run_once()
    told = [c.body for n in (1, 2) for c in world.issue(n).comments] + [world.pull_body(), caplog.text]
    assert not [text for text in told if world.github.token in text]
    files = [path for path in Path(world.folder / "state").rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if world.github.token.encode() in path.read_bytes()]
