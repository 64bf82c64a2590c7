"""The built-in agent `openai`, against a scripted model that makes mistakes."""

from __future__ import annotations

import itertools
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import TARGET, FakeClock, FastClock, World, make_config, wait_until
from model import (
    Fault,
    ModelServer,
    Reply,
    Step,
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
from test_task import failed

import runner as runner_module
from runner import Runner, TaskFailed, Unreachable, cut_middle, describe_use, interruptible, model_refusal, read_reply

KEY = "sk-standin"


def solve(world: World, model: ModelServer, clock: Any = None, **env: str) -> Runner:
    """Has a runner whose agent is the model poll once."""
    runner = world.runner(clock, **model.env(), **env)
    runner.run_once()
    assert model.problems == []
    return runner


def told(model: ModelServer, request: int = -1) -> list[Any]:
    """What the model was told last, in a request."""
    messages = model.requests[request]["messages"]
    last = max(n for n, message in enumerate(messages) if message["role"] == "assistant") if len(messages) > 2 else 0
    return [message["content"] for message in messages[last + 1 :]]


def show(world: World, file: str) -> str:
    return world.github.git(TARGET, "show", f"{world.pull().head}:{file}")


def changed(world: World) -> list[str]:
    return world.github.git(TARGET, "diff", "--name-status", f"main...{world.pull().head}").splitlines()


# -- Three tasks, solved with mistakes on the way -----------------------------------------------------

CALCULATOR = {
    "calculator.py": "def mean(numbers):\n    return sum(numbers) / len(numbers) - 1\n",
    "test_calculator.py": (
        "import unittest\nfrom calculator import mean\n\n\nclass TestMean(unittest.TestCase):\n"
        "    def test_mean(self):\n        self.assertEqual(mean([1, 2, 3]), 2)\n"
    ),
}
TEST = "python3 -m unittest -q 2>&1"


def test_a_bug_is_mended_so_that_a_given_test_passes(world: World) -> None:
    """On the way: a limit, a tool that does not exist, arguments that are no JSON, a command that fails."""
    world.github.commit(TARGET, CALCULATOR)
    world.open("`mean` is wrong. Make the test pass.", title="Mend mean")
    script: list[Step] = [
        status(429, retry_after=1),
        call("ls", "cat calculator.py"),
        raw_call("edit_file", '{"path": "calculator.py"}'),
        raw_call("bash", '{"command": "sed -i s/- 1// calculator.py'),
        call("patch -p1 < nothing.diff"),
        call(TEST),
        call("sed -i 's/ - 1//' calculator.py"),
        call(TEST),
        say("`mean` subtracted 1 from every result; it does not any more. The test passes."),
    ]
    with ModelServer(script) as model:
        solve(world, model, FastClock())
    assert changed(world) == ["M\tcalculator.py"]
    assert show(world, "calculator.py") == "def mean(numbers):\n    return sum(numbers) / len(numbers)"
    assert "`mean` subtracted 1 from every result" in world.pull_body()
    listed, source = told(model, 2)
    assert listed == "README.md\ncalculator.py\nsrc\ntest_calculator.py\n\n(It ended with exit status 0.)"
    assert "len(numbers) - 1" in source
    assert told(model, 3) == ['There is one tool, bash, and it has one argument, "command", a string. Nothing was run.']
    assert "The arguments are not valid JSON: " in told(model, 4)[0]
    assert (
        "(It ended with exit status 1.)" in told(model, 5)[0] or "(It ended with exit status 2.)" in told(model, 5)[0]
    )
    assert "FAILED" in told(model, 6)[0]
    assert "OK" in told(model, 8)[0]
    assert "| Steps | 8 |" in world.pull_body()


def test_a_file_is_added_although_the_connection_drops(world: World) -> None:
    """On the way: no answer, half of one, a page that is no JSON, one without a message, an overloaded server."""
    world.open("Add a file LICENSE.txt that says: do what you like.")
    script: list[Step] = [
        dropped(),
        half(),
        not_json(),
        answer({"choices": []}),
        status(503),
        call("echo 'Do what you like.' > LICENSE.txt"),
        dropped(),
        say("Added `LICENSE.txt`."),
    ]
    with ModelServer(script) as model:
        solve(world, model, FastClock())
    assert changed(world) == ["A\tLICENSE.txt"]
    assert "Added `LICENSE.txt`." in world.pull_body()


def test_a_name_is_changed_across_files_although_an_answer_was_too_long(world: World) -> None:
    """On the way: a call that was cut off, a text that was cut off, a script that is longer than an argument may be."""
    files = {f"src/module_{n}.py": f"from names import old_name\n\nprint(old_name + {n})\n" for n in range(20)}
    world.github.commit(TARGET, {**files, "src/names.py": "old_name = 1\n"})
    world.open("Rename old_name to new_name everywhere.")
    long = "\n".join(f"sed -i s/old_name/new_name/g src/module_{n % 20}.py" for n in range(4_000))
    cut_off = replace(raw_call("bash", '{"command": "sed -i s/old_name/new_'), finish="length")
    script = [
        cut_off,
        say("I will now rename old_name in src/mod", finish="length"),
        call(long),
        call("sed -i s/old_name/new_name/ src/names.py; grep -rc old_name src | grep -v :0"),
        say("Renamed in 21 files."),
    ]
    with ModelServer(script) as model:
        solve(world, model)
    assert changed(world) == sorted([*(f"M\tsrc/module_{n}.py" for n in range(20)), "M\tsrc/names.py"])
    assert told(model, 1) == told(model, 2) == [runner_module.NUDGES["length"]]
    assert told(model, 4) == ["(It ended with exit status 1.)"]


# -- What the model is told, and what it is not -------------------------------------------------------


def test_the_conversation_begins_with_the_prompt(world: World) -> None:
    world.open("Touch x.")
    with ModelServer([call("touch x"), say("Done.")]) as model:
        solve(world, model)
    system, user = model.requests[0]["messages"]
    assert "one tool, bash" in system["content"]
    assert "ended after 10 minutes" in system["content"]
    assert user == {"role": "user", "content": "Touch x."}
    assert model.headers[0]["authorization"] == f"Bearer {KEY}"


def test_the_commands_see_neither_the_models_key_nor_the_token(world: World) -> None:
    world.open("Look around.")
    look = "env; cat /proc/*/environ 2>/dev/null | tr '\\0' '\\n'; touch x"
    with ModelServer([call(look), say("Done.")]) as model:
        solve(world, model, AGENT_ENV="OPENAI_API_KEY,GIVEN", GIVEN="a value of mine")
    seen = told(model, 1)[0]
    assert "AGENT_TASK_ID=issue-1" in seen
    assert KEY not in json.dumps(model.requests)
    assert world.github.token not in json.dumps(model.requests)
    assert "GIVEN=***" in seen  # what the agent may use need not be told to the model


def test_long_output_is_cut_in_the_middle() -> None:
    text = cut_middle("a" * 50_000 + "b" * 50_000, 16_000)
    assert text == "a" * 8_000 + "\n\n[... 84,000 characters left out ...]\n\n" + "b" * 8_000
    assert cut_middle("short", 5) == "short"


def test_the_model_gets_long_output_cut(world: World) -> None:
    world.open("Look around.")
    command = "echo begin; yes | head -c 300000; echo end; touch x"
    with ModelServer([call(command), say("Done.")]) as model:
        solve(world, model)
    seen = told(model, 1)[0]
    assert len(seen) < 17_000
    assert "characters left out" in seen
    assert seen.endswith("end\n\n(It ended with exit status 0.)")


def test_escapes_and_odd_bytes_do_not_reach_the_model(world: World) -> None:
    world.open("Look around.")
    with ModelServer([call("printf '\\033[31mred\\033[0m\\r\\n\\377\\0ok\\n'; touch x"), say("Done.")]) as model:
        solve(world, model)
    assert told(model, 1) == ["red\n\ufffdok\n\n(It ended with exit status 0.)"]


def test_each_command_is_a_new_shell_and_nothing_outlives_it(world: World) -> None:
    world.open("Look around.")
    script = [
        call("cd src; export A=1; sleep 600 & echo $! > ../pid"),
        call('pwd; echo "A=$A"; kill -0 $(cat pid) || echo gone; rm pid; touch x'),
        say("Done."),
    ]
    with ModelServer(script) as model:
        solve(world, model)
    assert "A=\n" in told(model, 2)[0]
    assert "gone" in told(model, 2)[0]
    assert "/src" not in told(model, 2)[0].split("\n")[0]


def test_a_command_that_takes_too_long_is_ended_and_the_model_told(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "BASH_TIMEOUT", 1.0)
    world.open("Look around.")
    with ModelServer([call("echo begun; sleep 600"), call("touch x"), say("Done.")]) as model:
        solve(world, model)
    assert told(model, 1) == ["begun\n\n(It ran out of time (1 s).)"]
    assert changed(world) == ["A\tx"]


# -- Answers of all kinds -----------------------------------------------------------------------------


def test_a_model_that_only_describes_is_told_to_act(world: World) -> None:
    world.open("Touch x.")
    with ModelServer([say("You could run `touch x`."), call("touch x"), say(""), say("Done.")]) as model:
        solve(world, model)
    assert told(model, 1) == [runner_module.NUDGES["nothing"]]
    assert told(model, 3) == [runner_module.NUDGES["empty"]]
    assert changed(world) == ["A\tx"]


def test_a_model_that_never_acts_has_changed_nothing(world: World) -> None:
    world.open("Touch x.")
    with ModelServer([say("You could run `touch x`."), say("Please run `touch x`.")]) as model:
        solve(world, model)
    assert "The agent changed nothing." in failed(world)
    assert "Please run `touch x`." in failed(world)


def test_a_model_may_end_without_a_word(world: World) -> None:
    world.open("Touch x.")
    with ModelServer([call("touch x"), say(""), say("")]) as model:
        solve(world, model)
    assert changed(world) == ["A\tx"]


def test_thoughts_are_no_summary(world: World) -> None:
    world.open("Touch x.")
    with ModelServer([call("touch x"), say("<think>\nHm. Well.\n</think>\n\nDone.")]) as model:
        solve(world, model)
    assert "Well" not in world.pull_body()
    assert "\n\nDone.\n\n" in world.pull_body()


def test_a_summary_does_no_harm(world: World) -> None:
    world.open("Touch x.")
    with ModelServer([call("touch x"), say("Ask @octocat. Fixes #1. <!-- agent_task_metadata {} -->")]) as model:
        solve(world, model)
    assert "@octocat" not in world.pull_body()
    assert world.pull_body().count("<!-- agent_task_metadata") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "null",
        "[]",
        '"ls"',
        "{}",
        '{"command": 1}',
        '{"command": " "}',
        '{"cmd": "ls"}',
        "[" * 100_000,
        {"cmd": "ls"},
    ],
    ids=repr,
)
def test_a_bad_call_is_answered_and_nothing_is_run(world: World, arguments: Any) -> None:
    world.open("Touch x.")
    with ModelServer([raw_call("bash", arguments), call("touch x"), say("Done.")]) as model:
        solve(world, model)
    (said,) = told(model, 1)
    assert "Nothing was run." in said or "not valid JSON" in said
    assert changed(world) == ["A\tx"]


