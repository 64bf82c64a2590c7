"""`--check`: it finds what is wrong, names the cure, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any, NamedTuple

import pytest
from conftest import DISPATCH, TARGET, World
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from model import ModelServer
from standin import Fault
from standin_app import App, Installation
from test_cli import finish
from test_standin_app import PEM, PRIVATE, PUBLIC

import runner as runner_module
from runner import Config, Doctor, check_git, check_http, examine, is_runner_there, serving

LABEL = "copilot-agent"
LOCAL = ["state", "git", "disk", "sandbox", "agent", "http", "sign-in"]
REMOTE = ["clock", "quota", "dispatch", "labels", "target", "claims", "pulls"]


class Row(NamedTuple):
    mark: str
    check: str
    found: str
    cure: str


class Report(NamedTuple):
    code: int
    rows: list[Row]
    text: str

    def marks(self, mark: str) -> list[str]:
        """The checks with this mark."""
        return [row.check for row in self.rows if row.mark == mark]

    def row(self, check: str) -> Row:
        (found,) = (row for row in self.rows if row.check == check)
        return found


def read_report(code: int, text: str) -> Report:
    """What `--check` has printed; each line must be a finding or a cure."""
    rows: list[Row] = []
    for line in text.splitlines():
        if cure := re.fullmatch(r"  → (.+)", line):
            rows[-1] = rows[-1]._replace(cure=cure[1])
        else:
            match = re.fullmatch(r"([✓✗·]) (\S+) +(\S.*)", line)
            assert match, line
            rows.append(Row(match[1], match[2], match[3], ""))
    return Report(code, rows, text)


def look(config: Config, as_json: bool = False) -> tuple[int, str]:
    """The exit code of a check in this process, and what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = examine(Doctor(config).findings(), as_json)
    return code, out.getvalue()


def checked(world: World, **env: str) -> Report:
    return read_report(*look(world.config(**env)))


def check_process(world: World, **env: str) -> Report:
    """The same in a process of its own."""
    code, out, _ = finish(world.start("--check", **env), 20)
    return read_report(code, out)


@pytest.fixture(autouse=True)
def _labelled(world: World) -> None:
    world.github.new_label(world.github.repository(DISPATCH), LABEL, color="1d76db", description="For the agent")


def state_of(world: World) -> Any:
    """All that a check could leave behind at GitHub."""
    github = world.github
    refs = [github.git(name, "for-each-ref") for name in (DISPATCH, TARGET)]
    labels = [[vars(label).copy() for label in github.repository(name).labels.values()] for name in (DISPATCH, TARGET)]
    issues = [len(github.repository(name).issues) for name in (DISPATCH, TARGET)]
    return refs, labels, issues


def test_check_finds_everything_in_place(world: World) -> None:
    before = state_of(world)
    code, out, err = finish(world.start("--check"))
    report = read_report(code, out)
    assert (code, err) == (0, ""), out
    assert report.marks("✓") == LOCAL + REMOTE
    assert "→" not in out
    assert report.row("target").found == f"{TARGET} can be read, its default branch is main"
    assert state_of(world) == before
    assert list((world.folder / "state").iterdir()) == []


def test_check_writes_what_it_takes_back_and_what_changes_nothing(world: World) -> None:
    assert checked(world).code == 0
    writes = [(r.method, r.path, r.json, r.status) for r in world.github.rest() if r.method != "GET"]
    pull = {"title": "agent-runner --check", "head": "main", "base": "main"}
    assert writes == [
        ("PATCH", f"/repos/{DISPATCH}/labels/{LABEL}", {"color": "1d76db"}, 200),
        ("POST", f"/repos/{TARGET}/pulls", pull, 422),
    ]
    pushes = [r.path for r in world.github.requests("git") if r.path.endswith("git-receive-pack")]
    assert pushes == [f"/{TARGET}.git/git-receive-pack"] * 2  # a claim comes, and goes
    assert world.requests("POST", "graphql") == []


