"""Who may do what at the stand-in: GitHub Apps and their tokens, personal tokens, and TLS."""

from __future__ import annotations

import dataclasses
import datetime
import json
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jwt
import pytest
import requests
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID
from openapi_check import check_request
from standin import Fault, StandIn
from standin_app import App, Installation
from standin_graphql import answer_query
from test_standin import DRAFT, READY, TOKEN, Clock, Reply, ask, commit, get, git, headers_of, mutate, post, send

REPO, OTHER = "acme/dispatch", "acme/widgets"
ISSUES, PULLS = f"/repos/{REPO}/issues", f"/repos/{REPO}/pulls"
LABELS = f"/repos/{REPO}/labels"
PULL = {"title": "A change", "head": "work", "base": "main"}
KEY = rsa.generate_private_key(public_exponent=65_537, key_size=2048)
PEM = serialization.Encoding.PEM
PRIVATE = KEY.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
PUBLIC = KEY.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()
BOT = "agent-runner-app[bot]"
ALL = {"issues": "write", "contents": "write", "pull_requests": "write", "metadata": "read"}
NOT_FOR_BOTS = "Resource not accessible by integration"
NOT_FOR_USERS = "Resource not accessible by personal access token"
UNDECODED = "A JSON web token could not be decoded"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def app() -> App:
    return App(PUBLIC)


@pytest.fixture
def installed(app: App) -> Installation:
    return app.install("acme", [REPO, OTHER])


@pytest.fixture
def github(tmp_path: Path, clock: Clock, app: App) -> Iterator[StandIn]:
    folder = tmp_path / "github"
    with StandIn(folder, check=check_request, graphql=answer_query, app=app, now=clock) as standin:
        standin.add_repository(REPO)
        standin.add_repository(OTHER)
        standin.open_issue(REPO, title="A task", body="Do it")
        yield standin


def signed(github: StandIn, key: bytes = PRIVATE, algorithm: str = "RS256", **changed: Any) -> str:
    """A JSON web token of the App; a claim that is None is left out."""
    now = int(github.now())
    claims = {"iat": now - 60, "exp": now + 540, "iss": "4711"} | changed
    sent = {name: value for name, value in claims.items() if value is not None}
    return jwt.PyJWS().encode(json.dumps(sent).encode(), key, algorithm)


def use(github: StandIn, token: str, path: str, body: Any = None, method: str = "") -> Reply:
    method = method or ("GET" if body is None else "POST")
    return send(github, method, path, body, Authorization=f"Bearer {token}")


def mint(github: StandIn, installation: Installation | int, body: Any = None) -> Reply:
    number = installation if isinstance(installation, int) else installation.id
    return use(github, signed(github), f"/app/installations/{number}/access_tokens", body, "POST")


def token_of(github: StandIn, installation: Installation, **body: Any) -> str:
    answer = mint(github, installation, body)
    assert answer.status == 201, answer.json
    return str(answer.json["token"])


# The App's JSON web token.


@pytest.mark.parametrize("issuer", [4711, "4711", "Iv23liStandInApp"])
def test_an_app_signs_in_with_its_id_or_its_client_id(github: StandIn, app: App, issuer: object) -> None:
    answer = use(github, signed(github, iss=issuer), "/app")
    assert (answer.status, answer.json["slug"], answer.json["id"]) == (200, "agent-runner-app", 4711)
    assert [claims["iss"] for claims in app.claims] == [issuer]
    assert github.problems == []


