"""What an issue is told of a task that takes long, and the file of the agent's output from which that comes."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import DISPATCH, TARGET, Daemon, FakeClock, FastClock, World, make_config, wait_until
from hypothesis import given
from hypothesis import strategies as st
from standin import Fault, RecordedRequest
from test_loop import patch
from test_supervisor import Bench
from test_task import RETRY, agent, dispatch_body, plugin

import runner as runner_module
from runner import LIVE_KEPT, LOG_KEPT, OUTPUT_KEPT, Config, Output, Runner, last_line, run_supervised

AT_WORK = ("at work", "being fetched", "being published", "so far")


class HandClock(FakeClock):
    """A clock that goes on when the test says so; who waits for it does so in real time."""

    def __init__(self) -> None:
        super().__init__()
        self.waited_for: list[threading.Event] = []

    def wait(self, event: threading.Event, seconds: float) -> bool:
        self.waited_for.append(event)
        until = self.at + seconds
        while self.at < until and not event.is_set():
            event.wait(0.002)
        return event.is_set()


class Scene:
    """A daemon with a clock that the test holds, and agents that say what they are told to until they may end."""

    def __init__(self, world: World) -> None:
        self.world, self.clock = world, HandClock()
        code = """
            import os, pathlib, time
            home, task, said = pathlib.Path(os.environ["HOME"]), os.environ["AGENT_TASK_ID"], 0
            (home / f"{task}.begun").touch()
            while not (home / f"{task}.go").exists() and not (home / "go").exists():
                words = (home / f"{task}.say").read_bytes() if (home / f"{task}.say").exists() else b""
                os.write(1, words[said:])
                said = len(words)
                (home / f"{task}.said").write_text(str(said))
                time.sleep(0.02)
            open("new", "w")
        """
        env = {"AGENT_COMMAND": agent(world.home, code), "AGENT_LEASE": "1000000", "AGENT_MAX_CONCURRENT": "3"}
        env["AGENT_POLL_INTERVAL"] = "100000"
        self.runner = world.runner(self.clock, **env)
        self.daemon = Daemon(self.runner)

    def __enter__(self) -> Scene:
        self.daemon.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        (self.world.home / "go").touch()
        self.daemon.end(now=True)

    def begin(self, *tasks: str) -> None:
        """Waits until their agents are at work."""
        wait_until(lambda: all((self.world.home / f"{task}.begun").exists() for task in tasks), 60)

    def say(self, words: str | bytes, task: str = "t1") -> None:
        """Has an agent print this, and waits until it is in the file."""
        raw, file = words.encode() if isinstance(words, str) else words, self.world.home / f"{task}.say"
        before = file.read_bytes() if file.exists() else b""
        file.with_suffix(".new").write_bytes(before + raw)
        file.with_suffix(".new").rename(file)
        log = self.runner.config.state_dir / "logs" / f"{task[1:]}-1.log"
        size = min(len(before + raw), LOG_KEPT)
        wait_until(lambda: log.exists() and log.stat().st_size >= size)

    def later(self, seconds: float) -> None:
        """Lets time go on, and the loop take a turn that has come to its end."""
        self.clock.at += seconds
        done = threading.Event()
        turns = self.turns
        self.runner.wake.set()
        wait_until(lambda: self.turns > turns or done.is_set())
        turns = self.turns
        self.runner.wake.set()
        wait_until(lambda: self.turns > turns)

    @property
    def turns(self) -> int:
        return sum(event is self.runner.wake for event in list(self.clock.waited_for))

    def finish(self, outcome: str = "done", count: int = 1) -> None:
        (self.world.home / "go").touch()
        wait_until(lambda: self.runner.outcomes[outcome] == count)


@pytest.fixture
def scene(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    """A daemon with one task at work."""
    monkeypatch.setattr(runner_module, "PROGRESS_PAUSE", 60)
    world.open(patch(1))
    with Scene(world) as scene:
        scene.begin("t1")
        yield scene


def edits(world: World) -> list[RecordedRequest]:
    """The edits of comments so far."""
    return world.requests("PATCH", "/issues/comments/")


def first_comment(world: World, number: int = 1) -> str:
    return world.issue(number).comments[0].body


def fence_of(text: str) -> str:
    """The line in the only fence of a comment."""
    match = re.search(r"(?m)^(`{3,})text\n(.*)\n\1$", text)
    assert match, text
    assert text.count(match[1]) == 2
    return match[2]


# -- when ------------------------------------------------------------------------------------------


def test_the_comment_of_a_short_task_is_not_edited(world: World) -> None:
    world.open(patch(1))
    world.run_once()
    world.open(patch(2))
    before = len(world.requests())
    world.run_once()
    assert len(world.requests()) - before <= 8
    assert edits(world) == []
    assert "so far" not in first_comment(world)


def test_nothing_is_told_before_a_minute_is_over(scene: Scene, world: World) -> None:
    scene.say("words\n")
    scene.later(59)
    assert edits(world) == []
    scene.later(1)
    assert len(edits(world)) == 1


def test_a_long_task_tells_its_phase_its_time_and_its_last_line(scene: Scene, world: World) -> None:
    before = first_comment(world)
    scene.say("first\nsecond\nthi")
    scene.later(65)
    assert first_comment(world).startswith(before.partition("\n")[0])
    assert "The agent is at work. 1 min 5 s so far. The last line of its output:" in first_comment(world)
    assert fence_of(first_comment(world)) == "second"
    assert first_comment(world).rstrip().endswith(" step=start -->")
    scene.say("rd\n")
    scene.later(65)
    assert "2 min 10 s so far" in first_comment(world)
    assert fence_of(first_comment(world)) == "third"


def test_an_agent_that_is_silent_has_no_last_line(scene: Scene, world: World) -> None:
    scene.later(65)
    assert "The agent is at work. 1 min 5 s so far." in first_comment(world)
    assert "```" not in first_comment(world)
    assert "last line" not in first_comment(world)


def test_it_is_told_at_most_once_a_minute_and_less_often_later(scene: Scene, world: World) -> None:
    told = []
    for second in range(0, 1200, 10):
        before = len(edits(world))
        scene.later(10)
        told += [second + 10] * (len(edits(world)) - before)
    pauses = [after - before for before, after in zip([0, *told], told, strict=False)]
    assert min(pauses) >= 60
    assert pauses[:5] == [60] * 5
    assert pauses == sorted(pauses)
    assert all(pause <= max(60, at / 4 + 10) for at, pause in zip(told, pauses, strict=True))
    assert pauses[-1] > 150


def test_it_is_told_in_time_without_anybody_waking_the_loop(scene: Scene, world: World) -> None:
    scene.clock.at += 60
    wait_until(lambda: len(edits(world)) == 1)
    scene.clock.at += 60
    wait_until(lambda: len(edits(world)) == 2)


@pytest.mark.parametrize("quota", [5000, 900], ids=["allowed", "not allowed"])
def test_the_loop_does_not_spin(scene: Scene, world: World, quota: int) -> None:
    world.github.rate_remaining = quota
    scene.runner.request_poll()
    scene.later(2)
    before = scene.turns
    for _ in range(30):
        scene.clock.at += 10
        threading.Event().wait(0.02)
    assert scene.turns - before < 50


def test_the_loop_of_one_round_does_not_spin_and_tells_it_too(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "PROGRESS_PAUSE", 60)
    world.open(patch(1))
    scene = Scene(world)
    work = threading.Thread(target=scene.runner.run_once)
    work.start()
    try:
        scene.begin("t1")
        scene.say("words\n")
        scene.clock.at += 61
        before = scene.turns
        threading.Event().wait(0.3)
        assert scene.turns - before < 20
        wait_until(lambda: len(edits(world)) == 1)
        assert fence_of(first_comment(world)) == "words"
    finally:
        (world.home / "go").touch()
        work.join(60)
    assert scene.runner.outcomes == {"done": 1}


def test_several_tasks_share_one_edit_a_minute_the_longest_untold_first(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "PROGRESS_PAUSE", 60)
    for number in (1, 2, 3):
        world.open(patch(number))
    with Scene(world) as scene:
        scene.begin("t1", "t2", "t3")
        told = []
        for _ in range(27):
            before = len(edits(world))
            scene.later(20)
            told.append([r.path.rpartition("/")[2] for r in edits(world)[before:]])
        assert all(len(batch) <= 1 for batch in told)
        at = [index for index, batch in enumerate(told) if batch]
        assert at == list(range(2, 27, 3))
        issues = {str(world.issue(number).comments[0].id): number for number in (1, 2, 3)}
        order = [issues[comment] for batch in told for comment in batch]
        assert sorted(order[:3]) == [1, 2, 3]
        assert order[:6] == order[:3] * 2
        assert order == order[:3] * 3


def test_runners_that_are_at_work_share_one_edit_a_minute(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "PROGRESS_PAUSE", 60)
    tree = world.github.git(TARGET, "rev-parse", "main^{tree}")
    for number, other in {7: "b", 8: "c", 9: "c"}.items():
        record = {"runner": other, "nonce": "0" * 16, "epoch": 1, "attempt": 1}
        claim = world.github.git(TARGET, "commit-tree", tree, "-m", json.dumps(record))
        world.github.git(TARGET, "update-ref", f"refs/agent-runner/claims/{DISPATCH}/{number}", claim)
    world.open(patch(1))
    with Scene(world) as scene:
        scene.begin("t1")
        told = []
        for second in range(0, 700, 10):
            before = len(edits(world))
            scene.later(10)
            told += [second + 10] * (len(edits(world)) - before)
    assert told == [60, 240, 420, 600]


def test_a_task_that_cannot_tell_does_not_keep_others_from_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "PROGRESS_PAUSE", 60)
    for number in (1, 2):
        world.open(patch(number))
    locked = Fault(method="POST", path=".*/issues/1/comments", status=403, times=None)  # a locked conversation
    world.github.faults.append(locked)
    with Scene(world) as scene:
        scene.begin("t1", "t2")
        for _ in range(4):
            scene.later(61)
        assert "so far" in first_comment(world, 2)
        before = scene.turns
        threading.Event().wait(0.2)
        assert scene.turns - before < 20


# -- when not ---------------------------------------------------------------------------------------


def test_nothing_is_told_while_little_of_the_quota_is_left(scene: Scene, world: World) -> None:
    world.github.rate_remaining = 900  # of 5000
    scene.runner.request_poll()
    scene.later(2)
    for _ in range(5):
        scene.later(61)
    assert edits(world) == []
    world.github.rate_remaining = 4000
    scene.runner.request_poll()
    for _ in range(2):
        scene.later(61)
    assert len(edits(world)) >= 1


def test_nothing_is_told_while_a_limit_lasts_and_the_loop_goes_on(scene: Scene, world: World) -> None:
    path = f"/repos/{DISPATCH}"
    world.github.faults.append(Fault(path=path, status=429, headers={"retry-after": "3000"}))
    other = threading.Thread(target=scene.runner.github.request, args=("GET", path))
    other.start()
    wait_until(scene.runner.github.paused)
    for _ in range(5):
        scene.later(61)
    assert edits(world) == []
    scene.clock.at += 3000
    other.join(30)
    scene.later(61)
    assert len(edits(world)) == 1


@pytest.mark.parametrize("scarce", [{"rate_remaining": 900}, {}], ids=["little quota", "enough"])
def test_a_new_phase_is_not_told_in_excess(
    world: World, monkeypatch: pytest.MonkeyPatch, scarce: dict[str, int]
) -> None:
    """A task that was long prepared says so, and each milestone that follows once; nothing with few requests left."""
    monkeypatch.setattr(runner_module, "PROGRESS_PAUSE", 60)
    world.open(patch(1))
    scene = Scene(world)

    def some_minutes_later() -> None:
        wait_until(lambda: world.issue().comments)
        for name, value in scarce.items():
            setattr(world.github, name, value)
        scene.runner.github.request("GET", f"/repos/{DISPATCH}")  # so that the runner knows it
        scene.clock.at += 600
        if not scarce:
            wait_until(lambda: len(edits(world)) == 1)

    world.github.faults.append(
        Fault(kind="git", method="POST", path=".*widgets.git/git-upload-pack", after=1, action=some_minutes_later)
    )
    with scene:
        scene.begin("t1")
        scene.finish()
        told = [next(words for words in AT_WORK if words in r.json["body"]) for r in edits(world)[:-1]]
        assert told == sorted({*told}, key=["being fetched", "at work", "being published"].index)
        assert ("being fetched" in told) is not bool(scarce)
        assert edits(world) == [] or "Worked on it" in edits(world)[-1].json["body"]
        assert bool(edits(world)) is not bool(scarce)


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 404},
        {"status": 403},
        {"status": 502},
        {"drop": "before"},
        {"drop": "after"},
        {"status": 200, "body": b"x"},
    ],
    ids=str,
)
def test_an_edit_that_fails_costs_nothing(scene: Scene, world: World, fault: dict[str, Any]) -> None:
    spoiled = Fault(method="PATCH", path=".*/issues/comments/.*", times=1, **fault)
    world.github.faults.append(spoiled)
    scene.say("words\n")
    scene.later(61)
    assert spoiled.seen == 1
    scene.later(30)
    assert spoiled.seen == 1
    scene.later(31)
    assert spoiled.seen == 2
    assert "2 min 2 s so far" in first_comment(world)
    scene.finish()
    assert world.labels() == ["agent-done", "copilot-agent"]


def test_edits_stop_when_the_claim_is_lost(scene: Scene, world: World) -> None:
    scene.later(61)
    assert len(edits(world)) == 1
    (attempt,) = scene.runner._running.values()
    scene.clock.at += 1_000_000  # without a renewal
    scene.runner.wake.set()
    wait_until(lambda: scene.runner.outcomes["dropped"] or attempt.claim.lost)
    (world.home / "go").touch()
    wait_until(lambda: scene.runner.outcomes["dropped"])
    assert len(edits(world)) == 1
    assert len(world.issue().comments) == 1


# -- what ------------------------------------------------------------------------------------------


def test_when_it_ends_the_comment_does_not_say_that_it_is_at_work(scene: Scene, world: World) -> None:
    scene.say("words\n")
    scene.later(61)
    assert "at work" in first_comment(world)
    scene.finish()
    first, last = (comment.body for comment in world.issue().comments)
    assert not any(words in first for words in (*AT_WORK, "words", "```"))
    assert "Worked on it: task `t1` in acme/widgets, attempt 1, 1 min 1 s." in first
    assert last.startswith("Done: ")


def test_what_was_told_of_a_task_that_is_stopped_is_told_no_more(scene: Scene, world: World) -> None:
    scene.say("words\n")
    scene.later(61)
    scene.daemon.end(now=True)
    assert "The runner was stopped" in first_comment(world)
    assert not any(words in first_comment(world) for words in AT_WORK)


def test_a_cancelled_task_is_told_no_more(scene: Scene, world: World) -> None:
    scene.later(61)
    world.github.close_issue(DISPATCH, 1)
    scene.runner._look_in = True
    scene.runner.wake.set()
    wait_until(lambda: scene.runner.outcomes["cancelled"])
    assert first_comment(world).startswith("Cancelled: ")
    scene.later(200)
    assert first_comment(world).startswith("Cancelled: ")


def test_the_last_line_of_an_earlier_run_is_not_taken_for_this_ones(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "PROGRESS_PAUSE", 60)
    old = world.folder / "state/logs/1-1.log"
    old.parent.mkdir(parents=True)
    old.write_text("words of another run\n")
    world.open(patch(1))
    scene = Scene(world)
    world.github.faults.append(
        Fault(
            kind="git",
            method="POST",
            path=".*widgets.git/git-upload-pack",
            after=1,
            action=lambda: setattr(scene.clock, "at", scene.clock.at + 100),
        )
    )
    with scene:
        scene.begin("t1")
        scene.later(61)
        assert not any("another run" in r.json["body"] for r in edits(world))


HOSTILE = {
    "a mention": "ask @octocat and @acme/team",
    "closing words": "fixes #1, closes acme/dispatch#1 and resolves https://github.com/acme/dispatch/issues/1",
    "a comment's end": "--> <!-- agent_task_metadata {} -->",
    "a marker": "<!-- agent-runner run=0123456789abcdef step=end -->",
    "fences": "``` ````` ~~~",
    "a fence": "````",
    "colours": "\x1b[31mred\x1b[0m \x1b]0;title\x07 \x9b1m",
    "direction": "a\u202eb\u2066c",
    "HTML": "<script>alert(1)</script><img src=x> &#64;octocat",
    "table": "| a | b |",
    "wide": "修正" * 300,
    "bytes": "a\udcff\udcfeb\x00c",
    "a progress bar": "10 %\r20 %\r30 %",
}


@pytest.mark.parametrize("words", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_line_is_fenced_and_harmless(scene: Scene, world: World, words: str) -> None:
    scene.say(words.encode("utf-8", "surrogateescape") + b"\n")
    scene.later(61)
    body = first_comment(world)
    shown = fence_of(body)
    assert len(shown) <= 200 + 20
    assert not re.search("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", shown)
    assert body.count("<!--") == 1 == body.count(" step=start -->")
    assert not re.search(r"(fixes|closes|resolves) (#|acme|http)", body)
    assert body.splitlines().count(shown) == 1 or not shown
    scene.finish()
    assert len(world.issue().comments) == 2


def test_a_line_without_an_end_in_sight_is_not_shown(scene: Scene, world: World) -> None:
    scene.say("short\n")
    scene.say("x" * 10_000)
    scene.later(61)
    assert "xxx" not in first_comment(world)
    scene.say("\nnext\n")
    scene.later(61)
    assert fence_of(first_comment(world)) == "next"


def test_secrets_are_masked_also_half_printed_ones(scene: Scene, world: World) -> None:
    token = world.github.token
    scene.say(f"whole {token} one\n{token[:20]}")
    scene.later(61)
    assert fence_of(first_comment(world)) == "whole *** one"
    scene.say(f"{token[20:]}\n")
    scene.later(61)
    assert fence_of(first_comment(world)) == "***"
    scene.say(f"{'y' * 10_000}{token}\n")  # a window can cut it anywhere
    scene.later(61)
    scene.finish()
    bodies = [r.json["body"] for r in edits(world)]
    assert not any(token[n : n + 8] in body for body in bodies for n in range(len(token) - 8))


@given(
    before=st.integers(0, 2 * LIVE_KEPT),
    after=st.integers(0, 2 * LIVE_KEPT),
    end=st.sampled_from(["", "\n", "\r", " z\n"]),
)
def test_no_piece_of_a_secret_is_shown_wherever_the_window_begins(
    tmp_path_factory: pytest.TempPathFactory, before: int, after: int, end: str
) -> None:
    token = "ghp_" + "".join(chr(ord("A") + n % 26) + str(n % 10) for n in range(18))
    config, file = make_config({"GITHUB_TOKEN": token}), tmp_path_factory.getbasetemp() / "window"
    file.write_text(f"{'.' * before}{token}{',' * after}{end}")
    shown = last_line(config, file)
    assert not any(token[n : n + 4] in shown for n in range(len(token) - 3))
    assert len(shown) <= 200


def test_the_last_line_is_the_last_whole_one_that_says_something(config: Config, tmp_path: Path) -> None:
    file = tmp_path / "log"
    assert last_line(config, file) == ""
    for text, line in {
        "": "",
        "one": "",
        "one\n": "one",
        "one\ntwo": "one",
        "one\n\n \t\n": "one",
        "one\r\ntwo\r\nthree": "two",
        "1 %\r2 %\r3 %": "2 %",
        "a\n" + "b" * LIVE_KEPT: "",
        "b" * (LIVE_KEPT - 2) + "\nc": "b" * 200,
        "a\n" + "b" * (LIVE_KEPT - 2) + "\nc": "",  # it may begin before the window
        "a" * LIVE_KEPT + "\nb\n": "b",
        "  many   blanks \tin  it  \n": "many blanks in it",
    }.items():
        file.write_bytes(text.encode())
        assert last_line(config, file) == line, text[-30:]


# -- the loop and the worker at the same time -------------------------------------------------------


class Meddling(FastClock):
    """A clock at each reading of which, by a worker, the loop happens to have progress told."""

    def __init__(self) -> None:
        self.runner: Runner | None = None
        self.tales: list[threading.Thread] = []

    def monotonic(self) -> float:
        if self.runner and threading.current_thread().name.startswith("task"):
            for attempt in list(self.runner._running.values()):
                self.tales.append(threading.Thread(target=attempt.tell))
                self.tales[-1].start()
                self.tales[-1].join(0.2)  # it may have to wait for what the worker holds
        return super().monotonic()


@pytest.mark.parametrize("end", ["retry", "done", "failed"])
def test_whenever_the_loop_tells_nothing_stale_is_left(world: World, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    monkeypatch.setattr(runner_module, "PROGRESS_PAUSE", 0)
    code = {
        "retry": RETRY + "    raise runner.TaskRetry('busy')",
        "done": "def process_task(task, workspace):\n    open('new', 'w')",
        "failed": "def process_task(task, workspace):\n    pass",
    }[end]
    world.open(dispatch_body())
    clock = Meddling()
    runner = world.runner(clock, AGENT_PROCESS_TASK=plugin(world.home, code), AGENT_MAX_ATTEMPTS="2")
    clock.runner = runner
    runner.queue.poll()
    runner._look_around()
    runner._admit()
    wait_until(lambda: all(future.done() for future in runner._running), 60)
    clock.runner = None
    for tale in clock.tales:
        tale.join(30)
    assert any("so far" in r.json["body"] for r in edits(world))
    assert not any(words in first_comment(world) for words in AT_WORK), first_comment(world)
    assert ("It will be tried again" in first_comment(world)) == (end == "retry")


def test_what_a_worker_says_itself_is_not_overtaken(scene: Scene, world: World) -> None:
    """While its own edit is under way the loop does not wait for it, and says nothing."""
    scene.say("words\n")
    scene.later(61)
    under_way, go_on, held = threading.Event(), threading.Event(), list[bool]()

    def hold() -> None:
        under_way.set()
        held.append(go_on.wait(20))

    last_word = Fault(method="PATCH", where=lambda r: "Worked on it" in str(r.json), action=hold)
    world.github.faults.append(last_word)
    (world.home / "go").touch()
    assert under_way.wait(30)
    (attempt,) = scene.runner._running.values()
    attempt.tell()  # comes back at once
    go_on.set()
    wait_until(lambda: scene.runner.outcomes["done"])
    assert held == [True]
    assert "Worked on it" in edits(world)[-1].json["body"]
    assert last_word.seen == 1


# -- the file of the agent's output -----------------------------------------------------------------


def reference(output: bytes) -> bytes:
    """What a file is to hold of an agent's output: the first 4 MB, a note, and the last 64 KB."""
    if len(output) <= LOG_KEPT:
        return output
    rest = output[LOG_KEPT:]
    missing = len(rest) - OUTPUT_KEPT
    note = b"\n[... %d bytes left out ...]\n" % missing if missing > 0 else b""
    return output[:LOG_KEPT] + note + rest[-OUTPUT_KEPT:]


