"""Cut GitHub's OpenAPI description down to the routes that the stand-in serves.

The whole description (13 MB) comes in the npm package @octokit/openapi:

    npm pack @octokit/openapi
    tar xf octokit-openapi-*.tgz
    python make_subset.py package/generated/api.github.com.json

writes github.json beside this script. Requests are kept as GitHub describes them, with every
reference put in place; answers become an empty stub and all prose is dropped.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

REPO = "/repos/{owner}/{repo}"
ROUTES = {
    "/user": ["get"],
    "/rate_limit": ["get"],
    "/app": ["get"],
    "/app/installations/{installation_id}/access_tokens": ["post"],
    REPO: ["get"],
    f"{REPO}/installation": ["get"],
    f"{REPO}/collaborators/{{username}}/permission": ["get"],
    f"{REPO}/issues": ["get", "post"],
    f"{REPO}/issues/{{issue_number}}": ["get"],
    f"{REPO}/issues/{{issue_number}}/comments": ["get", "post"],
    f"{REPO}/issues/comments/{{comment_id}}": ["patch"],
    f"{REPO}/issues/{{issue_number}}/labels": ["post"],
    f"{REPO}/issues/{{issue_number}}/labels/{{name}}": ["delete"],
    f"{REPO}/labels": ["get", "post"],
    f"{REPO}/labels/{{name}}": ["get", "patch"],
    f"{REPO}/pulls": ["get", "post"],
    f"{REPO}/pulls/{{pull_number}}": ["get", "patch"],
    f"{REPO}/pulls/{{pull_number}}/requested_reviewers": ["post"],
}
PROSE = {"description", "example", "examples", "summary", "externalDocs"}


def lean(node: Any, whole: dict[str, Any], *, names: bool = False) -> Any:
    """The node without prose and with references put in place.

    Below `properties` the keys are field names (`names`): a field may well be called "description".
    """
    if isinstance(node, list):
        return [lean(item, whole) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        return lean(resolve(node["$ref"], whole), whole)
    return {
        key: lean(value, whole, names=key == "properties" and not names)
        for key, value in node.items()
        if names or not (key in PROSE or key.startswith("x-"))
    }


def resolve(ref: str, whole: dict[str, Any]) -> Any:
    """What a local reference such as `#/components/parameters/owner` points to."""
    node: Any = whole
    for step in ref.removeprefix("#/").split("/"):
        node = node[step.replace("~1", "/").replace("~0", "~")]
    return node


def subset(whole: dict[str, Any]) -> dict[str, Any]:
    """The description of ROUTES and nothing else."""
    paths: dict[str, Any] = {}
    for path, methods in ROUTES.items():
        for method in methods:
            found = whole["paths"][path][method]
            operation = {"operationId": found["operationId"]}
            for key in ("parameters", "requestBody"):
                if key in found:
                    operation[key] = lean(found[key], whole)
            operation["responses"] = {"default": {"description": ""}}
            paths.setdefault(path, {})[method] = operation
    return {
        "openapi": whole["openapi"],
        "info": {"title": "GitHub REST API (subset)", "version": whole["info"]["version"]},
        "servers": whole["servers"],
        "paths": paths,
    }


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    whole = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    text = json.dumps(subset(whole), indent=1, ensure_ascii=False)
    Path(__file__).with_name("github.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