@pytest.mark.parametrize(
    ("claims", "status", "message"),
    [
        ({"iss": 4712}, 404, "Integration not found"),
        ({"iss": None}, 404, "Integration not found"),
        ({"iat": None}, 401, "'Issued at' claim ('iat') must be an Integer"),
        ({"iat": 1_759_999_999.5}, 401, "'Issued at' claim ('iat') must be an Integer"),
        ({"iat": 1_760_000_001}, 401, "'Issued at' claim ('iat') must be an Integer"),
        ({"exp": None}, 401, "'Expiration time' claim ('exp') must be a numeric value"),
        ({"exp": "1760000300"}, 401, "'Expiration time' claim ('exp') must be a numeric value"),
        ({"exp": 1_760_000_000}, 401, "'Expiration time' claim ('exp') must be a numeric value"),
        ({"exp": 1_760_000_601}, 401, "'Expiration time' claim ('exp') is too far in the future"),
    ],
    ids=str,
)
def test_claims_that_github_refuses_are_told_apart(
    github: StandIn, app: App, claims: dict[str, Any], status: int, message: str
) -> None:
    refused = use(github, signed(github, **claims), "/app")
    assert refused.status == status
    assert refused.json["message"].startswith(message)
    assert len(app.claims) == 1
    assert github.problems == []


@pytest.mark.parametrize("claims", [{"exp": 1_760_000_600}, {"iat": 1_760_000_000}], ids=str)
def test_claims_may_go_to_their_limits(github: StandIn, claims: dict[str, Any]) -> None:
    assert use(github, signed(github, **claims), "/app").status == 200


def test_a_json_web_token_is_signed_with_the_apps_key_and_rs256(github: StandIn) -> None:
    other = rsa.generate_private_key(public_exponent=65_537, key_size=2048)
    stranger = other.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    unsigned = jwt.PyJWS().encode(b'{"iss": 4711}', "", "none")
    tokens = [signed(github, stranger), signed(github, algorithm="RS512"), unsigned, "a.b.c"]
    answers = [use(github, token, "/app") for token in tokens]
    assert [(answer.status, answer.json["message"]) for answer in answers] == [(401, UNDECODED)] * 4
    assert github.problems == []


def test_a_stand_in_without_an_app_knows_no_json_web_token(github: StandIn) -> None:
    github.app = None
    refused = use(github, signed(github), "/app")
    assert (refused.status, refused.json["message"]) == (401, UNDECODED)
    assert get(github, "/app").status == 404
    assert "no such route" in github.problems[0]


@pytest.mark.parametrize(
    ("path", "body"),
    [("/user", None), ("/rate_limit", None), (ISSUES, None), (ISSUES, {"title": "x"}), (f"/repos/{REPO}", None)],
)
def test_a_json_web_token_is_for_the_routes_of_apps_only(
    github: StandIn, installed: Installation, path: str, body: Any
) -> None:
    refused = use(github, signed(github), path, body)
    assert (refused.status, refused.json["message"]) == (401, UNDECODED)
    assert "signed in as app" in github.problems[0]


def test_graphql_takes_no_json_web_token(github: StandIn) -> None:
    assert ask(github, "updatedAt", Authorization=f"Bearer {signed(github)}").status == 401
    assert len(github.problems) == 1


def test_the_routes_of_apps_take_no_other_token(github: StandIn, installed: Installation) -> None:
    for token in (TOKEN, token_of(github, installed)):
        for path in ("/app", f"/repos/{REPO}/installation"):
            refused = use(github, token, path)
            assert (refused.status, refused.json["message"]) == (401, UNDECODED)
        assert use(github, token, f"/app/installations/{installed.id}/access_tokens", {}).status == 401
    assert len(github.problems) == 6


# Installations.


def test_a_repository_tells_the_apps_installation(github: StandIn, installed: Installation) -> None:
    told = use(github, signed(github), f"/repos/{REPO}/installation")
    assert told.status == 200
    assert (told.json["id"], told.json["account"]["login"]) == (installed.id, "acme")
    assert (told.json["app_id"], told.json["app_slug"]) == (4711, "agent-runner-app")
    assert told.json["permissions"] == ALL
    assert (told.json["repository_selection"], told.json["suspended_at"]) == ("selected", None)
    installed.suspended = True
    assert use(github, signed(github), f"/repos/{REPO}/installation").json["suspended_at"] is not None
    assert github.problems == []


def test_where_the_app_is_not_installed_is_404(github: StandIn, app: App) -> None:
    app.install("acme", [OTHER])
    github.add_repository("umbrella/secret")
    for name in (REPO, "umbrella/secret", "acme/none"):
        assert use(github, signed(github), f"/repos/{name}/installation").status == 404
    github.hidden.add(OTHER)
    assert use(github, signed(github), f"/repos/{OTHER}/installation").status == 404
    assert github.problems == []


