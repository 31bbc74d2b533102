"""The source for checkpoints of named tensors, in any file type and weight format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from glm_jax.checkpoint.folder.layout import Leaf
from glm_jax.checkpoint.formats.base import StoredWeight
from glm_jax.checkpoint.mapping.assignment import assign_tensors, load_slot, slot_quant_spec
from glm_jax.checkpoint.mapping.matching import ParamSlot, leaf_slots
from glm_jax.checkpoint.mapping.resolve_config import ResolvedConfig
from glm_jax.checkpoint.round_trip import RoundTripInfo
from glm_jax.checkpoint.sources.base import SourceInfo, SourceKind, WeightChunk, WeightSource
from glm_jax.checkpoint.sources.build import dominant_dtype, to_plain_array
from glm_jax.checkpoint.sources.storage import split_layer_groups
from glm_jax.config import Config
from glm_jax.memory import format_bytes
from glm_jax.weights import QUANT_PRESETS, QuantizedTensor, QuantSpec
from glm_jax.weights.params import is_matrix
from glm_jax.weights.storage import quantized_bytes


class TensorFiles(Protocol):
    """The files that hold the tensors."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for the user about harmless irregularities."""
        ...

    def fingerprint(self) -> str:
        """Returns a hash that changes when the weights may have changed."""
        ...

    def mtimes_ns(self) -> Mapping[str, int]:
        """Returns each file's modification time in nanoseconds."""
        ...


class NamedTensorSource(WeightSource):
    """Weights of a checkpoint that stores them as named tensors.

    Args:
        weights: Weights by tensor name, such as :func:`glm_jax.checkpoint.formats.read_stored_weights` returns.
        config: Contents of the checkpoint's ``config.json``.
        files: Files that hold the tensors.
        kind: Kind of checkpoint.
        name: Source as the user wrote it.
        folder: Folder with tokenizer and chat template.

    Raises:
        CheckpointError: if tensors do not fit the config; lists them all.
        ConfigError: for a config that this stack cannot run.
    """

    def __init__(
        self,
        weights: Mapping[str, StoredWeight],
        config: Mapping[str, Any],
        files: TensorFiles,
        *,
        kind: SourceKind,
        name: str,
        folder: Path | None,
    ) -> None:
        self.hf_config, self._files, self._weights = config, files, weights
        resolved = ResolvedConfig(Config.from_hf(config), weights)
        required = {tensor: stored for tensor, stored in weights.items() if tensor not in resolved.redundant_tensors}
        self.cfg = resolved.cfg
        self._slots = assign_tensors(self.cfg, required, resolved.aliases)
        self._quant_specs: dict[str, QuantSpec | None] = {}
        self.cfg = split_layer_groups(self.cfg, self.quant_spec)
        self.info = SourceInfo(
            kind=kind,
            name=name,
            folder=folder,
            dtype=dominant_dtype(self),
            original=RoundTripInfo(resolved.mtp_copies, resolved.head_copy, self._original_dtypes()),
            notes=(*files.notes, *resolved.notes, *self._dequantized_notes()),
        )

    def fingerprint(self) -> str:
        """Returns the fingerprint of the files, which samples pages of every tensor."""
        return self._files.fingerprint()

    def mtimes_ns(self) -> Mapping[str, int]:
        """Returns the modification time of every file in nanoseconds."""
        return self._files.mtimes_ns()

    def dtype(self, leaf: Leaf) -> np.dtype[Any]:
        """Returns the common dtype of the array's tensors; float32 if they differ."""
        if leaf.spec.dtype:
            return np.dtype(leaf.spec.dtype)
        dtypes = {self._weights[self._slots[slot].name].dtype for slot in leaf_slots(leaf)}
        return dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)

    def quant_spec(self, leaf: Leaf) -> QuantSpec | None:
        """Returns the storage of the array's tensors if all share one; ``None`` otherwise."""
        key = f"{leaf.checkpoint_name}/{leaf.name}"
        if key not in self._quant_specs:
            # Norms and routers are always loaded plain, even if a file has them quantized.
            fixed = not is_matrix(leaf.spec) or leaf.path[-1] == "router"
            specs: set[QuantSpec | None] = (
                {None} if fixed else {self._slot_quant_spec(slot) for slot in leaf_slots(leaf)}
            )
            self._quant_specs[key] = specs.pop() if len(specs) == 1 else None
        return self._quant_specs[key]

    def _slot_quant_spec(self, slot: ParamSlot) -> QuantSpec | None:
        tensor = self._slots[slot]
        return slot_quant_spec(tensor, self._weights[tensor.name])

    def iter_chunks(self, leaf: Leaf, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, WeightChunk]]:
        """Yields one chunk per expert, or all rows as one chunk; plain chunks are views of the file."""
        quantized = self.quant_spec(leaf) is not None
        end = leaf.spec.shape[0 if leaf.stack_index is None else 1] if stop is None else stop
        for slot in leaf_slots(leaf):
            expert = slot.expert
            if expert is not None and not start <= expert < end:
                continue
            weight = self._load(slot)
            if not quantized:
                array = to_plain_array(weight)
                yield (start, array[start:stop]) if expert is None else (expert, array[None])
            elif expert is not None:
                yield expert, cast(QuantizedTensor, weight).map_components(lambda _, array: array[None])
            elif len(leaf.shape) > 2:
                yield start, weight[start:stop]
            else:  # rows of one quantized matrix may share scales
                yield 0, weight

    def _load(self, slot: ParamSlot) -> WeightChunk:
        tensor = self._slots[slot]
        return load_slot(tensor, self._weights[tensor.name], slot)

    def _original_dtypes(self) -> dict[str, str]:
        fixed = [leaf for members in self.layout().values() for leaf in members if leaf.spec.dtype]
        names = {
            f"{leaf.checkpoint_name}/{leaf.name}": self._slots[ParamSlot(leaf.checkpoint_name, leaf.name, None)].name
            for leaf in fixed
        }
        own = {key: self._weights[name].dtype.name for key, name in names.items()}
        return {key: dtype for key, dtype in own.items() if dtype != "float32"}

    def _dequantized_notes(self) -> Iterator[str]:
        """Yields a note if weights must be dequantized because no storage matches their format."""
        dequantized = {
            leaf: leaf.size
            for members in self.layout().values()
            for leaf in members
            if self.quant_spec(leaf) is None and any(self._is_quantized(slot) for slot in leaf_slots(leaf))
        }
        if dequantized:
            sizes = ", ".join(
                f'"{name}" {format_bytes(quantized_bytes(self.cfg, rules))}' for name, rules in QUANT_PRESETS.items()
            )
            yield (
                f"{sum(dequantized.values()):,} weights are quantized in ways that cannot be kept as they are (such as "
                f"{next(iter(dequantized)).name}), and become plain numbers; with quantize (--quantize) the whole "
                f"model would take: {sizes}"
            )

    def _is_quantized(self, slot: ParamSlot) -> bool:
        stored = self._weights[self._slots[slot].name]
        return stored.spec is not None or stored.is_dequantized