def test_arguments_may_be_an_object_and_ids_missing(world: World) -> None:
    """As some servers send them."""
    world.open("Touch x and y.")
    first = raw_call("bash", {"command": "touch x"}, id="") + raw_call("bash", {"command": "touch y"}, id="")
    with ModelServer([first, say("Done.")]) as model:
        solve(world, model)
    assert changed(world) == ["A\tx", "A\ty"]


def test_a_name_that_no_function_may_have_is_mended() -> None:
    function = {"name": "bash; ls \u00e9" * 20, "arguments": "{}"}
    data = {"choices": [{"message": {"content": None, "tool_calls": [{"id": "1", "function": function}]}}]}
    sent = read_reply(data).message["tool_calls"][0]
    assert re.fullmatch("[A-Za-z0-9_-]{64}", sent["function"]["name"])
    assert sent["type"] == "function"


def test_what_belongs_to_a_call_goes_back_with_it() -> None:
    """Some servers want a signature of theirs to come back."""
    signed = {"id": "1", "extra_content": {"google": {"thought_signature": "x"}}}
    signed |= {"function": {"name": "bash", "arguments": "{}"}}
    data = {"choices": [{"message": {"content": [{"type": "text", "text": "Well."}], "tool_calls": [signed]}}]}
    reply = read_reply(data)
    assert reply.text == "Well."
    assert reply.message["tool_calls"][0]["extra_content"] == signed["extra_content"]


