"""Several runners at one queue, holders that fall asleep or have a wrong clock, and work that is called off."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import threading
from collections.abc import Callable
from datetime import datetime

import pytest
from conftest import DISPATCH, TARGET, Daemon, World, wait_until
from standin import Fault
from test_cli import finish
from test_faults import Agent, about, assert_done_once, is_published
from test_task import alive

from runner import Clock, Runner

DAY = 86_400


def place_of(world: World, name: str) -> dict[str, str]:
    """What makes a runner one of its own."""
    return {"AGENT_RUNNER_ID": name, "AGENT_STATE_DIR": str(world.folder / name), "AGENT_POLL_INTERVAL": "1"}


# -- many ------------------------------------------------------------------------------------------


@pytest.mark.race
def test_two_hundred_issues_are_each_done_once_by_eight_runners(world: World) -> None:
    numbers = [world.open(about(number)) for number in range(1, 201)]
    agent = Agent(world.home)
    env = {**agent.env, "AGENT_LOG_LEVEL": "ERROR"}
    places = [place_of(world, f"runner-{index}") | {"AGENT_POLL_INTERVAL": "5"} for index in range(8)]
    processes = [world.start(**place, **env) for place in places]
    try:
        world.wait_for_done(numbers, 400)
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
    assert [finish(process)[0] for process in processes] == [0] * 8
    expected = {f"t{number}" for number in numbers}
    tasks = [task for task, _ in agent.runs()]
    assert len(tasks) == 200
    assert set(tasks) == expected
    heads = [pull.head for pull in world.github.pulls(TARGET)]
    assert len(heads) == 200
    assert set(heads) == {f"agent-task-{task}" for task in expected}
    for number in numbers:
        assert world.labels(number) == ["agent-done", "copilot-agent"]
        assert len(world.comments("start", number)) == len(world.comments("end", number)) == 1
    assert world.claims() == []


def test_two_runners_with_the_same_state_folder_do_each_issue_once(world: World) -> None:
    """As `docker compose up --scale` with one volume: the second one gets a name of its own by itself."""
    numbers = [world.open(about(number)) for number in range(1, 11)]
    agent = Agent(world.home)
    processes = [world.start(AGENT_POLL_INTERVAL="1", **agent.env) for _ in range(2)]
    try:
        world.wait_for_done(numbers, 120)
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
    assert [finish(process)[0] for process in processes] == [0, 0]
    assert sorted(task for task, _ in agent.runs()) == sorted(f"t{number}" for number in numbers)
    assert len(world.github.pulls(TARGET)) == 10
    assert world.claims() == []


# -- a holder that falls asleep --------------------------------------------------------------------


class Pair:
    """Runner `a` at work, and runner `b`, which takes over while `a` sleeps."""

    def __init__(self, world: World) -> None:
        self.world, self.number = world, world.open("Do something.")
        self.slow = Agent.waiting(world.home)
        (world.home / "b-agent").mkdir()
        self.quick = Agent(world.home / "b-agent")
        self.a = self._start("a", self.slow)
        self.slow.pid()
        self.a.send_signal(signal.SIGSTOP)
        self.b = self._start("b", self.quick)
        wait_until(lambda: "agent-done" in world.labels() and not world.claims())
        self.pull, self.comments = world.pull(), list(world.comments("end"))
        self.tip = world.github.git(TARGET, "rev-parse", self.pull.head)

    def _start(self, name: str, agent: Agent) -> subprocess.Popen[str]:
        return self.world.start(AGENT_LEASE="3", **place_of(self.world, name), **agent.env)

    def wake(self) -> str:
        """Lets `a` find out, and ends both; the log of `a`."""
        self.a.send_signal(signal.SIGCONT)
        self._wait_for_the_loss()
        for process in (self.a, self.b):
            process.send_signal(signal.SIGTERM)
        assert finish(self.b)[0] == 0
        code, _, err = finish(self.a)
        assert code == 0, err
        return self._log + err

    def _wait_for_the_loss(self) -> None:
        assert self.a.stderr
        self._log, timer = "", threading.Timer(60, self.a.kill)
        timer.start()
        for line in self.a.stderr:
            self._log += line
            if LOST.search(line):
                timer.cancel()
                return
        pytest.fail(f"`a` never said that it lost its claim:\n{self._log}")

    def assert_nothing_changed(self) -> None:
        assert_done_once(self.world)
        assert self.world.pull().number == self.pull.number
        assert self.world.github.git(TARGET, "rev-parse", self.pull.head) == self.tip
        assert self.world.comments("end") == self.comments
        assert len(self.quick.runs()) == len(self.slow.runs()) == 1


# With a reason: who has it now, or that it could not be renewed in time.
LOST = re.compile(r"issue=1\b.*claim.*(lost|taken|gone)|issue=1\b.*lost.*claim", re.IGNORECASE)
WHY = re.compile(r"\bb\b|renew|lease", re.IGNORECASE)


def test_a_holder_that_slept_too_long_ends_its_agent_and_publishes_nothing(world: World) -> None:
    pair = Pair(world)
    pid = pair.slow.pid()
    assert alive(pid)
    log = pair.wake()
    assert not alive(pid)
    pair.assert_nothing_changed()
    line = next(line for line in log.splitlines() if LOST.search(line))
    assert WHY.search(LOST.sub("", line) + line.partition("claim")[2])


def test_a_holder_whose_agent_finished_while_it_slept_publishes_nothing(world: World) -> None:
    pair = Pair(world)
    pid = pair.slow.pid()
    pair.slow.go()
    wait_until(lambda: not alive(pid))
    pair.wake()
    pair.assert_nothing_changed()


def test_a_claim_whose_holder_is_gone_for_good_is_taken_over_after_its_lease(world: World) -> None:
    world.open("Do something.")
    agent = Agent.waiting(world.home)
    process = world.start("--once", AGENT_LEASE="3", **place_of(world, "a"), **agent.env)
    agent.pid()
    process.kill()
    process.communicate()
    agent.go()
    with Daemon(world.runner(None, AGENT_LEASE="3", **place_of(world, "b"), **agent.env)) as daemon:
        wait_until(lambda: daemon.runner.outcomes["done"])
        daemon.end()
    assert_done_once(world)
    assert len(agent.runs()) == 2


# -- a holder whose clock is wrong -----------------------------------------------------------------


class WrongClock(Clock):
    """A clock whose time of day is off; its seconds are as long as anybody's."""

    def __init__(self, off: float) -> None:
        self._off = off

    def now(self) -> float:
        return Clock().now() + self._off  # type: ignore[attr-defined, no-any-return, unused-ignore]


