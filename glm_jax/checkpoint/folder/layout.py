"""How the parameter tree lies on disk: parts, each holding the arrays of one layer without the layer axis.

``layer-00000`` … hold one block each, ``mtp`` the prediction layer, ``rest`` embedding, final norm and head. Everything
follows from :func:`glm_jax.weights.params.param_specs`, so the file format has no shapes of its own.
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
    """One array on disk and its place in the parameter tree.

    Attributes:
        checkpoint_name: the part that holds it.
        path: names inside the part, such as ``("moe", "gate")``.
        param_path: path of the parameter it belongs to, such as ``("runs", "1", "moe", "gate")``.
        stack_index: position along the parameter's layer axis; ``None`` where it has none.
        layer: number of the layer in the model (0 where the parameter has no layer axis).
        spec: of the whole parameter.
    """

    checkpoint_name: str
    path: ParamPath
    param_path: ParamPath
    stack_index: int | None
    layer: int
    spec: ParamSpec

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape on disk: the parameter's without its layer axis."""
        return self.spec.shape if self.stack_index is None else self.spec.shape[1:]

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def name(self) -> str:
        """Name inside its part, such as ``moe.gate``."""
        return ".".join(self.path)


@dataclasses.dataclass(frozen=True, slots=True)
class DiskArray:
    """One array of a part: a leaf, or one component of a quantized leaf.

    Attributes:
        checkpoint_name: that holds it.
        path: names inside the part, such as ``("moe", "gate", "codes")``.
        shape: on disk.
        dtype: on disk where the storage fixes it; None for a plain leaf.
        component: of a quantized leaf, else empty.
        chunked_by_expert: whether the first axis counts experts, each of which gets chunks of its own.
    """

    checkpoint_name: str
    path: ParamPath
    shape: tuple[int, ...]
    dtype: str | None
    component: str
    chunked_by_expert: bool

    @property
    def name(self) -> str:
        """Name inside its part, such as ``moe.gate.codes``."""
        return ".".join(self.path)


def disk_arrays(leaf: Leaf, spec: QuantSpec | None) -> tuple[DiskArray, ...]:
    """The arrays that a leaf is on disk, codes first."""
    by_expert = "experts" in leaf.spec.axes
    if spec is None:
        return (DiskArray(leaf.checkpoint_name, leaf.path, leaf.shape, None, "", by_expert),)
    return tuple(
        # An array without axes has no rows to read; it is one row here.
        DiskArray(leaf.checkpoint_name, (*leaf.path, name), shape or (1,), dtype.name, name, by_expert)
        for name, (shape, dtype) in spec.component_shapes(leaf.shape).items()
    )


def layer_checkpoint_name(cfg: Config, layer: int) -> str:
    """The part of a layer, counted as checkpoints count: the one after the last is the prediction layer."""
    return MTP if layer == cfg.num_hidden_layers else f"layer-{layer:05d}"


def checkpoint_layout(cfg: Config) -> dict[str, tuple[Leaf, ...]]:
    """The arrays of every part: the layers in order, then the prediction layer, then the rest."""
    parts: dict[str, list[Leaf]] = {layer_checkpoint_name(cfg, i): [] for i in range(cfg.num_hidden_layers)}
    if cfg.num_nextn_predict_layers:
        parts[MTP] = []
    parts[NON_LAYER] = []
    for target, spec in leaves_with_path(param_specs(cfg)):
        for leaf in _leaves(cfg, target, spec):
            parts[leaf.checkpoint_name].append(leaf)
    return {part: tuple(members) for part, members in parts.items()}


def _leaves(cfg: Config, target: ParamPath, spec: ParamSpec) -> Iterator[Leaf]:
    if target[0] == "runs":
        run = cfg.layer_groups[int(target[1])]
        for slot in range(run.count):
            layer = run.start + slot
            yield Leaf(layer_checkpoint_name(cfg, layer), target[2:], target, slot, layer, spec)
    elif target[0] == MTP:
        # Of the prediction layer's parameters only its block has a layer axis, of length one.
        yield Leaf(MTP, target[1:], target, 0 if len(target) > 2 else None, 0, spec)
    else:
        yield Leaf(NON_LAYER, target, target, None, 0, spec)
