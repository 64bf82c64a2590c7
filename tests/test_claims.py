"""Claims: who gets one, when it may be taken over, what is left behind and cleared away."""

from __future__ import annotations

import functools
import itertools
import json
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import DISPATCH, PATCH, TARGET, Daemon, FakeClock, World, make_config, wait_until
from standin import Fault
from test_cli import finish
from test_faults import Agent, about

from runner import Claim, ClaimLost, Clock, RefMoved, Runner, Seen, Unreachable, claims_prefix, read_record

CLAIM = f"refs/agent-runner/claims/{DISPATCH}/1"
RECORD = {"runner": "another", "nonce": "0123456789abcdef", "epoch": 2, "attempt": 2, "time": "", "body": ""}


def claim_of(runner: Runner, seen: Seen | None = None) -> Claim:
    return Claim(runner, 1, seen or Seen(TARGET, "", 0, {}), "", threading.Event())


def put_claim(world: World, message: str | None = None, ref: str = CLAIM, **record: Any) -> str:
    """Another runner's claim, of issue 1 as a rule, moved on each time; its commit."""
    tree = world.github.git(TARGET, "hash-object", "-t", "tree", "-w", os.devnull)
    text = message or json.dumps(RECORD | {"time": str(os.urandom(4))} | record)
    commit = world.github.git(TARGET, "commit-tree", tree, "-m", text)
    world.github.git(TARGET, "update-ref", ref, commit)
    return commit


def record_of(world: World) -> dict[str, Any]:
    return read_record(world.github.git(TARGET, "log", "-1", "--format=%B", CLAIM))


def places(world: World, count: int) -> list[Runner]:
    """Several runners, each on a state folder of its own."""
    return [
        world.runner(AGENT_STATE_DIR=str(world.folder / f"state-{n}"), AGENT_RUNNER_ID=f"r{n}") for n in range(count)
    ]


# -- who gets it -----------------------------------------------------------------------------------


@pytest.mark.race
def test_of_eight_racers_one_wins_in_each_of_a_hundred_rounds(world: World) -> None:
    runners = places(world, 8)
    with ThreadPoolExecutor(8) as pool:
        for _ in range(100):
            claims = [claim_of(runner) for runner in runners]
            barrier = threading.Barrier(8)

            def race(claim: Claim, barrier: threading.Barrier = barrier) -> bool:
                barrier.wait()
                return claim.take()

            won = list(pool.map(race, claims))
            assert won.count(True) == 1
            claims[won.index(True)].release()
            assert world.claims() == []
            for claim in claims:
                claim.close()


def test_of_several_that_take_over_an_old_claim_one_wins(world: World) -> None:
    seen = Seen(TARGET, put_claim(world), 0, RECORD)
    claims = [claim_of(runner, seen) for runner in places(world, 4)]
    with ThreadPoolExecutor(4) as pool:
        won = list(pool.map(Claim.take, claims))
    assert won.count(True) == 1
    record = record_of(world)
    assert (record["nonce"], record["epoch"], record["attempt"]) == ("0123456789abcdef", 3, 3)
    for claim in claims:
        claim.release()
    assert world.claims() == []


def test_a_claim_says_whose_it_is_and_starts_no_workflow(world: World) -> None:
    claim = claim_of(world.runner(AGENT_RUNNER_ID="me"))
    assert claim.take()
    record = record_of(world)
    assert record["runner"] == "me"
    assert (record["epoch"], record["attempt"], record["nonce"]) == (1, 1, claim.nonce)
    assert world.github.git(TARGET, "ls-tree", "-r", CLAIM) == ""
    assert world.claims() == [CLAIM]
    claim.release()
    assert world.claims() == []


