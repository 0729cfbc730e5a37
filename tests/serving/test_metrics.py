"""/metrics: the names that dashboards ask for, and that the figures are right and never go back."""

import asyncio
import time
from dataclasses import replace

import pytest
from engine_stats import STATS
from gptoss_launch.launch.api import metrics as metrics_module
from gptoss_launch.launch.api.lag import watch_lag
from gptoss_launch.launch.api.metrics import Metrics, Replica
from gptoss_launch.parallel.engine.request import Token
from gptoss_launch.parallel.engine.wire import Done
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

UP = Replica(True, 0)
# vLLM's, facts of its dashboards, under our prefix
PEERS = """num_requests_running num_requests_waiting kv_cache_usage_perc prefix_cache_queries prefix_cache_hits
num_preemptions prompt_tokens generation_tokens request_success time_to_first_token_seconds inter_token_latency_seconds
e2e_request_latency_seconds request_queue_time_seconds request_prefill_time_seconds request_decode_time_seconds"""


def read(metrics: Metrics, *states: Replica) -> dict:
    """(name, replica, other label) -> value."""
    families = list(text_string_to_metric_families(metrics.text(states).decode()))
    known = {"model_name", "replica"}
    return {
        (s.name, s.labels.get("replica", ""), *(value for key, value in s.labels.items() if key not in known)): s.value
        for family in families
        for s in family.samples
    }


def make(replicas: int = 1) -> Metrics:
    return Metrics(CollectorRegistry(), "tiny", replicas)


def test_names_are_those_of_the_peers():
    text = make().text([UP]).decode()
    names = {family.name for family in text_string_to_metric_families(text)}
    assert {f"gptoss:{name}" for name in PEERS.split()} <= names
    assert all(name.startswith("gptoss:") for name in names)


def test_reports_of_a_replica_are_shown():
    metrics = make(2)
    metrics.report(1, STATS)
    now = read(metrics, UP, Replica(True, 2))
    assert {key[0].removeprefix("gptoss:"): value for key, value in now.items() if key[1] == "1" and value} == {
        **{"replica_up": 1, "replica_restarts_total": 2, "num_requests_running": 3, "num_requests_waiting": 4},
        **{"kv_cache_usage_perc": 0.25, "prefix_cache_queries_total": 1000, "prefix_cache_hits_total": 600},
        **{"num_preemptions_total": 7, "exact_draws_total": 8, "engine_steps_total": 90, "slow_path": 1},
        **{"prefill_computed_tokens_total": 400, "decode_computed_tokens_total": 70},
        **{"expert_cache_hits_total": 30, "expert_cache_misses_total": 10, "expert_moved_bytes_total": 5000},
        **{"expert_waited_seconds_total": 0.5, "expert_stalled_seconds_total": 0.25},
        **{"expert_ahead_total": 12, "expert_ahead_hits_total": 9},
        **{"decode_step_seconds": 0.02, "communication_share": 0.25},
    }
    assert now["gptoss:slow_path", "1", "sampling: on the host"] == 1
    other = {key[0].removeprefix("gptoss:") for key in now if key[1] == "0"}  # it has told nothing
    assert {name for name in other if not name.startswith("inter_token_latency")} == {
        *("replica_up", "replica_restarts_total", "generation_tokens_total")
    }


def test_counters_of_a_restarted_replica_never_go_back():
    metrics = make()
    seen = []
    fields = ("prefix_queried_tokens_total", "preemptions_total", "steps_total")
    for steps in (10, 20, 3, 5, 0, 5):  # three lives
        metrics.report(0, replace(STATS, **dict.fromkeys(fields, steps)))
        now = read(metrics, UP)
        assert now["gptoss:prefix_cache_queries_total", "0"] == now["gptoss:engine_steps_total", "0"]
        seen.append(now["gptoss:engine_steps_total", "0"])
    assert seen == [10, 20, 23, 25, 25, 30]
    down = read(metrics, Replica(False, 3))
    assert down["gptoss:engine_steps_total", "0"] == 30 and down["gptoss:replica_up", "0"] == 0
    assert ("gptoss:num_requests_running", "0") not in down  # nobody knows


def test_where_the_time_of_a_request_went():
    metrics = make()
    metrics.report(0, Done("a", 0.5, 1.5, 2.5, 10, 0, 5))
    metrics.report(0, Done("b", 0.25, 1.0, 2.0, 10, 0, 5))
    now = read(metrics, UP)
    for name, total in (("queue", 0.75), ("prefill", 2.5), ("decode", 4.5)):
        assert now[f"gptoss:request_{name}_time_seconds_sum", "0"] == total
        assert now[f"gptoss:request_{name}_time_seconds_count", "0"] == 2


@pytest.mark.parametrize(
    "last, told, reason",
    [
        (Token("a", 5, "length"), "abort", "length"),
        (Token("a", -1, "deadline"), "abort", "deadline"),
        (Token("a", 5), "stop", "stop"),  # a stop string
        (Token("a", 5), "abort", "abort"),
    ],
)
def test_what_a_client_sees(monkeypatch, last, told, reason):
    clock_s = [100.0]
    monkeypatch.setattr(metrics_module.time, "monotonic", lambda: clock_s[-1])
    metrics = make(2)
    watch = metrics.watch(prompt_tokens=12)
    watch.sent(0)
    watch.sent(1)  # it moved
    for now_s, token in ((103.0, Token("a", 1)), (103.5, Token("a", 2)), (104.5, last)):
        clock_s.append(now_s)
        watch.token(token)
    clock_s.append(105.0)
    watch.end(told)
    watch.end("abort")
    now = read(metrics, UP, UP)
    drawn = 2 + (last.id >= 0)
    ended_s = 4.5 if last.finish_reason else 5.0
    assert now["gptoss:time_to_first_token_seconds_sum", "1"] == 3.0
    assert now["gptoss:inter_token_latency_seconds_sum", "1"] == (1.5 if drawn == 3 else 0.5)
    assert now["gptoss:inter_token_latency_seconds_count", "1"] == drawn - 1
    assert now["gptoss:e2e_request_latency_seconds_sum", "1"] == ended_s
    assert now["gptoss:prompt_tokens_total", "1"] == 12 and now["gptoss:generation_tokens_total", "1"] == drawn
    ends = {key[2]: value for key, value in now.items() if key[0] == "gptoss:request_success_total"}
    assert ends == {reason: 1}


def test_a_request_that_no_replica_had_is_not_counted():
    metrics = make()
    metrics.watch(3).end("abort")
    assert not [key for key in read(metrics, UP) if key[0] == "gptoss:request_success_total"]


def test_a_loop_that_is_held_up_is_late_and_its_turn_long():
    async def run() -> list[tuple[float, float]]:
        seen: list[tuple[float, float]] = []
        watching = asyncio.create_task(watch_lag(lambda late_s, turn_s: seen.append((late_s, turn_s)), every_s=0.01))

        async def compute() -> None:
            while len(seen) < 20:
                begun_s = time.thread_time()
                while time.thread_time() - begun_s < 0.03:
                    pass
                await asyncio.sleep(0)

        await compute()
        watching.cancel()
        return seen

    lates, turns = zip(*asyncio.run(run()), strict=True)
    assert sorted(lates)[10] > 0.005 and 0.029 < sorted(turns)[10] < 0.06
