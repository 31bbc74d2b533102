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
from glm_jax.weights.params import ParamPath
from glm_jax.weights.quantization import from_blocks, pack_components, qvalue_range, to_blocks
from glm_jax.weights.quantized_tensor import decode_scales

if TYPE_CHECKING:
    import optax

Forward = Callable[[Any, jax.Array], jax.Array]  # (weights by path, inputs [B, T, D]) -> outputs [B, T, D]
_MIN_SCALE_FACTOR, _MAX_SCALE_FACTOR = 0.5, 1.25


@dataclasses.dataclass(frozen=True, slots=True)
class SignRoundConfig:
    """How long and how fast to learn.

    Attributes:
        steps: of the descent.
        batch_size: windows of text per step.
        seed: of the order of windows.
    """

    steps: int = 200
    batch_size: int = 4
    seed: int = 0


class RoundingParams(NamedTuple):
    """What is learned of one weight: ``offset`` shaped like its blocks, ``scale_factor`` like its scales."""

    offset: jax.Array
    scale_factor: jax.Array


def supports_signround(spec: QuantSpec) -> bool:
    """Whether rounding to this storage can be learned; small floats and zero points are left to the search."""
    return spec.kind in ("int4", "int8") and spec.zero == "none" and spec.outer == "none" and not spec.permuted


def tune_block(
    forward: Forward,
    weights: Mapping[ParamPath, jax.Array],
    initial: Mapping[ParamPath, QuantizedTensor],
    learn_mask: Mapping[ParamPath, jax.Array],
    inputs: np.ndarray,
    targets: np.ndarray,
    config: SignRoundConfig,
    advance: Callable[[int], None],
) -> tuple[dict[ParamPath, QuantizedTensor], float, float]:
    """Tunes the quantized weights of one block.

    Args:
        forward: the block.
        weights: every weight of it in float32, quantized ones included, ``[*stack, O, I]`` or of any shape.
        initial: the quantized weights as the search left them.
        learn_mask: float32 0 or 1 for each matrix of each stack ``[*stack]`` of the weights to tune; the others stay.
        inputs: float32 ``[N, T, D]``, what the block will see: outputs of the layers before it, quantized.
        targets: float32 ``[N, T, D]``, what the unquantized model has after the block.
        config: of the descent.
        advance: called with 1 after each step.

    Returns:
        The weights, and the mean squared errors before and after (the start is kept where learning did not help).
    """
    fixed = {path: value for path, value in weights.items() if path not in initial}
    fixed |= {path: dequantize(weight) for path, weight in initial.items() if path not in learn_mask}
    tuned = {path: _init_params(weights[path], initial[path]) for path in learn_mask}
    scales = {path: decode_scales(initial[path])[..., None, None] for path in learn_mask}
    specs = tuple(sorted((path, initial[path].spec) for path in learn_mask))
    wanted = {path: weights[path] for path in learn_mask}
    optimizer = _make_optimizer(config.steps)
    state = optimizer.init(tuned)
    step = functools.partial(_step, forward, optimizer, specs)
    order = np.random.default_rng(config.seed)
    for _ in range(config.steps):
        rows = np.sort(order.choice(len(inputs), min(config.batch_size, len(inputs)), replace=False))
        tuned, state = step(tuned, state, wanted, scales, fixed, learn_mask, inputs[rows], targets[rows])
        advance(1)
    before = _mean_squared_error(
        forward, {**fixed, **{path: dequantize(initial[path]) for path in learn_mask}}, inputs, targets, config
    )
    rounded = {
        path: _quantize_learned(tuned[path], wanted[path], initial[path], learn_mask[path]) for path in learn_mask
    }
    held = {path: dequantize(weight) for path, weight in rounded.items()}
    after = _mean_squared_error(forward, {**fixed, **held}, inputs, targets, config)
    return {**initial, **(rounded if after < before else {})}, before, after


@functools.cache
def _make_optimizer(steps: int) -> optax.GradientTransformation:
    """One object for all layers, which then share a compilation."""
    import optax  # takes half a second, and only learning needs it

    return optax.sign_sgd(optax.linear_schedule(1.0 / steps, 0.0, steps))


