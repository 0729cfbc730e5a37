"""CUDA graphs of steps, each captured when it is first needed, or before, by a step of padding alone.

A graph of decodes, one for each size and kind of draw, holds the whole step, the draw included where that needs nothing
but the step's own numbers. One of chunks, with decodes or without, ends with hidden states: how many tokens are drawn
has nothing to do with its size. Knows when a graph fits a step; does not know what a step computes.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.batch import most_tiles
from .record import Head, Padding
from .schedule import Step

CHUNK_TOKENS = 8  # of a chunk, at least, on average: a graph has room for so many, the largest for any

Outputs = tuple[Tensor, Tensor | None]
Key = tuple[int, int, bool, int, int]


class Graphs:
    """decodes, chunks: sizes in tokens, ascending, none over the context. rows: sequences that may run. run: (head,
    whether to draw) -> tensors of the step; its inputs stand in static places."""

    def __init__(
        self, decodes: Sequence[int], chunks: Sequence[int], rows: int, run: Callable[[Head, bool], Outputs]
    ) -> None:
        every = rows + 1  # the scratch row's
        self._decodes = tuple(Padding(size) for size in decodes)
        self.chunks = tuple(
            Padding(size, most_tiles(size, every if size == chunks[-1] else min(every, size // CHUNK_TOKENS)))
            for size in chunks
        )
        self._run = run
        self._graphs: dict[Key, tuple[torch.cuda.CUDAGraph, Outputs]] = {}
        self._memory: Any = None  # torch's handle of one pool for all: graphs of one stream never run together
        self._stream: torch.cuda.Stream | None = None  # of all captures: cuBLAS keeps 33 MiB for each that it has seen

    def of_decodes(self, decodes: int) -> Padding:
        """The smallest that holds so many; nothing if none does."""
        return next((one for one in self._decodes if one.tokens >= decodes), Padding())

    def of_chunks(self, tokens: int, chunks: int) -> Padding:
        """The smallest that holds so many tokens, decodes among them, and chunks."""
        for one in self.chunks:
            padded = one.tokens > tokens
            if one.tokens >= tokens and one.tiles >= most_tiles(one.tokens, chunks + padded):
                return one
        return Padding()

    def of(self, step: Step) -> Padding:
        chunks = len(step.items) - step.decodes
        return self.of_chunks(step.tokens, chunks) if chunks else self.of_decodes(step.decodes)

    def has(self, head: Head) -> bool:
        return _key(head) in self._graphs

    def replay(self, head: Head) -> Outputs:
        graph, outputs = self._graphs[_key(head)]
        graph.replay()
        return outputs

    def rehearse(self, head: Head) -> None:
        """Launches what a graph would hold, with the inputs in place."""
        self._run(_plain(head), _key(head)[2])

    def capture(self, head: Head) -> None:
        """Runs the step once, then captures it. The inputs in place must be harmless."""
        key = _key(head)
        plain, draw = _plain(head), key[2]
        stream = self._stream = self._stream or torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._run(plain, draw)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # thread_local: what other threads do, such as the one that watches NCCL, is no part of it
        with torch.cuda.graph(graph, pool=self._memory, stream=stream, capture_error_mode="thread_local"):
            outputs = self._run(plain, draw)
        self._memory = graph.pool()
        self._graphs[key] = graph, outputs


def _key(head: Head) -> Key:
    """A draw that changes logits first, or counts tokens, is made after the graph; so is any of a step with chunks."""
    draws = not (head.tiles or head.adjusts or head.counts)
    return head.graph, head.tiles, draws, head.candidates if draws else 0, head.min_p if draws else 0


def _plain(head: Head) -> Head:
    """The head of a step of the same tokens, tiles and draws and nothing else: of as many decodes as there can be."""
    none = dict.fromkeys(("changes", "resets", "biases", "chunks", "masks"), 0)
    return dataclasses.replace(
        head, decodes=head.graph, exact=0, adjusts=0, repeats=0, counts=0, most_logprobs=-1, **none
    )
