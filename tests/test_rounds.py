"""What is done around the agent: setup before it, checks after it, and what becomes of work that is not finished."""

from __future__ import annotations

import re
import subprocess
import threading

import pytest
from conftest import DISPATCH, TARGET, FastClock, World, wait_until
from standin import Fault
from test_task import agent, failed, metadata_of
from test_workspace import Place, write

PATCHED = "What there is so far is on the runner's machine: `logs/1-1.patch` in its state folder."


def changed(world: World) -> list[str]:
    """The files of the pull request, with how they were changed."""
    return world.github.git(TARGET, "diff", "--name-status", f"main...{world.pull().head}").splitlines()


def show(world: World, file: str) -> str:
    return world.github.git(TARGET, "show", f"{world.pull().head}:{file}")


# -- Setup --------------------------------------------------------------------------------------------


def test_the_setup_runs_before_the_agent_and_in_its_place(world: World) -> None:
    world.open("Do it.")
    world.run_once(
        AGENT_SETUP_COMMAND='echo "$AGENT_TASK_ID $HOME" > "$TMPDIR/ready"',
        AGENT_COMMAND='cp "$TMPDIR/ready" told',
        AGENT_SHELL="yes",
    )
    assert show(world, "told") == f"issue-1 {world.home}"


def test_what_the_setup_leaves_is_not_the_agents_change(world: World) -> None:
    world.github.commit(TARGET, {"lock.txt": "one\n", "other.txt": "one\n", "gone.txt": "one\n", "kept/a.txt": "a\n"})
    setup = """
        mkdir -p deps/inner '#odd [name]' kept
        touch deps/inner/x '#odd [name]/x' '!x' kept/new.txt '*'
        echo two > lock.txt; echo two > other.txt; rm gone.txt
    """
    world.open("Do it.")
    world.run_once(
        AGENT_SETUP_COMMAND=setup,
        AGENT_COMMAND="touch deps/later mine.txt kept/mine.txt; echo three > other.txt",
        AGENT_SHELL="yes",
    )
    assert changed(world) == ["A\tkept/mine.txt", "A\tmine.txt", "M\tother.txt"]
    assert show(world, "other.txt") == "three"
    assert show(world, "lock.txt") == "one"


def test_an_agent_that_changed_nothing_is_not_saved_by_the_setup(world: World) -> None:
    world.open("Do it.")
    world.run_once(AGENT_SETUP_COMMAND="touch new; echo two >> README.md", AGENT_COMMAND="true")
    assert "The agent changed nothing." in failed(world)


def test_a_repository_that_the_setup_brings_does_not_matter(world: World) -> None:
    world.open("Do it.")
    world.run_once(AGENT_SETUP_COMMAND="git init -q vendored && mkfifo pipe", AGENT_COMMAND="touch mine.txt")
    assert changed(world) == ["A\tmine.txt"]


def test_a_setup_that_fails_is_told_apart_from_the_agent_and_tried_again(world: World) -> None:
    world.open("Do it.")
    runner = world.runner(FastClock(), AGENT_SETUP_COMMAND="echo no network >&2; exit 7", AGENT_COMMAND="touch x")
    runner.run_once()
    comment = failed(world)
    assert "**Failed.** The setup command ended with exit status 7. (3 attempts)" in comment
    assert "no network" in comment
    assert runner.outcomes == {"failed": 1}


def test_a_setup_that_takes_too_long_is_ended(world: World) -> None:
    world.open("Do it.")
    env = {"AGENT_SETUP_COMMAND": "sleep 15", "AGENT_SETUP_TIMEOUT": "1", "AGENT_MAX_ATTEMPTS": "1"}
    world.run_once(AGENT_COMMAND="touch x", **env)
    assert "The setup command ran out of time (1 s)." in failed(world)


def test_the_setup_is_held_by_the_same_walls(world: World) -> None:
    world.open("Do it.")
    setup = 'env > "$HOME/env"'
    world.run_once(AGENT_SETUP_COMMAND=setup, AGENT_COMMAND="touch x", AGENT_ENV="GIVEN", GIVEN="yes", OTHER="no")
    seen = (world.home / "env").read_text()
    assert "GIVEN=yes" in seen
    assert "OTHER" not in seen
    assert world.github.token not in seen


