"""Layout of a converted folder: one layer checkpoint per layer, which holds its arrays without the layer axis.

The layer checkpoints ``layer-00000`` and so on hold one block each, ``mtp`` holds the prediction layer, and ``rest``
holds embedding, final norm and head. All shapes follow from :func:`glm_jax.weights.params.param_specs`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from glm_jax.config import Config
from glm_jax.weights import QuantSpec
from glm_jax.weights.params import ParamPath, ParamSpec, leaves_with_path, param_specs

NON_LAYER, MTP = "rest", "mtp"
STATE_FOLDER = ".convert"  # holds the state of an unfinished conversion


@dataclasses.dataclass(frozen=True, slots=True)
class Leaf:
    """One layer's array of a parameter, or a whole parameter that has no layer axis.

    Attributes:
        checkpoint_name: Layer checkpoint that holds the array.
        path: Path within the layer checkpoint, such as ``("moe", "gate")``.
        param_path: Path of the parameter in the parameter tree, such as ``("runs", "1", "moe", "gate")``.
        stack_index: Position along the parameter's layer axis; ``None`` if the parameter has no layer axis.
        layer: Number of the layer in the model; 0 if the parameter has no layer axis.
        spec: Spec of the whole parameter.
    """

    checkpoint_name: str
    path: ParamPath
    param_path: ParamPath
    stack_index: int | None
    layer: int
    spec: ParamSpec

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter without its layer axis."""
        return self.spec.shape if self.stack_index is None else self.spec.shape[1:]

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def name(self) -> str:
        """Name within the layer checkpoint, such as ``moe.gate``."""
        return ".".join(self.path)


@dataclasses.dataclass(frozen=True, slots=True)
class DiskArray:
    """One array on disk: a plain leaf, or one component of a quantized leaf.

    Attributes:
        checkpoint_name: Layer checkpoint that holds the array.
        path: Path within the layer checkpoint, such as ``("moe", "gate", "codes")``.
        shape: Shape on disk.
        dtype: Dtype on disk if the quantization fixes it; None for a plain leaf.
        component: Name of the component of a quantized leaf; empty for a plain leaf.
        chunked_by_expert: Whether the first axis enumerates experts, each of which has chunks of its own.
    """

    checkpoint_name: str
    path: ParamPath
    shape: tuple[int, ...]
    dtype: str | None
    component: str
    chunked_by_expert: bool

    @property
    def name(self) -> str:
        """Name within the layer checkpoint, such as ``moe.gate.codes``."""
        return ".".join(self.path)


def disk_arrays(leaf: Leaf, spec: QuantSpec | None) -> tuple[DiskArray, ...]:
    """Arrays that hold a leaf on disk: one if ``spec`` is None, otherwise one per component, codes first."""
    by_expert = "experts" in leaf.spec.axes
    if spec is None:
        return (DiskArray(leaf.checkpoint_name, leaf.path, leaf.shape, None, "", by_expert),)
    return tuple(
        # Arrays are read by rows, so an array without axes is stored as one row.
        DiskArray(leaf.checkpoint_name, (*leaf.path, name), shape or (1,), dtype.name, name, by_expert)
        for name, (shape, dtype) in spec.component_shapes(leaf.shape).items()
    )


def layer_checkpoint_name(cfg: Config, layer: int) -> str:
    """Name of a layer's checkpoint; the layer after the last is the prediction layer, as in the original checkpoint."""
    return MTP if layer == cfg.num_hidden_layers else f"layer-{layer:05d}"


def checkpoint_layout(cfg: Config) -> dict[str, tuple[Leaf, ...]]:
    """Leaves of every layer checkpoint, by its name: the layers in order, then the prediction layer, then the rest."""
    checkpoints: dict[str, list[Leaf]] = {layer_checkpoint_name(cfg, i): [] for i in range(cfg.num_hidden_layers)}
    if cfg.num_nextn_predict_layers:
        checkpoints[MTP] = []
    checkpoints[NON_LAYER] = []
    for param_path, spec in leaves_with_path(param_specs(cfg)):
        for leaf in _leaves(cfg, param_path, spec):
            checkpoints[leaf.checkpoint_name].append(leaf)
    return {name: tuple(leaves) for name, leaves in checkpoints.items()}


def _leaves(cfg: Config, param_path: ParamPath, spec: ParamSpec) -> Iterator[Leaf]:
    if param_path[0] == "runs":
        group = cfg.layer_groups[int(param_path[1])]
        for stack_index in range(group.count):
            layer = group.start + stack_index
            yield Leaf(layer_checkpoint_name(cfg, layer), param_path[2:], param_path, stack_index, layer, spec)
    elif param_path[0] == MTP:
        # Among the prediction layer's parameters, only those of its block have a layer axis, of length one.
        yield Leaf(MTP, param_path[1:], param_path, 0 if len(param_path) > 2 else None, 0, spec)
    else:
        yield Leaf(NON_LAYER, param_path, param_path, None, 0, spec)
