"""CUDA graphs of steps that decode: one for each size and kind of draw, captured when it is first needed.

A graph holds the whole step, the draw included where that needs nothing but the step's own numbers. Knows when a graph
fits a step; does not know what a step computes.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .record import Head

Outputs = tuple[Tensor, Tensor | None]
Key = tuple[int, bool, int, int]


class Graphs:
    """sizes: ascending. run: (head, whether to draw) -> tensors of the step; its inputs stand in static places."""

    def __init__(self, sizes: Sequence[int], run: Callable[[Head, bool], Outputs]) -> None:
        self._sizes = tuple(sizes)
        self._run = run
        self._graphs: dict[Key, tuple[torch.cuda.CUDAGraph, Outputs]] = {}
        self._memory: Any = None  # torch's handle of one pool for all: graphs of one stream never run together

    def size_for(self, decodes: int) -> int:
        """The smallest size that holds so many; 0 if none does."""
        return next((size for size in self._sizes if size >= decodes), 0)

    def has(self, head: Head) -> bool:
        return _key(head) in self._graphs

    def replay(self, head: Head) -> Outputs:
        graph, outputs = self._graphs[_key(head)]
        graph.replay()
        return outputs

    def rehearse(self, head: Head) -> None:
        """Launches what a graph would hold, with the inputs in place."""
        self._run(_plain(head), _key(head)[1])

    def capture(self, head: Head) -> None:
        """Runs the step once, then captures it. The inputs in place must be harmless."""
        key = _key(head)
        plain = _plain(head)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._run(plain, key[1])
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # thread_local: what other threads do, such as the one that watches NCCL, is no part of it
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            outputs = self._run(plain, key[1])
        self._memory = graph.pool()
        self._graphs[key] = graph, outputs


def _key(head: Head) -> Key:
    """A draw that changes logits first, or counts tokens, is made after the graph."""
    draws = not (head.adjusts or head.counts)
    return head.graph, draws, head.candidates if draws else 0, head.min_p if draws else 0


def _plain(head: Head) -> Head:
    """The head of a step of the same tokens and draws and nothing else."""
    none = dict.fromkeys(("changes", "resets", "biases", "chunks", "tiles", "masks"), 0)
    return dataclasses.replace(
        head, decodes=head.graph, exact=0, adjusts=0, repeats=0, counts=0, most_logprobs=-1, **none
    )
