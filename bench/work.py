"""What the runner adds to a task, how many tasks it does at the same time, and how soon it begins."""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from lab import AGENT, Lab, Row, all_done, git_access, in_turns, is_look, open_issues, polled, ratio, seconds, wake
from soak import DISPATCH, TARGET, running, standing_in
from standin import StandIn
from wake import round_trips

SLEEP = 5  # seconds of an agent
WAKE_UP = 0.5  # seconds


# -- The runner's own time. ------------------------------------------------------------------------


def own_time(lab: Lab) -> Iterator[Row]:
    """Batches of tasks in one worker, and the same by a script; from the first request to the last one, each."""
    batch, rounds = lab.pick(5, 1), lab.pick(8, 1)
    with standing_in(lab.folder, strict=False) as github, ExitStack() as stack:
        small = {f"src/module_{n}.py": f"VALUE = {n}\n" * 20 for n in range(200)}
        github.commit(TARGET, small, message="Add modules")
        env = {"AGENT_MAX_CONCURRENT": "1", "AGENT_POLL_INTERVAL": "3600"}
        runner = stack.enter_context(running(github, lab.folder, AGENT, **env))
        script = stack.enter_context(floor(github, lab.folder))
        polled(github, runner)

        def by_the_runner() -> float:
            numbers, begun = open_issues(github, batch), len(github.log)
            wake(runner)
            all_done(github, numbers, 60 + 10 * batch)
            return tidied(github, numbers, begun)

        def by_a_script(safe: bool) -> float:
            numbers, begun = open_issues(github, batch), len(github.log)
            for number in numbers:
                script(number, safe)
            return tidied(github, numbers, begun)

        steps = (by_the_runner, lambda: by_a_script(False), lambda: by_a_script(True))
        in_turns(1, *steps)  # the first tasks also make copies of the target
        ours, bare, safe = in_turns(rounds, *steps)
    about = "small repository, agent that writes a file"
    yield ratio("runner's own time a task", about, ours, bare, 1.3, "the bare sequence")
    times = statistics.median(safe) / statistics.median(bare)
    note = f"{seconds(safe)} against {seconds(bare)}: three pushes in place of one, and a look at the refs"
    yield Row("the bare sequence with a claim", about, f"{times:.2f} x", note=note)
    times = statistics.median(ours) / statistics.median(safe)
    yield Row("runner's own time a task", "against the bare sequence with a claim", f"{times:.2f} x")


def tidied(github: StandIn, numbers: list[int], begun: int) -> float:
    """Seconds a task, by what was asked since then. Puts away what came of the tasks, as an owner would."""
    requests = github.log[begun:]
    first = next(request for request in requests if is_look(request))
    for number in numbers:
        github.close_issue(DISPATCH, number)
    for pull in github.pulls(TARGET):
        github.set_state(pull, "closed")
    branches = [branch for branch in github.heads(github.repository(TARGET)) if branch != "main"]
    github.git(TARGET, "branch", "--quiet", "-D", *branches)
    return (requests[-1].at - first.at) / len(numbers)


