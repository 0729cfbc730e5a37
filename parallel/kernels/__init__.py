"""The operations that the model is made of: a frozen group, chosen once from the plan and passed on.

Each has the size at which a GPU wants it fused. One file an idea: the mathematics first as complete plain torch, a fast
version after it with the same signature. Knows shapes and dtypes, and that ranks may hold parts of a product; knows
nothing of how they are linked, of checkpoints or requests.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from . import attention, begin, experts, linear, norm, sample


class Unsummed(Protocol):
    """A half-layer's result that `add_norm` and `norm_qkv_write` of the same operations sum up themselves."""

    def summed(self) -> Tensor: ...


@dataclass(frozen=True)
class Mixture:
    """`norm_route` and `experts` in one, which stands for these two alone: where one of them has been replaced, so that
    somebody sees routes or has experts elsewhere, it is not used. run: the arguments of `Operations.norm_experts`."""

    norm_route: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    experts: Callable[..., Tensor]
    run: Callable[..., tuple[Tensor, Tensor | Unsummed]]


@dataclass(frozen=True)
class Operations:
    """Signatures and meaning are those of the plain versions in this folder. `linear` and `experts` take the ranks that
    hold the other parts of a product, if they are to sum it up (`sums`). layout: of the packed weights that
    `experts` reads, which are brought into it while they are loaded."""

    layout: experts.Layout
    upload: Callable[[Tensor, Tensor], None]
    locate: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    embed: Callable[..., tuple[Tensor, tuple[Tensor, Tensor]]]
    linear: Callable[..., Tensor]
    add_norm: Callable[..., tuple[Tensor, Tensor]]
    norm_qkv_write: Callable[..., tuple[Tensor, Tensor]]
    attend: Callable[..., Tensor]
    norm_route: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    experts: Callable[..., Tensor]
    sample: Callable[..., sample.Drawn]
    sample_exact: Callable[..., Tensor]
    mixture: Mixture | None = None

    def norm_experts(
        self,
        residual_TH: Tensor,
        delta_TH: Tensor,
        norm_H: Tensor,
        eps: float,
        dtype: torch.dtype,
        router_EH: Tensor,
        router_bias_E: Tensor,
        experts_per_token: int,
        *mixed: Any,
    ) -> tuple[Tensor, Tensor | Unsummed]:
        """(residual_TH, sum_TH): `norm_route`, and of what it gives `experts`. mixed: what that takes after routes. The
        sum is for the next `add_norm` or `norm_qkv_write`, which may be the one to make it."""
        before = residual_TH, delta_TH, norm_H, eps, dtype, router_EH, router_bias_E, experts_per_token
        one = self.mixture
        if one is not None and (one.norm_route, one.experts) == (self.norm_route, self.experts):
            return one.run(*before, *mixed)
        residual_TH, x_TH, *routes = self.norm_route(*before)
        return residual_TH, self.experts(x_TH, *routes, *mixed)


PLAIN = Operations(
    layout=experts.LAYOUT,
    upload=begin.upload,
    locate=begin.locate,
    embed=begin.embed,
    linear=linear.linear,
    add_norm=norm.add_norm,
    norm_qkv_write=attention.norm_qkv_write,
    attend=attention.attend,
    norm_route=experts.norm_route,
    experts=experts.experts,
    sample=sample.sample,
    sample_exact=sample.sample_exact,
)
