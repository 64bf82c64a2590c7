"""What an issue is read as: every form of body that is about, and whatever a stranger can type."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
from typing import Any

import pytest
from conftest import TARGET, TASK_ID, issue_json, make_config
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import runner
from runner import (
    FENCE,
    MAX_METADATA,
    Config,
    Task,
    TaskFailed,
    check_task,
    is_branch_name,
    metadata_comment,
    name_branch,
    outside_fences,
    parse_task,
    printable,
    safe_slug,
)

CONFIG = make_config({"AGENT_ALLOWED_TARGETS": f"{TARGET},acme/gadgets"})
READ_BACK = re.compile(r"<!--\s*agent_task_metadata\s+(.*?)\s*-->", re.DOTALL)  # the back end's own
METADATA = {"task_id": TASK_ID, "user_id": "user-456", "provider": "github_issue_dispatch"}
OTHER = '<!-- agent_task_metadata {"task_id": "other"} -->'
with_git = settings(max_examples=30, suppress_health_check=[HealthCheck.filter_too_much])  # each starts a process


def backend_body(
    instruction: str = "Make more widgets.", metadata: dict[str, Any] | None = None, target: str = ""
) -> str:
    """A dispatch issue's body as the back end writes it."""
    about = ["", f"**Target:** {target}"] if target else []
    return "\n".join(
        [
            "# Agent Task Delegation",
            "",
            f"**Task ID:** `{TASK_ID}`",
            "**User ID:** `user-456`",
            *about,
            "",
            "## Instructions",
            "",
            instruction,
            "",
            "---",
            "",
            "<!-- agent_task_metadata",
            json.dumps(METADATA if metadata is None else metadata),
            "-->",
        ]
    )


def parse(body: str | None, config: Config = CONFIG, **fields: Any) -> Task:
    return parse_task(issue_json(body, **fields), config)


def read_back(text: str) -> Any:
    """The metadata as the back end finds it in a pull request's text."""
    match = READ_BACK.search(text)
    assert match
    return json.loads(match[1])


