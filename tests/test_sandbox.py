"""Attacks: a hostile agent of a user who is not root, under a real runner, and each wall by itself."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import RUNNER, World

import runner

NOBODY = 65534
OTHER_USER: dict[str, Any] = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
PACKAGES = ("requests", "urllib3", "idna", "certifi", "charset_normalizer", "dotenv")


def find_python() -> str:
    """A Python that the other user can start; root's own may be in root's home."""
    new_enough = "import sys; sys.exit(sys.version_info < (3, 11))"
    for python in filter(None, (os.path.realpath(sys.executable), shutil.which("python3", path=os.defpath))):
        with contextlib.suppress(OSError):
            if not subprocess.run([python, "-c", new_enough], check=False, **OTHER_USER).returncode:
                return python
    return ""


PYTHON = find_python()
pytestmark = [
    pytest.mark.skipif(runner.landlock_version() < 6, reason="needs Linux 6.12 or newer with Landlock, as CI has"),
    pytest.mark.skipif(not PYTHON, reason="needs a Python 3.11 that users other than root can start, as CI has"),
]


@pytest.fixture(scope="session")
def program() -> Iterator[Path]:
    """runner.py, what it imports and the thief, where every user can read them."""
    folder = Path(tempfile.mkdtemp(prefix="agent-runner-"))
    folder.chmod(0o755)
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        assert spec
        assert spec.origin
        shutil.copytree(Path(spec.origin).parent, folder / name)
    shutil.copy(RUNNER, folder)
    shutil.copy(Path(__file__).parent / "thief.py", folder)
    yield folder / "runner.py"
    shutil.rmtree(folder)


class Attack:
    """A runner of an ordinary user, started in a folder `cwd` with a file .env."""

    def __init__(self, world: World, program: Path) -> None:
        self.world, self.program = world, program
        self.token = world.github.token = "ghp_" + secrets.token_hex(18)
        self.folder = Path(tempfile.mkdtemp(prefix="agent-runner-"))
        self.cwd, self.home = self.folder / "cwd", self.folder / "agent"
        self.folder.chmod(0o755)
        for folder in (self.cwd, self.home):
            folder.mkdir()
            self.give(folder)
        self.env = {
            **world.env,
            "AGENT_PROMPT_FILE": "",  # which only this user could read
            "AGENT_ALLOW_ROOT": "no",
            "GITHUB_TOKEN": self.token,
            "PYTHONPATH": str(program.parent),
        }
        self.env |= {"AGENT_STATE_DIR": str(self.cwd / ".agent-runner"), "AGENT_HOME": str(self.home)}
        self.env |= {"PATH": os.defpath, "PYTHONDONTWRITEBYTECODE": "1"}
        self.since = time.time()

    def give(self, path: Path) -> None:
        """To the user that the runner runs as."""
        os.chown(path, OTHER_USER.get("user", -1), OTHER_USER.get("group", -1))

    def run(self, before: str = "", **env: str) -> subprocess.CompletedProcess[str]:
        """`python runner.py --once`; what is done `before` takes a wall down."""
        code = f"import runner, sys\n{before}\ncode = runner.main(['--once'])\n"
        code += "print(*(line for line in open('/proc/self/status') if line.startswith('VmHWM')))\nsys.exit(code)"
        options: dict[str, Any] = {"capture_output": True, "text": True, "check": False, **OTHER_USER}
        return subprocess.run([PYTHON, "-c", code], cwd=self.cwd, env={**self.env, **env}, **options)

    def run_two(self, code: str, **env: str) -> subprocess.CompletedProcess[str]:
        """A hostile task, which is shown how it is, and a harmless one after it, which must come to its end."""
        hostile, harmless = self.world.open("Task ID: hostile"), self.world.open("Task ID: harmless")
        code = (
            f"import os\nif os.environ['AGENT_TASK_ID'] == 'hostile':\n{textwrap.indent(textwrap.dedent(code), '    ')}"
        )
        result = self.run(AGENT_COMMAND=self.agent(code + "\nopen('new.txt', 'w').write('x')\n"), **env)
        assert self.world.labels(hostile) == ["agent-failed", "copilot-agent"], result.stderr
        assert self.done(harmless), result.stderr
        assert self.processes() == []
        return result

    def processes(self) -> list[int]:
        """What still runs of this attack: all that an agent started has the path of its task in the environment."""
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if str(self.folder).encode() in (place / "environ").read_bytes():
                    found.append(int(place.name))
        return found

    def agent(self, code: str) -> str:
        """AGENT_COMMAND for a Python program."""
        (self.folder / "agent.py").write_text(textwrap.dedent(code))
        return f"{PYTHON} {self.folder / 'agent.py'}"

    def done(self, number: int = 1) -> bool:
        return self.world.labels(number) == ["agent-done", "copilot-agent"]

    def hunt(
        self, before: str = "", tops: str = "", seconds: int = 0, env: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """What the thief reports."""
        self.world.open("Steal the token.")
        thief = f"{PYTHON} {self.program.parent / 'thief.py'}"
        hunt = {"HUNT_TOKEN": self.token[::-1], "HUNT_SINCE": str(self.since - 1), "HUNT_TOPS": tops or str(self.cwd)}
        hunt |= {"HUNT_SECONDS": str(seconds), "AGENT_ENV": "HUNT_TOKEN,HUNT_SINCE,HUNT_TOPS,HUNT_SECONDS"}
        result = self.run(before, AGENT_COMMAND=thief, **hunt, **(env or {}))
        assert self.done(), result.stderr
        report: dict[str, Any] = json.loads((self.home / "report.json").read_text())
        return report


@pytest.fixture
def attack(world: World, program: Path) -> Iterator[Attack]:
    attack = Attack(world, program)
    yield attack
    shutil.rmtree(attack.folder)


# -- the token --------------------------------------------------------------------------------------

NO_MEMORY_WALL = "runner.PR_SET_DUMPABLE = 999"
NO_ALLOW_LIST = "runner.allowed_environment = lambda config: dict(config.env)"


def test_a_thief_finds_the_token_nowhere(attack: Attack) -> None:
    (attack.cwd / ".env").write_text(f"GITHUB_TOKEN={attack.token}\n")
    (attack.cwd / ".env.bak").write_text(f"GITHUB_TOKEN={attack.token}\n")
    report = attack.hunt(tops="/", seconds=5, env={"AGENT_LEASE": "6"})  # git renews the claim every two seconds
    assert report["found"] == []
    assert report["tried"]["readable files"] > 5
    assert report["tried"]["files"] > report["tried"]["readable files"]
    assert report["tried"]["processes"] > 2


def test_a_token_in_a_file_is_found_nowhere_either(attack: Attack) -> None:
    file = attack.cwd / "token"
    file.write_text(attack.token)
    attack.give(file)
    env = {"GITHUB_TOKEN": "", "GITHUB_TOKEN_FILE": str(file)}
    assert attack.hunt(tops=str(attack.folder), env=env)["found"] == []


def test_without_the_wall_of_files_the_token_is_found_in_one(attack: Attack) -> None:
    (attack.cwd / ".env").write_text(f"GITHUB_TOKEN={attack.token}\n")
    report = attack.hunt(env={"AGENT_SANDBOX": "off"})
    assert str(attack.cwd / ".env") in report["found"]


@pytest.mark.parametrize(
    ("before", "env", "exposed"),
    [
        pytest.param(
            "",
            {"AGENT_SANDBOX": "off"},
            False,
            marks=pytest.mark.skipif(
                os.geteuid() != 0, reason="needs root: else the stand-in, which knows the token, is the same user's"
            ),
        ),
        (NO_MEMORY_WALL, {}, False),
        (NO_MEMORY_WALL, {"AGENT_SANDBOX": "off"}, True),
    ],
    ids=["the runner's own", "Landlock's", "none"],
)
def test_each_wall_of_memory_keeps_the_token_from_other_processes(
    attack: Attack, before: str, env: dict[str, str], exposed: bool
) -> None:
    found = attack.hunt(before, env=env)["found"]
    assert {where.partition(" of ")[0] for where in found} >= {"environment", "memory"} if exposed else found == []


def test_git_shows_the_token_to_agents_only_without_landlock(attack: Attack) -> None:
    assert attack.hunt(seconds=5, env={"AGENT_LEASE": "6", "AGENT_SANDBOX": "off"})["found"] != []


def test_without_the_allow_list_the_token_is_in_the_environment(attack: Attack) -> None:
    assert "$GITHUB_TOKEN" in attack.hunt(NO_ALLOW_LIST)["found"]


# -- the walls of files and signals -----------------------------------------------------------------

FORBIDDEN_WRITES = """
import os, pathlib
home, state = pathlib.Path.home(), pathlib.Path(os.environ["AGENT_TASK_FILE"]).parents[4]
targets = [
    state / "x",
    state / "repos/acme/widgets.git/config",
    state / "repos/acme/widgets.git/objects/x",
    state / "work/0/1/claim/config",
    state / "work/0/1/run/git/config",
    state / "work/0/1/run/task.md",
    state.parent / "x",
    pathlib.Path("/tmp/x"),
    pathlib.Path("/dev/shm/../../tmp/x"),
]
wrong = []
for target in targets:
    for way in (lambda: target.open("a").close(), lambda: os.symlink("x", f"{target}-link"), lambda: os.unlink(target)):
        try:
            way()
            wrong.append(str(target))
        except OSError:
            pass
