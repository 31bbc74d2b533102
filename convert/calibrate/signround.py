"""Learned rounding: signed gradient descent on one block's output.

SignRound (https://arxiv.org/abs/2309.05516): with a weight's block of scale ``s``, learn an offset ``v`` in
[-1/2, 1/2] for each weight and a factor ``a`` for each scale so that

    w' = s a * clip(round(w / (s a) + v))

keeps what the transformer block gives: each step takes the sign of the gradient of the squared error, with a rate that
falls linearly to zero and sums up to 1/2. Rounding counts as the identity in the gradient. Scales begin where the
search for the least squared error of the weights ends, not at the full range.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.weights import QuantizedTensor, QuantSpec, dequantize, quantize
from glm_jax.weights.params import Path
from glm_jax.weights.quantization import code_range, finish, from_blocks, to_blocks
from glm_jax.weights.quantized_tensor import scale_values

if TYPE_CHECKING:
    import optax

Forward = Callable[[Any, jax.Array], jax.Array]  # (weights by path, inputs [B, T, D]) -> outputs [B, T, D]
_LEAST_FACTOR, _LARGEST_FACTOR = 0.5, 1.25


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """How long and how fast to learn.

    Attributes:
        steps: of the descent.
        rows: windows of text per step.
        seed: of the order of windows.
    """

    steps: int = 200
    rows: int = 4
    seed: int = 0


class Tuned(NamedTuple):
    """What is learnt of one weight: ``offset`` shaped like its blocks, ``factor`` like its scales."""

    offset: jax.Array
    factor: jax.Array


def can_learn(spec: QuantSpec) -> bool:
    """Whether rounding to this storage can be learnt; small floats and zero points are left to the search."""
    return spec.kind in ("int4", "int8") and spec.zero == "none" and spec.outer == "none" and not spec.permuted


def tune(
    forward: Forward,
    plain: Mapping[Path, jax.Array],
    start: Mapping[Path, QuantizedTensor],
    learn: Mapping[Path, jax.Array],
    inputs: np.ndarray,
    targets: np.ndarray,
    settings: Settings,
    advance: Callable[[int], None],
) -> tuple[dict[Path, QuantizedTensor], float, float]:
    """Tunes the quantised weights of one block.

    Args:
        forward: the block.
        plain: every weight of it in float32, quantised ones included, ``[*stack, O, I]`` or of any shape.
        start: the quantised weights as the search left them.
        learn: float32 0 or 1 for each matrix of each stack ``[*stack]`` of the weights to tune; the others stay.
        inputs: float32 ``[N, T, D]``, what the block will see: outputs of the layers before it, quantised.
        targets: float32 ``[N, T, D]``, what the unquantised model has after the block.
        settings: of the descent.
        advance: called with 1 after each step.

    Returns:
        The weights, and the mean squared errors before and after (the start is kept where learning did not help).
    """
    fixed = {path: value for path, value in plain.items() if path not in start}
    fixed |= {path: dequantize(weight) for path, weight in start.items() if path not in learn}
    tuned = {path: _begin(plain[path], start[path]) for path in learn}
    scales = {path: scale_values(start[path])[..., None, None] for path in learn}
    specs = tuple(sorted((path, start[path].spec) for path in learn))
    wanted = {path: plain[path] for path in learn}
    optimiser = _optimiser(settings.steps)
    state = optimiser.init(tuned)
    step = functools.partial(_step, forward, optimiser, specs)
    order = np.random.default_rng(settings.seed)
    for _ in range(settings.steps):
        rows = np.sort(order.choice(len(inputs), min(settings.rows, len(inputs)), replace=False))
        tuned, state = step(tuned, state, wanted, scales, fixed, learn, inputs[rows], targets[rows])
        advance(1)
    before = _error(forward, {**fixed, **{path: dequantize(start[path]) for path in learn}}, inputs, targets, settings)
    rounded = {path: _finish(tuned[path], wanted[path], start[path], learn[path]) for path in learn}
    held = {path: dequantize(weight) for path, weight in rounded.items()}
    after = _error(forward, {**fixed, **held}, inputs, targets, settings)
    return {**start, **(rounded if after < before else {})}, before, after


@functools.cache
def _optimiser(steps: int) -> optax.GradientTransformation:
    """One object for all layers, which then share a compilation."""
    import optax  # takes half a second, and only learning needs it

    return optax.sign_sgd(optax.linear_schedule(1.0 / steps, 0.0, steps))


def _begin(plain: jax.Array, start: QuantizedTensor) -> Tuned:
    blocks = jax.eval_shape(lambda w: to_blocks(w, start.spec), plain)
    return Tuned(jnp.zeros(blocks.shape, jnp.float32), jnp.ones((*blocks.shape[:-2], 1, 1), jnp.float32))


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(3, 4))
def _step(
    forward: Forward,
    optimiser: optax.GradientTransformation,
    specs: tuple[tuple[Path, QuantSpec], ...],
    tuned: dict[Path, Tuned],
    state: Any,
    plain: dict[Path, jax.Array],
    scales: dict[Path, jax.Array],
    fixed: dict[Path, jax.Array],
    learn: dict[Path, jax.Array],
    inputs: jax.Array,
    targets: jax.Array,
) -> tuple[dict[Path, Tuned], Any]:
    def loss(tuned: dict[Path, Tuned]) -> jax.Array:
        made = {path: _soft(tuned[path], plain[path], scales[path], spec) for path, spec in specs}
        return jnp.mean(jnp.square(forward({**fixed, **made}, inputs) - targets))

    import optax

    gradients = jax.grad(loss)(tuned)
    gradients = {path: _masked(gradient, learn[path]) for path, gradient in gradients.items()}
    updates, state = optimiser.update(gradients, state, tuned)
    moved = optax.apply_updates(tuned, updates)
    return {path: _limited(value) for path, value in cast(dict[Path, Tuned], moved).items()}, state


def _masked(gradient: Tuned, learn: jax.Array) -> Tuned:
    wide = learn.reshape(*learn.shape, *[1] * 4)
    return Tuned(gradient.offset * wide, gradient.factor * wide)


def _limited(tuned: Tuned) -> Tuned:
    return Tuned(jnp.clip(tuned.offset, -0.5, 0.5), jnp.clip(tuned.factor, _LEAST_FACTOR, _LARGEST_FACTOR))


def _soft(tuned: Tuned, plain: jax.Array, scales: jax.Array, spec: QuantSpec) -> jax.Array:
    """The weight that the stored one will be, with a gradient."""
    scale = _stored_scale(tuned, scales, spec)
    codes = _codes(tuned, to_blocks(plain, spec), scale, spec)
    return from_blocks(codes * scale, plain.shape)


def _stored_scale(tuned: Tuned, scales: jax.Array, spec: QuantSpec) -> jax.Array:
    scale = scales * tuned.factor
    return _straight_through(scale, scale.astype(jnp.dtype(spec.scale)).astype(jnp.float32))


def _codes(tuned: Tuned, blocks: jax.Array, scale: jax.Array, spec: QuantSpec) -> jax.Array:
    shifted = blocks / scale + tuned.offset
    return jnp.clip(_straight_through(shifted, jnp.round(shifted)), *code_range(spec))


def _straight_through(x: jax.Array, rounded: jax.Array) -> jax.Array:
    return x + jax.lax.stop_gradient(rounded - x)


@jax.jit
def _finish(tuned: Tuned, plain: jax.Array, start: QuantizedTensor, learn: jax.Array) -> QuantizedTensor:
    spec = start.spec
    scale = _stored_scale(tuned, scale_values(start)[..., None, None], spec)
    codes, scales, _ = finish(
        _codes(tuned, to_blocks(plain, spec), scale, spec), scale, jnp.zeros_like(scale), spec, plain.shape
    )
    made = {"codes": codes, "scales": scales}

    def choose(name: str, array: jax.Array) -> jax.Array:
        # Matrices that were not to be learnt keep the codes of the search, to the bit.
        return jnp.where(learn.reshape(*learn.shape, 1, 1) > 0, made[name], array)

    return start.map(choose)


def _error(
    forward: Forward, weights: dict[Path, jax.Array], inputs: np.ndarray, targets: np.ndarray, settings: Settings
) -> float:
    total = 0.0
    for at in range(0, len(inputs), settings.rows):
        part = slice(at, at + settings.rows)
        total += float(_squared(forward, weights, inputs[part], targets[part]))
    return total / targets.size


@functools.partial(jax.jit, static_argnums=0)
def _squared(forward: Forward, weights: dict[Path, jax.Array], inputs: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(forward(weights, inputs) - targets))


def start_from(plain: jax.Array, spec: QuantSpec, dtype: Any) -> QuantizedTensor:
    """The weight with the scales of the search, one matrix of a stack at a time."""
    if plain.ndim == 2:
        return quantize(plain, spec, "mse", dtype)
    parts = [quantize(plain[i : i + 1], spec, "mse", dtype) for i in range(len(plain))]
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *parts)
