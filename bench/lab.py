"""What the measurements of `make bench` share: rows of the table, runners as processes, and what processes hold.

A measurement is a function that takes a `Lab` and yields `Row`s. Each gets an empty folder of its own. Where two things
are compared, they take turns, so that what else the machine does slows both down alike, and the ratio is that of the
medians.
"""

from __future__ import annotations

import base64
import itertools
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from soak import DISPATCH, TARGET
from standin import RecordedRequest, StandIn

ROOT = Path(__file__).parents[1]
MB = 1e6
# Writes one file.
AGENT = """\
#!/bin/sh
mkdir -p notes
echo "$AGENT_TASK_TITLE" > "notes/$AGENT_TASK_ID.txt"
"""


@dataclass(frozen=True)
class Row:
    """A line of the table. `good` is None where nothing is aimed at. What is counted is the same on each machine, so
    it fails the short form too."""

    what: str
    size: str
    value: str
    target: str = ""
    good: bool | None = None
    note: str = ""
    counted: bool = False


@dataclass(frozen=True)
class Lab:
    """Where a measurement works, and how much of it there is to be."""

    folder: Path
    short: bool
    minutes: float  # of killing

    def pick(self, full: int, short: int) -> int:
        return short if self.short else full


Measurement = Callable[[Lab], Iterator[Row]]


def counted(what: str, size: str, value: int, most: int, target: str, note: str = "", least: int = 0) -> Row:
    """A row for a number that must be within two others."""
    return Row(what, size, f"{value:,}", target, least <= value <= most, note, counted=True)


def ratio(what: str, size: str, one: Sequence[float], other: Sequence[float], most: float, floor: str) -> Row:
    """A row for how many times as long one thing takes as another; both were measured in turns."""
    times = statistics.median(one) / statistics.median(other)
    note = f"{seconds(one)} against {seconds(other)}"
    return Row(what, size, f"{times:.2f} x", f"<= {most:g} x {floor}", times <= most, note)


def seconds(times: Sequence[float]) -> str:
    return f"{statistics.median(times):.2f} s"


def until(condition: Callable[[], object], patience: float, what: str = "it") -> None:
    """Waits for something; an error if it does not come about."""
    end = time.monotonic() + patience
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what} did not come about in {patience:.0f} s")
        time.sleep(0.02)


# -- Tasks. ----------------------------------------------------------------------------------------


def open_issues(github: StandIn, count: int, title: str = "Note") -> list[int]:
    return [github.open_issue(DISPATCH, title=f"{title} {n}", body=f"Write note {n}.") for n in range(1, count + 1)]


def is_over(github: StandIn, number: int) -> bool:
    """Whether a task was done and the runner has let go of it."""
    labels = github.issue(DISPATCH, number).labels
    claim = github.repository(TARGET).path / f"refs/agent-runner/claims/{DISPATCH}/{number}"
    return "agent-processing" not in labels and bool({"agent-done", "agent-failed"} & {*labels}) and not claim.exists()


def all_done(github: StandIn, numbers: Sequence[int], patience: float) -> None:
    """Waits until tasks are over; an error if one of them failed."""
    until(lambda: all(is_over(github, number) for number in numbers), patience, f"the end of {len(numbers)} task(s)")
    for number in numbers:
        if "agent-failed" in (issue := github.issue(DISPATCH, number)).labels:
            raise RuntimeError(f"issue {number}: {issue.comments[-1].body}")


def wake(runner: subprocess.Popen[bytes]) -> None:
    """Has the runner look at the queue."""
    runner.send_signal(signal.SIGHUP)


def is_look(request: RecordedRequest) -> bool:
    """Whether a request is a look at the queue."""
    return request.kind == "rest" and request.method == "GET" and request.path.endswith("/issues")


def polled(github: StandIn, runner: subprocess.Popen[bytes], patience: float = 60) -> None:
    """Waits for the first look at the queue and what comes with it, so that the signals are taken."""
    until(lambda: github.rest() or runner.poll() is not None, patience, "a first request")
    if runner.poll() is not None:
        raise RuntimeError("the runner did not start")
    time.sleep(1)


# -- Processes. ------------------------------------------------------------------------------------


def tree(pid: int) -> list[int]:
    """A process and all below it."""
    parents: dict[int, list[int]] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(file.read_text().rpartition(") ")[2].split()[1])
        except OSError:  # it has ended meanwhile
            continue
        parents.setdefault(parent, []).append(int(file.parent.name))
    found = [pid]
    for each in found:
        found += parents.get(each, [])
    return found


def resident(pid: int) -> int:
    """Bytes of a process that are in memory; what it shares with others counts too. 0 if it is gone."""
    try:
        found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def share(pid: int) -> int:
    """The same, but what several processes share is divided among them; where that is not told, all of it."""
    try:
        found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    except OSError:
        return resident(pid)
    return int(found[1]) * 1024 if found else resident(pid)


def command_of(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1]
    except OSError:
        return []


def usage(*folders: Path) -> int:
    """Bytes that folders take up on the disk; what has several names counts once."""
    found: dict[tuple[int, int], int] = {}
    for folder in folders:
        pending = [str(folder)] if folder.exists() else []
        while pending:
            try:
                entries = list(os.scandir(pending.pop()))
            except FileNotFoundError:
                continue
            for entry in entries:
                try:
                    about = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                found[about.st_dev, about.st_ino] = about.st_blocks * 512
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
    return sum(found.values())


def timed(step: Callable[[], object]) -> float:
    begun = time.perf_counter()
    step()
    return time.perf_counter() - begun


def in_turns(rounds: int, *steps: Callable[[], float]) -> list[list[float]]:
    """What steps give, each of them so many times, taking turns."""
    results: list[list[float]] = [[] for _ in steps]
    for _, (number, step) in itertools.product(range(rounds), enumerate(steps)):
        results[number].append(step())
    return results


def python(code: str) -> None:
    """Runs a line of Python in a process of its own."""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def git_access(github: StandIn) -> dict[str, str]:
    """An environment in which git may speak to the stand-in."""
    login = base64.b64encode(f"x-access-token:{github.token}".encode()).decode()
    return github.git_env() | {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"http.{github.server_url}/.extraHeader",
        "GIT_CONFIG_VALUE_0": f"Authorization: Basic {login}",
    }
