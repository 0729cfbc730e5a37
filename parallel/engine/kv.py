"""Pages of the KV cache: who holds which, in two tables a sequence.

Full layers keep every page of a sequence; window layers give a page back once no later token can see it. Knows page
numbers only; the tensors are the engine's.
"""

from dataclasses import dataclass, field

import torch

from ..kernels.batch import PageView
from ..planning.spec import LayerKind, Spec

DROPPED = (
    -1
)  # a window page that was given back; its entry stays, so that entry i is always positions i * page_tokens on


@dataclass
class Pool:
    """Pages that nobody holds. Each page is in this list or in exactly one table."""

    free: list[int]

    @staticmethod
    def of(pages: int) -> "Pool":
        return Pool(list(range(pages - 1, -1, -1)))


@dataclass
class Sequence:
    """The tokens of one request that are in the cache, and their pages."""

    length: int = 0
    tables: dict[LayerKind, list[int]] = field(default_factory=lambda: {"window": [], "full": []})


def extend(pool: Pool, sequence: Sequence, tokens: int, spec: Spec, page_tokens: int) -> None:
    """Make room for `tokens` more. The caller has made sure that the pool has as many pages as that takes."""
    sequence.length += tokens
    for kind, table in sequence.tables.items():
        if spec.layers_of(kind):
            while len(table) * page_tokens < sequence.length:
                table.append(pool.free.pop())


def drop_passed(pool: Pool, sequence: Sequence, spec: Spec, page_tokens: int) -> None:
    """Give back window pages that end before what the next token sees, which is itself and window - 1 before it."""
    table = sequence.tables["window"]
    first_seen = sequence.length - spec.window_tokens + 1
    for index in range(min(len(table), max(0, first_seen) // page_tokens) - 1, -1, -1):
        if table[index] == DROPPED:
            break
        pool.free.append(table[index])
        table[index] = DROPPED


def release(pool: Pool, sequence: Sequence) -> None:
    """Give everything back."""
    for table in sequence.tables.values():
        pool.free.extend(page for page in table if page != DROPPED)
        table.clear()
    sequence.length = 0


def page_views(
    sequence: Sequence, tokens: int, spec: Spec, page_tokens: int, device: torch.device
) -> dict[LayerKind, PageView]:
    """Tables and slots of the sequence's last `tokens` tokens, for the forward pass."""
    positions_T = torch.arange(sequence.length - tokens, sequence.length)
    views: dict[LayerKind, PageView] = {}
    for kind, pages in sequence.tables.items():
        if not spec.layers_of(kind):
            continue
        table = torch.tensor([pages], dtype=torch.int64)
        slots_T = table[0, positions_T // page_tokens] * page_tokens + positions_T % page_tokens
        window_tokens = spec.window_tokens if kind == "window" else None
        views[kind] = PageView(table.int().to(device), slots_T.to(device), window_tokens)
    return views
