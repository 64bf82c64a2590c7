"""A scripted model behind OpenAI's chat completions API, for tests of a loop that asks one.

    with ModelServer([call("ls"), status(429, retry_after=1), say("Done.")]) as model:
        ...  # point the program at model.url with model.key, or give it model.env()
        assert [body["messages"][-1]["role"] for body in model.requests] == ["user", "tool", "tool"]
        assert model.problems == []

Steps are taken in order, one for each request: a Reply, a Fault, or a function that makes one of the request's JSON.
A script may be endless, as itertools.repeat(call("true")) is. Replies can be added: call("ls") + raw_call("bash", "{").

Strict means: an unknown path or key, a wrong API key, a history that OpenAI or servers like it refuse, and a request
after the script's end end up in `problems` and get an error; they take no step. Standard library only. The rules are
those of https://platform.openai.com/docs/api-reference/chat/create and of the types in OpenAI's own Python package.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from http.client import responses as REASONS  # noqa: N812
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any, Self, cast

Json = dict[str, Any]
PREFIX = "/v1"
CHAT, MODELS = f"POST {PREFIX}/chat/completions", f"GET {PREFIX}/models"
SLICE = 0.05  # seconds from one byte of a drip to the next
_ids = itertools.count(1)


# What a script is made of.


def tokens(prompt: int = 100, completion: int = 10, cached: int | None = 0) -> Json:
    """The usage that a reply tells; without details of the cache if `cached` is None, as from many other servers."""
    told: Json = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return told if cached is None else told | {"prompt_tokens_details": {"cached_tokens": cached, "audio_tokens": 0}}


@dataclass(frozen=True)
class Reply:
    """What the model says and wants to have called."""

    content: str | None = None
    calls: tuple[Json, ...] = ()
    finish: str = "stop"
    usage: Json | None = field(default_factory=tokens)  # None: leave it out
    extra: Json = field(default_factory=dict)  # more keys of the message, as some servers have them

    def __add__(self, other: Reply) -> Reply:
        """Both in one: all texts and calls; the rest is that of the first."""
        texts = [text for text in (self.content, other.content) if text is not None]
        finish = other.finish if self.finish == "stop" else self.finish
        return replace(self, content="".join(texts) if texts else None, calls=self.calls + other.calls, finish=finish)

    def render(self, model: str) -> Json:
        message: Json = {"role": "assistant", "content": self.content, "refusal": None, "annotations": []}
        message |= {"tool_calls": list(self.calls)} if self.calls else {}
        choice = {"index": 0, "message": message | self.extra, "logprobs": None, "finish_reason": self.finish}
        return {
            "id": f"chatcmpl-{next(_ids):024}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": model,
            "choices": [choice],
            **({} if self.usage is None else {"usage": self.usage}),
            "service_tier": "default",
            "system_fingerprint": "fp_standin",
        }


@dataclass(frozen=True)
class Fault:
    """What comes instead of a reply, or along with it."""

    status: int = 200
    body: bytes | None = None  # None: that of `reply`
    headers: dict[str, str] = field(default_factory=dict)
    reply: Reply = field(default_factory=Reply)
    ends: str = ""  # "before" the answer or "amid" it: the connection is closed
    wait: float = 0.0  # seconds before the answer
    drip: bool = False  # that wait comes after the head, with a space now and then


Step = Reply | Fault | Callable[[Json], Reply | Fault]


def say(text: str | None, finish: str = "stop", *, usage: Json | None = None, extra: Json | None = None) -> Reply:
    """A text and no call; `usage` is what tokens() makes, or {} for none."""
    return _reply(Reply(text, finish=finish, extra=extra or {}), usage)


def call(
    *commands: str, text: str | None = None, finish: str = "tool_calls", usage: Json | None = None, name: str = "bash"
) -> Reply:
    """One call of the tool `bash` for each command, with ids of their own."""
    calls = tuple(_call(name, json.dumps({"command": command}), None) for command in commands)
    return _reply(Reply(text, calls, finish), usage)


def raw_call(name: str, arguments: Any, id: str | None = None, *, usage: Json | None = None) -> Reply:  # noqa: A002
    """One call as it is given: arguments that are no JSON or no text, a tool that there is not, an id that is empty."""
    return _reply(Reply(None, (_call(name, arguments, id),), "tool_calls"), usage)


def _reply(reply: Reply, usage: Json | None) -> Reply:
    return reply if usage is None else replace(reply, usage=usage or None)


def _call(name: str, arguments: Any, number: str | None) -> Json:
    number = f"call_{next(_ids):024}" if number is None else number
    return {"id": number, "type": "function", "function": {"name": name, "arguments": arguments}}


# https://platform.openai.com/docs/guides/error-codes: type, code and message where a script names none.
INVALID = "invalid_request_error"
ERRORS: dict[int, tuple[str, str | None, str]] = {
    400: (INVALID, None, "Invalid request."),
    401: (INVALID, "invalid_api_key", "Incorrect API key provided: sk-wrong."),
    403: (INVALID, None, "You are not allowed to sample from this model."),
    404: (INVALID, "model_not_found", "The model `none` does not exist or you do not have access to it."),
    429: ("requests", "rate_limit_exceeded", "Rate limit reached for requests. Please try again in 1s."),
    500: ("server_error", None, "The server had an error while processing your request. Sorry about that!"),
    503: ("server_error", None, "The engine is currently overloaded, please try again later."),
}
QUOTA = "You exceeded your current quota, please check your plan and billing details."
TOO_LONG = "This model's maximum context length is 8192 tokens. However, your messages resulted in 9001 tokens."
CODES = {  # those that say more than the status: type, param, message
    "insufficient_quota": ("insufficient_quota", None, QUOTA),
    "context_length_exceeded": (INVALID, "messages", f"{TOO_LONG} Please reduce the length of the messages."),
}


def status(
    number: int,
    *,
    code: str | None = None,
    message: str | None = None,
    type: str | None = None,  # noqa: A002
    param: str | None = None,
    retry_after: float | str | None = None,
    headers: dict[str, str] | None = None,
) -> Fault:
    """An error as OpenAI words it. What is not given fits the code, or else the status."""
    usual_type, usual_code, usual_message = ERRORS.get(number, ERRORS[500 if number >= 500 else 400])
    usual_param = None
    if code in CODES:
        usual_type, usual_param, usual_message = CODES[code]
    later = {} if retry_after is None else {"retry-after": str(retry_after)}
    body = error_body(message or usual_message, type or usual_type, param or usual_param, code or usual_code)
    return Fault(number, json.dumps(body).encode(), later | (headers or {}))


def error_body(message: str, kind: str = INVALID, param: str | None = None, code: str | None = None) -> Json:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def dropped() -> Fault:
    """The connection is closed without an answer."""
    return Fault(ends="before")


def half(reply: Reply | None = None) -> Fault:
    """The connection is closed in the middle of the body."""
    return Fault(reply=reply or say("Half of this is missing."), ends="amid")


def not_json(body: bytes = b"<html>Bad gateway</html>", kind: str = "text/html", number: int = 200) -> Fault:
    return Fault(number, body, {"content-type": kind})


def answer(data: Any, number: int = 200) -> Fault:
    """Any JSON at all, such as {"choices": []}."""
    return Fault(number, json.dumps(data).encode())


def redirect(url: str, number: int = 307) -> Fault:
    return Fault(number, b"", {"location": url})


def slow(seconds: float, reply: Reply | None = None, *, drip: bool = False) -> Fault:
    """A reply that is late, and none if the server is closed first.

    With `drip` its head comes at once and a space now and then, which no time limit between two bytes will notice.
    """
    return Fault(reply=reply or say("Late."), wait=seconds, drip=drip)


# What is wrong with a request. Each check tells all that it finds.

Number = (int, float)
KEYS: dict[str, type | tuple[type, ...]] = {  # those of a request, less what is deprecated or not served
    "model": str,
    "messages": list,
    "tools": list,
    "tool_choice": (str, dict),
    "parallel_tool_calls": bool,
    "temperature": Number,
    "top_p": Number,
    "max_tokens": int,
    "max_completion_tokens": int,
    "reasoning_effort": str,
    "verbosity": str,
    "seed": int,
    "stop": (str, list),
    "n": int,
    "stream": bool,
    "store": bool,
    "user": str,
    "metadata": dict,
    "service_tier": str,
    "safety_identifier": str,
    "prompt_cache_key": str,
    "prompt_cache_retention": str,
    "frequency_penalty": Number,
    "presence_penalty": Number,
    "response_format": dict,
}
MESSAGE_KEYS = {
    "system": {"role", "content", "name"},
    "developer": {"role", "content", "name"},
    "user": {"role", "content", "name"},
    "assistant": {"role", "content", "name", "refusal", "tool_calls"},
    "tool": {"role", "content", "tool_call_id"},
}
SCHEMA_TYPES = {"string", "number", "integer", "boolean", "object", "array", "null"}
TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


def check_body(body: Any) -> Iterator[str]:
    if not isinstance(body, dict):
        yield "the body is not a JSON object"
        return
    yield from check_keys(body, set(KEYS), "")
    for key, kind in KEYS.items():
        value = body.get(key)
        is_wrong = not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
        if key in body and is_wrong:
            yield f"{key} is of the wrong type: {value!r}"
    for key in ("model", "messages"):
        if not body.get(key):
            yield f"{key} is missing or empty"
    if body.get("stream") or body.get("n", 1) != 1:
        yield "not served: stream, n"
    if {"max_tokens", "max_completion_tokens"} <= body.keys():
        yield "max_tokens and max_completion_tokens exclude each other"
    yield from check_tools(body)
    messages = body.get("messages")
    if isinstance(messages, list):
        yield from check_messages(messages)


def check_keys(node: Json, known: set[str], where: str) -> Iterator[str]:
    if unknown := sorted(node.keys() - known):
        yield f"{where or 'the body'} has unknown keys: {', '.join(unknown)}"


def check_tools(body: Json) -> Iterator[str]:
    if "tools" not in body:
        for key in ("tool_choice", "parallel_tool_calls"):
            if key in body:
                yield f"{key} is for requests with tools only"
        return
    tools = body["tools"] if isinstance(body["tools"], list) else []
    if not tools:
        yield "tools is empty"
    names = [tool["function"].get("name") for tool in tools if is_function(tool)]
    for index, tool in enumerate(tools):
        yield from check_tool(tool, f"tools[{index}]")
    if len(set(map(str, names))) < len(names):
        yield "tools has a name twice"
    choice = body.get("tool_choice", "auto")
    if choice not in ("none", "auto", "required") and not (
        is_function(choice) and choice["function"].get("name") in names
    ):
        yield f"tool_choice is none: {choice!r}"


def is_function(node: Any) -> bool:
    return isinstance(node, dict) and node.get("type") == "function" and isinstance(node.get("function"), dict)


def check_tool(tool: Any, where: str) -> Iterator[str]:
    if not is_function(tool):
        yield f"{where} is no function"
        return
    yield from check_keys(tool, {"type", "function"}, where)
    function = tool["function"]
    yield from check_keys(function, {"name", "description", "parameters", "strict"}, f"{where}.function")
    if not is_tool_name(function.get("name")):
        yield f"{where}.function.name is none: {function.get('name')!r}"
    if not isinstance(function.get("description", ""), str):
        yield f"{where}.function.description is no text"
    if "parameters" in function:
        schema, at = function["parameters"], f"{where}.function.parameters"
        if isinstance(schema, dict) and schema.get("type") != "object":
            yield f"{at} is not that of an object"
        yield from check_schema(schema, at, strict=function.get("strict") is True)


def is_tool_name(name: Any) -> bool:
    return isinstance(name, str) and TOOL_NAME.fullmatch(name) is not None


def check_schema(schema: Any, where: str, *, strict: bool) -> Iterator[str]:
    """As much of JSON Schema as parameters of tools need. What is strict names all its properties and allows no other.

    https://platform.openai.com/docs/guides/function-calling#strict-mode
    """
    if not isinstance(schema, dict):
        yield f"{where} is no schema"
        return
    kinds = schema.get("type")
    if not {str(kind) for kind in (kinds if isinstance(kinds, list) else [kinds])} <= SCHEMA_TYPES:
        yield f"{where}.type is none: {kinds!r}"
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if (
        not isinstance(properties, dict)
        or not isinstance(required, list)
        or any(key not in properties for key in map(str, required))
    ):
        yield f"{where} requires what it has not"
        return
    is_object = "properties" in schema or kinds == "object"
    if strict and is_object and (set(required) != set(properties) or schema.get("additionalProperties") is not False):
        yield f"{where} is not as strict as it says"
    for name, part in [*properties.items(), *([("[]", schema["items"])] if "items" in schema else [])]:
        yield from check_schema(part, f"{where}.{name}", strict=strict)


def check_messages(messages: Sequence[Any]) -> Iterator[str]:
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict) or str(message.get("role")) not in MESSAGE_KEYS:
            yield f"{where} has no known role"
            continue
        role = message["role"]
        yield from check_keys(message, MESSAGE_KEYS[role], where)
        yield from check_content(message, where)
        if "name" in message and not (
            isinstance(message["name"], str) and re.fullmatch(r"[^\s<|\\/>]+", message["name"])
        ):
            yield f"{where}.name is none: {message['name']!r}"
        if role == "assistant" and "tool_calls" in message:
            yield from check_calls(message["tool_calls"], where)
        if role == "tool" and not isinstance(message.get("tool_call_id"), str):
            yield f"{where}.tool_call_id is no text"
    yield from check_pairs([message if isinstance(message, dict) else {} for message in messages])


def check_content(message: Json, where: str) -> Iterator[str]:
    """A text, or parts that are texts where a person or a program speaks."""
    content, role = message.get("content"), message["role"]
    if isinstance(content, str) or (content is None and role == "assistant" and message.get("tool_calls")):
        return
    if role == "tool" or not (isinstance(content, list) and content):
        yield f"{where}.content is no text: {content!r}"
        return
    for index, part in enumerate(content):
        if not (isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] == "text"):
            yield f"{where}.content[{index}] is no part that is served"
        elif not isinstance(part["text"], str):
            yield f"{where}.content[{index}].text is no text"


def check_calls(calls: Any, where: str) -> Iterator[str]:
    if not isinstance(calls, list) or not calls:
        yield f"{where}.tool_calls is no list, or empty"
        return
    for index, made in enumerate(calls):
        at = f"{where}.tool_calls[{index}]"
        if not is_function(made):
            yield f"{at} is no call of a function"
            continue
        yield from check_keys(made, {"id", "type", "function"}, at)
        yield from check_keys(made["function"], {"name", "arguments"}, f"{at}.function")
        if not is_tool_name(made["function"].get("name")):
            yield f"{at}.function.name is none: {made['function'].get('name')!r}"
        arguments = made["function"].get("arguments")
        if not isinstance(arguments, str) or not is_json(arguments):
            yield f"{at}.function.arguments is no JSON in a text: {arguments!r}"
    ids = ids_of(calls)
    if len(set(ids)) < len(calls) or not all(ids):
        yield f"{where}.tool_calls has an id that is missing, empty or there twice"


def ids_of(calls: Any) -> list[str]:
    rows = calls if isinstance(calls, list) else []
    return [row["id"] for row in rows if isinstance(row, dict) and isinstance(row.get("id"), str)]


def check_pairs(messages: Sequence[Json]) -> Iterator[str]:
    """Each call is answered once, in any order, before anything else is said."""
    waiting: list[str] = []
    for index, message in enumerate(messages):
        if message.get("role") == "tool":
            if message.get("tool_call_id") in waiting:
                waiting.remove(message["tool_call_id"])
            else:
                yield f"messages[{index}] answers no call that waits: {message.get('tool_call_id')!r}"
            continue
        if waiting:
            yield f"messages[{index}] comes before the answers to {', '.join(waiting)}"
        waiting = ids_of(message.get("tool_calls")) if message.get("role") == "assistant" else []
    if waiting:
        yield f"messages ends without the answers to {', '.join(waiting)}"


def is_json(text: str | bytes) -> bool:
    try:
        parse_json(text)
    except ValueError:
        return False
    return True


def parse_json(text: str | bytes) -> Any:
    """As strict as other languages: no NaN, no half of a surrogate pair. ValueError if it is not JSON."""

    def refuse(constant: str) -> Any:
        raise ValueError(constant)

    value = json.loads(text, parse_constant=refuse)
    json.dumps(value, ensure_ascii=False).encode()
    return value


# The server.


class ModelServer:
    """A script, who may ask, and a memory of what was asked."""

    def __init__(
        self,
        script: Iterable[Step] = (),
        *,
        key: str | None = "sk-standin",  # None: no key is asked for
        models: Sequence[str] | None = ("standin-model",),  # None: any model is served, and there is no list of them
    ) -> None:
        self.key, self.models = key, models
        self.requests: list[Json] = []  # bodies of requests for a completion, as far as they were JSON objects
        self.headers: list[dict[str, str]] = []  # of the same requests; names in lower case
        self.paths: list[str] = []  # of all requests, such as "GET /v1/models"
        self.problems: list[str] = []
        self.stopping = threading.Event()
        self.lock = threading.Lock()
        self._steps = iter(script)
        self._server = _Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), name="model", daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}{PREFIX}"

    def env(self) -> dict[str, str]:
        """What points a program at it."""
        key = {} if self.key is None else {"OPENAI_API_KEY": self.key}
        return {"OPENAI_BASE_URL": self.url, "AGENT_MODEL": (self.models or ("standin-model",))[0], **key}

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Refuse connections from now on, cut those that are open, leave no thread behind."""
        self.stopping.set()
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()
        self._server.cut_connections()

    # What the handler asks.

    def refuse(self, number: int, text: str, message: str = "", *, code: str | None = None) -> Fault:
        """Note a problem, and answer with it."""
        with self.lock:
            self.problems.append(text)
        return answer(error_body(message or text, "server_error" if number >= 500 else INVALID, None, code), number)

    def handle(self, path: str, headers: dict[str, str], raw: bytes) -> Reply | Fault:
        with self.lock:
            self.paths.append(path)
        if refusal := self.admit(path, headers):
            return refusal
        if path == MODELS:
            return self.list_models()
        return self.complete(headers, raw)

    def admit(self, path: str, headers: dict[str, str]) -> Fault | None:
        if path not in (CHAT, MODELS):
            known = path.partition(" ")[2] in (CHAT.partition(" ")[2], MODELS.partition(" ")[2])
            return self.refuse(405 if known else 404, f"{path}: there is no such route", f"Invalid URL ({path})")
        given = headers.get("authorization")
        if self.key is None or given == f"Bearer {self.key}":
            return None
        if given is None:
            return self.refuse(401, f"{path}: no API key", "You didn't provide an API key.")
        return self.refuse(401, f"{path}: a wrong API key", "Incorrect API key provided.", code="invalid_api_key")

    def list_models(self) -> Fault:
        if self.models is None:
            return answer(error_body(f"Invalid URL ({MODELS})"), 404)
        rows = [
            {"id": name, "object": "model", "created": 1_700_000_000, "owned_by": "standin"} for name in self.models
        ]
        return answer({"object": "list", "data": rows})

    def complete(self, headers: dict[str, str], raw: bytes) -> Reply | Fault:
        try:
            body = parse_json(raw)
        except ValueError:
            return self.refuse(400, f"the body is no JSON: {raw[:80]!r}", "We could not parse the JSON body.")
        found = list(check_body(body))
        if not headers.get("content-type", "").startswith("application/json"):
            found.append(f"the content type is {headers.get('content-type')}")
        with self.lock:
            if isinstance(body, dict):
                self.requests.append(body)
                self.headers.append(headers)
            number = len(self.requests)
        if found:
            refusals = [self.refuse(400, f"request {number}: {text}") for text in found]
            return refusals[0]
        if self.models is not None and body["model"] not in self.models:
            return status(404, message=f"The model `{body['model']}` does not exist or you do not have access to it.")
        return self.step(number, body)

    def step(self, number: int, body: Json) -> Reply | Fault:
        with self.lock:
            step = next(self._steps, None)
        if step is None:
            return self.refuse(500, f"request {number}: the script is at its end")
        if isinstance(step, Reply | Fault):
            return step
        try:
            return step(body)
        except Exception:  # an assertion in a script must be seen by the test
            return self.refuse(500, f"request {number}: {traceback.format_exc()}")


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, model: ModelServer) -> None:
        self.model = model
        self.connections: dict[threading.Thread, socket.socket] = {}
        super().__init__(("127.0.0.1", 0), _Handler)

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer would ask the name service who we are

    def process_request(self, request: Any, client_address: Any) -> None:
        thread = threading.Thread(target=self.process_request_thread, args=(request, client_address), daemon=True)
        self.connections[thread] = request
        thread.start()

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        super().process_request_thread(request, client_address)
        self.connections.pop(threading.current_thread(), None)

    def cut_connections(self) -> None:
        open_now = list(self.connections.items())
        for _, connection in open_now:
            with contextlib.suppress(OSError):  # closed by the other side already
                connection.shutdown(socket.SHUT_RDWR)
        for thread, _ in open_now:
            thread.join(5)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):
            self.model.problems.append(traceback.format_exc())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    @property
    def model(self) -> ModelServer:
        return cast(_Server, self.server).model

    def log_message(self, *args: Any, **more: Any) -> None:
        pass

    def _handle(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        raw = self.rfile.read(int(headers.get("content-length", 0)))
        if "transfer-encoding" in headers:  # what is left unread would be taken for the next request
            self.close_connection = True
        found = self.model.handle(f"{self.command} {self.path}", headers, raw)
        fault = found if isinstance(found, Fault) else Fault(reply=found)
        if fault.ends == "before" or (not fault.drip and fault.wait and self.model.stopping.wait(fault.wait)):
            self.close_connection = True
            return
        body = fault.body
        if body is None:
            asked = json.loads(raw)["model"]
            body = json.dumps(fault.reply.render(asked)).encode()
        self._send(fault, body)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _handle  # noqa: N815

    def _send(self, fault: Fault, body: bytes) -> None:
        spaces = math.ceil(fault.wait / SLICE) if fault.drip else 0
        headers = {
            "content-type": "application/json",
            "content-length": str(spaces + len(body)),
            "x-request-id": f"req_{next(_ids):032}",
            **fault.headers,
        }
        lines = [f"HTTP/1.1 {fault.status} {REASONS.get(fault.status, '')}", f"date: {self.date_time_string()}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        head = "\r\n".join([*lines, "", ""]).encode("latin-1")
        if fault.ends == "amid":
            self.close_connection = True
            body = body[: len(body) // 2]
        if not spaces:  # head and body in one write: two would wait for each other's acknowledgement
            self.wfile.write(head + body)
            return
        self.wfile.write(head)
        for _ in range(spaces):
            if self.model.stopping.wait(SLICE):
                self.close_connection = True
                return
            self.wfile.write(b" ")
        self.wfile.write(body)
