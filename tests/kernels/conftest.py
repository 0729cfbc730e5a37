"""Kernels: by Triton, or its interpreter."""

import interpreter  # noqa: F401
