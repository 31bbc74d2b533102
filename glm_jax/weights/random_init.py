"""Random parameters from an integer hash: the same bits on any machine, device count and JAX version."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable
from typing import TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from glm_jax.config import Config
from glm_jax.sharding import Rules
from glm_jax.weights.bf16_bits import Bfloat16Bits
from glm_jax.weights.params import (
    ParamPath,
    ParamSpec,
    ParamTree,
    is_held_as_bits,
    map_with_path,
    named_sharding,
    param_specs,
)
from pallas_kernels.random_arrays import mix_bits

ArrayT = TypeVar("ArrayT", jax.Array, np.ndarray)

_RANDOM_BLOCK_VALUES = 1 << 16


def init_params(
    cfg: Config, seed: int = 0, dtype: DTypeLike = jnp.bfloat16, rules: Rules = Rules(), mesh: Mesh | None = None
) -> ParamTree:
    """Random parameters of realistic scale (logits with a standard deviation near 1), built on the device.

    Each matrix depends on (seed, path, layer, expert) alone. So a model of fewer layers is the beginning of a deeper
    one, and :func:`random_matrix` computes any single matrix with the same bits on any machine.
    """
    return map_with_path(lambda path, spec: init_leaf(cfg, path, spec, seed, dtype, rules, mesh), param_specs(cfg))


def init_leaf(
    cfg: Config,
    path: ParamPath,
    spec: ParamSpec,
    seed: int = 0,
    dtype: DTypeLike = jnp.bfloat16,
    rules: Rules = Rules(),
    mesh: Mesh | None = None,
) -> jax.Array | Bfloat16Bits:
    """One parameter of :func:`init_params`."""
    sharding = named_sharding(spec, rules, mesh)
    kind = jnp.dtype(spec.dtype or dtype)
    if spec.init != "normal":
        return jnp.full(spec.shape, 1.0 if spec.init == "ones" else 0.0, kind, device=sharding)
    first_layer = cfg.layer_groups[int(path[1])].start if path[0] == "runs" else 0
    indices = np.ndindex(spec.shape[: spec.stack_ndim])
    keys = [_random_key(path, seed, (index[0] + first_layer, *index[1:]) if index else ()) for index in indices]
    as_bits = is_held_as_bits(spec, dtype, mesh)
    values = _random_stack(sharding)(
        np.asarray(keys, np.uint32), spec.shape, spec.stack_ndim, spec.scale, kind.name, as_bits
    )
    return Bfloat16Bits(values) if as_bits else values


def random_matrix(
    path: ParamPath, spec: ParamSpec, seed: int, dtype: DTypeLike, layer: int, index: tuple[int, ...] = ()
) -> np.ndarray:
    """One matrix of :func:`init_params`, bit for bit, on the host and without the stack around it.

    Args:
        path: Path of the parameter in the tree.
        spec: Spec of the whole parameter.
        seed: Seed of the model.
        dtype: Dtype of the model.
        layer: Number of the layer in the model; ignored for parameters without a layer axis.
        index: Position in the stacked axes after the layer axis (expert or head).
    """
    kind, shape = jnp.dtype(spec.dtype or dtype), spec.shape[spec.stack_ndim :]
    if spec.init != "normal":
        return np.full(shape, 1.0 if spec.init == "ones" else 0.0, kind)
    key = np.uint32(_random_key(path, seed, (layer, *index) if spec.stack_ndim else ()))
    values = np.empty(math.prod(shape), kind)
    # Blocks stay in the CPU's cache: the temporaries of a whole embedding would take eight times its memory.
    for start in range(0, values.size, _RANDOM_BLOCK_VALUES):
        counters = np.arange(start, min(start + _RANDOM_BLOCK_VALUES, values.size), dtype=np.uint32)
        values[start : start + _RANDOM_BLOCK_VALUES] = _to_normal(mix_bits(counters ^ key), spec.scale)
    return values.reshape(shape)


def random_matrix_on_device(
    path: ParamPath, spec: ParamSpec, seed: int, dtype: DTypeLike, layer: int, index: tuple[int, ...] = ()
) -> jax.Array:
    """The matrix of :func:`random_matrix`, computed on JAX's default device."""
    kind, shape = jnp.dtype(spec.dtype or dtype), spec.shape[spec.stack_ndim :]
    if spec.init != "normal":
        return jnp.full(shape, 1.0 if spec.init == "ones" else 0.0, kind)
    keys = np.asarray([_random_key(path, seed, (layer, *index) if spec.stack_ndim else ())], np.uint32)
    return _random_stack(None)(keys, shape, 0, spec.scale, kind.name, False)


def _random_key(path: ParamPath, seed: int, index: tuple[int, ...]) -> int:
    # Without the number of the layer group, which depends on other layers; a layer has its number in the model.
    names = path[2:] if path[0] == "runs" else path
    key = zlib.crc32(repr((seed, names, index)).encode())
    return int(mix_bits(np.asarray([key], np.uint32))[0])


@functools.cache
def _random_stack(sharding: NamedSharding | None) -> Callable[..., jax.Array]:
    def build(
        keys: jax.Array, shape: tuple[int, ...], stack_ndim: int, scale: float, dtype: str, as_bits: bool
    ) -> jax.Array:
        inner = shape[stack_ndim:]
        flat = (keys.shape[0], math.prod(inner))
        # Elementwise from a counter: memory holds nothing but the result.
        counters = jax.lax.broadcasted_iota(jnp.uint32, flat, 1)
        bits = mix_bits(counters ^ jax.lax.broadcast_in_dim(keys, flat, (0,)))
        values = _to_normal(bits, scale).astype(dtype).reshape(shape)
        return jax.lax.bitcast_convert_type(values, jnp.uint16) if as_bits else values

    return jax.jit(build, static_argnums=(1, 2, 3, 4, 5), out_shardings=sharding)


def _to_normal(bits: ArrayT, scale: float) -> ArrayT:
    """Nearly normal float32 values of uint32 bits: the centered sum of four bytes has variance (256^2 - 1) / 3."""
    byte = np.uint32(0xFF)
    total = (bits & byte) + ((bits >> np.uint32(8)) & byte) + ((bits >> np.uint32(16)) & byte) + (bits >> np.uint32(24))
    return cast(ArrayT, (total.astype(np.float32) - np.float32(510)) * np.float32(scale / math.sqrt((256**2 - 1) / 3)))
