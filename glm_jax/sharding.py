"""Sharding rules: the mesh axis over which each logical axis of the model is split.

Parameters, cache and activations name their dimensions by eight logical axes, for example ``("heads", "latent")``.
:class:`Rules` maps logical axes to mesh axes; the model itself never names a mesh axis.
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
    """The mesh axis of each logical axis; None means replicated.

    Frozen and hashable, so it can be a static argument of ``jax.jit``.

    Attributes:
        batch: Rows of a batch.
        seq: Positions of a sequence.
        embed: Hidden features (D).
        heads: Attention heads (N).
        latent: Features of a latent vector (R or Q) and of the rotary part of a key (P).
        ffn: Intermediate width of a dense feed-forward (I) and of each expert (F).
        experts: Routed experts (E).
        vocab: Vocabulary (V).
    """

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
        """The mesh axes in use, without repetition; empty if everything is replicated."""
        mesh_axes = (getattr(self, field.name) for field in dataclasses.fields(self))
        return tuple(dict.fromkeys(axis for axis in mesh_axes if axis))

    def spec(self, *axes: LogicalAxis | None) -> jax.P:
        """The partition spec of an array whose dimensions have these logical axes (None: replicated).

        Raises:
            ShardingError: if two dimensions of one array would be split over the same mesh axis.
        """
        mesh_axes = [None if axis is None else getattr(self, axis) for axis in axes]
        used = [axis for axis in mesh_axes if axis]
        if len(used) != len(set(used)):
            raise ShardingError(f"axes {axes} would split one array twice over the same mesh axis: {mesh_axes}")
        return jax.P(*mesh_axes)

    def psum(self, x: jax.Array, *axes: LogicalAxis) -> jax.Array:
        """Sums partial results of a contraction over the devices that split these logical axes.

        Returns ``x`` unchanged if none of the axes is split. For use inside ``shard_map``.
        """
        names = tuple(dict.fromkeys(name for axis in axes if (name := getattr(self, axis))))
        return jax.lax.psum(x, names) if names else x

    def index(self, axis: LogicalAxis) -> jax.Array | int:
        """Index of this device along a logical axis; 0 if the axis is not split. For use inside ``shard_map``."""
        name = getattr(self, axis)
        return jax.lax.axis_index(name) if name else 0

    def validate(self, cfg: Config, mesh: Mesh) -> None:
        """Checks that the mesh has the axes of the rules, and that each divides the dimensions it splits.

        Raises:
            ShardingError: if it does not; the message names each dimension and the numbers of devices that divide it.
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
        for axis, (label, size) in sizes.items():
            name = getattr(self, axis)
            if name and size % mesh.shape[name]:
                divisors = [n for n in range(1, min(size, 64) + 1) if size % n == 0]
                problems.append(f"{size} {label} do not divide over {mesh.shape[name]} devices (possible: {divisors})")
        if self.ffn and cfg.intermediate_size % mesh.shape[self.ffn]:
            problems.append(f"dense width {cfg.intermediate_size} does not divide over {mesh.shape[self.ffn]} devices")
        if problems:
            raise ShardingError("; ".join(problems))


_PRESETS: dict[str, Rules] = {
    "replicated": Rules(),
    # Tensor parallelism for the lowest latency of one sequence: splits attention by heads and experts by width.
    "latency": Rules(heads="model", ffn="model", vocab="model"),
}


def get_sharding_preset(name: str) -> Rules:
    """The rules of a named preset.

    Raises:
        ShardingError: if there is no such preset; the message lists all names.
    """
    if name not in _PRESETS:
        raise ShardingError(f"no sharding preset {name!r}; there are {', '.join(_PRESETS)}")
    return _PRESETS[name]


def make_mesh(devices: int | Mesh, axis_sizes: tuple[int, int] | None = None) -> Mesh:
    """Returns a mesh with the axes ("data", "model").

    Args:
        devices: Number of devices, or a mesh, which is returned unchanged.
        axis_sizes: Devices along ("data", "model"); all along "model" by default.

    Raises:
        ShardingError: if there are fewer devices.
    """
    if isinstance(devices, Mesh):
        return devices
    available = jax.devices()
    if not 1 <= devices <= len(available):
        raise ShardingError(
            f"mesh={devices} asked for, but {len(available)} {available[0].platform} device(s) are there"
        )
    sizes = axis_sizes or (1, devices)
    return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Explicit,) * 2, devices=available[:devices])


def vary_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """Marks ``x`` as device-varying over the mesh axes over which ``like`` varies.

    Inside ``shard_map``, the carry of a loop must keep its type, so a constant initial value has to be marked like the
    values that replace it.
    """
    axes = tuple(_varying_axes(like) - _varying_axes(x))
    return jax.lax.pcast(x, axes, to="varying") if axes else x


def _varying_axes(x: jax.Array) -> frozenset[str]:
    aval = jax.typeof(x)
    # ``vma`` was renamed between JAX releases.
    return aval.vma if hasattr(aval, "vma") else aval.manual_axis_type.varying
