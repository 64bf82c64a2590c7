"""Git and the workspace: real repositories, real git over HTTP."""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
from conftest import TARGET, World
from standin import Fault

from runner import (
    Checkout,
    Config,
    Git,
    Mirror,
    RefMoved,
    SignIn,
    TaskFailed,
    Unreachable,
    diffstat,
    disk_usage,
    remove_tree,
)

MAIN = "refs/heads/main"
BRANCH = "refs/heads/agent-task-1"


class Place:
    """One checkout of the target, and what a test does with it."""

    def __init__(self, world: World, name: str = "run", **env: str) -> None:
        self.world, self.config = world, world.config(**env)
        self.git = Git(SignIn(self.config))
        self.mirror = Mirror(self.git, self.config, TARGET)
        commit = self.mirror.fetch(MAIN, self.git.refs(TARGET, MAIN)[1][MAIN])
        folder = self.config.state_dir / "work" / name
        self.checkout = Checkout(self.git, [self.mirror.path], folder, "main", commit, self.config.ignore)
        self.checkout.fill("agent-task-1")
        self.path = self.checkout.workspace.path

    def commit(self) -> str:
        tree = self.checkout.take(self.config)
        return self.checkout.commit(tree, "A change\n", self.config) if tree else ""

    def push(self, commit: str, old: str = "") -> None:
        self.git.push(TARGET, {BRANCH: (old, commit)}, self.checkout.git_dir)

    def changed(self) -> list[str]:
        """The paths that a commit of the workspace changes, with git's letter for how."""
        made, base = self.commit(), self.checkout.workspace.commit
        listed = self.git("diff", "--name-status", base, made, git_dir=self.checkout.git_dir)
        return sorted(listed.replace("\t", " ").splitlines())

    def agents_git(self, *command: str) -> str:
        """Git as the agent would run it, with its own `.git`."""
        env = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}
        done = subprocess.run(["git", *command], cwd=self.path, env=env, capture_output=True, text=True, check=True)
        return done.stdout


@pytest.fixture
def place(world: World) -> Place:
    return Place(world)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_workspace_holds_the_files_and_a_repository_with_history(world: World) -> None:
    world.github.commit(TARGET, {"second.txt": "2\n"}, message="Second")
    place = Place(world)
    assert (place.path / "second.txt").read_text() == "2\n"
    assert place.agents_git("log", "--format=%s").splitlines()[0] == "Second"
    assert place.agents_git("status", "--short") == ""
    assert place.agents_git("branch", "--show-current") == "agent-task-1\n"
    assert place.agents_git("remote") == ""
    place.agents_git("show", "HEAD~1:README.md")


def test_making_a_workspace_copies_no_history(place: Place) -> None:
    own = [path for path in (place.path / ".git" / "objects").rglob("*") if path.is_file()]
    assert [path.name for path in own] == ["alternates"]


def test_every_kind_of_change_is_taken(place: Place) -> None:
    write(place.path / "README.md", "changed\n")
    write(place.path / "new/deep/file with ünïcode.txt", "new\n")
    (place.path / "src/app.py").unlink()
    (place.path / "link").symlink_to("README.md")
    assert place.changed() == ["A link", "A new/deep/file with ünïcode.txt", "D src/app.py", "M README.md"]


def test_an_executable_stays_one(place: Place) -> None:
    (place.path / "src/app.py").chmod(0o755)
    made = place.commit()
    listed = place.git("ls-tree", "-r", made, git_dir=place.checkout.git_dir)
    assert "100755 blob" in next(line for line in listed.splitlines() if "app.py" in line)


