"""Opens the source that a user names: a path, a hub id, ``tiny`` or ``synthetic:…``."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

from glm_jax.checkpoint.array_record import FLOAT_DTYPES
from glm_jax.checkpoint.folder.layout import STATE_FOLDER
from glm_jax.checkpoint.folder.manifest import is_converted_folder
from glm_jax.checkpoint.safetensors.reader import reject_pickle
from glm_jax.checkpoint.sources.base import WeightSource
from glm_jax.checkpoint.sources.folder import ConvertedSource
from glm_jax.checkpoint.sources.gguf import GgufSource
from glm_jax.checkpoint.sources.gguf import is_gguf as is_gguf
from glm_jax.checkpoint.sources.hub import download_snapshot, is_hub_id
from glm_jax.checkpoint.sources.huggingface import HuggingFaceSource
from glm_jax.checkpoint.sources.synthetic import SYNTHETIC_PREFIX, SyntheticSource, SyntheticSpec
from glm_jax.errors import CheckpointError

TINY_MODEL = "tiny"


def open_source(source: str | Path, *, dtype: str | None = None) -> WeightSource:
    """Opens a source; reads config and headers, but no weights.

    Args:
        source: Safetensors folder, converted folder, GGUF file or a folder with one, hub id, ``"tiny"`` (the built-in
            miniature), or ``"synthetic:flash?layers=4&seed=0"``.
        dtype: Dtype of synthetic weights (bfloat16 if ``None``); other sources keep theirs.

    Raises:
        CheckpointError: if there is no usable checkpoint; the message explains the problem.
        ConfigError: for a ``config.json`` that this stack cannot run.
    """
    text = str(source)
    if not text:
        raise CheckpointError("no source given: name a folder, a hub id, or tiny")
    if text.startswith(SYNTHETIC_PREFIX):
        return SyntheticSource(SyntheticSpec.parse(text), FLOAT_DTYPES[dtype or "bfloat16"], text)
    if text == TINY_MODEL:
        return _open_folder(tiny_folder(), text)
    path = Path(os.path.expanduser(text))  # Path.expanduser raises if the user does not exist
    if path.exists() and is_gguf(path):
        return GgufSource(path, text)
    if path.is_dir():
        return _open_folder(path, text)
    if path.exists():
        reject_pickle(path)
        raise CheckpointError(
            f"{path} is a file: give a .gguf file, or the folder that holds config.json and the weights"
        )
    if not is_hub_id(text):
        raise CheckpointError(f"there is no folder {text}, and it is not a hub id such as zai-org/GLM-4.7-Flash")
    return _open_folder(download_snapshot(text), text)


def _open_folder(folder: Path, name: str) -> WeightSource:
    if is_converted_folder(folder):
        return ConvertedSource(folder, name)
    if (folder / STATE_FOLDER).exists() or (folder / "parts").is_dir():
        raise CheckpointError(f"{folder} is an unfinished conversion: run the same `python -m convert` command again")
    return HuggingFaceSource(folder, name)


def tiny_folder() -> Path:
    """Returns the folder of the built-in miniature."""
    return Path(str(files("glm_jax"))) / TINY_MODEL
