"""Finds and opens the files of one GGUF model: a single file, or all files of a split set."""

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
    """One GGUF file, possibly one of a split set; opening it reads and checks the header.

    Args:
        path: Path of the file.

    Attributes:
        name: File name, made safe to print.
        header: Metadata fields and tensors of the file.

    Raises:
        CheckpointError: If the file is unreadable, truncated, damaged, or not GGUF.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, printable(path.name)
        with wrap_read_errors(path), path.open("rb") as file:
            status = os.fstat(file.fileno())
            self.size, self.mtime_ns = status.st_size, status.st_mtime_ns
            self.header: GgufHeader = read_gguf_header(file, self.size, self.name)
        self.digest = self.header.digest

    def tensor_bytes(self, info: GgufTensorInfo) -> Array:
        """Returns the bytes of a tensor, ``uint8 [*stack, O, row_bytes]``, as a read-only view of the mapped file."""
        flat = np.frombuffer(self._mapped(), np.uint8, info.end - info.begin, info.begin)
        return flat.reshape(*info.shape[:-1], info.row_bytes)

    def byte_ranges(self) -> Iterator[tuple[int, int]]:
        """First byte and end of every tensor within the file."""
        return ((info.begin, info.end) for info in self.header.tensors.values())


@dataclasses.dataclass(frozen=True, slots=True)
class LocatedTensor:
    """A tensor and the file that holds it."""

    split: GgufSplit
    info: GgufTensorInfo


def open_splits(path: Path) -> tuple[GgufSplit, ...]:
    """Opens the files of a model, in order; the first one holds the model's metadata fields.

    Args:
        path: A file, any file of a split set, or a folder that holds one model.

    Raises:
        CheckpointError: If files are missing, damaged, do not form one set, or belong to several models.
    """
    paths = _split_paths(_find_only_model(path) if path.is_dir() else path)
    splits = tuple(GgufSplit(split_path) for split_path in paths)
    for number, split in enumerate(splits):
        _check_split(split, number, len(splits))
    declared = read_uint(splits[0].header.fields, "split.tensors.count", splits[0].name, 0)
    actual = sum(len(split.header.tensors) for split in splits)
    if declared not in (0, actual):
        raise CheckpointError(f"{splits[0].name} says that its set has {declared} tensors; the files have {actual}")
    return splits


def locate_tensors(splits: tuple[GgufSplit, ...]) -> dict[str, LocatedTensor]:
    """Finds every tensor of the files, by name.

    Raises:
        CheckpointError: If two files hold a tensor of the same name.
    """
    tensors: dict[str, LocatedTensor] = {}
    for split in splits:
        for name, info in split.header.tensors.items():
            if name in tensors:
                raise CheckpointError(f"tensor {printable(name)} is in {tensors[name].split.name} and in {split.name}")
            tensors[name] = LocatedTensor(split, info)
    return tensors


def _find_only_model(folder: Path) -> Path:
    with wrap_read_errors(folder):
        names = sorted(path.name for path in folder.iterdir() if path.name.lower().endswith(GGUF_SUFFIX))
    models: dict[str, str] = {}  # model -> its first file
    for name in names:
        match = _SPLIT_NAME.fullmatch(name)
        models.setdefault(f"{match[1]} of {match[3]}" if match else name, name)
    if not models:
        raise CheckpointError(f"{folder} holds no .gguf file")
    if len(models) > 1:
        first_files = format_names([*map(printable, models.values())])
        raise CheckpointError(f"{folder} holds {len(models)} GGUF models, name one of them: {first_files}")
    return folder / next(iter(models.values()))


def _split_paths(path: Path) -> list[Path]:
    match = _SPLIT_NAME.fullmatch(path.name)
    if match is None:
        return [path]
    number, total = int(match[2]), int(match[3])
    if not 1 <= number <= total or total > _MAX_SPLITS:
        raise CheckpointError(f"{printable(path.name)} is part {number} of {total}, which cannot be")
    paths = [path.with_name(f"{match[1]}-{i:05d}-of-{match[3]}{GGUF_SUFFIX}") for i in range(1, total + 1)]
    missing = [printable(split_path.name) for split_path in paths if not split_path.exists()]
    if missing:
        raise CheckpointError(f"{path.parent} lacks {format_names(missing)}: the download is incomplete")
    return paths


def _check_split(split: GgufSplit, number: int, total: int) -> None:
    """Checks that the file declares the position in the set that its name gives it."""
    fields, name = split.header.fields, split.name
    declared_number = read_uint(fields, "split.no", name, 0)
    declared_total = read_uint(fields, "split.count", name, 0) or 1
    if declared_total != total and total == 1:
        raise CheckpointError(
            f"{name} is part {declared_number + 1} of {declared_total}: put all parts into one folder, "
            "under names that end in -00001-of-00003.gguf and so on"
        )
    if (declared_number, declared_total) != (number, total):
        raise CheckpointError(
            f"{name} should be part {number + 1} of {total} by its name, "
            f"but says that it is part {declared_number + 1} of {declared_total}"
        )
