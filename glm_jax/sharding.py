"""Eight logical axes, the mesh axes they live on, and the checks that a layout is possible.

Parameters, cache and activations name their axes (``("heads", "latent")``); a :class:`Rules` says which mesh axis each
one is split over. The model asks the rules and never names a mesh axis itself.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
from jax.sharding import AxisType, Mesh

from glm_jax.config import Config
from glm_jax.errors import ShardingError

LogicalAxis = Literal["batch", "seq", "embed", "heads", "latent", "ffn", "experts", "vocab"]
ShardingPreset = Literal["replicated", "latency"]

MESH_AXES = ("data", "model")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """The mesh axis of each logical axis; ``None`` means replicated. Frozen and hashable: static under ``jax.jit``."""

    batch: str | None = None
    seq: str | None = None
    embed: str | None = None
    heads: str | None = None
    latent: str | None = None
    ffn: str | None = None
    experts: str | None = None
    vocab: str | None = None

    @property
    def mesh_axes(self) -> tuple[str, ...]:
        """The mesh axes in use, each once; empty when everything is replicated."""
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return tuple(dict.fromkeys(axis for axis in values if axis))

    def partition_spec(self, *axes: LogicalAxis | None) -> jax.P:
        """The partition spec of an array whose dimensions have these logical axes.

        Raises:
            ShardingError: if two dimensions of one array would be split over the same mesh axis.
        """
        mesh_axes = [None if axis is None else getattr(self, axis) for axis in axes]
        used = [axis for axis in mesh_axes if axis]
        if len(used) != len(set(used)):
            raise ShardingError(f"axes {axes} would split one array twice over the same mesh axis: {mesh_axes}")
        return jax.P(*mesh_axes)

    def psum(self, x: jax.Array, *axes: LogicalAxis) -> jax.Array:
        """Sums the partial results of a contraction over these logical axes; the identity where they are not split."""
        names = tuple(dict.fromkeys(name for axis in axes if (name := getattr(self, axis))))
        return jax.lax.psum(x, names) if names else x

    def axis_index(self, axis: LogicalAxis) -> jax.Array | int:
        """Position of this device along a logical axis; 0 where it is not split."""
        name = getattr(self, axis)
        return jax.lax.axis_index(name) if name else 0

    def validate(self, cfg: Config, mesh: Mesh) -> None:
        """Checks that every split axis divides.

        Raises:
            ShardingError: naming each axis that does not divide and the numbers of devices that would.
        """
        sizes = {
            "heads": ("attention heads", cfg.num_attention_heads),
            "ffn": ("expert width", cfg.moe_intermediate_size),
            "experts": ("experts", cfg.n_routed_experts),
            "vocab": ("vocabulary rows", cfg.vocab_size),
        }
        problems = []
        for axis in self.mesh_axes:
            if axis not in mesh.shape:
                raise ShardingError(f"the mesh has axes {tuple(mesh.shape)}, the rules need {axis!r}")
        for axis, (words, size) in sizes.items():
            name = getattr(self, axis)
            if name and size % mesh.shape[name]:
                fit = [n for n in range(1, min(size, 64) + 1) if size % n == 0]
                problems.append(f"{size} {words} do not divide over {mesh.shape[name]} devices (possible: {fit})")
        if self.ffn and cfg.intermediate_size % mesh.shape[self.ffn]:
            problems.append(f"dense width {cfg.intermediate_size} does not divide over {mesh.shape[self.ffn]} devices")
        if problems:
            raise ShardingError("; ".join(problems))


_PRESETS: dict[str, Rules] = {
    "replicated": Rules(),
    # Lowest latency for one sequence: attention by heads, experts by width, cache replicated.
    "latency": Rules(heads="model", ffn="model", vocab="model"),
}


def get_sharding_preset(name: str) -> Rules:
    """The rules of a named layout.

    Raises:
        ShardingError: listing the names there are.
    """
    if name not in _PRESETS:
        raise ShardingError(f"no sharding preset {name!r}; there are {', '.join(_PRESETS)}")
    return _PRESETS[name]


def make_mesh(devices: int | Mesh, axis_sizes: tuple[int, int] | None = None) -> Mesh:
    """A mesh with axes ("data", "model"), all devices on "model" unless ``axis_sizes`` says otherwise.

    Raises:
        ShardingError: if fewer devices are there than asked for.
    """
    if isinstance(devices, Mesh):
        return devices
    present = jax.devices()
    if not 1 <= devices <= len(present):
        raise ShardingError(f"mesh={devices} asked for, but {len(present)} {present[0].platform} device(s) are there")
    sizes = axis_sizes or (1, devices)
    return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Explicit,) * 2, devices=present[:devices])


def vary_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """Marks a constant as differing between devices wherever ``like`` does, so that both can be a loop's carry."""
    axes = tuple(_varying_axes(like) - _varying_axes(x))
    return jax.lax.pcast(x, axes, to="varying") if axes else x


def _varying_axes(x: jax.Array) -> frozenset[str]:
    kind = jax.typeof(x)  # the attribute was renamed between JAX releases
    return kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying
