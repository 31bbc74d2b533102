"""GLM-4.7-Flash as a functional Flax module.

The module only declares its parameters and calls; the mathematics is in :mod:`glm_jax.ops`. ``apply`` is a pure
function of parameters, tokens and cache::

    logits, cache = GLM(cfg).apply({"params": params}, tokens, positions=positions, cache=cache)
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import unfreeze

from glm_jax.cache.latent import CACHE_AXES as CACHE_AXES
from glm_jax.cache.latent import LatentCache
from glm_jax.config import Config, LayerGroup
from glm_jax.errors import ConfigError, ShardingError
from glm_jax.model import fused_decode, mtp
from glm_jax.model.block import ForwardContext, transformer_block
from glm_jax.model.fused_sampling import sample_from_residual
from glm_jax.model.hooks import ActivationHooks, EditFn, _check_activation_names
from glm_jax.ops.linear import embed_tokens, linear
from glm_jax.ops.mla import AttentionForm
from glm_jax.ops.norm import rms_norm
from glm_jax.sampling import SampleResult, SamplerState, sample
from glm_jax.sharding import Rules
from glm_jax.weights import TiledWeight
from glm_jax.weights.params import ParamSpec, leaves_with_path, map_specs, param_specs
from glm_jax.weights.storage import partition_specs
from glm_jax.weights.tiling import has_tiled_weights, to_local_param, to_local_params


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
            self.declared = {name: self.param(name, _init_params, spec, self.dtype) for name, spec in specs.items()}
            return
        # Linen compares arrays one by one with those that init would make, and a quantized weight has other arrays.
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
        edit: Mapping[str, EditFn] | None = None,
        attention: AttentionForm = "auto",
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
        hidden, cache, recorded = self._forward(tokens, positions, cache, trace, edit, attention)
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
        attention: AttentionForm = "auto",
    ) -> tuple[jax.Array, LatentCache | None]:
        """States after the final norm, ``[B, T, D]``, and the cache; arguments as in ``__call__``."""
        hidden, cache, _ = self._forward(tokens, positions, cache, (), None, attention)
        return hidden, cache

    def head(self, hidden: jax.Array) -> jax.Array:
        """Logits float32 ``[B, T, V]`` of final-norm states ``[B, T, D]``."""
        weights = self.weights.get("head", self.weights["embed"])
        return self._project_logits(hidden, weights)

    def decode_and_sample(
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
        kernels = not self.rules.mesh_axes and _LocalForward(self.cfg, self.rules, "auto").use_kernels(body, tokens)
        if not isinstance(head, TiledWeight) or not kernels:
            logits, after = self(tokens, positions, cache)
            return sample(logits[:, 0], sampler, positions[:, 0] + 1), after
        _check_cache(self.cfg, cache, tokens.shape[0], layers=self.cfg.num_hidden_layers)
        made, cache = fused_decode.forward_layers(self.cfg, body, tokens, positions, cache)
        return sample_from_residual(made, head, sampler, positions[:, 0], eps=self.cfg.rms_norm_eps), cache

    def draft(
        self,
        hidden: jax.Array,
        next_tokens: jax.Array,
        positions: jax.Array | None = None,
        cache: LatentCache | None = None,
        *,
        attention: AttentionForm = "auto",
    ) -> tuple[jax.Array, jax.Array, LatentCache | None]:
        """The prediction layer: logits for the token after ``next_tokens``.

        Args:
            hidden: ``[B, T, D]`` from :meth:`hidden_states` (or from this method, to draft further).
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
        positions = _resolve_positions(next_tokens, positions, cache)
        _check_cache(self.cfg, cache, next_tokens.shape[0], layers=1)
        weights = self.weights["mtp"]
        table = weights.get("embed", self.weights["embed"])
        core = {name: value for name, value in weights.items() if name not in ("embed", "head")}
        local = _LocalForward(self.cfg, self.rules, attention)
        specs = param_specs(self.cfg)
        axes = {name: specs["mtp"][name] for name in core}
        placed = (_partition_spec_tree(core, axes, self.rules), partition_specs(table, specs["embed"], self.rules))
        call = local.shard_over_mesh(local.draft, placed, cache is not None)
        state, cache = call((core, table), (hidden, next_tokens, positions), cache)
        logits = self._project_logits(state, weights.get("head", self.weights.get("head", self.weights["embed"])))
        return logits, state, cache

    def _forward(self, tokens, positions, cache, trace, edit, attention):  # noqa: ANN001, ANN202
        positions = _resolve_positions(tokens, positions, cache)
        _check_cache(self.cfg, cache, tokens.shape[0], layers=self.cfg.num_hidden_layers)
        edit = edit or {}
        _check_activation_names(self.cfg, [*trace, *edit])
        body = {name: self.weights[name] for name in ("embed", "runs", "norm")}
        local = _LocalForward(self.cfg, self.rules, attention, tuple(trace), edit)
        specs = param_specs(self.cfg)
        axes = _partition_spec_tree(body, {name: specs[name] for name in body}, self.rules)
        call = local.shard_over_mesh(local.hidden, axes, cache is not None)
        (hidden, recorded), cache = call(body, (tokens, positions), cache)
        return hidden, cache, recorded

    def _project_logits(self, hidden: jax.Array, weight: Any) -> jax.Array:
        def local(weight: Any, hidden: jax.Array) -> jax.Array:
            return linear(hidden, to_local_param(weight), dtype=jnp.dtype(jnp.float32))

        rules = self.rules
        if not rules.mesh_axes:
            return local(weight, hidden)
        _require_mesh(rules)
        logits = jax.shard_map(
            local,
            in_specs=(
                partition_specs(weight, param_specs(self.cfg)["embed"], rules),
                rules.partition_spec("batch", None, None),
            ),
            out_specs=rules.partition_spec("batch", None, "vocab"),
            check_vma=not has_tiled_weights(weight),
        )(weight, hidden)
        return jax.reshard(logits, rules.partition_spec("batch", None, None))


