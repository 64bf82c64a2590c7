"""Signing in as a GitHub App, or with a token in a file; and the way to GitHub: certificates and proxies."""

from __future__ import annotations

import base64
import contextlib
import functools
import http.client
import json
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jwt
import pytest
import test_standin_app
from conftest import DISPATCH, PATCH, RUNNER, TARGET, Daemon, FakeClock, FastClock, World, wait_until
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from openapi_check import check_request
from standin import Fault, RecordedRequest, StandIn
from standin_app import App
from standin_graphql import answer_query
from test_cli import finish
from test_faults import Agent, assert_done_once, told
from test_standin_app import ALL, BOT, PEM, PRIVATE, PUBLIC, Certificate
from test_task import dispatch_body

import runner as runner_module
from runner import (
    Clock,
    Config,
    ConfigError,
    Git,
    GitHub,
    SignIn,
    TaskFailed,
    Unreachable,
    git_login,
    hidden_paths,
    landlock_version,
    patiently,
)

certificate = test_standin_app.certificate  # the fixture
KEY = PRIVATE.decode().strip()
ONE_LINE = KEY.replace("\n", "\\n")
WEBHOOK_SECRET = "correct-horse-battery"
PUSH = {"contents": "write", "metadata": "read"}
ISSUE = f"/repos/{DISPATCH}/issues/1"
NOW = 1_760_000_000
HOUR = 3600


class AppWorld(World):
    """A world whose runners sign in as an App, which is installed for both repositories."""

    def __init__(self, github: StandIn, folder: Path, app: App) -> None:
        super().__init__(github, folder)
        self.app, self.installed = app, app.install("acme", [DISPATCH, TARGET])
        self.key_file = folder / "key.pem"
        self.key_file.write_bytes(PRIVATE)
        self.personal = self.env.pop("GITHUB_TOKEN")
        self.env |= {"GITHUB_APP_ID": str(app.id), "GITHUB_APP_PRIVATE_KEY_PATH": str(self.key_file)}

    def of_the_app(self) -> list[str]:
        """The App's own requests: it looks for an installation, it gets a token."""
        asked = [request for request in self.github.rest() if is_the_apps(request)]
        return [f"{request.method} {request.path.removeprefix('/repos/')}" for request in asked]

    def kinds(self) -> list[tuple[str, bool]]:
        """What each token so far is for: the repository, and whether it is for git."""
        return [(",".join(token.repositories), "issues" not in token.permissions) for token in self.app.tokens]

    def statuses(self, kind: str, *wanted: int) -> list[int]:
        return [request.status for request in self.github.requests(kind) if request.status in wanted]

    def is_over(self, number: int = 1) -> bool:
        return self.labels(number) == ["agent-done", "copilot-agent"] and not self.claims()


@contextlib.contextmanager
def app_world(folder: Path, tls: ssl.SSLContext | None = None) -> Iterator[AppWorld]:
    app = App(PUBLIC)
    with StandIn(folder / "github", check=check_request, graphql=answer_query, app=app, tls=tls) as github:
        github.add_repository(DISPATCH)
        github.add_repository(TARGET, files={"README.md": "# Widgets\n"})
        world = AppWorld(github, folder, app)
        yield world
        world.end()
        assert github.problems == []


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long a task takes, the issue is told of its end only."""
    monkeypatch.setattr(runner_module, "PROGRESS_PAUSE", 1_000_000)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[AppWorld]:
    with app_world(tmp_path) as world:
        yield world


class Client:
    """REST and git with one sign-in; GitHub has the same clock, which stands still."""

    def __init__(self, world: AppWorld, **env: str) -> None:
        self.clock, self.stop, self.config = FakeClock(), threading.Event(), world.config(**env)
        self.clock.at = NOW
        world.github.now = self.clock.now
        self.sign_in = SignIn(self.config, self.clock)
        self.github, self.git = self.another(), Git(self.sign_in)

    def another(self) -> GitHub:
        return GitHub(self.config, self.clock, self.stop, sign_in=self.sign_in)

    def refs(self) -> str:
        """The target's default branch, told by git to who waits for GitHub."""
        return patiently(lambda: self.git.refs(TARGET), self.clock, self.stop)[0]

    def use(self, kind: str) -> None:
        """Reads something from the API ("rest"), or from the target with git."""
        if kind == "rest":
            self.github.issue(1)
        else:
            self.refs()


@pytest.fixture
def client(world: AppWorld) -> Client:
    world.open()
    return Client(world)


class LaterClock(Clock):
    """This machine's clock, and as many seconds more as somebody says."""

    more = 0.0

    def now(self) -> float:
        return super().now() + self.more

    def monotonic(self) -> float:
        return super().monotonic() + self.more


class HastyClock(Clock):
    """This machine's clock, of somebody who waits three hundred times as short."""

    def wait(self, event: threading.Event, seconds: float) -> bool:
        return super().wait(event, seconds / FastClock.SPEED)


def is_the_apps(request: RecordedRequest) -> bool:
    return request.path.endswith(("/installation", "/access_tokens"))


def token_of(request: RecordedRequest) -> str:
    """What a request has signed in with, to the API or to git."""
    secret = request.headers["authorization"].partition(" ")[2]
    return base64.b64decode(secret).decode().partition(":")[2] if request.kind == "git" else secret


# -- what can be set -------------------------------------------------------------------------------

APP = {"GITHUB_APP_ID": "4711", "GITHUB_APP_PRIVATE_KEY": KEY}


def problems(**env: str) -> str:
    """What is said about wrong variables."""
    with pytest.raises(ConfigError) as caught:
        Config.from_env(env)
    return str(caught.value)


def pem_of(
    key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey,
    form: serialization.PrivateFormat = serialization.PrivateFormat.PKCS8,
    password: str = "",
) -> str:
    how = serialization.BestAvailableEncryption(password.encode()) if password else serialization.NoEncryption()
    return key.private_bytes(PEM, form, how).decode()


