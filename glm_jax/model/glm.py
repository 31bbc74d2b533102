"""GLM-4.7-Flash as a functional Flax module.

The module only declares its parameters and calls; the mathematics is in :mod:`glm_jax.ops`. ``apply`` is a pure
function of parameters, tokens and cache::

    logits, cache = GLM(cfg).apply({"params": params}, tokens, positions=positions, cache=cache)
"""

from __future__ import annotations

import difflib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import unfreeze

from glm_jax.cache.latent import AXES as CACHE_AXES
from glm_jax.cache.latent import LatentCache
from glm_jax.config import Config, LayerRun
from glm_jax.errors import ConfigError, ShardingError
from glm_jax.model import fused_decode, mtp
from glm_jax.model.block import Context, Edit, Taps, block, tap_names
from glm_jax.model.fused_sampling import sample_states
from glm_jax.ops.linear import embed, linear
from glm_jax.ops.mla import Form
from glm_jax.ops.norm import rms_norm
from glm_jax.sampling import SampleResult, SamplerState, sample
from glm_jax.sharding import Rules
from glm_jax.weights import TiledWeight
from glm_jax.weights.params import ParamSpec, leaves, map_specs, param_specs
from glm_jax.weights.storage import leaf_specs
from glm_jax.weights.tiling import has_tiles, local_part, local_tree


