"""The interface of all weight sources, and the records that describe a source."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from glm_jax.checkpoint.folder.layout import Leaf, checkpoint_layout
from glm_jax.checkpoint.round_trip import RoundTripInfo
from glm_jax.config import Config
from glm_jax.weights import QuantizedTensor, QuantSpec

Array = np.ndarray[Any, np.dtype[Any]]
WeightChunk = Array | QuantizedTensor
SourceKind = Literal["huggingface", "gguf", "converted", "synthetic", "memory"]


@dataclasses.dataclass(frozen=True, slots=True)
class SourceInfo:
    """Description of a source, without its weights.

    Attributes:
        kind: Kind of checkpoint.
        name: Source as the user wrote it.
        folder: Folder with tokenizer, chat template and generation_config.json; ``None`` if there is none.
        dtype: Dtype of most of the weights.
        original: Properties needed to write the checkpoint back bit for bit.
        notes: Sentences for the user.
        keep_alive: Owner of ``folder`` where that is temporary; the folder is deleted with it.
    """

    kind: SourceKind
    name: str
    folder: Path | None
    dtype: str
    original: RoundTripInfo = dataclasses.field(default_factory=RoundTripInfo)
    notes: tuple[str, ...] = ()
    keep_alive: object = dataclasses.field(default=None, repr=False, compare=False)


class WeightSource(abc.ABC):
    """The weights of one model, read array by array and chunk by chunk.

    Attributes:
        cfg: Architecture according to the tensors; without a prediction layer if it has no tensors.
        info: Description of the source.
        hf_config: Contents of the source's ``config.json``.
    """

    cfg: Config
    info: SourceInfo
    hf_config: Mapping[str, Any]

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Returns a hash that changes when the weights may have changed; may read a sample of them."""

    @abc.abstractmethod
    def dtype(self, leaf: Leaf) -> np.dtype[Any]:
        """Returns the dtype that holds the array without loss."""

    @abc.abstractmethod
    def iter_chunks(self, leaf: Leaf, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, WeightChunk]]:
        """Yields rows ``start`` to ``stop`` of the array's first axis, in order, as pairs (first row, chunk).

        Chunks may be read-only views, and may have a narrower dtype than :meth:`dtype`. An array for which
        :meth:`quant_spec` returns a spec comes as :class:`~glm_jax.weights.QuantizedTensor` chunks: whole matrices, or
        rows where each row has its own scales.

        Raises:
            CheckpointError: if the bytes are missing or damaged.
        """

    def quant_spec(self, leaf: Leaf) -> QuantSpec | None:
        """Returns how the array is quantized; ``None`` for a plain array."""
        del leaf
        return None

    def mtimes_ns(self) -> Mapping[str, int]:
        """Returns each weight file's modification time in nanoseconds, if the fingerprint does not cover every byte."""
        return {}

    def sha256(self, leaf: Leaf, component: str = "") -> str | None:
        """Returns the recorded SHA-256 of an array, or of a component of a quantized one; ``None`` if unknown."""
        del leaf, component
        return None

    def layout(self) -> dict[str, tuple[Leaf, ...]]:
        """Returns the arrays of each layer checkpoint, by the layer checkpoint's name."""
        return checkpoint_layout(self.cfg)

    def output_dtype(self, leaf: Leaf, dtype: np.dtype[Any] | None) -> np.dtype[Any]:
        """Returns the array's dtype after a conversion to ``dtype``; ``None`` keeps each array's own.

        Some parameters have a fixed dtype, which no conversion changes.
        """
        if leaf.spec.dtype:
            return np.dtype(leaf.spec.dtype)
        return self.dtype(leaf) if dtype is None else dtype

    def nbytes(self, leaf: Leaf, dtype: np.dtype[Any] | None = None) -> int:
        """Returns the array's size in bytes after a conversion to ``dtype``; ``None`` keeps the array's own."""
        if spec := self.quant_spec(leaf):
            return spec.nbytes(leaf.shape)
        return leaf.size * self.output_dtype(leaf, dtype).itemsize

    def total_bytes(self) -> int:
        """Returns the size of all arrays in bytes."""
        return sum(self.nbytes(leaf) for members in self.layout().values() for leaf in members)

    # Sources that compute weights during a conversion, such as learned rounding, override the methods below.

    def unquantized(self) -> WeightSource:
        """Returns the source of the values before this source quantizes them."""
        return self

    def start_conversion(self, folder: Path, *, keep_all: bool) -> None:
        """Prepares for a conversion into ``folder``; ``keep_all`` keeps every layer's state, not just the newest."""
        del folder, keep_all

    def on_progress(self, advance: Callable[[float], None]) -> None:
        """Registers a callback that receives each newly finished fraction (0 to 1) of the layer being computed."""
        del advance

    def memory_bytes(self) -> int:
        """Estimates the memory in bytes for computing the largest layer; 0 if nothing is computed."""
        return 0

    def require_memory(self) -> None:
        """Checks that the largest layer can be computed.

        Raises:
            MemoryPlanError: if memory is too small.
        """
        return

    def state_bytes(self) -> int:
        """Returns the largest number of bytes kept on disk between layers."""
        return 0

    def conversion_notes(self) -> tuple[str, ...]:
        """Returns sentences about the layers computed so far."""
        return ()