def test_a_claim_can_be_kept_among_the_branches(world: World) -> None:
    agent = Agent(world.home, f'git --git-dir="{world.github.repository(TARGET).path}" for-each-ref > refs.txt;')
    world.open("Do something.")
    world.run_once(AGENT_CLAIM_REFS="refs/heads/agent-claims", **agent.env)
    shown = world.github.git(TARGET, "show", f"{world.pull().head}:refs.txt")
    assert f"refs/heads/agent-claims/{DISPATCH}/1" in shown
    assert "agent-claims" not in world.github.git(TARGET, "for-each-ref")


@pytest.mark.parametrize("name", ["acme/.github", "acme/a..b", "acme/x.lock", "acme/...", "Acme/Dispatch.js"])
def test_every_dispatch_repository_has_a_place_for_its_claims(name: str) -> None:
    ref = f"{claims_prefix(make_config({'AGENT_DISPATCH_REPO': name}))}1"
    subprocess.run(["git", "check-ref-format", ref], check=True)
    assert ref.startswith("refs/agent-runner/claims/acme/")
    assert ref == ref.lower()


# -- how it is kept --------------------------------------------------------------------------------


def test_a_claim_that_another_runner_has_taken_over_can_publish_nothing(world: World) -> None:
    runner = world.runner()
    claim = claim_of(runner)
    assert claim.take()
    stolen, tip = put_claim(world), world.github.git(TARGET, "rev-parse", "main")
    with pytest.raises(ClaimLost, match="another runner has it"):
        claim.renew({"refs/heads/agent-task-1": ("", tip)}, claim.path)
    assert "agent-task-1" not in world.github.git(TARGET, "for-each-ref")
    claim.release()
    assert world.github.git(TARGET, "rev-parse", CLAIM) == stolen


def test_a_claim_is_given_up_when_it_was_not_renewed_for_two_thirds_of_a_lease(world: World) -> None:
    clock = FakeClock()
    claim = claim_of(world.runner(clock))
    claim._over.set()  # without renewals
    assert claim.take()
    clock.at += 399
    claim.check()
    clock.at += 2
    with pytest.raises(ClaimLost, match="not renewed for 6 min 41 s"):
        claim.check()
    claim._move = pytest.fail  # type: ignore[method-assign, assignment]
    claim.release()  # which must not delete what may be somebody else's


def test_a_renewal_that_got_through_unseen_is_not_taken_for_a_theft(world: World) -> None:
    runner, seconds = world.runner(), itertools.count(1_800_000_000)
    runner.clock.now = lambda: float(next(seconds))  # type: ignore[method-assign]
    claim = claim_of(runner)
    assert claim.take()
    lost = {"kind": "git", "method": "POST", "path": ".*receive-pack", "drop": "after"}
    world.github.faults += [Fault(**lost), Fault(kind="git", path=".*/info/refs", after=1, status=502)]  # type: ignore[arg-type]
    before = world.github.git(TARGET, "rev-parse", CLAIM)
    with pytest.raises(Unreachable):
        claim.renew()
    assert world.github.git(TARGET, "rev-parse", CLAIM) != before
    with pytest.raises(Unreachable, match="renewed late"):
        claim.renew()
    claim.renew()
    claim.check()
    claim.release()
    assert world.claims() == []


def test_a_branch_that_somebody_else_made_meanwhile_leaves_the_claim(world: World) -> None:
    claim = claim_of(world.runner())
    assert claim.take()
    world.github.git(TARGET, "branch", "agent-task-1", "main")
    tip = world.github.commit(TARGET, {"a": "b"})
    with pytest.raises(RefMoved, match="agent-task-1"):
        claim.renew({"refs/heads/agent-task-1": ("", tip or "main")}, world.github.repository(TARGET).path)
    claim.check()
    claim.release()
    assert world.claims() == []


# -- when it may be taken over ---------------------------------------------------------------------


def look(runner: Runner, clock: FakeClock, seconds: float = 0) -> bool:
    """Some time later: reads the claims; whether issue 1 may be had."""
    clock.at += seconds
    runner._next_look = 0
    runner._look_around()
    return runner._is_free(1)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def watching(world: World, clock: Clock, **env: str) -> Runner:
    """A runner that has read the queue."""
    runner = world.runner(clock, **env)
    runner.queue.poll()
    return runner


