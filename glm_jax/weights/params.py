"""Shape, axes and dtype of every parameter, known before any byte is read.

:func:`param_specs` is the only source of shapes: the module's initializer, the loaders and the memory plan all use it.
Matrices keep the checkpoint's orientation ``[out, in]``; the layers of a layer group are stacked along a leading axis.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, TypeAlias, TypeVar, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from glm_jax.config import Config
from glm_jax.sharding import LogicalAxis, Rules
from glm_jax.weights.bf16_bits import Bfloat16Bits

ParamTree: TypeAlias = dict[str, Any]  # nested dictionaries; leaves are weights, specs, or shapes
ParamPath: TypeAlias = tuple[str, ...]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class ParamSpec:
    """Description of one parameter.

    Attributes:
        shape: Shape of the whole array, the layer axis first where there is one.
        axes: Logical axis of each dimension; a dimension with ``None`` is never split.
        dtype: Fixed dtype, or None for the model's.
        init: Random initializer: "normal" with standard deviation ``scale``, "ones" or "zeros".
        scale: Standard deviation of the random initializer.
        stack_ndim: Number of leading dimensions that enumerate matrices (layers, experts, heads).
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
    """The parameter tree of a model as nested dictionaries of :class:`ParamSpec`."""
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
    eh_proj = ParamSpec((d, 2 * d), (None, None), scale=(2 * d) ** -0.5)
    return {
        "enorm": _norm_spec(d),
        "hnorm": _norm_spec(d),
        "eh_proj": eh_proj,
        "norm": _norm_spec(d),
        **_block_specs(cfg, "sparse", 1),
    }


def leaves_with_path(tree: Mapping[str, Any], prefix: ParamPath = ()) -> Iterator[tuple[ParamPath, Any]]:
    """The leaves of nested dictionaries with their paths, in the order of the tree."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves_with_path(value, (*prefix, name))
        else:
            yield (*prefix, name), value


def map_with_path(
    function: Callable[[ParamPath, Any], T], tree: Mapping[str, Any], prefix: ParamPath = ()
) -> ParamTree:
    """A tree of the same structure with ``function(path, leaf)`` in place of each leaf."""
    return {
        name: map_with_path(function, value, (*prefix, name))
        if isinstance(value, Mapping)
        else function((*prefix, name), value)
        for name, value in tree.items()
    }


def is_matrix(spec: ParamSpec) -> bool:
    """Whether a parameter is a matrix or a stack of matrices, not a norm or a bias."""
    return spec.dtype is None and len(spec.shape) - spec.stack_ndim >= 2


def is_held_as_bits(spec: ParamSpec, dtype: DTypeLike, mesh: Mesh | None = None) -> bool:
    """Whether a parameter is held as :class:`~glm_jax.weights.Bfloat16Bits`, as bfloat16 matrices are on a CPU."""
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    return is_matrix(spec) and device.platform == "cpu" and jnp.dtype(dtype) == jnp.bfloat16


def abstract_leaf(
    spec: ParamSpec, dtype: DTypeLike, rules: Rules, mesh: Mesh | None
) -> jax.ShapeDtypeStruct | Bfloat16Bits:
    """Shape, dtype and (with a mesh) sharding of a parameter that is not quantized."""
    sharding = named_sharding(spec, rules, mesh)
    if is_held_as_bits(spec, dtype, mesh):
        return Bfloat16Bits(cast(jax.Array, jax.ShapeDtypeStruct(spec.shape, jnp.uint16, sharding=sharding)))
    return jax.ShapeDtypeStruct(spec.shape, jnp.dtype(spec.dtype or dtype), sharding=sharding)


def named_sharding(spec: ParamSpec, rules: Rules, mesh: Mesh | None) -> NamedSharding | None:
    """Sharding of a parameter that is not quantized; None without a mesh."""
    return None if mesh is None else NamedSharding(mesh, rules.spec(*spec.axes))