class GLM(nn.Module):
    """The language model.

    Attributes:
        cfg: the architecture.
        rules: mesh axis of each logical axis. When any is set, calls must run under ``jax.set_mesh(mesh)``.
        dtype: of parameters made by ``init``; ``apply`` computes in the dtype of the parameters it is given.
    """

    cfg: Config
    rules: Rules = Rules()
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Declares every parameter from the one table of shapes; the prediction layer is optional in ``apply``."""
        specs = param_specs(self.cfg)
        if self.is_initializing():
            self.declared = {name: self.param(name, _init, spec, self.dtype) for name, spec in specs.items()}
            return
        # Linen compares arrays one by one with those that init would make, and a quantised weight has other arrays.
        given: dict[str, Any] = unfreeze(dict(self.variables.get("params", {})))
        _check_params(specs, given)
        self.declared = given

    @property
    def weights(self) -> dict[str, Any]:
        """The parameters as a plain nested dictionary (Linen freezes what ``setup`` stores)."""
        return unfreeze(self.declared)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        cache: LatentCache | None = None,
        *,
        logits_at: jax.Array | None = None,
        trace: Sequence[str] = (),
        edit: Mapping[str, Edit] | None = None,
        attention: Form = "auto",
    ) -> tuple[Any, ...]:
        """Logits of every token.

        Args:
            tokens: int32 ``[B, T]``; rows may be padded on the right.
            positions: int32 ``[B, T]``, ``0 .. T-1`` unless given; needed with a cache. A token sees cache slots up to
                its own position, so padding is whatever lies after a row's last real token.
            cache: latents of earlier tokens; the new ones are written into it.
            logits_at: int32 ``[B]``, the one index of each row whose logits are wanted.
            trace: names of activations to return (see :func:`activation_names`).
            edit: functions that replace activations by name.
            attention: "absorbed" or "expanded" force one form of the same result.

        Returns:
            ``(logits, cache)``, logits float32 ``[B, T, V]`` (``[B, 1, V]`` with ``logits_at``); with ``trace`` or
            ``edit`` also a dictionary of the traced activations.
        """
        hidden, cache, recorded = self._hidden(tokens, positions, cache, trace, edit, attention)
        if logits_at is not None:
            hidden = jnp.take_along_axis(hidden, logits_at[:, None, None], axis=1)
        logits = self.head(hidden)
        return (logits, cache, recorded) if trace or edit else (logits, cache)

    def hidden(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        cache: LatentCache | None = None,
        *,
        attention: Form = "auto",
    ) -> tuple[jax.Array, LatentCache | None]:
        """States after the final norm, ``[B, T, D]``, and the cache; arguments as in ``__call__``."""
        hidden, cache, _ = self._hidden(tokens, positions, cache, (), None, attention)
        return hidden, cache

    def head(self, hidden: jax.Array) -> jax.Array:
        """Logits float32 ``[B, T, V]`` of final-norm states ``[B, T, D]``."""
        weights = self.weights.get("head", self.weights["embed"])
        return self._head(hidden, weights)

    def draw(
        self, tokens: jax.Array, positions: jax.Array, cache: LatentCache, sampler: SamplerState
    ) -> tuple[SampleResult, LatentCache]:
        """The tokens after these, as a decode step draws them; by kernels, where those run the model and its head.

        Args:
            tokens: int32 ``[B, 1]``, the newest of each row.
            positions: int32 ``[B, 1]``, theirs; the drawn tokens will have the next ones.
            cache: latents of earlier tokens.
            sampler: options and history of the rows.

        Returns:
            What was drawn, and the cache with ``tokens`` in it.
        """
        body = {name: self.weights[name] for name in ("embed", "runs", "norm")}
        head = self.weights.get("head")
        kernels = not self.rules.mesh_axes and _Local(self.cfg, self.rules, "auto").by_kernels(body, tokens)
        if not isinstance(head, TiledWeight) or not kernels:
            logits, after = self(tokens, positions, cache)
            return sample(logits[:, 0], sampler, positions[:, 0] + 1), after
        _check_cache(self.cfg, cache, tokens.shape[0], layers=self.cfg.num_hidden_layers)
        made, cache = fused_decode.states(self.cfg, body, tokens, positions, cache)
        return sample_states(made, head, sampler, positions[:, 0], eps=self.cfg.rms_norm_eps), cache

    def draft(
        self,
        hidden: jax.Array,
        next_tokens: jax.Array,
        positions: jax.Array | None = None,
        cache: LatentCache | None = None,
        *,
        attention: Form = "auto",
    ) -> tuple[jax.Array, jax.Array, LatentCache | None]:
        """The prediction layer: logits for the token after ``next_tokens``.

        Args:
            hidden: ``[B, T, D]`` from :meth:`hidden` (or from this method, to draft further).
            next_tokens: int32 ``[B, T]``: entry ``p`` is the token at position ``p + 1``.
            positions: int32 ``[B, T]`` of ``hidden``.
            cache: the layer's own cache (``LatentCache.create(..., layers=1)``).

        Returns:
            Logits float32 ``[B, T, V]``, the state after ``shared_head.norm`` ``[B, T, D]``, and the cache.

        Raises:
            ConfigError: if the parameters hold no prediction layer.
        """
        if "mtp" not in self.weights:
            raise ConfigError("this model has no multi-token-prediction layer (num_nextn_predict_layers is 0)")
        if hidden.shape != (*next_tokens.shape, self.cfg.hidden_size):
            raise ConfigError(f"hidden {hidden.shape} must be tokens {next_tokens.shape} by {self.cfg.hidden_size}")
        positions = _positions(next_tokens, positions, cache)
        _check_cache(self.cfg, cache, next_tokens.shape[0], layers=1)
        weights = self.weights["mtp"]
        table = weights.get("embed", self.weights["embed"])
        core = {name: value for name, value in weights.items() if name not in ("embed", "head")}
        local = _Local(self.cfg, self.rules, attention)
        specs = param_specs(self.cfg)
        axes = {name: specs["mtp"][name] for name in core}
        placed = (_spec_tree(core, axes, self.rules), leaf_specs(table, specs["embed"], self.rules))
        call = local.wrap(local.draft, placed, cache is not None)
        state, cache = call((core, table), (hidden, next_tokens, positions), cache)
        logits = self._head(state, weights.get("head", self.weights.get("head", self.weights["embed"])))
        return logits, state, cache

    def _hidden(self, tokens, positions, cache, trace, edit, attention):  # noqa: ANN001, ANN202
        positions = _positions(tokens, positions, cache)
        _check_cache(self.cfg, cache, tokens.shape[0], layers=self.cfg.num_hidden_layers)
        edit = edit or {}
        _check_names(self.cfg, [*trace, *edit])
        body = {name: self.weights[name] for name in ("embed", "runs", "norm")}
        local = _Local(self.cfg, self.rules, attention, tuple(trace), edit)
        specs = param_specs(self.cfg)
        axes = _spec_tree(body, {name: specs[name] for name in body}, self.rules)
        call = local.wrap(local.hidden, axes, cache is not None)
        (hidden, recorded), cache = call(body, (tokens, positions), cache)
        return hidden, cache, recorded

    def _head(self, hidden: jax.Array, weight: Any) -> jax.Array:
        def local(weight: Any, hidden: jax.Array) -> jax.Array:
            return linear(hidden, local_part(weight), dtype=jnp.dtype(jnp.float32))

        rules = self.rules
        if not rules.mesh_axes:
            return local(weight, hidden)
        _require_mesh(rules)
        logits = jax.shard_map(
            local,
            in_specs=(leaf_specs(weight, param_specs(self.cfg)["embed"], rules), rules.spec("batch", None, None)),
            out_specs=rules.spec("batch", None, "vocab"),
            check_vma=not has_tiles(weight),
        )(weight, hidden)
        return jax.reshard(logits, rules.spec("batch", None, None))


class _Local:
    """The forward pass on one device's part of the weights, and its placement on the mesh."""

    def __init__(
        self, cfg: Config, rules: Rules, form: Form, trace: tuple[str, ...] = (), edit: Mapping[str, Edit] | None = None
    ) -> None:
        self.cfg, self.rules = cfg, rules
        self.form: Form = form
        self.trace, self.edit = trace, edit or {}

    def hidden(
        self, w: dict[str, Any], inputs: tuple[jax.Array, ...], cache: Any
    ) -> tuple[tuple[jax.Array, dict[str, Any]], Any]:
        tokens, positions = inputs
        w = local_tree(w)
        if cache is not None and self.by_kernels(w, tokens):
            h, cache = fused_decode.hidden(self.cfg, w, tokens, positions, cache, self.rules)
            return (h, {}), cache
        ctx = Context(self.cfg, self.rules, positions, self.form, Taps(frozenset(self.trace), self.edit))
        first = self.rules.index("vocab") * w["embed"].shape[0]
        h = ctx.taps("embed", self.rules.psum(embed(w["embed"], tokens, first), "vocab"))
        for i, run in enumerate(self.cfg.runs):
            h, cache = _run(ctx, run, h, cache, w["runs"][str(i)])
        h = ctx.taps("norm", rms_norm(h, w["norm"], self.cfg.rms_norm_eps))
        return (h, ctx.taps.recorded), cache

    def by_kernels(self, w: dict[str, Any], tokens: jax.Array) -> bool:
        """Whether the fused kernels do this call; they have one form, and no named activations."""
        plain = not (self.trace or self.edit) and self.form == "auto"
        few = tokens.size <= fused_decode.MOST_TOKENS and tokens.shape[1] <= fused_decode.MOST_PER_ROW
        return plain and few and fused_decode.obstacle(self.cfg, w, self.rules) is None

    def draft(self, w: tuple[dict[str, Any], Any], inputs: tuple[jax.Array, ...], cache: Any) -> tuple[jax.Array, Any]:
        hidden, next_tokens, positions = inputs
        ctx = Context(self.cfg, self.rules, positions, self.form)
        return mtp.draft_hidden(ctx, hidden, next_tokens, cache, *w)

    def wrap(self, function: Any, weight_axes: Any, with_cache: bool) -> Any:
        """``function(weights, inputs, cache) -> (states, cache)`` as one manual region over the whole mesh."""
        if not self.rules.mesh_axes:
            return function
        _require_mesh(self.rules)
        rows = self.rules.spec("batch")
        cache_axes = self.rules.spec(*CACHE_AXES) if with_cache else None
        # What a kernel makes of a device's part of the weights counts as different on every device, the cache too.
        return jax.shard_map(
            function,
            in_specs=(weight_axes, rows, cache_axes),
            out_specs=(rows, cache_axes),
            check_vma=not has_tiles(weight_axes),
        )