def test_each_owner_has_an_installation_of_its_own(github: StandIn, app: App) -> None:
    github.add_repository("umbrella/tools")
    first, second = app.install("acme", [REPO]), app.install("umbrella", ["umbrella/tools"], id=7)
    for name, found in {REPO: first, "umbrella/tools": second}.items():
        assert use(github, signed(github), f"/repos/{name}/installation").json["id"] == found.id
    assert second.id == 7
    assert use(github, token_of(github, second), f"/repos/{REPO}").status == 404


def test_the_installation_of_a_renamed_repository_is_found_by_its_number(
    github: StandIn, installed: Installation
) -> None:
    token = token_of(github, installed)
    github.repository(REPO).moved_to = "acme/new"
    moved = use(github, signed(github), f"/repos/{REPO}/installation")
    assert moved.status == 301
    assert use(github, signed(github), moved.headers["location"]).json["id"] == installed.id
    assert use(github, token, "/repos/acme/new").status == 200
    assert mint(github, installed, {"repositories": ["new"]}).status == 201
    assert github.problems == []


def test_a_repository_that_goes_to_another_owner_leaves_the_installation(
    github: StandIn, installed: Installation
) -> None:
    token = token_of(github, installed)
    github.repository(REPO).moved_to = "umbrella/dispatch"
    assert use(github, signed(github), "/repos/umbrella/dispatch/installation").status == 404
    assert use(github, token, "/repos/umbrella/dispatch").status == 404


# The tokens of an installation.


def test_a_token_tells_what_it_is_good_for(github: StandIn, app: App, installed: Installation) -> None:
    made = mint(github, installed)
    assert made.status == 201
    assert made.json["expires_at"] == "2025-10-09T09:53:20Z"
    assert (made.json["permissions"], made.json["repository_selection"]) == (ALL, "selected")
    assert [repo["full_name"] for repo in made.json["repositories"]] == [REPO, OTHER]
    (token,) = app.tokens
    assert (token.token, token.installation) == (made.json["token"], installed.id)
    assert (token.repositories, token.permissions) == ([REPO, OTHER], ALL)
    assert (token.expires, token.revoked) == (github.now() + 3600, False)
    assert github.problems == []


def test_a_token_is_long_and_has_dots_and_is_yet_no_json_web_token(github: StandIn, installed: Installation) -> None:
    token = token_of(github, installed)
    assert token.startswith("ghs_4711_")
    assert (len(token) > 400, token.count(".")) == (True, 2)
    assert use(github, token, ISSUES).status == 200


@pytest.mark.parametrize(
    ("body", "repositories", "permissions"),
    [
        ({}, [REPO, OTHER], ALL),
        ({"repositories": ["Widgets"]}, [OTHER], ALL),
        ({"repositories": ["widgets"], "repository_ids": [1001, 1002]}, [OTHER, REPO], ALL),
        ({"permissions": {"issues": "read"}}, [REPO, OTHER], {"metadata": "read", "issues": "read"}),
        ({"permissions": {"metadata": "read"}}, [REPO, OTHER], {"metadata": "read"}),
    ],
    ids=str,
)
def test_a_token_can_be_made_for_less(
    github: StandIn,
    app: App,
    installed: Installation,
    body: dict[str, Any],
    repositories: list[str],
    permissions: dict[str, str],
) -> None:
    assert mint(github, installed, body).json["permissions"] == permissions
    assert (app.tokens[0].repositories, app.tokens[0].permissions) == (repositories, permissions)
    assert github.problems == []


