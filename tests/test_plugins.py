"""The plug-ins of docs/plugins.md, run by the runner."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TARGET, FastClock, World
from model import ModelServer, say, status
from openapi_check import check_request
from standin import StandIn
from test_docs import ROOT, fences
from test_task import dispatch_body, failed

PAGE = ROOT / "docs/plugins.md"
GIVEN = {"AGENT_ENV": "OPENAI_API_KEY,OPENAI_BASE_URL,PLUGIN_MODEL", "PLUGIN_MODEL": "standin-model"}
NAMES = ("wish", "issue alone", "bump", "PyGithub", "openai")


@pytest.fixture
def plugin(world: World) -> Callable[[str], str]:
    """AGENT_PROCESS_TASK for a plug-in of the page."""
    sources = dict(zip(NAMES, fences(PAGE, "python"), strict=True))

    def write(name: str) -> str:
        (world.folder / "my_agent.py").write_text(sources[name], "utf-8")
        return f"{world.folder / 'my_agent.py'}:process_task"

    return write


def show(world: World, file: str) -> str:
    return world.github.git(TARGET, "show", f"{world.pull().head}:{file}")


def test_the_wish_is_written_down(world: World, plugin: Callable[[str], str]) -> None:
    world.open("Please.", title="A pony")
    world.run_once(AGENT_PROCESS_TASK=plugin("wish"))
    assert show(world, "WISHES.md") == "- A pony"
    assert "Wrote the wish down." in world.pull_body()


def test_what_the_plugin_does_not_do_it_says(world: World, plugin: Callable[[str], str]) -> None:
    world.open("Delete everything!")
    world.run_once(AGENT_PROCESS_TASK=plugin("wish"))
    assert "I do not do that." in failed(world)


def test_a_frozen_project_is_tried_again(world: World, plugin: Callable[[str], str]) -> None:
    world.github.commit(TARGET, {"FROZEN": ""})
    world.open("Please.")
    world.runner(FastClock(), AGENT_PROCESS_TASK=plugin("wish")).run_once()
    assert "The project is frozen. (3 attempts)" in failed(world)


def test_the_issue_alone_is_enough(world: World, plugin: Callable[[str], str]) -> None:
    world.open("Please.", title="A pony")
    world.run_once(AGENT_PROCESS_TASK=plugin("issue alone"))
    assert show(world, "WISH.md") == "A pony"


def test_a_dependency_is_bumped(world: World, plugin: Callable[[str], str]) -> None:
    world.github.commit(TARGET, {"requirements.txt": "Requests==2.31.0\nrequests-mock==1.0\n"})
    world.open("Please bump requests to 2.32.4.")
    world.run_once(AGENT_PROCESS_TASK=plugin("bump"))
    assert show(world, "requirements.txt") == "requests==2.32.4\nrequests-mock==1.0"
    assert "Bumped `requests` to `2.32.4`." in world.pull_body()


@pytest.mark.parametrize(
    ("files", "instruction", "why"),
    [
        ({}, "Upgrade it all.", "Write: bump PACKAGE to VERSION."),
        ({}, "bump x to 1", "There is no requirements.txt."),
        ({"requirements.txt": "y==1\n"}, "bump x to 1.2", "requirements.txt does not pin x."),
    ],
)
def test_what_cannot_be_bumped_is_told(
    world: World, plugin: Callable[[str], str], files: dict[str, str], instruction: str, why: str
) -> None:
    if files:
        world.github.commit(TARGET, files)
    world.open(instruction)
    world.run_once(AGENT_PROCESS_TASK=plugin("bump"))
    assert why in failed(world)


def test_a_plugin_reads_other_issues_with_a_token_of_its_own(
    world: World, plugin: Callable[[str], str], tmp_path: Path
) -> None:
    with StandIn(tmp_path / "other", check=check_request) as other:
        other.add_repository("acme/notes")
        other.token = "the-plugins-own"
        number = other.open_issue("acme/notes", title="A remark", body="Widgets are blue.")
        world.open(dispatch_body(f"Write down #{number}.", read_from="acme/notes"))
        env = {"PLUGIN_GITHUB_TOKEN": other.token, "PLUGIN_GITHUB_URL": other.api_url}
        world.run_once(AGENT_PROCESS_TASK=plugin("PyGithub"), AGENT_ENV=",".join(env), **env)
        # The library leaves out headers that GitHub only recommends.
        assert all("Accept" in problem or "Version" in problem for problem in other.problems)
    assert show(world, f"notes/{number}.md") == "# A remark\n\nWidgets are blue."
    assert world.github.token not in json.dumps([request.headers for request in other.requests("rest")])


def test_the_readme_is_rewritten_by_a_model(world: World, plugin: Callable[[str], str]) -> None:
    world.open("Make it louder.")
    with ModelServer([say("# WIDGETS!\n")]) as model:
        env = {**model.env(), **GIVEN}
        world.run_once(AGENT_PROCESS_TASK=plugin("openai"), **env)
    assert model.problems == []
    assert show(world, "README.md") == "# WIDGETS!"
    assert "# Widgets" in model.requests[0]["messages"][0]["content"]


def test_a_model_that_is_too_busy_is_tried_again(world: World, plugin: Callable[[str], str]) -> None:
    world.open("Make it louder.")
    busy = [status(429, retry_after=0)] * 3  # as often as the package asks
    with ModelServer([*busy, say("# WIDGETS!\n")]) as model:
        env = {**model.env(), **GIVEN}
        world.runner(FastClock(), AGENT_PROCESS_TASK=plugin("openai"), **env).run_once()
    assert "| Attempt | 2 |" in world.pull_body()
