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
from pallas_kernels._launch import Shape, check_counters, launch
from pallas_kernels.quant_matmul.config import LinearShape, linear_shape
from pallas_kernels.quant_matmul.op import Squares, compute_dtype, constants, operands
from pallas_kernels.sample.config import SampleShape
from pallas_kernels.tiles import Tiles

_LEVELS = 4  # of eight bits each
_WINDOW = 1024  # candidates that a program looks at together


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
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
        valid: ids from here on cannot.
        unused: nor can these.
    """

    valid: int
    unused: tuple[int, ...] = ()

    def there(self, width: int) -> np.ndarray:
        """Bool ``[width]``: whether each id can be drawn."""
        known = np.arange(width) < self.valid
        known[[token for token in self.unused if token < width]] = False
        return known

    def constants(self, width: int) -> dict[str, Any]:
        """As the kernels take them."""
        return {"VALID": min(self.valid, width), "MISSING": bool(self.unused)}

    def missing(self, width: int, instead: jax.Array) -> jax.Array:
        """Int8 ``[width]``, 1 for ids that cannot be drawn; where the kernels do not look, an array that is there."""
        return jnp.asarray(~self.there(width), jnp.int8) if self.unused else instead


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Drawn:
    """What was drawn.

    Attributes:
        tokens: int32 ``[M]``.
        ok: bool ``[M]``; False where a logit is NaN or +inf, or there is nothing to draw.
        logprob: float32 ``[M]`` of the tokens, or None.
    """

    tokens: jax.Array
    ok: jax.Array
    logprob: jax.Array | None = None


def head(
    x: jax.Array,
    weight: Tiles,
    rows: Rows,
    vocabulary: Vocabulary,
    counters: jax.Array,
    *,
    drawn: bool,
    squares: Squares | None = None,
    eps: float = 0.0,
    shape: LinearShape | None = None,
) -> tuple[Drawn, jax.Array]:
    """Tokens of the logits ``factor(x) * (x @ weight.T)``, which are never written anywhere; filters are ignored.

    A token is the id with the highest logit, the lowest among equals; or, in rows with a temperature, with the highest
    ``noise - (top - logit) / temperature``. There, a block of ids finds its best before anybody knows ``top``, and with
    its own highest logit instead: the order is the same but for rounding, so the token is the one that the formula
    gives from the same logits unless its two highest keys lie within 2^-15 of each other. (Keys that can win have gaps
    below 26, whose roundings sum up to less than that; and the lead of the highest key is below d with a probability
    below d.) Nothing of a row depends on the other rows.

    Args:
        x: ``[M, K]``; where ``squares`` are given, already multiplied by the norm's weight.
        weight: ``[V, K]``.
        rows: options.
        vocabulary: which ids can be drawn.
        counters: int32 zeros, one for each block of rows or more.
        drawn: whether some row has a temperature above 0; if not, they are not looked at.
        squares: of x before the norm's weight, for a norm.
        eps: of the norm.
        shape: block sizes, without splits; chosen for the card unless given.

    Returns:
        What was drawn, and the counters, zero again.
    """
    (m, stride), ids = x.shape, weight.outputs
    shape = shape or tuned.best(head_problem(m, weight))
    check_counters(counters, math.ceil(m / shape.block_m))
    blocks = math.ceil(ids / shape.block_n)
    height = shape.block_m if m > 1 else 1
    from pallas_kernels.sample.triton import head_kernel

    number = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    tokens, ok, _, _, counters = launch(
        head_kernel,
        [
            x,
            x if squares is None else squares.parts,
            *operands(weight),
            vocabulary.missing(ids, x),
            rows.temperature,
            rows.seeds,
            rows.positions,
            counters,
        ],
        [
            number((m,)),
            number((m,)),
            jax.ShapeDtypeStruct((3 if drawn else 1, m, blocks), jnp.float32),
            number((2, m, blocks)),
            number(counters.shape),
        ],
        grid=(math.ceil(m / shape.block_m), blocks),
        shape=Shape(num_warps=shape.num_warps, num_stages=shape.num_stages),
        aliases={9: 4},
        M=m,
        V=ids,
        STRIDE=stride,
        **constants(weight),
        **vocabulary.constants(ids),
        DRAWN=drawn,
        BM=shape.block_m,
        BN=shape.block_n,
        R=height,
        W=min(_WINDOW // height, _power(blocks)),
        FACTOR=squares is not None,
        FIRST=squares.first if squares else 0,
        PARTS=squares.count if squares else 1,
        ALL_PARTS=squares.parts.shape[1] if squares else 1,
        EPS=eps,
        DT=compute_dtype(x.dtype),
    )
    return Drawn(tokens, ok != 0), counters


def draw(
    scores: jax.Array,
    rows: Rows,
    vocabulary: Vocabulary,
    counters: jax.Array,
    *,
    drawn: bool,
    filters: bool,
    logprob: bool = False,
    logits: jax.Array | None = None,
    shape: SampleShape = SampleShape(),
) -> tuple[Drawn, jax.Array]:
    """Tokens of logits, by the rules of :func:`glm_jax.sampling.sample` from the temperature on.

    The ids that top_k keeps are the very ones, and so are the keys of the draw but for the rounding of a logarithm. Of
    min_p and top_p the ids can only differ whose gap, or the probability above them, is within 1e-5 of the edge: there
    an exponential or the order of a sum decides. That order depends on the width of a row alone.

    Args:
        scores: float32 ``[M, V]``.
        rows: options.
        vocabulary: which ids can be drawn.
        counters: int32 zeros, one for each row or more.
        drawn: whether some row has a temperature above 0.
        filters: whether some row uses top_k, top_p or min_p.
        logprob: whether the log-probabilities of the tokens are wanted.
        logits: float32 ``[M, V]``, of the model, where something was done to them before; ``ok`` and ``logprob`` are
            of these.
        shape: block sizes.

    Returns:
        What was drawn, and the counters, zero again.
    """
    check_counters(counters, scores.shape[0])
    survey = _survey(scores, scores if logits is None else logits, vocabulary, shape)
    first = second = jnp.zeros(scores.shape[0], jnp.uint32)
    if drawn and filters:
        (first, second), counters = _thresholds(scores, survey, rows, vocabulary, counters, shape)
    m, width = scores.shape
    shares = survey.shape[2]
    from pallas_kernels.sample.triton import draw_kernel

    number = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    real = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    tokens, ok, found, _, _, counters = launch(
        draw_kernel,
        [
            scores,
            scores if logits is None else logits,
            vocabulary.missing(width, scores),
            survey,
            rows.temperature,
            rows.top_k,
            rows.top_p,
            rows.min_p,
            rows.seeds,
            rows.positions,
            first,
            second,
            counters,
        ],
        [
            number((m,)),
            number((m,)),
            real((m if logprob else 1,)),
            real((2 if logprob else 1, m, shares)),
            number((m, shares)),
            number(counters.shape),
        ],
        grid=(m, shares),
        shape=Shape(num_warps=shape.num_warps),
        aliases={12: 5},
        V=width,
        **vocabulary.constants(width),
        DRAWN=drawn,
        FILTERS=drawn and filters,
        LOGPROB=logprob,
        SHARE=shape.share,
        WIDE=_power(shares),
    )
    return Drawn(tokens, ok != 0, found if logprob else None), counters


def thresholds(
    scores: jax.Array,
    rows: Rows,
    vocabulary: Vocabulary,
    counters: jax.Array,
    shape: SampleShape = SampleShape(),
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """The lowest scores that rows keep, as ranks: uint32 that are ordered as the scores are, 0 where nothing is asked.

    Args:
        scores: float32 ``[M, V]``.
        rows: options.
        vocabulary: which ids can be drawn.
        counters: int32 zeros, one for each row or more.
        shape: block sizes.

    Returns:
        Those of each row's first search (for top_k, where it has one, else for top_p) and of its second one (for top_p
        after top_k), and the counters, zero again.
    """
    check_counters(counters, scores.shape[0])
    return _thresholds(scores, _survey(scores, scores, vocabulary, shape), rows, vocabulary, counters, shape)


def head_problem(rows: int, weight: Tiles) -> tuned.Problem[LinearShape]:
    """What block sizes of :func:`head` depend on."""
    target = _device.target()
    rule = linear_shape(rows, weight.outputs, weight.chunks, target.multiprocessors if target else 128)
    key = f"{tuned.rows_key(rows)} n{weight.outputs} k{weight.inputs} {weight.kind} g{weight.group}"
    axes = {"block_n": (32, 64), "num_warps": (2, 4, 8), "num_stages": (2, 3, 4, 5, 6)}
    rule = dataclasses.replace(rule, splits=1)
    return tuned.Problem("head", key, rule, axes if rows <= 16 else {"block_m": (16, 32, 64), **axes})


def _survey(scores: jax.Array, logits: jax.Array, vocabulary: Vocabulary, shape: SampleShape) -> jax.Array:
    """Float32 ``[3, M, shares]``: highest scores, highest logits, whether some logit is broken."""
    m, width = scores.shape
    shares = math.ceil(width / shape.share)
    from pallas_kernels.sample.triton import survey_kernel

    (made,) = launch(
        survey_kernel,
        [scores, logits, vocabulary.missing(width, scores)],
        [jax.ShapeDtypeStruct((3, m, shares), jnp.float32)],
        grid=(m, shares),
        shape=Shape(num_warps=shape.num_warps),
        V=width,
        **vocabulary.constants(width),
        RAW=logits is not scores,
        SHARE=shape.share,
    )
    return made


def _thresholds(
    scores: jax.Array,
    survey: jax.Array,
    rows: Rows,
    vocabulary: Vocabulary,
    counters: jax.Array,
    shape: SampleShape,
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    none = jnp.zeros(scores.shape[0], jnp.uint32)

    def search(before: jax.Array, counters: jax.Array, *, again: bool) -> tuple[jax.Array, jax.Array]:
        edge, left = none, rows.top_p
        for level in range(_LEVELS):
            given = (before, edge, left)
            edge, left, counters = _narrow(
                scores, survey, rows, vocabulary, given, counters, shape, again=again, level=level
            )
        return edge, counters

    # Programs of rows that have nothing to search for end at once: a condition around the second search would cost
    # XLA as many launches as it saves.
    first, counters = search(none, counters, again=False)
    second, counters = search(first, counters, again=True)
    return (first, second), counters


def _narrow(
    scores: jax.Array,
    survey: jax.Array,
    rows: Rows,
    vocabulary: Vocabulary,
    given: tuple[jax.Array, jax.Array, jax.Array],
    counters: jax.Array,
    shape: SampleShape,
    *,
    again: bool,
    level: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Eight more bits of the thresholds of a search; what is still wanted; the counters."""
    m, width = scores.shape
    shares = survey.shape[2]
    from pallas_kernels.sample.triton import narrow_kernel

    edge, left, _, counters = launch(
        narrow_kernel,
        [
            scores,
            vocabulary.missing(width, scores),
            survey,
            rows.temperature,
            rows.top_k,
            rows.top_p,
            rows.min_p,
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
        shape=Shape(num_warps=shape.num_warps),
        aliases={10: 3},
        V=width,
        **vocabulary.constants(width),
        SECOND=again,
        LEVEL=level,
        SHARE=shape.share,
        WIDE=_power(shares),
        RUN=shape.run,
    )
    return edge, left, counters


def _power(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()
