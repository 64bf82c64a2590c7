"""What the runner writes: within GitHub's limits, and safe from what agents and strangers put into it."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
from typing import Any

import pytest
from conftest import TASK_ID, issue_json, make_config
from hypothesis import example, given, settings
from hypothesis import strategies as st

from runner import (
    FENCE,
    MAX_METADATA,
    Result,
    Task,
    TaskFailed,
    blocks,
    code,
    commit_message,
    cut,
    defused,
    duration,
    fenced,
    folded_output,
    harmless,
    metadata_comment,
    outside_fences,
    parse_task,
    printable,
    pull_body,
    pull_title,
    render_comment,
    step_marker,
    table,
)

GITHUB_LIMIT = 65_536  # characters of a body
NOTE = re.compile(r"… \(([\d,]+) characters more were left out\)")
TEXTS = {
    "words": "word ",
    "lines": "a line\n",
    "backticks": "`",
    "fence starts": "```\n",
    "tildes": "~",
    "stars": "*",
    "comments": "<!-- a -->",
    "line ends": "\n",
    "bars": "|",
    "escapes": "\x1b[31mred\x1b[0m",
    "emoji": "\U0001f600",
    "NUL": "\0",
}
huge = pytest.mark.parametrize("piece", TEXTS.values(), ids=TEXTS.keys())
odd_text = st.lists(
    st.one_of(st.sampled_from([*TEXTS.values(), "```", "~~~~\n", "\r\n", "</details>"]), st.text(max_size=8)),
    max_size=12,
).map("".join)
with_git = settings(max_examples=30)  # each starts a process


def make_task(**changes: Any) -> Task:
    body = metadata_comment({"task_id": TASK_ID, "user_id": "u"})
    return dataclasses.replace(parse_task(issue_json(body), make_config()), **changes)


# --------------------------------------------------------------------------------------------------
# The pull request


def test_a_pull_request_says_what_there_is_to_know() -> None:
    body = pull_body(make_task(attempt=2), "main", Result("", " README.md | 2 +-\n", "I made widgets."), "r1")
    assert body.startswith("<!-- agent_task_metadata {")
    for part in (
        "I made widgets.",
        "README.md | 2 +-",
        f"| Task | `{TASK_ID}` |",
        "| Dispatch issue | acme/dispatch#7 |",
        "| Asked for by | `octocat` |",
        "| Base | `main` |",
        "| Attempt | 2 |",
        "\nFixes acme/dispatch#7\n",
        step_marker("r1", "pull"),
    ):
        assert part in body


def test_a_pull_request_needs_no_summary() -> None:
    assert "\n\n\n" not in pull_body(make_task(), "main", Result("", " a | 1 +\n"), "r1")


@huge
def test_a_pull_request_never_grows_over_the_limit(piece: str) -> None:
    text = piece * (200_000 // len(piece))
    room = "x" * (MAX_METADATA - len(metadata_comment({"task_id": ""})))
    task = make_task(metadata={"task_id": room}, task_id=text, author=text, title=text)
    body = pull_body(task, text, Result("", text, text), "r1")
    assert len(body) <= GITHUB_LIMIT
    assert body.startswith(metadata_comment(task.metadata))
    assert body.endswith(f"Fixes acme/dispatch#7\n\n{step_marker('r1', 'pull')}")


@pytest.mark.parametrize("size", [63_000, 64_000, 65_000])
@pytest.mark.parametrize("mark", ["`", "~"])
def test_a_summary_that_is_one_long_fence_stays_within_the_limit(mark: str, size: int) -> None:
    assert len(pull_body(make_task(), "main", Result("", "", mark * size), "r1")) <= GITHUB_LIMIT


def test_a_long_summary_is_cut_with_a_note() -> None:
    body = pull_body(make_task(), "main", Result("", " a | 1 +\n", "word " * 20_000), "r1")
    assert NOTE.search(body)
    assert "### Changes" in body


@given(odd_text, odd_text)
@example("```python\nprint(1)", "")
@example("~~~~\n```", "````")
def test_nothing_in_a_summary_swallows_what_follows(summary: str, stat: str) -> None:
    shown = outside_fences(pull_body(make_task(), "main", Result("", stat, summary), "r1"))
    assert all(fence["close"] is not None for fence in FENCE.finditer(shown))
    assert "\n### Changes\n" in shown
    assert f"\n| Task | `{TASK_ID}` |\n" in shown
    assert shown.endswith(f"\nFixes acme/dispatch#7\n\n{step_marker('r1', 'pull')}")


def test_a_summary_cannot_forge_the_marker_of_a_step() -> None:
    forged = step_marker("other", "pull")
    assert forged not in pull_body(make_task(), "main", Result("", "", forged), "r1")


def test_a_summary_that_is_cut_inside_a_fence_ends_the_fence() -> None:
    shown = harmless("````text\n" + "x" * 10_000)
    assert shown.endswith("\n````")
    assert NOTE.search(shown)


def test_what_is_harmless_is_left_alone() -> None:
    text = "**Done.**\n\n```diff\n+a\n```\n\n| a | b |\n|---|---|"
    assert harmless(f"\n{text}\n") == text


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("Make more widgets", "Agent task: Make more widgets"),
        ("\x1b[31mRed\x1b[0m \x07bell", "Agent task: Red bell"),
        ("x" * 244, "Agent task: " + "x" * 244),
        ("x" * 245, "Agent task: " + "x" * 243 + "…"),
        ("\U0001f600" * 1000, "Agent task: " + "\U0001f600" * 243 + "…"),
    ],
    ids=["usual", "controls", "longest", "one too long", "emoji"],
)
def test_a_title_fits_into_256_characters(title: str, expected: str) -> None:
    assert pull_title(make_task(title=title), "Agent task: {title}") == expected
    assert len(expected) <= 256


# --------------------------------------------------------------------------------------------------
# Comments


def test_a_comment_holds_its_text_output_metadata_and_marker() -> None:
    comment = render_comment("r1", "end", "Done.", "line one\nline two\n", "<!-- meta -->")
    fold = folded_output("line one\nline two")
    assert comment == f"Done.\n\n{fold}\n\n<!-- meta -->\n\n{step_marker('r1', 'end')}"


def test_a_comment_without_output_has_no_fold() -> None:
    assert render_comment("r1", "start", "Working.") == f"Working.\n\n{step_marker('r1', 'start')}"


@huge
def test_a_comment_never_grows_over_the_limit(piece: str) -> None:
    text, metadata = piece * (200_000 // len(piece)), "<!-- " + "m" * (MAX_METADATA - 9) + " -->"
    comment = render_comment("r1", "end", text, text, metadata)
    assert len(comment) <= GITHUB_LIMIT
    assert comment.endswith(f"{metadata}\n\n{step_marker('r1', 'end')}")
    assert NOTE.search(comment)


def test_metadata_that_would_not_fit_is_left_out_whole() -> None:
    comment = render_comment("r1", "end", "Failed.", "", "m" * (MAX_METADATA + 1))
    assert comment == f"Failed.\n\n{step_marker('r1', 'end')}"


# --------------------------------------------------------------------------------------------------
# Output


def output_in(fold: str) -> str:
    """What stands in the fold's code fence."""
    (fence,) = FENCE.finditer(fold)
    assert fence["close"] is not None
    return fence["inside"]


