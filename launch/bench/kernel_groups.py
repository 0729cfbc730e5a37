"""Which part of a step a kernel belongs to, by its name: the profiler's many lines as a few that one can read.

The first pattern that is found in the name counts. A test holds the table to the names of our own kernels; the others
are those of cuBLAS, NCCL and torch. What is in no group is "other". A kernel that several parts use stands under what
it does ("products": q,k,v, out and head; their names do not tell them apart).
"""

import re
from collections.abc import Mapping

GROUPS: tuple[tuple[str, str], ...] = (
    ("all-reduce", r"nccl|all_?reduce|allreduce|one_shot|two_shot|all_?gather|symm_mem|c10d::|gloo"),
    (
        "experts",
        r"^_gate_up|^_down|^_finish|^_dequantize|^_grouped|^_sort$|^_sort_|^_reorder|^_sum$|^_expert|swiglu|fp4|_moe_",
    ),
    ("experts from the host", r"^_replace$|^_list_wanted$|^_copy$"),
    ("attention", r"^_attend|^_decode|^_join|^_merge|flash|scaled_dot_product|softmax"),
    ("rope and KV write", r"^_rotate_and_write|rope|rotary"),
    ("router", r"^_route|^_norm_route|topk|TopK"),
    ("norm and residual", r"^_add_norm|^_sum_add_norm|rms_?norm|RMSNorm"),
    ("begin", r"^_upload$|^_locate|^_embed$"),
    ("sampling", r"^_race|^_first$|^_keep$|^_log_times|multinomial|argmax|ArgMax|cumsum|exponential|sample"),
    (
        "products",
        r"^_one$|^_few$|^_norm_qkv_one|^_qkv_few|nvjet|gemm|gemv|cutlass|cublas|aten::(mm|addmm|bmm|matmul|linear)|splitK",
    ),
    (
        "training",
        r"^_(fill|gather|gather_back|invert|norm_backward|round|settle|sink|sink_backward|slopes|turn|turn_back|weigh)$",
    ),
    ("copies and fills", r"Memcpy|Memset|aten::(copy_|fill_|zero_|_to_copy|cat|clone)|CopyFunctor|FillFunctor"),
    ("gather and scatter", r"index|gather|scatter|embedding"),
    ("elementwise", r"elementwise|aten::(add|mul|sub|div|where|neg|exp|sigmoid|clamp|pow|rsqrt|bitwise|eq|lt|le|ge)"),
)
OTHER = "other"


def group_of(name: str) -> str:
    """The group of the kernel that the profiler calls `name`."""
    return next((group for group, pattern in GROUPS if re.search(pattern, name)), OTHER)


def by_group(microseconds: Mapping[str, float]) -> dict[str, float]:
    """Microseconds of a step by kernel -> by group, the largest first."""
    sums: dict[str, float] = {}
    for name, spent in microseconds.items():
        sums[group_of(name)] = sums.get(group_of(name), 0.0) + spent
    return dict(sorted(sums.items(), key=lambda item: -item[1]))