class _LocalForward:
    """The forward pass on one device's part of the weights, and its placement on the mesh."""

    def __init__(
        self,
        cfg: Config,
        rules: Rules,
        form: AttentionForm,
        trace: tuple[str, ...] = (),
        edit: Mapping[str, EditFn] | None = None,
    ) -> None:
        self.cfg, self.rules = cfg, rules
        self.form: AttentionForm = form
        self.trace, self.edit = trace, edit or {}

    def hidden(
        self, w: dict[str, Any], inputs: tuple[jax.Array, ...], cache: Any
    ) -> tuple[tuple[jax.Array, dict[str, Any]], Any]:
        tokens, positions = inputs
        w = to_local_params(w)
        if cache is not None and self.use_kernels(w, tokens):
            h, cache = fused_decode.hidden_states(self.cfg, w, tokens, positions, cache, self.rules)
            return (h, {}), cache
        ctx = ForwardContext(
            self.cfg, self.rules, positions, self.form, ActivationHooks(frozenset(self.trace), self.edit)
        )
        first = self.rules.axis_index("vocab") * w["embed"].shape[0]
        h = ctx.hooks("embed", self.rules.psum(embed_tokens(w["embed"], tokens, first), "vocab"))
        for i, run in enumerate(self.cfg.layer_groups):
            h, cache = _apply_layer_group(ctx, run, h, cache, w["runs"][str(i)])
        h = ctx.hooks("norm", rms_norm(h, w["norm"], self.cfg.rms_norm_eps))
        return (h, ctx.hooks.recorded), cache

    def use_kernels(self, w: dict[str, Any], tokens: jax.Array) -> bool:
        """Whether the fused kernels do this call; they have one form, and no named activations."""
        plain = not (self.trace or self.edit) and self.form == "auto"
        few = tokens.size <= fused_decode.MAX_TOKENS and tokens.shape[1] <= fused_decode.MAX_TOKENS_PER_ROW
        return plain and few and fused_decode.unsupported_reason(self.cfg, w, self.rules) is None

    def draft(self, w: tuple[dict[str, Any], Any], inputs: tuple[jax.Array, ...], cache: Any) -> tuple[jax.Array, Any]:
        hidden, next_tokens, positions = inputs
        ctx = ForwardContext(self.cfg, self.rules, positions, self.form)
        return mtp.draft_hidden_states(ctx, hidden, next_tokens, cache, *w)

    def shard_over_mesh(self, function: Any, weight_axes: Any, with_cache: bool) -> Any:
        """``function(weights, inputs, cache) -> (states, cache)`` as one manual region over the whole mesh."""
        if not self.rules.mesh_axes:
            return function
        _require_mesh(self.rules)
        rows = self.rules.partition_spec("batch")
        cache_axes = self.rules.partition_spec(*CACHE_AXES) if with_cache else None
        # What a kernel makes of a device's part of the weights counts as different on every device, the cache too.
        return jax.shard_map(
            function,
            in_specs=(weight_axes, rows, cache_axes),
            out_specs=(rows, cache_axes),
            check_vma=not has_tiled_weights(weight_axes),
        )


def _apply_layer_group(
    ctx: ForwardContext, run: LayerGroup, h: jax.Array, cache: Any, w: dict[str, Any]
) -> tuple[jax.Array, Any]:
    if run.count == 1 or ctx.hooks:
        # Named activations exist only where each layer is spelled out.
        for i in range(run.count):
            h, cache = transformer_block(ctx, h, cache, w, i, run.start + i, f"block.{run.start + i}")
        return h, cache

    def step(carry: tuple[jax.Array, Any], i: jax.Array) -> tuple[tuple[jax.Array, Any], None]:
        h, cache = carry
        return transformer_block(ctx, h, cache, w, i, run.start + i), None

    (h, cache), _ = jax.lax.scan(step, (h, cache), jnp.arange(run.count, dtype=jnp.int32))
    return h, cache


def _init_params(key: jax.Array, spec: Any, dtype: Any) -> Any:
    if isinstance(spec, ParamSpec):
        return _init_array(key, spec, dtype)
    return map_specs(
        lambda path, leaf: _init_array(
            jax.random.fold_in(key, zlib.crc32("/".join(path).encode()) & 0x7FFFFFFF), leaf, dtype
        ),
        spec,
    )


def _init_array(key: jax.Array, spec: ParamSpec, dtype: Any) -> jax.Array:
    kind = spec.dtype or dtype
    if spec.init == "normal":
        return jax.random.normal(key, spec.shape, kind) * jnp.asarray(spec.scale, kind)
    return jnp.full(spec.shape, 1.0 if spec.init == "ones" else 0.0, kind)


def _resolve_positions(tokens: jax.Array, positions: jax.Array | None, cache: LatentCache | None) -> jax.Array:
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


def _partition_spec_tree(weights: dict[str, Any], specs: dict[str, Any], rules: Rules) -> dict[str, Any]:
    held = dict(leaves_with_path(weights))
    return map_specs(lambda path, leaf: partition_specs(held[path], leaf, rules), specs)


def _check_params(specs: dict[str, Any], given: dict[str, Any]) -> None:
    """That the parameters are those of the config; the prediction layer may be left out."""
    wanted = dict(leaves_with_path({name: spec for name, spec in specs.items() if name != "mtp" or "mtp" in given}))
    found = dict(leaves_with_path(given))
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
