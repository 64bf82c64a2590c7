"""The supervisor by itself: it runs an agent within limits, and when it is done nothing that the agent started runs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import RUNNER, make_config, wait_until

import runner
from runner import Config, ConfigError, Finished, Order, Stopping, TaskFailed, make_order, run_supervised


@pytest.fixture(autouse=True)
def _measure_supervisors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "SUPERVISOR_INHERITS", re.compile(runner.SUPERVISOR_INHERITS.pattern + r"|COVERAGE\w+"))
    # Without Python's site-packages nothing could measure.
    monkeypatch.setattr(runner, "SUPERVISOR_PYTHON", [sys.executable, "-P"])


class Bench:
    """A place where agents run, and what they leave in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tree = folder / "state/work/0/1/run/tree"
        self.tree.mkdir(parents=True)
        self.home = folder / "home"
        self.home.mkdir()
        self.log = folder / "log"
        coverage = {name: value for name, value in os.environ.items() if name.startswith("COVERAGE")}
        env = {"PATH": os.environ["PATH"], **coverage}
        self.env = {**env, "AGENT_STATE_DIR": str(folder / "state"), "AGENT_HOME": str(self.home)}

    def order(self, code: str, env: dict[str, str] | None = None, **changes: Any) -> tuple[Config, Order]:
        """An agent that is a small Python program."""
        config = make_config({**self.env, **(env or {})})
        command = [sys.executable, "-c", textwrap.dedent(code)]
        order = make_order(config, command, self.tree, {}, "told", self.log, write=[self.tree])
        return config, order._replace(**changes)

    def run(self, code: str, env: dict[str, str] | None = None, **changes: Any) -> Finished:
        return run_supervised(*self.order(code, env, **changes))

    def pids(self, name: str = "pids") -> list[int]:
        """The processes that an agent has written down."""
        file = self.tree / name
        return [int(pid) for pid in file.read_text().split()] if file.exists() else []

    def alive(self, name: str = "pids") -> list[int]:
        return [pid for pid in self.pids(name) if psutil.pid_exists(pid)]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    for pid in bench.alive():
        os.kill(pid, signal.SIGKILL)


DAEMON = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        signal_all()
        open("pids", "a").write(f"{os.getpid()} ")
        open("ready", "w").close()
        time.sleep(600)
    os._exit(0)
while not os.path.exists("ready"):
    time.sleep(0.01)
