"""The settings: what each variable may hold, and what is said when it holds something else."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import pytest
from conftest import DISPATCH, TARGET, make_config
from hypothesis import given
from hypothesis import strategies as st

from runner import DROPPINGS, PROMPT, Config, ConfigError, Secret, git_login

TOKEN = "ghp_0123456789abcdefghijklmnopqrstuvwxyz"
DEFAULTS: dict[str, tuple[str, Any]] = {
    "GITHUB_API_URL": ("api_url", "https://api.github.com"),
    "GITHUB_SERVER_URL": ("server_url", "https://github.com"),
    "AGENT_DISPATCH_REPO": ("dispatch_repo", "endomorphosis/lift_coding_dispatch"),
    "GITHUB_TOKEN_FILE": ("token_file", None),
    "GITHUB_APP_ID": ("app_id", ""),
    "GITHUB_APP_PRIVATE_KEY": ("first_app_key", ""),
    "GITHUB_APP_PRIVATE_KEY_PATH": ("app_key_file", None),
    "GITHUB_APP_INSTALLATION_ID": ("app_installation", ""),
    "GITHUB_WEBHOOK_SECRET": ("webhook_secret", ""),
    "AGENT_TARGET_REPO": ("target_repo", "endomorphosis/lift_coding"),
    "AGENT_ALLOWED_TARGETS": ("allowed_targets", ("endomorphosis/lift_coding",)),
    "AGENT_ALLOWED_AUTHORS": ("allowed_authors", ()),
    "AGENT_TASK_LABEL": ("task_label", "copilot-agent"),
    "AGENT_PROCESSED_LABEL": ("processing_label", "agent-processing"),
    "AGENT_DONE_LABEL": ("done_label", "agent-done"),
    "AGENT_FAILED_LABEL": ("failed_label", "agent-failed"),
    "AGENT_POLL_INTERVAL": ("poll_interval", 60),
    "AGENT_PROCESS_TASK": ("process_task", "patch"),
    "AGENT_COMMAND": ("command", ""),
    "AGENT_SHELL": ("shell", False),
    "AGENT_MODEL": ("model", ""),
    "OPENAI_BASE_URL": ("model_url", "https://api.openai.com/v1"),
    "OPENAI_API_KEY": ("model_key", ""),
    "AGENT_MAX_STEPS": ("max_steps", 100),
    "AGENT_MAX_TOKENS": ("max_tokens", 5_000_000),
    "AGENT_PRICE_INPUT": ("price_input", -1),
    "AGENT_PRICE_CACHED": ("price_cached", -1),
    "AGENT_PRICE_OUTPUT": ("price_output", -1),
    "AGENT_PROMPT_FILE": ("prompt", PROMPT),
    "AGENT_SETUP_COMMAND": ("setup_command", ""),
    "AGENT_SETUP_TIMEOUT": ("setup_timeout", 600),
    "AGENT_VERIFY_COMMAND": ("verify_command", ""),
    "AGENT_VERIFY_TIMEOUT": ("verify_timeout", 600),
    "AGENT_VERIFY_ROUNDS": ("verify_rounds", 1),
    "AGENT_DRAFT_ON_FAILURE": ("draft_on_failure", False),
    "AGENT_TASK_TIMEOUT": ("task_timeout", 1800),
    "AGENT_STALL_SECONDS": ("stall_seconds", 0),
    "AGENT_SANDBOX": ("sandbox", "auto"),
    "AGENT_ALLOW_ROOT": ("allow_root", False),
    "AGENT_MAX_MEMORY_MB": ("max_memory", 0),
    "AGENT_MAX_ATTEMPTS": ("max_attempts", 3),
    "AGENT_MAX_CONCURRENT": ("max_concurrent", 1),
    "AGENT_LEASE": ("lease", 600),
    "AGENT_RUNNER_ID": ("runner_id", f"{socket.gethostname()}:{Path.cwd() / '.agent-runner'}"),
    "AGENT_CLAIM_REFS": ("claim_refs", "refs/agent-runner/claims"),
    "AGENT_DISK_BUDGET_MB": ("disk_budget", 10240),
    "AGENT_DRAIN_SECONDS": ("drain_seconds", 30),
    "AGENT_WRITE_INTERVAL": ("write_interval", 1),
    "AGENT_STATE_DIR": ("state_dir", Path.cwd() / ".agent-runner"),
    "AGENT_HOME": ("home", Path.cwd() / ".agent-runner" / "home"),
    "AGENT_ENV": ("agent_env", ()),
    "AGENT_MAX_CHANGED_FILES": ("max_changed_files", 1000),
    "AGENT_MAX_CHANGED_BYTES": ("max_changed_bytes", 10_000_000),
    "AGENT_IGNORE": ("ignore", tuple(DROPPINGS.split(","))),
    "AGENT_ALLOW_WORKFLOWS": ("allow_workflows", False),
    "AGENT_BRANCH": ("branch", "agent-task-{task_id}"),
    "AGENT_PR_TITLE": ("pull_title", "Agent task: {title}"),
    "AGENT_PR_DRAFT": ("pull_draft", False),
    "AGENT_PR_LABELS": ("pull_labels", ()),
    "AGENT_PR_REVIEWERS": ("pull_reviewers", ()),
    "AGENT_COMMIT_NAME": ("commit_name", "agent-runner"),
    "AGENT_COMMIT_EMAIL": ("commit_email", "agent-runner@noreply.github.com"),
    "AGENT_HTTP_HOST": ("http_host", "127.0.0.1"),
    "AGENT_HTTP_PORT": ("http_port", 0),
    "AGENT_LOG_FORMAT": ("log_format", "text"),
    "AGENT_LOG_LEVEL": ("log_level", "INFO"),
    "AGENT_AUDIT_LOG": ("audit_log", None),
}
BAD = [
    ("GITHUB_TOKEN", "two words", "blanks"),
    ("GITHUB_TOKEN", "ghp_\u00e9", "characters"),
    ("GITHUB_API_URL", "api.github.com", "http(s) address"),
    ("GITHUB_API_URL", "ftp://api.github.com", "http(s) address"),
    ("GITHUB_API_URL", "https://", "http(s) address"),
    ("GITHUB_API_URL", "http://[::1", ""),
    ("GITHUB_SERVER_URL", "https://me:secret@github.com", "without a user name"),
    ("AGENT_DISPATCH_REPO", "dispatch", "owner/repository"),
    ("AGENT_DISPATCH_REPO", "https://github.com/acme/dispatch", "owner/repository"),
    ("AGENT_TARGET_REPO", "acme/..", "owner/repository"),
    ("AGENT_TARGET_REPO", "acme/widgets.git", "owner/repository"),
    ("AGENT_TARGET_REPO", "acme/widgets/more", "owner/repository"),
    ("AGENT_TARGET_REPO", "-acme/widgets", "owner/repository"),
    ("AGENT_TARGET_REPO", "a/b\nc", "owner/repository"),
    ("AGENT_TASK_LABEL", "x" * 51, "50 characters"),
    ("AGENT_PROCESSED_LABEL", "a,b", "no comma"),
    ("AGENT_DONE_LABEL", "a,b", "no comma"),
    ("AGENT_FAILED_LABEL", "a,b", "no comma"),
    ("AGENT_POLL_INTERVAL", "0.5", "1 or more"),
    ("AGENT_POLL_INTERVAL", "a minute", "must be a number"),
    ("AGENT_POLL_INTERVAL", "nan", "must be a number"),
    ("AGENT_TASK_TIMEOUT", "inf", "must be a number"),
    ("AGENT_STALL_SECONDS", "-1", "0 or more"),
    ("OPENAI_BASE_URL", "localhost:11434/v1", "http(s) address"),
    ("OPENAI_API_KEY", "two words", "blanks"),
    ("AGENT_MAX_STEPS", "0", "1 or more"),
    ("AGENT_MAX_TOKENS", "1.5", "1 or more"),
    ("AGENT_PRICE_INPUT", "-1", "a price, 0 or more"),
    ("AGENT_PRICE_OUTPUT", "nan", "a price, 0 or more"),
    ("AGENT_PROMPT_FILE", "/nowhere/prompt.md", "cannot be read: No such file"),
    ("AGENT_PROMPT_FILE", "/dev/null", "must hold {instruction}"),
    ("AGENT_SETUP_TIMEOUT", "0", "1 or more"),
    ("AGENT_VERIFY_TIMEOUT", "soon", "must be a number"),
    ("AGENT_VERIFY_ROUNDS", "-1", "0 or more"),
    ("AGENT_DRAFT_ON_FAILURE", "maybe", "yes or no"),
    ("AGENT_BRANCH", "agent-task", "must hold {task_id}"),
    ("AGENT_BRANCH", "{title}-{task_id}", "holds {title}, which stands for nothing"),
    ("AGENT_BRANCH", "-{task_id}", "valid branch names"),
    ("AGENT_PR_TITLE", "{name}: {title}", "holds {name}"),
    ("AGENT_PR_DRAFT", "2", "yes or no"),
    ("AGENT_SANDBOX", "on", "auto, required or off"),
    ("AGENT_ALLOW_ROOT", "maybe", "yes or no"),
    ("AGENT_MAX_MEMORY_MB", "0", "1 or more"),
    ("AGENT_MAX_ATTEMPTS", "0", "1 or more"),
    ("AGENT_MAX_ATTEMPTS", "2.5", "whole number"),
    ("AGENT_MAX_CONCURRENT", "-1", "whole number"),
    ("AGENT_DRAIN_SECONDS", "-1", "0 or more"),
    ("AGENT_LEASE", "2.9", "3 or more"),
    ("AGENT_CLAIM_REFS", "agent-claims", "start of a ref"),
    ("AGENT_CLAIM_REFS", "refs/heads/../x", "start of a ref"),
    ("AGENT_DISK_BUDGET_MB", "10G", "whole number"),
    ("GITHUB_TOKEN_FILE", "/nonexistent", "cannot be read"),
    ("GITHUB_TOKEN_FILE", "/dev/null", "holds no token"),
    ("GITHUB_APP_ID", "my-app", "the App's id, or its client id"),
    ("GITHUB_APP_ID", "47 11", "the App's id, or its client id"),
    ("GITHUB_APP_PRIVATE_KEY", "SHA256:abcdef=", "private key in PEM form"),
    ("GITHUB_APP_PRIVATE_KEY", "-----BEGIN RSA PRIVATE KEY-----", "begins with -----BEGIN"),
    ("GITHUB_APP_PRIVATE_KEY", "-----BEGIN PUBLIC KEY-----\\nMIIB\\n-----END PUBLIC KEY-----", "private key in PEM"),
    ("GITHUB_APP_PRIVATE_KEY_PATH", "/nonexistent/key.pem", "'/nonexistent/key.pem', which cannot be read"),
    ("GITHUB_APP_PRIVATE_KEY_PATH", "/dev/null", "holds no private key"),
    ("GITHUB_APP_PRIVATE_KEY_PATH", "/", "cannot be read"),
    ("GITHUB_APP_INSTALLATION_ID", "acme", "must be a number"),
    ("GITHUB_APP_INSTALLATION_ID", "-1", "must be a number"),
    ("GITHUB_WEBHOOK_SECRET", "fifteen letters", "16 characters or more"),
    ("AGENT_HTTP_PORT", "0", "1 to 65535"),
    ("AGENT_HTTP_PORT", "65536", "1 to 65535"),
    ("AGENT_HTTP_PORT", "x", "1 to 65535"),
    ("AGENT_HTTP_PORT", "80.5", "1 to 65535"),
    ("AGENT_LOG_FORMAT", "xml", "text or json"),
    ("AGENT_WRITE_INTERVAL", "-0.1", "0 or more"),
    ("AGENT_MAX_CHANGED_FILES", "many", "whole number"),
    ("AGENT_MAX_CHANGED_BYTES", "10MB", "whole number"),
    ("AGENT_IGNORE", "*.log\n!*.txt", "on one line"),
    ("AGENT_IGNORE", "a\0b", "on one line"),
    ("AGENT_SHELL", "maybe", "yes or no"),
    ("AGENT_ALLOW_WORKFLOWS", "2", "yes or no"),
    ("AGENT_LOG_LEVEL", "LOUD", "DEBUG, INFO, WARNING, ERROR"),
    ("AGENT_AUDIT_LOG", "/nonexistent/audit.jsonl", "cannot be written to: No such file or directory"),
    ("AGENT_AUDIT_LOG", "/proc/audit.jsonl", "cannot be written to"),
    ("AGENT_AUDIT_LOG", "/", "cannot be written to: Is a directory"),
    ("AGENT_PROCESS_TASK", "magic", "package.module:function"),
    ("AGENT_PROCESS_TASK", ":run", "package.module:function"),
    ("AGENT_PROCESS_TASK", "module:not a name", "package.module:function"),
    ("AGENT_PROCESS_TASK", "nowhere/plugin.py:run", "does not exist"),
    ("AGENT_PROCESS_TASK", "command", "AGENT_COMMAND is not set"),
    ("AGENT_COMMAND", "no-such-program-anywhere --now", "not on the PATH"),
    ("AGENT_COMMAND", "sh -c 'never closed", "quotation"),
]


def problems(**env: str) -> str:
    """What is said about wrong variables."""
    with pytest.raises(ConfigError) as caught:
        make_config(env)
    return str(caught.value)


def settings_of(config: Config) -> Config:
    """The settings less the environment that they came from."""
    return dataclasses.replace(config, env={})


def test_the_defaults_are_those_of_the_documentation() -> None:
    config = Config.from_env({"GITHUB_TOKEN": TOKEN})
    assert {name: getattr(config, name) for name, _ in DEFAULTS.values()} == dict(DEFAULTS.values())


def test_every_variable_has_its_default_in_this_table() -> None:
    assert {"GITHUB_TOKEN", *DEFAULTS} == set(Config.variables())


@pytest.mark.parametrize("value", ["", "  ", "\n"])
@pytest.mark.parametrize("name", DEFAULTS)
def test_an_empty_variable_counts_as_unset(name: str, value: str) -> None:
    unset = Config.from_env({"GITHUB_TOKEN": TOKEN})
    assert settings_of(Config.from_env({"GITHUB_TOKEN": TOKEN, name: value})) == settings_of(unset)


@pytest.mark.parametrize(
    ("name", "value", "attribute", "expected"),
    [
        ("GITHUB_TOKEN", f" {TOKEN}\n", "token", TOKEN),
        ("GITHUB_API_URL", "http://127.0.0.1:8080/api/v3/", "api_url", "http://127.0.0.1:8080/api/v3"),
        ("GITHUB_SERVER_URL", "https://git.example.org/", "server_url", "https://git.example.org"),
        ("AGENT_DISPATCH_REPO", " you/tasks ", "dispatch_repo", "you/tasks"),
        ("AGENT_TARGET_REPO", "you/.github", "target_repo", "you/.github"),
        ("AGENT_ALLOWED_TARGETS", "a/b, c/* ,,", "allowed_targets", ("a/b", "c/*")),
        ("AGENT_ALLOWED_AUTHORS", "alice,helper[bot]", "allowed_authors", ("alice", "helper[bot]")),
        ("AGENT_TASK_LABEL", "Please do", "task_label", "Please do"),
        ("AGENT_POLL_INTERVAL", "1", "poll_interval", 1.0),
        ("AGENT_POLL_INTERVAL", "2.5", "poll_interval", 2.5),
        ("AGENT_TASK_TIMEOUT", "1e3", "task_timeout", 1000.0),
        ("AGENT_MAX_ATTEMPTS", "1", "max_attempts", 1),
        ("AGENT_MAX_CONCURRENT", "16", "max_concurrent", 16),
        ("AGENT_DRAIN_SECONDS", "0", "drain_seconds", 0.0),
        ("AGENT_WRITE_INTERVAL", "0", "write_interval", 0.0),
        ("AGENT_SHELL", "YES", "shell", True),
        ("AGENT_SHELL", "off", "shell", False),
        ("AGENT_ALLOW_WORKFLOWS", "1", "allow_workflows", True),
        ("AGENT_ALLOW_WORKFLOWS", "False", "allow_workflows", False),
        ("AGENT_STATE_DIR", "/var/lib/agent", "state_dir", Path("/var/lib/agent")),
        ("AGENT_STATE_DIR", "/var/lib/agent", "home", Path("/var/lib/agent/home")),
        ("AGENT_STATE_DIR", "state", "state_dir", Path.cwd() / "state"),
        ("AGENT_HOME", "/home/agent", "home", Path("/home/agent")),
        ("AGENT_HOME", "agent-home", "home", Path.cwd() / "agent-home"),
        ("AGENT_ENV", "OPENAI_API_KEY, LANG", "agent_env", ("OPENAI_API_KEY", "LANG")),
        ("AGENT_MAX_CHANGED_FILES", "5", "max_changed_files", 5),
        ("AGENT_MAX_CHANGED_BYTES", "1", "max_changed_bytes", 1),
        ("AGENT_IGNORE", "*.log, !keep.log", "ignore", ("*.log", "!keep.log")),
        ("AGENT_IGNORE", ",", "ignore", ()),
        ("AGENT_COMMIT_NAME", "The Agent", "commit_name", "The Agent"),
        ("AGENT_COMMIT_EMAIL", "agent@example.org", "commit_email", "agent@example.org"),
        ("AGENT_HTTP_PORT", "65535", "http_port", 65535),
        ("AGENT_HTTP_HOST", "::", "http_host", "::"),
        ("AGENT_LOG_FORMAT", "JSON", "log_format", "json"),
        ("AGENT_LOG_LEVEL", "debug", "log_level", "DEBUG"),
        ("AGENT_PROCESS_TASK", "package.module:function", "process_task", "package.module:function"),
        ("AGENT_PROCESS_TASK", "patch", "process_task", "patch"),
    ],
)
def test_a_good_value_is_taken(name: str, value: str, attribute: str, expected: object) -> None:
    assert getattr(make_config({name: value}), attribute) == expected


@pytest.mark.parametrize(("name", "value", "word"), BAD, ids=lambda value: str(value)[:40])
def test_a_bad_value_is_refused_by_name_and_reason(name: str, value: str, word: str) -> None:
    said = problems(**{name: value})
    assert name in said
    assert word in said


def test_an_address_with_a_port_that_is_no_number_is_refused() -> None:
    assert "GITHUB_API_URL" in problems(GITHUB_API_URL="http://localhost:port")


def test_all_bad_variables_are_named_at_once() -> None:
    bad = {name: value for name, value, _ in BAD if name not in ("AGENT_COMMAND", "AGENT_PROCESS_TASK")}
    said = problems(**bad, AGENT_PROCESS_TASK="magic", AGENT_ENV="GITHUB_TOKEN")
    assert [name for name in (*bad, "AGENT_PROCESS_TASK", "AGENT_ENV") if name not in said] == []


def test_a_missing_token_is_said_beside_what_else_is_wrong() -> None:
    with pytest.raises(ConfigError, match=r"(?s)AGENT_MAX_ATTEMPTS.*GITHUB_TOKEN is not set"):
        Config.from_env({"AGENT_MAX_ATTEMPTS": "none"})


def test_a_bad_token_is_not_repeated_in_the_message() -> None:
    assert "s3cret" not in problems(GITHUB_TOKEN="s3cret with blanks")


@pytest.mark.parametrize("name", ["GITHUB_APP_PRIVATE_KEY", "GITHUB_WEBHOOK_SECRET"])
def test_a_bad_secret_is_not_repeated_either(name: str) -> None:
    assert "s3cret" not in problems(**{name: "s3cret"})


def test_the_token_shows_in_no_repr() -> None:
    config = make_config({"GITHUB_TOKEN": TOKEN, "COPY": TOKEN})
    assert TOKEN not in f"{config!r} {config} {config.token!r} {[config.token]}"


def test_the_token_is_still_its_text_where_it_is_needed() -> None:
    assert f"Bearer {Secret(TOKEN)}" == f"Bearer {TOKEN}"


def test_the_settings_cannot_be_changed(config: Config) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.shell = True  # type: ignore[misc]


def test_the_nearest_known_name_is_proposed_for_an_unknown_one() -> None:
    (warning,) = make_config({"AGENT_POLL_INTERVALL": "5"}).unknown()
    assert "AGENT_POLL_INTERVALL" in warning
    assert "did you mean AGENT_POLL_INTERVAL?" in warning


def test_an_unknown_name_that_is_like_no_other_is_warned_about_without_a_guess() -> None:
    (warning,) = make_config({"AGENT_ZZZZZZZZZZZZZZZZZZZZ": "5"}).unknown()
    assert "AGENT_ZZZZZZZZZZZZZZZZZZZZ" in warning
    assert "did you mean" not in warning


def test_names_for_the_agent_and_of_others_are_not_warned_about() -> None:
    own = ("ID", "FILE", "TITLE", "ISSUE", "ATTEMPT", "BASE")
    env = {f"AGENT_TASK_{name}": "x" for name in own} | {"AGENT_SUMMARY_FILE": "x", "MY_AGENT_X": "x"}
    assert list(make_config({**env, "AGENT_ENV": "AGENT_KEY", "AGENT_KEY": "x"}).unknown()) == []


def test_each_unknown_name_gets_a_warning_of_its_own() -> None:
    warnings = list(make_config({"AGENT_MAX_ATTEMPT": "1", "AGENT_HOMES": "/x"}).unknown())
    assert [warning.split()[0] for warning in warnings] == ["AGENT_HOMES", "AGENT_MAX_ATTEMPT"]


def test_the_agent_cannot_be_given_the_token() -> None:
    assert "AGENT_ENV must not name GITHUB_TOKEN" in problems(AGENT_ENV="LANG,GITHUB_TOKEN")


@pytest.mark.parametrize("value", [TOKEN, f"{TOKEN}\n", f" {TOKEN}"], ids=["same", "newline", "blank"])
def test_the_agent_cannot_be_given_the_token_under_another_name(value: str) -> None:
    said = problems(GITHUB_TOKEN=f" {TOKEN}\n", GH_TOKEN=value, AGENT_ENV="GH_TOKEN")
    assert "AGENT_ENV must not name GH_TOKEN" in said
    assert TOKEN not in said


def test_the_agent_can_be_given_a_token_of_its_own() -> None:
    env = {"GITHUB_TOKEN": TOKEN, "GH_TOKEN": "another", "AGENT_ENV": "GH_TOKEN,UNSET"}
    assert make_config(env).agent_env == ("GH_TOKEN", "UNSET")


@pytest.mark.parametrize("hole", ["{instruction}", "{instruction_file}"])
def test_a_shell_never_gets_the_instruction_in_its_command(hole: str) -> None:
    said = problems(AGENT_SHELL="yes", AGENT_COMMAND=f"agent {hole} | tee log")
    assert f"AGENT_COMMAND must not hold {hole} with AGENT_SHELL" in said


@pytest.mark.parametrize(
    "env",
    [
        {"AGENT_COMMAND": "sh -c {instruction}"},
        {"AGENT_COMMAND": "sh run.sh {instruction_file}"},
        {"AGENT_SHELL": "yes", "AGENT_COMMAND": 'no-such-agent < "$AGENT_TASK_FILE" | tee log'},
    ],
    ids=["argument", "file", "shell"],
)
def test_a_command_is_taken_as_it_is(env: dict[str, str]) -> None:
    assert make_config(env).command == env["AGENT_COMMAND"]


def test_a_shell_without_a_command_is_refused() -> None:
    assert "AGENT_COMMAND is not set" in problems(AGENT_PROCESS_TASK="command", AGENT_SHELL="yes")


def test_a_command_is_looked_for_on_the_path_of_the_settings(tmp_path: Path) -> None:
    assert "not on the PATH" in problems(AGENT_COMMAND="sh", PATH=str(tmp_path))


def test_a_command_that_is_not_used_is_not_looked_for() -> None:
    config = make_config({"AGENT_PROCESS_TASK": "patch", "AGENT_COMMAND": "no-such-program"})
    assert config.process_task == "patch"


def test_a_command_is_what_runs_unless_something_else_is_named() -> None:
    assert make_config({"AGENT_COMMAND": "sh"}).process_task == "command"


def test_a_plugin_file_is_found_from_any_folder(tmp_path: Path) -> None:
    (tmp_path / "plugin.py").touch()
    relative = os.path.relpath(tmp_path / "plugin.py")
    spec = make_config({"AGENT_PROCESS_TASK": f"{relative}:run"}).process_task
    place, _, function = spec.rpartition(":")
    assert Path(place).is_absolute()
    assert Path(place).samefile(tmp_path / "plugin.py")
    assert function == "run"


@pytest.mark.parametrize("variable", ["TASK", "DONE", "FAILED"])
def test_labels_that_github_takes_for_one_are_refused(variable: str) -> None:
    said = problems(AGENT_PROCESSED_LABEL="In Work", **{f"AGENT_{variable}_LABEL": "in work"})
    assert "four different labels" in said


@pytest.mark.parametrize(
    ("allowed", "repo", "expected"),
    [
        ("", TARGET, True),
        ("", TARGET.upper(), True),
        ("", DISPATCH, False),
        ("acme/*", "acme/anything", True),
        ("Acme/*", "aCME/anything", True),
        ("acme/*", "acme-evil/anything", False),
        ("acme/*", "evil/acme/x", False),
        ("acme/lib-*, other/one", "acme/lib-a", True),
        ("acme/lib-*, other/one", "OTHER/one", True),
        ("acme/lib-*, other/one", "acme/library", False),
        ("acme/lib-*, other/one", "other/one-more", False),
        ("*", "any/thing", True),
    ],
)
def test_targets_are_allowed_by_pattern_whatever_their_case(allowed: str, repo: str, expected: bool) -> None:
    assert make_config({"AGENT_ALLOWED_TARGETS": allowed}).allows_target(repo) is expected


def test_the_commit_address_follows_the_server() -> None:
    config = make_config({"GITHUB_SERVER_URL": "https://git.example.org:8443/"})
    assert config.commit_email == "agent-runner@noreply.git.example.org"


def test_a_token_in_a_file_is_read_when_it_is_needed_and_all_that_were_there_stay_secret(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("ghs_first0123456789\n")
    config = Config.from_env({"GITHUB_TOKEN_FILE": str(file)})
    assert config.token == "ghs_first0123456789"
    file.write_text("ghs_second123456789\n")
    assert config.token == "ghs_second123456789"
    assert config.masked("ghs_first0123456789 ghs_second123456789") == "*** ***"
    for broken in ("", "half a tok"):  # as it is while somebody writes it
        file.write_text(broken)
        assert config.token == "ghs_second123456789"
    file.unlink()
    assert config.token == "ghs_second123456789"


def test_two_tokens_are_one_too_many(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    said = problems(GITHUB_TOKEN=TOKEN, GITHUB_TOKEN_FILE=str(tmp_path / "token"))
    assert "GITHUB_TOKEN and GITHUB_TOKEN_FILE are both set" in said


def test_the_agent_is_not_given_the_place_of_the_token() -> None:
    assert "AGENT_ENV must not name GITHUB_TOKEN_FILE" in problems(AGENT_ENV="GITHUB_TOKEN_FILE")


# --------------------------------------------------------------------------------------------------
# Secrets

KEY = 's3cret/key+"1" \u00e9~!'
PEM = "-----BEGIN KEY-----\n{}\n{}\n{}\n-----END KEY-----\n".format("MIIE+a/1" * 8, "Zb9/0+c2" * 8, "short==")
SECRET = make_config({"GITHUB_TOKEN": TOKEN, "KEY": KEY, "PEM": PEM, "AGENT_ENV": "KEY,PEM"})
ENCODINGS: dict[str, Callable[[str], str]] = {
    "plain": str,
    "base64": lambda text: base64.b64encode(text.encode()).decode(),
    "base64 for addresses": lambda text: base64.urlsafe_b64encode(text.encode()).decode(),
    "base64 in lines": lambda text: base64.encodebytes(text.encode()).decode(),
    "per cent": lambda text: quote(text, safe=""),
    "per cent in small letters": lambda text: re.sub("%..", lambda code: code[0].lower(), quote(text, safe="")),
    "per cent in a path": quote,
    "a form": quote_plus,
    "JSON": lambda text: json.dumps(text)[1:-1],
    "JSON in UTF-8": lambda text: json.dumps(text, ensure_ascii=False)[1:-1],
}
encodings = pytest.mark.parametrize("encode", ENCODINGS.values(), ids=ENCODINGS.keys())


@encodings
@pytest.mark.parametrize(("name", "value"), [("GITHUB_TOKEN", TOKEN), ("KEY", KEY), ("PEM", PEM.strip())])
def test_a_secret_is_masked_and_found_in_every_form(encode: Callable[[str], str], name: str, value: str) -> None:
    told = encode(value)
    masked = SECRET.masked(f"a {told} b")
    assert masked.startswith("a ***")
    assert masked.endswith(("* b", "\n b"))
    assert all(line not in masked for line in told.split("\n") if len(line) > 20 and not line.startswith("-----"))
    assert SECRET.finds_secret(f"a {told} b".encode()) == name


@given(st.binary(max_size=40), st.binary(max_size=40))
def test_a_secret_inside_a_longer_base64_text_is_masked_wherever_it_begins(before: bytes, after: bytes) -> None:
    whole = base64.b64encode(before + TOKEN.encode() + after).decode()
    for text in (whole, whole.replace("+", "-").replace("/", "_")):
        assert "***" in SECRET.masked(text)
        assert len(SECRET.masked(text)) <= len(whole) - len(TOKEN)
        assert SECRET.finds_secret(text.encode()) == "GITHUB_TOKEN"


@pytest.mark.parametrize("token", ["x", "x2", "t0ken", "ghp_abcd"])
def test_a_short_token_spoils_no_text(token: str) -> None:
    text = "2026-01-05 09:00:00 ERROR cannot start: the ruler is root"
    assert make_config({"GITHUB_TOKEN": token}).masked(text) == text
    assert make_config({"GITHUB_TOKEN": token}).masked(f"<{token}>") == "<***>"


def test_a_token_is_masked_whole_as_git_sends_it() -> None:
    assert SECRET.masked(f"Basic {git_login(TOKEN)}.") == "Basic ***."


def test_the_longer_lines_of_a_secret_are_masked_on_their_own() -> None:
    first, *_ = PEM.split("\n")[1:]
    assert SECRET.masked(f"1: {first}\n2: short==\n-----BEGIN KEY-----") == "1: ***\n2: short==\n-----BEGIN KEY-----"
    inside = make_config({"KEY": json.dumps({"private_key": PEM}), "AGENT_ENV": "KEY"})
    assert inside.masked(f"1: {first}") == "1: ***"


def test_what_is_too_short_for_a_secret_is_left_alone() -> None:
    config = make_config({"SHORT": "1234567", "LONG": "12345678", "UNSET": "", "AGENT_ENV": "SHORT,LONG,UNSET,MISSING"})
    assert config.masked("1234567 12345678 0") == "1234567 *** 0"


def test_one_secret_that_begins_like_another_leaves_no_rest() -> None:
    config = make_config({"A": "password", "B": "password-and-more", "AGENT_ENV": "A,B"})
    assert config.masked("password-and-more password") == "*** ***"


def test_a_secret_that_was_there_before_is_not_found_unless_there_are_more_of_it() -> None:
    data = f"key = {TOKEN}\n".encode()
    assert SECRET.finds_secret(data, data) == ""
    assert SECRET.finds_secret(b"", data) == ""
    assert SECRET.finds_secret(data + data, data) == "GITHUB_TOKEN"
    assert SECRET.finds_secret(b"\xff\0" + data) == "GITHUB_TOKEN"
    assert SECRET.finds_secret(b"nothing of the kind") == ""


def test_a_secret_that_is_no_unicode_is_found() -> None:
    config = make_config({"KEY": "12345678\udcff", "AGENT_ENV": "KEY"})  # as os.environ gives the byte 255
    assert config.finds_secret(b"12345678\xff") == "KEY"
    assert config.masked("12345678\udcff") == "***"
