"""Whole tasks: from an issue to a pull request, or to a comment that says why not."""

from __future__ import annotations

import json
import os
import re
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest
from conftest import DISPATCH, PATCH, TARGET, TASK_ID, Daemon, FastClock, World, wait_until
from standin import Fault

from runner import Config, Runner

BACKENDS_EXPRESSION = re.compile(r"<!--\s*agent_task_metadata\s+(.*?)\s*-->", re.DOTALL)


def metadata_of(text: str) -> Any:
    """What the back end reads from a text."""
    match = BACKENDS_EXPRESSION.search(text)
    assert match
    return json.loads(match[1])


def dispatch_body(instruction: str = PATCH, target: str = "", **metadata: Any) -> str:
    """A dispatch issue as the back end writes it."""
    metadata = {"task_id": TASK_ID, "user_id": "user-456", "provider": "github_issue_dispatch"} | metadata
    head = f"# Agent Task Delegation\n\n**Task ID:** `{TASK_ID}`\n**User ID:** `user-456`\n\n"
    place = f"**Target:** {target}\n\n" if target else ""
    hidden = f"<!-- agent_task_metadata\n{json.dumps(metadata)}\n-->"
    return f"{head}{place}## Instructions\n\n{instruction}\n\n---\n\n{hidden}\n"


def test_a_happy_task_costs_at_most_eight_requests(world: World) -> None:
    world.open(dispatch_body())
    world.run_once()  # the first task also gives the new labels their colours
    world.open(dispatch_body(task_id="second"))
    before = len(world.requests())
    world.run_once()
    assert len(world.requests()) - before <= 8
    assert world.labels(2) == ["agent-done", "copilot-agent"]


def test_a_dispatch_issue_becomes_a_pull_request(world: World) -> None:
    number = world.open(dispatch_body(), title="Make more widgets")
    world.run_once()
    pull = world.pull()
    assert (pull.title, pull.head, pull.base) == (
        "Agent task: Make more widgets",
        f"agent-task-{TASK_ID}",
        "main",
    )
    assert f"Fixes {DISPATCH}#{number}" in (pull.body or "")
    assert "README.md | 1 +" in (pull.body or "")
    assert world.github.git(TARGET, "show", f"{pull.head}:README.md") == "# Widgets\nMore of them."
    assert world.labels() == ["agent-done", "copilot-agent"]
    start, end = (comment.body for comment in world.issue().comments)
    assert TASK_ID in start
    assert pull.html_url in end
    assert pull.head in end
    assert metadata_of(end) == metadata_of(world.pull_body())


def test_the_commit_says_whose_it_is(world: World) -> None:
    world.open(dispatch_body())
    world.run_once(AGENT_COMMIT_NAME="Robot", AGENT_COMMIT_EMAIL="robot@example.com")
    shown = world.github.git(TARGET, "log", "-1", "--format=%an <%ae>%n%B", world.pull().head)
    assert shown.startswith("Robot <robot@example.com>\nAgent task: Make more widgets\n\n")
    assert f"Task-Id: {TASK_ID}\nDispatch-Issue: {DISPATCH}#1\nRun: " in shown


BACKENDS = {"task_id": TASK_ID, "user_id": "user-456", "provider": "github_issue_dispatch"}
ODD: dict[str, Any] = {"user_id": "a \"quoted\" 'user' --> <!-- `x` \\ \n\t ünï ✓ \u202e"}
MORE: dict[str, Any] = {"extra": {"deep": [1, 2.5, None, True]}, "base": "main"}
LINES = {"task_id": "abc", "user_id": "u1"}
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "the back end's": (dispatch_body(), BACKENDS),
    "with an issue as target": (dispatch_body(target=f"issue `{TARGET}#42`"), BACKENDS),
    "with context elsewhere": (dispatch_body(target="pr `other/place#42`"), BACKENDS),
    "on one line": (
        f'{PATCH}\n<!-- agent_task_metadata {{"task_id": "test-1234-5678-abcd"}} -->',
        {"task_id": "test-1234-5678-abcd"},
    ),
    "singular heading": (
        f"## Instruction\n{PATCH}\nTarget Repository: {TARGET}\n",
        {"task_id": "issue-1"},
    ),
    "lines only": (f"task_id: abc\nuser_id: u1\n\n{PATCH}", LINES),
    "bold lines": (f"**Task ID:** `abc`\n**User ID:** `u1`\n\n{PATCH}", LINES),
    "none": (PATCH, {"task_id": "issue-1"}),
    "quotes and the like": (dispatch_body(**ODD), BACKENDS | ODD),
    "more keys": (dispatch_body(**MORE), BACKENDS | MORE),
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_gives_its_metadata_back(world: World, form: str) -> None:
    body, expected = FORMS[form]
    world.open(body)
    world.run_once()
    assert metadata_of(world.pull_body()) == expected
    assert metadata_of(world.last_comment()) == expected