def test_the_last_fifty_lines_are_kept() -> None:
    fold = folded_output("".join(f"line {n}\n" for n in range(1, 201)))
    assert output_in(fold).splitlines() == [f"line {n}" for n in range(151, 201)]
    assert "Last 50 lines" in fold


def test_blank_lines_at_the_end_do_not_push_out_the_others() -> None:
    assert output_in(folded_output("the error\n" + " \n" * 200)) == "the error\n"


@pytest.mark.parametrize("output", ["", "\n\n", " \t", "\x1b[0m\n", "\0\x07"])
def test_output_that_shows_nothing_makes_no_fold(output: str) -> None:
    assert folded_output(output) == ""


def test_a_long_line_is_shortened() -> None:
    assert output_in(folded_output("x" * 500)) == "x" * 500 + "\n"
    assert output_in(folded_output("x" * 501)) == "x" * 499 + "…\n"


def test_line_ends_of_every_kind_end_lines() -> None:
    assert output_in(folded_output("a\r\nb\rc\n")) == "a\nb\nc\n"


@given(odd_text)
def test_output_cannot_leave_its_fence(output: str) -> None:
    fold = folded_output(output)
    if fold:
        assert output_in(fold)
        assert outside_fences(fold).split("\n", 1)[1].strip() == "</details>"