LONG = """\
First do this.

# A heading

## Instructions

More of them, <b>bold</b> <!-- and a remark -->.

---

```python
print("## Instruction")
# Task ID: not-this
```

| a | b |
|---|---|

---"""
QUOTED = f"Do as shown:\n\n```html\n{OTHER}\n```"
TILDES = f"Do as shown:\n\n~~~~\n```\n{OTHER}\n~~~\n~~~~"
ODD = {"task_id": 'a"b\n--> \u00e9\u2028`|', "user_id": "<!-- {\U0001f600} -->", "more": {"n": [1, None]}}
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "backend": (
        backend_body(),
        {
            "task_id": TASK_ID,
            "metadata": METADATA,
            "instruction": "Make more widgets.",
            "target_repo": TARGET,
            "context": "",
            "base": "",
            "trusted": True,
            "branch": f"agent-task-{TASK_ID}",
        },
    ),
    "backend with a target": (
        backend_body(target="issue `acme/gadgets#42`"),
        {"metadata": METADATA, "target_repo": "acme/gadgets", "context": "issue acme/gadgets#42"},
    ),
    "target that is not allowed is context": (
        backend_body(target="pr `other/place#1`"),
        {"target_repo": TARGET, "context": "pr other/place#1"},
    ),
    "target that names no repository": (
        backend_body(target="the login page"),
        {"target_repo": TARGET, "context": "the login page"},
    ),
    "target_repo in the metadata comes first": (
        backend_body(metadata={"task_id": "t", "target_repo": "any/where"}, target=f"pr {TARGET}#1"),
        {"task_id": "t", "target_repo": "any/where", "context": f"pr {TARGET}#1"},
    ),
    "target_repo in the metadata beside a line": (
        'Target Repository: other/place\n\nDo it.\n<!-- agent_task_metadata {"target_repo": "any/where"} -->',
        {"target_repo": "any/where", "instruction": "Do it."},
    ),
    "base in the metadata": (
        backend_body(metadata={"task_id": "t", "base": "release/1.x"}),
        {"base": "release/1.x", "metadata": {"task_id": "t", "base": "release/1.x"}},
    ),
    "empty target_repo and base": (
        backend_body(metadata={"task_id": "t", "base": None, "target_repo": ""}),
        {"base": "", "target_repo": TARGET, "metadata": {"task_id": "t", "base": None, "target_repo": ""}},
    ),
    "comment on one line": (
        'Do it.\n<!-- agent_task_metadata {"task_id": "test-1234-5678-abcd"} -->',
        {"task_id": "test-1234-5678-abcd", "instruction": "Do it."},
    ),
    "comment without blanks": (
        'Do it.<!--agent_task_metadata{"task_id":"a"}-->',
        {"task_id": "a", "instruction": "Do it."},
    ),
    "comment in upper case": (
        '<!-- AGENT_TASK_METADATA\n{"task_id": "a"}\n-->\nDo it.',
        {"task_id": "a", "instruction": "Do it."},
    ),
    "comment over many lines": (
        'Do it.\n<!--\n\tagent_task_metadata\n{\n  "task_id":\n  "a"\n}\n\n-->\n',
        {"task_id": "a", "instruction": "Do it."},
    ),
    "comment before the instruction": (
        '<!-- agent_task_metadata {"task_id": "a"} -->\n\n## Instructions\n\nDo it.\n\n---\nAnd that.',
        {"task_id": "a", "instruction": "Do it.\n\n---\nAnd that."},
    ),
    "comment of another name": (
        'Do it. <!-- agent_task_metadata_v2 {"task_id": "a"} -->',
        {"task_id": "issue-7", "instruction": "Do it.", "hidden": "comments: 1"},
    ),
    "singular heading and target line": (
        '## Instruction\n\nDo it.\n\nTarget Repository: acme/gadgets\n\n<!-- agent_task_metadata {"task_id": 5} -->',
        {
            "task_id": "5",
            "metadata": {"task_id": 5},
            "target_repo": "acme/gadgets",
            "instruction": "Do it.\n\nTarget Repository: acme/gadgets",
        },
    ),
    "target line above a heading": (
        "Target Repository: acme/gadgets\n\n## Instruction\n\nDo it.",
        {"task_id": "issue-7", "target_repo": "acme/gadgets", "instruction": "Do it."},
    ),
    "heading of another level and case": ("### INSTRUCTIONS ##\nDo it.", {"instruction": "Do it."}),
    "heading that only begins so": (
        "## Instructions for cooks\nDo it.",
        {"instruction": "## Instructions for cooks\nDo it."},
    ),
    "lines": (
        "task_id: abc\nuser_id: u1\n\nDo it.",
        {"task_id": "abc", "metadata": {"task_id": "abc", "user_id": "u1"}, "instruction": "Do it."},
    ),
    "lines in words": (
        "Do it.\nTask ID: abc\nUser ID: Ann Other",
        {"metadata": {"task_id": "abc", "user_id": "Ann Other"}, "instruction": "Do it."},
    ),
    "lines in bold": (
        "**Task ID:** `abc_1_`\n**User ID**: **u1**\n\nDo it.",
        {"metadata": {"task_id": "abc_1_", "user_id": "u1"}, "instruction": "Do it."},
    ),
    "lines in a list": (
        "- `task_id`: abc\n* **user_id:** u1\n> Target Repository: acme/gadgets\n\nDo it.",
        {
            "metadata": {"task_id": "abc", "user_id": "u1"},
            "target_repo": "acme/gadgets",
            "instruction": "Do it.",
        },
    ),
    "lines: the first of each counts": (
        "task_id: one\ntask_id: two\n\nDo it.",
        {"task_id": "one", "instruction": "Do it."},
    ),
    "lines inside a code fence": (
        "```\ntask_id: abc\n```\nDo it.",
        {"task_id": "issue-7", "instruction": "```\ntask_id: abc\n```\nDo it."},
    ),
    "lines without values": ("task_id:\nuser_id: ``\n\nDo it.", {"metadata": {"task_id": "issue-7"}}),
    "comment beside lines": (
        'Task ID: abc\n\nDo it.\n<!-- agent_task_metadata {"user_id": "u"} -->',
        {"task_id": "issue-7", "metadata": {"user_id": "u", "task_id": "issue-7"}, "instruction": "Do it."},
    ),
    "no metadata at all": (
        "Make more widgets.\n\nPlease.",
        {
            "task_id": "issue-7",
            "metadata": {"task_id": "issue-7"},
            "instruction": "Make more widgets.\n\nPlease.",
            "target_repo": TARGET,
        },
    ),
    "no body": ("", {"task_id": "issue-7", "instruction": "A title"}),
    "metadata alone": (OTHER, {"task_id": "other", "instruction": "A title"}),
    "nothing below the heading": (backend_body(""), {"task_id": TASK_ID, "instruction": ""}),
    "Windows line ends": (
        backend_body("One.\n\n```\ncode\n```", target="issue `acme/gadgets#42`").replace("\n", "\r\n"),
        {
            "metadata": METADATA,
            "context": "issue acme/gadgets#42",
            "instruction": "One.\n\n```\ncode\n```",
            "target_repo": "acme/gadgets",
        },
    ),
    "Windows line ends and lines": (
        "task_id: abc\r\nuser_id: u1\r\n\r\nDo it.\r\n",
        {"metadata": {"task_id": "abc", "user_id": "u1"}, "instruction": "Do it."},
    ),
    "instruction with all of Markdown": (
        backend_body(LONG),
        {"metadata": METADATA, "instruction": LONG.replace("<!-- and a remark -->", "")},
    ),
    "metadata in a code fence": (backend_body(QUOTED), {"metadata": METADATA, "instruction": QUOTED}),
    "metadata in a fence of tildes": (backend_body(TILDES), {"metadata": METADATA, "instruction": TILDES}),
    "metadata in a code fence only": (QUOTED, {"task_id": "issue-7", "instruction": QUOTED}),
    "heading in a code fence": (
        "```\n## Instructions\n```\nDo it.",
        {"instruction": "```\n## Instructions\n```\nDo it."},
    ),
    "stray fence before the metadata": (
        backend_body("Fix this:\n\n```python\nprint(1)"),
        {"metadata": METADATA, "instruction": "Fix this:\n\n```python\nprint(1)"},
    ),
    "stray fence after a whole one": (
        backend_body("```\na\n```\n````"),
        {"metadata": METADATA, "instruction": "```\na\n```\n````"},
    ),
    "stray fence before the heading": (
        "```\ntask_id: abc\n\n## Instructions\nDo it.",
        {"task_id": "abc", "instruction": "Do it."},
    ),
    "code in a line of three backticks": (
        "```npm test``` fails.\n\n## Instructions\n\nDo it:\n\n```\ncode\n```",
        {"instruction": "Do it:\n\n```\ncode\n```"},
    ),
    "several comments": (
        f'Do it.\n{OTHER}\n<!-- agent_task_metadata {{"task_id": "last"}} -->',
        {"task_id": "last", "instruction": "Do it."},
    ),
    "the last comment is no JSON": (
        f"Do it.\n{OTHER}\n<!-- agent_task_metadata {{task_id: last}} -->",
        {"task_id": "other", "instruction": "Do it."},
    ),
    "the last comment is no object": (
        f'Do it.\n{OTHER}\n<!-- agent_task_metadata ["last"] -->',
        {"task_id": "other"},
    ),
    "the metadata is cut short": (
        f'Do it.\n{OTHER}\n<!-- agent_task_metadata {{"task_id": "last" -->',
        {"task_id": "other", "instruction": "Do it."},
    ),
    "the last comment never ends": (
        f'Do it.\n{OTHER}\n<!-- agent_task_metadata {{"task_id": "last"}}',
        {"task_id": "other"},
    ),
    "the instruction begins a comment and never ends it": (
        backend_body("Write a <!-- agent_task_metadata { comment."),
        {"metadata": METADATA},
    ),
    "no comment is well formed": (
        "Task ID: abc\n\nDo it.\n<!-- agent_task_metadata {} {} -->",
        {"metadata": {"task_id": "abc"}, "instruction": "Do it."},
    ),
    "odd metadata": (
        f"Do it.\n{metadata_comment(ODD)}",
        {"metadata": ODD, "task_id": ODD["task_id"], "instruction": "Do it."},
    ),
    "task id that is an object": (
        'Do it.\n<!-- agent_task_metadata {"task_id": {"a": 1}, "user_id": "u"} -->',
        {"task_id": "issue-7", "metadata": {"task_id": "issue-7", "user_id": "u"}},
    ),
    "task id that is null": (
        'Do it.\n<!-- agent_task_metadata {"task_id": null} -->',
        {"task_id": "issue-7"},
    ),
    "task id that is nought": (
        'Do it.\n<!-- agent_task_metadata {"task_id": 0} -->',
        {"task_id": "0", "metadata": {"task_id": 0}},
    ),
}