def activation_names(cfg: Config) -> tuple[str, ...]:
    """Every name that ``trace`` and ``edit`` know, in the order of computation."""
    blocks = [tap_names(kind, f"block.{i}") for i, kind in enumerate(cfg.mlp_layer_types)]
    return ("embed", *(name for names in blocks for name in names), "norm")


def _run(ctx: Context, run: LayerRun, h: jax.Array, cache: Any, w: dict[str, Any]) -> tuple[jax.Array, Any]:
    if run.count == 1 or ctx.taps:
        # Named activations exist only where each layer is spelled out.
        for i in range(run.count):
            h, cache = block(ctx, h, cache, w, i, run.start + i, f"block.{run.start + i}")
        return h, cache

    def step(carry: tuple[jax.Array, Any], i: jax.Array) -> tuple[tuple[jax.Array, Any], None]:
        h, cache = carry
        return block(ctx, h, cache, w, i, run.start + i), None

    (h, cache), _ = jax.lax.scan(step, (h, cache), jnp.arange(run.count, dtype=jnp.int32))
    return h, cache


def _init(key: jax.Array, spec: Any, dtype: Any) -> Any:
    if isinstance(spec, ParamSpec):
        return _draw(key, spec, dtype)
    return map_specs(
        lambda path, leaf: _draw(
            jax.random.fold_in(key, zlib.crc32("/".join(path).encode()) & 0x7FFFFFFF), leaf, dtype
        ),
        spec,
    )


