"""What may go wrong at each single request of a task: the runner dies, an answer is lost, GitHub fails or is full."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from conftest import DISPATCH, PATCH, TARGET, Daemon, FastClock, World, wait_until
from standin import Fault, RecordedRequest
from test_cli import finish

from runner import Clock, GitHub

PUSH = ["GET git-receive-pack", "POST git-receive-pack"]
LIST_REFS = ["GET git-upload-pack", "POST git-upload-pack"]
HAPPY = [  # the requests of the first task that a runner does, and of nothing else
    "GET dispatch/issues",
    *LIST_REFS,  # the claims of all runners
    *PUSH,  # the claim
    "GET dispatch/issues/1",
    "POST dispatch/issues/1/labels",
    "PATCH dispatch/labels/agent-processing",  # the looks of a label that is new
    "POST dispatch/issues/1/comments",
    *LIST_REFS,
    *LIST_REFS,
    "POST git-upload-pack",  # the second half of a fetch
    *PUSH,  # the branch, and the claim moves on
    "POST widgets/pulls",
    "POST dispatch/issues/1/comments",
    "POST dispatch/issues/1/labels",
    "PATCH dispatch/labels/agent-done",
    "DELETE dispatch/issues/1/labels/agent-processing",
    *PUSH,  # the claim's end
]
REST = [index for index, step in enumerate(HAPPY) if "git-" not in step]
REST_WRITES = [index for index in REST if not HAPPY[index].startswith("GET")]
PUSHES = [index for index, step in enumerate(HAPPY) if "receive-pack" in step]
WRITES = sorted(REST_WRITES + [index for index in PUSHES if HAPPY[index].startswith("POST")])


def named(index: int) -> str:
    return f"{index}-{HAPPY[index]}".replace("/", ":")


def step_of(request: RecordedRequest) -> str:
    """A request as HAPPY names it."""
    service = request.query.get("service", request.path.rpartition("/")[2])
    return f"{request.method} {service if request.kind == 'git' else request.path.removeprefix('/repos/acme/')}"


def at_request(index: int, **fault: Any) -> Fault:
    """What goes wrong at one request, counted from the first of all, whatever it is."""
    return Fault(kind="*", after=index, **fault)


class Agent:
    """A small shell agent that writes down each of its runs: task and process."""

    def __init__(self, folder: Path, code: str = "") -> None:
        self.log, self._go = folder / "runs", folder / "go"
        self.env = {
            "AGENT_SHELL": "yes",
            "AGENT_COMMAND": f'echo "$AGENT_TASK_ID $$" >> "{self.log}"; {code} echo x > new.txt',
        }

    @classmethod
    def waiting(cls, folder: Path, printing: str = "") -> Agent:
        """One that goes on when it is told to, or after two minutes."""
        return cls(folder, f'for _ in $(seq 1200); do [ -e "{folder}/go" ] && break; sleep 0.1; done; {printing}')

    def runs(self) -> list[tuple[str, int]]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [(task, int(pid)) for task, _, pid in (line.rpartition(" ") for line in lines)]

    def pid(self) -> int:
        """The process of the first run, once there is one."""
        wait_until(self.runs)
        return self.runs()[0][1]

    def go(self) -> None:
        self._go.touch()


def is_published(world: World) -> bool:
    return any(head.startswith("agent-task-") for head in world.github.heads(world.github.repository(TARGET)))


def assert_done_once(world: World, number: int = 1) -> None:
    """One branch, one pull request, one final comment, and these are of the same run; nothing else is left."""
    assert world.labels(number) == ["agent-done", "copilot-agent"]
    pull = world.pull()
    (end,) = world.comments("end", number)
    assert end.startswith(f"Done: {pull.html_url}")
    run = world.github.git(TARGET, "log", "-1", "--format=%(trailers:key=Run,valueonly)", pull.head).strip()
    assert f"run={run} " in end
    starts = [start for start in world.comments("start", number) if f"run={run} " in start]
    assert [start.split(":")[0] for start in starts] == ["Working on it"]
    assert pull.head_sha == world.github.git(TARGET, "rev-parse", pull.head)
    assert world.claims() == []


def test_the_list_of_requests_is_complete(world: World) -> None:
    world.open(PATCH)
    assert finish(world.start("--once"))[0] == 0
    assert [step_of(request) for request in world.github.log] == HAPPY


# -- the runner dies -------------------------------------------------------------------------------


def children(pid: int) -> list[int]:
    """The processes that a process has started, and those that these have."""
    listed = Path(f"/proc/{pid}/task").glob("*/children")
    own = [int(child) for path in listed for child in path.read_text().split()]
    return own + [grandchild for child in own for grandchild in children(child)]


def power_cut(process: subprocess.Popen[str]) -> None:
    """Ends a runner and all that it has started in one moment."""
    os.kill(process.pid, signal.SIGSTOP)
    for pid in [process.pid, *children(process.pid)]:
        with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
            os.kill(pid, signal.SIGKILL)
    process.wait()


def kill(process: subprocess.Popen[str]) -> None:
    """Ends a runner; what it has started goes on."""
    process.kill()
    process.wait()


class Victim:
    """A runner whose end comes in the middle of a request."""

    def __init__(self, world: World, agent: Agent, end: Callable[[subprocess.Popen[str]], None] = power_cut) -> None:
        self._world, self._end, self._env = world, end, agent.env
        self._process: Future[subprocess.Popen[str]] = Future()

    def die(self) -> None:
        self._end(self._process.result(30))

    def run(self) -> None:
        """From its start to its end; that this is the one that was meant for it."""
        process = self._world.start("--once", **self._env)
        self._process.set_result(process)
        assert process.wait(60) == -signal.SIGKILL, process.communicate()
        process.communicate()


def run_again(world: World, agent: Agent) -> None:
    """A fresh process after the one that died."""
    code, _, err = finish(world.start("--once", **agent.env))
    assert code == 0, err


def assert_a_restart_finishes(world: World, fault: Fault, victim: Victim, agent: Agent) -> None:
    world.open("Do something.")
    world.github.faults.append(fault)
    victim.run()
    runs = len(agent.runs())
    published = is_published(world)
    run_again(world, agent)
    assert_done_once(world)
    assert len(agent.runs()) == (runs if published else runs + 1) <= 2


@pytest.mark.parametrize("index", range(len(HAPPY)), ids=named)
def test_a_task_is_done_once_though_the_runner_died_after_a_request(world: World, index: int) -> None:
    agent = Agent(world.home)
    victim = Victim(world, agent)
    assert_a_restart_finishes(world, at_request(index, after_effect=victim.die), victim, agent)


@pytest.mark.parametrize("index", sorted(REST_WRITES + PUSHES), ids=named)
def test_a_task_is_done_once_though_the_runner_died_before_a_request_had_its_effect(world: World, index: int) -> None:
    agent = Agent(world.home)
    victim = Victim(world, agent)
    assert_a_restart_finishes(world, at_request(index, action=victim.die, drop="before"), victim, agent)


@pytest.mark.parametrize("end", [power_cut, kill])
def test_a_task_is_done_once_though_the_runner_died_while_its_agent_worked(
    world: World, end: Callable[[subprocess.Popen[str]], None]
) -> None:
    world.open("Do something.")
    agent = Agent.waiting(world.home)
    process = world.start("--once", **agent.env)
    agent.pid()
    end(process)
    process.communicate()
    agent.go()
    run_again(world, agent)
    assert_done_once(world)
    assert len(agent.runs()) == 2


def test_a_push_that_a_dead_runner_left_behind_changes_nothing_when_it_comes_late(world: World) -> None:
    """Only the runner is killed; its git has sent the push, and GitHub is slow to take it."""
    agent = Agent(world.home)
    victim, done = Victim(world, agent, kill), Future[str]()
    publish = PUSHES[3]

    def die_and_linger() -> None:
        victim.die()
        done.result(60)

    world.open("Do something.")
    world.github.faults.append(at_request(publish, action=die_and_linger))
    victim.run()
    late = world.github.log[publish]
    run_again(world, agent)
    done.set_result(world.pull().head_sha)
    wait_until(lambda: late.status)
    assert_done_once(world)
    assert world.pull().head_sha == done.result()
    assert len(agent.runs()) == 2


def test_a_task_is_done_once_though_the_runner_died_again_and_again(world: World) -> None:
    """Each process gets a few requests further than the one before."""
    agent, number = Agent(world.home), world.open("Do something.")
    agent.env["AGENT_MAX_ATTEMPTS"] = "9"
    for allowed in (5, 8, 11, 16):
        victim = Victim(world, agent)
        world.github.faults[:] = [at_request(allowed, after_effect=victim.die)]
        victim.run()
        assert "agent-done" not in world.labels(number)
    world.github.faults.clear()
    run_again(world, agent)
    assert_done_once(world)


def has_run(agent: Agent, times: int) -> bool:
    return len(agent.runs()) == times


def test_a_last_comment_tells_the_end_that_came_after_a_death(world: World) -> None:
    """The first attempt fails, the runner dies when it has said so, and the second attempt works."""
    agent = Agent(world.home, f'[ $(wc -l < "{world.home}/runs") -gt 1 ] || exit 1;')
    victim = Victim(world, agent)
    world.open("Do something.")
    world.github.faults.append(Fault(method="POST", path=".*/comments", after=1, after_effect=victim.die))
    victim.run()
    assert world.last_comment().startswith("**Failed.**")
    run_again(world, agent)
    assert_done_once(world)


def test_a_task_that_takes_its_runner_down_each_time_is_given_up(world: World) -> None:
    agent = Agent.waiting(world.home)
    number = world.open("Do something.")
    for attempt in range(3):
        process = world.start("--once", **agent.env)
        wait_until(functools.partial(has_run, agent, attempt + 1))
        power_cut(process)
        process.communicate()
    assert finish(world.start("--once", **agent.env))[0] == 1
    assert world.labels(number) == ["agent-failed", "copilot-agent"]
    assert len(world.comments("end")) == 1
    assert len(agent.runs()) == 3
    assert world.github.pulls(TARGET) == []
    assert world.claims() == []


# -- the runner lives, GitHub or the network does not ----------------------------------------------


def assert_one_process_finishes(world: World, *faults: Fault) -> None:
    """The agent's work and all writes are there once, though some requests were needed twice."""
    agent = Agent(world.home)
    world.open("Do something.")
    world.github.faults += faults
    runner = world.runner(FastClock(), **agent.env)
    runner.run_once()
    assert runner.outcomes == {"done": 1}
    assert_done_once(world)
    assert len(world.comments("start")) == 1
    assert len(agent.runs()) == 1