@pytest.mark.parametrize("app_id", ["4711", "Iv23liStandInApp", "Iv1.0123456789abcdef"])
@pytest.mark.parametrize(
    "key",
    [KEY, f"{KEY}\n", ONE_LINE, f"{ONE_LINE}\\n", KEY.replace("\n", "\r\n")],
    ids=["lines", "file", "one line", "one line of a file", "Windows"],
)
def test_an_app_is_set_up_with_its_id_and_its_key(app_id: str, key: str) -> None:
    config = Config.from_env({"GITHUB_APP_ID": app_id, "GITHUB_APP_PRIVATE_KEY": key})
    assert config.app_id == app_id
    assert config.app_key.replace("\r", "") == KEY


def test_the_key_can_be_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key.pem").write_bytes(PRIVATE)
    monkeypatch.chdir(tmp_path)
    config = Config.from_env({"GITHUB_APP_ID": "4711", "GITHUB_APP_PRIVATE_KEY_PATH": "key.pem"})
    assert config.app_key == KEY
    assert config.app_key_file == tmp_path / "key.pem"


def test_a_key_in_the_first_form_of_its_kind_is_taken() -> None:
    key = rsa.generate_private_key(public_exponent=65_537, key_size=2048)
    old = pem_of(key, serialization.PrivateFormat.TraditionalOpenSSL)
    assert old.startswith("-----BEGIN RSA PRIVATE KEY-----")  # as GitHub gives it
    assert Config.from_env({**APP, "GITHUB_APP_PRIVATE_KEY": old}).app_key == old.strip()


BAD_KEYS = {
    "elliptic curve": pem_of(ec.generate_private_key(ec.SECP256R1())),
    "Ed25519": pem_of(ed25519.Ed25519PrivateKey.generate()),
    "encrypted": pem_of(test_standin_app.KEY, password="secret"),
    "encrypted the old way": pem_of(test_standin_app.KEY, serialization.PrivateFormat.TraditionalOpenSSL, "secret"),
    "cut off": "\n".join([*KEY.split("\n")[:9], KEY.split("\n")[-1]]),
    "invented": "-----BEGIN PRIVATE KEY-----\nc2VjcmV0IQ==\n-----END PRIVATE KEY-----",
}


@pytest.mark.parametrize("key", BAD_KEYS.values(), ids=BAD_KEYS.keys())
def test_a_key_that_cannot_be_used_is_told_and_not_shown(tmp_path: Path, key: str) -> None:
    (tmp_path / "key.pem").write_text(key)
    named = {"GITHUB_APP_PRIVATE_KEY": key, "GITHUB_APP_PRIVATE_KEY_PATH": str(tmp_path / "key.pem")}
    for name, value in named.items():
        said = problems(GITHUB_APP_ID="4711", **{name: value})
        assert f"- {name} is no RSA private key that can be used" in said
        assert not [line for line in key.split("\n")[1:-1] if line and line in said]


@pytest.mark.parametrize("name", ["GITHUB_APP_PRIVATE_KEY_PATH", "GITHUB_TOKEN_FILE"])
def test_a_secret_in_place_of_its_path_is_not_repeated(name: str) -> None:
    for secret in (KEY, ONE_LINE, "ghp_0123456789abcdefghijklmnopqrstuvwxyz"):
        said = problems(**{name: secret})
        assert name in said
        assert not [line for line in secret.replace("\\n", "\n").split("\n") if len(line) > 30 and line in said]


def test_a_public_key_is_no_private_key(tmp_path: Path) -> None:
    (tmp_path / "key.pem").write_text(PUBLIC)
    named = {"GITHUB_APP_PRIVATE_KEY": PUBLIC, "GITHUB_APP_PRIVATE_KEY_PATH": str(tmp_path / "key.pem")}
    for name, value in named.items():
        said = problems(GITHUB_APP_ID="4711", **{name: value})
        assert name in said
        assert "private key in PEM form" in said


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({}, "GITHUB_TOKEN is not set: put a GitHub token there"),
        ({}, "or set GITHUB_TOKEN_FILE or GITHUB_APP_ID"),
        ({**APP, "GITHUB_TOKEN": "t0ken"}, "GITHUB_TOKEN and GITHUB_APP_ID are both set: leave one of them out"),
        ({**APP, "GITHUB_TOKEN_FILE": "{file}"}, "GITHUB_TOKEN_FILE and GITHUB_APP_ID are both set: leave one"),
        ({"GITHUB_APP_ID": "4711"}, "GITHUB_APP_ID needs the App's private key: set GITHUB_APP_PRIVATE_KEY or"),
        ({"GITHUB_TOKEN": "t0ken", "GITHUB_APP_PRIVATE_KEY": KEY}, "GITHUB_APP_PRIVATE_KEY is set, but GITHUB_APP_ID"),
        (
            {"GITHUB_TOKEN": "t0ken", "GITHUB_APP_PRIVATE_KEY_PATH": "{file}"},
            "GITHUB_APP_PRIVATE_KEY_PATH is set, but GITHUB_APP_ID is not",
        ),
        (
            {**APP, "GITHUB_APP_PRIVATE_KEY_PATH": "{file}"},
            "GITHUB_APP_PRIVATE_KEY and GITHUB_APP_PRIVATE_KEY_PATH are both set: leave one of them out",
        ),
        (
            {**APP, "GITHUB_WEBHOOK_SECRET": WEBHOOK_SECRET},
            "GITHUB_WEBHOOK_SECRET is set, but AGENT_HTTP_PORT is not: set the port",
        ),
    ],
    ids=range(9),
)
def test_settings_that_do_not_go_together_are_told(tmp_path: Path, env: dict[str, str], words: str) -> None:
    (tmp_path / "secret").write_text(KEY if "GITHUB_APP_PRIVATE_KEY_PATH" in env else "t0ken")
    assert words in problems(**{name: value.format(file=tmp_path / "secret") for name, value in env.items()})


