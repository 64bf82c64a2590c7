"""Cut GitHub's GraphQL schema down to what the stand-in serves.

The whole schema (1.2 MB) comes in the npm package @octokit/graphql-schema:

    npm pack @octokit/graphql-schema
    tar xf octokit-graphql-schema-*.tgz
    python make_subset.py package/schema.graphql

writes github.graphql beside this script. Fields are kept as GitHub defines them, less their prose.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from graphql import build_schema, print_ast

TYPES = {  # what is kept of each: its fields, or an enumeration's values
    "Query": {"repository"},
    "Mutation": {"convertPullRequestToDraft", "markPullRequestReadyForReview"},
    "Repository": {"issue"},
    "Issue": {"timelineItems", "updatedAt", "userContentEdits"},
    "UserContentEditConnection": {"nodes", "pageInfo"},
    "UserContentEdit": {"editedAt", "editor"},
    "IssueTimelineItemsConnection": {"nodes", "pageInfo"},
    "IssueTimelineItemsItemType": {"LABELED_EVENT", "RENAMED_TITLE_EVENT"},
    "IssueTimelineItems": set(),
    "LabeledEvent": {"actor", "createdAt", "label"},
    "RenamedTitleEvent": {"actor", "createdAt"},
    "Label": {"name"},
    "PageInfo": {"hasNextPage", "hasPreviousPage"},
    "Actor": {"login"},
    "Bot": {"login"},
    "Mannequin": {"login"},
    "User": {"login"},
    "DateTime": set(),
    "ConvertPullRequestToDraftInput": {"pullRequestId"},
    "ConvertPullRequestToDraftPayload": {"pullRequest"},
    "MarkPullRequestReadyForReviewInput": {"pullRequestId"},
    "MarkPullRequestReadyForReviewPayload": {"pullRequest"},
    "PullRequest": {"id", "isDraft", "number"},
}
WORDS = {"object": "type", "input_object": "input"}


def render(kind: Any) -> str:
    """A type's definition with the fields or values that are kept."""
    node, name = kind.ast_node, kind.name
    word = node.kind.removesuffix("_type_definition")
    head = f"{WORDS.get(word, word)} {name}"
    if node.kind == "union_type_definition":
        return f"{head} = {' | '.join(member.name for member in kind.types if member.name in TYPES)}\n"
    if interfaces := [face.name for face in getattr(kind, "interfaces", ()) if face.name in TYPES]:
        head += f" implements {' & '.join(interfaces)}"
    members = getattr(node, "fields", None) or getattr(node, "values", None) or ()
    kept = [member for member in members if member.name.value in TYPES[name]]
    assert {member.name.value for member in kept} == TYPES[name], name
    lines = [f"  {member.name.value}{signature(member)}\n" for member in kept]
    return f"{head} {{\n{''.join(lines)}}}\n" if lines else f"{head}\n"


def signature(member: Any) -> str:
    """A field's arguments, which that of an input has not, and type; nothing for an enumeration's value."""
    if not hasattr(member, "type"):
        return ""
    arguments = []
    for given in getattr(member, "arguments", None) or ():
        default = f" = {print_ast(given.default_value)}" if given.default_value else ""
        arguments.append(f"{given.name.value}: {print_ast(given.type)}{default}")
    taken = f"({', '.join(arguments)})" if arguments else ""
    return f"{taken}: {print_ast(member.type)}"


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    whole = build_schema(Path(sys.argv[1]).read_text(encoding="utf-8"), assume_valid=True)
    text = "\n".join(render(whole.type_map[name]) for name in TYPES)
    Path(__file__).with_name("github.graphql").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
