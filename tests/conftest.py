"""What the tests share: a stand-in GitHub with two repositories, and ways to start the runner."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from openapi_check import check_request
from standin import Issue, Pull, RecordedRequest, StandIn
from standin_graphql import answer_query

import runner as runner_module
from runner import Clock, Config, Runner

# The same examples each time, and no limit of time: a failure is to come from a change.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")

RUNNER = Path(runner_module.__file__)
DISPATCH = "acme/dispatch"
TARGET = "acme/widgets"
TASK_ID = "3f0c1f6e-6a0e-4a52-9b6e-0f8d6f3c2b11"
PATCH = """\
```diff
--- a/README.md
+++ b/README.md
@@ -1 +1,2 @@
 # Widgets
+More of them.
```
"""


class FakeClock(Clock):
    """A clock that stands still until somebody waits; then it is later at once."""

    def __init__(self) -> None:
        self.at = 1_000_000.0
        self.waits: list[float] = []

    def now(self) -> float:
        return self.at

    def monotonic(self) -> float:
        return self.at

    def sleep(self, seconds: float) -> None:
        self.at += seconds
        if seconds:
            self.waits.append(seconds)

    def wait(self, event: threading.Event, seconds: float) -> bool:
        if not event.is_set():
            self.sleep(seconds)
        return event.is_set()

    def jitter(self, seconds: float) -> float:
        return seconds


class FastClock(Clock):
    """A clock that runs three hundred times as fast, for whole runners with their threads."""

    SPEED = 300

    def monotonic(self) -> float:
        return super().monotonic() * self.SPEED

    def wait(self, event: threading.Event, seconds: float) -> bool:
        return super().wait(event, seconds / self.SPEED)

    def jitter(self, seconds: float) -> float:
        return seconds


def wait_until(condition: Callable[[], object], seconds: int = 30) -> None:
    for _ in range(seconds * 100):
        if condition():
            return
        threading.Event().wait(0.01)
    pytest.fail(f"it did not come about in {seconds} s")


class Daemon:
    """A runner in a thread of its own. `end` stops it as a signal does, leaving the `with` as a second one does."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self._thread = threading.Thread(target=runner.run_forever)

    def __enter__(self) -> Daemon:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end(now=True)

    def end(self, now: bool = False, seconds: int = 30) -> None:
        self.runner.request_stop(now)
        self._thread.join(seconds)
        assert not self._thread.is_alive()


