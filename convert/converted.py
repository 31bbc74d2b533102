"""A converted folder as a source: slices of its Zarr arrays, checked against its manifest."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from convert.layout import Leaf
from convert.manifest import DTYPES, ArrayRecord, load_manifest
from convert.parts import part_folder, read_leaf
from convert.reader import listing
from convert.source import Array, SourceInfo, WeightSource, read_config
from glm_jax.config import Config
from glm_jax.errors import CheckpointError, ConfigError


class ConvertedSource(WeightSource):
    """Weights of a folder that ``python -m convert`` or :func:`glm_jax.checkpoint.save` wrote.

    Raises:
        CheckpointError: if the folder is incomplete, damaged, or from a newer version.
    """

    def __init__(self, folder: Path, name: str | None = None) -> None:
        self._folder = folder
        manifest = load_manifest(folder)
        self.cfg = manifest.cfg
        self.hf_config = read_config(folder)
        _check_config(self.cfg, self.hf_config, folder)
        self._records = manifest.parts
        self._fingerprint = hashlib.sha256(manifest.to_json().encode()).hexdigest()
        _check_parts(folder, set(manifest.parts))
        self.info = SourceInfo(
            kind="converted",
            name=name or str(folder),
            folder=folder,
            dtype=manifest.dtype,
            original=manifest.original,
        )

    def fingerprint(self) -> str:
        """Of the manifest, which has a hash of every array."""
        return self._fingerprint

    def dtype(self, leaf: Leaf) -> np.dtype[Any]:
        """As the manifest has it."""
        return DTYPES[self._record(leaf).dtype]

    def pieces(self, leaf: Leaf, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, Array]]:
        """Blocks of rows read from disk."""
        stop = leaf.shape[0] if stop is None else stop
        return read_leaf(self._folder, leaf, self._record(leaf).dtype, start, stop)

    def sha256(self, leaf: Leaf) -> str:
        """From the manifest."""
        return self._record(leaf).sha256

    def _record(self, leaf: Leaf) -> ArrayRecord:
        return self._records[leaf.part][leaf.name]


def _check_config(cfg: Config, hf_config: Any, folder: Path) -> None:
    try:
        stated = Config.from_hf(hf_config)
    except ConfigError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from None
    # The tensors decide these, whatever the original config.json said.
    settled = {
        "num_nextn_predict_layers": cfg.num_nextn_predict_layers,
        "mtp_own_embeddings": cfg.mtp_own_embeddings,
        "latent_eps": cfg.latent_eps,
    }
    stated = stated.replace(**settled)
    changed = [f.name for f in dataclasses.fields(cfg) if getattr(stated, f.name) != getattr(cfg, f.name)]
    if changed:
        raise CheckpointError(
            f"{folder / 'config.json'} and manifest.json disagree on {', '.join(changed)}: "
            "change the original's config.json and convert again"
        )


def _check_parts(folder: Path, wanted: set[str]) -> None:
    try:
        present = {path.name for path in part_folder(folder, "").iterdir()}
    except OSError as error:
        raise CheckpointError(f"cannot read {part_folder(folder, '')}: {error.strerror}") from None
    missing, extra = sorted(wanted - present), sorted(present - wanted)
    if missing:
        raise CheckpointError(f"{folder} lacks parts that its manifest lists: {listing(missing)}; convert again")
    if extra:
        raise CheckpointError(f"{folder} has parts that its manifest does not list: {listing(extra)}; convert again")
