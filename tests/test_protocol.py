"""What GitHub's and git's answers are taken to mean."""

from __future__ import annotations

from typing import Any

import pytest
import requests
from conftest import issue_json, make_config
from hypothesis import given
from hypothesis import strategies as st
from requests.structures import CaseInsensitiveDict

from runner import (
    MAX_PAUSE,
    SECONDARY_LIMIT_PAUSE,
    ApiRefused,
    Config,
    GitFailed,
    RunnerError,
    TaskFailed,
    Unreachable,
    is_limit,
    is_queued,
    limit_pause,
    refusal,
    remote_failure,
    root_cause,
    server_time,
)

NOW = 1_767_225_600.0
DATE = {"date": "Thu, 01 Jan 2026 00:00:00 GMT"}  # the same time


# --------------------------------------------------------------------------------------------------
# Limits


@pytest.mark.parametrize(
    ("status", "headers", "text", "expected"),
    [
        (429, {}, "", True),
        (403, {"retry-after": "30"}, "", True),
        (403, {"x-ratelimit-remaining": "0"}, "", True),
        (403, {"x-ratelimit-remaining": "4998"}, "You have exceeded a secondary rate limit.", True),
        (403, {}, "API Rate Limit exceeded for user ID 1.", True),
        (403, {"x-ratelimit-remaining": "4998"}, "Resource not accessible by personal access token", False),
        (403, {}, "", False),
        (200, {"x-ratelimit-remaining": "0"}, "rate limit", False),
        (401, {"retry-after": "30"}, "rate limit", False),
        (404, {"x-ratelimit-remaining": "0"}, "", False),
        (503, {"retry-after": "30"}, "", False),
    ],
)
def test_a_limit_is_told_from_a_refusal(status: int, headers: dict[str, str], text: str, expected: bool) -> None:
    assert is_limit(status, headers, text) is expected


def test_headers_are_found_however_they_are_written() -> None:
    headers = CaseInsensitiveDict({"Retry-After": "7", "Date": "Thu, 01 Jan 2026 00:00:00 GMT"})
    assert is_limit(403, headers, "")
    assert limit_pause(headers, 0) == 7
    assert server_time(headers) == NOW


@pytest.mark.parametrize(
    ("headers", "streak", "expected"),
    [
        ({"retry-after": "30"}, 0, 30),
        ({"retry-after": "30"}, 5, 30),
        ({"retry-after": "0"}, 0, 1),
        ({"retry-after": "-5"}, 4, 5),
        ({"retry-after": "5", "x-ratelimit-remaining": "0", "x-ratelimit-reset": str(int(NOW) + 900)}, 0, 5),
        ({"x-ratelimit-remaining": "0", "x-ratelimit-reset": str(int(NOW) + 900)}, 3, 901),
        ({"x-ratelimit-remaining": "0", "x-ratelimit-reset": str(int(NOW) - 900)}, 0, 1),
        ({"x-ratelimit-remaining": "0"}, 0, 60),
        ({"x-ratelimit-remaining": "0", "x-ratelimit-reset": "soon"}, 1, 120),
        ({"x-ratelimit-remaining": "4998", "x-ratelimit-reset": str(int(NOW) + 900)}, 0, 60),
        ({}, 0, 60),
        ({}, 1, 120),
        ({}, 2, 240),
        ({}, 5, 1920),
        ({}, 1000, 1920),
        ({"retry-after": "Thu, 01 Jan 2026 00:01:00 GMT"}, 0, SECONDARY_LIMIT_PAUSE),
        ({"retry-after": ""}, 1, 2 * SECONDARY_LIMIT_PAUSE),
    ],
)
def test_the_pause_after_a_limit_is_what_github_asks_for(headers: dict[str, str], streak: int, expected: float) -> None:
    assert limit_pause({**DATE, **headers}, streak) == expected


def test_without_the_servers_clock_the_time_of_the_reset_says_nothing() -> None:
    assert limit_pause({"x-ratelimit-remaining": "0", "x-ratelimit-reset": str(int(NOW))}, 0) == 60


@pytest.mark.parametrize("value", ["inf", "nan", "-inf", "1e400", "99999999999"])
@pytest.mark.parametrize("name", ["retry-after", "x-ratelimit-reset"])
def test_a_pause_without_end_is_not_believed(name: str, value: str) -> None:
    assert 0 <= limit_pause({**DATE, "x-ratelimit-remaining": "0", name: value}, 0) <= MAX_PAUSE