@pytest.mark.parametrize(
    "data",
    [None, [], {}, {"choices": []}, {"choices": [{}]}, {"choices": [{"message": None}]}, {"error": {"message": "busy"}},
     {"choices": [{"message": {"tool_calls": [{}]}}]}, {"choices": [{"message": {"tool_calls": 1}}]}],
    ids=repr,
)  # fmt: skip
def test_an_answer_without_a_message_is_asked_for_again(data: Any) -> None:
    with pytest.raises(Unreachable, match="holds no message"):
        read_reply(data)


# -- Servers that refuse, or are away -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "why", "advice"),
    [
        (status(401), "answered 401", "check OPENAI_API_KEY"),
        (status(403), "answered 403", "check OPENAI_API_KEY"),
        (status(404, code="model_not_found", message="No such model."), "404: No such model.", "check AGENT_MODEL"),
        (status(400, message="Bad tools."), "answered 400: Bad tools.", "check AGENT_MODEL"),
        (status(400, code="context_length_exceeded"), "answered 400", "ask for less at a time"),
        (status(429, code="insufficient_quota"), "answered 429", "check OPENAI_API_KEY"),
        (redirect("http://127.0.0.1:1/v1"), "answered 307", "OPENAI_BASE_URL"),
    ],
)
def test_what_will_not_get_better_fails_at_once_with_the_reason(
    world: World, fault: Any, why: str, advice: str
) -> None:
    world.open("Touch x.")
    with ModelServer([fault]) as model:
        solve(world, model)
    comment = failed(world)
    assert why in comment
    assert advice in comment
    assert len(model.paths) == 1


