"""Measurements of host memory."""

import jax
import numpy as np
import pytest

from glm_jax.bench.hardware import PeakMemoryMonitor, resident_bytes


@pytest.mark.skipif(resident_bytes() is None, reason="needs /proc")
def test_peak_memory_is_counted_from_the_start():
    with PeakMemoryMonitor() as memory:
        array = np.ones(64 << 20, np.uint8)
        jax.block_until_ready(jax.numpy.asarray(array[:1]))
    assert memory.peak is not None
    assert memory.peak >= array.nbytes * 0.9
