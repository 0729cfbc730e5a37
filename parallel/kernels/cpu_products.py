"""Products on a CPU by our C++, called by ctypes: the mixture of experts, with the signature and meaning of
`experts.experts`, and `linear.linear` for matrices that are kept in bf16 while fp32 is computed in, or in int8.

Weights stay as the checkpoint has them, so experts may as well be a view into its mapped file. All arithmetic is fp32
on the decoded values, whatever the dtype of the activations, and rounded once at the end; nothing depends on the number
of threads or on what else is in the step. With int8, the experts' activations are rounded to 8 bits, a scale a block of
32, before each of the two products: faster where the memory outruns the arithmetic, and no longer exact.
"""

import ctypes
import dataclasses
import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from . import PLAIN, Operations, attention, cpu_build, linear, sums
from . import experts as plain
from .weight_only import Narrow, Weight, narrowed

SOURCE = Path(__file__).with_suffix(".cpp")
CHECKED_ERROR = 1e-5  # of the largest value: fp32 sums in another order; measured 3e-7
CHECKED_ERROR_INT8 = 3e-2  # activations of 8 bits; measured 5e-3

_POINTER, _INT64 = ctypes.c_void_p, ctypes.c_int64
_EXPERTS = (
    *(_POINTER, _POINTER, _POINTER, _POINTER),  # pool, x, weights, chosen
    *(_INT64, _INT64, _INT64, _INT64, _INT64, _INT64, ctypes.c_float),  # T, X, H, I, E, first_expert, limit
    *(_POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER),  # blocks, scales, bias, twice
    *(ctypes.c_int, ctypes.c_int, _POINTER),  # bias_is_bf16, int8, out
)
_LINEAR = (
    *(_POINTER, _POINTER, _INT64, _POINTER, _INT64, _INT64),  # pool, x, T, matrix, its shape
    *(_POINTER, _POINTER, _POINTER),  # scales, bias, out
)
_READ = (torch.bfloat16, torch.int8)
BLOCK_COLUMNS = 32  # which a matrix has a whole number of


def thread_count() -> int:
    """As many as torch uses, but never more than this process has CPUs."""
    return max(1, min(torch.get_num_threads(), len(_cpus())))


def _cpus() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


class Threads:
    """A loaded library and the threads that it computes on: pinned to a CPU each where all of this process's CPUs are
    used, left to the system where other ranks may want some of them."""

    def __init__(self, library: ctypes.CDLL, count: int) -> None:
        self.library, self.count = library, count
        library.pool_new.restype, library.pool_new.argtypes = _POINTER, (ctypes.c_int, _POINTER)
        library.pool_delete.restype, library.pool_delete.argtypes = None, (_POINTER,)
        library.experts.restype, library.experts.argtypes = None, _EXPERTS
        library.linear.restype, library.linear.argtypes = None, _LINEAR
        library.read_all.restype, library.read_all.argtypes = ctypes.c_uint64, (_POINTER, _POINTER, _INT64)
        cpus = _cpus()
        places = (ctypes.c_int * count)(*cpus) if count == len(cpus) else None
        self.pool = library.pool_new(count, places)

    def __del__(self) -> None:
        if hasattr(self, "pool"):
            self.library.pool_delete(self.pool)

    def read(self, memory: Tensor) -> None:
        """Reads every byte: for measuring what the memory gives."""
        self.library.read_all(self.pool, memory.data_ptr(), memory.nbytes)


@dataclass(frozen=True)
class CpuExperts:
    """`experts.experts`, on `threads`."""

    threads: Threads = field(repr=False)
    int8: bool = False

    def __call__(
        self,
        x_TH: Tensor,
        weights_TX: Tensor,
        experts_TX: Tensor,
        gate_up: plain.Packed,
        down: plain.Packed,
        first_expert: int,
        limit: float,
        ranks: sums.Ranks | None = None,
    ) -> Tensor:
        x, weights, chosen = x_TH.float().contiguous(), weights_TX.float().contiguous(), experts_TX.contiguous()
        out_TH = torch.empty_like(x)
        held, hidden, blocks, _ = down.blocks.shape
        weights_are_plain = all(part.is_contiguous() for packed in (gate_up, down) for part in _parts(packed))
        bias_dtypes = {gate_up.bias.dtype, down.bias.dtype}
        assert weights_are_plain and bias_dtypes in ({torch.float32}, {torch.bfloat16}), bias_dtypes
        assert chosen.dtype == torch.int64 and x.shape[1] == hidden
        self.threads.library.experts(
            self.threads.pool,
            *(x.data_ptr(), weights.data_ptr(), chosen.data_ptr()),
            *(len(x), chosen.shape[1], hidden, blocks * 32, held, first_expert, limit),
            *(part.data_ptr() for packed in (gate_up, down) for part in _parts(packed)),
            *(int(bias_dtypes == {torch.bfloat16}), int(self.int8), out_TH.data_ptr()),
        )
        return sums.over(ranks, out_TH.to(x_TH.dtype))


