"""Has pip-audit ask PyPI for known holes in the packages that runner.py needs.

Some mirrors of PyPI know what is wrong with the newest release of a package, but not with a release by its number. So a
question for a number that is not answered is asked again for the newest release, if that is the one. Ends with 1 if
there is a known hole, or if nothing could be found out.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import requests
from pip_audit._cli import audit
from requests.adapters import HTTPAdapter

RELEASE = re.compile(r"(.*/pypi/[^/]+)/([^/]+)/json")
send = HTTPAdapter.send


def send_and_ask_again(adapter: HTTPAdapter, request: requests.PreparedRequest, *rest: Any, **more: Any) -> Any:
    answer, release = send(adapter, request, *rest, **more), RELEASE.fullmatch(request.url or "")
    if answer.status_code == 404 and release:
        again = request.copy()
        again.url = f"{release[1]}/json"
        newest = send(adapter, again, *rest, **more)
        if newest.ok and newest.json()["info"]["version"] == release[2]:
            return newest
    return answer


code: Any = 0
HTTPAdapter.send = send_and_ask_again  # type: ignore[method-assign]
with tempfile.TemporaryDirectory() as folder:
    report = Path(folder) / "report.json"
    options = ["--requirement", "requirements.txt", "--progress-spinner", "off", "--cache-dir", folder]
    sys.argv = ["pip-audit", *options, "--format", "json", "--output", str(report)]
    try:
        audit()
    except SystemExit as end:
        code = end.code
    packages = json.loads(report.read_text())["dependencies"] if report.exists() else []
for package in packages:
    holes = " ".join(hole["id"] for hole in package.get("vulns", ())) or "no known hole"
    print(package["name"], package.get("version", ""), package.get("skip_reason", holes))
if not any("version" in package for package in packages):
    sys.exit("nothing could be found out")
sys.exit(code)
