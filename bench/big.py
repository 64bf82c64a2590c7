"""A big repository: what a task in it takes, and ten of them at the same time on the disk."""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from lab import (
    MB,
    Lab,
    Row,
    all_done,
    git_access,
    in_turns,
    open_issues,
    polled,
    ratio,
    seconds,
    timed,
    until,
    usage,
    wake,
)
from soak import DISPATCH, TARGET, running, standing_in
from standin import StandIn

from runner import GIT_SETTINGS

FILES, FOLDERS, COMMITS = 50_000, 500, 10_000
SLACK = 1.0
# Changes a file, and says when it did.
CODE = """\
#!/bin/sh
echo "$AGENT_TASK_TITLE" >> folder-7/file-7.txt
date +%s.%N > "$HOME/ended"
"""
WORKERS = (1, 2, 4)
WORKERS_OF_THE_RUNNER = f"checkout.workers={GIT_SETTINGS['checkout.workers']}"


def history(files: int, folders: int, commits: int) -> Iterator[bytes]:
    """A stream for git fast-import: all the files in one commit, then one of them changed by each commit."""
    yield b"commit refs/heads/main\nmark :1\ncommitter octocat <octocat@example.com> 1700000000 +0000\ndata 5\nFirst\n"
    for number in range(files):
        content = (f"This is file {number}.\n" + f"Line of {number * 7919 % 1000003}.\n" * 20).encode()
        yield b"M 100644 inline folder-%d/file-%d.txt\ndata %d\n%s\n" % (
            number % folders,
            number,
            len(content),
            content,
        )
    for number in range(2, commits + 1):
        which = number * 7919 % files
        content = f"This is file {which}, changed by commit {number}.\n".encode()
        yield b"commit refs/heads/main\ncommitter octocat <octocat@example.com> %d +0000\n" % (1_700_000_000 + number)
        yield b"data 7\nChange.\nM 100644 inline folder-%d/file-%d.txt\n" % (which % folders, which)
        yield b"data %d\n%s\n" % (len(content), content)


@contextlib.contextmanager
def big_repository(lab: Lab) -> Iterator[StandIn]:
    """The stand-in, with a target that is big."""
    with standing_in(lab.folder, strict=False) as github:
        path = github.repository(TARGET).path
        command = ["git", "--git-dir", str(path), "fast-import", "--quiet", "--force"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, env=github.git_env()) as process:
            assert process.stdin
            for part in history(*size(lab)):
                process.stdin.write(part)
            process.stdin.close()
        if process.returncode:
            raise RuntimeError("git fast-import failed")
        github.git(TARGET, "repack", "-adq")
        yield github


def size(lab: Lab) -> tuple[int, int, int]:
    return (500, 50, 100) if lab.short else (FILES, FOLDERS, COMMITS)


def named(lab: Lab) -> str:
    files, _, commits = size(lab)
    return f"{files:,} files, {commits:,} commits"


def big(lab: Lab) -> Iterator[Row]:
    """Tasks one after another, in turns with the bare commands over the same files."""
    env = {"AGENT_MAX_CONCURRENT": "1", "AGENT_POLL_INTERVAL": "3600"}
    with big_repository(lab) as github, running(github, lab.folder, CODE, **env) as runner:
        polled(github, runner)
        bare = Bare(github, lab.folder / "bare")
        first = Task(github, runner, lab.folder)
        bare.task()  # the first files in a new place take a file system longer
        tasks, adds, publishes = [], [], []
        for number in range(2, lab.pick(11, 4)):  # the last one is the tenth
            task = Task(github, runner, lab.folder)
            if number > lab.pick(7, 1):
                tasks.append(task)
                add, publish = bare.task()
                adds.append(add)
                publishes.append(publish)
        clone = timed(lambda: bare.git("clone", "--quiet", github.url(TARGET), str(bare.folder / "clone")))
        turns = in_turns(1, *(bare.checkout(workers) for workers in WORKERS))
    whole = first.whole / clone
    yield Row("first task", named(lab), f"{whole:.2f} x", note=f"{first.whole:.1f} s, a bare git clone {clone:.1f} s")
    yield ratio("tenth task", named(lab), [t.whole for t in tasks], adds, 1.5, "git worktree add")
    ours = [t.publish for t in tasks]
    yield ratio("publish of a one-file change", named(lab), ours, publishes, 1.5, "add, write-tree, commit-tree, push")
    parts = [f"{name} {seconds([t.parts[name] for t in tasks])}" for name in tasks[0].parts]
    floor = statistics.median(a + p for a, p in zip(adds, publishes, strict=True))
    times = statistics.median(t.whole for t in tasks) / floor
    note = f"worktree add and publish take {floor:.2f} s; of the runner's time: {', '.join(parts)}"
    yield Row("tenth task", "against both of the bare parts", f"{times:.2f} x", note=note)
    alone = statistics.median(turns[0])
    tried = ", ".join(f"{n}: {statistics.median(t) / alone:.2f} x" for n, t in zip(WORKERS[1:], turns[1:], strict=True))
    yield Row("parallel checkout", named(lab), tried, note="git read-tree -u with checkout.workers, against one")


