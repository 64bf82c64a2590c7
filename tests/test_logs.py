"""What is told: lines of the log as text and as JSON, on a terminal and elsewhere, and their names."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import logging
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import unicodedata
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, NamedTuple

import pytest
from conftest import DISPATCH, PATCH, RUNNER, TARGET, FakeClock, FastClock, World, make_config, wait_until
from standin import Fault
from test_cli import finish
from test_loop import patch
from test_task import agent

import runner as runner_module
from runner import OUTCOMES, PHASES, Config, LogFormat, Terminal, about, describe, live_line, work_on

NAMES = ["issue", "task", "attempt", "phase"]
LINE = re.compile(r"\d{4}(?:-\d\d){2} \d\d:\d\d:\d\d,\d{3} ([A-Z]+) ((?:(?:issue|task|attempt|phase)=\S* )*)(.*)")
BOTH = pytest.mark.parametrize("form", ["text", "json"])
COLUMNS = 40
CJK = "修正した" * 60  # two columns each
WAITS = 'import os, pathlib, time\nwhile not pathlib.Path(os.environ["HOME"], "go").exists(): time.sleep(0.02)\n'


class Line(NamedTuple):
    level: str
    facts: dict[str, str]
    message: str


def read_line(text: str) -> Line:
    match = LINE.fullmatch(text)
    assert match, text
    facts = (part.partition("=") for part in match[2].split())
    return Line(match[1], {name: value for name, _, value in facts}, match[3])


def logged(world: World, *arguments: str, **env: str) -> list[Line]:
    """The lines of the log of a whole process."""
    return [read_line(line) for line in finish(world.start(*arguments, **env))[2].splitlines()]


# -- what the lines are about -----------------------------------------------------------------------


def test_lines_of_a_task_say_which_and_how_far_it_is_and_others_do_not(world: World) -> None:
    world.open(patch(7))
    lines = logged(world, "--once", AGENT_LOG_LEVEL="DEBUG")
    assert all([name for name in NAMES if name in line.facts] == [*line.facts] for line in lines)  # in this order
    steps = [tuple(line.facts.values()) for line in lines if line.facts]
    phases = ["claiming", "checking", "preparing", "working", "publishing", "reporting"]
    known = [("1", "t7", "1", phase) for phase in phases[1:]]
    assert [step for step in dict.fromkeys(steps) if step != ("1", "t7", "1", "waiting")] == [
        ("1", "claiming"), ("1", "1", "claiming"), *known
    ]  # fmt: skip
    (done,) = (line for line in lines if line.message.startswith("done: "))
    assert (done.level, [*done.facts]) == ("INFO", NAMES)
    others = [line.message for line in lines if not line.facts]
    assert any(f"GET {world.github.api_url}/repos/{DISPATCH}/issues?" in message for message in others)
    assert any("run git fetch" in message for message in others)  # of the claims
    assert not any("/issues/1" in message for message in others)


def test_lines_of_the_client_of_git_and_of_the_claim_say_it_too(world: World) -> None:
    world.open(patch(7))
    code = 'import time\ntime.sleep(3)\nopen("new", "w")'
    env = {"AGENT_LEASE": "3", "AGENT_COMMAND": agent(world.home, code), "AGENT_LOG_LEVEL": "DEBUG"}
    lines = logged(world, "--once", **env)

    def phases(start: str) -> list[str]:
        """In which phases such lines were written."""
        return [line.facts["phase"] for line in lines if line.facts and line.message.startswith(start)]

    assert phases(f"POST {world.github.api_url}/repos/{DISPATCH}/issues/1/comments -> 201") == ["checking", "reporting"]
    assert "preparing" in phases("run git ls-remote")
    assert "publishing" in phases("run git push")
    working = [line.message for line in lines if line.facts.get("phase") == "working"]
    assert any(
        message.startswith("run git push") for message in working
    )  # the claim's own thread, all that pushes then
    assert [line.message for line in lines if line.message.startswith("run git push") and not line.facts] == []


def test_two_tasks_at_a_time_do_not_mix_their_lines(world: World) -> None:
    for number in (1, 2):
        world.open(patch(number))
    code = """
        import os, pathlib, time
        home = pathlib.Path(os.environ["HOME"])
        (home / os.environ["AGENT_TASK_ID"]).touch()
        while len(list(home.glob("t?"))) < 2: time.sleep(0.02)
        open("new", "w")
    """
    env = {"AGENT_MAX_CONCURRENT": "2", "AGENT_COMMAND": agent(world.home, code), "AGENT_LOG_LEVEL": "DEBUG"}
    lines = logged(world, "--once", **env)
    seen = {(line.facts["issue"], line.facts["task"]) for line in lines if "task" in line.facts}
    assert seen == {("1", "t1"), ("2", "t2")}
    named = [
        (line, re.search(r"/issues/(\d)|agent-task-t(\d)|claims/acme/dispatch/(\d)", line.message)) for line in lines
    ]
    told = [(line.facts.get("issue"), match[1] or match[2] or match[3]) for line, match in named if match]
    assert len(told) > 20
    assert all(issue == other for issue, other in told)


def test_what_is_within_comes_to_an_end(config: Config) -> None:
    assert about() == {}
    with work_on({"issue": 1, "task": "", "attempt": 0, "phase": "claiming"}):
        with contextlib.suppress(KeyError), work_on({"issue": 2}):
            assert about() == {"issue": 2}
            raise KeyError
        assert about() == {"issue": 1, "phase": "claiming"}
        thread: list[dict[str, Any]] = []
        other = threading.Thread(target=lambda: thread.append(about()))
        other.start()
        other.join()
    assert (about(), thread) == ({}, [{}])


def test_the_audit_log_and_the_metrics_have_the_same_names(world: World) -> None:
    world.open(patch(7))
    world.open("No patch.")
    file = world.folder / "audit.jsonl"
    runner = world.run_once(AGENT_AUDIT_LOG=str(file))
    audited = [json.loads(line) for line in file.read_text().splitlines()]
    about_it = [{name: line[name] for name in NAMES if name in line} for line in audited]
    assert {"issue": 1, "task": "t7", "attempt": 1, "phase": "publishing"} in about_it
    assert {"issue": 2, "task": "issue-2", "attempt": 1, "phase": "reporting"} in about_it
    assert {facts["phase"] for facts in about_it} <= {*PHASES}
    text = runner.metrics.render()
    assert {*re.findall(r'agent_runner_phase_seconds_count{phase="(\w+)"}', text)} == {*PHASES} - {"waiting"}
    counted = dict(re.findall(r'agent_runner_tasks_total{outcome="(\w+)"} ([\d.]+)', text))
    assert {*counted} == {*OUTCOMES}
    assert {name for name, number in counted.items() if float(number)} == {"done", "failed"}
    assert sorted(past["outcome"] for past in describe(runner)["history"]) == ["done", "failed"]
    assert "agent_runner_phase_seconds_count" in text
    spent = dict(re.findall(r'agent_runner_phase_seconds_count{phase="(\w+)"} (\d+)', text))
    assert {name: int(number) for name, number in spent.items() if int(number)} == {
        "claiming": 2, "checking": 2, "preparing": 2, "working": 2, "publishing": 1, "reporting": 2
    }  # fmt: skip


# -- as JSON ----------------------------------------------------------------------------------------


def test_each_line_of_a_process_is_one_json_object(world: World) -> None:
    world.open(patch(7))
    env = {"AGENT_LOG_FORMAT": "json", "AGENT_LOG_LEVEL": "DEBUG", "AGENT_POLL_INTERVALL": "5"}
    before = datetime.now(UTC)
    lines = [json.loads(line) for line in finish(world.start("--once", **env))[2].splitlines()]
    for line in lines:
        facts = [name for name in NAMES if name in line]
        assert [*line] == ["time", "level", "message", *facts]
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
        assert 0 <= (datetime.fromisoformat(line["time"]) - before).total_seconds() + 0.001 < 600
        assert line["level"] in ("DEBUG", "INFO", "WARNING", "ERROR")
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)
    (done,) = (line for line in lines if line["message"].startswith("done: "))
    assert {name: done[name] for name in NAMES} == {"issue": 1, "task": "t7", "attempt": 1, "phase": "reporting"}
    assert lines[0]["message"].startswith("AGENT_POLL_INTERVALL is set")


def test_a_traceback_is_in_the_line_of_its_event(world: World) -> None:
    world.open(patch(7))
    world.github.faults.append(Fault(path=".*/issues/1", status=200, body={"message": "not an issue"}))
    _, err = world.start("--once", AGENT_LOG_FORMAT="json").communicate(timeout=60)
    (fault,) = (line for line in map(json.loads, err.splitlines()) if "exception" in line)
    assert (fault["level"], fault["message"], fault["issue"]) == ("ERROR", "a fault of the runner", 1)
    assert fault["exception"].startswith("Traceback (most recent call last):\n")
    assert "KeyError: 'repository_url'" in fault["exception"]
    assert [*fault][-1] == "exception"


def test_what_is_wrong_before_the_log_begins_is_plain(world: World) -> None:
    code, out, err = finish(world.start("--once", AGENT_LOG_FORMAT="xml"))
    assert (code, out) == (2, "")
    assert "AGENT_LOG_FORMAT must be text or json, not 'xml'" in err


# -- hostile words, and secrets ---------------------------------------------------------------------


class Written:
    """A log of its own, and what is written in it."""

    def __init__(self, form: str, **env: str) -> None:
        self.stream = io.StringIO()
        self.config = make_config({"AGENT_LOG_FORMAT": form, **env})
        handler = logging.StreamHandler(self.stream)
        handler.setFormatter(LogFormat(self.config))
        self.log = logging.Logger("agent-runner", logging.DEBUG)
        self.log.addHandler(handler)

    @property
    def text(self) -> str:
        return self.stream.getvalue()

    @property
    def messages(self) -> list[str]:
        lines = self.text.splitlines()
        if self.config.log_format == "json":
            return [json.loads(line)["message"] for line in lines]
        return [read_line(line).message for line in lines]


HOSTILE = {
    "newlines": "a\nb\r\nc\rd\x0be\x0cf\x85g\u2028h\u2029i",
    "colours": "a\x1b[31mb\x1b[0mc\x9b31md",
    "a title": "a\x1b]0;owned\x07b",
    "direction": "a\u202eb\u2066c\u200fd",
    "quotes": 'a"b\'c\\d\\"e',
    "a line of its own": "a\n2026-01-01 00:00:00,000 ERROR issue=2 phase=working forged",
    "an object of its own": 'a"}\n{"time": "2026-01-01T00:00:00.000Z", "level": "ERROR"}',
    "nothing": "\x00\x08\x7f",
    "a surrogate": "a\udc80b",
    "a percentage": "100%s %(message)s",
}


@BOTH
@pytest.mark.parametrize("words", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_words_stay_in_one_harmless_line(form: str, words: str) -> None:
    written = Written(form)
    with work_on({"issue": 1, "task": "t1", "attempt": 1, "phase": "working"}):
        written.log.info("it said: %s", words)
    (line,) = written.text[:-1].split("\n")
    assert re.sub(r"[^\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069]", "", line) == ""
    (message,) = written.messages
    assert message.startswith("it said: ")
    assert "\x1b" not in message
    assert "owned" not in message
    if form == "text":
        assert read_line(line).facts["issue"] == "1"
    else:
        assert json.loads(line)["issue"] == 1
        line.encode("ascii")


@BOTH
def test_a_hostile_label_is_one_line_of_a_process(world: World, form: str) -> None:
    number = world.open(PATCH, labels=["bug\x1b[2J\u202e\n2026-01-01 00:00:00,000 INFO forged", 'quo"te'])
    _, _, err = finish(world.start("--issue", str(number), AGENT_LOG_FORMAT=form))
    (line,) = (line for line in err.split("\n") if "forged" in line)
    assert "its labels: bug" in line
    assert not re.search("[\x1b\u202e\r]", err)
    assert form == "json" or "\nforged" not in err


@BOTH
def test_secrets_are_masked_in_messages_and_tracebacks(form: str) -> None:
    token, key = "ghp_" + "7" * 36, 'a "quoted" k\\ey ünï'
    written = Written(form, GITHUB_TOKEN=token, AGENT_ENV="KEY", KEY=key)
    written.log.info("found %s and %s", token, key)
    try:
        raise ValueError(f"cannot use {token} with {key}")
    except ValueError:
        written.log.exception("a fault")
    assert written.text.count("***") == 4
    for secret in (token, key, json.dumps(key)[1:-1], json.dumps(key, ensure_ascii=False)[1:-1], "quoted"):
        assert secret not in written.text
    assert "ValueError" in written.text


@BOTH
def test_a_traceback_with_hostile_words_is_harmless(form: str) -> None:
    written = Written(form)
    try:
        raise ValueError("a\x1b[2J\u202eb\x07")
    except ValueError:
        written.log.exception("a fault")
    assert "ValueError: a" in written.text
    assert not re.search("[\x07\x1b\u202e]", written.text)


@BOTH
def test_a_secret_is_masked_in_the_log_of_a_process(world: World, form: str) -> None:
    token = world.github.token
    world.github.faults.append(Fault(path=".*/issues", status=404, body={"message": f"who is {token}?"}))
    _, _, err = finish(world.start("--once", AGENT_LOG_FORMAT=form))
    assert "who is ***?" in err
    assert token not in err


# -- the last line of a terminal --------------------------------------------------------------------


class Screen:
    """A terminal of that width: lines that were ended, and the rows that each took."""

    def __init__(self, columns: int) -> None:
        self.columns, self.wraps = columns, True
        self.lines: list[str] = [""]
        self.row, self.column = [" "] * columns, 0
        self.wrapped: list[str] = []  # the rows above of a line that was too long
        self.last_lines: list[str] = []  # what was written without wrapping

    def feed(self, text: str) -> None:
        for part in re.findall(r"\x1b\[[^a-zA-Z]*[a-zA-Z]|.", text, re.DOTALL):
            self._take(part)

    def _take(self, part: str) -> None:
        if part == "\r":
            self.column = 0
        elif part == "\n":
            assert self.wraps
            self.lines[-1] = "".join([*self.wrapped, *self.row]).rstrip()
            self.lines.append("")
            self.row, self.column, self.wrapped = [" "] * self.columns, 0, []
        elif part == "\x1b[2K":
            self.row = [" "] * self.columns
        elif part in ("\x1b[?7l", "\x1b[?7h"):
            self.wraps = part.endswith("h")
            self.last_lines += [""] * (not self.wraps)
        else:
            assert part[0] != "\x1b", part
            self._put(part)

    def _put(self, character: str) -> None:
        width = 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if self.wraps and self.column + width > self.columns:
            self.wrapped.append("".join(self.row))
            self.row, self.column = [" "] * self.columns, 0
        if not self.wraps:
            self.last_lines[-1] += character
        self.column = min(self.column, self.columns - width)
        self.row[self.column : self.column + width] = [character, *[""] * (width - 1)]
        self.column += width


class OnTerminal:
    """A runner with a terminal as its standard error."""

    def __init__(self, world: World, **env: str) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
        (world.folder / "cwd").mkdir(exist_ok=True)
        passed_on = {name: value for name, value in os.environ.items() if name.startswith("COVERAGE")}
        self.process = subprocess.Popen(
            [sys.executable, str(RUNNER)], cwd=world.folder / "cwd", env={**passed_on, **world.env, **env},
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=slave, text=True,
        )  # fmt: skip
        world._started.append(self.process)
        os.close(slave)
        self.raw, self.gone = b"", threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        try:
            while not self.gone.is_set():
                if select.select([self.master], [], [], 0.05)[0]:
                    self.raw += os.read(self.master, 65_536)
        except OSError:  # EIO: nobody writes any more
            pass
        os.close(self.master)

    @property
    def text(self) -> str:
        return self.raw.decode("utf-8", "replace")

    def end(self) -> str:
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(60) == 0
        self._reader.join(60)
        return self.text

    def hang_up(self) -> None:
        self.gone.set()
        self._reader.join(60)


def work_on_terminal(world: World, until: str, **env: str) -> str:
    """What a terminal gets of a daemon that does one task, and is looked at on the way."""
    world.open(patch(7), title=CJK)
    code = f"print({CJK!r}, flush=True)\n{WAITS}open('new', 'w')"
    env = {"TERM": "xterm", "AGENT_COMMAND": agent(world.home, code), **env}
    terminal = OnTerminal(world, **env)
    wait_until(lambda: until in terminal.text, 60)
    (world.home / "go").touch()
    wait_until(lambda: "done: " in terminal.text, 60)
    wait_until(lambda: "\x1b" not in terminal.text or "● next look" in terminal.text.rpartition("done: ")[2], 60)
    return terminal.end()


def test_the_last_line_of_a_terminal_is_written_over_and_cleared(world: World) -> None:
    text = work_on_terminal(world, CJK[:9])
    screen = Screen(COLUMNS)
    screen.feed(text)
    lines = [read_line(line) for line in screen.lines[:-1]]  # all are whole, and nothing else is left
    assert any(line.message.startswith("done: ") for line in lines)
    assert any(line.message == f"begun in {TARGET}" for line in lines)
    assert "".join(screen.row).strip() == ""
    assert any("#1 working" in line and CJK[:9] in line for line in screen.last_lines)
    assert any(line.startswith("● next look in ") for line in screen.last_lines)
    assert all("\n" not in line for line in screen.last_lines)


def test_a_last_line_does_not_wrap(world: World) -> None:
    text = work_on_terminal(world, CJK[:9])
    shown = re.findall(r"\x1b\[\?7l(.*?)\x1b\[\?7h", text, re.DOTALL)
    assert any(len(line) > 100 for line in shown)
    assert "\n" not in "".join(shown)
    rest = re.sub(r"\x1b\[\?7l.*?\x1b\[\?7h", "", text, flags=re.DOTALL)
    assert "●" not in rest
    assert {*re.findall(r"\x1b[^a-zA-Z]*[a-zA-Z]", rest)} == {"\x1b[2K"}
    assert text.rpartition("\x1b[?7h")[2].startswith("\r\x1b[2K")


@pytest.mark.parametrize(
    "env", [{"TERM": "dumb"}, {"TERM": ""}, {"AGENT_LOG_FORMAT": "json"}], ids=["dumb", "none", "json"]
)
def test_a_terminal_that_cannot_or_should_not_gets_plain_lines(world: World, env: dict[str, str]) -> None:
    text = work_on_terminal(world, "begun in", **env)
    assert "\x1b" not in text
    assert "\r" not in text.replace("\r\n", "")
    lines = text.split("\r\n")[:-1]
    read: Callable[[str], object] = json.loads if env.get("AGENT_LOG_FORMAT") else read_line
    assert all(read(line) for line in lines)
    assert len(lines) > 3


def test_what_is_no_terminal_gets_plain_lines(world: World) -> None:
    world.open(patch(7))
    _, _, err = finish(world.start("--once", TERM="xterm"))
    assert not re.search("[\x1b\r]", err)
    assert [read_line(line) for line in err.splitlines()]


def test_a_terminal_that_goes_away_does_not_stop_the_runner(world: World) -> None:
    world.open(patch(7))
    terminal = OnTerminal(world, TERM="xterm", AGENT_COMMAND=agent(world.home, WAITS + "open('new', 'w')"))
    wait_until(lambda: "begun in" in terminal.text, 60)
    terminal.hang_up()
    (world.home / "go").touch()
    wait_until(lambda: "agent-done" in world.labels(), 60)
    terminal.process.send_signal(signal.SIGTERM)
    assert terminal.process.wait(60) in (0, 120)  # the latter is Python's word for what it could not write


def test_a_log_line_and_the_last_line_keep_apart() -> None:
    stream = io.StringIO()
    handler = Terminal(stream)
    handler.setFormatter(LogFormat(make_config()))
    log = logging.Logger("agent-runner")
    log.addHandler(handler)
    handler.show("one")
    log.info("first")
    handler.show("two")
    log.info("second")
    handler.show("")
    log.info("third")
    screen = Screen(200)
    screen.feed(stream.getvalue())
    assert [read_line(line).message for line in screen.lines[:-1]] == ["first", "second", "third"]
    assert screen.last_lines == ["one", "one", "two", "two"]
    assert "".join(screen.row).strip() == ""


def test_the_last_line_says_what_goes_on(world: World) -> None:
    runner = world.runner(FakeClock())
    assert live_line(describe(runner)) == "● next look in 0 s"
    for number in (1, 2, 3):
        world.open(patch(number))
    runner.queue.poll()
    line = live_line(describe(runner))
    assert re.fullmatch(r"● 3 queued · next look in 0 s · 4,99\d requests left", line)
    runner.clock.wait(threading.Event(), 1000)
    assert live_line(describe(runner)).startswith("○ ")
    runner.request_stop()
    assert " · stopping" in live_line(describe(runner))


def test_the_last_line_says_for_how_long_nothing_is_sent(world: World) -> None:
    status = describe(world.runner(FakeClock())) | {"paused": 40}
    assert live_line(status) == "● paused for 40 s"


def test_hostile_words_and_secrets_do_not_get_into_the_last_line(world: World) -> None:
    world.open(patch(7))
    said = f"\x1b[2J\u202e{world.github.token} `x`\x07"
    env = {"AGENT_COMMAND": agent(world.home, f"print({said!r}, flush=True)\n{WAITS}open('new', 'w')")}
    runner = world.runner(FastClock(), **env)
    work = threading.Thread(target=runner.run_once)
    work.start()
    wait_until(lambda: "***" in live_line(describe(runner)))
    line = live_line(describe(runner))
    (world.home / "go").touch()
    work.join(60)
    assert not re.search("[\x07\x1b\u202e\n]", line)
    assert world.github.token not in line
    assert runner_module.printable(line) == line
    assert re.search(r"#1 working .* \*\*\* `x` · ", line)