def test_an_id_that_no_branch_can_have_comes_back_unchanged(world: World) -> None:
    strange = "../../ odd\nid`--> ✓"
    world.open(dispatch_body(task_id=strange))
    world.run_once()
    assert re.fullmatch(r"agent-task-x[0-9a-f]{16}", world.pull().head)
    assert metadata_of(world.pull_body())["task_id"] == strange


def test_a_pull_request_goes_where_the_task_says(world: World) -> None:
    world.github.add_repository("acme/gadgets", files={"README.md": "# Widgets\n"})
    world.github.git("acme/gadgets", "branch", "next", "main")
    world.open(dispatch_body(target_repo="acme/gadgets", base="next"))
    world.run_once(AGENT_ALLOWED_TARGETS="acme/*")
    (pull,) = world.github.pulls("acme/gadgets")
    assert pull.base == "next"
    assert world.github.pulls(TARGET) == []


# -- what can go wrong, told on the issue ----------------------------------------------------------


def failed(world: World, number: int = 1) -> str:
    """The comment of a failed task; that it is one in every respect."""
    labels = [label for label in world.labels(number) if not label.startswith("agent:")]
    assert labels == ["agent-failed", "copilot-agent"]
    comment = world.last_comment(number)
    assert "take the label `agent-failed` off" in comment
    assert world.github.pulls(TARGET) == []
    return comment


def agent(folder: Path, code: str) -> str:
    """AGENT_COMMAND for an agent that is a small Python program."""
    program = folder / "agent.py"
    program.write_text(textwrap.dedent(code))
    return f"{sys.executable} {program}"


BAD_BODIES = {
    "empty instruction": (dispatch_body(" "), "instruction is empty"),
    "no patch": (dispatch_body("Please."), "no ```diff or ```patch block"),
    "patch that does not apply": (
        dispatch_body(PATCH.replace("# Widgets", "# Gadgets")),
        "The patch does not apply",
    ),
    "patch that leads out": (dispatch_body(PATCH.replace("README.md", "../x")), "The patch does not apply"),
    "target not allowed": (dispatch_body(target_repo="evil/place"), "`evil/place`"),
    "target that is no name": (dispatch_body(target_repo="--upload-pack=x"), "`--upload-pack=x`"),
    "base that is not there": (dispatch_body(base="nowhere"), "no branch `nowhere`"),
    "base that is no name": (dispatch_body(base="--output=/x"), "not a valid branch name"),
    "metadata too long": (dispatch_body(user_id="x" * 20_000), "metadata is longer"),
}


@pytest.mark.parametrize("case", BAD_BODIES)
def test_what_is_wrong_with_an_issue_is_told_on_it(world: World, case: str) -> None:
    body, reason = BAD_BODIES[case]
    world.open(body)
    runner = world.run_once()
    assert reason in failed(world)
    assert runner.outcomes == {"failed": 1}


def test_the_default_branch_is_named_when_a_base_is_missing(world: World) -> None:
    world.open(dispatch_body(base="nowhere"))
    world.run_once()
    assert "default branch is `main`" in failed(world)


def test_a_patch_is_known_in_upper_case_too(world: World) -> None:
    world.open(dispatch_body(PATCH.replace("```diff", "``` Patch README")))
    world.run_once()
    assert world.labels() == ["agent-done", "copilot-agent"]


def test_gits_reason_is_shown_when_a_patch_does_not_apply(world: World) -> None:
    world.open(dispatch_body(PATCH.replace("# Widgets", "# Gadgets")))
    world.run_once()
    assert "<details>" in failed(world)
    assert "error: patch failed: README.md:1" in failed(world)


def test_a_target_that_does_not_exist_is_told(world: World) -> None:
    world.open(dispatch_body(target_repo="acme/nowhere"))
    world.run_once(AGENT_ALLOWED_TARGETS="acme/*")
    assert "acme/nowhere cannot be read" in failed(world)


def test_an_empty_target_is_told(world: World) -> None:
    world.github.add_repository("acme/empty", files=None)
    world.open(dispatch_body(target_repo="acme/empty"))
    world.run_once(AGENT_ALLOWED_TARGETS="acme/*")
    assert "acme/empty is empty." in failed(world)


