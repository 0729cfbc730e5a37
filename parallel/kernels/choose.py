"""Which operations a rank uses, from its plan: Triton's where they run, plain torch elsewhere, and why.

Decided once, before weights are loaded: packed experts have the layout of whoever reads them.
"""

import importlib.util
from dataclasses import dataclass

from ..planning.plan import Plan
from . import PLAIN, Operations


@dataclass(frozen=True)
class Chosen:
    """slow: each slower way that is taken, with the reason; graphs: whether a step of decodes can be captured."""

    ops: Operations
    slow: tuple[str, ...]
    graphs: bool


def operations(plan: Plan) -> Chosen:
    """Triton's kernels are for bf16 on CUDA. Raises nothing: what cannot run is named in `slow`."""
    reason = why_plain(plan)
    if reason is not None:
        return Chosen(PLAIN, () if plan.device == "cpu" else (f"plain torch, no Triton kernels: {reason}",), False)
    return Chosen(fast(), (), True)


def why_plain(plan: Plan) -> str | None:
    if plan.device == "cpu":
        return "they are made for GPUs"
    if plan.dtype != "bf16":
        return f"they compute in bf16, and the plan in {plan.dtype}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return None


def fast() -> Operations:
    from . import (
        triton_attention,
        triton_experts,
        triton_linear,
        triton_mxfp4,
        triton_norm,
        triton_qkv,
        triton_route,
        triton_sample,
    )

    return Operations(
        pack=triton_mxfp4.pack,
        linear=triton_linear.linear,
        add_norm=triton_norm.add_norm,
        qkv_write=triton_qkv.qkv_write,
        attend=triton_attention.attend,
        route=triton_route.route,
        experts=triton_experts.experts,
        sample=triton_sample.sample,
        sample_exact=triton_sample.sample_exact,
    )
