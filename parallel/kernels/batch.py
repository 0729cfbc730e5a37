"""One step's work as the operations see it: which tokens, of which sequences, in which pages.

Host numbers are plain ints, so that no operation has to ask the device for them.
"""

from dataclasses import dataclass

from torch import Tensor

from ..planning.spec import LayerKind


@dataclass(frozen=True)
class PageView:
    """Where one kind of layer keeps its keys and values.

    table: [sequences, pages] int64; entry i holds positions i * page_tokens and on. Window layers have dropped the
    pages that no later token can see: those entries are never read. slots_T: page * page_tokens + offset of each
    token of the step. window_tokens: how many tokens a query sees, itself included; None: all.
    """

    table: Tensor
    slots_T: Tensor
    window_tokens: int | None


@dataclass(frozen=True)
class Batch:
    """T tokens of some sequences, one sequence after the other.

    spans: (start, stop, length) a sequence: its rows in the step, and its tokens in the cache when the step is done.
    wanted_S: rows of the step whose logits are wanted, int64; S of them.
    """

    tokens_T: Tensor
    positions_T: Tensor
    spans: tuple[tuple[int, int, int], ...]
    pages: dict[LayerKind, PageView]
    wanted_S: Tensor