@pytest.mark.parametrize(
    "body",
    [
        {"repositories": ["secret"]},
        {"repositories": ["dispatch", "none"]},
        {"repositories": [REPO]},
        {"repository_ids": [1003]},
        {"permissions": {"workflows": "write"}},
        {"permissions": {"pull_requests": "read", "issues": "write"}},
    ],
    ids=str,
)
def test_a_token_cannot_be_made_for_more_than_the_installation_has(
    github: StandIn, app: App, body: dict[str, Any]
) -> None:
    github.add_repository("acme/secret")
    refused = mint(github, app.install("acme", [REPO, OTHER], {"issues": "read", "pull_requests": "write"}), body)
    assert refused.status == 422
    repositories = "There is at least one repository that does not exist or is not accessible to the parent"
    permissions = "The permissions requested are not granted to this installation."
    assert refused.json["message"].startswith(permissions if "permissions" in body else repositories)
    assert app.tokens == []
    assert github.problems == []


@pytest.mark.parametrize("body", [{"repos": []}, {"permissions": {"issue": "read"}}, {"repositories": "x"}], ids=str)
def test_a_token_that_github_cannot_make_is_a_problem(
    github: StandIn, installed: Installation, body: dict[str, Any]
) -> None:
    assert mint(github, installed, body).status == 422
    assert len(github.problems) == 1


def test_there_is_no_token_for_an_installation_that_is_not_there_or_is_suspended(
    github: StandIn, installed: Installation
) -> None:
    token = token_of(github, installed)
    assert mint(github, 1).status == 404
    installed.suspended = True
    for refused in (mint(github, installed), use(github, token, ISSUES)):
        assert (refused.status, refused.json["message"]) == (403, "This installation has been suspended")
    with pytest.raises(RuntimeError, match="This installation has been suspended"):
        git(github, "ls-remote", github.url(REPO), token=token)
    installed.suspended = False
    assert use(github, token, ISSUES).status == 200
    assert github.problems == []


def test_a_token_that_has_expired_or_is_revoked_is_401(
    github: StandIn, app: App, installed: Installation, clock: Clock
) -> None:
    app.token_seconds = 60
    first = token_of(github, installed)
    clock.time += 60
    second = token_of(github, installed)
    app.revoke_tokens()
    for token in (first, second, "ghs_unknown"):
        refused = use(github, token, ISSUES)
        assert (refused.status, refused.json["message"]) == (401, "Bad credentials")
        assert ask(github, "updatedAt", Authorization=f"Bearer {token}").status == 401
        with pytest.raises(RuntimeError, match="Authentication failed"):
            git(github, "ls-remote", github.url(REPO), token=token)
    assert [made.revoked for made in app.tokens] == [True, True]
    assert use(github, token_of(github, installed), ISSUES).status == 200
    assert github.problems == []


def test_a_token_ends_with_its_installation(github: StandIn, app: App, installed: Installation) -> None:
    token = token_of(github, installed)
    installed.repositories.remove(REPO)
    assert use(github, token, ISSUES).status == 404
    app.installations.clear()
    assert use(github, token, f"/repos/{OTHER}").status == 401


def test_a_token_knows_its_repositories_only(github: StandIn, installed: Installation, tmp_path: Path) -> None:
    token = token_of(github, installed, repositories=["dispatch"])
    github.open_issue(OTHER, title="x", body="y")
    refused = ask(github, "updatedAt", repo="widgets", Authorization=f"Bearer {token}")
    assert refused.json["errors"][0]["type"] == "NOT_FOUND"
    assert use(github, token, f"/repos/{OTHER}").status == 404
    assert use(github, token, f"/repositories/{github.repository(OTHER).id}/issues").status == 404
    with pytest.raises(RuntimeError, match="Repository not found"):
        git(github, "ls-remote", github.url(OTHER), token=token)
    assert "refs/heads/main" in git(github, "ls-remote", github.url(REPO), token=token)
    assert github.problems == []


def test_an_issue_that_went_where_a_token_cannot_see_is_404(github: StandIn, installed: Installation) -> None:
    token = token_of(github, installed, repositories=["dispatch"])
    github.open_issue(OTHER, title="x", body="y")
    github.issue(REPO, 1).transferred_to = f"{OTHER}#1"
    assert use(github, token, f"{ISSUES}/1").status == 404
    assert get(github, f"{ISSUES}/1").status == 301


