"""Arguments that many kernels share: the arrays of a tiled weight, optional arrays, the dtype of products."""

from __future__ import annotations

import pkgutil

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels._kernel import Constant
from pallas_kernels._launch import is_interpreted
from pallas_kernels.tiles import Tiles


def tile_operands(weight: Tiles, name: str = "") -> dict[str, jax.Array]:
    """Returns the arrays of a weight by the names of their parameters: ``{name}_packed``, ``_scales``, ``_offsets``.

    A missing array is replaced by a placeholder, which the kernel does not read.
    """
    prefix = f"{name}_" if name else ""
    return {
        f"{prefix}packed": weight.packed,
        f"{prefix}scales": array_or(weight.scales, weight.packed),
        f"{prefix}offsets": array_or(weight.offsets, weight.packed),
    }


def array_or(array: jax.Array | None, placeholder: jax.Array) -> jax.Array:
    """Returns an optional array, or in its absence any array for the parameter, which the kernel then does not read."""
    return placeholder if array is None else array


def compute_itemsize(dtype: DTypeLike) -> int:
    """Returns the bytes of a factor of a kernel's products, for activations of a dtype."""
    return 4 if is_interpreted() or jnp.dtype(dtype) == jnp.float32 else 2


def compute_dtype(dtype: DTypeLike) -> Constant:
    """Returns Triton's dtype of a kernel's products: bfloat16, or float32 for float32 arrays and in the interpreter."""
    name = "float32" if compute_itemsize(dtype) == 4 else "bfloat16"
    return pkgutil.resolve_name(f"triton.language:{name}")  # optional and slow to import