def test_a_stranger_is_refused_and_his_metadata_not_read(world: World) -> None:
    world.open(dispatch_body(target_repo="acme/gadgets"), author="mallory", association="NONE")
    world.run_once(AGENT_ALLOWED_TARGETS="acme/*")
    assert "`mallory` may not give work" in failed(world)
    assert metadata_of(world.last_comment()) == {"task_id": "issue-1"}
    assert {r.path.split(".git/")[0] for r in world.github.log if r.kind == "git"} == {f"/{TARGET}"}


def test_a_listed_author_is_served(world: World) -> None:
    world.open(dispatch_body(), author="handsfree[bot]", association="NONE")
    world.run_once(AGENT_ALLOWED_AUTHORS="someone, HandsFree[bot]")
    assert metadata_of(world.pull_body())["task_id"] == TASK_ID


def test_an_agent_that_changed_nothing_is_told_with_its_output(world: World) -> None:
    world.open("Do something.")
    world.run_once(AGENT_COMMAND="echo I thought about it")
    assert "changed nothing" in failed(world)
    assert "I thought about it" in failed(world)


def test_an_agent_that_fails_is_told_with_its_last_50_lines(world: World) -> None:
    world.open("Do something.")
    code = """
        import sys
        for number in range(80):
            print("line", number, flush=True)
        print("\\x1b[31m```red\\x1b[0m", file=sys.stderr)
        sys.exit(3)
    """
    world.run_once(AGENT_COMMAND=agent(world.home, code))
    comment = failed(world)
    assert "exit status 3" in comment
    shown = comment.split("````text\n")[1].split("\n````")[0].split("\n")
    assert shown == [*(f"line {number}" for number in range(31, 80)), "```red"]


def test_an_agent_that_never_stops_talking_is_heard_to_the_end_only(world: World) -> None:
    world.open("Do something.")
    code = """
        import sys
        for number in range(200):
            sys.stdout.write("x" * 100_000 + "\\n")
        print("the end")
        sys.exit(1)
    """
    world.run_once(AGENT_COMMAND=agent(world.home, code))
    assert "the end" in failed(world)


def test_an_agent_that_is_killed_is_told(world: World) -> None:
    world.open("Do something.")
    world.run_once(AGENT_COMMAND=agent(world.home, "import os; os.kill(os.getpid(), 9)"))
    assert "ended with signal 9" in failed(world)


def test_an_agent_that_takes_too_long_is_ended_with_its_children(world: World) -> None:
    world.open("Do something.")
    code = """
        import subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print("child", child.pid, flush=True)
        time.sleep(600)
    """
    world.run_once(AGENT_COMMAND=agent(world.home, code), AGENT_TASK_TIMEOUT="1")
    comment = failed(world)
    assert "ran out of time (1 s)" in comment
    found = re.search(r"child (\d+)", comment)
    assert found
    assert not alive(int(found[1]))


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_an_instruction_too_long_for_an_argument_is_told(world: World) -> None:
    world.open("é" * 65_000 + " " * 500)
    # One argument may have 128 KiB: https://man7.org/linux/man-pages/man2/execve.2.html
    world.run_once(AGENT_COMMAND="echo {instruction}{instruction}")
    assert "cannot be started: Argument list too long" in failed(world)


