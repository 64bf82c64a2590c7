"""What is written and what the code does are kept in step; the examples run for real."""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from agents import AGENTS as REAL_AGENTS
from conftest import RUNNER, World, issue_json, make_config
from dotenv import dotenv_values

import runner
from runner import FENCE, Config, Workspace, call_plugin, load_plugin, parse_task

ROOT = RUNNER.parent
README = ROOT / "README.md"
GUIDE = ROOT / "docs/agent-runner-setup.md"
APP_GUIDE = ROOT / "docs/github-app.md"
AGENTS = ROOT / "docs/agents.md"
COMPOSE = ROOT / "docker-compose.agent-runner.yml"
OTHERS = (
    "docs/security.md",
    "docs/plugins.md",
    "docs/scaling.md",
    "docs/failures.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
)
EXAMPLES = sorted((ROOT / "docs/examples").iterdir())
PAGES = [README, GUIDE, APP_GUIDE, AGENTS, *(ROOT / page for page in OTHERS)]
ENV_LINE = re.compile(r"^#?([A-Z_]+)=(.*)$", re.MULTILINE)
RESULTS = ROOT / "bench/results.md"
YOURS = {"AGENT_DISPATCH_REPO": "you/tasks", "AGENT_TARGET_REPO": "you/project"}


def read(page: Path) -> str:
    return page.read_text("utf-8")


def fences(page: Path, language: str) -> list[str]:
    """The contents of a page's code blocks in one language."""
    return [fence["inside"] for fence in FENCE.finditer(read(page)) if fence["language"] == language]


def table(page: Path, heading: str) -> dict[str, list[str]]:
    """The rows of the first table whose first column has this heading, by their first cells."""
    after = read(page).partition(f"\n| {heading} |")[2].split("\n")[2:]
    rows: dict[str, list[str]] = {}
    for line in after:
        if not line.startswith("|"):
            break
        first, *others = (cell.strip() for cell in line.strip("|").split("|"))
        rows[first] = others
    return rows


def load_yaml(text: str) -> Any:
    """PyYAML comes with openapi-core; it has no type hints here."""
    return importlib.import_module("yaml").safe_load(text)


# Variables.


def test_the_readme_lists_every_variable_with_its_real_default() -> None:
    written = {name.strip("`"): cells[0] for name, cells in table(README, "Variable").items()}
    real = {name: spec.metadata["default"] for name, spec in Config.variables().items()}
    assert written.keys() == real.keys()
    for name, cell in written.items():
        literal = re.fullmatch(r"`([^`]*)`", cell)
        assert (literal[1] if literal else "") == real[name], name


def test_defaults_that_depend_on_other_variables_are_as_the_readme_says(tmp_path: Path) -> None:
    config = make_config({"AGENT_STATE_DIR": str(tmp_path)})
    assert config.allowed_targets == (config.target_repo,)
    assert config.allowed_authors == ()
    assert config.home == tmp_path / "home"
    assert config.process_task == "patch"
    assert make_config({"AGENT_COMMAND": "git version"}).process_task == "command"
    assert config.commit_email == "agent-runner@noreply.github.com"


def test_the_readme_lists_what_the_agent_sees() -> None:
    listed = re.findall(r"^\| `(AGENT_(?:TASK_\w+|SUMMARY_FILE))` \| [^`|]+ \|$", read(README), re.MULTILINE)
    assert listed == runner.AGENT_SIDE


def test_the_readme_names_the_permissions_the_variables_speak_of() -> None:
    assert "README.md lists the permissions" in "".join(runner.ADVICE.values())
    assert "### Token permissions" in read(README)


def test_the_env_example_names_every_variable_with_its_default_once() -> None:
    lines = ENV_LINE.findall(read(ROOT / ".env.example"))
    assert dict(lines) == {name: spec.metadata["default"] for name, spec in Config.variables().items()}
    assert len(lines) == len(dict(lines))
    assert lines[0][0] == "GITHUB_TOKEN"


