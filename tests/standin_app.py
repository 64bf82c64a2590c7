"""GitHub Apps for the stand-in: an App proves who it is with a JSON web token and gets tokens for its installations.

    app = App(public_key)
    app.install("acme", ["acme/dispatch", "acme/widgets"])
    with StandIn(tmp_path, app=app) as github:
        ...  # sign in as app.id (or app.client_id) with the private key
        assert [token.permissions for token in app.tokens] == [{"issues": "write", "metadata": "read"}]

What an installation's token is good for is told in standin.py: `needed`, `check_access`, `check_git_access`.
"""

from __future__ import annotations

import itertools
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jwt
from standin import (
    NO_JWT,
    REPO,
    Actor,
    Answer,
    Call,
    HttpError,
    Json,
    Repository,
    StandIn,
    grants,
    iso,
    render_repository,
    render_user,
    route,
)

PERMISSIONS = {"issues": "write", "contents": "write", "pull_requests": "write", "metadata": "read"}
MAX_SECONDS = 600  # that a JSON web token may still be good for
CREATED = "2026-01-01T00:00:00Z"
EXPIRED = (
    "'Expiration time' claim ('exp') must be a numeric value representing the future time at which the assertion"
    " expires"
)
TOO_FAR = "'Expiration time' claim ('exp') is too far in the future"
NOT_ISSUED = "'Issued at' claim ('iat') must be an Integer representing the time that the assertion was issued"
SUSPENDED = "This installation has been suspended"
NO_REPOSITORY = "There is at least one repository that does not exist or is not accessible to the parent installation."
NOT_GRANTED = "The permissions requested are not granted to this installation."


@dataclass
class Installation:
    """The App, as installed for some repositories of one owner."""

    id: int
    owner: str
    repositories: list[str]  # full names, new or old
    permissions: dict[str, str]
    suspended: bool = False

    def has(self, repo: Repository) -> bool:
        """A repository that goes to another owner leaves the installation."""
        names = {name.lower() for name in self.repositories}
        own = repo.owner.lower() == self.owner.lower()
        return own and not names.isdisjoint({repo.name.lower(), repo.full_name.lower()})


@dataclass
class Token:
    """A token of an installation; what it is good for is fixed when it is made."""

    token: str
    installation: int
    repositories: list[str]  # by the names that they were created with
    permissions: dict[str, str]
    expires: float  # by the stand-in's clock
    revoked: bool = False


@dataclass
class App:
    """One App: its key's public half, its installations, and all that it has signed and got."""

    public_key: str  # PEM
    id: int = 4711
    slug: str = "agent-runner-app"
    client_id: str = "Iv23liStandInApp"
    token_seconds: float = 3600
    installations: list[Installation] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)  # the oldest first
    claims: list[Json] = field(default_factory=list)  # of all JSON web tokens that could be read, the oldest first
    _ids: itertools.count[int] = field(default_factory=lambda: itertools.count(90_001))

    @property
    def login(self) -> str:
        return f"{self.slug}[bot]"

    def install(
        self,
        owner: str,
        repositories: Sequence[str],
        permissions: Mapping[str, str] | None = None,
        id: int | None = None,  # noqa: A002
    ) -> Installation:
        """Install the App for repositories of an owner, which need not be there yet."""
        granted = dict(PERMISSIONS if permissions is None else permissions)
        made = Installation(next(self._ids) if id is None else id, owner, list(repositories), granted)
        self.installations.append(made)
        return made

    def installation(self, number: int) -> Installation | None:
        return next((found for found in self.installations if found.id == number), None)

    def revoke_tokens(self) -> None:
        """https://docs.github.com/en/rest/apps/installations#revoke-an-installation-access-token"""
        for token in self.tokens:
            token.revoked = True

    def mint(
        self, installation: Installation, repositories: Sequence[Repository], permissions: Json, now: float
    ) -> Token:
        """Make a token in the form that GitHub gives them since 2026: long, and with dots.

        https://docs.github.com/en/rest/apps/apps#create-an-installation-access-token-for-an-app
        """
        secret = f"ghs_{self.id}_" + ".".join(secrets.token_urlsafe(size) for size in (27, 256, 64))
        names = [repo.name for repo in repositories]
        made = Token(secret, installation.id, names, permissions, now + self.token_seconds)
        self.tokens.append(made)
        return made

    # What the stand-in asks.

    def identify(self, github: StandIn, token: str) -> Actor:
        claims, is_signed = self._decode(token)
        if str(claims.get("iss")) not in (str(self.id), self.client_id):
            raise HttpError(404, "Integration not found")
        if not is_signed:
            raise HttpError(401, NO_JWT)
        check_times(claims, github.now())
        return Actor(self.login, "app", lambda _: True)

    def sign_in(self, github: StandIn, token: str) -> Actor | None:
        found = next((made for made in self.tokens if made.token == token), None)
        if found is None or found.revoked or github.now() >= found.expires:
            return None
        installation = self.installation(found.installation)
        if installation is None:  # it has been uninstalled
            return None
        if installation.suspended:
            raise HttpError(403, SUSPENDED)

        def sees(repo: Repository) -> bool:
            return repo.name in found.repositories and installation.has(repo)

        return Actor(self.login, "installation", sees, found.permissions)

    def _decode(self, token: str) -> tuple[Json, bool]:
        """The claims, and whether the App's key has signed them."""
        jws = jwt.PyJWS()
        try:
            claims = json.loads(jws.decode(token, options={"verify_signature": False}))
        except (jwt.PyJWTError, ValueError):
            claims = None
        if not isinstance(claims, dict):
            raise HttpError(401, NO_JWT)
        self.claims.append(claims)
        try:
            jws.decode(token, self.public_key, algorithms=["RS256"])
        except jwt.PyJWTError:
            return claims, False
        return claims, True


