"""GitHub's GraphQL API for the stand-in: queries are held against GitHub's own schema and run on the stand-in's state.

A query that the schema does not know, or that wants what is not served, ends up in the stand-in's
`problems`. The schema's source is told in graphql_schema/README.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

from graphql import GraphQLError, GraphQLSchema, build_schema, graphql_sync
from standin import Event, Issue, Json, Pull, RecordedRequest, Repository, StandIn

SCHEMA = Path(__file__).with_name("graphql_schema") / "github.graphql"
TIMELINE = {"labeled": ("LABELED_EVENT", "LabeledEvent"), "renamed": ("RENAMED_TITLE_EVENT", "RenamedTitleEvent")}


class Refused(Exception):
    """What GitHub, too, answers with an error."""

    kind = "UNPROCESSABLE"


class NotFound(Refused):
    kind = "NOT_FOUND"


class Forbidden(Refused):
    kind = "FORBIDDEN"


def answer_query(github: StandIn, request: RecordedRequest) -> Json:
    """What GitHub answers to a query; it has errors beside the data, and the status 200 for both."""
    query, variables = request.json.get("query"), request.json.get("variables")
    result = graphql_sync(schema(), query, Resolver(github).root(), variable_values=variables)
    for error in result.errors or []:
        if not isinstance(error.original_error, Refused):
            github.problem(request, str(error))
    errors = [render_error(error) for error in result.errors or []]
    return {"data": result.data, **({"errors": errors} if errors else {})}


@cache
def schema() -> GraphQLSchema:
    return build_schema(SCHEMA.read_text(encoding="utf-8"))


def render_error(error: GraphQLError) -> Json:
    refused = error.original_error
    return {**({"type": refused.kind} if isinstance(refused, Refused) else {}), **error.formatted}


class Resolver:
    """Values for the fields of the schema. Functions get a field's arguments; an argument that they do not name is one
    that is not served."""

    def __init__(self, github: StandIn) -> None:
        self.github = github

    def root(self) -> Json:
        """Of queries and of mutations: their fields have different names."""
        return {
            "repository": self.repository,
            "convertPullRequestToDraft": partial(self.set_draft, True),
            "markPullRequestReadyForReview": partial(self.set_draft, False),
        }

    def set_draft(self, draft: bool, _info: object, input: Json) -> Json | None:  # noqa: A002
        """What GitHub answers where nothing is to change is not documented; its schema allows for null, so that is it.

        https://docs.github.com/en/graphql/reference/mutations#convertpullrequesttodraft
        """
        node, actor = input["pullRequestId"], self.github.actor
        repo, pull = self.pull(node)
        assert actor is not None
        # It takes both: https://github.com/argoproj/argo-workflows/pull/16639
        if not (actor.holds("pull_requests=write") and actor.holds("contents=write")):
            raise Forbidden(actor.refusal)
        if not self.github.may_push(repo) or (draft and not repo.has_drafts):
            what = (
                f"convert the pull request {node} to draft"
                if draft
                else f"mark the pull request {node} ready for review"
            )
            raise Forbidden(f"{actor.login} does not have permission to {what}.")
        if pull.state != "open":
            raise Refused("Pull request is closed.")
        if pull.draft == draft:
            return None
        self.github.set_draft(pull, draft)
        return {"pullRequest": {"id": node, "isDraft": pull.draft, "number": pull.number}}

    def pull(self, node: str) -> tuple[Repository, Pull]:
        for repo in list(self.github.repositories.values()):
            for issue in repo.issues.values():
                if isinstance(issue, Pull) and node == f"PR_{issue.id}" and self.github.find(repo.full_name):
                    return repo, issue
        raise NotFound(f"Could not resolve to a node with the global id of '{node}'")

    def repository(self, _info: object, owner: str, name: str, **_renames: bool) -> Json:
        repo = self.github.find(f"{owner}/{name}")
        if repo is None:
            raise NotFound(f"Could not resolve to a Repository with the name '{owner}/{name}'.")

        def issue(_info: object, number: int) -> Json:
            found = repo.issues.get(number)
            if found is None or isinstance(found, Pull) or found.deleted or found.transferred_to:
                raise NotFound(f"Could not resolve to an Issue with the number of {number}.")
            return render_issue(found)

        return {"issue": issue}


def render_issue(issue: Issue) -> Json:
    def edits(_info: object, first: int | None = None, last: int | None = None) -> Json:
        """The newest first; the text that an issue began with is one too, once there is another."""
        rows = [event for event in issue.events if event.kind == "edited"]
        rows = [Event("edited", issue.user, issue.created_at), *rows] if rows else []
        return page([{"editedAt": row.at, "editor": render_actor(row.by)} for row in reversed(rows)], first, last)

    def timeline(_info: object, first: int | None = None, last: int | None = None, **more: list[str]) -> Json:
        """The oldest first."""
        wanted = more.pop("itemTypes")
        assert not more, f"not served: {more}"
        rows = [event for event in issue.events if TIMELINE.get(event.kind, ("", ""))[0] in wanted]
        return page([render_event(row) for row in rows], first, last)

    return {"updatedAt": issue.updated_at, "userContentEdits": edits, "timelineItems": timeline}


def render_event(event: Event) -> Json:
    shown = {"__typename": TIMELINE[event.kind][1], "createdAt": event.at, "actor": render_actor(event.by)}
    return shown | ({"label": {"name": event.label.name}} if event.label else {})


def render_actor(login: str | None) -> Json | None:
    """A bot has no `[bot]` here. A mannequin is what an import makes of a user of another server."""
    if login is None:
        return None
    name, _, kind = login.removesuffix("]").partition("[")
    return {"__typename": {"": "User", "bot": "Bot", "mannequin": "Mannequin"}[kind], "login": name}


def page(rows: Sequence[Json], first: int | None, last: int | None) -> Json:
    """https://docs.github.com/en/graphql/guides/using-pagination-in-the-graphql-api"""
    size = first or last or 0
    assert (first is None) != (last is None), "either `first` or `last` is needed"
    assert 1 <= size <= 100, "1 to 100 rows are served"
    shown, more = (rows[:size] if first else rows[-size:]), len(rows) > size
    return {"nodes": shown, "pageInfo": {"hasNextPage": bool(first) and more, "hasPreviousPage": bool(last) and more}}
