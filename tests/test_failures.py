"""Every kind of failure, end to end, and the table of what the issue is told then: docs/failures.md.

    PYTHONPATH=.:tests python tests/test_failures.py

writes the table anew; the tests fail when it is not what a run says.
"""

from __future__ import annotations

import itertools
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import DISPATCH, PATCH, TARGET, FastClock, World, open_world
from model import ModelServer, Step, call, say, status
from standin import Fault
from test_task import dispatch_body

import runner as runner_module

PAGE = Path(runner_module.__file__).parent / "docs/failures.md"
HEAD = """\
# Failures and what they mean

What the last comment on an issue says when a task has failed, and what to do. This page is made by a test that has
each of them happen (`tests/test_failures.py`): these are the runner's real words, with the names and numbers of the
test. Below them a comment holds the end of the agent's output, where there is one, and a table with the details.
To run the task again, take the label `agent-failed` off the issue.
"""


@dataclass(frozen=True)
class Case:
    """How a failure comes about: the issue, the runner's settings, a model's answers, and what else is done before."""

    body: str = "Do it."
    env: Mapping[str, str] = field(default_factory=dict)
    script: Callable[[], Iterator[Step]] | None = None
    labels: tuple[str, ...] = ()
    author: str = "OWNER"
    prepare: Callable[[World], object] = lambda world: None


def agent(command: str, **env: str) -> dict[str, str]:
    return {"AGENT_COMMAND": command, "AGENT_SHELL": "yes", **env}


def model(*steps: Step, more: bool = False) -> Callable[[], Iterator[Step]]:
    return lambda: itertools.chain(steps, itertools.repeat(steps[-1])) if more else iter(steps)


def edit_by_a_stranger(world: World) -> None:
    at = world.github.now() + 60
    world.github.now = lambda: at
    world.github.edit_issue(DISPATCH, 1, body="Do something else.", by="mallory")


def branch_of_somebody(world: World) -> None:
    world.github.commit(TARGET, {"x": "x"}, branch="agent-task-issue-1")


def refuse_pulls(world: World) -> None:
    body = {"message": "Validation Failed", "errors": [{"message": "Pull requests are disabled"}]}
    world.github.faults.append(Fault("POST", f"/repos/{TARGET}/pulls", status=422, body=body))


SECTIONS: dict[str, dict[str, Case]] = {
    "The task": {
        "The author may not give work": Case(author="NONE"),
        "A stranger has edited the issue": Case(prepare=edit_by_a_stranger),
        "The instruction is empty": Case(dispatch_body(" ")),
        "The target is not allowed": Case(dispatch_body(target_repo="evil/place")),
        "The base branch is missing": Case(dispatch_body(base="nowhere")),
        "No such agent": Case(env=agent("true", AGENT_COMMAND_CODEX="true"), labels=("agent:fast",)),
        "Two agents": Case(env=agent("true"), labels=("agent:codex", "agent:fast")),
        "The branch is somebody else's": Case(PATCH, prepare=branch_of_somebody),
    },
    "Patches": {
        "No patch": Case(),
        "A patch that does not fit": Case(PATCH.replace("# Widgets", "# Gadgets")),
    },
    "Setup": {
        "The setup fails": Case(env=agent("true", AGENT_SETUP_COMMAND="exit 3")),
        "The setup takes too long": Case(
            env=agent("true", AGENT_SETUP_COMMAND="sleep 99", AGENT_SETUP_TIMEOUT="1", AGENT_MAX_ATTEMPTS="1")
        ),
    },
    "The agent": {
        "It ends with an error": Case(env=agent("exit 3")),
        "It is killed": Case(env=agent("kill -9 $$")),
        "It takes too long": Case(env=agent("touch x; sleep 99", AGENT_TASK_TIMEOUT="1")),
        "It takes too long, and drafts are wanted": Case(
            env=agent("touch x; sleep 99", AGENT_TASK_TIMEOUT="1", AGENT_DRAFT_ON_FAILURE="yes")
        ),
        "It prints nothing": Case(env=agent("sleep 99", AGENT_STALL_SECONDS="1")),
        "It changes nothing": Case(env=agent("true")),
        "It leaves only what git ignores": Case(env=agent("touch .aider.chat.history.md")),
    },
    "The checks": {
        "They fail": Case(env=agent("touch x", AGENT_VERIFY_COMMAND="make test")),
        "They fail, and drafts are wanted": Case(
            env=agent("touch x", AGENT_VERIFY_COMMAND="make test", AGENT_DRAFT_ON_FAILURE="yes")
        ),
        "They take too long": Case(
            env=agent("touch x", AGENT_VERIFY_COMMAND="sleep 99", AGENT_VERIFY_TIMEOUT="1", AGENT_VERIFY_ROUNDS="0")
        ),
    },
    "The change": {
        "Too many files": Case(env=agent("touch a b", AGENT_MAX_CHANGED_FILES="1")),
        "Too large": Case(env=agent("yes | head -c 2000 > x", AGENT_MAX_CHANGED_BYTES="1000")),
        "A workflow": Case(env=agent("mkdir -p .github/workflows; touch .github/workflows/ci.yml")),
        "A secret": Case(env=agent('echo "$API_KEY" > x', AGENT_ENV="API_KEY", API_KEY="s3cret-s3cret")),
        "A link that leads out": Case(env=agent("ln -s /etc/passwd x")),
        "A repository in the repository": Case(env=agent("git init -q inner")),
        "A pipe": Case(env=agent("mkfifo pipe")),
    },
    "A plug-in": {
        "It says no": Case(env={"AGENT_PROCESS_TASK": "raise runner.TaskFailed('Too hard.', 'Ask a friend.')"}),
        "It says later, again and again": Case(env={"AGENT_PROCESS_TASK": "raise runner.TaskRetry('It rains.')"}),
        "It breaks": Case(env={"AGENT_PROCESS_TASK": "1 / 0"}),
        "It returns False": Case(env={"AGENT_PROCESS_TASK": "return False"}),
    },
    "The model of `openai`": {
        "The key is refused": Case(script=model(status(401, message="Incorrect API key provided."))),
        "The model does not exist": Case(script=model(status(404, message="The model `tiny` does not exist."))),
        "The account is empty": Case(
            script=model(status(429, code="insufficient_quota", message="You exceeded your current quota."))
        ),
        "The conversation is too long": Case(
            script=model(status(400, code="context_length_exceeded", message="The context length is 8192 tokens."))
        ),
        "The server stays away": Case(script=model(status(503, message="Overloaded."), more=True)),
        "Too many steps": Case(script=model(call("true"), more=True), env={"AGENT_MAX_STEPS": "3"}),
        "Too many tokens": Case(script=model(call("true"), more=True), env={"AGENT_MAX_TOKENS": "100"}),
        "It never acts": Case(script=model(say("You could do this."), more=True)),
    },
    "GitHub": {
        "It refuses the pull request": Case(PATCH, prepare=refuse_pulls),
    },
}
CASES = {name: case for section in SECTIONS.values() for name, case in section.items()}


