"""What gets into a commit, when who wrote the files means harm."""

from __future__ import annotations

import os
import re
import socket
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import PATCH, TARGET, World
from test_workspace import Place, make_deep, spy, write

import runner
from runner import Refused, TaskFailed, remove_tree


@pytest.fixture
def place(world: World) -> Place:
    return Place(world)


def refused(place: Place, why: str) -> None:
    with pytest.raises(Refused, match=why):
        place.commit()


# -- before git looks ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["new.bin", "src/app.py", "empty.txt"])
def test_a_file_of_10_gb_is_refused_before_git_reads_it(world: World, tmp_path: Path, name: str) -> None:
    world.github.commit(TARGET, {"empty.txt": ""})
    watched = spy(tmp_path / "spy")
    place = Place(world, PATH=f"{watched}/bin:{world.env['PATH']}")
    os.truncate(os.open(place.path / name, os.O_CREAT | os.O_WRONLY), 10 * 2**30)
    refused(place, "10,737,418,240 bytes; AGENT_MAX_CHANGED_BYTES")
    commands = [path.read_text().split("\n")[0] for path in (watched / "seen").glob("*.argv")]
    assert "ls-files" in commands
    assert "add" not in commands


def test_what_was_only_touched_does_not_count(world: World) -> None:
    world.github.commit(TARGET, {f"{number}.txt": "x" * 100 for number in range(10)})
    place = Place(world, AGENT_MAX_CHANGED_FILES="1", AGENT_MAX_CHANGED_BYTES="50")
    for file in place.path.glob("*.txt"):
        os.utime(file, (1, 1))
    (place.path / "1.txt").unlink()
    assert place.changed() == ["D 1.txt"]


def test_files_that_keep_their_length_count_too(world: World) -> None:
    world.github.commit(TARGET, {f"{number}.txt": "x" for number in range(3)})
    place = Place(world, AGENT_MAX_CHANGED_FILES="2")
    for number in range(3):
        write(place.path / f"{number}.txt", "y")
    refused(place, "3 files were changed; AGENT_MAX_CHANGED_FILES")


def test_deleted_files_count_too(world: World) -> None:
    world.github.commit(TARGET, {f"{number}.txt": "x" for number in range(3)})
    place = Place(world, AGENT_MAX_CHANGED_FILES="2")
    for number in range(3):
        (place.path / f"{number}.txt").unlink()
    refused(place, "3 files were changed; AGENT_MAX_CHANGED_FILES")


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(os.path.relpath(path))  # an address has few characters


@pytest.mark.parametrize("make", [os.mkfifo, make_socket], ids=["pipe", "socket"])
@pytest.mark.parametrize("name", ["new", "src/app.py"])
def test_what_is_no_file_is_refused(
    place: Place, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], None], name: str
) -> None:
    monkeypatch.chdir(place.path)
    (place.path / name).unlink(missing_ok=True)
    make(place.path / name)
    refused(place, f"`{name}` is a pipe, a socket or a device")


def test_a_pipe_that_is_ignored_does_not_matter(world: World) -> None:
    world.github.commit(TARGET, {".gitignore": "tmp/\n"})
    place = Place(world)
    (place.path / "tmp").mkdir()
    os.mkfifo(place.path / "tmp/pipe")
    write(place.path / "new.txt", "x")
    assert place.changed() == ["A new.txt"]


@pytest.mark.parametrize("name", [".gitignore", ".gitattributes", ".gitmodules", "src/.gitignore"])
@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "too long"])
def test_git_does_not_wait_for_its_own_files(place: Place, name: str, kind: str) -> None:
    pipe = place.path.parent / "pipe"
    os.mkfifo(pipe)
    if kind == "pipe":
        pipe.rename(place.path / name)
    elif kind == "link to a pipe":
        (place.path / name).symlink_to(pipe)
    else:
        os.truncate(os.open(place.path / name, os.O_CREAT | os.O_WRONLY), 2**30)
    refused(place, f"`{name}` is not a file that git should read")


def test_a_folder_or_a_link_to_nothing_in_place_of_gits_own_files_does_no_harm(place: Place) -> None:
    write(place.path / "src/.gitignore/file", "x")
    (place.path / ".gitattributes").symlink_to("nowhere")
    assert place.changed() == ["A .gitattributes", "A src/.gitignore/file"]


