"""The two things a conversion can make: our folder of Orbax parts, and a Hugging Face folder.

A target is a list of units. A unit is written whole, has a record of its arrays' hashes, and can be read back.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from glm_jax.checkpoint.array_record import ARRAY_DTYPES, ArrayRecord, ArrayRecords, hash_records
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
from glm_jax.checkpoint.safetensors.reader import INDEX_NAME, SafetensorsFile
from glm_jax.checkpoint.safetensors.writer import TensorOutput, build_index_json, split_into_shards, write_shard
from glm_jax.checkpoint.sources.base import ASSET_FILES, WeightSource, build_disk_arrays, output_dtype
from glm_jax.checkpoint.write.export import export_checkpoint
from glm_jax.errors import CheckpointError


class OutputShard(Protocol):
    """A piece of a target that is written and verified as one."""

    @property
    def name(self) -> str:
        """File or folder name."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        ...

    def write(self, folder: Path, advance: ProgressCallback) -> ArrayRecords:
        """Writes it, atomically, and returns its record."""
        ...

    def verify(self, folder: Path, records: ArrayRecords, advance: ProgressCallback) -> list[str]:
        """Reads it back; returns the arrays whose bytes are not those that were written."""
        ...

    def is_complete(self, folder: Path, records: ArrayRecords) -> bool:
        """Whether it is there and of the right size, with these records; reads none of its bytes."""
        ...

    def compute_records(self) -> ArrayRecords:
        """What writing it now would return: hashes of the source's bytes."""
        ...


class ConversionTarget(Protocol):
    """All units, the files that make the folder complete, and sentences worth telling the user."""

    shards: Sequence[OutputShard]
    notes: tuple[str, ...]

    def load_records(self, folder: Path) -> Mapping[str, ArrayRecords]:
        """What a complete folder has kept of the records of its units."""
        ...

    def finalize(self, folder: Path, key: str, records: Mapping[str, ArrayRecords]) -> None:
        """Writes what is not there yet beside the units; the file that makes the folder complete comes last."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class LayerCheckpoint:
    """One part of a converted folder."""

    source: WeightSource
    name: str
    leaves: tuple[Leaf, ...]
    dtype: np.dtype[Any] | None

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        return sum(self.source.nbytes(leaf, self.dtype) for leaf in self.leaves)

    def write(self, folder: Path, advance: ProgressCallback) -> ArrayRecords:
        """Writes the Orbax checkpoint of the part."""
        arrays, records = {}, {}
        for leaf in self.leaves:
            for place, array in build_disk_arrays(self.source, leaf, self.dtype).items():
                arrays[place.name], records[place.name] = array, ArrayRecord.from_array(array)
            advance(self.source.nbytes(leaf, self.dtype))
        write_layer_checkpoint(folder, self.name, self.arrays, arrays)
        return records

    @property
    def arrays(self) -> list[DiskArray]:
        """Its arrays on disk."""
        return [place for leaf in self.leaves for place in disk_arrays(leaf, self.source.quant_spec(leaf))]

    def verify(self, folder: Path, records: ArrayRecords, advance: ProgressCallback) -> list[str]:
        """Hashes every array as it is on disk."""
        wrong = []
        for place in self.arrays:
            record = records[place.name]
            pieces = iter_array_blocks(folder, place, record.dtype, 0, place.shape[0])
            if ArrayRecord.from_blocks(place.shape, record.dtype, (piece for _, piece in pieces)) != record:
                wrong.append(f"{self.name}/{place.name}")
            advance(math.prod(place.shape) * ARRAY_DTYPES[record.dtype].itemsize)
        return wrong

    def is_complete(self, folder: Path, records: ArrayRecords) -> bool:
        """Sizes of the files of every array, and Orbax's own list of arrays."""
        wanted = {
            place.name: (place.shape, place.dtype or output_dtype(self.source, leaf, self.dtype).name)
            for leaf in self.leaves
            for place in disk_arrays(leaf, self.source.quant_spec(leaf))
        }
        return (
            {name: (record.shape, record.dtype) for name, record in records.items()} == wanted
            and (layer_checkpoint_folder(folder, self.name) / "_METADATA").is_file()
            and all(is_array_complete(folder, place, records[place.name].dtype) for place in self.arrays)
        )

    def compute_records(self) -> ArrayRecords:
        """Hashes every array, one at a time."""
        built = (build_disk_arrays(self.source, leaf, self.dtype) for leaf in self.leaves)
        return {place.name: ArrayRecord.from_array(array) for arrays in built for place, array in arrays.items()}


