"""Where a calibration stands: kept on disk between layers, so that a killed run goes on."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from glm_jax.checkpoint.safetensors.reader import SafetensorsFile
from glm_jax.checkpoint.sources.base import Array
from glm_jax.checkpoint.write.conversion_state import STATE_FOLDER
from glm_jax.errors import CheckpointError

_STATES_KEPT = 2  # the layer that was recorded last may be one behind


@dataclasses.dataclass(frozen=True, slots=True)
class CalibrationState:
    """What goes into a layer.

    Attributes:
        layer_index: of the layer.
        reference_inputs: float32 ``[N, T, D]``, from the unquantized model.
        quantized_inputs: the same from the quantized layers before it.
        notes: a sentence on each layer so far.
    """

    layer_index: int
    reference_inputs: Array
    quantized_inputs: Array
    notes: tuple[str, ...]


def _path(folder: Path, index: int) -> Path:
    return folder / STATE_FOLDER / f"calibration-{index}.safetensors"


def save_state(folder: Path | None, state: CalibrationState, key: str, *, keep_all: bool = False) -> None:
    """Writes the state, and removes those that nothing can ask for any more, unless all are to be kept.

    Raises:
        OSError: if it cannot be written.
    """
    if folder is None:
        return
    path = _path(folder, state.layer_index)
    temporary = path.with_suffix(".tmp")
    arrays = {
        "exact": np.ascontiguousarray(state.reference_inputs),
        "seen": np.ascontiguousarray(state.quantized_inputs),
    }
    try:
        safetensors.numpy.save_file(arrays, temporary, metadata={"key": key, "notes": json.dumps(state.notes)})
    except safetensors.SafetensorError as error:  # which says what the system said, in words alone
        full = os.strerror(errno.ENOSPC) in str(error) or os.strerror(errno.EFBIG) in str(error)
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error)) from None
    os.replace(temporary, path)
    for old in range(0 if keep_all else state.layer_index - _STATES_KEPT + 1):
        _path(folder, old).unlink(missing_ok=True)


def load_latest_notes(folder: Path | None, key: str) -> tuple[str, ...]:
    """The notes of the calibration that got furthest."""
    found = [] if folder is None else list((folder / STATE_FOLDER).glob("calibration-*.safetensors"))
    numbers = [int(path.stem.rpartition("-")[2]) for path in found if path.stem.rpartition("-")[2].isdecimal()]
    state = load_state(folder, max(numbers), key) if numbers else None
    return state.notes if state else ()


def load_state(folder: Path | None, index: int, key: str) -> CalibrationState | None:
    """The state before a layer, if it was kept and is of the same calibration."""
    if folder is None or not _path(folder, index).is_file():
        return None
    try:
        file = SafetensorsFile(_path(folder, index))
        if file.header.metadata.get("key") != key:
            return None
        notes = tuple(json.loads(file.header.metadata["notes"]))
        return CalibrationState(index, np.array(file.get_tensor("exact")), np.array(file.get_tensor("seen")), notes)
    except (CheckpointError, KeyError, ValueError):
        return None
