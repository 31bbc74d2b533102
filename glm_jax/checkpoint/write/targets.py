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

from glm_jax.checkpoint.folder.arrays import is_whole, part_folder, read_array, write_part
from glm_jax.checkpoint.folder.layout import DiskArray, Leaf, disk_arrays
from glm_jax.checkpoint.folder.manifest import (
    ARRAY_DTYPES,
    MANIFEST,
    ArrayRecord,
    Manifest,
    Records,
    digest,
    load_manifest,
    write_changed,
)
from glm_jax.checkpoint.progress import Advance
from glm_jax.checkpoint.safetensors.reader import INDEX_NAME, Shard
from glm_jax.checkpoint.safetensors.writer import Output, index_json, shard, write_shard
from glm_jax.checkpoint.sources.base import COMPANIONS, WeightSource, build_arrays, kept_dtype
from glm_jax.checkpoint.write.export import export
from glm_jax.errors import CheckpointError


class Unit(Protocol):
    """A piece of a target that is written and verified as one."""

    @property
    def name(self) -> str:
        """File or folder name."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        ...

    def write(self, folder: Path, advance: Advance) -> Records:
        """Writes it, atomically, and returns its record."""
        ...

    def verify(self, folder: Path, records: Records, advance: Advance) -> list[str]:
        """Reads it back; returns the arrays whose bytes are not those that were written."""
        ...

    def stands(self, folder: Path, records: Records) -> bool:
        """Whether it is there and of the right size, with these records; reads none of its bytes."""
        ...

    def record(self) -> Records:
        """What writing it now would return: hashes of the source's bytes."""
        ...


class Target(Protocol):
    """All units, the files that make the folder complete, and sentences worth telling the user."""

    units: Sequence[Unit]
    notes: tuple[str, ...]

    def records(self, folder: Path) -> Mapping[str, Records]:
        """What a complete folder has kept of the records of its units."""
        ...

    def finish(self, folder: Path, key: str, records: Mapping[str, Records]) -> None:
        """Writes what is not there yet beside the units; the file that makes the folder complete comes last."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """One part of a converted folder."""

    source: WeightSource
    name: str
    leaves: tuple[Leaf, ...]
    dtype: np.dtype[Any] | None

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        return sum(self.source.nbytes(leaf, self.dtype) for leaf in self.leaves)

    def write(self, folder: Path, advance: Advance) -> Records:
        """Writes the Orbax checkpoint of the part."""
        arrays, records = {}, {}
        for leaf in self.leaves:
            for place, array in build_arrays(self.source, leaf, self.dtype).items():
                arrays[place.name], records[place.name] = array, ArrayRecord.of(array)
            advance(self.source.nbytes(leaf, self.dtype))
        write_part(folder, self.name, self.places, arrays)
        return records

    @property
    def places(self) -> list[DiskArray]:
        """Its arrays on disk."""
        return [place for leaf in self.leaves for place in disk_arrays(leaf, self.source.storage(leaf))]

    def verify(self, folder: Path, records: Records, advance: Advance) -> list[str]:
        """Hashes every array as it is on disk."""
        wrong = []
        for place in self.places:
            record = records[place.name]
            pieces = read_array(folder, place, record.dtype, 0, place.shape[0])
            if ArrayRecord.of_pieces(place.shape, record.dtype, (piece for _, piece in pieces)) != record:
                wrong.append(f"{self.name}/{place.name}")
            advance(math.prod(place.shape) * ARRAY_DTYPES[record.dtype].itemsize)
        return wrong

    def stands(self, folder: Path, records: Records) -> bool:
        """Sizes of the files of every array, and Orbax's own list of arrays."""
        wanted = {
            place.name: (place.shape, place.dtype or kept_dtype(self.source, leaf, self.dtype).name)
            for leaf in self.leaves
            for place in disk_arrays(leaf, self.source.storage(leaf))
        }
        return (
            {name: (record.shape, record.dtype) for name, record in records.items()} == wanted
            and (part_folder(folder, self.name) / "_METADATA").is_file()
            and all(is_whole(folder, place, records[place.name].dtype) for place in self.places)
        )

    def record(self) -> Records:
        """Hashes every array, one at a time."""
        built = (build_arrays(self.source, leaf, self.dtype) for leaf in self.leaves)
        return {place.name: ArrayRecord.of(array) for arrays in built for place, array in arrays.items()}