# -- Checks -------------------------------------------------------------------------------------------

MENDS = """
    import os, sys
    told = sys.stdin.read()
    with open("rounds.txt", "a") as rounds:
        rounds.write(told)
    open("state.txt", "w").write("good" if "The checks failed" in told else "bad")
    open(os.environ["AGENT_SUMMARY_FILE"], "w").write("Mended." if "The checks failed" in told else "Tried.")
"""
CHECK = "echo report > report.txt; cat state.txt; grep -q good state.txt"


@pytest.fixture
def prompt(world: World) -> World:
    """An agent that is told why its work was not good."""
    (world.folder / "prompt.md").write_text("{instruction}\nBefore: {failure}\n")
    return world


def test_checks_that_pass_cost_no_second_round(prompt: World) -> None:
    prompt.open("Do it.")
    prompt.run_once(AGENT_COMMAND="touch x", AGENT_VERIFY_COMMAND="test -e x")
    assert changed(prompt) == ["A\tx"]
    assert "| Checks | `test -e x` passed, round 1 |" in prompt.pull_body()
    assert prompt.pull().draft is False


def test_what_the_checks_say_goes_back_to_the_agent(prompt: World) -> None:
    prompt.open("Do it.")
    prompt.run_once(AGENT_COMMAND=agent(prompt.home, MENDS), AGENT_VERIFY_COMMAND=CHECK)
    assert changed(prompt) == ["A\trounds.txt", "A\tstate.txt"]  # and no report
    assert "The checks failed: `echo report > report.txt" in show(prompt, "rounds.txt")
    assert show(prompt, "rounds.txt").endswith("ended with exit status 1.\n\nbad")
    assert "Mended." in prompt.pull_body()
    assert "passed, round 2 |" in prompt.pull_body()
    assert prompt.labels() == ["agent-done", "copilot-agent"]


def test_without_rounds_the_first_failure_is_the_last(prompt: World) -> None:
    prompt.open("Do it.")
    prompt.run_once(AGENT_COMMAND=agent(prompt.home, MENDS), AGENT_VERIFY_COMMAND=CHECK, AGENT_VERIFY_ROUNDS="0")
    comment = failed(prompt)
    assert "**Failed.** The checks failed: `echo report > report.txt" in comment
    assert "ended with exit status 1." in comment
    assert "```text\nbad\n```" in comment
    assert PATCHED in comment
    assert "failed, round 1 |" in comment


def test_checks_that_never_pass_end_the_task(prompt: World) -> None:
    prompt.open("Do it.")
    prompt.run_once(AGENT_COMMAND="touch x", AGENT_VERIFY_COMMAND="echo never; false", AGENT_VERIFY_ROUNDS="2")
    assert "failed, round 3 |" in failed(prompt)


def test_checks_that_take_too_long_fail(prompt: World) -> None:
    prompt.open("Do it.")
    env = {"AGENT_VERIFY_TIMEOUT": "1", "AGENT_VERIFY_ROUNDS": "0"}
    prompt.run_once(AGENT_COMMAND="touch x", AGENT_VERIFY_COMMAND="sleep 15", **env)
    assert "`sleep 15` ran out of time (1 s)." in failed(prompt)


def test_what_the_checks_change_is_not_published(prompt: World) -> None:
    prompt.open("Do it.")
    prompt.run_once(AGENT_COMMAND="touch x", AGENT_VERIFY_COMMAND="echo more >> README.md; echo y > x; touch z")
    assert changed(prompt) == ["A\tx"]
    assert show(prompt, "x") == ""


def test_nothing_is_checked_if_nothing_was_changed(prompt: World) -> None:
    prompt.open("Do it.")
    prompt.run_once(AGENT_COMMAND="true", AGENT_VERIFY_COMMAND='touch "$HOME/checked"')
    assert "changed nothing" in failed(prompt)
    assert not (prompt.home / "checked").exists()


