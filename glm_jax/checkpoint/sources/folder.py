"""The source for converted folders: reads rows of their Zarr arrays, which the manifest describes."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from glm_jax.checkpoint.array_record import FLOAT_DTYPES, ArrayRecord
from glm_jax.checkpoint.folder.arrays import chunk_aligned_ranges, iter_array_blocks, layer_checkpoint_folder, read_rows
from glm_jax.checkpoint.folder.layout import Leaf, disk_arrays
from glm_jax.checkpoint.folder.manifest import Manifest, load_manifest
from glm_jax.checkpoint.messages import format_names
from glm_jax.checkpoint.sources.base import SourceInfo, WeightChunk, WeightSource
from glm_jax.checkpoint.sources.hf_config import read_hf_config
from glm_jax.checkpoint.sources.storage import build_storage, split_layer_groups
from glm_jax.config import Config
from glm_jax.errors import CheckpointError, ConfigError
from glm_jax.weights import QuantizedTensor, QuantSpec
from glm_jax.weights.storage import Storage


class ConvertedSource(WeightSource):
    """Weights of a folder that ``python -m convert`` or :func:`glm_jax.checkpoint.save` wrote.

    Args:
        folder: The converted folder.
        name: Source as the user wrote it; the folder's path if ``None``.

    Raises:
        CheckpointError: if the folder is incomplete, damaged, or from a newer version.
    """

    def __init__(self, folder: Path, name: str | None = None) -> None:
        self._folder = folder
        manifest = load_manifest(folder)
        self.cfg = manifest.cfg
        self.hf_config = read_hf_config(folder)
        _check_config(self.cfg, self.hf_config, folder)
        self._records, self._quant_specs = manifest.array_records, manifest.quant_specs
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
        """Returns a hash of the manifest, which records a hash of every array."""
        return self._fingerprint

    def dtype(self, leaf: Leaf) -> np.dtype[Any]:
        """Returns the dtype in the manifest; for quantized arrays, the model's dtype."""
        return FLOAT_DTYPES[self.info.dtype if self.quant_spec(leaf) else self._record(leaf).dtype]

    def quant_spec(self, leaf: Leaf) -> QuantSpec | None:
        """Returns the array's storage in the manifest."""
        return self._quant_specs.get(f"{leaf.checkpoint_name}/{leaf.name}")

    def iter_chunks(self, leaf: Leaf, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, WeightChunk]]:
        """Yields blocks of rows as they are read from disk."""
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
        # Rows of a matrix can be read alone only if each has its own scales and no component applies to all rows.
        whole = len(leaf.shape) == 2 and (spec.block[0] != 1 or spec.outer != "none" or spec.permuted)
        ranges = [(0, leaf.shape[0])] if whole else chunk_aligned_ranges(self._folder, arrays["codes"], start, stop)
        for first, last in ranges:
            components = {}
            for name, array in arrays.items():
                rows = (0, array.shape[0]) if whole else (first, last)
                components[name] = read_rows(self._folder, array, self._record(leaf, name).dtype, *rows)
            if len(leaf.shape) == 2 and "outer" in components:
                components["outer"] = components["outer"].reshape(())
            yield first, QuantizedTensor(**components, spec=spec, dtype=self.dtype(leaf))

    def sha256(self, leaf: Leaf, component: str = "") -> str | None:
        """Returns the array's hash in the manifest."""
        record = self._records[leaf.checkpoint_name].get(f"{leaf.name}.{component}" if component else leaf.name)
        return record.sha256 if record else None

    def _record(self, leaf: Leaf, component: str = "") -> ArrayRecord:
        return self._records[leaf.checkpoint_name][f"{leaf.name}.{component}" if component else leaf.name]


def manifest_storage(manifest: Manifest) -> tuple[Config, Storage]:
    """Returns the config and the storage of the model that a manifest describes; reads no other file."""

    def quant_spec(leaf: Leaf) -> QuantSpec | None:
        return manifest.quant_specs.get(f"{leaf.checkpoint_name}/{leaf.name}")

    cfg = split_layer_groups(manifest.cfg, quant_spec)
    return cfg, build_storage(cfg, quant_spec)


def _check_config(cfg: Config, hf_config: Mapping[str, Any], folder: Path) -> None:
    try:
        stated = Config.from_hf(hf_config)
    except ConfigError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from None
    # The tensors determine these fields, whatever the original config.json states.
    stated = stated.replace(
        num_nextn_predict_layers=cfg.num_nextn_predict_layers,
        mtp_own_embeddings=cfg.mtp_own_embeddings,
        latent_eps=cfg.latent_eps,
    )
    changed = [f.name for f in dataclasses.fields(cfg) if getattr(stated, f.name) != getattr(cfg, f.name)]
    if changed:
        raise CheckpointError(
            f"{folder / 'config.json'} and manifest.json disagree on {', '.join(changed)}: "
            "change the original's config.json and convert again"
        )


def _check_layer_checkpoints(folder: Path, listed: set[str]) -> None:
    try:
        present = {path.name for path in layer_checkpoint_folder(folder, "").iterdir()}
    except OSError as error:
        raise CheckpointError(f"cannot read {layer_checkpoint_folder(folder, '')}: {error.strerror}") from None
    missing, extra = sorted(listed - present), sorted(present - listed)
    if missing:
        raise CheckpointError(
            f"{folder} lacks layer checkpoints that its manifest lists: {format_names(missing)}; convert again"
        )
    if extra:
        raise CheckpointError(
            f"{folder} has layer checkpoints that its manifest does not list: {format_names(extra)}; convert again"
        )
