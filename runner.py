#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["requests>=2.31,<3", "python-dotenv>=1.0,<2"]
# ///
"""Agent runner: turns labelled GitHub issues into pull requests with the agent of your choice.

    GITHUB_TOKEN=... AGENT_DISPATCH_REPO=you/tasks AGENT_TARGET_REPO=you/project python runner.py

The life of a task: an open issue in the dispatch repository carries the label `copilot-agent`. One runner claims it,
labels it `agent-processing` and comments; `process_task` changes files in a clean checkout of the target repository;
the runner commits, pushes `agent-task-<id>` and opens a pull request. Then the issue gets a comment with the link and
`agent-done`, or one that says why not and `agent-failed`. The file reads from top to bottom; a rule opens each part.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import contextvars
import ctypes
import difflib
import email.utils
import errno
import fcntl
import fnmatch
import functools
import hashlib
import hmac
import html
import http.client
import importlib.machinery
import inspect
import ipaddress
import itertools
import json
import logging
import math
import os
import pwd
import re
import resource
import secrets
import select
import shlex
import shutil
import signal
import socket
import socketserver
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import Field, dataclass, field, fields, replace
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import IO, Any, NamedTuple, TextIO, TypeVar
from urllib.parse import parse_qs, quote, quote_plus, urlencode, urljoin, urlsplit

import requests
from dotenv import dotenv_values

__version__ = "0.1.0"

log = logging.getLogger("agent-runner")
T = TypeVar("T")

# -- Constants: what GitHub, other programs or plain sense fix, so that nobody need configure it. --

HTTP_TIMEOUT = (10, 30)  # seconds to connect, to answer; GitHub itself gives up after 10
MAX_BODY = 65_000  # characters; GitHub refuses a comment or pull request body over 65,536
MAX_ISSUE = 2 * 65_536  # characters of an issue's text; GitHub takes half of that
MAX_TITLE = 1_000  # characters of its title: GitHub takes 256
MAX_METADATA = 16_000  # characters of the metadata comment, which must fit into a body with the rest
PAGE_SIZE = 100
SECONDARY_LIMIT_PAUSE = 60  # seconds, doubled each time
MAX_PAUSE = 3660.0  # seconds; GitHub's quota is renewed every hour
PATIENCE = 900  # seconds that a task waits for a GitHub that is out of reach
WAKE_PAUSE = 0.2  # seconds between looks at the queue, however many webhooks come: GitHub allows 900 requests a minute
WEBHOOK_PATIENCE = 5  # times AGENT_POLL_INTERVAL, between polls while webhooks come in
WEBHOOKS_TRUSTED = 3600.0  # seconds after a webhook for which more are expected
WEBHOOK_ECHO = 5  # seconds by which GitHub's lists may lag behind a webhook
CONNECTIONS, HTTP_PATIENCE = 128, 10  # to the HTTP face at a time, and seconds that each may take, as at GitHub's end
MAX_DELIVERY = 1024**2  # bytes of a webhook delivery; GitHub sends more only for events that are no news here
DELIVERIES_KNOWN = 1000
COMPLAINT_PAUSE = 60  # seconds between two complaints about deliveries that anybody may send
QUEUE_SHOWN = 100
OLDEST = 16  # of the issues that wait, among which a runner chooses that has just lost one
HISTORY_KEPT = 50  # attempts that the status page shows
PROGRESS_PAUSE = 60  # seconds between two edits of comments that only tell how work goes on
RETRY_PAUSE = 30  # seconds before a task's second attempt, doubled each time
GIT_TIMEOUT = 1800
CLAIM_TIMEOUT = 30  # seconds for git to read or move a claim
EMPTY_TREE = "4b825dc642cb6eb9a060e54bf8d69288fbee4904"  # in every git repository
LOGS_KEPT = 50
NOWHERE = Path(os.devnull)
OWN_SECRETS = ("GITHUB_TOKEN", "GITHUB_APP_PRIVATE_KEY", "GITHUB_WEBHOOK_SECRET")  # what their variables begin with
MODEL_KEY = "OPENAI_API_KEY"
FRESH_TOKEN, FRESH_TOKEN_PAUSE = 30, 2  # seconds for which an App's token may not be known everywhere at GitHub
TOKENS_KEPT = 30  # that are masked; an App has a new one for each repository and hour
OUTPUT_LINES = 50  # lines of it that are shown
_ABOUT = ("ID", "FILE", "TITLE", "ISSUE", "ATTEMPT", "BASE")
AGENT_SIDE = [*(f"AGENT_TASK_{name}" for name in _ABOUT), "AGENT_SUMMARY_FILE"]  # the agent's own variables
PROGRAM = [sys.executable, str(Path(__file__).absolute())]  # itself, once more: to serve a plug-in
PLUGIN_CODES = {"done": 0, "failed": 70, "retry": 75}  # exit codes, as in sysexits.h
BASH_TIMEOUT = 600.0  # seconds for one command of a model
TOLD_OF_OUTPUT = 16_000  # characters of a command's output that a model, or an agent, is told
DROPPINGS = (  # that agents and interpreters leave behind; the rest of .claude and .codex may be wanted
    ".aider*,.claude/*.local.json,.claude/*.lock,.claude/worktrees/,/.codex,!/.codex/,.opencode/node_modules/,"
    ".opencode/package*.json,.opencode/bun.lock,.crush/,gemini-debug.log,.gemini-clipboard/,"
    "__pycache__/,*.pyc,.pytest_cache/,.mypy_cache/,.ruff_cache/,.DS_Store"
)
LABELS = {  # what becomes of a task: colour and description, should the repository lack the label
    "processing": ("fbca04", "The agent runner is working on this issue"),
    "done": ("0e8a16", "The agent runner has opened a pull request for this issue"),
    "failed": ("d93f0b", "The agent runner gave up; take this label off to run it again"),
}

# -- Errors: each class is one answer to "what now?". ----------------------------------------------


class RunnerError(Exception):
    """What the runner raises on purpose: `why` and `advice` for people, a program's `output`, an HTTP `status`."""

    def __init__(self, why: str = "", advice: str = "", output: str = "", status: int = 0) -> None:
        super().__init__(why)
        self.why, self.advice, self.output, self.status = why, advice, output, status

    @property
    def told(self) -> str:
        """The reason and, if there is one, the advice."""
        return f"{self.why.rstrip('.')}. {self.advice}" if self.advice else self.why


class ConfigError(RunnerError):
    """Variables are wrong; the message names all of them. Ends the program with exit code 2."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n  - ".join(["cannot start:", *problems]))
        self.problems = problems


class Stopping(RunnerError):
    """The runner was told to stop; the task goes back to the queue."""


class TaskFailed(RunnerError):
    """This task cannot be done, now or later; the issue is told why."""


class Refused(TaskFailed):
    """The task asks for, or brings, what this runner does not allow."""


class ApiRefused(TaskFailed):
    """GitHub answered 4xx: asking again would bring the same answer."""


class TaskRetry(RunnerError):
    """This task may succeed later; it is tried again, AGENT_MAX_ATTEMPTS times in all."""


class Unreachable(TaskRetry):
    """GitHub or the model, or the way there, is out of order: no answer, or 5xx; `pause` seconds may be asked for."""

    pause = 0.0


class GitFailed(RunnerError):
    """Git ended with an error; `output` is what it said."""


class RefMoved(TaskRetry):
    """A ref of a remote repository was to be moved, and is elsewhere: at the commit `at`, or gone if that is ""."""

    def __init__(self, repo: str, ref: str, at: str) -> None:
        super().__init__(f"{repo} has got {ref} from somebody else meanwhile")
        self.ref, self.at = ref, at


class ClaimLost(RunnerError):
    """The issue is, or may be, another runner's by now: nothing may be written any more."""


# -- Configuration: environment variables in, one frozen value out. --------------------------------

REPO_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,38}/(?!\.{1,2}\Z)[A-Za-z0-9._-]{1,100}(?<!\.git)")
ADDRESS = re.compile(r"https?://(?:[^\s@/?#:\[\]]+|\[[\da-f:.]+\])(?::(?!0|[7-9]\d{4})\d{1,5})?(?:/[^\s?#]*)?", re.I)


class Secret(str):
    """A string that does not show itself in a `repr`, and so in no log of a whole configuration."""

    def __repr__(self) -> str:
        return "'***'"


def _variable(name: str, parse: Callable[[str], Any], default: str = "") -> Any:
    """A field that is read from an environment variable; `parse` raises ValueError("must ...")."""
    return field(metadata={"name": name, "parse": parse, "default": default})


def _token(text: str) -> Secret:
    if not re.fullmatch(r"[\x21-\x7e]*", text):
        raise ValueError("holds blanks or characters that no token has")
    return Secret(text)


def _key(text: str) -> Secret:
    """A private key; where a value has to be one line, `\\n` stands for its line ends."""
    text = text.replace("\\n", "\n").strip()
    if text and not re.fullmatch(r"-----BEGIN ([A-Z ]*PRIVATE KEY)-----\s[\s\S]+\s-----END \1-----", text):
        raise ValueError("must be a private key in PEM form, which begins with -----BEGIN")
    return Secret(text)


def _file_with(parse: Callable[[str], Secret], what: str) -> Callable[[str], Path | None]:
    """A parser for the path of a file whose content `parse` takes."""

    def parse_path(text: str) -> Path | None:
        with contextlib.suppress(OSError):
            if not text or parse(Path(text).read_text("utf-8", "replace").strip()):
                return Path(text).absolute() if text else None
        # Somebody may have put the secret itself there.
        file = "a file" if re.match(r"-----BEGIN|gh[a-z]_|github_pat_", text) else f"the file {text!r}"
        raise ValueError(f"names {file}, which cannot be read or holds no {what}")

    return parse_path


def _must(what: str, good: Callable[[str], Any], value: Callable[[str], Any] = str) -> Callable[[str], Any]:
    """A parser that takes what is `good`, as `value` gives it."""

    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if good(text):
                return value(text)
        raise ValueError(f"must {what}" + ("" if "@" in text else f", not {text!r}"))

    return parse


def _number(low: int) -> Callable[[str], Any]:
    return _must(f"be a number, {low} or more", lambda text: low <= float(text) <= 10**9, float)


def _log_file(text: str) -> Path | None:
    if not text:
        return None
    try:
        append(Path(text), b"")
    except OSError as error:
        raise ValueError(f"names the file {text!r}, which cannot be written to: {error.strerror}") from None
    return Path(text).absolute()


_YES, _NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
_repo = _must("look like owner/repository", REPO_NAME.fullmatch)
_url = _must("be an http(s) address without a user name", ADDRESS.fullmatch, lambda text: text.rstrip("/"))
_label = _must("have at most 50 characters, and no comma", lambda text: len(text) <= 50 and "," not in text)
_flag = _must("be yes or no", lambda text: text.lower() in _YES + _NO, lambda text: text.lower() in _YES)
_sandbox = _must("be auto, required or off", lambda text: text.lower() in ("auto", "required", "off"), str.lower)
_level = _must(f"be one of {', '.join(_LEVELS)}", lambda text: text.upper() in _LEVELS, str.upper)
_format = _must("be text or json", lambda text: text.lower() in ("text", "json"), str.lower)
_count = _must("be a whole number, 1 or more", lambda text: 1 <= int(text) <= 10**9, int)
_app = _must("be the App's id, or its client id", re.compile(r"[A-Za-z0-9.]*").fullmatch)
_installation = _must("be a number", re.compile(r"\d*").fullmatch)
_port = _must("be a port, 1 to 65535", lambda text: not text or 1 <= int(text) <= 65_535, lambda text: int(text or 0))
_refs = _must("be the start of a ref, such as refs/heads/agent-claims", re.compile(r"refs(/[A-Za-z0-9_-]+)+").fullmatch)


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _webhook_secret(text: str) -> Secret:
    if 0 < len(text) < 16:
        raise ValueError("must have 16 characters or more, so that nobody guesses it")
    return Secret(text)


_patterns = _must("be patterns as in .gitignore, with commas, on one line", str.isprintable, _names)
_rounds = _must("be a whole number, 0 or more", lambda text: 0 <= int(text) <= 100, int)
_price = _must("be a price, 0 or more", lambda text: 0 <= float(text or 0) <= 10**6, lambda text: float(text or -1))

HOLE = re.compile(r"\{(\{[a-z_]+\})\}|\{([a-z_]+)\}")  # {name}; {{name}} stands for the words themselves
PROMPT_NAMES = ("instruction", "title", "issue", "target", "context", "base", "attempt", "failure")
PROMPT = """\
{instruction}

---

About: {context}
Why the last attempt did not work out: {failure}

The current folder is a fresh checkout of the branch {base} of {target}. Do what is asked above, and no more:

- First read what the repository says to those who work on it (AGENTS.md, CLAUDE.md, CONTRIBUTING.md), and follow it.
- Make the smallest change that does it well, in the style of the code around it. Leave everything else as it is.
- Add or adapt tests where the repository has any, and run them.
- Only change files. Do not commit, push or open a pull request: that is done for you with what you leave in the folder.
- Nobody can answer questions. If something cannot be done, say so in the end.

When you are done, say in a few sentences what you have changed, and why: that is what reviewers read first.
"""


def fill(template: str, values: Mapping[str, str]) -> str:
    """A template with its holes filled. A line whose holes all stay empty is left out."""

    def says_nothing(line: str) -> bool:
        found = [hole[2] for hole in HOLE.finditer(line) if hole[2]]
        return bool(found) and not any(values[name] for name in found)

    kept = "\n".join(line for line in template.strip("\n").split("\n") if not says_nothing(line)).strip("\n")
    return HOLE.sub(lambda hole: hole[1] or values[hole[2]], re.sub(r"\n{3,}", "\n\n", kept))


def _template(*names: str, needed: str = "") -> Callable[[str], str]:
    """A parser for a template that may only hold these names, and must hold the one that is needed."""

    def parse(text: str) -> str:
        found = [hole[2] for hole in HOLE.finditer(text) if hole[2]]
        known = ", ".join(f"{{{name}}}" for name in names)
        if unknown := [f"{{{name}}}" for name in found if name not in names]:
            raise ValueError(f"holds {' and '.join(unknown)}, which stands for nothing; it may hold {known}")
        if needed and needed not in found:
            raise ValueError(f"must hold {{{needed}}}")
        return text

    return parse


def _prompt(text: str) -> str:
    """The template that a file holds."""
    try:
        template = Path(text).read_text("utf-8") if text else PROMPT
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", "") or "it is not UTF-8"
        raise ValueError(f"names the file {text!r}, which cannot be read: {why}") from None
    return _template(*PROMPT_NAMES, needed="instruction")(template)


def _plugin(text: str) -> str:
    """A built-in's name or a plug-in's place; a file's path is made absolute."""
    place, _, function = text.rpartition(":")
    if text not in ("", "patch", "command", "openai") and not (place and function.isidentifier()):
        what = "patch, command, openai, package.module:function or path/to/file.py:function"
        raise ValueError(f"must be {what}, not {text!r}")
    if not place.endswith(".py"):
        return text
    if not Path(place).is_file():
        raise ValueError(f"names the file {place!r}, which does not exist")
    return f"{Path(place).absolute()}:{function}"


ROUTE = re.compile(r"AGENT_(COMMAND|MODEL)_([A-Z0-9_]+)")


def agent_name(text: object) -> str:
    """The name of an agent as labels, metadata and variables may write it: "Claude Code" is claude-code."""
    return re.sub(r"[\s_.]+", "-", str(text).strip().lower())


@dataclass(frozen=True)
class Config:
    """Everything that can be set; README.md says what each variable means."""

    env: Mapping[str, str] = field(repr=False)
    routes: Mapping[str, Mapping[str, str]]  # what is different with each agent that a task can ask for
    tokens: list[Secret] = field(repr=False)  # that were in use lately, the newest last
    unaudited: Counter[str] = field(repr=False)  # the events that AGENT_AUDIT_LOG lacks while it cannot be written to
    first_token: Secret = _variable("GITHUB_TOKEN", _token)
    token_file: Path | None = _variable("GITHUB_TOKEN_FILE", _file_with(_token, "token"))
    app_id: str = _variable("GITHUB_APP_ID", _app)
    first_app_key: Secret = _variable("GITHUB_APP_PRIVATE_KEY", _key)
    app_key_file: Path | None = _variable("GITHUB_APP_PRIVATE_KEY_PATH", _file_with(_key, "private key"))
    app_installation: str = _variable("GITHUB_APP_INSTALLATION_ID", _installation)
    api_url: str = _variable("GITHUB_API_URL", _url, "https://api.github.com")
    server_url: str = _variable("GITHUB_SERVER_URL", _url, "https://github.com")
    webhook_secret: Secret = _variable("GITHUB_WEBHOOK_SECRET", _webhook_secret)
    dispatch_repo: str = _variable("AGENT_DISPATCH_REPO", _repo, "endomorphosis/lift_coding_dispatch")
    target_repo: str = _variable("AGENT_TARGET_REPO", _repo, "endomorphosis/lift_coding")
    allowed_targets: tuple[str, ...] = _variable("AGENT_ALLOWED_TARGETS", _names)
    allowed_authors: tuple[str, ...] = _variable("AGENT_ALLOWED_AUTHORS", _names)
    task_label: str = _variable("AGENT_TASK_LABEL", _label, "copilot-agent")
    processing_label: str = _variable("AGENT_PROCESSED_LABEL", _label, "agent-processing")
    done_label: str = _variable("AGENT_DONE_LABEL", _label, "agent-done")
    failed_label: str = _variable("AGENT_FAILED_LABEL", _label, "agent-failed")
    poll_interval: float = _variable("AGENT_POLL_INTERVAL", _number(1), "60")
    process_task: str = _variable("AGENT_PROCESS_TASK", _plugin)
    command: str = _variable("AGENT_COMMAND", str)
    shell: bool = _variable("AGENT_SHELL", _flag, "no")
    model: str = _variable("AGENT_MODEL", str)
    model_url: str = _variable("OPENAI_BASE_URL", _url, "https://api.openai.com/v1")
    model_key: Secret = _variable(MODEL_KEY, _token)
    max_steps: int = _variable("AGENT_MAX_STEPS", _count, "100")
    max_tokens: int = _variable("AGENT_MAX_TOKENS", _count, "5000000")
    price_input: float = _variable("AGENT_PRICE_INPUT", _price)
    price_cached: float = _variable("AGENT_PRICE_CACHED", _price)
    price_output: float = _variable("AGENT_PRICE_OUTPUT", _price)
    prompt: str = _variable("AGENT_PROMPT_FILE", _prompt)
    setup_command: str = _variable("AGENT_SETUP_COMMAND", str)
    setup_timeout: float = _variable("AGENT_SETUP_TIMEOUT", _number(1), "600")
    verify_command: str = _variable("AGENT_VERIFY_COMMAND", str)
    verify_timeout: float = _variable("AGENT_VERIFY_TIMEOUT", _number(1), "600")
    verify_rounds: int = _variable("AGENT_VERIFY_ROUNDS", _rounds, "1")
    draft_on_failure: bool = _variable("AGENT_DRAFT_ON_FAILURE", _flag, "no")
    task_timeout: float = _variable("AGENT_TASK_TIMEOUT", _number(1), "1800")
    stall_seconds: float = _variable("AGENT_STALL_SECONDS", _number(0), "0")
    sandbox: str = _variable("AGENT_SANDBOX", _sandbox, "auto")
    allow_root: bool = _variable("AGENT_ALLOW_ROOT", _flag, "no")
    max_memory: int = _variable("AGENT_MAX_MEMORY_MB", lambda text: _count(text) if text else 0)
    max_attempts: int = _variable("AGENT_MAX_ATTEMPTS", _count, "3")
    max_concurrent: int = _variable("AGENT_MAX_CONCURRENT", _count, "1")
    lease: float = _variable("AGENT_LEASE", _number(3), "600")
    runner_id: str = _variable("AGENT_RUNNER_ID", str)
    claim_refs: str = _variable("AGENT_CLAIM_REFS", _refs, "refs/agent-runner/claims")
    drain_seconds: float = _variable("AGENT_DRAIN_SECONDS", _number(0), "30")
    write_interval: float = _variable("AGENT_WRITE_INTERVAL", _number(0), "1")
    state_dir: Path = _variable("AGENT_STATE_DIR", lambda text: Path(text).absolute(), ".agent-runner")
    home: Path = _variable("AGENT_HOME", lambda text: Path(text).absolute() if text else None)
    disk_budget: int = _variable("AGENT_DISK_BUDGET_MB", _count, "10240")
    agent_env: tuple[str, ...] = _variable("AGENT_ENV", _names)
    max_changed_files: int = _variable("AGENT_MAX_CHANGED_FILES", _count, "1000")
    max_changed_bytes: int = _variable("AGENT_MAX_CHANGED_BYTES", _count, "10000000")
    ignore: tuple[str, ...] = _variable("AGENT_IGNORE", _patterns, DROPPINGS)
    allow_workflows: bool = _variable("AGENT_ALLOW_WORKFLOWS", _flag, "no")
    branch: str = _variable("AGENT_BRANCH", _template("task_id", "issue", needed="task_id"), "agent-task-{task_id}")
    pull_title: str = _variable("AGENT_PR_TITLE", _template("title", "task_id", "issue"), "Agent task: {title}")
    pull_draft: bool = _variable("AGENT_PR_DRAFT", _flag, "no")
    pull_labels: tuple[str, ...] = _variable("AGENT_PR_LABELS", _names)
    pull_reviewers: tuple[str, ...] = _variable("AGENT_PR_REVIEWERS", _names)
    commit_name: str = _variable("AGENT_COMMIT_NAME", str, "agent-runner")
    commit_email: str = _variable("AGENT_COMMIT_EMAIL", str)
    http_host: str = _variable("AGENT_HTTP_HOST", str, "127.0.0.1")
    http_port: int = _variable("AGENT_HTTP_PORT", _port)
    log_format: str = _variable("AGENT_LOG_FORMAT", _format, "text")
    log_level: str = _variable("AGENT_LOG_LEVEL", _level, "INFO")
    audit_log: Path | None = _variable("AGENT_AUDIT_LOG", _log_file)

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Config:
        """Reads every variable; ConfigError names all bad ones. Empty is unset: Compose hands on `NAME=${NAME:-}`."""
        values: dict[str, Any] = {"env": dict(env), "tokens": [], "unaudited": Counter(), "routes": {}}
        problems = []
        for name, spec in cls.variables().items():
            parse, default = spec.metadata["parse"], spec.metadata["default"]
            try:
                values[spec.name] = parse(env.get(name, "").strip() or default)
            except ValueError as error:
                problems.append(f"{name} {error}")
                values[spec.name] = parse(default)
        values["home"] = values["home"] or values["state_dir"] / "home"
        usual = "command" if values["command"] else "openai" if values["model"] else "patch"
        values["process_task"] = values["process_task"] or usual
        for name, value in env.items():
            if (route := ROUTE.fullmatch(name)) and value.strip():
                kind = route[1].lower()
                changes = {"process_task": "openai" if kind == "model" else kind, kind: value.strip()}
                values["routes"][agent_name(route[2])] = changes
        values["allowed_targets"] = values["allowed_targets"] or (values["target_repo"],)
        values["runner_id"] = values["runner_id"] or f"{os.uname().nodename}:{values['state_dir']}"
        address = f"agent-runner@noreply.{urlsplit(values['server_url']).hostname}"
        values["commit_email"] = values["commit_email"] or address  # no account's, so no stranger's picture is shown
        config = cls(**values)
        if problems := [*problems, *config._contradictions()]:
            raise ConfigError(problems)
        return config

    @classmethod
    def variables(cls) -> dict[str, Field[Any]]:
        """The fields by the names of their variables."""
        return {spec.metadata["name"]: spec for spec in fields(cls) if spec.metadata}

    def _contradictions(self) -> Iterator[str]:
        """What is wrong with several variables together."""
        yield from self._sign_in_problems()
        if self.webhook_secret and not self.http_port:
            yield "GITHUB_WEBHOOK_SECRET is set, but AGENT_HTTP_PORT is not: set the port on which webhooks come in"
        labels = {self.task_label, self.processing_label, self.done_label, self.failed_label}
        if len({label.lower() for label in labels}) < 4:
            yield "the four AGENT_*_LABEL variables must name four different labels"
        own = secret_forms(tuple(("", value) for value in (self.token, self.app_key, self.webhook_secret) if value))
        for name in self.agent_env:
            if name.startswith(OWN_SECRETS) or any(value in self.env.get(name, "") for value in own):
                yield f"AGENT_ENV must not name {name}: the agent never gets the runner's secrets"
        owns = [user_home(), self.state_dir, *map(Path, PROGRAM)]
        if self.sandbox != "off" and any(path.is_relative_to(self.home) for path in owns):
            yield "AGENT_HOME must hold neither the runner, its state nor its user's home: name a folder of its own"
        if not is_branch_name(fill(self.branch, {"task_id": "1", "issue": "1"})):
            yield f"AGENT_BRANCH does not make valid branch names: {self.branch!r}"
        yield from self._agent_problems()

    def _agent_problems(self) -> Iterator[str]:
        """What is wrong with the agents that tasks can have."""
        if self.process_task == "openai" and not self.model:
            yield "AGENT_PROCESS_TASK is openai, but AGENT_MODEL is not set: name the model"
        for name in ("", *self.routes):
            end = f"_{name.upper().replace('-', '_')}" if name else ""
            config = self.for_agent(name)
            if name and all(self.env.get(f"AGENT_{kind}{end}", "").strip() for kind in ("COMMAND", "MODEL")):
                yield f"AGENT_COMMAND{end} and AGENT_MODEL{end} are both set: leave one of them out"
            try:
                if config.process_task == "command":
                    command_words(config, {})
            except ValueError as error:
                yield f"AGENT_COMMAND{end} {error}"

    def for_agent(self, name: str) -> Config:
        """The settings for a task that asks for this agent, or for none. A model's key is for the runner alone."""
        changes: dict[str, Any] = {**self.routes[name]} if name else {}
        config = replace(self, **changes)
        shared = tuple(other for other in config.agent_env if other != MODEL_KEY)
        return replace(config, agent_env=shared) if config.process_task == "openai" else config

    def _sign_in_problems(self) -> Iterator[str]:
        """What is wrong with the ways to sign in, of which there must be one."""
        ways = {"GITHUB_TOKEN": self.first_token, "GITHUB_TOKEN_FILE": self.token_file, "GITHUB_APP_ID": self.app_id}
        chosen = [name for name, value in ways.items() if value]
        names = ("GITHUB_APP_PRIVATE_KEY", "GITHUB_APP_PRIVATE_KEY_PATH")
        keys = [name for name in names if self.env.get(name, "").strip()]
        if not chosen:
            others = "GITHUB_TOKEN_FILE or GITHUB_APP_ID"
            yield f"GITHUB_TOKEN is not set: put a GitHub token there or into a file .env, or set {others}"
        if len(chosen) > 1:
            yield f"{' and '.join(chosen)} are both set: leave one of them out"
        if len(keys) > 1:
            yield f"{' and '.join(keys)} are both set: leave one of them out"
        if self.app_id and not keys:
            yield "GITHUB_APP_ID needs the App's private key: set GITHUB_APP_PRIVATE_KEY or GITHUB_APP_PRIVATE_KEY_PATH"
        elif self.app_id and self.app_key:  # else it was told already what is wrong with it
            try:
                app_jwt(self.app_id, self.app_key, 0)
            except ValueError as error:
                yield f"{keys[0]} {error}"
        elif keys and not self.app_id:
            yield f"{keys[0]} is set, but GITHUB_APP_ID is not: the key belongs to an App"

    def unknown(self) -> Iterator[str]:
        """A warning for each AGENT_* variable that nothing reads, with the nearest known name."""
        known = {*self.variables(), *self.agent_env, *AGENT_SIDE}
        strange = {name for name in self.env if name.startswith("AGENT_") and not ROUTE.fullmatch(name)}
        for name in sorted(strange - known):
            hint = "".join(f"; did you mean {near}?" for near in difflib.get_close_matches(name, known, 1))
            yield f"{name} is set, but the runner knows no such variable{hint}"

    @property
    def token(self) -> Secret:
        """The personal token of this moment: a task can outlive one, so its file is read each time."""
        with contextlib.suppress(OSError, ValueError):  # it may be about to be written
            self.remember(_token(self.token_file.read_text().strip()) if self.token_file else self.first_token)
        return (self.tokens or [Secret()])[-1]

    def remember(self, token: Secret, kept: int = 0) -> None:
        """Has a token masked from now on, also for a while after the next ones, at least `kept`, have come."""
        if token and token not in self.tokens[-1:]:
            self.tokens[:] = [*self.tokens[1 - max(TOKENS_KEPT, kept) :], token]

    @functools.cached_property
    def app_key(self) -> Secret:
        """The App's private key; "" if there is none."""
        with contextlib.suppress(OSError, ValueError):
            return _key(self.app_key_file.read_text()) if self.app_key_file else self.first_app_key
        return Secret()

    @property
    def secrets(self) -> tuple[tuple[str, str], ...]:
        """What must not get out, as (variable, value): the tokens, the other secrets of the runner, the agent's longer
        values, and longer lines of these."""
        named = [(name, self.env.get(name, "").strip()) for name in self.agent_env]
        named += [("GITHUB_APP_PRIVATE_KEY", self.app_key), ("GITHUB_WEBHOOK_SECRET", self.webhook_secret)]
        named += [(MODEL_KEY, self.model_key)]
        lines = [(name, line.strip()) for name, value in named for line in re.split(r"\n|\\n", value)]
        tokens = [("GITHUB_TOKEN", form) for token in self.tokens for form in (token, git_login(token))]
        lines = [(name, line) for name, line in lines if len(line) >= 16 and not line.startswith("-----")]
        return *tokens, *((name, value) for name, value in named if len(value) >= 8), *lines

    def masked(self, text: str) -> str:
        """The text without secrets, in whichever form."""
        for form in secret_forms(self.secrets):
            text = text.replace(form, "***")
        return text

    def allows_author(self, login: str) -> bool:
        """Whether AGENT_ALLOWED_AUTHORS names a login, which is an App's if it ends with `[bot]`; case is ignored."""
        return login.lower() in (name.lower() for name in self.allowed_authors)

    def finds_secret(self, data: bytes, before: bytes = b"") -> str:
        """The variable whose value occurs more often in `data` than `before`, in whichever form; or ""."""
        forms = ((name, form.encode("utf-8", "surrogateescape")) for form, name in secret_forms(self.secrets).items())
        return next((name for name, form in forms if data.count(form) > before.count(form)), "")

    def allows_target(self, repo: str) -> bool:
        """Whether pull requests may go to what is named; patterns may hold `*`, case is ignored."""
        patterns = self.allowed_targets if REPO_NAME.fullmatch(repo) else ()
        return any(fnmatch.fnmatchcase(repo.lower(), name.lower()) for name in patterns)


def user_home() -> Path:
    """The home of the user that this process runs as, whatever HOME says."""
    with contextlib.suppress(KeyError):  # a container may run with a number that has no name
        return Path(pwd.getpwuid(os.getuid()).pw_dir)
    return Path("/")