@pytest.mark.parametrize("uncommented", [False, True])
def test_the_env_example_is_a_valid_configuration(tmp_path: Path, uncommented: bool) -> None:
    text = read(ROOT / ".env.example").replace("GITHUB_TOKEN=\n", "GITHUB_TOKEN=t0ken\n")
    if uncommented:
        text = ENV_LINE.sub(r"\1=\2", text)
    (tmp_path / ".env").write_text(text, "utf-8")
    env = {k: v or "" for k, v in dotenv_values(tmp_path / ".env", interpolate=False).items()}
    config = Config.from_env(env)
    assert list(config.unknown()) == []
    plain = Config.from_env({"GITHUB_TOKEN": "t0ken"})
    assert dataclasses.replace(config, env={}) == dataclasses.replace(plain, env={})


def test_variables_that_the_documentation_names_exist() -> None:
    known = {*Config.variables(), *runner.AGENT_SIDE, "AGENT_RUNNER_TOKEN"}  # the last one is a secret's name
    for page in (*PAGES, *EXAMPLES, ROOT / ".env.example", ROOT / "Dockerfile", COMPOSE):
        named = set(re.findall(r"\bAGENT_[A-Z_]*[A-Z]\b(?!_?[*<])", read(page)))
        assert {name for name in named if not runner.ROUTE.fullmatch(name)} <= known, page


# Versions, options, links.


def test_requirements_and_the_script_header_name_the_same_packages() -> None:
    header = re.search(r"^# dependencies = \[(.*)\]$", read(RUNNER), re.MULTILINE)
    assert header
    assert re.findall(r'"([^"]+)"', header[1]) == read(ROOT / "requirements.txt").split()


def test_the_changelog_has_this_version_first() -> None:
    versions = re.findall(r"^## \[(.+?)\]", read(ROOT / "CHANGELOG.md"), re.MULTILINE)
    assert versions[0] == runner.__version__


def options_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", text))


def test_every_option_is_documented_and_every_documented_option_exists() -> None:
    helped = subprocess.run([sys.executable, str(RUNNER), "--help"], capture_output=True, text=True)
    real = options_in(helped.stdout.partition("options:")[2].partition("\n\n")[0])
    text = "\n".join(read(page) for page in PAGES if page != AGENTS)  # whose options are the agents'
    calls = re.findall(r"runner\.py((?: -[^\s`]+| [N\d]+)+)", text)
    alone = re.findall(r"`(--?[a-z][a-z-]*(?: N)?)`", text)
    assert real == options_in(" ".join(calls + alone))


def test_the_make_targets_that_are_documented_exist() -> None:
    documented = set(re.findall(r"\bmake ([a-z-]+)\b(?=`|\s+#)", "\n".join(map(read, PAGES))))
    targets = set(re.findall(r"^([a-z-]+):", read(ROOT / "Makefile"), re.MULTILINE))
    assert {"demo", "test"} <= documented <= targets


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    plain = runner.outside_fences(read(page))
    found: Counter[str] = Counter()
    result = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *$", plain, re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        result.add(f"{slug}-{found[slug]}" if found[slug] else slug)
        found[slug] += 1
    return result


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", runner.outside_fences(read(page))):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_file(), target
        assert not anchor or anchor in anchors(file), target


# Examples of issues and of plug-ins.


def parse(body: str, **fields: Any) -> runner.Task:
    return parse_task(issue_json(body, **fields), make_config(YOURS))


def test_the_readmes_issue_is_a_task_for_the_patch_built_in() -> None:
    (body, _) = fences(README, "markdown")
    task = parse(body)
    assert task.instruction.startswith("Leave a greeting.\n\n```diff\n")
    assert (task.task_id, task.target_repo) == ("issue-7", "you/project")


def test_the_guides_issues_say_what_their_text_says() -> None:
    machine, person = map(parse, fences(GUIDE, "markdown"))
    uuid = "3f0c1f6e-6a0e-4a52-9b6e-0f8d6f3c2b11"
    assert machine.metadata == {"task_id": uuid, "user_id": "user-456", "provider": "github_issue_dispatch"}
    assert (machine.branch, machine.target_repo) == (f"agent-task-{uuid}", "you/project")
    assert machine.context == "issue you/project#42"
    assert machine.instruction.startswith("Show that the runner works.")
    assert "metadata" not in machine.instruction
    assert (person.task_id, person.branch) == ("fix-typo", "agent-task-fix-typo")
    assert (person.target_repo, person.instruction) == ("you/project", "Correct the spelling in the README.")


