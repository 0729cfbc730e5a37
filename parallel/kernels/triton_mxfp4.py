"""MXFP4 weights laid out for tensor cores: made once at load, read by the kernels for few and for many tokens.

A tile is 16 rows (outputs) by 64 columns (inputs, two MXFP4 blocks), 512 bytes: 32 lanes of 16 bytes. What a lane
loads is its own share of the matrix operand of mma.m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16"), and of
each warp's 16 rows of wgmma.m64k16, so no weight passes through shared memory or changes lanes. With

    row = 2 g + rh    column = 32 b + 8 t + 4 q + 2 kh + h        g < 8, t < 4, the others < 2

lane 4 g + t holds eight 16-bit halves (kh, rh, h); a half holds the four codes of (b, q), its planes p = 2 b + q,
placed so that a shift and a mask or two make each a bf16 of 2**-126 times its value: magnitude bits at 6 to 8, where
1 and 0 stand for 0.5 and 0 as subnormal numbers do in E2M1. Even and odd rows (gate and up) share a lane. Knows
nothing of experts' routes or of ranks.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Triton's tl.constexpr annotations stand for plain values, which pyright cannot know.

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .experts import Layout, Packed, Shape

TILE_ROWS, TILE_COLUMNS, BLOCK_COLUMNS = 16, 64, 32
HALVES, SCALES = 256, 32  # 16-bit halves and scale bytes of a tile
MAX_SLOTS = 32  # slots whose K may be split, see triton_decode.py

_SHIFTS = ((15, 6), (12, 3), (13, 0), (14, 9))  # of each plane's sign and magnitude within a half
_MAX_SCALE = 160  # 2**33. `scaled_planes` leaves room up to here; published scales lie near 2**-10


@dataclass(frozen=True)
class Tiles(Packed):
    """blocks: int16 [E, tiles, steps, 32 lanes, 8 halves]; scales: u8 [E, tiles, steps, 8 g, 4 (rh b)]; bias [E, out].

    tiles = ceil(out / 16), steps = ceil(in / 64): the same bytes as in the checkpoint, if these divide. An odd number
    of MXFP4 blocks adds one of zeros to each row (1 / blocks of the bytes). arrivals: int32 zeros, [tiles * MAX_SLOTS],
    counters of the kernels for few tokens, which leave them at zero.
    """

    arrivals: Tensor


def pack(blocks: Tensor, scales: Tensor, bias: Tensor) -> Tiles:
    """From the checkpoint's layout, see `experts.Layout`."""
    experts, rows, count, _ = blocks.shape
    packed = room((experts, rows, count), bias.dtype, bias.device)
    packed.bias.copy_(bias)
    for expert in range(experts):
        put(packed, expert, blocks[expert], scales[expert])
    return packed