def _init_params(plain: jax.Array, start: QuantizedTensor) -> RoundingParams:
    blocks = jax.eval_shape(lambda w: to_blocks(w, start.spec), plain)
    return RoundingParams(jnp.zeros(blocks.shape, jnp.float32), jnp.ones((*blocks.shape[:-2], 1, 1), jnp.float32))


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(3, 4))
def _step(
    forward: Forward,
    optimizer: optax.GradientTransformation,
    specs: tuple[tuple[ParamPath, QuantSpec], ...],
    tuned: dict[ParamPath, RoundingParams],
    state: Any,
    plain: dict[ParamPath, jax.Array],
    scales: dict[ParamPath, jax.Array],
    fixed: dict[ParamPath, jax.Array],
    learn: dict[ParamPath, jax.Array],
    inputs: jax.Array,
    targets: jax.Array,
) -> tuple[dict[ParamPath, RoundingParams], Any]:
    def loss(tuned: dict[ParamPath, RoundingParams]) -> jax.Array:
        made = {path: _fake_quantize(tuned[path], plain[path], scales[path], spec) for path, spec in specs}
        return jnp.mean(jnp.square(forward({**fixed, **made}, inputs) - targets))

    import optax

    gradients = jax.grad(loss)(tuned)
    gradients = {path: _mask_gradient(gradient, learn[path]) for path, gradient in gradients.items()}
    updates, state = optimizer.update(gradients, state, tuned)
    moved = optax.apply_updates(tuned, updates)
    return {path: _clip_params(value) for path, value in cast(dict[ParamPath, RoundingParams], moved).items()}, state


def _mask_gradient(gradient: RoundingParams, learn: jax.Array) -> RoundingParams:
    wide = learn.reshape(*learn.shape, *[1] * 4)
    return RoundingParams(gradient.offset * wide, gradient.scale_factor * wide)


def _clip_params(tuned: RoundingParams) -> RoundingParams:
    return RoundingParams(
        jnp.clip(tuned.offset, -0.5, 0.5), jnp.clip(tuned.scale_factor, _MIN_SCALE_FACTOR, _MAX_SCALE_FACTOR)
    )


def _fake_quantize(tuned: RoundingParams, plain: jax.Array, scales: jax.Array, spec: QuantSpec) -> jax.Array:
    """The weight that the stored one will be, with a gradient."""
    scale = _stored_scale(tuned, scales, spec)
    codes = _round_codes(tuned, to_blocks(plain, spec), scale, spec)
    return from_blocks(codes * scale, plain.shape)


def _stored_scale(tuned: RoundingParams, scales: jax.Array, spec: QuantSpec) -> jax.Array:
    scale = scales * tuned.scale_factor
    return _straight_through(scale, scale.astype(jnp.dtype(spec.scale)).astype(jnp.float32))


def _round_codes(tuned: RoundingParams, blocks: jax.Array, scale: jax.Array, spec: QuantSpec) -> jax.Array:
    shifted = blocks / scale + tuned.offset
    return jnp.clip(_straight_through(shifted, jnp.round(shifted)), *qvalue_range(spec))


def _straight_through(x: jax.Array, rounded: jax.Array) -> jax.Array:
    return x + jax.lax.stop_gradient(rounded - x)


@jax.jit
def _quantize_learned(
    tuned: RoundingParams, plain: jax.Array, start: QuantizedTensor, learn: jax.Array
) -> QuantizedTensor:
    spec = start.spec
    scale = _stored_scale(tuned, decode_scales(start)[..., None, None], spec)
    codes, scales, _ = pack_components(
        _round_codes(tuned, to_blocks(plain, spec), scale, spec), scale, jnp.zeros_like(scale), spec, plain.shape
    )
    made = {"codes": codes, "scales": scales}

    def choose(name: str, array: jax.Array) -> jax.Array:
        # Matrices that were not to be learned keep the codes of the search, to the bit.
        return jnp.where(learn.reshape(*learn.shape, 1, 1) > 0, made[name], array)

    return start.map_components(choose)


def _mean_squared_error(
    forward: Forward,
    weights: dict[ParamPath, jax.Array],
    inputs: np.ndarray,
    targets: np.ndarray,
    settings: SignRoundConfig,
) -> float:
    total = 0.0
    for at in range(0, len(inputs), settings.batch_size):
        part = slice(at, at + settings.batch_size)
        total += float(_squared_error_sum(forward, weights, inputs[part], targets[part]))
    return total / targets.size


@functools.partial(jax.jit, static_argnums=0)
def _squared_error_sum(
    forward: Forward, weights: dict[ParamPath, jax.Array], inputs: jax.Array, targets: jax.Array
) -> jax.Array:
    return jnp.sum(jnp.square(forward(weights, inputs) - targets))


def quantize_by_search(weight: jax.Array, spec: QuantSpec, dtype: Any) -> QuantizedTensor:
    """The weight with the scales of the search, one matrix of a stack at a time."""
    if weight.ndim == 2:
        return quantize(weight, spec, "mse", dtype)
    parts = [quantize(weight[i : i + 1], spec, "mse", dtype) for i in range(len(weight))]
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *parts)
