"""Output of a conversion as a Hugging Face folder: safetensors files and their index."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from glm_jax.checkpoint.array_record import ArrayRecord, ArrayRecords
from glm_jax.checkpoint.asset_files import copy_assets
from glm_jax.checkpoint.atomic_write import write_if_changed
from glm_jax.checkpoint.progress import ProgressCallback
from glm_jax.checkpoint.safetensors.reader import INDEX_NAME, SafetensorsFile
from glm_jax.checkpoint.safetensors.writer import TensorOutput, build_index_json, split_into_shards, write_shard
from glm_jax.checkpoint.sources.base import WeightSource
from glm_jax.checkpoint.write.export import export_checkpoint
from glm_jax.checkpoint.write.targets import OutputShard, config_json
from glm_jax.errors import CheckpointError


@dataclasses.dataclass(frozen=True, slots=True)
class SafetensorsShard:
    """One safetensors file of a Hugging Face folder, as an output shard.

    Attributes:
        name: File name.
        outputs: Its tensors.
    """

    name: str
    outputs: Sequence[TensorOutput]

    @property
    def nbytes(self) -> int:
        """Size of its tensors in bytes."""
        return sum(output.nbytes for output in self.outputs)

    def write(self, folder: Path, advance: ProgressCallback) -> ArrayRecords:
        """Writes the file."""
        return write_shard(folder / self.name, self.outputs, advance)

    def verify(self, folder: Path, records: ArrayRecords, advance: ProgressCallback) -> list[str]:
        """Hashes every tensor on disk and compares it with its record."""
        file = SafetensorsFile(folder / self.name)
        corrupt = []
        for name, record in records.items():
            array = file.get_tensor(name)
            if ArrayRecord.from_array(array) != record:
                corrupt.append(f"{self.name}/{name}")
            advance(array.nbytes)
        return corrupt

    def is_complete(self, folder: Path, records: ArrayRecords) -> bool:
        """Returns whether the file's size and header are right; a Hugging Face folder keeps no records."""
        del records
        try:
            entries = SafetensorsFile(folder / self.name).header.tensors
        except CheckpointError:
            return False
        present = {name: (entry.shape, entry.dtype) for name, entry in entries.items()}
        return present == {output.name: (output.shape, output.dtype) for output in self.outputs}

    def compute_records(self) -> ArrayRecords:
        """Hashes every tensor of the source, block by block."""
        return {o.name: ArrayRecord.from_blocks(o.shape, o.dtype.name, o.iter_blocks()) for o in self.outputs}


class SafetensorsTarget:
    """A Hugging Face folder that transformers and serving engines can read.

    Args:
        source: The weights.
        dtype: Dtype to convert plain arrays to; ``None`` gives each tensor its original dtype.
    """

    def __init__(self, source: WeightSource, dtype: np.dtype[Any] | None) -> None:
        self._source, self._dtype = source, dtype
        exported = export_checkpoint(source, dtype)
        self._config, self.notes = exported.config, exported.notes
        self._outputs_by_file = split_into_shards(exported.outputs)
        self.shards: Sequence[OutputShard] = [
            SafetensorsShard(name, outputs) for name, outputs in self._outputs_by_file.items()
        ]

    def load_records(self, folder: Path) -> Mapping[str, ArrayRecords]:
        """Returns nothing: a Hugging Face folder keeps no records."""
        del folder
        return {}

    def finalize(self, folder: Path, key: str, records: Mapping[str, ArrayRecords]) -> None:
        """Writes asset files and config.json, and the index last."""
        del records
        copy_assets(self._source.info.folder, folder)
        write_if_changed(folder / "config.json", config_json(self._config, self._dtype))
        write_if_changed(folder / INDEX_NAME, build_index_json(self._outputs_by_file, key))
