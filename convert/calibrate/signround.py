"""Learned rounding: signed gradient descent on the output of one transformer block.

SignRound (https://arxiv.org/abs/2309.05516) learns, for a quantization block with scale ``s``, an offset ``v`` in
[-1/2, 1/2] for each weight and a factor ``a`` for each scale, so that

    w' = s a * clip(round(w / (s a) + v))

preserves the output of the transformer block. Each step follows the sign of the gradient of the squared error, with a
learning rate that falls linearly to zero and sums up to 1/2. The gradient treats rounding as the identity. Scales start
at the result of the search for the least squared error of the weights, not at the full range.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

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
    """Settings of the gradient descent.

    Attributes:
        steps: Number of steps.
        batch_size: Windows of text per step.
        seed: Seed for the choice of windows.
    """

    steps: int = 200
    batch_size: int = 4
    seed: int = 0


class RoundingParams(NamedTuple):
    """The learned parameters of one weight: ``offset`` has the shape of its blocks, ``scale_factor`` of its scales."""

    offset: jax.Array
    scale_factor: jax.Array


def supports_signround(spec: QuantSpec) -> bool:
    """Returns whether rounding to this storage can be learned; small floats and zero points cannot."""
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
        forward: The block.
        weights: All weights of the block in float32, including those that are quantized; matrices are
            ``[*stack, O, I]``.
        initial: Quantized weights as the search for the least squared error left them.
        learn_mask: For each weight to tune, float32 ``[*stack]``: 1 for matrices to tune, 0 for those to keep.
        inputs: Outputs of the quantized layers before the block, float32 ``[N, T, D]``.
        targets: Outputs of the block in the unquantized model, float32 ``[N, T, D]``.
        config: Settings of the descent.
        advance: Callback that receives 1 after each step.

    Returns:
        The quantized weights, and the mean squared error of the block's output before and after. The initial weights
        are returned if tuning did not lower the error.
    """
    fixed = {path: value for path, value in weights.items() if path not in initial}
    fixed |= {path: dequantize(weight) for path, weight in initial.items() if path not in learn_mask}
    tuned = {path: _init_params(weights[path], initial[path]) for path in learn_mask}
    scales = {path: decode_scales(initial[path])[..., None, None] for path in learn_mask}
    specs = tuple(sorted((path, initial[path].spec) for path in learn_mask))
    plain = {path: weights[path] for path in learn_mask}
    optimizer = _make_optimizer(config.steps)
    state = optimizer.init(tuned)
    step = functools.partial(_step, forward, optimizer, specs)
    rng = np.random.default_rng(config.seed)
    for _ in range(config.steps):
        rows = np.sort(rng.choice(len(inputs), min(config.batch_size, len(inputs)), replace=False))
        tuned, state = step(tuned, state, plain, scales, fixed, learn_mask, inputs[rows], targets[rows])
        advance(1)

    def error(quantized: Mapping[ParamPath, QuantizedTensor]) -> float:
        values = {path: dequantize(quantized[path]) for path in learn_mask}
        return _mean_squared_error(forward, {**fixed, **values}, inputs, targets, config.batch_size)

    rounded = {
        path: _quantize_learned(tuned[path], plain[path], initial[path], learn_mask[path]) for path in learn_mask
    }
    before, after = error(initial), error(rounded)
    return {**initial, **(rounded if after < before else {})}, before, after


@functools.cache
def _make_optimizer(steps: int) -> optax.GradientTransformation:
    """Returns one optimizer object for all layers, so that they share a compilation."""
    import optax  # takes half a second, and only learned rounding needs it

    return optax.sign_sgd(optax.linear_schedule(1.0 / steps, 0.0, steps))


def _init_params(plain: jax.Array, initial: QuantizedTensor) -> RoundingParams:
    blocks = jax.eval_shape(lambda w: to_blocks(w, initial.spec), plain)
    return RoundingParams(jnp.zeros(blocks.shape, jnp.float32), jnp.ones((*blocks.shape[:-2], 1, 1), jnp.float32))


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(3, 4))
def _step(
    forward: Forward,
    optimizer: optax.GradientTransformation,
    specs: tuple[tuple[ParamPath, QuantSpec], ...],
    tuned: dict[ParamPath, RoundingParams],
    state: optax.OptState,
    plain: dict[ParamPath, jax.Array],
    scales: dict[ParamPath, jax.Array],
    fixed: dict[ParamPath, jax.Array],
    learn_mask: dict[ParamPath, jax.Array],
    inputs: jax.Array,
    targets: jax.Array,
) -> tuple[dict[ParamPath, RoundingParams], optax.OptState]:
    def loss(tuned: dict[ParamPath, RoundingParams]) -> jax.Array:
        values = {path: _fake_quantize(tuned[path], plain[path], scales[path], spec) for path, spec in specs}
        return jnp.mean(jnp.square(forward({**fixed, **values}, inputs) - targets))

    gradients = jax.grad(loss)(tuned)
    gradients = {path: _mask_gradient(gradient, learn_mask[path]) for path, gradient in gradients.items()}
    updates, state = optimizer.update(gradients, state, tuned)
    updated = cast(dict[ParamPath, RoundingParams], jax.tree.map(jnp.add, tuned, updates))
    return {path: _clip_params(params) for path, params in updated.items()}, state


