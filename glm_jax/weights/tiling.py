"""Which parameters of a model lie in tiles where kernels run, and laying them out, on one device or on several."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from glm_jax.config import Config
from glm_jax.sharding import Rules
from glm_jax.weights.params import ParamPath, ParamSpec, leaves_with_path, param_specs
from glm_jax.weights.storage import partition_specs
from glm_jax.weights.tiled_weight import TiledWeight, tile_weight, untile_weight
from pallas_kernels.tiles import TILE_WIDTH, chunk_inputs

# Matrices that kernels multiply with. The embedding is looked up in; the prediction layer runs without kernels.
TILED_MATRICES = frozenset("q_a q_b kv_a k_b v_b o gate up down shared_gate shared_up shared_down router".split())
# Attention multiplies queries with the transposed matrices.
TRANSPOSED_MATRICES = frozenset(["k_b"])


@dataclasses.dataclass(frozen=True, slots=True)
class ModelSharding:
    """The devices that parameters lie on.

    Attributes:
        cfg: of the model.
        rules: mesh axis of each logical axis.
        mesh: the devices.
    """

    cfg: Config
    rules: Rules
    mesh: Mesh

    def param_spec(self, path: ParamPath) -> ParamSpec:
        """Shape and axes of a parameter."""
        return dict(leaves_with_path(param_specs(self.cfg)))[path]


def is_tiled_path(path: ParamPath) -> bool:
    """Whether a parameter is laid out in tiles."""
    return path == ("head",) or (path[0] == "runs" and path[-1] in TILED_MATRICES)


def tile_param(path: ParamPath, weight: Any, placement: ModelSharding | None = None) -> Any:
    """A parameter as kernels read it; as it is where they do not, or cannot.

    Args:
        path: of the parameter.
        weight: as it is held.
        placement: of parameters on several devices; each then lays its own part out.
    """
    if not is_tiled_path(path):
        return weight
    lay_out = functools.partial(tile_weight, transposed=path[-1] in TRANSPOSED_MATRICES)
    if placement is None:
        made = lay_out(weight)
        return weight if made is None else made
    param = placement.param_spec(path)
    part = jax.eval_shape(lay_out, _shard_shapes(weight, param, placement))
    if part is None or not _is_evenly_tiled(part, param, placement):
        return weight
    made = _map_shards(lay_out, weight, part, param, placement)
    outputs, inputs = param.shape[-2:]
    if made.turned:
        outputs, inputs = inputs, outputs
    return dataclasses.replace(made, tiles=dataclasses.replace(made.tiles, outputs=outputs, inputs=inputs))


def tile_param_layerwise(path: ParamPath, weight: Any) -> Any:
    """:func:`tile_param` for a stack on one device that has no room for a second copy of it: by way of the host.

    The weight's arrays are deleted. It takes as long as copying them to the host and back.
    """
    lay_out = functools.partial(tile_weight, transposed=path[-1] in TRANSPOSED_MATRICES)
    if not is_tiled_path(path) or len(weight.shape) < 3 or (made := jax.eval_shape(lay_out, weight)) is None:
        return tile_param(path, weight)
    device = next(iter(jax.tree.leaves(weight)[0].devices()))
    held = jax.device_get(weight)
    for array in jax.tree.leaves(weight):
        array.delete()
    with jax.default_device(device):
        stack = jax.jit(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), made))()
        for layer in range(made.shape[0]):
            stack = _set_layer(
                stack, lay_out(jax.device_put(jax.tree.map(lambda x, i=layer: x[i : i + 1], held))), layer
            )
    return stack


@functools.partial(jax.jit, donate_argnums=0)
def _set_layer(stack: Any, part: Any, layer: int) -> Any:
    """A stack with another layer in it."""
    return jax.tree.map(lambda all_of, one: jax.lax.dynamic_update_slice_in_dim(all_of, one, layer, 0), stack, part)


def untile_param(path: ParamPath, weight: Any, placement: ModelSharding | None = None) -> Any:
    """The inverse of :func:`tile_param`."""
    if not isinstance(weight, TiledWeight):
        return weight
    if placement is None:
        return untile_weight(weight)
    param = placement.param_spec(path)
    part = jax.eval_shape(_untile_shard, _shard_shapes(weight, param, placement))
    return _map_shards(_untile_shard, weight, part, param, placement)


def tile_params(params: Mapping[str, Any], placement: ModelSharding | None = None) -> dict[str, Any]:
    """A tree of parameters with those in tiles that kernels read."""
    return _map_with_path(functools.partial(tile_param, placement=placement), params)


def untile_params(params: Mapping[str, Any], placement: ModelSharding | None = None) -> dict[str, Any]:
    """The inverse of :func:`tile_params`."""
    return _map_with_path(functools.partial(untile_param, placement=placement), params)


def to_local_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of one device of several as such: in tiles a weight knows the sizes of its own part only."""
    return _map_with_path(lambda _, weight: to_local_param(weight), params)


def to_local_param(weight: Any) -> Any:
    """One parameter of :func:`to_local_params`."""
    if not isinstance(weight, TiledWeight):
        return weight
    tiles = weight.tiles
    outputs, inputs = (
        min(tiles.outputs, TILE_WIDTH * tiles.num_tiles),
        min(tiles.inputs, chunk_inputs(tiles.kind) * tiles.num_chunks),
    )
    return dataclasses.replace(weight, tiles=dataclasses.replace(tiles, outputs=outputs, inputs=inputs))


def has_tiled_weights(params: Any) -> bool:
    """Whether any parameter of a tree lies in tiles."""
    found = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, TiledWeight))
    return any(isinstance(leaf, TiledWeight) for leaf in found)


def _map_with_path(
    function: Callable[[ParamPath, Any], Any], params: Mapping[str, Any], path: ParamPath = ()
) -> dict[str, Any]:
    return {
        name: _map_with_path(function, value, (*path, name))
        if isinstance(value, Mapping)
        else function((*path, name), value)
        for name, value in params.items()
    }


def _untile_shard(weight: TiledWeight) -> Any:
    return untile_weight(to_local_param(weight))


def _shard_shapes(weight: Any, param: ParamSpec, placement: ModelSharding) -> Any:
    """Shapes and dtypes of what one device holds."""

    def shrunk(array: Any, spec: jax.P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(NamedSharding(placement.mesh, spec).shard_shape(array.shape), array.dtype)

    return jax.tree.map(shrunk, weight, partition_specs(weight, param, placement.rules))


def _map_shards(
    function: Callable[[Any], Any], weight: Any, part: Any, param: ParamSpec, placement: ModelSharding
) -> Any:
    """Applies a function on every device to its own part, of which it makes something of the shape of ``part``."""
    specs, out = (partition_specs(x, param, placement.rules) for x in (weight, part))
    run = jax.shard_map(function, mesh=placement.mesh, in_specs=(specs,), out_specs=out, check_vma=False)
    return jax.jit(run)(weight)


def _is_evenly_tiled(part: TiledWeight, param: ParamSpec, placement: ModelSharding) -> bool:
    """Whether the parts put together are the tiles of the whole: no tile, chunk or group is padded in between."""
    split = [size > mine for size, mine in zip(param.shape[-2:], part.shape[-2:], strict=True)]
    if part.transposed:
        return not any(split)
    tiles = part.tiles
    grouped = part.spec is not None and part.spec.block[1] > 0
    whole = (
        tiles.outputs % TILE_WIDTH == 0,
        tiles.inputs % chunk_inputs(tiles.kind) == 0 and (tiles.group_size > 0 or not grouped),
    )
    return all(fits or not cut for fits, cut in zip(whole, split, strict=True))
