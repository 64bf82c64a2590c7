"""The status page in a browser: what strangers write does nothing there, and it fits a phone."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from conftest import World
from playwright.sync_api import Browser, BrowserContext, Dialog, Page, Request, Route, ViewportSize, sync_playwright
from test_http import HOSTILE, busy, served

pytestmark = pytest.mark.browser
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SIZES: dict[str, ViewportSize] = {"phone": {"width": 390, "height": 844}, "desktop": {"width": 1280, "height": 900}}
WISHES = "done nothing done again hold done nothing done done hold nothing done done hold done nothing done done done"
WORK = [
    "Make the search box work with the keyboard alone",
    "Fix the crash when a folder name holds a space",
    "Add a dark theme",
    "Move the retry logic out of the upload code and give it tests of its own, as we said in the last meeting",
    "Update the documentation",
    "Speed up the import of large files",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not CHROMIUM:
        pytest.skip("there is no Chromium")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


class Watch:
    """A browser's window, and all that a page does in it which it should not."""

    def __init__(self, browser: Browser, size: str, scheme: str = "light", javascript: bool = True) -> None:
        how: dict[str, Any] = {"viewport": SIZES[size], "color_scheme": scheme, "java_script_enabled": javascript}
        self.context: BrowserContext = browser.new_context(**how)
        self.requests: list[str] = []
        self.seen: list[str] = []
        self.page: Page = self.context.new_page()
        self.page.on("console", lambda message: self.seen.append(f"console: {message.text}"))
        self.page.on("pageerror", lambda error: self.seen.append(f"error: {error}"))
        self.page.on("dialog", self._dismiss)
        self.page.on("popup", lambda _: self.seen.append("popup"))
        self.page.on("request", self._note)
        self.page.on("requestfailed", lambda request: self.seen.append(f"failed: {request.url}"))

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    def _note(self, request: Request) -> None:
        if not request.url.startswith("data:"):
            self.requests.append(request.url)

    def _dismiss(self, dialog: Dialog) -> None:
        self.seen.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def evaluate(self, code: str) -> Any:
        """What a script of ours finds; the page's own policy does not bind it."""
        return self.page.evaluate(code)


def address(port: int) -> str:
    return f"http://127.0.0.1:{port}/"


def assert_quiet(watch: Watch, url: str) -> None:
    """The page asked for nothing but itself, and nothing of it ran."""
    assert watch.seen == []
    assert set(watch.requests) == {url}
    assert "agent runner" in watch.page.title()
    assert watch.page.locator("script, img, iframe, svg, object, embed, form, input, base").count() == 0
    assert len(watch.context.pages) == 1


