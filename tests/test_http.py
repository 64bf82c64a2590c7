"""The HTTP face: webhooks that wake the loop, health, the status page; and what the internet throws at all of them."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import html
import html.parser
import http.client
import json
import logging
import os
import re
import secrets
import signal
import socket
import ssl
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

import psutil
import pytest
from conftest import PATCH, TARGET, Daemon, FakeClock, World, make_config, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st
from standin import Fault
from test_claims import put_claim
from test_cli import finish, wait_for_line
from test_faults import Agent

import runner as runner_module
from runner import (
    CONNECTIONS,
    HISTORY_KEPT,
    MAX_DELIVERY,
    WAKE_PAUSE,
    Clock,
    Exchange,
    Runner,
    is_news,
    is_signed,
    read_payload,
    serving,
    shown,
)

HELLO = "Codertocat/Hello-World"  # the repository of GitHub's examples
SECRET = "It's a Secret to Everybody"
HOOKED = {
    "AGENT_DISPATCH_REPO": HELLO,
    "AGENT_TASK_LABEL": "bug",
    "AGENT_POLL_INTERVAL": "3600",
    "GITHUB_WEBHOOK_SECRET": SECRET,
}
FORM = "application/x-www-form-urlencoded"
STATUS_PAGES = ("/", "/status.json", "/metrics")
Json = dict[str, Any]


class Delivery(NamedTuple):
    body: bytes
    signature: str
    event: str = "issues"
    kind: str = "application/json"


class Reply(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    text: str

    def json(self) -> Json:
        answer: Json = json.loads(self.text)
        return answer


class Site:
    """A face, as the network sees it."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self.host, self.port = host, port

    def ask(self, path: str = "/", method: str = "GET", body: bytes | None = None, **headers: str) -> Reply:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            answer = connection.getresponse()
            return Reply(answer.status, answer.headers, answer.read().decode())

    def deliver(self, delivery: Delivery, **headers: str) -> Reply:
        """Sends as GitHub does."""
        usual = {
            "Content_Type": delivery.kind,
            "User_Agent": "GitHub-Hookshot/044aadd",
            "X_GitHub_Delivery": str(uuid.uuid4()),
            "X_GitHub_Event": delivery.event,
            "X_Hub_Signature_256": delivery.signature,
        }
        return self.ask("/webhook", "POST", delivery.body, **usual | headers)

    def connect(self) -> socket.socket:
        return socket.create_connection((self.host, self.port), 60)

    def send(self, data: bytes) -> bytes:
        """Whatever comes back for these bytes."""
        answer = b""
        with self.connect() as connection, contextlib.suppress(ConnectionError):
            with contextlib.suppress(OSError):  # it may have heard enough
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
            while block := connection.recv(65_536):
                answer += block
        return answer


def _published() -> dict[tuple[str, str | None], Delivery]:
    found = json.loads((Path(__file__).parent / "webhooks/examples.json").read_text())
    return {(e["event"], e["action"]): Delivery(e["body"].encode(), e["signature"], e["event"]) for e in found}


EXAMPLES = _published()
VECTOR = EXAMPLES["vector", None]


def example(action: str | None, event: str = "issues") -> Delivery:
    """A delivery as GitHub publishes it, with the signature that GitHub's own signer made."""
    return EXAMPLES[event, action]


def signed(body: bytes, event: str = "issues", kind: str = "application/json") -> Delivery:
    """A delivery of our own."""
    signature = "sha256=" + hmac.new(SECRET.encode(), body, hashlib.sha256).hexdigest()
    return Delivery(body, signature, event, kind)


def payload(action: str, change: Callable[[Json], object] = lambda _: None) -> Json:
    """GitHub's example, or what becomes of it. It has none of `closed`: that is `reopened`, the other way round."""
    found: Json = json.loads(example("reopened" if action == "closed" else action).body)
    if action == "closed":
        found |= {"action": "closed"}
        found["issue"] |= {"state": "closed", "closed_at": found["issue"]["updated_at"]}
    change(found)
    return found


def derived(action: str, change: Callable[[Json], object] = lambda _: None) -> Delivery:
    return signed(json.dumps(payload(action, change)).encode())


def as_form(delivery: Delivery) -> Delivery:
    return signed(urlencode({"payload": delivery.body}).encode(), delivery.event, FORM)


