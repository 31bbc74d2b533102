"""Block sizes that were measured, one JSON file for each card; where nobody has measured, the rule's hold.

``python -m pallas_kernels.tune`` writes the files. Those shipped lie in this folder; a folder that GLM_JAX_TUNED names
is looked in first.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from pallas_kernels import _device
from pallas_kernels._compile import LaunchError
from pallas_kernels.machine_info import slugify

TUNED_DIR_ENV = "GLM_JAX_TUNED"
S = TypeVar("S")


@dataclasses.dataclass(frozen=True, slots=True)
class TuningKey(Generic[S]):
    """An operation's sizes, as far as block sizes depend on them.

    Attributes:
        op: name of the operation.
        key: the sizes as text.
        heuristic: block sizes by rule.
        search_space: values that are worth trying, by the name of the block size.
    """

    op: str
    key: str
    heuristic: S
    search_space: Mapping[str, tuple[int, ...]]


def lookup_config(tuning_key: TuningKey[S]) -> S:
    """The block sizes that were measured on the target at hand, else the rule's.

    Raises:
        LaunchError: for a file that is damaged, naming it.
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
    """Where files are looked for, in this order."""
    named = os.environ.get(TUNED_DIR_ENV)
    return (*([Path(named)] if named else []), Path(__file__).parent)


def tuned_filename(device: str) -> str:
    """Of the file of a card."""
    return f"{slugify(device)}.json"


def load_tuned(path: Path, device: str) -> dict[str, dict[str, Any]]:
    """Operation to key to what was measured; empty where there is no file.

    Raises:
        LaunchError: for a file that is not one of these, or of another card.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise _invalid_file(path, str(error)) from None
    try:
        held = json.loads(text)
        device_of, ops = held["device"], held["ops"]
        if not all(isinstance(entry["shape"], dict) for keys in ops.values() for entry in keys.values()):
            raise TypeError
    except (ValueError, TypeError, KeyError, AttributeError):
        raise _invalid_file(path, "it is not what the command writes") from None
    if device_of != device:
        raise _invalid_file(path, f"it is of {device_of!r}, not of {device!r}")
    return ops


@functools.cache
def _cached_entries(path: Path, device: str) -> dict[str, dict[str, Any]]:
    return load_tuned(path, device)


def _invalid_file(path: Path, why: str) -> LaunchError:
    return LaunchError(f"{path} cannot be used ({why}): make it anew with python -m pallas_kernels.tune, or delete it")


def _validated_config(path: Path, tuning_key: TuningKey[S], entry: Mapping[str, Any]) -> S:
    fields, rule = entry["shape"], tuning_key.heuristic
    names = {field.name for field in dataclasses.fields(rule)}  # pyright: ignore[reportArgumentType]
    if set(fields) != names:
        raise _invalid_file(path, f"{tuning_key.op} has {', '.join(sorted(names))}, not {', '.join(sorted(fields))}")
    if wrong := [name for name, value in fields.items() if not _is_allowed_value(tuning_key, name, value)]:
        raise _invalid_file(path, f"{tuning_key.op}, {tuning_key.key}: {wrong[0]} cannot be {fields[wrong[0]]!r}")
    return type(rule)(**fields)


def _is_allowed_value(tuning_key: TuningKey[Any], name: str, value: Any) -> bool:
    """Kernels are right with the rule's sizes and with those that are tried, and need not be with others."""
    return type(value) is int and (
        value == getattr(tuning_key.heuristic, name) or value in tuning_key.search_space.get(name, ())
    )


def rows_bucket(rows: int) -> str:
    """A number of rows as part of a key: few rows more change nothing."""
    return f"m{1 << (max(rows, 1) - 1).bit_length()}"
