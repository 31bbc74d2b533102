"""Shape, axes and dtype of every parameter, known before any byte is read.

:func:`param_specs` is the only source of shapes: the module's initializer, the loaders and the memory plan all use it.
Matrices keep the checkpoint's orientation ``[out, in]``; the layers of a run are stacked along a leading axis.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from glm_jax.config import Config
from glm_jax.sharding import LogicalAxis, Rules
from glm_jax.weights.bf16_bits import Bfloat16Bits
from pallas_kernels.random_arrays import mix_bits

_RANDOM_BLOCK_VALUES = 1 << 16
ParamTree = dict[str, Any]
ParamPath = tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class ParamSpec:
    """One parameter before it exists.

    Attributes:
        shape: of the whole array, the layer axis first where there is one.
        axes: logical axis of each dimension; ``None`` is never split.
        dtype: fixed dtype, or ``None`` for the model's.
        init: "normal" with standard deviation ``scale``, "ones" or "zeros".
        scale: standard deviation of the random initializer.
        stack_ndim: leading dimensions that enumerate matrices (layers, experts) and are drawn one matrix at a time.
    """

    shape: tuple[int, ...]
    axes: tuple[LogicalAxis | None, ...]
    dtype: str | None = None
    init: Literal["normal", "ones", "zeros"] = "normal"
    scale: float = 1.0
    stack_ndim: int = 0

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


def param_specs(cfg: Config) -> ParamTree:
    """The whole parameter tree of a model as nested dictionaries of :class:`ParamSpec`."""
    table = ParamSpec((cfg.vocab_size, cfg.hidden_size), ("vocab", "embed"), scale=1.0)
    head = dataclasses.replace(table, scale=cfg.hidden_size**-0.5)
    tree: ParamTree = {"embed": table, "norm": _norm_spec(cfg.hidden_size)}
    if not cfg.tie_word_embeddings:
        tree["head"] = head
    tree["runs"] = {str(i): _block_specs(cfg, run.kind, run.count) for i, run in enumerate(cfg.layer_groups)}
    if cfg.num_nextn_predict_layers:
        copies = {"embed": table, "head": head} if cfg.mtp_own_embeddings else {}
        tree["mtp"] = {**_mtp_specs(cfg), **copies}
    return tree


def _norm_spec(width: int, layers: int | None = None) -> ParamSpec:
    if layers is None:
        return ParamSpec((width,), (None,), init="ones")
    return ParamSpec((layers, width), (None, None), init="ones", stack_ndim=1)


def _matrix_spec(
    layers: int, shape: tuple[int, ...], axes: tuple[LogicalAxis | None, ...], stacked: int = 0
) -> ParamSpec:
    return ParamSpec((layers, *shape), (None, *axes), scale=shape[-1] ** -0.5, stack_ndim=1 + stacked)


def _block_specs(cfg: Config, kind: str, layers: int) -> ParamTree:
    feed_forward = {"mlp": _mlp_specs(cfg, layers)} if kind == "dense" else {"moe": _moe_specs(cfg, layers)}
    return {"attn": _attention_specs(cfg, layers), **feed_forward}


def _attention_specs(cfg: Config, l: int) -> ParamTree:  # noqa: E741  (the axis letter of the glossary)
    d, n, r = cfg.hidden_size, cfg.num_attention_heads, cfg.kv_lora_rank
    if cfg.q_lora_rank is None:
        query = {"q": _matrix_spec(l, (n * cfg.qk_head_dim, d), ("heads", "embed"))}
    else:
        query = {
            "q_a": _matrix_spec(l, (cfg.q_lora_rank, d), ("latent", "embed")),
            "q_a_norm": _norm_spec(cfg.q_lora_rank, l),
            "q_b": _matrix_spec(l, (n * cfg.qk_head_dim, cfg.q_lora_rank), ("heads", "latent")),
        }
    return {
        "norm": _norm_spec(d, l),
        **query,
        "kv_a": _matrix_spec(l, (cfg.cache_width, d), ("latent", "embed")),
        "kv_a_norm": _norm_spec(r, l),
        "k_b": _matrix_spec(l, (n, cfg.qk_nope_head_dim, r), ("heads", None, "latent"), stacked=1),
        "v_b": _matrix_spec(l, (n, cfg.v_head_dim, r), ("heads", None, "latent"), stacked=1),
        "o": _matrix_spec(l, (d, n * cfg.v_head_dim), ("embed", "heads")),
    }


def _swiglu_specs(layers: int, width: int, hidden: int, prefix: str = "") -> ParamTree:
    return {
        f"{prefix}gate": _matrix_spec(layers, (width, hidden), ("ffn", "embed")),
        f"{prefix}up": _matrix_spec(layers, (width, hidden), ("ffn", "embed")),
        f"{prefix}down": _matrix_spec(layers, (hidden, width), ("embed", "ffn")),
    }


def _mlp_specs(cfg: Config, layers: int) -> ParamTree:
    return {
        "norm": _norm_spec(cfg.hidden_size, layers),
        **_swiglu_specs(layers, cfg.intermediate_size, cfg.hidden_size),
    }


def _moe_specs(cfg: Config, l: int) -> ParamTree:  # noqa: E741
    d, e, f = cfg.hidden_size, cfg.n_routed_experts, cfg.moe_intermediate_size
    shared = _swiglu_specs(l, cfg.shared_width, d, "shared_") if cfg.n_shared_experts else {}
    return {
        "norm": _norm_spec(d, l),
        "router": _matrix_spec(l, (e, d), (None, "embed")),
        "router_bias": ParamSpec((l, e), (None, None), dtype="float32", init="zeros", stack_ndim=1),
        "gate": _matrix_spec(l, (e, f, d), ("experts", "ffn", "embed"), stacked=1),
        "up": _matrix_spec(l, (e, f, d), ("experts", "ffn", "embed"), stacked=1),
        "down": _matrix_spec(l, (e, d, f), ("experts", "embed", "ffn"), stacked=1),
        **shared,
    }


def _mtp_specs(cfg: Config) -> ParamTree:
    d = cfg.hidden_size
    joined = ParamSpec((d, 2 * d), (None, None), scale=(2 * d) ** -0.5)
    return {
        "enorm": _norm_spec(d),
        "hnorm": _norm_spec(d),
        "eh_proj": joined,
        "norm": _norm_spec(d),
        **_block_specs(cfg, "sparse", 1),
    }


def leaves_with_path(tree: ParamTree, prefix: ParamPath = ()) -> Iterator[tuple[ParamPath, Any]]:
    """The leaves of a nested dictionary with their paths, in the order of the tree."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves_with_path(value, (*prefix, name))
        else:
            yield (*prefix, name), value


