"""Why something does not fit, and what would."""

from __future__ import annotations

import jax.numpy as jnp

from glm_jax.cache.latent import EIGHT_BITS, bytes_per_token
from glm_jax.memory.memory_model import Setup

_DEFAULT_SHARE, _LARGE_SHARE = 0.75, 0.95
_MOST_DEVICES = 64
_PRESETS = ("int8", "int4", "int4-small")  # the one that changes least first


def refusal(setup: Setup, rows: int, context: int) -> str:
    """A few lines: the sum that is too large, what would fit instead, and how to get more of a GPU."""
    need = setup.need(rows, context)
    per_token = bytes_per_token(setup.cfg, setup.placement.cache_dtype)
    where = "the device has" if setup.devices == 1 else f"each of the {setup.devices} devices has"
    asked = f"{counted(rows, 'sequence')} of {counted(context, 'token')} at {per_token:,} bytes"
    lines = [
        f"{in_gb(need.weights)} weights + {in_gb(need.cache)} cache ({asked}) + {in_gb(need.workspace)} workspace "
        f"= {in_gb(need.total)}, but {where} {in_gb(setup.device_bytes)}",
        *(f"what would fit: {line}" for line in _alternatives(setup, rows, context)),
    ]
    if setup.default_share and need.total <= int(setup.device_bytes / _DEFAULT_SHARE * _LARGE_SHARE):
        lines += [
            f"JAX takes {_DEFAULT_SHARE:.0%} of a GPU unless told otherwise, and {_LARGE_SHARE:.0%} would be enough: "
            "restart, and put this at the top of the notebook, before anything imports jax:",
            f'import os; os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "{_LARGE_SHARE}"',
        ]
    return "\n".join(lines)


def _alternatives(setup: Setup, rows: int, context: int) -> list[str]:
    """What would fit instead, each alone."""
    found = []
    if fewer := setup.most_rows(context):
        found.append(f"{counted(fewer, 'sequence')} of that length")
    if shorter := setup.longest(rows):
        found.append(f"a context of {counted(shorter, 'token')}" + (" for each sequence" if rows > 1 else ""))
    if (jnp.dtype(setup.placement.dtype).itemsize > 2) and setup.in_dtype("bfloat16").fits(rows, context):
        found.append('half the bytes per value, with dtype="bfloat16"')
    quantised = (name for name in _PRESETS if not setup.placement.storage and setup.quantised(name).fits(rows, context))
    if preset := next(quantised, None):
        found.append(f'weights in fewer bits, with quantize="{preset}"')
    if setup.placement.cache_dtype not in EIGHT_BITS and setup.with_cache("int8").fits(rows, context):
        found.append('8 bits per cached value, with cache_dtype="int8" or "fp8"')
    if not setup.placement.on_cpu and (count := _enough_devices(setup, rows, context)):
        found.append(f"{count} such devices, with mesh={count}")
    return found


def _enough_devices(setup: Setup, rows: int, context: int) -> int | None:
    wider = ((count, setup.on_devices(count)) for count in range(setup.devices + 1, _MOST_DEVICES + 1))
    return next((count for count, more in wider if more and more.fits(rows, context)), None)


def counted(count: int, noun: str) -> str:
    """``1 token``, ``2 tokens``."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def in_gb(count: int) -> str:
    """Bytes as GB of 10^9 bytes, small amounts as MB."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.2f} MB"
