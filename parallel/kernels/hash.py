"""Random bits as a pure function of an integer: the same on every device and every version of every library."""

from torch import Tensor


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


STEP = _signed(0x9E3779B97F4A7C15)
MULTIPLY_1 = _signed(0xBF58476D1CE4E5B9)
MULTIPLY_2 = _signed(0x94D049BB133111EB)


def mix(x: Tensor) -> Tensor:
    """splitmix64 (Steele, Lea, Flood 2014, https://doi.org/10.1145/2714064.2660195) of int64, with wraparound.

    Two tensors of the size of x at a time besides x itself.
    """
    x = x + STEP
    x ^= _shift(x, 30)
    x *= MULTIPLY_1
    x ^= _shift(x, 27)
    x *= MULTIPLY_2
    x ^= _shift(x, 31)
    return x


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; torch's own copies the sign."""
    shifted = x >> bits
    shifted &= (1 << (64 - bits)) - 1
    return shifted