def test_what_an_installation_writes_is_written_by_a_bot(github: StandIn, installed: Installation) -> None:
    token = token_of(github, installed)
    github.git(REPO, "branch", "work", "main")
    github.commit(REPO, {"new.txt": "new"}, branch="work")
    made = [
        use(github, token, f"{ISSUES}/1/comments", {"body": "x"}),
        use(github, token, ISSUES, {"title": "x", "labels": ["bug"]}),
        use(github, token, PULLS, PULL),
    ]
    assert [answer.status for answer in made] == [201, 201, 201]
    assert {(row.json["user"]["login"], row.json["user"]["type"]) for row in made} == {(BOT, "Bot")}
    assert {row.json["author_association"] for row in made} == {"NONE"}
    use(github, token, f"{ISSUES}/1/labels", {"labels": ["agent-done"]})
    assert [event.by for number in (1, 2) for event in github.issue(REPO, number).events] == ["octocat", BOT, BOT]
    assert github.problems == []


def test_an_installation_is_no_user_and_has_no_role(github: StandIn, installed: Installation) -> None:
    token = token_of(github, installed)
    refused = use(github, token, "/user")
    assert (refused.status, refused.json["message"]) == (403, NOT_FOR_BOTS)
    assert set(use(github, token, f"/repos/{REPO}").json["permissions"].values()) == {False}
    assert use(github, token, "/rate_limit").status == 200
    assert github.problems == []


# Permissions.

BOTH = "issues={0}; pull_requests={0}"
NEEDS = [
    ("GET", f"/repos/{REPO}", None, "metadata=read"),
    ("GET", f"/repos/{REPO}/collaborators/octocat/permission", None, "metadata=read"),
    ("GET", ISSUES, None, "issues=read"),
    ("POST", ISSUES, {"title": "x"}, "issues=write"),
    ("GET", f"{ISSUES}/1", None, "issues=read"),
    ("GET", f"{ISSUES}/1/comments", None, BOTH.format("read")),
    ("POST", f"{ISSUES}/1/comments", {"body": "x"}, BOTH.format("write")),
    ("PATCH", f"{ISSUES}/comments/1", {"body": "x"}, BOTH.format("write")),
    ("POST", f"{ISSUES}/1/labels", {"labels": ["x"]}, BOTH.format("write")),
    ("DELETE", f"{ISSUES}/1/labels/copilot-agent", None, BOTH.format("write")),
    ("GET", LABELS, None, BOTH.format("read")),
    ("POST", LABELS, {"name": "x"}, BOTH.format("write")),
    ("GET", f"{LABELS}/copilot-agent", None, BOTH.format("read")),
    ("PATCH", f"{LABELS}/copilot-agent", {"color": "000000"}, BOTH.format("write")),
    ("GET", PULLS, None, "pull_requests=read"),
    ("POST", PULLS, PULL, "pull_requests=write"),
    ("GET", f"{PULLS}/2", None, "pull_requests=read"),
    ("PATCH", f"{PULLS}/2", {"title": "x"}, "pull_requests=write"),
    ("POST", f"{PULLS}/2/requested_reviewers", {"reviewers": ["octocat"]}, "pull_requests=write"),
]


@pytest.mark.parametrize("kind", ["installation", "fine-grained"])
@pytest.mark.parametrize(("method", "path", "body", "needs"), NEEDS, ids=[" ".join(row[:2]) for row in NEEDS])
def test_each_route_has_its_permission(
    github: StandIn, installed: Installation, kind: str, method: str, path: str, body: Any, needs: str
) -> None:
    github.permissions["octocat"] = "write"
    name, _, level = needs.partition(";")[0].partition("=")
    less = {key: value for key, value in ALL.items() if key != name} | ({name: "read"} if level == "write" else {})
    enough = {"metadata": "read", name: level}

    def ask_with(permissions: dict[str, str]) -> Reply:
        if kind == "installation":
            return use(github, token_of(github, installed, permissions=permissions), path, body, method)
        github.fine_grained = permissions
        return use(github, TOKEN, path, body, method)

    if name != "metadata":  # which each token has
        refused = ask_with(less)
        words = NOT_FOR_BOTS if kind == "installation" else NOT_FOR_USERS
        assert (refused.status, refused.json["message"]) == (403, words)
        assert refused.headers["x-accepted-github-permissions"] == needs
    assert ask_with(enough).status in (200, 201, 404, 422)
    assert github.problems == []