def map_specs(function: Callable[[ParamPath, ParamSpec], Any], tree: ParamTree, prefix: ParamPath = ()) -> ParamTree:
    """A tree of the same structure with ``function(path, spec)`` in place of each spec."""
    return {
        name: map_specs(function, value, (*prefix, name))
        if isinstance(value, dict)
        else function((*prefix, name), value)
        for name, value in tree.items()
    }


def is_matrix(spec: ParamSpec) -> bool:
    """Whether a parameter is a matrix or a stack of them, and not a norm or a bias."""
    return spec.dtype is None and len(spec.shape) - spec.stack_ndim >= 2


def is_held_as_bits(spec: ParamSpec, dtype: Any, mesh: Mesh | None = None) -> bool:
    """Whether a parameter is held as :class:`~glm_jax.weights.Bfloat16Bits`: bfloat16 matrices on a CPU."""
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    return is_matrix(spec) and device.platform == "cpu" and jnp.dtype(dtype) == jnp.bfloat16


def abstract_leaf(spec: ParamSpec, dtype: Any, rules: Rules, mesh: Mesh | None) -> jax.ShapeDtypeStruct | Bfloat16Bits:
    """Shape, dtype and (with a mesh) sharding of a parameter that is not quantized."""
    sharding = None if mesh is None else NamedSharding(mesh, rules.partition_spec(*spec.axes))
    if is_held_as_bits(spec, dtype, mesh):
        return Bfloat16Bits(cast(jax.Array, jax.ShapeDtypeStruct(spec.shape, jnp.uint16, sharding=sharding)))
    return jax.ShapeDtypeStruct(spec.shape, jnp.dtype(spec.dtype or dtype), sharding=sharding)


def init_params(
    cfg: Config, seed: int = 0, dtype: Any = jnp.bfloat16, rules: Rules = Rules(), mesh: Mesh | None = None
) -> ParamTree:
    """Random parameters of realistic scale (logits with a standard deviation near 1), built on the device.

    Each matrix depends on (seed, path, layer, expert) alone, so a model of fewer layers holds the first layers of a
    deeper one, and :func:`random_matrix` gives any single matrix with the same bits on any machine.
    """
    return map_specs(lambda path, spec: init_leaf(cfg, path, spec, seed, dtype, rules, mesh), param_specs(cfg))