def test_a_file_that_cannot_be_read_is_refused(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    write(place.path / "locked.txt", "x")
    monkeypatch.setattr("runner.os.access", lambda path, mode: Path(path).name != "locked.txt")  # root may read all
    refused(place, "`locked.txt` cannot be read")


def test_a_link_to_what_cannot_be_read_is_a_link(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    (place.path / "link").symlink_to("nowhere")
    assert place.changed() == ["A link"]


def test_folders_that_are_deeper_than_a_path_can_name_are_refused(place: Place) -> None:
    make_deep(place.path, 3000)
    refused(place, "cannot be read")
    remove_tree(place.checkout.folder)  # pytest cannot


def test_a_repository_whose_name_looks_like_a_pattern_is_refused(world: World) -> None:
    world.github.commit(TARGET, {".gitignore": "/ignored/\n"})
    place = Place(world)
    write(place.path / ":/ignored/.git/config", "[core]\n\tfsmonitor = /bin/false\n")
    refused(place, "`:/ignored` is a git repository of its own")


def test_what_was_written_into_the_runners_repository_meanwhile_does_not_count(place: Place) -> None:
    write(place.path / ".github/workflows/ci.yml", "on: push\n")
    private, base = place.checkout.git_dir, place.checkout.workspace.commit
    place.checkout.new_files()  # which makes the repository
    place.checkout.run("add", ".")
    tree = place.checkout.run("write-tree").strip()
    write(private / "refs/replace" / place.checkout.run("rev-parse", f"{base}^{{tree}}").strip(), tree)
    write(private / "info/exclude", "*\n")
    refused(place, "is a workflow")


# -- what a change must not bring ------------------------------------------------------------------


def submodule_in(world: World, settings: str = "") -> None:
    """The target gets a submodule at vendor/lib."""
    git = world.github.git
    files = f'[submodule "lib"]\n\tpath = vendor/lib\n\turl = https://example.com/lib.git\n{settings}'
    base = world.github.commit(TARGET, {".gitmodules": files})
    git(TARGET, "read-tree", base)
    git(TARGET, "update-index", "--add", "--cacheinfo", f"160000,{base},vendor/lib")
    tree = git(TARGET, "write-tree")
    git(TARGET, "update-ref", "refs/heads/main", git(TARGET, "commit-tree", tree, "-p", base, "-m", "A submodule"))


@pytest.mark.parametrize("settings", ["", "\tignore = all\n"])
def test_a_submodule_that_is_taken_away_is_refused(world: World, settings: str) -> None:
    submodule_in(world, settings)
    place = Place(world)
    assert place.commit() == ""
    (place.path / "vendor/lib").rmdir()
    refused(place, "`vendor/lib` is or describes a submodule")


def test_files_in_place_of_a_submodule_are_refused(world: World) -> None:
    submodule_in(world)
    place = Place(world)
    (place.path / "vendor/lib").rmdir()
    write(place.path / "vendor/lib", "x")
    refused(place, "`vendor/lib` is or describes a submodule")


@pytest.mark.parametrize("name", [".gitmodules", ".GITMODULES"])
def test_the_address_of_a_submodule_stays(world: World, name: str) -> None:
    submodule_in(world)
    place = Place(world)
    write(place.path / name, '[submodule "lib"]\n\tpath = vendor/lib\n\turl = https://example.com/other.git\n')
    refused(place, f"`{name}` is or describes a submodule")


def replace_folder(path: Path) -> None:
    """A folder that holds what a workflow would, and a link to it in the workflows' place."""
    write(path / "elsewhere/workflows/ci.yml", "on: push\n")
    (path / ".github").symlink_to("elsewhere")


def replace_workflows(path: Path) -> None:
    write(path / "elsewhere/ci.yml", "on: push\n")
    (path / ".github").mkdir()
    (path / ".github/workflows").symlink_to("../elsewhere")


WORKFLOWS: dict[str, Callable[[Path], object]] = {
    "new": lambda path: write(path / ".github/workflows/ci.yml", "on: push\n"),
    "in other letters": lambda path: write(path / ".GitHub/Workflows/ci.yml", "on: push\n"),
    "deeper": lambda path: write(path / ".github/workflows/a/b\nc.yml", "on: push\n"),
    "the folder is a link": replace_folder,
    "the inner folder is a link": replace_workflows,
    "the folder is a file": lambda path: write(path / ".github", "x"),
    "the inner folder is a file": lambda path: write(path / ".github/workflows", "x"),
}


@pytest.mark.parametrize("case", WORKFLOWS)
def test_workflows_are_known_in_every_form(world: World, case: str) -> None:
    place = Place(world)
    WORKFLOWS[case](place.path)
    refused(place, "is a workflow; this runner may not")
    place = Place(world, "allowed", AGENT_ALLOW_WORKFLOWS="yes")
    WORKFLOWS[case](place.path)
    assert place.commit()


def test_a_workflow_is_not_deleted_either_and_its_neighbours_are_free(world: World) -> None:
    world.github.commit(TARGET, {".github/workflows/ci.yml": "on: push\n", ".github/CODEOWNERS": "* @acme\n"})
    place = Place(world)
    write(place.path / ".github/CODEOWNERS", "* @octocat\n")
    write(place.path / "workflows/notes.txt", "x")
    assert place.changed() == ["A workflows/notes.txt", "M .github/CODEOWNERS"]
    (place.path / ".github/workflows/ci.yml").unlink()
    refused(place, "`.github/workflows/ci.yml` is a workflow")


LINKS = {
    "to the configuration": ("link", ".git/config"),
    "to it in other letters": ("src/link", "../.GIT/hooks"),
    "past the top": ("src/link", "../../tree/README.md"),
    "through what stays here": ("src/link", "../built/../../../x"),
    "to itself and out": ("link", "link/../../x"),
}


@pytest.mark.parametrize("case", LINKS)
def test_a_link_must_stay_within_as_it_reads_and_as_it_leads(world: World, case: str) -> None:
    world.github.commit(TARGET, {".gitignore": "built\n"})
    place = Place(world)
    (place.path / "one/two/three/four").mkdir(parents=True)
    (place.path / "built").symlink_to("one/two/three/four")
    name, target = LINKS[case]
    (place.path / name).symlink_to(target)
    refused(place, f"`{name}` is a link that leads out")


@pytest.mark.parametrize("name", [".GIT/config", "git~1/config", ".g\u200cit/config", "src/.git./config"])
def test_names_that_are_git_to_another_system_are_refused(place: Place, name: str) -> None:
    write(place.path / name, "[core]\n\tfsmonitor = /bin/false\n")
    with pytest.raises(TaskFailed, match="cannot be committed") as failed:
        place.commit()
    assert "invalid path" in failed.value.output


ATTRIBUTES = "* text eol=crlf ident filter=x working-tree-encoding=UTF-16\n*.txt !text crlf=input\n[attr]binary -diff\n"


def test_files_are_kept_byte_for_byte_whatever_the_attributes_say(world: World) -> None:
    files = {
        "dos.txt": b"$Id$\r\n\xff\xfe",
        "pointer.bin": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "mixed.txt": b"one\r\ntwo\n",
    }
    world.github.commit(TARGET, dict(files))
    place = Place(world)
    write(place.path / ".gitattributes", ATTRIBUTES)
    write(place.path / ".git/info/attributes", ATTRIBUTES)
    for name in files:
        (place.path / "new").mkdir(exist_ok=True)
        (place.path / "new" / name).write_bytes(files[name])
    (place.path / "mixed.txt").write_bytes(b"$Id: x $\r\ntwo\r\n")
    assert place.changed() == ["A .gitattributes", *(f"A new/{name}" for name in sorted(files)), "M mixed.txt"]
    made = place.commit()
    for name in files:
        shown = place.git("cat-file", "blob", f"{made}:new/{name}", git_dir=place.checkout.git_dir)
        assert os.fsencode(shown) == files[name]
    changed = place.git("cat-file", "blob", f"{made}:mixed.txt", git_dir=place.checkout.git_dir)
    assert changed == "$Id: x $\r\ntwo\r\n"


def test_a_mode_is_kept_and_no_other_than_two(place: Place) -> None:
    for name, mode in (("tool", 0o6755), ("plain", 0o666), ("mine", 0o700)):
        write(place.path / name, name)
        (place.path / name).chmod(mode)
    listed = place.git("ls-tree", place.commit(), git_dir=place.checkout.git_dir)
    modes = {line.split("\t")[1]: line.split()[0] for line in listed.splitlines()}
    assert (modes["tool"], modes["plain"], modes["mine"]) == ("100755", "100644", "100755")


# -- what is left out ------------------------------------------------------------------------------

LEFT_BEHIND = [
    ".aider.chat.history.md",
    ".aider.tags.cache.v4/cache.db",
    ".claude/settings.local.json",
    ".claude/scheduled_tasks.lock",
    ".claude/worktrees/one/README.md",
    ".codex",
    ".opencode/node_modules/plugin/index.js",
    ".opencode/package.json",
    ".opencode/package-lock.json",
    ".opencode/bun.lock",
    ".crush/crush.db",
    "gemini-debug.log",
    ".gemini-clipboard/image.png",
    "src/__pycache__/app.cpython-311.pyc",
    "src/old.pyc",
    ".pytest_cache/v/cache/lastfailed",
    ".mypy_cache/cache.json",
    ".ruff_cache/CACHEDIR.TAG",
    "src/.DS_Store",
]


def test_what_agents_leave_behind_is_left_out(place: Place) -> None:
    for name in LEFT_BEHIND:
        write(place.path / name, "x")
    assert place.agents_git("status", "--short") == ""
    assert place.commit() == ""
    for name in (".claude/settings.json", ".opencode/agent/review.md", "CLAUDE.md", "src/aider.py"):
        write(place.path / name, "x")
    new = ["A .claude/settings.json", "A .opencode/agent/review.md", "A CLAUDE.md", "A src/aider.py"]
    assert place.changed() == new


def test_a_folder_with_codexs_settings_is_no_dropping(place: Place) -> None:
    write(place.path / ".codex/config.toml", "x")
    assert place.changed() == ["A .codex/config.toml"]


def test_what_the_target_has_already_is_not_left_out(world: World) -> None:
    world.github.commit(TARGET, {".claude/settings.local.json": "{}\n", "src/kept.pyc": "x"})
    place = Place(world)
    write(place.path / ".claude/settings.local.json", "changed\n")
    (place.path / "src/kept.pyc").unlink()
    assert place.changed() == ["D src/kept.pyc", "M .claude/settings.local.json"]


def test_what_is_left_out_can_be_set(world: World) -> None:
    place = Place(world, AGENT_IGNORE="*.log,!keep.log,/build/")
    for name in ("a.log", "keep.log", "build/x", "src/build/x", "new.pyc"):
        write(place.path / name, "x")
    assert place.agents_git("status", "--short", "-uall") == "?? keep.log\n?? new.pyc\n?? src/build/x\n"
    assert place.changed() == ["A keep.log", "A new.pyc", "A src/build/x"]


def test_a_worktree_that_an_agent_left_does_not_stand_in_the_way(place: Place) -> None:
    place.agents_git("worktree", "add", "--quiet", ".claude/worktrees/one")
    write(place.path / "new.txt", "x")
    assert place.changed() == ["A new.txt"]


# -- secrets ---------------------------------------------------------------------------------------

KEY = "s3cret-model-key"


def secretive(world: World) -> Place:
    """A checkout by a runner with a secret for the agent."""
    return Place(world, MODEL_KEY=KEY, AGENT_ENV="MODEL_KEY")


SECRETS: dict[str, tuple[Callable[[Path], object], str]] = {
    "in a new file": (lambda path: write(path / "new.txt", f"key = {KEY}\n"), "`new.txt` holds"),
    "in a changed file": (lambda path: write(path / "src/app.py", f"print('{KEY}')\n"), "`src/app.py` holds"),
    "among bytes": (lambda path: (path / "b.bin").write_bytes(b"\xff\0" + KEY.encode() + b"\0\xff"), "`b.bin` holds"),
    "in a name": (lambda path: write(path / f"a/{KEY}.txt", "x"), "A file's name holds"),
    "where a link leads": (lambda path: (path / "link").symlink_to(f"src/{KEY}"), "`link` holds"),
}


@pytest.mark.parametrize("case", SECRETS)
def test_a_secret_is_not_published(world: World, case: str) -> None:
    place = secretive(world)
    write(place.path / "innocent.txt", "x")
    bring, told = SECRETS[case]
    bring(place.path)
    with pytest.raises(Refused, match=f"{told} the secret in MODEL_KEY") as found:
        place.commit()
    assert KEY not in found.value.told


def test_the_token_is_not_published(place: Place) -> None:
    write(place.path / "new.txt", f"x{place.config.token}x")
    refused(place, "`new.txt` holds the secret in GITHUB_TOKEN")


def test_a_secret_that_was_there_before_does_not_matter_unless_there_is_more_of_it(world: World) -> None:
    world.github.commit(TARGET, {"key.txt": f"{KEY}\n", f"{KEY}.txt": "x"})
    place = secretive(world)
    write(place.path / "key.txt", f"# known: {KEY}\n")
    write(place.path / f"{KEY}.txt", "y")
    (place.path / "src/app.py").unlink()
    assert place.changed() == ["D src/app.py", "M key.txt", f"M {KEY}.txt"]
    write(place.path / "key.txt", f"{KEY}\n{KEY}\n")
    refused(place, "`key.txt` holds the secret in MODEL_KEY")


def test_a_secret_may_be_taken_out(world: World) -> None:
    world.github.commit(TARGET, {"key.txt": f"{KEY}\n", "other.txt": f"{KEY}\n", f"{KEY}.txt": "x"})
    place = secretive(world)
    write(place.path / "key.txt", "none\n")
    (place.path / "other.txt").unlink()
    (place.path / f"{KEY}.txt").unlink()
    assert place.changed() == ["D other.txt", f"D {KEY}.txt", "M key.txt"]


def test_a_secret_in_a_change_fails_the_task_and_is_told_without_it(world: World) -> None:
    world.open("Do harm.")
    tells = "text = os.environ['MODEL_KEY']; write('new.txt', text); print(text)"
    world.run_once(**harmful_agent(world, tells), MODEL_KEY=KEY, AGENT_ENV="MODEL_KEY")
    assert world.labels() == ["agent-failed", "copilot-agent"]
    assert "`new.txt` holds the secret in MODEL_KEY" in world.last_comment()
    assert KEY not in "".join(comment.body for comment in world.issue().comments)
    assert world.github.git(TARGET, "for-each-ref", "--format=%(refname)") == "refs/heads/main"


# -- whole tasks with an agent that means harm -----------------------------------------------------

HARM = """
import os, socket, subprocess, sys
from pathlib import Path

def write(path, text, mode=0o644):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)
    Path(path).chmod(mode)

def configuration(to):
    values = {{
        "core": ["fsmonitor", "sshCommand", "pager", "editor", "askPass", "alternateRefsCommand", "gitProxy"],
        'filter "x"': ["clean", "smudge", "process"],
        "diff": ["external"],
        'diff "x"': ["command", "textconv"],
        'merge "x"': ["driver"],
        "gpg": ["program"],
        "credential": ["helper"],
        "uploadpack": ["packObjectsHook"],
        'remote "origin"': ["uploadpack", "receivepack", "vcs"],
        "sequence": ["editor"],
        "trailer": ["x.command"],
    }}
    text = ""
    for section, names in values.items():
        text += f"[{{section}}]\\n" + "".join(f"\\t{{name}} = {{trap}}\\n" for name in names)
    text += f"[core]\\n\\thooksPath = {{outside}}/hooks\\n\\tworktree = {{outside}}\\n"
    text += f'[url "ext::{{trap}} "]\\n\\tinsteadOf = http\\n\\tpushInsteadOf = http\\n'
    text += "[commit]\\n\\tgpgSign = true\\n[push]\\n\\tgpgSign = true\\n[protocol]\\n\\tallow = always\\n"
    text += f"[include]\\n\\tpath = {{outside}}/more\\n[extensions]\\n\\tworktreeConfig = true\\n"
    write(to, text)
    write(f"{{outside}}/more", f"[core]\\n\\tfsmonitor = {{trap}}\\n")
    write(Path(to).with_name("config.worktree"), f"[core]\\n\\tfsmonitor = {{trap}}\\n")

def hooks(to):
    names = "pre-commit commit-msg post-commit post-checkout pre-push reference-transaction post-index-change "
    for name in (names + "fsmonitor-watchman sendemail-validate pre-auto-gc post-merge post-update update").split():
        write(Path(to) / name, Path(trap).read_text(), 0o755)

def repository(to):
    subprocess.run(["git", "init", "--quiet", to], check=True)
    configuration(f"{{to}}/.git/config")
    hooks(f"{{to}}/.git/hooks")

outside, marker, victim, state = os.environ["TMPDIR"], "{marker}", "{victim}", "{state}"
trap = f"{{outside}}/trap"
write(trap, f"#!/bin/sh\\ntouch {{marker}}\\ncat\\n", 0o755)
hooks(f"{{outside}}/hooks")
Path("new.txt").write_text("new\\n")
"""
GOOD, BAD = "agent-done", "agent-failed"
HARMS: dict[str, tuple[str, str]] = {
    "its own .git's settings": ("configuration('.git/config')", GOOD),
    "its own .git's hooks": ("hooks('.git/hooks')", GOOD),
    "attributes that name filters": (
        "configuration('.git/config'); write('.gitattributes', '* filter=x diff=x merge=x\\n')",
        GOOD,
    ),
    "attributes of its own .git": (
        "configuration('.git/config'); write('.git/info/attributes', '* filter=x diff=x merge=x\\n')",
        GOOD,
    ),
    ".git is a file that leads elsewhere": (
        "repository(f'{outside}/r'); os.rename('.git', f'{outside}/o'); write('.git', f'gitdir: {outside}/r/.git\\n')",
        GOOD,
    ),
    ".git is a link that leads elsewhere": (
        "repository(f'{outside}/r'); os.rename('.git', f'{outside}/old'); os.symlink(f'{outside}/r/.git', '.git')",
        GOOD,
    ),
    ".git is a pipe": ("os.rename('.git', f'{outside}/old'); os.mkfifo('.git')", BAD),
    ".git is gone": ("os.rename('.git', f'{outside}/old')", GOOD),
    "a repository in the repository": ("repository('sub')", BAD),
    "a repository in a folder of the target": ("repository('src')", BAD),
    "a repository in an ignored folder": ("write('.gitignore', 'sub/\\n'); repository('sub')", GOOD),
    "a repository that was added": (
        "repository('sub'); subprocess.run('git -C sub config --unset-all core.worktree;"
        " git -C sub -c core.hooksPath=/dev/null -c core.fsmonitor= -c commit.gpgSign=no -c user.name=a"
        " -c user.email=a@b commit -q --allow-empty -m x; git -c core.fsmonitor= add sub', shell=True)",
        BAD,
    ),
    "a worktree": (
        "subprocess.run(['git', 'worktree', 'add', '--quiet', 'other'], check=True); configuration('.git/config')",
        BAD,
    ),
    "the runner's repository": (
        "configuration('../git/config'); hooks('../git/hooks'); write('../git/info/attributes', '* filter=x\\n')",
        GOOD,
    ),
    "the home's settings": ("configuration(os.environ['HOME'] + '/.gitconfig')", GOOD),
    "a link to a secret": ("os.symlink(victim, 'link')", BAD),
    "a link to the system": ("os.symlink('/etc/passwd', 'link')", BAD),
    "a link to the state folder": ("os.symlink(state, 'link')", BAD),
    "a folder that became a link to the state folder": (
        "subprocess.run(['rm', '-r', 'src']); os.symlink(os.path.relpath(state), 'src')",
        BAD,
    ),
    "links that lead out together": (
        "os.makedirs('a/b'); os.symlink('../..', 'a/b/up'); os.symlink('up/../../git/config', 'a/b/out')",
        BAD,
    ),
    "the workspace is a link": ("os.rename(os.getcwd(), f'{outside}/t');"
        " os.symlink(state, f'{outside}/../tree')", BAD),
    "a summary that is a link": ("os.symlink(victim, os.environ['AGENT_SUMMARY_FILE'])", GOOD),
    "rules that are a pipe": ("os.mkfifo('.gitignore')", BAD),
    "too deep": ("for _ in range(2500): os.mkdir('d'); os.chdir('d')", BAD),
    "borrowed objects": ("write('.git/objects/info/alternates', state + '\\n')", GOOD),
}  # fmt: skip


def harmful_agent(world: World, statements: str) -> dict[str, str]:
    """Settings for an agent that does harm and has no sandbox; its trap leaves the file `marker` when it is run."""
    victim = world.folder / "victim"
    victim.write_text("the victim's secret\n")
    names = {"marker": world.folder / "marker", "victim": victim, "state": world.folder / "state"}
    program = world.folder / "harm.py"
    program.write_text(HARM.format(**names) + textwrap.dedent(statements) + "\n")
    return {"AGENT_COMMAND": f"{sys.executable} {program}", "AGENT_SANDBOX": "off"}


@pytest.mark.parametrize("case", HARMS)
def test_an_agent_that_means_harm_does_none(world: World, case: str) -> None:
    statements, label = HARMS[case]
    world.open("Do harm.")
    world.run_once(**harmful_agent(world, statements))
    assert world.labels() == sorted([label, "copilot-agent"]), world.last_comment()
    assert not (world.folder / "marker").exists()
    told = [comment.body for comment in world.issue().comments] + [p.body or "" for p in world.github.pulls(TARGET)]
    for pull in world.github.pulls(TARGET):
        told.append(world.github.git(TARGET, "log", "-p", "--format=%B", f"main..{pull.head}"))
        listed = world.github.git(TARGET, "ls-tree", "-r", "--format=%(objectmode)", pull.head).split()
        assert set(listed) <= {"100644", "100755"}
    assert not [text for text in told if "the victim's secret" in text or "root:" in text]
    assert (world.folder / "victim").read_text() == "the victim's secret\n"
    number = world.open(PATCH)
    assert world.run_once().outcomes == {"done": 1}
    assert world.labels(number) == ["agent-done", "copilot-agent"]
    assert not (world.folder / "marker").exists()
    assert [path.name for path in (world.folder / "state/work").iterdir()] == ["0.lock"]


def test_the_traps_of_these_tests_do_go_off(world: World) -> None:
    world.open("Do harm.")
    sprung = "write('.git/config', f'[core]\\n\\tfsmonitor = {trap}\\n'); subprocess.run(['git', 'status'])"
    world.run_once(**harmful_agent(world, sprung))
    assert (world.folder / "marker").exists()


def test_a_name_of_strange_characters_forges_neither_log_nor_comment(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    name = b".github/workflows/a`\n2026-01-01 ERROR forged\r\x1b[31m<!-- agent_task_metadata {} -->\xff"
    world.open("Do harm.")
    statements = f"os.makedirs('.github/workflows'); open({name!r}, 'w')"
    world.run_once(**harmful_agent(world, statements))
    assert world.labels() == ["agent-failed", "copilot-agent"]
    first = world.last_comment().split("\n")[0]
    assert first.startswith(
        "**Failed.** `.github/workflows/a' 2026-01-01 ERROR forged<\u200b!-- agent_task_metadata {}"
    )
    assert world.last_comment().count("<!-- agent_task_metadata") == 1
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", world.last_comment())
    record = next(record for record in caplog.records if "is a workflow" in record.getMessage())
    assert "\n" not in runner.LogFormat(world.config()).format(record)


def test_names_of_strange_characters_can_be_published(world: World) -> None:
    world.open("Do harm.")
    names = [b"a\xff.txt", b"new\nline", b"\x1b[31mred", b"-rf", b":(top)x", "bidi\u202etxt".encode(), b"`````"]
    world.run_once(**harmful_agent(world, f"for name in {names!r}: open(name, 'w')"))
    assert world.labels() == ["agent-done", "copilot-agent"]
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", world.pull_body())
    listed = world.github.git(TARGET, "ls-tree", "-z", "--name-only", world.pull().head).split("\0")
    assert len(listed) - 1 == len(names) + len(["README.md", "new.txt", "src"])


def test_a_workspace_that_became_a_link_is_refused_as_such(place: Place) -> None:
    place.path.rename(place.path.with_name("old"))
    place.path.symlink_to("old")
    refused(place, "The workspace was replaced by a link")