@pytest.mark.parametrize(
    ("date", "expected"),
    [
        ("Thu, 01 Jan 2026 00:00:00 GMT", NOW),
        ("Thu, 01 Jan 2026 01:00:00 +0100", NOW),
        ("yesterday", 0),
        ("", 0),
        ("Thu, 99 Jan 2026 00:00:00 GMT", 0),
    ],
)
def test_the_servers_clock_is_read_from_its_date(date: str, expected: float) -> None:
    assert server_time({"date": date}) == expected


def test_without_a_date_there_is_no_time() -> None:
    assert server_time({}) == 0


@given(st.text(max_size=40), st.text(max_size=10), st.text(max_size=10), st.integers(0, 10**6))
def test_no_header_makes_the_reader_fail(date: str, after: str, reset: str, streak: int) -> None:
    assert server_time({"date": date}) >= 0
    assert 0 <= limit_pause({"retry-after": after}, streak) <= MAX_PAUSE
    headers = {**DATE, "x-ratelimit-remaining": "0", "x-ratelimit-reset": reset}
    assert 0 <= limit_pause(headers, streak) <= MAX_PAUSE


# --------------------------------------------------------------------------------------------------
# Refusals


def refused(status: int, data: Any) -> ApiRefused:
    error = refusal("POST", "/repos/acme/widgets/pulls", status, data)
    assert isinstance(error, ApiRefused)
    assert error.status == status
    return error


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 410, 422, 451])
def test_a_refusal_says_what_was_asked_and_answered(status: int) -> None:
    error = refused(status, {"message": "No, sorry"})
    assert error.why == f"GitHub answered {status} to POST /repos/acme/widgets/pulls: No, sorry"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ({"type": "NOT_FOUND"}, ApiRefused),
        ({"type": "FORBIDDEN", "extensions": {"saml_failure": False}}, ApiRefused),
        ({"extensions": {"code": "undefinedField"}}, ApiRefused),
        ({"type": "RATE_LIMITED"}, Unreachable),
        ({}, Unreachable),
    ],
)
def test_an_error_of_graphql_is_a_refusal_or_a_fault_although_its_status_is_200(
    error: dict[str, Any], kind: type[RunnerError]
) -> None:
    told = refusal("POST", "/graphql", 200, {"data": None, "errors": [{"message": "No, sorry", **error}]})
    assert type(told) is kind
    assert told.why == "GitHub answered 200 to POST /graphql: No, sorry"


@pytest.mark.parametrize("status", [408, 500, 502, 503, 504])
def test_a_fault_is_no_refusal(status: int) -> None:
    error = refusal("GET", "/x", status, {"message": "Server Error"})
    assert isinstance(error, Unreachable)
    assert str(error) == f"GitHub answered {status} to GET /x: Server Error"


def test_what_github_finds_wrong_is_said_in_its_words() -> None:
    errors = [
        {"resource": "PullRequest", "code": "custom", "message": "A pull request already exists"},
        "no commits",
    ]
    error = refused(422, {"message": "Validation Failed", "errors": errors})
    assert error.why.endswith(": Validation Failed; A pull request already exists; no commits")


def test_an_error_without_words_is_said_by_its_field_and_code() -> None:
    errors = [{"resource": "PullRequest", "field": "head", "code": "invalid"}]
    why = refused(422, {"message": "Validation Failed", "errors": errors}).why
    assert "head" in why
    assert "invalid" in why


def test_errors_that_are_one_text_are_said_as_one() -> None:
    why = refused(422, {"message": "Validation Failed", "errors": "Could not resolve to a node"}).why
    assert "Could not resolve to a node" in why


@pytest.mark.parametrize("data", [None, [], "<html>", {}, {"message": None}, {"errors": None}])
def test_an_answer_that_is_not_githubs_is_still_told(data: Any) -> None:
    assert refused(404, data).why.endswith("pulls: no message")


@given(
    st.integers(400, 599),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["message", "errors", "a"]), inner, max_size=3)
        ),
        max_leaves=8,
    ),
)
def test_no_answer_makes_the_reader_fail(status: int, data: Any) -> None:
    assert str(status) in str(refusal("GET", "/x", status, data))


