"""What a task costs and how the cost grows, measured on this machine against the stand-in for GitHub.

    make bench          all of it, in a quarter of an hour; writes bench/results.md
    make bench-smoke    in less than a minute; fails if a count is not as it should be, never for a time

`PYTHONPATH=.:tests .venv/bin/python bench/bench.py idle big` measures only what is named, and writes nothing. Times
differ from machine to machine: so the targets are counts and ratios, and both sides of a ratio are measured in turns
in the same run. The exit code is 1 if a target was missed; in the short form, if a count was.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import big
import counts
import ends
import parsing
import processes
import work
from lab import ROOT, Lab, Measurement, Row

from runner import __version__

RESULTS = ROOT / "bench" / "results.md"
MEASUREMENTS: dict[str, Measurement] = {
    "idle": counts.idle,
    "scan": counts.scan,
    "requests": counts.requests,
    "start": processes.start,
    "parsing": parsing.parsing,
    "own-time": work.own_time,
    "wake-up": work.wake_up,
    "throughput": work.throughput,
    "big": big.big,
    "disk": big.disk,
    "memory": processes.memory,
    "clean-up": ends.clean_up,
}
TIMES_ONLY = {"start", "parsing", "own-time", "big"}  # nothing to count: left out of the short form unless named
FLOORS = {  # what is in the way of a target, by what it is for
    "runner's own time a task": "A claim is three pushes, so that no issue is done twice. The bare sequence has one;"
    " with a claim it takes itself as long as the next row says.",
    "throughput": "This machine also plays GitHub. Scripts that do nothing but the requests and git commands, and to"
    " which the issues are dealt out, are about as slow; processes that look for issues themselves lose some to"
    " others.",
    "publish of a one-file change": "The runner looks for pipes, devices and repositories among the files before git"
    " does, and at sizes before anything is read.",
    "disk": "Each worktree has an index, which is no checked-out file.",
    "resident memory": "Python keeps the syntax tree of a script as long as it runs. As a module the runner has none.",
    "parsing of hostile bodies": "Python's regular expressions alone take longer than that, with one pass each.",
}
HEADINGS = ("What", "Size", "Measured", "Target", "", "Remarks")


def main() -> int:
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(line_buffering=True)
    logging.getLogger("agent-runner").addHandler(logging.NullHandler())  # of runners in this process
    options = command_line()
    names = options.names or [name for name in MEASUREMENTS if not (options.smoke and name in TIMES_ONLY)]
    load, begun = os.getloadavg()[0], time.monotonic()
    rows = [row for name in names for row in measured(name, options.smoke, options.minutes)]
    took = time.monotonic() - begun
    judged = [row for row in rows if row.counted or not options.smoke]
    bad = [row for row in judged if row.good is False]
    print(f"{len(rows)} rows in {took:.0f} s, {len(bad)} not as they should be")
    if not (options.smoke or options.names or options.no_write):
        RESULTS.write_text("".join(page(rows, took, load)), "utf-8")
    return 1 if bad else 0


def command_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measures what a task costs, and writes bench/results.md.")
    parser.add_argument("names", nargs="*", help=f"what to measure: {', '.join(MEASUREMENTS)} (default: all)")
    parser.add_argument("--smoke", action="store_true", help="the short form: little of each, and only counts can fail")
    parser.add_argument("--minutes", type=float, help="how long runners are killed at random (default: 2)")
    parser.add_argument("--no-write", action="store_true", help="leave results.md as it is")
    options = parser.parse_args()
    if unknown := {*options.names} - MEASUREMENTS.keys():
        parser.error(f"there is no {', '.join(sorted(unknown))}")
    options.minutes = options.minutes or (0.1 if options.smoke else 2)
    return options


def measured(name: str, short: bool, minutes: float) -> Iterator[Row]:
    """The rows of one measurement, printed as they come. One that breaks is a row too."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as folder:
        try:
            for row in MEASUREMENTS[name](Lab(Path(folder), short, minutes)):
                print(told(row, short))
                yield row
        except Exception as error:
            traceback.print_exc()
            said = str(error).strip().splitlines() or [""]
            row = Row(name, "", "broken", "", False, f"{type(error).__name__}: {said[0][:200]}", counted=True)
            print(told(row, short))
            yield row
    print(f"  ({name}: {time.monotonic() - begun:.0f} s)")


def told(row: Row, short: bool) -> str:
    """A row for the terminal."""
    about = ", ".join(filter(None, [row.what, row.size]))
    aim = f" (target: {row.target})" if row.target else ""
    remarks = f" - {row.note}" if row.note else ""
    return f"{mark(row, short) or ' '} {about}: {row.value}{aim}{remarks}"


def mark(row: Row, short: bool = False) -> str:
    """Whether the target is met; nothing where there is none, and for times of the short form."""
    return "" if row.good is None or (short and not row.counted) else "✓" if row.good else "✗"


def page(rows: Sequence[Row], took: float, load: float) -> Iterator[str]:
    """results.md"""
    yield "# What a task costs\n\n"
    yield f"Measured with `make bench` on {datetime.now(UTC):%Y-%m-%d}, in {took / 60:.0f} minutes.\n\n"
    yield "".join(f"- {line}\n" for line in circumstances(load))
    yield "\nTimes differ from machine to machine; counts and ratios do so less. Both sides of a ratio take turns in"
    yield " the same run. The functions that [bench.py](bench.py) names tell how each is measured.\n\n"
    yield f"| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}\n"
    for row in rows:
        cells = (row.what, row.size, row.value, row.target, mark(row), row.note)
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"
    if missed := {row.what for row in rows if row.good is False}:
        yield "\nWhat is in the way of targets that are missed; the remarks and the rows without a target measure it:\n"
        yield "\n"
        yield "".join(f"- **{what[0].upper()}{what[1:]}:** {why}\n" for what, why in FLOORS.items() if what in missed)


def circumstances(load: float) -> Iterator[str]:
    """What the figures hang on."""
    git = subprocess.run(["git", "--version"], capture_output=True, text=True, check=True).stdout.split()[2]
    yield f"agent-runner {__version__}, Python {platform.python_version()}, requests {version('requests')}, git {git}"
    cores = len(os.sched_getaffinity(0))
    yield f"{platform.system()} {platform.release().partition('-')[0]}, {platform.machine()}, {cores} cores"
    yield f"load of the machine before it began: {load:.1f}"


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
