"""The command line: real processes, real signals."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from conftest import PATCH, RUNNER, TARGET, World
from standin import Fault

import runner as runner_module
from runner import main


def finish(process: subprocess.Popen[str], seconds: float = 60) -> tuple[int, str, str]:
    """A process's exit code and what it printed, when it has ended."""
    out, err = process.communicate(timeout=seconds)
    assert "Traceback" not in err
    return process.returncode, out, err


def wait_for_line(process: subprocess.Popen[str], text: str) -> str:
    """What a process wrote on standard error up to a line with this text."""
    assert process.stderr
    seen = ""
    timer = threading.Timer(60, process.kill)
    timer.start()
    for line in process.stderr:
        seen += line
        if text in line:
            timer.cancel()
            return seen
    pytest.fail(f"no line with {text!r} in:\n{seen}")


def test_version_and_help_need_no_settings(world: World) -> None:
    world.env.clear()
    code, out, _ = finish(world.start("--version"))
    assert (code, out) == (0, f"agent-runner {runner_module.__version__}\n")
    code, out, _ = finish(world.start("--help"))
    assert code == 0
    for option in ("--once", "--issue N", "--check", "--json", "--version"):
        assert option in out
    assert "--plugin" not in out


def test_all_bad_variables_are_named_at_once(world: World) -> None:
    code, _, err = finish(world.start(GITHUB_TOKEN="", AGENT_TARGET_REPO="x", AGENT_POLL_INTERVAL="soon"))
    assert code == 2
    for name in ("GITHUB_TOKEN", "AGENT_TARGET_REPO", "AGENT_POLL_INTERVAL"):
        assert f"  - {name} " in err


def test_an_unknown_option_is_told(world: World) -> None:
    code, _, err = finish(world.start("--onse"))
    assert code == 2
    assert "--onse" in err


def test_an_unknown_variable_is_warned_about(world: World) -> None:
    _, _, err = finish(world.start("--once", AGENT_POLL_INTERVALL="5"))
    assert "WARNING AGENT_POLL_INTERVALL is set, but" in err
    assert "did you mean AGENT_POLL_INTERVAL?" in err


def test_once_does_what_is_queued_and_ends(world: World) -> None:
    world.open(PATCH)
    code, _, err = finish(world.start("--once"))
    assert code == 0, err
    assert world.labels() == ["agent-done", "copilot-agent"]
    assert world.github.token not in err


def test_once_with_nothing_to_do_is_well(world: World) -> None:
    assert finish(world.start("--once"))[0] == 0


def test_once_tells_by_its_exit_code_that_a_task_failed(world: World) -> None:
    world.open("No patch.")
    assert finish(world.start("--once"))[0] == 1
    assert world.labels() == ["agent-failed", "copilot-agent"]


def test_once_without_github_ends_with_one_clear_line(world: World) -> None:
    world.github.stop()
    code, _, err = finish(world.start("--once"))
    assert code == 1
    (line,) = err.splitlines()
    assert "ERROR cannot read the queue: no answer to GET" in line
    assert line.endswith("Connection refused")


def test_one_issue_is_run_alone(world: World) -> None:
    world.open(PATCH)
    number = world.open(PATCH)
    assert finish(world.start("--issue", str(number)))[0] == 0
    assert world.labels(number) == ["agent-done", "copilot-agent"]
    assert world.labels(1) == ["copilot-agent"]


def test_one_issue_that_is_not_queued_is_left_with_a_reason(world: World) -> None:
    number = world.open(PATCH, labels=["bug"])
    code, _, err = finish(world.start("--issue", str(number)))
    assert code == 1
    assert "skipped: it is open, its labels: bug" in err
    assert finish(world.start("--issue", "99"))[0] == 1


def test_the_daemon_waits_for_a_github_that_is_not_up_yet(world: World) -> None:
    world.open(PATCH)
    world.github.stop()
    process = world.start(AGENT_POLL_INTERVAL="1")
    wait_for_line(process, "cannot read the queue")
    world.github.start()
    wait_for_line(process, "done: ")
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 0
    assert world.labels() == ["agent-done", "copilot-agent"]


def test_the_daemon_outlives_a_github_that_goes_away(world: World) -> None:
    process = world.start(AGENT_POLL_INTERVAL="1")
    wait_for_line(process, "watching")
    world.github.stop()
    wait_for_line(process, "cannot read the queue")
    world.github.start()
    world.open(PATCH)
    wait_for_line(process, "done: ")
    process.send_signal(signal.SIGINT)
    assert finish(process)[0] == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_agents(world: World, number: signal.Signals) -> None:
    world.open(PATCH)
    started = world.home / "started"
    process = world.start(AGENT_COMMAND=f"touch {started}; sleep 600", AGENT_SHELL="yes")
    while not started.exists() and process.poll() is None:
        threading.Event().wait(0.02)
    process.send_signal(number)
    wait_for_line(process, "stopping: 1 task")
    process.send_signal(number)
    assert finish(process)[0] == 0
    assert world.labels() == ["copilot-agent"]


def test_sighup_has_the_daemon_look_at_once(world: World) -> None:
    process = world.start(AGENT_POLL_INTERVAL="3600")
    wait_for_line(process, "watching")
    while not world.requests():
        threading.Event().wait(0.02)
    world.open(PATCH)
    process.send_signal(signal.SIGHUP)
    wait_for_line(process, "done: ")
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 0


