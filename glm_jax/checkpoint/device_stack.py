"""Fills stacked arrays with chunks of layers, on one device or over a mesh, without a second copy of anything large.

On a CPU, a stack is a host buffer that JAX adopts without a copy. On an accelerator, it is allocated on the device and
filled by in-place updates, so the host never holds more than one chunk.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

Array = np.ndarray[Any, np.dtype[Any]]
Device = Any  # jax has no public type for the devices that jax.devices() returns
Box = tuple[tuple[int, int], ...]  # (start, stop) along each axis

_ALIGNMENT = 64  # JAX adopts host buffers without a copy if their address is a multiple of this
_BLOCK_BYTES = 32 << 20


class StackBuilder:
    """One parameter that is being filled.

    Args:
        shape: Shape of the whole array.
        dtype: Dtype of the whole array.
        sharding: Sharding over a mesh; ``None`` for JAX's default device.
        as_bits: Return bfloat16 values as their bits in uint16 (host memory only).
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: np.dtype[Any], sharding: Sharding | None, *, as_bits: bool = False
    ) -> None:
        self._shape, self._sharding = shape, sharding
        self._regions: dict[Box, _HostRegion | _DeviceRegion] = {}
        self._placements: list[tuple[Box, Device | None]] = [(tuple((0, n) for n in shape), None)]
        if sharding is not None:
            indices = sharding.addressable_devices_indices_map(shape)
            self._placements = [(_slices_to_box(index or (), shape), device) for device, index in indices.items()]
        for box, device in self._placements:
            # Devices that hold the same shard share one region.
            if box not in self._regions:
                self._regions[box] = _create_region(tuple(b - a for a, b in box), dtype, device, as_bits)

    def add(self, stack_index: int | None, row: int, chunk: Array) -> None:
        """Writes rows of one layer.

        Args:
            stack_index: Index of the layer within the stack; ``None`` if the parameter has no layer axis.
            row: Index of the chunk's first row.
            chunk: Rows, in any dtype.
        """
        if not self._shape:  # the parameter is a scalar
            for region in self._regions.values():
                _write_overlap(region, (), (), chunk)
            return
        if not chunk.ndim:  # one scalar per matrix
            if stack_index is None:
                for region in self._regions.values():
                    region.write((), chunk)
                return
            chunk, stack_index, row = chunk.reshape(1), None, stack_index
        for offset, block in _iter_blocks(chunk):
            start = (row + offset,) + (0,) * (block.ndim - 1)
            if stack_index is not None:
                start, block = (stack_index, *start), block[None]
            for box, region in self._regions.items():
                _write_overlap(region, box, start, block)

    def finish(self) -> jax.Array:
        """Returns the array; the builder must not be used again."""
        arrays = [self._regions[box].to_array(device) for box, device in self._placements]
        self._regions.clear()
        if self._sharding is None:
            return arrays[0]
        return jax.make_array_from_single_device_arrays(self._shape, self._sharding, arrays)


class _HostRegion:
    """A region in host memory, for CPU devices."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any], as_bits: bool) -> None:
        self._as_bits = as_bits
        raw = np.empty(int(np.prod(shape)) * dtype.itemsize + _ALIGNMENT, np.uint8)
        skip = -raw.ctypes.data % _ALIGNMENT
        self._buffer = raw[skip : len(raw) - _ALIGNMENT + skip].view(dtype).reshape(shape)

    def write(self, start: tuple[int, ...], block: Array) -> None:
        """Copies a block, cast to the region's dtype."""
        self._buffer[tuple(slice(a, a + n) for a, n in zip(start, block.shape, strict=True))] = block

    def to_array(self, device: Device | None) -> jax.Array:
        """Returns the region as an array that shares its memory."""
        shared = self._buffer.view(np.uint16) if self._as_bits else self._buffer
        return jax.device_put(shared, device, may_alias=True)


class _DeviceRegion:
    """A region in an accelerator's memory."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any], device: Device) -> None:
        self._device = device
        zeros = jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=SingleDeviceSharding(device))
        with use_single_device_mesh(device):
            self._array = zeros(shape, dtype)

    def write(self, start: tuple[int, ...], block: Array) -> None:
        """Transfers a block to the device and writes it in place."""
        on_device = jax.device_put(block.astype(self._array.dtype, copy=False), self._device)
        with use_single_device_mesh(self._device):
            self._array = _update(self._array, on_device, np.asarray(start, np.int32))

    def to_array(self, device: Device | None) -> jax.Array:
        """Returns the region, copied if another device than its own is given."""
        return self._array if device in (None, self._device) else jax.device_put(self._array, device)


@contextlib.contextmanager
def use_single_device_mesh(device: Device) -> Iterator[None]:
    """Sets a mesh of one device: operations on that device's arrays fail under a larger mesh set by the caller."""
    with jax.set_mesh(Mesh(np.asarray([device]), ("single",))):
        yield


@functools.partial(jax.jit, donate_argnums=0)
def _update(stack: jax.Array, block: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(stack, block, [start[i] for i in range(stack.ndim)])


def _create_region(
    shape: tuple[int, ...], dtype: np.dtype[Any], device: Device | None, as_bits: bool
) -> _HostRegion | _DeviceRegion:
    if (device or jax.devices()[0]).platform == "cpu":
        return _HostRegion(shape, dtype, as_bits)
    return _DeviceRegion(shape, dtype, device or jax.devices()[0])


def _write_overlap(region: _HostRegion | _DeviceRegion, box: Box, start: tuple[int, ...], block: Array) -> None:
    """Writes the intersection of a block and a region."""
    lows = [max(a, s) for (a, _), s in zip(box, start, strict=True)]
    highs = [min(b, s + n) for (_, b), s, n in zip(box, start, block.shape, strict=True)]
    if all(low < high for low, high in zip(lows, highs, strict=True)):
        common = tuple(slice(low - s, high - s) for low, high, s in zip(lows, highs, start, strict=True))
        region.write(tuple(low - a for low, (a, _) in zip(lows, box, strict=True)), block[common])


def _slices_to_box(index: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    slices = [*index, *[slice(None)] * (len(shape) - len(index))]
    return tuple(axis.indices(n)[:2] for axis, n in zip(slices, shape, strict=True))


def _iter_blocks(chunk: Array) -> Iterator[tuple[int, Array]]:
    rows = max(1, _BLOCK_BYTES * len(chunk) // max(1, chunk.nbytes))
    return ((start, chunk[start : start + rows]) for start in range(0, len(chunk), rows))
