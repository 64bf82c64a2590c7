"""What an agent is told, and which agent: templates, labels and metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import DISPATCH, TARGET, FastClock, World, issue_json, make_config
from test_task import dispatch_body, failed

from runner import PROMPT, PROMPT_NAMES, Config, ConfigError, fill, metadata_comment, parse_task, render_prompt

VALUES = {name: f"<{name}>" for name in PROMPT_NAMES}


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{title}: {instruction}", "<title>: <instruction>"),
        ("{{title}}", "{title}"),
        ('{"a": {"b": 1}} {instruction}', '{"a": {"b": 1}} <instruction>'),
        ("a\n\nAbout: {context}\n\nb", "a\n\nAbout: <context>\n\nb"),
        ("\n\na\n", "a"),
    ],
)
def test_a_template_is_filled(template: str, expected: str) -> None:
    assert fill(template, VALUES) == expected


def test_a_line_that_says_nothing_is_left_out() -> None:
    values = {**VALUES, "context": "", "failure": ""}
    assert fill("a\n\nAbout: {context}\nWhy: {failure}\n\nb", values) == "a\n\nb"
    assert fill("About {context} of {title}", values) == "About  of <title>"
    assert fill("a\n\nAbout: {context}\n", values) == "a"


def test_what_is_filled_in_is_not_a_template() -> None:
    assert fill("{instruction}", {**VALUES, "instruction": "{title}\n\n\n\n{{base}}"}) == "{title}\n\n\n\n{{base}}"


def prompt_of(body: str = "Mend it.", template: str = PROMPT, failure: str = "", **fields: Any) -> str:
    task = parse_task(issue_json(body, **fields), make_config(), 2, failure)
    return render_prompt(task, "main", template)


def test_a_template_may_hold_all_of_these_names() -> None:
    template = "\n".join(f"{name}={{{name}}}" for name in PROMPT_NAMES)
    body = f"Target: issue {TARGET}#42\n\n## Instructions\n\nMend it."
    assert prompt_of(body, template, "It rained.").splitlines() == [
        "instruction=Mend it.",
        "title=A title",
        f"issue=https://github.com/{DISPATCH}/issues/7",
        f"target={TARGET}",
        f"context=issue {TARGET}#42",
        "base=main",
        "attempt=2",
        "failure=It rained.",
    ]


def test_the_usual_prompt_begins_with_the_instruction_and_asks_for_a_small_tested_change() -> None:
    prompt = prompt_of("Mend it.\n\nBoth of them.")
    assert prompt.startswith("Mend it.\n\nBoth of them.\n\n---\n\nThe current folder is a fresh checkout")
    assert f"branch main of {TARGET}" in prompt
    for word in ("AGENTS.md", "CLAUDE.md", "smallest change", "tests", "Do not commit"):
        assert word in prompt
    assert "last attempt" not in prompt
    assert "About:" not in prompt


def test_the_usual_prompt_tells_why_the_last_attempt_did_not_work_out() -> None:
    assert "Why the last attempt did not work out: It rained." in prompt_of(failure="It rained.")


def test_an_agent_gets_the_usual_prompt_if_there_is_no_other(world: World) -> None:
    world.open("Mend it.")
    world.run_once(AGENT_COMMAND="tee told.txt", AGENT_PROMPT_FILE="")
    told = world.github.git(TARGET, "show", f"{world.pull().head}:told.txt")
    assert told.startswith("Mend it.\n\n---\n\n")
    assert "smallest change" in told


def test_a_prompt_file_is_used_from_any_folder(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("told.md").write_text("Attempt {attempt} at {{this}}:\n{instruction}\n", "utf-8")
    world.open("Mend it.")
    world.run_once(AGENT_COMMAND="tee told.txt", AGENT_PROMPT_FILE="told.md")
    assert world.github.git(TARGET, "show", f"{world.pull().head}:told.txt") == "Attempt 1 at {this}:\nMend it."


def test_a_name_that_stands_for_nothing_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "told.md").write_text("{instruction} {repo} {branch} {title}")
    with pytest.raises(ConfigError) as caught:
        make_config({"AGENT_PROMPT_FILE": str(tmp_path / "told.md")})
    assert "AGENT_PROMPT_FILE holds {repo} and {branch}, which stands for nothing; it may hold {instruction}" in str(
        caught.value
    )


def test_a_prompt_that_is_no_text_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "told.md").write_bytes(b"\xff\xfe{instruction}")
    with pytest.raises(ConfigError, match="it is not UTF-8"):
        make_config({"AGENT_PROMPT_FILE": str(tmp_path / "told.md")})


def test_a_second_attempt_is_told_why_the_first_did_not_work_out(world: World) -> None:
    prompt = world.folder / "why.md"
    prompt.write_text("{instruction}\nBefore: {failure}\n")
    setup = 'test -e "$HOME/ready" || { touch "$HOME/ready"; echo no network; exit 3; }'
    world.open("Mend it.")
    settings = {"AGENT_PROMPT_FILE": str(prompt), "AGENT_SETUP_COMMAND": setup, "AGENT_COMMAND": "tee told.txt"}
    world.runner(FastClock(), **settings).run_once()
    told = world.github.git(TARGET, "show", f"{world.pull().head}:told.txt")
    assert told == "Mend it.\nBefore: The setup command ended with exit status 3."


# -- Which agent --------------------------------------------------------------------------------------


def routed(**env: str) -> Config:
    return make_config({"PATH": "/usr/bin:/bin", "AGENT_COMMAND": "true", **env})


@pytest.mark.parametrize("name", ["claude-code", "Claude Code", "claude_code", " CLAUDE.CODE "])
def test_an_agents_name_may_be_written_in_many_ways(name: str) -> None:
    config = routed(AGENT_COMMAND_CLAUDE_CODE="true")
    by_label = parse_task(issue_json(labels=[{"name": f"agent:{name}"}]), config)
    by_metadata = parse_task(issue_json(f"Do it. {metadata_comment({'agent': name})}"), config)
    assert by_label.agent == by_metadata.agent == "claude-code"
    assert config.for_agent("claude-code").command == "true"


def test_a_label_chooses_the_agent(world: World) -> None:
    world.open("Do it.", labels=["copilot-agent", "agent:second"])
    world.run_once(AGENT_COMMAND="touch first", AGENT_COMMAND_SECOND="touch second")
    assert world.github.git(TARGET, "show", "--name-only", "--format=", world.pull().head) == "second"
    assert "| Agent | `second` |" in world.pull_body()
    assert "| Agent | `second` |" in world.last_comment()


def test_metadata_chooses_the_agent(world: World) -> None:
    world.open(dispatch_body("Do it.", agent="second"))
    world.run_once(AGENT_COMMAND="touch first", AGENT_COMMAND_SECOND="touch second")
    assert world.github.git(TARGET, "show", "--name-only", "--format=", world.pull().head) == "second"


def test_a_label_wins_over_metadata(world: World) -> None:
    world.open(dispatch_body("Do it.", agent="second"), labels=["copilot-agent", "agent:third"])
    world.run_once(AGENT_COMMAND="touch first", AGENT_COMMAND_SECOND="touch second", AGENT_COMMAND_THIRD="touch third")
    assert world.github.git(TARGET, "show", "--name-only", "--format=", world.pull().head) == "third"


def test_without_a_choice_the_usual_agent_works(world: World) -> None:
    world.open("Do it.")
    world.run_once(AGENT_COMMAND="touch first", AGENT_COMMAND_SECOND="touch second")
    assert world.github.git(TARGET, "show", "--name-only", "--format=", world.pull().head) == "first"
    assert "| Agent |" not in world.pull_body()


def test_a_stranger_chooses_no_agent_by_metadata() -> None:
    issue = issue_json(f"Do it. {metadata_comment({'agent': 'second'})}", author_association="NONE")
    assert parse_task(issue, routed(AGENT_COMMAND_SECOND="true")).agent == ""


def test_an_unknown_agent_is_told_with_those_that_are_known(world: World) -> None:
    world.open("Do it.", labels=["copilot-agent", "agent:fourth"])
    world.run_once(AGENT_COMMAND="touch first", AGENT_COMMAND_THIRD="true", AGENT_COMMAND_SECOND="true")
    comment = failed(world)
    assert "This runner knows no agent `fourth`." in comment
    assert "It knows `second`, `third`." in comment


def test_where_no_agent_has_a_name_the_owner_is_told_how_to_give_one(world: World) -> None:
    world.open("Do it.", labels=["copilot-agent", "agent:fourth"])
    world.run_once()
    assert "AGENT_COMMAND_NAME" in failed(world)


def test_two_agents_for_one_task_are_one_too_many(world: World) -> None:
    world.open("Do it.", labels=["copilot-agent", "agent:second", "agent:third"])
    world.run_once(AGENT_COMMAND="true", AGENT_COMMAND_THIRD="true", AGENT_COMMAND_SECOND="true")
    assert "The labels name several agents: `second, third`." in failed(world)


def test_an_agent_of_ones_own_is_checked_at_the_start() -> None:
    with pytest.raises(ConfigError) as caught:
        routed(AGENT_COMMAND_CODEX="no-such-program exec -", AGENT_COMMAND_X="true", AGENT_MODEL_X="gpt")
    assert "AGENT_COMMAND_CODEX names the program 'no-such-program'" in str(caught.value)
    assert "AGENT_COMMAND_X and AGENT_MODEL_X are both set" in str(caught.value)


def test_a_models_route_is_the_built_in_agent() -> None:
    config = routed(AGENT_MODEL_SMALL="tiny-1").for_agent("small")
    assert (config.process_task, config.model, config.command) == ("openai", "tiny-1", "true")


def test_a_model_alone_is_the_usual_agent() -> None:
    assert make_config({"AGENT_MODEL": "tiny-1"}).process_task == "openai"
    assert routed(AGENT_MODEL="tiny-1").process_task == "command"


def test_the_built_in_agent_needs_a_model() -> None:
    with pytest.raises(ConfigError, match="AGENT_PROCESS_TASK is openai, but AGENT_MODEL is not set"):
        make_config({"AGENT_PROCESS_TASK": "openai"})


def test_a_models_key_is_for_the_built_in_agent_alone() -> None:
    config = routed(AGENT_MODEL_SMALL="tiny-1", AGENT_ENV="OPENAI_API_KEY,OTHER", OPENAI_API_KEY="sk-123456789")
    assert config.for_agent("").agent_env == ("OPENAI_API_KEY", "OTHER")
    assert config.for_agent("small").agent_env == ("OTHER",)
    assert "sk-123456789" not in repr(config)
    assert config.masked("key sk-123456789") == "key ***"


def test_a_variable_for_a_named_agent_is_known() -> None:
    config = routed(AGENT_COMMAND_CODEX="true", AGENT_MODEL_SMALL="x", AGENT_COMMANDS="true")
    assert list(config.unknown()) == [
        "AGENT_COMMANDS is set, but the runner knows no such variable; did you mean AGENT_COMMAND?"
    ]


@pytest.mark.parametrize("label", ["agent:second", "Agent:Second", "AGENT: second "])
def test_a_label_may_be_written_large(label: str) -> None:
    task = parse_task(
        issue_json(labels=[{"name": "copilot-agent"}, {"name": label}]), routed(AGENT_COMMAND_SECOND="true")
    )
    assert task.agent == "second"


def test_what_the_instruction_says_already_is_not_told_twice() -> None:
    template = "{instruction}\nAbout: {context}"
    told = f"Target: issue `{TARGET}#42`\n\n## Instructions\n\nMend "
    assert "About:" in prompt_of(f"{told}it.", template)
    assert "About:" not in prompt_of(f"{told}issue {TARGET}#42.", template)
    assert "About:" not in prompt_of(f"{told}issue `{TARGET}#42`.", template)


def test_a_prompt_without_the_instruction_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "told.md").write_text("{title} {{instruction}}")
    with pytest.raises(ConfigError, match=r"AGENT_PROMPT_FILE must hold \{instruction\}"):
        make_config({"AGENT_PROMPT_FILE": str(tmp_path / "told.md")})
