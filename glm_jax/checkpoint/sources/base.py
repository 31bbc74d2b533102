"""Where weights come from: one interface for Hugging Face folders, converted folders and made-up weights."""

from __future__ import annotations

import abc
import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from glm_jax.checkpoint.folder.layout import MTP, NON_LAYER, DiskArray, Leaf, checkpoint_layout, disk_arrays
from glm_jax.checkpoint.safetensors.header import printable
from glm_jax.config import Config
from glm_jax.errors import CheckpointError
from glm_jax.weights import QuantizedTensor, QuantSpec
from glm_jax.weights.params import leaves_with_path, param_specs
from glm_jax.weights.storage import Storage

Array = np.ndarray[Any, np.dtype[Any]]
WeightChunk = Array | QuantizedTensor
SourceKind = Literal["huggingface", "gguf", "converted", "synthetic", "memory"]

# What lies beside the weights and goes wherever they go.
ASSET_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclasses.dataclass(frozen=True, slots=True)
class RoundTripInfo:
    """What a checkpoint had that its parameters do not show, so that it can be written back bit for bit.

    Attributes:
        mtp_copies: which of "embed" and "head" the prediction layer had tensors for.
        head_copy: whether a model with tied embeddings had a head tensor all the same.
        dtypes: dtype in the checkpoint of arrays that are kept in another one, by ``part/name``.
    """

    mtp_copies: tuple[str, ...] = ()
    head_copy: bool = False
    dtypes: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class SourceInfo:
    """What is known of a source besides its weights.

    Attributes:
        kind: of the source.
        name: as it was asked for.
        folder: that holds its tokenizer, chat template and generation_config.json; ``None`` if it has none.
        dtype: of most of its weights.
        original: what is needed to write the checkpoint back as it was.
        notes: sentences worth telling the user.
        keep_alive: what the folder needs to stay, where it is a temporary one.
    """

    kind: SourceKind
    name: str
    folder: Path | None
    dtype: str
    original: RoundTripInfo = dataclasses.field(default_factory=RoundTripInfo)
    notes: tuple[str, ...] = ()
    keep_alive: Any = dataclasses.field(default=None, repr=False, compare=False)


class WeightSource(abc.ABC):
    """The weights of one model, read array by array and piece by piece.

    Attributes:
        cfg: architecture, as the tensors show it (without a prediction layer if there are no tensors for one).
        info: everything else that is known.
        hf_config: the ``config.json`` it came with.
    """

    cfg: Config
    info: SourceInfo
    hf_config: Mapping[str, Any]

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """A hash that changes when the weights may have changed; may read a sample of them."""

    @abc.abstractmethod
    def dtype(self, leaf: Leaf) -> np.dtype[Any]:
        """Dtype in which the array is kept without loss."""

    @abc.abstractmethod
    def iter_chunks(self, leaf: Leaf, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, WeightChunk]]:
        """Rows ``start`` to ``stop`` of the array's first axis, in order, as (first row, rows) pieces.

        Pieces may be read-only views, and of a narrower dtype than :meth:`dtype`. Those of an array that
        :meth:`quant_spec` knows are :class:`~glm_jax.weights.QuantizedTensor` of whole matrices, or of rows where
        every row has its own scales.

        Raises:
            CheckpointError: if the bytes are not there or damaged.
        """

    def quant_spec(self, leaf: Leaf) -> QuantSpec | None:
        """How the array is quantized; None for a plain one."""
        del leaf
        return None

    def mtimes_ns(self) -> Mapping[str, int]:
        """When the files of weights were last changed, in nanoseconds, where the fingerprint cannot see every byte."""
        return {}

    def sha256(self, leaf: Leaf, component: str = "") -> str | None:
        """Known hash of the bytes of an array (of a quantized one: of one component), if the source keeps one."""
        del leaf, component
        return None

    def layout(self) -> dict[str, tuple[Leaf, ...]]:
        """The arrays of each part."""
        return checkpoint_layout(self.cfg)

    def nbytes(self, leaf: Leaf, dtype: np.dtype[Any] | None = None) -> int:
        """Bytes of the array, in its own dtype or the one a conversion would give it."""
        if spec := self.quant_spec(leaf):
            return spec.nbytes(leaf.shape)
        return leaf.size * output_dtype(self, leaf, dtype).itemsize

    def total_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(self.nbytes(leaf) for members in self.layout().values() for leaf in members)

    # A source that computes its weights while they are written, as learned rounding does, overrides what follows.

    def unquantized(self) -> WeightSource:
        """The source of the values before any quantization on the way."""
        return self

    def start_conversion(self, folder: Path, *, keep_all: bool) -> None:
        """Prepares to be written to ``folder``; ``keep_all`` keeps the state of every layer, not of the newest only."""
        del folder, keep_all

    def on_progress(self, advance: Callable[[float], None]) -> None:
        """Tells ``advance`` the share that is done of a layer that takes long to compute."""
        del advance

    def memory_bytes(self) -> int:
        """Memory that computing the largest layer takes, estimated; 0 if nothing is computed."""
        return 0

    def require_memory(self) -> None:
        """Raises :class:`~glm_jax.errors.MemoryPlanError` if the largest layer cannot be computed."""
        return

    def state_bytes(self) -> int:
        """Bytes kept on disk between layers, at most."""
        return 0

    def conversion_notes(self) -> tuple[str, ...]:
        """Sentences about what became of each layer."""
        return ()