def test_the_backends_expression_reads_the_readmes_pull_request() -> None:
    (expression,) = (block.strip() for block in fences(GUIDE, "text") if "agent_task_metadata" in block)
    (_, body) = fences(README, "markdown")
    found = re.search(expression, body, re.DOTALL)
    assert found
    assert found[1] == '{"task_id": "greeting-1", "user_id": "user-456"}'
    assert body.startswith(found[0])


def test_the_readmes_plugin_does_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source,) = (block for block in fences(README, "python") if "def process_task" in block)
    (tmp_path / "readme_plugin.py").write_text(source, "utf-8")
    monkeypatch.setitem(sys.modules, "readme_plugin", None)  # put back in the end
    plugin = load_plugin(f"{tmp_path / 'readme_plugin.py'}:process_task")
    workspace = Workspace(tmp_path, "main", "0" * 40)
    assert call_plugin(plugin, parse("Please.", title="A pony"), workspace) == ("done", "Wrote the wish down.")
    assert read(tmp_path / "WISH.md") == "A pony\n"


def settings_in(page: Path) -> list[dict[str, str]]:
    """The examples of settings on a page, each as the variables that it sets."""
    examples = (block for block in fences(page, "sh") if re.search(r"^[A-Z_]+=", block, re.MULTILINE))
    parts = (part for block in examples for part in block.split("\n\n"))
    return [
        {k: v or "" for k, v in dotenv_values(stream=io.StringIO(part), interpolate=False).items()} for part in parts
    ]


@pytest.mark.parametrize("page", [README, AGENTS], ids=lambda page: page.stem)
def test_the_examples_of_agents_are_accepted(tmp_path: Path, page: Path) -> None:
    examples = settings_in(page)
    assert len(examples) > 2
    for example in examples:
        for name, value in example.items():
            if name.startswith("AGENT_COMMAND"):
                (tmp_path / value.split()[0]).touch(0o755)
        config = make_config({"PATH": str(tmp_path), **example})
        assert list(config.unknown()) == []
        if config.command:
            words = runner.command_words(
                config, {"instruction": "Do it.", "summary_file": "/s", "instruction_file": "/i"}
            )
            assert words[0].startswith(str(tmp_path))
            assert not any("{" in word for word in words)


def test_the_recipes_are_the_commands_that_make_agents_runs() -> None:
    tried = {agent.command: agent for name, agent in REAL_AGENTS.items() if agent.packages}
    recipes = [example for example in settings_in(AGENTS) if example.get("AGENT_COMMAND") in tried]
    assert {example["AGENT_COMMAND"] for example in recipes} == {*tried}
    versions = [cells[0] for cells in table(AGENTS, "Agent").values()]
    assert sorted(versions) == sorted(re.split("[@=]+", agent.packages[0])[-1] for agent in tried.values())


def test_the_agents_page_shows_the_real_prompt() -> None:
    assert runner.PROMPT in fences(AGENTS, "text")
    assert {name.strip("`{}") for name in table(AGENTS, "In a template")} == set(runner.PROMPT_NAMES)


def test_the_agents_page_tells_the_real_limits() -> None:
    text = read(AGENTS)
    assert f"{runner.TOLD_OF_OUTPUT:,} characters" in text
    assert runner.BASH_TIMEOUT == 600
    assert "ten minutes for a command" in text
    assert f"The newest {runner.LOGS_KEPT} files" in text


# The smoke test of the guide, and the README's pull request, against the stand-in.


@pytest.fixture
def yours(world: World) -> World:
    """The repositories that the documentation speaks of."""
    tasks = world.github.add_repository("you/tasks")
    world.github.new_label(tasks, "copilot-agent")
    world.github.add_repository("you/project")
    world.env |= YOURS
    return world


