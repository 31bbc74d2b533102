"""The library code of the training data: the standard library of the running Python interpreter."""

from __future__ import annotations

import dataclasses
import hashlib
import sysconfig
from pathlib import Path

HELD_OUT_SHARE = 0.05
# Third-party packages, tables of character codes, generated text and demos teach little Python.
SKIPPED_FOLDERS = frozenset({"site-packages", "__pycache__", "encodings", "idlelib", "pydoc_data", "turtledemo"})
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")


@dataclasses.dataclass(frozen=True, slots=True)
class LibraryFile:
    """A source file: its path inside the library, its text, and the sha256 of its bytes."""

    name: str
    text: str
    sha256: str

    @property
    def held_out(self) -> bool:
        """Whether the file is held out for the evaluation; depends on its name only."""
        hash_value = int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:4], "big")
        return hash_value < HELD_OUT_SHARE * 2**32


def library_files(root: Path | None = None) -> list[LibraryFile]:
    """Reads the ``*.py`` files of a library folder (default: the interpreter's), sorted by name.

    Empty files, files that are not UTF-8 (fixtures of encoding tests) and repeated contents are left out.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    seen: set[str] = set()
    files: list[LibraryFile] = []
    for path in sorted(root.rglob("*.py")):
        file = _read(path, root)
        if file is not None and file.sha256 not in seen:
            seen.add(file.sha256)
            files.append(file)
    return files


def split_held_out(files: list[LibraryFile]) -> tuple[list[LibraryFile], list[LibraryFile]]:
    """Splits files into training files and held-out files."""
    return [f for f in files if not f.held_out], [f for f in files if f.held_out]


def _read(path: Path, root: Path) -> LibraryFile | None:
    relative = path.relative_to(root)
    if SKIPPED_FOLDERS.intersection(relative.parts) or relative.parts[0].startswith(SKIPPED_PREFIXES):
        return None
    data = path.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return None
    return LibraryFile(relative.as_posix(), text, hashlib.sha256(data).hexdigest()) if data else None
