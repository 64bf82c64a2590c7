"""An agent that looks everywhere for the runner's token, and writes down where it found it.

It is told the token backwards, so that what it was told is no find. HUNT_TOPS lists the folders that it searches; there
it reads every file that has changed since the moment HUNT_SINCE, since the token is not older.
"""

from __future__ import annotations

import base64
import json
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

TOKEN = os.environ["HUNT_TOKEN"][::-1].encode()
NEEDLES = (TOKEN, base64.b64encode(b"x-access-token:" + TOKEN))
SINCE = float(os.environ["HUNT_SINCE"])

found: set[str] = set()
tried = dict.fromkeys(("files", "readable files", "processes", "other environments", "other memories"), 0)


def look(where: str, read: Callable[[], bytes]) -> bool:
    """Whether it could be read at all."""
    try:
        data = read()
    except (OSError, ValueError, OverflowError):
        return False
    if any(needle in data for needle in NEEDLES):
        found.add(where)
    return True


def memory(pid: str) -> bytes:
    """What a process holds in the memory that it can write to, at most 256 MB."""
    held = b""
    with open(f"/proc/{pid}/mem", "rb", 0) as mem, open(f"/proc/{pid}/maps") as maps:
        for line in maps:
            span, rights = line.split()[:2]
            begin, end = (int(address, 16) for address in span.split("-"))
            if rights.startswith("rw") and len(held) + end - begin < 2**28:
                try:
                    mem.seek(begin)
                    held += mem.read(end - begin)
                except OSError:
                    continue
    return held


def search_processes() -> None:
    mine = {"self", "thread-self", str(os.getpid())}
    for pid in os.listdir("/proc"):
        if pid.isdecimal() and pid not in mine:
            tried["processes"] += 1
            place = Path("/proc") / pid
            tried["other environments"] += look(f"environment of {pid}", (place / "environ").read_bytes)
            tried["other memories"] += look(f"memory of {pid}", lambda pid=pid: memory(pid))  # type: ignore[misc]
            for name in ("cmdline", "cwd/.env", "root/etc/hostname"):
                look(str(place / name), (place / name).read_bytes)
            try:
                for number in os.listdir(place / "fd"):
                    if stat.S_ISREG(os.stat(place / "fd" / number).st_mode):
                        look(str(place / "fd" / number), (place / "fd" / number).read_bytes)
            except OSError:
                continue


def files() -> Iterator[str]:
    for top in os.environ["HUNT_TOPS"].split(":"):
        for folder, folders, names in os.walk(top):
            if folder == "/":
                folders[:] = [name for name in folders if name not in ("proc", "sys")]
            yield from (os.path.join(folder, name) for name in names)


def search_files() -> None:
    for file in files():
        try:
            status = os.stat(file)
        except OSError:
            continue
        if stat.S_ISREG(status.st_mode) and max(status.st_mtime, status.st_ctime) >= SINCE:
            tried["files"] += 1
            tried["readable files"] += look(file, Path(file).read_bytes)


for name, value in os.environ.items():
    if name != "HUNT_TOKEN":
        look(f"${name}", value.encode)
search_files()
deadline = time.monotonic() + float(os.environ["HUNT_SECONDS"])
while True:
    search_processes()  # also those that come and go
    if time.monotonic() > deadline:
        break
Path("new.txt").write_text("Nothing to see here.\n")
(Path.home() / "report.json").write_text(json.dumps({"found": sorted(found), "tried": tried}))
