"""Random quantized weights, generated on the device in seconds.

Quantizing random weights instead would take minutes and give the same speed.
"""

from __future__ import annotations

import zlib

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from glm_jax.config import Config
from glm_jax.weights import QuantRules, QuantSpec, TiledWeight, Weight, untile_weight
from glm_jax.weights.params import ParamPath, ParamSpec, ParamTree, map_with_path, param_specs
from glm_jax.weights.random_init import init_leaf
from glm_jax.weights.storage import plan_storage
from glm_jax.weights.tiling import TRANSPOSED_MATRICES, is_tiled_path, tile_param
from pallas_kernels import random_arrays
from pallas_kernels.tiles import TILE_WIDTH


def random_quantized_params(
    cfg: Config, quant: QuantRules, dtype: DTypeLike, *, tiles: bool, seed: int = 0
) -> ParamTree:
    """Returns random parameters of the scale that initialization gives them; tiled or not, the values are the same.

    Args:
        cfg: Config of the model.
        quant: Quantization of the matrices, to 4- or 8-bit integers with a scale per group or output.
        dtype: Dtype of the parameters that are not quantized.
        tiles: Whether matrices are laid out in tiles, as the kernels read them.
        seed: Seed of all values.
    """
    storage = plan_storage(cfg, quant)[0]

    def build(path: ParamPath, param: ParamSpec) -> Weight:
        spec = storage.get(path)
        if spec is None:
            plain = init_leaf(cfg, path, param, seed, dtype)
            return tile_param(path, plain) if tiles else plain
        leaf_seed = zlib.crc32(repr((path, seed)).encode())
        keep_tiles = tiles and is_tiled_path(path)
        return jax.jit(lambda: _random_weight(path, param, spec, dtype, leaf_seed, keep_tiles))()

    return map_with_path(build, param_specs(cfg))


def _random_weight(
    path: ParamPath, param: ParamSpec, spec: QuantSpec, dtype: DTypeLike, seed: int, keep_tiles: bool
) -> Weight:
    """Returns a random parameter, generated in tiles and untiled unless ``keep_tiles`` is set."""
    *stack, outputs, inputs = param.shape
    transposed, group_columns = path[-1] in TRANSPOSED_MATRICES, spec.block[1]
    if transposed:
        shape, group_size = (*stack, inputs, outputs), 0
        num_scale_sets = inputs // group_columns if group_columns else 1
    else:
        shape, group_size, num_scale_sets = param.shape, group_columns, 0
    if transposed and group_columns % TILE_WIDTH:
        raise ValueError(f"{'/'.join(path)}: groups of {group_columns} inputs are no whole number of tiles")
    arrays = random_arrays.random_tiles(
        shape,
        spec.kind,
        group_size,
        seed=seed,
        std=param.scale,
        scale_dtype=spec.scale,
        num_input_scale_sets=num_scale_sets,
    )
    weight = TiledWeight(arrays, spec, dtype=jnp.dtype(dtype), transposed=transposed)
    if keep_tiles:
        return weight
    # Layer by layer, because untiling takes four bytes per quantized value.
    return jax.lax.map(untile_weight, weight) if stack else untile_weight(weight)
