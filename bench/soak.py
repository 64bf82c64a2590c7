"""A soak: thousands of small tasks in one runner, against the stand-in for GitHub, and what grows meanwhile.

`make soak` runs 2,000 tasks, `make soak TASKS=200` fewer. Issues come in batches. After each batch an owner tidies up:
issues and pull requests are closed, branches deleted. Every so often, when the runner rests between two batches, the
owner moves the base branch on, and a row of the table says what the runner holds: `refs` are those that are left in
the target beside its branches, `disk` and `files` are all that it wrote. The exit code is 1 if something grew too much
after the warm-up, if a task was not done exactly once, or if the runner logged an error. (Each move of the base branch
brings three small objects into the runner's copy of the target, up to 24 KB on disk: that growth is meant.)
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from demo import wait_for
from openapi_check import check_request
from standin import StandIn
from standin_graphql import answer_query

RUNNER = Path(__file__).parents[1] / "runner.py"
DISPATCH, TARGET = "acme/tasks", "acme/widgets"
BATCH = 50  # tasks that wait at most
SAMPLES = 20  # rows of the table, about
WARM_UP = 0.1  # of the tasks
REST = 0.5  # seconds without a process of the runner's
AGENT = """\
#!/bin/sh
# A small change. What it leaves behind: a process, and that one's child, which ends and is not waited for.
mkdir -p notes
echo "$AGENT_TASK_TITLE" > "notes/$AGENT_TASK_ID.txt"
(true & exec sleep 0.2) &
"""
KB, MB = 1024, 1024 * 1024
GROWTH = {"threads": 0, "descriptors": 0, "zombies": 0, "memory": 10 * MB, "disk": MB, "refs": 0}  # what is allowed
UNITS = {"memory": KB, "disk": KB}
HEADINGS = ("tasks", "s/task", "threads", "descriptors", "zombies", "memory KB", "disk KB", "files", "refs")


@dataclass(frozen=True)
class Sample:
    """What the runner holds while it rests; sizes in bytes."""

    tasks: int
    seconds: float  # for each task since the sample before
    threads: int
    descriptors: int
    zombies: int
    memory: int
    disk: int
    files: int
    refs: int


def main() -> int:
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(line_buffering=True)
    parser = argparse.ArgumentParser(description="Runs many small tasks in one runner and shows what grows.")
    parser.add_argument("tasks", type=int, nargs="?", default=2000, help="how many tasks, 20 or more (default: 2000)")
    tasks = max(20, parser.parse_args().tasks)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name, standing_in(Path(name)) as github:
        with running(github, Path(name)) as runner:
            soak = Soak(github, runner, Path(name) / "runner")
            soak.work(tasks)
            problems = [*stopped(runner), *soak.problems]
        problems += [*doubles(github), *logged(Path(name) / "log"), *github.problems]
        problems += grown(soak.samples, tasks)
    for problem in problems[:20]:
        print("FAILED:", problem)
    print(f"{len(problems)} problem(s)" if problems else "Nothing grew more than it may, and each task was done once.")
    return 1 if problems else 0


@contextlib.contextmanager
def standing_in(folder: Path, strict: bool = True, now: Callable[[], float] = time.time) -> Iterator[StandIn]:
    """The stand-in with its two repositories, and no limit on requests. It is quicker if it is not strict."""
    check = check_request if strict else None
    with StandIn(folder / "github", check=check, graphql=answer_query, now=now) as github:
        github.rate_limit = github.rate_remaining = 10**9
        github.add_repository(DISPATCH)
        github.add_repository(TARGET)
        yield github


@contextlib.contextmanager
def running(
    github: StandIn, folder: Path, agent_code: str = AGENT, program: Sequence[str] = (str(RUNNER),), **more: str
) -> Iterator[subprocess.Popen[bytes]]:
    """The runner as a process of its own, all of whose files are below `runner`; killed in the end if need be."""
    home, agent = folder / "runner", folder / "agent.sh"
    (home / "tmp").mkdir(parents=True, exist_ok=True)
    if not agent.exists():  # one that is there may be running
        agent.write_text(agent_code)
        agent.chmod(0o755)
    env = github.settings(DISPATCH, TARGET, home / "state") | {
        "AGENT_COMMAND": str(agent),
        "AGENT_MAX_CONCURRENT": "4",
        "AGENT_POLL_INTERVAL": "1",
        "AGENT_WRITE_INTERVAL": "0",
        "AGENT_ALLOW_ROOT": "yes",
        "TMPDIR": str(home / "tmp"),
        **more,
    }
    with (folder / "log").open("ab") as log:
        runner = subprocess.Popen(
            [sys.executable, *program], env=env, cwd=home, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        yield runner
    finally:
        runner.kill()
        runner.wait()


class Soak:
    """Batches of tasks, and the samples between them."""

    def __init__(self, github: StandIn, runner: subprocess.Popen[bytes], folder: Path) -> None:
        self.github, self.runner, self.folder = github, runner, folder
        self.samples: list[Sample] = []
        self.problems: list[str] = []
        self.spent = 0.0  # seconds with tasks since the last sample

    def work(self, tasks: int, batches: int = 10) -> None:
        """All batches, so many at least; ends early if one does not come to an end."""
        print("  ".join(HEADINGS))
        batch, done, sampled = min(BATCH, tasks // batches), 0, 0
        while done < tasks:
            size = min(batch, tasks - done)
            if not (self._run_batch(range(done + 1, done + size + 1)) and self._rest()):
                return
            done += size
            if done - sampled >= tasks / SAMPLES or done == tasks:
                self._sample(done, self.spent / (done - sampled))
                sampled, self.spent = done, 0.0
                self.github.commit(TARGET, {"NEWS.md": f"{done} tasks\n"}, message="Move on")

    def _run_batch(self, tasks: Sequence[int]) -> bool:
        """Opens the issues, waits for the runner, looks at what it did, tidies up; whether they came to an end."""
        begun = time.monotonic()
        numbers = [self.github.open_issue(DISPATCH, title=f"Note {n}", body=f"Write note {n}.") for n in tasks]
        over = wait_for(lambda: all(map(self._is_over, numbers)), self.runner, 60 + 5 * len(tasks))
        self.spent += time.monotonic() - begun
        if not over:
            self.problems.append(f"the tasks {tasks[0]} to {tasks[-1]} did not come to an end")
        self.problems += [f"issue {number}: {why}" for number in numbers for why in self._faults_of(number)]
        self.problems += self._wrong_branches(numbers)
        self._tidy(numbers)
        return over

    def _is_over(self, number: int) -> bool:
        labels = self.github.issue(DISPATCH, number).labels
        return "agent-processing" not in labels and bool({"agent-done", "agent-failed"} & {*labels})

    def _faults_of(self, number: int) -> Iterator[str]:
        """What the issue says that one good run would not."""
        issue = self.github.issue(DISPATCH, number)
        if sorted(issue.labels) != ["agent-done", "copilot-agent"]:
            yield f"labels {', '.join(issue.labels)}"
        if len(issue.comments) != 2:
            yield f"{len(issue.comments)} comments, not 2"

    def _wrong_branches(self, numbers: Sequence[int]) -> Iterator[str]:
        """Branches that are not wanted, or hold something else than one commit with one file."""
        options = ("--branches", "--source", "--name-only", "--format=%x00%S")
        commits = self.github.git(TARGET, "log", *options, "--not", "main").split("\0")[1:]
        found = Counter(" ".join(commit.split()) for commit in commits)
        wanted = Counter(f"agent-task-issue-{n} notes/issue-{n}.txt" for n in numbers)
        for commit in sorted((found - wanted) + (wanted - found)):
            yield f"commits in {commit}: {found[commit]}, not {wanted[commit]}"
        branches = self.github.heads(self.github.repository(TARGET)).keys()
        for branch in sorted(branches - {"main"} - {f"agent-task-issue-{n}" for n in numbers}):
            yield f"there is a branch {branch}"

    def _tidy(self, numbers: Sequence[int]) -> None:
        """What an owner does with finished work: otherwise the stand-in would grow slow."""
        for number in numbers:
            self.github.close_issue(DISPATCH, number)
        for pull in self.github.pulls(TARGET):
            self.github.set_state(pull, "closed")
        heads = self.github.heads(self.github.repository(TARGET))
        if branches := [branch for branch in heads if branch != "main"]:
            self.github.git(TARGET, "branch", "--quiet", "-D", *branches)
        self.github.git(TARGET, "gc", "--quiet", "--prune=now")
        self.github.log.clear()

    def _rest(self) -> bool:
        """Whether the runner, within a minute, has no living process below it for a while."""
        quiet = 0
        for _ in range(1200):
            quiet = 0 if children(self.runner.pid, "[^Z]") else quiet + 1
            if quiet * 0.05 >= REST:
                return True
            time.sleep(0.05)
        self.problems.append("the runner did not come to rest")
        return False

    def _sample(self, tasks: int, seconds: float) -> None:
        """A row of the table."""
        process = Path("/proc", str(self.runner.pid))
        status = dict(re.findall(r"(\w+):\s+(\d+)", (process / "status").read_text()))
        if "VmRSS" not in status:
            self.problems.append("the runner is gone")
            return
        refs = self.github.git(TARGET, "for-each-ref", "--format=%(refname)").splitlines()
        sample = Sample(
            tasks,
            seconds,
            threads=int(status["Threads"]),
            descriptors=len(list((process / "fd").iterdir())),
            zombies=children(self.runner.pid, "Z"),
            memory=int(status["VmRSS"]) * KB,
            disk=sum(each.lstat().st_blocks * 512 for each in self.folder.rglob("*")),
            files=sum(not each.is_dir() for each in self.folder.rglob("*")),
            refs=sum(not ref.startswith("refs/heads/") for ref in refs),
        )
        self.samples.append(sample)
        print("  ".join(f"{shown:>{len(heading)}}" for heading, shown in zip(HEADINGS, row(sample), strict=True)))


def row(sample: Sample) -> list[str]:
    """The sample's cells."""
    count, seconds, *others = astuple(sample)
    scales = [UNITS.get(name, 1) for name in Sample.__dataclass_fields__][2:]
    return [str(count), f"{seconds:.2f}", *(str(value // scale) for value, scale in zip(others, scales, strict=True))]


def children(parent: int, state: str) -> int:
    """How many child processes a process has in a state."""
    count = 0
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            count += bool(re.search(rf"\) {state} {parent} [^)]*\Z", file.read_text()))
    return count


def stopped(runner: subprocess.Popen[bytes]) -> Iterator[str]:
    """Ends the runner as a service manager would; what was wrong with its end."""
    if runner.poll() is not None:
        yield f"the runner ended by itself, with exit code {runner.returncode}"
        return
    runner.send_signal(signal.SIGTERM)
    try:
        if code := runner.wait(60):
            yield f"the runner ended with exit code {code} after SIGTERM"
    except subprocess.TimeoutExpired:
        yield "the runner did not end within 60 s after SIGTERM"


def doubles(github: StandIn) -> Iterator[str]:
    """Tasks with another number of pull requests than one, over the whole time."""
    pulls = Counter(pull.head for pull in github.pulls(TARGET))
    for branch in sorted({f"agent-task-issue-{n}" for n in github.repository(DISPATCH).issues} | {*pulls}):
        if pulls[branch] != 1:
            yield f"{branch}: {pulls[branch]} pull requests, not 1"


def logged(log: Path) -> Iterator[str]:
    """The errors in the runner's log, each with the lines that belong to it."""
    error = r"^(?:\S+ \S+ (?:ERROR|CRITICAL) |Traceback).*(?:\n(?!\d{4}-\d\d-).*)*"
    for found in re.findall(error, log.read_text("utf-8", "replace"), re.MULTILINE):
        yield f"the runner logged: {found.rstrip()}"


def grown(samples: Sequence[Sample], tasks: int) -> Iterator[str]:
    """What grew more than it may from the end of the warm-up to the last sample."""
    warm = [sample for sample in samples if sample.tasks >= tasks * WARM_UP]
    if len(warm) < 2:
        yield "too few samples to compare"
        return
    print(f"From task {warm[0].tasks} to task {warm[-1].tasks}:")
    for name, allowed in GROWTH.items():
        first, last = getattr(warm[0], name), getattr(warm[-1], name)
        print(f"  {name}: {first:,} to {last:,}, {allowed:,} more are allowed")
        if last - first > allowed:
            yield f"{name} grew from {first:,} to {last:,}"


if __name__ == "__main__":
    sys.exit(main())
