"""The metrics: text that Prometheus reads, and numbers that are right."""

from __future__ import annotations

import math
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import Daemon, FakeClock, FastClock, World, wait_until
from hypothesis import example, given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from standin import Fault
from test_claims import put_claim
from test_http import HOOKED, SECRET, Site, busy, derived, hello, served, signed
from test_http import example as published

from runner import BUCKETS, METRICS, Metrics

__all__ = ["hello"]
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples(text: str) -> Samples:
    """All samples by name and labels, as Prometheus's own parser reads them."""
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = sample.name, tuple(sorted(sample.labels.items()))
            assert key not in found
            found[key] = sample.value
    return found


def counted(text: str, name: str) -> dict[str, float]:
    """The values of a metric of one label by that label's values, without those that are 0."""
    rows = samples(text).items()
    return {labels[0][1]: value for (key, labels), value in rows if key == f"agent_runner_{name}" and value}


def scrape(site: Site) -> str:
    answer = site.ask("/metrics")
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    return answer.text


# -- the text --------------------------------------------------------------------------------------


def assert_readable(text: str) -> None:
    """Prometheus reads it, and it keeps to Prometheus's customs: https://prometheus.io/docs/practices/naming/"""
    assert text.endswith("\n")
    families = list(text_string_to_metric_families(text))
    assert len(families) == len({family.name for family in families}) == len(METRICS)
    for family in families:
        assert re.fullmatch(r"agent_runner_[a-z][a-z0-9_]*", family.name)
        assert family.documentation
        assert family.type in ("counter", "gauge", "histogram")
        for sample in family.samples:
            assert re.fullmatch(rf"{family.name}(_total|_bucket|_sum|_count)?", sample.name)
            assert sample.name.endswith("_total") == (family.type == "counter")
            assert all(re.fullmatch(r"[a-z_]+", name) for name in sample.labels)
            assert math.isfinite(sample.value)
    for name, metric in METRICS.items():
        (told,) = re.findall(rf"^# HELP agent_runner_{name} (.+)$", text, re.MULTILINE)
        (kind,) = re.findall(rf"^# TYPE agent_runner_{name} (.+)$", text, re.MULTILINE)
        assert (told, kind) == (metric.help, metric.kind)
        assert name.endswith("_total") == (metric.kind == "counter")


def assert_histograms_add_up(text: str) -> None:
    found = samples(text)
    counts = [(key, labels, count) for (key, labels), count in found.items() if key.endswith("_count")]
    assert counts
    for key, labels, count in counts:
        name = key.removesuffix("_count") + "_bucket"
        tops = [*map(str, BUCKETS), "+Inf"]
        buckets = [found[name, tuple(sorted((*labels, ("le", top))))] for top in tops]
        assert buckets == sorted(buckets)
        assert buckets[-1] == count
        total = found[key.removesuffix("_count") + "_sum", labels]
        assert total >= 0
        assert (total > 0) <= (count > 0)


def test_a_new_runner_shows_all_metrics_with_what_can_be_counted_at_nought(world: World) -> None:
    with served(world, FakeClock()) as (_, site):
        text = scrape(site)
    assert_readable(text)
    assert_histograms_add_up(text)
    found = samples(text)
    for name, metric in METRICS.items():
        for value in metric.known if metric.kind == "counter" else ():
            assert found[f"agent_runner_{name}", ((metric.label, value),)] == 0
    assert found["agent_runner_healthy", ()] == 1
    assert found["agent_runner_queue_length", ()] == 0


