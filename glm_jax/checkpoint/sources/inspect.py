"""Reads a model's config, and how its weights are stored, without reading the weights."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from glm_jax.checkpoint.folder.manifest import is_converted_folder, load_manifest
from glm_jax.checkpoint.formats.quantization_config import MODELOPT_CONFIG_NAME, QUANTIZATION_CONFIG_KEYS
from glm_jax.checkpoint.sources.folder import manifest_storage
from glm_jax.checkpoint.sources.gguf import is_gguf
from glm_jax.checkpoint.sources.hf_config import read_hf_config
from glm_jax.checkpoint.sources.hub import download_config, is_hub_id
from glm_jax.checkpoint.sources.open import TINY_MODEL, open_source, tiny_folder
from glm_jax.checkpoint.sources.storage import source_storage
from glm_jax.checkpoint.sources.synthetic import SYNTHETIC_PREFIX, SyntheticSpec
from glm_jax.config import Config
from glm_jax.errors import CheckpointError
from glm_jax.weights.storage import Storage

_LOGGER = logging.getLogger(__name__)


def load_config_and_storage(model: str) -> tuple[Config, Storage]:
    """Returns the config of a model and the storage of its quantized weights, from configs and headers alone.

    Of a hub repository only ``config.json`` is downloaded.

    Args:
        model: Folder, GGUF file, hub id, ``"tiny"`` or ``"synthetic:…"``, as in
            :func:`glm_jax.checkpoint.sources.open.open_source`.

    Raises:
        CheckpointError: if there is no such model.
        ConfigError: if its ``config.json`` describes a model that this stack cannot run.
    """
    if model.startswith(SYNTHETIC_PREFIX):
        return SyntheticSpec.parse(model).cfg, Storage()
    path = tiny_folder() if model == TINY_MODEL else Path(os.path.expanduser(model))
    if model and path.is_dir() and not is_gguf(path):
        return _inspect_folder(path)
    if model and path.exists():
        source = open_source(path)
        return source.cfg, source_storage(source)
    if not is_hub_id(model):
        raise CheckpointError(f"there is no folder {model}, and it is not a hub id such as zai-org/GLM-4.7-Flash")
    return _inspect_folder(download_config(model))


def _inspect_folder(folder: Path) -> tuple[Config, Storage]:
    if is_converted_folder(folder):
        return manifest_storage(load_manifest(folder))
    hf_config = read_hf_config(folder)
    quantized = any(hf_config.get(key) for key in QUANTIZATION_CONFIG_KEYS) or (folder / MODELOPT_CONFIG_NAME).exists()
    if quantized and any(folder.glob("*.safetensors")):
        source = open_source(folder)
        return source.cfg, source_storage(source)
    if quantized:
        _LOGGER.warning(
            "note: these weights are quantized, but only the weight files say how: planned as unquantized "
            "(give a local folder, or --quantize)"
        )
    return Config.from_hf(hf_config), Storage()
