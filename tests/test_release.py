"""What `make release-check` says of trees that may or may not be released, in real git repositories."""

from __future__ import annotations

import itertools
import runpy
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from conftest import RUNNER
from hypothesis import given
from hypothesis import strategies as st

SCRIPT = RUNNER.parent / ".ci/release_check.py"
TODAY = datetime.now(UTC).strftime("%Y-%m-%d")
GOOD = {
    "runner.py": '"""A runner."""\n\n__version__ = "1.2.0"\n',
    "CHANGELOG.md": f"# Changelog\n\n## [1.2.0] - {TODAY}\n\n\n## [1.1.0] - 2025-01-31\n\n- agent-runner 1.1.0\n",
    "README.md": "Python 3.11 and git 2.31.0 are needed; `agent-runner:1.2.0` is the image.\n",
    "docs/guide.md": '```json\n{"version": "1.2.0"}\n```\n',
    "Dockerfile": "FROM python:3.13-slim\nARG VERSION=1.2.0\n",
}


NAMES = runpy.run_path(str(SCRIPT))
rank: Callable[[str], tuple[object, ...]] = NAMES["rank"]


class Tree:
    """A repository whose last commit holds these files."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.git("init", "--quiet", "--initial-branch=main")
        self.write(**GOOD)
        self.commit()

    def git(self, *arguments: str) -> None:
        who = ("-c", "user.name=A", "-c", "user.email=a@example.com", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *who, *arguments], cwd=self.root, check=True)

    def write(self, **files: str) -> None:
        for name, text in files.items():
            (self.root / name).parent.mkdir(exist_ok=True)
            (self.root / name).write_text(text, "utf-8")

    def commit(self, tag: str = "") -> None:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message=Work")
        if tag:
            self.git("tag", tag)

    def change(self, name: str, old: str, new: str) -> None:
        text = (self.root / name).read_text("utf-8")
        assert old in text
        self.write(**{name: text.replace(old, new)})
        self.commit()

    def check(self) -> tuple[int, list[str]]:
        """The exit code and what is missing."""
        done = subprocess.run([sys.executable, str(SCRIPT), str(self.root)], capture_output=True, text=True)
        assert done.stderr == ""
        *problems, last = done.stdout.splitlines()
        assert last.startswith("Not ready: " if problems else "✓ ")
        assert all(line.startswith("✗ ") for line in problems)
        return done.returncode, [line.removeprefix("✗ ") for line in problems]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_a_tree_with_all_that_it_needs_is_ready(tree: Tree) -> None:
    assert tree.check() == (0, [])


def test_older_tags_and_others_do_no_harm(tree: Tree) -> None:
    for tag in ("v1.1.0", "1.1.9", "v1.2.0-rc.2", "nightly", "v2", "v01.9.0"):
        tree.commit(tag)
    assert tree.check() == (0, [])


@pytest.mark.parametrize("tag", ["v1.2.0", "1.2.0", "v1.10.0", "v2.0.0-alpha", "v1.2.0+build.7"])
def test_a_version_that_is_not_newer_than_the_last_tag_is_named(tree: Tree, tag: str) -> None:
    tree.git("tag", "v1.1.0")
    tree.git("tag", tag)
    text = f"__version__ is 1.2.0, and there is a tag for {tag.removeprefix('v')}. Give it a higher number."
    assert tree.check() == (1, [f"runner.py: {text}"])


@pytest.mark.parametrize(
    "version", ["1.2", "1.2.0.1", "01.2.0", "1.2.0-", "1.2.0-rc..1", "1.2.0-01", "v1.2.0", "soon", ""]
)
def test_what_is_no_version_is_named(tree: Tree, version: str) -> None:
    tree.change("runner.py", "1.2.0", version)
    code, problems = tree.check()
    assert code == 1
    assert problems[0].startswith(f"runner.py: __version__ is {version!r}, which is no version")


@pytest.mark.parametrize("text", ["", "__version__ = '1.2.0'\n", GOOD["runner.py"] * 2])
def test_a_runner_without_one_version_is_told(tree: Tree, text: str) -> None:
    tree.write(**{"runner.py": text})
    assert tree.check() == (1, ['runner.py: there has to be one line like __version__ = "1.2.3".'])


@pytest.mark.parametrize(
    ("heading", "told"),
    [
        ("## [1.2.0] - unreleased", "[1.2.0] has 'unreleased' where its date should be, such as 2026-01-31."),
        ("## [1.2.0]", "[1.2.0] has 'nothing' where its date should be, such as 2026-01-31."),
        ("## [1.2.0] - 2026-02-30", "[1.2.0] has '2026-02-30' where its date should be, such as 2026-01-31."),
        ("## [1.2.0] - 9999-12-31", "the date of [1.2.0], 9999-12-31, is yet to come."),
        ("## [1.3.0] - 2026-01-31", "the first heading is '[1.3.0] - 2026-01-31', not that of [1.2.0]."),
        ("## Unreleased", "the first heading is 'Unreleased', not that of [1.2.0]."),
    ],
)
def test_a_changelog_without_version_and_date_is_told(tree: Tree, heading: str, told: str) -> None:
    tree.change("CHANGELOG.md", f"## [1.2.0] - {TODAY}", heading)
    assert tree.check() == (1, [f"CHANGELOG.md: {told}"])


def test_a_changelog_of_tomorrow_is_good_since_it_is_tomorrow_somewhere(tree: Tree) -> None:
    tomorrow = (datetime.now(UTC) + timedelta(days=1)).strftime("%Y-%m-%d")
    tree.change("CHANGELOG.md", TODAY, tomorrow)
    assert tree.check() == (0, [])


def test_a_changelog_that_is_missing_is_told(tree: Tree) -> None:
    (tree.root / "CHANGELOG.md").unlink()
    tree.commit()
    assert tree.check() == (1, ["CHANGELOG.md: the first heading is 'missing', not that of [1.2.0]."])


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("README.md", "agent-runner 1.1.0."),
        ("docs/guide.md", '{"version": "1.1.0"}'),
        ("docs/examples/kubernetes.yaml", "image: registry.example.com/agent-runner:1.1.0"),
        (".github/workflows/ci.yml", "pip install agent-runner==1.1.0"),
        ("Dockerfile", "ARG VERSION=1.1.0"),
        ("docker-compose.demo.yml", "image: agent-runner:1.1.0"),
    ],
)
def test_a_document_that_speaks_of_another_version_is_named(tree: Tree, name: str, line: str) -> None:
    (tree.root / name).parent.mkdir(parents=True, exist_ok=True)
    tree.write(**{name: f"First.\n{line}\n"})
    tree.commit()
    assert tree.check() == (1, [f"{name}, line 2: speaks of version 1.1.0, not of 1.2.0."])


def test_versions_of_others_do_no_harm(tree: Tree) -> None:
    others = (
        "git 2.39.5, mini-agent 9.9.9, agent-runners 3.4.5, agent-runner:latest, PYTHON_VERSION=3.13.1, 127.0.0.1\n"
    )
    tree.change("README.md", "Python", f"{others}Python")
    assert tree.check() == (0, [])


def test_what_is_not_committed_is_named(tree: Tree) -> None:
    for number in range(7):
        tree.write(**{f"new-{number}": ""})
    names = ", ".join(f"new-{number}" for number in range(5))
    assert tree.check() == (1, [f"git: not everything is committed: {names} and 2 more."])


def test_all_that_is_missing_is_told_at_once(tree: Tree) -> None:
    tree.git("tag", "v1.3.0")
    tree.change("CHANGELOG.md", TODAY, "unreleased")
    tree.change("Dockerfile", "1.2.0", "1.1.0")
    tree.write(new="")
    code, problems = tree.check()
    assert code == 1
    assert [problem.split(":")[0].split(",")[0] for problem in problems] == [
        "runner.py",
        "CHANGELOG.md",
        "Dockerfile",
        "git",
    ]


def test_versions_are_in_the_order_of_the_standard() -> None:
    """https://semver.org/spec/v2.0.0.html#spec-item-11"""
    words = ("1.0.0-alpha", "1.0.0-alpha.1", "1.0.0-alpha.beta", "1.0.0-beta", "1.0.0-beta.2", "1.0.0-beta.11")
    order = (*words, "1.0.0-rc.1", "1.0.0", "2.0.0", "2.1.0", "2.1.1", "2.11.0", "10.0.0")
    assert [*order] == sorted(order, key=rank)
    assert all(rank(a) < rank(b) for a, b in itertools.pairwise(order))


@given(st.lists(st.tuples(*[st.integers(0, 10**6)] * 3), min_size=2))
def test_plain_versions_are_in_the_order_of_their_numbers(versions: list[tuple[int, int, int]]) -> None:
    texts = [".".join(map(str, version)) for version in versions]
    assert sorted(texts, key=rank) == [".".join(map(str, version)) for version in sorted(versions)]


def test_this_trees_documents_speak_of_its_version_only() -> None:
    root = SCRIPT.parents[1]
    assert [*NAMES["about_documents"](root, NAMES["missing"](root)[0])] == []