def room(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tiles:
    experts, rows, count = shape
    tiles, steps = -(-rows // TILE_ROWS), -(-count // 2)
    return Tiles(
        blocks=torch.empty((experts, tiles, steps, 32, 8), dtype=torch.int16, device=device),
        scales=torch.empty((experts, tiles, steps, 8, 4), dtype=torch.uint8, device=device),
        bias=torch.empty((experts, rows), dtype=dtype, device=device),
        arrivals=torch.zeros(tiles * MAX_SLOTS, dtype=torch.int32, device=device),
    )


def put(packed: Packed, place: int, blocks: Tensor, scales: Tensor) -> None:
    if scales.numel() and (largest := _largest(scales)) > _MAX_SCALE:  # before they move: on the host nothing waits
        raise ValueError(f"an MXFP4 scale is {largest}, over {_MAX_SCALE} (2**{_MAX_SCALE - 127})")
    _, tiles, steps, _, _ = packed.blocks.shape
    rows, count = scales.shape
    blocks, scales = (part.to(packed.blocks.device, non_blocking=True) for part in (blocks, scales))
    more = (0, 2 * steps - count, 0, tiles * TILE_ROWS - rows)  # zeros to the right and below
    byte = torch.nn.functional.pad(blocks, (0, 0, *more)).view(
        tiles, 8, 2, steps, 2, 4, 2, 2
    )  # tile g rh step b t q kh
    index = byte.permute(4, 6, 0, 3, 1, 5, 7, 2).reshape(4, -1).int()
    pairs, first = _pairs(index.device)
    words = torch.nn.functional.embedding(index.add_(first), pairs).sum(0, dtype=torch.int32)
    packed.blocks[place] = words.view(torch.int16).view(tiles, steps, 32, 8)
    scale = torch.nn.functional.pad(scales, more).view(tiles, 8, 2, steps, 2)
    packed.scales[place] = scale.permute(0, 3, 1, 2, 4).flatten(-2)


def _largest(scales: Tensor) -> int:
    """NumPy's on the host: torch shares half a million bytes out over all cores, where the threads that read the
    checkpoint are (on 32 cores a rank alone took 14 s for its weights, and each of two, with a thread, 1.5)."""
    return int(scales.numpy().max() if scales.device.type == "cpu" else scales.max())


@cache
def _pairs(device: torch.device) -> tuple[Tensor, Tensor]:
    """int32 [4 * 256, 1]: what a byte adds to two halves, h = 0 in the lower bits, in each of the planes, no two of
    which have a bit in common; and where in there each plane begins, [4, 1]."""
    byte = torch.arange(256)
    parts = [[(code >> 3 << sign) | ((code & 7) << low) for code in (byte & 15, byte >> 4)] for sign, low in _SHIFTS]
    words = torch.cat([even | odd << 16 for even, odd in parts])
    first = torch.arange(0, len(words), 256)
    return words.to(torch.int32)[:, None].to(device), first.to(torch.int32)[:, None].to(device)


LAYOUT = Layout(pack, room, put)

_PLANES_ASM = tl.constexpr("""{ .reg .b32 a, b;
and.b32 $0, $4, 0x81C081C0;
shl.b32 a, $4, 3;  and.b32 $1, a, 0x81C081C0;
shl.b32 a, $4, 6;  and.b32 a, a, 0x01C001C0;  shl.b32 b, $4, 2;  and.b32 b, b, 0x80008000;  or.b32 $2, a, b;
shr.u32 a, $4, 3;  and.b32 a, a, 0x01C001C0;  shl.b32 b, $4, 1;  and.b32 b, b, 0x80008000;  or.b32 $3, a, b; }""")
_SCALED_ASM = tl.constexpr("""{ .reg .b32 a, b, z, f;
mov.b32 z, 0x80008000;
and.b32 a, $4, 0x81C081C0;  fma.rn.bf16x2 $0, a, $5, z;
shl.b32 a, $4, 3;  and.b32 a, a, 0x81C081C0;  fma.rn.bf16x2 $1, a, $5, z;
shl.b32 a, $4, 6;  and.b32 a, a, 0x01C001C0;  shl.b32 b, $4, 2;  and.b32 b, b, 0x80008000;  or.b32 a, a, b;
fma.rn.bf16x2 $2, a, $6, z;
shr.u32 a, $4, 3;  and.b32 a, a, 0x01C001C0;  shl.b32 b, $4, 1;  and.b32 b, b, 0x80008000;  or.b32 a, a, b;
fma.rn.bf16x2 $3, a, $6, z; }""")


@triton.jit
def planes(half, PLAIN: tl.constexpr):
    """int16 halves -> four tensors of 2**-126 times the values, bf16; PLAIN: fp32, for Triton's interpreter, which
    has no inline assembly and cannot multiply bf16 matrices."""
    if PLAIN:
        MASK: tl.constexpr = -32320  # 0x81C0
        third = ((half << 6) & 0x01C0) | ((half << 2) & -32768)
        fourth = ((half >> 3) & 0x01C0) | ((half << 1) & -32768)
        return _float(half & MASK), _float((half << 3) & MASK), _float(third), _float(fourth)
    else:
        return tl.inline_asm_elementwise(
            _PLANES_ASM,
            "=r,=r,=r,=r,r",
            [half],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )


@triton.jit
def scaled_planes(half, scale_0, scale_1, PLAIN: tl.constexpr):
    """int16 halves, and int16 scale bytes of blocks b = 0 and 1, of one shape -> four tensors of 2**-32 times the
    weights: no scale in [0, 160] overflows, and none that matters underflows, the factor 2**(scale - 33) included."""
    if PLAIN:
        v0, v1, v2, v3 = planes(half, PLAIN)
        first = ((scale_0.to(tl.int32) + 94) << 23).to(tl.float32, bitcast=True)
        second = ((scale_1.to(tl.int32) + 94) << 23).to(tl.float32, bitcast=True)
        return v0 * first, v1 * first, v2 * second, v3 * second
    else:
        first = (scale_0 + 94) << 7
        second = (scale_1 + 94) << 7
        return tl.inline_asm_elementwise(
            _SCALED_ASM,
            "=r,=r,=r,=r,r,r,r",
            [half, first, second],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )


@triton.jit
def _float(bits):
    """The upper half of an fp32, from int16."""
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def swiglu(gate, up, limit, ALPHA: tl.constexpr):
    """As `experts.swiglu`, on fp32."""
    gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
    up = tl.clamp(up, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    return gate / (1.0 + tl.exp(-ALPHA * gate)) * (up + 1.0)
