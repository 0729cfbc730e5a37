"""What a rank's memory really went into, by the names of the plan, and how long a step takes.

Works on steps of the scratch row, which no request uses. On CUDA memory is read from the books of torch's own
allocator; on the CPU torch keeps none, and no memory is reported.
"""

import os
import time
from collections.abc import Callable, Sequence

import torch

from .engine import Engine
from .record import PLAIN, Padding, Record, encode, only_padding, scratch_item
from .request import Sampling
from .schedule import Step

REPEATS = 5
COMPILE_THREADS = 16  # of some 45 kernels a few take as long as the others together
EVERYTHING = Sampling(top_p=0.9, min_p=0.01, presence=0.1)  # what takes the most memory to draw


class Meter:
    """Bytes that stay in use since the mark before, each under a name."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._parts: dict[str, int] = {}

    def mark(self, name: str) -> None:
        """What the allocator holds now and did not before, the gaps between tensors that it cannot give back included;
        what was only passing is given back, and no peak of later."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
            self._parts[name] = torch.cuda.memory_reserved(self._device) - sum(self._parts.values())

    def note(self, name: str, size_bytes: int) -> None:
        self._parts[name] = size_bytes

    def outside_bytes(self) -> int:
        """What is used on the device, by this process or others, and is not the allocator's."""
        if self._device.type != "cuda":
            return 0
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free - torch.cuda.memory_reserved(self._device)

    def finish(self, communication_bytes: int, capture: Callable[[], None]) -> dict[str, int]:
        """The marked parts, and four more: workspace_bytes, what the allocator holds besides them at its peak;
        graphs_bytes, what `capture` takes; communication_bytes, as it was found; and context_bytes, what else is used
        outside of the allocator: CUDA's context, loaded kernels, other processes.
        """
        if self._device.type != "cuda":
            return {}
        workspace_bytes = torch.cuda.max_memory_reserved(self._device) - sum(self._parts.values())
        context_bytes = self.outside_bytes() - communication_bytes
        torch.cuda.empty_cache()  # a capture does so too, and what it gives back is not what graphs take
        free_bytes, _ = torch.cuda.mem_get_info(self._device)
        capture()
        return self._parts | {
            "workspace_bytes": workspace_bytes,
            "graphs_bytes": free_bytes - torch.cuda.mem_get_info(self._device)[0],
            "communication_bytes": communication_bytes,
            "context_bytes": context_bytes,
        }


def scratch_step(
    engine: Engine, tokens: int, sequences: int, sampling: Sampling = PLAIN, *, exact: bool = False
) -> Record:
    """A step of `sequences` sequences with so many tokens each, at the end of the longest context: it takes the time
    and memory of a real one, and leaves nothing behind but in the scratch row."""
    item = scratch_item(engine.sizes, tokens, engine.plan.context_tokens - tokens, sampling, draws=True)
    step = Step((item,) * sequences, sequences if tokens == 1 else 0, exact, (), ())
    return encode(step, 0, engine.sizes)


def decode_step(engine: Engine, size: int) -> Record:
    """A step of `size` decodes as a graph runs it, where graphs are used."""
    padding = engine.graphs.of_decodes(size)
    return only_padding(0, engine.sizes, padding) if padding.tokens == size else scratch_step(engine, 1, size)


def compile_ahead(engine: Engine, graphs: Sequence[Padding]) -> None:
    """The kernels of `warm_up` and of these graphs: where Triton's cache holds none yet, steps would compile them one
    after the other."""
    from ..kernels.triton_launch import compiled_together

    prompt, *draws = _largest_steps(engine)
    with compiled_together(min(COMPILE_THREADS, os.cpu_count() or 1)):
        # the kernels that take the longest are those of many decodes in a graph
        for record in (prompt, *(only_padding(0, engine.sizes, padding) for padding in reversed(graphs)), *draws):
            engine.rehearse(record)


def warm_up(engine: Engine) -> None:
    """On a GPU the largest steps, so that kernels are loaded and the peak is seen and taken, before anybody else takes
    it; on the CPU a token."""
    on_cpu = engine.plan.device == "cpu"
    for record in (scratch_step(engine, 1, 1),) if on_cpu else _largest_steps(engine):
        engine.launch(record).results(1)


def _largest_steps(engine: Engine) -> tuple[Record, ...]:
    """A prompt's, and decodes that draw with everything, both ways."""
    plan = engine.plan
    most = min(plan.sequences, plan.step_tokens)
    return (
        scratch_step(engine, plan.step_tokens, 1),
        *(scratch_step(engine, 1, most, EVERYTHING, exact=exact) for exact in (False, True)),
    )


def capture(engine: Engine, graphs: Sequence[Padding]) -> None:
    """CUDA graphs that are needed first; others are captured when they are, or while the leader has nothing to do."""
    for padding in graphs:
        engine.launch(only_padding(0, engine.sizes, padding)).results(0)


def step_times(engine: Engine) -> dict[str, float]:
    """Seconds of a decode step of one token, and of its all-reduces alone: what communication can cost at most.

    Every rank of the replica calls it.
    """
    spec, record = engine.plan.spec, decode_step(engine, 1)
    times = {"decode_step_s": _fastest(lambda: engine.launch(record).results(1), engine.device)}
    if engine.plan.ranks == 1:
        return times
    message_TH = torch.zeros((1, spec.hidden), dtype=engine.weights.embed_VH.dtype, device=engine.device)

    def all_reduces() -> None:
        for _ in range(2 * spec.layers + 1):  # two a layer, and the embedding's
            engine.comm.all_reduce(message_TH)

    if engine.graphs.of_decodes(1).tokens:
        all_reduces = in_graph(all_reduces)
    return times | {"communication_s": _fastest(all_reduces, engine.device)}


def in_graph(work: Callable[[], object]) -> Callable[[], None]:
    """`work` as the steps of decodes run it, on a GPU."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    return graph.replay


def _fastest(work: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(REPEATS):
        began_s = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began_s)
    return min(times)
