"""A strict stand-in for GitHub: REST below /api/v3, GraphQL and git over HTTP, in this process.

    with StandIn(tmp_path) as github:
        github.add_repository("acme/dispatch")
        number = github.open_issue("acme/dispatch", title="Say hello", body="...")
        ...  # point the program at github.api_url and github.server_url with github.token
        assert github.issue("acme/dispatch", number).labels == ["copilot-agent"]
        assert github.problems == []

Strict means: an unknown route, query parameter or body key, a missing header, or a bug in here
ends up in `problems`. Rules come from GitHub's documentation; repositories are real bare git
repositories behind `git http-backend`. Standard library only; who wants GraphQL passes standin_graphql,
who wants to sign in as a GitHub App passes standin_app.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import itertools
import json
import math
import os
import re
import socket
import ssl
import string
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from typing import Any, Protocol, Self, TypeVar, cast
from urllib.parse import parse_qsl, unquote, urlencode

API_PREFIX, GRAPHQL = "/api/v3", "/api/graphql"  # as on GitHub Enterprise Server
REASONS = http.client.responses
# https://docs.github.com/en/rest/about-the-rest-api/api-versions
API_VERSIONS = {"2022-11-28", "2026-03-10"}
MEDIA_TYPE = "application/vnd.github+json"
DOCUMENTATION = "https://docs.github.com/rest"
NO_JWT = "A JSON web token could not be decoded"
LEVELS = ("read", "write", "admin")  # of a permission; each holds those before it
MAX_BODY, MAX_TITLE, MAX_LABEL, MAX_DESCRIPTION = 65_536, 256, 50, 100
BLOCK = 65_536

REPOSITORY_CONFIG = """
[http]
    receivepack = true
[uploadpack]
    allowFilter = true
    allowAnySHA1InWant = true
[receive]
    autogc = false
    hideRefs = refs/pull
[gc]
    auto = 0
"""

T = TypeVar("T")
Json = dict[str, Any]


# What is seen and what goes wrong.


@dataclass
class RecordedRequest:
    """One request as it came in; `path` is still percent-encoded."""

    kind: str  # "rest": path is below the API prefix; "graphql" and "git": whole path
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]  # lower-case names
    json: Any = None
    status: int = 0  # what was answered; 0: nothing
    at: float = field(default_factory=time.monotonic)


@dataclass
class Fault:
    """Something that goes wrong on requests that match, `times` times (None: for ever).

    The first fault in the list that applies is the only one that applies. A `delay` lies between
    the effect and the answer, and so does `after_effect`; for a late effect, sleep in `action`.
    """

    method: str = "*"
    path: str = ".*"  # regular expression for the whole of RecordedRequest.path
    kind: str = "rest"  # "rest", "graphql", "git" or "*"
    where: Callable[[RecordedRequest], bool] | None = None  # what else must hold of the request
    times: int | None = 1
    after: int = 0  # so many matching requests pass first
    status: int | None = None  # answer with it, without the effect
    body: Any = None  # of that answer: JSON, or bytes as they are
    headers: dict[str, str] = field(default_factory=dict)  # of that answer, else added to the real
    delay: float = 0.0
    drop: str | None = None  # "before" the effect, or "after" it: close without an answer
    action: Callable[[], None] | None = None  # called before the request is handled
    after_effect: Callable[[], None] | None = None  # called before it is answered
    seen: int = 0  # how many requests have matched

    def matches(self, request: RecordedRequest) -> bool:
        return (
            self.kind in ("*", request.kind)
            and self.method in ("*", request.method)
            and re.fullmatch(self.path, request.path) is not None
            and (self.where is None or self.where(request))
        )

    def applies(self) -> bool:
        """Count one matching request and tell whether this is one to spoil."""
        self.seen += 1
        return self.seen > self.after and (self.times is None or self.seen <= self.after + self.times)


# What GitHub keeps.


@dataclass
class Label:
    id: int
    name: str
    color: str = "ededed"
    description: str | None = None


@dataclass
class Comment:
    id: int
    body: str
    user: str
    association: str
    created_at: str
    updated_at: str


@dataclass
class Event:
    """What somebody has done to an issue's text or labels; only GraphQL tells it."""

    kind: str  # "edited" (its body), "renamed" or "labeled"
    by: str | None  # None: the account has been deleted
    at: str
    label: Label | None = None


@dataclass(kw_only=True)
class Issue:
    id: int
    number: int
    title: str
    body: str | None
    user: str
    association: str
    created_at: str
    updated_at: str
    state: str = "open"
    state_reason: str | None = None
    closed_at: str | None = None
    labels: list[str] = field(default_factory=list)
    comments: list[Comment] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)  # the oldest first
    deleted: bool = False
    transferred_to: str | None = None  # "owner/repo#number"


@dataclass(kw_only=True)
class Pull(Issue):
    """A pull request is an issue too: same numbers, same comments, same labels."""

    head: str
    base: str
    head_sha: str
    base_sha: str
    draft: bool = False
    html_url: str = ""
    reviewers: list[str] = field(default_factory=list)  # whose review is requested: logins
    team_reviewers: list[str] = field(default_factory=list)  # and slugs of teams


@dataclass
class Repository:
    id: int
    name: str  # owner/repo, as it was created
    path: Path
    default_branch: str
    private: bool = False
    has_issues: bool = True
    has_drafts: bool = True  # private repositories of free plans have no draft pull requests
    teams: set[str] = field(default_factory=set)  # slugs of those that may review
    moved_to: str | None = None  # owner/repo after a rename or transfer
    labels: dict[str, Label] = field(default_factory=dict)  # by lower-case name
    issues: dict[int, Issue] = field(default_factory=dict)

    @property
    def full_name(self) -> str:
        return self.moved_to or self.name

    @property
    def owner(self) -> str:
        return self.full_name.partition("/")[0]


# Who asks.


@dataclass(frozen=True)
class Actor:
    """Somebody who has signed in, and what the token is good for."""

    login: str
    kind: str  # "user" and "installation" have a token, "app" has a JSON web token
    sees: Callable[[Repository], bool]
    permissions: Mapping[str, str] | None = None  # None: permissions are no matter
    may_write: bool = True  # as far as a classic token's scopes tell

    @property
    def association(self) -> str:
        """That of what it writes; a bot is no member of anything."""
        return "COLLABORATOR" if self.kind == "user" else "NONE"

    @property
    def refusal(self) -> str:
        """https://docs.github.com/en/rest/using-the-rest-api/troubleshooting-the-rest-api#resource-not-accessible"""
        return f"Resource not accessible by {'personal access token' if self.kind == 'user' else 'integration'}"

    def holds(self, needs: str, *, pull: bool = False) -> bool:
        """Whether a permission such as "issues=write" is held, or none is needed.

        Of several ("issues=write; pull_requests=write") each is enough for a pull request, and the first for the rest.
        """
        if self.permissions is None or not needs:
            return True
        wanted = [need.partition("=") for need in needs.split("; ")]
        return any(grants(self.permissions, {name: level}) for name, _, level in wanted[: None if pull else 1])


