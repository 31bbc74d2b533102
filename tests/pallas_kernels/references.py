"""The kernels' references, and what lays weights out in tiles, compiled as one program for each kind of call."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from pallas_kernels import tiles
from pallas_kernels.grouped_matmul import reference as grouped_matmul
from pallas_kernels.mla_decode import reference as mla_decode
from pallas_kernels.moe import reference as moe
from pallas_kernels.quant_matmul import reference as quant_matmul


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as one program for each kind of call: arguments that hold arrays are traced, the others static.

    A reference is a hundred small operations, and JAX takes longer to compile each than the kernel takes to run.
    """
    programs: dict[str, Any] = {}

    def holds_arrays(argument: Any) -> bool:
        return any(isinstance(leaf, jax.Array | np.ndarray) for leaf in jax.tree.leaves(argument))

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        named = {**{str(i): value for i, value in enumerate(args)}, **kwargs}
        arrays = {name: value for name, value in named.items() if holds_arrays(value)}
        static = {name: value for name, value in named.items() if name not in arrays}

        def run(arrays: dict[str, Any]) -> Any:
            merged = {**static, **arrays}
            return function(*(merged[str(i)] for i in range(len(args))), **{name: merged[name] for name in kwargs})

        kind = repr((list(named), static))
        return programs.setdefault(kind, jax.jit(run))(arrays)

    return call


make_tiles, dequantize_tiles = compiled(tiles.make_tiles), compiled(tiles.dequantize_tiles)
fused_linear_ref = compiled(quant_matmul.fused_linear_ref)
grouped_matmul_ref = compiled(grouped_matmul.grouped_matmul_ref)
gated_linear_unit_ref = compiled(grouped_matmul.gated_linear_unit_ref)
route_ref, build_dispatch_ref = compiled(moe.route_ref), compiled(moe.build_dispatch_ref)
gate_up_ref, down_ref = compiled(moe.gate_up_ref), compiled(moe.down_ref)
absorbed_q_proj_ref = compiled(mla_decode.absorbed_q_proj_ref)
flash_decode_ref = compiled(mla_decode.flash_decode_ref)
combine_v_proj_ref = compiled(mla_decode.combine_v_proj_ref)