@pytest.mark.parametrize("blank", ["", "  ", "\n"], ids=repr)
def test_an_empty_key_is_none(tmp_path: Path, blank: str) -> None:
    (tmp_path / "key.pem").write_text(KEY)
    unset = {"GITHUB_APP_PRIVATE_KEY": blank, "GITHUB_APP_PRIVATE_KEY_PATH": blank, "GITHUB_APP_ID": blank}
    assert Config.from_env({**unset, "GITHUB_TOKEN": "t0ken"}).token == "t0ken"
    in_file = {"GITHUB_APP_ID": "4711", "GITHUB_APP_PRIVATE_KEY_PATH": str(tmp_path / "key.pem")}
    assert Config.from_env({**unset, **in_file}).app_key == KEY


NEW_SECRETS = ["GITHUB_APP_PRIVATE_KEY", "GITHUB_APP_PRIVATE_KEY_PATH", "GITHUB_WEBHOOK_SECRET"]


@pytest.mark.parametrize("name", NEW_SECRETS)
def test_the_agent_cannot_be_given_the_secrets_of_the_app(name: str) -> None:
    assert f"AGENT_ENV must not name {name}: the agent never gets" in problems(**APP, AGENT_ENV=f"LANG,{name}")


@pytest.mark.parametrize(
    "value",
    [KEY, f"{KEY}\n", ONE_LINE, json.dumps({"key": KEY}), base64.b64encode(PRIVATE).decode(), f"x {WEBHOOK_SECRET}"],
    ids=["key", "file", "one line", "JSON", "base64", "webhook secret"],
)
def test_the_agent_cannot_be_given_them_under_another_name(value: str) -> None:
    secret = {"GITHUB_WEBHOOK_SECRET": WEBHOOK_SECRET, "AGENT_HTTP_PORT": "8080"}
    said = problems(**APP, **secret, COPY=value, AGENT_ENV="COPY")
    assert "AGENT_ENV must not name COPY" in said
    assert value not in said


SECRET_FORMS: dict[str, Callable[[str], str]] = {
    "plain": str,
    "base64": lambda text: base64.b64encode(text.encode()).decode(),
    "base64 of more": lambda text: base64.b64encode(f"x{text}\n".encode()).decode(),
    "base64 in lines": lambda text: base64.encodebytes(text.encode()).decode(),
    "one line": lambda text: text.replace("\n", "\\n"),
}


@pytest.mark.parametrize("form", SECRET_FORMS.values(), ids=SECRET_FORMS.keys())
@pytest.mark.parametrize("what", ["key", "line of the key", "webhook secret"])
def test_the_secrets_of_the_app_are_masked_and_found(tmp_path: Path, what: str, form: Callable[[str], str]) -> None:
    (tmp_path / "key.pem").write_bytes(PRIVATE)
    secret = {"GITHUB_WEBHOOK_SECRET": WEBHOOK_SECRET, "AGENT_HTTP_PORT": "8080"}
    file = {"GITHUB_APP_ID": "4711", "GITHUB_APP_PRIVATE_KEY_PATH": str(tmp_path / "key.pem")}
    value = {"key": KEY, "line of the key": KEY.split("\n")[5], "webhook secret": WEBHOOK_SECRET}[what]
    name = "GITHUB_WEBHOOK_SECRET" if what == "webhook secret" else "GITHUB_APP_PRIVATE_KEY"
    shown = form(value)
    for settings in (APP, file):
        config = Config.from_env({**settings, **secret})
        masked = config.masked(f"a {shown} b")
        assert "***" in masked
        # What surrounds a value has a part in the first and last signs of its base64.
        assert not [line for line in shown.split("\n") if len(line) > 8 and line[4:-4] in masked]
        assert config.finds_secret(f"a {shown} b".encode()) == name


def test_the_secrets_of_the_app_show_in_no_repr() -> None:
    config = Config.from_env({**APP, "GITHUB_WEBHOOK_SECRET": WEBHOOK_SECRET, "AGENT_HTTP_PORT": "8080"})
    shown = f"{config!r} {config} {[config.app_key, config.webhook_secret]} {config.first_app_key!r}"
    assert WEBHOOK_SECRET not in shown
    assert not [line for line in KEY.split("\n") if line in shown]


def test_the_keys_file_is_hidden_from_agents_by_all_its_names(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "key.pem").write_bytes(PRIVATE)
    (tmp_path / "key.pem").symlink_to(tmp_path / "data" / "key.pem")
    config = Config.from_env({"GITHUB_APP_ID": "4711", "GITHUB_APP_PRIVATE_KEY_PATH": str(tmp_path / "key.pem")})
    assert hidden_paths(config) >= {tmp_path / "key.pem", tmp_path / "data" / "key.pem"}


