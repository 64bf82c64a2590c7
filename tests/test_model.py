"""The scripted model's own behaviour. Tests of the loop trust it, so it is tested first."""

from __future__ import annotations

import itertools
import json
import threading
import time
from typing import Any

import pytest
import requests
from model import (
    Fault,
    ModelServer,
    Reply,
    answer,
    call,
    dropped,
    half,
    not_json,
    raw_call,
    redirect,
    say,
    slow,
    status,
    tokens,
)

USER = {"role": "user", "content": "Say hello."}
SCHEMA = {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]}
TOOL = {"type": "function", "function": {"name": "bash", "description": "Run it.", "parameters": SCHEMA}}


def made(number: str = "a", arguments: Any = '{"command": "ls"}', name: Any = "bash") -> dict[str, Any]:
    return {"id": number, "type": "function", "function": {"name": name, "arguments": arguments}}


def calling(*calls: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": list(calls), **more}


def told(number: str = "a", content: Any = "README.md") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": number, "content": content}


def chat(
    model: ModelServer, /, *messages: Any, session: requests.Session | None = None, **more: Any
) -> requests.Response:
    """A request for a completion; what is None is left out."""
    body = {"model": "standin-model", "messages": list(messages) or [USER], "tools": [TOOL]} | more
    return ask(model, {key: value for key, value in body.items() if value is not None}, session=session)


def ask(
    model: ModelServer, body: Any, headers: dict[str, str] | None = None, session: requests.Session | None = None
) -> requests.Response:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent = {"Authorization": f"Bearer {model.key}", "Content-Type": "application/json"} | (headers or {})
    post = session.post if session else requests.post
    return post(f"{model.url}/chat/completions", data=raw, headers=sent, timeout=10, allow_redirects=False)


def choice(response: requests.Response) -> dict[str, Any]:
    (only,) = response.json()["choices"]
    assert isinstance(only, dict)
    return only


# What it says.


def test_the_script_is_taken_step_by_step() -> None:
    with ModelServer([call("ls", "pwd", text="Let me look."), say("Done.")]) as model:
        first = choice(chat(model))
        calls = first["message"]["tool_calls"]
        assert (first["finish_reason"], first["message"]["content"]) == ("tool_calls", "Let me look.")
        assert [json.loads(made["function"]["arguments"]) for made in calls] == [{"command": "ls"}, {"command": "pwd"}]
        assert len({made["id"] for made in calls}) == 2
        answers = [told(made["id"]) for made in reversed(calls)]  # any order will do
        last = choice(chat(model, USER, calling(*calls), *answers))
        assert (last["finish_reason"], last["message"]["content"]) == ("stop", "Done.")
        assert "tool_calls" not in last["message"]
        assert [body["messages"][-1]["role"] for body in model.requests] == ["user", "tool"]
        assert model.headers[0]["authorization"] == f"Bearer {model.key}"
        assert model.paths == ["POST /v1/chat/completions"] * 2
        assert model.problems == []


def test_usage_is_told_as_the_script_wants_it_or_not_at_all() -> None:
    script = [
        say("a"),
        say("b", usage=tokens(7, 3, cached=5)),
        call("c", usage=tokens(1, 1, cached=None)),
        say("d", usage={}),
    ]
    with ModelServer(script) as model:
        told_first, told_second, told_third = (chat(model).json()["usage"] for _ in range(3))
        assert told_first["total_tokens"] == 110
        assert (told_second["total_tokens"], told_second["prompt_tokens_details"]["cached_tokens"]) == (10, 5)
        assert "prompt_tokens_details" not in told_third
        assert "usage" not in chat(model).json()


def test_replies_can_be_added_and_calls_be_malformed() -> None:
    with ModelServer([say("Well. ") + call("ls") + raw_call("nonsense", '{"comm', "")]) as model:
        told_all = choice(chat(model))
        assert (told_all["finish_reason"], told_all["message"]["content"]) == ("tool_calls", "Well. ")
        first, second = told_all["message"]["tool_calls"]
        assert first["function"]["name"] == "bash"
        assert second == made("", '{"comm', "nonsense")
    assert (say("a") + say("b")).finish == "stop"
    assert say("a", finish="length").finish == "length"
    assert raw_call("bash", {"command": "ls"}).calls[0]["function"]["arguments"] == {"command": "ls"}


def test_a_step_can_be_made_of_the_request() -> None:
    with ModelServer([lambda body: say(f"You said: {body['messages'][-1]['content']}")]) as model:
        assert choice(chat(model))["message"]["content"] == "You said: Say hello."


def test_an_assertion_in_a_step_is_a_problem() -> None:
    def step(body: dict[str, Any]) -> Reply:
        assert body["temperature"] == 0
        return say("x")

    with ModelServer([step]) as model:
        assert chat(model, temperature=1).status_code == 500
        assert "assert body" in model.problems[0]


def test_a_script_may_be_endless() -> None:
    with ModelServer(itertools.repeat(call("true"))) as model:
        ids = {choice(chat(model))["message"]["tool_calls"][0]["id"] for _ in range(3)}
        assert len(model.requests) == 3
        assert model.problems == []
        assert len(ids) == 1  # it is one and the same reply


def test_a_request_after_the_end_is_500_and_a_problem() -> None:
    with ModelServer([say("x")]) as model:
        assert [chat(model).status_code for _ in range(2)] == [200, 500]
        assert model.problems == ["request 2: the script is at its end"]


def test_many_may_ask_at_once_and_each_gets_a_step_of_its_own() -> None:
    with ModelServer([say(str(number)) for number in range(16)]) as model:
        heard: list[str] = []
        askers = [
            threading.Thread(target=lambda: heard.append(choice(chat(model))["message"]["content"])) for _ in range(16)
        ]
        for asker in askers:
            asker.start()
        for asker in askers:
            asker.join()
        assert sorted(map(int, heard)) == list(range(16))


# Who asks, and where.


def test_the_key_is_asked_for() -> None:
    with ModelServer([say("x")]) as model:
        url = f"{model.url}/chat/completions"
        assert requests.post(url, json={}, timeout=10).status_code == 401
        wrong = ask(model, {}, {"Authorization": "Bearer wrong"})
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (401, "invalid_api_key")
        assert len(model.problems) == 2
        assert model.requests == []
        assert chat(model).status_code == 200


def test_without_a_key_anybody_may_ask() -> None:
    with ModelServer([say("x"), say("y")], key=None) as model:
        body = {"model": "standin-model", "messages": [USER]}
        assert requests.post(f"{model.url}/chat/completions", json=body, timeout=10).status_code == 200
        assert ask(model, body).status_code == 200
        assert model.problems == []
        assert "OPENAI_API_KEY" not in model.env()


@pytest.mark.parametrize(
    ("method", "path", "number"),
    [
        ("POST", "/completions", 404),
        ("POST", "/chat/completions/", 404),
        ("POST", "/chat/completions?x=y", 404),
        ("POST", "//chat/completions", 404),
        ("POST", "/models", 405),
        ("GET", "/chat/completions", 405),
    ],
)
def test_a_wrong_path_or_method_is_a_problem(method: str, path: str, number: int) -> None:
    with ModelServer() as model:
        headers = {"Authorization": f"Bearer {model.key}"}
        refused = requests.request(method, model.url + path, headers=headers, timeout=10)
        assert (refused.status_code, refused.json()["error"]["type"]) == (number, "invalid_request_error")
        assert path in model.problems[0]


def test_models_are_listed_where_there_is_a_list() -> None:
    with ModelServer(models=["one", "two"]) as model:
        headers = {"Authorization": f"Bearer {model.key}"}
        rows = requests.get(f"{model.url}/models", headers=headers, timeout=10).json()["data"]
        assert [row["id"] for row in rows] == ["one", "two"]
        assert model.env() == {"OPENAI_BASE_URL": model.url, "OPENAI_API_KEY": model.key, "AGENT_MODEL": "one"}
        unknown = chat(model)
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
        assert model.problems == []
    with ModelServer([say("x")], models=None) as model:
        headers = {"Authorization": f"Bearer {model.key}"}
        assert requests.get(f"{model.url}/models", headers=headers, timeout=10).status_code == 404
        assert chat(model, model="any").status_code == 200
        assert model.problems == []


# What is asked.


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b'{"model": NaN}', b'{"model": "\\ud83d"}', b"\xff"],
    ids=["nothing", "half", "NaN", "half a pair", "no UTF-8"],
)
def test_a_body_that_is_no_json_is_a_problem(raw: bytes) -> None:
    with ModelServer() as model:
        assert ask(model, raw).status_code == 400
        assert "no JSON" in model.problems[0]
        assert model.requests == []


