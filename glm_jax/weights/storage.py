"""Which parameters of a model are quantized and how, and the shapes, dtypes and places of their arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from glm_jax.config import Config
from glm_jax.errors import ShardingError
from glm_jax.sharding import LogicalAxis, Rules
from glm_jax.weights.params import (
    ParamPath,
    ParamSpec,
    ParamTree,
    abstract_leaf,
    is_matrix,
    leaves_with_path,
    map_specs,
    param_specs,
)
from glm_jax.weights.presets import QuantRules, fit_group_size
from glm_jax.weights.quant_spec import QuantSpec
from glm_jax.weights.quantized_tensor import QuantizedTensor
from glm_jax.weights.tiled_weight import TiledWeight


@dataclasses.dataclass(frozen=True, slots=True)
class Storage:
    """The quantized parameters of a model by path; every other one is a plain array. Frozen and hashable.

    Attributes:
        specs: pairs of path and spec, in the order of the tree.
    """

    specs: tuple[tuple[ParamPath, QuantSpec], ...] = ()

    def get(self, path: ParamPath) -> QuantSpec | None:
        """The spec of a parameter, or None."""
        return dict(self.specs).get(path)

    def __bool__(self) -> bool:
        return bool(self.specs)

    def to_json(self) -> list[list[Any]]:
        """Plain values; :meth:`from_json` is the inverse."""
        return [[list(path), spec.to_json()] for path, spec in self.specs]

    @classmethod
    def from_json(cls, value: list[list[Any]]) -> Storage:
        """From plain values."""
        return cls(tuple((tuple(path), QuantSpec.from_json(spec)) for path, spec in value))


def plan_storage(
    cfg: Config, quant: QuantRules, rules: Rules = Rules(), axis_sizes: Mapping[str, int] | None = None
) -> tuple[Storage, tuple[str, ...]]:
    """What rules of quantization mean for a model: a spec for each matrix, with groups that divide it.

    Args:
        cfg: the model.
        quant: the rules.
        rules: mesh axis of each logical axis: a group is never wider than the part of a matrix on one device.
        axis_sizes: devices along each mesh axis; one each unless given.

    Returns:
        The storage, and sentences about matrices that no group divides and that stay as they are.
    """
    specs: list[tuple[ParamPath, QuantSpec]] = []
    left: list[str] = []
    for path, param in leaves_with_path(param_specs(cfg)):
        asked = quant.spec_for(path) if is_matrix(param) else None
        if asked is None:
            continue
        split = _num_shards(param.axes[-1], rules, axis_sizes or {})
        fitted = fit_group_size(asked, param.shape, param.shape[-1] // split)
        if fitted is None:
            left.append(f"{'/'.join(path)} {list(param.shape)}")
        else:
            specs.append((path, fitted))
    note = "no group of 8 or more inputs divides these, which stay as they are: " + ", ".join(left)
    return Storage(tuple(specs)), (note,) if left else ()


def quantized_bytes(cfg: Config, quant: QuantRules, dtype: Any = jnp.bfloat16) -> int:
    """Bytes of all parameters of a model under rules of quantization."""
    storage, _ = plan_storage(cfg, quant)
    total = 0
    for path, param in leaves_with_path(param_specs(cfg)):
        spec = storage.get(path)
        total += spec.nbytes(param.shape) if spec else param.size * jnp.dtype(param.dtype or dtype).itemsize
    return total


def abstract_params(
    cfg: Config,
    dtype: Any = jnp.bfloat16,
    rules: Rules = Rules(),
    mesh: Mesh | None = None,
    storage: Storage = Storage(),
) -> ParamTree:
    """Shape, dtype and (with a mesh) sharding of every parameter on its device.

    Leaves are ``jax.ShapeDtypeStruct``, or a :class:`~glm_jax.weights.QuantizedTensor` or
    :class:`~glm_jax.weights.Bfloat16Bits` of these.

    Raises:
        ShardingError: if the mesh would cut through a block that shares a scale.
    """
    if storage and mesh is not None:
        check_block_sharding(cfg, storage, rules, dict(mesh.shape))

    def abstract(path: ParamPath, param: ParamSpec) -> Any:
        spec = storage.get(path)
        if spec is None:
            return abstract_leaf(param, dtype, rules, mesh)
        parts = {
            name: jax.ShapeDtypeStruct(
                shape,
                kind,
                sharding=None
                if mesh is None
                else NamedSharding(mesh, rules.partition_spec(*component_axes(name, shape, param))),
            )
            for name, (shape, kind) in spec.component_shapes(param.shape).items()
        }
        return QuantizedTensor(**parts, spec=spec, dtype=jnp.dtype(dtype))

    return map_specs(abstract, param_specs(cfg))


def component_axes(name: str, shape: tuple[int, ...], param: ParamSpec) -> tuple[LogicalAxis | None, ...]:
    """Logical axes of one array of a quantized parameter: the parameter's, where the array has that axis."""
    axes = param.axes
    if name == "outer":
        return axes[:-2]
    if name == "permutation":
        return (*axes[:-2], axes[-1])
    # One block along an axis serves all devices.
    return tuple(axis if size > 1 else None for axis, size in zip(axes, shape, strict=True))


