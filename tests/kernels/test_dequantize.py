"""Triton's MXFP4 -> bf16, for every code and every scale, and values -> MXFP4 -> bf16, against the plain ones."""

import pytest
import torch
from gptoss_launch.parallel.kernels import mxfp4
from gptoss_launch.parallel.kernels.quantize import quantize
from gptoss_launch.parallel.kernels.triton_dequantize import dequantize
from gptoss_launch.parallel.kernels.triton_round import nearest_mxfp4


@pytest.mark.filterwarnings("ignore:overflow encountered")  # of the interpreter: 6 * 2 ** 127
def test_every_value_is_the_plain_one() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    blocks = torch.arange(256, dtype=torch.uint8, device=device).repeat(256).view(256, 16, 16)  # [rows, blocks, bytes]
    scales = torch.arange(256, dtype=torch.uint8, device=device)[:, None].expand(-1, 16).contiguous()
    found, wanted = (way(blocks, scales, torch.bfloat16) for way in (dequantize, mxfp4.dequantize))
    # Triton's interpreter rounds subnormal numbers of fp32 away, and no weight is that small
    large = (scales.repeat_interleave(32, 1) > 2) if device == "cpu" else torch.ones_like(found, dtype=torch.bool)
    assert torch.equal(found[large].nan_to_num(7), wanted[large].nan_to_num(7))
    assert found.isnan()[255].all() and found.shape == (256, 512)


def test_rows_may_have_columns_to_spare_and_programs_rows() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (47, 3, 16), dtype=torch.uint8, generator=generator).to(device)
    scales = torch.randint(120, 130, (47, 3), dtype=torch.uint8, generator=generator).to(device)
    found = dequantize(blocks, scales, torch.bfloat16, spare=8)
    assert found.shape == (47, 104)
    assert torch.equal(found[:, :96], mxfp4.dequantize(blocks, scales, torch.bfloat16))
    with pytest.raises(ValueError, match="not contiguous"):
        dequantize(blocks.transpose(0, 1), scales, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_become_the_nearest_that_mxfp4_has(dtype: torch.dtype) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(33, 5, 32, generator=generator) * torch.exp2(torch.arange(-33.0, 0) / 3)[:, None, None]
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]).repeat(4) * torch.tensor([1.0, -1.0]).repeat(16)
    values[0] = 0
    values[1] = ties
    values[2] = 0.99999994  # just below a power of two
    values = values.flatten(1).to(device, dtype)
    wanted = mxfp4.dequantize(*quantize(values), torch.float32)
    found = nearest_mxfp4(values, torch.float32, spare=8)
    assert found.shape == (33, 168) and torch.equal(found[:, :160], wanted)
    assert torch.equal(nearest_mxfp4(wanted, torch.bfloat16), wanted.bfloat16())
