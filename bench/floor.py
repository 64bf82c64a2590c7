"""A task without any runner: the bare sequence of requests and git commands, as a script would do it.

It reads lines of JSON, `{"issue": 1, "safe": false}`, does what they say, and answers each with a line. With `safe` it
also moves a claim as the runner does: three pushes in place of one, and a look at the refs, which is what it takes to
let nobody else have the issue and to publish nothing once it is lost.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import requests

EMPTY_TREE = "4b825dc642cb6eb9a060e54bf8d69288fbee4904"


class Bare:
    """One script that does task after task, with one session and one copy of the target."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.copy = folder, folder / "copy.git"
        self.api, self.url = os.environ["BENCH_API"], os.environ["BENCH_URL"]
        self.dispatch, self.target = os.environ["BENCH_DISPATCH"], os.environ["BENCH_TARGET"]
        self.session = requests.Session()
        self.session.headers.update(
            {
                "Accept": "application/vnd.github+json",
                "Authorization": f"Bearer {os.environ['BENCH_TOKEN']}",
                "X-GitHub-Api-Version": "2022-11-28",
                "User-Agent": "floor",
            }
        )
        self.git("init", "--quiet", "--bare", str(self.copy))

    def git(self, *command: str, cwd: Path | None = None) -> str:
        done = subprocess.run(["git", *command], cwd=cwd or self.folder, check=True, stdout=subprocess.PIPE, text=True)
        return done.stdout.strip()

    def ask(self, method: str, path: str, body: object = None) -> None:
        response = self.session.request(method, f"{self.api}/repos/{path}", json=body, timeout=60)
        response.raise_for_status()

    def task(self, number: int, safe: bool) -> None:
        issue, branch, tree = f"{self.dispatch}/issues/{number}", f"floor-{number}", self.folder / f"tree-{number}"
        self.ask("GET", f"{self.dispatch}/issues?labels=copilot-agent&state=open&per_page=100")
        claim = self.claim(number, "") if safe else ""
        self.ask("GET", issue)
        self.ask("POST", f"{issue}/labels", {"labels": ["agent-processing"]})
        self.ask("POST", f"{issue}/comments", {"body": "Working on it."})
        if safe:
            self.git("ls-remote", "--symref", self.url, "HEAD", f"refs/heads/{branch}")
        self.git("fetch", "--quiet", "--no-tags", self.url, "+HEAD:refs/remotes/base", cwd=self.copy)
        self.git("worktree", "add", "--quiet", "-b", branch, str(tree), "refs/remotes/base", cwd=self.copy)
        names = {"AGENT_TASK_TITLE": f"Note {number}", "AGENT_TASK_ID": f"issue-{number}"}
        subprocess.run([os.environ["BENCH_AGENT"]], cwd=tree, env={**os.environ, **names}, check=True)
        self.git("add", "--all", cwd=tree)
        self.git("commit", "--quiet", "-m", f"Note {number}", cwd=tree)
        moves = [f"HEAD:refs/heads/{branch}"]
        if safe:
            held, claim = claim, self.record(number, claim)
            moves += [f"{claim}:{self.ref(number)}", "--atomic", f"--force-with-lease={self.ref(number)}:{held}"]
        self.git("push", "--quiet", self.url, *moves, cwd=tree)
        pull = {"title": f"Note {number}", "head": branch, "base": "main", "body": "Done."}
        self.ask("POST", f"{self.target}/pulls", pull)
        self.ask("POST", f"{issue}/comments", {"body": "Done."})
        self.ask("POST", f"{issue}/labels", {"labels": ["agent-done"]})
        self.ask("DELETE", f"{issue}/labels/agent-processing")
        if safe:
            lease = f"--force-with-lease={self.ref(number)}:{claim}"
            self.git("push", "--quiet", lease, self.url, f":{self.ref(number)}", cwd=self.copy)

    def ref(self, number: int) -> str:
        return f"refs/agent-runner/claims/{self.dispatch}/{number}"

    def record(self, number: int, parent: str) -> str:
        made = ["commit-tree", EMPTY_TREE, "-m", f"Claim {number}", *(("-p", parent) if parent else ())]
        return self.git(*made, cwd=self.copy)

    def claim(self, number: int, held: str) -> str:
        made = self.record(number, held)
        lease = f"--force-with-lease={self.ref(number)}:{held}"
        self.git("push", "--quiet", lease, self.url, f"{made}:{self.ref(number)}", cwd=self.copy)
        return made


def main() -> None:
    bare = Bare(Path.cwd())
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        bare.task(order["issue"], order["safe"])
        print("done", flush=True)


if __name__ == "__main__":
    main()
