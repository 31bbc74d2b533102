"""Explains why a plan does not fit, and which changes would make it fit."""

from __future__ import annotations

from collections.abc import Iterator

import jax.numpy as jnp

from glm_jax.cache.latent import QUANTIZED_CACHE_MAX, bytes_per_token
from glm_jax.memory.formatting import format_bytes, pluralize
from glm_jax.memory.memory_model import MemoryModel

_DEFAULT_MEMORY_FRACTION, _LARGE_MEMORY_FRACTION = 0.75, 0.95
_MAX_DEVICES = 64
_PRESETS = ("int8", "int4", "int4-small")  # the smallest change of the weights first


def oom_message(memory_model: MemoryModel, sequences: int, context: int) -> str:
    """Returns a few lines: the sum that is too large, alternatives that fit, and how to get more of a GPU.

    Args:
        memory_model: Model on its devices.
        sequences: Number of concurrent sequences.
        context: Tokens per sequence.
    """
    required = memory_model.requirement(sequences, context)
    per_token = bytes_per_token(memory_model.cfg, memory_model.placement.cache_dtype)
    devices = memory_model.num_devices
    owner = "the device has" if devices == 1 else f"each of the {devices} devices has"
    cached = f"{pluralize(sequences, 'sequence')} of {pluralize(context, 'token')} at {per_token:,} bytes"
    lines = [
        f"{format_bytes(required.weights)} weights + {format_bytes(required.cache)} cache ({cached}) + "
        f"{format_bytes(required.workspace)} workspace = {format_bytes(required.total)}, "
        f"but {owner} {format_bytes(memory_model.device_bytes)}",
        *(f"what would fit: {line}" for line in _alternatives(memory_model, sequences, context)),
    ]
    if memory_model.default_memory_fraction and required.total <= int(
        memory_model.device_bytes / _DEFAULT_MEMORY_FRACTION * _LARGE_MEMORY_FRACTION
    ):
        lines += [
            f"JAX takes {_DEFAULT_MEMORY_FRACTION:.0%} of a GPU unless told otherwise, and "
            f"{_LARGE_MEMORY_FRACTION:.0%} would be enough: "
            "restart, and put this at the top of the notebook, before anything imports jax:",
            f'import os; os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "{_LARGE_MEMORY_FRACTION}"',
        ]
    return "\n".join(lines)


def _alternatives(model: MemoryModel, sequences: int, context: int) -> Iterator[str]:
    """Yields changes that would each fit on their own."""
    if fewer := model.max_sequences(context):
        yield f"{pluralize(fewer, 'sequence')} of that length"
    if shorter := model.max_context(sequences):
        yield f"a context of {pluralize(shorter, 'token')}" + (" for each sequence" if sequences > 1 else "")
    if jnp.dtype(model.placement.dtype).itemsize > 2 and model.with_dtype("bfloat16").fits(sequences, context):
        yield 'half the bytes per value, with dtype="bfloat16"'
    if preset := _sufficient_preset(model, sequences, context):
        yield f'weights in fewer bits, with quantize="{preset}"'
    cache_is_8bit = model.placement.cache_dtype in QUANTIZED_CACHE_MAX
    if not cache_is_8bit and model.with_cache_dtype("int8").fits(sequences, context):
        yield '8 bits per cached value, with cache_dtype="int8" or "fp8"'
    # CPU devices share one memory, so more of them would not help.
    if not model.placement.on_cpu and (count := _sufficient_devices(model, sequences, context)):
        yield f"{count} such devices, with mesh={count}"


def _sufficient_preset(model: MemoryModel, sequences: int, context: int) -> str | None:
    """Returns the quantization preset that changes the weights least among those that fit."""
    if model.placement.storage:
        return None
    return next((preset for preset in _PRESETS if model.with_quantization(preset).fits(sequences, context)), None)


def _sufficient_devices(model: MemoryModel, sequences: int, context: int) -> int | None:
    """Returns the smallest larger number of devices on which the model fits."""
    counts = range(model.num_devices + 1, _MAX_DEVICES + 1)
    wider = ((count, model.with_devices(count)) for count in counts)
    return next((count for count, split in wider if split and split.fits(sequences, context)), None)