def test_bytes_are_kept_as_they_are(world: World) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    files: dict[str, str | bytes] = {
        ".gitattributes": "*.bin filter=lfs diff=lfs merge=lfs -text\n",
        "a.bin": pointer,
        "dos.txt": b"one\r\ntwo\r\n",
    }
    world.github.commit(TARGET, files)
    place = Place(world)
    assert (place.path / "a.bin").read_bytes() == pointer
    assert (place.path / "dos.txt").read_bytes() == b"one\r\ntwo\r\n"
    (place.path / "dos.txt").write_bytes(b"one\r\nthree\r\n")
    made = place.commit()
    shown = place.git("show", f"{made}:dos.txt", git_dir=place.checkout.git_dir)
    assert shown == "one\r\nthree\r\n"
    assert place.changed() == ["M dos.txt"]


def test_ignored_files_stay_out(world: World) -> None:
    world.github.commit(TARGET, {".gitignore": "build/\n"})
    place = Place(world)
    write(place.path / "build/out.o", "x")
    write(place.path / "kept.txt", "x")
    assert place.changed() == ["A kept.txt"]


def test_nothing_changed_makes_no_commit(place: Place) -> None:
    (place.path / "README.md").touch()
    assert place.commit() == ""


def test_what_the_agent_commits_counts_as_files_only(place: Place) -> None:
    write(place.path / "new.txt", "new\n")
    place.agents_git("add", ".")
    place.agents_git("commit", "-qm", "The agent's own")
    made = place.commit()
    log = place.git("log", "--format=%s %an", made, git_dir=place.checkout.git_dir).splitlines()
    assert log[0] == "A change agent-runner"
    assert len(log) == 2


def test_nothing_that_the_agent_sets_in_its_repository_runs(place: Place) -> None:
    trap = place.path.parent / "trapped"
    program = place.path.parent / "program.sh"
    program.write_text(f"#!/bin/sh\ntouch {trap}\ncat\n")
    program.chmod(0o755)
    for key in ("core.fsmonitor", "core.sshCommand", "filter.x.clean", "filter.x.smudge", "diff.external"):
        place.agents_git("config", key, str(program))
    write(place.path / ".gitattributes", "* filter=x diff=x\n")
    hook = place.path / ".git/hooks/pre-commit"
    write(hook, program.read_text())
    hook.chmod(0o755)
    write(place.path / "new.txt", "new\n")
    assert place.changed() == ["A .gitattributes", "A new.txt"]
    place.push(place.commit())
    assert not trap.exists()


@pytest.mark.parametrize("name", [".git/config", ".git"])
def test_a_repository_in_the_repository_is_refused(place: Place, name: str) -> None:
    write(place.path / "sub" / name, "[core]\n\tfsmonitor = /bin/false\n")
    with pytest.raises(TaskFailed, match="`sub` is a git repository"):
        place.commit()


def test_an_ignored_repository_in_the_repository_does_not_matter(world: World) -> None:
    world.github.commit(TARGET, {".gitignore": "vendor/\n"})
    place = Place(world)
    write(place.path / "vendor/lib/.git/config", "")
    write(place.path / "new.txt", "")
    assert place.changed() == ["A new.txt"]


@pytest.mark.parametrize("target", ["/etc/passwd", "../../secret", "../src/../../x"])
def test_a_link_that_leads_out_is_refused(place: Place, target: str) -> None:
    (place.path / "src/link").symlink_to(target)
    with pytest.raises(TaskFailed, match="`src/link` is a link that leads out"):
        place.commit()


def test_two_links_that_lead_out_together_are_refused(place: Place) -> None:
    write(place.path / "a/b/file", "")
    (place.path / "a/b/up").symlink_to("../..")
    (place.path / "a/b/out").symlink_to("up/../outside")
    with pytest.raises(TaskFailed, match="`a/b/out` is a link that leads out"):
        place.commit()


def test_a_workspace_that_is_a_link_is_refused(place: Place) -> None:
    shutil.rmtree(place.path)
    place.path.symlink_to("/usr/share")
    with pytest.raises(TaskFailed, match="replaced by a link"):
        place.commit()


def test_a_workspace_that_is_gone_is_refused(place: Place) -> None:
    shutil.rmtree(place.path)
    with pytest.raises(TaskFailed, match=r"`\.` cannot be read"):
        place.commit()


