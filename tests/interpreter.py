"""Away from a GPU, Triton kernels run under Triton's interpreter, which has to be asked for before Triton is loaded: a
conftest.py whose tests launch kernels imports this."""

import os
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def _patch_once() -> None:
    """Where a kernel calls a function, what `triton.language` has is the interpreter's from the launch on. Triton puts
    it there again at each such call, which takes a third of the time; once is enough for what the function's own module
    has of it."""
    from triton.runtime.interpreter import InterpretedFunction

    first_call, called = InterpretedFunction.__call__, set[str]()

    def call(self: Any, *given: Any, **named: Any) -> Any:
        if self.fn.__module__ in called:
            return self.rewrite()(*given, **named)
        called.add(self.fn.__module__)
        return first_call(self, *given, **named)

    InterpretedFunction.__call__ = call


def _products_do_not_warn() -> None:
    """Kernels multiply columns and rows that mean nothing, by whatever their memory holds, and store nothing of it. On
    a GPU that is silent; NumPy warns of infinities there, of which pytest makes failures, now and then."""
    from triton.runtime.interpreter import InterpreterBuilder

    builder: Any = InterpreterBuilder
    create_dot = builder.create_dot

    def silent(self: Any, *given: Any) -> Any:
        with np.errstate(invalid="ignore", over="ignore"):
            return create_dot(self, *given)

    builder.create_dot = silent


if find_spec("triton") is not None:
    _patch_once()
    _products_do_not_warn()
