"""Which parameters of a model are quantized and how, and the shapes, dtypes and shardings of their arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from glm_jax.config import Config
from glm_jax.errors import ShardingError
from glm_jax.sharding import LogicalAxis, Rules
from glm_jax.weights.bf16_bits import Bfloat16Bits
from glm_jax.weights.dense_weight import as_weight_matrix
from glm_jax.weights.params import (
    ParamPath,
    ParamSpec,
    ParamTree,
    abstract_leaf,
    is_matrix,
    leaves_with_path,
    map_with_path,
    param_specs,
)
from glm_jax.weights.presets import QuantRules, fit_group_size
from glm_jax.weights.quant_spec import QuantSpec, component_axes
from glm_jax.weights.quantized_tensor import QuantizedTensor
from glm_jax.weights.weight_matrix import StoredArray, WeightMatrix


@dataclasses.dataclass(frozen=True, slots=True)
class Storage:
    """The quantized parameters of a model by path; all others are plain arrays. Frozen and hashable.

    Attributes:
        specs: Pairs of path and spec, in the order of the tree.
    """

    specs: tuple[tuple[ParamPath, QuantSpec], ...] = ()

    def get(self, path: ParamPath) -> QuantSpec | None:
        """Quantization of a parameter; None for a plain array."""
        return dict(self.specs).get(path)

    def __bool__(self) -> bool:
        return bool(self.specs)

    def to_json(self) -> list[list[Any]]:
        """The specs as JSON values; :meth:`from_json` is the inverse."""
        return [[list(path), spec.to_json()] for path, spec in self.specs]

    @classmethod
    def from_json(cls, value: list[list[Any]]) -> Self:
        """Reads the JSON values that :meth:`to_json` writes."""
        return cls(tuple((tuple(path), QuantSpec.from_json(spec)) for path, spec in value))


def plan_storage(
    cfg: Config, quant: QuantRules, rules: Rules = Rules(), axis_sizes: Mapping[str, int] | None = None
) -> tuple[Storage, tuple[str, ...]]:
    """Resolves rules of quantization to a spec for each matrix, with groups that divide the matrix.

    Args:
        cfg: Config of the model.
        quant: Quantization of each kind of matrix.
        rules: Mesh axis of each logical axis; a group is never wider than one device's part of a matrix.
        axis_sizes: Devices along each mesh axis; one each by default.

    Returns:
        The storage, and notes about matrices that no group divides and that stay in the model's dtype.
    """
    specs: list[tuple[ParamPath, QuantSpec]] = []
    unquantized: list[str] = []
    for path, param in leaves_with_path(param_specs(cfg)):
        requested = quant.spec_for(path) if is_matrix(param) else None
        if requested is None:
            continue
        shards = _num_shards(param.axes[-1], rules, axis_sizes or {})
        fitted = fit_group_size(requested, param.shape, param.shape[-1] // shards)
        if fitted is None:
            unquantized.append(f"{'/'.join(path)} {list(param.shape)}")
        else:
            specs.append((path, fitted))
    note = "no group of 8 or more inputs divides these, which stay as they are: " + ", ".join(unquantized)
    return Storage(tuple(specs)), (note,) if unquantized else ()


def quantized_bytes(cfg: Config, quant: QuantRules, dtype: DTypeLike = jnp.bfloat16) -> int:
    """Bytes of all parameters of a model that is quantized by these rules."""
    storage, _ = plan_storage(cfg, quant)
    total = 0
    for path, param in leaves_with_path(param_specs(cfg)):
        spec = storage.get(path)
        total += spec.nbytes(param.shape) if spec else param.size * jnp.dtype(param.dtype or dtype).itemsize
    return total


def abstract_params(
    cfg: Config,
    dtype: DTypeLike = jnp.bfloat16,
    rules: Rules = Rules(),
    mesh: Mesh | None = None,
    storage: Storage = Storage(),
) -> ParamTree:
    """Shape, dtype and (with a mesh) sharding of every parameter.

    Leaves are ``jax.ShapeDtypeStruct``, or a :class:`~glm_jax.weights.QuantizedTensor` or
    :class:`~glm_jax.weights.Bfloat16Bits` of these.

    Raises:
        ShardingError: If a device boundary would cut through a block that shares a scale.
    """
    if storage and mesh is not None:
        check_block_sharding(cfg, storage, rules, dict(mesh.shape))

    def abstract(path: ParamPath, param: ParamSpec) -> jax.ShapeDtypeStruct | Bfloat16Bits | QuantizedTensor:
        spec = storage.get(path)
        if spec is None:
            return abstract_leaf(param, dtype, rules, mesh)

        def component(name: str, shape: tuple[int, ...], kind: DTypeLike) -> jax.ShapeDtypeStruct:
            partition = rules.spec(*component_axes(name, shape, param.axes))
            return jax.ShapeDtypeStruct(shape, kind, sharding=None if mesh is None else NamedSharding(mesh, partition))

        shapes = spec.component_shapes(param.shape)
        arrays = {name: component(name, shape, kind) for name, (shape, kind) in shapes.items()}
        return QuantizedTensor(**arrays, spec=spec, dtype=jnp.dtype(dtype))

    return map_with_path(abstract, param_specs(cfg))


def partition_specs(weight: WeightMatrix | StoredArray, param: ParamSpec, rules: Rules) -> Any:
    """Partition specs of a parameter, as a pytree of the structure in which the parameter is stored."""
    return as_weight_matrix(weight).map_axes(param.axes, rules.spec)


def check_block_sharding(cfg: Config, storage: Storage, rules: Rules, axis_sizes: Mapping[str, int]) -> None:
    """Checks that no device boundary cuts through a block that shares a scale.

    Args:
        cfg: Config of the model.
        storage: Its quantized parameters.
        rules: Mesh axis of each logical axis.
        axis_sizes: Devices along each mesh axis.

    Raises:
        ShardingError: Naming the first five parameters with such a block.
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
        for axis, block, axis_name in ((-2, spec.block[0], "outputs"), (-1, spec.block[1], "inputs")):
            shards = _num_shards(param.axes[axis], rules, axis_sizes)
            local = param.shape[axis] // shards
            if shards > 1 and block and local % block:
                yield f"{name} has blocks of {block} {axis_name}, {local} on each device"
            elif shards > 1 and axis == -1 and spec.permuted:
                yield f"{name} has its inputs permuted"
            elif shards > 1 and axis == -1 and local % spec.values_per_byte:
                yield f"{name} has {local} inputs on each device, and packs {spec.values_per_byte} to a byte"


def _num_shards(axis: LogicalAxis | None, rules: Rules, axis_sizes: Mapping[str, int]) -> int:
    name = getattr(rules, axis) if axis else None
    return axis_sizes.get(name, 1) if name else 1