@pytest.mark.parametrize("index", WRITES, ids=named)
def test_a_task_is_done_once_though_the_answer_to_a_write_was_lost(world: World, index: int) -> None:
    assert_one_process_finishes(world, at_request(index, drop="after"))


@pytest.mark.parametrize("status", [500, 502])
@pytest.mark.parametrize("index", sorted(REST_WRITES + PUSHES), ids=named)
def test_a_task_is_done_once_though_github_failed_at_a_write(world: World, index: int, status: int) -> None:
    assert_one_process_finishes(world, at_request(index, status=status))


@pytest.mark.parametrize("index", WRITES, ids=named)
def test_a_task_is_done_once_though_a_lost_write_was_followed_by_an_outage(world: World, index: int) -> None:
    """The look at what became of it fails as well, three times."""
    lost, outage = at_request(index, drop="after"), at_request(0, status=502, times=3)
    # Faults that are ahead in the list see a request first, and only those behind count it.
    outage.where = lambda _: lost.seen > lost.after
    assert_one_process_finishes(world, outage, lost)


# -- limits ----------------------------------------------------------------------------------------


def rest_gap(world: World, index: int) -> float:
    """Seconds on a FastClock between the REST request of that index and the next one."""
    before, after = [request.at for request in world.github.rest()][index : index + 2]
    return (after - before) * FastClock.SPEED