def _draw(key: jax.Array, spec: ParamSpec, dtype: Any) -> jax.Array:
    kind = spec.dtype or dtype
    if spec.init == "normal":
        return jax.random.normal(key, spec.shape, kind) * jnp.asarray(spec.scale, kind)
    return jnp.full(spec.shape, 1.0 if spec.init == "ones" else 0.0, kind)


def _positions(tokens: jax.Array, positions: jax.Array | None, cache: LatentCache | None) -> jax.Array:
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ConfigError(f"tokens must be integers [batch, length], not {tokens.dtype} {tokens.shape}")
    if positions is None and cache is not None:
        raise ConfigError("positions are needed with a cache: they say which slots the tokens take")
    if positions is None:
        return jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    if positions.shape != tokens.shape:
        raise ConfigError(f"positions {positions.shape} must have the shape of the tokens, {tokens.shape}")
    return positions


def _check_cache(cfg: Config, cache: LatentCache | None, batch: int, layers: int) -> None:
    if cache is None:
        return
    found, expected = cache.data.shape, (layers, batch, cache.capacity, cfg.cache_width)
    if found != expected:
        raise ConfigError(f"the cache is {found} (layers, rows, slots, width); these tokens need {expected}")
    cache.check_scales()


def _check_names(cfg: Config, names: Sequence[str]) -> None:
    known = activation_names(cfg)
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, 3) or ["embed", "block.0.out", "norm"]
            raise ConfigError(
                f"no activation {name!r}; there are for example {', '.join(close)} (see activation_names)"
            )


def _spec_tree(weights: dict[str, Any], specs: dict[str, Any], rules: Rules) -> dict[str, Any]:
    held = dict(leaves(weights))
    return map_specs(lambda path, leaf: leaf_specs(held[path], leaf, rules), specs)


def _check_params(specs: dict[str, Any], given: dict[str, Any]) -> None:
    """That the parameters are those of the config; the prediction layer may be left out."""
    wanted = dict(leaves({name: spec for name, spec in specs.items() if name != "mtp" or "mtp" in given}))
    found = dict(leaves(given))
    wrong = [
        f"{'/'.join(path)} {'is missing' if path not in found else f'is {found[path].shape}, must be {spec.shape}'}"
        for path, spec in wanted.items()
        if path not in found or tuple(found[path].shape) != spec.shape
    ]
    wrong += [f"{'/'.join(path)} is unknown" for path in found if path not in wanted]
    if wrong:
        more = f" … and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ConfigError(f"these parameters are not the config's: {'; '.join(wrong[:5])}{more}")


def _require_mesh(rules: Rules) -> None:
    mesh = jax.sharding.get_abstract_mesh()
    missing = [axis for axis in rules.mesh_axes if axis not in mesh.axis_names]
    if missing:
        raise ShardingError(f"mesh axis {missing[0]!r} is not there: call under `with jax.set_mesh(mesh):`")