def output_dtype(source: WeightSource, leaf: Leaf, dtype: np.dtype[Any] | None) -> np.dtype[Any]:
    """Dtype of an array after conversion to ``dtype`` (``None``: unchanged); some arrays have a fixed one."""
    if leaf.spec.dtype:
        return np.dtype(leaf.spec.dtype)
    return source.dtype(leaf) if dtype is None else dtype


def source_storage(source: WeightSource, cfg: Config | None = None) -> Storage:
    """The quantized parameters of a source, under a config with the same runs (its own unless given)."""
    return build_storage(cfg or source.cfg, source.quant_spec)


def build_storage(cfg: Config, storage: Callable[[Leaf], QuantSpec | None]) -> Storage:
    """The quantized parameters of a model whose runs are layers of one storage each."""
    specs = {leaf.param_path: storage(leaf) for members in checkpoint_layout(cfg).values() for leaf in members}
    wanted = (path for path, _ in leaves_with_path(param_specs(cfg)))
    return Storage(tuple((path, spec) for path in wanted if (spec := specs.get(path))))


def split_layer_groups(cfg: Config, storage: Callable[[Leaf], QuantSpec | None]) -> Config:
    """The config with a new run wherever a layer's weights are stored otherwise than those of the layer before."""
    plain = cfg.replace(run_starts=())
    kinds = [
        tuple((leaf.name, storage(leaf)) for leaf in members)
        for part, members in checkpoint_layout(plain).items()
        if part not in (MTP, NON_LAYER)
    ]
    same_kind = [i for i in range(1, len(kinds)) if cfg.mlp_layer_types[i] == cfg.mlp_layer_types[i - 1]]
    return plain.replace(run_starts=tuple(i for i in same_kind if kinds[i] != kinds[i - 1]))


def to_plain_array(chunk: WeightChunk) -> Array:
    """The values of a piece as an array, those of quantized ones in float32."""
    return np.asarray(chunk) if isinstance(chunk, QuantizedTensor) else chunk


def build_array(source: WeightSource, leaf: Leaf, dtype: np.dtype[Any] | None = None) -> Array:
    """A whole array, contiguous; without a copy where the source has it in one piece."""
    target = output_dtype(source, leaf, dtype)
    out: Array | None = None
    for start, piece in source.iter_chunks(leaf):
        piece = to_plain_array(piece)
        if piece.shape == leaf.shape and piece.dtype == target and piece.flags.c_contiguous:
            return piece
        out = np.empty(leaf.shape, target) if out is None else out
        out[start : start + len(piece)] = piece
    return np.empty(leaf.shape, target) if out is None else out


def build_disk_arrays(source: WeightSource, leaf: Leaf, dtype: np.dtype[Any] | None = None) -> dict[DiskArray, Array]:
    """The arrays that a leaf is on disk, contiguous."""
    spec = source.quant_spec(leaf)
    places = disk_arrays(leaf, spec)
    if spec is None:
        return {places[0]: np.ascontiguousarray(build_array(source, leaf, dtype))}
    arrays = {place: np.empty(place.shape, place.dtype) for place in places}
    for row, piece in source.iter_chunks(leaf):
        for place, array in arrays.items():
            part = np.atleast_1d(np.asarray(getattr(piece, place.component)))
            # A row of scales, or a permutation, may serve all rows of a matrix.
            start = row if len(array) == leaf.shape[0] else 0
            array[start : start + len(part)] = part
    return arrays


def dominant_dtype(source: WeightSource) -> str:
    """Dtype of most of a source's values."""
    counts: Counter[str] = Counter()
    for members in source.layout().values():
        for leaf in members:
            counts[source.dtype(leaf).name] += math.prod(leaf.shape)
    return counts.most_common(1)[0][0]


def read_hf_config(folder: Path) -> dict[str, Any]:
    """The dictionary of a folder's ``config.json``.

    Raises:
        CheckpointError: if it is missing or not a JSON object.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no config.json, so it is not a checkpoint folder") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({printable(str(error))})") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return config