def test_all_metrics_can_be_read_after_work_of_all_kinds(world: World) -> None:
    with busy(world, "done nothing again hold done done", ['A "quoted" \\ title']) as (runner, site):
        text = scrape(site)
        assert_readable(text)
        assert_histograms_add_up(text)
        found = samples(text)
        assert found["agent_runner_tasks_running", ()] == 1
        assert found["agent_runner_tasks_waiting", ()] == 1
        assert found["agent_runner_queue_length", ()] == 2
        assert found["agent_runner_last_poll_timestamp_seconds", ()] > 1_000_000_000
        assert found["agent_runner_quota_limit", (("resource", "core"),)] == 5000
        assert found["agent_runner_task_seconds_count", (("outcome", "done"),)] == 1
        assert found["agent_runner_task_seconds_count", (("outcome", "failed"),)] == 1
        assert found["agent_runner_phase_seconds_count", (("phase", "working"),)] == 3
        assert counted(text, "tasks_total") == {"done": 1, "failed": 1, "retry": 1}
        assert counted(text, "claims_total") == {"won": 4}
        assert runner.metrics.value("claims_total", "won") == 4


def test_each_metric_is_told_in_a_sentence() -> None:
    for metric in METRICS.values():
        assert metric.help.endswith(".")
        assert "\n" not in metric.help


@given(st.text())
@example('a "quoted" one')
@example("back\\slash \\n \\\\")
@example("line\nend\n\n")
@example('\\"\n')
@example('"} 1\nagent_runner_healthy 0\n#')
def test_label_values_come_back_as_they_were(value: str) -> None:
    metrics = Metrics()
    metrics.count("requests_total", value)
    metrics.observe("phase_seconds", 0.3, value)
    if re.search(r"[\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]", value):  # where the parser, but no Prometheus, ends a line
        return
    found = samples(metrics.render())
    assert found["agent_runner_requests_total", (("status", value),)] == 1
    assert found["agent_runner_phase_seconds_count", (("phase", value),)] == 1
    assert ("agent_runner_healthy", ()) not in found


@given(st.lists(st.floats(0, 10_000, allow_nan=False), min_size=1, max_size=30))
@example([0.1, 0.5, 1.0, 3600.0, 3600.1])
def test_a_histogram_counts_each_value_where_it_belongs(values: list[float]) -> None:
    metrics = Metrics()
    for seconds in values:
        metrics.observe("task_seconds", seconds, "done")
    text = metrics.render()
    assert_histograms_add_up(text)
    found = samples(text)
    for top in BUCKETS:
        below = sum(seconds <= top for seconds in values)
        assert found["agent_runner_task_seconds_bucket", (("le", str(top)), ("outcome", "done"))] == below
    assert found["agent_runner_task_seconds_count", (("outcome", "done"),)] == len(values)
    assert found["agent_runner_task_seconds_sum", (("outcome", "done"),)] == pytest.approx(sum(values))


def test_eight_threads_that_count_lose_nothing() -> None:
    metrics, rounds = Metrics(), 5_000

    def count(thread: int) -> None:
        for n in range(rounds):
            metrics.count("polls_total", "changed")
            metrics.count("requests_total", n % 7)
            metrics.observe("task_seconds", 1.0, "done")
            metrics.set("queue_length", n)
            if n % 1000 == 0:
                assert_histograms_add_up(metrics.render())

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(count, range(8)))
    text = metrics.render()
    assert counted(text, "polls_total") == {"changed": 8 * rounds}
    assert sum(counted(text, "requests_total").values()) == 8 * rounds
    assert counted(text, "task_seconds_count") == {"done": 8 * rounds}
    assert counted(text, "task_seconds_sum") == {"done": 8.0 * rounds}


# -- the numbers -----------------------------------------------------------------------------------


def test_tasks_that_are_done_and_failed_are_counted(world: World) -> None:
    world.open()
    world.open("No patch.")
    world.open()
    with served(world) as (runner, site):
        runner.run_once()
        text = scrape(site)
    assert counted(text, "tasks_total") == {"done": 2, "failed": 1}
    assert counted(text, "claims_total") == {"won": 3}
    assert counted(text, "task_seconds_count") == {"done": 2, "failed": 1}


