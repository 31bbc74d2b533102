"""A kernel that adds one to every element."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_one_kernel(x, out, N: tl.constexpr):
    """Computes ``out = x + 1`` in one program."""
    n = tl.arange(0, N)
    tl.store(out + n, tl.load(x + n) + 1.0)
