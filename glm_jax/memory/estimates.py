"""Estimates the bytes on one device (weights, latent cache, workspace) from shapes alone.

Shapes use the letters of the glossary in ARCHITECTURE.md: B sequences, T new tokens, S cache slots.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import jax.numpy as jnp

from glm_jax.cache.latent import CACHE_AXES, QUANTIZED_CACHE_MAX, bytes_per_token_and_layer
from glm_jax.config import Config
from glm_jax.ops.mla import KEY_BLOCK
from glm_jax.sharding import LogicalAxis, Rules
from glm_jax.weights.params import ParamPath, ParamSpec, ParamTree, leaves_with_path, param_specs
from glm_jax.weights.quant_spec import component_axes
from glm_jax.weights.storage import Storage

# Prompts are prefilled in chunks of this many tokens per sequence. On a GPU a small batch has longer chunks, because
# each chunk reads all weights and a short one leaves every expert too few tokens to amortize that.
PREFILL_CHUNK_SIZE = 512
_MAX_PREFILL_CHUNK_SIZE, _MAX_CHUNK_TOKENS_PER_BATCH = 2048, 8192
MTP_LAYER = "prediction layer"
_MAX_EXPERT_BLOCK_ROWS = 64  # rows of the largest block of (token, expert) pairs that share an expert
_SAMPLER_ARRAYS = 8  # float32 arrays [B, V] alive at once: logits, token counts, penalties, noise


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PlacementSpec:
    """Dtypes and sharding, which together with the config determine how many bytes a device holds.

    Attributes:
        dtype: Dtype of the weights that are not quantized.
        storage: Storage of the quantized weights.
        cache_dtype: Dtype of the latent cache, one of :data:`glm_jax.cache.latent.CACHE_DTYPES`.
        rules: Mesh axis of each logical axis.
        axis_sizes: Number of devices along each mesh axis.
        on_cpu: Whether the devices are CPUs, which compute in float32 whatever the dtype of the weights.
    """

    dtype: str = "bfloat16"
    storage: Storage = Storage()
    cache_dtype: str = "bfloat16"
    rules: Rules = Rules()
    axis_sizes: tuple[tuple[str, int], ...] = ()
    on_cpu: bool = False

    @property
    def itemsize(self) -> int:
        """Bytes per activation."""
        return 4 if self.on_cpu else _itemsize(self.dtype)

    def shard_length(self, length: int, axis: LogicalAxis | None) -> int:
        """Returns the length of a dimension on one device, rounded up where the devices' shards differ."""
        name = getattr(self.rules, axis) if axis else None
        return -(-length // dict(self.axis_sizes)[name]) if name else length

    def shard_num_elements(self, shape: Sequence[int], axes: Sequence[LogicalAxis | None]) -> int:
        """Returns the number of elements of an array on one device."""
        return math.prod(self.shard_length(length, axis) for length, axis in zip(shape, axes, strict=True))


# ------------------------------------------------------------------------------------------------- weights


@dataclasses.dataclass(frozen=True, slots=True)
class WeightGroup:
    """Size of a group of weights, such as the attention of all layers.

    Attributes:
        parameters: Number of parameters.
        nbytes: Bytes of the whole model.
        device_bytes: Bytes on each device.
    """

    parameters: int = 0
    nbytes: int = 0
    device_bytes: int = 0

    def __add__(self, other: WeightGroup) -> WeightGroup:
        return WeightGroup(
            self.parameters + other.parameters, self.nbytes + other.nbytes, self.device_bytes + other.device_bytes
        )


def group_weights(cfg: Config, placement: PlacementSpec) -> dict[str, WeightGroup]:
    """Returns the weights by group, the prediction layer last; groups that the model lacks are empty."""
    names = "embedding attention dense_mlp routed_experts shared_experts routers norms head".split()
    groups = dict.fromkeys([*names, MTP_LAYER], WeightGroup())
    for path, spec in leaves_with_path(param_specs(cfg)):
        groups[weight_group_name(path)] += _leaf_group(path, spec, placement)
    return groups


def _leaf_group(path: ParamPath, spec: ParamSpec, placement: PlacementSpec) -> WeightGroup:
    quant = placement.storage.get(path)
    if quant is None:
        itemsize = _itemsize(spec.dtype or placement.dtype)
        num_local = placement.shard_num_elements(spec.shape, spec.axes)
        return WeightGroup(spec.size, spec.size * itemsize, num_local * itemsize)
    device_bytes = sum(
        placement.shard_num_elements(shape, component_axes(name, shape, spec.axes)) * dtype.itemsize
        for name, (shape, dtype) in quant.component_shapes(spec.shape).items()
    )
    return WeightGroup(spec.size, quant.nbytes(spec.shape), device_bytes)


def weight_group_name(path: ParamPath) -> str:
    """Returns the group that a parameter belongs to; norms inside the attention count as attention."""
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


# --------------------------------------------------------------------------------------------------- cache


def cache_bytes(cfg: Config, placement: PlacementSpec, sequences: int, context: int) -> int:
    """Returns the bytes on one device of a latent cache for ``sequences`` sequences of ``context`` slots each."""
    shape = (cfg.num_hidden_layers, sequences, context)
    return placement.shard_num_elements(shape, CACHE_AXES[:-1]) * bytes_per_token_and_layer(cfg, placement.cache_dtype)


# ----------------------------------------------------------------------------------------------- workspace


@dataclasses.dataclass(frozen=True, slots=True)
class Workspace:
    """Upper bound, from shapes, on the bytes that a forward pass needs besides weights and cache.

    Attributes:
        activations: Activations of one chunk of every sequence, in the layer where they are largest.
        layer_weights: Copies of one layer's matrices, which the loop over layers passes to the matrix product. On CPUs
            these are the matrices in float32, the head included.
        logits: Float32 logits of one sequence's chunk, or the sampler's arrays for all sequences if larger.
    """

    activations: int
    layer_weights: int
    logits: int

    @property
    def total(self) -> int:
        """Sum of all three, because XLA may keep each in a buffer of its own."""
        return self.activations + self.layer_weights + self.logits


def prefill_chunk_length(sequences: int, *, on_cpu: bool) -> int:
    """Returns the largest number of tokens per sequence that one prefill step of ``sequences`` sequences runs."""
    if on_cpu:
        return PREFILL_CHUNK_SIZE
    return max(PREFILL_CHUNK_SIZE, min(_MAX_PREFILL_CHUNK_SIZE, _MAX_CHUNK_TOKENS_PER_BATCH // sequences))


def estimate_workspace(
    cfg: Config, placement: PlacementSpec, sequences: int, context: int, chunk: int | None = None
) -> Workspace:
    """Estimates the workspace on one device for a batch of prompts that is prefilled in chunks.

    With ``a`` bytes per activation, ``n = B * T`` new tokens, and ``K`` keys per block (all keys up to 2,048 slots,
    1,024 beyond), the activations are the larger of::

        attention      n * N * K * (8 + a)          scores and weights in float32, and rounded
                       + B * K * N * (Hn + Hv) * a  keys and values of the block
                       + B * S * (R + P) * a        the layer's slots of the cache; an 8-bit cache counts as stored,
                                                    plus B * (K + T) * (R + P) * (4 + a) for the slots read and
                                                    written, in float32 and rounded
        feed-forward   n * widest * (8 + 2 a)       gate and up in float32, and rounded
                       + 8 * D * n * X              results by (token, expert) pair, sorted and in order
                       + 4 * D * 64 * E             padding of the experts' blocks

    and ``4 * a * n * D`` for the residual stream, its norms and sums.

    Args:
        cfg: Config of the model.
        placement: Dtypes and sharding.
        sequences: B, the number of sequences.
        context: S, the slots per sequence.
        chunk: T, the tokens per sequence and step; :func:`prefill_chunk_length` by default.
    """
    sequences = placement.shard_length(sequences, "batch")
    chunk = min(chunk or prefill_chunk_length(sequences, on_cpu=placement.on_cpu), context)
    itemsize, new_tokens = placement.itemsize, sequences * chunk
    activations = max(
        _attention_bytes(cfg, placement, sequences, context, chunk),
        _feed_forward_bytes(cfg, placement, new_tokens),
    )
    return Workspace(
        activations + 4 * itemsize * new_tokens * cfg.hidden_size,
        _layer_weight_bytes(cfg, placement),
        4 * cfg.vocab_size * max(chunk, _SAMPLER_ARRAYS * sequences),
    )


def _attention_bytes(cfg: Config, placement: PlacementSpec, sequences: int, context: int, chunk: int) -> int:
    heads, itemsize = placement.shard_length(cfg.num_attention_heads, "heads"), placement.itemsize
    keys = context if context <= 2 * KEY_BLOCK else KEY_BLOCK
    scores = chunk * heads * keys * (8 + itemsize)
    expanded = keys * heads * (cfg.qk_nope_head_dim + cfg.v_head_dim) * itemsize
    if placement.cache_dtype in QUANTIZED_CACHE_MAX:
        stored = context * bytes_per_token_and_layer(cfg, placement.cache_dtype)
        dequantized = (keys + chunk) * cfg.cache_width * (4 + itemsize)
        return sequences * (scores + expanded + stored + dequantized)
    return sequences * (scores + expanded + context * cfg.cache_width * itemsize)


def _feed_forward_bytes(cfg: Config, placement: PlacementSpec, new_tokens: int) -> int:
    experts = placement.shard_length(cfg.n_routed_experts, "experts")
    expert_width = placement.shard_length(cfg.moe_intermediate_size, "ffn")
    widest = max(
        placement.shard_length(cfg.intermediate_size, "ffn"),
        placement.shard_length(cfg.shared_width, "ffn"),
        # With few experts, every token passes through all of them.
        experts * expert_width if experts <= 2 * cfg.num_experts_per_tok else expert_width,
    )
    pairs = 8 * new_tokens * cfg.num_experts_per_tok + 4 * _MAX_EXPERT_BLOCK_ROWS * experts
    return new_tokens * widest * (8 + 2 * placement.itemsize) + pairs * cfg.hidden_size


@functools.lru_cache(maxsize=64)
def _layer_weight_bytes(cfg: Config, placement: PlacementSpec) -> int:
    groups = param_specs(cfg)["runs"]
    # A group of one layer has no loop, so its matrices are not copied.
    looped = [str(i) for i, group in enumerate(cfg.layer_groups) if group.count > 1] or list(groups)
    layer = max(
        sum(_matrix_elements(("runs", i, *path), spec, placement) for path, spec in leaves_with_path(groups[i]))
        for i in looped
    )
    quantized_head = placement.storage.get(("embed",) if cfg.tie_word_embeddings else ("head",))
    head = 0
    if placement.on_cpu and _itemsize(placement.dtype) < 4 and not quantized_head:
        head = placement.shard_num_elements((cfg.vocab_size, cfg.hidden_size), ("vocab", "embed"))
    return (layer + head) * placement.itemsize


def _matrix_elements(path: ParamPath, spec: ParamSpec, placement: PlacementSpec) -> int:
    """Returns the elements of a parameter in one layer, or in one expert of it."""
    skip = 2 if "experts" in spec.axes else 1
    elements = placement.shard_num_elements(spec.shape[skip:], spec.axes[skip:])
    # CPUs dequantize a few rows of a matrix at a time, except for the two matrices that expand the cache.
    by_rows = placement.on_cpu and placement.storage.get(path) and path[-1] not in ("k_b", "v_b")
    return elements // 4 if by_rows else elements


# --------------------------------------------------------------------------------------------- decode step


def expected_active_experts(cfg: Config, tokens: int) -> float:
    """Returns the expected number of experts per layer that ``tokens`` tokens choose under uniform routing.

    The formula is ``E (1 - (1 - X/E)^tokens)``. Real routing is less even and reads fewer experts.
    """
    probability_unused = (1 - cfg.num_experts_per_tok / cfg.n_routed_experts) ** tokens
    return cfg.n_routed_experts * (1 - probability_unused)


def decode_bytes(
    cfg: Config, placement: PlacementSpec, weight_groups: Mapping[str, WeightGroup], sequences: int, context: int
) -> int:
    """Returns the bytes that one device must read to decode one token of each sequence.

    Each weight counts once and so does the whole cache. Of the routed experts only the expected active ones count. The
    embedding counts only if it is also the head; the lookups of a step are negligible.

    Args:
        cfg: Config of the model.
        placement: Dtypes and sharding.
        weight_groups: Weights by group, from :func:`group_weights`.
        sequences: Number of sequences.
        context: Tokens of each sequence in the cache.
    """
    local_sequences = placement.shard_length(sequences, "batch")
    active_fraction = expected_active_experts(cfg, local_sequences) / cfg.n_routed_experts
    partly_read = {MTP_LAYER, "routed_experts"} | (set() if cfg.tie_word_embeddings else {"embedding"})
    dense = sum(group.device_bytes for name, group in weight_groups.items() if name not in partly_read)
    routed = round(weight_groups["routed_experts"].device_bytes * active_fraction)
    return dense + routed + cache_bytes(cfg, placement, sequences, context)


def active_weight_bytes(cfg: Config, params: ParamTree, sequences: int = 1) -> int:
    """Returns the bytes of loaded weights that the products of one decode step read, as they are stored.

    Unlike :func:`decode_bytes`, this measures the arrays themselves, for example in tiles, and counts the rows of the
    embedding that are looked up. Of the routed experts only the expected active ones count.

    Args:
        cfg: Config of the model.
        params: Parameters on one device.
        sequences: Number of sequences that decode one token each.
    """
    active_fraction = expected_active_experts(cfg, sequences) / cfg.n_routed_experts

    def bytes_read(path: ParamPath, nbytes: int) -> float:
        if path[0] == "mtp":
            return 0
        if path[0] == "embed" and not cfg.tie_word_embeddings:
            return sequences * nbytes / cfg.vocab_size
        is_expert = path[-2:-1] == ("moe",) and path[-1] in ("gate", "up", "down")
        return nbytes * (active_fraction if is_expert else 1)

    return round(sum(bytes_read(path, weight.nbytes) for path, weight in leaves_with_path(params)))


def _itemsize(dtype: str) -> int:
    return jnp.dtype(dtype).itemsize
