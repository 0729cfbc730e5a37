"""What `top` shows of a server, from two readings of its /metrics, and how that looks in a terminal.

Takes our names and vLLM's, which are the same but for what stands in front. Knows neither HTTP nor keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..parallel.planning.machine import format_size
from .prometheus import Reading, quantile, rate, rise

PREFIXES = ("gptoss:", "vllm:")
BARS = "▁▂▃▄▅▆▇█"
BAR_WIDTH = 24


@dataclass(frozen=True)
class Replica:
    """One replica now. None: it does not tell."""

    name: str
    up: bool
    running: float | None
    waiting: float | None
    kv_share: float | None


@dataclass(frozen=True)
class Snapshot:
    """One moment. Rates and latencies are of the time between two readings; shares are 0 to 1; None: not told, or
    nothing happened that it could be of."""

    model: str
    generation_tok_s: float | None
    prompt_tok_s: float | None
    requests_s: float | None
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    itl_p50_s: float | None
    itl_p99_s: float | None
    running: float | None
    waiting: float | None
    kv_share: float | None
    prefix_hit_share: float | None
    preemptions: float | None
    decode_step_s: float | None
    communication_share: float | None
    gpu_used_bytes: float | None
    gpu_total_bytes: float | None
    slow_paths: tuple[str, ...]
    replicas: tuple[Replica, ...]


def snapshot(before: Reading, now: Reading) -> Snapshot:
    """Raises ValueError where there is nothing of a server that we know."""
    prefix = next((one for one in PREFIXES if any(name.startswith(one) for name, _ in now.values)), None)
    if prefix is None:
        raise ValueError("no metrics of gptoss-launch or vLLM")
    times = {
        f"{short}_p{per_cent}_s": quantile(before, now, f"{prefix}{name}_seconds", per_cent / 100)
        for short, name in (("ttft", "time_to_first_token"), ("itl", "inter_token_latency"))
        for per_cent in (50, 99)
    }
    queried, hits = (rise(before, now, f"{prefix}prefix_cache_{what}_total") for what in ("queries", "hits"))
    slow = {dict(labels)["slow_path"] for name, labels in now.values if name == f"{prefix}slow_path"}
    models = {dict(labels).get("model_name", "") for _, labels in now.values} - {""}
    return Snapshot(
        model=", ".join(sorted(models)),
        generation_tok_s=rate(before, now, f"{prefix}generation_tokens_total"),
        prompt_tok_s=rate(before, now, f"{prefix}prompt_tokens_total"),
        requests_s=rate(before, now, f"{prefix}request_success_total"),
        running=now.total(f"{prefix}num_requests_running"),
        waiting=now.total(f"{prefix}num_requests_waiting"),
        kv_share=now.mean(f"{prefix}kv_cache_usage_perc"),
        prefix_hit_share=hits / queried if queried and hits is not None else None,
        preemptions=now.total(f"{prefix}num_preemptions_total"),
        decode_step_s=now.mean(f"{prefix}decode_step_seconds"),
        communication_share=now.mean(f"{prefix}communication_share"),
        gpu_used_bytes=now.total(f"{prefix}gpu_memory_used_bytes"),
        gpu_total_bytes=now.total(f"{prefix}gpu_memory_total_bytes"),
        slow_paths=tuple(sorted(slow)),
        replicas=_replicas(now, prefix),
        **times,
    )


def _replicas(now: Reading, prefix: str) -> tuple[Replica, ...]:
    up = now.by(f"{prefix}replica_up", "replica")
    parts = [now.by(f"{prefix}{name}", "replica") for name in ("num_requests_running", "num_requests_waiting")]
    kv = now.by(f"{prefix}kv_cache_usage_perc", "replica")
    return tuple(
        Replica(name, bool(alive), parts[0].get(name), parts[1].get(name), kv.get(name))
        for name, alive in sorted(up.items())
    )


# --- in a terminal


@dataclass(frozen=True)
class View:
    """What is on the screen. shown: the last snapshot, None before there was one. trouble: why there is no newer one.
    speeds: generated tokens a second, the newest last."""

    url: str
    shown: Snapshot | None
    trouble: str
    speeds: Sequence[float]


def render(view: View) -> RenderableType:
    head = Text.assemble(("gptoss-launch top  ", "bold"), view.url, f"  {view.shown.model}" if view.shown else "")
    state = Text(view.trouble, "bold red") if view.trouble else Text("answers", "green")
    foot = Text("q leaves", "dim")
    if view.shown is None:
        return Group(head, state, "", foot)
    figures = Table(show_header=False, box=None, padding=(0, 2, 0, 0), style="dim" if view.trouble else "")
    figures.add_column(style="bold", no_wrap=True)
    figures.add_column()
    for name, text in lines(view.shown):
        figures.add_row(name, text)
    parts: list[RenderableType] = [head, state, "", figures, "", Text(f"tokens/s  {sparkline(view.speeds)}")]
    if len(view.shown.replicas) > 1:
        parts += ["", _replica_table(view.shown.replicas)]
    parts += [Text(f"slow path: {path}", "yellow") for path in view.shown.slow_paths]
    return Group(*parts, "", foot)


def lines(shown: Snapshot) -> list[tuple[str, str]]:
    """(name, figures) of every line."""

    def number(value: float | None, unit: str = "", scale: float = 1, digits: int = 1) -> str:
        return "-" if value is None else f"{value * scale:,.{digits}f}{unit}"

    def pair(first: float | None, second: float | None) -> str:
        return f"p50 {number(first, ' ms', 1e3)}   p99 {number(second, ' ms', 1e3)}"

    memory = "not told"
    if shown.gpu_used_bytes is not None:
        memory = format_size(round(shown.gpu_used_bytes))
        if shown.gpu_total_bytes:
            memory += f" of {format_size(round(shown.gpu_total_bytes))}"
    step = number(shown.decode_step_s, " ms", 1e3, 2)
    return [
        ("generated", f"{number(shown.generation_tok_s)} tokens/s"),
        ("prompts", f"{number(shown.prompt_tok_s)} tokens/s   {number(shown.requests_s, digits=2)} requests/s ended"),
        ("first token", pair(shown.ttft_p50_s, shown.ttft_p99_s)),
        ("between tokens", pair(shown.itl_p50_s, shown.itl_p99_s)),
        ("requests", f"{number(shown.running, digits=0)} running   {number(shown.waiting, digits=0)} waiting"),
        ("KV cache", bar(shown.kv_share)),
        ("prefix hits", f"{number(shown.prefix_hit_share, ' %', 100)} of prompt tokens"),
        ("preemptions", number(shown.preemptions, digits=0)),
        ("GPU memory", memory),
        ("communication", f"{number(shown.communication_share, ' %', 100)} of a decode step of {step}, at the start"),
    ]


def bar(share: float | None) -> str:
    if share is None:
        return "-"
    full = round(min(max(share, 0.0), 1.0) * BAR_WIDTH)
    return f"{'█' * full}{'░' * (BAR_WIDTH - full)} {share:.1%}"


def sparkline(values: Sequence[float]) -> str:
    """The largest value is a full block."""
    most = max(values, default=0.0) or 1.0
    return "".join(BARS[min(len(BARS) - 1, int(value / most * (len(BARS) - 1)))] for value in values)


def _replica_table(replicas: Sequence[Replica]) -> Table:
    shown = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("replica", "", "running", "waiting", "KV cache"):
        shown.add_column(heading, justify="left" if heading in ("", "KV cache") else "right")
    for one in replicas:
        counts = ("-" if count is None else f"{count:.0f}" for count in (one.running, one.waiting))
        shown.add_row(one.name, "up" if one.up else "down", *counts, bar(one.kv_share))
    return shown