@pytest.mark.parametrize(("body", "expected"), FORMS.values(), ids=FORMS.keys())
def test_every_form_of_body_is_understood(body: str, expected: dict[str, Any]) -> None:
    task = parse(body)
    assert {name: getattr(task, name) for name in expected} == expected


def test_what_surrounds_the_body_is_kept() -> None:
    issue = issue_json("Do it.", title=" Make \n more\twidgets ", number=12, html_url="https://example.org/12")
    task = parse_task(issue, CONFIG, attempt=2)
    assert (task.number, task.title, task.url) == (12, "Make more widgets", "https://example.org/12")
    assert (task.attempt, task.author, task.issue) == (2, "octocat", issue)
    assert task.reference == "acme/dispatch#12"


@pytest.mark.parametrize("missing", ["body", "title", "user", "html_url"])
def test_an_issue_may_lack_what_github_may_leave_out(missing: str) -> None:
    assert parse_task(issue_json() | {missing: None}, CONFIG).number == 7


# --------------------------------------------------------------------------------------------------
# Trust


def test_the_metadata_of_a_stranger_is_not_read() -> None:
    body = backend_body(metadata={"task_id": "x", "base": "b", "target_repo": "acme/gadgets"}, target="a/b#1")
    task = parse(body, author_association="NONE")
    assert (task.trusted, task.task_id, task.base) == (False, "issue-7", "")
    assert (task.metadata, task.target_repo, task.context) == ({"task_id": "issue-7"}, TARGET, "")


