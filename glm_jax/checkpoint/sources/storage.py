"""Derives the storage of each parameter, and the layer groups that follow from it, from a source's arrays."""

from __future__ import annotations

from collections.abc import Callable

from glm_jax.checkpoint.folder.layout import MTP, NON_LAYER, Leaf, checkpoint_layout
from glm_jax.checkpoint.sources.base import WeightSource
from glm_jax.config import Config
from glm_jax.weights import QuantSpec
from glm_jax.weights.params import leaves_with_path, param_specs
from glm_jax.weights.storage import Storage

QuantSpecLookup = Callable[[Leaf], QuantSpec | None]


def source_storage(source: WeightSource, cfg: Config | None = None) -> Storage:
    """Returns the storage of a source's quantized parameters.

    Args:
        source: The weights.
        cfg: Config with the same layer groups as the source's; the source's own if ``None``.
    """
    return build_storage(cfg or source.cfg, source.quant_spec)


def build_storage(cfg: Config, quant_spec: QuantSpecLookup) -> Storage:
    """Returns the storage of a model's quantized parameters; all layers of a group must be stored alike.

    Args:
        cfg: Config of the model.
        quant_spec: Returns how an array is quantized, ``None`` for a plain array.
    """
    specs = {leaf.param_path: quant_spec(leaf) for members in checkpoint_layout(cfg).values() for leaf in members}
    paths = (path for path, _ in leaves_with_path(param_specs(cfg)))
    return Storage(tuple((path, spec) for path in paths if (spec := specs.get(path))))


def split_layer_groups(cfg: Config, quant_spec: QuantSpecLookup) -> Config:
    """Returns the config with a new layer group wherever a layer is stored differently from the layer before it.

    Args:
        cfg: Config of the model.
        quant_spec: Returns how an array is quantized, ``None`` for a plain array.
    """
    plain = cfg.replace(run_starts=())
    layer_specs = [
        tuple((leaf.name, quant_spec(leaf)) for leaf in members)
        for name, members in checkpoint_layout(plain).items()
        if name not in (MTP, NON_LAYER)
    ]
    same_kind = [i for i in range(1, len(layer_specs)) if cfg.mlp_layer_types[i] == cfg.mlp_layer_types[i - 1]]
    return plain.replace(run_starts=tuple(i for i in same_kind if layer_specs[i] != layer_specs[i - 1]))
