"""Says whether the tree is ready to be released, and what is missing. `make release-check` runs it.

The version is `__version__` in runner.py; CHANGELOG.md, the documentation and the image's label have to agree with it.
Ends with 1 if something is missing. It changes nothing: the tag is yours to make.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

# https://semver.org/spec/v2.0.0.html#is-there-a-suggested-regular-expression-regex-to-check-a-semver-string
NUMBER, WORD = r"(?:0|[1-9]\d*)", r"(?:0|[1-9]\d*|\d*[A-Za-z-][0-9A-Za-z-]*)"
VERSION = rf"{NUMBER}\.{NUMBER}\.{NUMBER}(?:-{WORD}(?:\.{WORD})*)?(?:\+[0-9A-Za-z-]+(?:\.[0-9A-Za-z-]+)*)?"
# Where a file speaks of the runner's own version, and not of git's or an agent's.
OWN = re.compile(rf'(?:agent-runner[:@= ]=?v?|"version": "|\bVERSION=|image\.version="?)({VERSION})(?!\w|\.\d)')
DOCUMENTS = (":(glob)*.md", "docs", ".github", "Dockerfile", ":(glob)docker-compose*.yml", ":!CHANGELOG.md")

Rank = tuple[int, int, int, bool, tuple[tuple[bool, int, str], ...]]


def rank(version: str) -> Rank:
    """What versions are compared by: https://semver.org/spec/v2.0.0.html#spec-item-11"""
    plain, _, before = version.partition("+")[0].partition("-")
    major, minor, patch = map(int, plain.split("."))
    words = before.split(".") if before else []
    # A number is less than a word, and what comes before a release is less than the release.
    return major, minor, patch, not before, tuple((not w.isdigit(), int(w) if w.isdigit() else 0, w) for w in words)


def git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout


def read(file: Path) -> str:
    return file.read_text("utf-8") if file.is_file() else ""


def tagged(root: Path) -> list[str]:
    """The versions that have a tag, the newest last."""
    names = [name.removeprefix("v") for name in git(root, "tag", "--list").splitlines()]
    return sorted((name for name in names if re.fullmatch(VERSION, name)), key=rank)


def about_version(root: Path, version: str) -> Iterator[str]:
    if not re.fullmatch(VERSION, version):
        yield f"runner.py: __version__ is {version!r}, which is no version like 1.2.3 or 1.2.3-rc.1 (https://semver.org)."
        return
    known = tagged(root)
    if known and rank(version) <= rank(known[-1]):
        yield f"runner.py: __version__ is {version}, and there is a tag for {known[-1]}. Give it a higher number."


def about_changelog(root: Path, version: str) -> Iterator[str]:
    heading = re.search(r"^## +(.*?) *$", read(root / "CHANGELOG.md"), re.MULTILINE)
    first, _, date = (heading[1] if heading else "").partition(" - ")
    if first != f"[{version}]":
        yield f"CHANGELOG.md: the first heading is {heading[1] if heading else 'missing'!r}, not that of [{version}]."
        return
    try:
        day = datetime.strptime(date, "%Y-%m-%d").replace(tzinfo=UTC)
    except ValueError:
        yield f"CHANGELOG.md: [{version}] has {date or 'nothing'!r} where its date should be, such as 2026-01-31."
        return
    if day > datetime.now(UTC) + timedelta(days=1):  # it may be tomorrow somewhere
        yield f"CHANGELOG.md: the date of [{version}], {date}, is yet to come."


def about_documents(root: Path, version: str) -> Iterator[str]:
    for name in git(root, "ls-files", "-z", "--", *DOCUMENTS).split("\0"):
        for number, line in enumerate(read(root / name).splitlines() if name else (), 1):
            for other in {*OWN.findall(line)} - {version}:
                yield f"{name}, line {number}: speaks of version {other}, not of {version}."


def about_tree(root: Path) -> Iterator[str]:
    if changed := git(root, "status", "--porcelain").splitlines():
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        names = ", ".join(line[3:] for line in changed[:5])
        yield f"git: not everything is committed: {names}{more}."


def missing(root: Path) -> tuple[str, list[str]]:
    """The version, and what it still lacks."""
    found = re.findall(r'^__version__ = "(.*)"$', read(root / "runner.py"), re.MULTILINE)
    if len(found) != 1:
        return "", ['runner.py: there has to be one line like __version__ = "1.2.3".']
    (version,) = found
    parts = (about_version(root, version), about_changelog(root, version), about_documents(root, version))
    return version, [problem for part in (*parts, about_tree(root)) for problem in part]


def main() -> int:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1]
    version, problems = missing(root)
    for problem in problems:
        print("✗", problem)
    if problems:
        print(f"Not ready: {len(problems)} to mend.")
        return 1
    print(
        f"✓ {version} is ready. Once CI has passed: git tag -a v{version} -m v{version} && git push origin v{version}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