def start_without(module: str, folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A runner where a package is missing."""
    code = f"import sys; sys.modules[{module!r}] = None; import runner; sys.exit(runner.main({list(arguments)}))"
    path = {"PYTHONPATH": str(RUNNER.parent)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, env=env | path, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("module", ["jwt", "cryptography"])
def test_what_an_app_needs_is_told_where_it_is_missing(tmp_path: Path, module: str) -> None:
    done = start_without(module, tmp_path, "--once", **APP)
    assert done.returncode == 2
    assert "GITHUB_APP_PRIVATE_KEY needs another package: pip install 'PyJWT[crypto]" in done.stderr
    assert len(done.stderr.splitlines()) == 2


def test_who_signs_in_with_a_token_does_not_need_it(world: AppWorld, tmp_path: Path) -> None:
    world.open()
    personal = {name: value for name, value in world.env.items() if "_APP_" not in name}
    done = start_without("jwt", tmp_path, "--once", **personal, GITHUB_TOKEN=world.personal)
    assert done.returncode == 0, done.stderr
    assert_done_once(world)


# -- the App's JSON web token ----------------------------------------------------------------------


def test_the_app_signs_in_with_a_short_lived_token_of_its_key(world: AppWorld, client: Client) -> None:
    client.sign_in.token(DISPATCH)
    for claims in world.app.claims:
        assert claims["iss"] == "4711"
        assert claims["iat"] < NOW
        assert NOW < claims["exp"] <= NOW + 600
        assert claims["exp"] - claims["iat"] <= 600
    signed = [token_of(request) for request in world.requests()]
    assert [jwt.get_unverified_header(token)["alg"] for token in signed] == ["RS256", "RS256"]


def test_the_app_signs_in_with_its_client_id(world: AppWorld) -> None:
    client = Client(world, GITHUB_APP_ID=world.app.client_id)
    assert client.github.request("GET", f"/repos/{DISPATCH}").status == 200


@pytest.mark.parametrize("hours", [-24, 24])
def test_a_machine_whose_clock_is_a_day_off_signs_in_with_the_second_try(world: AppWorld, hours: int) -> None:
    client, offset = Client(world), hours * HOUR
    client.clock.at += offset
    world.github.now = lambda: client.clock.at - offset
    first = client.sign_in.token(DISPATCH)
    assert [request.status for request in world.requests()] == [401, 200, 201]
    client.sign_in.token(TARGET)
    assert [request.status for request in world.requests()] == [401, 200, 201, 200, 201]
    client.clock.at += HOUR * 0.8  # nor is the life of a token measured with that clock
    assert client.sign_in.token(DISPATCH) == first
    client.clock.at += HOUR * 0.15
    assert client.sign_in.token(DISPATCH) != first


def test_a_key_of_another_app_is_told_after_two_tries(world: AppWorld, client: Client) -> None:
    world.key_file.write_text(pem_of(rsa.generate_private_key(public_exponent=65_537, key_size=2048)))
    stranger = Client(world)
    with pytest.raises(TaskFailed, match="could not be decoded") as refused:
        stranger.github.issue(1)
    assert "GITHUB_APP_ID and the private key belong to the same App" in refused.value.told
    assert [request.status for request in world.requests()] == [401, 401]


def test_an_id_that_no_app_has_is_told(world: AppWorld) -> None:
    with pytest.raises(TaskFailed, match="Integration not found") as refused:
        Client(world, GITHUB_APP_ID="9999").github.issue(1)
    assert "GITHUB_APP_ID" in refused.value.told
    assert len(world.requests()) == 1


# -- a whole task ----------------------------------------------------------------------------------


def assert_the_app_did_it(world: AppWorld) -> None:
    assert_done_once(world)
    assert world.pull().user == BOT
    assert {comment.user for comment in world.issue().comments} == {BOT}
    assert {event.by for event in world.issue().events} == {"octocat", BOT}
    api = {token_of(request) for request in world.requests() if not is_the_apps(request)}
    pushes = {token_of(request) for request in world.github.requests("git")}
    made = {(token.token, "issues" in token.permissions) for token in world.app.tokens}
    assert {(token, True) for token in api} | {(token, False) for token in pushes} == made


def test_an_app_does_a_whole_task(world: AppWorld) -> None:
    world.open()
    assert world.run_once().outcomes == {"done": 1}
    assert_the_app_did_it(world)


def test_the_command_line_does_a_whole_task_as_an_app(world: AppWorld) -> None:
    world.open()
    del world.env["GITHUB_APP_PRIVATE_KEY_PATH"]
    code, out, err = finish(world.start("--once", GITHUB_APP_PRIVATE_KEY=ONE_LINE, AGENT_LOG_LEVEL="DEBUG"))
    assert code == 0, err
    assert_the_app_did_it(world)
    text = told(world, out + err)
    assert not [token for token in world.app.tokens if token.token in text]
    assert KEY.split("\n")[1] not in text


def test_tokens_are_got_once_for_each_repository_and_kind(world: AppWorld) -> None:
    """Dispatch for its API; the target for git, and for its API: each is looked up and got. A happy task costs eight
    requests besides these six: list, issue, label, comment, pull request, comment, label, label off."""
    world.open()
    with Daemon(world.runner()) as daemon:
        wait_until(world.is_over)
        assert world.of_the_app() == [
            f"{step}"
            for repo in (DISPATCH, TARGET, TARGET)
            for step in (f"GET {repo}/installation", f"POST /app/installations/{world.installed.id}/access_tokens")
        ]
        assert world.kinds() == [(DISPATCH, False), (TARGET, True), (TARGET, False)]
        before = len(world.requests())
        world.open(dispatch_body(task_id="second"))
        daemon.runner.request_poll()
        wait_until(functools.partial(world.is_over, 2))
    second = [request for request in world.requests()[before:] if request.status != 304]
    assert [request for request in second if is_the_apps(request)] == []
    assert len(second) <= 8


# -- installations ---------------------------------------------------------------------------------


def test_dispatch_and_target_can_be_in_two_installations(world: AppWorld) -> None:
    world.github.add_repository("umbrella/tools")
    other = world.app.install("umbrella", ["umbrella/tools"])
    world.open()
    world.env["AGENT_TARGET_REPO"] = "umbrella/tools"
    patch = dispatch_body(PATCH.replace("# Widgets", "# A repository"))
    world.github.edit_issue(DISPATCH, 1, body=patch)
    assert world.run_once().outcomes == {"done": 1}
    (pull,) = world.github.pulls("umbrella/tools")
    assert pull.user == BOT
    made = {(token.installation, *token.repositories) for token in world.app.tokens}
    assert made == {(world.installed.id, DISPATCH), (other.id, "umbrella/tools")}


def test_an_installation_that_is_named_is_not_looked_for(world: AppWorld) -> None:
    world.open()
    assert world.run_once(GITHUB_APP_INSTALLATION_ID=str(world.installed.id)).outcomes == {"done": 1}
    assert world.of_the_app() == [f"POST /app/installations/{world.installed.id}/access_tokens"] * 3


def poll(world: AppWorld, caplog: pytest.LogCaptureFixture, **env: str) -> str:
    """What a daemon's log says of its first poll."""
    world.runner(FakeClock(), **env).tick()
    return caplog.text


def test_a_dispatch_repository_without_the_app_is_told(world: AppWorld, caplog: pytest.LogCaptureFixture) -> None:
    world.installed.repositories.remove(DISPATCH)
    said = poll(world, caplog)
    assert "cannot read the queue: GitHub answered 404 to GET /repos/acme/dispatch/installation" in said
    assert f"should install the App on {DISPATCH}; docs/github-app.md says how" in said


def test_an_installation_that_is_named_wrongly_is_told(world: AppWorld, caplog: pytest.LogCaptureFixture) -> None:
    assert "GITHUB_APP_INSTALLATION_ID" in poll(world, caplog, GITHUB_APP_INSTALLATION_ID="1")


def test_an_installation_without_the_dispatch_repository_is_told(
    world: AppWorld, caplog: pytest.LogCaptureFixture
) -> None:
    other = world.app.install("umbrella", [])
    said = poll(world, caplog, GITHUB_APP_INSTALLATION_ID=str(other.id))
    assert f"give the App's installation the repository {DISPATCH}" in said
    assert "docs/github-app.md" in said


def test_a_suspended_installation_is_told(world: AppWorld, caplog: pytest.LogCaptureFixture) -> None:
    world.installed.suspended = True
    said = poll(world, caplog)
    assert "cannot read the queue: GitHub answered 403" in said
    assert "check the App's installation, which may be suspended" in said


def test_work_goes_on_when_the_app_is_installed_at_last(world: AppWorld) -> None:
    world.installed.repositories.remove(DISPATCH)
    world.open()
    with Daemon(world.runner(FastClock())):
        wait_until(lambda: 404 in world.statuses("rest", 404))
        world.installed.repositories.append(DISPATCH)
        wait_until(world.is_over)
    assert_the_app_did_it(world)


@pytest.mark.parametrize("named", [False, True])
def test_the_issue_is_told_that_the_app_is_not_installed_on_its_target(world: AppWorld, named: bool) -> None:
    world.github.add_repository("acme/other")
    world.open(dispatch_body(target="acme/other"))
    env = {"GITHUB_APP_INSTALLATION_ID": str(world.installed.id)} if named else {}
    assert world.run_once(AGENT_ALLOWED_TARGETS="acme/*", **env).outcomes == {"failed": 1}
    assert world.labels() == ["agent-failed", "copilot-agent"]
    assert "acme/other" in world.last_comment()
    assert "docs/github-app.md" in world.last_comment()


# -- permissions -----------------------------------------------------------------------------------


def without(permission: str) -> dict[str, str]:
    return {name: level for name, level in ALL.items() if name != permission}


def test_a_missing_permission_for_contents_is_told(world: AppWorld, caplog: pytest.LogCaptureFixture) -> None:
    world.installed.permissions = without("contents")
    world.open()
    assert world.run_once().outcomes == {"failed": 1}
    assert world.labels() == ["copilot-agent"]
    assert "left for later: GitHub answered 422 to POST /app/installations" in caplog.text
    assert "the permissions that docs/github-app.md lists" in caplog.text


def test_a_missing_permission_for_issues_is_told(world: AppWorld, client: Client) -> None:
    world.installed.permissions = without("issues")
    with pytest.raises(TaskFailed, match="not accessible by integration") as refused:
        client.github.issue(1)
    assert "permissions" in refused.value.advice


def test_the_issue_is_told_of_a_missing_permission_for_pull_requests(world: AppWorld) -> None:
    world.installed.permissions = without("pull_requests")
    world.open()
    runner = world.runner(FastClock())
    runner.run_once()
    assert runner.outcomes == {"failed": 1}
    assert "not accessible by integration" in world.last_comment()
    assert "permissions" in world.last_comment()


def test_the_token_for_git_is_good_for_contents_of_one_repository_only(world: AppWorld, client: Client) -> None:
    client.sign_in.token(TARGET, push=True)
    (token,) = world.app.tokens
    assert (token.permissions, token.repositories) == (PUSH, [TARGET])


@pytest.mark.parametrize("allowed", [False, True])
def test_it_is_good_for_workflows_only_if_these_are_allowed(world: AppWorld, allowed: bool) -> None:
    world.installed.permissions["workflows"] = "write"
    client = Client(world, AGENT_ALLOW_WORKFLOWS="yes" if allowed else "no")
    client.sign_in.token(TARGET, push=True)
    assert world.app.tokens[0].permissions == PUSH | ({"workflows": "write"} if allowed else {})


def test_workflows_that_the_installation_may_not_write_are_told(world: AppWorld) -> None:
    with pytest.raises(TaskFailed, match="permissions requested are not granted") as refused:
        Client(world, AGENT_ALLOW_WORKFLOWS="yes").git.refs(TARGET)
    assert "docs/github-app.md lists" in refused.value.advice


def test_an_agent_sees_nothing_of_the_app(world: AppWorld) -> None:
    hunt = 'grep -rlaE "ghs_|PRIVATE KEY" . "$HOME"'
    keys = f'cat "{world.key_file}" 2>/dev/null | wc -c'
    seek = f'echo ghs_x > "$HOME/control"; env > "$HOME/env"; {hunt} > found; {keys} > size; mv found size "$HOME"'
    world.open("Look around.")
    command = f"{seek}; echo x > new.txt"
    assert world.run_once(AGENT_SHELL="yes", AGENT_COMMAND=command).outcomes == {"done": 1}
    assert (world.home / "found").read_text().splitlines() == [str(world.home / "control")]
    names = {line.partition("=")[0] for line in (world.home / "env").read_text().splitlines()}
    assert "AGENT_TASK_ID" in names
    assert not [name for name in names if name.startswith("GITHUB_")]
    if landlock_version():
        assert (world.home / "size").read_text().strip() == "0"


# -- tokens that end -------------------------------------------------------------------------------


def test_a_token_is_replaced_when_a_tenth_of_its_life_is_left(world: AppWorld, client: Client) -> None:
    first = client.sign_in.token(DISPATCH)
    client.clock.at += HOUR * 0.9 - 2
    assert client.sign_in.token(DISPATCH) == first
    client.clock.at += 4
    second = client.sign_in.token(DISPATCH.upper())
    assert second == world.app.tokens[-1].token
    assert second != first
    assert client.sign_in.token(DISPATCH) == second


def run_while(world: AppWorld, meanwhile: Callable[[LaterClock], None]) -> None:
    """A task during which something happens, while its agent works."""
    agent, clock = Agent.waiting(world.home), LaterClock()
    world.github.now = clock.now
    world.open("Do something.")
    with Daemon(world.runner(clock, AGENT_LEASE="1000000", AGENT_POLL_INTERVAL="1000000", **agent.env)):
        agent.pid()
        assert world.kinds() == [(DISPATCH, False), (TARGET, True)]
        meanwhile(clock)
        agent.go()
        wait_until(world.is_over)
    assert_done_once(world)
    assert len(agent.runs()) == 1


def test_a_task_outlives_its_tokens(world: AppWorld) -> None:
    def later(clock: LaterClock) -> None:
        clock.more += HOUR + 1

    run_while(world, later)
    assert sorted(world.kinds()[2:]) == [(DISPATCH, False), (TARGET, False), (TARGET, True)]
    assert world.statuses("rest", 401, 403, 404) + world.statuses("git", 401, 403, 404) == []


def test_tokens_that_are_revoked_while_the_agent_works_are_replaced_once(world: AppWorld) -> None:
    run_while(world, lambda _: world.app.revoke_tokens())
    assert sorted(world.kinds()[2:]) == [(DISPATCH, False), (TARGET, False), (TARGET, True)]
    assert (world.statuses("rest", 401), world.statuses("git", 401)) == ([401], [401])


@pytest.mark.parametrize("kind", ["rest", "git"])
def test_a_revoked_token_is_replaced_at_once(world: AppWorld, client: Client, kind: str) -> None:
    client.use(kind)
    world.app.revoke_tokens()
    client.use(kind)
    assert len(world.app.tokens) == 2
    assert world.statuses(kind, 401) == [401]
    assert client.clock.waits == []


@pytest.mark.parametrize("kind", ["rest", "git"])
def test_a_new_token_after_a_revoked_one_may_take_its_time_too(world: AppWorld, client: Client, kind: str) -> None:
    client.use(kind)
    world.app.revoke_tokens()
    world.github.faults.append(Fault(path=f"{ISSUE}|/{TARGET}.*", kind=kind, status=401, times=2))
    client.use(kind)
    assert len(world.app.tokens) == 2
    assert client.clock.waits == [2]


@pytest.mark.parametrize("kind", ["rest", "git"])
def test_a_token_that_somebody_else_has_replaced_meanwhile_is_no_failure(
    world: AppWorld, client: Client, kind: str
) -> None:
    def meanwhile() -> None:
        world.app.revoke_tokens()
        client.another().issue(1) if kind == "rest" else client.refs()

    client.use(kind)
    world.github.faults.append(Fault(path=f"{ISSUE}|/{TARGET}.*", kind=kind, action=meanwhile))
    client.use(kind)
    assert len(world.app.tokens) == 2
    assert world.statuses(kind, 401) == [401, 401]


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("kind", ["rest", "git"])
def test_patience_ends_with_tokens_that_stay_refused(world: AppWorld, client: Client, kind: str, known: bool) -> None:
    if known:
        client.use(kind)
    world.github.faults.append(Fault(path=f"{ISSUE}|/{TARGET}.*", kind=kind, status=401, times=None))
    with pytest.raises((TaskFailed, Unreachable)):
        client.use(kind)
    assert sum(client.clock.waits) <= 900
    assert len(world.statuses(kind, 401)) < 60
    assert len(world.app.tokens) < 40


def test_a_personal_token_that_is_refused_is_not_sent_twice(world: AppWorld) -> None:
    personal = {"GITHUB_APP_ID": "", "GITHUB_APP_PRIVATE_KEY_PATH": "", "GITHUB_TOKEN": "ghp_wrong0123456789"}
    client = Client(world, **personal)
    with pytest.raises(TaskFailed, match="401"):
        client.github.issue(1)
    with pytest.raises(TaskFailed, match="cannot be read"):
        client.git.refs(TARGET)
    assert (world.statuses("rest", 401), world.statuses("git", 401)) == ([401], [401])


NEW_TOKEN = "ghp_" + "9876543210" * 4


@pytest.mark.parametrize("kind", ["rest", "git"])
def test_a_token_file_that_is_replaced_in_that_moment_is_read_again(world: AppWorld, kind: str) -> None:
    world.open()
    file = world.folder / "token"
    file.write_text(world.personal)
    client = Client(world, GITHUB_APP_ID="", GITHUB_APP_PRIVATE_KEY_PATH="", GITHUB_TOKEN_FILE=str(file))

    def replace() -> None:
        file.write_text(NEW_TOKEN)
        world.github.token = NEW_TOKEN

    world.github.faults.append(Fault(kind=kind, action=replace))
    client.use(kind)
    seen = world.github.requests(kind)
    assert [token_of(request) for request in seen[:2]] == [world.personal, NEW_TOKEN]
    assert world.statuses(kind, 401) == [401]
    assert client.clock.waits == []


# -- tokens that are new ---------------------------------------------------------------------------


@pytest.mark.parametrize("status", [401, 403, 404])
@pytest.mark.parametrize("kind", ["rest", "git"])
def test_a_new_token_is_given_time_to_get_about(world: AppWorld, client: Client, kind: str, status: int) -> None:
    world.github.faults.append(Fault(path=f"{ISSUE}|/{TARGET}.*", kind=kind, status=status, times=2))
    client.use(kind)
    assert client.clock.waits == [2, 2]
    assert len(world.app.tokens) == 1


@pytest.mark.parametrize("status", [403, 404])
@pytest.mark.parametrize("kind", ["rest", "git"])
def test_a_refusal_is_one_at_once_when_the_token_has_worked(
    world: AppWorld, client: Client, kind: str, status: int
) -> None:
    client.use(kind)
    world.github.faults.append(Fault(kind=kind, status=status, times=None))
    with pytest.raises(TaskFailed):
        client.use(kind)
    assert client.clock.waits == []
    assert len(world.statuses(kind, status)) == 1


@pytest.mark.parametrize("kind", ["rest", "git"])
def test_a_refusal_is_one_at_once_when_the_token_is_not_new(world: AppWorld, client: Client, kind: str) -> None:
    client.sign_in.token(TARGET, push=True)
    client.sign_in.token(DISPATCH)
    client.clock.at += 60
    world.github.faults.append(Fault(kind=kind, status=404, times=None))
    with pytest.raises(TaskFailed):
        client.use(kind)
    assert client.clock.waits == []


def test_a_task_is_done_with_tokens_that_are_new_each_time(world: AppWorld) -> None:
    first_uses = [
        Fault(path=f"/repos/{DISPATCH}/issues", status=401),
        Fault(path=f"/{TARGET}.git/.*", kind="git", status=404),
        Fault(path=f"/repos/{TARGET}/pulls", status=404),
    ]
    world.github.faults += first_uses
    world.open()
    with Daemon(world.runner(HastyClock(), AGENT_LEASE="1000000")):
        wait_until(world.is_over)
    assert [fault.seen > 1 for fault in first_uses] == [True] * 3
    assert_the_app_did_it(world)


@pytest.mark.parametrize("arguments", [["--once"], ["--check"]], ids=str)
def test_a_single_run_bears_with_a_new_token_too(world: AppWorld, arguments: list[str]) -> None:
    world.github.new_label(world.github.repository(DISPATCH), "copilot-agent")
    world.open()
    world.github.faults.append(Fault(path=f"/repos/{DISPATCH}/issues|/rate_limit", status=401))
    code, _, err = finish(world.start(*arguments))
    assert code == 0, err
    assert "GitHub may not know the App's new token yet" in err


# -- limits and faults of the App's own requests ---------------------------------------------------

OUT_OF_REACH: list[dict[str, Any]] = [
    {"status": 502},
    {"drop": "before"},
    {"drop": "after"},
    {"status": 200, "body": b"<html>Sign in to the hotel's network</html>"},
]
LIMITS: list[dict[str, Any]] = [
    {"status": 429},
    {"status": 429, "headers": {"retry-after": "60"}},
    {"status": 403, "headers": {"retry-after": "60"}},
    {"status": 403, "headers": {"x-ratelimit-remaining": "0", "x-ratelimit-reset": str(NOW + 60)}},
    {"status": 403, "body": {"message": "You have exceeded a secondary rate limit."}},
]
own_requests = pytest.mark.parametrize("path", [".*/installation", ".*/access_tokens"])


@pytest.mark.parametrize("fault", OUT_OF_REACH, ids=str)
@own_requests
def test_what_is_in_the_way_of_signing_in_is_waited_out(
    world: AppWorld, client: Client, path: str, fault: dict[str, Any]
) -> None:
    for kind in ("rest", "git"):
        world.github.faults.append(Fault(path=path, times=2, **fault))
        client.use(kind)
    assert client.clock.waits == [1, 2, 1, 2]


@pytest.mark.parametrize("limit", LIMITS, ids=str)
@pytest.mark.parametrize("kind", ["rest", "git"])
@own_requests
def test_a_limit_of_the_app_is_waited_out(
    world: AppWorld, client: Client, path: str, kind: str, limit: dict[str, Any]
) -> None:
    asked: list[float] = []
    faults = [Fault(path=path, action=lambda: asked.append(client.clock.at), **more) for more in (limit, {})]
    world.github.faults += faults
    client.use(kind)
    refused, granted = asked
    assert 60 <= granted - refused < 200


def test_a_limit_of_the_app_holds_for_all_repositories(world: AppWorld, client: Client) -> None:
    world.github.faults.append(Fault(path=".*/installation", status=429, headers={"retry-after": "60"}))
    for repo in (DISPATCH, TARGET):
        with pytest.raises(Unreachable, match="GitHub's limit for the App is reached"):
            client.sign_in.token(repo)
    assert len(world.requests()) == 1
    client.clock.at += 61
    assert client.sign_in.token(TARGET) == world.app.tokens[0].token


# -- masking ---------------------------------------------------------------------------------------


def test_all_tokens_are_masked_in_what_is_sent(world: AppWorld, client: Client) -> None:
    for _ in range(3):
        client.sign_in.token(DISPATCH)
        client.sign_in.token(TARGET, push=True)
        client.clock.at += HOUR
    tokens = [token.token for token in world.app.tokens]
    assert len(tokens) == 6
    forms = [form for token in tokens for form in (token, git_login(token), base64.b64encode(token.encode()).decode())]
    client.github.comment(1, "\n".join([*forms, "<!-- m -->"]), "<!-- m -->", again=False)
    assert world.last_comment().splitlines() == ["***"] * len(forms) + ["<!-- m -->"]
    assert not [token for token in tokens if token in f"{client.config!r} {client.sign_in.grant(DISPATCH)!r}"]


def test_all_tokens_that_are_good_are_masked_however_many_these_are(world: AppWorld, client: Client) -> None:
    for index in range(16):
        name = f"acme/repository-{index}"
        world.github.add_repository(name, files=None)
        world.installed.repositories.append(name)
        client.sign_in.token(name)
        client.sign_in.token(name, push=True)
    assert {client.config.masked(token.token) for token in world.app.tokens} == {"***"}
    assert len(world.app.tokens) == 32


# -- certificates ----------------------------------------------------------------------------------


@pytest.fixture
def secure(tmp_path: Path, certificate: Certificate) -> Iterator[AppWorld]:
    """A GitHub Enterprise Server whose certificate is of an authority of its own."""
    with app_world(tmp_path / "secure", certificate.server()) as world:
        world.open()
        yield world


def put_env_file(world: World, **env: str) -> None:
    (world.folder / "cwd").mkdir()
    (world.folder / "cwd" / ".env").write_text("".join(f"{name}={value}\n" for name, value in env.items()))


@pytest.mark.parametrize("place", ["environment", ".env"])
@pytest.mark.parametrize("name", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
def test_one_variable_makes_api_and_git_trust_an_authority(
    secure: AppWorld, certificate: Certificate, name: str, place: str
) -> None:
    settings = {name: str(certificate.path)}
    if place == ".env":
        put_env_file(secure, **settings)
    code, _, err = finish(secure.start("--once", **(settings if place == "environment" else {})))
    assert code == 0, err
    assert_the_app_did_it(secure)


@pytest.mark.parametrize("personal", [False, True])
def test_a_certificate_of_an_unknown_authority_is_told_in_one_line(secure: AppWorld, personal: bool) -> None:
    env = {"GITHUB_APP_ID": "", "GITHUB_APP_PRIVATE_KEY_PATH": "", "GITHUB_TOKEN": secure.personal} if personal else {}
    code, _, err = finish(secure.start("--once", **env))
    assert code == 1
    (line,) = [line for line in err.splitlines() if "ERROR" in line]
    assert "cannot read the queue: no answer to GET" in line
    assert "certificate" in line
    assert (secure.github.log, secure.labels()) == ([], ["copilot-agent"])


def test_a_folder_of_certificates_is_one_for_git_too(world: AppWorld, tmp_path: Path) -> None:
    passed = Git(SignIn(world.config(REQUESTS_CA_BUNDLE=str(tmp_path))))._env
    assert passed["GIT_SSL_CAPATH"] == str(tmp_path)
    assert "GIT_SSL_CAINFO" not in passed


# -- proxies ---------------------------------------------------------------------------------------

HOP_BY_HOP = ("connection", "keep-alive", "proxy-connection", "transfer-encoding", "content-length")


class Proxy(ThreadingHTTPServer):
    """A forward proxy, the only one who knows where github.test is."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Forward)
        self.seen: list[tuple[str, str]] = []  # user agents and addresses
        self.url = f"http://127.0.0.1:{self.server_port}"


class Forward(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def log_message(self, *args: Any, **more: Any) -> None:
        pass

    def forward(self) -> None:
        where = urlsplit(self.path)
        self.server.seen.append((self.headers["user-agent"], self.path))
        assert (where.scheme, where.hostname) == ("http", "github.test")
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        connection = http.client.HTTPConnection("127.0.0.1", where.port or 80, timeout=60)
        sent = self.kept(dict(self.headers.items())) | {"Content-Length": str(len(body))}
        connection.request(self.command, self.path.partition(where.netloc)[2], body, sent)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        self.send_response_only(answer.status)
        empty = answer.status in (204, 304)
        length = {} if empty else {"Content-Length": str(len(data))}
        for name, value in (self.kept(dict(answer.getheaders())) | length).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PATCH = do_DELETE = forward  # noqa: N815

    def kept(self, headers: Mapping[str, str]) -> dict[str, str]:
        return {name: value for name, value in headers.items() if name.lower() not in HOP_BY_HOP}


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with Proxy() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def do_one_issue(world: AppWorld, settings: dict[str, str], place: str) -> None:
    """A task, done by a process that has these settings in its environment or in .env."""
    if place == ".env":
        put_env_file(world, **settings)
    world.open()
    code, _, err = finish(world.start("--once", **(settings if place == "environment" else {})))
    assert code == 0, err
    assert_the_app_did_it(world)


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
@pytest.mark.parametrize("place", ["environment", ".env"])
def test_api_and_git_go_through_a_proxy(world: AppWorld, proxy: Proxy, name: str, place: str) -> None:
    world.github.server_url = f"http://github.test:{world.github.port}"
    world.github.api_url = f"{world.github.server_url}/api/v3"
    world.env |= {"GITHUB_SERVER_URL": world.github.server_url, "GITHUB_API_URL": world.github.api_url}
    settings = {name: proxy.url}
    do_one_issue(world, settings, place)
    assert len(proxy.seen) == len(world.github.log)
    assert {agent.partition("/")[0] for agent, _ in proxy.seen} == {"agent-runner", "git"}


@pytest.mark.parametrize("name", ["NO_PROXY", "no_proxy"])
@pytest.mark.parametrize("place", ["environment", ".env"])
def test_a_server_that_needs_no_proxy_is_reached_without(world: AppWorld, proxy: Proxy, name: str, place: str) -> None:
    settings = {"HTTP_PROXY": proxy.url, "http_proxy": proxy.url, name: "example.com,127.0.0.1"}
    do_one_issue(world, settings, place)
    assert proxy.seen == []
