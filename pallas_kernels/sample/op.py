"""The operations: which block sizes, and the launches."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import _device, tuned
from pallas_kernels._launch import CompileOptions, check_counters, launch
from pallas_kernels.quant_matmul.config import LinearConfig, linear_heuristic
from pallas_kernels.quant_matmul.op import SumSq, compute_dtype, weight_constants, weight_operands
from pallas_kernels.sample.config import SampleConfig
from pallas_kernels.tiles import Tiles

_RADIX_PASSES = 4  # of eight bits each
_CANDIDATE_WINDOW = 1024  # candidates that a program looks at together


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SamplingTensors:
    """What ``M`` rows ask for.

    Attributes:
        temperature: float32 ``[M]``; 0 takes the highest score. Such a row has no filters.
        top_k: int32 ``[M]``; 0 is off.
        top_p: float32 ``[M]``; 1 is off.
        min_p: float32 ``[M]``; 0 is off.
        seeds: uint32 ``[M, 2]``, the high and the low half.
        positions: int32 ``[M]``, of the rows' newest tokens; those that are drawn will have the next ones.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    seeds: jax.Array
    positions: jax.Array


@dataclasses.dataclass(frozen=True, slots=True)
class Vocabulary:
    """Which ids can be drawn.

    Attributes:
        valid_size: ids from here on cannot.
        unused_ids: nor can these.
    """

    valid_size: int
    unused_ids: tuple[int, ...] = ()

    def valid_mask(self, width: int) -> np.ndarray:
        """Bool ``[width]``: whether each id can be drawn."""
        known = np.arange(width) < self.valid_size
        known[[token for token in self.unused_ids if token < width]] = False
        return known

    def constants(self, width: int) -> dict[str, Any]:
        """As the kernels take them."""
        return {"VALID": min(self.valid_size, width), "MISSING": bool(self.unused_ids)}

    def invalid_mask(self, width: int, placeholder: jax.Array) -> jax.Array:
        """Int8 ``[width]``, 1 for ids that cannot be drawn; where the kernels do not look, an array that is there."""
        return jnp.asarray(~self.valid_mask(width), jnp.int8) if self.unused_ids else placeholder


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class SampleOutput:
    """What was drawn.

    Attributes:
        tokens: int32 ``[M]``.
        ok: bool ``[M]``; False where a logit is NaN or +inf, or there is nothing to draw.
        logprob: float32 ``[M]`` of the tokens, or None.
    """

    tokens: jax.Array
    ok: jax.Array
    logprob: jax.Array | None = None


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
) -> tuple[SampleOutput, jax.Array]:
    """Tokens of the logits ``factor(x) * (x @ weight.T)``, which are never written anywhere; filters are ignored.

    A token is the id with the highest logit, the lowest among equals; or, in rows with a temperature, with the highest
    ``noise - (top - logit) / temperature``. There, a block of ids finds its best before anybody knows ``top``, and with
    its own highest logit instead: the order is the same but for rounding, so the token is the one that the formula
    gives from the same logits unless its two highest keys lie within 2^-15 of each other. (Keys that can win have gaps
    below 26, whose roundings sum up to less than that; and the lead of the highest key is below d with a probability
    below d.) Nothing of a row depends on the other rows.

    Args:
        x: ``[M, K]``; where ``sum_sq`` are given, already multiplied by the norm's weight.
        weight: ``[V, K]``.
        sampling: options.
        vocabulary: which ids can be drawn.
        counters: int32 zeros, one for each block of rows or more.
        has_random: whether some row has a temperature above 0; if not, they are not looked at.
        sum_sq: of x before the norm's weight, for a norm.
        eps: of the norm.
        config: block sizes, without splits; chosen for the card unless given.

    Returns:
        What was drawn, and the counters, zero again.
    """
    (m, stride), ids = x.shape, weight.outputs
    config = config or tuned.lookup_config(lm_head_sample_tuning_key(m, weight))
    check_counters(counters, math.ceil(m / config.block_m))
    blocks = math.ceil(ids / config.block_n)
    height = config.block_m if m > 1 else 1
    from pallas_kernels.sample.triton import lm_head_sample_kernel

    number = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    tokens, ok, _, _, counters = launch(
        lm_head_sample_kernel,
        [
            x,
            x if sum_sq is None else sum_sq.partials,
            *weight_operands(weight),
            vocabulary.invalid_mask(ids, x),
            sampling.temperature,
            sampling.seeds,
            sampling.positions,
            counters,
        ],
        [
            number((m,)),
            number((m,)),
            jax.ShapeDtypeStruct((3 if has_random else 1, m, blocks), jnp.float32),
            number((2, m, blocks)),
            number(counters.shape),
        ],
        grid=(math.ceil(m / config.block_m), blocks),
        options=CompileOptions(num_warps=config.num_warps, num_stages=config.num_stages),
        aliases={9: 4},
        M=m,
        V=ids,
        STRIDE=stride,
        **weight_constants(weight),
        **vocabulary.constants(ids),
        DRAWN=has_random,
        BM=config.block_m,
        BN=config.block_n,
        R=height,
        W=min(_CANDIDATE_WINDOW // height, _next_power_of_2(blocks)),
        FACTOR=sum_sq is not None,
        FIRST=sum_sq.first_block if sum_sq else 0,
        PARTS=sum_sq.num_blocks if sum_sq else 1,
        ALL_PARTS=sum_sq.partials.shape[1] if sum_sq else 1,
        EPS=eps,
        DT=compute_dtype(x.dtype),
    )
    return SampleOutput(tokens, ok != 0), counters


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
) -> tuple[SampleOutput, jax.Array]:
    """Tokens of logits, by the rules of :func:`glm_jax.sampling.sample` from the temperature on.

    The ids that top_k keeps are the very ones, and so are the keys of the draw but for the rounding of a logarithm. Of
    min_p and top_p the ids can only differ whose gap, or the probability above them, is within 1e-5 of the edge: there
    an exponential or the order of a sum decides. That order depends on the width of a row alone.

    Args:
        scores: float32 ``[M, V]``.
        sampling: options.
        vocabulary: which ids can be drawn.
        counters: int32 zeros, one for each row or more.
        has_random: whether some row has a temperature above 0.
        has_filters: whether some row uses top_k, top_p or min_p.
        return_logprob: whether the log-probabilities of the tokens are wanted.
        logits: float32 ``[M, V]``, of the model, where something was done to them before; ``ok`` and ``return_logprob`` are
            of these.
        config: block sizes.

    Returns:
        What was drawn, and the counters, zero again.
    """
    check_counters(counters, scores.shape[0])
    survey = _logits_stats(scores, scores if logits is None else logits, vocabulary, config)
    first = second = jnp.zeros(scores.shape[0], jnp.uint32)
    if has_random and has_filters:
        (first, second), counters = _search_thresholds(scores, survey, sampling, vocabulary, counters, config)
    m, width = scores.shape
    shares = survey.shape[2]
    from pallas_kernels.sample.triton import sample_kernel

    number = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    real = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    tokens, ok, found, _, _, counters = launch(
        sample_kernel,
        [
            scores,
            scores if logits is None else logits,
            vocabulary.invalid_mask(width, scores),
            survey,
            sampling.temperature,
            sampling.top_k,
            sampling.top_p,
            sampling.min_p,
            sampling.seeds,
            sampling.positions,
            first,
            second,
            counters,
        ],
        [
            number((m,)),
            number((m,)),
            real((m if return_logprob else 1,)),
            real((2 if return_logprob else 1, m, shares)),
            number((m, shares)),
            number(counters.shape),
        ],
        grid=(m, shares),
        options=CompileOptions(num_warps=config.num_warps),
        aliases={12: 5},
        V=width,
        **vocabulary.constants(width),
        DRAWN=has_random,
        FILTERS=has_random and has_filters,
        LOGPROB=return_logprob,
        SHARE=config.block_v,
        WIDE=_next_power_of_2(shares),
    )
    return SampleOutput(tokens, ok != 0, found if return_logprob else None), counters