"""
STUBBORN = "import signal\ndef signal_all():\n    [signal.signal(n, signal.SIG_IGN) for n in (1, 2, 15)]\n"


def test_what_an_agent_says_and_how_it_ended_comes_back(bench: Bench) -> None:
    done = bench.run("import sys; print(sys.stdin.read()); print('wrong', file=sys.stderr); sys.exit(3)")
    assert (done.code, done.late, sorted(done.out.split())) == (3, "", ["told", "wrong"])
    assert bench.log.read_text() == done.out
    assert bench.log.stat().st_mode & 0o777 == 0o600


def test_an_agent_that_a_signal_ended_says_which(bench: Bench) -> None:
    assert bench.run("import os; os.kill(os.getpid(), 9)").code == -9


def test_an_agent_that_cannot_start_says_why(bench: Bench) -> None:
    with pytest.raises(TaskFailed, match="cannot be started: No such file or directory"):
        bench.run("", command=["/nowhere/agent"])


def test_a_supervisor_that_fails_fails_the_task(bench: Bench) -> None:
    with pytest.raises(TaskFailed, match="supervisor failed"):
        bench.run("", log="/nowhere/log")


def test_a_daemon_that_forked_twice_ends_with_its_agent(bench: Bench) -> None:
    assert bench.run(STUBBORN + DAEMON).code == 0
    assert len(bench.pids()) == 1
    assert bench.alive() == []


@pytest.mark.parametrize(
    ("changes", "late"), [({"timeout": 4.0}, "timeout"), ({"stall": 4.0}, "stall")], ids=["too long", "silent"]
)
def test_an_agent_that_takes_too_long_is_ended_with_all_it_started(
    bench: Bench, changes: dict[str, Any], late: str
) -> None:
    done = bench.run(STUBBORN + DAEMON + "print('begun', flush=True); time.sleep(600)", **changes)
    assert (done.late, done.out) == (late, "begun\n")
    assert bench.alive() == []


def test_an_agent_that_ignores_sigterm_is_killed(bench: Bench) -> None:
    done = bench.run(STUBBORN + "signal_all()\nimport time\nprint('on', flush=True)\ntime.sleep(600)", timeout=4)
    assert (done.late, done.code) == ("timeout", -9)


def test_an_agent_that_minds_sigterm_may_say_goodbye(bench: Bench) -> None:
    code = """
        import signal, sys, time
        signal.signal(15, lambda *_: sys.exit(print("bye")))
        print("on", flush=True)
        time.sleep(600)
    """
    done = bench.run(code, timeout=4)
    assert (done.late, done.code, done.out) == ("timeout", 0, "on\nbye\n")


def test_an_agent_that_talks_is_not_silent(bench: Bench) -> None:
    code = "import time\nfor _ in range(40): print('.', flush=True); time.sleep(0.1)"
    assert bench.run(code, stall=3).late == ""


def test_a_flood_of_output_is_kept_at_both_ends_only(bench: Bench) -> None:
    code = """
        import os
        os.write(1, b"first\\n")
        block = b"x" * 2**20
        for _ in range(1024):
            view = memoryview(block)
            while view:
                view = view[os.write(1, view):]
        os.write(1, b"\\nlast")
    """
    done = bench.run(code)
    assert done.code == 0
    assert len(done.out) == runner.OUTPUT_KEPT
    assert done.out.endswith("x\nlast")
    kept = bench.log.read_bytes()
    assert kept.startswith(b"first\nxxx")
    assert kept.endswith(b"x\nlast")
    assert b" bytes left out ...]" in kept
    assert len(kept) < runner.LOG_KEPT + runner.OUTPUT_KEPT + 100


def test_an_agent_that_closes_its_output_is_waited_for(bench: Bench) -> None:
    done = bench.run("import os, time; os.close(1); os.close(2); time.sleep(1); open('late', 'w')")
    assert (done.code, done.out) == (0, "")
    assert (bench.tree / "late").exists()


def test_a_full_disk_costs_the_file_of_the_output_and_not_the_task(bench: Bench) -> None:
    assert bench.run("print('words')", log="/dev/full").out == "words\n"


def test_stop_ends_the_agent_and_all_it_started(bench: Bench) -> None:
    stop = threading.Event()
    config, order = bench.order(STUBBORN + DAEMON + "open('pids', 'a').write(str(os.getpid())); time.sleep(600)")

    def stop_once_it_runs() -> None:
        wait_until(lambda: len(bench.pids()) == 2)
        stop.set()

    threading.Thread(target=stop_once_it_runs).start()
    with pytest.raises(Stopping):
        run_supervised(config, order, stop)
    assert bench.alive() == []


def test_an_agent_gets_only_the_environment_that_it_is_to_have(bench: Bench) -> None:
    secrets = {"GITHUB_TOKEN": "ghp_" + "1" * 36, "PYTHONWARNINGS": "ignore", "OTHER": "x"}
    done = bench.run("import os; print(sorted(os.environ))", {**secrets, "AGENT_ENV": "MINE", "MINE": "1"})
    assert set(re.findall(r"\w+", done.out)) == {"PATH", "HOME", "MINE", "LC_CTYPE"}


def test_what_an_agent_may_use_is_limited(bench: Bench) -> None:
    code = """
        import json, os, resource as r
        limits = [r.getrlimit(which)[1] for which in (r.RLIMIT_CORE, r.RLIMIT_FSIZE, r.RLIMIT_DATA)]
        status = dict(line.split(":", 1) for line in open("/proc/self/status"))
        killed_first = open("/proc/self/oom_score_adj").read()
        print(json.dumps([limits, r.getrlimit(r.RLIMIT_NPROC)[1], os.nice(0), killed_first, status["NoNewPrivs"]]))
    """
    done = bench.run(code, {"AGENT_DISK_BUDGET_MB": "7000", "AGENT_MAX_MEMORY_MB": "900"})
    limits, processes, nice, killed_first, no_new_privileges = json.loads(done.out)
    assert limits == [0, 7_000_000_000, 900_000_000]
    assert runner.SPARE_PROCESSES < processes < 10**6
    assert (nice - os.nice(0), killed_first.strip(), no_new_privileges.strip()) == (5, "1000", "1")


def test_an_agent_with_more_memory_than_it_may_have_fails_alone(bench: Bench) -> None:
    done = bench.run("x = bytearray(400 * 10**6)", {"AGENT_MAX_MEMORY_MB": "200"})
    assert "MemoryError" in done.out


def test_a_file_cannot_grow_beyond_the_disk_budget(bench: Bench) -> None:
    done = bench.run("open('big', 'wb').truncate(4 * 10**9)", {"AGENT_DISK_BUDGET_MB": "3000"})
    assert "File too large" in done.out
    assert (bench.tree / "big").stat().st_size == 0


def test_an_agent_that_fills_the_disk_is_ended(bench: Bench) -> None:
    code = """
        import itertools, os
        for n in itertools.count():
            with open(f"big{n % 16}", "wb") as file:
                os.unlink(file.name) if n % 2 else None
                held = [*globals().get("held", []), os.dup(file.fileno())]
                for _ in range(64):
                    file.write(bytes(2**20))
    """
    done = bench.run(code, {"AGENT_DISK_BUDGET_MB": "1500"}, timeout=120)
    assert done.late == "disk"


def start(bench: Bench, code: str, before: str = "", after: str = "") -> subprocess.Popen[str]:
    """A process of its own that runs an agent as the runner does."""
    _, order = bench.order(code)
    program = f"""
