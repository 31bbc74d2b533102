"""Which parameters of a model lie in tiles where kernels run, and laying them out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glm_jax.params import Path, leaves
from glm_jax.quant import TiledWeight, tile, untile

# Matrices that kernels multiply with. The embedding is looked up in; the prediction layer runs without kernels.
MATRICES = frozenset("q_a q_b kv_a k_b v_b o gate up down shared_gate shared_up shared_down router".split())
# Attention multiplies queries with the transposed matrices.
TURNED = frozenset(["k_b"])


def lies_in_tiles(path: Path) -> bool:
    """Whether a parameter is laid out in tiles."""
    return path == ("head",) or (path[0] == "runs" and path[-1] in MATRICES)


def tiled(path: Path, weight: Any) -> Any:
    """A parameter as kernels read it; as it is where they do not, or cannot."""
    made = tile(weight, turned=path[-1] in TURNED) if lies_in_tiles(path) else None
    return weight if made is None else made


def tiled_tree(params: Mapping[str, Any], path: Path = ()) -> dict[str, Any]:
    """A tree of parameters with those in tiles that kernels read."""
    return {
        name: tiled_tree(value, (*path, name)) if isinstance(value, Mapping) else tiled((*path, name), value)
        for name, value in params.items()
    }


def untiled_tree(params: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`tiled_tree`."""
    return {
        name: untiled_tree(value)
        if isinstance(value, Mapping)
        else untile(value)
        if isinstance(value, TiledWeight)
        else value
        for name, value in params.items()
    }


def has_tiles(params: Mapping[str, Any]) -> bool:
    """Whether any parameter lies in tiles."""
    return any(isinstance(leaf, TiledWeight) for _, leaf in leaves(dict(params)))