def test_all_targets_that_have_a_name_are_looked_at_once(world: World) -> None:
    world.github.add_repository("acme/gadgets")
    world.github.add_repository("other/things")
    report = checked(world, AGENT_ALLOWED_TARGETS=f"acme/gadgets, {TARGET}, other/*")
    assert report.code == 0
    assert report.marks("✓") == LOCAL + REMOTE + ["target", "claims", "pulls"]
    found = [row.found.partition(" ")[0] for row in report.rows if row.check == "target"]
    assert found == [TARGET, "acme/gadgets"]


def test_a_target_among_several_that_cannot_be_had_is_named(world: World) -> None:
    report = checked(world, AGENT_ALLOWED_TARGETS=f"{TARGET}, acme/nowhere")
    assert report.code == 1
    assert [row.check for row in report.rows if row.mark == "✗" and "acme/nowhere" in row.found] == [
        "target", "claims", "pulls"
    ]  # fmt: skip
    assert all(TARGET not in row.found for row in report.rows if row.mark == "✗")


def test_what_the_token_is_and_when_it_ends_is_shown(world: World) -> None:
    assert checked(world).row("sign-in").found == "classic token with the scopes repo"
    world.github.token_expiration = "2026-12-01 00:00:00 UTC"
    world.github.token, world.github.fine_grained = "github_pat_" + "1" * 40, {"contents": "write"}
    found = checked(world, GITHUB_TOKEN=world.github.token).row("sign-in").found
    assert found == "fine-grained token, until 2026-12-01 00:00:00 UTC"


# -- one fault, one row, one cure -------------------------------------------------------------------


def refuse_claims(world: World) -> None:
    """Has the target take branches only, as some rules do."""
    hook = world.github.repository(TARGET).path / "hooks/update"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text('#!/bin/sh\ncase "$1" in refs/heads/*) exit 0;; *) echo "GH999: not there"; exit 1;; esac\n')
    hook.chmod(0o755)


def empty_target(world: World) -> None:
    world.github.add_repository("acme/empty", files=None)


def archived(world: World) -> None:
    data = {"full_name": DISPATCH, "archived": True, "has_issues": True, "permissions": {"push": True}}
    world.github.faults.append(Fault(method="GET", path=f"/repos/{DISPATCH}", status=200, body=data, times=None))


def fine_grained(**lacking: str) -> Callable[[World], None]:
    """A token with all that is needed but this."""

    def plant(world: World) -> None:
        needs = {"issues": "write", "contents": "write", "pull_requests": "write"}
        world.github.fine_grained = {**needs, **lacking}

    return plant


class Planted(NamedTuple):
    """A fault, the rows that must tell it, and what they must say."""

    rows: str
    told: str
    cure: str
    env: dict[str, str] = {}  # noqa: RUF012 (never changed)
    plant: Callable[[World], None] = lambda _: None


