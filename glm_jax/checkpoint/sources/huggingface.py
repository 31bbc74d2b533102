"""The source for Hugging Face folders of safetensors, plain or quantized."""

from __future__ import annotations

from pathlib import Path

from glm_jax.checkpoint.formats import read_stored_weights
from glm_jax.checkpoint.safetensors.reader import SafetensorsReader
from glm_jax.checkpoint.sources.hf_config import read_hf_config
from glm_jax.checkpoint.sources.named_tensors import NamedTensorSource


class HuggingFaceSource(NamedTensorSource):
    """Weights of a safetensors folder: plain ones as zero-copy views of the files, quantized ones repacked.

    Args:
        folder: The folder.
        name: Source as the user wrote it; the folder's path if ``None``.

    Raises:
        CheckpointError: if the folder is damaged or not supported; lists all tensors that do not fit the config.
        ConfigError: for a ``config.json`` that this stack cannot run.
    """

    def __init__(self, folder: Path, name: str | None = None) -> None:
        config, reader = read_hf_config(folder), SafetensorsReader.open(folder)
        weights = read_stored_weights(reader, config, folder)
        super().__init__(weights, config, reader, kind="huggingface", name=name or str(folder), folder=folder)