class OrbaxTarget:
    """A converted folder."""

    def __init__(self, source: WeightSource, dtype: np.dtype[Any] | None) -> None:
        self._source, self._dtype = source, dtype
        self.notes: tuple[str, ...] = ()
        self.shards: Sequence[OutputShard] = [
            LayerCheckpoint(source, part, leaves, dtype) for part, leaves in source.layout().items()
        ]

    def load_records(self, folder: Path) -> Mapping[str, ArrayRecords]:
        """From the manifest; none if it is damaged."""
        try:
            return load_manifest(folder).array_records
        except CheckpointError:
            return {}

    def finalize(self, folder: Path, key: str, records: Mapping[str, ArrayRecords]) -> None:
        """Companions, config.json, and the manifest last."""
        source, info = self._source, self._source.info
        # Converted to another dtype, the weights are no longer the original's.
        original = info.original if self._dtype is None else dataclasses.replace(info.original, dtypes={})
        dtype = info.dtype if self._dtype is None else self._dtype.name
        _write_assets(source, folder)
        write_if_changed(folder / "config.json", _config_json(source.hf_config, self._dtype))
        # Parameters in memory have no name to go by; their hashes tell them apart.
        origin = hash_records(records) if info.kind == "memory" else key
        storage = {
            f"{leaf.checkpoint_name}/{leaf.name}": spec
            for members in source.layout().values()
            for leaf in members
            if (spec := source.quant_spec(leaf))
        }
        manifest = Manifest(source.cfg, dtype, original, origin, records, storage)
        write_if_changed(folder / MANIFEST_NAME, manifest.to_json())


@dataclasses.dataclass(frozen=True, slots=True)
class SafetensorsShard:
    """One safetensors file of a Hugging Face folder."""

    name: str
    outputs: Sequence[TensorOutput]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(output.nbytes for output in self.outputs)

    def write(self, folder: Path, advance: ProgressCallback) -> ArrayRecords:
        """Writes the file."""
        return write_shard(folder / self.name, self.outputs, advance)

    def verify(self, folder: Path, records: ArrayRecords, advance: ProgressCallback) -> list[str]:
        """Hashes every tensor as it is on disk."""
        file = SafetensorsFile(folder / self.name)
        wrong = []
        for name, record in records.items():
            array = file.get_tensor(name)
            if ArrayRecord.from_array(array) != record:
                wrong.append(f"{self.name}/{name}")
            advance(array.nbytes)
        return wrong

    def is_complete(self, folder: Path, records: ArrayRecords) -> bool:
        """Size and header of the file; a folder of shards keeps no hashes."""
        del records
        try:
            entries = SafetensorsFile(folder / self.name).header.tensors
        except CheckpointError:
            return False
        there = {name: (entry.shape, entry.dtype) for name, entry in entries.items()}
        return there == {output.name: (output.shape, output.dtype) for output in self.outputs}

    def compute_records(self) -> ArrayRecords:
        """Hashes every tensor, block by block."""
        return {o.name: ArrayRecord.from_blocks(o.shape, o.dtype.name, o.iter_blocks()) for o in self.outputs}


class SafetensorsTarget:
    """A Hugging Face folder, as transformers and serving engines read it."""

    def __init__(self, source: WeightSource, dtype: np.dtype[Any] | None) -> None:
        self._source, self._dtype = source, dtype
        made = export_checkpoint(source, dtype)
        self._config, self.notes = made.config, made.notes
        self._outputs_by_file = split_into_shards(made.outputs)
        self.shards: Sequence[OutputShard] = [
            SafetensorsShard(name, members) for name, members in self._outputs_by_file.items()
        ]

    def load_records(self, folder: Path) -> Mapping[str, ArrayRecords]:
        """None: the folder has the files of its kind alone."""
        del folder
        return {}

    def finalize(self, folder: Path, key: str, records: Mapping[str, ArrayRecords]) -> None:
        """Companions, config.json, and the index last."""
        del records
        source = self._source
        _write_assets(source, folder)
        write_if_changed(folder / "config.json", _config_json(self._config, self._dtype))
        write_if_changed(folder / INDEX_NAME, build_index_json(self._outputs_by_file, key))


TARGET_TYPES: dict[str, Callable[[WeightSource, np.dtype[Any] | None], ConversionTarget]] = {
    "orbax": OrbaxTarget,
    "safetensors": SafetensorsTarget,
}


def _config_json(config: Mapping[str, Any], dtype: np.dtype[Any] | None) -> str:
    changed = {} if dtype is None else {key: dtype.name for key in ("dtype", "torch_dtype") if key in config}
    return json.dumps({**config, **changed}, indent=2) + "\n"


def _write_assets(source: WeightSource, folder: Path) -> None:
    for path in asset_paths(source.info.folder):
        try:
            data = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
        write_if_changed(folder / path.name, data)


def asset_paths(folder: Path | None) -> Iterator[Path]:
    """The tokenizer and its like, where they are."""
    if folder is not None:
        yield from (folder / name for name in ASSET_FILES if (folder / name).is_file())


def find_corrupt_arrays(
    shard: OutputShard, folder: Path, records: ArrayRecords, advance: ProgressCallback
) -> list[str]:
    """The arrays of a unit that cannot be read back as they were written."""
    try:
        return shard.verify(folder, records, advance)
    except CheckpointError as error:
        return [f"{shard.name} ({error})"]