PLANTED = {
    "state not writable": Planted(
        "state disk claims", "/proc/nowhere", "AGENT_STATE_DIR", {"AGENT_STATE_DIR": "/proc/nowhere"}
    ),
    "too little disk": Planted(
        "disk", "1,000,000,000", "AGENT_DISK_BUDGET_MB", {"AGENT_DISK_BUDGET_MB": "1000000000"}
    ),
    "plug-in that cannot be loaded": Planted(
        "agent", "No module named 'no_such_module'", "Mend the plug-in",
        {"AGENT_PROCESS_TASK": "no_such_module:process_task"},
    ),
    "wrong token": Planted("sign-in", "401", "check GITHUB_TOKEN", {"GITHUB_TOKEN": "ghp_" + "9" * 36}),
    "no scopes": Planted(
        "sign-in", "scopes are: none", "scope repo", plant=lambda world: setattr(world.github, "scopes", "")
    ),
    "other scopes": Planted(
        "sign-in", "scopes are: read:org", "scope repo", plant=lambda world: setattr(world.github, "scopes", "read:org")
    ),
    "no scope workflow": Planted("sign-in", "scope workflow", "AGENT_ALLOW_WORKFLOWS", {"AGENT_ALLOW_WORKFLOWS": "1"}),
    "no dispatch repository": Planted(
        "dispatch labels", "acme/nowhere", "name", {"AGENT_DISPATCH_REPO": "acme/nowhere"}
    ),
    "issues off": Planted(
        "dispatch", "issues are off", "Turn them on",
        plant=lambda world: setattr(world.github.repository(DISPATCH), "has_issues", False),
    ),
    "archived": Planted("dispatch", "archived", "unarchive", plant=archived),
    "no label": Planted("labels", "no label do-this", "Make it", {"AGENT_TASK_LABEL": "do-this"}),
    "no push": Planted(
        "target claims pulls", TARGET, "README.md lists the permissions",
        plant=lambda world: world.github.push_denied.add(TARGET),
    ),
    "empty target": Planted(
        "target", "acme/empty is empty", "Push a first commit", {"AGENT_TARGET_REPO": "acme/empty"}, empty_target
    ),
    "no claims": Planted(
        "claims", f"{TARGET} refuses the push", "AGENT_CLAIM_REFS=refs/heads/agent-claims", plant=refuse_claims
    ),
    "issues read only": Planted("labels", "403", "lists the permissions", plant=fine_grained(issues="read")),
    "pulls read only": Planted("pulls", "403", "lists the permissions", plant=fine_grained(pull_requests="read")),
    "contents read only": Planted("claims", TARGET, "lists the permissions", plant=fine_grained(contents="read")),
    "clock ahead": Planted(
        "clock", "clock is 1 h", "NTP", plant=lambda world: setattr(world.github, "now", lambda: time.time() - 3900)
    ),
    "clock behind": Planted(
        "clock", "clock is 1 h", "NTP", plant=lambda world: setattr(world.github, "now", lambda: time.time() + 3900)
    ),
    "quota nearly used up": Planted(
        "quota", "99 of 5,000", "wait", plant=lambda world: setattr(world.github, "rate_remaining", 99)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_a_fault_is_found_in_its_row_with_its_cure(world: World, name: str) -> None:
    planted = PLANTED[name]
    planted.plant(world)
    report = checked(world, **planted.env)
    assert report.code == 1
    assert report.marks("✗") == planted.rows.split(), report.text
    first = report.row(planted.rows.split()[0])
    assert planted.told in first.found
    assert planted.cure in first.cure
    assert all(row.cure for row in report.rows if row.mark == "✗")
    assert report.marks("·") == (REMOTE if first.check == "sign-in" else [])


def test_the_way_out_for_refused_claims_is_one(world: World) -> None:
    refuse_claims(world)
    before = state_of(world)
    assert checked(world, AGENT_CLAIM_REFS="refs/heads/agent-claims").code == 0
    assert state_of(world) == before


@pytest.mark.parametrize(
    ("script", "found"),
    [("#!/bin/sh\necho git version 2.20.1\n", "git 2.20.1 is too old"), ("#!/bin/sh\nexit 3\n", "git does not start")],
    ids=["old", "broken"],
)
def test_a_git_that_is_too_old_or_does_not_start_is_found(world: World, script: str, found: str) -> None:
    (world.folder / "bin").mkdir()
    git = world.folder / "bin/git"
    git.write_text(script)
    git.chmod(0o755)
    report = checked(world, PATH=f"{world.folder}/bin")
    assert report.code == 1
    assert report.row("git").mark == "✗"
    assert report.row("git").found.startswith(found)
    assert report.row("git").cure == "Install git 2.31 or newer."


def test_a_git_that_is_not_there_is_found(world: World) -> None:
    report = checked(world, PATH=str(world.folder))
    assert (report.code, report.row("git").cure) == (1, "Install git 2.31 or newer.")
    assert report.row("git").found.startswith("git does not start: ")
    assert {"git", "target", "claims"} <= {*report.marks("✗")}


def test_a_new_enough_git_is_named(world: World) -> None:
    (world.folder / "state").mkdir()
    assert re.fullmatch(r"git [\d.]+.*", check_git(world.config()))


@pytest.mark.parametrize(
    ("env", "user", "version", "found", "cure"),
    [
        ({"AGENT_ALLOW_ROOT": "no"}, 0, 7, "the runner is root", "AGENT_ALLOW_ROOT=yes"),
        ({"AGENT_SANDBOX": "required"}, 1000, 0, "AGENT_SANDBOX is required", "AGENT_SANDBOX=auto"),
    ],
    ids=["root", "no Landlock"],
)
def test_walls_that_are_missing_are_found(
    world: World, monkeypatch: pytest.MonkeyPatch, env: dict[str, str], user: int, version: int, found: str, cure: str
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.setattr(runner_module, "landlock_version", lambda: version)
    monkeypatch.setattr(runner_module, "set_process", lambda *_: True)
    report = checked(world, AGENT_COMMAND="true", **env)
    assert (report.code, report.marks("✗")) == (1, ["sandbox"])
    assert found in report.row("sandbox").found
    assert cure in report.row("sandbox").cure


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be refused as root")
def test_root_is_found_by_a_process_too(world: World) -> None:
    report = check_process(world, AGENT_COMMAND="true", AGENT_ALLOW_ROOT="")
    assert (report.code, report.marks("✗")) == (1, ["sandbox"])


def test_the_program_and_the_plugin_that_will_run_are_named(world: World) -> None:
    program = checked(world, AGENT_COMMAND="true --fast").row("agent")
    assert (program.mark, program.found) == ("✓", f"command {shutil.which('true')}")
    assert checked(world, AGENT_COMMAND="a | b", AGENT_SHELL="1").row("agent").found == "command /bin/sh"
    (world.folder / "mine.py").write_text("def process_task(issue): return True\n")
    spec = f"{world.folder}/mine.py:process_task"
    assert checked(world, AGENT_PROCESS_TASK=spec).row("agent").found == spec


def test_the_agents_that_tasks_can_choose_are_named(world: World) -> None:
    row = checked(world, AGENT_COMMAND="true", AGENT_COMMAND_SECOND="false").row("agent")
    assert row.found == f"command {shutil.which('true')}; second: command {shutil.which('false')}"


def test_walls_are_looked_at_where_only_a_named_agent_or_a_script_needs_them(world: World) -> None:
    assert checked(world).row("sandbox").found == "patches need none"
    for variable in ("AGENT_COMMAND_SECOND", "AGENT_SETUP_COMMAND", "AGENT_VERIFY_COMMAND"):
        assert "agents are kept from" in checked(world, **{variable: "true"}).row("sandbox").found


def test_a_models_server_that_takes_the_key_is_well(world: World) -> None:
    with ModelServer() as model:
        row = checked(world, **model.env()).row("agent")
    assert (row.mark, row.found) == ("✓", f"openai standin-model at {model.url}")
    assert model.headers == []  # nothing was asked of the model itself
    assert model.paths == ["GET /v1/models"]


def test_a_server_that_does_not_list_its_models_is_well(world: World) -> None:
    with ModelServer(models=None, key=None) as model:
        assert checked(world, **model.env()).row("agent").mark == "✓"


def test_a_models_key_that_is_refused_is_found(world: World) -> None:
    with ModelServer() as model:
        row = checked(world, **model.env() | {"OPENAI_API_KEY": "sk-wrong"}).row("agent")
    assert (row.mark, row.found) == ("✗", f"{model.url}/models answers 401")
    assert row.cure == "Check OPENAI_API_KEY and what it may do."


def test_a_models_server_that_is_away_is_found(world: World) -> None:
    row = checked(world, AGENT_MODEL="any", OPENAI_BASE_URL="http://127.0.0.1:1/v1").row("agent")
    assert re.fullmatch(r"no answer from http://127\.0\.0\.1:1/v1/models: .*Connection refused", row.found)
    assert row.cure == "Check OPENAI_BASE_URL."


# -- variables --------------------------------------------------------------------------------------


def test_all_bad_variables_are_named_at_once(world: World) -> None:
    bad = {
        "GITHUB_TOKEN": "",
        "AGENT_TARGET_REPO": "x",
        "AGENT_POLL_INTERVAL": "soon",
        "AGENT_COMMAND": "nowhere-at-all",
    }
    report = check_process(world, **bad)
    assert report.code == 1
    assert report.marks("✗") == ["settings"] * 4 == [row.check for row in report.rows]
    assert sorted(row.found.partition(" ")[0] for row in report.rows) == sorted(bad)
    assert all(row.cure for row in report.rows)
    assert world.github.log == []


def test_a_program_that_is_not_on_the_path_is_named(world: World) -> None:
    (row,) = check_process(world, AGENT_COMMAND="nowhere-at-all --fast").rows
    assert (row.mark, row.check) == ("✗", "settings")
    assert "AGENT_COMMAND names the program 'nowhere-at-all', which is not on the PATH" in row.found


# -- the port ---------------------------------------------------------------------------------------


@pytest.fixture
def taken() -> Iterator[socket.socket]:
    """A port that another program listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


@pytest.fixture
def port(taken: socket.socket) -> str:
    """A port that was free a moment ago."""
    taken.close()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return str(listener.getsockname()[1])


def test_a_port_that_another_program_has_is_found(world: World, taken: socket.socket) -> None:
    number = taken.getsockname()[1]
    report = checked(world, AGENT_HTTP_PORT=str(number))
    assert (report.code, report.marks("✗")) == (1, ["http"])
    assert report.row("http").found.startswith(f"http://127.0.0.1:{number}/: Address already in use")
    assert "AGENT_HTTP_PORT" in report.row("http").cure


def test_another_web_server_on_the_port_is_no_runner(world: World) -> None:
    report = checked(world, AGENT_HTTP_PORT=str(world.github.port))
    assert (report.code, report.marks("✗")) == (1, ["http"])
    world.github.problems.clear()  # it was asked for a path that GitHub does not have


def test_a_port_that_this_runner_uses_already_is_well(world: World, port: str) -> None:
    env = {"AGENT_HTTP_PORT": port, "GITHUB_WEBHOOK_SECRET": "s3cret-of-webhooks"}
    with serving(world.runner(None, **env)):
        assert is_runner_there(world.config(**env))
        report = checked(world, **env)
    assert report.code == 0
    address = f"http://127.0.0.1:{port}/"
    assert report.row("http").found.startswith(f"page at {address}, webhooks at {address}webhook")
    assert not is_runner_there(world.config(**env))


def test_a_free_port_is_free_afterwards(world: World, port: str) -> None:
    assert ", no webhooks" in check_http(world.config(AGENT_HTTP_PORT=port))
    socket.create_server(("127.0.0.1", int(port))).close()


@pytest.mark.parametrize("host", ["no.such.host.invalid", "a..b", "x" * 64])
def test_a_host_that_is_none_is_found(world: World, port: str, host: str) -> None:
    report = checked(world, AGENT_HTTP_PORT=port, AGENT_HTTP_HOST=host)
    assert (report.code, report.marks("✗")) == (1, ["http"])


# -- GitHub that does not answer as it should -------------------------------------------------------


def test_after_a_sign_in_that_failed_nothing_more_is_asked(world: World) -> None:
    report = check_process(world, GITHUB_TOKEN="ghp_wrong")
    assert (report.code, report.marks("✓"), report.marks("✗"), report.marks("·")) == (
        1,
        LOCAL[:-1],
        ["sign-in"],
        REMOTE,
    )
    assert {row.found for row in report.rows if row.mark == "·"} == {"not looked at"}
    assert [(r.kind, r.path) for r in world.github.log] == [("rest", "/rate_limit")]


def test_a_github_out_of_reach_is_found(world: World) -> None:
    world.github.stop()
    report = check_process(world)
    assert (report.code, report.marks("✗"), report.marks("·")) == (1, ["sign-in"], REMOTE)
    assert report.row("sign-in").found.startswith("no answer to GET /rate_limit: ")
    assert report.row("sign-in").found.endswith("Connection refused")
    assert report.row("sign-in").cure


def test_a_quota_that_is_used_up_is_told_and_not_waited_for(world: World) -> None:
    world.github.rate_remaining = 0
    report = check_process(world)
    assert report.code == 1
    assert report.marks("✗") == ["quota"]
    assert report.row("quota").found.startswith("0 of 5,000 requests are left until 20")
    assert "wait" in report.row("quota").cure
    assert {"dispatch", "labels"} <= {*report.marks("·")}


def test_a_limit_that_is_met_on_the_way_is_not_waited_for(world: World) -> None:
    world.github.faults.append(Fault(path=".*/labels/.*", status=429, headers={"retry-after": "3600"}, times=None))
    report = check_process(world)
    assert report.code == 1
    assert "labels" not in report.marks("✓")
    assert report.row("claims").mark == "✓"


def test_a_github_server_without_limits_is_well(world: World) -> None:
    body = {"message": "Rate limiting is not enabled."}  # as GitHub Enterprise Server answers unless they are turned on
    world.github.faults.append(Fault(path="/rate_limit", status=404, body=body, times=None))
    report = checked(world)
    assert (report.code, report.marks("✗")) == (0, []), report.text


@pytest.mark.parametrize("body", [{}, [], {"resources": {"core": {}}}, b"<html>Log in to the hotel's network"], ids=str)
def test_a_server_that_is_not_githubs_is_found(world: World, body: Any) -> None:
    world.github.faults.append(Fault(path="/rate_limit", status=200, body=body, times=None))
    report = checked(world)
    assert (report.code, report.marks("✗"), report.marks("·")) == (1, ["sign-in"], REMOTE)


# -- as a GitHub App --------------------------------------------------------------------------------


class AsApp(NamedTuple):
    app: App
    env: dict[str, str]

    def install(self, repositories: list[str], **permissions: str) -> Installation:
        needs = {"issues": "write", "contents": "write", "pull_requests": "write", "metadata": "read"}
        return self.app.install("acme", repositories, {**needs, **permissions})


@pytest.fixture
def as_app(world: World) -> AsApp:
    app = world.github.app = App(PUBLIC)
    env = {"GITHUB_TOKEN": "", "GITHUB_APP_ID": str(app.id), "GITHUB_APP_PRIVATE_KEY": PRIVATE.decode()}
    return AsApp(app, env)


def test_an_app_with_everything_in_place(world: World, as_app: AsApp) -> None:
    as_app.install([DISPATCH, TARGET])
    before = state_of(world)
    report = checked(world, **as_app.env)
    assert report.marks("✓") == LOCAL + REMOTE, report.text
    assert report.row("sign-in").found == f"App 4711 with its permissions for {DISPATCH} and {TARGET}"
    assert state_of(world) == before


def test_the_key_of_another_app_is_found(world: World, as_app: AsApp) -> None:
    as_app.install([DISPATCH, TARGET])
    other = rsa.generate_private_key(public_exponent=65_537, key_size=2048)
    key = other.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()).decode()
    report = checked(world, **as_app.env | {"GITHUB_APP_PRIVATE_KEY": key})
    assert (report.code, report.marks("✗"), report.marks("·")) == (1, ["sign-in"], REMOTE)
    assert "belong to the same App" in report.row("sign-in").cure


@pytest.mark.parametrize("there", [[DISPATCH], [TARGET], []], ids=str)
def test_an_app_that_is_not_installed_is_found(world: World, as_app: AsApp, there: list[str]) -> None:
    as_app.install(there)
    report = checked(world, **as_app.env)
    assert (report.code, report.marks("✗"), report.marks("·")) == (1, ["sign-in"], REMOTE)
    missing = next(name for name in (DISPATCH, TARGET) if name not in there)
    assert f"install the App on {missing}" in report.row("sign-in").cure


@pytest.mark.parametrize(
    ("permissions", "env", "told"),
    [
        ({"issues": "read"}, {}, f"{DISPATCH}: issues: write"),
        ({"contents": "read", "pull_requests": "read"}, {}, f"{TARGET}: contents: write, pull_requests: write"),
        ({}, {"AGENT_ALLOW_WORKFLOWS": "yes"}, f"{TARGET}: workflows: write"),
    ],
    ids=["issues", "contents and pulls", "workflows"],
)
def test_a_permission_that_an_app_lacks_is_named(
    world: World, as_app: AsApp, permissions: dict[str, str], env: dict[str, str], told: str
) -> None:
    as_app.install([DISPATCH, TARGET], **permissions)
    report = checked(world, **as_app.env, **env)
    assert (report.code, report.marks("✗"), report.marks("·")) == (1, ["sign-in"], REMOTE)
    assert report.row("sign-in").found == f"the App lacks permissions for {told}"
    assert "App's settings" in report.row("sign-in").cure


def test_an_installation_that_is_suspended_is_found(world: World, as_app: AsApp) -> None:
    as_app.install([DISPATCH, TARGET]).suspended = True
    report = checked(world, **as_app.env)
    assert (report.code, report.marks("✗")) == (1, ["sign-in"])
    assert "suspended" in report.row("sign-in").cure


def test_another_target_that_the_app_is_not_installed_on_is_found(world: World, as_app: AsApp) -> None:
    world.github.add_repository("acme/gadgets")
    as_app.install([DISPATCH, TARGET])
    report = checked(world, **as_app.env, AGENT_ALLOWED_TARGETS=f"{TARGET},acme/gadgets")
    assert report.marks("✗") == ["target", "claims", "pulls"]
    wrong = [row for row in report.rows if row.mark == "✗"]
    assert all("acme/gadgets" in row.found + row.cure for row in wrong)


# -- for programs, and without secrets --------------------------------------------------------------


def shape(rows: list[Row]) -> list[Row]:
    """Findings without their numbers, which change from one look to the next."""
    return [row._replace(found=re.sub(r"[\d,]+", "0", row.found)) for row in rows]


@pytest.mark.parametrize(
    "env",
    [{}, {"GITHUB_TOKEN": "ghp_wrong"}, {"AGENT_TASK_LABEL": "do-this"}, {"AGENT_POLL_INTERVAL": "soon"}],
    ids=["all well", "wrong token", "no label", "bad variable"],
)
def test_json_holds_the_same_findings(world: World, env: dict[str, str]) -> None:
    told = check_process(world, **env)
    code, out, _ = finish(world.start("--check", "--json", **env))
    found = json.loads(out)
    assert (code, found["ok"], found["version"]) == (told.code, not told.code, runner_module.__version__)
    assert all(list(row) == ["check", "ok", "found", "cure"] for row in found["checks"])
    marks = {True: "✓", False: "✗", None: "·"}
    rows = [Row(marks[row["ok"]], row["check"], row["found"], row["cure"]) for row in found["checks"]]
    assert shape(rows) == shape(told.rows)


def test_json_is_alone_on_standard_output(world: World) -> None:
    process = world.start("--check", "--json", AGENT_POLL_INTERVALL="5", AGENT_LOG_LEVEL="DEBUG")
    code, out, err = finish(process)
    assert (code, json.loads(out)["ok"]) == (0, True)
    assert "did you mean AGENT_POLL_INTERVAL?" in err
    assert "DEBUG run git" in err


def test_json_goes_with_check_only(world: World) -> None:
    for others in ((), ("--once",), ("--issue", "1")):
        code, out, err = finish(world.start("--json", *others))
        assert (code, out) == (2, "")
        assert "--json goes with --check" in err
    assert world.github.log == []


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "JSON"])
def test_no_secret_gets_into_a_finding(world: World, as_json: bool) -> None:
    secret, token = 'pass "word" and more', world.github.token
    (world.folder / "leaky.py").write_text(f"import os\nraise ValueError(os.environ['MY_KEY'] + {token!r})\n")
    env = {"AGENT_ENV": "MY_KEY", "MY_KEY": secret, "AGENT_PROCESS_TASK": f"{world.folder}/leaky.py:process_task"}
    refused = {"message": f"who is {token}?"}
    world.github.faults.append(Fault(path=f"/repos/{DISPATCH}", status=403, body=refused))
    code, out = look(world.config(**env), as_json)
    assert code == 1
    assert token not in out
    assert secret not in out
    assert json.dumps(secret)[1:-1] not in out
    assert out.count("***") >= 2


def test_what_others_say_stays_in_its_row(world: World) -> None:
    refused = {"message": "first\n✓ second\x1b[31m\u202e"}
    world.github.faults.append(Fault(path=f"/repos/{DISPATCH}", status=403, body=refused))
    report = checked(world)
    assert report.marks("✗") == ["dispatch"]
    assert "first ✓ second" in report.row("dispatch").found
    assert not re.search("[\x1b\u202e]", report.text)


def test_a_models_server_is_asked_as_the_agent_asks_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no login of ~/.netrc, and at no other address."""
    netrc = world.folder / "netrc"
    netrc.write_text("machine 127.0.0.1 login a password b\n")
    monkeypatch.setenv("NETRC", str(netrc))
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append((self.path, self.headers["Authorization"]))
            self.send_response(307)
            self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        checked(world, AGENT_MODEL="any", OPENAI_BASE_URL=f"http://127.0.0.1:{server.server_port}/v1").row("agent")
        server.shutdown()
    assert seen == [("/v1/models", None)]
