"""Weights of fewer bits than the compute dtype, which stand where a weight in that dtype stood: 8 bits with a scale for
each output row, or bf16 as the checkpoint has it.

Activations are not rounded: what is saved is memory, and bytes that a decode step reads. T tokens, I columns in, O rows
out. Does not know which weights of a model these are, nor whether what comes out is good enough.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..planning.memory import DENSE_TILE_BYTES

CODES: dict[str, torch.dtype] = {  # by the plan's name
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
    "bf16": torch.bfloat16,
}
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # int8 is symmetric: -128 is not used


@dataclass(frozen=True)
class Narrow:
    """codes_OI: int8, float8_e4m3fn or bfloat16. scale_O: of each row, fp32 with the values of bf16, so that it is the
    same in products of either; 1 for bfloat16. dtype: that products are computed in."""

    codes_OI: Tensor
    scale_O: Tensor
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        return self.codes_OI.device

    @property
    def shape(self) -> torch.Size:
        return self.codes_OI.shape

    def __len__(self) -> int:
        return len(self.codes_OI)

    def dense(self, rows: slice | Tensor) -> Tensor:
        """These rows in the dtype of products."""
        codes, scale_R1 = self.codes_OI, self.scale_O[rows, None]
        if codes.dtype == torch.bfloat16:
            return codes[rows].to(self.dtype)
        if self.dtype == torch.bfloat16:  # in one pass; in fp16 a small scale would not be what it is
            scale_R1 = scale_R1.to(self.dtype)
        if codes.dtype != torch.int8:  # torch neither indexes fp8 everywhere nor multiplies it
            some = codes.view(torch.uint8)[rows].view(codes.dtype).to(scale_R1.dtype)
        else:
            some = codes[rows]
        return (some * scale_R1).to(self.dtype)


Weight = Tensor | Narrow


def narrowed(weight_OI: Tensor, codes: torch.dtype, dtype: torch.dtype) -> Narrow:
    """The nearest codes, with a scale that brings the largest value of a row to the largest code; or bf16 as it is."""
    if codes == torch.bfloat16:
        return Narrow(weight_OI.to(codes), torch.ones(len(weight_OI), device=weight_OI.device), dtype)
    largest, wide_OI = LARGEST[codes], weight_OI.float()
    least = torch.finfo(torch.bfloat16).tiny  # a row of zeros has some scale, too
    scale_O = (wide_OI.abs().amax(1) / largest).clamp_min(least).bfloat16().float()
    codes_OI = (wide_OI / scale_O[:, None]).clamp_(-largest, largest)  # scales are rounded: some exceed it
    return Narrow((codes_OI.round_() if codes == torch.int8 else codes_OI).to(codes), scale_O, dtype)


def linear(x_TI: Tensor, weight_OI: Narrow, bias_O: Tensor | None = None) -> Tensor:
    """x W^T + b, [T, O], in the dtype of x: rows are dequantized a tile at a time."""
    rows, columns = weight_OI.shape
    out_TO = torch.empty((len(x_TI), rows), dtype=x_TI.dtype, device=x_TI.device)
    step = max(1, DENSE_TILE_BYTES // (columns * x_TI.element_size()))
    for start in range(0, rows, step):
        tile = slice(start, start + step)
        bias = None if bias_O is None else bias_O[tile]
        out_TO[:, tile] = torch.nn.functional.linear(x_TI, weight_OI.dense(tile), bias)
    return out_TO