@pytest.mark.parametrize("kind", ["installation", "fine-grained"])
def test_a_pull_request_is_labelled_by_who_may_write_either_issues_or_pull_requests(
    github: StandIn, installed: Installation, kind: str
) -> None:
    number = github.open_issue(REPO, title="x", body="y", labels=["known"], pull_request=True)

    def label(name: str, **permissions: str) -> Reply:
        github.fine_grained = permissions
        token = TOKEN if kind == "fine-grained" else token_of(github, installed, permissions=permissions)
        return use(github, token, f"{ISSUES}/{number}/labels", {"labels": [name]})

    assert label("copilot-agent", pull_requests="write").status == 200
    assert label("new", issues="write").status == 200
    assert label("known", pull_requests="read", contents="write").status == 403
    refused = label("newer", pull_requests="write")
    assert (refused.status, refused.json["message"], refused.json["errors"]) == (
        403,
        "You do not have permission to create labels on this repository.",
        [{"resource": "Repository", "field": "label", "code": "unauthorized"}],
    )
    assert github.issue(REPO, number).labels == ["known", "copilot-agent", "new"]
    assert github.problems == []


def test_a_team_is_asked_for_a_review_by_who_may_read_members_only(github: StandIn, installed: Installation) -> None:
    number = github.open_issue(REPO, title="x", body="y", pull_request=True)
    github.repository(REPO).teams.add("core")
    path, body = f"{PULLS}/{number}/requested_reviewers", {"team_reviewers": ["core"]}
    refused = use(github, token_of(github, installed), path, body)
    assert (refused.status, refused.json["message"]) == (422, "Validation Failed")
    assert refused.json["errors"] == ["Could not resolve to a node with the global id of 'T_core'."]
    installed.permissions["members"] = "read"
    assert use(github, token_of(github, installed), path, body).status == 201
    assert use(github, TOKEN, path, body).status == 201
    assert github.problems == []


@pytest.mark.parametrize("name", [READY, DRAFT])
def test_to_change_a_pull_requests_stage_takes_both_permissions(
    github: StandIn, installed: Installation, name: str
) -> None:
    github.open_issue(REPO, title="x", body="y", pull_request=True)
    (pull,) = github.pulls(REPO)
    pull.draft = name == READY
    node, both = f"PR_{pull.id}", {"contents": "write", "pull_requests": "write"}
    for missing in both:
        github.fine_grained = both | {missing: "read"}
        token = token_of(github, installed, permissions=github.fine_grained)
        for secret, message in {token: NOT_FOR_BOTS, TOKEN: NOT_FOR_USERS}.items():
            refused = mutate(github, name, node, Authorization=f"Bearer {secret}")
            assert (refused.status, refused.json["data"]) == (200, {name: None})
            assert [(error["type"], error["message"]) for error in refused.json["errors"]] == [("FORBIDDEN", message)]
    token = token_of(github, installed, permissions=both)
    assert "errors" not in mutate(github, name, node, Authorization=f"Bearer {token}").json
    assert pull.draft is (name == DRAFT)
    assert github.problems == []


def test_a_stranger_does_not_find_a_pull_request_by_its_node(github: StandIn, app: App) -> None:
    github.open_issue(REPO, title="x", body="y", pull_request=True)
    token = token_of(github, app.install("acme", [OTHER]))
    node = f"PR_{github.pulls(REPO)[0].id}"
    assert mutate(github, DRAFT, node, Authorization=f"Bearer {token}").json["errors"][0]["type"] == "NOT_FOUND"


def test_graphql_needs_to_read_issues_and_refuses_with_200(github: StandIn, installed: Installation) -> None:
    token = token_of(github, installed, permissions={"contents": "write"})
    github.fine_grained = {"contents": "write"}
    for secret, message in {token: NOT_FOR_BOTS, TOKEN: NOT_FOR_USERS}.items():
        refused = ask(github, "updatedAt", Authorization=f"Bearer {secret}")
        assert (refused.status, refused.json["data"]) == (200, {"repository": {"issue": None}})
        assert [(error["type"], error["message"]) for error in refused.json["errors"]] == [("FORBIDDEN", message)]
    reader = token_of(github, installed, permissions={"issues": "read"})
    assert "errors" not in ask(github, "updatedAt", Authorization=f"Bearer {reader}").json
    assert github.problems == []