def init_leaf(
    cfg: Config,
    path: ParamPath,
    spec: ParamSpec,
    seed: int = 0,
    dtype: Any = jnp.bfloat16,
    rules: Rules = Rules(),
    mesh: Mesh | None = None,
) -> jax.Array | Bfloat16Bits:
    """One parameter of :func:`init_params`."""
    sharding = None if mesh is None else NamedSharding(mesh, rules.partition_spec(*spec.axes))
    kind = jnp.dtype(spec.dtype or dtype)
    if spec.init != "normal":
        return jnp.full(spec.shape, 1.0 if spec.init == "ones" else 0.0, kind, device=sharding)
    first = cfg.layer_groups[int(path[1])].start if path[0] == "runs" else 0
    numbers = np.ndindex(spec.shape[: spec.stack_ndim])
    keys = [_random_key(path, seed, (n[0] + first, *n[1:]) if n else ()) for n in numbers]
    as_bits = is_held_as_bits(spec, dtype, mesh)
    values = _random_stack(sharding)(
        np.asarray(keys, np.uint32), spec.shape, spec.stack_ndim, spec.scale, kind.name, as_bits
    )
    return Bfloat16Bits(values) if as_bits else values


def random_matrix(
    path: ParamPath, spec: ParamSpec, seed: int, dtype: Any, layer: int, index: tuple[int, ...] = ()
) -> np.ndarray:
    """One matrix of :func:`init_params`, bit for bit, without building the stack around it.

    Args:
        path: of the parameter, as in the tree.
        spec: of the whole parameter.
        dtype: the model's.
        layer: number of the layer in the model (ignored for parameters without a layer axis).
        index: position in the stacked axes after the layer axis (expert or head).
    """
    kind, shape = jnp.dtype(spec.dtype or dtype), spec.shape[spec.stack_ndim :]
    if spec.init != "normal":
        return np.full(shape, 1.0 if spec.init == "ones" else 0.0, kind)
    key = np.uint32(_random_key(path, seed, (layer, *index) if spec.stack_ndim else ()))
    values = np.empty(math.prod(shape), kind)
    # In blocks that stay in the cache: the temporaries of a whole embedding would take eight times its memory.
    for start in range(0, values.size, _RANDOM_BLOCK_VALUES):
        counters = np.arange(start, min(start + _RANDOM_BLOCK_VALUES, values.size), dtype=np.uint32)
        values[start : start + _RANDOM_BLOCK_VALUES] = _to_normal(mix_bits(counters ^ key), spec.scale)
    return values.reshape(shape)


def random_matrix_on_device(
    path: ParamPath, spec: ParamSpec, seed: int, dtype: Any, layer: int, index: tuple[int, ...] = ()
) -> jax.Array:
    """As :func:`random_matrix`, on JAX's default device."""
    kind, shape = jnp.dtype(spec.dtype or dtype), spec.shape[spec.stack_ndim :]
    if spec.init != "normal":
        return jnp.full(shape, 1.0 if spec.init == "ones" else 0.0, kind)
    keys = np.asarray([_random_key(path, seed, (layer, *index) if spec.stack_ndim else ())], np.uint32)
    return _random_stack(None)(keys, shape, 0, spec.scale, kind.name, False)


def _random_key(path: ParamPath, seed: int, numbers: tuple[int, ...]) -> int:
    # A run's place is an accident of the layers around it; its layers are numbered in the model.
    names = path[2:] if path[0] == "runs" else path
    key = zlib.crc32(repr((seed, names, numbers)).encode())
    return int(mix_bits(np.asarray([key], np.uint32))[0])


@functools.cache
def _random_stack(sharding: NamedSharding | None) -> Callable[..., jax.Array]:
    def build(
        keys: jax.Array, shape: tuple[int, ...], stacked: int, scale: float, dtype: str, as_bits: bool
    ) -> jax.Array:
        inner = shape[stacked:]
        flat = (keys.shape[0], math.prod(inner))
        # Elementwise from a counter: nothing is held but the result.
        counters = jax.lax.broadcasted_iota(jnp.uint32, flat, 1)
        bits = mix_bits(counters ^ jax.lax.broadcast_in_dim(keys, flat, (0,)))
        values = _to_normal(bits, scale).astype(dtype).reshape(shape)
        return jax.lax.bitcast_convert_type(values, jnp.uint16) if as_bits else values

    return jax.jit(build, static_argnums=(1, 2, 3, 4, 5), out_shardings=sharding)


def _to_normal(bits: Any, scale: float) -> Any:
    """Nearly normal float32 values: the centered sum of the four bytes, whose variance is (256^2 - 1) / 3."""
    byte = np.uint32(0xFF)
    total = (bits & byte) + ((bits >> np.uint32(8)) & byte) + ((bits >> np.uint32(16)) & byte) + (bits >> np.uint32(24))
    return (total.astype(np.float32) - np.float32(510)) * np.float32(scale / math.sqrt((256**2 - 1) / 3))
