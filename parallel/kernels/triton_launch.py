"""How a Triton kernel is given what is fixed when it is compiled."""

from typing import Any


def constants(**values: Any) -> dict[str, Any]:
    """Constexpr arguments, num_warps and num_stages of a launch, without types: those of triton.jit know neither that
    an int serves as a constexpr nor what a launch takes besides."""
    return values
