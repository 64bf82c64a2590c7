"""The image and the compose file on a real Docker engine.

`make docker` runs it, on Linux; `.ci/engine up` starts an engine where there is none. It builds the image, has the
demo make a pull request, looks at the walls from inside, lets an agent look for the runner's token, counts what three
replicas make of thirty issues while one of them is killed, stops them in the middle of work, takes GitHub away, and
signs in with secrets as files. `--agents` builds the images for Codex and Claude Code too, which takes minutes.
`python tests/docker.py demo replicas` takes only these parts.

All happens in a copy of the files in a temporary folder, with an `.env` of its own, in a project of its own. Containers
talk plain HTTP to the stand-in for GitHub, which listens on the engine's bridge. The last thing printed is a table for
Markdown; the exit code is 1 if a line of it is bad. Containers, volumes, networks and images are removed in the end.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from openapi_check import check_request
from standin import StandIn
from standin_app import App
from standin_graphql import answer_query
from test_standin_app import PRIVATE, PUBLIC

ROOT = Path(__file__).parents[1]
COMPOSE = "docker-compose.agent-runner.yml"
FILES = (COMPOSE, "Dockerfile", ".dockerignore", "requirements.txt", "runner.py", "tests/demo.py", "tests/standin.py")
DISPATCH, TARGET = "acme/tasks", "acme/widgets"
SOUGHT = "ghp_canary1nTheC0alM1ne"  # stands in the agent's script; how the token goes on is not to be seen there
TOKEN = SOUGHT + "5ingsN0M0re9"
STATE = "/app/.agent-runner"
IN_APP = [".agent-runner", "__pycache__", "requirements.txt", "runner.py"]
EVERYWHERE = "0.0.0.0"  # nosec B104
SHARED = "/dev/shm"  # nosec B108
TEMPORARY = "/tmp"  # nosec B108
IN_MEMORY = ("/dev/mqueue", SHARED, TEMPORARY)
REPLICAS, ISSUES = 3, 30
GRACE = 60  # seconds, the compose file's stop_grace_period
AGENT = f"""\
# What it does stands in the task's title. Who has done what is kept in HOME, which all tasks share.
echo "$AGENT_TASK_ID $(cat /etc/hostname)" >> "$HOME/runs"
case $AGENT_TASK_TITLE in
Search*)
    {{
        id -u | sed 's/^/as:/'
        sed -n 's/^NoNewPrivs:[[:space:]]*/privileges:/p' /proc/self/status
        {{
            env; cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline
            grep -rsh {SOUGHT} /app /run /etc /tmp /dev/shm "$HOME" "$TMPDIR" .git
        }} 2>/dev/null | grep -aoE '{SOUGHT}[[:alnum:]]*' | sort -u | sed 's/^/found:/'
        for folder in / /app /dev /dev/mqueue /dev/shm /etc /run /tmp /usr /var/tmp {STATE} "$HOME" "$TMPDIR" .; do
            touch "$folder/probe" 2>/dev/null && echo "wrote:$folder" && rm "$folder/probe"
        done
    }} > "$HOME/search";;
Sleep*) sleep "${{AGENT_TASK_TITLE##* }}";;
esac
echo "$AGENT_TASK_TITLE" > "$AGENT_TASK_ID.txt"
"""
WRITABLE = """\
import os
for top, folders, _ in os.walk("/"):
    folders[:] = [name for name in folders if top != "/" or name not in ("proc", "sys")]
    if os.access(top, os.W_OK):
        print(top)
        folders.clear()
"""
KILL = """\
import glob, os, signal
for name in sorted(glob.glob("/proc/[0-9]*/cmdline")):
    if open(name).read() == "python\\0-m\\0runner\\0":
        os.kill(int(name.split("/")[2]), signal.SIGKILL)
"""
ZOMBIES = """\
import glob, os, time
if not os.fork():
    os.fork() or time.sleep(0.3)
    os._exit(0)
