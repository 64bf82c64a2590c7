"""Runners that are killed at random: what is left behind once those that live have done the rest."""

from __future__ import annotations

import contextlib
import random
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from lab import Lab, Row, counted, is_over, until, usage
from soak import AGENT, DISPATCH, GROWTH, TARGET, doubles, running, standing_in
from standin import StandIn

RUNNERS, LIFE, QUEUE = 3, 4.0, 6  # how many, seconds that each lives in the mean, tasks that wait at most
CODE = AGENT + "sleep 1\n"
SETTINGS = {"AGENT_MAX_CONCURRENT": "2", "AGENT_LEASE": "6", "AGENT_MAX_ATTEMPTS": "100"}


@dataclass
class Place:
    """A runner's folder, and the process that lives there now."""

    folder: Path
    name: str
    life: ExitStack
    process: subprocess.Popen[bytes] | None = None

    def start(self, github: StandIn) -> None:
        env = SETTINGS | {"AGENT_RUNNER_ID": self.name}
        self.process = self.life.enter_context(running(github, self.folder, CODE, **env))

    def kill(self) -> None:
        """As `kill -9` does: it closes nothing."""
        self.life.close()
        self.process = None


@dataclass(frozen=True)
class Left:
    """What is there while all rests."""

    refs: int
    processes: int
    disk: int


def clean_up(lab: Lab) -> Iterator[Row]:
    """Two rounds of killing: what is left after the first is the measure for the second, which is longer."""
    seconds = lab.minutes * 60
    with standing_in(lab.folder, strict=False) as github, ExitStack() as stack:
        places = []
        for index in range(RUNNERS):
            folder = lab.folder / f"place-{index}"
            folder.mkdir()
            places.append(Place(folder, f"runner-{index}", stack.enter_context(ExitStack())))
        mayhem = Mayhem(github, places)
        mayhem.go_on(seconds / 5)
        before, early = mayhem.rest(), mayhem.kills
        mayhem.go_on(seconds * 4 / 5)
        after, kills = mayhem.rest(), mayhem.kills - early
        tasks = len(github.repository(DISPATCH).issues)
        wrong = [*doubles(github), *mayhem.failed(), *github.problems]
    about = f"{kills} kills in {seconds * 4 / 5:.0f} s, {tasks} tasks"
    yield counted("refs left beside branches", about, after.refs, 0, "0")
    yield counted("processes left", about, after.processes, 0, "0")
    grown = after.disk - before.disk
    note = f"from {before.disk / 1e6:.1f} MB, with {early} kills before"
    yield Row("growth of disk", about, f"{grown / 1e3:.0f} kB", "< 1 MB", grown < GROWTH["disk"], note, counted=True)
    value = wrong[0] if wrong else "yes"
    yield Row("tasks done once", about, value, "yes", not wrong, counted=True)


class Mayhem:
    """Runners at work, killed at random and started again, with tasks coming in all the while."""

    def __init__(self, github: StandIn, places: list[Place]) -> None:
        self.github, self.places, self.kills = github, places, 0
        # Nobody need fail to guess it.
        self._chance = random.Random(1)  # nosec B311

    def go_on(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        for place in self.places:
            if not place.process:
                place.start(self.github)
        while time.monotonic() < end:
            self._feed()
            time.sleep(self._chance.expovariate(RUNNERS / LIFE))
            place = self._chance.choice(self.places)
            place.kill()
            place.start(self.github)
            self.kills += 1

    def _feed(self) -> None:
        issues = self.github.repository(DISPATCH).issues
        waiting = sum("agent-done" not in issue.labels for issue in issues.values())
        for _ in range(QUEUE - waiting):
            number = len(issues) + 1
            self.github.open_issue(DISPATCH, title=f"Note {number}", body=f"Write note {number}.")

    def rest(self) -> Left:
        """Lets the runners finish, ends them, and looks at what is left. The last of them does not wait for claims."""
        numbers = list(self.github.repository(DISPATCH).issues)
        with contextlib.suppress(TimeoutError):  # the rows will tell
            until(lambda: all(is_over(self.github, number) for number in numbers), 180, "the end of all tasks")
        with contextlib.suppress(TimeoutError):
            until(lambda: self._processes() <= len(self.places), 30, "the end of the agents")
        for place in self.places:
            if place.process:
                place.process.terminate()
                place.process.wait(60)
                place.kill()
        refs = self.github.git(TARGET, "for-each-ref", "--format=%(refname)").splitlines()
        beside = sum(not ref.startswith("refs/heads/") for ref in refs)
        disk = usage(*(place.folder / "runner" for place in self.places))
        return Left(beside, self._processes(), disk)

    def _processes(self) -> int:
        """How many processes have one of the runners' folders in their environment, arguments or as their place."""
        marks = [str(place.folder).encode() for place in self.places]
        return sum(any(mark in about for mark in marks) for about in map(about_process, Path("/proc").glob("[0-9]*")))

    def failed(self) -> Iterator[str]:
        for number, issue in self.github.repository(DISPATCH).issues.items():
            if sorted(issue.labels) != ["agent-done", "copilot-agent"]:
                yield f"issue {number} has the labels {', '.join(issue.labels)}"


def about_process(place: Path) -> bytes:
    """What tells where a process comes from, as far as this user may see it."""
    told = b""
    for name in ("cmdline", "environ"):
        with contextlib.suppress(OSError):
            told += (place / name).read_bytes()
    with contextlib.suppress(OSError):
        told += str((place / "cwd").readlink()).encode()
    return told