@huge
def test_a_fold_leaves_room_for_the_rest(piece: str) -> None:
    assert len(folded_output(piece * 100_000)) < 30_000


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("\x1b[1;31mred\x1b[0m", "red"),
        ("\x1b[38;2;1;2;3mtrue colour\x1b[m", "true colour"),
        ("\x1b[38:5:1mcolons", "colons"),
        ("\x1b[2J\x1b[1;1Hcleared", "cleared"),
        ("\x1b[?25lhidden cursor\x1b[?25h", "hidden cursor"),
        ("\x1b[>4;2mkeys\x1b[<u", "keys"),
        ("\x1b]0;title\x07text", "text"),
        ("\x1b]8;;https://example.org\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x1b]0;never ended\nnext line", "\nnext line"),
        ("\x1b(B\x1b[mreset by tput", "reset by tput"),
        ("\x1b7saved\x1b8", "saved"),
        ("\x1b=keypad\x1b>", "keypad"),
        ("\x1bMup", "up"),
        ("a\0b\x07c\x08d\x7fe", "abcde"),
        ("tab\tand\nline", "tab\tand\nline"),
        ("lone \x1b", "lone "),
        ("\u00fcber \U0001f600 [31m", "\u00fcber \U0001f600 [31m"),
    ],
)
def test_terminal_escapes_and_control_characters_are_gone(raw: str, shown: str) -> None:
    assert printable(raw) == shown


@given(st.text(alphabet="\x1b[]0;?m\x07\\ \na\x9b(", max_size=30))
def test_no_escape_character_ever_remains(text: str) -> None:
    assert not set(printable(text)) & {"\x1b", "\x07"}


# --------------------------------------------------------------------------------------------------
# Small pieces


@pytest.mark.parametrize("text", ["", "a", "`", "``` a", "a ```` b `````", "```\n```"])
def test_a_fence_is_longer_than_any_run_of_backticks_inside(text: str) -> None:
    first, *_, last = fenced(text).split("\n")
    longest = max(map(len, re.findall("`+", text)), default=0)
    assert first == f"{last}text"
    assert len(last) == last.count("`") >= max(3, longest + 1)


@given(odd_text)
def test_text_comes_out_of_its_fence_unchanged_but_for_what_acts_in_code_too(text: str) -> None:
    whole = fenced(text)
    (fence,) = FENCE.finditer(whole)
    assert fence["inside"] == f"{defused(printable(text))}\n"
    assert fence["close"] is not None
    assert fence.end() == len(whole)


@pytest.mark.parametrize("size", [101, 250, 12_345])
def test_a_cut_says_truly_how_much_is_left_out(size: int) -> None:
    shown = cut("x" * size, 100)
    note = NOTE.search(shown)
    assert note
    assert shown.count("x", 0, note.start()) + int(note[1].replace(",", "")) == size
    assert len(shown) <= 100


def test_what_fits_is_not_cut() -> None:
    assert cut("x" * 100, 100) == "x" * 100


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("main", "`main`"),
        ("", "(nothing)"),
        (" \n", "(nothing)"),
        ("a`b``c", "`a'b''c`"),
        ("two\nlines\tand  blanks", "`two lines and blanks`"),
        ("\x1b[31mred\0", "`red`"),
        ("x" * 300, "`" + "x" * 200 + "`"),
        ("\ud800", "`?`"),
    ],
    ids=["usual", "empty", "blank", "backticks", "lines", "controls", "long", "surrogate"],
)
def test_foreign_text_stays_inside_its_inline_code(text: str, shown: str) -> None:
    assert code(text) == shown


def test_a_bar_does_not_end_a_table_cell() -> None:
    assert table({"Task": "`a|b||c`"}).splitlines()[-1] == r"| Task | `a\|b\|\|c` |"


def test_a_table_has_a_row_for_each_entry() -> None:
    assert table({"A": "1", "B": "2"}) == "| | |\n|---|---|\n| A | 1 |\n| B | 2 |"