def test_a_claim_may_be_taken_over_when_it_has_not_changed_for_a_lease(world: World, clock: FakeClock) -> None:
    world.open(PATCH)
    put_claim(world)
    runner = watching(world, clock)
    assert not look(runner, clock)
    assert not look(runner, clock, 599)
    put_claim(world)
    assert not look(runner, clock, 2)
    assert not look(runner, clock, 599)
    assert look(runner, clock, 2)


def test_an_issue_in_work_without_a_claim_is_left_for_a_lease(world: World, clock: FakeClock) -> None:
    world.open(PATCH, labels=["copilot-agent", "agent-processing"])
    runner = watching(world, clock)
    assert not runner._is_free(1)
    assert not look(runner, clock)
    assert not look(runner, clock, 599)
    assert look(runner, clock, 2)


def test_a_runner_that_comes_back_takes_up_its_own_claims_at_once(world: World, clock: FakeClock) -> None:
    world.open(PATCH)
    put_claim(world, runner="me")
    world.github.faults.append(Fault(kind="git", status=502))  # the first look fails
    runner = watching(world, clock, AGENT_RUNNER_ID="me")
    look(runner, clock)
    assert look(runner, clock)
    put_claim(world, runner="me")  # but not those that another one of this name makes later
    assert not look(runner, clock)


def test_what_is_no_claim_is_taken_over_too(world: World, clock: FakeClock) -> None:
    world.open(PATCH)
    for junk in (
        "junk",
        "[]",
        '{"nonce": "x"}',
        '{"nonce": "0123456789abcdef", "epoch": -1, "attempt": 1}',
        "[" * 9999,
    ):
        put_claim(world, junk)
        runner = watching(world, clock)
        assert not look(runner, clock)
        assert look(runner, clock, 601)
    world.github.git(TARGET, "update-ref", f"{CLAIM}x", "main")
    runner.run_once()
    assert world.labels() == ["agent-done", "copilot-agent"]


@pytest.mark.parametrize("over", ["closed", "done"])
def test_a_claim_that_nobody_needs_is_swept_with_its_label(world: World, over: str) -> None:
    label = ["agent-done"] if over == "done" else []
    world.open(PATCH, labels=["copilot-agent", "agent-processing", *label])
    if over == "closed":
        world.github.close_issue(DISPATCH, 1)
    put_claim(world)
    with Daemon(world.runner(AGENT_LEASE="3", AGENT_POLL_INTERVAL="1")):
        wait_until(lambda: world.claims() == [])
    assert world.labels() == sorted(["copilot-agent", *label])
    assert world.github.pulls(TARGET) == []


def test_attempts_are_counted_over_runners(world: World) -> None:
    world.open(PATCH)
    put_claim(world, attempt=3, runner="me")
    world.run_once(AGENT_RUNNER_ID="me")
    assert world.labels() == ["agent-failed", "copilot-agent"]
    assert "broke off 3 attempts" in world.last_comment()
    world.github.remove_label(DISPATCH, 1, "agent-failed")
    world.run_once()
    assert "| Attempt | 1 |" in world.last_comment()
    assert world.labels() == ["agent-done", "copilot-agent"]


def test_an_issue_that_is_edited_while_it_is_claimed_goes_to_its_new_target(world: World) -> None:
    world.github.add_repository("acme/gadgets", files={"README.md": "# Widgets\n"})
    world.open(PATCH)
    body = f'{PATCH}\n<!-- agent_task_metadata {{"target_repo": "acme/gadgets"}} -->'
    edit = Fault(path=".*/issues/1", action=lambda: world.github.edit_issue(DISPATCH, 1, body=body))
    world.github.faults.append(edit)
    with Daemon(world.runner(AGENT_ALLOWED_TARGETS="acme/*", AGENT_POLL_INTERVAL="1")):
        wait_until(lambda: "agent-done" in world.labels())
        wait_until(lambda: world.github.git("acme/gadgets", "for-each-ref", "refs/agent-runner") == "")
    assert world.github.pulls(TARGET) == []
    assert len(world.github.pulls("acme/gadgets")) == 1