def test_each_attempt_is_counted(world: World) -> None:
    world.open("Do something.")
    code = "import runner\ndef process_task(task, workspace):\n"
    code += "    if task.attempt < 3: raise runner.TaskRetry('busy')\n    open('new', 'w')"
    (world.home / "again.py").write_text(code)
    runner = world.runner(FastClock(), AGENT_PROCESS_TASK=f"{world.home}/again.py:process_task")
    runner.run_once()
    text = runner.metrics.render()
    assert counted(text, "tasks_total") == {"retry": 2, "done": 1}
    assert counted(text, "phase_seconds_count")["working"] == 3
    assert counted(text, "claims_total") == {"won": 1}


def steal(world: World) -> None:
    put_claim(world)


def test_a_claim_that_another_runner_wins_is_counted(world: World) -> None:
    world.open()
    taken = Fault(
        kind="git",
        where=lambda r: r.query.get("service") == "git-receive-pack",
        action=lambda: steal(world),
    )
    world.github.faults.append(taken)
    runner = world.run_once()
    assert taken.seen
    text = runner.metrics.render()
    assert counted(text, "claims_total") == {"lost": 1}
    assert counted(text, "tasks_total") == {"held": 1}
    assert not runner.history


def test_a_claim_that_is_taken_over_is_counted(world: World) -> None:
    world.open()
    world.github.faults.append(
        Fault(method="POST", path=".*/comments", action=lambda: steal(world)),
    )
    runner = world.run_once()
    text = runner.metrics.render()
    assert counted(text, "claims_total") == {"won": 1, "dropped": 1}
    assert counted(text, "tasks_total") == {"dropped": 1}
    assert [end["outcome"] for end in runner.history] == ["dropped"]
    assert "another runner has it" in runner.history[0]["why"]


def test_polls_are_counted_by_what_came_of_them(world: World) -> None:
    clock = FakeClock()
    with served(world, clock) as (runner, site):
        world.github.faults.append(Fault(path=".*/issues", status=502, after=2))
        for _ in range(5):
            runner._poll()
            clock.at = runner.next_poll
        text = scrape(site)
    assert counted(text, "polls_total") == {"changed": 1, "unchanged": 3, "failed": 1}
    assert counted(text, "requests_total") == {"200": 1, "304": 3, "502": 1}


def test_requests_without_an_answer_are_counted(world: World) -> None:
    runner = world.runner(FakeClock())
    world.github.faults.append(Fault(path=".*/issues", drop="before"))
    runner._poll()
    assert counted(runner.metrics.render(), "requests_total") == {"0": 1}


def test_deliveries_are_counted_by_what_came_of_them(hello: World) -> None:
    with served(hello, FakeClock(), **HOOKED) as (_, site):
        site.deliver(published("opened"))
        site.deliver(published("opened"))
        site.deliver(published("edited"))
        site.deliver(published(None, "ping"))
        site.deliver(published("opened")._replace(signature="sha256=0"))
        site.deliver(signed(b"no JSON"))
        site.deliver(signed(b"x" * 2_000_000))
        site.deliver(derived("closed"))
        text = scrape(site)
    assert counted(text, "webhooks_total") == {"news": 2, "repeated": 1, "ignored": 2, "refused": 3}
    assert SECRET not in text


def test_health_and_the_time_since_the_start_can_be_seen(world: World) -> None:
    clock = FakeClock()
    with served(world, clock, AGENT_POLL_INTERVAL="100") as (_, site):
        clock.at += 300
        found = samples(scrape(site))
        assert (found["agent_runner_uptime_seconds", ()], found["agent_runner_healthy", ()]) == (300, 1)
        clock.at += 1
        assert samples(scrape(site))["agent_runner_healthy", ()] == 0


def test_a_limit_shows_as_a_pause(world: World) -> None:
    with served(world) as (runner, site):
        world.github.faults.append(Fault(path=".*/issues", status=429, headers={"retry-after": "120"}))
        with Daemon(runner):
            wait_until(lambda: samples(scrape(site))["agent_runner_paused_seconds", ()])
            assert 0 < samples(scrape(site))["agent_runner_paused_seconds", ()] <= 120
            assert "paused" in site.ask("/status.json").json()
