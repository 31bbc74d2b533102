"""The forward pass of few tokens in few kernels: eight for a layer of experts, nine for more than eight tokens.

The reference computes one operation after the other; here kernels begin and end where the data must cross the card, and
everything between is part of one of them:

====== =======================================================================================
 1     queries' latent and latent, from the normed residual stream
 2     queries in the space of the latents, rotated; the new row of the cache
 3     attention over shares of the cache
 4     the shares put together, values
 5     output projection, residual stream
 6     the router's logits
 7     chosen experts and shared expert: gate, up, their product
 8     down, weighted sum, residual stream
====== =======================================================================================

The residual stream is float32. A norm is never computed on its own: the kernel before it leaves the stream multiplied
by the norm's weight, and its sums of squares, and the kernel after it multiplies its products by ``1 / rms``.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from glm_jax.cache.latent import LatentCache
from glm_jax.config import Config, LayerRun
from glm_jax.ops.linear import embed
from glm_jax.ops.rope import rope_table
from glm_jax.sharding import Rules
from glm_jax.weights import TiledWeight
from glm_jax.weights.params import leaves
from glm_jax.weights.tiling import lies_in_tiles
from pallas_kernels import available, interpreted, mla_decode, moe
from pallas_kernels.quant_matmul import Made, Squares, linear
from pallas_kernels.tiles import same_layout

# More tokens go the way of prompts, whose products are made for many rows.
MOST_TOKENS, MOST_PER_ROW = 128, 8
# Of more tokens several are likely to share an expert: one more kernel, so that it is read once.
_MOST_UNSORTED = 8
_COUNTERS = 16_384
_BLOCK = 64


class Stream(NamedTuple):
    """The residual stream of M tokens between two layers, and what goes along with it.

    Attributes:
        h: float32 ``[M, D]``.
        scaled: ``[M, D]``, times the weight of the norm that comes next.
        squares: float32 ``[M, blocks]``, sums of squares of h by block of columns.
        cache: of all layers.
        counters: zeros.
    """

    h: jax.Array
    scaled: jax.Array
    squares: jax.Array
    cache: mla_decode.Cache
    counters: jax.Array


def obstacle(cfg: Config, body: dict[str, Any], rules: Rules = Rules()) -> str | None:
    """Why a model cannot be run by these kernels; None if it can."""
    if not available():
        return "there is no GPU, or no Triton"
    if unsupported := [axis for axis in ("batch", "seq", "embed", "latent", "experts") if getattr(rules, axis)]:
        return f"they run on devices that split heads, widths and vocabulary, not {unsupported[0]}"
    widths = (cfg.kv_lora_rank, cfg.qk_rope_head_dim)
    if cfg.q_lora_rank is None:
        return "its queries have no latent"
    if cfg.n_group != 1:
        return "its experts are chosen by group"
    if any(width & (width - 1) for width in widths):
        return "the widths of latent and rope key must be powers of two"
    if cfg.qk_head_dim % _BLOCK or cfg.q_lora_rank % _BLOCK or cfg.kv_lora_rank % _BLOCK:
        return f"the widths of head and latents must be multiples of {_BLOCK}"
    plain = [
        "/".join(("runs", *path))
        for path, leaf in leaves(body["runs"])
        if not isinstance(leaf, TiledWeight) and lies_in_tiles(("runs", *path))
    ]
    if plain:
        return f"the storage of {plain[0]} has no layout in tiles"
    if not interpreted() and body["embed"].dtype != jnp.bfloat16:
        return f"they compute in bfloat16, not in {jnp.dtype(body['embed'].dtype).name}"
    return next((problem for run in body["runs"].values() if (problem := _differences(run))), None)


def _differences(run: dict[str, Any]) -> str | None:
    """Weights that one kernel reads together but that are stored in different ways."""
    attn, feed = run["attn"], run.get("moe") or run["mlp"]
    if attn["q_a"].tiles.kind != attn["kv_a"].tiles.kind:
        return "q_a and kv_a are stored in different ways"
    for one, other in (("gate", "up"), ("shared_gate", "shared_up")):
        if one in feed and not same_layout(feed[one].tiles, feed[other].tiles):
            return f"{one} and {other} are stored in different ways"
    return None


def hidden(
    cfg: Config,
    body: dict[str, Any],
    tokens: jax.Array,
    positions: jax.Array,
    cache: LatentCache,
    rules: Rules = Rules(),
) -> tuple[jax.Array, LatentCache]:
    """States after the final norm ``[B, T, D]`` in the dtype of the embedding, and the cache; see :func:`states`."""
    made, cache = states(cfg, body, tokens, positions, cache, rules)
    factor = jax.lax.rsqrt(jnp.sum(made.squares, axis=-1, keepdims=True) / made.h.shape[-1] + cfg.rms_norm_eps)
    normed = (made.scaled.astype(jnp.float32) * factor).astype(made.scaled.dtype)
    return normed.reshape(*tokens.shape, -1), cache


def states(
    cfg: Config,
    body: dict[str, Any],
    tokens: jax.Array,
    positions: jax.Array,
    cache: LatentCache,
    rules: Rules = Rules(),
) -> tuple[Stream, LatentCache]:
    """What the layers leave, and the cache with the new tokens in it.

    Args:
        cfg: the model.
        body: ``embed``, ``runs`` and ``norm``; the matrices of the runs in tiles. Of several devices the local part.
        tokens: int32 ``[B, T]``.
        positions: int32 ``[B, T]``.
        cache: of all layers, on every device.
        rules: mesh axis of each logical axis: heads, widths and vocabulary may be split.

    Returns:
        The stream, of B times T tokens, with the final norm as the one that comes next; and the cache.
    """
    first = rules.index("vocab") * body["embed"].shape[0]
    embedded = rules.psum(embed(body["embed"], tokens.reshape(-1), first), "vocab")
    dtype, h = embedded.dtype, embedded.astype(jnp.float32)
    flat = positions.reshape(-1)
    norms = jnp.concatenate([*(run["attn"]["norm"] for run in _runs(cfg, body)), body["norm"][None]])
    stream = Stream(
        h,
        (h * norms[:1].astype(jnp.float32)).astype(dtype),
        jnp.sum(h * h, axis=-1, keepdims=True),
        mla_decode.Cache(cache.data, cache.scales),
        jnp.zeros(_COUNTERS, jnp.int32),
    )
    table = jnp.stack(rope_table(flat, cfg.qk_rope_head_dim, cfg.rope_theta, dtype))  # together: one kernel
    shared = _Shared(cfg, rules, flat, table, norms)
    for run, weights in zip(cfg.runs, _runs(cfg, body), strict=True):
        stream = _run(shared, run, weights, stream)
    return stream, dataclasses.replace(cache, data=stream.cache.codes, scales=stream.cache.scales)


class _Shared(NamedTuple):
    """What all layers have in common."""

    cfg: Config
    rules: Rules
    positions: jax.Array
    table: jax.Array
    norms: jax.Array


def _runs(cfg: Config, body: dict[str, Any]) -> list[dict[str, Any]]:
    return [body["runs"][str(i)] for i in range(len(cfg.runs))]


def _run(shared: _Shared, run: LayerRun, w: dict[str, Any], stream: Stream) -> Stream:
    attn = w["attn"]
    ones = jnp.ones((run.count, shared.cfg.qk_rope_head_dim), attn["norm"].dtype)
    latent_norms = jnp.concatenate([attn["q_a_norm"], attn["kv_a_norm"], ones], axis=1)

    # Spelled out: a loop would add its counter to every layer, and would hold the layers of a token apart.
    for i in range(run.count):
        stream = _layer(shared, run, w, latent_norms, i, stream)
    return stream


def _layer(
    shared: _Shared, run: LayerRun, w: dict[str, Any], latent_norms: jax.Array, layer: int, stream: Stream
) -> Stream:
    cfg, attn, place = shared.cfg, w["attn"], jnp.full(1, layer, jnp.int32)
    dtype, squares = stream.scaled.dtype, Squares(stream.squares, 0, stream.squares.shape[1])
    a, counters = linear(
        stream.scaled,
        attn["q_a"].tiles,
        place,
        stream.counters,
        other=attn["kv_a"].tiles,
        squares=squares,
        eps=cfg.rms_norm_eps,
        next_norm=latent_norms,
    )
    latents = _split_squares(cfg, a.squares)
    sizes = _attention(cfg, heads=attn["k_b"].shape[1])
    query, cache = mla_decode.queries(
        sizes, a.scaled, latents, place, shared.positions, shared.table, attn["q_b"].tiles, attn["k_b"].tiles,
        stream.cache, cache_from=run.start, dtype=dtype,
    )  # fmt: skip
    parts = mla_decode.attend(sizes, query, cache, place, shared.positions, cache_from=run.start)
    attended = mla_decode.values(sizes, parts, place, attn["v_b"].tiles, dtype=dtype)
    feed = w.get("moe") or w["mlp"]
    split = bool(shared.rules.heads)
    mid, counters = linear(
        attended, attn["o"].tiles, place, counters, residual=None if split else stream.h,
        next_norm=None if split else feed["norm"], dtype=jnp.float32, scaled_dtype=dtype,
    )  # fmt: skip
    if split:
        mid = _joined(shared.rules.psum(mid.out, "heads"), stream.h, feed["norm"][layer], dtype)
    split, next_from = bool(shared.rules.ffn), run.start + 1
    norms = None if split else shared.norms
    step = _sparse if "moe" in w else _dense
    made, counters = step(shared, feed, place, mid, counters, None if split else mid.out, norms, next_from)
    if split:
        made = _joined(shared.rules.psum(made.out, "ffn"), mid.out, shared.norms[next_from + layer], dtype)
    return Stream(made.out, made.scaled, made.squares.parts, cache, counters)


def _joined(added: jax.Array, h: jax.Array, norm: jax.Array, dtype: Any) -> Made:
    """What a kernel leaves when it adds to the residual stream itself, of a sum over devices."""
    out = h + added
    squares = Squares(jnp.sum(out * out, axis=-1, keepdims=True), 0, 1)
    return Made(out, (out * norm.astype(jnp.float32)[None]).astype(dtype), squares)


def _sparse(shared, w, place, mid, counters, residual, norms, next_from):  # noqa: ANN001, ANN202
    cfg = shared.cfg
    routed = moe.Routed(
        experts=cfg.n_routed_experts,
        chosen=cfg.num_experts_per_tok,
        normalised=cfg.norm_topk_prob,
        factor=cfg.routed_scaling_factor,
    )
    logits, counters = linear(
        mid.scaled, w["router"].tiles, place, counters, squares=mid.squares, eps=cfg.rms_norm_eps, dtype=jnp.float32
    )
    both = (w["shared_gate"].tiles, w["shared_up"].tiles) if cfg.n_shared_experts else None
    bias = w["router_bias"]
    many = logits.out.shape[0] > _MOST_UNSORTED
    plan = moe.sort_pairs(routed, place, logits.out, bias) if many else None
    h, plan = moe.gate_up(
        routed, mid.scaled, mid.squares, place, logits.out, bias, w["gate"].tiles, w["up"].tiles, both,
        eps=cfg.rms_norm_eps, plan=plan,
    )  # fmt: skip
    shared_down = w["shared_down"].tiles if cfg.n_shared_experts else None
    return moe.down(
        routed, h, plan, place, w["down"].tiles, shared_down, residual, norms, counters, next_from=next_from
    )  # fmt: skip


def _dense(shared, w, place, mid, counters, residual, norms, next_from):  # noqa: ANN001, ANN202
    none = moe.Routed(experts=1, chosen=0, normalised=False, factor=1.0)
    both = (w["gate"].tiles, w["up"].tiles)
    h, _ = moe.gate_up(none, mid.scaled, mid.squares, place, mid.out, mid.out, *both, both, eps=shared.cfg.rms_norm_eps)
    h = h.reshape(mid.scaled.shape[0], -1)
    return linear(
        h, w["down"].tiles, place, counters, residual=residual, next_norm=norms, next_from=next_from, dtype=jnp.float32,
        scaled_dtype=h.dtype,
    )  # fmt: skip


def _attention(cfg: Config, heads: int) -> mla_decode.Attention:
    return mla_decode.Attention(
        heads=heads,
        nope=cfg.qk_nope_head_dim,
        rope=cfg.qk_rope_head_dim,
        latent=cfg.kv_lora_rank,
        value=cfg.v_head_dim,
        query_latent=cfg.q_lora_rank or 0,
        interleave=cfg.rope_interleave,
        eps=cfg.latent_eps,
    )


def _split_squares(cfg: Config, squares: Squares) -> tuple[Squares, Squares]:
    """Those of the queries' latent and of the latent; blocks do not cross from one to the other."""
    width = (cfg.q_lora_rank or 0) + cfg.cache_width
    block = _BLOCK if -(-width // _BLOCK) == squares.count else _BLOCK // 2
    first, count = (cfg.q_lora_rank or 0) // block, cfg.kv_lora_rank // block
    return Squares(squares.parts, 0, first), Squares(squares.parts, first, count)