def keep_picture(watch: Watch, name: str) -> None:
    if folder := os.environ.get("SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        watch.page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


@pytest.mark.parametrize("titles", [HOSTILE, WORK], ids=["hostile", "usual"])
def test_the_page_fits_and_keeps_still(world: World, browser: Browser, titles: list[str]) -> None:
    kind = "hostile" if titles is HOSTILE else "usual"
    said = f"{HOSTILE[1]}\u202e{'y' * 400}" if titles is HOSTILE else "Running 212 tests: 187 passed, 0 failed"
    with busy(world, WISHES, titles, said, AGENT_MAX_CONCURRENT="3") as (_, site):
        for size, scheme in ((size, scheme) for size in SIZES for scheme in ("light", "dark")):
            with Watch(browser, size, scheme) as watch:
                answer = watch.page.goto(address(site.port))
                assert answer is not None
                assert answer.status == 200
                watch.page.wait_for_timeout(300)  # for what might run late
                assert_quiet(watch, address(site.port))
                assert watch.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
                inside = "e => { const b = e.getBoundingClientRect(); return b.left >= 0 && b.right <= innerWidth }"
                assert watch.evaluate(f"[...document.querySelectorAll('li, dd, pre, a, .pill')].every({inside})")
                for name in ("Running", "To be tried again", "Queue", "Last results"):
                    assert watch.page.locator("h2", has_text=name).is_visible()
                assert watch.page.locator("pre").count() == 3
                keep_picture(watch, f"{kind}-{size}-{scheme}")


def contrast(one: str, other: str) -> float:
    """https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio of two colours such as "rgb(1, 2, 3)"."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_read(world: World, browser: Browser, scheme: str) -> None:
    find = """() => [...document.querySelectorAll('h1, h2, p, dt, dd, a, .pill, pre, time')].map(e => {
        let back = e;
        while (back && getComputedStyle(back).backgroundColor === 'rgba(0, 0, 0, 0)') back = back.parentElement;
        return [e.outerHTML.slice(0, 80), getComputedStyle(e).color, getComputedStyle(back).backgroundColor]})"""
    with busy(world, "done nothing again hold done", WORK) as (_, site), Watch(browser, "phone", scheme) as watch:
        watch.page.goto(address(site.port))
        found = cast(list[list[str]], watch.evaluate(find))
        assert len(found) > 30
        assert [text for text, colour, back in found if contrast(colour, back) < 4.5] == []


def test_it_works_without_javascript(world: World, browser: Browser) -> None:
    with (
        busy(world, "done nothing again hold done", HOSTILE) as (_, site),
        Watch(browser, "phone", javascript=False) as watch,
    ):
        watch.page.goto(address(site.port))
        assert_quiet(watch, address(site.port))
        assert watch.page.locator("li").count() == 6
        assert "<img src=x onerror=alert(2)>" in watch.page.inner_text("body")


def test_it_refreshes_itself(world: World, browser: Browser) -> None:
    with served(world) as (runner, site), Watch(browser, "phone") as watch:
        watch.page.goto(address(site.port))
        assert watch.page.locator('meta[http-equiv="refresh"]').get_attribute("content") == "10"
        assert "Queue (0)" in watch.page.inner_text("body")
        world.open("Do something.", title="A new one")
        runner._poll()
        watch.page.get_by_text("A new one").wait_for(timeout=60_000)
        assert_quiet(watch, address(site.port))


def test_an_idle_runner_has_a_page_too(world: World, browser: Browser) -> None:
    with served(world) as (_, site), Watch(browser, "phone") as watch:
        watch.page.goto(address(site.port))
        assert_quiet(watch, address(site.port))
        assert watch.page.get_by_text("Nothing.").count() == 4
        assert watch.page.get_by_text("none yet").is_visible()
        keep_picture(watch, "idle-phone-light")


def test_the_policy_stops_what_the_escaping_might_miss(
    world: World, browser: Browser, caplog: pytest.LogCaptureFixture
) -> None:
    """A page whose escaping has a hole: the browser still runs, loads and sends nothing."""
    caplog.set_level(logging.DEBUG)
    hole = "<script>document.title='ran'</script><img src=/status.json onerror=\"document.title='ran'\">"
    hole += "<svg onload=\"document.title='ran'\"></svg><iframe src=/healthz></iframe><style>h1{display:none}</style>"
    hole += "<link rel=stylesheet href=/x.css><form id=f action=/webhook method=post><button>x</button></form>"
    with served(world) as (_, site), Watch(browser, "phone") as watch:

        def spoil(route: Route) -> None:
            answer = route.fetch()
            route.fulfill(response=answer, body=answer.text().replace("<dl>", f"{hole}<dl>"))

        watch.page.route(address(site.port), spoil)
        watch.page.goto(address(site.port))
        watch.page.wait_for_timeout(500)
        assert watch.page.locator("script").count() == 1
        assert "agent runner" in watch.page.title()
        assert watch.page.locator("h1").is_visible()
        watch.evaluate("document.getElementById('f').submit()")
        watch.page.wait_for_timeout(300)
        assert watch.page.url == address(site.port)
        assert re.findall(r'"([A-Z]+ \S+) HTTP', caplog.text) == ["GET /"]
        assert "violates the following Content Security Policy" in " ".join(watch.seen)


def test_no_other_page_can_frame_it(world: World, browser: Browser) -> None:
    with served(world) as (_, site), Watch(browser, "phone") as watch:
        frame = f"<iframe src='{address(site.port)}'></iframe>"
        watch.page.route("http://evil.example/", lambda route: route.fulfill(body=frame, content_type="text/html"))
        watch.page.goto("http://evil.example/")
        watch.page.wait_for_timeout(500)
        texts = [each.locator("body").inner_text() for each in watch.page.frames[1:]]
        assert not [text for text in texts if "Agent runner" in text]
