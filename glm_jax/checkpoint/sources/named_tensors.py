"""A checkpoint of named tensors as a source, whatever files and formats they are in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from glm_jax.checkpoint.folder.layout import Leaf
from glm_jax.checkpoint.formats.base import StoredWeight
from glm_jax.checkpoint.mapping.resolve_config import ResolvedConfig
from glm_jax.checkpoint.mapping.rules import ParamSlot, assign_tensors, expert_slots, load_slot, slot_quant_spec
from glm_jax.checkpoint.sources.base import (
    RoundTripInfo,
    SourceInfo,
    SourceKind,
    WeightChunk,
    WeightSource,
    dominant_dtype,
    split_layer_groups,
    to_plain_array,
)
from glm_jax.config import Config
from glm_jax.memory import format_bytes
from glm_jax.weights import QUANT_PRESETS, QuantSpec
from glm_jax.weights.params import is_matrix
from glm_jax.weights.storage import quantized_bytes


class TensorFiles(Protocol):
    """What is asked of the files behind the tensors."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Harmless oddities worth telling."""
        ...

    def fingerprint(self) -> str:
        """A hash that changes when the weights may have changed."""
        ...

    def mtimes_ns(self) -> Mapping[str, int]:
        """When each file was last changed, in nanoseconds."""
        ...


class NamedTensorSource(WeightSource):
    """Weights by their names in a checkpoint.

    Args:
        weights: by logical name, as :func:`glm_jax.checkpoint.formats.read_stored_weights` gives them.
        config: the ``config.json`` they came with.
        files: that they are in.
        kind: of the source.
        name: as it was asked for.
        folder: that holds tokenizer and chat template.

    Raises:
        CheckpointError: if the tensors do not fit the config; all of them are listed together.
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
        settled = ResolvedConfig(Config.from_hf(config), weights)
        kept = {tensor: stored for tensor, stored in weights.items() if tensor not in settled.redundant_tensors}
        self.cfg = settled.cfg
        self._slots = assign_tensors(self.cfg, kept, settled.aliases)
        self._storage: dict[str, QuantSpec | None] = {}
        self.cfg = split_layer_groups(self.cfg, self.quant_spec)
        self.info = SourceInfo(
            kind=kind,
            name=name,
            folder=folder,
            dtype=dominant_dtype(self),
            original=RoundTripInfo(settled.mtp_copies, settled.head_copy, self._original_dtypes()),
            notes=(*files.notes, *settled.notes, *self._dequantized_notes()),
        )

    def fingerprint(self) -> str:
        """Of the files, with pages of every tensor."""
        return self._files.fingerprint()

    def mtimes_ns(self) -> Mapping[str, int]:
        """Of every file."""
        return self._files.mtimes_ns()

    def dtype(self, leaf: Leaf) -> np.dtype[Any]:
        """The dtype of the leaf's tensors; float32 where they differ among themselves."""
        if leaf.spec.dtype:
            return np.dtype(leaf.spec.dtype)
        dtypes = {self._weights[self._slots[slot].name].dtype for slot in _leaf_slots(leaf)}
        return dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)

    def quant_spec(self, leaf: Leaf) -> QuantSpec | None:
        """That of the leaf's tensors, if it is the same for all."""
        key = f"{leaf.checkpoint_name}/{leaf.name}"
        if key not in self._storage:
            # Norms and routers are not held quantized, whatever a file does with them.
            fixed = not is_matrix(leaf.spec) or leaf.path[-1] == "router"
            specs: set[QuantSpec | None] = (
                {None} if fixed else {self._slot_quant_spec(slot) for slot in _leaf_slots(leaf)}
            )
            self._storage[key] = specs.pop() if len(specs) == 1 else None
        return self._storage[key]

    def _slot_quant_spec(self, slot: ParamSlot) -> QuantSpec | None:
        tensor = self._slots[slot]
        return slot_quant_spec(tensor, self._weights[tensor.name])

    def iter_chunks(self, leaf: Leaf, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, WeightChunk]]:
        """One per expert, or the rows in one piece; plain ones are views."""
        quantized = self.quant_spec(leaf) is not None
        end = leaf.spec.shape[0 if leaf.stack_index is None else 1] if stop is None else stop
        for slot in _leaf_slots(leaf):
            expert = slot[2]
            if expert is not None and not start <= expert < end:
                continue
            value = self._load(slot)
            if quantized:
                stacked = value.map(lambda _, array: array[None]) if expert is not None else value
                yield (start, stacked[start:stop]) if expert is None and len(leaf.shape) > 2 else (expert or 0, stacked)
            else:
                array = to_plain_array(value)
                yield (start, array[start:stop]) if expert is None else (expert, array[None])

    def _load(self, slot: ParamSlot) -> Any:
        tensor = self._slots[slot]
        return load_slot(tensor, self._weights[tensor.name], slot)

    def _original_dtypes(self) -> dict[str, str]:
        fixed = [leaf for members in self.layout().values() for leaf in members if leaf.spec.dtype]
        names = {
            f"{leaf.checkpoint_name}/{leaf.name}": self._slots[leaf.checkpoint_name, leaf.name, None].name
            for leaf in fixed
        }
        own = {key: self._weights[name].dtype.name for key, name in names.items()}
        return {key: dtype for key, dtype in own.items() if dtype != "float32"}

    def _dequantized_notes(self) -> Iterator[str]:
        """A sentence on weights whose format no storage here holds, and what would."""
        packed = {
            leaf: leaf.size
            for members in self.layout().values()
            for leaf in members
            if self.quant_spec(leaf) is None and any(self._is_quantized(slot) for slot in _leaf_slots(leaf))
        }
        if packed:
            sizes = ", ".join(
                f'"{name}" {format_bytes(quantized_bytes(self.cfg, rules))}' for name, rules in QUANT_PRESETS.items()
            )
            yield (
                f"{sum(packed.values()):,} weights are quantized in ways that cannot be kept as they are (such as "
                f"{next(iter(packed)).name}), and become plain numbers; with quantize (--quantize) the whole model "
                f"would take: {sizes}"
            )

    def _is_quantized(self, slot: ParamSlot) -> bool:
        stored = self._weights[self._slots[slot].name]
        return stored.spec is not None or stored.is_dequantized


def _leaf_slots(leaf: Leaf) -> Iterator[ParamSlot]:
    return ((leaf.checkpoint_name, leaf.name, row) for row in expert_slots(leaf))
