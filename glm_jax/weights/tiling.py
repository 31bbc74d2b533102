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
from glm_jax.weights.params import ParamSpec, Path, leaves, param_specs
from glm_jax.weights.storage import leaf_specs
from glm_jax.weights.tiled_weight import TiledWeight, tile, untile
from pallas_kernels.tiles import WIDTH, chunk

# Matrices that kernels multiply with. The embedding is looked up in; the prediction layer runs without kernels.
MATRICES = frozenset("q_a q_b kv_a k_b v_b o gate up down shared_gate shared_up shared_down router".split())
# Attention multiplies queries with the transposed matrices.
TURNED = frozenset(["k_b"])


@dataclasses.dataclass(frozen=True, slots=True)
class Placement:
    """The devices that parameters lie on.

    Attributes:
        cfg: of the model.
        rules: mesh axis of each logical axis.
        mesh: the devices.
    """

    cfg: Config
    rules: Rules
    mesh: Mesh

    def param(self, path: Path) -> ParamSpec:
        """Shape and axes of a parameter."""
        return dict(leaves(param_specs(self.cfg)))[path]


def lies_in_tiles(path: Path) -> bool:
    """Whether a parameter is laid out in tiles."""
    return path == ("head",) or (path[0] == "runs" and path[-1] in MATRICES)


def tiled(path: Path, weight: Any, placement: Placement | None = None) -> Any:
    """A parameter as kernels read it; as it is where they do not, or cannot.

    Args:
        path: of the parameter.
        weight: as it is held.
        placement: of parameters on several devices; each then lays its own part out.
    """
    if not lies_in_tiles(path):
        return weight
    lay_out = functools.partial(tile, turned=path[-1] in TURNED)
    if placement is None:
        made = lay_out(weight)
        return weight if made is None else made
    param = placement.param(path)
    part = jax.eval_shape(lay_out, _part(weight, param, placement))
    if part is None or not _divides(part, param, placement):
        return weight
    made = _each_part(lay_out, weight, part, param, placement)
    outputs, inputs = param.shape[-2:]
    if made.turned:
        outputs, inputs = inputs, outputs
    return dataclasses.replace(made, tiles=dataclasses.replace(made.tiles, outputs=outputs, inputs=inputs))


def tiled_by_layers(path: Path, weight: Any) -> Any:
    """:func:`tiled` for a stack on one device that has no room for a second copy of it: by way of the host.

    The weight's arrays are deleted. It takes as long as copying them to the host and back.
    """
    lay_out = functools.partial(tile, turned=path[-1] in TURNED)
    if not lies_in_tiles(path) or len(weight.shape) < 3 or (made := jax.eval_shape(lay_out, weight)) is None:
        return tiled(path, weight)
    device = next(iter(jax.tree.leaves(weight)[0].devices()))
    held = jax.device_get(weight)
    for array in jax.tree.leaves(weight):
        array.delete()
    with jax.default_device(device):
        stack = jax.jit(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), made))()
        for layer in range(made.shape[0]):
            stack = _put(stack, lay_out(jax.device_put(jax.tree.map(lambda x, i=layer: x[i : i + 1], held))), layer)
    return stack


@functools.partial(jax.jit, donate_argnums=0)
def _put(stack: Any, part: Any, layer: int) -> Any:
    """A stack with another layer in it."""
    return jax.tree.map(lambda all_of, one: jax.lax.dynamic_update_slice_in_dim(all_of, one, layer, 0), stack, part)


def untiled(path: Path, weight: Any, placement: Placement | None = None) -> Any:
    """The inverse of :func:`tiled`."""
    if not isinstance(weight, TiledWeight):
        return weight
    if placement is None:
        return untile(weight)
    param = placement.param(path)
    part = jax.eval_shape(_untile_part, _part(weight, param, placement))
    return _each_part(_untile_part, weight, part, param, placement)


def tiled_tree(params: Mapping[str, Any], placement: Placement | None = None) -> dict[str, Any]:
    """A tree of parameters with those in tiles that kernels read."""
    return _mapped(functools.partial(tiled, placement=placement), params)


def untiled_tree(params: Mapping[str, Any], placement: Placement | None = None) -> dict[str, Any]:
    """The inverse of :func:`tiled_tree`."""
    return _mapped(functools.partial(untiled, placement=placement), params)


def local_tree(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of one device of several as such: in tiles a weight knows the sizes of its own part only."""
    return _mapped(lambda _, weight: local_part(weight), params)


def local_part(weight: Any) -> Any:
    """One parameter of :func:`local_tree`."""
    if not isinstance(weight, TiledWeight):
        return weight
    tiles = weight.tiles
    outputs, inputs = min(tiles.outputs, WIDTH * tiles.tiles), min(tiles.inputs, chunk(tiles.kind) * tiles.chunks)
    return dataclasses.replace(weight, tiles=dataclasses.replace(tiles, outputs=outputs, inputs=inputs))


def has_tiles(params: Any) -> bool:
    """Whether any parameter of a tree lies in tiles."""
    found = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, TiledWeight))
    return any(isinstance(leaf, TiledWeight) for leaf in found)


def _mapped(function: Callable[[Path, Any], Any], params: Mapping[str, Any], path: Path = ()) -> dict[str, Any]:
    return {
        name: _mapped(function, value, (*path, name)) if isinstance(value, Mapping) else function((*path, name), value)
        for name, value in params.items()
    }


def _untile_part(weight: TiledWeight) -> Any:
    return untile(local_part(weight))


def _part(weight: Any, param: ParamSpec, placement: Placement) -> Any:
    """Shapes and dtypes of what one device holds."""

    def shrunk(array: Any, spec: jax.P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(NamedSharding(placement.mesh, spec).shard_shape(array.shape), array.dtype)

    return jax.tree.map(shrunk, weight, leaf_specs(weight, param, placement.rules))


def _each_part(function: Callable[[Any], Any], weight: Any, part: Any, param: ParamSpec, placement: Placement) -> Any:
    """Applies a function on every device to its own part, of which it makes something of the shape of ``part``."""
    specs, out = (leaf_specs(x, param, placement.rules) for x in (weight, part))
    run = jax.shard_map(function, mesh=placement.mesh, in_specs=(specs,), out_specs=out, check_vma=False)
    return jax.jit(run)(weight)


def _divides(part: TiledWeight, param: ParamSpec, placement: Placement) -> bool:
    """Whether the parts put together are the tiles of the whole: no tile, chunk or group is padded in between."""
    split = [size > mine for size, mine in zip(param.shape[-2:], part.shape[-2:], strict=True)]
    if part.turned:
        return not any(split)
    tiles = part.tiles
    grouped = part.spec is not None and part.spec.block[1] > 0
    whole = tiles.outputs % WIDTH == 0, tiles.inputs % chunk(tiles.kind) == 0 and (tiles.group > 0 or not grouped)
    return all(fits or not cut for fits, cut in zip(whole, split, strict=True))
