"""Which parameters of a model are tiled for kernels, and laying them out in tiles, on one device or on several."""

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
from glm_jax.weights.dense_weight import as_weight_matrix
from glm_jax.weights.params import ParamPath, ParamSpec, ParamTree, leaves_with_path, map_with_path, param_specs
from glm_jax.weights.storage import partition_specs
from glm_jax.weights.tiled_weight import TiledWeight, tile_weight
from glm_jax.weights.types import Weight
from glm_jax.weights.weight_matrix import WeightMatrix
from pallas_kernels.tiles import TILE_WIDTH, chunk_inputs

# Matrices that kernels multiply with. The embedding is only looked up, and the prediction layer runs without kernels.
TILED_MATRICES = frozenset("q_a q_b kv_a k_b v_b o gate up down shared_gate shared_up shared_down router".split())
# Attention multiplies queries with the transposed matrices.
TRANSPOSED_MATRICES = frozenset(["k_b"])


@dataclasses.dataclass(frozen=True, slots=True)
class ModelSharding:
    """How the parameters of a model are sharded.

    Attributes:
        cfg: Config of the model.
        rules: Mesh axis of each logical axis.
        mesh: The devices.
    """

    cfg: Config
    rules: Rules
    mesh: Mesh

    def param_spec(self, path: ParamPath) -> ParamSpec:
        """Shape and axes of a parameter."""
        return dict(leaves_with_path(param_specs(self.cfg)))[path]


def is_tiled_path(path: ParamPath) -> bool:
    """Whether the parameter at this path is laid out in tiles where kernels run."""
    return path == ("head",) or (path[0] == "runs" and path[-1] in TILED_MATRICES)


def tile_param(path: ParamPath, weight: Weight, placement: ModelSharding | None = None) -> Weight:
    """The parameter in tiles; unchanged where no kernel multiplies with it or tiles have no layout for its storage.

    Args:
        path: Path of the parameter in the tree.
        weight: The parameter outside tiles.
        placement: Sharding of parameters on several devices; each device then lays out its own part.
    """
    if not is_tiled_path(path):
        return weight
    lay_out = _layout_of(path)
    if placement is None:
        tiled = lay_out(weight)
        return weight if tiled is None else tiled
    param = placement.param_spec(path)
    part = jax.eval_shape(lay_out, _shard_shapes(weight, param, placement))
    if part is None or not _is_evenly_tiled(part, param):
        return weight
    tiled = _map_shards(lay_out, weight, part, param, placement)
    outputs, inputs = param.shape[-2:]
    if tiled.transposed:
        outputs, inputs = inputs, outputs
    return dataclasses.replace(tiled, tiles=dataclasses.replace(tiled.tiles, outputs=outputs, inputs=inputs))


def _layout_of(path: ParamPath) -> Callable[[Weight], TiledWeight | None]:
    return functools.partial(tile_weight, transposed=path[-1] in TRANSPOSED_MATRICES)


def tile_param_layerwise(path: ParamPath, weight: Weight) -> Weight:
    """:func:`tile_param` by way of the host, for a stack on one device without room for a second copy.

    The weight's arrays are deleted. It takes as long as copying them to the host and back.
    """
    lay_out = _layout_of(path)
    if not is_tiled_path(path) or len(weight.shape) < 3 or (shapes := jax.eval_shape(lay_out, weight)) is None:
        return tile_param(path, weight)
    device = next(iter(jax.tree.leaves(weight)[0].devices()))
    on_host = jax.device_get(weight)
    for array in jax.tree.leaves(weight):
        array.delete()
    with jax.default_device(device):
        stack = jax.jit(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))()
        for layer in range(shapes.shape[0]):
            one_layer = jax.device_put(jax.tree.map(lambda x, i=layer: x[i : i + 1], on_host))
            stack = _set_layer(stack, lay_out(one_layer), layer)
    return stack


@functools.partial(jax.jit, donate_argnums=0)
def _set_layer(stack: TiledWeight, part: TiledWeight, layer: int) -> TiledWeight:
    """Overwrites one layer of a stack."""
    return jax.tree.map(lambda whole, one: jax.lax.dynamic_update_slice_in_dim(whole, one, layer, 0), stack, part)


def untile_param(path: ParamPath, weight: Weight, placement: ModelSharding | None = None) -> Weight:
    """The parameter out of its tiles; the inverse of :func:`tile_param`."""
    matrix = as_weight_matrix(weight)
    if placement is None or not matrix.is_tiled:
        return matrix.untile()
    param = placement.param_spec(path)
    part = jax.eval_shape(_untile_shard, _shard_shapes(weight, param, placement))
    return _map_shards(_untile_shard, weight, part, param, placement)


def tile_params(params: Mapping[str, Any], placement: ModelSharding | None = None) -> ParamTree:
    """The parameters, in tiles where kernels multiply with them; see :func:`tile_param`."""
    return map_with_path(functools.partial(tile_param, placement=placement), params)


def untile_params(params: Mapping[str, Any], placement: ModelSharding | None = None) -> ParamTree:
    """The parameters out of their tiles; the inverse of :func:`tile_params`."""
    return map_with_path(functools.partial(untile_param, placement=placement), params)


def to_local_params(params: Mapping[str, Any]) -> ParamTree:
    """The parameters as one device of several sees them inside ``shard_map``."""
    return map_with_path(lambda _, weight: as_weight_matrix(weight).to_local(), params)


def has_tiled_weights(params: Any) -> bool:
    """Whether any parameter of a tree is stored in tiles."""
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, WeightMatrix))
    return any(as_weight_matrix(leaf).is_tiled for leaf in leaves)


def _untile_shard(weight: WeightMatrix) -> Weight:
    return as_weight_matrix(weight.to_local()).untile()


def _shard_shapes(weight: Weight, param: ParamSpec, placement: ModelSharding) -> Any:
    """Shapes and dtypes of one device's part of a weight."""

    def shard_shape(array: jax.Array, spec: jax.P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(NamedSharding(placement.mesh, spec).shard_shape(array.shape), array.dtype)

    return jax.tree.map(shard_shape, weight, partition_specs(weight, param, placement.rules))


def _map_shards(
    function: Callable[[Any], Any], weight: Weight, part: Any, param: ParamSpec, placement: ModelSharding
) -> Any:
    """Applies a function on every device to its own part; ``part`` has the shapes of one device's result."""
    in_specs, out_specs = (partition_specs(x, param, placement.rules) for x in (weight, part))
    run = jax.shard_map(function, mesh=placement.mesh, in_specs=(in_specs,), out_specs=out_specs, check_vma=False)
    return jax.jit(run)(weight)


def _is_evenly_tiled(part: TiledWeight, param: ParamSpec) -> bool:
    """Whether the devices' tiles together are the tiles of the whole, without padding between them."""
    outputs_split, inputs_split = (
        whole > local for whole, local in zip(param.shape[-2:], part.shape[-2:], strict=True)
    )
    if part.transposed:
        return not (outputs_split or inputs_split)
    tiles = part.tiles
    has_groups = part.spec is not None and part.spec.block[1] > 0
    whole_tiles = tiles.outputs % TILE_WIDTH == 0
    whole_chunks = tiles.inputs % chunk_inputs(tiles.kind) == 0 and (tiles.group_size > 0 or not has_groups)
    return (whole_tiles or not outputs_split) and (whole_chunks or not inputs_split)
