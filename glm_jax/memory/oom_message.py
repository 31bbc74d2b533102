"""Why something does not fit, and what would."""

from __future__ import annotations

import jax.numpy as jnp

from glm_jax.cache.latent import QUANTIZED_CACHE_MAX, bytes_per_token
from glm_jax.memory.memory_model import MemoryModel

_DEFAULT_MEMORY_FRACTION, _LARGE_MEMORY_FRACTION = 0.75, 0.95
_MAX_DEVICES = 64
_PRESETS = ("int8", "int4", "int4-small")  # the one that changes least first


def oom_message(memory_model: MemoryModel, rows: int, context: int) -> str:
    """A few lines: the sum that is too large, what would fit instead, and how to get more of a GPU."""
    need = memory_model.requirement(rows, context)
    per_token = bytes_per_token(memory_model.cfg, memory_model.placement.cache_dtype)
    where = "the device has" if memory_model.num_devices == 1 else f"each of the {memory_model.num_devices} devices has"
    asked = f"{pluralize(rows, 'sequence')} of {pluralize(context, 'token')} at {per_token:,} bytes"
    lines = [
        f"{format_bytes(need.weights)} weights + {format_bytes(need.cache)} cache ({asked}) + {format_bytes(need.workspace)} workspace "
        f"= {format_bytes(need.total)}, but {where} {format_bytes(memory_model.device_bytes)}",
        *(f"what would fit: {line}" for line in _alternatives(memory_model, rows, context)),
    ]
    if memory_model.default_memory_fraction and need.total <= int(
        memory_model.device_bytes / _DEFAULT_MEMORY_FRACTION * _LARGE_MEMORY_FRACTION
    ):
        lines += [
            f"JAX takes {_DEFAULT_MEMORY_FRACTION:.0%} of a GPU unless told otherwise, and {_LARGE_MEMORY_FRACTION:.0%} would be enough: "
            "restart, and put this at the top of the notebook, before anything imports jax:",
            f'import os; os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "{_LARGE_MEMORY_FRACTION}"',
        ]
    return "\n".join(lines)


def _alternatives(memory_model: MemoryModel, rows: int, context: int) -> list[str]:
    """What would fit instead, each alone."""
    found = []
    if fewer := memory_model.max_sequences(context):
        found.append(f"{pluralize(fewer, 'sequence')} of that length")
    if shorter := memory_model.max_context(rows):
        found.append(f"a context of {pluralize(shorter, 'token')}" + (" for each sequence" if rows > 1 else ""))
    if (jnp.dtype(memory_model.placement.dtype).itemsize > 2) and memory_model.with_dtype("bfloat16").fits(
        rows, context
    ):
        found.append('half the bytes per value, with dtype="bfloat16"')
    quantized = (
        name
        for name in _PRESETS
        if not memory_model.placement.storage and memory_model.with_quantization(name).fits(rows, context)
    )
    if preset := next(quantized, None):
        found.append(f'weights in fewer bits, with quantize="{preset}"')
    if memory_model.placement.cache_dtype not in QUANTIZED_CACHE_MAX and memory_model.with_cache_dtype("int8").fits(
        rows, context
    ):
        found.append('8 bits per cached value, with cache_dtype="int8" or "fp8"')
    if not memory_model.placement.on_cpu and (count := _min_devices(memory_model, rows, context)):
        found.append(f"{count} such devices, with mesh={count}")
    return found


def _min_devices(memory_model: MemoryModel, rows: int, context: int) -> int | None:
    wider = (
        (count, memory_model.with_devices(count)) for count in range(memory_model.num_devices + 1, _MAX_DEVICES + 1)
    )
    return next((count for count, more in wider if more and more.fits(rows, context)), None)


def pluralize(count: int, noun: str) -> str:
    """``1 token``, ``2 tokens``."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def format_bytes(num_bytes: int) -> str:
    """Bytes as GB of 10^9 bytes, small amounts as MB."""
    return f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:,.2f} MB"
