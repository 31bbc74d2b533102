"""Bytes on one device: weights by part, latent cache, workspace of a forward pass. Arithmetic on shapes alone."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import jax.numpy as jnp

from glm_jax.cache.latent import CACHE_AXES as CACHE_AXES
from glm_jax.cache.latent import QUANTIZED_CACHE_MAX, bytes_per_token_and_layer
from glm_jax.config import Config
from glm_jax.ops.mla import KEY_BLOCK
from glm_jax.sharding import LogicalAxis, Rules
from glm_jax.weights.params import ParamPath, ParamSpec, leaves_with_path, param_specs
from glm_jax.weights.storage import Storage, component_axes

# Prompts are run in chunks of this many tokens per row. On a GPU few rows have longer ones: a chunk reads all weights,
# and with fewer tokens an expert has few rows to use each for.
PREFILL_CHUNK_SIZE = 512
_MAX_PREFILL_CHUNK_SIZE, _MAX_CHUNK_TOKENS_PER_BATCH = 2048, 8192
MTP_LAYER = "prediction layer"
_MAX_EXPERT_BLOCK_ROWS = 64  # rows of the tallest block of pairs that share an expert
_SAMPLER_ARRAYS = 8  # float32 arrays [rows, vocab] at once: logits, history, processors, noise


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PlacementSpec:
    """What decides, besides the architecture, how many bytes a device holds.

    Attributes:
        dtype: of the weights that are not quantized.
        storage: the quantized ones.
        cache_dtype: of the latent cache, one of :data:`glm_jax.cache.latent.CACHE_DTYPES`.
        rules: mesh axis of each logical axis.
        axis_sizes: devices along each mesh axis.
        on_cpu: whether the devices are CPUs, which compute in float32 whatever the weights are stored in.
    """

    dtype: str = "bfloat16"
    storage: Storage = Storage()
    cache_dtype: str = "bfloat16"
    rules: Rules = Rules()
    axis_sizes: tuple[tuple[str, int], ...] = ()
    on_cpu: bool = False

    @property
    def itemsize(self) -> int:
        """Bytes of an activation."""
        return 4 if self.on_cpu else _itemsize(self.dtype)

    def shard_length(self, length: int, axis: LogicalAxis | None) -> int:
        """Length of a dimension on one device, the longest where the devices' differ."""
        name = getattr(self.rules, axis) if axis else None
        return -(-length // dict(self.axis_sizes)[name]) if name else length

    def shard_num_elements(self, shape: Sequence[int], axes: Sequence[LogicalAxis | None]) -> int:
        """Values of an array on one device."""
        return math.prod(self.shard_length(length, axis) for length, axis in zip(shape, axes, strict=True))


@dataclasses.dataclass(frozen=True, slots=True)
class WeightGroup:
    """A group of weights.

    Attributes:
        parameters: how many.
        nbytes: of the whole model.
        device_bytes: on each device.
    """

    parameters: int = 0
    nbytes: int = 0
    device_bytes: int = 0

    def __add__(self, other: WeightGroup) -> WeightGroup:
        return WeightGroup(
            self.parameters + other.parameters, self.nbytes + other.nbytes, self.device_bytes + other.device_bytes
        )


def group_weights(cfg: Config, placement: PlacementSpec) -> dict[str, WeightGroup]:
    """The weights by part, the prediction layer last; a part the model does not have is empty."""
    names = "embedding attention dense_mlp routed_experts shared_experts routers norms head".split()
    parts = dict.fromkeys([*names, MTP_LAYER], WeightGroup())
    for path, spec in leaves_with_path(param_specs(cfg)):
        parts[weight_group_name(path)] += _leaf_group(path, spec, placement)
    return parts


def _leaf_group(path: ParamPath, spec: ParamSpec, placement: PlacementSpec) -> WeightGroup:
    quant = placement.storage.get(path)
    if quant is None:
        item = _itemsize(spec.dtype or placement.dtype)
        return WeightGroup(spec.size, spec.size * item, placement.shard_num_elements(spec.shape, spec.axes) * item)
    arrays = quant.component_shapes(spec.shape)
    here = sum(
        placement.shard_num_elements(shape, component_axes(name, shape, spec)) * dtype.itemsize
        for name, (shape, dtype) in arrays.items()
    )
    return WeightGroup(spec.size, quant.nbytes(spec.shape), here)


def weight_group_name(path: ParamPath) -> str:
    """The part that a parameter belongs to; the norms inside the attention count as attention."""
    if path[0] == "mtp":
        return MTP_LAYER
    if len(path) == 1:
        return {"embed": "embedding", "head": "head", "norm": "norms"}[path[0]]
    block, name = path[-2], path[-1]
    if name == "norm":
        return "norms"
    if block != "moe":
        return {"attn": "attention", "mlp": "dense_mlp"}[block]
    return {"router": "routers", "shared": "shared_experts"}.get(name.partition("_")[0], "routed_experts")


def cache_bytes(cfg: Config, placement: PlacementSpec, rows: int, context: int) -> int:
    """Bytes on one device of a latent cache of ``rows`` rows with ``context`` slots."""
    shape = (cfg.num_hidden_layers, rows, context)
    return placement.shard_num_elements(shape, CACHE_AXES[:-1]) * bytes_per_token_and_layer(cfg, placement.cache_dtype)


@dataclasses.dataclass(frozen=True, slots=True)
class Workspace:
    """Bytes that a forward pass needs besides weights and cache, an upper bound from shapes.

    Attributes:
        activations: of one chunk of every row, where they are largest.
        layer_weights: copies of one layer's matrices, which the loop over layers hands to the matrix product (on CPUs
            the matrices as float32, the head's too).
        logits: float32 ones of one row's chunk, or what sampling holds of all rows.
    """

    activations: int
    layer_weights: int
    logits: int

    @property
    def total(self) -> int:
        """All of them: XLA may give each its own place."""
        return self.activations + self.layer_weights + self.logits


def prefill_chunk_length(rows: int, *, on_cpu: bool) -> int:
    """Longest chunk of prompts that are run together."""
    return (
        PREFILL_CHUNK_SIZE
        if on_cpu
        else max(PREFILL_CHUNK_SIZE, min(_MAX_PREFILL_CHUNK_SIZE, _MAX_CHUNK_TOKENS_PER_BATCH // rows))
    )


def estimate_workspace(
    cfg: Config, placement: PlacementSpec, rows: int, context: int, chunk: int | None = None
) -> Workspace:
    """The workspace on one device, for ``rows`` prompts run together in chunks of ``chunk`` tokens.

    With ``a`` bytes per activation, ``n = rows * chunk`` new tokens, and ``K`` keys at a time (all up to 2,048 slots,
    else 1,024), the larger of::

        attention      n * heads * K * (8 + a)               scores, weights in float32 and rounded
                       + rows * K * heads * (Hn + Hv) * a    keys and values of the block
                       + rows * context * (R + P) * a        the layer's rows of the cache; of an 8-bit cache those as
                                                             stored, and rows * (K + chunk) * (R + P) * (4 + a) for
                                                             the ones read and written, in float32 and rounded
        feed-forward   n * widest * (8 + 2 a)                gate and up, in float32 and rounded
                       + 8 * D * n * experts per token       results by pair, sorted and in order
                       + 4 * D * 64 * experts                padding of their blocks

    and ``4 * a * n * D`` for the residual stream, its norms and sums.
    """
    rows = placement.shard_length(rows, "batch")
    chunk = min(chunk or prefill_chunk_length(rows, on_cpu=placement.on_cpu), context)
    item, new = placement.itemsize, rows * chunk
    activations = max(
        _attention_bytes(cfg, placement, rows, context, chunk),
        _feed_forward_bytes(cfg, placement, new),
    )
    return Workspace(
        activations + 4 * item * new * cfg.hidden_size,
        _layer_weight_bytes(cfg, placement),
        4 * cfg.vocab_size * max(chunk, _SAMPLER_ARRAYS * rows),
    )


def _attention_bytes(cfg: Config, placement: PlacementSpec, rows: int, context: int, chunk: int) -> int:
    heads, item = placement.shard_length(cfg.num_attention_heads, "heads"), placement.itemsize
    keys = context if context <= 2 * KEY_BLOCK else KEY_BLOCK
    scores = chunk * heads * keys * (8 + item)
    expanded = keys * heads * (cfg.qk_nope_head_dim + cfg.v_head_dim) * item
    if placement.cache_dtype in QUANTIZED_CACHE_MAX:
        widened = (keys + chunk) * cfg.cache_width * (4 + item)
        return rows * (scores + expanded + context * bytes_per_token_and_layer(cfg, placement.cache_dtype) + widened)
    return rows * (scores + expanded + context * cfg.cache_width * item)


def _feed_forward_bytes(cfg: Config, placement: PlacementSpec, new: int) -> int:
    experts = placement.shard_length(cfg.n_routed_experts, "experts")
    width = placement.shard_length(cfg.moe_intermediate_size, "ffn")
    # With few experts all of them are applied to every token.
    side_by_side = experts * width if experts <= 2 * cfg.num_experts_per_tok else width
    widest = max(
        placement.shard_length(cfg.intermediate_size, "ffn"),
        placement.shard_length(cfg.shared_width, "ffn"),
        side_by_side,
    )
    pairs = 8 * new * cfg.num_experts_per_tok + 4 * _MAX_EXPERT_BLOCK_ROWS * experts
    return new * widest * (8 + 2 * placement.itemsize) + pairs * cfg.hidden_size


@functools.lru_cache(maxsize=64)
def _layer_weight_bytes(cfg: Config, placement: PlacementSpec) -> int:
    blocks = param_specs(cfg)["runs"]
    # A run of one layer is no loop: its matrices are used where they are.
    loops = [str(i) for i, run in enumerate(cfg.layer_groups) if run.count > 1] or list(blocks)
    layer = max(
        sum(_matrix_elements(("runs", i, *path), spec, placement) for path, spec in leaves_with_path(blocks[i]))
        for i in loops
    )
    quantized_head = placement.storage.get(("embed",) if cfg.tie_word_embeddings else ("head",))
    widened = placement.shard_num_elements((cfg.vocab_size, cfg.hidden_size), ("vocab", "embed"))
    head = widened if placement.on_cpu and _itemsize(placement.dtype) < 4 and not quantized_head else 0
    return (layer + head) * placement.itemsize


def _matrix_elements(path: ParamPath, spec: ParamSpec, placement: PlacementSpec) -> int:
    """Values of a parameter in one layer, and of one expert where there are many."""
    skip = 2 if "experts" in spec.axes else 1
    values = placement.shard_num_elements(spec.shape[skip:], spec.axes[skip:])
    # Quantized matrices are widened a few rows at a time on CPUs, but for the two that expand the cache.
    in_rows = placement.on_cpu and placement.storage.get(path) and path[-1] not in ("k_b", "v_b")
    return values // 4 if in_rows else values


def expected_active_experts(cfg: Config, rows: int) -> float:
    """Experts per layer that ``rows`` tokens choose if all are equally likely: ``E (1 - (1 - X/E)^rows)``.

    Real routing is less even and reads fewer.
    """
    missed = 1 - cfg.num_experts_per_tok / cfg.n_routed_experts
    return cfg.n_routed_experts * (1 - missed**rows)


def decode_bytes(
    cfg: Config, placement: PlacementSpec, weight_groups: Mapping[str, WeightGroup], rows: int, context: int
) -> int:
    """Bytes that one device must read to write one token in each of ``rows`` rows of ``context`` tokens.

    Each weight once, of the routed experts those that are chosen, of the embedding nothing worth counting unless it is
    also the head; and the whole cache.
    """
    chosen = expected_active_experts(cfg, placement.shard_length(rows, "batch")) / cfg.n_routed_experts
    unread = {MTP_LAYER, "routed_experts"} | (set() if cfg.tie_word_embeddings else {"embedding"})
    always = sum(part.device_bytes for name, part in weight_groups.items() if name not in unread)
    routed = round(weight_groups["routed_experts"].device_bytes * chosen)
    return always + routed + cache_bytes(cfg, placement, rows, context)


def _itemsize(dtype: str) -> int:
    return jnp.dtype(dtype).itemsize