(home / "wrong").write_text(repr(wrong))
open("new.txt", "w").write("x")
"""


def test_an_agent_writes_nowhere_but_in_its_own_folders(attack: Attack) -> None:
    attack.world.open("Write everywhere.")
    result = attack.run(AGENT_COMMAND=attack.agent(FORBIDDEN_WRITES))
    assert attack.done(), result.stderr
    assert (attack.home / "wrong").read_text() == "[]"


def test_without_landlock_it_could_write_there(attack: Attack) -> None:
    attack.world.open("Write everywhere.")
    attack.run(AGENT_COMMAND=attack.agent(FORBIDDEN_WRITES), AGENT_SANDBOX="off")
    assert "repos/acme/widgets.git/config" in (attack.home / "wrong").read_text()


SIGNALS = """
import os, socket
parent = os.getppid()
runner = int(open(f"/proc/{parent}/stat").read().rpartition(") ")[2].split()[1])
outcome = []
for pid in (runner, parent):
    try:
        os.kill(pid, 0)
        outcome.append("may")
    except PermissionError:
        outcome.append("may not")
try:
    socket.socket(socket.AF_UNIX).connect(bytes(1) + os.environ["SOCKET"].encode())
    outcome.append("may")
except PermissionError:
    outcome.append("may not")
