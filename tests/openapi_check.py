"""Check recorded REST requests against GitHub's own OpenAPI description.

GitHub ignores query parameters and body keys that it does not know, so a misspelt one fails in
silence; here it is an error. The description's source is told in openapi/README.md.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from openapi_core import OpenAPI
from openapi_core.datatypes import RequestParameters
from openapi_core.exceptions import OpenAPIError
from standin import RecordedRequest
from werkzeug.datastructures import Headers, ImmutableMultiDict

DESCRIPTION = Path(__file__).with_name("openapi") / "github.json"
SERVER = "https://api.github.com"


def check_request(request: RecordedRequest) -> None:
    """Raise AssertionError when GitHub's description has no such request."""
    path = described_path(request.path)
    name = f"{request.method} {request.path}"
    operation = find_operation(request.method, path)
    assert operation is not None, f"{name}: the description has no such operation"
    known = {item["name"] for item in operation["parameters"] if item["in"] == "query"}
    unknown = sorted(set(request.query) - known)
    assert not unknown, f"{name}: query parameters that GitHub does not know: {unknown}"
    if request.json is not None:
        assert "requestBody" in operation, f"{name}: GitHub takes no body here"
    try:
        openapi().validate_request(_Request(request, path))
    except OpenAPIError as error:
        raise AssertionError(f"{name}: {explain(error)}") from error


def described_path(path: str) -> str:
    """The path in the form that the description knows.

    Link headers point to `/repositories/{id}/...`, a form of `/repos/{owner}/{repo}/...` that the
    description leaves out. A slash inside a parameter (label names have them) splits the path for
    openapi-core even when it is percent-encoded, so it is replaced.
    """
    path = re.sub(r"^/repositories/\d+(?=/|$)", "/repos/owner/repo", path)
    steps = [unquote(step).replace("/", "_") for step in path.split("/")]
    return "/".join(quote(step, safe="") for step in steps)


def find_operation(method: str, path: str) -> dict[str, Any] | None:
    """The described operation; a fixed path (issues/comments/1) wins over one with parameters."""
    for template in sorted(description()["paths"], key=lambda template: template.count("{")):
        pattern = re.sub(r"\\{\w+\\}", "[^/]+", re.escape(template))
        operation = description()["paths"][template].get(method.lower())
        if operation is not None and re.fullmatch(pattern, path):
            return {"parameters": [], **operation}
    return None


def explain(error: BaseException) -> str:
    """The schema errors behind an error of openapi-core, whose own text does not name the field."""
    cause = error.__cause__ or error
    found = list(getattr(cause, "schema_errors", [])) or [cause]
    return "; ".join(str(getattr(item, "message", item)).splitlines()[0] for item in found)


@cache
def description() -> dict[str, Any]:
    """The description, made strict: no body key that it does not name."""
    loaded: dict[str, Any] = json.loads(DESCRIPTION.read_text(encoding="utf-8"))
    for operations in loaded["paths"].values():
        for operation in operations.values():
            for media in operation.get("requestBody", {}).get("content", {}).values():
                close(media["schema"])
    return loaded


def close(schema: Any) -> None:
    """Forbid additional properties in every object below the schema."""
    if isinstance(schema, list):
        for item in schema:
            close(item)
    elif isinstance(schema, dict):
        if isinstance(schema.get("properties"), dict):
            schema.setdefault("additionalProperties", False)
        for value in schema.values():
            close(value)


@cache
def openapi() -> OpenAPI:
    return OpenAPI.from_dict(description())


class _Request:
    """A recorded request as openapi-core's `Request` protocol wants it."""

    host_url = SERVER
    content_type = "application/json"

    def __init__(self, request: RecordedRequest, path: str) -> None:
        self.path = path
        self.method = request.method.lower()
        self.body = None if request.json is None else json.dumps(request.json).encode()
        self.parameters = RequestParameters(query=ImmutableMultiDict(request.query), header=Headers(request.headers))