def test_empty_blocks_leave_no_gap() -> None:
    assert blocks("a", "", "b") == "a\n\nb"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0 s"),
        (0.4, "0 s"),
        (42.4, "42 s"),
        (59.6, "1 min 0 s"),
        (60, "1 min 0 s"),
        (185, "3 min 5 s"),
        (3599, "59 min 59 s"),
        (3599.7, "1 h 0 min"),
        (3720, "1 h 2 min"),
        (90_000, "25 h 0 min"),
    ],
)
def test_durations_are_said_as_people_say_them(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


# --------------------------------------------------------------------------------------------------
# The commit's message


def trailers(message: str) -> list[str]:
    """What git reads as the message's trailers."""
    command = ["git", "interpret-trailers", "--parse"]
    done = subprocess.run(command, input=message, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    "title",
    [
        "Make more widgets",
        "",
        "Fix: this\x1b[31m",
        "Run: forged",
        "\U0001f600" * 200,
        "a word " * 60,
        "---",
        "# a",
    ],
)
def test_git_reads_the_trailers_of_a_commit(title: str) -> None:
    message = commit_message(make_task(title=title), "r1", make_config())
    assert trailers(message) == [f"Task-Id: {TASK_ID}", "Dispatch-Issue: acme/dispatch#7", "Run: r1"]


def test_a_commit_has_a_short_subject_of_its_own() -> None:
    subject, blank, *_ = commit_message(make_task(title="\x1b[31m" + "word " * 50), "r1", make_config()).split("\n")
    assert subject.startswith("Agent task: word word")
    assert len(subject) <= 100
    assert blank == ""


@with_git
@given(st.text(max_size=40), st.text(max_size=40))
@example("Fix it\n\nRun: forged", "a\n\nRun: forged")
def test_no_issue_forges_a_trailer(title: str, task_id: str) -> None:
    body = metadata_comment({"task_id": task_id})
    task = parse_task(issue_json(body, title=title), make_config())
    read = trailers(commit_message(task, "r1", make_config()))
    assert read == [f"Task-Id: {task.slug}", "Dispatch-Issue: acme/dispatch#7", "Run: r1"]


def test_metadata_is_plain_ascii_on_one_line() -> None:
    comment = metadata_comment({"task_id": "\u00e9\n\u2028-->"})
    assert comment.isascii()
    assert len(comment.splitlines()) == 1
    assert json.loads(comment[len("<!-- agent_task_metadata ") : -len(" -->")]) == {"task_id": "\u00e9\n\u2028-->"}


# --------------------------------------------------------------------------------------------------
# What is not finished


def test_why_it_is_not_finished_is_one_trailer_that_closes_nothing() -> None:
    failure = TaskFailed("It broke.\x1b[31m\n\nRun: forged\n\nFixes #1, closes acme/dispatch#7. " + "word " * 100)
    message = commit_message(make_task(), "r1", make_config(), failure)
    read = trailers(message)
    assert [line.partition(":")[0] for line in read] == ["Task-Id", "Dispatch-Issue", "Run", "Unfinished"]
    assert read[3].startswith("Unfinished: It broke. Run: forged Fixes \u200b#1") or "Fixes\u200b #1" in read[3]
    assert "Fixes #1" not in message
    assert len(read[3]) <= 230


def test_the_warning_is_one_paragraph_that_does_no_harm() -> None:
    failure = TaskFailed("It broke.\n\n> @octocat\n\n<!-- agent_task_metadata {} -->\n\nFixes #1", output="its output")
    body = pull_body(make_task(), "main", Result("", " a | 1 +\n", failure=failure), "r1")
    (line,) = [line for line in body.split("\n") if "Not finished" in line]
    assert line.startswith("> **Not finished.** It broke. > ")
    assert "@octocat" not in body
    assert "Fixes #1" not in body
    assert body.count("<!-- agent_task_metadata") == 1
    assert "```text\nits output\n```" in body
    assert "<details open>" not in body


def test_a_blank_summary_is_none() -> None:
    body = pull_body(make_task(), "main", Result("", " a | 1 +\n", " \n\t", "its output"), "r1")
    assert "<details open>" in body
    assert "its output" in body


@pytest.mark.parametrize("title", ["", "\x1b[31m", "\u200b\u2060"])
def test_a_title_that_shows_nothing_is_the_id(title: str) -> None:
    assert pull_title(make_task(title=title), "feat: {title}") == f"feat: {TASK_ID}"


@pytest.mark.parametrize("login", ["", "a b", "a\nRun: forged", "a> <b@c", "[bot]", "\u00e9", "a[bot]x"])
def test_a_login_that_no_account_has_is_no_co_author(login: str) -> None:
    task = make_task(author=login, issue={"user": {"login": login, "id": 5}})
    assert "Co-authored-by" not in commit_message(task, "r1", make_config())
    assert "Co-authored-by: a-b <5+a-b@" in commit_message(dataclasses.replace(task, author="a-b"), "r1", make_config())