def test_what_is_written_beside_the_workspace_is_not_trusted(place: Place) -> None:
    trap = place.path.parent / "trapped"
    place.checkout.new_files()  # which makes the repository
    with (place.checkout.git_dir / "config").open("a") as config:
        config.write(f"[core]\n\tsshCommand = touch {trap}\n[http]\n\tproxy = http://127.0.0.1:1\n")
    write(place.path / "new.txt", "new\n")
    place.push(place.commit())
    assert not trap.exists()


def test_line_ends_that_nobody_touched_stay(world: World) -> None:
    files: dict[str, str | bytes] = {"a.txt": b"one\r\ntwo\r\n", "b.bat": b"x\ny\r\n"}
    world.github.commit(TARGET, files)
    world.github.commit(TARGET, {".gitattributes": "*.txt text\n*.bat text eol=crlf\n"})
    place = Place(world)
    assert (place.path / "a.txt").read_bytes() == b"one\r\ntwo\r\n"
    assert place.commit() == ""
    write(place.path / "new.txt", "new\n")
    assert place.changed() == ["A new.txt"]


def test_a_name_that_is_no_text_can_be_shown(place: Place) -> None:
    Path(os.fsdecode(os.fsencode(place.path) + b"/caf\xe9.txt")).write_text("x")
    base, made = place.checkout.workspace.commit, place.commit()
    diffstat(place.git, place.checkout.git_dir, base, made).encode()


def test_what_a_killed_git_leaves_in_the_mirror_is_cleared(world: World, place: Place) -> None:
    for name in (place.mirror.path / "refs/mirror").iterdir():
        name.with_suffix(".lock").touch()
    world.github.commit(TARGET, {"second.txt": "2\n"})
    Place(world, "second")


def test_a_link_within_is_taken(place: Place) -> None:
    (place.path / "src/link").symlink_to("../README.md")
    assert place.changed() == ["A src/link"]


def test_a_pipe_in_place_of_a_file_is_refused(place: Place) -> None:
    (place.path / "README.md").unlink()
    os.mkfifo(place.path / "README.md")
    with pytest.raises(TaskFailed, match="cannot be committed"):
        place.commit()


def test_too_many_files_are_refused(world: World) -> None:
    place = Place(world, AGENT_MAX_CHANGED_FILES="2")
    for index in range(3):
        write(place.path / f"{index}.txt", "")
    with pytest.raises(TaskFailed, match="3 files were changed; AGENT_MAX_CHANGED_FILES"):
        place.commit()


def test_too_many_bytes_are_refused(world: World) -> None:
    place = Place(world, AGENT_MAX_CHANGED_BYTES="1000")
    write(place.path / "big.txt", "x" * 1001)
    with pytest.raises(TaskFailed, match="1,001 bytes; AGENT_MAX_CHANGED_BYTES"):
        place.commit()


def test_workflows_are_refused_unless_allowed(world: World) -> None:
    for name, env in (("a", {}), ("b", {"AGENT_ALLOW_WORKFLOWS": "yes"})):
        place = Place(world, name, **env)
        write(place.path / ".github/workflows/ci.yml", "on: push\n")
        if env:
            assert place.changed() == ["A .github/workflows/ci.yml"]
        else:
            with pytest.raises(TaskFailed, match="is a workflow"):
                place.commit()


def test_a_branch_is_created_once(world: World, place: Place) -> None:
    write(place.path / "new.txt", "new\n")
    made = place.commit()
    place.push(made)
    assert world.github.git(TARGET, "rev-parse", "agent-task-1").strip() == made
    other = Place(world, "other")
    write(other.path / "other.txt", "other\n")
    with pytest.raises(RefMoved, match="from somebody else"):
        other.push(other.commit())
    assert world.github.git(TARGET, "rev-parse", "agent-task-1").strip() == made


