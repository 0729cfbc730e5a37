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
    blocks = torch.arange(256, dtype=torch.uint8, device=device).repeat(256).view(2, 128, 16, 16)
    scales = torch.arange(256, dtype=torch.uint8, device=device)[:, None].repeat(1, 16).view(2, 128, 16)
    found, wanted = (way(blocks, scales, torch.bfloat16) for way in (dequantize, mxfp4.dequantize))
    # Triton's interpreter rounds subnormal numbers of fp32 away, and no weight is that small
    large = (scales.repeat_interleave(32, 2) > 2) if device == "cpu" else torch.ones_like(found, dtype=torch.bool)
    assert torch.equal(found[large].nan_to_num(7), wanted[large].nan_to_num(7))
    assert found.isnan()[1, 127].all() and found.shape == (2, 128, 512)


def test_rows_may_have_columns_to_spare_and_parts_are_those_of_all() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (2, 47, 3, 16), dtype=torch.uint8, generator=generator).to(device)
    scales = torch.randint(120, 130, (2, 47, 3), dtype=torch.uint8, generator=generator).to(device)
    wanted = mxfp4.dequantize(blocks, scales, torch.bfloat16)
    found = dequantize(blocks, scales, torch.bfloat16, spare=8)
    assert found.shape == (2, 47, 104) and torch.equal(found[..., :96], wanted)
    rows = dequantize(blocks[:, 5:45], scales[:, 5:45], torch.bfloat16, spare=8)
    assert torch.equal(rows[..., :96], wanted[:, 5:45])
    columns = dequantize(blocks[:, :, 1:], scales[:, :, 1:], torch.bfloat16)
    assert torch.equal(columns, wanted[..., 32:])
    with pytest.raises(ValueError, match="not side by side"):
        dequantize(blocks[:, :, 1:], scales[:, :, 1:].contiguous(), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_become_the_nearest_that_mxfp4_has(dtype: torch.dtype) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(33, 5, 32, generator=generator) * torch.exp2(torch.arange(-33.0, 0) / 3)[:, None, None]
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]).repeat(4) * torch.tensor([1.0, -1.0]).repeat(16)
    values[0] = 0
    values[1] = ties
    values[2] = 0.99999994  # just below a power of two
    values = values.view(3, 11, 160).to(device, dtype)
    wanted = mxfp4.dequantize(*quantize(values), torch.float32)
    found = nearest_mxfp4(values, torch.float32, spare=8)
    assert found.shape == (3, 11, 168) and torch.equal(found[..., :160], wanted)
    assert torch.equal(nearest_mxfp4(wanted, torch.bfloat16), wanted.bfloat16())
    assert torch.equal(nearest_mxfp4(values[:, 2:9], torch.float32, spare=8)[..., :160], wanted[:, 2:9])
    assert torch.equal(nearest_mxfp4(values[..., 64:], torch.float32), wanted[..., 64:])
    with pytest.raises(ValueError, match="no whole blocks"):
        nearest_mxfp4(values[..., 8:], torch.float32)
