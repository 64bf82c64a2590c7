"""The numbers of docs/scaling.md: what is counted is counted again, what is computed is computed again."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
from conftest import DISPATCH, PATCH, TARGET, Daemon, FastClock, World, wait_until
from test_docs import ROOT, read, table
from test_task import agent

import runner
from runner import PROGRESS_PAUSE, Config

PAGE = ROOT / "docs/scaling.md"
HOUR = 3600
LIMITS = (5_000, 12_500)
WRITES_ALLOWED = 500
REPLICAS = (1, 2, 4, 8)


def cell(text: str) -> int:
    """The first number of a cell."""
    found = re.search(r"\d[\d,]*", text)
    assert found, text
    return int(found[0].replace(",", ""))


def costs(what: str) -> list[int]:
    """Requests and writes, as the page says."""
    return [cell(text) for text in table(PAGE, "What")[what][:2]]


def default(name: str) -> float:
    return float(Config.variables()[name].metadata["default"])


def spent(world: World, step: Callable[[], Any]) -> tuple[int, int, int]:
    """The requests that count, the writes and the pushes of a step."""
    before = len(world.github.log)
    step()
    log = world.github.log[before:]
    rest = [request for request in log if request.kind in ("rest", "graphql") and request.status != 304]
    pushes = [request for request in log if request.path.endswith("/git-receive-pack")]
    return len(rest), sum(request.method != "GET" for request in rest), len(pushes)


def test_a_task_costs_what_the_page_says(world: World) -> None:
    world.open(PATCH)
    world.run_once()  # the first task also gives the new labels their colours
    world.open(PATCH)
    requests, writes, pushes = spent(world, world.run_once)
    look = 1
    assert [requests - look, writes, pushes] == [cell(text) for text in table(PAGE, "What")["A task"]]
    points = (requests - writes) + 5 * writes
    assert f"a task is {points} points" in read(PAGE)


def test_a_long_task_costs_what_the_page_says(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "PROGRESS_PAUSE", PROGRESS_PAUSE)  # a minute, of a clock that runs fast
    world.open(PATCH)
    world.run_once()
    number, clock = world.open("Do it."), FastClock()
    command = agent(world.home, "import time; time.sleep(1); open('new', 'w')")
    begun = clock.monotonic()

    def work() -> None:
        with Daemon(world.runner(clock, AGENT_COMMAND=command, AGENT_POLL_INTERVAL="100000")):
            wait_until(lambda: world.labels(number) == ["agent-done", "copilot-agent"])

    _, writes, _ = spent(world, work)
    minutes = math.ceil((clock.monotonic() - begun) / 60)
    short, long = costs("A task")[1], costs("A task of more than a minute, in addition")[1]
    assert short < writes <= short + long + minutes


def test_a_look_at_a_queue_that_rests_costs_nothing(world: World) -> None:
    replica = world.runner()
    replica.queue.poll()
    assert spent(world, replica.queue.poll) == (0, 0, 0)
    world.open(PATCH)
    assert spent(world, replica.queue.poll) == (1, 0, 0)
    looks = HOUR / default("AGENT_POLL_INTERVAL")
    assert costs("Looks at the queue, each replica and hour") == [looks, 0]
    edits = HOUR / PROGRESS_PAUSE
    assert costs("Telling how far tasks are, all replicas together, an hour") == [edits, edits]
    assert runner.WEBHOOK_PATIENCE == 5


def test_an_issue_that_another_replica_has_costs_no_request_but_the_look(world: World) -> None:
    number = world.open(PATCH)
    record = {"runner": "another", "nonce": "0" * 16, "epoch": 1, "attempt": 1}
    tree = world.github.git(TARGET, "rev-parse", "main^{tree}")
    claim = world.github.git(TARGET, "commit-tree", tree, "-m", json.dumps(record))
    world.github.git(TARGET, "update-ref", f"refs/agent-runner/claims/{DISPATCH}/{number}", claim)
    assert spent(world, world.run_once) == (1, 0, 0)


def test_who_comes_too_late_for_an_issue_has_spent_a_push_and_no_request(world: World) -> None:
    """It has seen the queue before the other one claimed."""
    number, late = world.open(PATCH), world.runner(AGENT_RUNNER_ID="late")
    late.queue.poll()
    command = agent(world.home, "import time; time.sleep(2); open('new', 'w')")
    with Daemon(world.runner(AGENT_RUNNER_ID="holder", AGENT_COMMAND=command)):
        wait_until(lambda: world.claims() and world.comments("start", number))

        def come() -> None:
            late._admit()
            wait_until(lambda: all(future.done() for future in late._running))
            late._collect()

        assert spent(world, come)[:2] == (0, 0)
        assert late.outcomes == {"held": 1}
        wait_until(lambda: "agent-done" in world.labels(number))


def by_requests(limit: int, replicas: int, shared: int, each: int) -> int:
    return (limit - costs(LOOKS)[0] * replicas - shared) // each


LOOKS, EDITS = "Looks at the queue, each replica and hour", "Telling how far tasks are, all replicas together, an hour"


def test_short_tasks_an_hour_are_computed_right() -> None:
    requests, writes = costs("A task")
    rows = table(PAGE, "Short tasks, replicas")
    assert [int(replicas) for replicas in rows] == [*REPLICAS]
    for replicas, cells in rows.items():
        wanted = [by_requests(limit, int(replicas), 0, requests) for limit in LIMITS]
        wanted.append(WRITES_ALLOWED // writes)
        assert [cell(text) for text in cells] == wanted
        assert [text.startswith("**") for text in cells] == [number == min(wanted) for number in wanted]


def test_long_tasks_an_hour_are_computed_right() -> None:
    more = costs("A task of more than a minute, in addition")
    requests, writes = (sum(pair) for pair in zip(costs("A task"), more, strict=True))
    rows = table(PAGE, "Long tasks, replicas")
    assert [int(replicas) for replicas in rows] == [*REPLICAS]
    for replicas, (*cells, slots) in rows.items():
        wanted = [by_requests(limit, int(replicas), costs(EDITS)[0], requests) for limit in LIMITS]
        wanted.append((WRITES_ALLOWED - costs(EDITS)[1]) // writes)
        assert [cell(text) for text in cells] == wanted
        assert [text.startswith("**") for text in cells] == [number == min(wanted) for number in wanted]
        assert cell(slots) == min(8 * 60 // 10, *wanted)
    text = read(PAGE)
    assert f"by {requests}; an hour's writes, less 60 for all edits, by {writes}." in text


@pytest.mark.parametrize("lease", [600, 1800])
def test_pushes_an_hour_are_computed_right(lease: int) -> None:
    pushes, allowed = cell(table(PAGE, "What")["A task"][2]), 6 * 60
    text = " ".join(read(PAGE).split())
    assert f"6 a minute are {allowed} an hour, so {allowed // pushes} short tasks" in text
    long = pushes + 600 // (lease // 3)
    assert f"{long} times: {allowed // long}" in text
    assert default("AGENT_LEASE") == 600


def test_what_the_page_says_of_writes_a_minute_holds() -> None:
    each = 60 / default("AGENT_WRITE_INTERVAL")
    assert each == 60 < 80 < 2 * each
    assert f"up to {runner.LOGS_KEPT} logs of {runner.LOG_KEPT // 1024**2} MB" in read(PAGE)
