"""GLM-4.7-Flash as a functional Flax module.

The module only declares its parameters and checks its arguments; the forward pass is in
:mod:`glm_jax.model.local_forward`, the mathematics in :mod:`glm_jax.ops`. ``apply`` is a pure function of parameters,
tokens and cache::

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

from glm_jax.cache.latent import LatentCache
from glm_jax.config import Config
from glm_jax.errors import ConfigError
from glm_jax.model import fused_decode
from glm_jax.model.fused_sampling import sample_from_residual
from glm_jax.model.hooks import EditFn, check_activation_names
from glm_jax.model.local_forward import LocalForward, require_mesh
from glm_jax.ops.linear import linear
from glm_jax.ops.mla import AttentionForm
from glm_jax.sampling import SampleResult, SamplerState, sample
from glm_jax.sharding import Rules
from glm_jax.weights import Weight, as_weight_matrix
from glm_jax.weights.params import ParamPath, ParamSpec, ParamTree, leaves_with_path, map_with_path, param_specs
from glm_jax.weights.storage import partition_specs
from glm_jax.weights.tiling import has_tiled_weights


class GLM(nn.Module):
    """The language model.

    Attributes:
        cfg: Architecture of the model.
        rules: Mesh axis of each logical axis. When any is set, calls must run under ``jax.set_mesh(mesh)``.
        dtype: Dtype of parameters that ``init`` creates; ``apply`` computes in the dtype of its parameters.
    """

    cfg: Config
    rules: Rules = Rules()
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Declares every parameter of :func:`param_specs`; the prediction layer is optional in ``apply``."""
        specs = param_specs(self.cfg)
        if self.is_initializing():
            self.declared = {name: self.param(name, _init_params, spec, self.dtype) for name, spec in specs.items()}
            return
        # Not by self.param, which compares each array with that of init: a quantized weight has other arrays.
        params: ParamTree = unfreeze(dict(self.variables.get("params", {})))
        _check_params(specs, params)
        self.declared = params

    @property
    def weights(self) -> ParamTree:
        """The parameters as plain nested dictionaries (Linen freezes attributes that ``setup`` assigns)."""
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
            tokens: ``int32 [B, T]``; rows may be padded on the right.
            positions: ``int32 [B, T]``, by default ``0 .. T-1``; required with a cache. A token sees cache slots up to
                its own position, so padding is any token after a row's last real one.
            cache: Latents of earlier tokens; those of the new tokens are written into the returned cache.
            logits_at: ``int32 [B]``, one index into each row, to compute only the logits of that token.
            trace: Names of activations to return (see :func:`activation_names`).
            edit: Functions that replace activations, by name.
            attention: "absorbed" or "expanded" force one form of attention; both give the same result.

        Returns:
            ``(logits, cache)`` with logits ``float32 [B, T, V]``, or ``float32 [B, 1, V]`` with ``logits_at``. With
            ``trace`` or ``edit`` also a dictionary of the traced activations.

        Raises:
            ConfigError: If shapes do not fit the config, or an activation name is unknown.
            ShardingError: If the rules name a mesh axis and no such mesh is set.
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
        """States after the final norm, ``[B, T, D]``, and the cache; takes the arguments of ``__call__``."""
        hidden, cache, _ = self._forward(tokens, positions, cache, (), None, attention)
        return hidden, cache

    def head(self, hidden: jax.Array) -> jax.Array:
        """Logits ``float32 [B, T, V]`` of states after the final norm ``[B, T, D]``."""
        return self._project_logits(hidden, self.weights.get("head", self.weights["embed"]))

    def decode_and_sample(
        self, tokens: jax.Array, positions: jax.Array, cache: LatentCache, sampler: SamplerState
    ) -> tuple[SampleResult, LatentCache]:
        """One decode step: samples the token after the newest one of each row.

        Kernels compute both the step and the sampling where they run the model and its head on one device.

        Args:
            tokens: ``int32 [B, 1]``, the newest token of each row.
            positions: ``int32 [B, 1]``, positions of ``tokens``; the sampled tokens take the next ones.
            cache: Latents of earlier tokens.
            sampler: Sampling options and history of the rows.

        Returns:
            The sampled tokens, and the cache with ``tokens`` in it.
        """
        body = {name: self.weights[name] for name in ("embed", "runs", "norm")}
        head = self.weights.get("head")
        head_tiles = None if head is None else as_weight_matrix(head).kernel_tiles
        local = LocalForward(self.cfg, self.rules)
        if head_tiles is None or self.rules.mesh_axes or not local.use_fused_decode(body, tokens):
            logits, after = self(tokens, positions, cache)
            with jax.named_scope("sample"):
                return sample(logits[:, 0], sampler, positions[:, 0] + 1), after
        _check_cache(self.cfg, cache, tokens.shape[0], layers=self.cfg.num_hidden_layers)
        stream, cache = fused_decode.forward_layers(self.cfg, body, tokens, positions, cache)
        return sample_from_residual(stream, head_tiles, sampler, positions[:, 0], eps=self.cfg.rms_norm_eps), cache

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
            hidden: ``[B, T, D]`` from :meth:`hidden` (or the state that this method returns, to draft further).
            next_tokens: ``int32 [B, T]``; entry ``p`` is the token at position ``p + 1``.
            positions: ``int32 [B, T]``, positions of ``hidden``.
            cache: The layer's own cache (``LatentCache.create(..., layers=1)``).
            attention: "absorbed" or "expanded" force one form of attention.

        Returns:
            Logits ``float32 [B, T, V]``, the state after ``shared_head.norm`` ``[B, T, D]``, and the cache.

        Raises:
            ConfigError: If the parameters have no prediction layer, or shapes do not fit the config.
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
        local = LocalForward(self.cfg, self.rules, attention)
        specs = param_specs(self.cfg)
        core_partition = _partition_spec_tree(core, {name: specs["mtp"][name] for name in core}, self.rules)
        partition = (core_partition, partition_specs(table, specs["embed"], self.rules))
        call = local.shard_over_mesh(local.draft, partition, cache is not None)
        state, cache = call((core, table), (hidden, next_tokens, positions), cache)
        logits = self._project_logits(state, weights.get("head", self.weights.get("head", self.weights["embed"])))
        return logits, state, cache

    def _forward(
        self,
        tokens: jax.Array,
        positions: jax.Array | None,
        cache: LatentCache | None,
        trace: Sequence[str],
        edit: Mapping[str, EditFn] | None,
        attention: AttentionForm,
    ) -> tuple[jax.Array, LatentCache | None, dict[str, jax.Array]]:
        positions = _resolve_positions(tokens, positions, cache)
        _check_cache(self.cfg, cache, tokens.shape[0], layers=self.cfg.num_hidden_layers)
        edit = edit or {}
        check_activation_names(self.cfg, [*trace, *edit])
        body = {name: self.weights[name] for name in ("embed", "runs", "norm")}
        local = LocalForward(self.cfg, self.rules, attention, tuple(trace), edit)
        specs = param_specs(self.cfg)
        partition = _partition_spec_tree(body, {name: specs[name] for name in body}, self.rules)
        call = local.shard_over_mesh(local.hidden, partition, cache is not None)
        (hidden, recorded), cache = call(body, (tokens, positions), cache)
        return hidden, cache, recorded

    @jax.named_scope("lm_head")
    def _project_logits(self, hidden: jax.Array, weight: Weight) -> jax.Array:
        def local(weight: Weight, hidden: jax.Array) -> jax.Array:
            return linear(hidden, as_weight_matrix(weight).to_local(), dtype=jnp.dtype(jnp.float32))

        rules = self.rules
        if not rules.mesh_axes:
            return local(weight, hidden)
        require_mesh(rules)
        logits = jax.shard_map(
            local,
            in_specs=(
                partition_specs(weight, param_specs(self.cfg)["embed"], rules),
                rules.spec("batch", None, None),
            ),
            out_specs=rules.spec("batch", None, "vocab"),
            check_vma=not has_tiled_weights(weight),
        )(weight, hidden)
        return jax.reshard(logits, rules.spec("batch", None, None))


