"""Away from a GPU, Triton kernels run under Triton's interpreter, which has to be asked for before Triton is loaded: a
conftest.py whose tests launch kernels imports this."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