def test_two_issues_with_one_id_at_the_same_time_are_two_tasks(world: World) -> None:
    """Whoever comes second names the first."""
    for _ in range(2):
        world.open(about(1))
    agent = Agent(world.home, f'while [ $(wc -l < "{world.home}/runs") -lt 2 ]; do sleep 0.05; done;')
    runner = world.runner(None, AGENT_MAX_CONCURRENT="2", **agent.env)
    runner.clock.jitter = lambda seconds: 0.1  # type: ignore[method-assign]
    runner.run_once()
    assert runner.outcomes == {"done": 1, "failed": 1}
    first, second = (1, 2) if "agent-done" in world.labels(1) else (2, 1)
    assert f"of {DISPATCH}#{first}" in world.last_comment(second)
    assert world.pull().body
    assert world.claims() == []


def test_an_issue_that_another_runner_has_is_not_run_and_said_to_be_elsewhere(world: World) -> None:
    world.open(PATCH)
    put_claim(world)
    code, _, err = finish(world.start("--issue", "1"))
    assert code == 1
    assert "issue=1 is in the hands of another runner" in err
    assert finish(world.start("--once"))[0] == 0
    assert world.issue().comments == []


def first_push(action: Callable[[], None]) -> Fault:
    """Has something happen when a runner that has read queue and claims begins to claim an issue."""
    return Fault(kind="git", where=lambda r: r.query.get("service") == "git-receive-pack", action=action)


def test_who_loses_an_issue_does_not_try_the_others_that_are_taken(world: World) -> None:
    for _ in range(4):
        world.open()

    def take() -> None:
        for number in (1, 2, 3):
            put_claim(world, ref=f"{CLAIM.rpartition('/')[0]}/{number}")

    world.github.faults.append(first_push(take))
    runner = world.run_once(AGENT_MAX_CONCURRENT="1")
    assert (runner.metrics.value("claims_total", "lost"), runner.metrics.value("claims_total", "won")) == (1, 1)
    assert "agent-done" in world.issue(4).labels


def test_runners_that_lost_the_same_issue_do_not_meet_again_at_the_next(world: World) -> None:
    for _ in range(9):
        world.open()
    runners = [
        world.runner(AGENT_RUNNER_ID=name, AGENT_STATE_DIR=str(world.folder / name), AGENT_MAX_CONCURRENT="2")
        for name in ("a", "c", "e")
    ]
    for runner in runners:
        runner.queue.poll()
        runner._lost = True
    for runner in runners:
        runner._admit()
    begun = [[attempt.number for attempt in runner.at_work()[0]] for runner in runners]
    for runner in runners:
        runner._drain()
    assert begun == [[8, 9], [3, 4], [6, 7]]
    assert all(runner.outcomes == {"done": 2} for runner in runners)
    assert not any(runner._lost for runner in runners)