import runner, sys
config = runner.Config.from_env({{"GITHUB_TOKEN": "t0ken", **{bench.env!r}}})
{before}
try:
    print(runner.run_supervised(config, runner.Order(**{order._asdict()!r})))
except runner.TaskFailed as failed:
    print(failed)
{after}
"""
    return subprocess.Popen([sys.executable, "-c", program], cwd=RUNNER.parent, stdout=subprocess.PIPE, text=True)


def test_the_agent_dies_with_the_runner(bench: Bench) -> None:
    process = start(bench, STUBBORN + DAEMON + "open('pids', 'a').write(f'{os.getpid()} ')\ntime.sleep(600)\n")
    wait_until(lambda: len(bench.pids()) == 2)
    process.kill()
    process.communicate()
    wait_until(lambda: not bench.alive())


KILL_THE_SUPERVISOR = STUBBORN + DAEMON + "os.kill(os.getppid(), 9)\ntime.sleep(600)\n"


def test_what_an_agent_leaves_that_killed_its_supervisor_is_ended_too(bench: Bench) -> None:
    bench.env["AGENT_SANDBOX"] = "off"
    before = "runner.set_process(runner.PR_SET_CHILD_SUBREAPER, 1)"
    process = start(bench, KILL_THE_SUPERVISOR, before, "print(len(runner.below()))")
    out, _ = process.communicate()
    assert out.split("\n")[:2] == ["The agent's supervisor was killed.", "0"]
    assert len(bench.pids()) == 1
    assert bench.alive() == []


def test_the_runners_own_processes_are_no_strays(bench: Bench) -> None:
    before = """
