"""Saves a calibration's progress on disk between layers, so that a killed conversion resumes."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from glm_jax.checkpoint.folder.layout import STATE_FOLDER
from glm_jax.checkpoint.safetensors.reader import SafetensorsFile
from glm_jax.checkpoint.sources.base import Array
from glm_jax.errors import CheckpointError

_STATES_KEPT = 2  # the newest layer checkpoint on disk may be one layer behind the newest state


@dataclasses.dataclass(frozen=True, slots=True)
class CalibrationState:
    """The inputs of one layer.

    Attributes:
        layer_index: Index of the layer.
        reference_inputs: Outputs of the unquantized layers before it, float32 ``[N, T, D]``.
        quantized_inputs: Outputs of the quantized layers before it, float32 ``[N, T, D]``.
        notes: A sentence on each layer so far.
    """

    layer_index: int
    reference_inputs: Array
    quantized_inputs: Array
    notes: tuple[str, ...]


def _state_path(folder: Path, layer_index: int) -> Path:
    return folder / STATE_FOLDER / f"calibration-{layer_index}.safetensors"


def save_state(folder: Path | None, state: CalibrationState, key: str, *, keep_all: bool = False) -> None:
    """Writes a state, and removes older ones that can no longer be needed.

    Args:
        folder: Destination of the conversion; ``None`` saves nothing.
        state: The state.
        key: Fingerprint of the calibration.
        keep_all: Whether to keep all older states.

    Raises:
        OSError: if the state cannot be written.
    """
    if folder is None:
        return
    path = _state_path(folder, state.layer_index)
    temporary = path.with_suffix(".tmp")
    arrays = {
        "exact": np.ascontiguousarray(state.reference_inputs),
        "seen": np.ascontiguousarray(state.quantized_inputs),
    }
    try:
        safetensors.numpy.save_file(arrays, temporary, metadata={"key": key, "notes": json.dumps(state.notes)})
    except safetensors.SafetensorError as error:  # holds the system's message, but not its error code
        disk_full = os.strerror(errno.ENOSPC) in str(error) or os.strerror(errno.EFBIG) in str(error)
        raise OSError(errno.ENOSPC if disk_full else errno.EIO, str(error)) from None
    os.replace(temporary, path)
    for index in range(0 if keep_all else state.layer_index - _STATES_KEPT + 1):
        _state_path(folder, index).unlink(missing_ok=True)


def load_latest_notes(folder: Path | None, key: str) -> tuple[str, ...]:
    """Returns the notes of the newest saved state; none if there is no state of this calibration."""
    paths = [] if folder is None else list((folder / STATE_FOLDER).glob("calibration-*.safetensors"))
    suffixes = [path.stem.rpartition("-")[2] for path in paths]
    indices = [int(suffix) for suffix in suffixes if suffix.isdecimal()]
    state = load_state(folder, max(indices), key) if indices else None
    return state.notes if state else ()


def load_state(folder: Path | None, layer_index: int, key: str) -> CalibrationState | None:
    """Returns the saved inputs of a layer; ``None`` if there is no intact state of this calibration.

    Args:
        folder: Destination of the conversion; ``None`` for no saved states.
        layer_index: Index of the layer.
        key: Fingerprint of the calibration.
    """
    if folder is None or not _state_path(folder, layer_index).is_file():
        return None
    try:
        file = SafetensorsFile(_state_path(folder, layer_index))
        if file.header.metadata.get("key") != key:
            return None
        notes = tuple(json.loads(file.header.metadata["notes"]))
        reference_inputs, quantized_inputs = (np.array(file.get_tensor(name)) for name in ("exact", "seen"))
        return CalibrationState(layer_index, reference_inputs, quantized_inputs, notes)
    except (CheckpointError, KeyError, ValueError):
        return None