def normal(text: str, world: World) -> str:
    """Less what differs from run to run."""
    text = text.replace(world.github.server_url, "https://github.com")
    for pattern, form in (
        (r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ", "TIME "),
        (r"\b[0-9a-f]{40}\b", "COMMIT"),
        (r"run=[0-9a-f]{16}", "run=RUN"),
        (r"git \d[\d.]+$", "git VERSION"),
        (r"^✓ state     /\S+$", "✓ state     FOLDER"),
        (r"^✓ disk      [\d,]+ MB", "✓ disk      1 MB"),
    ):
        text = re.sub(pattern, form, text, flags=re.MULTILINE)
    return text


def log_of(world: World, number: int, label: str) -> str:
    """What the daemon logs until an issue has the label and no work is left; then it is stopped."""
    process = world.start(AGENT_POLL_INTERVAL="1")
    give_up = time.monotonic() + 30
    wanted = sorted(["copilot-agent", label])
    while sorted(world.github.issue("you/tasks", number).labels) != wanted and time.monotonic() < give_up:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=30)
    assert process.returncode == 0
    # Whether the worker has ended at that moment is a matter of luck.
    return re.sub(r"^.* INFO stopping: .*\n", "", log, flags=re.MULTILINE)


def test_the_smoke_test_goes_as_the_guide_says(yours: World) -> None:
    checked, done, comments, failed = (
        block for block in fences(GUIDE, "text") if re.search(r"✓| INFO | WARNING |Working on it", block)
    )
    check = yours.start("--check")
    assert normal(check.communicate()[0], yours) == normal(checked, yours)
    assert check.returncode == 0
    yours.github.open_issue("you/tasks", title="Smoke test", body=fences(GUIDE, "markdown")[0])
    assert normal(log_of(yours, 1, "agent-done"), yours) == normal(done, yours)
    issue = yours.github.issue("you/tasks", 1)
    assert issue.labels == ["copilot-agent", "agent-done"]
    first_lines = [normal(comment.body.split("\n")[0], yours) for comment in issue.comments]
    assert first_lines == comments.splitlines()
    (pull,) = yours.github.pulls("you/project")
    assert f"`{pull.title}`" in read(GUIDE)
    assert f"`{pull.head}`" in read(GUIDE)
    changed = yours.github.git("you/project", "diff", "--name-only", "main", pull.head)
    assert changed == "agent-runner-smoke-test.md"
    yours.github.open_issue("you/tasks", title="Without a patch", body="Do it.")
    assert normal(log_of(yours, 2, "agent-failed"), yours).endswith(normal(failed, yours))


def test_the_readmes_pull_request_is_what_its_issue_brings(yours: World) -> None:
    (body, pull_body) = fences(README, "markdown")
    metadata = pull_body.split("\n")[0]
    yours.github.open_issue("you/tasks", title="Greet", body=f"{body}\n---\n\n{metadata}")
    yours.run_once()
    (pull,) = yours.github.pulls("you/project")
    assert normal(pull.body or "", yours) == normal(pull_body.rstrip("\n"), yours)


def test_the_readmes_audit_log_is_what_its_story_brings(yours: World) -> None:
    (sample,) = (block for block in fences(README, "json") if '"event"' in block)
    file = yours.folder / "audit.jsonl"
    yours.github.open_issue("you/tasks", title="Greet", body="Do it.")
    yours.github.open_issue("you/tasks", title="Harm", body="Do it.", author="mallory", association="NONE")
    yours.run_once(AGENT_AUDIT_LOG=str(file), AGENT_COMMAND="cp /proc/uptime new.txt")
    written, real = ([json.loads(line) for line in text.splitlines()] for text in (sample, read(file)))
    assert {line["event"] for line in real} == {line["event"] for line in written}
    assert {name.strip("`") for name in table(README, "Event")} == {line["event"] for line in real}

    def shape(line: dict[str, Any]) -> str:
        """The line, less what differs from run to run."""
        path = line.get("path", "").removeprefix("/api/v3")
        line = line | {"time": "TIME", "seconds": 0} | ({"path": path} if path else {})
        return re.sub(r"[0-9a-f]{40}", "COMMIT", json.dumps(line))

    assert {*map(shape, written)} <= {*map(shape, real)}


def test_the_readmes_line_of_a_json_log_is_a_real_one(yours: World) -> None:
    (sample,) = (json.loads(block) for block in fences(README, "json") if '"level"' in block)
    yours.github.open_issue("you/tasks", title="Greet", body="Do it.")
    log = yours.start("--once", AGENT_LOG_FORMAT="json").communicate()[1]
    (line,) = (line for line in map(json.loads, log.splitlines()) if line["message"] == sample["message"])
    assert line | {"time": ""} == sample | {"time": ""}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
    phases = re.search(r"the `phase`, which is (.+?)\.\n", read(README), re.DOTALL)
    assert phases
    assert tuple(re.findall(r"`(\w+)`", phases[1])) == runner.PHASES


