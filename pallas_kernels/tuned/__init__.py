"""Tuned block sizes, one JSON file for each GPU; the heuristics hold where nothing was measured.

``python -m pallas_kernels.tune`` writes the files. This folder has those that are shipped; a folder named by
GLM_JAX_TUNED has priority.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

from pallas_kernels import _device
from pallas_kernels._kernel import LaunchError
from pallas_kernels.machine_info import slugify

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

TUNED_DIR_ENV = "GLM_JAX_TUNED"
ConfigT = TypeVar("ConfigT", bound="DataclassInstance")
TunedEntries: TypeAlias = dict[str, dict[str, Any]]  # operation to key to a JSON object


@dataclasses.dataclass(frozen=True, slots=True)
class TuningKey(Generic[ConfigT]):
    """The sizes of an operation that its block sizes depend on.

    Attributes:
        op: Name of the operation.
        key: The sizes as text.
        heuristic: Block sizes of the heuristic.
        search_space: Values to try, by the name of the block size.
    """

    op: str
    key: str
    heuristic: ConfigT
    search_space: Mapping[str, tuple[int, ...]]


def lookup_config(tuning_key: TuningKey[ConfigT]) -> ConfigT:
    """Returns the block sizes tuned on the current target, or else those of the heuristic.

    Raises:
        LaunchError: For a damaged file, naming it.
    """
    target = _device.current_target()
    if target is None:
        return tuning_key.heuristic
    for folder in tuned_dirs():
        path = folder / tuned_filename(target.name)
        entry = _cached_entries(path, target.name).get(tuning_key.op, {}).get(tuning_key.key)
        if entry is not None:
            return _validated_config(path, tuning_key, entry)
    return tuning_key.heuristic


def tuned_dirs() -> tuple[Path, ...]:
    """Returns the folders that are searched for tuned files, in order."""
    user_dir = os.environ.get(TUNED_DIR_ENV)
    return (*([Path(user_dir)] if user_dir else []), Path(__file__).parent)


def tuned_filename(device: str) -> str:
    """Returns the name of the tuned file of a GPU."""
    return f"{slugify(device)}.json"


def config_to_json(config: DataclassInstance) -> dict[str, int]:
    """Returns block sizes by their names in a tuned file."""
    return {_json_name(field): getattr(config, field.name) for field in dataclasses.fields(config)}


def load_tuned(path: Path, device: str) -> TunedEntries:
    """Returns the entries of a tuned file, by operation and key; empty if there is no file.

    Raises:
        LaunchError: If the file is not a tuned file, or is one of another GPU.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise _invalid_file(path, str(error)) from None
    try:
        content = json.loads(text)
        file_device, ops = content["device"], content["ops"]
        if not all(isinstance(entry["shape"], dict) for keys in ops.values() for entry in keys.values()):
            raise TypeError
    except (ValueError, TypeError, KeyError, AttributeError):
        raise _invalid_file(path, "it is not what the command writes") from None
    if file_device != device:
        raise _invalid_file(path, f"it is of {file_device!r}, not of {device!r}")
    return ops


@functools.cache
def _cached_entries(path: Path, device: str) -> TunedEntries:
    return load_tuned(path, device)


def _invalid_file(path: Path, reason: str) -> LaunchError:
    return LaunchError(
        f"{path} cannot be used ({reason}): make it anew with python -m pallas_kernels.tune, or delete it"
    )


def _json_name(field: dataclasses.Field[Any]) -> str:
    """Returns the name of a block size in a tuned file, which may be older than that of the field."""
    return field.metadata.get("json", field.name)


def _validated_config(path: Path, tuning_key: TuningKey[ConfigT], entry: Mapping[str, Any]) -> ConfigT:
    sizes = entry["shape"]
    names = {_json_name(field): field.name for field in dataclasses.fields(tuning_key.heuristic)}
    if set(sizes) != set(names):
        raise _invalid_file(path, f"{tuning_key.op} has {', '.join(sorted(names))}, not {', '.join(sorted(sizes))}")
    config = {names[name]: value for name, value in sizes.items()}
    if wrong := [name for name, value in config.items() if not _is_allowed_value(tuning_key, name, value)]:
        raise _invalid_file(path, f"{tuning_key.op}, {tuning_key.key}: {wrong[0]} cannot be {config[wrong[0]]!r}")
    return type(tuning_key.heuristic)(**config)


def _is_allowed_value(tuning_key: TuningKey[Any], name: str, value: object) -> bool:
    """Returns whether a kernel is known to be correct with a block size: that of the heuristic or the search space."""
    return type(value) is int and (
        value == getattr(tuning_key.heuristic, name) or value in tuning_key.search_space.get(name, ())
    )


def rows_bucket(rows: int) -> str:
    """Returns a number of rows as part of a key, rounded up to a power of two."""
    return f"m{1 << (max(rows, 1) - 1).bit_length()}"