def test_a_body_is_sent_as_json() -> None:
    with ModelServer() as model:
        assert ask(model, {"model": "x", "messages": [USER]}, {"Content-Type": "text/plain"}).status_code == 400
        assert model.problems == ["request 1: the content type is text/plain"]


GOOD: list[tuple[list[Any], dict[str, Any]]] = [
    ([USER], {"tools": None}),
    ([{"role": "system", "content": "You are."}, USER], {"temperature": 0, "max_completion_tokens": 9, "seed": 1}),
    ([{"role": "developer", "content": [{"type": "text", "text": "You are."}]}, USER], {"parallel_tool_calls": False}),
    ([USER, calling(made("a"), made("b")), told("b"), told("a")], {"tool_choice": "required", "stream": False}),
    ([USER, calling(made(), content="So:", refusal=None), told(content="")], {"reasoning_effort": "low"}),
    ([USER, calling(made(arguments="{}", name="other")), told(), USER], {"tool_choice": TOOL}),
    ([USER, calling(made()), told(), calling(made()), told()], {"stop": ["x"], "top_p": 0.5}),
    ([USER, {"role": "assistant", "content": "Hello."}, USER | {"name": "octocat"}], {"metadata": {}}),
]


@pytest.mark.parametrize(("messages", "more"), GOOD)
def test_what_openai_takes_is_taken(messages: list[Any], more: dict[str, Any]) -> None:
    with ModelServer([say("x")]) as model:
        assert chat(model, *messages, **more).status_code == 200
        assert model.problems == []