def test_the_guides_findings_as_json_are_of_the_real_form(yours: World) -> None:
    (sample,) = map(json.loads, fences(GUIDE, "json"))
    told = json.loads(yours.start("--check", "--json").communicate()[0])
    assert told.keys() == sample.keys()
    assert told["version"] == sample["version"]
    assert {frozenset(row) for row in told["checks"]} == {frozenset(row) for row in sample["checks"]}


# Metrics and the App.


def test_the_readme_lists_every_metric_with_its_labels_values() -> None:
    rows = table(README, "Metric")
    listed = [name for cell in rows for name in re.findall(r"`agent_runner_(\w+)`", cell)]
    assert listed == [*runner.METRICS]
    for cell, (meaning,) in rows.items():
        name = re.findall(r"`agent_runner_(\w+)`", cell)[0]
        metric = runner.METRICS[name]
        if metric.kind == "counter" and metric.label != "status":
            assert [w for w in re.findall(r"`(\w+)`", meaning) if w != metric.label] == [*metric.known], name


def test_the_readmes_alerts_speak_of_metrics_and_values_that_exist() -> None:
    scrape, rules = map(load_yaml, fences(README, "yaml"))
    (job,) = scrape["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["127.0.0.1:8080"]}]
    (group,) = rules["groups"]
    assert len(group["rules"]) == 3
    for rule in group["rules"]:
        names = re.findall(r"agent_runner_(\w+)", rule["expr"])
        assert names
        assert set(names) <= runner.METRICS.keys()
        for label, value in re.findall(r'\{(\w+)="(\w+)"\}', rule["expr"]):
            assert (label, value in runner.OUTCOMES) == ("outcome", True)


# The bench.


def figures(text: str) -> set[str]:
    return set(re.findall(r"\d[\d,]*(?:\.\d+)?", text))


def test_the_readmes_costs_are_those_that_were_measured() -> None:
    told = figures(read(README).partition("\n## What it costs\n")[2].partition("\n## ")[0])
    assert len(told) > 20
    assert told <= figures(read(RESULTS))


def test_the_bench_has_measured_all_and_explains_each_target_that_is_missed() -> None:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in read(RESULTS).split("\n") if "|" in line]
    assert not [row for row in rows if "broken" in row]
    missed = {row[0] for row in rows if "✗" in row}
    explained = {what.lower() for what in re.findall(r"^- \*\*(.+?):\*\*", read(RESULTS), re.MULTILINE)}
    assert missed <= explained


def test_the_manifest_asks_for_what_the_runner_needs_and_no_more() -> None:
    (form,) = fences(APP_GUIDE, "html")
    manifest = json.loads(form.partition('name="manifest"')[2].partition(">")[2].partition("</textarea>")[0])
    needed = runner.PERMISSIONS["dispatch"] | runner.PERMISSIONS["target"] | {"metadata": "read"}
    assert manifest["default_permissions"] == needed
    assert manifest["default_events"] == ["issues"]
    assert (manifest["public"], manifest["hook_attributes"]["active"]) == (False, False)
    listed = {name.strip("`"): access for name, (access, _) in table(APP_GUIDE, "Permission").items()}
    assert listed == needed | {"workflows": "write"}


