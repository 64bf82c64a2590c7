"""What is counted: requests and quota of an idle hour, of a first look at a long queue, and of a task."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from conftest import FakeClock, FastClock, World, open_world
from lab import MB, Lab, Row, all_done, counted, is_look, polled, resident, until, wake
from soak import DISPATCH, TARGET, running, standing_in
from standin import StandIn
from test_parsing import backend_body
from test_task import RETRY, agent, retried

import runner as runner_module
from runner import Config, Runner

FINISHED = ("copilot-agent", "agent-done")
PATCH = "```diff\n--- a/README.md\n+++ b/README.md\n@@ -1 +1,2 @@\n # Widgets\n+More of them.\n```\n"
STUMBLES = RETRY + "    if task.attempt < 2: raise runner.TaskRetry('busy')\n    open('new', 'w')"


def idle(lab: Lab) -> Iterator[Row]:
    """An hour of looks at a queue with nothing to do, by a clock that does not wait."""
    found = []
    for size in (0, lab.pick(1000, 300), lab.pick(10_000, 1000)):
        requests, quota = idle_hour(lab.folder / str(size), size)
        found.append((requests, quota))
        about = f"{size:,} finished open issues"
        yield counted("REST requests of an idle hour", about, requests, 60, "60", least=60)
        yield counted("quota of an idle hour", about, quota, 0, "0")
    alike = len(set(found)) == 1
    yield Row("an idle hour", "all three", "alike" if alike else "not alike", "alike", alike, counted=True)


def idle_hour(folder: Path, finished: int) -> tuple[int, int]:
    """Requests and quota of sixty looks, once the runner has seen the queue."""
    clock = FakeClock()
    with standing_in(folder, strict=False, now=lambda: 1_700_000_000 + clock.at) as github:
        github.rate_reset += 10**9
        for number in range(finished):
            github.open_issue(DISPATCH, title=f"Note {number}", body="Done long ago.", labels=FINISHED)
        config = Config.from_env(github.settings(DISPATCH, TARGET, folder / "state"))
        runner = Runner(config, clock)
        clock.at += 3600  # since they were changed
        for _ in range(5):
            look(runner, clock)
        before, quota, end = len(github.requests("rest", "graphql")), github.rate_remaining, clock.at + 3600
        while clock.at < end:
            look(runner, clock)
        runner._drain()
        problems(github)
        return len(github.requests("rest", "graphql")) - before, quota - github.rate_remaining


def look(runner: Runner, clock: FakeClock) -> None:
    runner.tick()
    clock.wait(runner.wake, runner.next_poll - clock.at)


def problems(github: StandIn) -> None:
    if github.problems:
        raise RuntimeError(github.problems[0])


def scan(lab: Lab) -> Iterator[Row]:
    """The first look at a long queue, by a runner whose only worker is busy meanwhile."""
    size = lab.pick(10_000, 1000)
    with standing_in(lab.folder, strict=False) as github:
        first = github.open_issue(DISPATCH, title="Wait", body="Wait.")
        wait = f'#!/bin/sh\nwhile [ ! -e "{lab.folder}/go" ]; do sleep 0.2; done; touch new\n'
        env = {"AGENT_MAX_CONCURRENT": "1", "AGENT_POLL_INTERVAL": "3600", "AGENT_SANDBOX": "off"}
        with running(github, lab.folder, wait, **env) as process:
            polled(github, process)
            until(lambda: len(github.issue(DISPATCH, first).comments) == 1, 60, "the first comment")
            body = backend_body("Make more widgets.\n" * 30)
            for number in range(size - 1):
                github.open_issue(DISPATCH, title=f"Note {number}", body=body)
            before, begun = resident(process.pid), len(github.log)
            peak = Peak(process.pid)
            wake(process)
            until(lambda: looks(github, begun) >= math.ceil(size / 100), 300, "the look")
            threading.Event().wait(2)
            grown = (peak.end() - before) / MB
            requests = looks(github, begun)
            (lab.folder / "go").touch()
            for number in range(2, size + 1):
                github.close_issue(DISPATCH, number)
            all_done(github, [first], 60)
    about, pages = f"{size:,} open issues", math.ceil(size / 100)
    yield counted("REST requests of the first scan", about, requests, pages, f"{pages}: ceil(n/100)", least=pages)
    yield Row("memory growth by the first scan", about, f"{grown:.0f} MB", "< 30 MB", grown < 30, "at its peak")


def looks(github: StandIn, begun: int) -> int:
    return sum(is_look(request) and request.status > 0 for request in github.log[begun:])


class Peak:
    """The most memory that a process has had since this was made."""

    def __init__(self, pid: int) -> None:
        self._pid, self._most, self._over = pid, 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(0.01):
            self._most = max(self._most, resident(self._pid))

    def end(self) -> int:
        self._over.set()
        self._thread.join()
        return self._most


def requests(lab: Lab) -> Iterator[Row]:
    """Requests of one task, with the look that finds it. The first task also colours the new labels."""
    with open_world(lab.folder) as world, quiet_progress():
        spent(world, PATCH, world.run_once)
        happy, _ = spent(world, PATCH, world.run_once)
        yield counted("REST requests a task", "happy path", happy, 8, "<= 8")
        again, asked = spent(world, "Do it.", lambda: retried(world, STUMBLES))
        yield counted("REST requests a task", "with a retry", again, 12, "<= 12", f"and of GraphQL {asked}")
        most = max(spent(world, "Do it.", lambda: compete(world))[0] for _ in range(lab.pick(5, 2)))
        note = "the most of several times; the losers' looks are among them"
        yield counted("REST requests a task", "3 replicas", most, 8 + 2, "<= 8 + 1 for each loser", note)
        problems(world.github)


@contextmanager
def quiet_progress() -> Iterator[None]:
    """A task of a second is one of five minutes on a clock that runs fast; it is not to tell how far it is."""
    with patch.object(runner_module, "PROGRESS_PAUSE", runner_module.PROGRESS_PAUSE * FastClock.SPEED):
        yield


def spent(world: World, body: str, work: Callable[[], object]) -> tuple[int, int]:
    """Requests of REST and of GraphQL for one new issue, which is done."""
    number, before = world.open(body), len(world.requests())
    work()
    done = sorted(world.issue(number).labels)
    if done != ["agent-done", "copilot-agent"]:
        raise RuntimeError(f"{done}: {world.last_comment(number)}")
    made = [request.kind for request in world.requests()[before:]]
    return made.count("rest"), made.count("graphql")


def compete(world: World) -> None:
    """Three runners that have seen the same issue before any of them has it."""
    command = agent(world.home, "import time; time.sleep(1); open('new', 'w')")
    runners = [world.runner(AGENT_RUNNER_ID=f"replica-{n}", AGENT_COMMAND=command) for n in range(3)]
    together = threading.Barrier(len(runners))

    def work(runner: Runner) -> None:
        runner.queue.poll()
        together.wait(60)
        while not runner.outcomes:
            runner._collect()
            runner._look_around()
            runner._admit()
            runner.wake.wait(0.1)

    threads = [threading.Thread(target=work, args=[runner]) for runner in runners]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for runner in runners:
        runner._drain()
