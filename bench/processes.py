"""What the runner's processes hold in memory, and how soon the first of them is there."""

from __future__ import annotations

import contextlib
import io
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from lab import (
    MB,
    ROOT,
    Lab,
    Row,
    all_done,
    command_of,
    in_turns,
    open_issues,
    polled,
    python,
    ratio,
    resident,
    share,
    timed,
    tree,
    until,
    wake,
)
from soak import DISPATCH, GROWTH, RUNNER, TARGET, Soak, doubles, running, standing_in
from standin import StandIn

IDLE, EACH, FLAT = 45, 8, 2  # megabytes: of an idle runner, more for a task, and by how much "flat" may be off
PEERS = 4


def start(lab: Lab) -> Iterator[Row]:
    """From the start of the process to its first request, against a Python that does nothing but import requests."""
    with standing_in(lab.folder, strict=False) as github:
        env = github.settings(DISPATCH, TARGET, lab.folder / "state") | {"AGENT_ALLOW_ROOT": "yes"}

        def begin() -> float:
            before, begun = len(github.log), time.monotonic()
            with subprocess.Popen(
                [sys.executable, str(RUNNER)], env=env, cwd=lab.folder, stderr=subprocess.DEVNULL
            ) as it:
                until(lambda: len(github.log) > before, 60, "a first request")
                it.kill()
            return github.log[before].at - begun

        steps = (begin, lambda: timed(lambda: python("import requests")), lambda: timed(lambda: python(COMPILE)))
        in_turns(1, *steps)
        ours, imports, compiles = in_turns(lab.pick(15, 1), *steps)
    yield ratio("start", "process start to first request", ours, imports, 2, 'python -c "import requests"')
    part = statistics.median(compiles) / statistics.median(imports)
    note = "Python compiles anew what it runs, unlike what it imports"
    yield Row("start", "of that: compiling runner.py", f"{part:.2f} x", note=note)


COMPILE = f"compile(open({str(RUNNER)!r}).read(), 'runner.py', 'exec')"


def memory(lab: Lab) -> Iterator[Row]:
    """An idle runner, one with four agents, and one that has done many tasks."""
    if not lab.short:  # nothing is counted there
        with standing_in(lab.folder, strict=False) as github:
            yield from few(github, lab.folder)
    (lab.folder / "many").mkdir()
    with standing_in(lab.folder / "many", strict=False) as github:
        yield from many(github, lab.folder / "many", lab.pick(500, 16), lab.pick(10, 4))


def idle(github: StandIn, folder: Path, *program: str) -> float:
    """Megabytes of a runner that has looked at an empty queue."""
    env = {"AGENT_POLL_INTERVAL": "3600", "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": ""}
    with running(github, folder, program=program, **env) as runner:
        polled(github, runner)
        time.sleep(1)
        return resident(runner.pid) / MB


def few(github: StandIn, folder: Path) -> Iterator[Row]:
    (place := folder / "idle").mkdir()
    idle(github, place, "-m", "runner")  # which writes the bytecode
    module, script = idle(github, place, "-m", "runner"), idle(github, place, str(RUNNER))
    yield Row("resident memory", "idle, `python -m runner`", f"{module:.0f} MB", f"<= {IDLE} MB", module <= IDLE)
    note = "Python keeps the syntax tree of a script while it runs: the same lines, none of them called, take"
    note += f" {as_a_script(folder):.0f} MB more as a script than as a module"
    yield Row("resident memory", "idle, `python runner.py`", f"{script:.0f} MB", f"<= {IDLE} MB", script <= IDLE, note)
    code = f'#!/bin/sh\nwhile [ ! -e "{folder}/go" ]; do sleep 0.2; done\necho x > new\n'
    env = {"AGENT_MAX_CONCURRENT": str(PEERS), "AGENT_POLL_INTERVAL": "3600", "AGENT_SANDBOX": "off"}
    with running(github, folder, code, **env) as runner:
        polled(github, runner)
        time.sleep(1)
        before, alone = resident(runner.pid) / MB, share(runner.pid)
        numbers = open_issues(github, PEERS)
        wake(runner)
        until(lambda: sum(len(github.issue(DISPATCH, n).comments) for n in numbers) == PEERS, 120, "the comments")
        until(lambda: len(supervisors(runner.pid)) == PEERS, 60, "the supervisors")
        time.sleep(2)
        more = (resident(runner.pid) / MB - before) / PEERS
        helpers = supervisors(runner.pid)
        each = (sum(map(share, [runner.pid, *helpers])) - alone) / MB / PEERS
        held = statistics.mean(map(resident, helpers)) / MB
        (folder / "go").touch()
        all_done(github, numbers, 120)
    note = (
        f"what processes share counts once; {more:.1f} MB more in the runner, and {held:.0f} MB in a supervisor, with"
    )
    note += f" what it shares; a Python that does nothing has {bare_python() / MB:.0f} MB"
    yield Row("resident memory", f"{PEERS} running, each", f"+ {each:.0f} MB", f"<= {EACH} MB", each <= EACH, note)