def free_port() -> int:
    """A port below those that the system gives to connections, so that no other test's connection takes it."""
    while True:
        port = 10_000 + secrets.randbelow(22_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


@contextlib.contextmanager
def served(world: World, clock: Clock | None = None, /, **env: str) -> Iterator[tuple[Runner, Site]]:
    """A runner whose loop does not run, and its face."""
    port = free_port()
    runner = world.runner(clock, AGENT_HTTP_PORT=str(port), **env)
    with serving(runner):
        yield runner, Site(port)


def polls(world: World) -> int:
    """How often the queue was read."""
    return len([r for r in world.requests("GET", "/issues") if r.path.endswith("/issues")])


def looks(world: World, runner: Runner, clock: FakeClock) -> bool:
    """Whether the loop reads the queue in this moment, or a second later."""
    before = polls(world)
    clock.at += 1
    runner.tick()
    return polls(world) > before


@pytest.fixture
def hello(world: World) -> World:
    """The stand-in with the repository of GitHub's examples."""
    world.github.add_repository(HELLO)
    return world


def labels_of(world: World) -> list[str]:
    return sorted(world.github.issue(HELLO, 1).labels)


def open_bug(world: World, body: str = PATCH) -> None:
    """Opens the issue that GitHub's examples are about."""
    assert world.github.open_issue(HELLO, title="Spelling error in the README file", body=body, labels=["bug"]) == 1


def assert_well(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    assert site.ask("/healthz").status == 200
    assert "Traceback" not in caplog.text
    loud = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert [text for text in loud if not text.startswith("webhook from 127.0.0.1: ")] == []


# -- webhooks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [False, True], ids=["json", "form"])
@pytest.mark.parametrize("action", ["opened", "labeled", "reopened"])
def test_a_delivery_of_github_has_the_issue_done(hello: World, action: str, form: bool) -> None:
    with served(hello, **HOOKED) as (runner, site), Daemon(runner) as daemon:
        wait_until(lambda: runner.metrics.value("last_poll_timestamp_seconds"))
        open_bug(hello)
        delivery = as_form(example(action)) if form else example(action)
        answer = site.deliver(delivery)
        assert (answer.status, answer.text) == (202, "The runner looks.\n")
        wait_until(lambda: runner.outcomes["done"] == 1)
        daemon.end()
    assert labels_of(hello) == ["agent-done", "bug"]


@pytest.mark.parametrize("action", ["closed", "unlabeled"])
def test_an_end_that_a_delivery_tells_ends_the_agent(hello: World, action: str) -> None:
    open_bug(hello, "Do something.")
    agent = Agent.waiting(hello.home)
    with served(hello, **HOOKED, **agent.env, AGENT_LEASE="100000") as (runner, site), Daemon(runner) as daemon:
        agent.pid()
        if action == "closed":
            hello.github.close_issue(HELLO, 1)
            delivery = derived("closed")
        else:
            hello.github.remove_label(HELLO, 1, "bug")
            delivery = example("unlabeled")
        assert site.deliver(delivery).status == 202
        wait_until(lambda: runner.outcomes["cancelled"] == 1)
        daemon.end()
    assert hello.github.pulls(TARGET) == []
    assert "agent-processing" not in labels_of(hello)


def test_a_ping_is_answered_and_wakes_nothing(hello: World) -> None:
    clock = FakeClock()
    with served(hello, clock, **HOOKED) as (runner, site):
        runner.tick()
        answer = site.deliver(example(None, "ping"))
        assert (answer.status, answer.text) == (200, "pong\n")
        assert not looks(hello, runner, clock)


def labelled(name: str) -> Callable[[Json], object]:
    """Another label is the one that was put on or taken off; the issue carries it and its task label."""
    return lambda found: found.update(label={**found.get("label", {}), "name": name})


def without_labels(found: Json) -> None:
    found["issue"]["labels"] = []


def bare(name: str) -> Callable[[Json], object]:
    """As `labelled`, of an issue that carries none."""
    return lambda found: found.update(label={"name": name}, issue=found["issue"] | {"labels": []})


def moved(found: Json) -> None:
    found["repository"]["full_name"] = "Codertocat/Other-World"


NO_NEWS = {
    "assigned": example("assigned"),
    "edited": example("edited"),
    "a comment": example("created", "issue_comment"),
    "an event of another kind": example("opened")._replace(event="pull_request"),
    "no event": example("opened")._replace(event=""),
    "another repository": derived("opened", moved),
    "no task label": derived("opened", without_labels),
    "another label": derived("labeled", bare("wontfix")),
    "processing added": derived("labeled", labelled("agent-processing")),
    "processing added, in capitals": derived("labeled", labelled("Agent-Processing")),
    "done added": derived("labeled", labelled("agent-done")),
    "failed added": derived("labeled", labelled("agent-failed")),
    "processing removed": derived("unlabeled", labelled("agent-processing")),
    "no object": signed(b"[1, null]"),
    "nothing": signed(b"null"),
    "a text": signed(b'"issues"'),
    "an empty object": signed(b"{}"),
    "odd values": signed(b'{"action": ["opened"], "issue": 7, "repository": "x", "label": [], "sender": 1e999}'),
    "odd labels": derived("opened", lambda found: found["issue"].update(labels=["bug", None, {"name": None}])),
    "a label that is a text": derived("labeled", lambda found: found.update(label="bug")),
    "half of a character": signed(b'{"action": "\\ud800"}'),
}


@pytest.mark.parametrize("delivery", NO_NEWS.values(), ids=NO_NEWS.keys())
def test_what_is_no_news_is_accepted_and_makes_no_poll(hello: World, delivery: Delivery) -> None:
    clock = FakeClock()
    with served(hello, clock, **HOOKED) as (runner, site):
        runner.tick()
        answer = site.deliver(delivery)
        assert (answer.status, answer.text) == (202, "That is no news for the runner.\n")
        assert not looks(hello, runner, clock)
        assert not runner.hears


NEWS = {
    "opened": example("opened"),
    "unlabeled": example("unlabeled"),
    "closed": derived("closed"),
    "done taken off": derived("unlabeled", labelled("agent-done")),
    "failed taken off": derived("unlabeled", labelled("agent-failed")),
    "another label beside the task's": derived("labeled", labelled("urgent")),
    "the task label in capitals": derived("labeled", bare("BUG")),
    "the repository in capitals": derived("opened", lambda found: found["repository"].update(full_name=HELLO.upper())),
    "as JSON of another name": example("opened")._replace(kind="application/json; charset=utf-8"),
    "as a form with a character set": as_form(example("opened"))._replace(kind=f"{FORM.upper()}; charset=utf-8"),
}


@pytest.mark.parametrize("delivery", NEWS.values(), ids=NEWS.keys())
def test_news_makes_one_poll(hello: World, delivery: Delivery) -> None:
    clock = FakeClock()
    with served(hello, clock, **HOOKED) as (runner, site):
        runner.tick()
        assert site.deliver(delivery).text == "The runner looks.\n"
        assert looks(hello, runner, clock)
        assert not looks(hello, runner, clock)


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.just("bug") | st.just("opened"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.just("name"), inner),
    max_leaves=6,
)


@given(st.fixed_dictionaries({}, optional=dict.fromkeys(("action", "issue", "label", "repository"), json_values)))
@settings(max_examples=300)
def test_no_payload_of_whatever_shape_is_a_fault(found: Json) -> None:
    config = make_config(HOOKED | {"AGENT_HTTP_PORT": "1"})
    assert is_news("issues", found, config) is False
    assert is_news("issues", payload("opened") | found, config) in (True, False)


@given(st.binary(max_size=60), st.sampled_from(["", "application/json", FORM, "text/plain", "\xff"]))
def test_a_body_is_a_value_or_refused(body: bytes, kind: str) -> None:
    with contextlib.suppress(ValueError):
        read_payload(kind, body)


# -- signatures ------------------------------------------------------------------------------------


def test_the_test_vector_of_github_passes() -> None:
    assert is_signed(SECRET, VECTOR.body, VECTOR.signature)
    assert VECTOR.body == b"Hello, World!"


@pytest.mark.parametrize("known", EXAMPLES.values(), ids=["-".join(map(str, key)) for key in EXAMPLES])
def test_every_signature_of_githubs_own_signer_passes_and_nothing_near_it(known: Delivery) -> None:
    assert is_signed(SECRET, known.body, known.signature)
    assert signed(known.body).signature == known.signature
    assert not is_signed(SECRET, known.body + b" ", known.signature)
    assert not is_signed(SECRET + " ", known.body, known.signature)
    assert not is_signed(SECRET, known.body, known.signature[:-1])
    assert not is_signed(SECRET, known.body, known.signature + "0")
    assert not is_signed(SECRET, known.body, known.signature.removeprefix("sha256="))


NO_JSON = b"{this is no JSON"
SHA1 = "sha1=" + hmac.new(SECRET.encode(), NO_JSON, hashlib.sha1).hexdigest()
GOOD = signed(NO_JSON).signature
UNSIGNED = {
    "empty": {"X_Hub_Signature_256": ""},
    "wrong": {"X_Hub_Signature_256": "sha256=" + "0" * 64},
    "of another body": {"X_Hub_Signature_256": VECTOR.signature},
    "SHA-1 only": {"X_Hub_Signature_256": "", "X_Hub_Signature": SHA1},
    "SHA-1 in its place": {"X_Hub_Signature_256": SHA1},
    "in the old header": {"X_Hub_Signature_256": "", "X_Hub_Signature": GOOD},
    "prefix in capitals": {"X_Hub_Signature_256": GOOD.replace("sha256", "SHA256")},
    "without prefix": {"X_Hub_Signature_256": GOOD.removeprefix("sha256=")},
    "not ASCII": {"X_Hub_Signature_256": "sha256=\xe9\xff" + GOOD[9:]},
    "very long": {"X_Hub_Signature_256": GOOD + "0" * 10_000},
}


@pytest.mark.parametrize("headers", UNSIGNED.values(), ids=UNSIGNED.keys())
def test_a_body_without_its_signature_is_refused_unread(hello: World, headers: dict[str, str]) -> None:
    clock = FakeClock()
    with served(hello, clock, **HOOKED) as (runner, site):
        runner.tick()
        answer = site.deliver(Delivery(NO_JSON, ""), **headers)
        assert answer.status == 401
        assert "X-Hub-Signature-256" in answer.text
        real = site.deliver(Delivery(example("opened").body, ""), **headers)
        assert real.status == 401
        assert not looks(hello, runner, clock)
        assert runner.metrics.value("webhooks_total", "refused") == 2


def test_no_signature_header_at_all_is_refused(hello: World) -> None:
    with served(hello, **HOOKED) as (_, site):
        headers = {"Content_Type": "application/json", "X_GitHub_Event": "issues"}
        assert site.ask("/webhook", "POST", example("opened").body, **headers).status == 401
        assert site.ask("/webhook", "POST", b"", **headers).status == 401
        assert site.ask("/webhook", "POST", b"", X_GitHub_Event="ping").status == 401


def test_a_wrong_secret_shows_in_the_log_but_a_flood_does_not(hello: World, caplog: pytest.LogCaptureFixture) -> None:
    clock = FakeClock()
    with served(hello, clock, **HOOKED) as (_, site):
        for _ in range(5):
            site.deliver(Delivery(NO_JSON, ""))
        clock.at += 61
        site.deliver(Delivery(NO_JSON, ""))
    complaints = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(complaints) == 2
    assert all("is the secret the same?" in text for text in complaints)


@pytest.mark.parametrize(
    "body",
    [NO_JSON, b"", b"\xff\xfe\xfd", b"[" * 500_000, b"1" * 100_000],
    ids=["half", "empty", "bytes", "deep", "digits"],
)
def test_a_signed_body_that_is_no_json_is_told(hello: World, body: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with served(hello, **HOOKED) as (runner, site):
        assert site.deliver(signed(body)).status == 400
        assert site.deliver(signed(b"payload=" + body, kind=FORM)).status == 400
        assert not runner.hears
        assert_well(site, caplog)


def test_a_form_of_a_thousand_fields_is_refused(hello: World, caplog: pytest.LogCaptureFixture) -> None:
    with served(hello, **HOOKED) as (_, site):
        assert site.deliver(signed(b"a=1&" * 1000, kind=FORM)).status == 400
        assert_well(site, caplog)


def test_a_replay_under_another_number_makes_no_second_poll(hello: World) -> None:
    clock = FakeClock()
    with served(hello, clock, **HOOKED) as (runner, site):
        runner.tick()
        assert site.deliver(example("opened"), X_GitHub_Delivery="one").text == "The runner looks.\n"
        assert looks(hello, runner, clock)
        again = site.deliver(example("opened"), X_GitHub_Delivery="two")
        assert (again.status, again.text) == (202, "This delivery came before.\n")
        assert not looks(hello, runner, clock)
        assert site.deliver(example("labeled")).text == "The runner looks.\n"


def test_only_the_last_deliveries_are_remembered(hello: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "DELIVERIES_KNOWN", 3)
    deliveries = [signed(b"[%d]" % number) for number in range(4)]
    with served(hello, **HOOKED) as (_, site):
        for delivery in deliveries:
            assert site.deliver(delivery).text != "This delivery came before.\n"
        for delivery in deliveries[1:]:
            assert site.deliver(delivery).text == "This delivery came before.\n"
        assert site.deliver(deliveries[0]).text != "This delivery came before.\n"


def test_what_was_refused_does_not_count_as_known(hello: World) -> None:
    with served(hello, **HOOKED) as (_, site):
        known = example("opened")
        assert site.deliver(known._replace(body=b"another")).status == 401
        assert site.deliver(known).text == "The runner looks.\n"


# -- what the internet sends -----------------------------------------------------------------------


def test_a_delivery_that_is_too_long_is_answered_and_kept_nowhere(hello: World) -> None:
    site = Site(free_port())
    process = hello.start(**HOOKED, AGENT_HTTP_PORT=str(site.port))
    wait_for_line(process, "status page on")
    held = psutil.Process(process.pid)
    for body in (example("opened").body, b"x" * MAX_DELIVERY):  # what it needs once is not to count
        assert site.ask("/webhook", "POST", body).status == 401
    before = held.memory_info().rss
    for _ in range(3):
        answer = site.ask("/webhook", "POST", b"x" * 30_000_000)
        assert answer.status == 413
        assert "1,048,576 bytes" in answer.text
    assert held.memory_info().rss - before < 15_000_000
    assert site.ask("/healthz").status == 200
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 0


@pytest.mark.parametrize("size", [MAX_DELIVERY, MAX_DELIVERY + 1])
def test_a_delivery_may_be_as_long_as_it_may_be(hello: World, size: int) -> None:
    with served(hello, **HOOKED) as (_, site):
        body = b'{"a": "' + b"x" * (size - 9) + b'"}'
        assert len(body) == size
        assert site.deliver(signed(body)).status == (202 if size <= MAX_DELIVERY else 413)


LENGTHS = {
    "none": (b"", 411),
    "empty": (b"Content-Length:\r\n", 411),
    "negative": (b"Content-Length: -1\r\n", 411),
    "signed": (b"Content-Length: +2\r\n", 411),
    "letters": (b"Content-Length: many\r\n", 411),
    "exponent": (b"Content-Length: 1e3\r\n", 411),
    "hexadecimal": (b"Content-Length: 0x10\r\n", 411),
    "underscore": (b"Content-Length: 1_0\r\n", 411),
    "superscript": (b"Content-Length: \xb2\r\n", 411),
    "beyond all numbers": (b"Content-Length: " + b"9" * 5000 + b"\r\n", 411),
    "huge": (b"Content-Length: 999999999999\r\n", 413),
    "more than comes": (b"Content-Length: 100\r\n", 401),
    "chunked": (b"Transfer-Encoding: chunked\r\n", 411),
}


@pytest.mark.parametrize(("header", "status"), LENGTHS.values(), ids=LENGTHS.keys())
def test_a_length_is_a_number_or_refused(
    hello: World, header: bytes, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    with served(hello, **HOOKED) as (runner, site):
        answer = site.send(b"POST /webhook HTTP/1.1\r\nHost: x\r\n" + header + b"\r\n2\r\n{}\r\n0\r\n\r\n")
        assert answer.startswith(b"HTTP/1.0 %d " % status)
        assert not runner.hears
        assert_well(site, caplog)


def tls_hello() -> bytes:
    """The first bytes of a browser that was told https."""
    out = ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), out, server_hostname="localhost")
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return out.read()


GARBAGE = {
    "nothing": (b"", b""),
    "line ends": (b"\r\n\r\n", b""),
    "bytes": (bytes(range(256)) * 20 + b"\r\n\r\n", b"400"),
    "NULs": (b"\0" * 1000 + b"\r\n\r\n", b"400"),
    "a TLS hello": (tls_hello() + b"\r\n\r\n", b"400"),
    "a long line": (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", b"414"),
    "a line without end": (b"A" * 1_000_000, b"414"),
    "a long header": (b"GET /healthz HTTP/1.1\r\nX: " + b"a" * 70_000 + b"\r\n\r\n", b"431"),
    "a thousand headers": (b"GET /healthz HTTP/1.1\r\n" + b"X: y\r\n" * 1000 + b"\r\n", b"431"),
    "odd headers": (b"GET /healthz HTTP/1.1\r\n: \r\nno colon\r\n\xff\xfe: \x00\r\n\r\n", b"200"),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"505"),
    "no version": (b"GET /healthz HTTP/one.two\r\n\r\n", b"400"),
    "four words": (b"GET / healthz HTTP/1.1\r\n\r\n", b"400"),
    "HEAD": (b"HEAD /healthz HTTP/1.1\r\n\r\n", b"200"),
    "PUT": (b"PUT / HTTP/1.1\r\nContent-Length: 1\r\n\r\nx", b"501"),
    "DELETE": (b"DELETE /webhook HTTP/1.1\r\n\r\n", b"501"),
    "OPTIONS": (b"OPTIONS * HTTP/1.1\r\n\r\n", b"501"),
    "CONNECT": (b"CONNECT example.com:443 HTTP/1.1\r\n\r\n", b"501"),
    "a method that Python has": (b"__class__ / HTTP/1.1\r\n\r\n", b"501"),
    "dots": (b"GET /../../../../etc/passwd HTTP/1.1\r\n\r\n", b"404"),
    "dots in code": (b"GET /%2e%2e/%2e%2e/etc/passwd HTTP/1.1\r\n\r\n", b"404"),
    "NUL in the path": (b"GET /healthz\0 HTTP/1.1\r\n\r\n", b"404"),
    "escapes in the path": (b"GET /\x1b[2J\xff HTTP/1.1\r\n\r\n", b"404"),
    "two slashes": (b"GET //evil.example/ HTTP/1.1\r\n\r\n", b"404"),
    "a proxy's address": (b"GET http://evil.example/ HTTP/1.1\r\n\r\n", b"404"),
    "a body that nobody wants": (b"GET /healthz HTTP/1.1\r\nContent-Length: 9999\r\n\r\nx", b"200"),
    "a POST elsewhere": (b"POST / HTTP/1.1\r\nContent-Length: 1\r\n\r\nx", b"404"),
    "a GET of the webhook": (b"GET /webhook HTTP/1.1\r\n\r\n", b"405"),
}


@pytest.mark.parametrize(("sent", "status"), GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_is_refused_and_leaves_no_trace(
    hello: World, sent: bytes, status: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with served(hello, **HOOKED) as (_, site):
        answer = site.send(sent)
        if len(sent) < 60_000 or answer:  # an answer can get lost when not all was read
            # Python's server answers what it takes for HTTP/0.9 without a status line.
            assert re.match(rb"(HTTP/1\.0 )?%s |\Z" % status, answer)
            assert bool(answer) == bool(status)
        assert b"root:" not in answer
        assert b"Traceback" not in answer
        assert_well(site, caplog)
        assert "\x1b" not in "".join(runner_module.LogFormat(make_config()).format(r) for r in caplog.records)


def test_who_asks_in_http_0_9_gets_the_bare_answer(hello: World) -> None:
    with served(hello, **HOOKED) as (_, site):
        assert site.send(b"GET /healthz\r\n\r\n") == b"ok\n"


def test_a_head_has_no_body(hello: World) -> None:
    with served(hello, **HOOKED) as (_, site):
        for path in ("/healthz", *STATUS_PAGES):
            head, _, body = site.send(f"HEAD {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()).partition(
                b"\r\n\r\n"
            )
            assert head.startswith(b"HTTP/1.0 200 ")
            assert body == b""


def test_a_client_that_goes_away_in_the_middle_does_no_harm(hello: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with served(hello, **HOOKED) as (runner, site):
        before = threading.active_count()
        for sent in (
            b"PO",
            b"POST /webhook HTTP/1.1\r\nContent-Length: 5000\r\n\r\n{",
            b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        ):
            for _ in range(20):
                connection = site.connect()
                connection.sendall(sent)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # reset it
                connection.close()
        wait_until(lambda: threading.active_count() <= before)
        assert not runner.hears
        assert_well(site, caplog)


def is_cut(connection: socket.socket) -> bool:
    """Whether the other side has closed it."""
    connection.settimeout(0.01)
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except ConnectionError:
        return True


@pytest.mark.parametrize("talking", [False, True], ids=["silent", "dripping"])
def test_two_hundred_slow_clients_do_not_stop_the_work(
    hello: World, talking: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(runner_module, "HTTP_PATIENCE", 3)
    monkeypatch.setattr(Exchange, "timeout", 3600)  # which a byte now and then renews
    with served(hello, **HOOKED) as (runner, site), Daemon(runner) as daemon:
        wait_until(lambda: runner.metrics.value("last_poll_timestamp_seconds"))
        process, over = psutil.Process(), threading.Event()
        before = threading.active_count(), process.num_fds()
        slow = [site.connect() for _ in range(200)]

        def drip() -> None:
            for piece in b"POST /webhook HTTP/1.1\r\nContent-Length: 900\r\n\r\n" + b"x" * 900:
                for connection in slow:
                    with contextlib.suppress(OSError):
                        connection.send(bytes([piece]))
                if over.wait(0.1):
                    return

        dripping = threading.Thread(target=drip if talking else lambda: None)
        dripping.start()
        open_bug(hello)
        assert site.deliver(example("opened")).status == 202
        wait_until(lambda: runner.outcomes["done"] == 1)
        wait_until(lambda: all(map(is_cut, slow)))
        over.set()
        dripping.join()
        for connection in slow:
            connection.close()
        # The work itself has left some behind: the worker, and connections to GitHub.
        wait_until(lambda: threading.active_count() <= before[0] + 10 and process.num_fds() <= before[1] + 10)
        assert_well(site, caplog)
        daemon.end()


def test_of_too_many_connections_the_oldest_are_cut(hello: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "HTTP_PATIENCE", 3600)
    monkeypatch.setattr(Exchange, "timeout", 3600)
    with served(hello, **HOOKED) as (_, site):
        before = threading.active_count()
        slow = [site.connect() for _ in range(CONNECTIONS + 50)]
        wait_until(lambda: all(map(is_cut, slow[:50])))
        wait_until(lambda: threading.active_count() <= before + CONNECTIONS)
        assert not any(map(is_cut, slow[60:]))
        assert site.deliver(example("opened")).status == 202
        for connection in slow:
            connection.close()
        wait_until(lambda: threading.active_count() <= before)


def test_a_hundred_deliveries_at_once_are_all_answered_with_few_polls(
    hello: World, caplog: pytest.LogCaptureFixture
) -> None:
    deliveries = [signed(json.dumps(payload("opened") | {"number": number}).encode()) for number in range(100)]
    with served(hello, **HOOKED) as (runner, site), Daemon(runner) as daemon:
        wait_until(lambda: runner.metrics.value("last_poll_timestamp_seconds"))
        begun, before = time.monotonic(), polls(hello)
        with ThreadPoolExecutor(100) as pool:
            assert {answer.status for answer in pool.map(site.deliver, deliveries)} == {202}
        daemon.end()
        assert polls(hello) - before <= 2 + (time.monotonic() - begun) / WAKE_PAUSE
        assert runner.metrics.value("webhooks_total", "news") == 100
        assert "Traceback" not in caplog.text


# -- where it listens ------------------------------------------------------------------------------


def test_without_a_secret_there_is_no_webhook(world: World) -> None:
    with served(world) as (runner, site):
        for path in ("/webhook", "/webhook?a=b"):
            assert site.ask(path).status == 404
            assert site.deliver(example("opened")).status == 404
            assert site.ask(path, "POST", example("opened").body).status == 404
        assert not runner.hears
        assert site.ask("/status.json").json()["webhooks"] == "off"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may see the sockets of a process that hides itself")
def test_without_a_port_nothing_listens(world: World) -> None:
    process = world.start()
    assert "status page" not in wait_for_line(process, "watching")
    wait_until(world.requests)
    listening = [c for c in psutil.Process(process.pid).net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert listening == []
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 0


def test_one_round_opens_no_port(world: World) -> None:
    agent, site = Agent.waiting(world.home), Site(free_port())
    world.open("Do something.")
    process = world.start("--once", **agent.env, AGENT_HTTP_PORT=str(site.port))
    agent.pid()
    with pytest.raises(ConnectionRefusedError):
        site.ask("/healthz")
    agent.go()
    assert finish(process)[0] == 0


def test_a_port_that_is_taken_stops_the_start_with_advice(world: World) -> None:
    with socket.create_server(("127.0.0.1", free_port())) as taken:
        port = taken.getsockname()[1]
        code, _, err = finish(world.start(AGENT_HTTP_PORT=str(port)))
    assert code == 2
    (line,) = err.splitlines()
    assert f"cannot start: AGENT_HTTP_HOST and AGENT_HTTP_PORT, 127.0.0.1 and {port}: Address already in use" in line
    assert "Set AGENT_HTTP_PORT to a port that is free" in line


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid", "not a host", "\u2603.example"])
def test_an_address_that_is_not_this_machines_stops_the_start(world: World, host: str) -> None:
    code, _, err = finish(world.start(AGENT_HTTP_PORT=str(free_port()), AGENT_HTTP_HOST=host))
    assert code == 2
    assert "AGENT_HTTP_HOST" in err


def test_ipv6_is_served(world: World) -> None:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
            port = server.getsockname()[1]
    except OSError:
        pytest.skip("this machine has no IPv6")
    runner = world.runner(AGENT_HTTP_HOST="::1", AGENT_HTTP_PORT=str(port))
    with serving(runner):
        site = Site(port, "::1")
        assert site.ask("/healthz").status == 200
        assert site.ask("/status.json").status == 200
        assert site.ask("/status.json", Host="evil.example").status == 421


def test_the_port_is_free_again_after_a_signal(world: World) -> None:
    site = Site(free_port())
    for _ in range(2):
        process = world.start(AGENT_HTTP_PORT=str(site.port))
        wait_for_line(process, "watching")
        assert site.ask("/healthz").status == 200
        with site.connect():  # that somebody is connected does not hold it up
            process.send_signal(signal.SIGTERM)
            assert finish(process)[0] == 0
        with pytest.raises(ConnectionRefusedError):
            site.ask("/healthz")


# -- health and the pause between polls ------------------------------------------------------------


def test_health_hangs_on_polls_that_work(world: World) -> None:
    clock = FakeClock()
    with served(world, clock, AGENT_POLL_INTERVAL="100") as (runner, site):
        assert site.ask("/healthz").text == "ok\n"
        runner.tick()
        clock.at += 300
        assert site.ask("/healthz").status == 200
        clock.at += 1
        answer = site.ask("/healthz")
        assert (answer.status, answer.text) == (503, "The queue was not read lately.\n")
        assert site.ask("/status.json").json()["healthy"] is False
        world.github.faults.append(Fault(path=".*/issues", status=502))
        runner.tick()
        assert site.ask("/healthz").status == 503
        clock.at = runner.next_poll
        runner.tick()
        assert site.ask("/healthz").status == 200


def test_a_runner_that_never_reads_the_queue_becomes_unhealthy(world: World) -> None:
    clock = FakeClock()
    world.github.faults.append(Fault(path=".*/issues", status=502, times=None))
    with served(world, clock, AGENT_POLL_INTERVAL="100") as (runner, site):
        for _ in range(20):
            runner.tick()
            clock.at = runner.next_poll
        assert site.ask("/healthz").status == 503
        assert "none yet" in site.ask("/").text


def test_a_runner_that_stops_is_not_healthy_and_says_so(world: World) -> None:
    agent = Agent.waiting(world.home)
    world.open("Do something.")
    with served(world, **agent.env) as (runner, site), Daemon(runner) as daemon:
        agent.pid()
        assert site.ask("/healthz").status == 200
        runner.request_stop()
        assert site.ask("/healthz").status == 503
        assert site.ask("/status.json").json()["stopping"] is True
        agent.go()
        daemon.end()


def test_while_webhooks_come_in_polls_are_rare(hello: World) -> None:
    clock = FakeClock()
    with served(hello, clock, **HOOKED | {"AGENT_POLL_INTERVAL": "100"}) as (runner, site):

        def poll() -> float:
            """Polls when it is time; the pause until the next time."""
            clock.at = max(clock.at, runner.next_poll)
            runner.tick()
            return runner.next_poll - clock.at

        assert poll() == 100
        assert site.ask("/status.json").json()["webhooks"] == "none lately"
        clock.at += 50
        told = clock.at
        site.deliver(example("opened"))
        assert runner.next_poll == clock.at
        assert site.ask("/status.json").json()["webhooks"] == "coming in"
        assert poll() == 5
        assert poll() == 500
        assert runner.healthy
        clock.at += 499
        assert runner.healthy
        assert poll() == 500
        while clock.at + 500 < told + 3600:
            assert poll() == 500
        poll()
        assert poll() == 100
        assert site.ask("/status.json").json()["webhooks"] == "none lately"


def test_a_find_that_no_webhook_told_of_ends_the_trust(hello: World) -> None:
    clock = FakeClock()
    with served(hello, clock, **HOOKED | {"AGENT_POLL_INTERVAL": "100"}) as (runner, site):
        runner._poll()
        site.deliver(example("opened"))
        for _ in range(3):
            clock.at = runner.next_poll
            runner._poll()
        assert runner.next_poll - clock.at == 500
        open_bug(hello)
        clock.at = runner.next_poll
        runner._poll()
        assert runner.next_poll - clock.at == 100
        assert not runner.hears
        clock.at = runner.next_poll
        runner._poll()
        assert runner.next_poll - clock.at == 100


def test_a_list_that_lags_behind_a_webhook_is_read_again(hello: World) -> None:
    clock = FakeClock()
    with served(hello, clock, **HOOKED) as (runner, site):
        runner._poll()
        clock.at += 60
        told = clock.at
        open_bug(hello)
        hello.github.faults.append(Fault(path=".*/issues", status=200, body=[]))
        site.deliver(example("opened"))
        runner._poll()
        assert not runner.queue.waiting
        assert runner.next_poll == told + 5
        clock.at = runner.next_poll
        runner._poll()
        assert list(runner.queue.waiting) == [1]
        assert runner.hears
        assert runner.next_poll - clock.at == 5 * 3600


def test_a_webhook_during_a_poll_is_not_forgotten(hello: World) -> None:
    clock = FakeClock()
    with served(hello, clock, **HOOKED) as (runner, site):

        def tell() -> None:
            open_bug(hello)
            site.deliver(example("opened"))

        runner._poll()
        clock.at = runner.next_poll
        hello.github.faults.append(Fault(path=".*/issues", action=tell))
        runner._poll()
        assert list(runner.queue.waiting) == [1]
        assert runner.hears
        assert runner.next_poll <= clock.at + 5


def test_a_webhook_during_a_poll_that_fails_is_not_forgotten(hello: World) -> None:
    clock = FakeClock()
    with served(hello, clock, **HOOKED) as (runner, site):

        def tell() -> None:
            site.deliver(example("opened"))

        away = Fault(path=".*/issues", status=502, times=None)
        hello.github.faults.append(away)
        for _ in range(12):  # so that the next try is far away
            runner._poll()
            clock.at = runner.next_poll
        away.action = tell
        runner._poll()
        assert runner.next_poll <= clock.at + 5


def test_webhooks_do_not_have_the_queue_read_all_the_time(hello: World) -> None:
    clock = FakeClock()
    with served(hello, clock, **HOOKED) as (runner, site):
        runner._poll()
        for action in ("opened", "labeled", "reopened"):
            site.deliver(example(action))
            assert runner.next_poll == clock.at + WAKE_PAUSE


# -- the status page -------------------------------------------------------------------------------

PLUGIN = """
import os, time, runner
def process_task(task, workspace):
    wish = task.issue["body"].split()[0]
    print("starting", flush=True)
    print("the key is", os.environ.get("MY_KEY"), SAID, flush=True)
    if wish == "hold":
        time.sleep(600)
    if wish == "again":
        raise runner.TaskRetry("the <b>model</b> is busy")
    if wish == "done":
        open("new.txt", "w").write(task.task_id)
"""

HOSTILE = [
    "<script>document.title='ran';alert(1)</script>",
    "<img src=x onerror=alert(2)>",
    '"><svg onload=alert(3)>',
    "' onmouseover='alert(4)",
    "</title></style></pre></li><iframe src=//evil.example>",
    "&lt;script&gt;alert(5)&lt;/script&gt; &#60;b&#62;",
    "a\u202etxt.exe\u202c \u2066and\u2069 \u200bzero\u200dwidth\ufeff",
    "W" * 10_000,
    "word " * 2_000,
    "javascript:alert(6) [x](javascript:alert(7))",
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467",
]
ALLOWED = {
    *("html", "head", "meta", "title", "link", "style", "body", "main", "header", "h1", "h2", "p", "bdi", "dl", "div"),
    *("dt", "dd", "ul", "li", "span", "a", "pre", "time"),
}


class Page(html.parser.HTMLParser):
    """What a browser makes of a page: tags, attributes, text, links."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def links(self) -> list[str]:
        return [value for name, value in self.attributes if name == "href" and not value.startswith("data:")]


def assert_harmless(page: Page) -> None:
    assert set(page.tags) <= ALLOWED
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "srcdoc", "style")]
    assert {name for name, _ in page.attributes} <= {
        *("lang", "charset", "http-equiv", "content", "name", "rel", "href", "class", "datetime", "title", "role"),
        *("aria-label", "dir"),
    }
    assert all(re.match(r"https?://127\.0\.0\.1:\d+/acme/", link) for link in page.links)
    assert not re.search("[\u200b\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]", page.text)


@contextlib.contextmanager
def busy(
    world: World, wishes: str, titles: list[str], said: str = "<script>alert(1)</script>", **env: str
) -> Iterator[tuple[Runner, Site]]:
    """A runner that has done what was asked of it up to the tasks that hold it; these have printed something."""
    (world.home / "agent.py").write_text(f"SAID = {said!r}\n{PLUGIN}")
    for index, wish in enumerate(wishes.split()):
        world.open(wish, title=titles[index % len(titles)])
    held = [number for number, wish in enumerate(wishes.split(), 1) if wish == "hold"]
    usual = {
        "AGENT_PROCESS_TASK": f"{world.home}/agent.py:process_task",
        "AGENT_ENV": "MY_KEY",
        "MY_KEY": "a-value-that-is-secret",
        **env,
    }
    with served(world, **usual) as (runner, site), Daemon(runner):

        def is_held() -> bool:
            running = site.ask("/status.json").json()["running"]
            return [task["issue"] for task in running if "key" in task["last_line"]] == held

        wait_until(is_held, 120)
        yield runner, site


def test_the_status_tells_what_goes_on(world: World) -> None:
    titles = ["Add a <b>", "Change nothing", "Try again", "Hold", "Wait", "Wait too"]
    with busy(world, "done nothing again hold done done", titles) as (runner, site):
        status, page = site.ask("/status.json").json(), Page(site.ask("/").text)
    (task,) = status["running"]
    assert (task["issue"], task["title"], task["phase"], task["attempt"]) == (4, "Hold", "working", 1)
    assert task["last_line"] == "the key is *** <script>alert(1)</script>"
    assert task["seconds"] >= 0
    assert task["claim"]["epoch"] == 1
    assert 0 <= task["claim"]["renewed"] < 600
    assert [row["issue"] for row in status["queue"]] == [5, 6]
    assert status["queue_length"] == 2
    (again,) = status["waiting"]
    assert (again["issue"], again["why"]) == (3, "the <b>model</b> is busy")
    assert [(end["issue"], end["outcome"]) for end in status["history"]] == [(3, "retry"), (2, "failed"), (1, "done")]
    assert status["history"][2]["pull"] == world.pull().html_url
    assert status["history"][1]["why"] == "The agent changed nothing."
    assert status["quota"]["limit"] == 5000
    assert 0 < status["quota"]["remaining"] <= 5000
    assert status["healthy"] is True
    assert status["dispatch"] == "acme/dispatch"
    assert status["runner"] == runner.id
    for text in ("Running", "working", "the key is *** <script>", "To be tried again", "Queue (2)", "Last results"):
        assert text in page.text
    assert "of 5,000" in page.text
    assert world.pull().html_url in page.links
    assert {f"{world.github.server_url}/acme/dispatch/issues/{n}" for n in range(1, 7)} <= set(page.links)
    assert_harmless(page)


def test_the_last_fifty_ends_are_kept(world: World) -> None:
    for number in range(1, 56):
        world.open("No patch.", title=f"Task {number}")
    with served(world, AGENT_MAX_CONCURRENT="8") as (runner, site):
        runner.run_once()
        status, page = site.ask("/status.json").json(), Page(site.ask("/").text)
    ends = [end["issue"] for end in status["history"]]
    assert len(ends) == len(set(ends)) == HISTORY_KEPT == 50
    assert ends[0] > 45
    assert [end["at"] for end in status["history"]] == sorted([end["at"] for end in status["history"]], reverse=True)
    assert sorted(page.links) == sorted(end["url"] for end in status["history"])


def test_a_long_queue_is_shown_in_part_and_counted_whole(world: World) -> None:
    for number in range(130):
        world.open(title=f"Task {number}")
    with served(world, FakeClock()) as (runner, site):
        runner._poll()
        status = site.ask("/status.json").json()
        assert [row["issue"] for row in status["queue"]] == list(range(1, 101))
        assert status["queue_length"] == 130
        assert "Queue (130)" in Page(site.ask("/").text).text


def test_what_other_runners_have_is_not_shown_as_queued(world: World) -> None:
    world.open()
    world.open()
    put_claim(world)
    with served(world, FakeClock()) as (runner, site):
        runner._poll()
        runner._look_around()
        status = site.ask("/status.json").json()
        assert [row["issue"] for row in status["queue"]] == [2]
        assert status["elsewhere"] == 1


def test_hostile_titles_and_output_are_text(world: World) -> None:
    wishes = "nothing " * 4 + "again hold" + " done" * 6
    said = "\x1b[31m\x00<img src=x onerror=alert(8)>\u202e &amp; \"quoted\" 'too' </pre>" + "y" * 5000
    with busy(world, wishes, HOSTILE, said) as (_, site):
        text = site.ask("/").text
        status = site.ask("/status.json").json()
    page = Page(text)
    assert_harmless(page)
    assert "<img src=x onerror=alert(2)>" in page.text
    assert "&lt;script&gt;alert(5)&lt;/script&gt; &#60;b&#62;" in page.text
    assert "\"quoted\" 'too' </pre>" in page.text
    assert all(len(task["title"]) <= 1000 for kind in ("running", "waiting", "history") for task in status[kind])
    assert all(len(row["title"]) <= 256 for row in status["queue"])
    assert len(text) < 60_000


@given(st.text() | st.sampled_from(HOSTILE) | st.text(st.sampled_from("<>&\"' \u202e\u200b\x1b\x00\n\r\u2028\x85a")))
def test_foreign_text_is_one_short_line_that_holds_no_markup(text: str) -> None:
    made = shown(text)
    assert not re.search(r"[<>\"']|&(?!amp;|lt;|gt;|quot;|#x27;)", made)
    assert not runner_module.UNSEEN.search(made)
    assert len(html.unescape(made)) <= 300
    assert len(made.splitlines()) <= 1
    if len(text) <= 300:
        assert html.unescape(made).split() == runner_module.printable(text).split()


@pytest.mark.parametrize("form", ["{}", "https://x:{}@example.com/", "%s"])
def test_no_secret_is_shown_anywhere(world: World, form: str) -> None:
    token, key = world.github.token, "a-value-that-is-secret"
    coded = base64.b64encode(f"x-access-token:{token}".encode()).decode()
    told = [form.format(token) if "{" in form else coded, key, SECRET]
    with busy(world, "nothing again hold done", told, GITHUB_WEBHOOK_SECRET=SECRET, said=f"again {key}") as (_, site):
        pages = [site.ask(path).text for path in STATUS_PAGES]
    assert "***" in pages[0]
    assert "***" in pages[1]
    for page in pages:
        for secret in (token, coded, key, SECRET, "It&#x27;s a Secret"):
            assert secret not in page


@pytest.mark.parametrize("value", ["webhooks", "queue_length", "1234567.0", '"running": ', "last_poll"])
def test_a_secret_that_looks_like_a_part_of_the_status_spoils_nothing(world: World, value: str) -> None:
    clock = FakeClock()
    clock.at = 0.0
    with served(world, clock, AGENT_ENV="MY_KEY", MY_KEY=value) as (runner, site):
        runner.metrics.set("quota_reset_timestamp_seconds", 1234567.0, "core")
        clock.at = 12_345_678.0
        for path in STATUS_PAGES:
            assert site.ask(path).status == 200
        assert site.ask("/status.json").json()["queue_length"] == 0


def test_a_browser_may_do_nothing_with_what_it_gets(world: World) -> None:
    with served(world) as (_, site):
        for path in (*STATUS_PAGES, "/healthz", "/nothing"):
            headers = site.ask(path).headers
            policy = dict(part.strip().partition(" ")[::2] for part in headers["Content-Security-Policy"].split(";"))
            assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
            assert policy["form-action"] == "'none'"
            assert "script-src" not in policy
            assert "unsafe" not in headers["Content-Security-Policy"]
            assert headers["X-Content-Type-Options"] == "nosniff"
            assert headers["X-Frame-Options"] == "DENY"
            assert headers["Referrer-Policy"] == "no-referrer"
            assert headers["Cache-Control"] == "no-store"
            assert headers["Server"] == "agent-runner"
            assert "Access-Control-Allow-Origin" not in headers
        assert site.ask("/").headers["Content-Type"] == "text/html; charset=utf-8"
        assert site.ask("/status.json").headers["Content-Type"] == "application/json"


def test_the_style_is_the_one_that_the_policy_allows(world: World) -> None:
    with served(world) as (_, site):
        answer = site.ask("/")
    (style,) = re.findall(r"<style>(.*?)</style>", answer.text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in answer.headers["Content-Security-Policy"]


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8080", "localhost.evil.example", "127.0.0.1.evil.example", "a@localhost", "[x]"],
)
def test_a_name_that_leads_here_by_dns_gets_no_page(hello: World, host: str) -> None:
    with served(hello, **HOOKED) as (_, site):
        for path in STATUS_PAGES:
            answer = site.ask(path, Host=host)
            assert answer.status == 421
            assert HELLO not in answer.text
        assert site.ask("/healthz", Host=host).status == 200
        assert site.deliver(example("opened"), Host=host).status == 202


@pytest.mark.parametrize("host", ["localhost:1234", "LOCALHOST", "127.0.0.1", "127.0.0.1:80", "[::1]", "[::1]:80", ""])
def test_this_machines_own_names_get_the_pages(world: World, host: str) -> None:
    with served(world) as (_, site):
        for path in STATUS_PAGES:
            assert site.ask(path, Host=host).status == 200


def test_who_opens_it_to_all_machines_can_use_any_name(world: World) -> None:
    with served(world, AGENT_HTTP_HOST="0.0.0.0") as (_, site):  # nosec B104
        assert site.ask("/status.json", Host="runner.example").status == 200


def test_the_page_can_be_read_while_everything_changes(world: World) -> None:
    """Readers in their threads, beside a loop and workers that change what they read."""
    for number in range(1, 25):
        world.open("No patch.", title=f"Task {number}")
    with served(world, AGENT_MAX_CONCURRENT="4") as (runner, site), Daemon(runner) as daemon:
        with ThreadPoolExecutor(4) as pool:

            def read(path: str) -> set[int]:
                seen = set()
                while runner.outcomes["failed"] < 24:
                    seen.add(site.ask(path).status)
                return seen

            assert set().union(*pool.map(read, (*STATUS_PAGES, "/healthz"), timeout=120)) == {200}
        daemon.end()
