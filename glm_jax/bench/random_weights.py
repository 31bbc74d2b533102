"""Quantised weights without a model: random codes and fitting scales, made where they are used in a moment.

Quantising random weights would take minutes and say nothing more about speed.
"""

from __future__ import annotations

import zlib
from typing import Any

import jax

from glm_jax.config import Config
from glm_jax.weights import QuantRules, QuantSpec, TiledWeight, untile
from glm_jax.weights.params import ParamSpec, Path, Tree, init_leaf, map_specs, param_specs
from glm_jax.weights.storage import plan_storage
from glm_jax.weights.tiling import TURNED, lies_in_tiles, tiled
from pallas_kernels import random_arrays as noise
from pallas_kernels.tiles import WIDTH


def random_params(cfg: Config, quant: QuantRules, dtype: Any, *, tiles: bool, seed: int = 0) -> Tree:
    """Parameters of the size that training would give them; the same values in tiles and not.

    Args:
        cfg: the model.
        quant: 4- and 8-bit integers with a scale for each group or output.
        dtype: of what is not quantised.
        tiles: lay the matrices out as kernels read them.
        seed: of everything.
    """
    storage = plan_storage(cfg, quant)[0]

    def build(path: Path, param: ParamSpec) -> Any:
        spec = storage.get(path)
        if spec is None:
            plain = init_leaf(cfg, path, param, seed, dtype)
            return tiled(path, plain) if tiles else plain
        own = zlib.crc32(repr((path, seed)).encode())
        kept = tiles and lies_in_tiles(path)
        return jax.jit(lambda: _weight(path, param, spec, dtype, own, kept))()

    return map_specs(build, param_specs(cfg))


def _weight(path: Path, param: ParamSpec, spec: QuantSpec, dtype: Any, seed: int, tiles: bool) -> Any:
    """A parameter; out of its tiles layer by layer, since on the way each code takes four bytes."""
    *stack, outputs, inputs = param.shape
    turned, columns = path[-1] in TURNED, spec.block[1]
    shape = (*stack, inputs, outputs) if turned else param.shape
    group, sets = (0, inputs // columns if columns else 1) if turned else (columns, 0)
    if turned and columns % WIDTH:
        raise ValueError(f"{'/'.join(path)}: groups of {columns} inputs are no whole number of tiles")
    made = noise.tiles(shape, spec.kind, group, seed=seed, size=param.scale, scale=spec.scale, factors=sets)
    weight = TiledWeight(made, spec, dtype=jax.numpy.dtype(dtype), turned=turned)
    if tiles:
        return weight
    return jax.lax.map(untile, weight) if stack else untile(weight)