@pytest.mark.parametrize("index", REST, ids=named)
def test_nothing_is_sent_for_as_long_as_a_limit_says_wherever_it_is_met(world: World, index: int) -> None:
    limit = {"retry-after": "7"}
    assert_one_process_finishes(world, at_request(index, status=403, headers=limit))
    (limited,) = [at for at, request in enumerate(world.github.rest()) if request.status == 403]
    assert rest_gap(world, limited) >= 7


def test_a_limit_without_headers_is_waited_out_longer_each_time_by_the_whole_runner(world: World) -> None:
    limit = Fault(method="POST", path=".*/pulls", status=429, times=3, headers={"x-ratelimit-remaining": "4000"})
    assert_one_process_finishes(world, limit)
    limited = [at for at, request in enumerate(world.github.rest()) if request.status == 429]
    for at, pause in zip(limited, (60, 120, 240), strict=True):
        assert rest_gap(world, at) >= pause


def test_a_runner_without_quota_waits_for_its_reset(world: World) -> None:
    def use_up() -> None:
        world.github.rate_remaining, world.github.rate_reset = 1, int(world.github.now()) + 100

    def refill() -> None:
        world.github.rate_remaining = 5000

    # The answer to the first comment says that it was the last request of this hour.
    last_one = Fault(method="POST", path=".*/comments", action=use_up)
    assert_one_process_finishes(world, last_one, Fault(method="POST", path=".*/pulls", action=refill))
    last = next(at for at, request in enumerate(world.github.rest()) if request.path.endswith("/comments"))
    assert rest_gap(world, last) >= 98
    assert 403 not in [request.status for request in world.github.rest()]


