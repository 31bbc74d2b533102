"""Quantized weights without a model: random codes and fitting scales, made where they are used in a moment.

Quantizing random weights would take minutes and say nothing more about speed.
"""

from __future__ import annotations

import zlib
from typing import Any

import jax

from glm_jax.config import Config
from glm_jax.weights import QuantRules, QuantSpec, TiledWeight, untile_weight
from glm_jax.weights.params import ParamPath, ParamSpec, ParamTree, init_leaf, map_specs, param_specs
from glm_jax.weights.storage import plan_storage
from glm_jax.weights.tiling import TRANSPOSED_MATRICES, is_tiled_path, tile_param
from pallas_kernels import random_arrays
from pallas_kernels.tiles import TILE_WIDTH


def random_quantized_params(cfg: Config, quant: QuantRules, dtype: Any, *, tiles: bool, seed: int = 0) -> ParamTree:
    """Parameters of the size that training would give them; the same values in tiles and not.

    Args:
        cfg: the model.
        quant: 4- and 8-bit integers with a scale for each group or output.
        dtype: of what is not quantized.
        tiles: lay the matrices out as kernels read them.
        seed: of everything.
    """
    storage = plan_storage(cfg, quant)[0]

    def build(path: ParamPath, param: ParamSpec) -> Any:
        spec = storage.get(path)
        if spec is None:
            plain = init_leaf(cfg, path, param, seed, dtype)
            return tile_param(path, plain) if tiles else plain
        own = zlib.crc32(repr((path, seed)).encode())
        kept = tiles and is_tiled_path(path)
        return jax.jit(lambda: _random_weight(path, param, spec, dtype, own, kept))()

    return map_specs(build, param_specs(cfg))


def _random_weight(path: ParamPath, param: ParamSpec, spec: QuantSpec, dtype: Any, seed: int, tiles: bool) -> Any:
    """A parameter; out of its tiles layer by layer, since on the way each code takes four bytes."""
    *stack, outputs, inputs = param.shape
    turned, columns = path[-1] in TRANSPOSED_MATRICES, spec.block[1]
    shape = (*stack, inputs, outputs) if turned else param.shape
    group, sets = (0, inputs // columns if columns else 1) if turned else (columns, 0)
    if turned and columns % TILE_WIDTH:
        raise ValueError(f"{'/'.join(path)}: groups of {columns} inputs are no whole number of tiles")
    made = random_arrays.random_tiles(
        shape, spec.kind, group, seed=seed, std=param.scale, scale_dtype=spec.scale, num_input_scale_sets=sets
    )
    weight = TiledWeight(made, spec, dtype=jax.numpy.dtype(dtype), transposed=turned)
    if tiles:
        return weight
    return jax.lax.map(untile_weight, weight) if stack else untile_weight(weight)