@pytest.mark.parametrize(("status", "word"), [(401, "GITHUB_TOKEN"), (403, "permissions"), (404, "may not see")])
def test_a_refusal_comes_with_advice(status: int, word: str) -> None:
    assert word in refused(status, {"message": "No"}).advice


def test_there_is_no_advice_where_there_is_none_to_give() -> None:
    assert refused(422, {"message": "No"}).advice == ""


# --------------------------------------------------------------------------------------------------
# Which issues wait


def labelled(*names: str, **fields: Any) -> dict[str, Any]:
    return issue_json(labels=[{"name": name} for name in names], **fields)


@pytest.mark.parametrize(
    ("issue", "expected"),
    [
        (labelled("copilot-agent"), True),
        (labelled("bug", "Copilot-Agent"), True),
        (labelled("bug"), False),
        (labelled(), False),
        (labelled("copilot-agent", "agent-processing"), True),
        (labelled("copilot-agent", "agent-done"), False),
        (labelled("copilot-agent", "agent-failed"), False),
        (labelled("copilot-agent", "AGENT-DONE"), False),
        (labelled("copilot-agent", "agent-done-not"), True),
        (labelled("copilot-agent", state="closed"), False),
        (labelled("copilot-agent", pull_request={"url": "https://example.org"}), False),
        ({"number": 1}, False),
    ],
)
def test_an_issue_is_queued_by_its_labels(issue: dict[str, Any], expected: bool, config: Config) -> None:
    assert is_queued(issue, config) is expected


def test_labels_of_another_name_count_where_they_are_set() -> None:
    config = make_config({"AGENT_TASK_LABEL": "Do This", "AGENT_DONE_LABEL": "Was Done"})
    assert is_queued(labelled("do this", "agent-done"), config)
    assert not is_queued(labelled("do this", "was done"), config)


# --------------------------------------------------------------------------------------------------
# Causes


def raised(*errors: Exception, explicitly: bool) -> Exception:
    """The last of some errors, each raised because of the one before."""
    try:
        if len(errors) > 1:
            try:
                raise raised(*errors[:-1], explicitly=explicitly)
            except Exception as cause:
                if explicitly:
                    raise errors[-1] from cause
                raise errors[-1]  # noqa: B904 (the implicit way is what is tried)
        raise errors[0]
    except Exception as error:
        return error


@pytest.mark.parametrize("explicitly", [True, False])
def test_the_innermost_reason_is_told(explicitly: bool) -> None:
    inner = OSError(111, "Connection refused")
    shell = requests.ConnectionError("HTTPConnectionPool(host='x', port=1): Max retries exceeded")
    error = raised(inner, ValueError("<object at 0x1>: failed"), shell, explicitly=explicitly)
    assert root_cause(error) == "[Errno 111] Connection refused"


def test_an_error_that_wraps_nothing_is_its_own_reason() -> None:
    assert root_cause(ValueError("Failed to establish a new connection: no route")) == "no route"


@pytest.mark.parametrize("error", [TimeoutError(), TimeoutError("read: ")])
def test_an_error_without_words_is_told_by_its_kind(error: Exception) -> None:
    assert root_cause(error) == "TimeoutError"


# --------------------------------------------------------------------------------------------------
# Git's words. The repository is acme/widgets in all of them.