def test_a_runner_that_may_not_push_takes_no_issue_and_says_why(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.github.push_denied.add(TARGET)
    world.open(dispatch_body())
    assert world.run_once().outcomes == {"failed": 1}
    assert world.labels() == ["copilot-agent"]
    assert world.issue().comments == []
    assert f"left for later: {TARGET} cannot be read or pushed to" in caplog.text


def test_a_pull_request_that_github_refuses_is_told(world: World) -> None:
    refused = {"message": "Validation Failed", "errors": [{"message": "because of a rule"}]}
    world.github.faults.append(Fault(method="POST", path=".*/pulls", status=422, body=refused))
    world.open(dispatch_body())
    world.run_once()
    assert "because of a rule" in failed(world)


def test_a_failed_task_runs_again_when_its_label_is_taken_off(world: World) -> None:
    world.open(dispatch_body(PATCH.replace("# Widgets", "# Gadgets")))
    world.run_once()
    failed(world)
    world.github.edit_issue(DISPATCH, 1, body=dispatch_body())
    world.github.remove_label(DISPATCH, 1, "agent-failed")
    world.run_once()
    assert world.labels() == ["agent-done", "copilot-agent"]
    assert world.pull().number


def test_long_texts_are_cut_with_a_note(world: World) -> None:
    code = """
        import os
        open("new.txt", "w").write("new")
        open(os.environ["AGENT_SUMMARY_FILE"], "w").write("word " * 40_000)
    """
    world.open("Do something.", title="t" * 256)
    world.run_once(AGENT_COMMAND=agent(world.home, code))
    assert "characters more were left out" in world.pull_body()
    assert len(world.pull_body()) <= 65_536
    assert world.pull().title.endswith("…")


# -- the agent -------------------------------------------------------------------------------------


def test_an_agent_gets_its_task_in_every_way(world: World) -> None:
    world.open(dispatch_body("Write `it` down.\n\nTwice; $HOME."), title="Two words")
    code = """
        import json, os, sys
        names = sorted(n for n in os.environ if n.startswith("AGENT_"))
        told = {"stdin": sys.stdin.read(), "file": open(os.environ["AGENT_TASK_FILE"]).read(),
                "word": sys.argv[1], "named": open(sys.argv[2]).read(), "cwd": sorted(os.listdir("."))}
        told |= {name: os.environ[name] for name in names}
        json.dump(told, open("told.json", "w"))
    """
    command = agent(world.home, code) + " {instruction} {instruction_file}"
    world.run_once(AGENT_COMMAND=command)
    told = json.loads(world.github.git(TARGET, "show", f"{world.pull().head}:told.json"))
    instruction = "Write `it` down.\n\nTwice; $HOME."
    assert told["word"] == instruction
    assert told["stdin"] == told["file"] == told["named"] == instruction + "\n"
    assert told["cwd"] == [".git", "README.md", "src"]
    assert told["AGENT_TASK_ID"] == TASK_ID
    assert told["AGENT_TASK_TITLE"] == "Two words"
    assert told["AGENT_TASK_ISSUE"].endswith(f"/{DISPATCH}/issues/1")
    assert (told["AGENT_TASK_ATTEMPT"], told["AGENT_TASK_BASE"]) == ("1", "main")


def test_an_agent_is_told_what_its_task_is_about(world: World) -> None:
    world.open(dispatch_body("Mend it.", target=f"issue `{TARGET}#42`"))
    world.open(f"Mend it.\n\nTarget: issue `{TARGET}#42`\n\ntask_id: second")
    world.run_once(AGENT_COMMAND="tee told.txt", AGENT_SHELL="yes")
    first, second = (world.github.git(TARGET, "show", f"{pull.head}:told.txt") for pull in world.github.pulls(TARGET))
    assert first == f"Mend it.\n\nTarget: issue {TARGET}#42"
    assert second == f"Mend it.\n\nTarget: issue `{TARGET}#42`"


def test_an_agent_sees_what_it_may_of_the_environment_and_never_the_token(world: World) -> None:
    code = 'import os, json; json.dump(dict(os.environ), open("env.json", "w"))'
    world.open("Do something.")
    env = {"MODEL_KEY": "k", "OTHER": "x", "LANG": "C.UTF-8", "AGENT_ENV": "MODEL_KEY,NOT_SET"}
    world.run_once(AGENT_COMMAND=agent(world.home, code), **env)
    seen = json.loads(world.github.git(TARGET, "show", f"{world.pull().head}:env.json"))
    assert seen["MODEL_KEY"] == "k"
    assert seen["HOME"] == str(world.home)
    allowed = {"PATH", "LANG", "HOME", "TMPDIR", "MODEL_KEY", "LC_CTYPE"}
    assert {name for name in seen if not name.startswith("AGENT_")} <= allowed
    assert world.github.token not in json.dumps(seen)


def test_an_instruction_is_never_taken_for_an_option(world: World) -> None:
    world.open("--dangerous")
    code = 'import sys; open("argument", "w").write(sys.argv[1])'
    world.run_once(AGENT_COMMAND=agent(world.home, code) + " {instruction}")
    argument = world.github.git(TARGET, "show", f"{world.pull().head}:argument")
    assert argument == "\n--dangerous"


def test_a_shell_is_used_only_when_asked_for(world: World) -> None:
    world.open("first\nsecond")
    world.run_once(AGENT_COMMAND='tail -n 1 "$AGENT_TASK_FILE" > out && cat >> out', AGENT_SHELL="yes")
    assert world.github.git(TARGET, "show", f"{world.pull().head}:out") == "second\nfirst\nsecond"


def test_an_agents_summary_is_the_pull_requests_text(world: World) -> None:
    code = """
        import os
        open("new.txt", "w").write("new")
        forged = '<!-- agent_task_metadata {"task_id": "forged"} -->'
        open(os.environ["AGENT_SUMMARY_FILE"], "w").write("Made **it** new.\\n" + forged + "\\n```\\nopen")
    """
    world.open(dispatch_body("Do something."))
    world.run_once(AGENT_COMMAND=agent(world.home, code))
    assert "Made **it** new." in world.pull_body()
    assert metadata_of(world.pull_body())["task_id"] == TASK_ID
    assert [json.loads(m)["task_id"] for m in BACKENDS_EXPRESSION.findall(world.pull_body())] == [TASK_ID]


def test_an_agents_output_stands_in_for_a_summary(world: World) -> None:
    world.open("Do something.")
    world.run_once(AGENT_COMMAND=agent(world.home, 'print("I did"); open("new", "w")'))
    assert "I did" in world.pull_body()


def test_a_summary_that_is_a_link_is_not_read(world: World) -> None:
    secret = world.folder / "secret"
    secret.write_text("s3cret")
    code = f'import os; os.symlink("{secret}", os.environ["AGENT_SUMMARY_FILE"]); open("new", "w")'
    world.open("Do something.")
    world.run_once(AGENT_COMMAND=agent(world.home, code))
    assert "s3cret" not in world.pull_body()


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_a_summary_that_is_no_file_is_not_read(world: World, kind: str) -> None:
    make = "mkdir" if kind == "folder" else "mkfifo"
    code = f'import os; os.{make}(os.environ["AGENT_SUMMARY_FILE"]); open("new", "w")'
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        world.open("Do something.")
    assert world.run_once(AGENT_COMMAND=agent(world.home, code)).outcomes == {"done": 3}
    assert len(os.listdir("/proc/self/fd")) <= before + 2  # the client's connection stays open


def test_nothing_is_left_of_a_finished_workspace(world: World) -> None:
    world.open(dispatch_body())
    world.open("No patch.")
    world.run_once()
    assert [path.name for path in (world.folder / "state/work").iterdir()] == ["0.lock"]


# -- plug-ins --------------------------------------------------------------------------------------


def plugin(folder: Path, code: str) -> str:
    file = folder / "my_agent.py"
    file.write_text(textwrap.dedent(code))
    return f"{file}:process_task"


def test_a_plugin_changes_files_and_returns_a_summary(world: World) -> None:
    code = """
        from runner import Task, Workspace

        def process_task(task: Task, workspace: Workspace) -> str:
            text = f"{task.instruction} {task.reference} {workspace.base} {workspace.commit}"
            (workspace.path / "new.txt").write_text(text)
            return "A *summary*."
    """
    world.open(dispatch_body("Do something."))
    world.run_once(AGENT_PROCESS_TASK=plugin(world.home, code))
    assert "A *summary*." in world.pull_body()
    written = world.github.git(TARGET, "show", f"{world.pull().head}:new.txt")
    base = world.github.git(TARGET, "rev-parse", "main").strip()
    assert written == f"Do something. {DISPATCH}#1 main {base}"


def test_a_plugin_of_the_first_runners_form_works(world: World) -> None:
    code = """
        import pathlib

        def process_task(issue) -> bool:
            pathlib.Path("new.txt").write_text(issue["title"])
            return True
    """
    world.open(title="From the title")
    world.run_once(AGENT_PROCESS_TASK=plugin(world.home, code))
    assert world.github.git(TARGET, "show", f"{world.pull().head}:new.txt") == "From the title"


def test_a_plugin_can_be_a_module(world: World) -> None:
    (world.home / "package").mkdir()
    plugin(world.home / "package", 'def process_task(task, workspace): open("new", "w")')
    world.open("Do something.")
    env = {"PYTHONPATH": str(world.home), "AGENT_ENV": "PYTHONPATH"}
    world.run_once(AGENT_PROCESS_TASK="package.my_agent:process_task", **env)
    assert world.labels() == ["agent-done", "copilot-agent"]


PLUGIN_FAILURES = {
    "sys.exit(0)": ("raise SystemExit(0)", "raised SystemExit"),
    "False": ("return False", "says that it did not work"),
    "TaskFailed": ("raise runner.TaskFailed('Too hard.', 'Ask a friend.')", "Too hard. Ask a friend."),
    "an exception": ("print('before'); 1 / 0", "raised ZeroDivisionError"),
    "an exit": ("os._exit(4)", "ended with status 4 before it had returned"),
}


@pytest.mark.parametrize("case", PLUGIN_FAILURES)
def test_what_a_plugin_has_to_say_is_told(world: World, case: str) -> None:
    statement, reason = PLUGIN_FAILURES[case]
    world.open("Do something.")
    code = f"import os, runner\ndef process_task(issue): {statement}"
    world.run_once(AGENT_PROCESS_TASK=plugin(world.home, code))
    assert reason in failed(world)


def test_a_plugin_does_not_have_the_token(world: World) -> None:
    code = 'import os\ndef process_task(task, workspace): open("env", "w").write(repr(os.environ))'
    world.open("Do something.")
    world.run_once(AGENT_PROCESS_TASK=plugin(world.home, code))
    seen = world.github.git(TARGET, "show", f"{world.pull().head}:env")
    assert world.github.token not in seen
    assert "AGENT_TASK_ID" in seen


# -- again, and adopted ----------------------------------------------------------------------------


def retried(world: World, code: str, **env: str) -> Runner:
    runner = world.runner(FastClock(), AGENT_PROCESS_TASK=plugin(world.home, code), **env)
    runner.run_once()
    return runner


RETRY = "import runner\ndef process_task(task, workspace):\n"


def test_a_task_that_may_succeed_later_is_tried_again(world: World) -> None:
    world.open("Do something.")
    code = RETRY + "    if task.attempt < 3: raise runner.TaskRetry('model is busy')\n    open('new', 'w')"
    runner = retried(world, code)
    assert runner.outcomes == {"done": 1}
    assert len(world.issue().comments) == 2
    assert "| Attempt | 3 |" in world.last_comment()


def test_a_task_is_tried_only_so_often(world: World) -> None:
    world.open("Do something.")
    retried(world, RETRY + "    raise runner.TaskRetry('model is busy')", AGENT_MAX_ATTEMPTS="2")
    assert "model is busy (2 attempts)" in failed(world)


def test_another_try_is_announced(world: World) -> None:
    world.open("Do something.")
    spec = plugin(world.home, RETRY + "    raise runner.TaskRetry('model is busy')")
    runner = world.runner(AGENT_PROCESS_TASK=spec)
    while not runner._again:
        runner.tick()
        runner.wake.wait(0.1)
    comment = world.last_comment()
    assert "Attempt 1 did not work out: model is busy" in comment
    assert re.search(r"again in (2|3)\d s", comment)
    runner.request_stop()
    runner._drain()
    assert world.labels() == ["copilot-agent"]
    assert "queued" in world.last_comment()


def test_a_branch_whose_run_was_never_ended_is_finished_without_the_agent(world: World) -> None:
    world.open(dispatch_body())
    world.run_once()
    pushed = world.github.git(TARGET, "rev-parse", f"agent-task-{TASK_ID}")
    del world.github.repository(TARGET).issues[world.pull().number]
    world.issue().comments.pop()
    world.github.remove_label(DISPATCH, 1, "agent-done")
    world.run_once()
    assert world.github.git(TARGET, "rev-parse", f"agent-task-{TASK_ID}") == pushed
    assert "README.md | 1 +" in world.pull_body()
    assert metadata_of(world.pull_body())["task_id"] == TASK_ID
    assert world.labels() == ["agent-done", "copilot-agent"]


def again(world: World, label: str = "agent-done") -> Runner:
    """Takes a label off, so that the task runs again; the agent writes another file then."""
    world.github.remove_label(DISPATCH, 1, label)
    return world.run_once(AGENT_COMMAND="cp /proc/uptime new.txt")


def test_a_finished_task_whose_label_is_taken_off_runs_again_and_updates_its_pull_request(world: World) -> None:
    world.open(dispatch_body())
    world.run_once()
    first = world.github.git(TARGET, "rev-parse", world.pull().head)
    assert again(world).outcomes == {"done": 1}
    assert world.github.git(TARGET, "rev-parse", world.pull().head) != first
    assert world.github.git(TARGET, "rev-parse", f"{world.pull().head}^", "main").split("\n")[0] in first + (
        world.github.git(TARGET, "rev-parse", "main")
    )
    assert "new.txt" in world.pull_body()
    assert "README.md" not in world.pull_body()
    assert metadata_of(world.pull_body())["task_id"] == TASK_ID
    assert [c.body.split(":")[0] for c in world.issue().comments] == ["Working on it", "Done"] * 2
    assert world.labels() == ["agent-done", "copilot-agent"]


def test_a_closed_pull_request_is_followed_by_a_new_one(world: World) -> None:
    world.open(dispatch_body())
    world.run_once()
    world.github.close_issue(TARGET, world.pull().number)
    assert again(world).outcomes == {"done": 1}
    first, second = world.github.pulls(TARGET)
    assert (first.state, second.state, first.head) == ("closed", "open", second.head)
    assert second.html_url in world.last_comment()


def test_commits_of_a_person_on_the_branch_are_not_replaced(world: World) -> None:
    world.open(dispatch_body())
    world.run_once()
    head = world.pull().head
    world.github.commit(TARGET, {"fix.txt": "by hand\n"}, branch=head)
    tip = world.github.git(TARGET, "rev-parse", head)
    assert again(world).outcomes == {"failed": 1}
    assert "Somebody has added commits" in world.last_comment()
    assert world.github.git(TARGET, "rev-parse", head) == tip


def test_a_task_that_failed_after_its_push_runs_again_on_the_same_branch(world: World) -> None:
    world.github.faults.append(Fault(method="POST", path=".*/pulls", status=403))
    world.open(dispatch_body())
    assert world.run_once().outcomes == {"failed": 1}
    assert again(world, "agent-failed").outcomes == {"done": 1}
    assert "new.txt" in world.pull_body()


def test_a_pull_request_that_an_earlier_run_opened_is_adopted(world: World) -> None:
    world.open(dispatch_body())
    world.run_once()
    world.issue().comments.pop()
    world.github.remove_label(DISPATCH, 1, "agent-done")
    world.run_once()
    assert world.pull().html_url in world.last_comment()
    assert world.labels() == ["agent-done", "copilot-agent"]


def test_a_branch_of_another_issue_is_not_touched(world: World) -> None:
    world.open(dispatch_body())
    world.run_once()
    head = world.github.git(TARGET, "rev-parse", world.pull().head)
    world.open(dispatch_body())
    world.run_once()
    assert world.labels(2) == ["agent-failed", "copilot-agent"]
    assert f"of {DISPATCH}#1" in world.last_comment(2)
    assert world.github.git(TARGET, "rev-parse", world.pull().head) == head


def test_a_branch_that_a_person_made_is_not_touched(world: World) -> None:
    world.github.git(TARGET, "branch", f"agent-task-{TASK_ID}", "main")
    world.open(dispatch_body())
    world.run_once()
    assert "of somebody else" in failed(world)


def test_an_answer_that_was_lost_makes_nothing_twice(world: World) -> None:
    world.github.faults += [Fault(method=method, drop="after") for method in ("POST", "PATCH", "DELETE")]
    world.github.faults.append(Fault(kind="git", path=".*receive-pack", method="POST", drop="after"))
    world.open(dispatch_body())
    runner = world.runner(FastClock())
    runner.run_once()
    assert runner.outcomes == {"done": 1}
    assert len(world.issue().comments) == 2
    assert world.pull().number


def test_a_minute_without_github_loses_no_work(world: World) -> None:
    runs = world.home / "runs"
    world.open("Do something.")
    code = f'open("new", "w"); open("{runs}", "a").write("x")'
    world.github.faults += [
        Fault(kind="git", path=".*receive-pack", status=503, times=4),
        Fault(method="POST", path=".*/pulls", status=502, times=4),
    ]
    runner = world.runner(FastClock(), AGENT_COMMAND=agent(world.home, code))
    runner.run_once()
    assert runner.outcomes == {"done": 1}
    assert runs.read_text() == "x"


# -- not to be run ---------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["close_issue", "finish", "unlabel"])
def test_an_issue_that_is_not_queued_any_more_is_left_alone(world: World, change: str) -> None:
    number = world.open(dispatch_body())
    changes = {
        "close_issue": lambda: world.github.close_issue(DISPATCH, number),
        "finish": lambda: world.github.add_label(DISPATCH, number, "agent-done"),
        "unlabel": lambda: world.github.remove_label(DISPATCH, number, "copilot-agent"),
    }
    world.github.faults.append(Fault(path=f".*/issues/{number}", action=changes[change]))
    runner = world.run_once()
    assert runner.outcomes == {"skipped": 1}
    assert world.issue(number).comments == []


def test_a_fault_of_the_runner_is_told_too(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.process_task", lambda work: 1 / 0)
    world.open(dispatch_body())
    world.run_once()
    assert "The runner met a fault" in failed(world)


def test_what_cannot_be_told_does_not_stop_the_others(world: World) -> None:
    world.open(dispatch_body())
    world.open(dispatch_body(task_id="second"))
    world.github.faults.append(Fault(method="POST", path=".*/issues/1/labels", status=403, times=None))
    runner = world.run_once()
    assert runner.outcomes == {"failed": 1, "done": 1}
    assert world.labels(2) == ["agent-done", "copilot-agent"]


def polls(runner: Runner, count: int) -> None:
    """So many polls, each with the work that comes of it."""
    for _ in range(count):
        runner.queue.poll()
        runner._next_look = 0
        runner._look_around()
        runner._admit()
        while runner._running:
            runner.wake.wait(0.1)
            runner._collect()
            runner._admit()


def test_a_runner_that_may_not_label_does_not_comment_and_goes_on_when_it_may(world: World) -> None:
    world.open("No patch.")
    world.open(dispatch_body(), author="mallory", association="NONE")
    world.github.faults.append(Fault(method="POST", path=".*/labels", status=403, times=None))
    runner = world.runner()
    polls(runner, 3)
    assert world.issue(1).comments == world.issue(2).comments == []
    world.github.faults.clear()
    polls(runner, 1)
    assert world.labels(1) == world.labels(2) == ["agent-failed", "copilot-agent"]
    runner.request_stop()
    runner._drain()


@pytest.mark.parametrize("status", [401, 403, 404])
def test_an_issue_that_could_not_be_read_once_is_run_with_the_next_poll(world: World, status: int) -> None:
    world.open(dispatch_body())
    world.github.faults.append(Fault(path=".*/issues/1", status=status))
    runner = world.runner()
    polls(runner, 2)
    runner.request_stop()
    runner._drain()
    assert world.labels() == ["agent-done", "copilot-agent"]


def test_work_goes_on_in_a_renamed_dispatch_repository(world: World) -> None:
    world.open(dispatch_body())
    world.github.repository(DISPATCH).moved_to = "acme/renamed"
    runner = world.run_once()
    assert runner.outcomes == {"done": 1}


def test_a_task_whose_end_could_not_be_told_is_ended_later(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.open("No patch.")
    comments = Fault(method="POST", path=".*/issues/1/comments", status=502, after=1, times=None)
    world.github.faults.append(comments)
    with Daemon(world.runner(FastClock(), AGENT_LEASE="1500")) as daemon:
        wait_until(lambda: "left for later" in caplog.text)
        world.github.faults.clear()
        wait_until(lambda: "agent-failed" in world.labels())
        daemon.end()
    assert world.labels() == ["agent-failed", "copilot-agent"]
    assert "no ```diff" in world.last_comment()
    assert "Attempt | 2" in world.last_comment()


def test_the_end_is_told_once_although_the_labels_took_long(world: World) -> None:
    world.open(dispatch_body())
    labels = Fault(method="POST", path=".*/issues/1/labels", status=502, after=1, times=11)
    world.github.faults.append(labels)
    with Daemon(world.runner(FastClock())) as daemon:
        wait_until(lambda: daemon.runner.outcomes)
        daemon.end()
    assert labels.seen > 12
    assert daemon.runner.outcomes["done"] == 1
    assert len([c for c in world.issue().comments if c.body.startswith("Done")]) == 1


def test_a_deleted_progress_comment_does_no_harm(world: World) -> None:
    world.open("Do something.")
    world.github.faults.append(Fault(method="PATCH", path=".*/comments/.*", status=404, times=None))
    code = RETRY + "    if task.attempt < 2: raise runner.TaskRetry('busy')\n    open('new', 'w')"
    assert retried(world, code).outcomes == {"done": 1}


def test_a_locked_conversation_gets_its_labels(world: World) -> None:
    world.open(dispatch_body())
    world.github.faults.append(Fault(method="POST", path=".*/comments", status=403, times=None))
    assert world.run_once().outcomes == {"done": 1}
    assert world.labels() == ["agent-done", "copilot-agent"]
    assert world.pull().number


def test_a_token_that_an_agent_tells_is_masked(world: World) -> None:
    code = f'print("found {world.github.token} and s3cret-model-key"); open("new", "w")'
    world.open("Do something.")
    env = {"MODEL_KEY": "s3cret-model-key", "AGENT_ENV": "MODEL_KEY"}
    world.run_once(AGENT_COMMAND=agent(world.home, code), **env)
    assert "found *** and ***" in world.pull_body()


@pytest.mark.parametrize("change", ["close_issue", "unlabel"])
def test_an_issue_that_is_taken_back_between_two_attempts_is_let_go(world: World, change: str) -> None:
    number = world.open("Do something.")
    changes = {
        "close_issue": lambda: world.github.close_issue(DISPATCH, number),
        "unlabel": lambda: world.github.remove_label(DISPATCH, number, "copilot-agent"),
    }
    world.github.faults.append(Fault(method="GET", path=f".*/issues/{number}", after=1, action=changes[change]))
    runner = retried(world, RETRY + "    raise runner.TaskRetry('model is busy')")
    assert runner.outcomes == {"skipped": 1}
    assert "agent-processing" not in world.labels()
    assert "not tried again" in world.last_comment()


def test_the_same_process_runs_many_tasks_at_once(world: World, config: Config) -> None:
    barrier = world.home / "barrier"
    barrier.mkdir()
    code = f"""
        import os, pathlib, time
        me = os.environ["AGENT_TASK_ID"]
        pathlib.Path("{barrier}", me).touch()
        while len(os.listdir("{barrier}")) < 4:
            time.sleep(0.01)
        open(me, "w")
    """
    for number in range(4):
        world.open(dispatch_body("Do something.", task_id=f"t{number}"))
    command = agent(world.home, code)
    runner = world.run_once(AGENT_COMMAND=command, AGENT_MAX_CONCURRENT="4", AGENT_TASK_TIMEOUT="60")
    assert runner.outcomes == {"done": 4}
    assert threading.active_count() < 20