def test_a_push_whose_answer_was_lost_is_found_done(world: World, place: Place) -> None:
    write(place.path / "new.txt", "new\n")
    made = place.commit()
    world.github.faults.append(Fault(kind="git", method="POST", path=".*receive-pack", drop="after"))
    place.push(made)
    place.push(made)
    assert world.github.git(TARGET, "rev-parse", "agent-task-1").strip() == made


def test_a_branch_that_the_targets_rules_refuse_is_told(world: World, place: Place) -> None:
    hook = Path(world.github.repository(TARGET).path) / "hooks/pre-receive"
    write(hook, "#!/bin/sh\necho 'GH013: rule violations' >&2\nexit 1\n")
    hook.chmod(0o755)
    write(place.path / "new.txt", "new\n")
    with pytest.raises(TaskFailed, match="refuses the push") as refused:
        place.push(place.commit())
    assert "GH013" in refused.value.output


def test_a_diffstat_names_what_changed(place: Place) -> None:
    write(place.path / "README.md", "changed\n")
    base, made = place.checkout.workspace.commit, place.commit()
    stat = diffstat(place.git, place.checkout.git_dir, base, made)
    assert "README.md | 2 +-" in stat


def test_what_the_agent_made_unreadable_is_deleted(place: Place) -> None:
    write(place.path / "a/b/c.txt", "x")
    (place.path / "a/b").chmod(0)
    (place.path / "a").chmod(0)
    outside = place.path.parent.parent / "outside"
    outside.mkdir(mode=0o500)
    (place.path / "link").symlink_to(outside)
    remove_tree(place.checkout.folder)
    assert not place.checkout.folder.exists()
    assert outside.stat().st_mode & 0o777 == 0o500


def make_deep(folder: Path, levels: int) -> None:
    """Folders in folders, more than a path can name."""
    here = os.open(folder, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir("d", dir_fd=here)
        inner = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)


def test_what_is_deeper_than_python_can_go_is_counted_and_deleted(place: Place) -> None:
    make_deep(place.path, 3000)
    assert disk_usage(place.checkout.folder) > 0
    remove_tree(place.checkout.folder)
    assert not place.checkout.folder.exists()


def test_a_link_in_place_of_a_folder_is_deleted_and_not_followed(tmp_path: Path) -> None:
    write(tmp_path / "kept/folder/file", "x")
    (tmp_path / "kept/folder").chmod(0o500)
    (tmp_path / "link").symlink_to("kept")
    remove_tree(tmp_path / "link")
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "kept/folder").stat().st_mode & 0o777 == 0o500
    assert (tmp_path / "kept/folder/file").exists()


def test_a_commit_that_the_mirror_has_is_not_fetched_again(world: World, place: Place) -> None:
    before = len(world.github.log)
    commit = place.checkout.workspace.commit
    assert place.mirror.fetch(MAIN, commit) == commit
    assert len(world.github.log) == before


def test_a_branch_that_became_a_folder_can_be_fetched(world: World, place: Place) -> None:
    for ref in ("refs/heads/topic", "refs/heads/topic/part"):
        world.github.git(TARGET, "update-ref", ref, "main")
        place.mirror.fetch(ref, "")
        world.github.git(TARGET, "update-ref", "-d", ref)