def test_what_must_not_be_published_is_refused_before_the_checks(prompt: World) -> None:
    prompt.open("Do it.")
    prompt.run_once(AGENT_COMMAND="ln -s /etc/passwd x", AGENT_VERIFY_COMMAND='touch "$HOME/checked"')
    assert "leads out of the repository" in failed(prompt)
    assert not (prompt.home / "checked").exists()


def test_checks_work_with_patches_too(world: World) -> None:
    world.open()
    world.run_once(AGENT_VERIFY_COMMAND="grep -q More README.md")
    assert "passed, round 1 |" in world.pull_body()


# -- Work that is not finished ------------------------------------------------------------------------

HALF = """
    import time
    open("half.txt", "w").write("half")
    print("half done", flush=True)
    time.sleep(600)
"""


def drafted(world: World, why: str) -> str:
    """The last comment of a task that failed, and left a draft that says why."""
    pull, comment = world.pull(), world.last_comment()
    assert pull.draft is True
    assert world.labels() == ["agent-failed", "copilot-agent"]
    assert f"**Failed.** {why}" in comment
    assert f"What there is so far is in a draft: {pull.html_url}" in comment
    assert "take the label `agent-failed` off" in comment
    assert f"> [!WARNING]\n> **Not finished.** {why}" in world.pull_body()
    assert metadata_of(world.pull_body()) == metadata_of(comment)
    return comment


def test_checks_that_fail_leave_a_draft(prompt: World) -> None:
    prompt.open("Do it.")
    command = "echo 3 tests failed; false"
    prompt.run_once(AGENT_COMMAND="touch x", AGENT_VERIFY_COMMAND=command, AGENT_DRAFT_ON_FAILURE="yes")
    comment = drafted(prompt, f"The checks failed: `{command}` ended with exit status 1.")
    assert "3 tests failed" in comment
    assert "3 tests failed" in prompt.pull_body()
    assert changed(prompt) == ["A\tx"]
    trailer = prompt.github.git(TARGET, "log", "-1", "--format=%(trailers:key=Unfinished)", prompt.pull().head)
    assert trailer.strip() == f"Unfinished: The checks failed: `{command}` ended with exit status 1."
    assert prompt.claims() == []


def test_work_at_a_time_out_is_kept_as_a_draft(world: World) -> None:
    world.open("Do it.")
    command = agent(world.home, HALF)
    world.run_once(AGENT_COMMAND=command, AGENT_TASK_TIMEOUT="2", AGENT_DRAFT_ON_FAILURE="yes")
    comment = drafted(world, "The agent ran out of time (2 s).")
    assert "half done" in comment
    assert changed(world) == ["A\thalf.txt"]


def test_work_at_a_time_out_is_kept_as_a_patch_where_no_draft_is_wanted(world: World) -> None:
    world.open("Do it.")
    command = agent(world.home, HALF.replace('"half"', 'b"half\\xff\\0"').replace('"w"', '"wb"'))
    runner = world.run_once(AGENT_COMMAND=command, AGENT_TASK_TIMEOUT="2")
    comment = failed(world)
    assert "The agent ran out of time (2 s)." in comment
    assert PATCHED in comment
    patch = runner.config.state_dir / "logs" / "1-1.patch"
    assert patch.stat().st_mode & 0o777 == 0o600
    clone = world.folder / "clone"
    world.github.git(TARGET, "worktree", "add", "-q", str(clone), "main")
    subprocess.run(["git", "apply", str(patch)], cwd=clone, check=True)
    assert (clone / "half.txt").read_bytes() == b"half\xff\0"


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("touch x; exit 3", "The agent ended with exit status 3."),
        ("touch x; kill -9 $$", "The agent ended with signal 9."),
        ("touch x; sleep 600", "The agent printed nothing for 1 s."),
    ],
)
def test_an_agent_that_fails_leaves_a_draft(world: World, command: str, why: str) -> None:
    world.open("Do it.")
    env = {"AGENT_STALL_SECONDS": "1", "AGENT_DRAFT_ON_FAILURE": "yes"}
    world.run_once(AGENT_COMMAND=command, AGENT_SHELL="yes", **env)
    drafted(world, why)


