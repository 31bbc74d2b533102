"""Reads folders of safetensors files lazily and memory-mapped, with NumPy and ml_dtypes alone.

Opening a folder reads headers only. Tensors are read-only views of mapped files, so nothing is copied and the
operating system can drop the pages again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from glm_jax.checkpoint.mapped_file import MappedFile, wrap_read_errors
from glm_jax.checkpoint.messages import format_names, printable
from glm_jax.checkpoint.safetensors.header import (
    HEADER_LENGTH_BYTES,
    SafetensorsHeader,
    TensorInfo,
    parse_header,
    parse_header_length,
)
from glm_jax.errors import CheckpointError

Array = np.ndarray[Any, np.dtype[Any]]

INDEX_NAME = "model.safetensors.index.json"
MAX_NAME_BYTES = 255  # limit for file names on every common system
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors")


class SafetensorsFile(MappedFile):
    """One safetensors file; opening it reads and checks the header.

    Args:
        path: Path of the file.

    Attributes:
        header: Tensors and metadata of the file.

    Raises:
        CheckpointError: If the file is unreadable, truncated, damaged, or not safetensors.
    """

    def __init__(self, path: Path) -> None:
        self.path, name = path, printable(path.name)
        with wrap_read_errors(path), path.open("rb") as file:
            status = os.fstat(file.fileno())
            self.size, self.mtime_ns = status.st_size, status.st_mtime_ns
            length = parse_header_length(file.read(HEADER_LENGTH_BYTES), self.size, name)
            raw = file.read(length)
        self.header: SafetensorsHeader = parse_header(raw, self.size, name)
        self.digest = hashlib.sha256(raw).hexdigest()

    def get_tensor(self, name: str) -> Array:
        """Returns the tensor as a read-only view of the mapped file."""
        info = self.header.tensors[name]
        if info.begin == info.end:
            return np.empty(info.shape, info.dtype)
        raw = np.frombuffer(self._mapped(), np.uint8, info.end - info.begin, info.begin)
        return raw.view(info.dtype).reshape(info.shape)

    def byte_ranges(self) -> Iterator[tuple[int, int]]:
        """First byte and end of every tensor within the file."""
        return ((info.begin, info.end) for info in self.header.tensors.values())


@dataclasses.dataclass(frozen=True, slots=True)
class SafetensorsReader:
    """All tensors of a folder of safetensors files, by name.

    Attributes:
        folder: Folder that holds the files.
        shards: Opened files by file name.
        weight_map: File name of each tensor, by tensor name.
        notes: Harmless oddities to report to the user.
    """

    folder: Path
    shards: Mapping[str, SafetensorsFile]
    weight_map: Mapping[str, str]
    notes: tuple[str, ...] = ()

    @classmethod
    def open(cls, folder: Path) -> SafetensorsReader:
        """Opens every shard of a folder and checks that they form one checkpoint.

        Raises:
            CheckpointError: For pickle files, missing or damaged shards, tensors in two shards, and an index that
                disagrees with the shards.
        """
        index = _read_index(folder)
        files = _find_all_shards(folder) if index is None else _indexed_files(index, folder)
        shards = {name: SafetensorsFile(folder / name) for name in files}
        weight_map = _build_weight_map(shards)
        if index is not None:
            _check_index(index["weight_map"], weight_map)
        return cls(folder, shards, weight_map, _total_size_notes(index, shards))

    def __contains__(self, name: str) -> bool:
        return name in self.weight_map

    def __iter__(self) -> Iterator[str]:
        return iter(self.weight_map)

    def tensor_info(self, name: str) -> TensorInfo:
        """Dtype, shape and byte range of a tensor."""
        return self.shards[self.weight_map[name]].header.tensors[name]

    def get_tensor(self, name: str) -> Array:
        """Returns a whole tensor as a read-only view; its bytes are read when they are first used."""
        return self.shards[self.weight_map[name]].get_tensor(name)

    def fingerprint(self) -> str:
        """SHA-256 of every shard's name, size and header, and of three pages of every tensor.

        Any training that updates whole tensors changes the fingerprint. A few bytes changed between the sampled pages
        do not; a stopped conversion notices those by :meth:`mtimes_ns`, a finished conversion with ``--check``.
        """
        lines = [f"{name} {shard.size} {shard.sample_digest()}" for name, shard in sorted(self.shards.items())]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def mtimes_ns(self) -> dict[str, int]:
        """Time of each shard's last change in nanoseconds, by file name."""
        return {name: shard.mtime_ns for name, shard in sorted(self.shards.items())}


