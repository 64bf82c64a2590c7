"""How fast issues are understood, if whoever writes them wants it to be slow."""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Iterator

from conftest import issue_json
from lab import Lab, Row, timed
from test_hostile import CONFIG, HIDDEN, ISSUES
from test_parsing import FORMS

from runner import COMMENT, FENCE, KEY_LINE, UNSEEN, parse_task

SIZE = 65_536  # characters of a body: what GitHub takes
SLOWEST = 5
ROUNDS = 7
BEGINS = re.compile(r"[`~<]")  # what a fence or a comment may begin with: the least that is to be looked for
PATTERNS = (FENCE, COMMENT, UNSEEN, KEY_LINE)


def bodies() -> dict[str, str]:
    """Texts that are repeated until a body is full: all that the tests know of, and what regular expressions fear."""
    found = {f"issue: {name}": str(about.get("body") or "") for name, (about, _) in ISSUES.items()}
    found |= {f"hidden: {name}": body for name, (body, _) in HIDDEN.items()}
    found |= {f"form: {name}": body for name, (body, _) in FORMS.items()}
    found |= {f"line: {name}": body + "\n" for name, (body, _) in HIDDEN.items()}
    pieces = (
        "a",
        " ",
        "\n",
        "`",
        "```\n",
        "~~~\n",
        "<!--",
        "<!--\n",
        "-->",
        "- ",
        "> ",
        "\\",
        "{",
        "# ",
        "\u200b",
        "\x1b[",
    )
    found |= {f"piece {piece!r}": piece for piece in pieces}
    found |= {f"pieces {one + other!r}": one + other for one in pieces for other in pieces if one != other}
    found |= {f"{piece!r} at the end": "a" * 100 + piece for piece in pieces}
    return {name: text for name, text in found.items() if text}


def filled(text: str, size: int) -> str:
    return (text * (size // len(text) + 1))[:size]


def parsing(lab: Lab) -> Iterator[Row]:
    """The slowest of all kinds of body, and whether four times the text takes four times as long. The best of several
    times counts: what else the machine does makes it only longer."""
    texts = bodies()
    if lab.short:
        texts = dict(itertools.islice(texts.items(), 0, None, 20))
    full = {name: once(filled(text, SIZE)) for name, text in texts.items()}
    slowest = sorted(full, key=lambda name: -full[name])[:SLOWEST]
    whole = {name: best(filled(texts[name], SIZE)) for name in slowest}
    growth = {name: whole[name] / best(filled(texts[name], SIZE // 4)) for name in slowest}
    worst = max(whole, key=lambda name: whole[name])
    rate, usual = speed(whole[worst]), speed(statistics.median(full.values()))
    body = filled(texts[worst], SIZE)
    least = speed(one_pass(BEGINS, body))
    each = speed(sum(one_pass(pattern, body) for pattern in PATTERNS))
    note = f"{worst}; over the same body a regular expression of three characters: {least:.1f} MB/s"
    note += f", the runner's four regular expressions, once each and nothing else: {each:.1f} MB/s"
    note += f"; half of the kinds are faster than {usual:.0f} MB/s"
    about = f"the slowest of {len(texts)} kinds of 64 kB"
    yield Row("parsing of hostile bodies", about, f"{rate:.1f} MB/s", ">= 20 MB/s", rate >= 20, note)
    bent = max(growth, key=lambda name: growth[name])
    note = f"four times the text is 4 x if linear, 16 x if quadratic; most of the {SLOWEST} slowest kinds: {bent}"
    yield Row(
        "growth of the time to parse", "16 to 64 kB", f"{growth[bent]:.1f} x", "linear: < 8 x", growth[bent] < 8, note
    )


def one_pass(pattern: re.Pattern[str], body: str) -> float:
    """Seconds, at best, to find all that a regular expression matches."""
    return min(timed(lambda: list(pattern.finditer(body))) for _ in range(ROUNDS))


def best(body: str) -> float:
    """Seconds, at best. No two bodies are the same: what was kept of one does not help with the next."""
    return min(once(f"{body[:-8]}{number:08}") for number in range(ROUNDS))


def once(body: str) -> float:
    issue = issue_json(body)
    return timed(lambda: parse_task(issue, CONFIG))


def speed(seconds: float) -> float:
    """Megabytes a second."""
    return SIZE / seconds / 1e6
