"""A kernel that writes the sampler's noise; imported only by the test that runs it."""

import triton
import triton.language as tl

from pallas_kernels.sample.triton import gumbel_noise


@triton.jit
def gumbel_noise_kernel(seed, position, out, N: tl.constexpr):
    """Writes the noise of the first N ids."""
    ids = tl.arange(0, N)
    tl.store(out + ids, gumbel_noise(tl.load(seed), tl.load(seed + 1), tl.load(position), ids))