def reject_pickle(path: Path) -> None:
    """Rejects a file whose suffix marks it as a pickle, because loading a pickle can run code.

    Raises:
        CheckpointError: If the file has such a suffix.
    """
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise CheckpointError(
            f"{printable(path.name)} is a pickle file, and loading one can run any code: "
            "convert it to safetensors first"
        )


def _find_weight_files(folder: Path) -> list[str]:
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"cannot read {folder}: {error.strerror}") from None
    files = [name for name in names if name.endswith(".safetensors")]
    if not files:
        for name in names:
            reject_pickle(folder / name)
        raise CheckpointError(f"{folder} holds no weights: expected *.safetensors files")
    # Some repositories hold other weights too, such as adapters or a copy in another layout.
    return [name for name in files if name.startswith("model")] or files


def _find_all_shards(folder: Path) -> list[str]:
    """Weight files of a folder without an index, complete according to their ``-00001-of-00002`` names."""
    files = _find_weight_files(folder)
    for name in files:
        match = _SHARD.fullmatch(name)
        if match is None:
            continue
        stem, width, total = match[1], len(match[2]), int(match[3])
        expected = {f"{stem}-{i:0{width}d}-of-{match[3]}.safetensors" for i in range(1, min(total, 100_000) + 1)}
        _reject_missing(sorted(expected - set(files)), folder)
    return files


def _reject_missing(missing: list[str], folder: Path) -> None:
    if missing:
        raise CheckpointError(f"{folder} lacks {format_names([*map(printable, missing)])}: the download is incomplete")


def _read_index(folder: Path) -> dict[str, Any] | None:
    path = folder / INDEX_NAME
    try:
        index = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({printable(str(error))})") from None
    weights = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weights, dict) or not weights or not all(isinstance(v, str) for v in weights.values()):
        raise CheckpointError(f"{path} has no weight_map from tensor names to file names")
    return index


def _indexed_files(index: Mapping[str, Any], folder: Path) -> list[str]:
    files = sorted(set(index["weight_map"].values()))
    for name in files:
        reject_pickle(Path(name))
        if not _is_file_name(name) or not name.endswith(".safetensors"):
            raise CheckpointError(f"{INDEX_NAME} names {printable(name)}, which is not a safetensors file beside it")
    _reject_missing([name for name in files if not os.path.exists(folder / name)], folder)
    return files


def _is_file_name(name: str) -> bool:
    # A printable name has no control characters or lone surrogates, so it can be encoded too.
    return Path(name).name == name and name.isprintable() and len(name.encode()) <= MAX_NAME_BYTES


def _build_weight_map(shards: Mapping[str, SafetensorsFile]) -> dict[str, str]:
    weight_map: dict[str, str] = {}
    duplicates: list[str] = []
    for file, shard in shards.items():
        for name in shard.header.tensors:
            if name in weight_map:
                duplicates.append(f"{printable(name)} (in {printable(weight_map[name])} and {printable(file)})")
            weight_map.setdefault(name, file)
    if duplicates:
        raise CheckpointError(f"tensors that are in two files: {format_names(duplicates)}")
    return weight_map


def _check_index(listed: Mapping[str, str], actual: Mapping[str, str]) -> None:
    """Compares the index's weight map with the weight map of the files themselves."""
    problems = []
    absent = [f"{printable(name)} ({file})" for name, file in listed.items() if actual.get(name) != file]
    if absent:
        problems.append(f"the index lists tensors that are not in the file it names: {format_names(absent)}")
    unlisted = [f"{printable(name)} ({printable(file)})" for name, file in actual.items() if name not in listed]
    if unlisted:
        problems.append(f"the files hold tensors that the index does not list: {format_names(unlisted)}")
    if problems:
        raise CheckpointError("; ".join(problems))


def _total_size_notes(index: Mapping[str, Any] | None, shards: Mapping[str, SafetensorsFile]) -> tuple[str, ...]:
    metadata = index.get("metadata") if index else None
    claimed = metadata.get("total_size") if isinstance(metadata, dict) else None
    actual = sum(info.end - info.begin for shard in shards.values() for info in shard.header.tensors.values())
    # Some writers count tied tensors twice, so a wrong total alone says nothing about the weights.
    return () if claimed in (None, actual) else (f"{INDEX_NAME} says {claimed} bytes, the files hold {actual}",)