def claim_times(world: World) -> list[float]:
    """What stands in the claim as its time, in seconds since 1970, if there is a claim."""
    texts = [text for text in (message_of(world, ref) for ref in world.claims()) if text]
    return [datetime.fromisoformat(json.loads(text)["time"]).timestamp() for text in texts]


def message_of(world: World, ref: str) -> str:
    try:
        return world.github.git(TARGET, "log", "-1", "--format=%B", ref)
    except RuntimeError:  # it is gone meanwhile
        return ""


@pytest.mark.parametrize("off", [-DAY, DAY])
def test_a_holder_whose_clock_is_a_day_off_keeps_its_claim(world: World, off: float) -> None:
    """The agent takes longer than a lease, and somebody watches the claim all the while."""
    world.open("Do something.")
    agent = Agent.waiting(world.home)
    holder = world.runner(WrongClock(off), AGENT_LEASE="6", **place_of(world, "holder"), **agent.env)
    with Daemon(holder) as first:
        agent.pid()
        (claimed,) = claim_times(world)
        assert abs(claimed - world.github.now() - off) < 3600
        with Daemon(world.runner(None, AGENT_LEASE="6", **place_of(world, "other"), **agent.env)) as second:
            # The holder renews every two seconds: five renewals are more than a lease and a half.
            wait_until(lambda: claim_times(world) > [claimed + 9])
            agent.go()
            wait_until(lambda: holder.outcomes)
            second.end()
        first.end()
    assert holder.outcomes == {"done": 1}
    assert second.runner.outcomes["done"] == 0
    assert_done_once(world)
    assert len(agent.runs()) == 1


