"""The queue: what it costs to look, and that nothing is missed or taken twice."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import DISPATCH, TARGET, FakeClock, World
from openapi_check import check_request
from standin import Fault, StandIn

from runner import GitHub, Queue, Unreachable

DONE = ("copilot-agent", "agent-done")


class Time:
    """The stand-in's time, which a test sets."""

    now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def world(tmp_path: Path, time: Time) -> Iterator[World]:
    with StandIn(tmp_path / "github", check=check_request, now=time) as github:
        github.add_repository(DISPATCH)
        github.add_repository(TARGET)
        yield World(github, tmp_path)
        assert github.problems == []


@pytest.fixture
def queue(world: World) -> Queue:
    config = world.config()
    return Queue(config, GitHub(config, FakeClock(), threading.Event()))


def polled(world: World, queue: Queue) -> list[int]:
    """Polls; the answers' status codes."""
    before = len(world.requests())
    queue.poll()
    return [request.status for request in world.requests()[before:]]


def test_an_idle_poll_is_one_304_and_costs_no_quota(world: World, queue: Queue) -> None:
    world.open(labels=DONE)
    queue.poll()
    quota = world.github.rate_remaining
    assert [polled(world, queue) for _ in range(5)] == [[304]] * 5
    assert world.github.rate_remaining == quota


def test_a_thousand_finished_issues_cost_no_more_than_none(world: World, queue: Queue, time: Time) -> None:
    for _ in range(1000):
        world.open(labels=DONE)
    time.now += 3600
    assert polled(world, queue) == [200] * 10
    quota = world.github.rate_remaining
    second = polled(world, queue)
    assert second.count(304) >= 9
    assert world.github.rate_remaining >= quota - 1
    queue.poll()
    quota = world.github.rate_remaining
    assert [polled(world, queue) for _ in range(5)] == [[304]] * 5
    assert world.github.rate_remaining == quota
    assert queue.waiting == {}


def test_a_new_issue_is_found_behind_a_thousand_finished_ones(world: World, queue: Queue, time: Time) -> None:
    numbers = [world.open(labels=DONE) for _ in range(1000)]
    time.now += 3600
    for _ in range(4):
        queue.poll()
    new = world.open()
    assert polled(world, queue) == [200]
    assert set(queue.waiting) == {new}
    time.now += 3600
    world.github.remove_label(DISPATCH, numbers[500], "agent-done")
    assert polled(world, queue) == [200]
    assert set(queue.waiting) == {new, numbers[500]}


def test_a_thousand_issues_just_finished_cost_no_quota_either(world: World, queue: Queue, time: Time) -> None:
    for _ in range(150):
        world.open(labels=DONE)
    for _ in range(3):
        queue.poll()
    quota = world.github.rate_remaining
    assert polled(world, queue) == [304, 304]
    assert world.github.rate_remaining == quota
    time.now += 600
    queue.poll()
    queue.poll()
    assert polled(world, queue) == [304]


def test_the_101st_issue_is_found_although_the_full_page_before_it_did_not_change(world: World, queue: Queue) -> None:
    for _ in range(100):
        world.open(labels=DONE)
    queue.poll()
    queue.poll()
    new = world.open()
    queue.poll()
    assert set(queue.waiting) == {new}


def test_exactly_a_full_page_of_finished_issues_costs_no_quota(world: World, queue: Queue, time: Time) -> None:
    for _ in range(100):
        world.open(labels=DONE)
    time.now += 3600
    for _ in range(3):
        queue.poll()
    assert [polled(world, queue) for _ in range(3)] == [[304]] * 3
    new = world.open()
    queue.poll()
    assert set(queue.waiting) == {new}


@pytest.mark.parametrize("body", [b"{}", b"[1]"])
def test_a_list_that_is_none_changes_nothing(world: World, queue: Queue, body: bytes) -> None:
    world.open()
    queue.poll()
    world.github.faults.append(Fault(status=200, body=body))
    with pytest.raises(Unreachable):
        queue.poll()
    assert set(queue.waiting) == {1}


def on_each_page(world: World, change: Callable[[], None]) -> None:
    """Has the world change before each of the list's pages is read."""
    for page in range(1, 4):
        world.github.faults.append(Fault(method="GET", path=r".*/issues", after=page, action=change, times=1))


def test_rows_that_shift_while_they_are_read_are_not_missed(world: World, queue: Queue, time: Time) -> None:
    numbers = [world.open() for _ in range(301)]
    time.now += 3600
    gone = iter(numbers)
    on_each_page(world, lambda: world.github.close_issue(DISPATCH, next(gone)))
    queue.poll()
    missed = set(numbers[3:]) - set(queue.waiting)
    assert missed, "the stand-in did not shift the rows: the test shows nothing"
    for _ in range(3):
        queue.poll()
    assert set(numbers[3:]) <= set(queue.waiting)


def test_pull_requests_in_the_list_are_skipped(world: World, queue: Queue) -> None:
    world.open(pull_request=True)
    queue.poll()
    assert queue.waiting == {}


@pytest.mark.parametrize("label", ["agent-done", "agent-failed", "AGENT-DONE"])
def test_an_issue_with_a_state_label_is_not_queued(world: World, queue: Queue, label: str) -> None:
    world.open(labels=("copilot-agent", label))
    queue.poll()
    assert queue.waiting == {}


def test_an_issue_that_is_in_work_somewhere_stays_in_the_queue_until_it_is_over(world: World, queue: Queue) -> None:
    number = world.open()
    queue.poll()
    assert not queue.waiting[number].processing
    world.github.add_label(DISPATCH, number, "agent-processing")
    queue.poll()
    assert queue.waiting[number].processing
    world.github.add_label(DISPATCH, number, "agent-done")
    queue.poll()
    assert queue.waiting == {}


def test_a_list_that_lags_behind_does_not_bring_an_issue_back(world: World, queue: Queue, time: Time) -> None:
    number = world.open()
    queue.poll()
    queue.handled(number, queue.waiting[number].updated)
    queue.poll()
    assert queue.waiting == {}
    time.now += 60
    world.github.edit_issue(DISPATCH, number, title="Now really")
    queue.poll()
    assert set(queue.waiting) == {number}


def test_a_poll_that_fails_half_way_changes_nothing(world: World, queue: Queue) -> None:
    for _ in range(150):
        world.open()
    queue.poll()
    before = dict(queue.waiting)
    world.open()
    world.github.faults.append(Fault(after=1, status=502))
    with pytest.raises(Unreachable):
        queue.poll()
    assert queue.waiting == before
    queue.poll()
    assert len(queue.waiting) == 151