open(os.path.expanduser("~/outcome"), "w").write(" ".join(outcome))
open("new.txt", "w").write("x")
"""


@pytest.mark.parametrize(("sandbox", "outcome"), [("required", "may not may not may not"), ("off", "may may may")])
def test_an_agent_can_signal_nobody_and_call_no_abstract_socket(attack: Attack, sandbox: str, outcome: str) -> None:
    attack.world.open("Kill the runner.")
    name = secrets.token_hex(8)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(b"\0" + name.encode())
        listener.listen()
        env = {"AGENT_SANDBOX": sandbox, "AGENT_ENV": "SOCKET", "SOCKET": name}
        result = attack.run(AGENT_COMMAND=attack.agent(SIGNALS), **env)
    assert attack.done(), result.stderr
    assert (attack.home / "outcome").read_text() == outcome


def test_what_an_agent_needs_is_there(attack: Attack) -> None:
    """Its modules, git with the history, its folders, pipes, locks and other programs."""
    code = """
        import multiprocessing, os, shutil, subprocess, tempfile
        multiprocessing.Lock().acquire()
        with tempfile.NamedTemporaryFile() as file:
            assert file.name.startswith(os.environ["TMPDIR"])
        for command in ("ls / > /dev/null", "git log --stat", "git commit --allow-empty -m x", "cat $AGENT_TASK_FILE"):
            subprocess.run(command, shell=True, check=True)
        os.mkdir("a"), os.mkdir("b")
        open("a/new", "w").write("x")
        os.rename("a/new", "b/new")
        os.kill(subprocess.Popen(["sleep", "60"]).pid, 15)
        open(os.path.expanduser("~/state"), "a").close()
        assert open("/proc/self/oom_score_adj").read().strip() == "1000"
    """
    attack.world.open("Work.")
    result = attack.run(AGENT_COMMAND=attack.agent(code), AGENT_SANDBOX="required")
    assert attack.done(), result.stderr + attack.world.last_comment()


def test_a_plugin_reads_what_lies_beside_it_but_not_the_settings(attack: Attack) -> None:
    (attack.cwd / "helper.py").write_text("name = '.env'\n")
    (attack.cwd / ".env").write_text(f"GITHUB_TOKEN={attack.token}\n")
    (attack.cwd / "my_agent.py").write_text(
        textwrap.dedent("""
            import helper, pathlib

            def process_task(task, workspace):
                pathlib.Path("new.txt").write_text("x")
                try:
                    return pathlib.Path(__file__).with_name(helper.name).read_text()
                except PermissionError:
                    return "The settings are hidden."
        """)
    )
    attack.world.open("Read the settings.")
    result = attack.run(AGENT_PROCESS_TASK="my_agent.py:process_task")
    assert attack.done(), result.stderr
    assert "The settings are hidden." in attack.world.pull_body()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, which is refused here")
def test_root_runs_no_agent_unless_it_is_allowed_to(world: World) -> None:
    world.open()
    process = world.start("--once", AGENT_COMMAND="true", AGENT_ALLOW_ROOT="no")
    _, err = process.communicate()
    assert process.returncode == 2
    assert "the runner is root" in err
    assert "AGENT_ALLOW_ROOT=yes" in err
    assert world.issue().comments == []


# -- agents that do not want to end -----------------------------------------------------------------

LINGER = """
import signal, time
if os.fork() == 0:
    os.setsid()
    if os.fork():
        os._exit(0)
    for number in (1, 2, 15):
        signal.signal(number, signal.SIG_IGN)
    time.sleep(600)