@pytest.mark.parametrize(
    ("association", "expected"),
    [
        ("OWNER", True),
        ("MEMBER", True),
        ("COLLABORATOR", True),
        ("CONTRIBUTOR", False),
        ("FIRST_TIMER", False),
        ("NONE", False),
        ("owner", False),
        (None, False),
    ],
)
def test_trust_follows_the_association(association: str | None, expected: bool) -> None:
    assert parse_task(issue_json(author_association=association), CONFIG).trusted is expected


@pytest.mark.parametrize(
    ("login", "expected"),
    [
        ("alice", True),
        ("Alice", True),
        ("helper[bot]", True),
        ("helper", False),
        ("evil[bot]", False),
        ("alice[bot]", False),
        ("alice2", False),
        ("ali", False),
        ("", False),
    ],
)
def test_a_listed_author_is_trusted_by_the_whole_name(login: str, expected: bool) -> None:
    config = make_config({"AGENT_ALLOWED_AUTHORS": "alice, helper[bot]"})
    issue = issue_json(author_association="NONE", user={"login": login})
    assert parse_task(issue, config).trusted is expected


def test_an_author_whose_account_is_gone_is_not_trusted() -> None:
    assert not parse_task(issue_json(author_association="NONE", user=None), CONFIG).trusted


# --------------------------------------------------------------------------------------------------
# Refusals


def refusal_of(body: str, **fields: Any) -> TaskFailed:
    with pytest.raises(TaskFailed) as caught:
        check_task(parse(body, **fields), CONFIG)
    return caught.value


@pytest.mark.parametrize("name", [name for name in FORMS if name != "nothing below the heading"])
def test_a_task_with_an_allowed_target_may_run(name: str) -> None:
    task = dataclasses.replace(parse(FORMS[name][0]), target_repo="Acme/Widgets")
    check_task(task, CONFIG)


def test_a_stranger_is_told_who_may_open_issues() -> None:
    failure = refusal_of("Do it.", author_association="NONE", user={"login": "evil[bot]"})
    assert "`evil[bot]` may not give work" in failure.why
    assert "AGENT_ALLOWED_AUTHORS" in failure.advice


@pytest.mark.parametrize(
    "target", ["other/place", "acme/widgets2", "../widgets", "acme", "https://github.com/acme/widgets"]
)
def test_a_target_that_is_not_allowed_is_named(target: str) -> None:
    failure = refusal_of(backend_body(metadata={"task_id": "a", "target_repo": target}))
    assert f"`{target}`" in failure.why
    assert "AGENT_ALLOWED_TARGETS" in failure.advice