ASIDE = {"role": "assistant", "content": "Hello."}
BAD_MESSAGES: dict[str, list[Any]] = {
    "has no known role": [{"role": "function", "content": "x"}],
    "has no known role ": ["Say hello."],
    "has no known role  ": [{"role": ["user"], "content": "x"}],
    "[0] has unknown keys: images": [USER | {"images": []}],
    "[1] has unknown keys: annotations, audio": [USER, ASIDE | {"annotations": [], "audio": None}],
    "[1] has unknown keys: reasoning_content": [USER, ASIDE | {"reasoning_content": "hm"}],
    "[2] has unknown keys: name": [USER, calling(made()), told() | {"name": "bash"}],
    "[0].name is none": [USER | {"name": "two words"}],
    "[0].content is no text: None": [USER | {"content": None}],
    "[0].content is no text: []": [USER | {"content": []}],
    "[0].content[0] is no part": [USER | {"content": ["x"]}],
    "[0].content[0].text": [USER | {"content": [{"type": "text", "text": 5}]}],
    "[1].content is no text: None": [USER, ASIDE | {"content": None}],
    "[2].content is no text: None": [USER, calling(made()), told(content=None)],
    "[2].content is no text: [": [USER, calling(made()), told(content=[{"type": "text", "text": "x"}])],
    "[2].content is no text: {": [USER, calling(made()), told(content={"exit_code": 0})],
    "[2].tool_call_id": [USER, calling(made()), {"role": "tool", "content": "x"}],
    "[1].tool_calls is no list, or empty": [USER, ASIDE | {"tool_calls": []}],
    "[1].tool_calls is no list, or empty ": [USER, ASIDE | {"tool_calls": None}],
    "[1].tool_calls[0] is no call": [USER, calling({"id": "a"}), told()],
    "[1].tool_calls[0] has unknown keys: index": [USER, calling(made() | {"index": 0}), told()],
    "[1].tool_calls[0].function.name is none: ''": [USER, calling(made(name="")), told()],
    "[1].tool_calls[0].function.name is none: 'a b'": [USER, calling(made(name="a b")), told()],
    "no JSON in a text: '{\"comm'": [USER, calling(made(arguments='{"comm')), told()],
    "no JSON in a text: ''": [USER, calling(made(arguments="")), told()],
    "no JSON in a text: {'command'": [USER, calling(made(arguments={"command": "ls"})), told()],
    "an id that is missing, empty": [USER, calling(made("")), told("")],
    "or there twice": [USER, calling(made(), made()), told(), told()],
    "ends without the answers to b": [USER, calling(made("a"), made("b")), told("a")],
    "[2] comes before the answers to a": [USER, calling(made()), USER, told()],
    "[3] comes before the answers to b": [USER, calling(made("a"), made("b")), told("a"), ASIDE],
    "[1] answers no call that waits: 'a'": [USER, told()],
    "[2] answers no call that waits: 'b'": [USER, calling(made()), told("b"), told("a")],
    "[3] answers no call that waits: 'a'": [USER, calling(made()), told(), told()],
    "[4] answers no call that waits: 'a'": [USER, calling(made()), told(), ASIDE, told()],
}


