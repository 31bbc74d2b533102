"""A folder as Hugging Face repositories have it, plain or quantised, read through the rule table."""

from __future__ import annotations

from pathlib import Path

from convert.checkpoint_source import CheckpointSource
from convert.formats import read_formats
from convert.reader import Reader
from convert.source import read_config


class HuggingFaceSource(CheckpointSource):
    """Weights of a safetensors folder: plain ones as zero-copy views of its files, quantised ones repacked.

    Raises:
        CheckpointError: for anything wrong with the folder; tensors that do not fit the config are listed together.
        ConfigError: for a ``config.json`` that this stack cannot run.
    """

    def __init__(self, folder: Path, name: str | None = None) -> None:
        config, reader = read_config(folder), Reader.open(folder)
        weights = read_formats(reader, config, folder)
        super().__init__(weights, config, reader, kind="huggingface", name=name or str(folder), folder=folder)
