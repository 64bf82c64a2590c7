"""From a webhook to a claim: how long it takes until a runner that is told of an issue has it.

`make wake` does that 30 times, against the stand-in for GitHub on this machine: an issue is opened, a delivery as
GitHub sends it is posted to the runner, and the time is taken until the claim is in the target repository. The runner
polls once an hour, so that only the webhook wakes it. The exit code is 1 if a delivery was not followed by a claim.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import json
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import requests
from demo import ISSUE, wait_for
from openapi_check import check_request
from standin import StandIn
from standin_graphql import answer_query

ROOT = Path(__file__).parents[1]
DISPATCH, TARGET, LABEL = "Codertocat/Hello-World", "acme/greeter", "bug"  # as in GitHub's published examples
# The one of GitHub's published examples.
SECRET = "It's a Secret to Everybody"  # nosec B105


def main() -> int:
    parser = argparse.ArgumentParser(description="Measures the time from a webhook to the claim.")
    parser.add_argument("rounds", type=int, nargs="?", default=30, help="how many deliveries (default: 30)")
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        times = round_trips(Path(name), rounds)
    good = sorted(seconds for seconds in times if seconds is not None)
    print(f"Python {platform.python_version()}, {rounds} deliveries, {rounds - len(good)} without a claim")
    if good:
        late = good[int(len(good) * 0.95)] if len(good) > 1 else good[0]
        print(f"delivery to claim: median {statistics.median(good):.3f} s, 95 % {late:.3f} s, longest {good[-1]:.3f} s")
    return 0 if len(good) == rounds else 1


def round_trips(folder: Path, rounds: int) -> list[float | None]:
    """As many round trips, all with one runner."""
    examples = json.loads((ROOT / "tests/webhooks/examples.json").read_text("utf-8"))
    payload = next(json.loads(e["body"]) for e in examples if (e["event"], e["action"]) == ("issues", "labeled"))
    with standing_in(folder) as github, running(github, folder) as (runner, port):
        return [round_trip(github, runner, port, payload) for _ in range(rounds)]


@contextmanager
def standing_in(folder: Path) -> Iterator[StandIn]:
    with StandIn(folder / "github", check=check_request, graphql=answer_query) as github:
        github.rate_limit = github.rate_remaining = 10**9
        github.add_repository(DISPATCH)
        github.add_repository(
            TARGET, files={"greeter.py": 'def greet(name: str) -> str:\n    return "Hello " + name\n'}
        )
        yield github


@contextmanager
def running(github: StandIn, folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The runner as a process that has polled once and waits, and its port."""
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    env = github.settings(DISPATCH, TARGET, folder / "state") | {
        "AGENT_HTTP_PORT": str(port),
        "AGENT_POLL_INTERVAL": "3600",
        "AGENT_TASK_LABEL": LABEL,
        "AGENT_WRITE_INTERVAL": "0",
        "GITHUB_WEBHOOK_SECRET": SECRET,
    }
    with (folder / "log").open("wb") as log:
        runner = subprocess.Popen([sys.executable, str(ROOT / "runner.py")], env=env, cwd=folder, stderr=log)
    try:
        wait_for(lambda: bool(github.rest()), runner)
        yield runner, port
    finally:
        runner.terminate()
        runner.wait(60)


def round_trip(github: StandIn, runner: subprocess.Popen[bytes], port: int, payload: dict[str, object]) -> float | None:
    """Seconds from the delivery of one issue to its claim; None if there was none within some seconds."""
    issue = ISSUE.replace("3f0c1f6e", f"{len(github.repository(DISPATCH).issues):08x}")
    number = github.open_issue(DISPATCH, title="Greet politely", body=issue, labels=[LABEL])
    body = json.dumps(payload | {"issue": payload["issue"] | {"number": number}}).encode()  # type: ignore[operator]
    claim = github.repository(TARGET).path / f"refs/agent-runner/claims/{DISPATCH.lower()}/{number}"
    signature = "sha256=" + hmac.new(SECRET.encode(), body, hashlib.sha256).hexdigest()
    headers = {"X-GitHub-Event": "issues", "X-Hub-Signature-256": signature, "Content-Type": "application/json"}
    begun, taken = time.monotonic(), None
    requests.post(f"http://127.0.0.1:{port}/webhook", data=body, headers=headers, timeout=10).raise_for_status()
    while taken is None and time.monotonic() < begun + 20:
        if claim.exists():
            taken = time.monotonic() - begun
        time.sleep(0.002)
    wait_for(lambda: "agent-processing" not in github.issue(DISPATCH, number).labels, runner)
    github.close_issue(DISPATCH, number)
    return taken


if __name__ == "__main__":
    sys.exit(main())
