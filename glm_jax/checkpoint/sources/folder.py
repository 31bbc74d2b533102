"""A converted folder as a source: slices of its Zarr arrays, checked against its manifest."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from glm_jax.checkpoint.array_record import FLOAT_DTYPES, ArrayRecord
from glm_jax.checkpoint.folder.arrays import chunk_aligned_ranges, iter_array_blocks, layer_checkpoint_folder, read_rows
from glm_jax.checkpoint.folder.layout import Leaf, disk_arrays
from glm_jax.checkpoint.folder.manifest import Manifest, load_manifest
from glm_jax.checkpoint.messages import format_names
from glm_jax.checkpoint.sources.base import (
    SourceInfo,
    WeightChunk,
    WeightSource,
    build_storage,
    read_hf_config,
    split_layer_groups,
)
from glm_jax.config import Config
from glm_jax.errors import CheckpointError, ConfigError
from glm_jax.weights import QuantizedTensor, QuantSpec
from glm_jax.weights.storage import Storage


class ConvertedSource(WeightSource):
    """Weights of a folder that ``python -m convert`` or :func:`glm_jax.checkpoint.save` wrote.

    Raises:
        CheckpointError: if the folder is incomplete, damaged, or from a newer version.
    """

    def __init__(self, folder: Path, name: str | None = None) -> None:
        self._folder = folder
        manifest = load_manifest(folder)
        self.cfg = manifest.cfg
        self.hf_config = read_hf_config(folder)
        _check_config(self.cfg, self.hf_config, folder)
        self._records, self._storage = manifest.array_records, manifest.quant_specs
        self.cfg = split_layer_groups(self.cfg, self.quant_spec)
        self._fingerprint = hashlib.sha256(manifest.to_json().encode()).hexdigest()
        _check_layer_checkpoints(folder, set(manifest.array_records))
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
        return FLOAT_DTYPES[self.info.dtype if self.quant_spec(leaf) else self._record(leaf).dtype]

    def quant_spec(self, leaf: Leaf) -> QuantSpec | None:
        """From the manifest."""
        return self._storage.get(f"{leaf.checkpoint_name}/{leaf.name}")

    def iter_chunks(self, leaf: Leaf, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, WeightChunk]]:
        """Blocks of rows read from disk."""
        stop = leaf.shape[0] if stop is None else stop
        spec = self.quant_spec(leaf)
        if spec is None:
            (array,) = disk_arrays(leaf, None)
            return iter_array_blocks(self._folder, array, self._record(leaf).dtype, start, stop)
        return self._iter_quantized_chunks(leaf, spec, start, stop)

    def _iter_quantized_chunks(
        self, leaf: Leaf, spec: QuantSpec, start: int, stop: int
    ) -> Iterator[tuple[int, WeightChunk]]:
        arrays = {array.component: array for array in disk_arrays(leaf, spec)}
        # Rows of a matrix can be had alone only where each has its own scales and nothing belongs to all of them.
        whole = len(leaf.shape) == 2 and (spec.block[0] != 1 or spec.outer != "none" or spec.permuted)
        bounds = [(0, leaf.shape[0])] if whole else chunk_aligned_ranges(self._folder, arrays["codes"], start, stop)
        for first, last in bounds:
            parts = {}
            for name, array in arrays.items():
                rows = (0, array.shape[0]) if whole else (first, last)
                parts[name] = read_rows(self._folder, array, self._record(leaf, name).dtype, *rows)
            if len(leaf.shape) == 2 and "outer" in parts:
                parts["outer"] = parts["outer"].reshape(())
            yield first, QuantizedTensor(**parts, spec=spec, dtype=self.dtype(leaf))

    def sha256(self, leaf: Leaf, component: str = "") -> str | None:
        """From the manifest."""
        record = self._records[leaf.checkpoint_name].get(f"{leaf.name}.{component}" if component else leaf.name)
        return record.sha256 if record else None

    def _record(self, leaf: Leaf, component: str = "") -> ArrayRecord:
        return self._records[leaf.checkpoint_name][f"{leaf.name}.{component}" if component else leaf.name]


def manifest_storage(manifest: Manifest) -> tuple[Config, Storage]:
    """The model of a manifest, and which of its parameters are quantized and how; reads nothing else."""

    def stored(leaf: Leaf) -> QuantSpec | None:
        return manifest.quant_specs.get(f"{leaf.checkpoint_name}/{leaf.name}")

    cfg = split_layer_groups(manifest.cfg, stored)
    return cfg, build_storage(cfg, stored)


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


def _check_layer_checkpoints(folder: Path, wanted: set[str]) -> None:
    try:
        present = {path.name for path in layer_checkpoint_folder(folder, "").iterdir()}
    except OSError as error:
        raise CheckpointError(f"cannot read {layer_checkpoint_folder(folder, '')}: {error.strerror}") from None
    missing, extra = sorted(wanted - present), sorted(present - wanted)
    if missing:
        raise CheckpointError(f"{folder} lacks parts that its manifest lists: {format_names(missing)}; convert again")
    if extra:
        raise CheckpointError(
            f"{folder} has parts that its manifest does not list: {format_names(extra)}; convert again"
        )
