"""The source for GGUF models, whose files hold config and tokenizer as well as the weights."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
import weakref
from pathlib import Path

from glm_jax.checkpoint.formats.gguf import GgufModel, open_gguf
from glm_jax.checkpoint.formats.gguf.split_files import GGUF_SUFFIX
from glm_jax.checkpoint.sources.named_tensors import NamedTensorSource
from glm_jax.errors import CheckpointError


def is_gguf(path: Path) -> bool:
    """Returns whether a path is a GGUF file, or a folder whose only weights are GGUF files."""
    if path.is_dir():
        present = {entry.suffix for entry in path.iterdir()}
        return GGUF_SUFFIX in present and ".safetensors" not in present and not (path / "manifest.json").exists()
    return path.suffix == GGUF_SUFFIX


class GgufSource(NamedTensorSource):
    """Weights of a GGUF model, repacked without a change of value.

    Args:
        path: The file, any file of a split set, or a folder that holds one model.
        name: Source as the user wrote it; the path if ``None``.

    Raises:
        CheckpointError: if the file is damaged or not supported.
        ConfigError: for an architecture that this stack cannot run.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        model = open_gguf(path)
        # Tokenizer and template are read from folders, so they are extracted; the folder lives as long as `info`.
        assets = _TemporaryFolder()
        asset_notes = _extract_assets(model, assets.path)
        super().__init__(model.weights, model.config, model, kind="gguf", name=name or str(path), folder=assets.path)
        self.info = dataclasses.replace(self.info, keep_alive=assets, notes=(*self.info.notes, *asset_notes))


class _TemporaryFolder:
    """A private temporary folder that is deleted when this object is garbage-collected."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="glm-jax-gguf-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def _extract_assets(model: GgufModel, folder: Path) -> tuple[str, ...]:
    """Writes config and asset files to a folder; returns a note if the tokenizer cannot be used."""
    files = {"config.json": json.dumps(dict(model.config), indent=2).encode()}
    notes: tuple[str, ...] = ()
    try:
        files |= model.asset_files()
    except CheckpointError as error:
        notes = (f"its tokenizer cannot be used: {error}",)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return notes