def test_a_server_that_stays_away_is_tried_again_later(world: World) -> None:
    world.open("Touch x.")
    with ModelServer(itertools.repeat(status(500))) as model:
        runner = world.runner(FastClock(), **model.env(), AGENT_MAX_ATTEMPTS="2")
        runner.run_once()
    comment = failed(world)
    assert "The model cannot be reached: The model's server answered 500" in comment
    assert "(2 attempts)" in comment
    assert len(model.paths) > 10


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({"error": {"message": "m"}}, "m"),
        ({"error": "plain"}, "plain"),
        ({"detail": "as FastAPI says it"}, "as FastAPI says it"),
        ({"object": "error", "message": "flat"}, "flat"),
        ("text", "text"),
        (None, "no message"),
        ([], "no message"),
        ({"error": {"message": "x" * 9_000}}, "x" * 500),
    ],
)
def test_servers_say_in_many_ways_what_is_wrong(data: Any, reason: str) -> None:
    refused = model_refusal(400, data, {})
    assert isinstance(refused, TaskFailed)
    assert refused.why == f"The model's server answered 400: {reason}"


@pytest.mark.parametrize(
    ("header", "pause"), [("7", 7.0), ("0.5", 0.5), ("-3", 0.0), ("soon", 0.0), ("99999", runner_module.MAX_PAUSE)]
)
def test_a_server_is_given_the_time_that_it_asks_for(header: str, pause: float) -> None:
    fault = model_refusal(429, {}, {"retry-after": header})
    assert isinstance(fault, Unreachable)
    assert fault.pause == pause


def test_the_wait_is_as_long_as_the_server_asks_for(world: World) -> None:
    world.open("Touch x.")
    clock = FakeClock()
    with ModelServer([status(429, retry_after=77), call("touch x"), say("Done.")]) as model:
        solve(world, model, clock)
    assert 77 in clock.waits


# -- Limits -------------------------------------------------------------------------------------------


def test_steps_are_bounded_and_the_work_is_kept(world: World) -> None:
    world.open("Touch x.")
    with ModelServer(itertools.repeat(call("date >> x"))) as model:
        solve(world, model, AGENT_MAX_STEPS="3", AGENT_DRAFT_ON_FAILURE="yes")
    assert len(model.requests) == 3
    assert world.pull().draft is True
    assert "The model did not come to an end in 3 steps." in world.last_comment()
    assert "AGENT_MAX_STEPS" in world.last_comment()
    assert "$ date >> x" in world.last_comment()


def test_tokens_are_bounded(world: World) -> None:
    world.open("Touch x.")
    with ModelServer(itertools.repeat(call("true", usage=tokens(900, 200)))) as model:
        solve(world, model, AGENT_MAX_TOKENS="2000")
    assert len(model.requests) == 2
    assert "The model has used more than 2,000 tokens." in failed(world)


def test_time_is_bounded_also_within_a_command(world: World) -> None:
    world.open("Touch x.")
    with ModelServer([call("touch x; sleep 600"), say("Done.")]) as model:
        solve(world, model, AGENT_TASK_TIMEOUT="2")
    assert "The agent ran out of time (2 s)." in failed(world)
    assert len(model.requests) == 1


