"""A GGUF file as a source; what other formats have in files beside the weights is in the file itself."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
import weakref
from pathlib import Path

from glm_jax.checkpoint.formats.gguf import GgufModel, open_gguf
from glm_jax.checkpoint.sources.named_tensors import NamedTensorSource
from glm_jax.errors import CheckpointError

GGUF_SUFFIX = ".gguf"


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file, or a folder with nothing but these for weights."""
    if path.is_dir():
        present = {entry.suffix for entry in path.iterdir()}
        return GGUF_SUFFIX in present and ".safetensors" not in present and not (path / "manifest.json").exists()
    return path.suffix == GGUF_SUFFIX


class GgufSource(NamedTensorSource):
    """Weights of a GGUF model, repacked.

    Args:
        path: the file, any part of a split set, or a folder that holds one model.
        name: as it was asked for.

    Raises:
        CheckpointError: for anything wrong with the file.
        ConfigError: for an architecture that this stack cannot run.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        opened = open_gguf(path)
        # Readers of tokenizers and templates know folders; this one lives as long as what is known of the source.
        kept = _TemporaryFolder()
        missing = _write_assets(opened, kept.path)
        super().__init__(opened.weights, opened.config, opened, kind="gguf", name=name or str(path), folder=kept.path)
        self.info = dataclasses.replace(self.info, keep_alive=kept, notes=(*self.info.notes, *missing))


class _TemporaryFolder:
    """A private temporary folder that goes when nobody holds this object any more."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="glm-jax-gguf-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def _write_assets(opened: GgufModel, folder: Path) -> tuple[str, ...]:
    """Writes the config and the companions; gives a sentence if there is no tokenizer that can be used."""
    files = {"config.json": json.dumps(dict(opened.config), indent=2).encode()}
    notes: tuple[str, ...] = ()
    try:
        files |= opened.asset_files()
    except CheckpointError as error:
        notes = (f"its tokenizer cannot be used: {error}",)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return notes
