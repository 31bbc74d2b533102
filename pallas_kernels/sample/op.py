"""The sampling operations: block sizes, checks and the launches."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from pallas_kernels import _device, tuned
from pallas_kernels._implementation import Implementation, select_implementation
from pallas_kernels._kernel_args import array_or, compute_dtype, tile_operands
from pallas_kernels._launch import CompileOptions, KernelModule, check_counters, launch
from pallas_kernels.quant_matmul.config import LinearConfig, linear_heuristic
from pallas_kernels.quant_matmul.types import SumSq, SumSqLayout
from pallas_kernels.sample import _thresholds
from pallas_kernels.sample._thresholds import next_power_of_2
from pallas_kernels.sample.config import SampleConfig
from pallas_kernels.sample.reference import filter_thresholds_ref, lm_head_sample_ref, sample_logits_ref
from pallas_kernels.sample.types import SampleOutput, SamplingTensors, Vocabulary
from pallas_kernels.tiles import Tiles

kernels = KernelModule("pallas_kernels.sample.triton")
_CANDIDATE_WINDOW = 1024  # candidates that a program compares at once


def lm_head_sample(
    x: jax.Array,
    weight: Tiles,
    sampling: SamplingTensors,
    vocabulary: Vocabulary,
    counters: jax.Array,
    *,
    has_random: bool,
    sum_sq: SumSq | None = None,
    eps: float = 0.0,
    config: LinearConfig | None = None,
    implementation: Implementation | None = None,
) -> tuple[SampleOutput, jax.Array]:
    """Samples from the logits ``inv_rms(x) * (x @ weight.T)``, which are never written to memory, without filters.

    A token is the id with the highest logit, the lowest of equals; or, in rows with a temperature, the id with the
    highest ``noise - (top - logit) / temperature`` (the Gumbel-max trick). There, a block of ids compares its keys
    before ``top`` is known, with its own highest logit instead. The order is the same but for rounding, so the token is
    the one that the formula gives for the same logits unless its two highest keys are within 2^-15 of each other.
    (Keys that can win have gaps below 26, whose roundings add up to less than that, and the highest key leads by less
    than d with a probability below d.) No row depends on other rows.

    Args:
        x: ``[M, K]``; with ``sum_sq``, already multiplied by the weight of its norm.
        weight: ``[V, K]``.
        sampling: Sampling parameters of the rows.
        vocabulary: Ids that can be sampled.
        counters: ``int32`` zeros, at least one for each block of rows.
        has_random: Whether some row has a temperature above 0; otherwise temperatures are not read.
        sum_sq: Sums of squares of x before the weight of its norm, if x has a norm.
        eps: Epsilon of that norm.
        config: Block sizes, without splits; tuned or heuristic by default.
        implementation: See :func:`~pallas_kernels._implementation.select_implementation`.

    Returns:
        The sampled tokens, and the counters, zero again.

    Raises:
        LaunchError: If there are too few counters.
        NotImplementedError: If the named implementation cannot run.
    """
    if select_implementation(implementation) == "reference":
        return lm_head_sample_ref(
            x, weight, sampling, vocabulary, counters, has_random=has_random, sum_sq=sum_sq, eps=eps
        )
    (m, stride), ids = x.shape, weight.outputs
    config = config or tuned.lookup_config(lm_head_sample_tuning_key(m, weight))
    row_blocks, blocks = math.ceil(m / config.block_m), math.ceil(ids / config.block_n)
    check_counters(counters, row_blocks)
    rows = config.block_m if m > 1 else 1
    results = launch(
        kernels.lm_head_sample_kernel,
        {
            "x": x,
            "sum_sq": array_or(sum_sq.partials if sum_sq else None, x),
            **tile_operands(weight),
            "invalid_ids": vocabulary.invalid_mask(ids, x),
            "temperature": sampling.temperature,
            "seeds": sampling.seeds,
            "positions": sampling.positions,
            "counters_in": counters,
        },
        {
            "tokens": jax.ShapeDtypeStruct((m,), jnp.int32),
            "ok": jax.ShapeDtypeStruct((m,), jnp.int32),
            "block_scores": jax.ShapeDtypeStruct((3 if has_random else 1, m, blocks), jnp.float32),
            "block_ids": jax.ShapeDtypeStruct((2, m, blocks), jnp.int32),
            "counters": jax.ShapeDtypeStruct(counters.shape, jnp.int32),
        },
        {
            "M": m,
            "STRIDE": stride,
            "WEIGHT": weight.layout,
            "VOCAB": vocabulary.layout(ids),
            "NORM": sum_sq.layout(eps) if sum_sq else SumSqLayout(),
            "HAS_RANDOM": has_random,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "ROWS": rows,
            "WINDOW": min(_CANDIDATE_WINDOW // rows, next_power_of_2(blocks)),
            "DTYPE": compute_dtype(x.dtype),
        },
        grid=(row_blocks, blocks),
        options=CompileOptions(num_warps=config.num_warps, num_stages=config.num_stages),
        aliases={"counters_in": "counters"},
    )
    return SampleOutput(results["tokens"], results["ok"] != 0), results["counters"]


def sample_logits(
    scores: jax.Array,
    sampling: SamplingTensors,
    vocabulary: Vocabulary,
    counters: jax.Array,
    *,
    has_random: bool,
    has_filters: bool,
    return_logprob: bool = False,
    logits: jax.Array | None = None,
    config: SampleConfig = SampleConfig(),
    implementation: Implementation | None = None,
) -> tuple[SampleOutput, jax.Array]:
    """Samples from logits by the rules of :func:`glm_jax.sampling.sample`, from the temperature on.

    The ids that top_k keeps are exactly those of the rules, and so are the keys but for the rounding of a logarithm.
    For min_p and top_p only such ids can differ whose gap, or the probability above them, is within 1e-5 of the
    threshold: there an exponential or the order of a sum decides. That order depends on the width of a row alone.

    Args:
        scores: ``float32 [M, V]``.
        sampling: Sampling parameters of the rows.
        vocabulary: Ids that can be sampled.
        counters: ``int32`` zeros, at least one for each row.
        has_random: Whether some row has a temperature above 0.
        has_filters: Whether some row uses top_k, top_p or min_p.
        return_logprob: Whether to return the log-probabilities of the tokens.
        logits: ``float32 [M, V]``, the model's logits if the scores differ from them; ``ok`` and the log-probabilities
            are computed from these.
        config: Block sizes.
        implementation: See :func:`~pallas_kernels._implementation.select_implementation`.

    Returns:
        The sampled tokens, and the counters, zero again.

    Raises:
        LaunchError: If there are too few counters.
        NotImplementedError: If the named implementation cannot run.
    """
    if select_implementation(implementation) == "reference":
        return sample_logits_ref(
            scores,
            sampling,
            vocabulary,
            counters,
            has_random=has_random,
            has_filters=has_filters,
            return_logprob=return_logprob,
            logits=logits,
        )
    check_counters(counters, scores.shape[0])
    stats = _thresholds.logits_stats(scores, array_or(logits, scores), vocabulary, config)
    first_threshold = second_threshold = jnp.zeros(scores.shape[0], jnp.uint32)
    if has_random and has_filters:
        (first_threshold, second_threshold), counters = _thresholds.search_thresholds(
            scores, stats, sampling, vocabulary, counters, config
        )
    (m, width), blocks = scores.shape, stats.shape[2]
    results = launch(
        kernels.sample_kernel,
        {
            "scores": scores,
            "logits": array_or(logits, scores),
            "invalid_ids": vocabulary.invalid_mask(width, scores),
            "stats": stats,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "seeds": sampling.seeds,
            "positions": sampling.positions,
            "first_threshold": first_threshold,
            "second_threshold": second_threshold,
            "counters_in": counters,
        },
        {
            "tokens": jax.ShapeDtypeStruct((m,), jnp.int32),
            "ok": jax.ShapeDtypeStruct((m,), jnp.int32),
            "logprob": jax.ShapeDtypeStruct((m if return_logprob else 1,), jnp.float32),
            "block_keys": jax.ShapeDtypeStruct((2 if return_logprob else 1, m, blocks), jnp.float32),
            "block_ids": jax.ShapeDtypeStruct((m, blocks), jnp.int32),
            "counters": jax.ShapeDtypeStruct(counters.shape, jnp.int32),
        },
        {
            "VOCAB": vocabulary.layout(width),
            "HAS_RANDOM": has_random,
            "HAS_FILTERS": has_random and has_filters,
            "RETURN_LOGPROB": return_logprob,
            "BLOCK_V": config.block_v,
            "PADDED_BLOCKS": next_power_of_2(blocks),
        },
        grid=(m, blocks),
        options=CompileOptions(num_warps=config.num_warps),
        aliases={"counters_in": "counters"},
    )
    logprob = results["logprob"] if return_logprob else None
    return SampleOutput(results["tokens"], results["ok"] != 0, logprob), results["counters"]


def filter_thresholds(
    scores: jax.Array,
    sampling: SamplingTensors,
    vocabulary: Vocabulary,
    counters: jax.Array,
    config: SampleConfig = SampleConfig(),
    *,
    implementation: Implementation | None = None,
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """Finds the lowest scores that the filters keep, as ranks: uint32 in the order of the scores, 0 for no filter.

    Args:
        scores: ``float32 [M, V]``.
        sampling: Sampling parameters of the rows.
        vocabulary: Ids that can be sampled.
        counters: ``int32`` zeros, at least one for each row.
        config: Block sizes.
        implementation: See :func:`~pallas_kernels._implementation.select_implementation`.

    Returns:
        The ranks of each row's first search (for top_k, or for top_p if there is no top_k) and of its second one (for
        top_p after top_k), both ``uint32 [M]``; and the counters, zero again.

    Raises:
        LaunchError: If there are too few counters.
        NotImplementedError: If the named implementation cannot run.
    """
    if select_implementation(implementation) == "reference":
        return filter_thresholds_ref(scores, sampling, vocabulary, counters)
    check_counters(counters, scores.shape[0])
    stats = _thresholds.logits_stats(scores, scores, vocabulary, config)
    return _thresholds.search_thresholds(scores, stats, sampling, vocabulary, counters, config)


def lm_head_sample_tuning_key(rows: int, weight: Tiles) -> tuned.TuningKey[LinearConfig]:
    """Returns the sizes that the block sizes of :func:`lm_head_sample` depend on."""
    target = _device.current_target()
    multiprocessors = target.multiprocessors if target else 128
    heuristic = linear_heuristic(rows, weight.outputs, weight.num_chunks, multiprocessors)
    key = f"{tuned.rows_bucket(rows)} n{weight.outputs} k{weight.inputs} {weight.kind} g{weight.group_size}"
    space = {"block_n": (32, 64), "num_warps": (2, 4, 8), "num_stages": (2, 3, 4, 5, 6)}
    heuristic = dataclasses.replace(heuristic, splits=1)
    return tuned.TuningKey("head", key, heuristic, space if rows <= 16 else {"block_m": (16, 32, 64), **space})