def test_threads_share_a_mirror(world: World) -> None:
    places: list[Place] = []
    threads = [threading.Thread(target=lambda name=str(index): places.append(Place(world, name))) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(places) == 6


def test_an_empty_repository_has_no_default_branch(world: World) -> None:
    world.github.add_repository("acme/empty", files=None)
    config = world.config()
    found = Git(SignIn(config)).refs("acme/empty", "HEAD")
    assert found == ("", {})


@pytest.mark.parametrize(("name", "hint"), [("acme/nowhere", "does not exist"), (TARGET, "may not")])
def test_a_repository_that_the_token_may_not_read_is_told(world: World, name: str, hint: str) -> None:
    world.github.hidden.add(TARGET)
    config = world.config()
    with pytest.raises(TaskFailed, match=hint):
        Git(SignIn(config)).refs(name, "HEAD")


def test_a_wrong_token_is_told(world: World) -> None:
    config = world.config(GITHUB_TOKEN="ghp_wrong")
    with pytest.raises(TaskFailed, match="cannot be read or pushed to"):
        Git(SignIn(config)).refs(TARGET, "HEAD")


def test_a_push_that_is_not_allowed_is_told(world: World, place: Place) -> None:
    world.github.push_denied.add(TARGET)
    write(place.path / "new.txt", "new\n")
    with pytest.raises(TaskFailed, match="the token may not"):
        place.push(place.commit())


@pytest.mark.parametrize("fault", [{"status": 502}, {"status": 503}, {"drop": "before"}])
def test_a_git_server_in_trouble_is_worth_another_try(world: World, fault: dict[str, str]) -> None:
    world.github.faults.append(Fault(kind="git", **fault))  # type: ignore[arg-type]
    config = world.config()
    with pytest.raises(Unreachable):
        Git(SignIn(config)).refs(TARGET, "HEAD")


def spy(folder: Path) -> Path:
    """A `git` that writes down how it was called, and then is git."""
    real, seen = shutil.which("git"), folder / "seen"
    seen.mkdir(parents=True)
    program = folder / "bin/git"
    write(program, f'#!/bin/sh\nprintf "%s\\n" "$@" > {seen}/$$.argv\nenv > {seen}/$$.env\nexec {real} "$@"\n')
    program.chmod(0o755)
    return folder


def test_the_token_is_in_no_argument_address_file_or_object(world: World, tmp_path: Path) -> None:
    watched = spy(tmp_path / "spy")
    world.env["PATH"] = f"{watched}/bin:{world.env['PATH']}"
    place = Place(world)
    write(place.path / "new.txt", "new\n")
    place.push(place.commit())
    login = base64.b64encode(f"x-access-token:{world.github.token}".encode())
    secrets = [world.github.token.encode(), login]
    seen = list((watched / "seen").iterdir())
    argvs = [path.read_bytes() for path in seen if path.suffix == ".argv"]
    assert any(b"push" in argv for argv in argvs)
    stored = [path.read_bytes() for path in place.config.state_dir.rglob("*") if path.is_file()]
    objects = place.git("cat-file", "--batch-all-objects", "--batch", git_dir=place.checkout.git_dir)
    for secret in secrets:
        assert not [argv for argv in argvs if secret in argv]
        assert not [data for data in stored if secret in data]
        assert secret.decode() not in objects
    for path in seen:
        if path.suffix == ".env" and secrets[1] in path.read_bytes():
            command = path.with_suffix(".argv").read_text().split("\n")[0]
            assert command in ("ls-remote", "fetch", "push")


def test_the_machines_git_configuration_is_not_read(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    write(home / ".gitconfig", '[url "http://127.0.0.1:1/"]\n\tinsteadOf = http://\n[core]\n\tbare = x\n')
    write(home / ".netrc", "machine 127.0.0.1 login a password b\n")
    world.env |= {"HOME": str(home), "XDG_CONFIG_HOME": str(home), "GIT_DIR": "/nowhere"}
    world.env["GIT_TRACE"] = str(tmp_path / "trace")
    monkeypatch.chdir(tmp_path)
    subprocess.run(["git", "init", "--quiet"], check=True, cwd=tmp_path)
    Place(world)
    assert not (tmp_path / "trace").exists()


def test_what_git_may_need_of_the_network_settings_is_passed_on(world: World, config: Config) -> None:
    env = {"HTTPS_PROXY": "http://p:1", "no_proxy": "x", "SSL_CERT_FILE": "/c", "OTHER": "no"}
    passed = Git(SignIn(world.config(**env)))._env
    assert {name: passed[name] for name in env if name in passed} == {
        name: value for name, value in env.items() if name != "OTHER"
    }