def _init_params(key: jax.Array, spec: ParamSpec | ParamTree, dtype: Any) -> jax.Array | ParamTree:
    if isinstance(spec, ParamSpec):
        return _init_array(key, spec, dtype)

    def init(path: ParamPath, leaf: ParamSpec) -> jax.Array:
        path_key = jax.random.fold_in(key, zlib.crc32("/".join(path).encode()) & 0x7FFFFFFF)
        return _init_array(path_key, leaf, dtype)

    return map_with_path(init, spec)


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
    actual, expected = cache.data.shape, (layers, batch, cache.capacity, cfg.cache_width)
    if actual != expected:
        raise ConfigError(f"the cache is {actual} (layers, rows, slots, width); these tokens need {expected}")
    cache.check_scales()


def _partition_spec_tree(weights: ParamTree, specs: ParamTree, rules: Rules) -> ParamTree:
    by_path = dict(leaves_with_path(weights))
    return map_with_path(lambda path, spec: partition_specs(by_path[path], spec, rules), specs)


def _check_params(specs: ParamTree, params: ParamTree) -> None:
    """Checks that the parameters are those of the config; the prediction layer is optional."""
    expected = dict(leaves_with_path({name: spec for name, spec in specs.items() if name != "mtp" or "mtp" in params}))
    actual = dict(leaves_with_path(params))
    wrong = [
        f"{'/'.join(path)} {'is missing' if path not in actual else f'is {actual[path].shape}, must be {spec.shape}'}"
        for path, spec in expected.items()
        if path not in actual or tuple(actual[path].shape) != spec.shape
    ]
    wrong += [f"{'/'.join(path)} is unknown" for path in actual if path not in expected]
    if wrong:
        more = f" … and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ConfigError(f"these parameters are not the config's: {'; '.join(wrong[:5])}{more}")