@dataclass(frozen=True)
class CpuLinear:
    """`linear.linear`, on `threads`."""

    threads: Threads = field(repr=False)

    def __call__(
        self, x_TI: Tensor, weight_OI: Weight, bias_O: Tensor | None = None, ranks: sums.Ranks | None = None
    ) -> Tensor:
        narrow = isinstance(weight_OI, Narrow)
        if not narrow or weight_OI.codes_OI.dtype not in _READ or weight_OI.shape[1] % BLOCK_COLUMNS:
            return linear.linear(x_TI, weight_OI, bias_O, ranks)
        codes_OI, x = weight_OI.codes_OI, x_TI.float().contiguous()
        bias = None if bias_O is None else bias_O.float().contiguous()
        scale = weight_OI.scale_O.contiguous() if codes_OI.dtype == torch.int8 else None
        assert codes_OI.is_contiguous() and x.shape[1] == codes_OI.shape[1]
        out_TO = torch.empty((len(x), len(codes_OI)))
        self.threads.library.linear(
            *(self.threads.pool, x.data_ptr(), len(x), codes_OI.data_ptr(), *codes_OI.shape),
            *(None if one is None else one.data_ptr() for one in (scale, bias, out_TO)),
        )
        return sums.over(ranks, out_TO.to(x_TI.dtype))


def _parts(packed: plain.Packed) -> tuple[Tensor, Tensor, Tensor]:
    return packed.blocks, packed.scales, packed.bias


def _pack(blocks: Tensor, scales: Tensor, bias: Tensor) -> plain.Packed:
    return plain.Packed(blocks, scales, bias.to(_bias_dtype(bias.dtype)))


def _room(shape: plain.Shape, dtype: torch.dtype, device: torch.device) -> plain.Packed:
    return plain.room(shape, _bias_dtype(dtype), device)


def _bias_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float16 else dtype


LAYOUT = plain.Layout(_pack, _room, plain.put)  # the checkpoint's own; a bias of fp16 is read as fp32


def cpu_operations(int8: bool = False, **build: Any) -> Operations:
    """Plain torch but for experts and products with matrices in bf16 or int8. build: arguments of `cpu_build.library`.

    Raises NoLibraryError where nothing can be compiled, and UserError where what was compiled computes something else.
    """
    level = cpu_build.level_for(cpu_build.cpu_flags())
    threads = Threads(cpu_build.library(SOURCE, level, **build), thread_count())
    if int8 and not threads.library.has_int8():
        raise UserError("experts with int8 activations need a CPU with AVX2", "leave out --kernels cpu-int8")
    run, product = CpuExperts(threads, int8), CpuLinear(threads)
    limit = CHECKED_ERROR_INT8 if int8 else CHECKED_ERROR
    for what, error, most in (
        ("experts", disagreement(run), limit),
        ("products", linear_disagreement(product), CHECKED_ERROR),
    ):
        if not error <= most:
            raise UserError(
                f"the CPU {what} ({level.name}) are off by {error:.1e} of the largest value, limit {most:.0e}",
                "--kernels plain computes them with torch",
            )
    return dataclasses.replace(
        PLAIN,
        layout=LAYOUT,
        linear=product,
        norm_qkv_write=partial(attention.norm_qkv_write, product=product),
        experts=run,
    )


def linear_disagreement(product: CpuLinear) -> float:
    """As `disagreement`, of products with a matrix in bf16, and of one in int8."""
    generator = torch.Generator().manual_seed(0)
    x_TI, weight_OI = torch.randn((5, 96), generator=generator), torch.randn((43, 96), generator=generator).bfloat16()
    errors = []
    for codes in _READ:
        narrow_OI = narrowed(weight_OI, codes, torch.float32)
        wanted = x_TI.double() @ narrow_OI.dense(slice(None)).double().T
        errors.append(float((product(x_TI, narrow_OI) - wanted).abs().max() / wanted.abs().max()))
    return max(errors)


def disagreement(run: CpuExperts) -> float:
    """Largest difference from the plain experts in fp64, over their largest value, on a small example that has a
    token by itself, several together, and a row that ends in the middle of a step."""
    generator = torch.Generator().manual_seed(0)
    tokens, hidden, inner, held = 5, 96, 160, 3

    def product(outputs: int, columns: int) -> plain.Packed:
        size = (held, outputs, columns // 32)
        blocks = torch.randint(0, 256, (*size, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(119, 125, size, generator=generator, dtype=torch.uint8)
        return plain.Packed(blocks, scales, torch.randn(size[:2], generator=generator))

    packs = product(2 * inner, hidden), product(hidden, inner)
    x_TH = torch.randn((tokens, hidden), generator=generator)
    weights_TX = torch.rand((tokens, 2), generator=generator)
    experts_TX = torch.tensor([[0, 1], [0, 7], [0, 1], [2, 0], [1, 0]])
    up, down = (plain.Packed(one.blocks, one.scales, one.bias.double()) for one in packs)
    wanted = plain.experts(x_TH.double(), weights_TX, experts_TX, up, down, 0, 7.0)
    found = run(x_TH, weights_TX, experts_TX, *packs, 0, 7.0)
    return float((found - wanted).abs().max() / wanted.abs().max())