class OrbaxTarget:
    """A converted folder."""

    def __init__(self, source: WeightSource, dtype: np.dtype[Any] | None) -> None:
        self._source, self._dtype = source, dtype
        self.notes: tuple[str, ...] = ()
        self.units: Sequence[Unit] = [Part(source, part, leaves, dtype) for part, leaves in source.layout().items()]

    def records(self, folder: Path) -> Mapping[str, Records]:
        """From the manifest; none if it is damaged."""
        try:
            return load_manifest(folder).parts
        except CheckpointError:
            return {}

    def finish(self, folder: Path, key: str, records: Mapping[str, Records]) -> None:
        """Companions, config.json, and the manifest last."""
        source, info = self._source, self._source.info
        # Converted to another dtype, the weights are no longer the original's.
        original = info.original if self._dtype is None else dataclasses.replace(info.original, dtypes={})
        dtype = info.dtype if self._dtype is None else self._dtype.name
        _write_companions(source, folder)
        write_changed(folder / "config.json", _config_json(source.hf_config, self._dtype))
        # Parameters in memory have no name to go by; their hashes tell them apart.
        origin = digest(records) if info.kind == "memory" else key
        storage = {
            f"{leaf.part}/{leaf.name}": spec
            for members in source.layout().values()
            for leaf in members
            if (spec := source.storage(leaf))
        }
        manifest = Manifest(source.cfg, dtype, original, origin, records, storage)
        write_changed(folder / MANIFEST, manifest.to_json())


@dataclasses.dataclass(frozen=True, slots=True)
class ShardFile:
    """One safetensors file of a Hugging Face folder."""

    name: str
    outputs: Sequence[Output]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(output.nbytes for output in self.outputs)

    def write(self, folder: Path, advance: Advance) -> Records:
        """Writes the file."""
        return write_shard(folder / self.name, self.outputs, advance)

    def verify(self, folder: Path, records: Records, advance: Advance) -> list[str]:
        """Hashes every tensor as it is on disk."""
        file = Shard(folder / self.name)
        wrong = []
        for name, record in records.items():
            array = file.get(name)
            if ArrayRecord.of(array) != record:
                wrong.append(f"{self.name}/{name}")
            advance(array.nbytes)
        return wrong

    def stands(self, folder: Path, records: Records) -> bool:
        """Size and header of the file; a folder of shards keeps no hashes."""
        del records
        try:
            entries = Shard(folder / self.name).header.tensors
        except CheckpointError:
            return False
        there = {name: (entry.shape, entry.dtype) for name, entry in entries.items()}
        return there == {output.name: (output.shape, output.dtype) for output in self.outputs}

    def record(self) -> Records:
        """Hashes every tensor, block by block."""
        return {o.name: ArrayRecord.of_pieces(o.shape, o.dtype.name, o.blocks()) for o in self.outputs}


class SafetensorsTarget:
    """A Hugging Face folder, as transformers and serving engines read it."""

    def __init__(self, source: WeightSource, dtype: np.dtype[Any] | None) -> None:
        self._source, self._dtype = source, dtype
        made = export(source, dtype)
        self._config, self.notes = made.config, made.notes
        self._shards = shard(made.outputs)
        self.units: Sequence[Unit] = [ShardFile(name, members) for name, members in self._shards.items()]

    def records(self, folder: Path) -> Mapping[str, Records]:
        """None: the folder has the files of its kind alone."""
        del folder
        return {}

    def finish(self, folder: Path, key: str, records: Mapping[str, Records]) -> None:
        """Companions, config.json, and the index last."""
        del records
        source = self._source
        _write_companions(source, folder)
        write_changed(folder / "config.json", _config_json(self._config, self._dtype))
        write_changed(folder / INDEX_NAME, index_json(self._shards, key))


TARGETS: dict[str, Callable[[WeightSource, np.dtype[Any] | None], Target]] = {
    "orbax": OrbaxTarget,
    "safetensors": SafetensorsTarget,
}


def _config_json(config: Mapping[str, Any], dtype: np.dtype[Any] | None) -> str:
    changed = {} if dtype is None else {key: dtype.name for key in ("dtype", "torch_dtype") if key in config}
    return json.dumps({**config, **changed}, indent=2) + "\n"


def _write_companions(source: WeightSource, folder: Path) -> None:
    for path in companions(source.info.folder):
        try:
            data = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
        write_changed(folder / path.name, data)


def companions(folder: Path | None) -> Iterator[Path]:
    """The tokenizer and its like, where they are."""
    if folder is not None:
        yield from (folder / name for name in COMPANIONS if (folder / name).is_file())


def verify(unit: Unit, folder: Path, records: Records, advance: Advance) -> list[str]:
    """The arrays of a unit that cannot be read back as they were written."""
    try:
        return unit.verify(folder, records, advance)
    except CheckpointError as error:
        return [f"{unit.name} ({error})"]
