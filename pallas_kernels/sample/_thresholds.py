"""Launches of the kernels that look at whole rows of logits: statistics, and the search for filter thresholds."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from pallas_kernels._launch import CompileOptions, KernelModule, launch
from pallas_kernels.sample.config import SampleConfig
from pallas_kernels.sample.types import SamplingTensors, Vocabulary

kernels = KernelModule("pallas_kernels.sample.triton")
_RADIX_PASSES = 4  # of eight bits each


def logits_stats(scores: jax.Array, logits: jax.Array, vocabulary: Vocabulary, config: SampleConfig) -> jax.Array:
    """Returns ``float32 [3, M, blocks]``: highest scores, highest logits, and 1 where some logit is NaN or +inf."""
    m, width = scores.shape
    blocks = math.ceil(width / config.block_v)
    results = launch(
        kernels.logits_stats_kernel,
        {"scores": scores, "logits": logits, "invalid_ids": vocabulary.invalid_mask(width, scores)},
        {"stats": jax.ShapeDtypeStruct((3, m, blocks), jnp.float32)},
        {"VOCAB": vocabulary.layout(width), "HAS_LOGITS": logits is not scores, "BLOCK_V": config.block_v},
        grid=(m, blocks),
        options=CompileOptions(num_warps=config.num_warps),
    )
    return results["stats"]


def search_thresholds(
    scores: jax.Array,
    stats: jax.Array,
    sampling: SamplingTensors,
    vocabulary: Vocabulary,
    counters: jax.Array,
    config: SampleConfig,
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """Returns the thresholds of both searches, ``uint32 [M]``, and the counters.

    Args:
        scores: ``float32 [M, V]``.
        stats: From :func:`logits_stats`.
        sampling: Sampling parameters of the rows.
        vocabulary: Ids that can be sampled.
        counters: ``int32`` zeros, at least one for each row.
        config: Block sizes.
    """
    zeros = jnp.zeros(scores.shape[0], jnp.uint32)

    def search(first_threshold: jax.Array, counters: jax.Array, *, is_second: bool) -> tuple[jax.Array, jax.Array]:
        prefix, remaining = zeros, sampling.top_p
        for level in range(_RADIX_PASSES):
            state = {"first_threshold": first_threshold, "prefix_in": prefix, "remaining_in": remaining}
            prefix, remaining, counters = _radix_select_pass(
                scores, stats, sampling, vocabulary, state, counters, config, is_second=is_second, level=level
            )
        return prefix, counters

    # Programs of rows without this search end at once: skipping the second search by a condition would cost XLA as many
    # launches as it saves.
    first, counters = search(zeros, counters, is_second=False)
    second, counters = search(first, counters, is_second=True)
    return (first, second), counters


def _radix_select_pass(
    scores: jax.Array,
    stats: jax.Array,
    sampling: SamplingTensors,
    vocabulary: Vocabulary,
    state: dict[str, jax.Array],
    counters: jax.Array,
    config: SampleConfig,
    *,
    is_second: bool,
    level: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns a threshold with eight more bits, the count or mass still to be kept below it, and the counters."""
    (m, width), blocks = scores.shape, stats.shape[2]
    results = launch(
        kernels.radix_select_kernel,
        {
            "scores": scores,
            "invalid_ids": vocabulary.invalid_mask(width, scores),
            "stats": stats,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            **state,
            "counters_in": counters,
        },
        {
            "prefix": jax.ShapeDtypeStruct((m,), jnp.uint32),
            "remaining": jax.ShapeDtypeStruct((m,), jnp.float32),
            "masses": jax.ShapeDtypeStruct((m, blocks, 2, 256), jnp.int32),
            "counters": jax.ShapeDtypeStruct(counters.shape, jnp.int32),
        },
        {
            "VOCAB": vocabulary.layout(width),
            "IS_SECOND": is_second,
            "LEVEL": level,
            "BLOCK_V": config.block_v,
            "PADDED_BLOCKS": next_power_of_2(blocks),
            "BLOCKS_PER_SUM": config.blocks_per_sum,
        },
        grid=(m, blocks),
        options=CompileOptions(num_warps=config.num_warps),
        aliases={"counters_in": "counters"},
    )
    return results["prefix"], results["remaining"], results["counters"]


def next_power_of_2(count: int) -> int:
    """Returns the smallest power of two that is at least ``count``."""
    return 1 << (count - 1).bit_length()