def numbered(size: int) -> bytes:
    """So many bytes, of which no two places are alike."""
    return b"".join(b"%015d\n" % n for n in range(size // 16 + 1))[:size]


@pytest.mark.parametrize(
    "size",
    [
        0, 1, LOG_KEPT - 1, LOG_KEPT, LOG_KEPT + 1, LOG_KEPT + LIVE_KEPT, LOG_KEPT + LIVE_KEPT + 1,
        LOG_KEPT + OUTPUT_KEPT - 1, LOG_KEPT + OUTPUT_KEPT, LOG_KEPT + OUTPUT_KEPT + 1, 2 * LOG_KEPT + 7, 5 * LOG_KEPT,
    ],
)  # fmt: skip
@pytest.mark.parametrize("block", [OUTPUT_KEPT, 9_999, 3 * OUTPUT_KEPT])
def test_the_file_holds_the_beginning_and_the_end_exactly(tmp_path: Path, size: int, block: int) -> None:
    data, output = numbered(size), Output(str(tmp_path / "log"))
    for start in range(0, size, block):
        output.add(data[start : start + block])
    output.add(b"")  # the end of a pipe
    output.close()
    assert (tmp_path / "log").read_bytes() == reference(data)
    assert output.tail == data[-OUTPUT_KEPT:]


@pytest.mark.parametrize("size", [LOG_KEPT, LOG_KEPT + 100, 2 * LOG_KEPT + 16])
def test_the_last_line_can_be_seen_while_an_agent_runs(config: Config, tmp_path: Path, size: int) -> None:
    output, data = Output(str(tmp_path / "log")), numbered(size // 16 * 16)
    for start in range(0, len(data), 60_000):
        output.add(data[start : start + 60_000])
        line = last_line(config, tmp_path / "log")
        assert line == (data[: start + 60_000].rpartition(b"\n")[0].rpartition(b"\n")[2]).decode()
    output.add(b"one more\nand a ")
    assert last_line(config, tmp_path / "log") == "one more"
    output.close()
    assert (tmp_path / "log").read_bytes() == reference(data + b"one more\nand a ")


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.mark.parametrize("size", [1000, LOG_KEPT + 1000, 3 * LOG_KEPT], ids=["little", "more", "much"])
def test_a_supervisor_shows_what_its_agent_says_as_it_goes(bench: Bench, size: int) -> None:
    code = f"""
        import os, time
        data = b"".join(b"%015d\\n" % n for n in range({size} // 16 + 1))[:{size}] + b"\\nlast but one\\nla"
        while data:
            data = data[os.write(1, data[:65536]):]
        while not os.path.exists("go"):
            time.sleep(0.01)
        os.write(1, b"st\\n")
    """
    config, order = bench.order(code)
    done: list[Any] = []
    work = threading.Thread(target=lambda: done.append(run_supervised(config, order)))
    work.start()
    try:
        wait_until(lambda: last_line(config, bench.log) == "last but one", 60)
        assert bench.log.stat().st_size <= LOG_KEPT + LIVE_KEPT + 1
    finally:
        (bench.tree / "go").touch()
        work.join(60)
    data = numbered(size) + b"\nlast but one\nlast\n"
    assert bench.log.read_bytes() == reference(data)
    assert done[0].out == data[-OUTPUT_KEPT:].decode()


def test_the_file_of_an_agent_that_was_stopped_is_masked_too(scene: Scene, world: World) -> None:
    log = scene.runner.config.state_dir / "logs" / "1-1.log"
    scene.say(f"my token is {world.github.token}\n")
    assert world.github.token in log.read_text()  # it is the runner's own, for the moment
    assert log.stat().st_mode & 0o777 == 0o600
    scene.daemon.end(now=True)
    assert scene.runner.outcomes == {"stopped": 1}
    assert log.read_text() == "my token is ***\n"


def test_the_status_shows_phase_time_and_last_line(scene: Scene, world: World) -> None:
    scene.say(f"{world.github.token} words\n")
    scene.later(30)
    (task,) = runner_module.describe(scene.runner)["running"]
    assert (task["phase"], task["seconds"], task["last_line"]) == ("working", 30, "*** words")
    scene.finish()
    assert runner_module.describe(scene.runner)["running"] == []