def test_an_issue_that_is_over_has_the_list_read_again_before_others_are_tried(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runner.WAKE_PAUSE", 0)
    for _ in range(4):
        world.open()

    def finish_them() -> None:
        for number in (1, 2, 3):
            world.github.add_label(DISPATCH, number, "agent-done")

    world.github.faults.append(first_push(finish_them))
    runner = world.runner(None, AGENT_MAX_CONCURRENT="1")

    def is_done() -> bool:
        runner.tick()
        return runner.outcomes["done"] > 0

    wait_until(is_done)
    assert runner.outcomes == {"skipped": 1, "done": 1}
    assert "agent-done" in world.issue(4).labels


# -- what is left on the disk ----------------------------------------------------------------------


def test_what_dead_processes_left_is_deleted_and_what_living_ones_have_is_not(world: World) -> None:
    work = world.folder / "state/work"
    alive = world.runner()
    (alive.folder / "mine").mkdir(parents=True)
    for name in ("1", "2", "3"):
        (work / name / "1/run/tree").mkdir(parents=True)
        (work / f"{name}.lock").touch()
    (work / "3/1/run/tree").chmod(0)
    second = world.runner()
    assert second.folder.name == "1"
    assert second.id == f"{alive.id}/1"
    assert sorted(path.name for path in work.iterdir() if path.is_dir()) == ["0"]
    assert (alive.folder / "mine").exists()


def test_a_workspace_that_a_killed_runner_left_is_gone_after_the_next_start(world: World) -> None:
    world.open("Do something.")
    process = world.start("--once", AGENT_COMMAND="sleep 60")
    wait_until(lambda: list(world.folder.glob("state/work/0/1/run/tree/README.md")))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    world.run_once(AGENT_COMMAND="touch new.txt")
    assert world.labels() == ["agent-done", "copilot-agent"]
    assert [path.name for path in (world.folder / "state/work").iterdir()] == ["0.lock"]


def mirror_of(world: World, name: str = TARGET) -> Path:
    return world.folder / f"state/repos/{name}.git"


def cut_off(mirror: Path, size: int) -> None:
    for path in (mirror / "objects").rglob("*"):
        if path.is_file():
            path.chmod(0o600)
            path.write_bytes(path.read_bytes()[:size])


BROKEN: dict[str, Callable[[Path], object]] = {
    "no objects": lambda mirror: shutil.rmtree(mirror / "objects/pack"),
    "no folder for objects": lambda mirror: shutil.rmtree(mirror / "objects"),
    "cut off objects": functools.partial(cut_off, size=20),
    "empty objects": functools.partial(cut_off, size=0),
    "no HEAD": lambda mirror: (mirror / "HEAD").unlink(),
    "an odd configuration": lambda mirror: (mirror / "config").write_text("[core"),
    "an odd ref": lambda mirror: [path.write_text("x") for path in (mirror / "refs/mirror").iterdir()],
}


@pytest.mark.parametrize("moved", [False, True], ids=["same base", "new base"])
@pytest.mark.parametrize("how", BROKEN)
def test_a_mirror_that_is_broken_is_made_anew(world: World, how: str, moved: bool) -> None:
    world.open(about(1))
    world.run_once(AGENT_COMMAND="touch 1.txt")
    BROKEN[how](mirror_of(world))
    if moved:
        world.github.commit(TARGET, {"second.txt": "2\n"})
    world.open(about(2))
    assert world.run_once(AGENT_COMMAND="touch 2.txt").outcomes == {"done": 1}
    assert world.labels(2) == ["agent-done", "copilot-agent"]


def test_mirrors_that_nobody_uses_make_room_for_others(world: World) -> None:
    for name in ("acme/one", "acme/two", "acme/three"):
        world.github.add_repository(name, files={"README.md": "# Widgets\n", "large.bin": os.urandom(700_000)})
    for number, name in enumerate(("acme/one", "acme/two", "acme/three"), 1):
        world.open(f'{PATCH}\n<!-- agent_task_metadata {{"target_repo": "{name}", "task_id": "t{number}"}} -->')
        world.run_once(AGENT_ALLOWED_TARGETS="acme/*", AGENT_DISK_BUDGET_MB="1")
        assert "agent-done" in world.labels(number)
    assert [mirror_of(world, name).exists() for name in ("acme/one", "acme/two", "acme/three")] == [False, True, True]


def test_a_task_waits_for_room_on_the_disk(world: World) -> None:
    world.open(PATCH)
    large = world.runner().folder / "large"
    large.parent.mkdir()
    large.write_bytes(os.urandom(1_100_000))
    runner = world.runner(AGENT_DISK_BUDGET_MB="1", AGENT_MAX_ATTEMPTS="1")
    runner.run_once()
    assert "AGENT_DISK_BUDGET_MB allows fewer" in world.last_comment()