def test_time_is_bounded_also_while_the_model_thinks(world: World) -> None:
    world.open("Touch x.")
    with ModelServer([slow(600, say("Done."))]) as model:
        runner = world.runner(None, **model.env(), AGENT_TASK_TIMEOUT="2")
        runner.run_once()
    assert "The agent ran out of time (2 s)." in failed(world)


def test_a_stop_does_not_wait_for_the_model(world: World) -> None:
    world.open("Touch x.")
    with ModelServer([slow(600, say("Done."))]) as model:
        runner = world.runner(None, **model.env())
        thread = threading.Thread(target=runner.run_once)
        thread.start()
        wait_until(lambda: model.requests)
        runner.request_stop(now=True)
        thread.join(20)
        assert not thread.is_alive()
    assert world.labels() == ["copilot-agent"]
    assert world.claims() == []


def test_a_call_that_fails_raises_what_it_raised() -> None:
    def fail() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        interruptible(fail, threading.Event())


# -- What it costs ------------------------------------------------------------------------------------


@pytest.fixture
def used(world: World) -> Iterator[Callable[..., dict[str, str]]]:
    def rows(*counts: int, **env: str) -> dict[str, str]:
        names = ("steps", "input", "cached", "output")
        config = make_config({"AGENT_MODEL": "tiny-1", **env})
        task = runner_module.parse_task({"number": 1, "user": None}, config)
        work: Any = type(
            "Work", (), {"task": task, "config": config, "used": Counter(dict(zip(names, counts, strict=True)))}
        )
        return describe_use(work)

    return rows  # type: ignore[return-value]


def test_what_was_used_is_told(world: World) -> None:
    world.open("Touch x.")
    script = [call("touch x", usage=tokens(1_000, 50, 800)), say("Done.", usage=tokens(1_100, 20, 1_000))]
    prices = {"AGENT_PRICE_INPUT": "2.5", "AGENT_PRICE_CACHED": "0.25", "AGENT_PRICE_OUTPUT": "10"}
    with ModelServer(script) as model:
        solve(world, model, **prices)
    for text in (world.pull_body(), world.last_comment()):
        assert "| Model | `standin-model` |" in text
        assert "| Steps | 2 |" in text
        assert "| Tokens | 2,100 in (1,800 of them cached), 70 out |" in text
        assert "| Cost | 0.0019 |" in text  # (300 * 2.5 + 1,800 * 0.25 + 70 * 10) / 10**6


def test_without_prices_no_cost_is_told(world: World) -> None:
    world.open("Touch x.")
    with ModelServer([call("touch x", usage={}), say("Done.", usage={})]) as model:
        solve(world, model)
    assert "| Tokens | 0 in (0 of them cached), 0 out |" in world.pull_body()
    assert "| Cost |" not in world.pull_body()


def test_what_a_failed_task_used_is_told_too(world: World) -> None:
    world.open("Touch x.")
    with ModelServer([call("true", usage=tokens(1_000, 50)), status(400)]) as model:
        solve(world, model)
    assert "| Tokens | 1,000 in (0 of them cached), 50 out |" in failed(world)


# -- Around it ----------------------------------------------------------------------------------------


