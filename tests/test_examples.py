"""The files in docs/examples and the project's own workflow: other programs find nothing wrong with them, and what they
set is what the runner needs."""

from __future__ import annotations

import importlib
import ipaddress
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import make_config
from test_docs import EXAMPLES, GUIDE, ROOT, load_yaml, read, table

import runner
from runner import Config

FOLDER = ROOT / "docs/examples"
MANIFEST, UNIT, TIMER, WORKFLOW = (
    FOLDER / name for name in ("kubernetes.yaml", "agent-runner.service", "agent-runner.timer", "agent-runner.yml")
)
OWN_WORKFLOW = ROOT / ".github/workflows/ci.yml"
NAME = {"app.kubernetes.io/name": "agent-runner"}


def run(*command: str | Path, cwd: Path = ROOT) -> tuple[int, str]:
    """A program's exit status and all that it printed; one of the virtual environment's comes first."""
    beside = Path(sys.executable).parent / command[0]
    done = subprocess.run(
        [beside if beside.exists() else command[0], *command[1:]], cwd=cwd, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def default(name: str) -> float:
    return float(Config.variables()[name].metadata["default"])


def accepted(env: dict[str, str]) -> Config:
    """The settings, if the runner takes them and knows each of them."""
    config = Config.from_env(env)
    assert list(config.unknown()) == []
    return config


def time_to_stop(config: Config) -> float:
    return config.drain_seconds + runner.SUPERVISOR_GRACE


def test_each_example_is_looked_at_here() -> None:
    assert sorted(EXAMPLES) == sorted([MANIFEST, UNIT, TIMER, WORKFLOW])
    pages = "".join(map(read, (GUIDE, ROOT / "docs/scaling.md")))
    assert all(f"(examples/{file.name})" in pages for file in EXAMPLES)


# Kubernetes.


def manifest() -> dict[str, Any]:
    """The objects, by their kinds."""
    found = [*importlib.import_module("yaml").safe_load_all(read(MANIFEST))]
    assert len({document["kind"] for document in found}) == len(found)
    return {document["kind"]: document for document in found}


def pod() -> dict[str, Any]:
    spec: dict[str, Any] = manifest()["Deployment"]["spec"]["template"]["spec"]
    return spec


def container() -> dict[str, Any]:
    (one,) = pod()["containers"]
    return dict(one)


def pod_settings() -> Config:
    objects, spec = manifest(), container()
    (name,) = spec["env"]
    assert name["valueFrom"] == {"fieldRef": {"fieldPath": "metadata.name"}}
    assert spec["envFrom"] == [{"configMapRef": {"name": "agent-runner"}}, {"secretRef": {"name": "agent-runner"}}]
    env = objects["ConfigMap"]["data"] | objects["Secret"]["stringData"]
    return accepted(env | {name["name"]: "agent-runner-5d9c7b6f4-x2x7k"})


def megabytes(size: str) -> float:
    number, unit = size[:-2], size[-2:]
    return float(number) * {"Mi": 1, "Gi": 1024}[unit] * 1.048576


@pytest.mark.parametrize("version", ["1.29", "1.37"])
def test_the_manifest_is_what_kubernetes_knows(version: str) -> None:
    code, told = run(sys.executable, "-m", "kubernetes_validate", "--strict", "-k", version, MANIFEST)
    assert (code, told.count(" passed for resource ")) == (0, len(manifest())), told


@pytest.mark.parametrize(("right", "wrong"), [("replicas:", "replica:"), ("runAsUser: 1000", 'runAsUser: "1000"')])
def test_the_validator_notices_what_kubernetes_does_not_know(tmp_path: Path, right: str, wrong: str) -> None:
    file = tmp_path / "kubernetes.yaml"
    file.write_text(read(MANIFEST).replace(right, wrong), "utf-8")
    code, told = run(sys.executable, "-m", "kubernetes_validate", "--strict", file)
    assert (code, "did not validate" in told) == (1, True)


def test_the_pods_settings_are_good() -> None:
    config = pod_settings()
    assert config.runner_id == "agent-runner-5d9c7b6f4-x2x7k"
    assert ipaddress.ip_address(config.http_host).is_unspecified
    assert config.write_interval == manifest()["Deployment"]["spec"]["replicas"] == 2
    assert pod()["terminationGracePeriodSeconds"] > time_to_stop(config)


def test_the_pods_have_no_rights() -> None:
    assert pod()["automountServiceAccountToken"] is pod()["enableServiceLinks"] is False
    who = pod()["securityContext"]
    assert (who["runAsNonRoot"], who["runAsUser"], who["fsGroup"]) == (True, 1000, 1000)
    assert re.search(r"^USER 1000$", read(ROOT / "Dockerfile"), re.MULTILINE)
    assert who["seccompProfile"] == {"type": "RuntimeDefault"}
    rights = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    assert container()["securityContext"] == rights


def test_a_github_that_is_away_ends_no_pod() -> None:
    (port,) = container()["ports"]
    assert port["containerPort"] == pod_settings().http_port
    assert container()["readinessProbe"]["httpGet"] == {"path": "/healthz", "port": port["name"]}
    assert container()["livenessProbe"]["tcpSocket"] == {"port": port["name"]}


def test_the_pods_can_write_where_the_runner_does_and_have_room_for_it() -> None:
    volumes = {volume["name"]: volume["emptyDir"]["sizeLimit"] for volume in pod()["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container()["volumeMounts"]}
    state = "/app/" + Config.variables()["AGENT_STATE_DIR"].metadata["default"]
    # It is the container's own.
    assert mounts.keys() == {state, "/tmp"}  # nosec B108
    assert pod_settings().disk_budget * 1.1 < megabytes(mounts[state])
    room = sum(map(megabytes, volumes.values()))
    assert room <= megabytes(container()["resources"]["limits"]["ephemeral-storage"])


def test_all_objects_speak_of_the_same_pods() -> None:
    objects = manifest()
    assert all(thing["metadata"] == {"name": "agent-runner", "labels": NAME} for thing in objects.values())
    deployment = objects["Deployment"]["spec"]
    assert deployment["template"]["metadata"]["labels"] == NAME
    selectors = [deployment["selector"], objects["PodDisruptionBudget"]["spec"]["selector"]]
    selectors += [
        objects["NetworkPolicy"]["spec"]["podSelector"],
        {"matchLabels": objects["Service"]["spec"]["selector"]},
    ]
    selectors += [spread["labelSelector"] for spread in pod()["topologySpreadConstraints"]]
    assert selectors == [{"matchLabels": NAME}] * 5
    assert objects["PodDisruptionBudget"]["spec"]["maxUnavailable"] < deployment["replicas"]


def test_the_image_has_this_version() -> None:
    assert container()["image"].endswith(f"/agent-runner:{runner.__version__}")


# systemd.


def settings_of(unit: Path) -> dict[str, list[str]]:
    """What a unit sets, less its sections: none of these names is in two of them."""
    lines = re.findall(r"^(\w+)=(.*)$", read(unit), re.MULTILINE)
    return {name: [value for other, value in lines if other == name] for name, _ in lines}


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """A folder with both units, which start a Python that is there."""
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not on this machine; Debian has it in the package systemd")
    text = read(UNIT).replace("/srv/agent-runner/.venv/bin/python", sys.executable)
    (tmp_path / UNIT.name).write_text(text, "utf-8")
    shutil.copy(TIMER, tmp_path)
    return tmp_path


def test_systemd_finds_nothing_wrong_with_the_units(units: Path) -> None:
    assert run("systemd-analyze", "verify", units / UNIT.name, units / TIMER.name) == (0, "")


@pytest.mark.parametrize(
    ("right", "wrong"), [("Restart=", "Restarts="), ("=mixed", "=mixt"), ("landlock_add_rule", "landlock_rule")]
)
def test_systemd_would_notice_a_mistake(units: Path, right: str, wrong: str) -> None:
    file = units / UNIT.name
    file.write_text(file.read_text("utf-8").replace(right, wrong, 1), "utf-8")
    assert file.name in run("systemd-analyze", "verify", file)[1]


def test_systemd_calls_the_service_well_walled(units: Path) -> None:
    _, told = run("systemd-analyze", "security", "--offline=true", units / UNIT.name)
    exposure = re.search(r"Overall exposure level for agent-runner\.service: ([\d.]+)", told)
    assert exposure
    assert float(exposure[1]) < 2  # of 10; the lower the better


def test_the_services_settings_are_good(tmp_path: Path) -> None:
    unit = settings_of(UNIT)
    (tmp_path / "agent-runner").mkdir()
    (tmp_path / "token").write_text("t0ken\n")
    env = dict(line.split("=", 1) for line in unit["Environment"])
    assert env["GITHUB_TOKEN_FILE"] == f"%d/{unit['LoadCredential'][0].partition(':')[0]}"
    assert env["AGENT_STATE_DIR"] == f"%S/{unit['StateDirectory'][0]}"
    assert env["AGENT_AUDIT_LOG"].startswith(f"%L/{unit['LogsDirectory'][0]}/")
    real = {name: re.sub(r"^%[dSL]", str(tmp_path), value) for name, value in env.items()}
    config = accepted(real)
    assert config.state_dir == tmp_path / "agent-runner"
    assert float(unit["TimeoutStopSec"][0]) > time_to_stop(config)


def test_the_service_stops_the_runner_and_not_its_agents() -> None:
    unit = settings_of(UNIT)
    assert unit["KillMode"] == ["mixed"]
    assert unit["OOMPolicy"] == ["continue"]
    assert unit["ExecReload"] == ["/bin/kill -HUP $MAINPID"]
    assert (unit["Restart"], unit["RestartPreventExitStatus"]) == (["on-failure"], ["2"])
    assert table(GUIDE, "Exit code")["2"][0].startswith("The settings are wrong")


def test_the_service_leaves_the_runner_its_own_walls() -> None:
    unit = settings_of(UNIT)
    calls = " ".join(unit["SystemCallFilter"]).split()
    assert {"landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self"} <= {*calls}
    assert not any(call.startswith("~") for call in calls)
    assert not {"ProtectProc", "ProcSubset", "MemoryDenyWriteExecute", "PrivateNetwork", "DynamicUser"} & unit.keys()


def test_the_timers_service_ends_by_itself() -> None:
    drop_in = dict(re.findall(r"^#   (\w+)=(.+)$", read(TIMER), re.MULTILINE))
    assert drop_in == {
        "Type": "oneshot",
        "ExecStart": f"{settings_of(UNIT)['ExecStart'][0]} --once",
        "Restart": "no",
    }
    assert "OnUnitInactiveSec" in settings_of(TIMER)  # OnUnitActiveSec would count from the start


# GitHub Actions.


@pytest.fixture(params=[WORKFLOW, OWN_WORKFLOW], ids=lambda file: file.name)
def workflow(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy, for mistakes too."""
    return Path(shutil.copy(request.param, tmp_path))


def lint(file: Path) -> tuple[int, str]:
    return run("check-jsonschema", "--builtin-schema", "vendor.github-workflows", file)


def audit(file: Path) -> tuple[int, str]:
    config = ROOT / ".github/zizmor.yml"
    code, told = run("zizmor", "--offline", "--quiet", "--persona", "pedantic", "--config", config, file)
    return code, told


def test_a_workflow_is_what_github_knows(workflow: Path) -> None:
    code, told = lint(workflow)
    assert code == 0, told


def test_zizmor_finds_nothing_unsafe(workflow: Path) -> None:
    code, told = audit(workflow)
    assert code == 0, told


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("persist-credentials: false", "fetch-depth: 1"),
        ("permissions: {}", "permissions: write-all"),
        ("@v6", ""),
        ("- run: ", '- run: echo "${{ github.event.issue.title }}"; '),
    ],
)
def test_a_hole_in_a_workflow_is_found(workflow: Path, right: str, wrong: str) -> None:
    text = read(workflow)
    assert right in text
    workflow.write_text(text.replace(right, wrong, 1), "utf-8")
    assert audit(workflow)[0] != 0


@pytest.mark.parametrize(
    ("right", "wrong"), [("runs-on:", "run-on:"), ("permissions: {}", "permissions: all"), ("cancel-in-", "cancel-")]
)
def test_a_mistake_in_a_workflow_is_found(workflow: Path, right: str, wrong: str) -> None:
    workflow.write_text(read(workflow).replace(right, wrong, 1), "utf-8")
    assert lint(workflow)[0] == 1


def test_the_jobs_settings_are_good() -> None:
    (job,) = load_yaml(read(WORKFLOW))["jobs"].values()
    *_, last = job["steps"]
    env = {name: re.sub(r"\$\{\{.*?\}\}", "1", value) for name, value in last["env"].items()}
    assert env.pop("NUMBER") == "1"
    config = accepted(env | {"AGENT_DISPATCH_REPO": "you/tasks", "GITHUB_TOKEN": "t0ken"})
    assert config.target_repo == make_config({"AGENT_TARGET_REPO": "you/project"}).target_repo


def test_the_projects_workflow_runs_what_the_makefile_has() -> None:
    steps = [step for job in load_yaml(read(OWN_WORKFLOW))["jobs"].values() for step in job["steps"]]
    asked = {name for step in steps for name in re.findall(r"^make (\S+)$", step.get("run", ""), re.MULTILINE)}
    assert asked == {"lint", "audit", "demo", "test"}
    assert all(f"\n{name}: " in read(ROOT / "Makefile") for name in asked)


def test_the_projects_workflow_begins_with_the_oldest_python_that_will_do() -> None:
    versions = load_yaml(read(OWN_WORKFLOW))["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert versions == [f"3.{minor}" for minor in range(11, 11 + len(versions))]
    assert f'# requires-python = ">={versions[0]}"' in read(ROOT / "runner.py")


def test_the_image_is_built_with_the_runners_version() -> None:
    script = load_yaml(read(OWN_WORKFLOW))["jobs"]["image"]["steps"][-1]["run"]
    first = script.splitlines()[0]
    assert run("sh", "-ec", f'{first}\nprintf %s "$version"') == (0, runner.__version__)
    assert "org.opencontainers.image.version=$VERSION" in read(ROOT / "Dockerfile")
