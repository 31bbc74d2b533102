"""Opens a GGUF model: its config, its weights, and its tokenizer files."""

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
    """Contents of a GGUF file or a set of split files; :func:`open_gguf` builds it.

    Attributes:
        splits: Files of the model, in order.
        config: Config of the model in the form of a ``config.json``.
        weights: Weights by logical name; see :func:`~glm_jax.checkpoint.formats.gguf.weights.named_weights`.
        notes: Harmless oddities to report to the user.
    """

    splits: tuple[GgufSplit, ...]
    config: Mapping[str, Any]
    weights: Mapping[str, StoredWeight]
    notes: tuple[str, ...]

    def asset_files(self) -> dict[str, bytes]:
        """Builds the files that accompany a checkpoint's weights.

        Returns:
            Contents of ``tokenizer.json``, ``tokenizer_config.json``, ``generation_config.json`` and, if the model has
            a chat template, ``chat_template.jinja``, by file name.

        Raises:
            CheckpointError: If the file has no tokenizer, or a tokenizer other than GLM-4's.
        """
        return build_asset_files(self.splits[0].header.fields, self.config, self.splits[0].name)

    def fingerprint(self) -> str:
        """SHA-256 of every file's name, size and header, and of three pages of every tensor.

        Any further training or other quantization changes the fingerprint. A few bytes changed between the sampled
        pages do not.
        """
        lines = [f"{split.name} {split.size} {split.sample_digest()}" for split in self.splits]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def mtimes_ns(self) -> dict[str, int]:
        """Time of each file's last change in nanoseconds, by file name."""
        return {split.path.name: split.mtime_ns for split in self.splits}


def open_gguf(path: Path) -> GgufModel:
    """Opens a GGUF model; reads headers and no weights.

    Args:
        path: A ``.gguf`` file, any file of a split set, or a folder that holds one model in this format.

    Raises:
        CheckpointError: If files are missing or damaged, hold another model, or need a computation or tensor type that
            is not supported.
    """
    splits = open_splits(path)
    tensors = locate_tensors(splits)
    shapes = {name: tensor.info.shape for name, tensor in tensors.items()}
    config = build_hf_config(splits[0].header.fields, shapes, splits[0].name)
    weights, notes = named_weights(tensors, config)
    return GgufModel(splits, config, weights, tuple(notes))