runner.set_process(runner.PR_SET_CHILD_SUBREAPER, 1)
import pathlib, subprocess, threading, time
own = threading.Thread(target=runner.run_process, args=(["sleep", "3"], pathlib.Path("/"), {}, 60))
own.start()
others = subprocess.Popen(["sleep", "600"])
while len(runner.below()) < 2:
    time.sleep(0.01)
    """
    after = "own.join(); print(others.poll()); others.kill(); others.wait()"
    out, _ = start(bench, "pass", before, after).communicate()
    assert out.split("\n")[:2] == ["Finished(code=0, out='', err='', late='')", "None"]


def test_what_cannot_be_ended_is_told_and_not_waited_for(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    end_processes = runner.end_processes
    monkeypatch.setattr(runner, "end_processes", lambda _: end_processes(lambda: {2**22 + 1}, rounds=3))
    assert bench.run("pass").code == 0
    assert "cannot be ended: 4194305" in caplog.text


def test_ends_are_also_seen_where_the_system_does_not_tell_of_them(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "pidfd_open")
    monkeypatch.setattr(runner, "SUPERVISOR", runner.SUPERVISOR.replace("os.pidfd_open", "os.no_such_thing"))
    done = bench.run("print(input())")
    assert (done.code, done.out) == (0, "told\n")


def test_half_a_surrogate_in_what_the_agent_is_told_is_replaced(bench: Bench) -> None:
    assert bench.run("print(input())", stdin="a\ud800b").out == "a?b\n"


def test_lines_of_the_supervisor_are_those_of_the_file() -> None:
    theirs, ours = runner.SUPERVISOR.splitlines(), RUNNER.read_text().splitlines()
    begin = ours.index("class Supervisor:")
    assert theirs[begin : begin + 50] == ours[begin : begin + 50]
    assert theirs[-1] == "supervise()"


def test_a_file_that_is_replaced_meanwhile_does_not_matter(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "runner.py").write_text("raise SystemExit('another version')")
    monkeypatch.setattr(runner, "__file__", str(tmp_path / "runner.py"))
    assert bench.run("print(input())").out == "told\n"


# -- which walls there are --------------------------------------------------------------------------


@pytest.mark.parametrize("version", range(1, max(2, runner.landlock_version() + 1)))
def test_the_rules_suit_every_landlock_up_to_this_kernels(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    monkeypatch.setattr(runner, "landlock_version", lambda: version)
    os.close(runner.landlock_rules(bench.order("pass")[1]))


def test_what_is_hidden_is_left_out_and_the_rest_is_covered(tmp_path: Path) -> None:
    for name in ("a/secret", "a/b/state/x", "a/b/open", "c/d"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "a/link").symlink_to(tmp_path / "a/secret")
    hidden = {f"{tmp_path}/a/secret", f"{tmp_path}/a/b/state"}
    seen = {os.path.relpath(path, tmp_path) for path in runner.visible(str(tmp_path), hidden)}
    assert seen == {"a/b/open", "c"}
    assert list(runner.visible(f"{tmp_path}/c", hidden)) == [f"{tmp_path}/c"]


def test_hidden_are_the_state_the_settings_and_other_ways_to_github(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "user_home", lambda: tmp_path / "me")
    for name in ("state", "me/.ssh", "me/.config/gh", "me/.config/other", "secrets"):
        (tmp_path / name).mkdir(parents=True)
    for name in (".env.old", "secrets/real", "me/.netrc"):
        (tmp_path / name).write_text("t0ken")
    (tmp_path / ".env").symlink_to("secrets/real")
    config = make_config({"AGENT_STATE_DIR": str(tmp_path / "state"), "AGENT_AUDIT_LOG": "audit"})
    hidden = {path.relative_to(tmp_path).as_posix() for path in runner.hidden_paths(config)}
    assert hidden == {"state", "audit", ".env", "secrets/real", ".env.old", "me/.ssh", "me/.netrc", "me/.config/gh"}


def sandbox(monkeypatch: pytest.MonkeyPatch, version: int = 7, user: int = 1000, **env: str) -> str:
    monkeypatch.setattr(runner, "landlock_version", lambda: version)
    monkeypatch.setattr(runner, "set_process", lambda *_: True)
    monkeypatch.setattr(os, "geteuid", lambda: user)
    return runner.check_sandbox(make_config({"AGENT_COMMAND": "true", "PATH": os.environ["PATH"], **env}))


def test_check_names_the_walls(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    assert sandbox(monkeypatch, version=9).endswith("others' sockets, outliving its task")
    assert sandbox(monkeypatch, version=7).endswith("; not from others' sockets")
    assert not caplog.text
    assert "; not from the runner's files, signals" in sandbox(monkeypatch, version=0)
    assert "can read the runner's files" in caplog.text
    assert "; not from the runner's memory" in sandbox(monkeypatch, version=9, user=0, AGENT_ALLOW_ROOT="yes")


@pytest.mark.parametrize(
    ("env", "version", "user", "why"),
    [
        ({}, 7, 0, "the runner is root"),
        ({"AGENT_SANDBOX": "required"}, 0, 1000, "AGENT_SANDBOX is required"),
    ],
    ids=["root", "no Landlock"],
)
def test_agents_are_refused_without_the_walls_that_are_required(
    monkeypatch: pytest.MonkeyPatch, env: dict[str, str], version: int, user: int, why: str
) -> None:
    with pytest.raises(TaskFailed, match=why):
        sandbox(monkeypatch, version, user, **env)


def test_the_page_on_security_shows_what_check_says(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (RUNNER.parent / "docs/security.md").read_text()
    assert f"```text\n✓ sandbox   {sandbox(monkeypatch)}\n```" in page
    assert f"`✓ sandbox   {sandbox(monkeypatch, AGENT_PROCESS_TASK='patch')}`" in page
    assert all(f"`{name}`" in page for name in runner.CREDENTIALS)


def test_patches_need_no_walls(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sandbox(monkeypatch, 0, 0, AGENT_PROCESS_TASK="patch") == "patches need none"


@pytest.mark.parametrize("home", [str(RUNNER.parent), "/", "state"])
def test_the_agents_home_must_hold_nothing_of_the_runners(home: str) -> None:
    with pytest.raises(ConfigError, match="AGENT_HOME must hold neither"):
        make_config({"AGENT_HOME": home, "AGENT_STATE_DIR": "state"})
    assert make_config({"AGENT_HOME": home, "AGENT_STATE_DIR": "state", "AGENT_SANDBOX": "off"}).home


def test_a_user_without_a_name_has_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 7)
    assert runner.user_home() == Path("/")


def test_a_system_without_these_calls_has_no_such_walls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "libc", lambda: object())
    assert runner.landlock_version() == 0
    assert runner.set_process(runner.PR_SET_DUMPABLE, 0) is False