def grants(held: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    """Whether these permissions hold those."""
    return all(name in held and LEVELS.index(level) <= LEVELS.index(held[name]) for name, level in wanted.items())


class AppSide(Protocol):
    """What the stand-in asks of a GitHub App; standin_app has one."""

    def identify(self, github: StandIn, token: str) -> Actor:
        """The App whose JSON web token it is; HttpError if it is not as it should be."""

    def sign_in(self, github: StandIn, token: str) -> Actor | None:
        """The installation whose token it is, while the token is good."""


class StandIn:
    """GitHub with one user, one personal token, at most one App, and a memory of all that it was asked."""

    def __init__(
        self,
        root: Path,
        *,
        token: str = "ghp_" + string.digits + string.ascii_lowercase,
        address: str = "127.0.0.1",
        port: int = 0,
        check: Callable[[RecordedRequest], None] | None = None,
        graphql: Callable[[StandIn, RecordedRequest], Json] | None = None,
        app: AppSide | None = None,
        tls: ssl.SSLContext | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.root, self.token, self.check, self.graphql, self.now = root, token, check, graphql, now
        self.app, self.tls, self.address = app, tls, address
        self.login = "agent-runner"  # whose personal token it is
        self.scopes: str | None = "repo"  # of that token; None: it tells none and may do everything
        self.fine_grained: dict[str, str] | None = None  # its permissions, which make it a fine-grained one
        self.token_expiration: str | None = None  # such as "2026-12-01 00:00:00 UTC"
        self.log: list[RecordedRequest] = []
        self.problems: list[str] = []
        self.faults: list[Fault] = []
        self.push_denied: set[str] = set()  # repositories the token may read only
        self.hidden: set[str] = set()  # repositories that answer 404 to everything
        self.permissions: dict[str, str] = {}  # by login: admin, write, read or none; nobody else exists
        self.rate_limit = self.rate_remaining = self.graphql_remaining = 5000
        self.rate_reset = int(now()) + 3600
        self.repositories: dict[str, Repository] = {}
        self.lock = threading.RLock()
        self.stopping = threading.Event()
        self._asking = threading.local()
        self._ids = itertools.count(1001)
        (root / "home").mkdir(parents=True, exist_ok=True)
        self._server: _Server | None = _Server(self, port)
        self._thread: threading.Thread | None = None
        self.port: int = self._server.server_address[1]
        self.server_url = f"https://localhost:{self.port}" if tls else f"http://{address}:{self.port}"
        self.api_url = self.server_url + API_PREFIX

    # Life.

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Begin to answer; after stop() at the same port and with the same state."""
        self.stopping.clear()
        server = self._server = self._server or _Server(self, self.port)
        server.server_activate()
        self._thread = threading.Thread(target=server.serve_forever, args=(0.02,), name="standin", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Refuse connections from now on, cut those that are open, leave no thread behind."""
        server, self._server = self._server, None
        thread, self._thread = self._thread, None
        self.stopping.set()
        if server and thread:
            server.shutdown()
            thread.join()
        if server:
            server.server_close()
            server.cut_connections()

    # What tests look at.

    def rest(self) -> list[RecordedRequest]:
        """The REST requests so far."""
        return self.requests("rest")

    def requests(self, *kinds: str) -> list[RecordedRequest]:
        """The requests of these kinds so far."""
        return [request for request in list(self.log) if request.kind in kinds]

    def url(self, name: str) -> str:
        """The clone URL of a repository."""
        return f"{self.server_url}/{name}.git"

    def settings(self, dispatch: str, target: str, state: Path) -> dict[str, str]:
        """The whole environment of a runner that is to work here."""
        return {
            "PATH": os.environ["PATH"],
            "GITHUB_TOKEN": self.token,
            "GITHUB_API_URL": self.api_url,
            "GITHUB_SERVER_URL": self.server_url,
            "AGENT_DISPATCH_REPO": dispatch,
            "AGENT_TARGET_REPO": target,
            "AGENT_STATE_DIR": str(state),
        }

    def repository(self, name: str) -> Repository:
        """The repository of that name, new or old; KeyError if there is none."""
        with self.lock:
            for repo in self.repositories.values():
                if repo.full_name.lower() == name.lower():
                    return repo
            return self.repositories[name.lower()]

    def issue(self, name: str, number: int) -> Issue:
        return self.repository(name).issues[number]

    def pulls(self, name: str) -> list[Pull]:
        with self.lock:
            issues = list(self.repository(name).issues.values())
        return [issue for issue in issues if isinstance(issue, Pull)]

    def git(self, name: str, *args: str) -> str:
        """The output of git, run in that bare repository; RuntimeError if it fails."""
        command = ["git", "--git-dir", str(self.repository(name).path), *args]
        return self._run_git(command).decode(errors="replace").rstrip("\n")

    def git_env(self) -> dict[str, str]:
        """An environment for git without this machine's or this user's settings."""
        who = {"NAME": "octocat", "EMAIL": "octocat@example.com"}
        return {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(self.root / "home"),
            "LC_ALL": "C",
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_CONFIG_GLOBAL": os.devnull,
            **{f"GIT_{role}_{key}": who[key] for role in ("AUTHOR", "COMMITTER") for key in who},
        }

    def heads(self, repo: Repository) -> dict[str, str]:
        """The branches and their commits."""
        form = "--format=%(objectname) %(refname:lstrip=2)"
        lines = self.git(repo.name, "for-each-ref", form, "refs/heads").splitlines()
        return {branch: sha for sha, _, branch in (line.partition(" ") for line in lines)}

    # What people do.

    def add_repository(
        self,
        name: str,
        *,
        files: Mapping[str, str | bytes] | None = {"README.md": "# A repository\n"},
        default_branch: str = "main",
        private: bool = False,
    ) -> Repository:
        """Make a repository with one commit that holds the files (None: without a commit)."""
        path = self.root / "git" / f"{name}.git"
        path.mkdir(parents=True)
        branch = f"--initial-branch={default_branch}"
        self._run_git(["git", "init", "--quiet", "--bare", "--template=", branch, str(path)])
        with (path / "config").open("a") as config:
            config.write(REPOSITORY_CONFIG)
        repo = Repository(next(self._ids), name, path, default_branch, private)
        with self.lock:
            self.repositories[name.lower()] = repo
        if files is not None:
            self.commit(name, files, message="First commit")
        return repo

    def commit(
        self,
        name: str,
        files: Mapping[str, str | bytes],
        *,
        branch: str | None = None,
        message: str = "A change",
    ) -> str:
        """Put a commit with these files on top of a branch and return its hash."""
        repo = self.repository(name)
        ref = f"refs/heads/{branch or repo.default_branch}"
        who = f"octocat <octocat@example.com> {int(self.now())} +0000"
        parts = [f"commit {ref}\ncommitter {who}\n".encode(), _data(message)]
        if ref.removeprefix("refs/heads/") in self.heads(repo):
            parts.append(f"from {ref}^0\n".encode())
        for path, content in files.items():
            parts += [f"M 100644 inline {path}\n".encode(), _data(content)]
        command = ["git", "--git-dir", str(repo.path), "fast-import", "--quiet"]
        self._run_git(command, b"".join(parts))
        return self.git(name, "rev-parse", ref)

    def open_issue(
        self,
        name: str,
        *,
        title: str,
        body: str | None,
        labels: Sequence[str] = ("copilot-agent",),
        author: str = "octocat",
        association: str = "OWNER",
        pull_request: bool = False,
    ) -> int:
        """Open an issue (or a pull request, of a branch that nobody looks at); its number."""
        repo = self.repository(name)
        with self.lock:
            values = self.new_issue(repo, title, body, author, association)
            issue = Issue(**values)
            if pull_request:
                issue = self.new_pull(repo, values, f"patch-{values['number']}")
            repo.issues[issue.number] = issue
            for label in labels:
                self.add_label(name, issue.number, label, by=author)
            for event in issue.events:  # all of it is one act
                event.at = issue.created_at
            issue.updated_at = issue.created_at
        return issue.number

    def edit_issue(
        self,
        name: str,
        number: int,
        *,
        title: str | None = None,
        body: str | None = None,
        by: str | None = "octocat",
    ) -> None:
        with self.lock:
            issue = self.issue(name, number)
            if title is not None:
                issue.title = title
                self.record(issue, "renamed", by)
            if body is not None:
                issue.body = body
                self.record(issue, "edited", by)

    def close_issue(self, name: str, number: int) -> None:
        self.set_state(self.issue(name, number), "closed")

    def reopen_issue(self, name: str, number: int) -> None:
        self.set_state(self.issue(name, number), "open")

    def add_label(self, name: str, number: int, label: str, *, by: str | None = "octocat") -> None:
        """Label an issue by hand; a label the repository lacks is made with its own colour."""
        with self.lock:
            repo = self.repository(name)
            if label.lower() not in repo.labels:
                made = Label(next(self._ids), label, "d4c5f9", "Made by a person")
                repo.labels[label.lower()] = made
            self.label_issue(repo, repo.issues[number], label, by)

    def remove_label(self, name: str, number: int, label: str) -> None:
        with self.lock:
            issue = self.issue(name, number)
            issue.labels.remove(self.repository(name).labels[label.lower()].name)
            self.touch(issue)

    def comment(
        self,
        name: str,
        number: int,
        body: str,
        *,
        author: str = "octocat",
        association: str = "OWNER",
    ) -> int:
        """Write a comment on an issue and return the comment's id."""
        return self.new_comment(self.issue(name, number), body, author, association).id

    # The changes that people and the API have in common. Each bumps updated_at.

    def new_issue(self, repo: Repository, title: str, body: str | None, user: str, association: str) -> Json:
        """The fields of a new issue or pull request: they share one sequence of numbers."""
        stamp = iso(self.now())
        return {
            "id": next(self._ids),
            "number": max(repo.issues, default=0) + 1,
            "title": title,
            "body": body,
            "user": user,
            "association": association,
            "created_at": stamp,
            "updated_at": stamp,
        }

    def new_pull(self, repo: Repository, values: Json, head: str, **more: Any) -> Pull:
        html_url = f"{self.server_url}/{repo.full_name}/pull/{values['number']}"
        fields = {"base": repo.default_branch, "head_sha": "0" * 40, "base_sha": "0" * 40, **more}
        return Pull(head=head, html_url=html_url, **values, **fields)

    def new_comment(self, issue: Issue, body: str, user: str, association: str) -> Comment:
        with self.lock:
            stamp = iso(self.now())
            comment = Comment(next(self._ids), body, user, association, stamp, stamp)
            issue.comments.append(comment)
            self.touch(issue)
        return comment

    def new_label(self, repo: Repository, name: str, **fields: Any) -> Label:
        """The repository's label of that name, made as the API makes one if there is none."""
        label = repo.labels.get(name.lower())
        if label is None:
            label = repo.labels[name.lower()] = Label(next(self._ids), name, **fields)
        return label

    def label_issue(self, repo: Repository, issue: Issue, name: str, by: str | None) -> None:
        label = self.new_label(repo, name)
        if label.name not in issue.labels:
            issue.labels.append(label.name)
            self.record(issue, "labeled", by, label)

    def record(self, issue: Issue, kind: str, by: str | None, label: Label | None = None) -> None:
        self.touch(issue)
        issue.events.append(Event(kind, by, issue.updated_at, label))

    def set_draft(self, pull: Pull, draft: bool) -> None:
        with self.lock:
            pull.draft = draft
            self.touch(pull)

    def set_state(self, issue: Issue, state: str) -> None:
        with self.lock:
            if issue.state != state:
                issue.state = state
                issue.state_reason = "completed" if state == "closed" else "reopened"
                issue.closed_at = iso(self.now()) if state == "closed" else None
                self.touch(issue)

    def touch(self, thing: Issue | Comment) -> None:
        thing.updated_at = iso(self.now())

    def after_push(self, repo: Repository) -> None:
        """Let open pull requests follow their branch; without its branch one is closed."""
        pulls = [pull for pull in self.pulls(repo.name) if pull.state == "open"]
        heads = self.heads(repo) if pulls else {}
        with self.lock:
            for pull in pulls:
                if pull.head not in heads and pull.head_sha.strip("0"):
                    self.set_state(pull, "closed")
                elif pull.head_sha != heads.get(pull.head, pull.head_sha):
                    pull.head_sha = heads[pull.head]
                    self.touch(pull)

    # Inner needs of the request handling below.

    @property
    def actor(self) -> Actor | None:
        """Who has signed in with the request that this thread answers."""
        return cast("Actor | None", getattr(self._asking, "actor", None))

    @actor.setter
    def actor(self, actor: Actor | None) -> None:
        self._asking.actor = actor

    def sign_in(self, token: str) -> Actor | None:
        """Whose token it is, a personal one or that of an App's installation."""
        if token == self.token:
            return self.user()
        return self.app.sign_in(self, token) if self.app else None

    def user(self) -> Actor:
        """Whoever has the personal token.

        https://docs.github.com/en/apps/oauth-apps/building-oauth-apps/scopes-for-oauth-apps#available-scopes
        """
        if self.fine_grained is not None:
            return Actor(self.login, "user", lambda _: True, {"metadata": "read", **self.fine_grained})
        scopes = {scope.strip() for scope in ("repo" if self.scopes is None else self.scopes).split(",")}
        whole = "repo" in scopes
        may_write = whole or "public_repo" in scopes
        return Actor(self.login, "user", lambda repo: whole or not repo.private, may_write=may_write)

    def may_push(self, repo: Repository) -> bool:
        """Whether who asks may write to the repository, as far as its role in there tells."""
        return self.actor is not None and self.actor.may_write and repo.name not in self.push_denied

    def find(self, name: str) -> Repository | None:
        """The repository, unless the token may not see it."""
        try:
            repo = self.repository(name)
        except KeyError:
            return None
        unseen = self.actor is not None and not self.actor.sees(repo)
        return None if unseen or {repo.name, repo.full_name} & self.hidden else repo

    def fault_for(self, request: RecordedRequest) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.matches(request) and fault.applies():
                    return fault
        return None

    def problem(self, request: RecordedRequest, text: str) -> None:
        self.problems.append(f"{request.method} {request.path}: {text}")

    def _run_git(self, command: list[str], stdin: bytes = b"") -> bytes:
        done = subprocess.run(command, input=stdin, env=self.git_env(), capture_output=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.decode(errors='replace')}")
        return done.stdout


def iso(timestamp: float) -> str:
    """A time as GitHub writes it: UTC, whole seconds."""
    return datetime.fromtimestamp(timestamp, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _data(content: str | bytes) -> bytes:
    """The data command of git fast-import."""
    raw = content.encode() if isinstance(content, str) else content
    return b"data %d\n%s\n" % (len(raw), raw)


# One REST request: who asks, what for, and what may go wrong on the way.


@dataclass
class Answer:
    status: int
    data: Any = None
    headers: dict[str, str] = field(default_factory=dict)


class HttpError(Exception):
    """An answer that is not a success."""

    def __init__(self, status: int, message: str, errors: Sequence[Json | str] | None = None) -> None:
        super().__init__(message)
        data = {"message": message, "documentation_url": DOCUMENTATION, "status": str(status)}
        self.answer = Answer(status, data | ({"errors": list(errors)} if errors else {}))


def invalid(resource: str, name: str | None, code: str, message: str | None = None) -> HttpError:
    """https://docs.github.com/en/rest/using-the-rest-api/troubleshooting-the-rest-api#validation-failed"""
    error = {"resource": resource, "field": name, "code": code, "message": message}
    return HttpError(422, "Validation Failed", [{key: value for key, value in error.items() if value}])


@dataclass
class Call:
    """A request that was let in, with what its handler needs."""

    github: StandIn
    request: RecordedRequest
    args: dict[str, str]  # the path's parameters, decoded
    tail: str  # the path below /repos/{owner}/{repo}

    @property
    def actor(self) -> Actor:
        assert self.github.actor is not None
        return self.github.actor

    @property
    def query(self) -> dict[str, str]:
        return self.request.query

    @property
    def body(self) -> Json:
        if not isinstance(self.request.json, dict):
            raise HttpError(422, "Invalid request.\n\nThe body is not an object.")
        return self.request.json

    @property
    def repo(self) -> Repository:
        name = f"{self.args['owner']}/{self.args['repo']}"
        repo = self.github.find(name)
        if repo is None:
            raise HttpError(404, "Not Found")
        if repo.full_name.lower() != name.lower():
            raise self.moved(repo, self.tail)
        if "/issues" in self.tail and not repo.has_issues:
            raise HttpError(410, "Issues are disabled for this repo")
        return repo

    @property
    def issue(self) -> Issue:
        """https://docs.github.com/en/rest/issues/issues#get-an-issue"""
        issue = self.repo.issues.get(int(self.args["number"]))
        if issue is None:
            raise HttpError(404, "Not Found")
        if issue.deleted:
            raise HttpError(410, "This issue was deleted")
        if issue.transferred_to:
            name, _, number = issue.transferred_to.partition("#")
            repo = self.github.find(name)
            if repo is None:
                raise HttpError(404, "Not Found")
            raise self.moved(repo, re.sub(r"/\d+", f"/{number}", self.tail, count=1))
        return issue

    @property
    def pull(self) -> Pull:
        pull = self.issue
        if not isinstance(pull, Pull):
            raise HttpError(404, "Not Found")
        return pull

    @property
    def is_about_a_pull(self) -> bool:
        """Whether the path has the number of a pull request, which is an issue too."""
        repo = self.github.find(f"{self.args['owner']}/{self.args['repo']}") if "number" in self.args else None
        return repo is not None and isinstance(repo.issues.get(int(self.args["number"])), Pull)

    def moved(self, repo: Repository, tail: str) -> HttpError:
        """https://docs.github.com/en/rest/using-the-rest-api/best-practices-for-using-the-rest-api#follow-redirects"""
        query = f"?{urlencode(self.query)}" if self.query else ""
        url = f"{self.github.api_url}/repositories/{repo.id}{tail}{query}"
        permanent = self.request.method == "GET"
        refusal = HttpError(301 if permanent else 307, "Moved Permanently" if permanent else "Temporary Redirect")
        refusal.answer.data["url"] = refusal.answer.headers["location"] = url
        return refusal

    def text(self, resource: str, key: str, limit: int, *, required: bool = False) -> str | None:
        """A string of the body, within its limit."""
        value = self.body.get(key)
        if required and not value:
            raise invalid(resource, key, "missing_field")
        if not isinstance(value, str | None):
            raise HttpError(422, f"Invalid request.\n\nFor 'properties/{key}', not a string.")
        if value and len(value) > limit:
            text = f"{key} is too long (maximum is {limit} characters)"
            raise invalid(resource, key, "custom", text)
        return value

    def choice(self, key: str, *allowed: str) -> str:
        """A query parameter with a fixed set of values; the first is the default."""
        value = self.query.get(key, allowed[0])
        if value not in allowed:
            raise invalid("Issue", key, "invalid")
        return value


Handler = Callable[[Call], Answer]


@dataclass(frozen=True)
class Route:
    method: str
    pattern: re.Pattern[str]
    handler: Handler
    accepts: frozenset[str]  # query parameters (GET) or body keys (others) that are served
    locked: bool
    serves: str  # "app" and "user": only that kind of actor; "token": both kinds that have one
    needs: str  # as Actor.holds takes it


ROUTES: list[Route] = []
REPO = "/repos/{owner}/{repo}"
ISSUE = REPO + "/issues/{number}"


def route(
    method: str, template: str, accepts: str = "", *, locked: bool = True, serves: str = "token"
) -> Callable[[Handler], Handler]:
    """Register a handler; `locked`: it runs with the state to itself."""
    pattern = template.replace("{number}", r"(?P<number>\d+)")
    pattern = re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", pattern)

    def register(handler: Handler) -> Handler:
        known = frozenset(accepts.split())
        ROUTES.append(Route(method, re.compile(pattern), handler, known, locked, serves, needed(method, template)))
        return handler

    return register


def needed(method: str, template: str) -> str:
    """The permission that a route needs, in the words of the header x-accepted-github-permissions.

    https://docs.github.com/en/rest/authentication/permissions-required-for-github-apps
    """
    level = "read" if method == "GET" else "write"
    if not template.startswith(REPO):
        return ""
    if "/pulls" in template:
        return f"pull_requests={level}"
    if "/comments" in template or "/labels" in template:
        return f"issues={level}; pull_requests={level}"
    return f"issues={level}" if "/issues" in template else "metadata=read"


def answer_api(github: StandIn, request: RecordedRequest, raw: bytes) -> tuple[Answer, bytes]:
    """The answer with all its headers, and its body."""
    try:
        serve = serve_rest if request.kind == "rest" else serve_graphql
        answer = serve(github, request, raw)
    except HttpError as refusal:
        answer = refusal.answer
    except Exception:  # a bug in here must be seen, and must not garble the answer
        github.problem(request, traceback.format_exc())
        answer = Answer(500, {"message": "Server Error", "documentation_url": DOCUMENTATION})
    body = json.dumps(answer.data).encode()
    if request.method == "GET" and answer.status == 200 and request.path != "/rate_limit":
        etag = f'W/"{hashlib.sha256(body).hexdigest()}"'
        answer.headers["etag"] = etag
        # https://docs.github.com/en/rest/using-the-rest-api/best-practices-for-using-the-rest-api#use-conditional-requests-if-appropriate
        if etag in request.headers.get("if-none-match", ""):
            answer.status, body = 304, b""
            with github.lock:
                github.rate_remaining += 1  # what is unchanged costs nothing
    answer.headers = rest_headers(github) | answer.headers
    return answer, body


def serve_rest(github: StandIn, request: RecordedRequest, raw: bytes) -> Answer:
    authorise(github, request)
    check_version(github, request)
    if request.path != "/rate_limit":
        spend(github)
    found, call = find_route(github, request)
    if raw and request.json is None:
        raise HttpError(400, "Problems parsing JSON")
    check_content(github, request, found)
    check_access(call, found)
    if found.locked:
        with github.lock:
            return found.handler(call)
    return found.handler(call)


def serve_graphql(github: StandIn, request: RecordedRequest, raw: bytes) -> Answer:
    """https://docs.github.com/en/graphql/guides/forming-calls-with-graphql"""
    actor = authorise(github, request)
    if actor.kind == "app":
        github.problem(request, "this is not for Apps, but for their installations")
        raise HttpError(401, NO_JWT)
    if github.graphql is None or request.method != "POST" or request.query:
        github.problem(request, "the stand-in has no such route")
        raise HttpError(404, "Not Found")
    if not isinstance(request.json, dict):
        raise HttpError(400, "Problems parsing JSON")
    if unknown := sorted(request.json.keys() - {"query", "variables"}):
        github.problem(request, f"not served: {', '.join(unknown)}")
    with github.lock:
        # It has a limit of its own, and tells with status 200 that it is reached:
        # https://docs.github.com/en/graphql/overview/rate-limits-and-node-limits-for-the-graphql-api
        error = {"type": "RATE_LIMITED", "message": "API rate limit exceeded for user ID 1."}
        limited, left = github.graphql_remaining <= 0, max(0, github.graphql_remaining - 1)
        data = {"errors": [error]} if limited else permitted(actor, github.graphql(github, request))
        github.graphql_remaining = left
    return Answer(200, data, {"x-ratelimit-resource": "graphql", "x-ratelimit-remaining": str(left)})


def permitted(actor: Actor, data: Json) -> Json:
    """What an actor gets to see of a query's answer; a refusal, too, comes with status 200."""
    if actor.holds("issues=read") or not (data["data"] or {}).get("repository"):
        return data
    error = {"type": "FORBIDDEN", "path": ["repository", "issue"], "extensions": {"saml_failure": False}}
    return {"data": {"repository": {"issue": None}}, "errors": [error | {"message": actor.refusal}]}


def authorise(github: StandIn, request: RecordedRequest) -> Actor:
    """https://docs.github.com/en/rest/authentication/authenticating-to-the-rest-api"""
    if not request.headers.get("user-agent"):
        raise HttpError(403, "Request forbidden by administrative rules. No User-Agent header.")
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() not in ("bearer", "token"):
        raise HttpError(401, "Requires authentication")
    token = token.strip()
    if scheme.lower() == "bearer" and is_jwt(token):
        if github.app is None:
            raise HttpError(401, NO_JWT)
        actor: Actor | None = github.app.identify(github, token)
    else:
        actor = github.sign_in(token)
    if actor is None:
        raise HttpError(401, "Bad credentials")
    github.actor = actor
    return actor


def is_jwt(token: str) -> bool:
    """An installation's token is none, although it has one in it.

    https://docs.github.com/en/rest/apps/apps#create-an-installation-access-token-for-an-app
    """
    return token.count(".") == 2 and not token.startswith("ghs_")


def check_access(call: Call, found: Route) -> None:
    """Refuse what the actor may not do. Of a repository that it may not see it does not hear that there is one.

    https://docs.github.com/en/rest/using-the-rest-api/troubleshooting-the-rest-api
    """
    actor = call.actor
    if (actor.kind == "app") != (found.serves == "app"):
        call.github.problem(call.request, f"this is not for a request that is signed in as {actor.kind}")
        raise HttpError(401, NO_JWT)
    if found.serves == "user" and actor.kind != "user":
        raise HttpError(403, actor.refusal)
    if "repo" in call.args and call.github.find(f"{call.args['owner']}/{call.args['repo']}") is None:
        raise HttpError(404, "Not Found")
    if found.method != "GET" and not actor.may_write:
        raise HttpError(404, "Not Found")
    if not actor.holds(found.needs, pull=call.is_about_a_pull):
        refusal = HttpError(403, actor.refusal)
        refusal.answer.headers["x-accepted-github-permissions"] = found.needs
        raise refusal


def check_version(github: StandIn, request: RecordedRequest) -> None:
    if MEDIA_TYPE not in request.headers.get("accept", ""):
        github.problem(request, f"no Accept: {MEDIA_TYPE}")
    version = request.headers.get("x-github-api-version")
    if version not in API_VERSIONS:
        github.problem(request, f"X-GitHub-Api-Version is {version}")
        if version is not None:
            raise HttpError(400, f"Unsupported API version: {version}")


def spend(github: StandIn) -> None:
    """Take one request of the hour's quota.

    https://docs.github.com/en/rest/using-the-rest-api/rate-limits-for-the-rest-api
    """
    with github.lock:
        if github.now() >= github.rate_reset:
            github.rate_remaining = github.rate_limit
            github.rate_reset = int(github.now()) + 3600
        if github.rate_remaining <= 0:
            raise HttpError(403, "API rate limit exceeded for user ID 1.")
        github.rate_remaining -= 1


def rest_headers(github: StandIn) -> dict[str, str]:
    left = github.rate_remaining
    return {
        "content-type": "application/json; charset=utf-8",
        "x-github-request-id": f"{len(github.log):04X}:{time.monotonic_ns():X}",
        "x-ratelimit-limit": str(github.rate_limit),
        "x-ratelimit-remaining": str(left),
        "x-ratelimit-used": str(max(0, github.rate_limit - left)),
        "x-ratelimit-reset": str(github.rate_reset),
        "x-ratelimit-resource": "core",
        **token_headers(github),
    }


def token_headers(github: StandIn) -> dict[str, str]:
    """What GitHub tells of a personal token; a fine-grained one has no scopes.

    https://docs.github.com/en/apps/oauth-apps/building-oauth-apps/scopes-for-oauth-apps
    https://github.blog/changelog/2021-07-26-expiration-options-for-personal-access-tokens/
    """
    if github.actor is None or github.actor.kind != "user":
        return {}
    told = {
        "x-oauth-scopes": None if github.fine_grained is not None else github.scopes,
        "github-authentication-token-expiration": github.token_expiration,
    }
    return {name: value for name, value in told.items() if value is not None}


def find_route(github: StandIn, request: RecordedRequest) -> tuple[Route, Call]:
    path = request.path
    # Link headers and redirects name a repository by its number, which outlives a rename.
    by_id = re.fullmatch(r"/repositories/(\d+)(/.*|)", path)
    if by_id:
        repos = github.repositories.values()
        names = [repo.full_name for repo in repos if repo.id == int(by_id[1])]
        path = f"/repos/{(names or ['/'])[0]}{by_id[2]}"
        if not names:
            raise HttpError(404, "Not Found")
    for found in ROUTES:
        served = found.method == request.method and (found.serves != "app" or github.app is not None)
        match = found.pattern.fullmatch(path) if served else None
        if match:
            args = {key: unquote(value) for key, value in match.groupdict().items()}
            tail = re.sub(r"^/repos/[^/]+/[^/]+", "", path)
            return found, Call(github, request, args, tail)
    github.problem(request, "the stand-in has no such route")
    raise HttpError(404, "Not Found")


def check_content(github: StandIn, request: RecordedRequest, found: Route) -> None:
    """Refuse what GitHub would ignore in silence, and what its own description forbids."""
    body = request.json if isinstance(request.json, dict) else {}
    sent = request.query if request.method == "GET" else {**request.query, **body}
    unknown = sorted(set(sent) - found.accepts)
    try:
        assert not unknown, f"not served: {', '.join(unknown)}"
        if github.check:
            github.check(request)
    except AssertionError as error:
        github.problem(request, str(error))
        raise HttpError(422, str(error)) from error


def page_of(call: Call, rows: Sequence[T], render: Callable[[T], Json]) -> Answer:
    """One page of a list, with the links to the others.

    https://docs.github.com/en/rest/using-the-rest-api/using-pagination-in-the-rest-api
    """
    size = min(whole_number(call.query.get("per_page"), 30), 100)
    page = whole_number(call.query.get("page"), 1)
    last = max(1, math.ceil(len(rows) / size))
    others: dict[str, int] = {}
    if page > 1:
        others["prev"] = min(page - 1, last)
    if page < last:
        others |= {"next": page + 1, "last": last}
    if page > 1:
        others["first"] = 1
    base = f"{call.github.api_url}/repositories/{call.repo.id}{call.tail}"
    links = [f'<{base}?{urlencode(call.query | {"page": str(number)})}>; rel="{rel}"' for rel, number in others.items()]
    shown = rows[(page - 1) * size : page * size]
    headers = {"link": ", ".join(links)} if links else {}
    return Answer(200, [render(row) for row in shown], headers)


def whole_number(text: str | None, default: int) -> int:
    return int(text) if text and text.isdecimal() and int(text) > 0 else default


# The routes: the user and the repository.


@route("GET", "/user", serves="user")
def get_user(call: Call) -> Answer:
    return Answer(200, render_user(call.actor.login))


@route("GET", "/rate_limit")
def get_rate_limit(call: Call) -> Answer:
    limit, left = call.github.rate_limit, call.github.rate_remaining
    core = {"limit": limit, "remaining": left, "used": limit - left}
    core["reset"] = call.github.rate_reset
    return Answer(200, {"resources": {"core": core}, "rate": core})


@route("GET", REPO)
def get_repository(call: Call) -> Answer:
    return Answer(200, render_repository(call.github, call.repo))


@route("GET", REPO + "/collaborators/{username}/permission")
def get_permission(call: Call) -> Answer:
    """https://docs.github.com/en/rest/collaborators/collaborators#get-repository-permissions-for-a-user"""
    login = call.args["username"]
    if call.repo.name in call.github.push_denied:
        raise HttpError(403, "Must have push access to view collaborator permission.")
    if login not in call.github.permissions:
        raise HttpError(404, f"{login} is not a user")
    permission = call.github.permissions[login]
    return Answer(200, {"permission": permission, "role_name": permission, "user": render_user(login)})


# The routes: issues, https://docs.github.com/en/rest/issues/issues


@route("GET", REPO + "/issues", "state labels sort direction since creator per_page page")
def list_issues(call: Call) -> Answer:
    """Pull requests are in the list too."""
    wanted = {name.lower() for name in call.query.get("labels", "").split(",") if name}
    state, creator = call.choice("state", "open", "closed", "all"), call.query.get("creator")
    sort = call.choice("sort", "created", "updated", "comments")
    rows = [
        issue
        for issue in changed_since(call, list(call.repo.issues.values()))
        if state in ("all", issue.state)
        and wanted <= {name.lower() for name in issue.labels}
        and creator in (None, issue.user)
        and not (issue.deleted or issue.transferred_to)
    ]
    return page_of(call, sort_issues(call, rows, sort), lambda issue: render_issue(call, issue))


def sort_issues(call: Call, rows: list[T], sort: str) -> list[T]:
    def key(row: Any) -> Any:
        if sort == "comments":
            return len(row.comments), row.number
        return (row.updated_at if sort == "updated" else row.created_at), row.number

    return sorted(rows, key=key, reverse=call.choice("direction", "desc", "asc") == "desc")


Dated = TypeVar("Dated", Issue, Comment)


def changed_since(call: Call, rows: list[Dated]) -> list[Dated]:
    """Those updated at or after the query's `since`."""
    if "since" not in call.query:
        return rows
    try:
        since = datetime.fromisoformat(call.query["since"]).astimezone(UTC)
    except ValueError:
        raise invalid("Issue", "since", "invalid") from None
    return [row for row in rows if datetime.fromisoformat(row.updated_at) >= since]


@route("POST", REPO + "/issues", "title body labels")
def create_issue(call: Call) -> Answer:
    title = call.text("Issue", "title", MAX_TITLE, required=True)
    body = call.text("Issue", "body", MAX_BODY)
    labels = label_names(call)
    values = call.github.new_issue(call.repo, title or "", body, call.actor.login, call.actor.association)
    issue = call.repo.issues[values["number"]] = Issue(**values)
    for name in labels:
        call.github.label_issue(call.repo, issue, name, call.actor.login)
    return Answer(201, render_issue(call, issue))


@route("GET", ISSUE)
def get_issue(call: Call) -> Answer:
    return Answer(200, render_issue(call, call.issue))


# The routes: comments, https://docs.github.com/en/rest/issues/comments


@route("GET", ISSUE + "/comments", "since per_page page")
def list_comments(call: Call) -> Answer:
    issue = call.issue
    rows = changed_since(call, issue.comments)
    return page_of(call, rows, lambda comment: render_comment(call, issue, comment))


@route("POST", ISSUE + "/comments", "body")
def create_comment(call: Call) -> Answer:
    issue, body = call.issue, comment_body(call)
    comment = call.github.new_comment(issue, body, call.actor.login, call.actor.association)
    return Answer(201, render_comment(call, issue, comment))


@route("PATCH", REPO + "/issues/comments/{comment_id}", "body")
def update_comment(call: Call) -> Answer:
    for issue in call.repo.issues.values():
        for comment in issue.comments:
            if str(comment.id) == call.args["comment_id"]:
                comment.body = comment_body(call)
                call.github.touch(comment)
                call.github.touch(issue)
                return Answer(200, render_comment(call, issue, comment))
    raise HttpError(404, "Not Found")


def comment_body(call: Call) -> str:
    body = call.body.get("body")
    if not isinstance(body, str):
        raise invalid("IssueComment", "body", "missing_field")
    if not body.strip():
        raise invalid("IssueComment", "data", "unprocessable", "Body cannot be blank")
    if len(body) > MAX_BODY:
        text = f"Body is too long (maximum is {MAX_BODY} characters)"
        raise invalid("IssueComment", "data", "unprocessable", text)
    return body


# The routes: labels, https://docs.github.com/en/rest/issues/labels


@route("POST", ISSUE + "/labels", "labels")
def add_labels(call: Call) -> Answer:
    issue, names = call.issue, label_names(call)
    if not names:
        raise invalid("Label", "name", "missing_field")
    if not call.actor.holds("issues=write") and any(name.lower() not in call.repo.labels for name in names):
        # Who may label pull requests only may make no label:
        # https://github.com/actions/labeler#recommended-permissions
        error = {"resource": "Repository", "field": "label", "code": "unauthorized"}
        raise HttpError(403, "You do not have permission to create labels on this repository.", [error])
    for name in names:
        call.github.label_issue(call.repo, issue, name, call.actor.login)
    return Answer(200, labels_of(call, issue))


@route("DELETE", ISSUE + "/labels/{name}")
def remove_label(call: Call) -> Answer:
    issue, name = call.issue, call.args["name"].lower()
    if name not in [label.lower() for label in issue.labels]:
        raise HttpError(404, "Label does not exist")
    issue.labels = [label for label in issue.labels if label.lower() != name]
    call.github.touch(issue)
    return Answer(200, labels_of(call, issue))


@route("GET", REPO + "/labels", "per_page page")
def list_labels(call: Call) -> Answer:
    return page_of(call, list(call.repo.labels.values()), lambda label: render_label(call, label))


@route("POST", REPO + "/labels", "name color description")
def create_label(call: Call) -> Answer:
    name = call.text("Label", "name", MAX_LABEL, required=True) or ""
    if name.lower() in call.repo.labels:
        raise invalid("Label", "name", "already_exists")
    label = call.github.new_label(call.repo, name, **label_looks(call))
    return Answer(201, render_label(call, label))


@route("GET", REPO + "/labels/{name}")
def get_label(call: Call) -> Answer:
    return Answer(200, render_label(call, label_of(call)))


@route("PATCH", REPO + "/labels/{name}", "new_name color description")
def update_label(call: Call) -> Answer:
    label, old, looks = label_of(call), call.args["name"].lower(), label_looks(call)
    new = call.text("Label", "new_name", MAX_LABEL) or label.name
    if new.lower() != old and new.lower() in call.repo.labels:
        raise invalid("Label", "name", "already_exists")
    for issue in call.repo.issues.values():
        issue.labels = [new if name == label.name else name for name in issue.labels]
    label.name, label.color = new, looks.get("color", label.color)
    label.description = looks.get("description", label.description)
    call.repo.labels[new.lower()] = call.repo.labels.pop(old)
    return Answer(200, render_label(call, label))


def label_of(call: Call) -> Label:
    """Names of labels are compared without regard to case."""
    label = call.repo.labels.get(call.args["name"].lower())
    if label is None:
        raise HttpError(404, "Not Found")
    return label


def label_looks(call: Call) -> Json:
    """Colour and description, as far as the body has them."""
    text = call.text("Label", "description", MAX_DESCRIPTION)
    color = call.body.get("color", "ededed")
    if not isinstance(color, str) or not re.fullmatch(r"[0-9a-fA-F]{6}", color):
        raise invalid("Label", "color", "invalid")
    looks = {"color": color.lower(), "description": text}
    return {key: value for key, value in looks.items() if key in call.body}


def label_names(call: Call) -> list[str]:
    """The body's labels: names, or objects with a name."""
    names = []
    for item in call.body.get("labels", []):
        name = item.get("name") if isinstance(item, dict) else item
        if not isinstance(name, str) or not name.strip():
            raise invalid("Label", "name", "missing_field")
        if len(name) > MAX_LABEL:
            text = f"name is too long (maximum is {MAX_LABEL} characters)"
            raise invalid("Label", "name", "custom", text)
        names.append(name)
    return names


def labels_of(call: Call, issue: Issue) -> list[Json]:
    return [render_label(call, call.repo.labels[name.lower()]) for name in issue.labels]


# The routes: pull requests, https://docs.github.com/en/rest/pulls/pulls


@route("GET", REPO + "/pulls", "state head base sort direction per_page page")
def list_pulls(call: Call) -> Answer:
    """`head` filters only in the form owner:branch; GitHub ignores any other."""
    state = call.choice("state", "open", "closed", "all")
    head, base = call.query.get("head", ""), call.query.get("base")
    rows = [
        pull
        for pull in call.github.pulls(call.repo.name)
        if state in ("all", pull.state)
        and (":" not in head or head.lower() == f"{call.repo.owner}:{pull.head}".lower())
        and base in (None, pull.base)
    ]
    rows = sort_issues(call, rows, call.choice("sort", "created", "updated"))
    return page_of(call, rows, lambda pull: render_pull(call, pull))


@route("POST", REPO + "/pulls", "title head base body draft maintainer_can_modify", locked=False)
def create_pull(call: Call) -> Answer:
    repo = call.repo
    if repo.name in call.github.push_denied:
        raise HttpError(403, call.actor.refusal)
    title = call.text("PullRequest", "title", MAX_TITLE, required=True) or ""
    body = call.text("PullRequest", "body", MAX_BODY)
    head, base, heads = compared(call)
    draft = call.body.get("draft") is True
    if draft and not repo.has_drafts:
        raise HttpError(422, "Draft pull requests are not supported in this repository.")
    with call.github.lock:
        for pull in call.github.pulls(repo.name):
            if (pull.state, pull.head, pull.base) == ("open", head, base):
                text = f"A pull request already exists for {repo.owner}:{head}."
                raise invalid("PullRequest", None, "custom", text)
        values = call.github.new_issue(repo, title, body, call.actor.login, call.actor.association)
        more = {"base": base, "head_sha": heads[head], "base_sha": heads[base]}
        pull = call.github.new_pull(repo, values, head, **more)
        pull.draft = draft
        repo.issues[pull.number] = pull
        return Answer(201, render_pull(call, pull))


def compared(call: Call) -> tuple[str, str, dict[str, str]]:
    """The two branches of a new pull request, which must differ, and all branches' commits."""
    heads = call.github.heads(call.repo)
    given = call.text("PullRequest", "head", MAX_TITLE, required=True) or ""
    base = call.text("PullRequest", "base", MAX_TITLE, required=True) or ""
    owner, colon, head = given.rpartition(":")
    if head not in heads or (colon and owner.lower() != call.repo.owner.lower()):
        raise invalid("PullRequest", "head", "invalid")
    if base not in heads:
        raise invalid("PullRequest", "base", "invalid")
    shas = heads[base], heads[head]
    if not call.github.git(call.repo.name, "rev-list", "-n1", f"{shas[0]}..{shas[1]}"):
        text = f"No commits between {base} and {head}"
        raise invalid("PullRequest", None, "custom", text)
    try:
        call.github.git(call.repo.name, "merge-base", *shas)
    except RuntimeError:
        text = f"The {head} branch has no history in common with {base}"
        raise invalid("PullRequest", None, "custom", text) from None
    return head, base, heads


@route("GET", REPO + "/pulls/{number}")
def get_pull(call: Call) -> Answer:
    return Answer(200, render_pull(call, call.pull))


@route("PATCH", REPO + "/pulls/{number}", "title body state base maintainer_can_modify")
def update_pull(call: Call) -> Answer:
    pull, state = call.pull, call.body.get("state", call.pull.state)
    if state not in ("open", "closed"):
        raise invalid("PullRequest", "state", "invalid")
    title = call.text("PullRequest", "title", MAX_TITLE)
    body = call.text("PullRequest", "body", MAX_BODY)
    base = call.text("PullRequest", "base", MAX_TITLE) or pull.base
    if base != pull.base and base not in call.github.heads(call.repo):
        raise invalid("PullRequest", "base", "invalid")
    pull.title, pull.base = title or pull.title, base
    pull.body = body if "body" in call.body else pull.body
    call.github.set_state(pull, state)
    call.github.touch(pull)
    return Answer(200, render_pull(call, pull))


@route("POST", REPO + "/pulls/{number}/requested_reviewers", "reviewers team_reviewers")
def request_reviewers(call: Call) -> Answer:
    """All or none: https://docs.github.com/en/rest/pulls/review-requests#request-reviewers-for-a-pull-request"""
    pull = call.pull
    users, teams = ([name.lower() for name in call.body.get(key, [])] for key in ("reviewers", "team_reviewers"))
    if not call.github.may_push(call.repo):
        raise HttpError(403, call.actor.refusal)
    if not users + teams:
        call.github.problem(call.request, "nobody is asked for a review")
        raise HttpError(422, "Validation Failed")
    if pull.user.lower() in users:
        raise HttpError(422, "Review cannot be requested from pull request author.")
    known_users, known_teams = reviewers_of(call.github, call.repo)
    if not (known_users.keys() >= set(users) and known_teams.keys() >= set(teams)):
        which = f"One or more of the users or teams you specified is not a collaborator of the {call.repo.full_name}"
        raise HttpError(422, f"Reviews may only be requested from collaborators. {which} repository.")
    if teams and not call.actor.holds("members=read"):  # https://github.com/actions/github-script/issues/284
        error = f"Could not resolve to a node with the global id of 'T_{teams[0]}'."
        raise HttpError(422, "Validation Failed", [error])
    pull.reviewers = list(dict.fromkeys(pull.reviewers + [known_users[login] for login in users]))
    pull.team_reviewers = list(dict.fromkeys(pull.team_reviewers + [known_teams[slug] for slug in teams]))
    call.github.touch(pull)
    return Answer(201, render_pull(call, pull))


def reviewers_of(github: StandIn, repo: Repository) -> tuple[dict[str, str], dict[str, str]]:
    """Users and teams that can be asked for a review, by their names in lower case; to read is enough."""
    users = [login for login, permission in github.permissions.items() if permission != "none"]
    return {login.lower(): login for login in users}, {slug.lower(): slug for slug in repo.teams}


# What things look like as JSON.


def render_user(login: str) -> Json:
    kind = "Bot" if login.endswith("[bot]") else "User"
    number = 1 + sum(login.encode()) if login != "agent-runner" else 1
    return {"login": login, "id": number, "node_id": f"U_{number}", "type": kind}


def render_team(call: Call, slug: str) -> Json:
    number, owner = 1 + sum(slug.encode()), call.repo.owner
    url = f"{call.github.api_url}/organizations/{render_user(owner)['id']}/team/{number}"
    return {
        "id": number,
        "node_id": f"T_{slug}",
        "name": slug,
        "slug": slug,
        "description": None,
        "privacy": "closed",
        "permission": "push",
        "url": url,
        "html_url": f"{call.github.server_url}/orgs/{owner}/teams/{slug}",
        "members_url": f"{url}/members{{/member}}",
        "repositories_url": f"{url}/repos",
        "parent": None,
    }


def render_repository(github: StandIn, repo: Repository) -> Json:
    # Whoever is no user has no role.
    has_role = github.actor is not None and github.actor.kind == "user"
    may_push = has_role and repo.name not in github.push_denied
    return {
        "id": repo.id,
        "node_id": f"R_{repo.id}",
        "name": repo.full_name.partition("/")[2],
        "full_name": repo.full_name,
        "owner": render_user(repo.owner),
        "private": repo.private,
        "html_url": f"{github.server_url}/{repo.full_name}",
        "url": f"{github.api_url}/repos/{repo.full_name}",
        "clone_url": github.url(repo.full_name),
        "default_branch": repo.default_branch,
        "has_issues": repo.has_issues,
        "archived": False,
        "disabled": False,
        "permissions": {
            "admin": False,
            "maintain": False,
            "push": may_push,
            "triage": may_push,
            "pull": has_role,
        },
    }


def render_label(call: Call, label: Label) -> Json:
    return {
        "id": label.id,
        "node_id": f"LA_{label.id}",
        "url": f"{call.github.api_url}/repos/{call.repo.full_name}/labels/{label.name}",
        "name": label.name,
        "color": label.color,
        "description": label.description,
        "default": False,
    }


def render_issue(call: Call, issue: Issue) -> Json:
    server = f"{call.github.server_url}/{call.repo.full_name}"
    repository_url = f"{call.github.api_url}/repos/{call.repo.full_name}"
    url = f"{repository_url}/issues/{issue.number}"
    shown = {
        "id": issue.id,
        "node_id": f"I_{issue.id}",
        "number": issue.number,
        "title": issue.title,
        "body": issue.body,
        "state": issue.state,
        "state_reason": issue.state_reason,
        "locked": False,
        "labels": labels_of(call, issue),
        "assignees": [],
        "milestone": None,
        "user": render_user(issue.user),
        "author_association": issue.association,
        "comments": len(issue.comments),
        "created_at": issue.created_at,
        "updated_at": issue.updated_at,
        "closed_at": issue.closed_at,
        "html_url": f"{server}/issues/{issue.number}",
        "url": url,
        "repository_url": repository_url,
        "comments_url": f"{url}/comments",
        "labels_url": f"{url}/labels{{/name}}",
    }
    if isinstance(issue, Pull):
        pull_url = f"{repository_url}/pulls/{issue.number}"
        shown |= {"node_id": f"PR_{issue.id}", "html_url": issue.html_url, "draft": issue.draft}
        shown["pull_request"] = {"url": pull_url, "html_url": issue.html_url, "merged_at": None}
    return shown


def render_comment(call: Call, issue: Issue, comment: Comment) -> Json:
    api = f"{call.github.api_url}/repos/{call.repo.full_name}/issues"
    server = f"{call.github.server_url}/{call.repo.full_name}"
    return {
        "id": comment.id,
        "node_id": f"IC_{comment.id}",
        "url": f"{api}/comments/{comment.id}",
        "issue_url": f"{api}/{issue.number}",
        "html_url": f"{server}/issues/{issue.number}#issuecomment-{comment.id}",
        "body": comment.body,
        "user": render_user(comment.user),
        "author_association": comment.association,
        "created_at": comment.created_at,
        "updated_at": comment.updated_at,
    }


def render_pull(call: Call, pull: Pull) -> Json:
    repo = render_repository(call.github, call.repo)
    sides = {"head": (pull.head, pull.head_sha), "base": (pull.base, pull.base_sha)}
    shown = render_issue(call, pull)
    issue_url, pull_url = shown["url"], shown["pull_request"]["url"]
    for key in ("pull_request", "state_reason", "repository_url", "labels_url"):
        del shown[key]
    return shown | {
        "url": pull_url,
        "issue_url": issue_url,
        "merged_at": None,
        "requested_reviewers": [render_user(login) for login in pull.reviewers],
        "requested_teams": [render_team(call, slug) for slug in pull.team_reviewers],
        **{
            side: {
                "label": f"{call.repo.owner}:{ref}",
                "ref": ref,
                "sha": sha,
                "user": repo["owner"],
                "repo": repo,
            }
            for side, (ref, sha) in sides.items()
        },
    }


# git over HTTP: https://git-scm.com/docs/git-http-backend does the work.

GIT_PATH = re.compile(r"/([^/]+/[^/]+?)(?:\.git)?(/info/refs|/git-upload-pack|/git-receive-pack)")


class GitError(Exception):
    def __init__(self, status: int, text: str, **headers: str) -> None:
        super().__init__(text)
        self.status, self.text = status, text
        self.headers = {key.replace("_", "-"): value for key, value in headers.items()}


def admit_git(github: StandIn, request: RecordedRequest) -> tuple[Repository, str]:
    """The repository and the path below it, if the token may do this."""
    match = GIT_PATH.fullmatch(unquote(request.path))
    if match is None:
        github.problem(request, "neither the API nor git")
        raise GitError(404, "Not Found")
    scheme, _, secret = request.headers.get("authorization", "").partition(" ")
    actor = git_actor(github, basic_password(secret)) if scheme.lower() == "basic" else None
    if actor is None:
        text = "Invalid username or token. Password authentication is not supported."
        raise GitError(401, text, www_authenticate='Basic realm="GitHub"')
    github.actor = actor
    name, service = match[1], request.query.get("service", match[2][1:])
    repo = github.find(name)
    if repo is None:
        raise GitError(404, "Repository not found.")
    if service not in ("git-upload-pack", "git-receive-pack"):
        raise GitError(403, "Please upgrade your git client.")
    check_git_access(github, actor, repo, service == "git-receive-pack")
    return repo, match[2]


def git_actor(github: StandIn, token: str) -> Actor | None:
    try:
        return github.sign_in(token)
    except HttpError as refusal:
        raise GitError(refusal.answer.status, str(refusal)) from None


def check_git_access(github: StandIn, actor: Actor, repo: Repository, push: bool) -> None:
    """Who may not even read is told of writing, in GitHub's own words."""
    if not actor.holds("contents=read"):
        raise GitError(403, "Write access to repository not granted.")
    may_push = actor.may_write and actor.holds("contents=write") and repo.name not in github.push_denied
    if push and not may_push:
        raise GitError(403, f"Permission to {repo.full_name}.git denied to {actor.login}.")


def basic_password(secret: str) -> str:
    try:
        return base64.b64decode(secret).decode().partition(":")[2]
    except ValueError:
        return ""


def run_backend(
    github: StandIn, repo: Repository, tail: str, request: RecordedRequest, body: Iterable[bytes]
) -> Iterator[bytes]:
    """The CGI program's output: head and body, as they come."""
    process = subprocess.Popen(
        ["git", "http-backend"],
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=github.git_env() | backend_env(github, repo, tail, request),
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        with contextlib.suppress(BrokenPipeError):  # it has read enough to know its answer
            for block in body:
                process.stdin.write(block)
        process.stdin.close()
        while block := process.stdout.read(BLOCK):
            yield block
        process.wait()
        if tail == "/git-receive-pack":
            github.after_push(repo)
    finally:
        process.kill()
        process.stdin.close()
        process.stdout.close()
        process.wait()


def backend_env(github: StandIn, repo: Repository, tail: str, request: RecordedRequest) -> dict[str, str]:
    """https://www.rfc-editor.org/rfc/rfc3875#section-4.1"""
    headers = request.headers
    return {
        "GIT_PROJECT_ROOT": str(github.root / "git"),
        "GIT_HTTP_EXPORT_ALL": "1",
        "GIT_PROTOCOL": headers.get("git-protocol", ""),
        "PATH_INFO": f"/{repo.name}.git{tail}",
        "QUERY_STRING": urlencode(request.query),
        "REQUEST_METHOD": request.method,
        "REMOTE_USER": github.actor.login if github.actor else "",
        "REMOTE_ADDR": "127.0.0.1",
        "CONTENT_TYPE": headers.get("content-type", ""),
        "HTTP_CONTENT_ENCODING": headers.get("content-encoding", ""),
        # Without a length (chunked body) the program reads to the end.
        **({"CONTENT_LENGTH": headers["content-length"]} if "content-length" in headers else {}),
    }


def split_head(chunks: Iterator[bytes]) -> tuple[int, dict[str, str], Iterator[bytes]]:
    """Status and headers of a CGI answer, and the rest of it."""
    start = b""
    while b"\r\n\r\n" not in start:
        chunk = next(chunks, None)
        if chunk is None:
            raise ConnectionError("git http-backend gave no answer")
        start += chunk
    head, _, rest = start.partition(b"\r\n\r\n")
    lines = [line.partition(": ") for line in head.decode("latin-1").split("\r\n")]
    headers = {name.lower(): value for name, _, value in lines}
    status = int(headers.pop("status", "200").split()[0])
    return status, headers, itertools.chain([rest] if rest else [], chunks)


# HTTP.


class _Server(ThreadingHTTPServer):
    """Bound when made (the port is known at once), listening from server_activate() on."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, github: StandIn, port: int) -> None:
        self.github = github
        self.connections: dict[threading.Thread, socket.socket] = {}
        super().__init__((github.address, port), _Handler, bind_and_activate=False)
        self.server_bind()

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer would ask the name service who we are

    def get_request(self) -> tuple[Any, Any]:
        connection, address = super().get_request()
        if self.github.tls is None:
            return connection, address
        # The handshake comes with the first read, and so in the connection's own thread.
        tls = self.github.tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return tls, address

    def process_request(self, request: Any, client_address: Any) -> None:
        thread = threading.Thread(target=self.process_request_thread, args=(request, client_address), daemon=True)
        self.connections[thread] = request
        thread.start()

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        super().process_request_thread(request, client_address)
        self.connections.pop(threading.current_thread(), None)

    def cut_connections(self) -> None:
        open_now = list(self.connections.items())
        for _, connection in open_now:
            with contextlib.suppress(OSError):  # closed by the other side already
                socket.socket.shutdown(connection, socket.SHUT_RDWR)  # TLS's own would trouble a thread that reads
        for thread, _ in open_now:
            if thread is not threading.current_thread():
                thread.join(5)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):
            self.github.problems.append(traceback.format_exc())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    @property
    def github(self) -> StandIn:
        return cast(_Server, self.server).github

    def log_message(self, *args: Any, **more: Any) -> None:
        pass

    def _handle(self) -> None:
        path, _, query = self.path.partition("?")
        rest = path.startswith(API_PREFIX + "/")
        kind = "rest" if rest else "graphql" if path == GRAPHQL else "git"
        body = self._read_body()
        raw = b"" if kind == "git" else b"".join(body)
        request = RecordedRequest(
            kind=kind,
            method=self.command,
            path=path.removeprefix(API_PREFIX),
            query=dict(parse_qsl(query, keep_blank_values=True)),
            headers={name.lower(): value for name, value in self.headers.items()},
            json=parse_json(raw),
        )
        self.github.log.append(request)
        self.github.actor = None  # the connection may have served somebody else
        fault = self.github.fault_for(request) or Fault()
        if fault.action:
            fault.action()
        if fault.drop == "before":
            self.close_connection = True
        elif fault.status is not None:
            self._send_fault(request, fault)
        elif kind != "git":
            answer, data = answer_api(self.github, request, raw)
            self._send(request, fault, answer.status, answer.headers, data)
        else:
            self._serve_git(request, fault, body)
        for _ in body:  # what nobody read would be taken for the next request
            pass

    do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = _handle  # noqa: N815

    def _send_fault(self, request: RecordedRequest, fault: Fault) -> None:
        status = fault.status or 500
        data = {"message": REASONS.get(status, "Fault"), "documentation_url": DOCUMENTATION}
        data = data if fault.body is None else fault.body
        headers = rest_headers(self.github)
        raw = data if isinstance(data, bytes) else json.dumps(data).encode()
        self._send(request, fault, status, headers, raw)

    def _serve_git(self, request: RecordedRequest, fault: Fault, body: Iterator[bytes]) -> None:
        try:
            repo, tail = admit_git(self.github, request)
        except GitError as refusal:
            text = refusal.text.encode() + b"\n"
            headers = {"content-type": "text/plain; charset=utf-8"} | refusal.headers
            self._send(request, fault, refusal.status, headers, text)
            return
        output = run_backend(self.github, repo, tail, request, body)
        status, headers, chunks = split_head(output)
        if fault.delay or fault.drop or fault.after_effect:  # the effect is complete before the answer goes wrong
            self._send(request, fault, status, headers, b"".join(chunks))
            return
        request.status = status
        self._write_head(status, headers | fault.headers | {"transfer-encoding": "chunked"})
        for chunk in chunks:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
        self.wfile.write(b"0\r\n\r\n")

    def _send(
        self,
        request: RecordedRequest,
        fault: Fault,
        status: int,
        headers: dict[str, str],
        body: bytes,
    ) -> None:
        if fault.after_effect:
            fault.after_effect()
        stopped = fault.delay > 0 and self.github.stopping.wait(fault.delay)
        if stopped or fault.drop:
            self.close_connection = True
            return
        request.status = status
        added = {name.lower(): value for name, value in fault.headers.items()}
        empty = status in (204, 304)  # these have no body, whatever a fault says
        length = {} if empty else {"content-length": str(len(body))}
        self._write_head(status, headers | added | length, b"" if empty else body)

    def _write_head(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        """Head and body in one write: two would wait for each other's acknowledgement."""
        date = self.date_time_string(int(self.github.now()))
        lines = [f"HTTP/1.1 {status} {REASONS.get(status, '')}", f"date: {date}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self.wfile.write("\r\n".join([*lines, "", ""]).encode("latin-1") + body)

    def _read_body(self) -> Iterator[bytes]:
        if "chunked" not in self.headers.get("transfer-encoding", "").lower():
            yield from self._read(int(self.headers.get("content-length", 0)))
            return
        while size := int(self._read_line().partition(b";")[0], 16):
            yield from self._read(size)
            self._read_line()
        while self._read_line().strip():
            pass

    def _read_line(self) -> bytes:
        line = self.rfile.readline(BLOCK)
        if not line:
            raise ConnectionError("the client is gone")
        return line

    def _read(self, size: int) -> Iterator[bytes]:
        while size > 0:
            block = self.rfile.read(min(size, BLOCK))
            if not block:
                raise ConnectionError("the client is gone")
            size -= len(block)
            yield block


def parse_json(raw: bytes) -> Any:
    """The value, or None for what is not JSON (or is empty)."""
    try:
        return json.loads(raw) if raw else None
    except ValueError:
        return None