# -- work that is called off -----------------------------------------------------------------------

CALLED_OFF: dict[str, tuple[Callable[[World], None], Callable[[World], None]]] = {
    "closed": (
        lambda world: world.github.close_issue(DISPATCH, 1),
        lambda world: world.github.reopen_issue(DISPATCH, 1),
    ),
    "unlabelled": (
        lambda world: world.github.remove_label(DISPATCH, 1, "copilot-agent"),
        lambda world: world.github.add_label(DISPATCH, 1, "copilot-agent"),
    ),
}


class CalledOff:
    """A task that is called off while its agent works: what is left of it."""

    def __init__(self, world: World, way: str) -> None:
        self.world, (call_off, self._wish_again) = world, CALLED_OFF[way]
        world.open("Do something.")
        self.agent = Agent.waiting(world.home)
        self.runner = world.runner(None, AGENT_LEASE="6", AGENT_POLL_INTERVAL="1", **self.agent.env)
        with Daemon(self.runner) as daemon:
            pid = self.agent.pid()
            call_off(world)
            wait_until(lambda: not alive(pid))
            wait_until(lambda: not world.claims())
            wait_until(lambda: self.runner.outcomes)
            daemon.end()

    def wish_again(self) -> Runner:
        """The issue is as it was before, and another runner looks at it."""
        self._wish_again(self.world)
        self.agent.go()
        return self.world.run_once(**self.agent.env)


@pytest.mark.parametrize("way", CALLED_OFF)
def test_an_issue_that_is_called_off_ends_its_agent_and_publishes_nothing(world: World, way: str) -> None:
    called_off = CalledOff(world, way)
    assert called_off.runner.outcomes["done"] == called_off.runner.outcomes["failed"] == 0
    assert not is_published(world)
    assert world.github.pulls(TARGET) == []
    assert not {"agent-processing", "agent-done", "agent-failed"} & set(world.labels())
    assert world.comments("end") == []
    (start,) = world.comments("start")
    assert re.search(r"cancel|called off", start, re.IGNORECASE)


@pytest.mark.parametrize("way", CALLED_OFF)
def test_an_issue_that_was_called_off_and_is_wanted_again_is_done_afresh(world: World, way: str) -> None:
    called_off = CalledOff(world, way)
    assert called_off.wish_again().outcomes == {"done": 1}
    assert_done_once(world)
    assert len(called_off.agent.runs()) == 2


@pytest.mark.parametrize("way", CALLED_OFF)
def test_the_same_process_takes_up_again_what_was_called_off(world: World, way: str) -> None:
    call_off, wish_again = CALLED_OFF[way]
    world.open("Do something.")
    agent, now = Agent.waiting(world.home), world.github.now
    with Daemon(world.runner(None, AGENT_LEASE="6", AGENT_POLL_INTERVAL="1", **agent.env)) as daemon:
        pid = agent.pid()
        call_off(world)
        wait_until(lambda: not alive(pid) and not world.claims())
        agent.go()
        world.github.now = lambda: now() + 60  # GitHub tells changes within one second not apart
        wish_again(world)
        wait_until(lambda: daemon.runner.outcomes["done"])
        daemon.end()
    assert_done_once(world)
    assert len(agent.runs()) == 2


def test_an_issue_that_is_called_off_between_claim_and_work_is_left_alone(world: World) -> None:
    """The claim is there, the issue is read again, and says no."""
    agent = Agent(world.home)
    world.open("Do something.")
    world.github.faults.append(Fault(path=".*/issues/1", action=lambda: world.github.close_issue(DISPATCH, 1)))
    assert world.run_once(**agent.env).outcomes == {"skipped": 1}
    assert agent.runs() == []
    assert world.claims() == []
    assert world.issue().comments == []