def test_a_server_without_a_key_gets_none(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    netrc = world.folder / "netrc"
    netrc.write_text("machine 127.0.0.1 login a password b\n")
    monkeypatch.setenv("NETRC", str(netrc))
    world.open("Touch x.")
    with ModelServer([call("touch x"), say("Done.")], key=None) as model:
        solve(world, model)
    assert "authorization" not in model.headers[0]
    assert changed(world) == ["A\tx"]


def test_checks_that_fail_begin_a_new_conversation(world: World) -> None:
    (world.folder / "prompt.md").write_text("{instruction}\nBefore: {failure}\n")
    world.open("Touch x.")
    script = [call("touch y"), say("Done."), call("touch x"), say("Now done.")]
    with ModelServer(script) as model:
        solve(world, model, AGENT_VERIFY_COMMAND="test -e x || { echo no x; exit 1; }")
    user = model.requests[2]["messages"][1]["content"]
    assert user.startswith("Touch x.\nBefore: The checks failed:")
    assert user.endswith("no x")
    assert "Now done." in world.pull_body()
    assert "| Steps | 4 |" in world.pull_body()


def test_the_conversation_is_logged_and_its_last_line_shown(world: World) -> None:
    world.open("Touch x.")
    script = [call("echo $AGENT_TASK_ID; touch x\ntrue", text="Let me see."), say("Done.")]
    with ModelServer(script) as model:
        runner = solve(world, model)
    log = (runner.config.state_dir / "logs" / "1-1.log").read_text()
    assert log == "Let me see.\n$ echo $AGENT_TASK_ID; touch x\n$ true\nissue-1\nDone.\n"


def test_the_agent_is_audited(world: World, tmp_path: Path) -> None:
    world.open("Touch x.")
    file = tmp_path / "audit.jsonl"
    with ModelServer([call("touch x"), say("Done.")]) as model:
        solve(world, model, AGENT_AUDIT_LOG=str(file))
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    events = [(line["event"], line.get("program"), line.get("outcome")) for line in lines if "agent" in line["event"]]
    assert events == [("agent started", "standin-model", None), ("agent ended", "standin-model", "done")]


def test_a_label_chooses_the_model(world: World) -> None:
    world.open("Touch x.", labels=["copilot-agent", "agent:small"])
    with ModelServer([call("touch x"), say("Done.")], models=["small-1"]) as model:
        env = {**model.env(), "AGENT_MODEL": "", "AGENT_MODEL_SMALL": "small-1"}
        world.run_once(AGENT_COMMAND="false", **env)
    assert model.problems == []
    assert "| Model | `small-1` |" in world.pull_body()
    assert "| Agent | `small` |" in world.pull_body()


# -- Answers that no model should give ----------------------------------------------------------------


def raw(text: str) -> Fault:
    """An answer of exactly these words."""
    return Fault(200, text.encode())


def with_usage(reply: Reply, usage: str) -> Fault:
    data = json.dumps({**reply.render("standin-model"), "usage": "USAGE"})
    return raw(data.replace('"USAGE"', usage))


@pytest.mark.parametrize(
    "usage",
    [
        '{"prompt_tokens": NaN}',
        '{"prompt_tokens": 1e999}',
        '{"prompt_tokens": -5000, "completion_tokens": -1}',
        '{"prompt_tokens": true}',
        '{"prompt_tokens": [1]}',
        '"many"',
        "[]",
        "7",
    ],
)
def test_a_usage_that_is_no_number_does_no_harm(world: World, usage: str) -> None:
    world.open("Touch x.")
    with ModelServer([with_usage(call("touch x"), usage), with_usage(say("Done."), usage)]) as model:
        solve(world, model, AGENT_PRICE_INPUT="1")
    assert changed(world) == ["A\tx"]
    assert re.search(r"\| Tokens \| \d+ in", world.pull_body())


def test_a_usage_beyond_all_measure_is_too_much_and_no_fault(world: World) -> None:
    world.open("Touch x.")
    with ModelServer([with_usage(call("touch x"), '{"prompt_tokens": ' + "9" * 4_300 + "}")]) as model:
        solve(world, model, AGENT_PRICE_INPUT="1")
    assert "The model has used more than 5,000,000 tokens." in failed(world)


@pytest.mark.parametrize("body", ["[" * 100_000, '{"choices": ' + "9" * 5_000 + "}"], ids=["deep", "long number"])
def test_json_that_python_does_not_read_is_asked_for_again(world: World, body: str) -> None:
    world.open("Touch x.")
    with ModelServer([raw(body), call("touch x"), say("Done.")]) as model:
        solve(world, model, FastClock())
    assert changed(world) == ["A\tx"]


def test_what_is_no_json_goes_not_back_to_the_server(world: World) -> None:
    world.open("Touch x.")
    data = call("touch x").render("standin-model")
    data["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"] = {"command": "touch x", "n": "NUMBER"}
    with ModelServer([raw(json.dumps(data).replace('"NUMBER"', "NaN")), say("Done.")]) as model:
        solve(world, model, FastClock())
    assert changed(world) == ["A\tx"]


@pytest.mark.parametrize(
    "reply",
    [
        call("touch x", text="half \ud83d"),
        raw_call("bash", '{"command": "touch x; echo \ud83d"}'),
        raw_call("bash", '{"command": "touch x; echo \\ud83d"}'),
        raw_call("bash", '{"command": "touch x"}', id="a\ud83d"),
    ],
    ids=["text", "arguments", "escape in arguments", "id"],
)
def test_half_a_character_goes_not_back_to_the_server(world: World, reply: Reply) -> None:
    world.open("Touch x.")
    with ModelServer([reply, say("Done \ud83d.")]) as model:
        solve(world, model, FastClock())
    assert changed(world) == ["A\tx"]
    assert world.pull_body().encode()


def test_half_a_character_in_a_refusal_is_no_fault_of_the_runner(world: World) -> None:
    world.open("Touch x.")
    with ModelServer([call("touch x"), status(400, message="bad \ud83d thing")]) as model:
        solve(world, model, AGENT_DRAFT_ON_FAILURE="yes")
    assert world.pull().draft is True
    assert "The model's server answered 400: bad" in world.last_comment()


@pytest.mark.parametrize("name", ["", "\u00e9", "a b", "x" * 100])
def test_a_name_goes_back_as_servers_take_it(world: World, name: str) -> None:
    world.open("Touch x.")
    with ModelServer([raw_call(name, "{}"), call("touch x"), say("Done.")]) as model:
        solve(world, model)
    assert changed(world) == ["A\tx"]


@pytest.mark.parametrize("ids", [["1", "1", "1"], ["call-1", ""], ["", "call-0"], ["", ""]], ids=repr)
def test_every_call_gets_an_id_of_its_own(ids: list[str]) -> None:
    calls = [{"id": id_, "function": {"name": "bash", "arguments": "{}"}} for id_ in ids]
    reply = read_reply({"choices": [{"message": {"content": None, "tool_calls": calls}}]})
    assert [made["id"] for made in reply.message["tool_calls"]] == [id_ for id_, _, _ in reply.calls]
    assert len({id_ for id_, _, _ in reply.calls} - {""}) == len(ids)


def test_time_is_bounded_also_while_the_answer_drips(world: World) -> None:
    """No limit of time between two bytes would notice."""
    world.open("Touch x.")
    with ModelServer([slow(600, say("Done."), drip=True)]) as model:
        world.run_once(**model.env(), AGENT_TASK_TIMEOUT="2")
    assert "The agent ran out of time (2 s)." in failed(world)


def test_a_key_that_a_server_repeats_is_in_no_commit(world: World) -> None:
    world.open("Touch x.")
    with ModelServer([call("touch x"), status(401, message=f"Incorrect API key provided: {KEY}.")]) as model:
        solve(world, model, AGENT_DRAFT_ON_FAILURE="yes")
    message = world.github.git(TARGET, "log", "-1", "--format=%B", world.pull().head)
    assert "Unfinished: The model's server answered 401" in message
    assert KEY not in message


def test_a_key_that_a_server_repeats_is_not_told_to_the_next_attempt(world: World) -> None:
    (world.folder / "prompt.md").write_text("{instruction}\nBefore: {failure}\n")
    world.open("Touch x.")
    refusals = [status(500, message=f"Something is wrong with {KEY}.")] * 20  # as often as one attempt asks
    with ModelServer([*refusals, call('cat "$AGENT_TASK_FILE"; touch x'), say("Done.")]) as model:
        world.runner(FastClock(), **model.env()).run_once()
    assert "Before: The model cannot be reached" in json.dumps(model.requests[-1])
    assert KEY not in json.dumps(model.requests)


# -- What nothing else would notice -------------------------------------------------------------------


def test_the_log_of_the_conversation_holds_no_secret(world: World) -> None:
    world.open("Touch x.")
    secret = "a value of mine"
    with ModelServer([call(f"touch x # {secret}", text=f"It is {secret}."), say("Done.")]) as model:
        runner = solve(world, model, AGENT_ENV="GIVEN", GIVEN=secret)
    log = (runner.config.state_dir / "logs" / "1-1.log").read_text()
    assert log == "It is ***.\n$ touch x # ***\nDone.\n"


def test_a_models_key_is_a_secret_also_if_no_agent_gets_it() -> None:
    config = make_config({"OPENAI_API_KEY": "sk-123456789", "AGENT_MODEL": "tiny-1"})
    assert config.masked("key sk-123456789") == "key ***"


def test_a_server_is_not_waited_for_beyond_the_tasks_time(world: World) -> None:
    world.open("Touch x.")
    clock = FakeClock()
    with ModelServer(itertools.repeat(status(500))) as model:
        solve(world, model, clock, AGENT_TASK_TIMEOUT="100", AGENT_MAX_ATTEMPTS="1")
    assert "The model cannot be reached" in failed(world)
    assert sum(seconds for seconds in clock.waits if seconds <= 60) <= 100  # longer are those for the claim


def test_a_model_that_takes_all_the_time_is_out_of_time_and_not_out_of_reach(world: World) -> None:
    world.open("Touch x.")
    with ModelServer([slow(600, say("Done."))]) as model:
        world.run_once(**model.env(), AGENT_TASK_TIMEOUT="1")
    assert "The agent ran out of time (1 s)." in failed(world)


def test_a_model_may_think_longer_than_github(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "HTTP_TIMEOUT", (10, 0.5))
    world.open("Touch x.")
    with ModelServer([slow(1.5, call("touch x")), say("Done.")]) as model:
        solve(world, model)
    assert len(model.requests) == 2


def test_a_command_that_fills_the_disk_ends_the_attempt(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    done = runner_module.Finished(-15, "", "", "disk")
    monkeypatch.setattr(runner_module, "run_script", lambda *_, **__: done)
    world.open("Touch x.")
    with ModelServer([call("yes > x")]) as model:
        solve(world, model, AGENT_MAX_ATTEMPTS="1")
    assert "The disk filled up while the agent ran." in failed(world)


def test_answers_may_be_too_long_more_than_once(world: World) -> None:
    world.open("Touch x.")
    long = say("I will now", finish="length")
    with ModelServer([call("touch x"), long, long, say("Done.")]) as model:
        solve(world, model)
    assert told(model, 2) == told(model, 3) == [runner_module.NUDGES["length"]]
    assert "\n\nDone.\n\n" in world.pull_body()


def test_another_tool_runs_nothing_whatever_its_arguments(world: World) -> None:
    world.open("Touch x.")
    with ModelServer([raw_call("shell", '{"command": "touch y"}'), call("touch x"), say("Done.")]) as model:
        solve(world, model)
    assert "Nothing was run." in told(model, 1)[0]
    assert changed(world) == ["A\tx"]


@pytest.mark.parametrize("code", [408, 409, 429, 500, 503, 529])
def test_what_may_get_better_is_asked_for_again(code: int) -> None:
    assert isinstance(model_refusal(code, {}, {}), Unreachable)


@pytest.mark.parametrize("code", [301, 400, 401, 402, 403, 404, 413, 422])
def test_what_will_stay_as_it_is_fails(code: int) -> None:
    assert isinstance(model_refusal(code, {}, {}), TaskFailed)


def test_a_conversation_that_is_too_long_is_known_by_its_words_too() -> None:
    refused = model_refusal(400, {"error": {"message": "The maximum Context Length is 8192 tokens."}}, {})
    assert isinstance(refused, TaskFailed)
    assert refused.advice == "The task takes more than the model can read: ask for less at a time."


def test_a_refusal_that_is_no_json_fails_at_once(world: World) -> None:
    world.open("Touch x.")
    with ModelServer([not_json(number=404)]) as model:
        solve(world, model)
    assert "The model's server answered 404: no message" in failed(world)


def test_what_comes_from_the_cache_costs_as_much_as_all_else_unless_it_has_a_price(
    used: Callable[..., dict[str, str]],
) -> None:
    assert used(1, 1_000, 1_000, 0, AGENT_PRICE_INPUT="2")["Cost"] == "0.0020"
    assert used(1, 1_000, 1_000, 0, AGENT_PRICE_INPUT="2", AGENT_PRICE_CACHED="0")["Cost"] == "0.0000"
    assert used(1, 1_000, 0, 1_000, AGENT_PRICE_OUTPUT="3")["Cost"] == "0.0030"


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_a_number_that_json_does_not_know_goes_not_back_to_the_server(world: World, number: str) -> None:
    """Even where it only stands beside a call."""
    world.open("Touch x.")
    data = call("touch x").render("standin-model")
    data["choices"][0]["message"]["tool_calls"][0]["extra_content"] = "NUMBER"
    with ModelServer([raw(json.dumps(data).replace('"NUMBER"', f'{{"x": {number}}}')), say("Done.")]) as model:
        world.runner(FastClock(), **model.env()).run_once()
    assert len(model.requests) == 2


def test_very_many_calls_are_read_in_no_time() -> None:
    calls = [{"id": f"c{n}", "function": {"name": "bash", "arguments": "{}"}} for n in range(50_000)]
    begun = time.process_time()
    read_reply({"choices": [{"message": {"content": None, "tool_calls": calls}}]})
    assert time.process_time() - begun < 10
