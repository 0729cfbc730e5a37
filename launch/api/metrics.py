"""What /metrics shows, in Prometheus' text format: vLLM's names under our prefix, labelled by model and replica.

Two sources: the replicas' own reports (`wire.Stats` now and then, `wire.Done` for each request), and what the HTTP
process sees of each request by itself (`Watch`). Nothing is global: a registry of its own. Does not know where reports
come from.
"""

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from ...parallel.engine.request import FinishReason, Token
from ...parallel.engine.wire import Done, Stats

PREFIX = "gptoss:"
LABELS = ("model_name", "replica")
# abort: the client left. error: the engine refused it or died.
EndReason = FinishReason | Literal["abort", "error"]

# Upper edges, in seconds: vLLM's, and finer where a small model is faster.
TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40, 80)
REQUEST_S = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)
LAG_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 2.5)
FIRST_S = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)

# name, what it is, from Stats; a replica that is down has none of these.
_GAUGES = (
    ("num_requests_running", "Requests in the batch", lambda stats: stats.running),
    ("num_requests_waiting", "Requests that wait for a place in the batch", lambda stats: stats.waiting),
    ("kv_cache_usage_perc", "Share of the KV pages in use, 0 to 1", lambda s: s.kv_pages_used / max(s.kv_pages, 1)),
    ("decode_step_seconds", "Time of a decode step", lambda stats: stats.decode_step_s),
    ("communication_share", "Share of a decode step in all-reduces, 0 to 1", lambda stats: _share(stats)),
)
# name (Prometheus' text adds _total), what it is, field of Stats
_TOTALS = (
    ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache", "prefix_queried_tokens_total"),
    ("prefix_cache_hits", "Prompt tokens found in the prefix cache", "prefix_hit_tokens_total"),
    ("num_preemptions", "Requests that lost their pages and were computed again", "preemptions_total"),
    ("exact_draws", "Draws repeated because the first candidates did not suffice", "exact_draws_total"),
    ("engine_steps", "Forward passes", "steps_total"),
    ("prefill_computed_tokens", "Prompt tokens computed, recomputed ones included", "prefill_tokens_total"),
    ("decode_computed_tokens", "Answer tokens computed", "decode_tokens_total"),
    ("expert_cache_hits", "Experts that a step needed and the device had", "expert_hits_total"),
    ("expert_cache_misses", "Experts that a step needed and the device had not", "expert_misses_total"),
    ("expert_moved_bytes", "Bytes of experts brought to the device", "expert_moved_bytes_total"),
    ("expert_waited_seconds", "Time to learn which experts a step needs", "expert_waited_s_total"),
    ("expert_stalled_seconds", "Time in which the device waited for experts", "expert_stalled_s_total"),
    ("expert_ahead", "Experts brought to the device before a layer asked for them", "expert_ahead_total"),
    ("expert_ahead_hits", "Those of them that the layer then needed", "expert_ahead_hits_total"),
)


@dataclass(frozen=True)
class Replica:
    """What the HTTP process knows of a replica's connection. restarts: how often it answered again after a loss."""

    up: bool
    restarts: int