@pytest.mark.parametrize("headers", [{"retry-after": "3000"}, {"x-ratelimit-remaining": "0"}, {}])
def test_stopping_cuts_the_wait_for_a_limit_short(world: World, headers: dict[str, str]) -> None:
    world.github.rate_reset = int(world.github.now()) + 3000
    world.github.faults.append(Fault(status=403 if headers else 429, headers=headers, times=None))
    world.open("Do something.")
    process = world.start()
    wait_until(world.requests)
    wait_until(lambda: world.requests()[0].status)
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 0
    assert len(world.requests()) == 1


# -- one issue must not stop the others ------------------------------------------------------------


def forbid(world: World, ref: str) -> None:
    """Has the target refuse every push to a ref, as a rule of its owner would."""
    hook = world.github.repository(TARGET).path / "hooks/update"
    hook.parent.mkdir(exist_ok=True)
    rules = hook.read_text() if hook.exists() else "#!/bin/sh\n"
    hook.write_text(f'{rules}if [ "$1" = "{ref}" ]; then exit 1; fi\n')
    hook.chmod(0o755)


PLACES = [
    "reading",
    "reading rubbish",
    "the claim",
    "labels",
    "labels refused",
    "comments",
    "no answer to comments",
    "the agent",
    "the push",
    "the pull request",
]


