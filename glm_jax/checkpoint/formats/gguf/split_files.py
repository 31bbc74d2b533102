"""The files of one GGUF model: a single one, or the parts of a split set."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from glm_jax.checkpoint.formats.gguf.header import GgufHeader, GgufTensorInfo, read_gguf_header, read_uint
from glm_jax.checkpoint.mapped_file import MappedFile, wrap_read_errors
from glm_jax.checkpoint.messages import format_names, printable
from glm_jax.errors import CheckpointError

Array = np.ndarray[Any, np.dtype[Any]]

GGUF_SUFFIX = ".gguf"
_SPLIT_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
_MAX_SPLITS = 10_000


class GgufSplit(MappedFile):
    """One GGUF file, its header checked, mapped when first touched.

    Raises:
        CheckpointError: if the file is unreadable, truncated, damaged, or not GGUF.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, printable(path.name)
        with wrap_read_errors(path), path.open("rb") as file:
            status = os.fstat(file.fileno())
            self.size, self.mtime_ns = status.st_size, status.st_mtime_ns
            self.header: GgufHeader = read_gguf_header(file, self.size, self.name)
        self.digest = self.header.digest

    def tensor_bytes(self, entry: GgufTensorInfo) -> Array:
        """The bytes of a tensor, uint8 ``[*stack, O, row bytes]``, as a read-only view of the mapped file."""
        flat = np.frombuffer(self._mapped(), np.uint8, entry.end - entry.begin, entry.begin)
        return flat.reshape(*entry.shape[:-1], entry.row_bytes)

    def byte_ranges(self) -> Iterator[tuple[int, int]]:
        """Of every tensor."""
        return ((entry.begin, entry.end) for entry in self.header.tensors.values())


@dataclasses.dataclass(frozen=True, slots=True)
class LocatedTensor:
    """A tensor and the file it is in."""

    split: GgufSplit
    info: GgufTensorInfo


def open_splits(path: Path) -> tuple[GgufSplit, ...]:
    """The parts of a model, in order; the fields of the model are in the first.

    Args:
        path: a file, any part of a split set, or a folder that holds one model.

    Raises:
        CheckpointError: if files are missing, damaged, do not belong together, or are of several models.
    """
    files = _split_paths(_find_only_model(path) if path.is_dir() else path)
    parts = tuple(GgufSplit(file) for file in files)
    for number, part in enumerate(parts):
        _check_split(part, number, len(parts))
    total = read_uint(parts[0].header.fields, "split.tensors.count", parts[0].name, 0)
    present = sum(len(part.header.tensors) for part in parts)
    if total not in (0, present):
        raise CheckpointError(f"{parts[0].name} says that its set has {total} tensors; the files have {present}")
    return parts


def locate_tensors(splits: tuple[GgufSplit, ...]) -> dict[str, LocatedTensor]:
    """Every tensor by its name in the files.

    Raises:
        CheckpointError: if one is in two files.
    """
    found: dict[str, LocatedTensor] = {}
    for part in splits:
        for name, entry in part.header.tensors.items():
            if name in found:
                raise CheckpointError(f"tensor {printable(name)} is in {found[name].split.name} and in {part.name}")
            found[name] = LocatedTensor(part, entry)
    return found


def _find_only_model(folder: Path) -> Path:
    with wrap_read_errors(folder):
        names = sorted(path.name for path in folder.iterdir() if path.name.lower().endswith(GGUF_SUFFIX))
    models: dict[str, str] = {}
    for name in names:
        match = _SPLIT_NAME.fullmatch(name)
        models.setdefault(f"{match[1]} of {match[3]}" if match else name, name)
    if not models:
        raise CheckpointError(f"{folder} holds no .gguf file")
    if len(models) > 1:
        raise CheckpointError(
            f"{folder} holds {len(models)} GGUF models, name one of them: {format_names([*map(printable, models.values())])}"
        )
    return folder / next(iter(models.values()))


def _split_paths(path: Path) -> list[Path]:
    match = _SPLIT_NAME.fullmatch(path.name)
    if match is None:
        return [path]
    number, total = int(match[2]), int(match[3])
    if not 1 <= number <= total or total > _MAX_SPLITS:
        raise CheckpointError(f"{printable(path.name)} is part {number} of {total}, which cannot be")
    files = [path.with_name(f"{match[1]}-{i:05d}-of-{match[3]}{GGUF_SUFFIX}") for i in range(1, total + 1)]
    missing = [printable(file.name) for file in files if not file.exists()]
    if missing:
        raise CheckpointError(f"{path.parent} lacks {format_names(missing)}: the download is incomplete")
    return files


def _check_split(part: GgufSplit, number: int, total: int) -> None:
    fields = part.header.fields
    claimed = (read_uint(fields, "split.no", part.name, 0), read_uint(fields, "split.count", part.name, 0) or 1)
    if claimed[1] != total and total == 1:
        raise CheckpointError(
            f"{part.name} is part {claimed[0] + 1} of {claimed[1]}: put all parts into one folder, "
            "under names that end in -00001-of-00003.gguf and so on"
        )
    if claimed != (number, total):
        raise CheckpointError(
            f"{part.name} should be part {number + 1} of {total} by its name, "
            f"but says that it is part {claimed[0] + 1} of {claimed[1]}"
        )
