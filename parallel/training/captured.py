"""All layers of a pack as two CUDA graphs, of the pass and of its gradients, which the host replays in two calls.

A layer is some hundred kernels, many of a few microseconds; to launch them one by one takes longer than to run them.
Graphs are of one shape: a pack is as long as the longest may be, and what it leaves over is a document of its own that
nothing is learnt from. Gradients are added up where they are. Knows nothing of the head or of losses.

T tokens of a pack, H hidden, X experts a token.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .forward import Inputs

Run = Callable[[Inputs], tuple[Tensor, Tensor]]  # as `forward`, recomputing layers for their gradient
WARM_PASSES = 2  # compilers run, libraries take their memory


class Captured:
    def __init__(
        self, run: Run, inputs: Inputs, tensors_of: Callable[[Any], list[Tensor]], leaves: Iterable[Tensor]
    ) -> None:
        """inputs: of a pack of the largest shape, whose tensors are kept and written to. tensors_of: of its masks.
        leaves: get gradients of zeros, if they have none, where those of all packs will be added up."""
        self._tensors = _tensors(inputs, tensors_of)
        self._tensors_of = tensors_of
        gradients = []
        for leaf in leaves:
            leaf.grad = torch.zeros_like(leaf)
            gradients.append(leaf.grad)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_PASSES):
                x_TH, _ = run(inputs)
                x_TH.backward(torch.zeros_like(x_TH))
                del x_TH
        torch.cuda.current_stream().wait_stream(stream)
        for gradient in gradients:
            gradient.zero_()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # a graph has memory of its own
        forth, back = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(forth, stream=stream):
            x_TH, experts_LTX = run(inputs)
        grad_TH = torch.zeros_like(x_TH)
        with torch.cuda.graph(back, pool=forth.pool(), stream=stream):
            x_TH.backward(grad_TH)
        self._forth, self._back = forth, back
        self._x_TH, self._experts_LTX, self._grad_TH = x_TH.detach(), experts_LTX, grad_TH
        self._anchor = torch.zeros((), device=grad_TH.device, requires_grad=True)

    def __call__(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """As `forward`. What it returns is written over by the next call."""
        x_TH: Any = _Replay.apply(self._anchor, self, inputs)
        return x_TH, self._experts_LTX[:, : len(inputs.tokens)]

    def play(self, inputs: Inputs) -> Tensor:
        for ours, new in zip(self._tensors, _tensors(inputs, self._tensors_of), strict=True):
            ours[: len(new)].copy_(new)  # what is left over stays as it was: it is nobody's
        self._forth.replay()
        return self._x_TH[: len(inputs.tokens)]

    def play_back(self, grad_TH: Tensor) -> None:
        self._grad_TH[: len(grad_TH)].copy_(grad_TH)
        self._grad_TH[len(grad_TH) :].zero_()
        self._back.replay()


def _tensors(inputs: Inputs, tensors_of: Callable[[Any], list[Tensor]]) -> list[Tensor]:
    masks = [tensor for mask in inputs.masks.values() for tensor in tensors_of(mask)]
    return [inputs.tokens, *inputs.turn, *masks]


class _Replay(torch.autograd.Function):
    """anchor: a tensor that wants a gradient, so that somebody asks for ours."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, captured: Captured, inputs: Inputs) -> Tensor:
        ctx.captured = captured
        return captured.play(inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        ctx.captured.play_back(grads[0])
        return None, None, None


@dataclass(frozen=True)
class Choice:
    """run: what will be used. why: a line for the log."""

    run: Run
    why: str


def choose(
    run: Run, inputs: Inputs, tensors_of: Callable[[Any], list[Tensor]] | None, leaves: Iterable[Tensor], allowed: bool
) -> Choice:
    """allowed: whether weights and gradients are where they are for the whole run."""
    if not allowed or tensors_of is None:
        return Choice(run, "passes: launched kernel by kernel")
    try:
        return Choice(Captured(run, inputs, tensors_of, leaves), "passes: two CUDA graphs")
    except RuntimeError as error:
        torch.cuda.synchronize()
        reason = " ".join(str(error).split())[:200]
        return Choice(run, f"passes: launched kernel by kernel; a CUDA graph fails here: {reason}")
