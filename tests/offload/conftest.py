"""Experts that the device brings itself: by Triton, or its interpreter."""

import interpreter  # noqa: F401