def filter_thresholds(
    scores: jax.Array,
    sampling: SamplingTensors,
    vocabulary: Vocabulary,
    counters: jax.Array,
    config: SampleConfig = SampleConfig(),
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """The lowest scores that rows keep, as ranks: uint32 that are ordered as the scores are, 0 where nothing is asked.

    Args:
        scores: float32 ``[M, V]``.
        sampling: options.
        vocabulary: which ids can be drawn.
        counters: int32 zeros, one for each row or more.
        config: block sizes.

    Returns:
        Those of each row's first search (for top_k, where it has one, else for top_p) and of its second one (for top_p
        after top_k), and the counters, zero again.
    """
    check_counters(counters, scores.shape[0])
    return _search_thresholds(
        scores, _logits_stats(scores, scores, vocabulary, config), sampling, vocabulary, counters, config
    )


def lm_head_sample_tuning_key(rows: int, weight: Tiles) -> tuned.TuningKey[LinearConfig]:
    """What block sizes of :func:`lm_head_sample` depend on."""
    target = _device.current_target()
    rule = linear_heuristic(rows, weight.outputs, weight.num_chunks, target.multiprocessors if target else 128)
    key = f"{tuned.rows_bucket(rows)} n{weight.outputs} k{weight.inputs} {weight.kind} g{weight.group_size}"
    axes = {"block_n": (32, 64), "num_warps": (2, 4, 8), "num_stages": (2, 3, 4, 5, 6)}
    rule = dataclasses.replace(rule, splits=1)
    return tuned.TuningKey("head", key, rule, axes if rows <= 16 else {"block_m": (16, 32, 64), **axes})


def _logits_stats(scores: jax.Array, logits: jax.Array, vocabulary: Vocabulary, config: SampleConfig) -> jax.Array:
    """Float32 ``[3, M, shares]``: highest scores, highest logits, whether some logit is broken."""
    m, width = scores.shape
    shares = math.ceil(width / config.block_v)
    from pallas_kernels.sample.triton import logits_stats_kernel

    (made,) = launch(
        logits_stats_kernel,
        [scores, logits, vocabulary.invalid_mask(width, scores)],
        [jax.ShapeDtypeStruct((3, m, shares), jnp.float32)],
        grid=(m, shares),
        options=CompileOptions(num_warps=config.num_warps),
        V=width,
        **vocabulary.constants(width),
        RAW=logits is not scores,
        SHARE=config.block_v,
    )
    return made


def _search_thresholds(
    scores: jax.Array,
    stats: jax.Array,
    sampling: SamplingTensors,
    vocabulary: Vocabulary,
    counters: jax.Array,
    config: SampleConfig,
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    none = jnp.zeros(scores.shape[0], jnp.uint32)

    def search(before: jax.Array, counters: jax.Array, *, again: bool) -> tuple[jax.Array, jax.Array]:
        edge, left = none, sampling.top_p
        for level in range(_RADIX_PASSES):
            given = (before, edge, left)
            edge, left, counters = _radix_select_pass(
                scores, stats, sampling, vocabulary, given, counters, config, second=again, level=level
            )
        return edge, counters

    # Programs of rows that have nothing to search for end at once: a condition around the second search would cost
    # XLA as many launches as it saves.
    first, counters = search(none, counters, again=False)
    second, counters = search(first, counters, again=True)
    return (first, second), counters


def _radix_select_pass(
    scores: jax.Array,
    stats: jax.Array,
    sampling: SamplingTensors,
    vocabulary: Vocabulary,
    given: tuple[jax.Array, jax.Array, jax.Array],
    counters: jax.Array,
    config: SampleConfig,
    *,
    second: bool,
    level: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Eight more bits of the thresholds of a search; what is still wanted; the counters."""
    m, width = scores.shape
    shares = stats.shape[2]
    from pallas_kernels.sample.triton import radix_select_kernel

    edge, left, _, counters = launch(
        radix_select_kernel,
        [
            scores,
            vocabulary.invalid_mask(width, scores),
            stats,
            sampling.temperature,
            sampling.top_k,
            sampling.top_p,
            sampling.min_p,
            *given,
            counters,
        ],
        [
            jax.ShapeDtypeStruct((m,), jnp.uint32),
            jax.ShapeDtypeStruct((m,), jnp.float32),
            jax.ShapeDtypeStruct((m, shares, 2, 256), jnp.int32),
            jax.ShapeDtypeStruct(counters.shape, jnp.int32),
        ],
        grid=(m, shares),
        options=CompileOptions(num_warps=config.num_warps),
        aliases={10: 3},
        V=width,
        **vocabulary.constants(width),
        SECOND=second,
        LEVEL=level,
        SHARE=config.block_v,
        WIDE=_next_power_of_2(shares),
        RUN=config.blocks_per_sum,
    )
    return edge, left, counters


def _next_power_of_2(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()
