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
from pallas_kernels.machine_info import slug

FOLDER = "GLM_JAX_TUNED"
S = TypeVar("S")


@dataclasses.dataclass(frozen=True, slots=True)
class Problem(Generic[S]):
    """An operation's sizes, as far as block sizes depend on them.

    Attributes:
        op: name of the operation.
        key: the sizes as text.
        rule: block sizes by rule.
        axes: values that are worth trying, by the name of the block size.
    """

    op: str
    key: str
    rule: S
    axes: Mapping[str, tuple[int, ...]]


def best(problem: Problem[S]) -> S:
    """The block sizes that were measured on the target at hand, else the rule's.

    Raises:
        LaunchError: for a file that is damaged, naming it.
    """
    target = _device.target()
    if target is None:
        return problem.rule
    for folder in folders():
        path = folder / file_name(target.name)
        entry = _entries(path, target.name).get(problem.op, {}).get(problem.key)
        if entry is not None:
            return _checked(path, problem, entry)
    return problem.rule


def folders() -> tuple[Path, ...]:
    """Where files are looked for, in this order."""
    named = os.environ.get(FOLDER)
    return (*([Path(named)] if named else []), Path(__file__).parent)


def file_name(device: str) -> str:
    """Of the file of a card."""
    return f"{slug(device)}.json"


def read(path: Path, device: str) -> dict[str, dict[str, Any]]:
    """Operation to key to what was measured; empty where there is no file.

    Raises:
        LaunchError: for a file that is not one of these, or of another card.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise _damaged(path, str(error)) from None
    try:
        held = json.loads(text)
        device_of, ops = held["device"], held["ops"]
        if not all(isinstance(entry["shape"], dict) for keys in ops.values() for entry in keys.values()):
            raise TypeError
    except (ValueError, TypeError, KeyError, AttributeError):
        raise _damaged(path, "it is not what the command writes") from None
    if device_of != device:
        raise _damaged(path, f"it is of {device_of!r}, not of {device!r}")
    return ops


@functools.cache
def _entries(path: Path, device: str) -> dict[str, dict[str, Any]]:
    return read(path, device)


def _damaged(path: Path, why: str) -> LaunchError:
    return LaunchError(f"{path} cannot be used ({why}): make it anew with python -m pallas_kernels.tune, or delete it")


def _checked(path: Path, problem: Problem[S], entry: Mapping[str, Any]) -> S:
    fields, rule = entry["shape"], problem.rule
    names = {field.name for field in dataclasses.fields(rule)}  # pyright: ignore[reportArgumentType]
    if set(fields) != names:
        raise _damaged(path, f"{problem.op} has {', '.join(sorted(names))}, not {', '.join(sorted(fields))}")
    if wrong := [name for name, value in fields.items() if not _possible(problem, name, value)]:
        raise _damaged(path, f"{problem.op}, {problem.key}: {wrong[0]} cannot be {fields[wrong[0]]!r}")
    return type(rule)(**fields)


def _possible(problem: Problem[Any], name: str, value: Any) -> bool:
    """Kernels are right with the rule's sizes and with those that are tried, and need not be with others."""
    return type(value) is int and (value == getattr(problem.rule, name) or value in problem.axes.get(name, ()))


def rows_key(rows: int) -> str:
    """A number of rows as part of a key: few rows more change nothing."""
    return f"m{1 << (max(rows, 1) - 1).bit_length()}"
