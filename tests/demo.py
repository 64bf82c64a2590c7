"""The whole story on one machine: a stand-in for GitHub, a dispatch issue, the runner, a pull request.

`make demo` runs it. It needs no account and no network, and leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import io
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from standin import StandIn

RUNNER = Path(__file__).parents[1] / "runner.py"
DISPATCH, TARGET = "acme/tasks", "acme/greeter"
GREETER = """\
def greet(name: str) -> str:
    return "Hello " + name
"""
TASK = {"task_id": "3f0c1f6e-6a0e-4a52-9b6e-0f8d6f3c2b11", "user_id": "user-456"}
ISSUE = f"""\
# Agent Task Delegation

**Task ID:** `{TASK["task_id"]}`
**User ID:** `{TASK["user_id"]}`

## Instructions

Greet with a comma and an exclamation mark:

```diff
--- a/greeter.py
+++ b/greeter.py
@@ -1,2 +1,2 @@
 def greet(name: str) -> str:
-    return "Hello " + name
+    return f"Hello, {{name}}!"
```

---

<!-- agent_task_metadata
{json.dumps({**TASK, "provider": "github_issue_dispatch"})}
-->
"""


def main() -> int:
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(line_buffering=True)  # what the runner says is to stand in its place
    with tempfile.TemporaryDirectory() as folder, StandIn(Path(folder, "github")) as github:
        github.add_repository(DISPATCH)
        github.add_repository(TARGET, files={"greeter.py": GREETER})
        number = github.open_issue(DISPATCH, title="Greet politely", body=ISSUE)
        title(f"1. A back end opens {DISPATCH}#{number}, labelled copilot-agent")
        print(ISSUE)
        title("2. python runner.py, a process of its own, finds it")
        with running(github, Path(folder)) as runner:
            done = wait_for(lambda: finished(github, number), runner)
        if not done:
            print("\nThe task was not done; the log above says why.")
            return 1
        show_result(github, number)
        return 0


@contextlib.contextmanager
def running(github: StandIn, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The runner as a process, in an empty folder; ended in the end."""
    env = github.settings(DISPATCH, TARGET, folder / "state")
    print("\n".join(f"{name}={value}" for name, value in env.items() if name.startswith("AGENT_")), "\n")
    command = [sys.executable, str(RUNNER)]
    runner = subprocess.Popen(command, env=env, cwd=folder, stderr=subprocess.STDOUT)
    try:
        yield runner
    finally:
        runner.send_signal(signal.SIGTERM)
        runner.wait(60)


def finished(github: StandIn, number: int) -> bool:
    labels = github.issue(DISPATCH, number).labels
    return "agent-done" in labels and "agent-processing" not in labels


def wait_for(condition: Callable[[], bool], runner: subprocess.Popen[bytes], seconds: float = 50) -> bool:
    """Whether the condition came true while the runner ran."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and runner.poll() is None:
        if condition():
            return True
        time.sleep(0.1)
    return False


def show_result(github: StandIn, number: int) -> None:
    issue, (pull,) = github.issue(DISPATCH, number), github.pulls(TARGET)
    title(f"3. The pull request: {TARGET}#{pull.number}, from {pull.head} to {pull.base}")
    print(f"{pull.title}\n\n{pull.body}")
    title("   Its diff")
    print(github.git(TARGET, "diff", f"{pull.base}...{pull.head}"))
    title("4. What the issue says now")
    print("labels:", ", ".join(sorted(issue.labels)))
    for comment in issue.comments:
        print(f"\n-- comment --\n{comment.body}")
    title("5. What it cost")
    requests = github.rest()
    for request in requests:
        print(f"   {request.method:6} {request.path}")
    print(f"\n   {len(requests)} REST requests; the two PATCH give new labels their colours, once and for all.")


def title(text: str) -> None:
    print(f"\n{'=' * 100}\n{text}\n{'=' * 100}\n")


if __name__ == "__main__":
    sys.exit(main())