os.wait()
time.sleep(1)
zombies = sum(b") Z " in open(name, "rb").read() for name in glob.glob("/proc/[0-9]*/stat"))
print(open("/proc/1/comm").read().strip(), zombies)
"""

T = TypeVar("T")


class Broken(Exception):
    """Something that the tests need does not work."""


class Report:
    """What was looked at, and what was found."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, str]] = []

    def add(self, what: str, good: bool, found: object) -> None:
        self.row(what, found, "good" if good else "**BAD**")

    def figure(self, what: str, found: str) -> None:
        self.row(what, found, "")

    def row(self, what: str, found: object, verdict: str) -> None:
        text = " ".join(str(found).split()).replace("|", "\\|")
        self.rows.append((what, text, verdict))
        print(f"{verdict.strip('*') or '-':5} {what}: {text}")

    @property
    def good(self) -> bool:
        return not any("BAD" in verdict for *_, verdict in self.rows)

    def table(self) -> str:
        return "\n".join(["| Check | Found | |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in self.rows)])


def docker(*arguments: str, check: bool = True, cwd: Path | None = None, **more: Any) -> str:
    """What a command of Docker's prints, also on standard error. The environment holds no settings of a runner."""
    kept = ("PATH", "HOME", "LANG", "TMPDIR")
    env = {name: value for name, value in os.environ.items() if name in kept or name.startswith("DOCKER_")}
    done: subprocess.CompletedProcess[str] = subprocess.run(
        ["docker", *arguments],
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        **more,
    )
    if check and done.returncode:
        raise Broken(f"`docker {' '.join(arguments)}` ended with status {done.returncode}:\n{done.stdout}")
    return done.stdout.strip()


def wait_for(condition: Callable[[], T], what: str, seconds: float = 120) -> T:
    """What the condition gives once that is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.1)
    raise Broken(f"{what} did not come about in {seconds:.0f} s")


class Project:
    """A copy of the files that make the containers, and the containers."""

    def __init__(self, folder: Path, github: StandIn) -> None:
        self.folder, self.github = folder, github
        self.name = f"agent-runner-test-{os.getpid()}"
        self.image = f"{self.name}-agent-runner"
        for file in FILES:
            (folder / file).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / file, folder / file)
        (folder / "agent.sh").write_text(AGENT)
        check = {"interval": "1s", "timeout": "5s", "retries": 2, "start_period": "20s"}
        mount = "./agent.sh:/app/agent.sh:ro"
        service = {"healthcheck": check, "volumes": [mount]}
        (folder / "override.json").write_text(json.dumps({"services": {"agent-runner": service}}))
        self.set()

    def set(self, **changes: str) -> None:
        """Writes `.env`."""
        lines = {
            **self.github.settings(DISPATCH, TARGET, Path(STATE)),
            "AGENT_POLL_INTERVAL": "1",
            "AGENT_WRITE_INTERVAL": "0",
            "AGENT_COMMAND": "sh /app/agent.sh",
            **changes,
        }
        del lines["PATH"], lines["AGENT_STATE_DIR"]
        (self.folder / ".env").write_text("".join(f"{name}={value}\n" for name, value in lines.items()))

    @contextlib.contextmanager
    def uncommented(self, *beginnings: str) -> Iterator[None]:
        """The compose file with these lines of it uncommented."""
        file = self.folder / COMPOSE
        before = text = file.read_text()
        for beginning in beginnings:
            text, count = re.subn(rf"(?m)^( *)# ({re.escape(beginning)}.*)$", r"\1\2", text)
            if count != 1:
                raise Broken(f"{count} lines of {COMPOSE} are a commented {beginning}")
        file.write_text(text)
        try:
            yield
        finally:
            file.write_text(before)

    def compose(self, *arguments: str, check: bool = True, **more: Any) -> str:
        files = ("-p", self.name, "-f", COMPOSE, "-f", "override.json", "--progress", "quiet")
        return docker("compose", *files, *arguments, check=check, cwd=self.folder, **more)

    def containers(self) -> list[str]:
        """The ids of the runners, as long as host names are."""
        return self.compose("ps", "--all", "--quiet", "agent-runner", "--no-trunc").split()

    def container(self) -> str:
        found = self.containers()
        if len(found) != 1:
            raise Broken(f"{len(found)} runners, not 1")
        return found[0]

    def up(self) -> None:
        self.compose("up", "--detach")

    def execute(self, *command: str, check: bool = True) -> str:
        return docker("exec", self.container(), *command, check=check)

    def read(self, file: str) -> str:
        """A file of HOME, from the volume."""
        quick = ("--rm", "--no-deps", "--quiet-pull", "-T")
        return self.compose("run", *quick, "agent-runner", "cat", f"{STATE}/home/{file}")

    def down(self) -> None:
        self.compose("--profile", "demo", "down", "--volumes", "--timeout", "0", "--remove-orphans")

    def remove(self) -> None:
        """Everything, whatever state it is in."""
        self.compose("--profile", "demo", "down", "-v", "-t", "0", "--rmi", "local", "--remove-orphans", check=False)
        for kind, remove in (("container", "rm -f"), ("volume", "volume rm -f"), ("network", "network rm")):
            left = docker(kind, "ls", *(["-a"] if kind == "container" else []), "-q", "--filter", f"name={self.name}")
            for item in left.split():
                docker(*remove.split(), item, check=False)
        label = f"label=com.docker.compose.project={self.name}"  # also those that a later build has taken the name from
        docker("image", "prune", "--force", "--filter", label, check=False)

    # Issues.

    def open(self, *titles: str) -> list[int]:
        return [self.github.open_issue(DISPATCH, title=title, body=title) for title in titles]

    def labels(self, number: int) -> list[str]:
        return sorted(self.github.issue(DISPATCH, number).labels)

    def is_done(self, number: int) -> bool:
        return self.labels(number) == ["agent-done", "copilot-agent"]

    def wait_for_done(self, numbers: Sequence[int], seconds: float = 120) -> None:
        wait_for(lambda: all(map(self.is_done, numbers)), f"the end of issues {numbers[0]} to {numbers[-1]}", seconds)

    def claims(self) -> list[str]:
        return self.github.git(TARGET, "for-each-ref", "--format=%(refname)", "refs/agent-runner").split()

    def forget(self) -> None:
        """Closes what is open, so that the next runner has nothing to do."""
        for number in self.github.repository(DISPATCH).issues:
            self.github.close_issue(DISPATCH, number)


def seconds_since(begun: float) -> str:
    return f"{time.monotonic() - begun:.1f} s"


def inspect(item: str, form: str) -> str:
    return docker("inspect", "--format", form, item)


# The files and the image.


def try_files(project: Project, report: Report) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    if hadolint.exists():
        done = subprocess.run([hadolint, "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
        report.add("hadolint", not done.stdout + done.stderr, done.stdout + done.stderr or "nothing")
    else:
        report.figure("hadolint", "not installed: pip install -r requirements-dev.txt")
    commented = re.findall(r"(?m)^ *# ((?:- \./|- /etc|args|secrets|ports).*)$", (ROOT / COMPOSE).read_text())
    said = project.compose("--profile", "demo", "config", "--quiet", check=False)
    for line in commented:
        with project.uncommented(line):
            said += project.compose("config", "--quiet", check=False)
    report.add(f"compose config, as it is and with each of {len(commented)} commented lines", not said, said or "clean")


def try_image(project: Project, report: Report) -> None:
    begun = time.monotonic()
    project.compose("build", "--no-cache", "agent-runner")
    report.figure("Build without a cache, base image at hand", seconds_since(begun))
    (project.folder / "runner.py").write_text((project.folder / "runner.py").read_text() + "# changed\n")
    begun = time.monotonic()
    project.compose("build", "agent-runner")
    report.figure("Build after a change of runner.py", seconds_since(begun))
    sizes = [int(inspect(image, "{{.Size}}")) for image in (project.image, "python:3.13-slim")]
    report.figure(
        "Size of the image, and what of it is the base", " MB, ".join(f"{size / 1e6:.0f}" for size in sizes) + " MB"
    )
    config = json.loads(inspect(project.image, "{{json .Config}}"))
    labels = {name.rpartition(".")[2] for name in config["Labels"] if name.startswith("org.opencontainers.image.")}
    report.add("Labels", labels >= {"title", "description", "version", "source", "licenses"}, ", ".join(sorted(labels)))
    look = "find / -xdev '(' -name '.env*' -o -name standin.py ')' 2>/dev/null; ls -A /app"
    files = docker("run", "--rm", "--network", "none", project.image, "sh", "-c", look).split()
    report.add("In /app, and no .env or tests anywhere", files == IN_APP, ", ".join(files))
    first, zombies = docker("run", "--rm", "--network", "none", project.image, "python", "-c", ZOMBIES).split()
    report.add("Without --init: process 1, and zombies left", (first, zombies) == ("tini", "0"), f"{first}, {zombies}")


def try_demo(project: Project, report: Report) -> None:
    project.compose("build", "demo")
    begun = time.monotonic()
    log = project.compose("up", "--no-log-prefix", "demo", timeout=120)
    wanted = (
        "3. The pull request: acme/greeter#1",
        '+    return f"Hello, {name}!"',
        "labels: agent-done, copilot-agent",
        "Done: http",
    )
    missing = [text for text in wanted if text not in log]
    report.add("Demo: pull request, diff, labels and comments are shown", not missing, missing or seconds_since(begun))
    services = project.compose("--profile", "demo", "ps", "--all", "--format", "{{.Service}} {{.ExitCode}}")
    report.add("Demo: services, and how they ended", services == "demo 0", services)
    project.down()


# One runner.


def try_start(project: Project, report: Report) -> None:
    project.github.log.clear()
    begun = time.monotonic()
    project.up()
    wait_for(lambda: project.github.log, "the first poll")
    report.figure("From `up` to the first poll", f"{project.github.log[0].at - begun:.1f} s")
    wait_for(lambda: inspect(project.container(), "{{.State.Health.Status}}") == "healthy", "health", 30)
    report.add("From `up` to healthy, looking each second", True, seconds_since(begun))
    services = project.compose("ps", "--all", "--format", "{{.Service}}")
    report.add("`up` starts", services == "agent-runner", services)
    time.sleep(2)
    report.figure("Memory, idle", memory(project))
    begun = time.monotonic()
    project.execute("python", "-c", "pass")
    plain = time.monotonic() - begun
    log = json.loads(inspect(project.container(), "{{json .State.Health.Log}}"))
    report.add(
        "Health check", log[-1]["ExitCode"] == 0, f"{lasted(log[-1]):.2f} s; `python -c pass` takes {plain:.2f} s"
    )


def lasted(check: Mapping[str, str]) -> float:
    """Seconds that a health check took."""
    begun, ended = (re.findall(r"\d+:(\d+):(\d+\.\d+)", check[name])[0] for name in ("Start", "End"))
    return (int(ended[0]) - int(begun[0])) % 60 * 60 + float(ended[1]) - float(begun[1])


def memory(project: Project) -> str:
    return docker("stats", "--no-stream", "--format", "{{.MemUsage}}, {{.PIDs}} threads", project.container())


def try_walls(project: Project, report: Report) -> None:
    project.up()
    lines = project.execute("cat", "/proc/1/status").splitlines()
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    ids = {*status["Uid"].split(), *status["Gid"].split(), *status["Groups"].split()}
    report.add("User and groups of process 1", ids == {"1000"}, ", ".join(ids))
    capabilities = {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")}
    report.add("Capabilities, also those that could be had", capabilities == {"0" * 16}, ", ".join(capabilities))
    report.add("no_new_privs", status["NoNewPrivs"] == "1", status["NoNewPrivs"])
    report.add("seccomp filter", status["Seccomp"] == "2", status["Seccomp"])
    root = next(line for line in project.execute("cat", "/proc/1/mounts").splitlines() if line.split()[1] == "/")
    report.add("The root file system is read-only", "ro" in root.split()[3].split(","), root.split()[3].split(",")[0])
    folders = sorted(project.execute("python", "-c", WRITABLE).split())
    report.add("Folders that can be written to", folders == [STATE, *IN_MEMORY], ", ".join(folders))
    config = json.loads(inspect(project.container(), "{{json .HostConfig}}"))
    limits = [config["NanoCpus"], config["Memory"], config["PidsLimit"]]
    report.add("Limits: CPU, memory, processes", limits == [500_000_000, 2**28, 3000], limits)
    others = [config["RestartPolicy"]["Name"], *config["LogConfig"]["Config"].values()]
    report.add("Restart policy and log rotation", sorted(others) == ["10m", "3", "unless-stopped"], ", ".join(others))
    check = project.execute("python", "runner.py", "--check", check=False)
    report.add(
        "--check in the container", "✗" not in check and "✓ claims" in check, "no ✗" if "✗" not in check else check
    )
    (sandbox,) = re.findall(r"sandbox +(.*)", check)
    report.figure("Its line about the sandbox", sandbox)


def try_work(project: Project, report: Report) -> None:
    project.set(AGENT_MAX_CONCURRENT="4", AGENT_SANDBOX="required")
    project.up()
    begun = time.monotonic()
    numbers = project.open("Search for the token")
    project.wait_for_done(numbers)
    report.figure("One task, from the issue to the pull request, with half a CPU", seconds_since(begun))
    found = project.execute("cat", f"{STATE}/home/search").split()
    good = {"as:1000", "privileges:1"} <= {*found} and leaks(found) == [SOUGHT]
    report.add("What an agent finds of the token: the words it looks for", good, leaks(found))
    wrote = [line.removeprefix("wrote:") for line in found if line.startswith("wrote:")]
    good = all(folder in (".", SHARED) or folder.startswith(f"{STATE}/") for folder in wrote)
    report.add("An agent writes to", good and len(wrote) == 4, ", ".join(wrote).replace(f"{STATE}/", "…/"))
    numbers = project.open(*["Sleep 8"] * 4)
    wait_for(lambda: all("agent-processing" in project.labels(number) for number in numbers), "four tasks at work")
    time.sleep(3)
    report.figure("Memory, 4 tasks at work", memory(project))
    project.wait_for_done(numbers)
    project.set(AGENT_SANDBOX="off")
    project.up()
    project.wait_for_done(project.open("Search again"))
    found = project.execute("cat", f"{STATE}/home/search").split()
    report.add("The same search with AGENT_SANDBOX=off finds all of it", TOKEN in leaks(found), leaks(found))


def leaks(found: Sequence[str]) -> list[str]:
    """What the agent's search came upon: its own script, and the token if it can be had."""
    return [line.removeprefix("found:") for line in found if line.startswith("found:")]


def try_crash(project: Project, report: Report) -> None:
    """The runner is killed within its container, which Compose starts again: with the same name, so that the task goes
    on before its lease is over."""
    project.set()
    project.up()
    (number,) = project.open("Sleep 5")
    wait_for(lambda: "agent-processing" in project.labels(number), "a task at work")
    time.sleep(2)
    begun = time.monotonic()
    project.execute("python", "-c", KILL, check=False)
    project.wait_for_done([number])
    count = inspect(project.container(), "{{.RestartCount}}")
    good = count == "1" and not project.claims()
    report.add("A runner that crashed at a task of 5 s is started again, and does it", good, seconds_since(begun))


def try_health(project: Project, report: Report) -> None:
    def wait_for_health(wanted: str) -> str:
        begun = time.monotonic()
        wait_for(lambda: inspect(project.container(), "{{.State.Health.Status}}") == wanted, wanted, 60)
        return seconds_since(begun)

    project.set()
    project.up()
    wait_for_health("healthy")
    project.github.stop()
    report.add("Unhealthy when GitHub is away (3 polls of 1 s, 2 checks)", True, wait_for_health("unhealthy"))
    project.github.start()
    report.add("Healthy when GitHub is back", True, wait_for_health("healthy"))
    project.set(AGENT_HTTP_PORT="")
    project.up()
    report.add("Healthy without a page, which there is nobody to ask", True, wait_for_health("healthy"))
    project.down()


def try_alone(project: Project, report: Report) -> None:
    """`docker run` as the guide has it; there is no init but the image's."""
    (command,) = re.findall(r"(?m)^docker run (--.*) agent-runner$", (ROOT / "docs/agent-runner-setup.md").read_text())
    name, volume = f"{project.name}-alone", f"{project.name}_alone"
    words = command.replace("agent-runner-state", volume).split()
    project.set(AGENT_COMMAND="")
    project.compose("build", "agent-runner")
    project.github.log.clear()
    docker("run", "--name", name, *words, project.image, cwd=project.folder)
    wait_for(lambda: project.github.log, "the first poll")
    begun = time.monotonic()
    docker("stop", name)
    code = inspect(name, "{{.State.ExitCode}}")
    report.add(
        "`docker run` as in the guide polls, and stops with code", code == "0", f"{code}, {seconds_since(begun)}"
    )
    docker("rm", name)
    docker("volume", "rm", volume)


# Several runners.


def runs(project: Project) -> list[tuple[str, str]]:
    """What agents have run: the issue's number, and the host's name."""
    lines = (line.split() for line in project.read("runs").splitlines() if line.startswith("issue-"))
    return [(task.removeprefix("issue-"), host) for task, host in lines]


def try_replicas(project: Project, report: Report) -> None:
    project.set(AGENT_LEASE="10", AGENT_MAX_CONCURRENT="2", AGENT_HTTP_HOST=EVERYWHERE)
    with project.uncommented("ports:"):
        project.compose("up", "--detach", "--scale", f"agent-runner={REPLICAS}")
        replicas = project.containers()
        ports = {inspect(one, '{{(index (index .NetworkSettings.Ports "8080/tcp") 0).HostPort}}') for one in replicas}
        report.add("Each of three runners has a port of its own", len(ports) == REPLICAS, ", ".join(sorted(ports)))
        begun = time.monotonic()
        numbers = project.open(*["Sleep 3"] * ISSUES)
        victim = wait_for(lambda: busy(project, numbers, replicas), "a runner in the middle of two tasks")
        docker("kill", "--signal", "KILL", victim)
        killed_at = [number for number in numbers if project.is_done(number)]
        project.wait_for_done(numbers, 400)
        wait_for(lambda: not project.claims(), "the end of the claims")
        report.figure(f"{ISSUES} issues, two runners and a killed one", seconds_since(begun))
        judge(project, report, numbers, victim, killed_at)
        try_stop(project, report, [one for one in replicas if one != victim])
    project.down()


def busy(project: Project, numbers: Sequence[int], replicas: Sequence[str]) -> str:
    """The id of a runner that has done some tasks and is in the middle of two, or ""."""
    if sum(map(project.is_done, numbers)) < 5:
        return ""
    alive = replicas[0]
    done = {str(number) for number in numbers if project.is_done(number)}
    lines = docker("exec", alive, "cat", f"{STATE}/home/runs").splitlines()
    at_work = Counter(line.split()[1] for line in lines if line.split()[0].removeprefix("issue-") not in done)
    return next((one for one in replicas if at_work[one[:12]] >= 2), "")


def judge(project: Project, report: Report, numbers: Sequence[int], victim: str, done: Sequence[int]) -> None:
    """Whether each issue was done once, and what the killed runner had was done by others."""
    pulls = Counter(pull.head for pull in project.github.pulls(TARGET))
    wrong = [number for number in numbers if pulls[f"agent-task-issue-{number}"] != 1]
    report.add(f"Each of {ISSUES} issues has one pull request and right labels", not wrong, wrong or "yes")
    hosts: dict[str, list[str]] = {}
    for task, host in runs(project):
        hosts.setdefault(task, []).append(host)
    mine = {str(number): hosts.get(str(number), []) for number in numbers}
    again = {task: them for task, them in mine.items() if len(them) > 1}
    # A machine that is too busy to renew a claim in time loses it, as the log says; then there is another run, too.
    log = project.compose("logs", "--no-color")
    lost = Counter(re.findall(r"issue=(\d+) .* dropped, for the claim is lost", log))
    doubled = [task for task, them in mine.items() if not 0 < len(them) <= 1 + lost[task] + (victim[:12] in them[:-1])]
    shares = Counter(them[-1] for them in mine.values() if them)
    told = doubled or f"{len(again)} ran again, {lost.total()} of them since a claim was not renewed in time"
    report.add("Each agent ran once, but for those of the killed runner", not doubled, told)
    killed = [task for task, them in again.items() if victim[:12] in them[:-1]]
    taken = [task for task in killed if int(task) not in done and again[task][-1] != victim[:12]]
    report.add("Its tasks were finished by others", bool(taken) and taken == killed, f"{len(taken)} of {len(killed)}")
    report.add("All three had a share", len(shares) == REPLICAS, ", ".join(str(count) for count in shares.values()))


def try_stop(project: Project, report: Report, alive: Sequence[str]) -> None:
    """Stops what is in the middle of work that does not end by itself."""
    numbers = project.open(*["Sleep 900"] * 4)
    wait_for(lambda: all("agent-processing" in project.labels(number) for number in numbers), "four tasks at work")
    time.sleep(3)
    begun = time.monotonic()
    project.compose("stop")
    seconds = time.monotonic() - begun
    report.add(f"Stopped at work within {GRACE} s (AGENT_DRAIN_SECONDS=30)", seconds < GRACE, f"{seconds:.1f} s")
    codes = [inspect(one, "{{.State.ExitCode}}") for one in alive]
    report.add("With exit codes", {*codes} == {"0"}, ", ".join(codes))
    labels, claims = {label for number in numbers for label in project.labels(number)}, project.claims()
    found = f"{len(claims)} claims, labels {', '.join(labels)}"
    report.add("Claims are released, the issues back in the queue", not claims and labels == {"copilot-agent"}, found)
    project.forget()


# Secrets in files.


def keep_secret(project: Project, name: str, text: str) -> None:
    """A file that user 1000 can read, and nobody else if that can be had."""
    file = project.folder / "secrets" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    if os.geteuid() == 0:
        os.chown(file, 1000, 1000)
    file.chmod(0o400 if os.geteuid() in (0, 1000) else 0o444)


def run_once(project: Project) -> str:
    return project.compose(
        "run", "--rm", "-T", "agent-runner", "python", "runner.py", "--once", check=False, timeout=120
    )


def try_secrets(project: Project, report: Report) -> None:
    keep_secret(project, "github_token", TOKEN + "\n")
    project.set(GITHUB_TOKEN="", GITHUB_TOKEN_FILE="/run/secrets/github_token")
    with project.uncommented("secrets: [github_token]"):
        (number,) = project.open("Search for the token")
        log = run_once(project)
        found = project.read("search").split()
    good = project.is_done(number) and leaks(found) == [SOUGHT]
    report.add("The token as a compose secret works, and no agent finds it", good, "yes" if good else log)
    app = App(PUBLIC)
    app.install("acme", [DISPATCH, TARGET])
    project.github.app = app
    keep_secret(project, "github_app_key.pem", PRIVATE.decode())
    key = {"GITHUB_APP_ID": str(app.id), "GITHUB_APP_PRIVATE_KEY_PATH": "/run/secrets/github_app_key"}
    project.set(GITHUB_TOKEN="", **key)
    with project.uncommented("secrets: [github_app_key]", "args: {EXTRAS"):
        project.compose("build", "agent-runner")
        (number,) = project.open("Sign in as an App")
        log = run_once(project)
    good = project.is_done(number) and len(app.tokens) > 0
    report.add("An App's key as a compose secret works", good, f"{len(app.tokens)} tokens made" if good else log)
    project.down()


# Agents.


def try_agents(project: Project, report: Report) -> None:
    """The images with agents, by the examples in the compose file."""
    for line in re.findall(r"# (args: \{NPM.*)", (ROOT / COMPOSE).read_text()):
        with project.uncommented(line):
            begun = time.monotonic()
            project.compose("build", "agent-runner")
            took = seconds_since(begun)
            program = "codex" if "codex" in line else "claude"
            version = project.compose(
                "run", "--rm", "-T", "--no-deps", "-e", f"HOME={STATE}", "agent-runner", program, "--version"
            )
            package = line.partition('"')[2].rpartition('"')[0]
        size = int(inspect(project.image, "{{.Size}}")) / 1e6
        wanted = package.rpartition("@")[2]
        report.add(
            f"Image with {package}", wanted in version, f"{took}, {size:,.0f} MB, `{program} --version` says {version}"
        )
    project.down()


def gateway() -> str:
    """The address of this machine that containers reach."""
    try:
        return docker("network", "inspect", "bridge", "--format", "{{(index .IPAM.Config 0).Gateway}}")
    except (Broken, OSError) as problem:
        raise Broken(f"No Docker engine answers; `bash .ci/engine up` starts one. {problem}") from None


PARTS = {
    "files": try_files,
    "image": try_image,
    "demo": try_demo,
    "start": try_start,
    "walls": try_walls,
    "work": try_work,
    "crash": try_crash,
    "health": try_health,
    "alone": try_alone,
    "replicas": try_replicas,
    "secrets": try_secrets,
}


def main() -> int:
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(line_buffering=True)
    parser = argparse.ArgumentParser(description="Tries the image and the compose file on a real Docker engine.")
    parser.add_argument("parts", nargs="*", metavar="part", help=f"which (default: all): {', '.join(PARTS)}")
    parser.add_argument("--agents", action="store_true", help="build the images for Codex and Claude Code, too")
    arguments = parser.parse_args()
    if unknown := {*arguments.parts} - {*PARTS}:
        parser.error(f"there is no part {', '.join(sorted(unknown))}")
    tries = [PARTS[name] for name in arguments.parts or PARTS] + [try_agents] * arguments.agents
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    report, begun = Report(), time.monotonic()
    with contextlib.ExitStack() as stack:
        try:
            address = gateway()
        except Broken as problem:
            print(problem)
            return 1
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        github = StandIn(folder / "github", token=TOKEN, address=address, check=check_request, graphql=answer_query)
        stack.enter_context(github)
        github.rate_limit = github.rate_remaining = github.graphql_remaining = 10**9
        github.new_label(github.add_repository(DISPATCH), "copilot-agent")
        github.add_repository(TARGET)
        (folder / "files").mkdir()
        project = Project(folder / "files", github)
        stack.callback(project.remove)
        for each in tries:
            try:
                each(project, report)
            except (Broken, subprocess.TimeoutExpired) as problem:
                report.add(each.__name__.replace("_", " "), False, problem)
                print(project.compose("logs", "--tail", "40", check=False))
                project.compose("--profile", "demo", "down", "-v", "-t", "0", check=False)
        report.add("What the stand-in for GitHub complains about", not github.problems, github.problems or "nothing")
    print(f"\n{report.table()}\n\n{'Good' if report.good else 'BAD'}, after {time.monotonic() - begun:.0f} s.")
    return 0 if report.good else 1


if __name__ == "__main__":
    sys.exit(main())