def fails_for_ever(world: World, number: int) -> dict[str, Callable[[], object]]:
    """How to have an issue go wrong for ever in each of the PLACES. The agent does so by itself."""
    issue, mine = f".*/issues/{number}", f"agent-task-t{number}"

    def refuse(path: str, **fault: Any) -> Callable[[], None]:
        return lambda: world.github.faults.append(Fault(path=path, times=None, **fault))

    ways: list[Callable[[], object]] = [
        refuse(issue, status=500),
        refuse(issue, status=200, body=b"<html>"),
        lambda: forbid(world, f"refs/agent-runner/claims/{DISPATCH}/{number}"),
        refuse(f"{issue}/labels.*", status=500),
        refuse(f"{issue}/labels.*", status=403),
        refuse(f"{issue}/comments", status=500),
        refuse(f"{issue}/comments", drop="after"),
        lambda: None,
        lambda: forbid(world, f"refs/heads/{mine}"),
        refuse(".*/pulls", status=500, method="POST", where=lambda request: request.json["head"] == mine),
    ]
    return dict(zip(PLACES, ways, strict=True))


def about(number: int) -> str:
    """An instruction with a task id of its own."""
    return f'Do something.\n\n<!-- agent_task_metadata {{"task_id": "t{number}"}} -->'


def assert_others_get_done(world: World, others: int, *places: str) -> None:
    """Issue 1 fails in these places for ever, the others are well."""
    bad = world.open(about(1))
    good = [world.open(about(number)) for number in range(2, others + 2)]
    for place in places:
        fails_for_ever(world, bad)[place]()
    agent = Agent(world.home, "case $AGENT_TASK_ID in t1) kill -9 $$;; esac;" if "the agent" in places else "")
    env = {"AGENT_MAX_CONCURRENT": "4", **agent.env}
    with Daemon(world.runner(FastClock(), **env)):
        world.wait_for_done(good, 180)
    heads = [pull.head for pull in world.github.pulls(TARGET)]
    tasks = [task for task, _ in agent.runs()]
    for number in good:
        assert heads.count(f"agent-task-t{number}") == tasks.count(f"t{number}") == 1
        assert len(world.comments("end", number)) == 1


@pytest.mark.parametrize("place", PLACES)
def test_an_issue_that_fails_in_one_place_for_ever_does_not_stop_the_others(world: World, place: str) -> None:
    assert_others_get_done(world, 9, place)


def test_an_issue_that_fails_wherever_it_can_does_not_stop_forty_nine_others(world: World) -> None:
    assert_others_get_done(world, 49, *PLACES)


@pytest.mark.parametrize("place", ["the agent", "the push"])
def test_an_issue_whose_work_cannot_be_published_is_told_so(world: World, place: str) -> None:
    number = world.open(about(1))
    fails_for_ever(world, number)[place]()
    world.run_once(**Agent(world.home, "kill -9 $$;" if place == "the agent" else "").env)
    assert world.labels(number) == ["agent-failed", "copilot-agent"]
    assert len(world.comments("end", number)) == 1
    assert world.claims() == []


# -- a list that is older than the work ------------------------------------------------------------


def queue_of(world: World) -> Any:
    """The list of issues as GitHub gives it now."""
    client = GitHub(world.config(), Clock(), threading.Event())
    return client.request("GET", f"/repos/{DISPATCH}/issues?labels=copilot-agent&state=open").data


def assert_untouched(world: World, agent: Agent) -> None:
    """The issue was done once, and nobody has been at it since."""
    assert_done_once(world)
    assert len(world.issue().comments) == 2
    assert len(agent.runs()) == 1


def test_a_done_issue_in_an_old_list_is_not_run_again_by_the_same_process(world: World) -> None:
    agent = Agent(world.home)
    world.open("Do something.")
    old = Fault(path=f".*/{DISPATCH}/issues", status=200, body=queue_of(world), times=None)
    clock, env = FastClock(), {"AGENT_POLL_INTERVAL": "1"}
    with Daemon(world.runner(clock, **env, **agent.env)) as daemon:
        wait_until(lambda: daemon.runner.outcomes["done"])
        world.github.faults.append(old)
        wait_until(lambda: old.seen > 5)
        daemon.end()
    assert_untouched(world, agent)
    assert daemon.runner.outcomes["done"] == 1