def test_an_agent_that_fails_without_a_change_leaves_no_draft(world: World) -> None:
    world.open("Do it.")
    world.run_once(AGENT_COMMAND="false", AGENT_DRAFT_ON_FAILURE="yes")
    assert "so far" not in failed(world)


def test_what_must_not_be_published_is_no_draft_either(world: World) -> None:
    world.open("Do it.")
    command = "ln -s /etc/passwd x; exit 3"
    runner = world.run_once(AGENT_COMMAND=command, AGENT_SHELL="yes", AGENT_DRAFT_ON_FAILURE="yes")
    assert "ended with exit status 3" in failed(world)
    assert not (runner.config.state_dir / "logs" / "1-1.patch").exists()


def test_a_setup_that_fails_leaves_no_draft(world: World) -> None:
    world.open("Do it.")
    env = {"AGENT_DRAFT_ON_FAILURE": "yes", "AGENT_MAX_ATTEMPTS": "1"}
    world.run_once(AGENT_SETUP_COMMAND="touch x; false", AGENT_COMMAND="true", **env)
    failed(world)


def test_where_there_are_no_drafts_it_is_a_pull_request_that_says_so(world: World) -> None:
    world.github.repository(TARGET).has_drafts = False
    world.open("Do it.")
    world.run_once(AGENT_COMMAND="touch x; exit 3", AGENT_SHELL="yes", AGENT_DRAFT_ON_FAILURE="yes")
    assert world.pull().draft is False
    assert "**Not finished.** The agent ended with exit status 3." in world.pull_body()


def test_a_second_run_that_succeeds_makes_the_draft_ready(world: World) -> None:
    world.open("Do it.")
    env = {"AGENT_SHELL": "yes", "AGENT_DRAFT_ON_FAILURE": "yes"}
    world.run_once(AGENT_COMMAND="touch x; exit 3", **env)
    draft = world.pull()
    world.github.remove_label(DISPATCH, 1, "agent-failed")
    world.run_once(AGENT_COMMAND="touch x", **env)
    assert world.pull().number == draft.number
    assert world.pull().draft is False
    assert "Not finished" not in world.pull_body()
    assert world.labels() == ["agent-done", "copilot-agent"]


def test_a_second_run_that_fails_makes_the_pull_request_a_draft(world: World) -> None:
    world.open("Do it.")
    env = {"AGENT_SHELL": "yes", "AGENT_DRAFT_ON_FAILURE": "yes"}
    world.run_once(AGENT_COMMAND="touch x", **env)
    world.github.remove_label(DISPATCH, 1, "agent-done")
    world.run_once(AGENT_COMMAND="touch y; exit 3", **env)
    drafted(world, "The agent ended with exit status 3.")


