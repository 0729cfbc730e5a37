"""The operations that a plan names: Triton's, plain torch, or plain torch with experts of our own on a CPU.

Chosen once, before weights are loaded: packed experts have the layout of whoever reads them.
"""

import importlib.util

from ..errors import UserError
from ..planning.plan import Plan
from . import PLAIN, Mixture, Operations


def operations(plan: Plan) -> tuple[Operations, tuple[str, ...]]:
    """The operations, and the slower ways among them that are taken in place of what the plan names, with the reason:
    only plain experts, where the CPU's own, which are as exact, cannot be compiled.

    Raises UserError where the plan's kernels cannot run here.
    """
    if plan.kernels == "plain":
        return PLAIN, ()
    if plan.kernels in ("cpu", "cpu-int8"):
        from .cpu_build import NoLibraryError
        from .cpu_products import cpu_operations

        try:
            return cpu_operations(int8=plan.kernels == "cpu-int8"), ()
        except NoLibraryError as error:
            if plan.kernels == "cpu-int8":
                raise UserError(f"experts with int8 activations cannot be compiled: {error}", "--kernels cpu") from None
            return PLAIN, (f"plain torch experts, some 100 times slower: {error}",)
    if importlib.util.find_spec("triton") is None:
        raise UserError(
            "the plan's kernels are Triton's, and Triton is not installed",
            "pip install triton in the version that this torch names, or --dtype fp32 for plain torch",
        )
    return triton_operations(), ()


def triton_operations() -> Operations:
    """bf16 on GPUs from sm_80 on; all of them can be captured in a CUDA graph."""
    from . import (
        triton_attention,
        triton_begin,
        triton_experts,
        triton_linear,
        triton_mxfp4,
        triton_norm,
        triton_qkv,
        triton_route,
        triton_sample,
    )

    return Operations(
        layout=triton_mxfp4.LAYOUT,
        upload=triton_begin.upload,
        locate=triton_begin.locate,
        embed=triton_begin.embed,
        linear=triton_linear.linear,
        add_norm=triton_norm.add_norm,
        norm_qkv_write=triton_qkv.norm_qkv_write,
        attend=triton_attention.attend,
        norm_route=triton_route.norm_route,
        experts=triton_experts.experts,
        sample=triton_sample.sample,
        sample_exact=triton_sample.sample_exact,
        mixture=Mixture(triton_route.norm_route, triton_experts.experts, triton_experts.norm_experts),
    )