def test_a_done_issue_in_an_old_list_is_not_run_again_by_another_runner(world: World) -> None:
    agent = Agent(world.home)
    world.open("Do something.")
    old = Fault(path=f".*/{DISPATCH}/issues", status=200, body=queue_of(world), times=None)
    world.run_once(**agent.env)
    world.github.faults.append(old)
    other = world.run_once(AGENT_STATE_DIR=str(world.folder / "other"), AGENT_RUNNER_ID="other", **agent.env)
    assert old.seen
    assert other.outcomes["done"] == 0
    assert_untouched(world, agent)


def test_an_issue_that_another_runner_finished_since_the_poll_is_not_run_again(world: World) -> None:
    """The other one does the whole task between this one's poll and its claim."""
    agent = Agent(world.home)
    world.open("Do something.")

    def overtake() -> None:
        world.run_once(AGENT_STATE_DIR=str(world.folder / "other"), AGENT_RUNNER_ID="other", **agent.env)

    slow = Fault(path=f".*/{DISPATCH}/issues", after_effect=overtake)
    world.github.faults.append(slow)
    assert world.run_once(**agent.env).outcomes["done"] == 0
    assert_untouched(world, agent)


def test_a_done_issue_that_is_itself_shown_as_it_was_is_not_run_again(world: World) -> None:
    """List and issue come from a replica that lags behind; the branch and the last comment tell the truth."""
    agent = Agent(world.home)
    world.open("Do something.")
    issues = f".*/{DISPATCH}/issues"
    issue = GitHub(world.config(), Clock(), threading.Event()).issue(1)
    old = [Fault(path=issues, status=200, body=queue_of(world)), Fault(path=f"{issues}/1", status=200, body=issue)]
    world.github.now = lambda: time.time() + 60
    world.run_once(**agent.env)
    world.github.faults += old
    world.run_once(AGENT_STATE_DIR=str(world.folder / "other"), AGENT_RUNNER_ID="other", **agent.env)
    assert [fault.seen for fault in old] == [1, 1]
    assert_done_once(world)
    assert len(agent.runs()) == 1


# -- a token that is replaced ----------------------------------------------------------------------

NEW_TOKEN = "ghp_" + "9876543210" * 4


def run_with_a_new_token(world: World, printing: str = "") -> str:
    """A task during which the token in GITHUB_TOKEN_FILE is replaced, and the old one revoked; the log."""
    file, agent = world.folder / "token", Agent.waiting(world.home, printing)
    file.write_text(world.env.pop("GITHUB_TOKEN") + "\n")
    world.open("Do something.")
    process = world.start("--once", GITHUB_TOKEN_FILE=str(file), AGENT_LOG_LEVEL="DEBUG", **agent.env)
    agent.pid()
    fresh = world.folder / "token.new"
    fresh.write_text(NEW_TOKEN + "\n")
    fresh.rename(file)
    world.github.token = NEW_TOKEN
    agent.go()
    code, _, err = finish(process)
    assert code == 0, err
    assert_done_once(world)
    assert len(agent.runs()) == 1
    return err


def told(world: World, log: str) -> str:
    """All that people can read of a task."""
    return "\n".join([log, world.pull_body(), *(comment.body for comment in world.issue().comments)])


def test_a_token_that_is_replaced_while_the_agent_works_is_used_from_then_on(world: World) -> None:
    old = world.github.token
    text = told(world, run_with_a_new_token(world))
    assert old not in text
    assert NEW_TOKEN not in text
    assert [request.status for request in world.github.log if request.status in (401, 403)] == []


def test_both_tokens_are_masked_when_an_agent_tells_them(world: World) -> None:
    old = world.github.token
    (world.folder / "secrets").write_text(f"{old} {NEW_TOKEN}\n")
    text = told(world, run_with_a_new_token(world, f'echo "found $(cat {world.folder}/secrets)";'))
    assert "found *** ***" in text
    assert old not in text
    assert NEW_TOKEN not in text