def supervisors(pid: int) -> list[int]:
    return [each for each in tree(pid) if "supervisor" in command_of(each)]


def python_with(*program: str, cwd: Path = ROOT) -> int:
    """Bytes of a Python that waits for input in the end."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with subprocess.Popen([sys.executable, *program], stdin=subprocess.PIPE, cwd=cwd, env=env) as process:
        time.sleep(1)
        held = resident(process.pid)
        process.kill()
    return held


def bare_python() -> int:
    """What any process of Python has: the least that a supervisor written in it can take."""
    return python_with("-c", "input()")


def as_a_script(folder: Path) -> float:
    """Megabytes that runner.py takes as a script, where nothing of it is called, more than as a module."""
    text = RUNNER.read_text("utf-8").partition("\nif __name__ ==")[0]
    (folder / "lines.py").write_text(f"{text}\nif __name__ == '__main__':\n    input()\n", "utf-8")
    modules = [
        python_with("-c", "import lines; input()", cwd=folder) for _ in range(2)
    ]  # the first writes the bytecode
    return (python_with("lines.py", cwd=folder) - modules[-1]) / MB


def many(github: StandIn, folder: Path, tasks: int, batches: int) -> Iterator[Row]:
    """See soak.py."""
    with running(github, folder) as runner, contextlib.redirect_stdout(io.StringIO()):
        polled(github, runner)
        soak = Soak(github, runner, folder / "runner")
        soak.work(tasks, batches)
    problems = [*soak.problems, *doubles(github), *github.problems]
    yield Row("tasks done once", f"{tasks} tasks, 4 workers", "yes" if not problems else problems[0], "yes",
              not problems, counted=True)  # fmt: skip
    warm = soak.samples[math.ceil(len(soak.samples) / 5) :]
    first, last = warm[0], warm[-1]
    half = len(warm) // 2
    before, after = (statistics.median(s.memory for s in part) / MB for part in (warm[:half], warm[half:]))
    note = f"medians of tasks {first.tasks} to {warm[half - 1].tasks} and {warm[half].tasks} to {last.tasks}"
    value = f"{before:.1f}, then {after:.1f} MB"
    yield Row("resident memory", f"after {tasks} tasks", value, f"flat: + {FLAT} MB", after - before <= FLAT, note)
    for what in ("threads", "descriptors", "zombies", "refs"):
        grown = getattr(last, what) - getattr(first, what)
        yield Row(
            f"growth of {what}",
            f"task {first.tasks} to {last.tasks}",
            f"{grown}",
            "0",
            grown <= GROWTH[what],
            counted=True,
        )
    grown = last.disk - first.disk
    value = f"{grown / 1e3:.0f} kB"
    yield Row(
        "growth of disk", f"task {first.tasks} to {last.tasks}", value, "< 1 MB", grown < GROWTH["disk"], counted=True
    )
    times = [sample.seconds for sample in warm]
    note = f"{statistics.median(times[:half]):.2f} s a task, then {statistics.median(times[half:]):.2f} s"
    yield Row("time a task, 4 at a time", f"task {first.tasks} to {last.tasks}", seconds_of(times), note=note)


def seconds_of(times: list[float]) -> str:
    return f"{statistics.median(times):.2f} s"
