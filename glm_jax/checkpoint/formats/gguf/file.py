"""A GGUF model, opened: its config, its weights, and what belongs beside them."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glm_jax.checkpoint.formats.base import StoredWeight
from glm_jax.checkpoint.formats.gguf.hf_config import build_hf_config
from glm_jax.checkpoint.formats.gguf.split_files import GgufSplit, locate_tensors, open_splits
from glm_jax.checkpoint.formats.gguf.tokenizer import build_asset_files
from glm_jax.checkpoint.formats.gguf.weights import named_weights


@dataclasses.dataclass(frozen=True, slots=True)
class GgufModel:
    """The contents of a GGUF file or split set; make one with :func:`open_gguf`.

    Attributes:
        splits: the files, in order.
        config: as a ``config.json`` has it.
        weights: by logical name; see :func:`~glm_jax.checkpoint.formats.gguf.weights.named_weights`.
        notes: sentences worth telling the user.
    """

    splits: tuple[GgufSplit, ...]
    config: Mapping[str, Any]
    weights: Mapping[str, StoredWeight]
    notes: tuple[str, ...]

    def asset_files(self) -> dict[str, bytes]:
        """tokenizer.json, tokenizer_config.json, generation_config.json and, if there is one, chat_template.jinja.

        Raises:
            CheckpointError: if the file has no tokenizer, or another than GLM-4's.
        """
        return build_asset_files(self.splits[0].header.fields, self.config, self.splits[0].name)

    def fingerprint(self) -> str:
        """A hash of every file's name, size and header, and of three pages of every tensor.

        It changes with any training or other quantization; a few bytes changed between the pages do not show.
        """
        lines = [f"{part.name} {part.size} {part.sample_digest()}" for part in self.splits]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def mtimes_ns(self) -> dict[str, int]:
        """When each file was last changed, in nanoseconds."""
        return {part.path.name: part.mtime_ns for part in self.splits}


def open_gguf(path: Path) -> GgufModel:
    """Opens a GGUF model; reads headers and no weights.

    Args:
        path: a ``.gguf`` file, any part of a split set, or a folder that holds one model in this format.

    Raises:
        CheckpointError: if files are missing or damaged, hold another model, or ask for something that this stack
            does not compute or cannot read.
    """
    parts = open_splits(path)
    tensors = locate_tensors(parts)
    shapes = {name: placed.info.shape for name, placed in tensors.items()}
    config = build_hf_config(parts[0].header.fields, shapes, parts[0].name)
    weights, notes = named_weights(tensors, config)
    return GgufModel(parts, config, weights, tuple(notes))
