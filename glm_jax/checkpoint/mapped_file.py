"""Memory-mapped files of tensors, and fingerprints that need not read them whole."""

from __future__ import annotations

import abc
import contextlib
import hashlib
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

from glm_jax.checkpoint.messages import printable
from glm_jax.errors import CheckpointError

SAMPLE_PAGE_BYTES = 4096


class MappedFile(abc.ABC):
    """A file of tensors whose header has been checked; it is mapped when a tensor is first read.

    Attributes:
        path: Path of the file.
        size: Size of the file in bytes when its header was read.
        mtime_ns: Time of the file's last change when its header was read, in nanoseconds.
        digest: SHA-256 of the file's header, in hexadecimal digits.
    """

    path: Path
    size: int
    mtime_ns: int
    digest: str
    _map: mmap.mmap | None = None

    @abc.abstractmethod
    def byte_ranges(self) -> Iterator[tuple[int, int]]:
        """First byte and end of every tensor within the file."""

    def sample_digest(self) -> str:
        """SHA-256 of the header digest and of the sampled pages of every tensor (see :func:`sample_ranges`).

        Raises:
            CheckpointError: If the file cannot be read or has become shorter.
        """
        digest = hashlib.sha256(self.digest.encode())
        # Plain reads: touching a mapped page would bring its neighbors into memory as well.
        with wrap_read_errors(self.path), self.path.open("rb", buffering=0) as file:
            for tensor in self.byte_ranges():
                for begin, end in sample_ranges(*tensor):
                    file.seek(begin)
                    page = file.read(end - begin)
                    if len(page) != end - begin:
                        raise self._changed_error()
                    digest.update(page)
        return digest.hexdigest()

    def _mapped(self) -> mmap.mmap:
        if self._map is None:
            with wrap_read_errors(self.path), self.path.open("rb") as file:
                # A file that was cut since its header was read would kill the process at the first missing page.
                if os.fstat(file.fileno()).st_size != self.size:
                    raise self._changed_error()
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._map

    def _changed_error(self) -> CheckpointError:
        return CheckpointError(f"{printable(self.path.name)} changed while it was being read")


@contextlib.contextmanager
def wrap_read_errors(path: Path) -> Iterator[None]:
    """Turns the operating system's errors inside the block into a :class:`CheckpointError` that names ``path``."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot read {path.parent / printable(path.name)}: {error.strerror}") from None


def sample_ranges(begin: int, end: int) -> list[tuple[int, int]]:
    """Byte ranges of a tensor that are sampled: its first, middle and last page, or all of a small tensor."""
    if end - begin <= 3 * SAMPLE_PAGE_BYTES:
        return [(begin, end)]
    middle = (begin + end - SAMPLE_PAGE_BYTES) // 2
    return [(at, at + SAMPLE_PAGE_BYTES) for at in (begin, middle, end - SAMPLE_PAGE_BYTES)]