URL = "https://github.com/acme/widgets.git"
UNABLE = f"fatal: unable to access '{URL}/': "
FINAL = {
    "403 on fetch": (
        f"remote: Write access to repository not granted.\n{UNABLE}The requested URL returned error: 403",
        "cannot be read or pushed to",
    ),
    "403 on push": (
        f"remote: Permission to acme/widgets.git denied to octocat.\n{UNABLE}The requested URL returned error: 403",
        "cannot be read or pushed to",
    ),
    "archived": (
        f"remote: This repository was archived so it is read-only.\n{UNABLE}The requested URL returned error: 403",
        "cannot be read or pushed to",
    ),
    "404": (
        f"remote: Repository not found.\nfatal: repository '{URL}/' not found",
        "cannot be read or pushed to",
    ),
    "404 of another server": (
        f"{UNABLE}The requested URL returned error: 404",
        "cannot be read or pushed to",
    ),
    "401": (
        "fatal: could not read Username for 'https://github.com': terminal prompts disabled",
        "cannot be read or pushed to",
    ),
    "bad token": (
        "remote: Invalid username or token. Password authentication is not supported for Git operations.\n"
        f"fatal: Authentication failed for '{URL}/'",
        "cannot be read or pushed to",
    ),
    "301": (f"{UNABLE}The requested URL returned error: 301", "has moved"),
    "followed redirect": (
        f"fatal: unable to update url base from redirection:\n  asked for: {URL}\n   redirect: https://x/",
        "has moved",
    ),
    "workflow, personal token": (
        f"To {URL}\n!\tabc:refs/heads/x\t[remote rejected] (refusing to allow a Personal Access Token to"
        " create or update workflow `.github/workflows/ci.yml` without `workflow` scope)\nDone\n"
        f"error: failed to push some refs to '{URL}'",
        "workflows",
    ),
    "workflow, app": (
        "!\tabc:refs/heads/x\t[remote rejected] (refusing to allow a GitHub App to create or update workflow"
        " `.github/workflows/ci.yml` without `workflows` permission)\n"
        f"error: failed to push some refs to '{URL}'",
        "workflows",
    ),
    "rule": (
        "remote: error: GH013: Repository rule violations found for refs/heads/x.\n"
        "!\tabc:refs/heads/x\t[remote rejected] (push declined due to repository rule violations)\n"
        f"error: failed to push some refs to '{URL}'",
        "refuses",
    ),
    "protected branch": (
        "remote: error: GH006: Protected branch update failed for refs/heads/x.\n"
        "!\tabc:refs/heads/x\t[remote rejected] (protected branch hook declined)\n"
        f"error: failed to push some refs to '{URL}'",
        "refuses",
    ),
    "hook": (
        "!\tabc:refs/heads/x\t[remote rejected] (pre-receive hook declined)\n"
        f"error: failed to push some refs to '{URL}'",
        "refuses",
    ),
}
PASSING = {
    "connection refused": UNABLE + "Failed to connect to github.com port 443 after 0 ms: Connection refused",
    "name": UNABLE + "Could not resolve host: github.com",
    "503": UNABLE + "The requested URL returned error: 503",
    "500": UNABLE + "The requested URL returned error: 500",
    "429": UNABLE + "The requested URL returned error: 429",
    "broken off": "error: RPC failed; curl 92 HTTP/2 stream 5 was not closed cleanly\n"
    "fatal: the remote end hung up unexpectedly",
    "TLS": UNABLE + "gnutls_handshake() failed: The TLS connection was non-properly terminated.",
    "too slow": "fetch-pack: unexpected disconnect while reading sideband packet\ntimeout",
}


@pytest.mark.parametrize(("text", "word"), FINAL.values(), ids=FINAL.keys())
def test_what_git_is_refused_for_good_ends_the_task(text: str, word: str) -> None:
    error = remote_failure(GitFailed("git push failed", output=text), "acme/widgets")
    assert isinstance(error, TaskFailed)
    assert word in error.why
    assert error.advice
    assert error.output == text


@pytest.mark.parametrize("text", PASSING.values(), ids=PASSING.keys())
def test_what_may_pass_is_worth_another_try(text: str) -> None:
    error = remote_failure(GitFailed("git fetch failed", output=text), "acme/widgets")
    assert isinstance(error, Unreachable)
    assert error.why in [f"git cannot reach acme/widgets: {line}" for line in text.splitlines()]


NAMES = ["redirects", "not-found", "protected", "declined", "gh2024", "error-404"]


@pytest.mark.parametrize("name", NAMES)
def test_the_name_of_a_repository_is_not_taken_for_a_reason(name: str) -> None:
    text = f"fatal: unable to access 'https://github.com/acme/{name}.git/': Could not resolve host: github.com"
    assert isinstance(remote_failure(GitFailed("git fetch failed", output=text), f"acme/{name}"), Unreachable)


@pytest.mark.parametrize("name", NAMES)
def test_the_name_of_a_branch_is_not_taken_for_a_reason(name: str) -> None:
    text = f"To {URL}\n!\tabc:refs/heads/agent-task-{name}\t[rejected] (stale info)\nDone"
    assert isinstance(remote_failure(GitFailed("git push failed", output=text), "acme/widgets"), Unreachable)