@pytest.mark.parametrize(
    ("words", "messages"), BAD_MESSAGES.items(), ids=lambda item: item if isinstance(item, str) else ""
)
def test_a_history_that_servers_refuse_is_a_problem(words: str, messages: list[Any]) -> None:
    with ModelServer([say("x")]) as model:
        refused = chat(model, *messages)
        assert (refused.status_code, refused.json()["error"]["type"]) == (400, "invalid_request_error")
        assert any(words.strip() in problem for problem in model.problems), model.problems
        assert chat(model).status_code == 200  # the step is still there


def function(**changed: Any) -> list[Any]:
    return [{"type": "function", "function": TOOL["function"] | changed}]  # type: ignore[operator]


BAD_KEYS: dict[str, dict[str, Any]] = {
    "unknown keys: max_output_tokens": {"max_output_tokens": 5},
    "unknown keys: functions": {"functions": []},
    "model is missing": {"model": None},
    "model is of the wrong type": {"model": 5},
    "messages is missing or empty": {"messages": []},
    "messages is of the wrong type": {"messages": "Say hello."},
    "temperature is of the wrong type": {"temperature": "0"},
    "max_tokens is of the wrong type": {"max_tokens": True},
    "exclude each other": {"max_tokens": 5, "max_completion_tokens": 5},
    "not served: stream": {"stream": True},
    "tool_choice is for requests with tools": {"tools": None, "tool_choice": "auto"},
    "parallel_tool_calls is for requests with tools": {"tools": None, "parallel_tool_calls": True},
    "tool_choice is none: 'any'": {"tool_choice": "any"},
    "tool_choice is none: {": {"tool_choice": {"type": "function", "function": {"name": "other"}}},
    "tools is empty": {"tools": []},
    "tools has a name twice": {"tools": [TOOL, TOOL]},
    "tools[0] is no function": {"tools": [{"type": "bash"}]},
    "tools[0] has unknown keys: name": {"tools": [TOOL | {"name": "bash"}]},
    "function has unknown keys: input_schema": {"tools": function(input_schema=SCHEMA)},
    "function.name is none": {"tools": function(name="run it")},
    "function.description is no text": {"tools": function(description=None)},
    "parameters is not that of an object": {"tools": function(parameters={"type": "string"})},
    "parameters is no schema": {"tools": function(parameters=[])},
    "parameters.command.type is none: 'text'": {
        "tools": function(parameters=SCHEMA | {"properties": {"command": {"type": "text"}}})
    },
    "parameters requires what it has not": {"tools": function(parameters=SCHEMA | {"required": ["cmd"]})},
    "parameters is not as strict as it says": {"tools": function(strict=True)},
}


@pytest.mark.parametrize(("words", "more"), BAD_KEYS.items(), ids=BAD_KEYS)
def test_a_request_that_openai_refuses_is_a_problem(words: str, more: dict[str, Any]) -> None:
    with ModelServer([say("x")]) as model:
        assert chat(model, **more).status_code == 400
        assert any(words in problem for problem in model.problems), model.problems


def test_a_strict_tool_is_taken() -> None:
    with ModelServer([say("x")]) as model:
        tools = function(strict=True, parameters=SCHEMA | {"additionalProperties": False})
        assert chat(model, tools=tools).status_code == 200


def test_a_body_that_is_no_object_is_a_problem() -> None:
    with ModelServer() as model:
        assert ask(model, [USER]).status_code == 400
        assert "not a JSON object" in model.problems[0]