def _mask_gradient(gradient: RoundingParams, learn_mask: jax.Array) -> RoundingParams:
    mask = learn_mask.reshape(*learn_mask.shape, *[1] * 4)
    return RoundingParams(gradient.offset * mask, gradient.scale_factor * mask)


def _clip_params(tuned: RoundingParams) -> RoundingParams:
    return RoundingParams(
        jnp.clip(tuned.offset, -0.5, 0.5), jnp.clip(tuned.scale_factor, _MIN_SCALE_FACTOR, _MAX_SCALE_FACTOR)
    )


def _fake_quantize(tuned: RoundingParams, plain: jax.Array, scales: jax.Array, spec: QuantSpec) -> jax.Array:
    """Returns the dequantized value of the weight as it will be stored, with a gradient."""
    scale = _stored_scale(tuned, scales, spec)
    qvalues = _round_qvalues(tuned, to_blocks(plain, spec), scale, spec)
    return from_blocks(qvalues * scale, plain.shape)


def _stored_scale(tuned: RoundingParams, scales: jax.Array, spec: QuantSpec) -> jax.Array:
    scale = scales * tuned.scale_factor
    return _straight_through(scale, scale.astype(jnp.dtype(spec.scale)).astype(jnp.float32))


def _round_qvalues(tuned: RoundingParams, blocks: jax.Array, scale: jax.Array, spec: QuantSpec) -> jax.Array:
    shifted = blocks / scale + tuned.offset
    return jnp.clip(_straight_through(shifted, jnp.round(shifted)), *qvalue_range(spec))


def _straight_through(x: jax.Array, rounded: jax.Array) -> jax.Array:
    return x + jax.lax.stop_gradient(rounded - x)


@jax.jit
def _quantize_learned(
    tuned: RoundingParams, plain: jax.Array, initial: QuantizedTensor, learn_mask: jax.Array
) -> QuantizedTensor:
    spec = initial.spec
    scale = _stored_scale(tuned, decode_scales(initial)[..., None, None], spec)
    codes, scales, _ = pack_components(
        _round_qvalues(tuned, to_blocks(plain, spec), scale, spec), scale, jnp.zeros_like(scale), spec, plain.shape
    )
    components = {"codes": codes, "scales": scales}

    def select(name: str, array: jax.Array) -> jax.Array:
        # Matrices outside the mask keep the result of the search bit for bit.
        return jnp.where(learn_mask.reshape(*learn_mask.shape, 1, 1) > 0, components[name], array)

    return initial.map_components(select)


def _mean_squared_error(
    forward: Forward,
    weights: dict[ParamPath, jax.Array],
    inputs: np.ndarray,
    targets: np.ndarray,
    batch_size: int,
) -> float:
    total = 0.0
    for start in range(0, len(inputs), batch_size):
        batch = slice(start, start + batch_size)
        total += float(_squared_error_sum(forward, weights, inputs[batch], targets[batch]))
    return total / targets.size


@functools.partial(jax.jit, static_argnums=0)
def _squared_error_sum(
    forward: Forward, weights: dict[ParamPath, jax.Array], inputs: jax.Array, targets: jax.Array
) -> jax.Array:
    return jnp.sum(jnp.square(forward(weights, inputs) - targets))


def quantize_by_search(weight: jax.Array, spec: QuantSpec, dtype: DTypeLike) -> QuantizedTensor:
    """Quantizes a weight ``[*stack, O, I]`` with the scales of least squared error, one matrix of a stack at a time."""
    if weight.ndim == 2:
        return quantize(weight, spec, "mse", dtype)
    matrices = [quantize(weight[i : i + 1], spec, "mse", dtype) for i in range(len(weight))]
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *matrices)