def test_settings_come_from_a_file_and_the_agent_does_not_get_them(world: World) -> None:
    token = world.env.pop("GITHUB_TOKEN")
    (world.folder / "cwd").mkdir()
    (world.folder / "cwd/.env").write_text(f"GITHUB_TOKEN={token}\nMY_KEY='${{b}} c'\nAGENT_ENV=MY_KEY\n")
    world.open("Do something.")
    code, _, err = finish(world.start("--once", AGENT_COMMAND="env > env.txt", AGENT_SHELL="1"))
    assert code == 0, err
    seen = world.github.git(TARGET, "show", f"{world.pull().head}:env.txt")
    assert "MY_KEY=${b} c" in seen.splitlines()
    assert token not in seen


def test_the_environment_wins_over_the_file(world: World) -> None:
    (world.folder / "cwd").mkdir()
    (world.folder / "cwd/.env").write_text("GITHUB_TOKEN=wrong\nAGENT_COMMAND=false\n")
    world.open(PATCH)
    assert finish(world.start("--once", AGENT_COMMAND="true"))[0] == 1
    assert "changed nothing" in world.last_comment()


def test_a_settings_file_that_is_no_text_is_told(world: World) -> None:
    (world.folder / "cwd").mkdir()
    (world.folder / "cwd/.env").write_bytes(b"GITHUB_TOKEN=\xff\xfe\n")
    code, _, err = finish(world.start("--once"))
    assert code == 2
    assert err.startswith("cannot read .env: ")


def test_an_event_is_one_line_of_the_log(world: World) -> None:
    refused = {"message": "first\nsecond\x1b[31m"}
    world.github.faults.append(Fault(path=".*/issues", status=404, body=refused))
    _, _, err = finish(world.start("--once"))
    (line,) = err.splitlines()
    assert "first second" in line
    assert "\x1b" not in line


def test_an_empty_variable_counts_as_not_set_beside_the_file_too(world: World) -> None:
    (world.folder / "cwd").mkdir()
    (world.folder / "cwd/.env").write_text("AGENT_COMMAND=true\n")
    world.open(PATCH)
    assert finish(world.start("--once", AGENT_COMMAND=""))[0] == 1
    assert "changed nothing" in world.last_comment()


def test_once_can_be_stopped_while_it_waits_for_a_limit(world: World) -> None:
    world.github.faults.append(Fault(status=429, times=None))
    process = world.start("--once")
    wait_for_line(process, "limit is reached")
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code == 1
    assert "stopped before the queue was read" in err


def test_a_plugin_that_cannot_be_loaded_stops_the_start(world: World) -> None:
    broken = world.folder / "broken.py"
    broken.write_text("import no_such_module\n")
    world.open(PATCH)
    process = world.start("--once", AGENT_PROCESS_TASK=f"{broken}:process_task")
    code, _, err = finish(process)
    assert code == 2
    assert "No module named 'no_such_module'" in err
    assert world.labels() == ["copilot-agent"]


def test_a_plugin_that_ends_without_a_word_stops_the_start(world: World) -> None:
    silent = world.folder / "silent.py"
    silent.write_text("import os\nos._exit(3)\n")
    code, _, err = finish(world.start("--once", AGENT_PROCESS_TASK=f"{silent}:process_task"))
    assert code == 2
    assert "status 3" in err


def test_a_run_that_is_cut_short_says_so_by_its_exit_code(world: World) -> None:
    world.open(PATCH)
    started = world.home / "started"
    process = world.start(
        "--once", AGENT_COMMAND=f"touch {started}; sleep 600", AGENT_SHELL="yes", AGENT_DRAIN_SECONDS="0"
    )
    while not started.exists() and process.poll() is None:
        threading.Event().wait(0.02)
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 1
    assert world.labels() == ["copilot-agent"]


def test_a_state_folder_that_cannot_be_written_to_stops_the_start(world: World) -> None:
    code, _, err = finish(world.start("--once", AGENT_STATE_DIR="/proc/nowhere"))
    assert code == 2
    assert "Set AGENT_STATE_DIR to a folder" in err


def test_a_secret_that_gets_into_a_log_line_is_masked(world: World) -> None:
    _, _, err = finish(world.start("--once", AGENT_POLL_INTERVALL="x", **{f"AGENT_{world.github.token}": "1"}))
    assert "AGENT_***" in err
    assert world.github.token not in err


def test_the_file_is_a_module_without_side_effects() -> None:
    code = "import sys, threading, runner; print(threading.active_count(), runner.__version__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=RUNNER.parent, capture_output=True, text=True, check=True)
    assert done.stdout == f"1 {runner_module.__version__}\n"


def test_main_returns_its_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("GITHUB_TOKEN", "")
    assert main([]) == 2
    assert "GITHUB_TOKEN is not set" in capsys.readouterr().err


def test_a_plugin_is_called_by_the_file_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "def process_task(issue):\n    return issue['title'] == 'A title'\n"
    (tmp_path / "agent.py").write_text(textwrap.dedent(code))
    spec = f"{tmp_path}/agent.py:process_task"
    assert runner_module.load_plugin(spec)({"title": "A title"}) is True
