"""From a plan to an engine that is loaded, warm and measured, on one rank."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from ..errors import UserError, lacks_host_memory
from ..kernels.choose import operations
from ..model.calibrate import connect
from ..model.checkpoint import load
from ..model.comm import Alone, Comm, Marked, Sums
from ..offload.counts import Counts
from ..offload.experts import Computed, Copied, loaded, offloaded
from ..offload.mapped import mapped
from ..planning.headers import check_inventory, read_inventory
from ..planning.plan import Plan
from . import rest
from .engine import Engine
from .laps import Laps
from .lockstep import Ring, Steps
from .lockstep_network import Broadcasts
from .measure import Meter, capture, compile_ahead, step_times, warm_up
from .routes import Recorder, checked
from .trace import Trace
from .wire import Ready

DECODE_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # of CUDA graphs
UNPADDED_SIZES = tuple(range(1, 9))  # where padding would bring experts that nobody needs; each graph takes memory
CAPTURED_AT_START = (1, 2, 4, 8, 16, 32)
LEAST_CHUNK_TOKENS = 16  # of a graph of a step with chunks, decodes among them; there are four up to the double


def decode_sizes(sequences: int, offloaded: bool = False) -> tuple[int, ...]:
    """Of graphs of decodes, for a plan of so many sequences: no step has more, and none is padded to more."""
    sizes = {*DECODE_SIZES, *(UNPADDED_SIZES if offloaded else ())}
    return tuple(sorted({*(size for size in sizes if size < sequences), min(sequences, DECODE_SIZES[-1])}))


def chunk_sizes(step_tokens: int, offloaded: bool = False) -> tuple[int, ...]:
    """Of graphs of steps with chunks: each step fits into one, and none is padded by more than a quarter. Where experts
    are offloaded there are none: to copy them takes longer than all launches, and padding would want some."""
    if offloaded:
        return ()
    doubled = range(step_tokens.bit_length())
    sizes = (LEAST_CHUNK_TOKENS * quarters // 4 << times for times in doubled for quarters in range(4, 8))
    return (*(size for size in sizes if size < step_tokens), step_tokens)


@dataclass(frozen=True)
class Options:
    """What changes how a rank is watched, but not what it computes."""

    check_ranks: bool = False
    record_routing: Path | None = None

    @property
    def watched(self) -> bool:
        return self.check_ranks or self.record_routing is not None


def join(plan: Plan) -> None:
    """Make the process group of the replica, from the addresses that torchrun put into the environment."""
    if plan.ranks > 1:
        dist.init_process_group("gloo" if plan.device == "cpu" else "cpu:gloo,cuda:nccl")


def join_in_step(plan: Plan, rank: int, options: Options, file: Path, words: int) -> Steps | None:
    """Joins, and how the leader tells the other ranks what to do, in records of at most so many words; None for a rank
    that is alone.

    file: that all ranks of a node share. Raises UserError where another node was started with other flags.
    """
    ring = Ring(file, words, create=True) if plan.ranks > 1 and plan.span == 1 and rank == 0 else None
    join(plan)  # nobody comes out of it before the leader has come in
    if plan.ranks == 1:
        return None
    if plan.span == 1:
        return ring or Ring(file, words, create=False)
    everyone: list[bool] = [False] * plan.ranks
    dist.all_gather_object(everyone, options.watched)
    if any(watched != everyone[0] for watched in everyone):
        raise UserError("--check-ranks or --record-routing on some nodes only", "the same command on every node")
    return Broadcasts(words)


def start(
    plan: Plan,
    rank: int,
    options: Options,
    trace: Trace,
    progress: Callable[[int, int], None],
    laps: Laps | None = None,
) -> tuple[Engine, Recorder | None, Ready]:
    """The engine of `rank`; the recorder if one is wanted; and what it all took, for the supervisor.

    A replica of several ranks has joined (`join`) before. laps: of what the process did before.
    """
    laps = laps or Laps()
    assert plan.checkpoint is not None
    device = torch.device(plan.device)
    if plan.device == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    folder = Path(plan.checkpoint)
    inventory = read_inventory(folder)
    check_inventory(plan.spec, inventory, folder, quantizes=True)
    meter = Meter(device)
    read_bytes = 0

    def count(done_bytes: int, total_bytes: int) -> None:
        nonlocal read_bytes
        read_bytes = done_bytes
        progress(done_bytes, total_bytes)

    (ops, slow_ways), recorder = operations(plan), None
    experts_on, offload_counts, slow_offload = "device", Counts(), list[str]()
    if plan.offload != "none":
        experts_on = plan.offload.taken.kept
        if plan.offload.taken.device == "cuda":  # on the CPU only the place of the experts is another
            ops, offload_counts, slow_offload = offloaded(plan.offload, ops, device)
    laps.mark("kernels")
    files = mapped(entry.path for entry in inventory.values()) if experts_on == "file" else None
    try:
        weights = load(plan, rank, inventory, device, count, ops.layout, experts_on, plan.kept)
    except (MemoryError, OSError, RuntimeError) as error:
        if not lacks_host_memory(error):
            raise
        raise UserError(
            f"no host memory is left after {read_bytes} bytes of the checkpoint were read",
            "end what else uses it; --host-memory SIZE, less than was found, leaves experts in the file",
        ) from None
    ops, experts_now = loaded(ops, weights.layers, offload_counts, plan.kernels == "triton")
    waits = isinstance(ops.experts, Copied | Computed)
    slow_paths = [*slow_offload, *slow_ways]
    if waits:
        slow_paths.append(
            "no CUDA graphs: not all experts are on the GPU, and in each layer the host waits to be told which"
        )
    notes = () if files is None else files.watch()
    meter.mark("weights_bytes")
    laps.mark("weights")
    outside_bytes = meter.outside_bytes()
    comm: Comm = Alone()
    if plan.ranks > 1:
        linked, slow_links = connect(plan, device)
        comm = Marked(linked, trace)
        slow_paths += slow_links
    communication_bytes = meter.outside_bytes() - outside_bytes
    laps.mark("links")
    if plan.device == "cuda" and plan.kernels == "plain":
        slow_paths.append(f"plain torch without CUDA graphs: Triton's kernels are for bf16, not for {plan.dtype}")
    if options.check_ranks:
        slow_paths.append("no CUDA graphs: --check-ranks compares in the middle of steps")
        comm = Sums(comm)
        ops = checked(ops, comm, plan.spec.layers)
    if options.record_routing is not None:
        slow_paths.append("no CUDA graphs: --record-routing would count their padding")
        if rank == 0:
            recorder = Recorder(options.record_routing, plan, device)
            ops = recorder.counted(ops)
    in_graphs = plan.kernels == "triton" and not waits and not options.watched
    elsewhere = plan.offload != "none"
    sizes = decode_sizes(plan.sequences, elsewhere), chunk_sizes(plan.step_tokens, elsewhere)
    engine = Engine(plan, rank, weights, ops, comm, sizes if in_graphs else ((), ()), experts_now, files)
    meter.note("kv_bytes", engine.kv_LPCSKD.nbytes)
    first = [one for size in CAPTURED_AT_START if (one := engine.graphs.of_decodes(size)).tokens == size]
    if (largest := engine.graphs.of_chunks(plan.step_tokens, 1)).tokens:
        first.append(largest)
    if first:
        try:
            compile_ahead(engine, [*first, *engine.graphs.chunks[:-1:4]])  # each twice the one before
        except Exception as error:  # of a compiler, say: the steps below take the same way, and need it
            slow_paths.append(f"kernels compiled one after the other: {type(error).__name__}: {error}")
        laps.mark("compiling")
    warm_up(engine)
    laps.mark("first steps")
    notes += () if plan.rest == "bf16" else (rest.checked(engine, rank, inventory),)
    memory = meter.finish(communication_bytes, lambda: capture(engine, first)) | {"read_bytes": read_bytes}
    laps.mark("graphs" if plan.rest == "bf16" else "comparison and graphs")
    times = step_times(engine)
    laps.mark("timing")
    if recorder is not None:
        recorder.reset()
    return (
        engine,
        recorder,
        Ready(rank, plan.digest, memory, times, laps.total_s, tuple(slow_paths), notes, laps.parts_s),
    )