def check_times(claims: Json, now: float) -> None:
    """https://docs.github.com/en/apps/creating-github-apps/authenticating-with-a-github-app/generating-a-json-web-token-jwt-for-a-github-app"""
    issued, expires = claims.get("iat"), claims.get("exp")
    if type(issued) is not int or issued > now:
        raise HttpError(401, NOT_ISSUED)
    if not isinstance(expires, int | float) or expires <= now:
        raise HttpError(401, EXPIRED)
    if expires > now + MAX_SECONDS:
        raise HttpError(401, TOO_FAR)


# The routes: https://docs.github.com/en/rest/apps/apps


def app_of(call: Call) -> App:
    assert isinstance(call.github.app, App)
    return call.github.app


@route("GET", "/app", serves="app")
def get_app(call: Call) -> Answer:
    app = app_of(call)
    shown = {
        "id": app.id,
        "node_id": f"A_{app.id}",
        "slug": app.slug,
        "client_id": app.client_id,
        "name": app.slug,
        "description": None,
        "owner": render_user("octocat"),
        "external_url": "https://example.com",
        "html_url": f"{call.github.server_url}/apps/{app.slug}",
        "permissions": PERMISSIONS,
        "events": [],
        "created_at": CREATED,
        "updated_at": CREATED,
        "installations_count": len(app.installations),
    }
    return Answer(200, shown)


@route("GET", REPO + "/installation", serves="app")
def get_repository_installation(call: Call) -> Answer:
    """https://docs.github.com/en/rest/apps/apps#get-a-repository-installation-for-the-authenticated-app"""
    repo = call.repo
    for installation in app_of(call).installations:
        if installation.has(repo):
            return Answer(200, render_installation(call, installation))
    raise HttpError(404, "Not Found")


@route(
    "POST",
    "/app/installations/{installation_id}/access_tokens",
    "repositories repository_ids permissions",
    serves="app",
)
def create_access_token(call: Call) -> Answer:
    """https://docs.github.com/en/rest/apps/apps#create-an-installation-access-token-for-an-app"""
    app, number = app_of(call), call.args["installation_id"]
    installation = app.installation(int(number)) if number.isdecimal() else None
    if installation is None:
        raise HttpError(404, "Not Found")
    if installation.suspended:
        raise HttpError(403, SUSPENDED)
    body = {} if call.request.json is None else call.body
    repositories, permissions = chosen(call, installation, body), asked_for(installation, body)
    made = app.mint(installation, repositories, permissions, call.github.now())
    shown = {
        "token": made.token,
        "expires_at": iso(made.expires),
        "permissions": permissions,
        "repository_selection": "selected",
        "repositories": [render_repository(call.github, repo) for repo in repositories],
    }
    return Answer(201, shown)


def chosen(call: Call, installation: Installation, body: Json) -> list[Repository]:
    """The repositories that a token is wanted for: those named, or else all of the installation."""
    has = [repo for repo in call.github.repositories.values() if installation.has(repo)]
    known: dict[Any, Repository] = {repo.id: repo for repo in has}
    known |= {repo.full_name.partition("/")[2].lower(): repo for repo in has}
    if not ("repositories" in body or "repository_ids" in body):
        return has
    wanted = [name.lower() for name in body.get("repositories", [])] + body.get("repository_ids", [])
    if not known.keys() >= set(wanted):
        raise HttpError(422, NO_REPOSITORY)
    return list({known[key].id: known[key] for key in wanted}.values())


def asked_for(installation: Installation, body: Json) -> dict[str, str]:
    """The permissions that a token is wanted for: those named, or else all of the installation."""
    held = {"metadata": "read", **installation.permissions}
    wanted: dict[str, str] = body.get("permissions", held)
    if not grants(held, wanted):
        raise HttpError(422, NOT_GRANTED)
    return {"metadata": "read", **wanted}


def render_installation(call: Call, installation: Installation) -> Json:
    app, path = app_of(call), f"installations/{installation.id}"
    return {
        "id": installation.id,
        "account": render_user(installation.owner),
        "app_id": app.id,
        "app_slug": app.slug,
        "client_id": app.client_id,
        "target_id": render_user(installation.owner)["id"],
        "target_type": "Organization",
        "permissions": {"metadata": "read", **installation.permissions},
        "events": [],
        "repository_selection": "selected",
        "access_tokens_url": f"{call.github.api_url}/app/{path}/access_tokens",
        "repositories_url": f"{call.github.api_url}/installation/repositories",
        "html_url": f"{call.github.server_url}/organizations/{installation.owner}/settings/{path}",
        "single_file_name": None,
        "created_at": CREATED,
        "updated_at": CREATED,
        "suspended_at": CREATED if installation.suspended else None,
        "suspended_by": render_user("octocat") if installation.suspended else None,
    }
