"""The interface of a conversion's output: a list of shards, and the files that complete the folder.

:mod:`~glm_jax.checkpoint.write.orbax_target` writes converted folders, and
:mod:`~glm_jax.checkpoint.write.safetensors_target` writes Hugging Face folders.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from glm_jax.checkpoint.array_record import ArrayRecords
from glm_jax.checkpoint.progress import ProgressCallback
from glm_jax.errors import CheckpointError


class OutputShard(Protocol):
    """A unit of output that is written, recorded and verified as a whole: a layer checkpoint or a safetensors file."""

    @property
    def name(self) -> str:
        """File or folder name."""
        ...

    @property
    def nbytes(self) -> int:
        """Size of its arrays in bytes."""
        ...

    def write(self, folder: Path, advance: ProgressCallback) -> ArrayRecords:
        """Writes the shard atomically and returns the records of its arrays."""
        ...

    def verify(self, folder: Path, records: ArrayRecords, advance: ProgressCallback) -> list[str]:
        """Reads the shard back and returns the names of arrays whose bytes do not match their records."""
        ...

    def is_complete(self, folder: Path, records: ArrayRecords) -> bool:
        """Returns whether the shard exists with the sizes and dtypes of its records; reads no values."""
        ...

    def compute_records(self) -> ArrayRecords:
        """Returns the records that :meth:`write` would return, from the source's bytes."""
        ...


class ConversionTarget(Protocol):
    """The output of a conversion.

    Attributes:
        shards: All shards, in the order in which they are written.
        notes: Sentences for the user.
    """

    shards: Sequence[OutputShard]
    notes: tuple[str, ...]

    def load_records(self, folder: Path) -> Mapping[str, ArrayRecords]:
        """Returns the records that a complete folder keeps, by shard name."""
        ...

    def finalize(self, folder: Path, key: str, records: Mapping[str, ArrayRecords]) -> None:
        """Writes the missing files beside the shards; the file that marks the folder complete comes last.

        Args:
            folder: The destination.
            key: Key of the conversion job.
            records: Records of all shards, by shard name.
        """
        ...


def find_corrupt_arrays(
    shard: OutputShard, folder: Path, records: ArrayRecords, advance: ProgressCallback
) -> list[str]:
    """Returns the names of a shard's arrays that cannot be read back as they were written."""
    try:
        return shard.verify(folder, records, advance)
    except CheckpointError as error:
        return [f"{shard.name} ({error})"]


def config_json(config: Mapping[str, Any], dtype: np.dtype[Any] | None) -> str:
    """Returns the text of ``config.json`` after a conversion to ``dtype``; ``None`` keeps the stated dtype."""
    changed = {} if dtype is None else {key: dtype.name for key in ("dtype", "torch_dtype") if key in config}
    return json.dumps({**config, **changed}, indent=2) + "\n"