class World:
    """The stand-in, the settings that point to it, and short ways to what tests want of both."""

    def __init__(self, github: StandIn, folder: Path) -> None:
        self.github, self.folder = github, folder
        self.runners: list[Runner] = []
        self.env = github.settings(DISPATCH, TARGET, folder / "state")
        self.home = folder / "home"  # where agents can leave what tests look at
        self.home.mkdir()
        self.env |= {"AGENT_WRITE_INTERVAL": "0", "AGENT_ALLOW_ROOT": "yes", "AGENT_HOME": str(self.home)}
        prompt = folder / "prompt.md"  # agents here are small programs that need no advice
        prompt.write_text("{instruction}\n\nTarget: {context}\n")
        self.env["AGENT_PROMPT_FILE"] = str(prompt)
        self._started: list[subprocess.Popen[str]] = []

    def config(self, **env: str) -> Config:
        return Config.from_env(self.env | env)

    def runner(self, clock: Clock | None = None, **env: str) -> Runner:
        if isinstance(clock, FastClock):  # which makes a lease as short as all else; this one is an hour
            env = {"AGENT_LEASE": str(3600 * FastClock.SPEED), **env}
        self.runners.append(Runner(self.config(**env), clock))
        return self.runners[-1]

    def run_once(self, **env: str) -> Runner:
        """One poll and its tasks, in this process."""
        runner = self.runner(None, **env)
        runner.run_once()
        return runner

    def start(self, *arguments: str, **env: str) -> subprocess.Popen[str]:
        """`python runner.py ...` as a process of its own, in an empty folder."""
        (self.folder / "cwd").mkdir(exist_ok=True)
        passed_on = {k: v for k, v in os.environ.items() if k.startswith("COVERAGE")}
        process = subprocess.Popen(
            [sys.executable, str(RUNNER), *arguments],
            cwd=self.folder / "cwd",
            env={**passed_on, **self.env, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._started.append(process)
        return process

    def end(self) -> None:
        """Ends the runners of this process, and the processes that a failed test has left behind or stopped."""
        for runner in self.runners:
            runner.request_stop(now=True)
            runner._drain()
        for process in self._started:
            process.kill()
            process.wait()
            for pipe in (process.stdout, process.stderr):
                if pipe:
                    pipe.close()

    def open(self, body: str | None = PATCH, title: str = "Make more widgets", **more: Any) -> int:
        return self.github.open_issue(DISPATCH, title=title, body=body, **more)

    def issue(self, number: int = 1) -> Issue:
        return self.github.issue(DISPATCH, number)

    def pull(self) -> Pull:
        """The only pull request of the target."""
        (pull,) = self.github.pulls(TARGET)
        return pull

    def pull_body(self) -> str:
        return self.pull().body or ""

    def last_comment(self, number: int = 1) -> str:
        return self.issue(number).comments[-1].body

    def requests(self, method: str = "", path: str = "") -> list[RecordedRequest]:
        """Requests to the API, REST and GraphQL."""
        return [r for r in self.github.requests("rest", "graphql") if method in r.method and path in r.path]

    def labels(self, number: int = 1) -> list[str]:
        return sorted(self.issue(number).labels)

    def wait_for_done(self, numbers: Iterable[int], seconds: int = 120) -> None:
        """Waits for many issues; looks at them seldom and without a lock, so as not to slow the stand-in down."""
        issues, pause = [self.issue(number) for number in numbers], threading.Event()
        for _ in range(seconds * 4):
            if all("agent-done" in issue.labels for issue in issues):
                return
            pause.wait(0.25)
        pytest.fail(f"only {sum('agent-done' in issue.labels for issue in issues)} were done in {seconds} s")

    def claims(self) -> list[str]:
        """The claims that are held in the target."""
        return self.github.git(TARGET, "for-each-ref", "--format=%(refname)", "refs/agent-runner").splitlines()

    def comments(self, step: str, number: int = 1) -> list[str]:
        """The comments of an issue that a runner wrote at this step, "start" or "end"."""
        bodies = [comment.body for comment in self.issue(number).comments]
        return [body for body in bodies if f" step={step} -->" in body]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A started stand-in. A request that GitHub would not know fails the test."""
    # A FastClock makes a task of a second one of five minutes, of whose progress the issue would be told.
    monkeypatch.setattr(runner_module, "PROGRESS_PAUSE", runner_module.PROGRESS_PAUSE * FastClock.SPEED)
    with open_world(tmp_path) as world:
        yield world


@contextlib.contextmanager
def open_world(folder: Path) -> Iterator[World]:
    with StandIn(folder / "github", check=check_request, graphql=answer_query) as github:
        github.add_repository(DISPATCH)
        github.add_repository(TARGET, files={"README.md": "# Widgets\n", "src/app.py": "print(1)\n"})
        world = World(github, folder)
        yield world
        world.end()
        assert github.problems == []


@pytest.fixture
def config() -> Config:
    """Settings for what needs no GitHub."""
    return make_config()


def make_config(env: Mapping[str, str] | None = None, **changes: Any) -> Config:
    base = {"GITHUB_TOKEN": "t0ken", "AGENT_DISPATCH_REPO": DISPATCH, "AGENT_TARGET_REPO": TARGET}
    return dataclasses.replace(Config.from_env(base | dict(env or {})), **changes)


def issue_json(body: str | None = "Do it.", **fields: Any) -> dict[str, Any]:
    """An issue as GitHub's API gives it."""
    return {
        "number": 7,
        "title": "A title",
        "body": body,
        "state": "open",
        "labels": [{"name": "copilot-agent"}],
        "user": {"login": "octocat"},
        "author_association": "OWNER",
        "html_url": "https://github.com/acme/dispatch/issues/7",
        "updated_at": "2026-01-01T00:00:00Z",
        **fields,
    }