def test_a_draft_that_github_does_not_make_ready_does_no_harm(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.open("Do it.")
    env = {"AGENT_SHELL": "yes", "AGENT_DRAFT_ON_FAILURE": "yes"}
    world.run_once(AGENT_COMMAND="touch x; exit 3", **env)
    world.github.remove_label(DISPATCH, 1, "agent-failed")
    world.github.faults.append(Fault(kind="graphql", where=lambda r: "mutation" in r.json["query"], status=403))
    world.run_once(AGENT_COMMAND="touch x", **env)
    assert "stays as it is" in caplog.text
    assert world.labels() == ["agent-done", "copilot-agent"]


def test_a_draft_is_finished_as_one_after_a_crash(world: World) -> None:
    """The branch was pushed, and neither pull request nor comment came to be."""
    world.open("Do it.")
    env = {"AGENT_SHELL": "yes", "AGENT_DRAFT_ON_FAILURE": "yes"}
    command = 'touch x; echo run >> "$HOME/runs"; exit 3'
    world.run_once(AGENT_COMMAND=command, **env)
    del world.github.repository(TARGET).issues[world.pull().number]
    world.issue().comments.pop()
    world.github.remove_label(DISPATCH, 1, "agent-failed")
    world.run_once(AGENT_COMMAND=command, **env)
    drafted(world, "The agent ended with exit status 3.")
    assert (world.home / "runs").read_text() == "run\n"


# -- What an agent leaves -----------------------------------------------------------------------------


def test_droppings_are_told_apart_from_a_change(world: World) -> None:
    world.github.commit(TARGET, {".gitignore": "build/\n"})
    world.open("Do it.")
    world.run_once(AGENT_COMMAND="mkdir build; touch build/x .aider.chat.history.md", AGENT_SHELL="yes")
    comment = failed(world)
    assert "**Failed.** The agent changed nothing." in comment
    assert "It only left `.aider.chat.history.md`, `build/`, which git ignores here." in comment


def test_the_logs_of_all_parts_are_kept(world: World) -> None:
    world.open("Do it.")
    runner = world.run_once(
        AGENT_SETUP_COMMAND="echo setup",
        AGENT_COMMAND="echo agent; touch x",
        AGENT_SHELL="yes",
        AGENT_VERIFY_COMMAND="echo checks; false",
    )
    logs = {file.name: file.read_text() for file in (runner.config.state_dir / "logs").iterdir()}
    patch = logs.pop("1-1.patch")
    assert re.search(r"^\+\+\+ b/x|new file", patch, re.MULTILINE)
    assert logs == {
        "1-1.setup.log": "setup\n",
        "1-1.log": "agent\n",
        "1-1.checks-1.log": "checks\n",
        "1-1.round-2.log": "agent\n",
        "1-1.checks-2.log": "checks\n",
    }


# -- What nothing else would notice -------------------------------------------------------------------

QUIET = "trap 'exit 0' TERM; sleep 600 & wait"  # ends well, and too late


def test_a_setup_that_ends_well_but_too_late_has_failed(world: World) -> None:
    world.open("Do it.")
    env = {"AGENT_SETUP_COMMAND": QUIET, "AGENT_SETUP_TIMEOUT": "1", "AGENT_MAX_ATTEMPTS": "1"}
    world.run_once(AGENT_COMMAND="touch x", **env)
    assert "The setup command ran out of time (1 s)." in failed(world)


def test_checks_that_end_well_but_too_late_have_failed(prompt: World) -> None:
    prompt.open("Do it.")
    env = {"AGENT_VERIFY_TIMEOUT": "1", "AGENT_VERIFY_ROUNDS": "0"}
    prompt.run_once(AGENT_COMMAND="touch x", AGENT_VERIFY_COMMAND=QUIET, **env)
    assert "ran out of time (1 s)." in failed(prompt)


def test_the_time_of_setup_and_checks_is_not_the_agents(prompt: World) -> None:
    prompt.open("Do it.")
    checks = "sleep 4; grep -q good state.txt"
    env = {"AGENT_SETUP_COMMAND": "sleep 4", "AGENT_VERIFY_COMMAND": checks, "AGENT_TASK_TIMEOUT": "3"}
    prompt.run_once(AGENT_COMMAND=agent(prompt.home, MENDS), **env)
    assert "passed, round 2 |" in prompt.pull_body()


def test_the_agent_is_not_told_all_that_long_checks_say(prompt: World) -> None:
    prompt.open("Do it.")
    command = 'wc -c >> sizes; test "$(wc -l < sizes)" -lt 3'
    checks = "echo begin; yes | head -c 60000; echo end; test $(wc -l < sizes) = 2"
    prompt.run_once(AGENT_COMMAND=command, AGENT_SHELL="yes", AGENT_VERIFY_COMMAND=checks)
    first, second = map(int, show(prompt, "sizes").split())
    assert first < 100
    assert 16_000 < second < 17_000


def test_what_the_setup_leaves_is_left_out_only_where_it_lies(world: World) -> None:
    world.open("Do it.")
    world.run_once(AGENT_SETUP_COMMAND="touch made", AGENT_COMMAND="touch src/made")
    assert changed(world) == ["A\tsrc/made"]


def test_what_the_setup_leaves_and_git_ignores_is_not_told_as_the_agents(world: World) -> None:
    world.github.commit(TARGET, {".gitignore": "build/\n"})
    world.open("Do it.")
    world.run_once(AGENT_SETUP_COMMAND="mkdir build; touch build/x", AGENT_COMMAND="true")
    assert "The agent changed nothing." in failed(world)
    assert "build" not in failed(world)


def test_an_agent_that_fails_in_its_second_round_leaves_a_draft(prompt: World) -> None:
    prompt.open("Do it.")
    command = 'echo x >> x; test "$(wc -l < x)" = 1 || exit 3'
    env = {"AGENT_SHELL": "yes", "AGENT_VERIFY_COMMAND": "false", "AGENT_DRAFT_ON_FAILURE": "yes"}
    prompt.run_once(AGENT_COMMAND=command, **env)
    drafted(prompt, "The agent ended with exit status 3.")
    assert show(prompt, "x") == "x\nx"


# -- What others than the agent have written ----------------------------------------------------------

NAMES = ["a\nb", " lead", "trail ", "back\\", "tab\t", 'q"uote', "nb\u00a0sp", "cr\r", "#x", "!y", "*", "[z]"]
NAMES += [":(top)x", "-rf", "\udcff.bin", "new\\\nline"]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_what_the_setup_leaves_may_have_any_name(world: World, name: str) -> None:
    place = Place(world)
    for path in (place.path / name, place.path / "src" / name / "x"):
        write(path, "x")
    place.checkout.settle()
    write(place.path / "src/mine", "x")
    assert place.changed() == ["A src/mine"]


def test_what_the_setup_leaves_is_left_out_also_where_gitignore_wants_it(world: World) -> None:
    world.github.commit(TARGET, {".gitignore": "/*\n!/src\n!/lib\n!.gitignore\n"})
    world.open("Do it.")
    setup = "mkdir lib; touch lib/made; git init -q lib/vendored; mkfifo lib/pipe"
    world.run_once(AGENT_SETUP_COMMAND=setup, AGENT_COMMAND="touch src/x")
    assert changed(world) == ["A\tsrc/x"]


@pytest.mark.parametrize("harm", ["echo noise >> README.md; echo noise >> rounds.txt", "rm -f README.md other.txt"])
def test_what_checks_that_failed_have_changed_is_not_published_either(prompt: World, harm: str) -> None:
    prompt.open("Do it.")
    first = 'if "The checks failed" not in told: open("other.txt", "w").write("mine")'
    command = agent(prompt.home, f"{MENDS}    {first}\n")
    prompt.run_once(AGENT_COMMAND=command, AGENT_VERIFY_COMMAND=f"grep -q good state.txt && exit; {harm}; false")
    assert changed(prompt) == ["A\tother.txt", "A\trounds.txt", "A\tstate.txt"]
    assert show(prompt, "other.txt") == "mine"


def test_an_agent_that_ends_well_without_a_change_leaves_no_draft(world: World) -> None:
    world.open("Do it.")
    world.run_once(AGENT_COMMAND="true", AGENT_DRAFT_ON_FAILURE="yes")
    assert "The agent changed nothing." in failed(world)
    assert not world.github.pulls(TARGET)


def test_a_patch_keeps_bytes_that_are_no_utf_8(world: World) -> None:
    world.open("Do it.")
    runner = world.run_once(AGENT_COMMAND="printf 'gr\\374n\\n' > x; exit 3", AGENT_SHELL="yes")
    assert b"+gr\xfcn\n" in (runner.config.state_dir / "logs" / "1-1.patch").read_bytes()


def test_setup_and_checks_run_in_bash(world: World) -> None:
    world.open("Do it.")
    world.run_once(AGENT_SETUP_COMMAND="[[ a == a ]]", AGENT_VERIFY_COMMAND='test -n "$BASH"', AGENT_COMMAND="touch x")
    assert "passed, round 1 |" in world.pull_body()


def test_all_rounds_share_the_agents_time(prompt: World) -> None:
    prompt.open("Do it.")
    env = {"AGENT_TASK_TIMEOUT": "5", "AGENT_VERIFY_ROUNDS": "9"}
    prompt.run_once(AGENT_COMMAND="echo >> x; sleep 2", AGENT_SHELL="yes", AGENT_VERIFY_COMMAND="false", **env)
    assert "The agent ran out of time (5 s)." in failed(prompt)


@pytest.mark.parametrize("part", ["AGENT_SETUP_COMMAND", "AGENT_VERIFY_COMMAND"])
def test_what_setup_and_checks_print_can_be_seen_meanwhile(world: World, part: str) -> None:
    world.open("Do it.")
    runner = world.runner(
        None, AGENT_COMMAND="touch x", **{part: 'echo almost; while ! test -e "$HOME/go"; do sleep 0.1; done'}
    )
    thread = threading.Thread(target=runner.run_once)
    thread.start()
    try:
        wait_until(lambda: any(attempt.last_line == "almost" for attempt in runner.at_work()[0]))
    finally:
        (world.home / "go").touch()
        thread.join(60)


@pytest.mark.parametrize("harm", ["cd ..; mv tree old; ln -s old tree", "mkfifo .gitignore"])
def test_what_checks_that_passed_leave_does_not_matter(world: World, harm: str) -> None:
    world.open("Do it.")
    world.run_once(AGENT_COMMAND="touch x", AGENT_VERIFY_COMMAND=harm, AGENT_SANDBOX="off")
    assert changed(world) == ["A\tx"]


def test_what_the_setup_leaves_may_be_odd_and_ignored(world: World) -> None:
    world.github.commit(TARGET, {".gitignore": "deps/\n"})
    world.open("Do it.")
    world.run_once(AGENT_SETUP_COMMAND="git init -q deps/vendored; mkfifo deps/pipe", AGENT_COMMAND="touch x")
    assert changed(world) == ["A\tx"]


def test_the_agent_may_have_git_ignore_what_the_setup_made(world: World) -> None:
    world.open("Do it.")
    command = "echo deps/ > .gitignore"
    world.run_once(AGENT_SETUP_COMMAND="mkdir deps; touch deps/x", AGENT_COMMAND=command, AGENT_SHELL="yes")
    assert changed(world) == ["A\t.gitignore"]


def test_setup_and_checks_may_change_the_same_file(prompt: World) -> None:
    prompt.github.commit(TARGET, {"lock.txt": "one\n"})
    prompt.open("Do it.")
    checks = 'cat lock.txt >> "$HOME/locks"; echo three > lock.txt; grep -q good state.txt'
    env = {"AGENT_SETUP_COMMAND": "echo two > lock.txt", "AGENT_VERIFY_COMMAND": checks}
    prompt.run_once(AGENT_COMMAND=agent(prompt.home, MENDS), **env)
    assert changed(prompt) == ["A\trounds.txt", "A\tstate.txt"]
    assert (prompt.home / "locks").read_text() == "two\ntwo\n"


def test_checks_that_delete_the_workspace_are_no_fault_of_the_runner(world: World) -> None:
    world.open("Do it.")
    checks = 'cd /; rm -rf "$OLDPWD"; false'
    world.run_once(AGENT_COMMAND="touch x", AGENT_VERIFY_COMMAND=checks, AGENT_SANDBOX="off")
    assert "The runner met a fault" not in failed(world)


def test_a_folder_that_checks_replaced_by_a_link_is_put_back_in_its_place(prompt: World) -> None:
    outside = prompt.home / "outside"
    outside.mkdir()
    prompt.open("Do it.")
    makes = 'os.makedirs("d", exist_ok=True); open("d/f", "w").write("x")'
    harm = f"rm -rf d src; ln -s {outside} d; ln -s {outside} src; false"
    command = agent(prompt.home, f"{MENDS}    {makes}\n")
    prompt.run_once(AGENT_COMMAND=command, AGENT_VERIFY_COMMAND=f"grep -q good state.txt && exit; {harm}")
    assert changed(prompt) == ["A\td/f", "A\trounds.txt", "A\tstate.txt"]
    assert not [*outside.iterdir()]