@pytest.mark.parametrize(
    ("permissions", "reads", "pushes"),
    [
        ({"contents": "write"}, "", ""),
        ({"contents": "read"}, "", f"Permission to {REPO}.git denied to {{login}}"),
        ({"issues": "write"}, "Write access to repository not granted", "Write access to repository not granted"),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["installation", "fine-grained"])
def test_git_needs_to_read_or_write_contents(
    github: StandIn,
    installed: Installation,
    tmp_path: Path,
    kind: str,
    permissions: dict[str, str],
    reads: str,
    pushes: str,
) -> None:
    clone = tmp_path / "clone"
    git(github, "clone", "--quiet", github.url(REPO), str(clone))
    sha = commit(github, clone)
    github.fine_grained = permissions
    token = TOKEN if kind == "fine-grained" else token_of(github, installed, permissions=permissions)
    login = github.login if kind == "fine-grained" else BOT
    for refusal, command in [(reads, ["ls-remote", "origin"]), (pushes, ["push", "origin", "HEAD:work"])]:
        if refusal:
            with pytest.raises(RuntimeError, match="error: 403") as refused:
                git(github, *command, cwd=clone, token=token)
            assert refusal.format(login=login) in str(refused.value)
        else:
            git(github, *command, cwd=clone, token=token)
    assert (github.heads(github.repository(REPO)).get("work") == sha) is (permissions == {"contents": "write"})
    assert github.problems == []


# Personal tokens.

SCOPES, EXPIRATION = "x-oauth-scopes", "github-authentication-token-expiration"


@pytest.mark.parametrize("scopes", ["repo", "repo, workflow", "", None])
def test_answers_tell_the_scopes_of_a_classic_token(github: StandIn, scopes: str | None) -> None:
    github.scopes = scopes
    for path, status in {"/user": 200, ISSUES: 200, f"{ISSUES}/9": 404}.items():
        answer = get(github, path)
        assert (answer.status, answer.headers.get(SCOPES)) == (status, scopes)
    assert EXPIRATION not in answer.headers


def test_answers_tell_when_a_personal_token_expires(github: StandIn, installed: Installation) -> None:
    github.token_expiration = "2026-12-01 00:00:00 UTC"
    assert get(github, "/user").headers[EXPIRATION] == "2026-12-01 00:00:00 UTC"
    github.fine_grained = {}
    headers = get(github, "/user").headers
    assert headers[EXPIRATION] == "2026-12-01 00:00:00 UTC"
    assert SCOPES not in headers


def test_other_answers_tell_nothing_of_the_personal_token(github: StandIn, installed: Installation) -> None:
    github.token_expiration = "2026-12-01 00:00:00 UTC"
    token = token_of(github, installed)
    with requests.Session() as session:  # one connection, on which the personal token comes first
        statuses = []
        for secret in (TOKEN, "wrong", token, signed(github)):
            answer = session.get(f"{github.api_url}/app", headers=headers_of(secret), timeout=20)
            statuses.append(answer.status_code)
            assert (SCOPES in answer.headers, EXPIRATION in answer.headers) == ((secret == TOKEN),) * 2
    assert statuses == [401, 401, 401, 200]


@pytest.mark.parametrize(
    ("scopes", "private", "reads", "writes"),
    [
        ("repo", False, 200, 201),
        ("repo", True, 200, 201),
        ("workflow, public_repo", False, 200, 201),
        ("public_repo", True, 404, 404),
        ("read:org", False, 200, 404),
        ("", True, 404, 404),
        (None, True, 200, 201),
    ],
)
def test_a_classic_token_without_the_scope_finds_nothing(
    github: StandIn, scopes: str | None, private: bool, reads: int, writes: int
) -> None:
    github.scopes, github.repository(REPO).private = scopes, private
    assert get(github, ISSUES).status == reads
    refused = post(github, f"{ISSUES}/1/comments", {"body": "x"})
    assert refused.status == writes
    assert len(github.issue(REPO, 1).comments) == (writes == 201)
    assert github.problems == []


def test_a_classic_token_without_the_scope_may_not_push(github: StandIn, tmp_path: Path) -> None:
    github.scopes = "read:org"
    git(github, "clone", "--quiet", github.url(REPO), str(tmp_path / "clone"))
    commit(github, tmp_path / "clone")
    with pytest.raises(RuntimeError, match=r"Permission to acme/dispatch\.git denied to agent-runner"):
        git(github, "push", "origin", "HEAD:work", cwd=tmp_path / "clone")


def test_a_fine_grained_token_is_a_users_and_reads_metadata(github: StandIn) -> None:
    github.fine_grained = {}
    assert get(github, "/user").json["login"] == github.login
    assert get(github, f"/repos/{REPO}").json["permissions"]["push"] is True
    assert get(github, ISSUES).status == 403


# TLS.


@dataclasses.dataclass
class Certificate:
    path: Path

    def server(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.path)
        return context


@pytest.fixture
def certificate(tmp_path: Path) -> Certificate:
    """A key and a certificate for localhost, signed by itself, in one file."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(KEY.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(KEY, hashes.SHA256())
    )
    path = tmp_path / "certificate.pem"
    path.write_bytes(PRIVATE + made.public_bytes(PEM))
    return Certificate(path)


@pytest.fixture
def secure(tmp_path: Path, certificate: Certificate) -> Iterator[StandIn]:
    with StandIn(tmp_path / "secure", tls=certificate.server()) as standin:
        standin.add_repository(REPO)
        yield standin


def fetch(github: StandIn, certificate: Certificate, path: str = "/user") -> requests.Response:
    return requests.get(github.api_url + path, headers=headers_of(), verify=str(certificate.path), timeout=20)


def test_with_tls_all_addresses_are_https(secure: StandIn, certificate: Certificate) -> None:
    assert secure.server_url == f"https://localhost:{secure.port}"
    answer = fetch(secure, certificate, f"/repos/{REPO}")
    assert answer.status_code == 200
    assert answer.json()["clone_url"] == f"https://localhost:{secure.port}/{REPO}.git"
    trust = ("-c", f"http.sslCAInfo={certificate.path}")
    assert "refs/heads/main" in git(secure, *trust, "ls-remote", secure.url(REPO))
    assert secure.problems == []


def test_a_client_that_does_not_trust_the_certificate_gets_nothing(secure: StandIn) -> None:
    with pytest.raises(requests.exceptions.SSLError):
        requests.get(f"{secure.api_url}/user", headers=headers_of(), timeout=20)
    with pytest.raises(RuntimeError, match="certificate"):
        git(secure, "ls-remote", secure.url(REPO))
    assert (secure.log, secure.problems) == ([], [])


def test_who_does_not_shake_hands_holds_nobody_up(secure: StandIn, certificate: Certificate) -> None:
    with socket.create_connection(("localhost", secure.port), timeout=20) as silent:
        assert fetch(secure, certificate).status_code == 200
        secure.stop()
        assert silent.recv(1) == b""
    secure.start()
    assert fetch(secure, certificate).status_code == 200
    assert secure.problems == []


def test_plain_http_is_no_tls(secure: StandIn) -> None:
    with socket.create_connection(("localhost", secure.port), timeout=20) as plain:
        plain.sendall(b"GET /api/v3/user HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"HTTP" not in plain.recv(1024)
    assert (secure.log, secure.problems) == ([], [])


def test_faults_work_with_tls(secure: StandIn, certificate: Certificate) -> None:
    secure.faults += [Fault(drop="before"), Fault(status=503)]
    with pytest.raises(requests.exceptions.ConnectionError):
        fetch(secure, certificate)
    assert [fetch(secure, certificate).status_code for _ in range(2)] == [503, 200]
    assert secure.problems == []