class Script:
    """The script of floor.py, which is told to do task after task."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._answer("ready")

    def __call__(self, number: int, safe: bool) -> None:
        assert self._process.stdin
        self._process.stdin.write(json.dumps({"issue": number, "safe": safe}) + "\n")
        self._process.stdin.flush()
        self._answer("done")

    def _answer(self, wanted: str) -> None:
        assert self._process.stdout
        if self._process.stdout.readline().strip() != wanted:
            raise RuntimeError("the script of floor.py failed")


@contextlib.contextmanager
def floor(github: StandIn, folder: Path, code: str = AGENT) -> Iterator[Script]:
    home, agent = folder / "floor", folder / "floor.sh"
    home.mkdir(parents=True)
    agent.write_text(code)
    agent.chmod(0o755)
    env = git_access(github) | {
        "BENCH_API": github.api_url,
        "BENCH_URL": github.url(TARGET),
        "BENCH_TOKEN": github.token,
        "BENCH_DISPATCH": DISPATCH,
        "BENCH_TARGET": TARGET,
        "BENCH_AGENT": str(agent),
    }
    command = [sys.executable, str(Path(__file__).with_name("floor.py"))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=home, env=env, text=True, **pipes) as process:  # type: ignore[call-overload]
        yield Script(process)


# -- How soon. -------------------------------------------------------------------------------------


def wake_up(lab: Lab) -> Iterator[Row]:
    """See wake.py."""
    rounds = lab.pick(20, 2)
    times = round_trips(lab.folder, rounds)
    good = [taken for taken in times if taken is not None]
    yield Row(
        "webhooks followed by a claim", f"{rounds} deliveries", f"{len(good)}", "all", len(good) == rounds, counted=True
    )
    median = statistics.median(good)
    note = f"the longest {max(good):.2f} s"
    yield Row("wake-up", "webhook to claim pushed", f"{median:.2f} s", f"median < {WAKE_UP} s", median < WAKE_UP, note)


# -- How many. -------------------------------------------------------------------------------------


def throughput(lab: Lab) -> Iterator[Row]:
    """Agents that sleep, in rounds of as many tasks as there are workers."""
    sleep, rounds = lab.pick(SLEEP, 1), lab.pick(3, 1)
    sizes = [(1, 2)] if lab.short else [(1, 1), (1, 2), (1, 4), (1, 8), (2, 1), (4, 1)]
    for processes, workers in sizes:
        places = processes * workers
        took, agents, lost = rounds_of(lab.folder / f"{processes}-{workers}", processes, workers, rounds, sleep)
        share = sleep * rounds / took
        about = f"{processes} process(es) of {workers} worker(s)"
        note = f"{places * rounds} tasks of {sleep} s in {took:.1f} s"
        note += f"; {lost} times another process was faster" if processes > 1 else ""
        yield Row("throughput", about, f"{share:.2f} x", ">= 0.9 x the ideal", share >= 0.9, note)
        yield Row("agents started", about, str(agents), f"{places * rounds}", agents == places * rounds, counted=True)
    for scripts in [] if lab.short else [1, 4, 8]:
        took = by_scripts(lab.folder / f"scripts-{scripts}", scripts, rounds, sleep)
        note = f"{scripts * rounds} tasks of {sleep} s in {took:.1f} s, by the bare sequence with a claim"
        yield Row("throughput", f"{scripts} script(s)", f"{sleep * rounds / took:.2f} x", note=note)


def by_scripts(folder: Path, count: int, rounds: int, sleep: int) -> float:
    """Seconds from the first request to the last one, if scripts do the tasks, each its own."""
    folder.mkdir()
    code = f'#!/bin/sh\nsleep "$(cat "{folder}/seconds")"\necho x > new\n'
    with standing_in(folder, strict=False) as github, ExitStack() as stack:
        scripts = [stack.enter_context(floor(github, folder / str(index), code)) for index in range(count)]

        def work(script: Script, numbers: Sequence[int]) -> None:
            for number in numbers:
                script(number, safe=True)

        # One round that does not count, as with the runner.
        for numbered, seconds in ((1, 0), (rounds, sleep)):
            (folder / "seconds").write_text(str(seconds))
            numbers, begun = open_issues(github, count * numbered), len(github.log)
            shares = [numbers[index * numbered : (index + 1) * numbered] for index in range(count)]
            with ThreadPoolExecutor(count) as pool:
                list(pool.map(work, scripts, shares))
        return github.log[-1].at - github.log[begun].at


def rounds_of(folder: Path, processes: int, workers: int, rounds: int, sleep: int) -> tuple[float, int, int]:
    """Seconds from the look that finds the tasks to the last request, how many agents ran, and how many claims were not
    to be had: git sees that before it sends anything."""
    folder.mkdir()
    (folder / "started").mkdir()
    code = f'#!/bin/sh\ntouch "{folder}/started/$AGENT_TASK_ID-$$"\nsleep "$(cat "{folder}/seconds")"\necho x > new\n'
    env = {"AGENT_MAX_CONCURRENT": str(workers), "AGENT_POLL_INTERVAL": "3600", "AGENT_SANDBOX": "off"}
    with standing_in(folder, strict=False) as github, ExitStack() as stack:
        runners = []
        for index in range(processes):
            place = folder / str(index)
            place.mkdir()
            mine = env | {"AGENT_RUNNER_ID": f"runner-{index}"}
            runners.append(stack.enter_context(running(github, place, code, **mine)))
        for count, runner in enumerate(runners, start=1):
            polled(github, runner)
            while sum(map(is_look, github.rest())) < count:
                time.sleep(0.05)
        # One round that does not count: it makes copies of the target and colours the labels.
        for numbered, seconds in ((processes * workers, 0), (processes * workers * rounds, sleep)):
            (folder / "seconds").write_text(str(seconds))
            numbers, begun = open_issues(github, numbered), len(github.log)
            for file in (folder / "started").iterdir():
                file.unlink()
            for runner in runners:
                wake(runner)
            all_done(github, numbers, 120 + sleep * rounds * 3)
        asked = github.log[begun:]
        first = next(request for request in asked if is_look(request))
        begun_pushes = sum(request.query.get("service") == "git-receive-pack" for request in asked)
        sent = sum(request.method == "POST" and request.path.endswith("/git-receive-pack") for request in asked)
        return asked[-1].at - first.at, len(list((folder / "started").iterdir())), begun_pushes - sent