time.sleep(0.5)
"""


def test_an_agent_that_kills_its_supervisor_leaves_nothing(attack: Attack) -> None:
    attack.run_two(LINGER + "os.kill(os.getppid(), 9)\ntime.sleep(600)", AGENT_SANDBOX="off")
    assert "supervisor was killed" in attack.world.last_comment(1)


@pytest.mark.race
def test_a_fork_bomb_is_ended(attack: Attack) -> None:
    bomb = "while True:\n    try:\n        os.fork()\n    except OSError:\n        pass"
    attack.run_two(bomb, AGENT_TASK_TIMEOUT="5")
    assert "ran out of time" in attack.world.last_comment(1)


@pytest.mark.race
def test_a_chain_of_forks_is_ended(attack: Attack) -> None:
    chain = "if os.fork():\n    time.sleep(2)\n    raise SystemExit(1)\nwhile not os.fork() or os._exit(0):\n    pass"
    attack.run_two(LINGER + chain)


@pytest.mark.race
def test_an_agent_that_writes_ten_gigabytes_is_ended(attack: Attack) -> None:
    code = "for n in range(100):\n    open(f'big{n}', 'wb').write(bytes(10**8))"
    attack.run_two(code, AGENT_DISK_BUDGET_MB="2000", AGENT_MAX_ATTEMPTS="1")
    assert "disk filled up" in attack.world.last_comment(1)


@pytest.mark.race
def test_a_flood_of_output_leaves_the_runners_memory_flat(attack: Attack) -> None:
    code = "for _ in range(1024):\n    os.write(1, bytes(2**20))\nraise SystemExit(1)"
    result = attack.run_two(code)
    assert int(result.stdout.split()[1]) < 100_000, "kB"