# What goes wrong.


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (status(429, retry_after=1), {"type": "requests", "code": "rate_limit_exceeded"}),
        (status(429, code="insufficient_quota"), {"type": "insufficient_quota", "code": "insufficient_quota"}),
        (status(400, code="context_length_exceeded"), {"param": "messages", "code": "context_length_exceeded"}),
        (status(400, param="tools", message="No."), {"param": "tools", "message": "No.", "code": None}),
        (status(401), {"type": "invalid_request_error", "code": "invalid_api_key"}),
        (status(404), {"type": "invalid_request_error", "code": "model_not_found"}),
        (status(500), {"type": "server_error", "code": None}),
        (status(529, type="overloaded_error"), {"type": "overloaded_error"}),
    ],
)
def test_errors_are_worded_as_openai_does_it(fault: Fault, error: dict[str, Any]) -> None:
    with ModelServer([fault, say("x")]) as model:
        refused = chat(model)
        assert refused.status_code == fault.status
        assert refused.json()["error"].keys() == {"message", "type", "param", "code"}
        assert error.items() <= refused.json()["error"].items()
        assert refused.headers.get("retry-after") == fault.headers.get("retry-after")
        assert chat(model).status_code == 200
        assert model.problems == []


def test_an_answer_can_be_lost_or_end_in_the_middle() -> None:
    with ModelServer([dropped(), half(), half(say("x" * 100_000)), say("x")]) as model, requests.Session() as session:
        for _ in range(3):
            with pytest.raises((requests.ConnectionError, requests.exceptions.ChunkedEncodingError)):
                chat(model, session=session)
        assert chat(model, session=session).status_code == 200
        assert len(model.requests) == 4
        assert model.problems == []


def test_an_answer_can_be_something_else() -> None:
    script = [not_json(), not_json(b"", number=502), answer({"choices": []}), redirect("http://127.0.0.1:1/")]
    with ModelServer(script) as model, requests.Session() as session:
        page, empty, none, elsewhere = (chat(model, session=session) for _ in script)
        assert (page.status_code, page.headers["content-type"], page.text[:6]) == (200, "text/html", "<html>")
        assert (empty.status_code, empty.text) == (502, "")
        assert none.json() == {"choices": []}
        assert (elsewhere.status_code, elsewhere.headers["location"]) == (307, "http://127.0.0.1:1/")
        assert model.problems == []


def test_a_late_answer_is_late_and_a_drip_does_not_look_so() -> None:
    with ModelServer([slow(0.3), slow(0.3, say("At last."), drip=True)]) as model:
        for text in ("Late.", "At last."):
            start = time.monotonic()
            assert choice(chat(model))["message"]["content"] == text
            assert time.monotonic() - start >= 0.3


@pytest.mark.parametrize("drip", [False, True])
def test_the_end_cuts_a_late_answer_short(drip: bool) -> None:
    seen: list[BaseException | None] = []

    def wait_for_it() -> None:
        try:
            chat(model)
            seen.append(None)
        except requests.RequestException as error:
            seen.append(error)

    with ModelServer([slow(60, drip=drip)]) as model:
        asker = threading.Thread(target=wait_for_it)
        asker.start()
        while not model.requests:
            time.sleep(0.01)
        start = time.monotonic()
    asker.join(10)
    assert time.monotonic() - start < 5
    assert isinstance(seen[0], requests.RequestException)


# Life.


def test_one_connection_carries_many_requests() -> None:
    with ModelServer(itertools.repeat(say("x"))) as model, requests.Session() as session:
        start = time.monotonic()
        for _ in range(50):
            assert chat(model, session=session).status_code == 200
        assert len(model._server.connections) == 1
        assert time.monotonic() - start < 2


def test_nothing_is_left_behind() -> None:
    before = set(threading.enumerate())
    with ModelServer([say("x")]) as model, requests.Session() as session:
        chat(model, session=session)
        model.close()
        assert set(threading.enumerate()) == before
        with pytest.raises(requests.ConnectionError):
            session.get(f"{model.url}/models", timeout=10)
    never_started = ModelServer()
    never_started.close()
    assert set(threading.enumerate()) == before


def test_a_body_in_chunks_is_a_problem() -> None:
    with ModelServer([say("x")]) as model:
        headers = {"Authorization": f"Bearer {model.key}"}
        sent = requests.post(f"{model.url}/chat/completions", data=iter([b"{}"]), headers=headers, timeout=10)
        assert sent.status_code == 400
        assert len(model.problems) == 1