@pytest.mark.parametrize("target", [["acme/widgets"], {"a": 1}, 5, True, "acme/..\n", "acme/\ud800"])
def test_a_target_that_is_no_name_is_refused_whatever_is_allowed(target: object) -> None:
    task = parse(backend_body(metadata={"task_id": "a", "target_repo": target}))
    with pytest.raises(TaskFailed, match="may not change"):
        check_task(task, make_config({"AGENT_ALLOWED_TARGETS": "*"}))


def test_a_target_line_that_is_not_allowed_is_refused() -> None:
    assert "`other/place`" in refusal_of("Target Repository: other/place\n\nDo it.").why


@pytest.mark.parametrize("base", ["-x", "a b", "../x", "a..b", "x.lock", "refs\u3000heads", "\ud800", ["x"]])
def test_a_base_that_is_no_branch_name_is_refused(base: object) -> None:
    failure = refusal_of(backend_body(metadata={"task_id": "a", "base": base}))
    assert "not a valid branch name" in failure.why


def test_metadata_that_would_not_fit_is_refused() -> None:
    failure = refusal_of(backend_body(metadata={"task_id": "a", "more": "\u00e9" * (MAX_METADATA // 6)}))
    assert "metadata is longer than 16,000 characters" in failure.why


def test_an_empty_instruction_is_refused_with_the_place_to_write_it() -> None:
    failure = refusal_of(backend_body(" \n "))
    assert "instruction is empty" in failure.why
    assert "## Instructions" in failure.advice


def test_a_refusal_quotes_so_that_nothing_breaks_out() -> None:
    hostile = "`**a** <!-- b --> \x1b[31m\n" + "c" * 1000
    failure = refusal_of(backend_body(metadata={"task_id": "a", "target_repo": hostile}))
    assert failure.why.count("`") == 2
    assert "\x1b" not in failure.why
    assert len(failure.why) < 300


# --------------------------------------------------------------------------------------------------
# Names of branches


def git_takes(name: str) -> bool:
    """Whether git itself takes a name for a branch."""
    done = subprocess.run(["git", "check-ref-format", "--branch", name], capture_output=True, check=False)
    return done.returncode == 0


@pytest.mark.parametrize(
    "name", ["main", "release/1.x", "a-b_c", "feature/#12", "\u00fcber", "a@b", "@a", "x.locks", "a.b"]
)
def test_usual_branch_names_are_taken(name: str) -> None:
    assert is_branch_name(name)
    assert git_takes(name)


BRANCH_PARTS = ["a", "B", "/", ".", "..", ".lock", "@", "@{", "{", "}", "-", "~", "^", ":", "?", "*", "["]
BRANCH_PARTS += [
    "\\",
    " ",
    "\t",
    "\n",
    "\x7f",
    "\x85",
    "\u3000",
    "\u200b",
    "\u00e9",
    "HEAD",
    "refs",
    "x" * 70,
]


@pytest.mark.parametrize("name", ["", "-a", "a/", "/a", "a.", ".a", "a//b", "a.lock/b", *BRANCH_PARTS])
def test_git_takes_each_name_that_the_runner_takes(name: str) -> None:
    assert git_takes(name) or not is_branch_name(name)


@with_git
@given(st.lists(st.sampled_from(BRANCH_PARTS), min_size=1, max_size=6).map("".join).filter(is_branch_name))
def test_git_takes_every_name_that_the_runner_takes(name: str) -> None:
    assert git_takes(name)


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "a" * 201, "a\nb", "a\u2028b"])
def test_names_that_no_process_can_be_given_are_not_taken(name: str) -> None:
    assert not is_branch_name(name)


@pytest.mark.parametrize("task_id", [TASK_ID, "issue-7", "a", "A.b_c-1", "x" * 64])
def test_a_plain_task_id_is_its_own_slug(task_id: str) -> None:
    assert safe_slug(task_id) == task_id


@pytest.mark.parametrize("task_id", ["", "a/b", "../a", "a..b", "a.", "a.lock", "a b", "x" * 65, "a\n", "\ud800"])
def test_any_other_task_id_gets_a_slug_that_stays_the_same(task_id: str) -> None:
    assert re.fullmatch(r"x[0-9a-f]{16}", safe_slug(task_id))
    assert safe_slug(task_id) == safe_slug(task_id)
    assert safe_slug(task_id) != safe_slug(task_id + "!")


@with_git
@given(st.text(max_size=80))
@example("-a")
@example(".")
@example("@{")
def test_every_task_id_makes_a_branch_that_git_takes(task_id: str) -> None:
    assert git_takes(name_branch("agent-task-{task_id}", task_id, 7))
    assert git_takes(name_branch("{task_id}", task_id, 7))


# --------------------------------------------------------------------------------------------------
# Properties

PIECES = [
    "<!--",
    "-->",
    "--",
    ">",
    "<!-- agent_task_metadata",
    OTHER,
    "agent_task_metadata",
    "`",
    "```",
    "```\n",
    "~~~\n",
    "\n",
    "\r\n",
    "---\n",
    "## Instructions\n",
    "Task ID: a\n",
    "Target: a/b\n",
    '"',
    "\\",
    "{",
    "}",
    '{"task_id": "x"}',
    "Fixes #1",
    "\u3000",
    "\x1b[31m",
    "\0",
]
odd_text = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=8)), max_size=12).map("".join)
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), odd_text)


def nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(st.lists(inner, max_size=3), st.dictionaries(odd_text, inner, max_size=3))


values = st.recursive(scalars, nested, max_leaves=6)
metadatas = st.dictionaries(odd_text, values, max_size=5)


def as_it_is_seen(text: str) -> str:
    """What is left of a text without comments."""
    return printable(re.sub("\r\n?", "\n", text.replace("\0", "")))


@given(odd_text.filter(lambda text: "<!--" not in text and not FENCE.search(text)), metadatas)
@example("```x```\nA line of code, then a fence:\n\n    ```", {})
@example("Two\rlines", {})
def test_an_instruction_comes_back_as_it_was_written(instruction: str, metadata: dict[str, Any]) -> None:
    metadata = {**metadata, "task_id": "t"}
    task = parse(backend_body(instruction, metadata))
    assert task.instruction == as_it_is_seen(instruction.strip()).strip()
    assert task.metadata == metadata


@given(odd_text)
def test_an_instruction_in_a_fence_comes_back_whole(code: str) -> None:
    ticks = "`" * (3 + code.count("`"))
    instruction = f"Do this:\n\n{ticks}html\n{code}\n{ticks}"
    task = parse(backend_body(instruction))
    assert task.instruction == as_it_is_seen(instruction)
    assert task.metadata == METADATA


# --------------------------------------------------------------------------------------------------
# Code fences


@given(odd_text)
def test_blanking_fences_keeps_length_and_lines(text: str) -> None:
    blanked = outside_fences(text)
    assert len(blanked) == len(text)
    assert [i for i, c in enumerate(blanked) if c == "\n"] == [i for i, c in enumerate(text) if c == "\n"]
    assert all(new in (old, " ") for new, old in zip(blanked, text, strict=True))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\n```\nb\n```\nc", "a c"),
        ("~~~ python\nb\n~~~\nc", "c"),
        ("````\n```\nb\n````\nc", "c"),
        ("   ```\nb\n   ```\nc", "c"),
        ("```\nb\n~~~\n```", ""),
        ("```\nb\n``` c\n```\nd", "d"),
        ("    ```\nb", "``` b"),
        ("``\nb\n``", "`` b ``"),
        ("a ```\nb\n``` c", "a ``` b ``` c"),
        ("```\nb", "``` b"),
        ("```\nb\n```\n```\nc", "``` c"),
        ("```b```\nc\n```\nd\n```\ne", "```b``` c e"),
    ],
)
def test_fences_are_told_as_commonmark_tells_them(text: str, shown: str) -> None:
    assert " ".join(outside_fences(text).split()) == shown


def test_a_fence_knows_its_language_and_its_inside() -> None:
    text = "Apply:\n``` Diff  hunk\n+a\n```\n"
    (fence,) = FENCE.finditer(text)
    assert (fence["language"], fence["inside"]) == ("Diff", "+a\n")


def test_code_in_a_line_of_three_backticks_does_not_hide_a_patch() -> None:
    assert [fence["language"] for fence in FENCE.finditer("```npm test```\n\n```diff\n+a\n```\n")] == ["diff"]


def test_no_expression_has_a_possessive_group() -> None:
    """Python 3.11.2 matches too little with these: hidden comments got through."""
    patterns = {name: value.pattern for name, value in vars(runner).items() if isinstance(value, re.Pattern)}
    assert len(patterns) > 10
    assert [name for name, pattern in patterns.items() if re.search(r"\)(?:[*+?]|\{[\d,]+\})\+", pattern)] == []
