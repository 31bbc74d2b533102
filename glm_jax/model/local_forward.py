"""The forward pass on one device's part of the weights, and its mapping over the mesh."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from glm_jax.cache.latent import CACHE_AXES, LatentCache
from glm_jax.config import Config, LayerGroup
from glm_jax.errors import ShardingError
from glm_jax.model import fused_decode, mtp
from glm_jax.model.block import ForwardContext, transformer_block
from glm_jax.model.hooks import ActivationHooks, EditFn
from glm_jax.model.kernel_selection import unsupported_reason
from glm_jax.ops.linear import embed_tokens
from glm_jax.ops.mla import AttentionForm
from glm_jax.ops.norm import rms_norm
from glm_jax.sharding import Rules
from glm_jax.weights import Weight
from glm_jax.weights.params import ParamTree
from glm_jax.weights.tiling import has_tiled_weights, to_local_params


@dataclasses.dataclass(frozen=True, slots=True)
class LocalForward:
    """One call of the model as each device computes it.

    Attributes:
        cfg: Config of the model.
        rules: Mesh axis of each logical axis.
        form: Form of the attention.
        trace: Names of activations to record.
        edit: Functions that replace activations, by name.
    """

    cfg: Config
    rules: Rules
    form: AttentionForm = "auto"
    trace: tuple[str, ...] = ()
    edit: Mapping[str, EditFn] = dataclasses.field(default_factory=dict)

    def hidden(
        self, w: ParamTree, inputs: tuple[jax.Array, jax.Array], cache: LatentCache | None
    ) -> tuple[tuple[jax.Array, dict[str, jax.Array]], LatentCache | None]:
        """States after the final norm ``[B, T, D]`` with the recorded activations, and the cache.

        Args:
            w: ``embed``, ``runs`` and ``norm``, this device's part.
            inputs: Tokens and positions, ``int32 [B, T]`` each.
            cache: Latents of earlier tokens, or None to attend to the new tokens alone.
        """
        tokens, positions = inputs
        w = to_local_params(w)
        if cache is not None and self.use_fused_decode(w, tokens):
            h, cache = fused_decode.hidden_states(self.cfg, w, tokens, positions, cache, self.rules)
            return (h, {}), cache
        hooks = ActivationHooks(frozenset(self.trace), self.edit)
        ctx = ForwardContext(self.cfg, self.rules, positions, self.form, hooks)
        first_row = self.rules.index("vocab") * w["embed"].shape[0]
        h = ctx.hooks("embed", self.rules.psum(embed_tokens(w["embed"], tokens, first_row), "vocab"))
        for i, group in enumerate(self.cfg.layer_groups):
            with jax.named_scope(f"layer_group_{i}"):
                h, cache = _apply_layer_group(ctx, group, h, cache, w["runs"][str(i)])
        h = ctx.hooks("norm", rms_norm(h, w["norm"], self.cfg.rms_norm_eps))
        return (h, ctx.hooks.recorded), cache

    def use_fused_decode(self, w: ParamTree, tokens: jax.Array) -> bool:
        """Whether :mod:`glm_jax.model.fused_decode` computes this call: it has one form, and no named activations."""
        has_options = bool(self.trace or self.edit) or self.form != "auto"
        few = tokens.size <= fused_decode.MAX_TOKENS and tokens.shape[1] <= fused_decode.MAX_TOKENS_PER_ROW
        return not has_options and few and unsupported_reason(self.cfg, w, self.rules) is None

    def draft(
        self, w: tuple[ParamTree, Weight], inputs: tuple[jax.Array, jax.Array, jax.Array], cache: LatentCache | None
    ) -> tuple[jax.Array, LatentCache | None]:
        """The prediction layer; see :func:`glm_jax.model.mtp.draft_hidden_states`.

        Args:
            w: The ``mtp`` parameters and the embedding, this device's part.
            inputs: Hidden states ``[B, T, D]``, next tokens and positions ``int32 [B, T]``.
            cache: The layer's own cache.
        """
        hidden, next_tokens, positions = inputs
        ctx = ForwardContext(self.cfg, self.rules, positions, self.form)
        return mtp.draft_hidden_states(ctx, hidden, next_tokens, cache, *w)

    def shard_over_mesh(
        self, function: Callable[..., Any], weight_partition: Any, with_cache: bool
    ) -> Callable[..., Any]:
        """Maps ``function(weights, inputs, cache) -> (states, cache)`` over the mesh, as one manual region.

        Args:
            function: A method of this class.
            weight_partition: Partition specs of its weights.
            with_cache: Whether it is called with a cache.
        """
        if not self.rules.mesh_axes:
            return function
        require_mesh(self.rules)
        rows = self.rules.spec("batch")
        cache_partition = self.rules.spec(*CACHE_AXES) if with_cache else None
        # JAX takes a kernel's results, the cache included, to differ between devices wherever its inputs do.
        return jax.shard_map(
            function,
            in_specs=(weight_partition, rows, cache_partition),
            out_specs=(rows, cache_partition),
            check_vma=not has_tiled_weights(weight_partition),
        )


def _apply_layer_group(
    ctx: ForwardContext, group: LayerGroup, h: jax.Array, cache: LatentCache | None, w: ParamTree
) -> tuple[jax.Array, LatentCache | None]:
    if group.count == 1 or ctx.hooks:
        # Named activations exist only where the layers are unrolled.
        for i in range(group.count):
            h, cache = transformer_block(ctx, h, cache, w, i, group.start + i, f"block.{group.start + i}")
        return h, cache

    def step(
        carry: tuple[jax.Array, LatentCache | None], i: jax.Array
    ) -> tuple[tuple[jax.Array, LatentCache | None], None]:
        h, cache = carry
        return transformer_block(ctx, h, cache, w, i, group.start + i), None

    (h, cache), _ = jax.lax.scan(step, (h, cache), jnp.arange(group.count, dtype=jnp.int32))
    return h, cache


def require_mesh(rules: Rules) -> None:
    """Checks that the mesh of the rules is set.

    Raises:
        ShardingError: If a mesh axis is missing.
    """
    mesh = jax.sharding.get_abstract_mesh()
    missing = [axis for axis in rules.mesh_axes if axis not in mesh.axis_names]
    if missing:
        raise ShardingError(f"mesh axis {missing[0]!r} is not there: call under `with jax.set_mesh(mesh):`")