def comment_of(world: World, case: Case) -> str:
    """What the issue is told in this case: the text above the output and the table."""
    author = "mallory" if case.author == "NONE" else "octocat"
    world.open(case.body, labels=["copilot-agent", *case.labels], association=case.author, author=author)
    case.prepare(world)
    env = dict(case.env)
    if statement := env.get("AGENT_PROCESS_TASK"):
        file = world.folder / "my_agent.py"
        file.write_text(f"import runner\n\n\ndef process_task(issue):\n    {statement}\n")
        env["AGENT_PROCESS_TASK"] = f"{file}:process_task"
    with ModelServer(case.script() if case.script else ()) as server:
        env |= server.env() if case.script else {}
        world.runner(FastClock(), **env).run_once()
    assert "agent-failed" in world.labels()
    text = world.last_comment().split("\n\n<details>")[0].split("\n\n| | |")[0]
    text = text.replace(world.github.url(TARGET).rsplit("/", 2)[0], "https://github.com")
    return re.sub(r"http://127\.0\.0\.1:\d+(/api)?", "https://github.com", text)


def row(name: str, comment: str) -> str:
    told = comment.replace("\n\nTo run it again, take the label `agent-failed` off this issue.", "")
    return f"| {name} | {told.replace('|', chr(92) + '|').replace(chr(10) * 2, '<br>')} |"


def rows_of(page: str) -> dict[str, str]:
    rows = (line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| What "))
    return {line.split(" | ")[0].removeprefix("| "): line for line in rows}


@pytest.mark.parametrize("name", CASES)
def test_the_page_tells_what_an_issue_is_told(world: World, name: str) -> None:
    comment = comment_of(world, CASES[name])
    assert comment.startswith("**Failed.** ")
    assert "To run it again, take the label `agent-failed` off this issue." in comment
    assert rows_of(PAGE.read_text("utf-8"))[name] == row(name, comment)


def test_the_page_tells_nothing_else() -> None:
    assert [*rows_of(PAGE.read_text("utf-8"))] == [*CASES]


def main() -> None:
    parts = [HEAD]
    for section, cases in SECTIONS.items():
        parts.append(f"\n## {section}\n\n| What happened | What the issue is told |\n|---|---|\n")
        for name, case in cases.items():
            with tempfile.TemporaryDirectory() as folder, open_world(Path(folder)) as world:
                parts.append(row(name, comment_of(world, case)) + "\n")
            print(name, file=sys.stderr)
    PAGE.write_text("".join(parts), "utf-8")


if __name__ == "__main__":
    main()