class Metrics:
    """All figures of one HTTP process."""

    def __init__(self, registry: CollectorRegistry, model_name: str, replicas: int) -> None:
        self._registry = registry
        self._model_name = model_name
        self._reports = [_Reports() for _ in range(replicas)]
        self._states = [Replica(False, 0)] * replicas

        def histogram(name: str, what: str, edges: Sequence[float]) -> Histogram:
            return Histogram(PREFIX + name, what, LABELS, registry=registry, buckets=edges)

        self._tokens = [_Tokens() for _ in range(replicas)]
        self._first = histogram("time_to_first_token_seconds", "From the request to its first token", FIRST_S)
        self._whole = histogram("e2e_request_latency_seconds", "From the request to its end", REQUEST_S)
        self._queue = histogram("request_queue_time_seconds", "From arrival to the first step", REQUEST_S)
        self._prefill = histogram("request_prefill_time_seconds", "From there to the first token", REQUEST_S)
        self._decode = histogram("request_decode_time_seconds", "From there to the last token", REQUEST_S)
        begun = "Tokens of prompts whose answer began"
        self._prompt_tokens = Counter(PREFIX + "prompt_tokens", begun, LABELS, registry=registry)
        ended = "Requests that ended, by reason; abort: the client left"
        self._ended = Counter(PREFIX + "request_success", ended, (*LABELS, "finish_reason"), registry=registry)
        repairs = "Places where an answer left the harmony format and was read all the same, by kind"
        self._repairs = Counter(PREFIX + "harmony_repairs", repairs, (*LABELS, "kind"), registry=registry)
        # Of the HTTP process itself, so without a replica.
        http, http_labels = "HTTP requests by route and status", (LABELS[0], "route", "method", "status")
        self._http = Counter(PREFIX + "http_requests", http, http_labels, registry=registry)
        late, turn = "Time by which the event loop was late", "What one turn of the event loop computed"
        self._late = Histogram(PREFIX + "event_loop_late_seconds", late, LABELS[:1], registry=registry, buckets=LAG_S)
        self._turn = Histogram(PREFIX + "event_loop_turn_seconds", turn, LABELS[:1], registry=registry, buckets=LAG_S)
        registry.register(_Scrape(self._families))

    def report(self, replica: int, report: Done | Stats) -> None:
        """What a replica told."""
        if isinstance(report, Stats):
            self._reports[replica].take(report)
            return
        labels = (self._model_name, str(replica))
        self._queue.labels(*labels).observe(report.queue_s)
        self._prefill.labels(*labels).observe(report.prefill_s)
        self._decode.labels(*labels).observe(report.decode_s)

    def http(self, route: str, method: str, status: int) -> None:
        """An HTTP request ended (`record.Record`)."""
        known = method if method in ("GET", "POST", "DELETE", "HEAD", "OPTIONS") else "other"
        self._http.labels(self._model_name, route, known, str(status)).inc()

    def lag(self, late_s: float, turn_s: float) -> None:
        """What `lag.watch_lag` saw."""
        self._late.labels(self._model_name).observe(late_s)
        self._turn.labels(self._model_name).observe(turn_s)

    def watch(self, prompt_tokens: int) -> "Watch":
        """For one request that begins now."""
        return Watch(self, prompt_tokens)

    def text(self, states: Sequence[Replica]) -> bytes:
        """All of it, in Prometheus' text format. states: of the replicas, now."""
        self._states = list(states)
        return generate_latest(self._registry)

    def _families(self) -> Iterator[Metric]:
        everyone = list(enumerate(zip(self._reports, self._states, strict=True)))
        told = [(replica, reports) for replica, (reports, _) in everyone if reports.last is not None]

        def labels(replica: int) -> tuple[str, str]:
            return self._model_name, str(replica)

        up = GaugeMetricFamily(PREFIX + "replica_up", "1 while it answers", labels=LABELS)
        restarts = CounterMetricFamily(PREFIX + "replica_restarts", "Times it answered again", labels=LABELS)
        for replica, (_, state) in everyone:
            up.add_metric(labels(replica), float(state.up))
            restarts.add_metric(labels(replica), float(state.restarts))
        gap = "Between two tokens of an answer"
        gaps = HistogramMetricFamily(PREFIX + "inter_token_latency_seconds", gap, labels=LABELS)
        generated = CounterMetricFamily(PREFIX + "generation_tokens", "Tokens of answers", labels=LABELS)
        for replica, tokens in enumerate(self._tokens):
            gaps.add_metric(labels(replica), tokens.buckets(), tokens.gaps_s)
            generated.add_metric(labels(replica), tokens.count)
        yield from (up, restarts, gaps, generated)
        now = [(replica, reports.last) for replica, reports in told if reports.last and self._states[replica].up]
        for name, what, value in _GAUGES:
            gauge = GaugeMetricFamily(PREFIX + name, what, labels=LABELS)
            for replica, stats in now:
                gauge.add_metric(labels(replica), value(stats))
            yield gauge
        for name, what, field in _TOTALS:
            counter = CounterMetricFamily(PREFIX + name, what, labels=LABELS)
            for replica, reports in told:
                counter.add_metric(labels(replica), reports.total(field))
            yield counter
        slow = GaugeMetricFamily(PREFIX + "slow_path", "A slower way that is taken", labels=(*LABELS, "slow_path"))
        for replica, stats in now:
            for name in stats.slow_paths:
                slow.add_metric((*labels(replica), name), 1)
        yield slow