def test_the_guide_keeps_what_github_answers_to_a_manifest(tmp_path: Path) -> None:
    (script,) = (block for block in fences(APP_GUIDE, "sh") if "conversions" in block)
    answer = {"id": 123456, "pem": "-----BEGIN RSA PRIVATE KEY-----\n", "webhook_secret": "x" * 40}
    (tmp_path / "app.json").write_text(json.dumps(answer))
    local = re.sub(r"^curl .+\n", "", script)
    done = subprocess.run(["sh", "-ec", local], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == f"GITHUB_APP_ID=123456\nGITHUB_WEBHOOK_SECRET={'x' * 40}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["app.pem"]
    assert read(tmp_path / "app.pem") == answer["pem"]
    assert (tmp_path / "app.pem").stat().st_mode & 0o077 == 0


# Files that other programs read.


def test_the_actions_workflow_never_puts_an_issues_text_into_a_script() -> None:
    text = read(ROOT / "docs/examples/agent-runner.yml")
    assert set(re.findall(r"github\.event\.issue\.(\w+)", text)) == {"number"}
    workflow = load_yaml(text)
    assert workflow[True] == {"issues": {"types": ["labeled"]}}  # YAML 1.1 reads `on` as true
    (job,) = workflow["jobs"].values()
    assert job["if"] == "github.event.label.name == 'copilot-agent'"
    *_, last = job["steps"]
    assert last["run"] == 'python runner.py --issue "$NUMBER"'
    assert last["env"]["NUMBER"] == "${{ github.event.issue.number }}"
    assert not any("${{" in step.get("run", "") for step in job["steps"])
    assert job["timeout-minutes"] * 60 > float(Config.variables()["AGENT_TASK_TIMEOUT"].metadata["default"])


def interpolate(text: str, env: Mapping[str, str]) -> str:
    """What Compose makes of ${NAME:-default}."""
    return re.sub(r"\$\{(\w+):-([^}]*)\}", lambda match: env.get(match[1]) or match[2], text)


@pytest.fixture
def service() -> dict[str, Any]:
    service = load_yaml(read(COMPOSE))["services"]["agent-runner"]
    assert isinstance(service, dict)
    return service


def test_only_the_runner_starts_by_itself_and_all_containers_have_walls() -> None:
    services = load_yaml(read(COMPOSE))["services"]
    assert [name for name, service in services.items() if not service.get("profiles")] == ["agent-runner"]
    for service in services.values():
        assert (service["read_only"], service["init"], service["cap_drop"]) == (True, True, ["ALL"])
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["deploy"]["resources"]["limits"]["pids"] > 2 * runner.SPARE_PROCESSES


def test_the_agents_that_may_go_into_the_image_are_those_that_make_agents_runs() -> None:
    offered = re.findall(r'NPM(?:=|: )"([^"]+)"', read(COMPOSE) + read(ROOT / "Dockerfile"))
    assert len({*offered}) == 2
    assert {*offered} <= {agent.packages[0] for agent in REAL_AGENTS.values() if agent.packages}


def test_the_image_says_which_version_it_is() -> None:
    assert f"\nARG VERSION={runner.__version__}\n" in read(ROOT / "Dockerfile")


def test_the_compose_file_hands_on_the_runners_own_defaults(service: dict[str, Any]) -> None:
    """`environment` wins over `env_file`: a variable that stood there could not be set in .env."""
    handed_on = dict(interpolate(line, {}).split("=", 1) for line in service["environment"])
    assert handed_on.keys() == {
        "GITHUB_TOKEN",
        "AGENT_DISPATCH_REPO",
        "AGENT_TARGET_REPO",
        "AGENT_POLL_INTERVAL",
        "AGENT_PROCESSED_LABEL",
    }
    for name, spec in Config.variables().items():
        assert handed_on.get(name, "") in ("", spec.metadata["default"])
    assert service["env_file"] == [{"path": ".env", "required": False}]


def test_the_container_has_time_to_stop_and_keeps_its_state(service: dict[str, Any]) -> None:
    drain = float(Config.variables()["AGENT_DRAIN_SECONDS"].metadata["default"])
    assert float(service["stop_grace_period"].removesuffix("s")) >= drain + runner.SUPERVISOR_GRACE
    folder = "/app/" + Config.variables()["AGENT_STATE_DIR"].metadata["default"]
    assert service["volumes"] == [f"agent-runner-state:{folder}"]
    assert f"\nVOLUME {folder}\n" in read(ROOT / "Dockerfile")


def sources(dockerfile: str) -> Iterator[str]:
    for line in re.findall(r"^COPY (.+)$", dockerfile, re.MULTILINE):
        yield from line.split()[:-1]


def test_the_image_gets_what_it_copies_and_nothing_else() -> None:
    ignore = [line for line in read(ROOT / ".dockerignore").splitlines() if line and line[0] != "#"]
    assert ignore[0] == "*"
    assert sorted(line.removeprefix("!") for line in ignore[1:]) == sorted(sources(read(ROOT / "Dockerfile")))