@functools.lru_cache(maxsize=8)
def secret_forms(secrets: tuple[tuple[str, str], ...]) -> dict[str, str]:
    """The forms in which values get about, the longest first, and the variables that hold them."""
    forms: dict[str, str] = {}
    for name, value in secrets:
        raw = value.encode("utf-8", "surrogateescape")
        quoted = [quote(raw, safe=""), quote(raw), quote_plus(raw)]
        found = [value, *quoted, *(re.sub(r"%..", lambda code: code[0].lower(), text) for text in quoted)]
        found += [json.dumps(value, ensure_ascii=ascii_only)[1:-1] for ascii_only in (True, False)]
        for shift in range(3):  # inside a longer text: less the characters that depend on what surrounds the value
            text = base64.b64encode(bytes(shift) + raw).decode()
            begin, end = -(-shift * 8 // 6), (shift + len(raw)) * 8 // 6
            for part in (text[begin:end], text[begin:]):
                found += [part, part.replace("+", "-").replace("/", "_")]
        found += base64.encodebytes(raw).decode().split()  # as programs wrap it
        # What is shorter stands in many a text by chance.
        forms |= {form: name for form in found if form not in forms and (form == value or len(form) >= 8)}
    return dict(sorted(forms.items(), key=lambda item: -len(item[0])))


def git_login(token: str) -> str:
    """A token in the form in which git sends it."""
    return base64.b64encode(f"x-access-token:{token}".encode()).decode()


# -- What is told: the log, the audit log and the metrics, with the same names in all three. ---------

# What the work in this thread is about: `issue`, `task`, `attempt` and `phase`, as far as they are known.
ABOUT: contextvars.ContextVar[Mapping[str, Any]] = contextvars.ContextVar("about")


@contextlib.contextmanager
def work_on(facts: Mapping[str, Any]) -> Iterator[None]:
    """Has all that is written within be about this."""
    before = ABOUT.set(facts)
    try:
        yield
    finally:
        ABOUT.reset(before)


def about() -> dict[str, Any]:
    """The facts that belong to each line that is written now."""
    return {name: value for name, value in ABOUT.get({}).items() if value}


class LogFormat(logging.Formatter):
    """One line an event, without secrets: text, or JSON."""

    def __init__(self, config: Config) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")
        self._config = config

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (the library's name)
        record.message = " ".join([*(f"{name}={value}" for name, value in about().items()), record.message])
        return printable(super().formatMessage(record)).replace("\n", " ")

    def formatException(self, ei: Any) -> str:  # noqa: N802 (the library's name)
        return printable(super().formatException(ei))

    def format(self, record: logging.LogRecord) -> str:
        return self._config.masked(self._json(record) if self._config.log_format == "json" else super().format(record))

    def _json(self, record: logging.LogRecord) -> str:
        at = f"{utc(record.created)[:-1]}.{int(record.msecs):03}Z"
        line = {"time": at, "level": record.levelname, "message": printable(record.getMessage()), **about()}
        return json.dumps(line | ({"exception": self.formatException(record.exc_info)} if record.exc_info else {}))


class Terminal(logging.StreamHandler[TextIO]):
    """A log on a terminal, with a last line below it that is written over: what goes on now."""

    live = ""

    def show(self, text: str) -> None:
        """Writes the last line anew, cut off where the terminal ends."""
        with self.lock or contextlib.nullcontext():
            self.live = f"\x1b[?7l{text}\x1b[?7h" if text else ""
            self._write("")

    def emit(self, record: logging.LogRecord) -> None:
        self._write(self.format(record) + "\n")

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):  # the terminal may be gone
            self.stream.write(f"\r\x1b[2K{text}{self.live}")
            self.stream.flush()


def append(path: Path, line: bytes) -> None:
    """Adds to a file, with one write. It is opened each time, so it may be moved away or deleted at any time."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o600)
    try:
        if os.write(file, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(file)


def audit(config: Config, event: str, **facts: Any) -> None:
    """Writes a line to AGENT_AUDIT_LOG, if there is one. The work does not hang on it."""
    if not config.audit_log:
        return
    facts = {"dispatch": config.dispatch_repo, **about(), **facts}
    shown = {key: config.masked(value) if isinstance(value, str) else value for key, value in facts.items()}
    line = config.masked(json.dumps({"time": utc(time.time()), "event": event, **shown})) + "\n"
    try:
        append(config.audit_log, (f"\n{line}" if config.unaudited else line).encode())  # the last one may lack its end
    except OSError as error:
        if not config.unaudited:
            log.error("AGENT_AUDIT_LOG cannot be written to: %s", error.strerror)
        config.unaudited[event] += 1
        return
    if config.unaudited:
        log.warning("AGENT_AUDIT_LOG can be written to again; it lacks %d events", config.unaudited.total())
        config.unaudited.clear()


@contextlib.contextmanager
def audited(config: Config, event: str, **facts: Any) -> Iterator[dict[str, Any]]:
    """Audits what is done within once it is over, with what is added to the facts: its outcome, unless it is "done"."""
    begun = time.monotonic()
    facts["outcome"] = "done"
    try:
        yield facts
    except BaseException as error:
        facts["outcome"] = str(error) or type(error).__name__
        raise
    finally:
        audit(config, event, **facts, seconds=round(time.monotonic() - begun, 1))


class Metric(NamedTuple):
    """A kind of Prometheus metric, its help, and the label that it has, with the values that are known beforehand: a
    counter that is there from the start can be watched for its first step."""

    kind: str
    help: str
    label: str = ""
    known: tuple[str, ...] = ()


OUTCOMES = ("done", "failed", "retry", "cancelled", "stopped", "skipped", "held", "dropped")
PHASES = (
    "claiming", "checking", "preparing", "setup", "working", "verifying", "publishing", "reporting", "waiting"
)  # fmt: skip
BUCKETS = (0.1, 0.5, 1, 5, 15, 60, 300, 900, 1800, 3600)  # seconds
METRICS = {
    "build_info": Metric("gauge", "1, with the version of the runner.", "version"),
    "uptime_seconds": Metric("gauge", "Seconds since the runner was started."),
    "healthy": Metric("gauge", "1 while looks at the queue succeed, else 0."),
    "last_poll_timestamp_seconds": Metric("gauge", "When the queue was last read, in seconds since 1970; 0 is never."),
    "polls_total": Metric("counter", "Looks at the queue.", "result", ("changed", "unchanged", "failed")),
    "requests_total": Metric("counter", "Requests to GitHub's API; 0 is no answer.", "status", ("200", "304")),
    "quota_limit": Metric("gauge", "Requests that GitHub allows in an hour.", "resource"),
    "quota_remaining": Metric("gauge", "Requests that are left of it.", "resource"),
    "quota_reset_timestamp_seconds": Metric("gauge", "When it is renewed, in seconds since 1970.", "resource"),
    "paused_seconds": Metric("gauge", "Seconds for which nothing is sent, because GitHub's limit was reached."),
    "queue_length": Metric("gauge", "Issues that wait for a runner."),
    "tasks_running": Metric("gauge", "Tasks that this runner works on."),
    "tasks_waiting": Metric("gauge", "Tasks of this runner that wait for another attempt."),
    "tasks_total": Metric("counter", "Attempts that have ended.", "outcome", OUTCOMES),
    "task_seconds": Metric("histogram", "How long attempts took.", "outcome", ("done", "failed")),
    "phase_seconds": Metric("histogram", "How long their phases took.", "phase", PHASES[:-1]),
    "claims_total": Metric("counter", "Claims to issues.", "result", ("won", "lost", "dropped")),
    "webhooks_total": Metric("counter", "Webhook deliveries.", "result", ("news", "ignored", "repeated", "refused")),
}


class Metrics:
    """What is counted and measured, for Prometheus."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, dict[str, list[float]]] = {name: {} for name in METRICS}
        for name, metric in METRICS.items():
            if metric.kind != "gauge":
                for value in metric.known or ("",):
                    self._of(name, value)

    def count(self, name: str, value: object = "") -> None:
        """Counts one more, with this value of the metric's label."""
        with self._lock:
            self._of(name, value)[0] += 1

    def set(self, name: str, number: float, value: object = "") -> None:
        with self._lock:
            self._of(name, value)[0] = float(number)

    def observe(self, name: str, seconds: float, value: object = "") -> None:
        with self._lock:
            numbers = self._of(name, value)
            numbers[0] += seconds
            numbers[1 + next((i for i, top in enumerate(BUCKETS) if seconds <= top), len(BUCKETS))] += 1

    def value(self, name: str, value: object = "") -> float | None:
        """One number, if it is there."""
        with self._lock:
            return self._values[name].get(str(value), [None])[0]

    def _of(self, name: str, value: object) -> list[float]:
        """A counter's or gauge's number; a histogram's sum, and how many seconds fell into each bucket."""
        size = len(BUCKETS) + 2 if METRICS[name].kind == "histogram" else 1
        return self._values[name].setdefault(str(value), [0.0] * size)

    def render(self) -> str:
        """All of it as text: https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format"""
        lines = []
        with self._lock:
            for name, metric in METRICS.items():
                name_ = f"agent_runner_{name}"
                lines += [f"# HELP {name_} {metric.help}", f"# TYPE {name_} {metric.kind}"]
                for value, numbers in self._values[name].items():
                    escaped = value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
                    label = f'{metric.label}="{escaped}"' if metric.label else ""
                    one = f"{name_}{{{label}}} {numbers[0]}" if label else f"{name_} {numbers[0]}"
                    lines += _histogram(name_, label, numbers) if numbers[1:] else [one]
        return "\n".join([*lines, ""])


def _histogram(name: str, label: str, numbers: Sequence[float]) -> Iterator[str]:
    """The lines of one histogram, whose buckets hold all that the smaller ones hold too."""
    for top, total in zip((*BUCKETS, "+Inf"), itertools.accumulate(numbers[1:]), strict=True):
        yield f'{name}_bucket{{{label},le="{top}"}} {total}'
    yield f"{name}_sum{{{label}}} {numbers[0]}"
    yield f"{name}_count{{{label}}} {sum(numbers[1:])}"


# -- The task: from an issue to a value, and on to text. Pure functions, in time linear in the text.

METADATA_START = re.compile(r"<!--\s*agent_task_metadata\s*(?=\{)", re.IGNORECASE)
FENCE = re.compile(  # https://spec.commonmark.org/0.31.2/#fenced-code-blocks; without `close` it never closes
    r"(?m)^ {0,3}(?P<mark>(?P<tick>`)`{2,}+(?![^\n]*`)|~{3,}+)[ \t]*(?P<language>[^\s`]*)[^\n]*(?:\n|\Z)"
    r"(?P<inside>[\s\S]*?)(?:(?P<close>^ {0,3}(?P=mark)(?(tick)`*|~*)[^\S\n]*(?:\n|\Z))|\Z)"
)
KEY_LINE = re.compile(r"^[ \t>*_`-]*(task[ _]id|user[ _]id|target repository|target)[*_`]*:(.*)", re.I | re.M)
INSTRUCTION_HEADING = re.compile(r"^#{1,6}[ \t]+instructions?(?:[ \t]++#*)?[ \t]*$", re.I | re.M)
SAFE_ID = re.compile(r"(?!.*\.\.)[A-Za-z0-9._-]{1,64}(?<!\.)(?<!\.lock)")
ESCAPES = r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|\x1b(?:\][^\x07\x1b\n]*(?:\x07|\x1b\\)?|[ -/]*[0-~])"
INVISIBLE = (  # Default_Ignorable_Code_Point less the emoji's U+FE0F, and line and annotation characters
    r"\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ufe00-\ufe0e"
    r"\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
UNSEEN = re.compile(ESCAPES + rf"|[\x00-\x08\x0b-\x1f\x7f-\x9f{INVISIBLE}]")
printable = functools.partial(UNSEEN.sub, "")  # leaves text without these
# Comments outside of code: https://spec.commonmark.org/0.31.2/#html-blocks (kind 2) and #html-comment. First what is
# passed over: code that people see in fences, also of lists, and within a line. A backtick without its like in the line
# spoils the rest of the paragraph, for what is code there is not so easily said. Groups are atomic and not possessive:
# early Pythons 3.11, such as Debian 12's, lose their way in possessive groups.
_LEAD = r"[ \t>*+\d.)-]*+"
_NEXT = rf"\n(?![ \t]*\n| {{0,3}}(?:`{{3,}}+(?![^\n]*`)|~~~)|(?!-->){_LEAD}<!--)"  # a line of the same paragraph
COMMENT = re.compile(
    rf"{FENCE.pattern}|^(?: {{4}}|\t|[ \t]*(?:[*+-]|\d{{1,9}}[.)])[ \t])[ \t]*+(?P<nested>`{{3,}}+(?![^\n]*`)|~{{3,}}+)"
    r"[^\n]*(?>(?:\n(?![ \t]*(?P=nested))(?:(?:  |\t)[^\n]*)?)*)(?:\n[ \t]*(?P=nested)[^\n]*)?"
    r"|\\[!-~]|(?<!`)(?P<run>`++)[^\n|]{1,1000}?(?<!`)(?P=run)(?!`)"
    rf"|`++(?>(?:[^<\n]++|<(?!!--)|{_NEXT})*)"
    rf"|^(?P<before>{_LEAD})<!--(?:-?>|[\s\S]*?(?:-->|\Z))(?:(?>[^\n]*<!--)(?!-?>|[^\n]*-->)[\s\S]*?(?:-->|\Z))*"
    r"(?P<after>[^\n]*)"
    rf"|(?P<inline><!--(?:-?>|(?>(?:[^\n-]++|-(?!->)|{_NEXT})*)(?:-->)?))"
)

# What would act where the runner writes foreign text, up to where a zero-width space breaks it. Programs find comments
# and closing keywords, with what may name an issue, in code too; calls and tags, also as entities, act outside of it.
FOR_PROGRAMS = re.compile(
    r"<(?=!--)|(?:close[sd]?|fix(?:e[sd])?|resolve[sd]?)"
    r"(?=(?>(?:[^\w#]|_)+)(?:#|num;|GH-\d|https?://|[\w.-]{1,39}/[\w.-]{1,100}#))",
    re.IGNORECASE,
)
FOR_PEOPLE = re.compile(rf"{FENCE.pattern}|(?<![A-Za-z0-9])@(?=[A-Za-z0-9])|<(?=[A-Za-z/!?])|&(?=#|commat;|num;)")
INDENTED_FENCE = re.compile(r"(?m)^(?=[ \t>*+\d-])[ \t>*+\d.)-]++(?=`{3,}+[^`\n]*$|~{3})")


@dataclass(frozen=True)
class Task:
    """One dispatch issue, understood: what `process_task` gets. `slug` is the `task_id` made safe for a branch name,
    `base` the branch to start from or "", `context` what it is about ("issue acme/widgets#42"), `agent` the one that it
    asks for or "", `hidden` what was taken out because nobody who reads the issue sees it ("comments: 2"), `failure`
    why the last attempt did not work out or "", `issue` its JSON."""

    number: int
    dispatch_repo: str
    title: str
    url: str
    author: str
    trusted: bool
    task_id: str
    slug: str
    metadata: Mapping[str, Any]
    target_repo: str
    base: str
    context: str
    instruction: str
    agent: str
    branch: str
    hidden: str
    attempt: int
    failure: str
    issue: Mapping[str, Any] = field(repr=False)

    @property
    def reference(self) -> str:
        """The dispatch issue as GitHub writes it across repositories: owner/repository#number."""
        return f"{self.dispatch_repo}#{self.number}"


@functools.lru_cache(maxsize=2)
def outside_fences(text: str) -> str:
    """The text with its code fences blanked; offsets and lines stay where they are. A fence that never closes is left
    as it is, unlike in CommonMark: one stray ``` in an instruction must not hide the metadata that follows it."""

    def blanked(fence: re.Match[str]) -> str:
        return fence[0] if fence["close"] is None else "\n".join(" " * len(line) for line in fence[0].split("\n"))

    return FENCE.sub(blanked, text) if "```" in text or "~~~" in text else text


def split_metadata(text: str) -> tuple[str, dict[str, Any] | None]:
    """The text less its `agent_task_metadata` comments outside fences and the rule (`---`) that sets them off; and what
    the last valid one holds. A `-->` in JSON ends none."""
    plain, parts, content, kept, at, close = outside_fences(text), [], None, 0, 0, 0
    while match := METADATA_START.search(plain, at):
        if close < (start := match.end()) and (close := plain.find("-->", start)) < 0:
            break
        valid, at = False, close + len("-->")
        with contextlib.suppress(ValueError, RecursionError):
            # A slice, since an error counts the lines before it, and there may be thousands of errors.
            value, end = json.JSONDecoder().raw_decode(text[start:])
            end += start
            nested = text.count("{", start, end) + text.count("[", start, end)
            if nested <= 500 and (ended := re.compile(r"\s*-->").match(text, end)):
                content, valid, at = value, True, ended.end()
        if not valid and (inner := METADATA_START.search(plain, start, at)):  # one was begun and never ended
            at = inner.start()
        else:
            parts.append(text[kept : match.start()])
            kept = at
    before = re.sub(r"^-{3,}\Z", "", "".join(parts).rstrip(), flags=re.MULTILINE)
    return trimmed(before + text[kept:]), content


def trimmed(text: str) -> str:
    """The text without the blank lines around it; the indentation of its first line stays."""
    return re.sub(r"\A(?:[^\S\n]*\n)+", "", text.rstrip())


@functools.lru_cache(maxsize=2)
def find_key_lines(text: str) -> list[re.Match[str]]:
    """All the lines of metadata outside fences."""
    return list(KEY_LINE.finditer(outside_fences(text)))


def key_lines(text: str) -> dict[str, str]:
    """The first `Task ID:`, `User ID:`, `Target Repository:` and `Target:` lines outside fences."""
    found: dict[str, str] = {}
    for match in find_key_lines(text):
        value = re.sub(r"\A[*_]+(?=\s|\Z)", "", match[2]).replace("`", "").strip(" \t*")
        found.setdefault(match[1].lower().replace(" ", "_"), value)
    return found


def without_comments(text: str) -> tuple[str, int]:
    """The text without the HTML comments that GitHub does not show, and their number. One that begins a line and never
    ends hides all that follows."""
    count = 0
    if "<!--" not in text:
        return text, 0

    def shown(match: re.Match[str]) -> str:
        nonlocal count
        if (match["inline"] or "").endswith("-->"):
            count += 1
            return ""
        if match["before"] is None:
            return match[0]
        after, more = re.subn(r"<!--(?:-?>|.*?-->)", "", match["after"])
        count += 1 + more
        return str(match["before"]) + after

    return COMMENT.sub(shown, text), count


def find_instruction(text: str, title: str) -> str:
    """All after the `## Instruction(s)` heading, else the text without the lines of metadata, else the title."""
    if heading := INSTRUCTION_HEADING.search(outside_fences(text)):
        return text[heading.end() :].strip()
    found = [match for match in find_key_lines(text) if match[1].lower() != "target"]
    begins, ends = [0, *(match.end() + 1 for match in found)], [*(match.start() for match in found), len(text)]
    return "".join(text[begin:end] for begin, end in zip(begins, ends, strict=True)).strip() or title


def choose_target(metadata: Mapping[str, Any], lines: Mapping[str, str], config: Config) -> str:
    """The repository that a pull request is wanted in; it may be one that is not allowed."""
    line = lines.get("target_repository", "")
    if named := metadata.get("target_repo") or (line if REPO_NAME.fullmatch(line) else ""):
        return str(named)
    context = next(filter(REPO_NAME.fullmatch, re.split(r"[\s()#,;]+", lines.get("target", ""))), "")
    return context if context and config.allows_target(context) else config.target_repo


def stand_in(task_id: str) -> str:
    """Always the same for an id, and good for every branch name."""
    return "x" + hashlib.sha256(task_id.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def safe_slug(task_id: str) -> str:
    """The id itself where it may stand in a branch name, else a stand-in for it."""
    return task_id if SAFE_ID.fullmatch(task_id) else stand_in(task_id)


def name_branch(template: str, task_id: str, number: int) -> str:
    """The branch of a task; not every id fits into every template."""
    slugs = safe_slug(task_id), stand_in(task_id)
    names = [fill(template, {"task_id": slug, "issue": str(number)}) for slug in slugs]
    return next(filter(is_branch_name, names), names[0])


def choose_agent(issue: Mapping[str, Any], metadata: Mapping[str, Any]) -> str:
    """The agent that a label `agent:<name>`, or else the metadata, asks for: or "". Of several labels a list."""
    names = {
        agent_name(label["name"][6:]) for label in issue.get("labels") or [] if label["name"][:6].lower() == "agent:"
    }
    return ", ".join(sorted(names)) or agent_name(encodable(metadata.get("agent")))


def encodable(text: object) -> str:
    """As text without NUL and lone surrogates, which JSON can hold and files and arguments cannot."""
    return str(text or "").replace("\0", "").encode("utf-8", "replace").decode()


def parse_task(issue: Mapping[str, Any], config: Config, attempt: int = 1, failure: str = "") -> Task:
    """An issue, as GitHub gives it, as a task. Never fails: `check_task` says what is wrong."""
    whole = encodable(issue.get("body"))[:MAX_ISSUE].replace("\r\n", "\n").replace("\r", "\n")
    body, metadata = split_metadata(trimmed(whole))  # most often nothing else is left out: then fences are found once
    text, comments = without_comments(body)
    title, in_title = UNSEEN.subn("", encodable(issue.get("title"))[:MAX_TITLE])
    title = " ".join(title.split())
    login = str((issue.get("user") or {}).get("login") or "")
    # https://docs.github.com/graphql/reference/enums#commentauthorassociation
    trusted = config.allows_author(login) or issue.get("author_association") in ("OWNER", "MEMBER", "COLLABORATOR")
    lines = key_lines(text) if trusted else {}
    text, in_text = UNSEEN.subn("", text)
    hidden = {"invisible characters": in_text + in_title, "comments": comments}
    if metadata is None or not trusted:
        metadata = {key: lines[key] for key in ("task_id", "user_id") if lines.get(key)}
    if metadata.get("task_id") in (None, "") or isinstance(metadata["task_id"], dict | list):
        metadata = {**metadata, "task_id": f"issue-{issue['number']}"}
    task_id = str(metadata["task_id"])
    return Task(
        number=issue["number"],
        dispatch_repo=config.dispatch_repo,
        title=title,
        url=encodable(issue.get("html_url")),
        author=encodable(login),
        trusted=trusted,
        task_id=task_id,
        slug=safe_slug(task_id),
        metadata=metadata,
        target_repo=choose_target(metadata, lines, config),
        base=str(metadata.get("base") or ""),
        context=printable(lines.get("target", "")),
        instruction=find_instruction(text, title),
        agent=choose_agent(issue, metadata),
        branch=name_branch(config.branch, task_id, issue["number"]),
        hidden=", ".join(f"{what}: {count}" for what, count in hidden.items() if count),
        attempt=attempt,
        failure=failure,
        issue=issue,
    )


def is_branch_name(name: str) -> bool:
    """Whether git takes this as a branch name: https://git-scm.com/docs/git-check-ref-format"""
    bad = r"[\s~^:?*\[\\]|\.\.|@\{|//|/\.|\.lock(?:/|\Z)|\A(?:@|HEAD)\Z|\A[-./]|[./]\Z"
    return 0 < len(name) <= 200 and name.isprintable() and not re.search(bad, name) and not UNSEEN.search(name)


def claim_repo(task: Task, config: Config) -> str:
    """Where the claim belongs: with the branch, or in the usual target if there will be none."""
    return task.target_repo if config.allows_target(task.target_repo) else config.target_repo


def check_task(task: Task, config: Config) -> None:
    """Raises Refused for a task that must not or cannot be run."""
    owner = "the runner's owner can"
    if not task.trusted:
        advice = f"An owner, member or collaborator can open the issue, or {owner} set AGENT_ALLOWED_AUTHORS."
        raise Refused(f"{code(task.author)} may not give work to this runner.", advice)
    if not config.allows_target(task.target_repo):
        advice = f"Name another target, or {owner} add it to AGENT_ALLOWED_TARGETS."
        raise Refused(f"This runner may not change the repository {code(task.target_repo)}.", advice)
    if not is_branch_name(task.branch):
        raise Refused(f"{code(task.branch)} is not a valid branch name.", f"{owner.capitalize()} change AGENT_BRANCH.")
    if task.base and not is_branch_name(task.base):
        raise Refused(f"The base {code(task.base)} is not a valid branch name.")
    if len(metadata_comment(task.metadata)) > MAX_METADATA:
        raise Refused(f"The metadata is longer than {MAX_METADATA:,} characters.")
    if len(str(task.issue.get("body"))) > MAX_ISSUE:
        raise Refused(f"The issue's text is longer than {MAX_ISSUE:,} characters.")
    if not task.instruction:
        raise Refused("The instruction is empty.", "Write what is to be done below `## Instructions`.")
    if "," in task.agent:
        raise Refused(f"The labels name several agents: {code(task.agent)}.", "Leave one of them on.")
    if task.agent and task.agent not in config.routes:
        known = ", ".join(map(code, sorted(config.routes)))
        advice = f"It knows {known}." if known else f"It knows none by name; {owner} set AGENT_COMMAND_NAME."
        raise Refused(f"This runner knows no agent {code(task.agent)}.", advice)


def render_prompt(task: Task, base: str, template: str) -> str:
    """What an agent is told. What the task is about is left out where the instruction says it."""
    told = task.context in task.instruction.replace("`", "")
    values = {"instruction": task.instruction, "title": task.title, "issue": task.url, "target": task.target_repo}
    values |= {"context": "" if told else task.context, "base": base, "attempt": str(task.attempt)}
    return fill(template, {**values, "failure": task.failure})


def metadata_comment(metadata: Mapping[str, Any]) -> str:
    """The hidden comment that the back end finds by `<!--\\s*agent_task_metadata\\s+(.*?)\\s*-->` and reads as JSON. So
    no `-->` and no `fixes #1` may occur inside: such characters stand only in JSON strings, where an escape does."""
    text = re.sub("[<>#]", lambda sign: f"\\u{ord(sign[0]):04x}", json.dumps(metadata))
    return f"<!-- agent_task_metadata {text} -->"


def step_marker(run: str, step: str) -> str:
    """A hidden comment by which what was written with an answer that was lost is found again."""
    return f"<!-- agent-runner run={run} step={step} -->"


def defused(text: str) -> str:
    """Foreign text without what programs find in code too: comments, and words that close issues."""
    return FOR_PROGRAMS.sub("\\g<0>\u200b", text)


def code(text: str) -> str:
    """Foreign text as inline code that it cannot break out of."""
    shown = " ".join(printable(encodable(text)).split()).replace("`", "'")[:200]
    return f"`{defused(shown)}`" if shown else "(nothing)"


def fenced(text: str) -> str:
    """Foreign text in a code fence that is longer than any run of backticks in it."""
    text = defused(printable(text))
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def issue_url(config: Config, number: int) -> str:
    return f"{config.server_url}/{config.dispatch_repo}/issues/{number}"


def cut_middle(text: str, limit: int) -> str:
    """The text, if need be without its middle, with a note that says so."""
    half = limit // 2
    short = f"{text[:half]}\n\n[... {len(text) - 2 * half:,} characters left out ...]\n\n{text[len(text) - half :]}"
    return text if len(text) <= limit else short


def cut(text: str, limit: int) -> str:
    """The text, if need be without its end, with a note that says so."""
    kept = max(0, limit - 60)
    short = f"{text[:kept]}\n\n… ({len(text) - kept:,} characters more were left out)"
    return text if len(text) <= limit else short


def folded_output(output: str, is_summary: bool = False) -> str:
    """The last lines of an agent's output in a fold, or nothing if it printed nothing. A short summary is unfolded."""
    lines = printable(re.sub(r"\r\n?", "\n", output)).rstrip().split("\n")[-OUTPUT_LINES:]
    shown = fenced("\n".join(line if len(line) <= 500 else line[:499] + "…" for line in lines))
    summary = f"<summary>Last {OUTPUT_LINES} lines of output</summary>"
    fold = "<details open>" if is_summary and len(lines) <= OUTPUT_LINES / 2 else "<details>"
    return f"{fold}{summary}\n\n{shown}\n\n</details>" if any(map(str.strip, lines)) else ""


def harmless(markdown: str, limit: int = 4_000) -> str:
    """Foreign Markdown, cut to a limit: its fences closed, and taken out of lists, so that it is plain where they end;
    and with a zero-width space in what would hide, forge, call people or close issues."""
    text = re.sub(r"(`{200})`+|(~{200})~+", r"\1\2", printable(re.sub(r"\r\n?", "\n", markdown)))
    text = INDENTED_FENCE.sub(lambda match: match[0].rstrip() + "\n" * bool(match[0].strip()), text.strip())
    text = FOR_PEOPLE.sub(lambda match: match[0] + "\u200b" * (match["mark"] is None), text)
    text = cut(defused(text), limit - 200)
    return "\n".join([text, *(fence["mark"] for fence in FENCE.finditer(text) if fence["close"] is None)])


def table(rows: Mapping[str, str]) -> str:
    """A two-column Markdown table."""
    lines = [f"| {key} | {value.replace('|', chr(92) + '|')} |" for key, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def blocks(*parts: str) -> str:
    """Markdown blocks, the empty ones left out."""
    return "\n\n".join(part for part in parts if part)


def duration(seconds: float) -> str:
    """Seconds as people say them: 42 s, 3 min 5 s, 1 h 2 min."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def render_comment(run: str, step: str, text: str, output: str = "", metadata: str = "") -> str:
    """A comment on the issue within GitHub's limit; what programs look for is never cut."""
    end = blocks(metadata if len(metadata) <= MAX_METADATA else "", step_marker(run, step))
    fold = folded_output(output)
    return blocks(cut(text, MAX_BODY - len(end) - len(fold) - 4), fold, end)


def pull_title(task: Task, template: str) -> str:
    """The pull request's title; GitHub takes 256 characters."""
    values = {"title": printable(task.title) or task.slug, "task_id": task.slug, "issue": str(task.number)}
    title = fill(template, values)
    return title if len(title) <= 256 else title[:255] + "…"


class Result(NamedTuple):
    """What came of a task: the commit, what it changed, the agent's summary or else the end of its output, further rows
    for the details, and why it is not finished: None if it is."""

    commit: str
    stat: str
    summary: str = ""
    output: str = ""
    rows: Mapping[str, str] = {}
    failure: RunnerError | None = None


def pull_body(task: Task, base: str, result: Result, run: str) -> str:
    """The pull request's text. The metadata comes first: the back end takes the first comment. The output stands in for
    a summary."""
    rows = {"Task": code(task.task_id), "Dispatch issue": task.reference, "Asked for by": code(task.author)}
    rows |= {"Base": code(base), "Attempt": str(task.attempt), **result.rows}
    head, failure = metadata_comment(task.metadata), result.failure
    changes = "### Changes\n\n" + fenced(cut(result.stat.rstrip("\n"), 8_000))
    tail = blocks(changes, table(rows), f"Fixes {task.reference}", step_marker(run, "pull"))
    # https://docs.github.com/get-started/writing-on-github/getting-started-with-writing-and-formatting-on-github/basic-writing-and-formatting-syntax#alerts
    warning = f"> [!WARNING]\n> **Not finished.** {' '.join(harmless(failure.why).split())}" if failure else ""
    output = failure.output if failure else "" if result.summary.strip() else result.output
    fold = folded_output(output, is_summary=not failure)
    told = harmless(result.summary, MAX_BODY - len(head) - len(tail) - len(warning) - len(fold) - 100)
    return blocks(head, warning, told, fold, tail)


def commit_message(task: Task, run: str, config: Config, failure: RunnerError | None = None) -> str:
    """The commit's message. Its trailers say whose branch it is, for whoever finds it later, and who asked for it.
    https://docs.github.com/pull-requests/committing-changes-to-your-project/creating-and-editing-commits/creating-a-commit-with-multiple-authors
    """
    subject = pull_title(task, config.pull_title)[:100].strip()
    trailers = {"Task-Id": task.slug, "Dispatch-Issue": task.reference, "Run": run}
    if failure:
        trailers["Unfinished"] = defused(" ".join(printable(failure.why).split())[:200])
    if (user := (task.issue.get("user") or {}).get("id")) and re.fullmatch(r"[A-Za-z0-9-]+(\[bot\])?", task.author):
        host = urlsplit(config.server_url).hostname
        trailers["Co-authored-by"] = f"{task.author} <{user}+{task.author}@users.noreply.{host}>"
    return config.masked(f"{subject}\n\n" + "".join(f"{name}: {value}\n" for name, value in trailers.items()))


# -- GitHub's protocol: pure functions that say what an answer means. ------------------------------

APP_ADVICE = {  # for the App's own requests
    401: "The runner's owner should check that GITHUB_APP_ID and the private key belong to the same App.",
    403: "The runner's owner should check the App's installation, which may be suspended.",
    404: "The runner's owner should install the App on {}; docs/github-app.md says how.",
    422: "The runner's owner should give the App's installation the repository {}, and the permissions that "
    "docs/github-app.md lists.",
}
ADVICE = {
    401: "The runner's owner should check GITHUB_TOKEN: it is wrong, expired or revoked.",
    403: "The runner's owner should check what the token may do; README.md lists the permissions.",
    404: "The runner's owner should check the name. GitHub also answers 404 for what the token may not see.",
}


NO_DRAFTS = re.compile(r"draft pull requests are not supported", re.I)


class Answer(NamedTuple):
    """An answer, neither limit nor fault. `data` is None for a 304 and an empty body, `at` the `server_time`."""

    status: int
    data: Any
    etag: str
    next_url: str
    at: float
    headers: Mapping[str, str]


def is_limit(status: int, headers: Mapping[str, str], text: str) -> bool:
    """Whether a request was refused for a limit: 429, or a 403 that does not mean "you may not"."""
    told = headers.get("x-ratelimit-remaining") == "0" or "retry-after" in headers or "rate limit" in text.lower()
    return status == 429 or (status == 403 and told)


def limit_pause(headers: Mapping[str, str], streak: int) -> float:
    """Seconds for which nothing may be sent after a limit was met, `streak` of them in a row before."""
    # https://docs.github.com/rest/using-the-rest-api/best-practices-for-using-the-rest-api#handle-rate-limit-errors-appropriately
    now = server_time(headers)  # not this machine's clock, which may be off
    with contextlib.suppress(ValueError):
        if "retry-after" in headers:
            return min(max(1.0 + streak, float(headers["retry-after"])), MAX_PAUSE)
        if headers.get("x-ratelimit-remaining") == "0" and now:
            return min(max(0.0, float(headers.get("x-ratelimit-reset", "")) - now) + 1, MAX_PAUSE)
    return float(SECONDARY_LIMIT_PAUSE * 2 ** min(streak, 5))


def server_time(headers: Mapping[str, str]) -> float:
    """The server's clock in seconds since 1970, from the Date header; 0 if it does not say."""
    with contextlib.suppress(ValueError):
        return email.utils.parsedate_to_datetime(headers.get("date", "")).timestamp()
    return 0.0


def refusal(method: str, path: str, status: int, data: Any) -> RunnerError:
    """What a 4xx or 5xx answer means for the task at hand, or one of GraphQL, which says with 200 what is wrong."""
    data = data if isinstance(data, dict) else {}
    found = data.get("errors") or []
    found = found if isinstance(found, list) else [found]
    errors = [error.get("message") or error if isinstance(error, dict) else error for error in found]
    reasons = "; ".join(str(reason) for reason in [data.get("message"), *errors] if reason) or "no message"
    what = f"GitHub answered {status} to {method} {path}: {reasons}"
    # GraphQL names what it refuses, such as NOT_FOUND; an error without a name is a failure of its own.
    names = [error.get("type") or error.get("extensions") for error in found if isinstance(error, dict)]
    fault = status >= 500 or status == 408 or (status == 200 and any(n in (None, "RATE_LIMITED") for n in names))
    return Unreachable(what) if fault else ApiRefused(what, ADVICE.get(status, ""), status=status)


def read_answer(method: str, path: str, response: requests.Response) -> Answer:
    """What an answer brings; raises what `refusal` makes of it."""
    data, status, headers = None, response.status_code, response.headers
    with contextlib.suppress(requests.JSONDecodeError):
        data = response.json()
    if status >= 400 or (isinstance(data, dict) and data.get("errors")):
        raise refusal(method, path, status, data)
    if (response.content or (method, status) == ("GET", 200)) and not isinstance(data, dict | list):
        raise Unreachable(f"the answer to {method} {path} is not GitHub's")  # but a proxy's or a hotel's page
    next_url = str(response.links.get("next", {}).get("url", ""))
    return Answer(status, data, headers.get("etag", ""), next_url, server_time(headers), headers)


def app_jwt(app_id: str, key: str, now: float) -> str:
    """What an App signs in with for at most ten minutes, at `now` seconds since 1970; raises ValueError("...").
    https://docs.github.com/apps/creating-github-apps/authenticating-with-a-github-app/generating-a-json-web-token-jwt-for-a-github-app
    """
    try:
        import jwt  # the optional package PyJWT[crypto]

        # A minute ago, since no two clocks agree.
        return jwt.encode({"iss": app_id, "iat": int(now) - 60, "exp": int(now) + 540}, key, "RS256")
    except (ImportError, NotImplementedError):  # the latter without `crypto`
        raise ValueError("needs another package: pip install 'PyJWT[crypto]>=2.8,<3'") from None
    except (ValueError, TypeError, jwt.PyJWTError):
        raise ValueError("is no RSA private key that can be used") from None


def repo_of(path: str, usual: str) -> str:
    """The repository that a path of the API is about; some name none, or only its number."""
    return "/".join(path.split("/")[2:4]) if path.startswith("/repos/") else usual


def is_signed(secret: str, body: bytes, signature: str) -> bool:
    """Whether a webhook delivery is GitHub's, by its header X-Hub-Signature-256.
    https://docs.github.com/webhooks/using-webhooks/validating-webhook-deliveries"""
    good = "sha256=" + hmac.new(secret.encode("utf-8", "surrogateescape"), body, hashlib.sha256).hexdigest()
    return hmac.compare_digest(good.encode(), signature.encode("utf-8", "replace"))


def is_news(event: str, payload: Any, config: Config) -> bool:
    """Whether a webhook delivery may mean work, or its end: an issue of the dispatch repository with the task label has
    changed, otherwise than by what the runner itself does to it.
    https://docs.github.com/webhooks/webhook-events-and-payloads#issues"""
    try:
        action, label = payload.get("action"), str((payload.get("label") or {}).get("name", "")).lower()
        if event != "issues" or action not in ("opened", "labeled", "reopened", "closed", "unlabeled"):
            return False
        if payload["repository"]["full_name"].lower() != config.dispatch_repo.lower():
            return False
        ends = () if action == "unlabeled" else (config.done_label.lower(), config.failed_label.lower())
        own = label in (config.processing_label.lower(), *ends)
        return not own and (label == config.task_label.lower() or has_label(payload["issue"], config.task_label))
    except (AttributeError, KeyError, TypeError):
        return False


def has_label(issue: Mapping[str, Any], *labels: str) -> bool:
    """Whether an issue carries one of the labels; GitHub ignores their case."""
    carried = {str(label["name"]).lower() for label in issue.get("labels", ())}
    return any(label.lower() in carried for label in labels)


def is_wanted(issue: Mapping[str, Any], config: Config) -> bool:
    """Whether an issue is an open task, run or not."""
    return issue.get("state") == "open" and "pull_request" not in issue and has_label(issue, config.task_label)


def is_queued(issue: Mapping[str, Any], config: Config) -> bool:
    """Whether an issue is to be run, or is being run: a claim tells the two apart, the label `processing` does not."""
    return is_wanted(issue, config) and not has_label(issue, config.done_label, config.failed_label)


# The edits come newest first, the events newest last: https://docs.github.com/graphql/reference/objects#issue
HISTORY = """query($owner: String!, $name: String!, $number: Int!) {
  repository(owner: $owner, name: $name) { issue(number: $number) { updatedAt
    userContentEdits(first: 100) { pageInfo { hasNextPage } nodes { editedAt editor { __typename login } } }
    timelineItems(last: 100, itemTypes: [LABELED_EVENT, RENAMED_TITLE_EVENT]) { pageInfo { hasPreviousPage } nodes {
      ... on LabeledEvent { createdAt actor { __typename login } label { name } }
      ... on RenamedTitleEvent { createdAt actor { __typename login } }
    } }
  } }
}"""
Change = tuple[str, bool, str]  # when, whether title or body was edited (or else the task label given), by whom


def rest_login(actor: Mapping[str, str] | None) -> str:
    """A login as REST has it, for GraphQL names the bot `evil[bot]` like the user `evil`; "" for who is neither."""
    suffix = {"User": "", "Bot": "[bot]"}.get(actor["__typename"]) if actor else None
    return "" if actor is None or suffix is None else actor["login"].removesuffix(suffix) + suffix


def read_history(issue: Mapping[str, Any], label: str) -> list[Change]:
    """What the answer to HISTORY tells, the newest first; in one second an edit counts as newer than the label. For
    older events, which it leaves out, stands an edit by nobody known."""
    edits, events = issue["userContentEdits"], issue["timelineItems"]
    if edits["pageInfo"]["hasNextPage"]:
        raise TaskFailed("The issue was edited more than 100 times.", "Open it anew.")
    changes = [(edit["editedAt"], True, rest_login(edit["editor"])) for edit in edits["nodes"]]
    told = [event for event in events["nodes"] if event.get("label", {"name": label})["name"].lower() == label.lower()]
    changes += [(event["createdAt"], "label" not in event, rest_login(event["actor"])) for event in told]
    return sorted(changes + [("", True, "")] * events["pageInfo"]["hasPreviousPage"], reverse=True)


def utc(seconds: float) -> str:
    """Seconds since 1970 as GitHub writes a time."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def parse_utc(text: str) -> float:
    """A time of GitHub's as seconds since 1970."""
    return datetime.fromisoformat(text).timestamp()


# -- GitHub's client: the only place that speaks HTTP. ---------------------------------------------


class Clock:
    """Time and chance as the runner sees them; tests pass one of their own."""

    def now(self) -> float:
        """Seconds since 1970; for people, since no two machines agree on it."""
        return time.time()

    def monotonic(self) -> float:
        """Seconds that go on while the machine sleeps, where the system has such a clock."""
        return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))

    def wait(self, event: threading.Event, seconds: float) -> bool:
        """Waits for the event, at most so many seconds; whether it happened."""
        return event.wait(seconds)

    def jitter(self, seconds: float) -> float:
        """About so many seconds, so that many runners do not come back in the same moment."""
        return seconds * secrets.SystemRandom().uniform(0.8, 1.2)


def patiently(step: Callable[[], T], clock: Clock, stop: threading.Event, patience: float = PATIENCE) -> T:
    """Takes a step, which must bear being repeated, again while GitHub is out of reach, for about `patience` seconds:
    what an agent has done in an hour is not to be lost to a minute without network."""
    pause, left = 1.0, patience
    while True:
        try:
            return step()
        except Unreachable as fault:
            if (left := left - max(pause, fault.pause)) < 0:
                raise
            wait = max(pause, fault.pause)
            log.warning("%s; next try in %.0f s", fault, wait)
            if clock.wait(stop, clock.jitter(wait)):
                raise Stopping from fault
            pause = min(pause * 2, 60)


class Http:
    """Sends requests to GitHub's API, and to no other host."""

    def __init__(self, config: Config, metrics: Metrics) -> None:
        self._config, self._metrics = config, metrics
        # https://docs.github.com/enterprise-server/graphql/guides/forming-calls-with-graphql#the-graphql-endpoint
        self.graphql = re.sub(r"(?<=/api)/v3\Z", "", config.api_url) + "/graphql"
        self._session = requests.Session()
        self._session.headers.update({"Accept": "application/vnd.github+json", "X-GitHub-Api-Version": "2022-11-28"})
        self._session.headers["User-Agent"] = f"agent-runner/{__version__}"

    def writes(self, method: str, path: str, body: Any) -> bool:
        """Whether a request changes something; most of GraphQL's do not."""
        return method != "GET" and (path != self.graphql or body["query"].startswith("mutation"))

    def send(self, method: str, path: str, token: str, body: Any = None, etag: str = "") -> requests.Response:
        """Sends; follows redirects itself, since requests would turn a moved POST into a GET. Raises Unreachable.
        https://docs.github.com/rest/using-the-rest-api/best-practices-for-using-the-rest-api#follow-redirects"""
        url = path if "://" in path else self._config.api_url + path
        # An agent may have found a secret and told it.
        body = body and {k: self._config.masked(v) if k in ("title", "body") else v for k, v in body.items()}
        options: dict[str, Any] = {"timeout": HTTP_TIMEOUT, "allow_redirects": False, "auth": _bearer(token)}
        options["headers"] = {"If-None-Match": etag or None}  # requests leaves out what is None
        for _ in range(4):
            if urlsplit(url)[:2] != urlsplit(self._config.api_url)[:2]:
                raise ApiRefused(f"{method} {path} leads to another host, {urlsplit(url).netloc}")
            status = 0
            try:
                response = self._session.request(method, url, json=body, **options)
                status = response.status_code
            except requests.RequestException as error:
                raise Unreachable(f"no answer to {method} {path}: {root_cause(error)}") from error
            finally:
                self._metrics.count("requests_total", status)
                if self.writes(method, path, body):
                    audit(self._config, "write", method=method, path=urlsplit(url).path, status=status)
            log.debug("%s %s -> %d", method, url, response.status_code)
            if response.status_code not in (301, 302, 307, 308):
                return response
            with contextlib.suppress(ValueError):
                url = urljoin(url, response.headers.get("location", ""))
        raise ApiRefused(f"{method} {path} is redirected without end")


def _bearer(token: str) -> Callable[[requests.PreparedRequest], requests.PreparedRequest]:
    """Signs a request in; requests would put ~/.netrc before a plain header."""

    def sign(request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {token}"
        return request

    return sign


@dataclass
class Grant:
    """An installation token: since when the runner has it, when it wants another one, and whether it has worked yet.
    Times on the monotonic clock."""

    token: Secret
    since: float
    until: float
    permissions: Mapping[str, str]
    proven: bool = False


class SignIn:
    """What the runner signs in with, for all threads: the personal token, or as an App an installation token for each
    repository, and another one, which can do no more than that, for git. A token lasts an hour; the next one is got
    when a tenth of that is left, so also in the middle of a task.
    https://docs.github.com/apps/creating-github-apps/authenticating-with-a-github-app/authenticating-as-a-github-app-installation
    """

    def __init__(self, config: Config, clock: Clock | None = None, metrics: Metrics | None = None) -> None:
        self.config, self._clock = config, clock or Clock()
        self._http = Http(config, metrics or Metrics())
        self._grants: dict[tuple[str, bool], Grant] = {}
        self._skew = 0.0  # how far GitHub's clock is ahead of this machine's
        self._not_before = 0.0  # when the App may ask again after it met a limit, on the monotonic clock
        self._lock = threading.Lock()

    def token(self, repo: str, push: bool = False) -> Secret:
        """A token for a repository's API, or for git there."""
        return self.grant(repo, push).token if self.config.app_id else self.config.token

    def grant(self, repo: str, push: bool = False) -> Grant:
        """The App's token for a repository, new if need be. Raises ApiRefused or Unreachable."""
        with self._lock:
            grant = self._grants.get((repo.lower(), push))
            if not grant or self._clock.monotonic() >= grant.until:
                grant = self._grants[repo.lower(), push] = self._make(repo, push)
                self.config.remember(grant.token, 2 * len(self._grants))
            return grant

    def worked(self, token: str) -> None:
        """Takes note that GitHub knows a token."""
        for grant in list(self._grants.values()):
            grant.proven = grant.proven or grant.token == token

    def forgives(self, tokens: Sequence[str], status: int, stop: threading.Event) -> bool:
        """Whether to ask again after an answer 401, 403 or 404 to the last of these tokens. All of GitHub may not know
        a new one for some seconds: then it waits a moment. If it was a 401, there may be another token; once."""
        grant = next((grant for grant in list(self._grants.values()) if grant.token == tokens[-1]), None)
        if grant and not grant.proven and self._clock.monotonic() - grant.since < FRESH_TOKEN:
            log.warning("GitHub may not know the App's new token yet: it is tried again")
            if self._clock.wait(stop, FRESH_TOKEN_PAUSE):
                raise Stopping
            return True
        if grant and status == 401:
            grant.until = 0
        # An App's token that is not among them any more: another thread has got the next one already.
        other = bool(self.config.app_id) or self.config.token != tokens[-1]
        return status == 401 and other and len({*tokens}) == 1

    def _make(self, repo: str, push: bool) -> Grant:
        """https://docs.github.com/rest/apps/apps#create-an-installation-access-token-for-an-app"""
        begun, body = self._clock.monotonic(), dict[str, Any](repositories=[repo.partition("/")[2]])
        if push:
            workflows = {"workflows": "write"} if self.config.allow_workflows else {}
            body["permissions"] = {"contents": "write", "metadata": "read"} | workflows
        found = self.config.app_installation or self._ask("GET", f"/repos/{repo}/installation", repo).data["id"]
        made = self._ask("POST", f"/app/installations/{found}/access_tokens", repo, body)
        life = parse_utc(made.data["expires_at"]) - (made.at or self._clock.now())
        return Grant(Secret(made.data["token"]), begun, begun + life * 0.9, made.data.get("permissions") or {})

    def _ask(self, method: str, path: str, repo: str, body: Any = None) -> Answer:
        """A request of the App itself. If its clock may be to blame for an answer 401, it is sent again by GitHub's."""
        if (pause := self._not_before - self._clock.monotonic()) > 0:
            raise Unreachable(f"GitHub's limit for the App is reached, for {pause:.0f} s more")
        for again in (True, False):
            token = app_jwt(self.config.app_id, self.config.app_key, self._clock.now() + self._skew)
            response = self._http.send(method, path, token, body)
            if at := server_time(response.headers):
                self._skew = at - self._clock.now()
            if response.status_code != 401 or not again:
                break
        if is_limit(response.status_code, response.headers, response.text):
            self._not_before = self._clock.monotonic() + limit_pause(response.headers, 0)
            raise Unreachable("GitHub's limit for the App is reached")
        try:
            return read_answer(method, path, response)
        except ApiRefused as refused:
            kind = 401 if "Integration not found" in refused.why else refused.status
            advice = APP_ADVICE.get(kind, "").format(repo)
            if refused.status == 404 and path.startswith("/app/"):
                advice = "The runner's owner should check GITHUB_APP_INSTALLATION_ID: the App has no such installation."
            raise ApiRefused(refused.why, advice, status=refused.status) from None


class GitHub:
    """GitHub's API, for all threads. Requests go out one by one, writes AGENT_WRITE_INTERVAL apart, none while a
    limit lasts. Raises ApiRefused for 4xx, Unreachable for faults, Stopping when `stop` cuts a wait short, or when a
    client that does not wait would have to."""

    def __init__(
        self, config: Config, clock: Clock, stop: threading.Event,
        metrics: Metrics | None = None, sign_in: SignIn | None = None, waits: bool = True
    ) -> None:  # fmt: skip
        self._config, self._clock, self._stop, self._waits = config, clock, stop, waits
        self._metrics = metrics or Metrics()
        self._sign_in = sign_in or SignIn(config, clock, self._metrics)
        self._http = Http(config, self._metrics)
        self._dispatch = f"/repos/{config.dispatch_repo}"
        self._lock = threading.Lock()
        self._not_before = self._next_write = self._renewal = 0.0
        self._limits_in_a_row, self._scarcity = 0, 1.0

    def request(self, method: str, path: str, body: Any = None, etag: str = "", repo: str = "") -> Answer:
        """One request, sent again only if GitHub refused it for a limit, or its token. `repo` is for a path that names
        no repository, and is not about the dispatch repository."""
        repo, tokens = repo or repo_of(path, self._config.dispatch_repo), list[str]()
        while True:
            with self._lock:
                pause = self._not_before - self._clock.monotonic()
                if pause > 0 and (not self._waits or self._clock.wait(self._stop, pause)):
                    raise Stopping
                if self._http.writes(method, path, body):
                    self._clock.wait(threading.Event(), max(0.0, self._next_write - self._clock.monotonic()))
                    self._next_write = self._clock.monotonic() + self._config.write_interval
                tokens.append(self._sign_in.token(repo))
                response = self._http.send(method, path, tokens[-1], body, etag)
                if self._observe(response):
                    continue
            status = response.status_code
            if status < 400:
                self._sign_in.worked(tokens[-1])
            if status not in (401, 403, 404) or not self._sign_in.forgives(tokens, status, self._stop):
                return read_answer(method, path, response)

    def _observe(self, response: requests.Response) -> bool:
        """Learns from the rate-limit headers; whether this request was refused for a limit."""
        headers = response.headers
        with contextlib.suppress(KeyError, ValueError):
            limit, left = int(headers["x-ratelimit-limit"]), int(headers["x-ratelimit-remaining"])
            reset, resource_ = float(headers["x-ratelimit-reset"]), headers.get("x-ratelimit-resource", "core")
            self._scarcity = max(1.0, limit / 5 / max(1, left))
            self._renewal = self._clock.monotonic() + reset - server_time(headers)
            for name, value in {"limit": limit, "remaining": left, "reset_timestamp_seconds": reset}.items():
                self._metrics.set(f"quota_{name}", value, resource_)
        limited = is_limit(response.status_code, headers, response.text)
        if limited or headers.get("x-ratelimit-remaining") == "0":
            pause = limit_pause(headers, self._limits_in_a_row)
            log.warning("GitHub's limit is reached: nothing is sent for %.0f s", pause)
            self._not_before = self._clock.monotonic() + pause
        self._limits_in_a_row = self._limits_in_a_row + 1 if limited else 0
        return limited

    def paused(self) -> float:
        """Seconds for which nothing is sent, because a limit was met."""
        return max(0.0, self._not_before - self._clock.monotonic())

    def poll_pause(self, interval: float) -> float:
        """Seconds from one poll to the next: longer with less than a fifth of the quota left, which is for work."""
        return max(interval, min(interval * self._scarcity, self._renewal - self._clock.monotonic()))

    def _repeat(self, method: str, path: str, body: Any = None, last: bool = False) -> Answer:
        """A request that may be sent twice; while GitHub is away a `last` one is for seconds, whatever `stop` says."""
        stop, patience = (threading.Event(), 8) if last else (self._stop, PATIENCE)
        return patiently(lambda: self.request(method, path, body), self._clock, stop, patience)

    def _create(self, path: str, body: Mapping[str, Any], find: Callable[[], Any], asked: bool = False) -> Any:
        """POSTs something that must not be made twice, and returns it. GitHub may have made it although no good answer
        came, and has no key against doubles: so it is looked for before it is asked for again."""

        def step() -> Any:
            nonlocal asked
            found = find() if asked else None
            asked = True
            made = found or self.request("POST", path, body).data
            if not made:
                raise Unreachable(f"the answer to POST {path} is empty")
            return made

        return patiently(step, self._clock, self._stop)

    def issue(self, number: int) -> dict[str, Any]:
        """One issue of the dispatch repository, which may have a new name; moved elsewhere counts as refused."""
        issue: dict[str, Any] = self._repeat("GET", f"{self._dispatch}/issues/{number}").data
        home = f"{self._config.api_url}{self._dispatch}"
        if issue["repository_url"].lower() != home.lower():
            home = self._repeat("GET", self._dispatch).data["url"]
        if issue["repository_url"].lower() != home.lower():
            raise ApiRefused(f"issue {number} was moved to another repository", status=301)
        return issue

    def changed(self, number: int, etag: str) -> tuple[dict[str, Any] | None, str]:
        """The issue unless it is as it was, and the ETag to ask with next time."""
        answer = self.request("GET", f"{self._dispatch}/issues/{number}", etag=etag)
        return answer.data, answer.etag or etag

    def history(self, issue: Mapping[str, Any]) -> list[Change]:
        """Who has edited an issue, and who gave it the task label; only GraphQL tells."""
        owner, name = self._config.dispatch_repo.split("/")
        body = {"query": HISTORY, "variables": {"owner": owner, "name": name, "number": issue["number"]}}

        def step() -> list[Change]:
            known = self.request("POST", self._http.graphql, body).data["data"]["repository"]["issue"]
            if known["updatedAt"] < issue["updated_at"]:  # a replica that lags may not know of the last edit
                raise Unreachable(f"GraphQL shows issue {issue['number']} as it was before")
            return read_history(known, self._config.task_label)

        return patiently(step, self._clock, self._stop)

    def may_write(self, login: str) -> bool:
        """Whether a person may write to the dispatch repository; a bot's App has rights of another kind."""
        if not login or login.endswith("[bot]"):
            return False
        try:
            path = f"{self._dispatch}/collaborators/{quote(login, safe='')}/permission"
            return self._repeat("GET", path).data["permission"] in ("admin", "write")
        except ApiRefused as error:
            if error.status != 404:
                raise
            return False

    def find_comment(self, number: int, marker: str) -> dict[str, Any] | None:
        pages = self._pages(f"{self._dispatch}/issues/{number}/comments?per_page={PAGE_SIZE}")
        return next((comment for comment in pages if marker in str(comment["body"])), None)

    def comment(self, number: int, text: str, marker: str, again: bool) -> int:
        """Comments on an issue, once; the comment's id. `marker` is in this text alone; `again` if it may be there."""
        path, find = f"{self._dispatch}/issues/{number}/comments", lambda: self.find_comment(number, marker)
        return int(self._create(path, {"body": text}, find, again)["id"])

    def edit_comment(self, comment: int, text: str, patient: bool = True) -> None:
        send = self._repeat if patient else self.request
        send("PATCH", f"{self._dispatch}/issues/comments/{comment}", {"body": text})

    def add_label(self, number: int, label: str, looks: tuple[str, str]) -> None:
        """Labels an issue. A label that the repository lacks GitHub makes, grey and without a description; the answer
        holds all of the issue's labels, so that only a new one costs a second request, for its looks."""
        path = f"{self._dispatch}/issues/{number}/labels"
        for made in self._create(path, {"labels": [label]}, find=lambda: None):
            new = made["color"] == "ededed" and not made.get("description")
            if new and made["name"].lower() == label.lower():
                body = {"color": looks[0], "description": looks[1]}
                with contextlib.suppress(ApiRefused, Unreachable):  # it works without
                    self.request("PATCH", f"{self._dispatch}/labels/{quote(label, safe='')}", body)

    def remove_label(self, number: int, label: str, last: bool = False) -> None:
        """Takes a label off an issue; that it is not there is as good."""
        try:
            self._repeat("DELETE", f"{self._dispatch}/issues/{number}/labels/{quote(label, safe='')}", last=last)
        except ApiRefused as error:
            if error.status != 404:
                raise

    def open_pull(self, repo: str, body: Mapping[str, Any], draft: bool, marker: str, again: bool) -> dict[str, Any]:
        """The pull request from the branch `head`: the one with this `marker` in its text, else an open one, which gets
        the new text, else a new one. `again` if there may be one. Where there are no drafts it is none."""
        find = functools.partial(self._find_pull, repo, body["head"], marker)
        try:
            pull = self._create(f"/repos/{repo}/pulls", {**body, "draft": True} if draft else body, find, again)
        except ApiRefused as error:
            if draft and NO_DRAFTS.search(error.why):
                log.warning("no draft: %s", error)
                return self.open_pull(repo, body, False, marker, True)
            if error.status != 422 or not (pull := find()):  # 422 does not tell which one exists already
                raise
        if marker not in str(pull["body"]):
            wanted = {key: body[key] for key in ("title", "body", "base")}
            is_draft = bool(pull.get("draft"))
            pull = self._repeat("PATCH", f"/repos/{repo}/pulls/{pull['number']}", wanted).data
            if is_draft != draft:
                self._set_draft(repo, pull, draft)
        return dict(pull)

    def _set_draft(self, repo: str, pull: Mapping[str, Any], draft: bool) -> None:
        """Makes a pull request a draft, or ready for review, which only GraphQL does. The work does not hang on it."""
        name = "convertPullRequestToDraft" if draft else "markPullRequestReadyForReview"
        query = f"mutation($id: ID!) {{ {name}(input: {{pullRequestId: $id}}) {{ pullRequest {{ isDraft }} }} }}"
        body = {"query": query, "variables": {"id": pull["node_id"]}}
        try:
            patiently(lambda: self.request("POST", self._http.graphql, body, repo=repo), self._clock, self._stop)
        except (ApiRefused, Unreachable) as error:
            log.warning("#%d stays as it is: %s", pull["number"], error)

    def dress_pull(self, repo: str, number: int, labels: Sequence[str], reviewers: Sequence[str]) -> dict[str, str]:
        """Labels a pull request and asks people, and teams as `owner/team`, for reviews: what GitHub refuses, and why.
        https://docs.github.com/rest/pulls/review-requests#request-reviewers-for-a-pull-request"""
        teams = [name.rpartition("/")[2] for name in reviewers if "/" in name]
        people = [name for name in reviewers if "/" not in name]
        asked = {"reviewers": people, "team_reviewers": teams}
        wishes = {"Labels": (f"/repos/{repo}/issues/{number}/labels", {"labels": list(labels)} if labels else {})}
        wishes["Reviewers"] = (f"/repos/{repo}/pulls/{number}/requested_reviewers", asked if reviewers else {})
        problems = {}
        for what, (path, body) in wishes.items():
            try:
                if body:
                    self._repeat("POST", path, body)
            except (ApiRefused, Unreachable) as error:
                log.warning("no %s: %s", what.lower(), error)
                problems[what] = error.why
        return problems

    def _find_pull(self, repo: str, branch: str, marker: str) -> dict[str, Any] | None:
        query = urlencode({"head": f"{repo.split('/')[0]}:{branch}", "state": "all", "per_page": PAGE_SIZE})
        pulls = [pull for pull in self._pages(f"/repos/{repo}/pulls?{query}", repo) if pull["head"]["ref"] == branch]
        own = [pull for pull in pulls if marker in str(pull["body"])]
        return next(iter(own or [pull for pull in pulls if pull["state"] == "open"]), None)

    def _pages(self, url: str, repo: str = "") -> Iterator[dict[str, Any]]:
        """All rows of a list. Links are followed as given: they lead to other paths."""
        while url:
            answer = self.request("GET", url, repo=repo)
            yield from answer.data or []
            url = answer.next_url


def root_cause(error: BaseException) -> str:
    """The innermost reason of an exception that wraps others, without their technical shells."""
    while isinstance(inner := error.__cause__ or error.__context__, BaseException):
        error = inner
    return str(error).rpartition(": ")[2] or type(error).__name__


# -- The queue: what waits in the dispatch repository, at the price of a 304 while nothing changes. -


class Row(NamedTuple):
    """What the queue keeps of an issue in the list: `repo` is where its claim belongs, `body` a hash of its text."""

    number: int
    updated: str
    queued: bool
    processing: bool
    repo: str
    body: str
    title: str

    @classmethod
    def of(cls, issue: Mapping[str, Any], config: Config) -> Row:
        body = hashlib.sha256(str(issue["body"]).encode("utf-8", "replace")).hexdigest()
        processing = has_label(issue, config.processing_label)
        task = parse_task(issue, config)
        repo, queued = claim_repo(task, config), is_queued(issue, config)
        return cls(issue["number"], str(issue["updated_at"]), queued, processing, repo, body, task.title[:256])


Page = tuple[str, list[Row], str]  # its ETag, its rows, the address of the next one


class Queue:
    """The queued issues in `waiting`, by number, also those in work somewhere. Finished issues that stay open are in
    GitHub's list too: so that they cost nothing, a list that was read to its end is asked from then on only for what
    changed `since`. Offset paging can skip a row when another leaves the list between two pages: so several pages
    count as read only when a second reading finds nothing that the first missed. A 304 uses no quota:
    https://docs.github.com/rest/using-the-rest-api/best-practices-for-using-the-rest-api#use-conditional-requests-if-appropriate
    """

    def __init__(self, config: Config, github: GitHub) -> None:
        self._config, self._github = config, github
        self._since = ""
        self._pages: dict[str, Page] = {}  # by address, as they were last read
        self._seen: dict[int, Row] = {}
        self._handled: dict[int, str] = {}
        self.waiting: dict[int, Row] = {}

    def poll(self) -> bool:
        """Reads what changed; whether something has. Raises Unreachable or ApiRefused, and then has changed nothing."""
        pages, at, changed = self._read()
        rows = {row.number: row for _, page, _ in pages.values() for row in page}
        self._handled = {n: updated for n, updated in self._handled.items() if n in rows}
        for row in rows.values():
            self.waiting.pop(row.number, None)
            if row.queued and row.updated > self._handled.get(row.number, ""):
                self.waiting[row.number] = row
        newest = max((row.updated for row in self._seen.values()), default="")
        missed = any(row.updated <= newest and row.number not in self._seen for row in rows.values())
        settled = self._seen and not missed
        self._pages, self._seen = pages, rows if len(rows) >= PAGE_SIZE else {}
        # The next reading may begin before this one, as the list may lag, if a single page holds it then.
        since = utc(at - 180)
        if settled and self._seen and sum(row.updated >= since for row in rows.values()) < PAGE_SIZE:
            self._since, self._pages, self._seen = since, {}, {}
        return changed

    def handled(self, number: int, updated: str) -> None:
        """Remembers how new the issue was when it was run: a list that lags shows it unrun."""
        self._handled[number] = updated
        if number in self.waiting and self.waiting[number].updated <= updated:
            del self.waiting[number]

    def _read(self) -> tuple[dict[str, Page], float, bool]:
        """The list's pages by their addresses, the server's time when it was begun, and whether one has changed."""
        query = {"labels": self._config.task_label, "state": "open", "per_page": PAGE_SIZE}
        query |= {"sort": "created", "direction": "asc"} | ({"since": self._since} if self._since else {})
        url, at = f"/repos/{self._config.dispatch_repo}/issues?{urlencode(query)}", 0.0
        pages: dict[str, Page] = {}
        changed = False
        while url and url not in pages:
            etag, rows, next_url = self._pages.get(url, ("", [], ""))
            # A full last page stays the same when the next one comes to be; only its Link changes.
            usable = next_url or len(rows) < PAGE_SIZE
            answer = self._github.request("GET", url, etag=etag if usable else "")
            if answer.status != 304:
                if not isinstance(answer.data, list) or not all(isinstance(row, dict) for row in answer.data):
                    raise Unreachable(f"the answer to GET {url} is no list of issues")
                rows = [Row.of(issue, self._config) for issue in answer.data]
                etag, next_url, changed = answer.etag, answer.next_url, True
            pages[url], at, url = (etag, rows, next_url), at or answer.at, next_url
        return pages, at, changed


# -- The supervisor: what stands between the runner and an agent. ----------------------------------
#
# The agent may do whatever an issue talks it into. So it is started by a process of its own: without
# secrets, it puts up the walls, looks after limits and output, and ends when everything that the
# agent started has ended. It dies with the runner, and the agent with it. Of this file it knows only
# this part, and of Python only what SUPERVISOR imports: all of them would cost each agent 0.3 seconds
# and 40 MB.

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446  # the same on every machine
# Rights to files by the version that brought them: https://docs.kernel.org/userspace-api/landlock.html
LANDLOCK_RIGHTS = {1: (1 << 13) - 1, 2: 1 << 13, 3: 1 << 14, 5: 1 << 15, 9: 1 << 16}
LANDLOCK_READ, LANDLOCK_LIST, LANDLOCK_OF_FILES = 1 << 0 | 1 << 2, 1 << 3, 1 << 0 | 1 << 1 | 1 << 2 | 7 << 14
LANDLOCK_SCOPES = 1 << 0 | 1 << 1  # abstract sockets, signals; since version 6
DEVICES = [f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom", "tty", "shm")]
SPARE_PROCESSES = 1024
KILL_GRACE = 5  # seconds
OUTPUT_KEPT = 64 * 1024  # bytes of an agent's output
LOG_KEPT = 4 * 1024**2  # bytes of it that go to a file
LIVE_KEPT = 8 * 1024  # bytes of its end that can be seen while the agent runs


class Finished(NamedTuple):
    """A process that has ended; `late` is "" if it did so by itself, else "timeout"."""

    code: int
    out: str
    err: str
    late: str


class Order(NamedTuple):
    """What a supervisor is to run, and within which walls: `write` and `read` are granted below what is in `hide`.
    Seconds and bytes; 0 is no limit."""

    command: Sequence[str]
    cwd: str
    env: Mapping[str, str]
    stdin: str
    log: str
    timeout: float
    stall: float
    disk: int
    memory: int
    landlock: bool
    write: Sequence[str]
    read: Sequence[str]
    hide: Sequence[str]


def kernel(call: Callable[..., int], *arguments: int | bytes | None) -> int:
    """A call of the system's C library; raises OSError."""
    words = [ctypes.c_long(word) if isinstance(word, int) else word for word in arguments]
    if (result := call(*words)) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def set_process(option: int, value: int) -> bool:
    """Sets an attribute of this process, if this is Linux: https://man7.org/linux/man-pages/man2/prctl.2.html"""
    with contextlib.suppress(AttributeError, OSError):
        return kernel(libc().prctl, option, value, 0, 0, 0) == 0
    return False


def landlock_version() -> int:
    """Which Landlock the running kernel has: 0 is none."""
    with contextlib.suppress(AttributeError, OSError):
        return kernel(libc().syscall, LANDLOCK_CREATE_RULESET, None, 0, 1) if sys.platform == "linux" else 0
    return 0


def visible(top: str, hidden: Collection[str]) -> Iterator[str]:
    """What covers a folder less what is hidden in it: rules can only grant, and grant all that is below."""
    if top in hidden:
        return
    if not any(path.startswith(f"{top.rstrip('/')}/") for path in hidden):
        yield top
        return
    with contextlib.suppress(OSError):
        for entry in os.scandir(top):
            if not entry.is_symlink():
                yield from visible(entry.path, hidden)


def landlock_rules(order: Order) -> int:
    """The rules for an agent, as a file: https://man7.org/linux/man-pages/man7/landlock.7.html"""
    version, call = landlock_version(), libc().syscall
    rights = sum(right for since, right in LANDLOCK_RIGHTS.items() if since <= version)
    handled = struct.pack("=QQQ", rights, 0, LANDLOCK_SCOPES if version >= 6 else 0)
    handled = handled[: 8 if version < 4 else 16 if version < 6 else 24]
    rules = kernel(call, LANDLOCK_CREATE_RULESET, handled, len(handled), 0)

    def grant(path: str, what: int) -> None:
        with contextlib.suppress(FileNotFoundError, PermissionError):
            file = os.open(path, os.O_PATH | os.O_CLOEXEC)
            what &= rights if stat.S_ISDIR(os.fstat(file).st_mode) else rights & LANDLOCK_OF_FILES
            kernel(call, LANDLOCK_ADD_RULE, rules, 1, struct.pack("=Qi", what, file), 0)
            os.close(file)

    grant("/", LANDLOCK_LIST)  # names are no secret, and programs look for their modules in lists
    for path in (*visible("/", order.hide), *order.read):
        grant(path, LANDLOCK_READ | LANDLOCK_LIST)
    for name in (*order.write, *DEVICES):
        grant(name, rights)
    return rules


def set_limit(which: int, value: int) -> None:
    """Sets a limit of this process and its children; never above what it has."""
    hard = resource.getrlimit(which)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (value, value))


def process_limit() -> int:
    """How many processes may be, all of this user's: the kernel also counts those in other containers, which nothing
    here can list. So it is tried how many are too few."""
    limit = SPARE_PROCESSES
    soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    for _ in range(10):
        resource.setrlimit(resource.RLIMIT_NPROC, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
        with contextlib.suppress(BlockingIOError):
            if not (child := os.fork()):
                os._exit(0)
            os.waitpid(child, 0)
            break
        limit *= 2
    resource.setrlimit(resource.RLIMIT_NPROC, (soft, hard))
    return limit * 2


def confine(order: Order, rules: int, processes: int) -> None:
    """Puts up the walls around this process, just before it becomes the agent."""
    set_process(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.nice(5)
    set_process(PR_SET_DUMPABLE, 1)  # what is not cannot write to its own /proc
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # if memory runs out, this goes first
    set_limit(resource.RLIMIT_CORE, 0)
    set_limit(resource.RLIMIT_FSIZE, order.disk)
    set_limit(resource.RLIMIT_NPROC, processes)
    if order.memory:  # not the address space, of which some programs reserve far more than they use
        set_limit(resource.RLIMIT_DATA, order.memory)
    set_process(PR_SET_NO_NEW_PRIVS, 1)
    if rules >= 0:
        kernel(libc().syscall, LANDLOCK_RESTRICT_SELF, rules, 0)


def process_table() -> dict[int, tuple[int, int]]:
    """The parent and the session of each process, where the system tells them as Linux does.
    https://man7.org/linux/man-pages/man5/proc_pid_stat.5.html"""
    table = {}
    for pid in filter(str.isdecimal, os.listdir("/proc") if os.path.isdir("/proc") else ()):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/stat", "rb") as file:  # it has ended meanwhile
            _, parent, _, session = file.read().rpartition(b") ")[2].split()[:4]
            table[int(pid)] = int(parent), int(session)
    return table


def descendants(table: Mapping[int, tuple[int, int]], tops: set[int]) -> set[int]:
    """These processes, and all that come from them."""
    children: dict[int, list[int]] = {}
    for pid, (parent, _) in table.items():
        children.setdefault(parent, []).append(pid)
    found, rest = set(tops), list(tops)
    while rest:
        new = [pid for pid in children.get(rest.pop(), ()) if pid not in found]
        found.update(new)
        rest += new
    return found


def below() -> set[int]:
    """All processes that come from this one."""
    me = os.getpid()
    return descendants(process_table(), {me}) - {me}


def end_processes(find: Callable[[], set[int]], rounds: int = 1000) -> set[int]:
    """Ends the processes that `find` finds until it finds none. All are stopped before the first is killed: so what
    forks faster than it is killed comes to rest. Those that are left hang in the kernel; they die before they can go
    on."""
    stopped: set[int] = set()
    for _ in range(rounds):
        if not (found := find()):
            break
        new = found - stopped
        stopped |= new
        for pid in new or found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGSTOP if new else signal.SIGKILL)
        for pid in found:
            with contextlib.suppress(ChildProcessError):  # not a child yet
                os.waitpid(pid, os.WNOHANG)
        if not new:
            threading.Event().wait(0.01)
    return found


def watch(process: subprocess.Popen[bytes], files: Collection[int], seconds: float) -> set[int]:
    """Waits until one of these files can be read, a child has ended, or the time is over; which of the files it is.
    `Popen.wait` sees an end up to 50 ms late. https://man7.org/linux/man-pages/man2/pidfd_open.2.html"""
    wait, ends = select.poll(), list[int]()
    with contextlib.suppress(AttributeError, OSError):
        ends.append(os.pidfd_open(process.pid))
    for file in (*files, *ends):
        wait.register(file, select.POLLIN)
    try:
        ready = wait.poll(seconds * 1000 if ends else 10)
    finally:
        for end in ends:
            os.close(end)
    return {file for file, _ in ready} - {*ends}


class Output:
    """What an agent prints: the beginning in a file, the end in memory."""

    def __init__(self, log_file: str) -> None:
        self._file = open(log_file, "wb", opener=lambda name, flags: os.open(name, flags, 0o600))  # noqa: SIM115
        self.size, self.tail = 0, b""

    def add(self, data: bytes) -> None:
        self.tail = (self.tail + data)[-OUTPUT_KEPT:]
        with contextlib.suppress(OSError):  # the disk may be full
            self._file.write(data[: max(0, LOG_KEPT - self.size)])
            if self.size + len(data) > LOG_KEPT:  # for who wants to see how it goes; written over by what comes next
                self._file.seek(LOG_KEPT)
                self._file.write(b"\n" + self.tail[-LIVE_KEPT:])
            self._file.flush()
        self.size += len(data)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            if self.size > LOG_KEPT:
                self._file.seek(LOG_KEPT)
                missing = max(0, self.size - LOG_KEPT - len(self.tail))
                self._file.write(b"\n[... %d bytes left out ...]\n" % missing if missing else b"")
                self._file.write(self.tail[max(0, LOG_KEPT - self.size + len(self.tail)) :])
                self._file.truncate()
            self._file.close()


class Supervisor:
    """Runs one agent, which reads the file `feed`. The runner holds the other end of the pipe `lifeline`: so a runner
    that dies lets go of it."""

    def __init__(self, order: Order, lifeline: int, feed: int) -> None:
        self._order, self._lifeline, self._feed = order, lifeline, feed
        self._output = Output(order.log)
        self._free = {path: free_bytes(path) for path in order.write}
        self._begun = self._heard = time.monotonic()
        self._stopped = False

    def run(self) -> Finished:
        """Runs the agent, and ends all that it started. `err` says why it did not start."""
        set_process(PR_SET_CHILD_SUBREAPER, 1)
        set_process(PR_SET_DUMPABLE, 0)
        signal.signal(signal.SIGTERM, self._stop)
        order, (reader, writer) = self._order, os.pipe()
        processes, rules = process_limit(), landlock_rules(order) if order.landlock else -1
        try:
            agent = subprocess.Popen(
                order.command, cwd=order.cwd, env=order.env, stdin=self._feed, stdout=writer, stderr=writer,
                start_new_session=True, preexec_fn=functools.partial(confine, order, rules, processes)
            )  # fmt: skip
        except (OSError, subprocess.SubprocessError) as error:
            return Finished(127, "", getattr(error, "strerror", "") or str(error), "")
        os.close(writer)
        late = self._watch(agent, reader)
        if agent.poll() is None:
            agent.kill()
            agent.wait()
        end_processes(below)  # what is left comes to the runner, which tries it again
        os.set_blocking(reader, False)
        with contextlib.suppress(BlockingIOError):
            while self._read(reader):
                pass
        self._output.close()
        return Finished(agent.returncode, self._output.tail.decode("utf-8", "replace"), "", late)

    def _watch(self, agent: subprocess.Popen[bytes], reader: int) -> str:
        """Waits until the agent ends, or is to be ended: then it gets SIGTERM, and a while. Why, or ""."""
        late, patience, sources = "", 0.0, [reader, self._lifeline]
        while agent.poll() is None:
            ready = watch(agent, sources, 0.1)
            if self._lifeline in ready:
                return "stopped"
            if reader in ready and not self._read(reader):
                sources.remove(reader)
            if not late and (late := self._why_end()):
                patience = time.monotonic() + KILL_GRACE
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(agent.pid, signal.SIGTERM)
            if late and time.monotonic() > patience:
                break
        return late

    def _read(self, reader: int) -> bool:
        data = os.read(reader, OUTPUT_KEPT)
        self._output.add(data)
        self._heard = time.monotonic() if data else self._heard
        return bool(data)

    def _why_end(self) -> str:
        """Why the agent may not go on, or ""."""
        order, now = self._order, time.monotonic()
        if self._stopped:
            return "stopped"
        if now - self._begun > order.timeout:
            return "timeout"
        if order.stall and now - self._heard > order.stall:
            return "stall"
        lost = (free - free_bytes(path) > min(order.disk, free * 0.9) for path, free in self._free.items())
        return "disk" if any(lost) else ""

    def _stop(self, _number: int, _frame: object) -> None:
        self._stopped = True


def free_bytes(path: str) -> int:
    """What is free on the disk that a folder is on."""
    disk = os.statvfs(path)
    return disk.f_bavail * disk.f_frsize


def supervise() -> None:
    """The other side of `run_supervised`."""
    order = Order(**json.loads(sys.stdin.readline()))
    print(json.dumps(Supervisor(order, *map(int, sys.argv[-2:])).run()))


# -- Processes: the only place that starts one. ----------------------------------------------------

SUPERVISOR_IMPORTS = (
    "contextlib, ctypes, functools, json, os, resource, select, signal, stat, struct, subprocess, sys, threading, time"
)
SUPERVISOR_INHERITS = re.compile(r"PATH|HOME|TMPDIR|LD_LIBRARY_PATH|PYTHON\w+|VIRTUAL_ENV")
SUPERVISOR_GRACE = KILL_GRACE + 15  # seconds for the supervisor to end an agent and all that it started
CREDENTIALS = (".ssh", ".gnupg", ".netrc", ".git-credentials", ".config/git", ".config/gh", ".config/hub")  # in a home

_known: set[int] = set()  # the processes that this one has started and still waits for
_starting = threading.Lock()


def run_process(
    command: Sequence[str], cwd: Path, env: Mapping[str, str], timeout: float, stdin: bytes = b"",
    stop: threading.Event | None = None, grace: float = KILL_GRACE, pass_fds: Sequence[int] = ()
) -> Finished:  # fmt: skip
    """Runs a command for at most `timeout` seconds, and ends its process group; raises OSError or, on `stop`, Stopping.
    What it prints goes to files: a process that it leaves behind may hold a pipe open."""
    stop = stop or threading.Event()
    if stop.is_set():
        raise Stopping
    log.debug("run %s", shlex.join(command))
    with tempfile.TemporaryFile() as feed, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        feed.write(stdin)
        feed.seek(0)
        files: dict[str, Any] = {"stdin": feed, "stdout": out, "stderr": err, "pass_fds": pass_fds}
        with _starting:
            process = subprocess.Popen(command, cwd=cwd, env=env, start_new_session=True, **files)
            _known.add(process.pid)
        deadline = time.monotonic() + timeout
        try:
            while process.poll() is None and time.monotonic() <= deadline and not stop.is_set():
                watch(process, (), 0.2)
        finally:
            late = "timeout" if process.poll() is None else ""
            for how in [signal.SIGTERM, signal.SIGKILL] if late else [signal.SIGKILL]:
                with contextlib.suppress(ProcessLookupError, PermissionError, subprocess.TimeoutExpired):
                    os.killpg(process.pid, how)
                    process.wait(grace)  # a moment to clean up
            process.wait()
            _known.discard(process.pid)
        if late and stop.is_set():
            raise Stopping
        out.seek(0)
        err.seek(0)
        printed = out.read().decode("utf-8", "surrogateescape")
        return Finished(process.returncode, printed, err.read().decode("utf-8", "replace"), late)


def strays() -> set[int]:
    """What has come to this process from children that have ended: their sessions are neither its own nor known."""
    me = os.getpid()
    with _starting:
        table, mine = process_table(), _known | {me}
    sessions = {os.getsid(0), *mine}
    tops = {pid for pid, (parent, session) in table.items() if parent == me and session not in sessions}
    return descendants(table, tops - mine)


def hidden_paths(config: Config) -> set[Path]:
    """What no agent may read: all that the runner keeps, where its secrets are, and other ways into GitHub."""
    credentials = (user_home() / name for name in CREDENTIALS)
    own = (config.state_dir, config.token_file, config.app_key_file, config.audit_log)
    paths = {*own, *Path.cwd().glob(".env*"), *credentials}
    return {form for path in paths if path and path.exists() for form in (path.absolute(), path.resolve())}


def supervisor() -> str:
    """The program of a supervisor. Each of its lines has the number that it has in this file."""
    before, heading, rest = Path(__file__).read_text("utf-8").partition("\n# -- The supervisor: ")
    imports = f"from __future__ import annotations; import {SUPERVISOR_IMPORTS}; from typing import NamedTuple"
    blank_lines = [""] * before.count("\n")
    return "\n".join([imports, *blank_lines, heading.strip() + rest.partition("\n# -- ")[0], "supervise()"])


# Read when the runner starts: should the file be replaced while it runs, both sides still fit.
SUPERVISOR = supervisor()
SUPERVISOR_PYTHON = [sys.executable, "-S", "-P"]  # no packages, nothing from the current folder
SUPERVISOR_START = "import json, sys; exec(compile(json.loads(sys.stdin.readline()), sys.argv[1], 'exec'))"


def run_supervised(config: Config, order: Order, stop: threading.Event | None = None) -> Finished:
    """Runs an agent: how it ended, with the end of what it printed. When this returns, all that it started has ended.
    Raises TaskFailed if it cannot be started, or Stopping."""
    env = {name: value for name, value in config.env.items() if SUPERVISOR_INHERITS.fullmatch(name)}
    told = "".join(f"{json.dumps(part)}\n" for part in (SUPERVISOR, order._replace(stdin="")._asdict())).encode()
    (lifeline, held), timeout = os.pipe(), order.timeout + SUPERVISOR_GRACE
    try:
        with tempfile.TemporaryFile() as feed:
            feed.write(order.stdin.encode("utf-8", "replace"))
            feed.seek(0)
            fds = (lifeline, feed.fileno())
            command = [*SUPERVISOR_PYTHON, "-c", SUPERVISOR_START, __file__, "supervisor", *map(str, fds)]
            done = run_process(command, Path("/"), env, timeout, told, stop, SUPERVISOR_GRACE, fds)
    finally:
        os.close(lifeline)
        os.close(held)
        if left := end_processes(strays):  # of a supervisor that was killed
            log.error("processes of an agent cannot be ended: %s", ", ".join(map(str, sorted(left))))
    if done.code or done.late:
        how = "was killed" if done.code < 0 else "failed"
        raise TaskFailed(f"The agent's supervisor {how}.", output=done.err)
    finished = Finished(*json.loads(done.out))
    if finished.err:
        advice = "A long instruction is better read from standard input or $AGENT_TASK_FILE."
        raise TaskFailed(f"The agent cannot be started: {finished.err}.", advice)
    return finished


# -- Git and the workspace: the only place that runs git. ------------------------------------------
#
# Three repositories per task: the private bare mirror of the target, shared by all its tasks; one
# of the task's own, which the runner commits with; and the agent's throw-away `.git`, which borrows
# the mirror's history, knows no remote, and is never read again.

GIT_SETTINGS = {
    "checkout.workers": "4",  # ext4 is slow to make files where many were deleted a short time ago
    "checkout.thresholdForParallelism": "1000",
    "core.hooksPath": "/dev/null",
    "core.fsmonitor": "false",
    "core.protectHFS": "true",  # no names that are `.git` on a Mac
    "core.protectNTFS": "true",  # or on Windows
    "core.quotePath": "false",
    "gc.auto": "0",
    "http.followRedirects": "false",
    "http.lowSpeedLimit": "1000",
    "http.lowSpeedTime": "60",
    "protocol.allow": "never",
    "safe.directory": "*",  # a volume may belong to another user; what is there is the runner's
}
GIT_ENV = {
    "HOME": "/nonexistent",  # no ~/.netrc, no ~/.config/git
    "LC_ALL": "C",  # its messages are read
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_ATTR_NOSYSTEM": "1",
}
CHECKOUT_CONFIG = "[core]\nrepositoryformatversion = 0\nbare = false\n[user]\nname = agent\nemail = agent@localhost\n"
NETWORK = re.compile(  # variables that say how to reach a server, for requests and for git
    r"SSL_CERT_(FILE|DIR)|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE|GIT_SSL_CAINFO|(https?|all|no)_proxy", re.IGNORECASE
)
GIT_INHERITS = re.compile(rf"PATH|TMPDIR|{NETWORK.pattern}", re.IGNORECASE)


class Git:
    """Runs git with no configuration but the runner's. The token is only where it is needed, in that one process's
    environment: never in an argument, an address or a file.
    https://git-scm.com/docs/git-config#Documentation/git-config.txt-GITCONFIGCOUNT"""

    def __init__(self, sign_in: SignIn, stop: threading.Event | None = None) -> None:
        self._sign_in, self._config, self.stop = sign_in, sign_in.config, stop or threading.Event()
        env = {k: v for k, v in self._config.env.items() if GIT_INHERITS.fullmatch(k)}
        env = {k.lower(): v for k, v in env.items() if k.endswith("_PROXY")} | env  # git knows small letters best
        bundle = env.get("REQUESTS_CA_BUNDLE") or env.get("CURL_CA_BUNDLE") or ""  # which git does not know
        kind = "GIT_SSL_CAPATH" if os.path.isdir(bundle) else "GIT_SSL_CAINFO"
        self._env = ({kind: bundle} if bundle else {}) | env | GIT_ENV

    def url(self, repo: str) -> str:
        return f"{self._config.server_url}/{repo}.git"

    def __call__(
        self, *command: str, git_dir: Path, work_tree: Path | None = None, stdin: bytes = b"",
        remote: str = "", env: Mapping[str, str] | None = None, timeout: float = GIT_TIMEOUT
    ) -> str:  # fmt: skip
        """What one git command prints; it has a token if it speaks to a `remote` repository, which it names. Raises
        GitFailed or, with `remote`, what that means for the task."""
        tokens: list[str] = []
        while True:
            tokens.append(self._sign_in.token(remote, push=True) if remote else "")
            try:
                place = {**self._place(git_dir, work_tree, tokens[-1]), **(env or {})}
                done = run_process(["git", *command], work_tree or git_dir, place, timeout, stdin, self.stop)
            except OSError as error:
                raise GitFailed(f"git does not start: {error}", output=str(error)) from error
            if not (done.code or done.late):
                break
            said = [done.err.strip(), encodable(done.out).strip(), done.late]
            output = "\n".join(filter(None, said)) or f"status {done.code}"
            failure = GitFailed(f"git {command[0]} failed: {output}", output=output)
            if not remote:
                raise failure
            status = 401 if UNAUTHORISED.search(output) else 404 if FORBIDDEN.search(output) else 0
            if not (status and self._sign_in.forgives(tokens, status, self.stop)):
                raise remote_failure(failure, remote)
        self._sign_in.worked(tokens[-1])
        return done.out

    def _place(self, git_dir: Path, work_tree: Path | None, token: str) -> dict[str, str]:
        """The environment of one git process."""
        settings, server = dict(GIT_SETTINGS), self._config.server_url
        if token:
            settings[f"http.{server}/.extraHeader"] = f"Authorization: Basic {git_login(token)}"
            settings[f"protocol.{urlsplit(server).scheme}.allow"] = "always"
        place = self._env | {"GIT_DIR": str(git_dir), "GIT_CONFIG_COUNT": str(len(settings))}
        for index, (key, value) in enumerate(settings.items()):
            place |= {f"GIT_CONFIG_KEY_{index}": key, f"GIT_CONFIG_VALUE_{index}": value}
        if work_tree:
            place |= {"GIT_WORK_TREE": str(work_tree), "GIT_INDEX_FILE": str(git_dir / "index")}
        return place

    def refs(self, repo: str, *names: str) -> tuple[str, dict[str, str]]:
        """A remote repository's default branch, and the commits of those of these refs that are there."""
        printed = self("ls-remote", "--symref", self.url(repo), *names, git_dir=Path("/"), remote=repo)
        default = re.search(r"^ref: refs/heads/(.+)\tHEAD$", printed, re.MULTILINE)
        rows = (line.partition("\t") for line in printed.splitlines())
        return default[1] if default else "", {name: value for value, _, name in rows if name in names}

    def push(
        self, repo: str, moves: Mapping[str, tuple[str, str]], git_dir: Path, timeout: float = GIT_TIMEOUT
    ) -> None:
        """Moves refs of a remote repository, each from one commit to another, all or none; "" is "not there". If the
        answer was lost, it looks what has become of them. Raises RefMoved for the first that is elsewhere.
        https://git-scm.com/docs/git-push#Documentation/git-push.txt---force-with-leaseltrefnamegtltexpectgt"""
        leases = [f"--force-with-lease={ref}:{old}" for ref, (old, _) in moves.items()]
        command = ["push", "--porcelain", "--atomic", *leases, self.url(repo)]
        command += [f"{new}:{ref}" for ref, (_, new) in moves.items()]
        with audited(self._config, "push", repo=repo, refs=moves):
            try:
                self(*command, git_dir=git_dir, remote=repo, timeout=timeout)
            except RunnerError:
                there = self.refs(repo, *moves)[1]
                if all(there.get(ref, "") == new for ref, (_, new) in moves.items()):
                    return
                for ref, (old, _) in moves.items():
                    if there.get(ref, "") != old:
                        raise RefMoved(repo, ref, there.get(ref, "")) from None
                raise


UNAUTHORISED = re.compile("could not read username|authentication failed|returned error: 401", re.IGNORECASE)
FORBIDDEN = re.compile("not found|returned error: 40[34]", re.IGNORECASE)
REMOTE_FAILURES = {  # what git says: what it means, and what to do
    r"without `workflows?` (scope|permission)": ("does not let this token push workflows.", ADVICE[403]),
    r"returned error: 30\d|from redirection": ("has moved.", "Use its new name."),
    f"{UNAUTHORISED.pattern}|{FORBIDDEN.pattern}": (
        "cannot be read or pushed to: it does not exist, or the token may not.",
        f"{ADVICE[404]} README.md lists the permissions.",
    ),
    r"(hook|push) declined|error: GH\d{3}:|hidden ref|funny refname": (
        "refuses the push.",
        "See its rules; if it refuses the claims, the runner's owner can set AGENT_CLAIM_REFS=refs/heads/agent-claims.",
    ),
}
BROKEN = re.compile(  # what git says of a repository on this machine that has lost something
    r"^(error|fatal): (not a git repository|bad (object|tree|config)|object file|inflate|unable to (unpack|read) |pack"
    r"|loose object|file \S+ is far|index file|could not read [0-9a-f]{40}|missing |invalid obj|\S+ did not send all)",
    re.MULTILINE | re.IGNORECASE,
)


def remote_failure(failure: GitFailed, repo: str) -> RunnerError:
    """What git's words about a remote mean for the task at hand."""
    if BROKEN.search(failure.output):
        return failure
    for pattern, (what, advice) in REMOTE_FAILURES.items():
        if re.search(pattern, failure.output, re.IGNORECASE):
            return TaskFailed(f"{repo} {what}", advice, failure.output)
    lines = failure.output.splitlines()
    if rejected := next((line for line in lines if "rejected]" in line), ""):
        return Unreachable(f"{repo} does not take the push now: {rejected}")
    said = next((line for line in lines if line.startswith(("fatal: ", "error: "))), lines[-1])
    return Unreachable(f"git cannot reach {repo}: {said}")


def lock_file(path: Path, how: int = fcntl.LOCK_EX) -> IO[str] | None:
    """The file, open and locked, or None if somebody else has locked it. The lock ends with the file or the process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a")
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(file, how | fcntl.LOCK_NB)
        return file
    file.close()
    return None


def walk(
    *folders: Path, without: str = "", missed: Callable[[OSError], None] = log.debug
) -> Iterator[os.DirEntry[str]]:
    """All that folders hold, however deep, unlike `os.walk`. Enters no links, and no folders of the name `without`."""
    pending = list(map(str, folders))
    while pending:
        try:
            with os.scandir(pending.pop()) as found:
                entries = list(found)
        except OSError as error:
            missed(error)
            continue
        for entry in entries:
            yield entry
            if entry.name != without and entry.is_dir(follow_symlinks=False):
                pending.append(entry.path)


def remove_tree(folder: Path) -> None:
    """Deletes a folder, also what an agent made unreadable, or deeper than Python can go."""
    if folder.is_symlink():
        folder.unlink()
    inside = (entry.path for entry in walk(folder) if entry.is_dir(follow_symlinks=False))
    for path in itertools.chain([str(folder)], inside):  # what is made readable is walked next
        with contextlib.suppress(OSError):
            os.chmod(path, stat.S_IRWXU)
    with contextlib.suppress(RecursionError):
        shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        run_process(["rm", "-rf", "--", str(folder)], Path("/"), {"PATH": os.defpath}, GIT_TIMEOUT)


def take_folder(work: Path) -> tuple[Path, IO[str]]:
    """An empty folder for this process alone, `0` for the first one, and its lock; deletes what dead processes left."""
    mine = next(filter(None, (lock_file(work / f"{number}.lock") for number in itertools.count())))
    folder = Path(mine.name).with_suffix("")
    remove_tree(folder)
    for other in work.glob("*.lock"):
        if unused := lock_file(other):
            with unused:
                remove_tree(other.with_suffix(""))
    return folder, mine


def disk_usage(*folders: Path) -> int:
    """Bytes that folders take up."""
    used = 0
    for entry in walk(*folders):
        with contextlib.suppress(OSError):  # deleted meanwhile
            used += entry.stat(follow_symlinks=False).st_blocks * 512
    return used


def write_repository(
    path: Path, lenders: Sequence[Path] = (), branch: str = "none", commit: str = "", ignore: Sequence[str] = ()
) -> None:
    """What `git init` would make, with other repositories' objects lent: https://git-scm.com/docs/gitrepository-layout"""
    for folder in ("objects/info", "objects/pack", "refs/heads", "info"):
        (path / folder).mkdir(parents=True, exist_ok=True)
    (path / "HEAD").write_text(f"ref: refs/heads/{branch}\n")
    (path / "config").write_text(CHECKOUT_CONFIG)
    (path / "objects/info/alternates").write_text("".join(f"{lender / 'objects'}\n" for lender in lenders))
    if commit:
        (path / "refs/heads" / branch).parent.mkdir(parents=True, exist_ok=True)
        (path / "refs/heads" / branch).write_text(f"{commit}\n")
    (path / "info/exclude").write_text("".join(f"{pattern}\n" for pattern in ignore), "utf-8")
    # Files come and go byte for byte: what the target's .gitattributes say would change some that nobody touched.
    (path / "info/attributes").write_text("* -text !eol -ident -filter !working-tree-encoding\n")


class Mirror:
    """A private bare copy of a target repository, shared by its tasks, also of other processes. It has the whole
    history, files included: an agent may want to look at any of it, and has no token to fetch with."""

    def __init__(self, git: Git, config: Config, repo: str) -> None:
        self._git, self._config, self._repo = git, config, repo
        self._mended = False
        self.path = config.state_dir / "repos" / f"{repo.lower()}.git"

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        """While it is in use, nobody deletes it. Others are deleted, the longest unused first, until all is within
        AGENT_DISK_BUDGET_MB; raises TaskRetry if that does not do."""
        with self._locked(".use", fcntl.LOCK_SH) as self._use:
            os.utime(self._use.fileno())
            folders = [self._config.state_dir / name for name in ("repos", "work")]
            others = sorted(folders[0].glob("*/*.use"), key=lambda path: path.stat().st_mtime)
            while (used := disk_usage(*folders)) > self._config.disk_budget * 10**6:
                if not others:
                    why = f"The runner's folder holds {used / 10**6:,.0f} MB; AGENT_DISK_BUDGET_MB allows fewer."
                    raise TaskRetry(why)
                if unused := lock_file(other := others.pop(0)):
                    with unused:
                        shutil.rmtree(other.with_suffix(".git"), ignore_errors=True)
            yield

    def sound(self, step: Callable[[], T]) -> T:
        """Takes a step that reads the mirror. One that git cannot work with is made anew, once."""
        try:
            return step()
        except GitFailed as failure:
            if self._mended:
                raise TaskFailed(f"git cannot work with {self._repo}.", output=failure.output) from None
            self._mended = True
            with contextlib.suppress(BlockingIOError):  # another task has use of it
                fcntl.flock(self._use, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(self.path, ignore_errors=True)
            fcntl.flock(self._use, fcntl.LOCK_SH)
            raise Unreachable(f"the copy of {self._repo} is made anew, for git says: {failure.output}") from None

    def fetch(self, ref: str, commit: str, own: str = "") -> str:
        """The commit of one of the target's refs, brought into the mirror unless it is `commit` there. The mirror's own
        name for a ref is flat: a branch `a` that was deleted upstream must not stand in the way of a branch `a/b`."""
        own = f"refs/mirror/{own or hashlib.sha256(ref.encode()).hexdigest()[:32]}"
        read = ("rev-parse", "--verify", "--quiet", own)
        with contextlib.suppress(GitFailed, OSError):
            if self._git(*read, git_dir=self.path).strip() == commit:
                return commit
        with self._locked(".lock"):
            if not (self.path / "info/attributes").exists():  # what is written last
                write_repository(self.path)
            for stale in (*self.path.glob("refs/mirror/*.lock"), *self.path.glob("objects/pack/tmp_*")):
                stale.unlink()  # of a git that was killed
            command = ("fetch", "--quiet", "--no-tags", "--no-write-fetch-head", "--force", self._git.url(self._repo))
            self._git(*command, f"{ref}:{own}", git_dir=self.path, remote=self._repo)
            with contextlib.suppress(GitFailed):
                self._git("-c", "gc.auto=6700", "-c", "gc.autoDetach=false", "gc", "--auto", "-q", git_dir=self.path)
        return self._git(*read, git_dir=self.path).strip()

    @contextlib.contextmanager
    def _locked(self, suffix: str, how: int = fcntl.LOCK_EX) -> Iterator[IO[str]]:
        """Waits for a lock file: threads and processes may share the state folder."""
        while not (held := lock_file(self.path.with_suffix(suffix), how)):
            if self._git.stop.wait(0.05):
                raise Stopping
        with held:
            yield held


def diffstat(git: Git, git_dir: Path, base: str, commit: str) -> str:
    """What a commit changed since it left the base, as `git diff --stat` shows it."""
    options = ("--stat=100", "--stat-count=60", "--no-color", "--no-ext-diff")
    return encodable(git("diff", *options, f"{base}...{commit}", "--", git_dir=git_dir))


@dataclass(frozen=True)
class Workspace:
    """Where `process_task` works: the files of `base` at `commit`, at `path`. Its `.git` is a throw-away."""

    path: Path
    base: str
    commit: str


GIT_READS = (".gitignore", ".gitattributes", ".gitmodules")  # also before it adds them
WORKFLOWS = re.compile(r"\.github(/workflows(/.*)?)?", re.IGNORECASE | re.DOTALL)  # or a file or link in their place


def refuse_more_than_allowed(count: int, size: int, config: Config) -> None:
    """Raises Refused for a change of too many files or bytes."""
    smaller = "Ask for a smaller change, or let the runner's owner raise the limit."
    if count > config.max_changed_files:
        raise Refused(f"{count:,} files were changed; AGENT_MAX_CHANGED_FILES allows fewer.", smaller)
    if size > config.max_changed_bytes:
        raise Refused(f"The changed files hold {size:,} bytes; AGENT_MAX_CHANGED_BYTES allows fewer.", smaller)


def is_small_file(path: str) -> bool:
    """Whether git, which reads it as a whole, also through a link, finds a file of 10 MB at most, or none."""
    with contextlib.suppress(OSError):
        found = os.stat(path)
        return stat.S_ISDIR(found.st_mode) or (stat.S_ISREG(found.st_mode) and found.st_size <= 10**7)
    return True


def leads_out(top: Path, link: str) -> bool:
    """Whether a link leads out of the files below `top`, or to a `.git`: as it reads, or as the system follows it."""
    target = os.readlink(top / link)
    reads = os.path.normpath(os.path.join(os.path.dirname(link), target))
    leads = os.path.relpath(os.path.realpath(top / link), os.path.realpath(top))
    return os.path.isabs(target) or not {"..", ".git"}.isdisjoint(f"{reads}/{leads}".lower().split("/"))


class Checkout:
    """One task's folder: the agent's workspace, and the repository that the runner commits with. `lenders` are the
    repositories whose objects it may use; the agent may use those of the first. New files that match `ignore` do not
    count."""

    def __init__(
        self, git: Git, lenders: Sequence[Path], folder: Path, base: str, commit: str, ignore: Sequence[str]
    ) -> None:
        self._git, self.lenders, self._ignore = git, lenders, ignore
        self.folder, self.git_dir = folder, folder / "git"
        self.workspace = Workspace(folder / "tree", base, commit)
        self._index, self._index_time = b"", 0
        self._settled: dict[str, str] = {}  # files of the commit that were changed before the agent began: their blobs
        self._leftovers = frozenset[str]()  # what was left out already then
        self._passed: set[str] = set()  # new files and folders that are not the agent's
        self._untouched: list[str] = []  # the objects of what is there and was not taken: `restore` may need them
        self._taken, self._pack = (b"", 0), ""  # the index of what was taken, with its time, and the objects

    def fill(self, branch: str) -> None:
        """Checks out the files; takes time with their number, not with the history's length."""
        remove_tree(self.folder)
        throw_away = self.workspace.path / ".git"
        write_repository(self.git_dir, self.lenders, ignore=self._ignore)
        write_repository(throw_away, self.lenders[:1], branch, self.workspace.commit, self._ignore)
        (self.folder / "tmp").mkdir()
        self.run("read-tree", "--reset", "-u", self.workspace.commit)
        shutil.copyfile(self.git_dir / "index", throw_away / "index")
        index = self.git_dir / "index"
        self._index, self._index_time = index.read_bytes(), index.stat().st_mtime_ns
        remove_tree(self.git_dir)  # until it is needed

    def _renew(self) -> None:
        """Makes the runner's repository anew, without what was written there meanwhile. The index keeps its time: files
        that are as old as it git compares by content."""
        remove_tree(self.git_dir)
        write_repository(self.git_dir, self.lenders, ignore=self._ignore)
        self._put_index(self._index, self._index_time)

    def _put_index(self, index: bytes, time_ns: int) -> None:
        (self.git_dir / "index").write_bytes(index)
        os.utime(self.git_dir / "index", ns=(time_ns, time_ns))

    def settle(self) -> None:
        """Has what was changed so far count as not the agent's: new files, and files of the commit as they are now."""
        self.pass_over(set())
        self.run("add", "--update", ".")
        self._settled = {path: row[3] for path, row in self._changes().items()}
        self._leftovers = frozenset(self._listed("--ignored"))

    def new_files(self) -> set[str]:
        """The files and folders that git does not know, less what it ignores."""
        self._begin()
        return {path[2:] for path in self._odd_files()} | {path.rstrip("/") for path in self._listed()}

    def pass_over(self, known: set[str]) -> None:
        """Leaves the new files and folders out of the change from now on, but for those that were known before."""
        self._passed |= self.new_files() - known

    def _counts(self, path: str) -> bool:
        """Whether a path is not passed over, by itself or with a folder above it."""
        parts = path.split("/")
        return not any("/".join(parts[:end]) in self._passed for end in range(1, len(parts) + 1))

    def ignored_files(self) -> list[str]:
        """What the agent has left and git ignores."""
        return sorted(set(self._listed("--ignored")) - self._leftovers)

    def _listed(self, *options: str) -> list[str]:
        listed = self.run("ls-files", "-z", "--others", "--exclude-standard", "--directory", *options)
        return listed.split("\0")[:-1]

    def _begin(self) -> None:
        if self.workspace.path.is_symlink():
            raise Refused("The workspace was replaced by a link.")
        self._renew()

    def apply(self, patch: str) -> None:
        """Changes the files as a patch says."""
        self._renew()
        self.run("apply", "--whitespace=nowarn", "-", stdin=patch.encode())

    def take(self, config: Config) -> str:
        """What has changed: a tree with it, or "" for nothing. Raises TaskFailed for what must not be published."""
        self._begin()
        try:
            self._refuse_odd_files({path: why for path, why in self._odd_files().items() if self._counts(path[2:])})
            gone, kept, new = self._touched(config)
            # `git add --all` would look at all files once more.
            self._update_index("--force-remove", "--stdin", rows=gone)
            self._update_index("--add", "--replace", "--stdin", rows=[*kept, *new])
            changes = self._changes()
            if skipped := [path for path in new if path not in changes]:
                raise GitFailed("git update-index failed", output=f"invalid path {skipped[0]!r}")
        except GitFailed as failure:
            raise TaskFailed("The changed files cannot be committed.", output=failure.output) from None
        index, self._untouched = self.git_dir / "index", []
        self._taken = index.read_bytes(), index.stat().st_mtime_ns
        if same := [path for path, row in changes.items() if self._settled.get(path) == row[3]]:
            self._untouched = [blob for path in same if (blob := changes[path][3]).strip("0")]
            self._update_index("--index-info", rows=[f"{changes[path][0]} {changes[path][2]}\t{path}" for path in same])
            changes = self._changes()
        self._check_changes(changes, config)
        self._refuse_secrets(changes, config)
        self._pack = ""
        return self.run("write-tree").strip() if changes else ""

    def _update_index(self, *how: str, rows: Sequence[str]) -> None:
        """Has git take paths, or what is to be in their place, into the index."""
        if rows:
            self.run("update-index", "-z", *how, stdin="\0".join([*rows, ""]).encode("utf-8", "surrogateescape"))

    def hold(self, tree: str) -> None:
        """Keeps what was taken in memory, where nothing that runs until it is published can change it."""
        objects = "\n".join([tree, *self._untouched, f"^{self.workspace.commit}", ""]).encode()
        self._pack = self.run("pack-objects", "--revs", "--stdout", "-q", stdin=objects)

    def _give_back(self) -> None:
        if self._pack:
            self._renew()
            self.run("unpack-objects", "-q", stdin=self._pack.encode("utf-8", "surrogateescape"))

    def restore(self) -> None:
        """Has the files be again as they were when they were taken and held."""
        self._give_back()
        self._put_index(*self._taken)
        self.run("checkout-index", "--force", "--all", "--quiet")

    def commit(self, tree: str, message: str, config: Config) -> str:
        """Commits what was taken."""
        self._give_back()
        who = {"NAME": config.commit_name, "EMAIL": config.commit_email}
        env = {f"GIT_{role}_{key}": who[key] for role in ("AUTHOR", "COMMITTER") for key in who}
        parent = ("-p", self.workspace.commit, "-F", "-")
        return self.run("commit-tree", tree, *parent, stdin=encodable(message).encode(), env=env).strip()

    def patch(self, tree: str) -> str:
        """What was taken, as a patch."""
        self._give_back()
        return self.run("diff", "--binary", "--no-color", "--no-ext-diff", self.workspace.commit, tree, "--")

    def _odd_files(self) -> dict[str, str]:
        """Before git looks: what would make it run programs or skip files, and why. Raises Refused for what would have
        it wait."""
        tree, odd = self.workspace.path, dict[str, str]()
        for entry in walk(tree, without=".git", missed=lambda e: odd.update({e.filename: "cannot be read"})):
            if entry.name == ".git" and os.path.dirname(entry.path) != str(tree):
                odd[os.path.dirname(entry.path)] = "is a git repository of its own, which cannot be committed"
            elif entry.name in GIT_READS and not is_small_file(entry.path):
                raise Refused(f"{code(os.path.relpath(entry.path, tree))} is not a file that git should read.")
            elif not (
                entry.is_file(follow_symlinks=False) or entry.is_dir(follow_symlinks=False) or entry.is_symlink()
            ):
                odd[entry.path] = "is a pipe, a socket or a device, which cannot be committed"
        return {f"./{os.path.relpath(path, tree)}": what for path, what in odd.items()}  # a name may begin with `:`

    def _ignored(self, paths: Collection[str]) -> set[str]:
        """Those of the paths, which begin with `./`, that git ignores."""
        names = "\0".join(paths).encode("utf-8", "surrogateescape")
        with contextlib.suppress(GitFailed):  # status 1: none of them
            return set(self.run("check-ignore", "-z", "--stdin", stdin=names).split("\0")) if paths else set()
        return set()

    def _refuse_odd_files(self, found: Mapping[str, str]) -> None:
        """What is ignored does not matter."""
        ignored = self._ignored(found)
        if refused := [path for path in found if path not in ignored]:
            raise Refused(f"{code(refused[0][2:])} {found[refused[0]]}.")

    def _touched(self, config: Config) -> tuple[list[str], list[str], list[str]]:
        """The files of the commit that are gone, those that may have changed, and the new ones, none of them read yet.
        Raises Refused for too much; what was only touched does not count."""
        with ThreadPoolExecutor(1) as beside:
            changed = beside.submit(self.run, "diff-files", "--raw", "-z", "--ignore-submodules=dirty")
            others = self.run("ls-files", "-z", "--others", "--exclude-standard").split("\0")[:-1]
        new, listed = list(filter(self._counts, others)), changed.result().split("\0")
        rows = {path: raw.split() for raw, path in zip(listed[::2], listed[1::2], strict=False) if self._counts(path)}
        before = self._sizes({path: row[2] for path, row in rows.items() if row[0] != ":160000"})
        count = size = 0
        for path in (*rows, *new):
            file, now = self.workspace.path / path, 0
            with contextlib.suppress(OSError):  # it is not there any more
                now = file.lstat().st_size
                if not file.is_symlink() and not os.access(file, os.R_OK):
                    raise Refused(f"{code(path)} cannot be read.")
            if before.get(path) != str(now):
                count, size = count + 1, size + now
        refuse_more_than_allowed(count, size, config)
        gone = [path for path, row in rows.items() if row[4] == "D"]
        return gone, [path for path in rows if rows[path][4] != "D"], new

    def _sizes(self, blobs: Mapping[str, str]) -> dict[str, str]:
        """How many bytes each of these objects has."""
        if not blobs:
            return {}
        told = self.run("cat-file", "--batch-check=%(objectsize)", stdin="\n".join(blobs.values()).encode())
        return dict(zip(blobs, told.split(), strict=True))

    def _changes(self) -> dict[str, list[str]]:
        """What has changed, by path: both modes, both objects and git's letter for how."""
        options = ("--cached", "--raw", "--no-renames", "--ignore-submodules=none", "-z")
        listed = self.run("diff-index", *options, self.workspace.commit).split("\0")
        return {path: raw[1:].split() for raw, path in zip(listed[::2], listed[1::2], strict=False)}

    def _check_changes(self, changes: Mapping[str, list[str]], config: Config) -> None:
        """Refuses what a pull request must not bring: too much, workflows, submodules, links that lead out."""
        files = [path for path, (_, mode, *_) in changes.items() if mode in ("100644", "100755")]
        top = self.workspace.path
        refuse_more_than_allowed(len(changes), sum((top / path).stat().st_size for path in files), config)
        for path, (old_mode, mode, *_) in changes.items():
            if WORKFLOWS.fullmatch(path) and not config.allow_workflows:
                advice = "The runner's owner can allow that with AGENT_ALLOW_WORKFLOWS."
                raise Refused(f"{code(path)} is a workflow; this runner may not change them.", advice)
            # A reviewer sees neither what a submodule brings, nor that another address brings something else.
            if "160000" in (old_mode, mode) or path.lower() == ".gitmodules":
                raise Refused(f"{code(path)} is or describes a submodule; this runner does not change them.")
            if mode == "120000" and leads_out(top, path):
                raise Refused(f"{code(path)} is a link that leads out of the repository.")

    def _refuse_secrets(self, changes: Mapping[str, list[str]], config: Config) -> None:
        """Refuses what brings one of the runner's secrets: in a file, its name or a link. All is searched at once: only
        if there is something git is asked for each file, and for what it was."""

        def whole(path: str, *blobs: str) -> bytes:
            held = self.run("cat-file", "--batch", stdin="\n".join(blobs).encode()) if blobs else ""
            return f"{path}\0{held}".encode("utf-8", "surrogateescape")

        if not config.finds_secret(whole("\0".join(changes), *(row[3] for row in changes.values()))):
            return
        for path, (_, _, old, new, how) in changes.items():
            if name := config.finds_secret(whole(path, new), b"" if how == "A" else whole(path, old)):
                where = "A file's name" if config.finds_secret(whole(path)) else code(path)
                advice = "The runner's owner should replace it if anybody else can have seen it."
                raise Refused(f"{where} holds the secret in {name}, which must not be published.", advice)

    def run(self, *command: str, **options: Any) -> str:
        """What git prints, with the runner's repository and the agent's files."""
        return self._git(*command, git_dir=self.git_dir, work_tree=self.workspace.path, **options)


# -- Claims: which of several runners has an issue. ------------------------------------------------
#
# A claim is a ref in the target repository. Git moves a ref only for who names the commit that it is
# at, so of several runners that want to move it one wins. Labels have no such thing. The commit's
# message is the claim's record: whose it is, and how often the task has been begun.


class Seen(NamedTuple):
    """An issue's claim as this runner sees it: the ref is at `commit` ("" if there is none) since at least `since`, on
    the monotonic clock. `record` is what it says, empty if it is not a runner's."""

    repo: str
    commit: str
    since: float
    record: Mapping[str, Any]


def write_record(git: Git, git_dir: Path, record: Mapping[str, Any], *parent: str) -> str:
    """A commit of nothing but a record."""
    who = {f"GIT_{role}_{key}": "agent-runner" for role in ("AUTHOR", "COMMITTER") for key in ("NAME", "EMAIL")}
    command = ("commit-tree", EMPTY_TREE, *parent)
    return git(*command, git_dir=git_dir, stdin=json.dumps(record).encode(), env=who).strip()


def read_record(text: str) -> dict[str, Any]:
    """A claim's record, or nothing if it is not one."""
    with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
        record = json.loads(text)
        if re.fullmatch(r"[0-9a-f]{16}", record["nonce"]) and record["epoch"] > 0 and record["attempt"] > 0:
            return dict(record)
    return {}


def claims_prefix(config: Config) -> str:
    """What the refs of this dispatch repository begin with; a repository's name may hold what a ref's must not."""
    name = re.sub(r"(?<=/)\.|\.\.|\.(?=lock\Z)", lambda dots: "%2e" * len(dots[0]), config.dispatch_repo.lower())
    return f"{config.claim_refs}/{name}/"


def read_claims(git: Git, config: Config, repo: str, folder: Path) -> dict[int, tuple[str, dict[str, Any]]]:
    """All claims in a repository, by issue: (commit, record). `ls-remote` would list all other refs too."""
    remove_tree(folder)
    write_repository(folder)
    command = ("fetch", "--quiet", "--no-tags", "--no-write-fetch-head", git.url(repo))
    refs = f"{claims_prefix(config)}*:refs/claims/*"
    git(*command, refs, git_dir=folder, remote=repo, timeout=CLAIM_TIMEOUT)
    form = "--format=%(refname:lstrip=2) %(objectname) %(contents:subject)"
    rows = [line.split(" ", 2) for line in git("for-each-ref", form, "refs/claims", git_dir=folder).splitlines()]
    return {int(number): (commit, read_record(text)) for number, commit, text in rows if number.isdecimal()}


class Claim:
    """The hold on one issue. It is renewed three times in each AGENT_LEASE, and lost if that did not work for two
    thirds of one: then `halt` is set, and nothing more may be written. `nonce` names the run that began with the first
    claim and goes on with whoever takes it over; `epoch` counts the holders, `attempt` the attempts."""

    def __init__(self, runner: Runner, number: int, seen: Seen, body: str, halt: threading.Event) -> None:
        self._config, self._clock, self._runner = runner.config, runner.clock, runner
        self._body, self._halt = body, halt
        self.repo, self._ref, self._commit = seen.repo, f"{claims_prefix(runner.config)}{number}", seen.commit
        self.path = runner.folder / str(number) / "claim"
        self.nonce = str(seen.record.get("nonce") or secrets.token_hex(8))
        self.epoch, self.attempt = seen.record.get("epoch", 0) + 1, seen.record.get("attempt", 0) + 1
        self.held, self.lost, self._renewed = False, "", 0.0
        self._made: set[str] = set()  # the commits that were to be pushed
        self._moving, self._over = threading.Lock(), threading.Event()

    def take(self) -> bool:
        """Gets hold of the issue; False if somebody else was faster, or its holder has stirred."""
        try:
            self._move(self._record())
        except RefMoved:
            return False
        self.held = True
        keep = functools.partial(contextvars.copy_context().run, self._keep)
        threading.Thread(target=keep, name=f"claim-{self._ref}", daemon=True).start()
        return True

    @property
    def age(self) -> float:
        """Seconds since it was renewed."""
        return self._clock.monotonic() - self._renewed

    def check(self) -> None:
        """Raises ClaimLost if the issue may be another runner's by now."""
        if not self.lost and (late := self.age) > self._config.lease * 2 / 3:
            self._lose(f"it was not renewed for {duration(late)}")
        if self.lost:
            raise ClaimLost(self.lost)

    def renew(self, branch: Mapping[str, tuple[str, str]] | None = None, git_dir: Path | None = None) -> None:
        """Moves the claim on and, to publish, a `branch` with it. Git does both or neither: who has lost the claim
        cannot publish. A publication is not cut short, so that what is told of it is true."""
        with self._moving:
            if branch:
                self._move(self._record(), branch, git_dir)
            elif not self._over.is_set():
                self._move(self._record(), patience=0, timeout=min(CLAIM_TIMEOUT, self._config.lease / 3))

    def release(self) -> None:
        """Lets go of the issue. What fails here heals: a claim that nobody renews is taken over."""
        self._over.set()
        try:
            with self._moving:
                if self.held and not self.lost:
                    self._move("", patience=8, timeout=CLAIM_TIMEOUT)
        except RunnerError as error:
            log.warning("%s is not released: %s", self._ref, error)
        self.close()

    def close(self) -> None:
        """Ends the renewals, and deletes what is on the disk."""
        self._over.set()
        self.held = False
        remove_tree(self.path.parent)

    def _keep(self) -> None:
        """Renews the claim until it is over; in a thread of its own."""
        pause = self._config.lease / 3
        while not self._clock.wait(self._over, pause) and not self.lost:
            try:
                self.renew()
                pause = self._config.lease / 3
            except RunnerError as error:
                log.warning("%s is not renewed: %s", self._ref, error)
                pause = self._config.lease / 20

    def _move(
        self, new: str, branch: Mapping[str, tuple[str, str]] | None = None, git_dir: Path | None = None,
        patience: float = PATIENCE, timeout: float = GIT_TIMEOUT
    ) -> None:  # fmt: skip
        """Moves the ref to a commit, and a branch with it. Raises ClaimLost, or RefMoved if it is not ours."""
        git = Git(self._runner.sign_in, None if self.held else self._halt)

        def step() -> None:
            if self.held:
                self.check()
            begun, moves = self._clock.monotonic(), {self._ref: (self._commit, new), **(branch or {})}
            try:
                git.push(self.repo, moves, git_dir or self.path, timeout)
            except RefMoved as moved:
                if moved.ref != self._ref or not self.held:
                    raise
                if moved.at not in self._made:
                    self._lose("another runner has it")
                    self.check()
                self._commit = moved.at  # an earlier push got through, and its answer did not
                raise Unreachable(f"{self._ref} was renewed late") from None
            self._commit, self._renewed = new, begun

        self._made.add(new)
        patiently(step, self._clock, self._runner.stop if new else threading.Event(), patience)

    def _record(self) -> str:
        """A commit with what is to be known of the claim. A child of the last one, so that it is another each time."""
        record = {"runner": self._runner.id, "nonce": self.nonce, "epoch": self.epoch, "attempt": self.attempt}
        record |= {"time": utc(self._clock.now()), "body": self._body}
        write_repository(self.path)  # as it was, whatever has been written there meanwhile
        parent = ("-p", self._commit) if self.held else ()
        return write_record(Git(self._runner.sign_in), self.path, record, *parent)

    def _lose(self, why: str) -> None:
        self.lost = self.lost or why
        self._halt.set()


# -- process_task: what changes the files. Three are built in; anything else is a plug-in. ---------


class Work(NamedTuple):
    """What one attempt has to work with. `stop` ends it early, and so does `ends`, on this machine's clock. What the
    agent uses up is counted in `used`, what it prints goes to `log_file`."""

    task: Task
    checkout: Checkout
    config: Config
    stop: threading.Event
    clock: Clock
    used: Counter[str]
    log_file: Path
    ends: float = math.inf

    @property
    def prompt(self) -> str:
        return render_prompt(self.task, self.checkout.workspace.base, self.config.prompt)

    @property
    def prompt_file(self) -> Path:
        return self.checkout.folder / "task.md"

    @property
    def summary_file(self) -> Path:
        return self.checkout.folder / "tmp" / "summary.md"

    def time_left(self) -> float:
        """Seconds that the agent still has. Raises TaskFailed if there are none."""
        if (left := self.ends - time.monotonic()) <= 0:
            raise early_end(Finished(0, "", "", "timeout"), self.config)
        return left


def process_task(work: Work) -> tuple[str, str]:
    """Changes the files as AGENT_PROCESS_TASK says: (summary, output). Raises TaskFailed, TaskRetry or Stopping."""
    built_in = {"patch": process_patch, "command": process_command, "openai": process_openai}
    return built_in.get(work.config.process_task, process_plugin)(work)


def run_setup(work: Work) -> None:
    """Runs AGENT_SETUP_COMMAND, and has what it leaves count as not the agent's. What it lacks may be there the next
    time: so raises TaskRetry."""
    config = work.config
    done = run_script(work, config.setup_command, config.setup_timeout, work.log_file)
    if done.code or done.late:
        advice = "The agent was not started. The runner's owner should look at AGENT_SETUP_COMMAND."
        raise TaskRetry(f"The setup command {how_ended(done, config.setup_timeout)}.", advice, done.out)
    with readable_after("setup command"):
        work.checkout.settle()


@contextlib.contextmanager
def readable_after(what: str) -> Iterator[None]:
    """Raises TaskFailed if a script has left a workspace that git cannot read."""
    try:
        yield
    except (GitFailed, OSError) as failure:
        why = f"The {what} left a workspace that git cannot read."
        raise TaskFailed(why, output=getattr(failure, "output", "") or str(failure)) from None


def nothing_changed(work: Work, output: str) -> TaskFailed:
    """What is told of an agent that changed nothing, or only what git ignores."""
    left = ", ".join(map(code, work.checkout.ignored_files()[:3]))
    what = f"It only left {left}, which git ignores here. " if left else ""
    hint = "What it printed last may say why. " if output.strip() else ""
    advice = f"{what}{hint}If there is something to change, say more precisely what and where."
    return TaskFailed("The agent changed nothing.", advice, output)


def failed_checks(work: Work, tree: str) -> TaskFailed | None:
    """Runs AGENT_VERIFY_COMMAND: why the change, which was taken as a tree, is not good, if it is not."""
    work.checkout.hold(tree)
    config, known = work.config, work.checkout.new_files()
    done = run_script(work, config.verify_command, config.verify_timeout, work.log_file)
    work.used["checks"] += 1
    if not done.code and not done.late:
        work.used["passed"] = 1
        return None
    with readable_after("checks"):
        work.checkout.pass_over(known)
        work.checkout.restore()
    advice = "The end of their output is below. Ask for less at a time, or say more precisely what is wanted."
    return TaskFailed(
        f"The checks failed: {code(config.verify_command)} {how_ended(done, config.verify_timeout)}.", advice, done.out
    )


def describe_use(work: Work) -> dict[str, str]:
    """Rows for the details: the agent, and what it has used up."""
    used, config, rows = work.used, work.config, dict[str, str]()
    if work.task.agent:
        rows["Agent"] = code(work.task.agent)
    if used["steps"]:
        rows |= {"Model": code(config.model), "Steps": str(used["steps"])}
        rows["Tokens"] = f"{used['input']:,} in ({used['cached']:,} of them cached), {used['output']:,} out"
    if used["steps"] and max(config.price_input, config.price_output) >= 0:
        fresh, cached = max(0.0, config.price_input), config.price_cached
        cost = (used["input"] - used["cached"]) * fresh + used["cached"] * (cached if cached >= 0 else fresh)
        rows["Cost"] = f"{(cost + used['output'] * max(0.0, config.price_output)) / 10**6:.4f}"
    if used["checks"]:
        rows["Checks"] = (
            f"{code(config.verify_command)} {'passed' if used['passed'] else 'failed'}, round {used['checks']}"
        )
    return rows


def process_patch(work: Work) -> tuple[str, str]:
    """Applies the instruction's ```diff and ```patch blocks, all of them or none."""
    fences = [fence for fence in FENCE.finditer(work.task.instruction) if fence["close"] is not None]
    patches = [fence["inside"] for fence in fences if fence["language"].lower() in ("diff", "patch")]
    if not patches:
        why = "The instruction holds no ```diff or ```patch block, and this runner applies patches."
        raise TaskFailed(why, "Add one, or let the runner's owner set AGENT_COMMAND to a coding agent.")
    try:
        work.checkout.apply("".join(patches))
    except GitFailed as failure:
        advice = f"Make it against the newest commit of {code(work.checkout.workspace.base)}."
        raise TaskFailed("The patch does not apply.", advice, failure.output) from None
    return "", ""


COMMAND_HOLE = re.compile(r"\{(instruction|instruction_file|summary_file)\}")


def command_words(config: Config, values: Mapping[str, str]) -> list[str]:
    """AGENT_COMMAND as arguments; raises ValueError("..."). The program is never looked for in the workspace."""
    if not config.command:
        raise ValueError("is not set, and AGENT_PROCESS_TASK is command")
    if config.shell and (hole := COMMAND_HOLE.search(config.command)):
        why = f"must not hold {hole[0]} with AGENT_SHELL, for the shell would run what the issue says"
        raise ValueError(f'{why}: let it read standard input, "$AGENT_TASK_FILE" and "$AGENT_SUMMARY_FILE"')
    if config.shell:
        return ["/bin/sh", "-c", config.command]
    try:
        words = shlex.split(config.command)
    except ValueError as error:
        raise ValueError(f"cannot be split into words: {error}") from None
    if not (program := shutil.which(words[0], path=config.env.get("PATH"))):
        raise ValueError(f"names the program {words[0]!r}, which is not on the PATH")
    filled = [COMMAND_HOLE.sub(lambda hole: values.get(hole[1], ""), word) for word in words[1:]]
    return [str(Path(program).absolute()), *filled]


def allowed_environment(config: Config) -> dict[str, str]:
    """All that an agent sees of the runner's environment: an allow-list, so never the token."""
    return {name: config.env[name] for name in ("PATH", "LANG", "TERM", *config.agent_env) if name in config.env}


def make_order(
    config: Config, command: Sequence[str], cwd: Path, env: Mapping[str, str], stdin: str = "",
    log_file: Path = NOWHERE, write: Sequence[Path] = (), read: Sequence[Path] = (), timeout: float = 60,
    stall: float = 0
) -> Order:  # fmt: skip
    """What a supervisor is told; an agent may always write to its HOME."""
    return Order(
        command=command,
        cwd=str(cwd),
        env={**allowed_environment(config), "HOME": str(config.home), **env},
        stdin=stdin,
        log=str(log_file),
        timeout=timeout,
        stall=stall,
        disk=config.disk_budget * 10**6,
        memory=config.max_memory * 10**6,
        landlock=config.sandbox != "off" and landlock_version() > 0,
        write=[str(path) for path in (config.home, *write)],
        read=[str(path) for path in read],
        hide=sorted(map(str, hidden_paths(config))),
    )


def new_log(config: Config, name: str) -> Path:
    """A file for what is to be kept of a task; deletes the one of an earlier run, and the oldest of all."""

    def age(path: Path) -> float:
        with contextlib.suppress(FileNotFoundError):  # another task was quicker
            return path.stat().st_mtime
        return 0.0

    file = config.state_dir / "logs" / name
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    for old in sorted(file.parent.iterdir(), key=age)[: -LOGS_KEPT + 1]:
        old.unlink(missing_ok=True)
    return file


def last_line(config: Config, file: Path) -> str:
    """The last whole line that an agent has printed so far, without secrets: "" if there is none yet."""
    with contextlib.suppress(OSError), file.open("rb") as output:
        begin = max(0, output.seek(0, os.SEEK_END) - LIVE_KEPT)
        output.seek(begin)
        # Neither the first nor the last piece may be whole, and half a secret cannot be known as one.
        pieces = re.split(r"[\r\n]", output.read().decode("utf-8", "replace"))[1 if begin else 0 : -1]
        lines = (" ".join(printable(config.masked(piece)).split()) for piece in reversed(pieces))
        return next(filter(None, lines), "")[:200]
    return ""


def run_in_workspace(
    work: Work, command: Sequence[str], timeout: float, stdin: str = "", log_file: Path = NOWHERE, stall: float = 0
) -> Finished:
    """Runs what must be kept within walls: how it ended, without secrets. Raises TaskFailed or Stopping."""
    task, config, place, folder = work.task, work.config, work.checkout.workspace, work.checkout.folder
    config.home.mkdir(parents=True, exist_ok=True)
    work.prompt_file.write_text(work.prompt + "\n", "utf-8")
    about = (task.task_id, work.prompt_file, task.title, task.url, task.attempt, place.base, work.summary_file)
    env = {**dict(zip(AGENT_SIDE, map(encodable, about), strict=True)), "TMPDIR": str(folder / "tmp")}
    readable = [work.prompt_file, folder / "command.sh", work.checkout.lenders[0] / "objects"]
    reach = {"write": [place.path, folder / "tmp"], "read": readable}
    order = make_order(config, command, place.path, env, stdin, log_file, timeout=timeout, stall=stall, **reach)
    try:
        done = run_supervised(config, order, work.stop)
    finally:  # also of an agent that was stopped
        if log_file.is_file():
            log_file.write_text(config.masked(log_file.read_text("utf-8", "replace")), "utf-8")
    # Masked before it is made harmless, which could change a secret so that it is not known any more.
    return done._replace(out=config.masked(done.out))


def run_script(work: Work, script: str, timeout: float, log_file: Path = NOWHERE) -> Finished:
    """Runs a script with a shell in the workspace: bash, if there is one. It is a file, since an argument can be too
    long."""
    file = work.checkout.folder / "command.sh"
    file.write_text(encodable(script) + "\n", "utf-8")
    shell = shutil.which("bash", path=work.config.env.get("PATH")) or "/bin/sh"
    return run_in_workspace(work, [shell, str(file)], timeout, log_file=log_file)


def run_agent(work: Work, command: Sequence[str], stdin: str) -> tuple[Finished, str]:
    """Runs an agent in the workspace: how it ended, and its $AGENT_SUMMARY_FILE. Raises TaskFailed, TaskRetry or
    Stopping."""
    config, facts = work.config, {"repo": work.task.target_repo, "program": Path(command[0]).name}
    audit(config, "agent started", **facts)
    with audited(config, "agent ended", **facts) as end:
        done = run_in_workspace(work, command, work.time_left(), stdin, work.log_file, config.stall_seconds)
        end["outcome"] = done.late or f"status {done.code}"
    log.info("the agent's output is in %s", work.log_file)
    if done.late:
        raise early_end(done, config)
    return done, config.masked(read_regular(work.summary_file))


def early_end(done: Finished, config: Config) -> RunnerError:
    """What it means for the task that its agent had to be ended."""
    advice = "Ask for less at a time, or let the runner's owner raise {}."
    if done.late == "timeout":
        why = f"The agent ran out of time ({duration(config.task_timeout)})."
        return TaskFailed(why, advice.format("AGENT_TASK_TIMEOUT"), done.out)
    if done.late == "stall":
        why = f"The agent printed nothing for {duration(config.stall_seconds)}."
        return TaskFailed(why, advice.format("AGENT_STALL_SECONDS"), done.out)
    why = "The disk filled up while the agent ran." if done.late == "disk" else "The agent was ended from outside."
    return TaskRetry(why, advice.format("AGENT_DISK_BUDGET_MB"), done.out)


def process_command(work: Work) -> tuple[str, str]:
    """Runs AGENT_COMMAND; what it is told is on standard input, in a file, and in the words."""
    # What begins with a dash would be an option of the agent.
    told = "\n" + work.prompt if work.prompt.startswith("-") else work.prompt
    values = {"instruction": told, "instruction_file": str(work.prompt_file), "summary_file": str(work.summary_file)}
    done, summary = run_agent(work, command_words(work.config, values), work.prompt + "\n")
    if done.code:
        advice = "What it printed last may say why." if done.out.strip() else "It printed nothing."
        raise TaskFailed(f"The agent {how_ended(done)}.", advice, done.out)
    return summary, done.out


def how_ended(done: Finished, limit: float = 0) -> str:
    """How a program ended that was not well: with what, or when its `limit` in seconds was over."""
    if done.late == "timeout":
        return f"ran out of time ({duration(limit)})"
    if done.late:
        return "filled up the disk" if done.late == "disk" else "was ended from outside"
    return f"ended with signal {-done.code}" if done.code < 0 else f"ended with exit status {done.code}"


def read_regular(path: Path) -> str:
    """The start of a text that an agent may have written; a link, which might lead to a secret, counts as empty."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
    with contextlib.suppress(OSError), open(path, "rb", opener=lambda name, _: os.open(name, flags)) as file:
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return file.read(MAX_BODY).decode("utf-8", "replace")
    return ""


def process_plugin(work: Work) -> tuple[str, str]:
    """Calls a plug-in in a process of its own: it can be ended, and it does not have the token."""
    order = {"task": vars(work.task), **vars(work.checkout.workspace)}
    done, text = run_agent(work, [*PROGRAM, "--plugin", work.config.process_task], json.dumps(order, default=str))
    if done.code == PLUGIN_CODES["retry"]:
        raise TaskRetry(text, output=done.out)
    if done.code:
        why = f"The plug-in ended with status {done.code} before it had returned."
        raise TaskFailed(text if done.code == PLUGIN_CODES["failed"] else why, output=done.out)
    return text, done.out


def serve_plugin(spec: str, order: str) -> int:
    """The other side of `process_plugin`; without an order it only loads the plug-in."""
    function, kind = load_plugin(spec), "done"
    if order:
        given = json.loads(order)
        workspace = Workspace(Path(given["path"]), given["base"], given["commit"])
        kind, text = call_plugin(function, Task(**given["task"]), workspace)
        Path(os.environ["AGENT_SUMMARY_FILE"]).write_text(encodable(text), "utf-8")
    return PLUGIN_CODES[kind]


def load_plugin(spec: str) -> Any:
    """The function that `package.module:function` or `path/to/file.py:function` names."""
    place, _, name = spec.rpartition(":")
    sys.modules["runner"] = sys.modules[__name__]  # its TaskFailed and ours are to be the same
    if place.endswith(".py"):
        sys.path.insert(0, str(Path(place).parent))  # for what lies beside it
        sys.modules["agent_plugin"] = module = ModuleType("agent_plugin")
        module.__file__ = place
        importlib.machinery.SourceFileLoader("agent_plugin", place).exec_module(module)
    else:
        module = importlib.import_module(place)
    return getattr(module, name)


def call_plugin(function: Callable[..., Any], task: Task, workspace: Workspace) -> tuple[str, str]:
    """Calls a plug-in's function: ("done", "failed" or "retry", text for people). With one parameter it gets GitHub's
    JSON of the issue and returns whether it worked; with two a Task and a Workspace, and may return a summary."""
    try:
        if len(inspect.signature(function).parameters) == 1:
            worked = function(dict(task.issue))
            return ("done", "") if worked else ("failed", "`process_task` says that it did not work.")
        return "done", str(function(task, workspace) or "")
    except (TaskRetry, TaskFailed) as error:
        return "retry" if isinstance(error, TaskRetry) else "failed", error.told
    except (Exception, SystemExit) as error:
        log.exception("the plug-in failed")
        return "failed", f"The plug-in raised {type(error).__name__}."


# -- The built-in agent `openai`: a model that runs commands until the task is done. ----------------
#
# The key of the model stays in the runner: only the commands run within the walls. There is nothing
# else to it: the whole conversation is sent each time, and a command's output is the next message.

BASH = {  # https://platform.openai.com/docs/guides/function-calling
    "name": "bash",
    "description": "Runs a script with bash in the folder of the repository; answers with what it printed and its exit"
    " status. Each call is a new shell, and what it leaves running is ended. There is no terminal and no input.",
    "parameters": {
        "type": "object",
        "properties": {"command": {"type": "string", "description": "The script, of one or more lines."}},
        "required": ["command"],
        "additionalProperties": False,
    },
}
SYSTEM = """\
You are a coding agent. You work on a task in a repository with one tool, bash: look around, change files, run tests.
You may write below the current folder, $TMPDIR and $HOME only. A command is ended after {minutes} minutes. Long output
is cut in the middle, so look at large files in parts. When the task is done, answer without calling the tool: that
answer is shown to reviewers as the summary of your change, in Markdown."""
NUDGES = {
    "length": "Your answer was too long and was cut off. Go on in smaller steps: call bash with a shorter script.",
    "nothing": "You have not run any command yet. Call the tool bash to do the task; describing it changes nothing.",
    "empty": "Your answer was empty. Call bash to go on, or sum up what you have changed if you are done.",
}


class Reply(NamedTuple):
    """A model's message as it goes back into the conversation, its text, its calls as (id, name, arguments), and
    whether it was cut off for its length."""

    message: Mapping[str, Any]
    text: str
    calls: Sequence[tuple[str, str, str]]
    cut_off: bool


def read_reply(data: Any) -> Reply:
    """Reads an answer of the model; raises Unreachable if it is none, for it may be good the next time.
    https://platform.openai.com/docs/api-reference/chat/object"""
    calls, sent = dict[str, tuple[str, str, str]](), []
    try:
        choice = data["choices"][0]
        said, cut_off = choice["message"], choice.get("finish_reason") == "length"
        parts = said.get("content") or ""
        text = parts if isinstance(parts, str) else "".join(str(part.get("text") or "") for part in parts)
        for number, call in enumerate(said.get("tool_calls") or []):
            function, id_ = call["function"], str(call.get("id") or "call")
            name, arguments = str(function.get("name")), function.get("arguments")
            arguments = (
                arguments if isinstance(arguments, str) else json.dumps(arguments)
            )  # some servers send an object
            while id_ in calls:
                id_ = f"{id_}-{number}"
            calls[id_] = id_, name, arguments
            # Servers refuse a conversation with bad names or arguments: what was wrong the next message says.
            shown = {
                "name": re.sub(r"[^A-Za-z0-9_-]", "_", name)[:64] or "_",
                "arguments": arguments if _is_object(arguments) else "{}",
            }
            sent.append({**call, "id": id_, "type": "function", "function": shown})
    except (AttributeError, KeyError, IndexError, TypeError):
        told = printable(json.dumps(data.get("error") if isinstance(data, dict) else None))[:500]
        raise Unreachable(f"the model's answer holds no message ({told})") from None
    message = {"role": "assistant", "content": text, **({"tool_calls": sent} if sent else {})}
    return Reply(message, text, tuple(calls.values()), cut_off)


def _is_object(text: str) -> bool:
    """Whether a text is a JSON object that any server can read."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)  # Python knows numbers that JSON does not

    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(text, parse_constant=refuse)
        json.dumps(value, ensure_ascii=False).encode()  # nor half characters
        return isinstance(value, dict)
    return False


def model_refusal(status: int, data: Any, headers: Mapping[str, str]) -> RunnerError:
    """What an answer of 300 or more means for the task. https://platform.openai.com/docs/guides/error-codes/api-errors"""
    error = data.get("error", data) if isinstance(data, dict) else data
    known = error if isinstance(error, dict) else {"message": error}
    reason, what = str(known.get("message") or known.get("detail") or "no message")[:500], known.get("code")
    why = f"The model's server answered {status}: {reason}"
    if what != "insufficient_quota" and (status in (408, 409, 429) or status >= 500):
        fault = Unreachable(why)
        with contextlib.suppress(ValueError):
            fault.pause = min(max(0.0, float(headers.get("retry-after", ""))), MAX_PAUSE)
        return fault
    if what == "context_length_exceeded" or "context length" in reason.lower():
        return TaskFailed(why, "The task takes more than the model can read: ask for less at a time.")
    key, place = "OPENAI_API_KEY, what it may do, and what its account has left", "AGENT_MODEL and OPENAI_BASE_URL"
    return TaskFailed(why, f"The runner's owner should check {key if status in (401, 402, 403, 429) else place}.")


def interruptible(call: Callable[[], T], stop: threading.Event, check: Callable[[], object] = bool) -> T:
    """What a call returns, or Stopping as soon as `stop` is set, or what `check` raises meanwhile: the call then comes
    to its end unheard."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, name="model", daemon=True).start()
    while not stop.is_set():
        if wait_for([future], 0.2).done:
            return future.result()
        check()
    raise Stopping


class Model:
    """A model behind a server's chat completions, and what it has used up."""

    def __init__(self, work: Work) -> None:
        self._work, self._session = work, requests.Session()
        key = work.config.model_key
        self._session.auth = _bearer(key) if key else (lambda request: request)  # nor what ~/.netrc has

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self._session.close()

    def ask(self, messages: Sequence[Mapping[str, Any]]) -> Reply:
        """The model's next message. A server that is away or too busy is asked again while there is time."""
        work = self._work
        if work.used["input"] + work.used["output"] > work.config.max_tokens:
            why = f"The model has used more than {work.config.max_tokens:,} tokens."
            raise TaskFailed(why, "Ask for less at a time, or let the runner's owner raise AGENT_MAX_TOKENS.")
        body = {"model": work.config.model, "messages": messages, "tools": [{"type": "function", "function": BASH}]}
        step = functools.partial(interruptible, functools.partial(self._post, body), work.stop, work.time_left)
        try:
            return patiently(step, work.clock, work.stop, min(PATIENCE, work.time_left()))
        except Unreachable as fault:
            work.time_left()
            advice = "Run it again when the model's server is well."
            raise TaskRetry(f"The model cannot be reached: {fault.why}", advice) from fault

    def _post(self, body: Mapping[str, Any]) -> Reply:
        url, timeout = f"{self._work.config.model_url}/chat/completions", (HTTP_TIMEOUT[0], self._work.time_left())
        try:
            response = self._session.post(url, json=body, timeout=timeout, allow_redirects=False)
        except requests.RequestException as error:
            raise Unreachable(f"no answer from the model's server: {root_cause(error)}") from error
        data = None
        with contextlib.suppress(ValueError, RecursionError):
            # Without half characters and NaN, which no server takes back.
            data = json.loads(
                json.dumps(response.json(), ensure_ascii=False).encode("utf-8", "replace"),
                parse_constant=lambda _: None,
            )
        log.debug("POST %s -> %d", url, response.status_code)
        if response.status_code >= 300:
            raise model_refusal(response.status_code, data, response.headers)
        self._count(data)
        return read_reply(data)

    def _count(self, data: Any) -> None:
        """https://platform.openai.com/docs/api-reference/chat/object#chat/object-usage"""
        used = self._work.used
        used["steps"] += 1
        with contextlib.suppress(
            AttributeError, KeyError, OverflowError, TypeError, ValueError
        ):  # not every server counts
            usage = data["usage"]
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
            counts = {"input": usage.get("prompt_tokens"), "output": usage.get("completion_tokens"), "cached": cached}
            for name, count in counts.items():
                used[name] += min(max(0, int(count or 0)), 10**12)


def process_openai(work: Work) -> tuple[str, str]:
    """Has AGENT_MODEL run commands until it says that it is done; its last message is the summary."""
    facts, transcript = {"repo": work.task.target_repo, "program": work.config.model}, Output(str(work.log_file))
    audit(work.config, "agent started", **facts)
    try:
        with audited(work.config, "agent ended", **facts), Model(work) as model:
            summary = converse(work, model, transcript)
        return summary, transcript.tail.decode("utf-8", "replace")
    except (TaskFailed, TaskRetry) as failure:
        failure.output = failure.output or transcript.tail.decode("utf-8", "replace")
        raise
    finally:
        transcript.close()
        log.info("the conversation is in %s", work.log_file)


def converse(work: Work, model: Model, transcript: Output) -> str:
    """The loop: ask, run, answer. Returns the last message."""
    system = SYSTEM.format(minutes=int(BASH_TIMEOUT / 60))
    messages: list[Mapping[str, Any]] = [
        {"role": "system", "content": system},
        {"role": "user", "content": work.prompt},
    ]
    nudged = set[str]()
    for _ in range(work.config.max_steps):
        reply = model.ask(messages)
        messages.append(reply.message)
        note(work, transcript, reply.text)
        for id_, name, arguments in reply.calls:
            answer = answer_call(work, transcript, name, arguments, reply.cut_off)
            messages.append({"role": "tool", "tool_call_id": id_, "content": answer})
        lack = what_lacks(reply, work.used["calls"])
        if not reply.calls and (not lack or lack in nudged):
            return work.config.masked(re.sub(r"\A\s*<think>[\s\S]*?</think>\s*", "", reply.text)[:MAX_BODY])
        if lack:
            messages.append({"role": "user", "content": NUDGES[lack]})
            nudged |= {lack} - {"length"}
    why = f"The model did not come to an end in {work.config.max_steps} steps."
    raise TaskFailed(why, "Ask for less at a time, or let the runner's owner raise AGENT_MAX_STEPS.")


def what_lacks(reply: Reply, calls: int) -> str:
    """What is to be said to a message that calls nothing and is no good as the last one; or ""."""
    if reply.calls:
        return ""
    if reply.cut_off:
        return "length"
    return "empty" if not reply.text.strip() else "nothing" if not calls else ""


def answer_call(work: Work, transcript: Output, name: str, arguments: str, cut_off: bool) -> str:
    """What a model is told of one call: what the command printed and how it ended, or what was wrong with the call."""
    try:
        given = json.loads(arguments)
    except (ValueError, RecursionError) as error:
        return NUDGES["length"] if cut_off else f"The arguments are not valid JSON: {error}"
    command = given.get("command") if isinstance(given, dict) else None
    if name != "bash" or not isinstance(command, str) or not command.strip():
        return 'There is one tool, bash, and it has one argument, "command", a string. Nothing was run.'
    work.used["calls"] += 1
    note(work, transcript, "\n".join(f"$ {line}" for line in command.split("\n")))
    limit = min(BASH_TIMEOUT, work.time_left())
    done = run_script(work, command, limit)
    work.time_left()
    if done.late and done.late != "timeout":
        raise early_end(done, work.config)
    output = cut_middle(printable(re.sub(r"\r\n?", "\n", done.out)).rstrip(), TOLD_OF_OUTPUT)
    note(work, transcript, output)
    return f"{output}\n\n(It {how_ended(done, limit)}.)".lstrip()


def note(work: Work, transcript: Output, text: str) -> None:
    """Writes to the log of the conversation."""
    if text.strip():
        transcript.add((work.config.masked(text.rstrip()) + "\n").encode("utf-8", "replace"))


# -- The story of one task. ------------------------------------------------------------------------


STOPPED = "The runner was stopped. The task is queued, and starts over when it is back."
PROGRESS = {
    "preparing": "The repository is being fetched.",
    "setup": "The setup command is running.",
    "working": "The agent is at work.",
    "verifying": "The checks are running.",
    "publishing": "The change is being published.",
}


class Attempt:
    """The attempts at one issue by this runner, while it holds the claim: each from reading the issue again to the
    comment that ends it. What GitHub holds already of this run is found and used, never made twice. `halt` ends the
    agent and git; `due` is when the next attempt may begin, on the monotonic clock."""

    def __init__(self, runner: Runner, number: int) -> None:
        self._runner, self._config = runner, runner.config
        self.number, self.due, self.halt = number, 0.0, threading.Event()
        row = runner.queue.waiting.get(number)
        seen = runner.seen.get(number) or Seen(row.repo if row else self._config.target_repo, "", 0, {})
        self.claim = Claim(runner, number, seen, row.body if row else "", self.halt)
        self.settled = ""  # when the issue was changed last, once it is known what becomes of it
        self.moved: Row | None = None  # what was edited so that it belongs elsewhere now
        self._updated = row.updated if row else ""
        self._refused: TaskFailed | None = None  # why the target cannot be had
        self._run, self._again = self.claim.nonce, bool(seen.record)  # whether some of it may have been done
        self._git = Git(runner.sign_in, self.halt)
        self._comments: dict[str, int] = {}
        self._cancelled, self._etag = "", ""
        self.task: Task | None = None
        self.facts: dict[str, Any] = {"issue": number, "task": "", "attempt": 0, "phase": "claiming"}
        self.title, self.why, self.pull = row.title if row else "", "", ""
        self._log_file, self._rows = NOWHERE, dict[str, str]()
        self.begun = self._phase_begun = self.told = runner.clock.monotonic()
        self._telling, self.milestone = threading.Lock(), False

    @property
    def _folder(self) -> Path:
        """Where the agent works. It goes when all is told, for to delete many files takes a while."""
        return self.claim.path.parent / "run"

    @property
    def _github(self) -> GitHub:
        """The way to GitHub, as long as the issue is this runner's."""
        self.claim.check()
        return self._runner.github

    def run(self) -> str:
        """One attempt: how it ended, as "done", "failed", "retry", "cancelled", "stopped", "skipped", "held" (another
        runner has the issue) or "dropped" (it has it now). Raises what makes it impossible to tell it on the issue;
        the claim stays then until somebody takes it over."""
        self.begun = self._phase_begun = self.told = self._runner.clock.monotonic()
        self.facts["phase"], outcome, self._rows = "claiming", "dropped", {}
        try:
            if self.claim.held:
                self.claim.attempt += 1
                self.facts["attempt"] = self.claim.attempt
                self.claim.renew()
            elif not self._take():
                return "held"
            outcome = self._attempt()
            if outcome != "retry":
                self.claim.release()
        except ClaimLost as lost:
            self.why = str(lost)
            self._runner.metrics.count("claims_total", "dropped")
            log.warning("dropped, for the claim is lost: %s", lost)
        finally:
            if outcome == "retry":
                remove_tree(self._folder)
            else:
                self.claim.close()
        return outcome

    def shown_at_work(self) -> dict[str, Any]:
        """What it shows while the attempt runs."""
        claim = {"epoch": self.claim.epoch, "renewed": round(self.claim.age, 1) if self.claim.held else 0}
        now = {"phase": self.facts["phase"], "seconds": round(self.elapsed), "last_line": self.last_line}
        return self.shown() | now | {"claim": claim}

    def shown(self) -> dict[str, Any]:
        """What the status page shows of it in any case."""
        target = self.task.target_repo if self.task else self.claim.repo
        facts = {name: self.facts[name] for name in ("issue", "task", "attempt")}
        return {**facts, "title": self.title, "url": issue_url(self._config, self.number), "target": target}

    @property
    def elapsed(self) -> float:
        """Seconds since this attempt began."""
        return self._runner.clock.monotonic() - self.begun

    @property
    def next_tale(self) -> float:
        """When it may be told again how far the work is: less often, the longer it takes; a milestone at once."""
        return 0.0 if self.milestone else self.told + max(PROGRESS_PAUSE, (self.told - self.begun) / 4)

    def enter(self, phase: str) -> None:
        """Notes that the next part of the work begins. Of a task that takes long the issue is told that."""
        now = self._runner.clock.monotonic()
        self._runner.metrics.observe("phase_seconds", now - self._phase_begun, self.facts["phase"])
        self.facts["phase"], self._phase_begun = phase, now
        if phase in PROGRESS and self.elapsed >= PROGRESS_PAUSE:
            self.milestone = True
            self._runner.wake.set()

    def _take(self) -> bool:
        won = self._take_somewhere()
        self._runner.metrics.count("claims_total", "won" if won else "lost")
        self.facts["attempt"] = self.claim.attempt
        return won

    def _take_somewhere(self) -> bool:
        try:
            return self.claim.take()
        except TaskFailed as refused:
            usual = self._config.target_repo
            if self.claim.repo.lower() == usual.lower():
                raise
            # The issue is to be told, by one runner: so it is claimed where claims are possible.
            self._refused = refused
            self.claim = Claim(self._runner, self.number, Seen(usual, "", 0, {}), "", self.halt)
            return self.claim.take()

    def _attempt(self) -> str:
        """The story, once the issue is claimed."""
        try:
            if (issue := self._read_again()) is None:
                return "skipped"
            task = self.task = parse_task(issue, self._config, self.claim.attempt, self.why)
            self.facts["task"], self.title = task.slug, task.title
            self.enter("checking")
            if not self._refused and claim_repo(task, self._config).lower() != self.claim.repo.lower():
                self.moved = Row.of(issue, self._config)
                return "skipped"
            # Outside the `try` below: a runner that may not label must not comment either, poll after poll.
            self._github.add_label(self.number, self._config.processing_label, LABELS["processing"])
        except RunnerError:
            self.claim.release()  # nothing has been done yet
            raise
        try:
            self._check(task)
            self._check_edits(task)
            log.info("begun in %s", task.target_repo)
            self._say(self._working(task))
            pull, failure = self._carry_out(task)
        except Stopping:
            self.enter("reporting")
            self.claim.check()
            self.release(self._cancelled or STOPPED)
            return "cancelled" if self._cancelled else "stopped"
        except TaskRetry as retry:
            return self._retry(task, retry)
        except TaskFailed as failed:
            return self._failed(task, failed)
        except ClaimLost:
            raise
        except Exception:
            log.exception("a fault of the runner")
            return self._failed(task, TaskFailed("The runner met a fault; its log says more."))
        self.pull = f"{self._config.server_url}/{task.target_repo}/pull/{pull['number']}"
        self._rows |= {"Pull request": f"{task.target_repo}#{pull['number']}", "Branch": code(task.branch)}
        if failure:
            return self._failed(task, failure, f"What there is so far is in a draft: {pull['html_url']}")
        self._close(task, "done", f"Done: {pull['html_url']}")
        log.info("done: %s", pull["html_url"])
        return "done"

    def _check(self, task: Task) -> None:
        """Logs what of the issue is not passed on. Raises TaskFailed for a task that must not or cannot be run."""
        if task.hidden:
            log.warning("not passed on, for nobody sees it: %s", task.hidden)
        check_task(task, self._config)
        if self._refused:
            raise self._refused

    def _read_again(self) -> dict[str, Any] | None:
        """The issue as it is now, if it is still queued: a list can be old. If not, what is left of an earlier run is
        put right."""
        try:
            issue = self._github.issue(self.number)
        except ApiRefused as refused:
            if refused.status not in (301, 404, 410, 451):
                raise
            log.warning("skipped: %s", refused)
            self.settled = "" if refused.status == 404 else self._updated
            return None
        if is_queued(issue, self._config):
            return issue
        labels = ", ".join(label["name"] for label in issue["labels"]) or "none"
        log.warning("skipped: it is %s, its labels: %s", issue["state"], labels)
        self.settled = str(issue["updated_at"])
        if has_label(issue, self._config.processing_label):
            over = is_wanted(issue, self._config)  # but done or failed, as the last comment says
            self.release("" if over else "It is not tried again: the issue was closed, or lost its label.")
        return None

    def _check_edits(self, task: Task) -> None:
        """Raises TaskFailed if a stranger has edited the issue and nobody who may give work has labelled it since. An
        issue that is as it was opened costs no request."""
        if task.issue["updated_at"] == task.issue["created_at"]:
            return
        may_write, author = functools.cache(self._github.may_write), task.author.lower()
        try:
            history = self._github.history(task.issue)
            logins = {who for _, _, who in history if who}
            known = {who for who in logins if who.lower() == author or self._config.allows_author(who)}
            strange = {who for _, edit, who in history if edit} - known
            for _, edit, who in history if strange else []:
                trusted = who in known or may_write(who)
                if trusted and not edit:
                    return
                if edit and not trusted:
                    editor = code(who) if who else "Somebody unknown"
                    why = f"{editor} has edited this issue, and nobody who may give work has labelled it since."
                    again = f"Take the label {code(self._config.task_label)} off and put it on again"
                    raise TaskFailed(why, f"{again} once you have read the issue.")
        except ApiRefused as refused:
            why = f"It cannot be found out who has edited this issue: {refused.why}"
            raise TaskFailed(why, f"Open it anew. {refused.advice or ADVICE[403]}") from None

    def look_in(self) -> None:
        """Ends the work if the issue was closed, or lost its label, since it began."""
        try:
            issue, self._etag = self._runner.github.changed(self.number, self._etag)
        except RunnerError as error:
            log.debug("issue %d cannot be read: %s", self.number, error)
            return
        if issue and not is_wanted(issue, self._config):
            what = "was closed" if issue["state"] != "open" else f"lost its label {code(self._config.task_label)}"
            self._cancelled = f"Cancelled: the issue {what} while it was worked on. No pull request was opened."
            self.settled = str(issue["updated_at"])
            self.halt.set()

    def _carry_out(self, task: Task) -> tuple[dict[str, Any], RunnerError | None]:
        """Work, commit, push, pull request: what the task is about. With it comes why it is not finished, if so."""
        self.enter("preparing")
        patiently, mirror = self._runner.patiently, Mirror(self._git, self._config, task.target_repo)
        base_ref, ref = f"refs/heads/{task.base}" if task.base else "HEAD", f"refs/heads/{task.branch}"
        default, refs = patiently(lambda: self._git.refs(task.target_repo, "HEAD", base_ref, ref))
        base, old = task.base or default, refs.get(ref, "")
        if not base or base_ref not in refs:
            why = f"{task.target_repo} has no branch {code(base)}." if base else f"{task.target_repo} is empty."
            raise TaskFailed(why, f"Its default branch is {code(default)}." if default else "Push a first commit.")
        with mirror.use():
            fetch = functools.partial(mirror.fetch, f"refs/heads/{base}", refs[base_ref])
            result = patiently(lambda: mirror.sound(lambda: self._published(task, mirror, fetch, old))) if old else None
            result = result or self._publish(task, mirror, base, fetch, old)
        return self._open_pull(task, base, result, bool(old)), result.failure

    def _open_pull(self, task: Task, base: str, result: Result, again: bool) -> dict[str, Any]:
        """The pull request, with labels and reviewers; a task does not hang on these."""
        config, repo = self._config, task.target_repo
        wanted = {"title": pull_title(task, config.pull_title), "head": task.branch, "base": base}
        wanted["body"] = pull_body(task, base, result, self._run)
        draft, marker = config.pull_draft or result.failure is not None, step_marker(self._run, "pull")
        pull = self._github.open_pull(repo, wanted, draft, marker, again)
        problems = self._github.dress_pull(repo, pull["number"], config.pull_labels, config.pull_reviewers)
        self._rows |= {name: f"none: {code(why)}" for name, why in problems.items()}
        return pull

    def _publish(self, task: Task, mirror: Mirror, base: str, fetch: Callable[[], str], old: str) -> Result:
        """Runs `process_task` in a fresh checkout and pushes what it changed."""
        if self.claim.attempt > self._config.max_attempts:
            raise TaskFailed(
                f"The runner broke off {self.claim.attempt - 1} attempts at this task; its log may say why."
            )

        def fill() -> Checkout:
            lenders = (mirror.path, self.claim.path)
            checkout = Checkout(self._git, lenders, self._folder, base, fetch(), self._config.ignore)
            checkout.fill(task.branch)
            return checkout

        checkout = self._runner.patiently(lambda: mirror.sound(fill))
        result = self._change(task, checkout)
        self.claim.renew({f"refs/heads/{task.branch}": (old, result.commit)}, checkout.git_dir)
        return result

    def _change(self, task: Task, checkout: Checkout) -> Result:
        """What the agent makes of the task, committed. What is not finished is kept, if not as a draft, then in a file.
        Raises TaskFailed, TaskRetry or Stopping."""
        config = self._config.for_agent(task.agent)
        work = Work(task, checkout, config, self.halt, self._runner.clock, Counter(), NOWHERE)
        summary = output = tree = ""
        failure: TaskFailed | None = None
        try:
            tree, summary, output, failure = self._work(work)
        except Refused:
            raise
        except TaskFailed as caught:
            failure, tree = caught, self._remains(checkout)
        finally:
            self._rows = describe_use(work)
        if failure and not (tree and config.draft_on_failure):
            raise self._kept(failure, checkout, tree)
        self.enter("publishing")
        made = checkout.commit(tree, commit_message(task, self._run, config, failure), config)
        log.info("made commit %s", made)
        stat = diffstat(self._git, checkout.git_dir, checkout.workspace.commit, made)
        return Result(made, stat, summary, output, describe_use(work), failure)

    def _work(self, work: Work) -> tuple[str, str, str, TaskFailed | None]:
        """Setup, agent, checks, and the agent again while they fail: what has changed, as a tree; the agent's summary
        and output; and why the change is not good, if so."""
        config, round_ = work.config, 0
        if config.setup_command:
            run_setup(self._part("setup", work, ".setup"))
        work = work._replace(ends=time.monotonic() + config.task_timeout)
        while True:
            round_ += 1
            work = self._part("working", work, f".round-{round_}" if round_ > 1 else "")
            summary, output = process_task(work)
            if not (tree := work.checkout.take(config)):
                raise nothing_changed(work, output)
            if not config.verify_command:
                return tree, summary, output, None
            begun = time.monotonic()
            failure = failed_checks(self._part("verifying", work, f".checks-{round_}"), tree)
            if not failure or round_ > config.verify_rounds:
                return tree, summary, output, failure
            told = blocks(failure.why, cut_middle(failure.output.strip(), TOLD_OF_OUTPUT))
            # The time of the checks is not the agent's.
            work = work._replace(task=replace(work.task, failure=told), ends=work.ends + time.monotonic() - begun)

    def _part(self, phase: str, work: Work, name: str) -> Work:
        """Begins a part of the work that prints something; the name is that of its log."""
        self.enter(phase)
        self._log_file = new_log(self._config, f"{self.number}-{work.task.attempt}{name}.log")
        return work._replace(log_file=self._log_file)

    def _remains(self, checkout: Checkout) -> str:
        """What an agent that failed has changed, as a tree; "" if that is nothing, or must not be kept."""
        try:
            return checkout.take(self._config)
        except TaskFailed as refused:
            log.warning("what the agent has changed is not kept: %s", refused.why)
            return ""

    def _kept(self, failure: TaskFailed, checkout: Checkout, tree: str) -> TaskFailed:
        """The failure, once what was changed is in a file, of which it tells."""
        if tree:
            file = new_log(self._config, f"{self.number}-{self.facts['attempt']}.patch")
            file.touch(0o600)
            file.write_text(checkout.patch(tree), "utf-8", "surrogateescape")
            where = f"What there is so far is on the runner's machine: {code(f'logs/{file.name}')} in its state folder."
            failure.advice = f"{failure.advice} {where}".strip()
        return failure

    def _published(self, task: Task, mirror: Mirror, fetch: Callable[[], str], tip: str) -> Result | None:
        """What the branch that is there brings, if it is of a run of this issue that did not come to its end: then the
        rest is to be done. If it did, somebody wants another run. Raises TaskFailed for a branch of somebody else."""
        mirror.fetch(f"refs/heads/{task.branch}", tip, "task")  # one name for all of these, of which there is no end
        keys = ("Dispatch-Issue", "Run", "Unfinished")
        trailers = [f"%(trailers:key={key},valueonly,separator=%x20)" for key in keys]
        command = ("log", "--first-parent", "-200", f"--format=%H%x00{'%x00'.join(trailers)}", tip, "--")
        commits = [line.split("\0") for line in self._git(*command, git_dir=mirror.path).splitlines()]
        commit, owner, run, unfinished = next((commit for commit in commits if commit[1]), ("", "", "", ""))
        if owner.lower() != task.reference.lower():
            whose = f"{task.target_repo} has a branch {code(task.branch)} of {owner or 'somebody else'}."
            raise TaskFailed(whose, "Give this task an id of its own, or delete the branch.")
        told = self._github.find_comment(self.number, step_marker(run, "end")) if run != self.claim.nonce else None
        # An issue that looks older than its end is a stale answer, and nobody's wish.
        if told and told["created_at"] <= task.issue["updated_at"]:
            if commit != tip:
                why = f"Somebody has added commits to the branch {code(task.branch)}, which another run would replace."
                raise TaskFailed(why, "Give this task an id of its own, or delete the branch.")
            return None
        log.info("the branch was pushed before")
        self.enter("publishing")
        self._run, self._again = run, True
        failure = TaskFailed(unfinished) if unfinished else None
        return Result(tip, diffstat(self._git, mirror.path, fetch(), tip), failure=failure)

    def _failed(self, task: Task, failure: RunnerError, draft: str = "") -> str:
        self.why = self._config.masked(failure.why)
        log.warning("failed: %s", failure.why)
        if isinstance(failure, Refused):
            audit(self._config, "refused", author=task.author, reason=failure.why)
        again = f"To run it again, take the label {code(self._config.failed_label)} off this issue."
        text = blocks(f"**Failed.** {harmless(failure.why)}", draft, harmless(failure.advice), again)
        self._close(task, "failed", text, failure.output)
        return "failed"

    def _close(self, task: Task, end: str, text: str, output: str = "") -> None:
        """The last comment, then the label: an issue with the label has its comment."""
        self.enter("reporting")
        took = duration(self.elapsed)
        with self._telling:  # what is being told just now counts too
            told = self.told > self.begun
        if told:  # else it would go on to say what the agent does
            self._say(f"Worked on it: task {code(task.task_id)} in {task.target_repo}, attempt {task.attempt}, {took}.")
        rows = {"Task": code(task.task_id), **self._rows, "Attempt": str(task.attempt), "Duration": took}
        body = render_comment(self._run, "end", blocks(text, table(rows)), output, metadata_comment(task.metadata))
        try:
            self._comment("end", body)
        except ApiRefused as refused:  # a conversation can be locked; the labels still tell the end
            log.error("no comment: %s", refused)
        self._github.add_label(self.number, getattr(self._config, f"{end}_label"), LABELS[end])
        self._github.remove_label(self.number, self._config.processing_label)
        self.settled = str(task.issue["updated_at"])

    def _retry(self, task: Task, retry: TaskRetry) -> str:
        if task.attempt >= self._config.max_attempts:
            why = f"{retry.why} ({task.attempt} attempts)" if task.attempt > 1 else retry.why
            return self._failed(task, TaskFailed(why, retry.advice, retry.output))
        self.enter("reporting")  # from now on nobody else tells anything
        clock, why = self._runner.clock, f"Attempt {task.attempt} did not work out: {harmless(retry.why)}"
        pause = clock.jitter(RETRY_PAUSE * 2.0 ** (task.attempt - 1))
        self.why = self._config.masked(retry.why)
        log.warning("again in %.0f s: %s", pause, retry.why)
        self._say(blocks(why, f"It will be tried again in {duration(pause)}."), retry.output)
        self.due = clock.monotonic() + pause
        return "retry"

    def release(self, why: str) -> None:
        """Takes the issue out of work without an end."""
        with work_on(self.facts):
            self._github.remove_label(self.number, self._config.processing_label, last=True)
            log.info("released. %s", why)
            if why and (self._comments or self._again):
                self._say(why)

    def _working(self, task: Task) -> str:
        """What the comment says while the task is in work; after a minute also how far it is."""
        text = f"Working on it: task {code(task.task_id)} in {task.target_repo}, attempt {task.attempt}."
        if self.facts["phase"] not in PROGRESS or self.elapsed < PROGRESS_PAUSE:
            return text
        line = self.last_line
        told = f"{PROGRESS[self.facts['phase']]} {duration(self.elapsed)} so far."
        return blocks(text, told + (" The last line of its output:" if line else ""), fenced(line) if line else "")

    @property
    def last_line(self) -> str:
        """What the agent, or another command, has printed last, while it is at work."""
        if self.facts["phase"] not in ("setup", "working", "verifying"):
            return ""
        return last_line(self._config, self._log_file)

    @property
    def can_tell(self) -> bool:
        """Whether there is a comment, and work, of which it can tell."""
        return bool(self.task) and self.facts["phase"] in PROGRESS and "start" in self._comments

    def tell(self) -> None:
        """Has the first comment say how far the work is, if nothing else is being said there; the loop wants that."""
        self.milestone = False
        if not self._telling.acquire(blocking=False):
            return
        try:
            if self.task and self.can_tell:
                self.told = self._runner.clock.monotonic()
                body = render_comment(self._run, "start", self._working(self.task))
                with work_on(self.facts):
                    self._github.edit_comment(self._comments["start"], body, patient=False)
        except RunnerError as error:
            log.debug("no progress is told: %s", error)
        finally:
            self._telling.release()

    def _say(self, text: str, output: str = "") -> None:
        """The comment that tells how the task goes on. The work does not hang on it."""
        try:
            with self._telling:
                self._comment("start", render_comment(self._run, "start", text, output))
        except (ApiRefused, Unreachable) as error:
            log.warning("no comment: %s", error)

    def _comment(self, step: str, body: str) -> None:
        """One of the run's two comments: made once, edited from then on, also by who takes the run over."""
        known, marker = self._comments.get(step), step_marker(self._run, step)
        self._comments[step] = known or self._github.comment(self.number, body, marker, self._again)
        if known or self._again:
            self._github.edit_comment(self._comments[step], body)


# -- The loop: poll, admit, wait; until told to stop. ----------------------------------------------


class Runner:
    """The daemon: hands queued issues to AGENT_MAX_CONCURRENT workers, oldest first. `stop` ends the admission of
    work and every wait for GitHub, `kill` ends the agents, `wake` ends the wait for the next tick. `seen` are the
    claims of all runners."""

    def __init__(self, config: Config, clock: Clock | None = None) -> None:
        self.config, self.clock, self.metrics = config, clock or Clock(), Metrics()
        self.stop, self.kill, self.wake = threading.Event(), threading.Event(), threading.Event()
        self.sign_in = SignIn(config, self.clock, self.metrics)
        self.github = GitHub(config, self.clock, self.stop, self.metrics, self.sign_in)
        self.patiently = functools.partial(patiently, clock=self.clock, stop=self.stop)
        self.queue = Queue(config, self.github)
        self.seen: dict[int, Seen] = {}
        self.folder, self._lock = take_folder(config.state_dir / "work")
        # A second process on the same state folder is another runner.
        self.id = config.runner_id + (f"/{self.folder.name}" if self.folder.name != "0" else "")
        self.outcomes: Counter[str] = Counter()
        self._untold: Counter[int] = Counter()  # how often an issue came to no end; these come last
        self._pool = ThreadPoolExecutor(config.max_concurrent, thread_name_prefix="task")
        self._running: dict[Future[str], Attempt] = {}
        self._again: list[Attempt] = []
        self.started = self.polled = self.next_poll = self._next_look = self._next_tale = self.clock.monotonic()
        self._poll_begun = self._heard = self._echo = -math.inf
        self._poll_pause, self._polls_failed = config.poll_interval, 0
        self._first_look, self._look_in, self._lost = True, False, False
        self.history: deque[dict[str, Any]] = deque(maxlen=HISTORY_KEPT)  # how attempts ended, the newest first

    def run_forever(self) -> None:
        """Works until `stop` is set, then lets what runs come to an end."""
        log.info("watching %s for the label %s", self.config.dispatch_repo, self.config.task_label)
        while not self.stop.is_set():
            try:
                self.tick()
            except Exception:
                log.exception("a fault of the runner; it goes on")
            self._rest(self.next_poll)
        self._drain()

    def run_once(self, issue: int | None = None) -> None:
        """One poll, or one issue if it is queued, and what comes of it. Raises what a poll raises."""
        if issue is None:
            self.queue.poll()
        else:
            self.queue.waiting[issue] = Row.of(self.github.issue(issue), self.config)
        while not self.stop.is_set():
            self._collect()
            self._look_around()
            self._tell_progress()
            self._admit(issue)
            if not self._running and not self._again:
                break
            self._rest(self._next_look)
        if issue is not None and not self.outcomes:
            with work_on({"issue": issue}):
                log.warning("is in the hands of another runner, or was until a short time ago")
        self._drain()

    def tick(self) -> None:
        """One turn of the loop, without waiting: collect, poll if it is time, admit."""
        self._collect()
        if self.clock.monotonic() >= self.next_poll and not self._poll():
            return
        self._look_around()
        self._tell_progress()
        self._admit()

    def _poll(self) -> bool:
        """Reads the queue; False if the runner is to stop. After a poll that failed the next one is soon, then less and
        less soon. While webhooks bring the news, polls are rare; one that finds what no webhook has told ends that."""
        begun = self._poll_begun = self.clock.monotonic()
        last, known = self._heard, self.queue.waiting.copy()
        heard = begun - last
        slower = WEBHOOK_PATIENCE if heard < WEBHOOKS_TRUSTED else 1
        self._poll_pause = self.github.poll_pause(self.config.poll_interval * slower)
        self.next_poll = self._echo if begun < self._echo else begun + self._poll_pause
        try:
            changed = self.queue.poll()
        except Stopping:
            return False
        except RunnerError as error:
            self._polls_failed += 1
            self.metrics.count("polls_total", "failed")
            pause = self.clock.jitter(min(self.config.poll_interval, 2.0 ** min(self._polls_failed, 10)))
            log.error("cannot read the queue: %s; next try in %.0f s", error.told, pause)
            self.next_poll = min(self.next_poll, self.clock.monotonic() + pause)  # a webhook may have come meanwhile
            return True
        self._polls_failed, self.polled = 0, begun
        self.metrics.count("polls_total", "changed" if changed else "unchanged")
        self.metrics.set("last_poll_timestamp_seconds", round(self.clock.now()))
        if self._heard == last and heard > WEBHOOK_ECHO * 2 and self.queue.waiting.keys() - known.keys():
            self._heard, self.next_poll = -math.inf, begun + self.github.poll_pause(self.config.poll_interval)
        return True

    @property
    def healthy(self) -> bool:
        """Whether the queue was read not longer ago than three pauses between polls."""
        late = self.clock.monotonic() - self.polled > 3 * max(self._poll_pause, self.config.poll_interval)
        return not (late or self.stop.is_set())

    def at_work(self) -> tuple[list[Attempt], list[Attempt]]:
        """The attempts that run, and those that wait to be made again."""
        return sorted(self._running.values(), key=lambda attempt: attempt.number), list(self._again)

    @property
    def hears(self) -> bool:
        """Whether webhooks are relied on to bring the news."""
        return self.clock.monotonic() - self._heard < WEBHOOKS_TRUSTED

    def request_stop(self, now: bool = False) -> None:
        """Begins the end; `now` ends the agents as well."""
        self.stop.set()
        if now:
            self._end_work()
        self.wake.set()

    def request_poll(self) -> None:
        """Has the queue read now, but not more often than WAKE_PAUSE allows."""
        self.next_poll = max(self.clock.monotonic(), self._poll_begun + WAKE_PAUSE)
        self.wake.set()

    def hear(self, event: str, payload: Any) -> bool:
        """Takes what GitHub has sent as a hint that there is something to see; whether it is one. It is looked for at
        once and, since a list may lag behind the webhook, a moment later again."""
        news = is_news(event, payload, self.config)
        if news:
            self._heard = self.clock.monotonic()
            self._echo = self._heard + WEBHOOK_ECHO
            self._look_in = self._look_in or payload["action"] in ("closed", "unlabeled")
            self.request_poll()
        return news

    def _tell_progress(self) -> None:
        """Has one task tell how far it is, at a milestone or if it was quiet longest: beside milestones an edit a
        minute by all runners at work, fewer for a task that takes long, and none while GitHub allows little."""
        now, github = self.clock.monotonic(), self.github
        due = [attempt for attempt in self._running.values() if self._tale_due(attempt) <= now]
        if due:
            others = {seen.record.get("runner") for seen in self.seen.values()} - {None, self.id}
            self._next_tale = now + PROGRESS_PAUSE * (1 + len(others))
            first = min(due, key=lambda attempt: (not attempt.can_tell, not attempt.milestone, attempt.told))
            if github.paused() or github.poll_pause(1) > 1:
                first.milestone = False
            else:
                first.tell()

    def _tale_due(self, attempt: Attempt) -> float:
        """When an attempt may tell how far it is."""
        return attempt.next_tale if attempt.milestone else max(self._next_tale, attempt.next_tale)

    def _end_work(self) -> None:
        self.kill.set()
        for attempt in list(self._running.values()):
            attempt.halt.set()

    def _look_around(self) -> None:
        """Three times a lease: which issues in work are not wanted any more, and which claims are there. These also
        when another runner was faster: it may be ahead with other issues, and one look costs less than to try each."""
        now = self.clock.monotonic()
        due = now >= self._next_look
        if due or self._look_in:
            self._look_in = now < self._echo  # as an issue may lag behind its webhook too
            for attempt in list(self._running.values()):
                attempt.look_in()
        if due:
            self._next_look = now + self.config.lease / 3
        if due or self._lost:
            self._look_at_claims()

    def _look_at_claims(self) -> None:
        """Reads the claims of all runners. That of an earlier life of this runner may be taken over at once."""
        mirrors = (f"{path.parent.name}/{path.stem}" for path in self.config.state_dir.glob("repos/*/*.git"))
        rows, found, failed = list(self.queue.waiting.values()), dict[int, Seen](), False
        for repo in {repo.lower() for repo in (self.config.target_repo, *mirrors, *(row.repo for row in rows))}:
            try:
                claims = read_claims(Git(self.sign_in, self.stop), self.config, repo, self.folder / "claims")
            except RunnerError as error:
                log.log(logging.DEBUG if self.stop.is_set() else logging.WARNING, "no claims in %s: %s", repo, error)
                found |= {number: seen for number, seen in self.seen.items() if seen.repo.lower() == repo}
                failed = True
                continue
            for number, (commit, record) in claims.items():
                mine = self._first_look and record.get("runner") == self.id
                since = self.clock.monotonic() - (self.config.lease if mine else 0)
                found[number] = Seen(repo, commit, since, record)
        for row in rows:
            if row.processing and row.number not in found:  # a crash, or a person; wait for a lease as well
                found[row.number] = Seen(row.repo, "", self.clock.monotonic(), {})
        for number, before in self.seen.items():
            if number in found and found[number].commit == before.commit:
                found[number] = before
        self.seen, self._first_look = found, self._first_look and failed

    def _is_free(self, number: int) -> bool:
        """Whether nobody has the issue, or who has it has not stirred for a lease."""
        if seen := self.seen.get(number):
            return self.clock.monotonic() - seen.since >= self.config.lease
        return not self.queue.waiting[number].processing

    def _admit(self, only: int | None = None) -> None:
        """Starts as much of what is due as there are free workers, oldest first. Runners that have lost the same issue
        go on at different places, or they would meet at the next one."""
        now, room = self.clock.monotonic(), self.config.max_concurrent - len(self._running)
        known = {attempt.number for attempt in (*self._running.values(), *self._again)}
        numbers = sorted((self.queue.waiting.keys() | self.seen.keys()) - known, key=lambda n: (self._untold[n], n))
        due = [attempt for attempt in self._again if attempt.due <= now]
        free = [number for number in numbers if self._is_free(number) and only in (None, number)]
        at = int(stand_in(self.id)[1:], 16) % min(len(free), OLDEST) if self._lost and free else 0
        self._lost = False
        new = (Attempt(self, number) for number in [*free[at:], *free[:at]])
        for attempt in itertools.islice(itertools.chain(due, new), 0 if self.stop.is_set() else room):
            self._again = [other for other in self._again if other is not attempt]
            future = self._pool.submit(self._attempt, attempt)
            self._running[future] = attempt
            future.add_done_callback(lambda _: self.wake.set())

    def _attempt(self, attempt: Attempt) -> str:
        """One attempt, in a worker's thread; nothing that goes wrong in it leaves it."""
        with work_on(attempt.facts):
            try:
                return attempt.run()
            except Stopping:
                return "stopped"
            except RunnerError as error:
                if self.stop.is_set():
                    return "stopped"
                attempt.why = error.why
                log.error("left for later: %s", error.told)
            except Exception:
                attempt.why = "The runner met a fault; its log says more."
                log.exception("a fault of the runner")
            finally:
                attempt.enter("waiting")
            return "failed"

    def _collect(self) -> None:
        """Takes note of the attempts that have ended. What is not settled waits until the claims are read again."""
        for future in [future for future in self._running if future.done()]:
            attempt, outcome = self._running.pop(future), future.result()
            self._note(attempt, outcome)
            if outcome == "retry":
                self._again.append(attempt)
                continue
            self.outcomes[outcome] += 1
            self._lost = self._lost or outcome == "held"
            if outcome == "skipped" and not attempt.moved:  # what the list says is old, perhaps of other issues too
                self.request_poll()
            self.seen.pop(attempt.number, None)
            if attempt.moved:
                self.queue.waiting[attempt.number] = attempt.moved
            elif attempt.settled:
                self.queue.handled(attempt.number, attempt.settled)
                self._untold.pop(attempt.number, None)
            elif attempt.number in self.queue.waiting:
                self._untold[attempt.number] += outcome == "failed"
                self.seen[attempt.number] = Seen(attempt.claim.repo, "?", self.clock.monotonic(), {})

    def _note(self, attempt: Attempt, outcome: str) -> None:
        """Counts how an attempt ended, and keeps it for the status page."""
        self.metrics.count("tasks_total", outcome)
        if outcome in ("held", "skipped"):  # nothing was done
            return
        if outcome in ("done", "failed"):
            self.metrics.observe("task_seconds", attempt.elapsed, outcome)
        ended = {"outcome": outcome, "at": utc(self.clock.now()), "seconds": round(attempt.elapsed, 1)}
        why = self.config.masked(attempt.why)[:500] if outcome != "done" else ""
        self.history.appendleft(attempt.shown() | ended | {"why": why, "pull": attempt.pull})

    def _rest(self, until: float) -> None:
        """Waits for the next thing to do, or for somebody who knows of one."""
        until = min(until, self._next_look)
        until = min([until, *map(self._tale_due, self._running.values())])
        if len(self._running) < self.config.max_concurrent:
            until = min([until, *(attempt.due for attempt in self._again)])
        self.clock.wait(self.wake, max(0.0, until - self.clock.monotonic()))
        self.wake.clear()

    def _drain(self) -> None:
        """Lets the agents finish for AGENT_DRAIN_SECONDS, then ends them; puts back what waits."""
        deadline = self.clock.monotonic() + self.config.drain_seconds
        self._collect()
        if self._running:
            log.info("stopping: %d task(s) in work", len(self._running))
        while self._running and not self.kill.is_set() and self.clock.monotonic() < deadline:
            self.clock.wait(self.wake, deadline - self.clock.monotonic())
            self.wake.clear()
            self._collect()
        self._end_work()
        self._pool.shutdown()
        self._collect()
        for attempt in self._again:
            with contextlib.suppress(RunnerError):
                attempt.release(STOPPED)
            attempt.claim.release()
        remove_tree(self.folder)
        self._lock.close()


# -- The HTTP face: health, metrics, a page for people, and GitHub's webhooks. Off unless it has a port.

PORT_ADVICE = "Set AGENT_HTTP_PORT to a port that is free, another one for each runner of a machine."


def describe(runner: Runner) -> dict[str, Any]:
    """What a runner does now, as `/status.json` gives it: times in seconds, no secrets."""
    now, config, metrics = runner.clock.monotonic(), runner.config, runner.metrics
    running, again = runner.at_work()
    mine = {attempt.number for attempt in (*running, *again)}
    rows = sorted(runner.queue.waiting.copy().items())
    queue = [row for number, row in rows if number not in mine and number not in runner.seen]
    quota = {name: metrics.value(f"quota_{name}", "core") for name in ("remaining", "limit", "reset_timestamp_seconds")}
    status = {
        "version": __version__,
        "runner": runner.id,
        "dispatch": config.dispatch_repo,
        "targets": config.allowed_targets,
        "healthy": runner.healthy,
        "stopping": runner.stop.is_set(),
        "uptime": round(now - runner.started),
        "last_poll": round(now - runner.polled) if metrics.value("last_poll_timestamp_seconds") else None,
        "next_poll": max(0, round(runner.next_poll - now)),
        "webhooks": "off" if not config.webhook_secret else "coming in" if runner.hears else "none lately",
        "quota": quota,
        "paused": round(runner.github.paused()),
        "lease": config.lease,
        "running": [attempt.shown_at_work() for attempt in running],
        "waiting": [attempt.shown() | {"why": attempt.why, "due": round(attempt.due - now)} for attempt in again],
        "queue": [
            {"issue": r.number, "title": r.title, "url": issue_url(config, r.number)} for r in queue[:QUEUE_SHOWN]
        ],
        "queue_length": len(queue),
        "elsewhere": len(runner.seen.keys() - mine),
        "history": list(runner.history),
    }
    return {name: without_secrets(value, config) for name, value in status.items()}


def without_secrets(value: Any, config: Config) -> Any:
    """A value as JSON has it, with its texts masked; names are the runner's own."""
    if isinstance(value, dict):
        return {name: without_secrets(inner, config) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(inner, config) for inner in value]
    return config.masked(value) if isinstance(value, str) else value


def update_gauges(runner: Runner) -> None:
    """The numbers that are as they are at this moment."""
    metrics, status = runner.metrics, describe(runner)
    metrics.set("build_info", 1, __version__)
    metrics.set("uptime_seconds", status["uptime"])
    metrics.set("healthy", status["healthy"])
    metrics.set("paused_seconds", status["paused"])
    metrics.set("queue_length", status["queue_length"])
    metrics.set("tasks_running", len(status["running"]))
    metrics.set("tasks_waiting", len(status["waiting"]))


def live_line(status: Mapping[str, Any]) -> str:
    """What goes on now, in one line for a terminal."""
    parts = [f"#{t['issue']} {t['phase']} {duration(t['seconds'])} {t['last_line']}".strip() for t in status["running"]]
    queued, left = status["queue_length"], status["quota"]["remaining"]
    parts += [f"{queued} queued"] if queued else []
    parts += [f"{len(status['waiting'])} to be tried again"] if status["waiting"] else []
    looks = f"next look in {status['next_poll']} s" if not status["paused"] else f"paused for {status['paused']} s"
    parts += ["stopping" if status["stopping"] else looks]
    parts += [f"{left:,.0f} requests left"] if left is not None else []
    return printable(f"{'●' if status['healthy'] else '○'} {' · '.join(parts)}")


STYLE = """
:root{color-scheme:light dark;--bg:#f6f7f9;--card:#fff;--text:#1b1f24;--soft:#5b6470;--line:#dde1e6;--link:#0a58ca;
--good:#116932;--bad:#b3261e;--busy:#7a4d00;--wash:#eef1f4}
@media(prefers-color-scheme:dark){:root{--bg:#0e1116;--card:#171b22;--text:#e6e9ee;--soft:#9aa4b2;--line:#2b323c;
--link:#7fb2ff;--good:#5fd38a;--bad:#ff8a80;--busy:#f0b95a;--wash:#10141a}}
*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--text);font:16px/1.45 system-ui,sans-serif}
main{max-width:64rem;margin:0 auto;padding:1rem}a{color:var(--link)}h1{font-size:1.3rem;margin:.2rem 0}
h2{font-size:1rem;margin:1.6rem 0 .5rem}p{margin:0}.soft,dt{color:var(--soft);font-size:.875rem}
header{display:flex;flex-wrap:wrap;gap:.3rem 1rem;align-items:baseline;justify-content:space-between}
.pill{font-size:.8rem;font-weight:600;border:1px solid;border-radius:1rem;padding:.05rem .55rem;white-space:nowrap;
vertical-align:.08em}
.good{color:var(--good)}.bad{color:var(--bad)}.busy{color:var(--busy)}
dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(8rem,1fr));gap:.5rem;margin:1rem 0 0}
dl div,ul{background:var(--card);border:1px solid var(--line);border-radius:.5rem}dl div,li{padding:.6rem .75rem}
dd{margin:0}ul{list-style:none;margin:0;padding:0}li+li{border-top:1px solid var(--line)}
li,dd{overflow-wrap:anywhere}li .soft{margin-top:.15rem}time{white-space:nowrap}
pre{margin:.4rem 0 0;padding:.4rem .6rem;background:var(--wash);border-radius:.35rem;font-size:.8rem;
white-space:pre-wrap;overflow-wrap:anywhere}
"""
ICON = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg'%3E"
    "%3Ccircle cx='8' cy='8' r='7' fill='%230a58ca'/%3E%3C/svg%3E"
)
PILLS = {"done": "good", "failed": "bad", "dropped": "bad", "retry": "busy", "cancelled": "busy", "stopped": "busy"}


def shown(text: object) -> str:
    """Foreign text as HTML, on one line."""
    return html.escape(cut_line(printable(str(text)), 300))


def cut_line(text: str, limit: int) -> str:
    """Text on one line, if need be without its end."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _item(task: Mapping[str, Any], pill: str, *facts: str, below: str = "") -> str:
    """One task in a list of the page; facts are HTML."""
    mark = f'<span class="pill {PILLS.get(pill, "busy")}">{shown(pill)}</span>' if pill else ""
    title = f"<bdi>{shown(cut_line(task['title'], 120))}</bdi>"  # which cannot turn round what stands beside it
    head = f'<p>{mark} <a href="{html.escape(task["url"])}">#{task["issue"]}</a> {title}</p>'
    told = f'<p class="soft">{" · ".join(filter(None, facts))}</p>' if any(facts) else ""
    return f"<li>{head}{told}{below}</li>"


def _running_item(task: Mapping[str, Any]) -> str:
    claim = f"claim renewed {duration(task['claim']['renewed'])} ago"
    claim += f" by its holder number {task['claim']['epoch']}" if task["claim"]["epoch"] > 1 else ""
    below = f"<pre>{shown(task['last_line'])}</pre>" if task["last_line"] else ""
    attempt = f"attempt {task['attempt']}"
    return _item(task, task["phase"], duration(task["seconds"]), shown(task["target"]), attempt, claim, below=below)


def _past_item(task: Mapping[str, Any]) -> str:
    pull = f'<a href="{html.escape(task["pull"])}">pull request</a>' if task["pull"] else ""
    at = f'<time datetime="{shown(task["at"])}">{shown(task["at"][:16].replace("T", " "))} UTC</time>'
    facts = (pull, duration(task["seconds"]), shown(task["target"]), f"attempt {task['attempt']}", at)
    return _item(task, task["outcome"], *facts, below=f"<p>{shown(task['why'])}</p>" if task["why"] else "")


def render_page(status: Mapping[str, Any]) -> str:
    """The status page: one document that needs nothing else and refreshes itself."""
    kind, word = ("good", "healthy") if status["healthy"] else ("bad", "not healthy")
    health = f'<span class="pill {kind}">{word}</span>'
    last, quota = status["last_poll"], status["quota"]
    left = "not known yet" if quota["remaining"] is None else f"{quota['remaining']:,.0f} of {quota['limit']:,.0f}"
    cells = {
        "Last look": "none yet" if last is None else f"{duration(last)} ago",
        "Next look": f"in {duration(max(status['next_poll'], status['paused']))}",
        "Webhooks": status["webhooks"],
        "GitHub quota left": left,
        "Lease": duration(status["lease"]),
        "With other runners": status["elsewhere"],
        "Up for": duration(status["uptime"]),
    }
    facts = "".join(f"<div><dt>{name}</dt><dd>{shown(value)}</dd></div>" for name, value in cells.items())
    waiting = [_item(t, "retry", f"in {duration(max(0, t['due']))}", shown(t["why"])) for t in status["waiting"]]
    lists = {
        "Running": [*map(_running_item, status["running"])],
        "To be tried again": waiting,
        f"Queue ({status['queue_length']})": [_item(row, "") for row in status["queue"]],
        "Last results": [*map(_past_item, status["history"])],
    }
    body = "".join(
        f"<h2>{name}</h2>" + (f"<ul>{''.join(items)}</ul>" if items else '<p class="soft">Nothing.</p>')
        for name, items in lists.items()
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="10">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="robots" content="noindex">'
        f'<title>{len(status["running"])} running · agent runner</title><link rel="icon" href="{ICON}">'
        f"<style>{STYLE}</style></head><body><main><header><h1>Agent runner</h1>{health}</header>"
        f'<p class="soft">{shown(status["dispatch"])} → {shown(", ".join(status["targets"]))}</p><dl>{facts}</dl>{body}'
        f'<h2>Runner</h2><p class="soft">{shown(status["runner"])}, version {shown(status["version"])}</p>'
        "</main></body></html>"
    )


@functools.cache
def page_headers() -> dict[str, str]:
    """What keeps a browser from running, loading or framing anything."""
    style = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    return {
        "Content-Security-Policy": f"default-src 'none'; style-src 'sha256-{style}'; img-src data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cache-Control": "no-store",
    }


def read_payload(content_type: str, body: bytes) -> Any:
    """A delivery's content: JSON, or a form that holds it, as GitHub sends unless told otherwise. Raises ValueError."""
    if content_type.partition(";")[0].strip().lower() == "application/x-www-form-urlencoded":
        body = "".join(parse_qs(body.decode(), max_num_fields=10).get("payload", [])).encode()
    try:
        return json.loads(body)
    except RecursionError:
        raise ValueError("nested too deep") from None


def address_family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


class HttpFace(ThreadingHTTPServer):
    """The server. Nothing that comes in can hurt the loop: there are so many connections at most, for so long; when
    there are too many, the oldest is cut off."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self._open: OrderedDict[Any, float] = OrderedDict()  # the connections, and since when they are there
        self._known: OrderedDict[str, None] = OrderedDict()  # the signatures of the last deliveries
        self._complained = -math.inf
        self._lock = threading.Lock()
        host, port = runner.config.http_host, runner.config.http_port
        self.address_family = address_family(host)
        super().__init__((host, port), Exchange)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer would ask the name service who this is

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches it."""
        return ipaddress.ip_address(str(self.server_address[0])).is_loopback

    def is_new(self, signature: str) -> bool:
        """Whether a delivery comes for the first time. Its number is not signed, so that a replay can have another."""
        with self._lock:
            new = signature not in self._known
            self._known[signature] = None
            while len(self._known) > DELIVERIES_KNOWN:
                self._known.popitem(last=False)
            return new

    def may_complain(self) -> bool:
        """Whether the log may tell of a bad delivery, which it does once a minute."""
        with self._lock:
            now, last = self.runner.clock.monotonic(), self._complained
            self._complained = now if now - last >= COMPLAINT_PAUSE else last
            return self._complained != last

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._open[request] = self.runner.clock.monotonic()
            oldest = [*self._open][: max(0, len(self._open) - CONNECTIONS)]
        self._cut(oldest)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        now = self.runner.clock.monotonic()
        with self._lock:
            late = [request for request, since in self._open.items() if now - since > HTTP_PATIENCE]
        self._cut(late)

    def _cut(self, connections: Sequence[Any]) -> None:
        """Has the threads that read from or write to them come to an end."""
        for connection in connections:
            with self._lock:
                self._open.pop(connection, None)
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 (the library's names)
        level = logging.DEBUG if isinstance(sys.exception(), OSError) else logging.ERROR
        log.log(level, "a connection from %s broke", client_address, exc_info=level == logging.ERROR)


class Exchange(BaseHTTPRequestHandler):
    """One request to the face, and its answer."""

    server: HttpFace
    timeout = HTTP_PATIENCE
    error_content_type, error_message_format = "text/plain; charset=utf-8", "%(code)d %(message)s\n"

    def version_string(self) -> str:
        return "agent-runner"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the library's name)
        log.debug("%s: %s", self.client_address[0], format % args)

    def do_GET(self) -> None:
        runner, path = self.server.runner, self.path.partition("?")[0]
        if path == "/healthz":
            healthy = runner.healthy
            self._answer(200 if healthy else 503, "ok\n" if healthy else "The queue was not read lately.\n")
        elif path == "/webhook" and runner.config.webhook_secret:
            self._answer(405, "Webhooks are sent by POST.\n")
        elif path not in ("/", "/status.json", "/metrics"):
            self._answer(404, "There is nothing here.\n")
        elif not self._is_asked_by_its_name():
            self._answer(421, "Ask by this machine's address or as localhost.\n")
        elif path == "/":
            self._answer(200, render_page(describe(runner)), "text/html; charset=utf-8")
        elif path == "/metrics":
            update_gauges(runner)
            self._answer(200, runner.metrics.render(), "text/plain; version=0.0.4; charset=utf-8")
        else:
            self._answer(200, json.dumps(describe(runner), indent=1) + "\n", "application/json")

    do_HEAD = do_GET  # noqa: N815 (the library's name)

    def do_POST(self) -> None:
        runner = self.server.runner
        if self.path.partition("?")[0] != "/webhook" or not runner.config.webhook_secret:
            self._answer(404, "There is nothing here.\n")
            return
        status, result, told = self._take_delivery(runner)
        runner.metrics.count("webhooks_total", result)
        loud = result == "refused" and self.server.may_complain()
        log.log(logging.WARNING if loud else logging.DEBUG, "webhook from %s: %s", self.client_address[0], told)
        self._answer(status, f"{told}\n")

    def _take_delivery(self, runner: Runner) -> tuple[int, str, str]:
        """The status to answer with, the result to count, and a word about it. Nothing is read as anything but bytes
        before the signature is known to be right."""
        length, headers = self.headers.get("content-length", ""), self.headers
        if not re.fullmatch(r"\d{1,12}", length):
            return 411, "refused", "The delivery does not say how long it is."
        if int(length) > MAX_DELIVERY:
            self._pass_over(int(length))
            return 413, "refused", f"The delivery is longer than {MAX_DELIVERY:,} bytes."
        body, signature = self.rfile.read(int(length)), headers.get("x-hub-signature-256", "")
        if not is_signed(runner.config.webhook_secret, body, signature):
            return 401, "refused", "The header X-Hub-Signature-256 is missing or wrong: is the secret the same?"
        event = headers.get("x-github-event", "")
        if event == "ping":
            return 200, "ignored", "pong"
        if not self.server.is_new(signature):
            return 202, "repeated", "This delivery came before."
        try:
            payload = read_payload(headers.get("content-type", ""), body)
        except ValueError:
            return 400, "refused", "The delivery is no JSON."
        news = runner.hear(event, payload)
        return 202, "news" if news else "ignored", "The runner looks." if news else "That is no news for the runner."

    def _pass_over(self, length: int) -> None:
        """Reads on without keeping it, so that the sender gets to the answer."""
        while length > 0 and (data := self.rfile.read(min(length, 65_536))):
            length -= len(data)

    def _is_asked_by_its_name(self) -> bool:
        """Whether no site that a person visits can have had its own name lead here; for what only this machine reaches.
        https://en.wikipedia.org/wiki/DNS_rebinding"""
        name = r"(localhost|[\d.]+|\[[\da-f:.]+\]|)(:\d+)?"
        return not self.server.is_local or bool(re.fullmatch(name, self.headers.get("host", ""), re.IGNORECASE))

    def _answer(self, status: int, text: str, kind: str = "text/plain; charset=utf-8") -> None:
        body = text.encode("utf-8", "replace")
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **page_headers()}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body if self.command != "HEAD" else b"")


def http_address(config: Config, path: str = "/") -> str:
    host = f"[{config.http_host}]" if ":" in config.http_host else config.http_host
    return f"http://{host}:{config.http_port}{path}"


@contextlib.contextmanager
def serving(runner: Runner) -> Iterator[None]:
    """The face, if there is a port for it. Raises TaskFailed if it cannot be had."""
    host, port = runner.config.http_host, runner.config.http_port
    if not port:
        yield
        return
    try:
        face = HttpFace(runner)
    except (OSError, UnicodeError) as error:
        why = f"AGENT_HTTP_HOST and AGENT_HTTP_PORT, {host} and {port}: {getattr(error, 'strerror', '') or error}"
        raise TaskFailed(why, PORT_ADVICE) from None
    threading.Thread(target=face.serve_forever, args=(0.1,), name="http", daemon=True).start()
    log.info("status page on %s", http_address(runner.config))
    try:
        yield
    finally:
        face.shutdown()
        face.server_close()


@contextlib.contextmanager
def showing(runner: Runner, handler: logging.Handler) -> Iterator[None]:
    """The last line of a terminal's log, written anew each second by a thread of its own."""
    if not isinstance(handler, Terminal):
        yield
        return
    over = threading.Event()

    def show() -> None:
        while not runner.clock.wait(over, 1):
            handler.show(live_line(describe(runner)))
        handler.show("")

    thread = threading.Thread(target=show, name="terminal", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


# -- The doctor: what `--check` looks at, and what it advises. --------------------------------------

TOKENS = {  # https://docs.github.com/authentication/keeping-your-account-and-data-secure/about-authentication-to-github
    "ghp_": "classic token",
    "github_pat_": "fine-grained token",
    "gho_": "OAuth token",
    "ghu_": "App user token",
    "ghs_": "installation token",
}
PERMISSIONS = {"dispatch": {"issues": "write"}, "target": {"contents": "write", "pull_requests": "write"}}  # of an App


class Finding(NamedTuple):
    """What a check has found: `ok` is None if it could not be looked at. `cure` is what to do about it."""

    check: str
    ok: bool | None
    found: str
    cure: str = ""


def check_state(config: Config) -> str:
    """The runner's own folder."""
    try:
        config.state_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=config.state_dir).close()
    except OSError as error:
        advice = "Set AGENT_STATE_DIR to a folder that the runner may write to."
        raise TaskFailed(f"{config.state_dir}: {error.strerror}", advice) from None
    return f"{config.state_dir}"


def check_git(config: Config) -> str:
    """Settings by environment, on which the token's safety rests, came with git 2.31."""
    try:
        version = Git(SignIn(config))("version", git_dir=Path("/")).split()[2]
    except GitFailed as failure:
        raise TaskFailed(f"git does not start: {failure.output}", "Install git 2.31 or newer.") from None
    if [int(number) for number in re.findall(r"\d+", version)[:2]] < [2, 31]:
        raise TaskFailed(f"git {version} is too old", "Install git 2.31 or newer.")
    return f"git {version}"


def check_disk(config: Config) -> str:
    """Whether there is room for at least a tenth of what the runner may use."""
    free = free_bytes(str(config.state_dir)) // 10**6
    if free < config.disk_budget / 10:
        advice = "Free some, set AGENT_STATE_DIR to a folder on another disk, or lower AGENT_DISK_BUDGET_MB."
        raise TaskFailed(f"{free:,} MB are free, and AGENT_DISK_BUDGET_MB allows {config.disk_budget:,}", advice)
    return f"{free:,} MB are free"


def walls(config: Config) -> dict[str, bool]:
    """What an agent is kept from, and whether it is on this machine; docs/security.md says more of each."""
    version = landlock_version() if config.sandbox != "off" else 0
    return {
        "the runner's files": version > 0,
        "the runner's memory": os.geteuid() != 0 and (version > 0 or set_process(PR_SET_DUMPABLE, 0)),
        "signals to others": version >= 6,
        "others' abstract sockets": version >= 6,
        "others' sockets": version >= 9,
        "outliving its task": sys.platform == "linux",
    }


def check_sandbox(config: Config) -> str:
    """The walls around an agent. That they are incomplete is no fault, unless they are required."""
    if config.process_task == "patch" and not (config.routes or config.setup_command or config.verify_command):
        return "patches need none"
    if os.geteuid() == 0 and not config.allow_root:
        advice = "Start the runner as another user, in a container for example, or set AGENT_ALLOW_ROOT=yes."
        raise TaskFailed("the runner is root, whose agents no wall stops", advice)
    stands = walls(config)
    holding, missing = (", ".join(wall for wall in stands if stands[wall] is state) for state in (True, False))
    if config.sandbox == "required" and not stands["the runner's files"]:
        advice = "Use Linux 5.13 or newer with Landlock, or set AGENT_SANDBOX=auto."
        raise TaskFailed(f"AGENT_SANDBOX is required, and nothing keeps agents from {missing}", advice)
    if not stands["the runner's files"]:
        log.warning("agents can read the runner's files, its token included; docs/security.md says more")
    return f"agents are kept from {holding or 'nothing'}" + (f"; not from {missing}" if missing else "")


def check_model(config: Config) -> str:
    """Whether the model's server takes the key; not every server lists its models.
    https://platform.openai.com/docs/api-reference/models/list"""
    url, key = f"{config.model_url}/models", config.model_key
    auth = _bearer(key) if key else (lambda request: request)
    try:
        answer = requests.get(url, auth=auth, timeout=HTTP_TIMEOUT, allow_redirects=False)
    except requests.RequestException as error:
        raise TaskFailed(f"no answer from {url}: {root_cause(error)}", "Check OPENAI_BASE_URL.") from None
    if answer.status_code in (401, 403):
        raise TaskFailed(f"{url} answers {answer.status_code}", "Check OPENAI_API_KEY and what it may do.")
    return f"{config.model} at {config.model_url}"


def check_agents(config: Config) -> str:
    """The usual agent, and those that tasks can ask for."""
    usual = check_agent(config)
    others = [f"{name}: {check_agent(config.for_agent(name))}" for name in sorted(config.routes)]
    return "; ".join([usual, *others])


def check_agent(config: Config) -> str:
    """A plug-in is loaded, a model's server is asked; the other built-ins were looked at with the variables."""
    if ":" in config.process_task:
        config.home.mkdir(parents=True, exist_ok=True)
        done = run_supervised(config, make_order(config, [*PROGRAM, "--plugin", config.process_task], Path("/"), {}))
        if done.code:
            said = printable((done.out.strip() or done.late or f"status {done.code}").splitlines()[-1])
            raise TaskFailed(f"{config.process_task}: {said}", "Mend the plug-in, or AGENT_PROCESS_TASK.")
    if config.process_task == "openai":
        return f"openai {check_model(config)}"
    if config.process_task == "command":
        return f"command {'/bin/sh' if config.shell else command_words(config, {})[0]}"
    return config.process_task


def check_http(config: Config) -> str:
    """The port of the status page and of webhooks, which this runner or another one may be using already."""
    if not config.http_port:
        return "off, for AGENT_HTTP_PORT is not set"
    try:
        place = config.http_host, config.http_port
        socket.create_server(place, family=address_family(config.http_host)).close()
    except (OSError, UnicodeError) as error:
        if not is_runner_there(config):
            why = getattr(error, "strerror", "") or error
            raise TaskFailed(f"{http_address(config)}: {why}", PORT_ADVICE) from None
    hooks = f"webhooks at {http_address(config, '/webhook')}" if config.webhook_secret else "no webhooks"
    local = re.fullmatch(r"localhost|127\..+|::1", config.http_host)
    return f"page at {http_address(config)}, {hooks}" + (", for this machine only" if local else "")


def is_runner_there(config: Config) -> bool:
    """Whether a runner listens on the port of this one."""
    connection = http.client.HTTPConnection(config.http_host, config.http_port, timeout=3)
    with contextlib.closing(connection), contextlib.suppress(OSError, UnicodeError, http.client.HTTPException):
        connection.request("GET", "/healthz")
        return connection.getresponse().getheader("Server") == "agent-runner"
    return False


class Doctor:
    """Looks at everything that a task will need, a claim included, which it takes back."""

    def __init__(self, config: Config) -> None:
        self._config, self._clock = config, Clock()
        self._sign_in = SignIn(config)
        self._github = GitHub(config, self._clock, threading.Event(), sign_in=self._sign_in, waits=False)
        self._headers: Mapping[str, str] = {}
        self._quota: Mapping[str, Any] = {}
        self._ahead = 0.0  # seconds by which GitHub's clock is

    def findings(self) -> Iterator[Finding]:
        """One finding after the other. Where nobody can sign in, the rest is not looked at."""
        config = self._config
        local = {"state": check_state, "git": check_git, "disk": check_disk, "sandbox": check_sandbox}
        for name, check in {**local, "agent": check_agents, "http": check_http}.items():
            yield self._find(name, functools.partial(check, config))
        yield (first := self._find("sign-in", self._check_sign_in))
        targets = [name for name in config.allowed_targets if REPO_NAME.fullmatch(name)]
        remote = {"clock": self._check_clock, "quota": self._check_quota, "dispatch": self._check_dispatch}
        remote["labels"] = self._check_labels
        for repo in dict.fromkeys([config.target_repo, *targets]):
            remote[f"target {repo}"] = functools.partial(self._check_target, repo)
            remote[f"claims {repo}"] = functools.partial(self._check_claims, repo)
            remote[f"pulls {repo}"] = functools.partial(self._check_pulls, repo)
        for name, look in remote.items():
            yield self._find(name, look) if first.ok else Finding(name.split()[0], None, "not looked at")

    def _find(self, name: str, look: Callable[[], str]) -> Finding:
        ok: bool | None = True
        try:
            found, cure = look(), ""
        except Stopping:
            ok, found, cure = None, "not looked at, for GitHub's limit is reached", ""
        except (RunnerError, OSError) as error:
            ok, found, cure = False, str(error), getattr(error, "advice", "") or "See what is said above."
        # Plug-ins and GitHub are quoted, which may tell a secret.
        found, cure = (cut_line(printable(self._config.masked(text)), 500) for text in (found, cure))
        return Finding(name.split()[0], ok, found, cure)

    def _check_sign_in(self) -> str:
        """https://docs.github.com/rest/rate-limit/rate-limit, which costs nothing, and the headers of its answer"""
        config, begun = self._config, self._clock.now()
        try:
            answer = self._github.request("GET", "/rate_limit")
            core = answer.data["resources"]["core"]
            self._quota = {name: int(core[name]) for name in ("limit", "remaining", "reset")}
        except ApiRefused as refused:
            if refused.status != 404:  # which GitHub Enterprise Server answers where there are no limits
                raise
            answer = self._github.request("GET", f"/repos/{config.dispatch_repo}" if config.app_id else "/user")
        except (LookupError, TypeError, ValueError):
            raise Unreachable("the answer to GET /rate_limit is not GitHub's") from None
        self._headers, self._ahead = answer.headers, answer.at - begun
        if config.app_id:
            return self._check_app()
        token = self._sign_in.token(config.dispatch_repo)
        kind = next((kind for start, kind in TOKENS.items() if token.startswith(start)), "token")
        until = self._headers.get("github-authentication-token-expiration")
        return f"{kind}{self._check_scopes(token)}" + (f", until {until}" if until else "")

    def _check_scopes(self, token: str) -> str:
        """https://docs.github.com/apps/oauth-apps/building-oauth-apps/scopes-for-oauth-apps"""
        told = self._headers.get("x-oauth-scopes")
        if told is None or token.startswith(("github_pat_", "ghs_", "ghu_")):  # which have permissions instead
            return ""
        scopes = {scope.strip() for scope in told.split(",")}
        if scopes.isdisjoint({"repo", "public_repo"}):
            raise TaskFailed(f"the token's scopes are: {told or 'none'}", "Make a token with the scope repo.")
        if self._config.allow_workflows and "workflow" not in scopes:
            raise TaskFailed("the token lacks the scope workflow", "Add it, or unset AGENT_ALLOW_WORKFLOWS.")
        return f" with the scopes {told}"

    def _check_app(self) -> str:
        """The permissions that the App has where it is needed."""
        config, told = self._config, []
        for role, repo in {"dispatch": config.dispatch_repo, "target": config.target_repo}.items():
            has = self._sign_in.grant(repo).permissions
            needs = PERMISSIONS[role] | ({"workflows": "write"} if role == "target" and config.allow_workflows else {})
            if missing := ", ".join(f"{name}: {needs[name]}" for name in needs if has.get(name) != needs[name]):
                advice = "Add them in the App's settings, and accept the change in those of its installation."
                raise TaskFailed(f"the App lacks permissions for {repo}: {missing}", advice)
            told.append(repo)
        return f"App {config.app_id} with its permissions for {' and '.join(dict.fromkeys(told))}"

    def _check_clock(self) -> str:
        if abs(self._ahead) > 60:
            raise TaskFailed(f"this machine's clock is {duration(abs(self._ahead))} off", "Set it, for example by NTP.")
        return "as GitHub's, to a minute"

    def _check_quota(self) -> str:
        if not self._quota:
            return "there is no limit"
        left, limit = self._quota["remaining"], self._quota["limit"]
        if left < limit / 50:
            advice = "Other programs use the same account: give the runner one of its own, or wait."
            raise TaskFailed(f"{left:,} of {limit:,} requests are left until {utc(self._quota['reset'])}", advice)
        return f"{left:,} of {limit:,} requests are left"

    def _repository(self, repo: str) -> dict[str, Any]:
        """What the API says of a repository; an App's permissions were looked at before."""
        data: dict[str, Any] = self._github.request("GET", f"/repos/{repo}").data
        if data.get("archived"):
            raise TaskFailed(f"{repo} is archived", "Name another one, or unarchive it.")
        is_user = not self._sign_in.token(repo).startswith("ghs_")  # GitHub says nothing of an App here
        if is_user and not data.get("permissions", {}).get("push"):
            raise TaskFailed(f"{repo}: the token's user may not write", ADVICE[403])
        return data

    def _check_dispatch(self) -> str:
        repo = self._config.dispatch_repo
        if not self._repository(repo)["has_issues"]:
            raise TaskFailed(f"{repo}: issues are off", "Turn them on in its settings.")
        return f"{repo} has issues, and may be written to"

    def _check_labels(self) -> str:
        """The label of tasks must be there, for people choose it from a list. To write it as it is tells whether the
        token may write to issues."""
        repo, label = self._config.dispatch_repo, self._config.task_label
        path = f"/repos/{repo}/labels/{quote(label, safe='')}"
        try:
            colour = self._github.request("GET", path).data["color"]
        except ApiRefused as refused:
            if refused.status != 404:
                raise
            raise TaskFailed(f"{repo} has no label {label}", "Make it on the repository's page Labels.") from None
        self._github.request("PATCH", path, {"color": colour})
        return f"{label} is there; the others are made when they are needed"

    def _check_target(self, repo: str) -> str:
        self._repository(repo)
        branch, _ = Git(self._sign_in).refs(repo, "HEAD")
        if not branch:
            raise TaskFailed(f"{repo} is empty", "Push a first commit.")
        return f"{repo} can be read, its default branch is {branch}"

    def _check_claims(self, repo: str) -> str:
        git, probe = Git(self._sign_in), f"{claims_prefix(self._config)}check-{secrets.token_hex(4)}"
        with tempfile.TemporaryDirectory(dir=self._config.state_dir) as name:
            write_repository(folder := Path(name))
            commit = write_record(git, folder, {})
            git.push(repo, {probe: ("", commit)}, folder)
            git.push(repo, {probe: (commit, "")}, folder)
        return f"one was pushed to {repo} and deleted again"

    def _check_pulls(self, repo: str) -> str:
        """Asks for a pull request that cannot be: without the right to open one, GitHub refuses in another way."""
        branch, _ = Git(self._sign_in).refs(repo, "HEAD")
        body = {"title": "agent-runner --check", "head": branch, "base": branch}
        try:
            self._github.request("POST", f"/repos/{repo}/pulls", body)
        except ApiRefused as refused:
            if refused.status != 422:
                raise
        return f"may be opened in {repo}"


def examine(findings: Iterator[Finding], as_json: bool) -> int:
    """Tells what was found, each as soon as it is known, or all as JSON; the exit code."""
    rows = []
    for row in findings:
        rows.append(row)
        if not as_json:
            mark = {True: "✓", False: "✗", None: "·"}[row.ok]
            print(f"{mark} {row.check:<9} {row.found}" + (f"\n  → {row.cure}" if row.cure else ""), flush=True)
    good = all(row.ok for row in rows)
    if as_json:
        print(json.dumps({"version": __version__, "ok": good, "checks": [row._asdict() for row in rows]}, indent=1))
    return 0 if good else 1


# -- The command line. -----------------------------------------------------------------------------


def run(config: Config, once: bool, issue: int | None, handler: logging.Handler) -> int:
    """The daemon, or one round of it; the exit code."""
    try:
        for check in (check_state, check_git, check_sandbox, check_agents):
            check(config)
    except TaskFailed as problem:
        log.error("cannot start: %s", problem.told)
        return 2
    runner = Runner(config)

    def act(number: int, _frame: object) -> None:
        # In a thread: the handler may have interrupted the holder of the lock that Event.set takes.
        stop = functools.partial(runner.request_stop, now=runner.stop.is_set())
        threading.Thread(target=runner.request_poll if number == signal.SIGHUP else stop).start()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, act)
    if not once and issue is None:
        try:
            with serving(runner), showing(runner, handler):
                runner.run_forever()
        except TaskFailed as problem:
            log.error("cannot start: %s", problem.told)
            return 2
        return 0
    try:
        runner.run_once(issue)
    except Stopping:
        log.info("stopped before the queue was read")
    except RunnerError as error:
        log.error("cannot read the queue: %s", error.told)
        return 1
    good = not runner.outcomes.keys() & {"failed", "stopped"} if once else runner.outcomes["done"] > 0
    return 0 if good and not runner.stop.is_set() else 1


def command_line() -> argparse.ArgumentParser:
    """The options; one of them is for the runner itself."""
    what = "Turns labelled GitHub issues into pull requests with the agent of your choice."
    more = """Everything else is set by environment variables, or in a file .env in the current folder; README.md lists
    them. Signals: SIGTERM or Ctrl-C lets finish what runs (AGENT_DRAIN_SECONDS), a second one ends it now, SIGHUP
    looks for work at once. Exit codes: 0 all well, 1 something failed, 2 set up wrongly."""
    parser = argparse.ArgumentParser(description=what, epilog=more)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--once", action="store_true", help="poll once, finish its tasks, exit")
    how.add_argument("--issue", type=int, metavar="N", help="run one issue, exit")
    how.add_argument("--check", action="store_true", help="look whether everything is in place")
    parser.add_argument("--json", action="store_true", help="with --check: for programs")
    how.add_argument("--plugin", metavar="SPEC", help=argparse.SUPPRESS)
    how.add_argument("--version", action="version", version=f"agent-runner {__version__}")
    return parser


def log_handler(config: Config, is_check: bool) -> logging.Handler:
    """Where the log goes: to standard error, which may be a terminal that can write a line over."""
    able = sys.stderr.isatty() and config.env.get("TERM") not in (None, "", "dumb")
    handler = Terminal() if able and config.log_format == "text" and not is_check else logging.StreamHandler()
    handler.setFormatter(LogFormat(config))
    return handler


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_line()
    options = parser.parse_args(arguments)
    if options.json and not options.check:
        parser.error("--json goes with --check")
    if options.plugin:
        return serve_plugin(options.plugin, sys.stdin.read())
    set_process(PR_SET_DUMPABLE, 0)  # shuts /proc/<pid>/environ and /mem, where the token is
    set_process(PR_SET_CHILD_SUBREAPER, 1)
    try:
        # Read, not loaded: what is in .env must not get into the environment that others inherit.
        file = dotenv_values(Path.cwd() / ".env", interpolate=False)
        env = {**os.environ, **{name: os.environ.get(name) or value or "" for name, value in file.items()}}
        config = Config.from_env(env)
    except (ConfigError, OSError, UnicodeDecodeError) as error:
        if options.check and isinstance(error, ConfigError):
            return examine(
                (Finding("settings", False, why, "Mend this variable.") for why in error.problems), options.json
            )
        print(error if isinstance(error, ConfigError) else f"cannot read .env: {error}", file=sys.stderr)
        return 2
    os.environ.update({name: value for name, value in env.items() if NETWORK.fullmatch(name)})  # requests looks there
    handler = log_handler(config, options.check)
    logging.basicConfig(level=config.log_level, handlers=[handler], force=True)
    for warning in config.unknown():
        log.warning("%s", warning)
    if options.check:
        return examine(Doctor(config).findings(), options.json)
    return run(config, options.once, options.issue, handler)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