class Task:
    """One task of the runner's, and how long its parts took."""

    def __init__(self, github: StandIn, runner: subprocess.Popen[bytes], folder: Path) -> None:
        ended, begun = folder / "runner/state/home/ended", len(github.log)
        (number,) = open_issues(github, 1, "Change")
        wake(runner)
        all_done(github, [number], 600)
        asked = github.log[begun:]
        look = next(request.at for request in asked if request.kind == "rest")
        said = next(r.at for r in asked if r.kind == "rest" and r.path.endswith("/comments"))
        pushed = [r.at for r in asked if r.method == "POST" and r.path.endswith("/git-receive-pack")]
        pull = next(r.at for r in asked if r.kind == "rest" and r.path.endswith("/pulls"))
        agent = float(ended.read_text()) - time.time() + time.monotonic()
        self.whole = asked[-1].at - look
        self.publish = pushed[1] - agent
        self.parts = {
            "claim": said - look,
            "checkout and agent": agent - said,
            "commit": pushed[1] - agent,
            "push": pull - pushed[1],
            "report": asked[-1].at - pull,
        }
        github.close_issue(DISPATCH, number)


class Bare:
    """The same by git alone."""

    def __init__(self, github: StandIn, folder: Path) -> None:
        self.folder, self._env, self._url = folder, git_access(github), github.url(TARGET)
        self._github = github
        folder.mkdir()
        self.git("clone", "--quiet", "--bare", self._url, str(folder / "copy.git"))
        self._count = 0

    def git(self, *command: str, at: Path | None = None) -> str:
        done = subprocess.run(
            ["git", *command], cwd=at or self.folder, env=self._env, check=True, stdout=subprocess.PIPE, text=True
        )
        return done.stdout.strip()

    def task(self) -> tuple[float, float]:
        """Seconds of `git worktree add`, and until a change of one file is sent. That is in files that came to be as
        the runner's do: git reads those that are as old as its index, of which there are more if all goes quickly."""
        self._count += 1
        tree, copy = self.folder / "tree", self.folder / "copy.git"
        add = timed(lambda: self.git("worktree", "add", "--quiet", "--detach", str(tree), "main", at=copy))
        self.git("worktree", "remove", "--force", str(tree), at=copy)
        self.git("-c", WORKERS_OF_THE_RUNNER, "worktree", "add", "--quiet", "--detach", str(tree), "main", at=copy)
        with (tree / "folder-7/file-7.txt").open("a") as file:
            file.write(f"Change {self._count}\n")

        begun = time.monotonic()
        self.git("add", "-A", at=tree)
        made = self.git("commit-tree", self.git("write-tree", at=tree), "-p", "HEAD", "-m", "Change", at=tree)
        self.git("push", "--quiet", self._url, f"{made}:refs/heads/bare-{self._count}", at=tree)
        sent = self._github.log[-1].at
        self.git("worktree", "remove", "--force", str(tree), at=copy)
        return add, sent - begun

    def disk(self) -> int:
        """Bytes of a worktree, and of what git keeps of it beside it."""
        tree, copy = self.folder / "tree", self.folder / "copy.git"
        self.git("-c", WORKERS_OF_THE_RUNNER, "worktree", "add", "--quiet", "--detach", str(tree), "main", at=copy)
        return usage(tree) + usage(copy / "worktrees")

    def checkout(self, workers: int) -> Timed:
        return Timed(self, workers)


class Timed:
    """Seconds of a checkout by so many processes."""

    def __init__(self, bare: Bare, workers: int) -> None:
        self._bare, self._workers = bare, workers

    def __call__(self) -> float:
        tree = self._bare.folder / "parallel"
        tree.mkdir()
        git = ("-c", f"checkout.workers={self._workers}", "--git-dir", str(self._bare.folder / "copy.git"))
        index = {"GIT_INDEX_FILE": str(self._bare.folder / "parallel-index")}
        command = ["git", *git, "-c", "core.bare=false", "--work-tree", str(tree), "read-tree", "--reset", "-u", "main"]
        env = self._bare._env | index
        took = timed(lambda: subprocess.run(command, env=env, check=True))
        subprocess.run(["rm", "-rf", str(tree), index["GIT_INDEX_FILE"]], check=True)
        return took


def disk(lab: Lab) -> Iterator[Row]:
    """Ten tasks at work: their workspaces, and the copy of the target that they share."""
    count = lab.pick(10, 3)
    code = f'#!/bin/sh\ntouch "{lab.folder}/started-$AGENT_TASK_ID"\n'
    code += f'while [ ! -e "{lab.folder}/go" ]; do sleep 0.5; done\ntouch new\n'
    env = {"AGENT_MAX_CONCURRENT": str(count), "AGENT_POLL_INTERVAL": "3600", "AGENT_SANDBOX": "off"}
    with big_repository(lab) as github, running(github, lab.folder, code, **env) as runner:
        polled(github, runner)
        open_issues(github, count)
        wake(runner)
        until(lambda: len(list(lab.folder.glob("started-*"))) == count, 900, "the start of the agents")
        state = lab.folder / "runner/state"
        whole, copy = usage(state / "work", state / "repos"), usage(state / "repos")
        trees = sorted((state / "work").glob("*/*/run/tree"))
        each = usage(trees[0]) - usage(trees[0] / ".git")
        beside = usage(trees[0] / ".git")
        processes = len(trees)
        (lab.folder / "go").touch()
        bare = Bare(github, lab.folder / "bare").disk()
    allowed, floor = copy + count * each, copy + count * bare
    note = f"the mirror has {copy / MB:.0f} MB, each checkout {each / MB:.0f} MB, and its .git {beside / MB:.1f} MB"
    note += f", nearly all of it the index; so many bare worktrees with theirs are {floor / MB:.0f} MB"
    share = whole / allowed
    value = f"{whole / MB:.0f} MB, {share:.3f} x"
    target = f"<= {allowed / MB:.0f} MB: mirror + {count} x files"
    yield Row("disk", f"{count} parallel workspaces of {named(lab)}", value, target, share <= SLACK, note)
    yield Row("disk", "against bare worktrees", f"{whole / floor:.3f} x")
    yield Row("workspaces at the same time", named(lab), f"{processes}", f"{count}", processes == count, counted=True)