def partition_specs(weight: Any, param: ParamSpec, rules: Rules) -> Any:
    """Partition specs of a parameter as it is held, in the shape of its pytree."""
    if isinstance(weight, QuantizedTensor):
        return weight.map_components(
            lambda name, array: rules.partition_spec(*component_axes(name, array.shape, param))
        )
    if isinstance(weight, TiledWeight):
        return dataclasses.replace(weight, tiles=_tile_partition_specs(weight, param, rules))
    return rules.partition_spec(*param.axes)


def _tile_partition_specs(weight: TiledWeight, param: ParamSpec, rules: Rules) -> Any:
    """Columns of tiles are split as the outputs are, chunks and groups as the inputs."""
    *stack, outputs, inputs = param.axes
    if weight.transposed:
        outputs, inputs = inputs, outputs
    tiles = weight.tiles
    of_scales = rules.partition_spec(*stack, outputs, inputs if tiles.group_size else None, None)
    return dataclasses.replace(
        tiles,
        packed=rules.partition_spec(*stack, outputs, inputs, None, None),
        scales=None if tiles.scales is None else of_scales,
        offsets=None if tiles.offsets is None else of_scales,
        input_scales=None if tiles.input_scales is None else rules.partition_spec(*stack, None, None),
    )


def check_block_sharding(cfg: Config, storage: Storage, rules: Rules, axis_sizes: Mapping[str, int]) -> None:
    """Checks that no device boundary cuts through a block that shares a scale.

    Raises:
        ShardingError: naming the parameters.
    """
    problems = list(_misaligned_blocks(cfg, storage, rules, axis_sizes))
    if problems:
        more = f" … and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ShardingError(
            f"the checkpoint's quantization does not divide over these devices: {'; '.join(problems[:5])}{more}; "
            'load with quantize="int4" or "int8" to make new groups, or on fewer devices'
        )


def _misaligned_blocks(cfg: Config, storage: Storage, rules: Rules, axis_sizes: Mapping[str, int]) -> Iterator[str]:
    params = dict(leaves_with_path(param_specs(cfg)))
    for path, spec in storage.specs:
        param, name = params[path], "/".join(path)
        for axis, block, words in ((-2, spec.block[0], "outputs"), (-1, spec.block[1], "inputs")):
            split = _num_shards(param.axes[axis], rules, axis_sizes)
            local = param.shape[axis] // split
            if split > 1 and block and local % block:
                yield f"{name} has blocks of {block} {words}, {local} on each device"
            elif split > 1 and axis == -1 and spec.permuted:
                yield f"{name} has its inputs permuted"
            elif split > 1 and axis == -1 and local % spec.values_per_byte:
                yield f"{name} has {local} inputs on each device, and packs {spec.values_per_byte} to a byte"


def _num_shards(axis: LogicalAxis | None, rules: Rules, axis_sizes: Mapping[str, int]) -> int:
    name = getattr(rules, axis) if axis else None
    return axis_sizes.get(name, 1) if name else 1
