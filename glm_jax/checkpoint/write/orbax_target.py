"""Output of a conversion as a converted folder: one Orbax checkpoint per layer, and a manifest."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from glm_jax.checkpoint.array_record import ARRAY_DTYPES, ArrayRecord, ArrayRecords, hash_records
from glm_jax.checkpoint.asset_files import copy_assets
from glm_jax.checkpoint.atomic_write import write_if_changed
from glm_jax.checkpoint.folder.arrays import (
    is_array_complete,
    iter_array_blocks,
    layer_checkpoint_folder,
    write_layer_checkpoint,
)
from glm_jax.checkpoint.folder.layout import DiskArray, Leaf, disk_arrays
from glm_jax.checkpoint.folder.manifest import MANIFEST_NAME, Manifest, load_manifest
from glm_jax.checkpoint.progress import ProgressCallback
from glm_jax.checkpoint.sources.base import WeightSource
from glm_jax.checkpoint.sources.build import build_disk_arrays
from glm_jax.checkpoint.write.targets import OutputShard, config_json
from glm_jax.errors import CheckpointError


@dataclasses.dataclass(frozen=True, slots=True)
class LayerCheckpoint:
    """One layer checkpoint of a converted folder, as an output shard.

    Attributes:
        source: The weights.
        name: Name of the layer checkpoint.
        leaves: Its arrays.
        dtype: Dtype to convert plain arrays to; ``None`` keeps each array's own.
    """

    source: WeightSource
    name: str
    leaves: tuple[Leaf, ...]
    dtype: np.dtype[Any] | None

    @property
    def nbytes(self) -> int:
        """Size of its arrays in bytes."""
        return sum(self.source.nbytes(leaf, self.dtype) for leaf in self.leaves)

    @property
    def arrays(self) -> list[DiskArray]:
        """Its arrays on disk."""
        return [array for leaf in self.leaves for array in disk_arrays(leaf, self.source.quant_spec(leaf))]

    def write(self, folder: Path, advance: ProgressCallback) -> ArrayRecords:
        """Writes the Orbax checkpoint."""
        arrays, records = {}, {}
        for leaf in self.leaves:
            for disk_array, array in build_disk_arrays(self.source, leaf, self.dtype).items():
                arrays[disk_array.name], records[disk_array.name] = array, ArrayRecord.from_array(array)
            advance(self.source.nbytes(leaf, self.dtype))
        write_layer_checkpoint(folder, self.name, self.arrays, arrays)
        return records

    def verify(self, folder: Path, records: ArrayRecords, advance: ProgressCallback) -> list[str]:
        """Hashes every array on disk and compares it with its record."""
        corrupt = []
        for array in self.arrays:
            record = records[array.name]
            blocks = iter_array_blocks(folder, array, record.dtype, 0, array.shape[0])
            if ArrayRecord.from_blocks(array.shape, record.dtype, (block for _, block in blocks)) != record:
                corrupt.append(f"{self.name}/{array.name}")
            advance(math.prod(array.shape) * ARRAY_DTYPES[record.dtype].itemsize)
        return corrupt

    def is_complete(self, folder: Path, records: ArrayRecords) -> bool:
        """Returns whether Orbax's metadata and all files of every array exist, with the recorded sizes."""
        expected = {
            array.name: (array.shape, array.dtype or self.source.output_dtype(leaf, self.dtype).name)
            for leaf in self.leaves
            for array in disk_arrays(leaf, self.source.quant_spec(leaf))
        }
        return (
            {name: (record.shape, record.dtype) for name, record in records.items()} == expected
            and (layer_checkpoint_folder(folder, self.name) / "_METADATA").is_file()
            and all(is_array_complete(folder, array, records[array.name].dtype) for array in self.arrays)
        )

    def compute_records(self) -> ArrayRecords:
        """Hashes every array of the source, one at a time."""
        built = (build_disk_arrays(self.source, leaf, self.dtype) for leaf in self.leaves)
        return {disk.name: ArrayRecord.from_array(array) for arrays in built for disk, array in arrays.items()}


class OrbaxTarget:
    """A converted folder.

    Args:
        source: The weights.
        dtype: Dtype to convert plain arrays to; ``None`` keeps each array's own.
    """

    def __init__(self, source: WeightSource, dtype: np.dtype[Any] | None) -> None:
        self._source, self._dtype = source, dtype
        self.notes: tuple[str, ...] = ()
        self.shards: Sequence[OutputShard] = [
            LayerCheckpoint(source, name, leaves, dtype) for name, leaves in source.layout().items()
        ]

    def load_records(self, folder: Path) -> Mapping[str, ArrayRecords]:
        """Returns the records in the manifest; none if the manifest is damaged."""
        try:
            return load_manifest(folder).array_records
        except CheckpointError:
            return {}

    def finalize(self, folder: Path, key: str, records: Mapping[str, ArrayRecords]) -> None:
        """Writes asset files and config.json, and the manifest last."""
        source, info = self._source, self._source.info
        # After a conversion to another dtype, the original dtypes no longer apply.
        original = info.original if self._dtype is None else dataclasses.replace(info.original, dtypes={})
        dtype = info.dtype if self._dtype is None else self._dtype.name
        copy_assets(info.folder, folder)
        write_if_changed(folder / "config.json", config_json(source.hf_config, self._dtype))
        # The key of parameters in memory is random; their hashes identify them instead.
        fingerprint = hash_records(records) if info.kind == "memory" else key
        quant_specs = {
            f"{leaf.checkpoint_name}/{leaf.name}": spec
            for members in source.layout().values()
            for leaf in members
            if (spec := source.quant_spec(leaf))
        }
        manifest = Manifest(source.cfg, dtype, original, fingerprint, records, quant_specs)
        write_if_changed(folder / MANIFEST_NAME, manifest.to_json())
