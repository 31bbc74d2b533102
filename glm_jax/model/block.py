"""One transformer block on one device's part of the weights, and the taps that let research look inside."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from glm_jax.cache.latent import LatentCache, Rows
from glm_jax.config import Config
from glm_jax.errors import ConfigError
from glm_jax.ops import experts
from glm_jax.ops.linear import Index, linear, pick
from glm_jax.ops.mla import Form, attend, project
from glm_jax.ops.mlp import swiglu
from glm_jax.ops.norm import rms_norm
from glm_jax.sharding import Rules

Edit = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, slots=True)
class Taps:
    """Named points where activations are read (``trace``) or replaced (``edit``) during one call.

    Attributes:
        trace: names to record.
        edit: name to function; the function's result takes the activation's place.
        recorded: filled during the call.
    """

    trace: frozenset[str] = frozenset()
    edit: Mapping[str, Edit] = dataclasses.field(default_factory=dict)
    recorded: dict[str, jax.Array] = dataclasses.field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.trace or self.edit)

    def __call__(self, name: str, value: jax.Array) -> jax.Array:
        """Passes ``value`` through the point ``name``."""
        if name in self.edit:
            edited = self.edit[name](value)
            if edited.shape != value.shape:
                raise ConfigError(
                    f"the edit of {name!r} must return the shape {value.shape} it was given, not {edited.shape}"
                )
            value = edited.astype(value.dtype)
        if name in self.trace:
            self.recorded[name] = value
        return value


@dataclasses.dataclass(frozen=True, slots=True)
class Context:
    """What every block of one call shares.

    Attributes:
        positions: int32 ``[B, T]``.
        form: of the attention.
    """

    cfg: Config
    rules: Rules
    positions: jax.Array
    form: Form = "auto"
    taps: Taps = dataclasses.field(default_factory=Taps)


def block(
    ctx: Context, h: jax.Array, cache: LatentCache | None, w: dict[str, Any], layer: Index, slot: Index, name: str = ""
) -> tuple[jax.Array, LatentCache | None]:
    """``h + attention(norm(h))``, then ``+ feed_forward(norm(.))``.

    Args:
        h: residual stream ``[B, T, D]``.
        cache: of all layers, or ``None`` to attend to the new tokens alone.
        w: parameters of a run, stacked by layer.
        layer: index into the run's stacks.
        slot: index into the cache's layers.
        name: prefix of the tap names, ``block.{i}``.

    Returns:
        The new residual stream and cache.
    """
    h = ctx.taps(f"{name}.in", h)
    attention, cache = _attention(ctx, h, cache, w["attn"], layer, slot)
    h = h + ctx.taps(f"{name}.attn", attention)
    if "mlp" in w:
        out = ctx.taps(f"{name}.mlp", _dense(ctx, h, w["mlp"], layer))
    else:
        out = ctx.taps(f"{name}.moe", _sparse(ctx, h, w["moe"], layer, name))
    return ctx.taps(f"{name}.out", h + out), cache


def tap_names(kind: str, name: str) -> tuple[str, ...]:
    """The tap points of a block of this kind."""
    inner = ("mlp",) if kind == "dense" else ("moe.router", "moe.experts", "moe")
    return tuple(f"{name}.{point}" for point in ("in", "attn", *inner, "out"))


def _attention(
    ctx: Context, h: jax.Array, cache: LatentCache | None, w: dict[str, Any], layer: Index, slot: Index
) -> tuple[jax.Array, LatentCache | None]:
    cfg = ctx.cfg
    heads = w["k_b"].shape[1]
    x = rms_norm(h, pick(w["norm"], layer), cfg.rms_norm_eps)
    queries, new = project(cfg, x, w, layer, ctx.positions, heads)
    if cache is None:
        # The rows are the tokens themselves: a token's slot is its place in the row, wherever the row begins.
        own_slot = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32)[None], ctx.positions.shape)
        rows = Rows(new)
    else:
        own_slot = ctx.positions
        cache = cache.write(slot, own_slot, new, cfg.kv_lora_rank)
        # The new tokens too are seen as they are stored, so that it does not matter which call wrote a row.
        rows = cache.layer(slot)
    stored = None if cache is None else (cache, slot)
    out = attend(cfg, queries, rows, own_slot, w, layer, ctx.form, stored)
    # Partial sums over the devices' heads are added in float32.
    partial = linear(out.reshape(*out.shape[:2], -1), w["o"], layer, dtype=jnp.dtype(jnp.float32))
    return ctx.rules.psum(partial, "heads").astype(h.dtype), cache


def _dense(ctx: Context, h: jax.Array, w: dict[str, Any], layer: Index) -> jax.Array:
    x = rms_norm(h, pick(w["norm"], layer), ctx.cfg.rms_norm_eps)
    out = swiglu(x, w["gate"], w["up"], w["down"], layer, dtype=jnp.dtype(jnp.float32))
    return ctx.rules.psum(out, "ffn").astype(h.dtype)


def _sparse(ctx: Context, h: jax.Array, w: dict[str, Any], layer: Index, name: str) -> jax.Array:
    cfg, shape = ctx.cfg, h.shape
    x = rms_norm(h, pick(w["norm"], layer), cfg.rms_norm_eps).reshape(-1, shape[-1])
    routing = experts.route(cfg, x, pick(w["router"], layer), pick(w["router_bias"], layer))
    if ctx.taps:
        routing = _tap_routing(ctx, routing, shape, f"{name}.moe.router")
    routed = experts.apply_experts(x, routing, w, layer, ctx.rules)
    routed = ctx.taps(f"{name}.moe.experts", routed.reshape(shape))
    shared = experts.apply_shared(x, w, layer, ctx.rules).reshape(shape) if cfg.n_shared_experts else 0.0
    return (routed + shared).astype(h.dtype)


def _tap_routing(ctx: Context, routing: experts.Routing, shape: tuple[int, ...], name: str) -> experts.Routing:
    count = ctx.cfg.n_routed_experts
    dense = ctx.taps(name, experts.to_dense(routing, count).reshape(*shape[:-1], count))
    return experts.from_dense(dense.reshape(-1, count)) if name in ctx.taps.edit else routing