class Watch:
    """One request as its client sees it. Times run from its making."""

    def __init__(self, metrics: Metrics, prompt_tokens: int) -> None:
        self._metrics = metrics
        self._prompt_tokens = prompt_tokens
        self._begun_s = time.monotonic()
        self._last_s: float | None = None
        self._labels = (metrics._model_name, "")
        self._ended = False

    def sent(self, replica: int) -> None:
        """This replica has it now."""
        self._labels = (self._labels[0], str(replica))
        self._tokens = self._metrics._tokens[replica]

    def token(self, token: Token) -> None:
        now_s = time.monotonic()
        if token.id >= 0:
            if self._last_s is None:
                metrics = self._metrics
                metrics._first.labels(*self._labels).observe(now_s - self._begun_s)
                metrics._prompt_tokens.labels(*self._labels).inc(self._prompt_tokens)
            else:
                self._tokens.add_gap(now_s - self._last_s)
            self._tokens.count += 1
            self._last_s = now_s
        if token.finish_reason is not None:
            self.end(token.finish_reason)

    def repaired(self, kind: str) -> None:
        """Its answer left the format (`harmony.StreamParser`)."""
        self._metrics._repairs.labels(*self._labels, kind).inc()

    def end(self, reason: EndReason) -> None:
        """The first reason counts; those after it follow from it. A request that no replica had is not counted."""
        if self._ended or not self._labels[1]:
            return
        self._ended = True
        self._metrics._ended.labels(*self._labels, reason).inc()
        self._metrics._whole.labels(*self._labels).observe(time.monotonic() - self._begun_s)


class _Tokens:
    """Tokens of one replica, and the times between them. By hand: a Histogram and a Counter take ten times as long,
    and this is done for each token of every stream."""

    def __init__(self) -> None:
        self.count = 0
        self.gaps_s = 0.0
        self._gaps = [0] * (len(TOKEN_S) + 1)  # the last one: longer than any edge

    def add_gap(self, gap_s: float) -> None:
        self._gaps[bisect_left(TOKEN_S, gap_s)] += 1
        self.gaps_s += gap_s

    def buckets(self) -> list[tuple[str, float]]:
        """Edge and count up to it, as Prometheus has them."""
        edges = map(floatToGoString, (*TOKEN_S, float("inf")))
        return list(zip(edges, accumulate(self._gaps), strict=True))


class _Reports:
    """The Stats of one replica over all its lives. Totals of a new life begin at 0; ours never go back."""

    def __init__(self) -> None:
        self.last: Stats | None = None
        self._before: dict[str, float] = {field: 0 for _, _, field in _TOTALS}  # of lives that are over

    def take(self, stats: Stats) -> None:
        if self.last is not None and any(getattr(stats, field) < getattr(self.last, field) for field in self._before):
            for field in self._before:
                self._before[field] += getattr(self.last, field)
        self.last = stats

    def total(self, field: str) -> float:
        return self._before[field] + getattr(self.last, field)


class _Scrape(Collector):
    """Families made when they are asked for."""

    def __init__(self, families: Callable[[], Iterator[Metric]]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        return self._families()


def _share(stats: Stats) -> float:
    return stats.communication_s / stats.decode_step_s if stats.decode_step_s > 0 else 0.0
