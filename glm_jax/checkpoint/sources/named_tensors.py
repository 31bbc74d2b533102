"""A checkpoint of named tensors as a source, whatever files and formats they are in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from glm_jax.checkpoint.folder.layout import Leaf
from glm_jax.checkpoint.formats.base import Stored
from glm_jax.checkpoint.mapping.resolve_config import Settled
from glm_jax.checkpoint.mapping.rules import Slot, assign, load, slot_storage, slots
from glm_jax.checkpoint.sources.base import (
    Kind,
    Original,
    Piece,
    SourceInfo,
    WeightSource,
    main_dtype,
    plain,
    split_runs,
)
from glm_jax.config import Config
from glm_jax.memory import in_gb
from glm_jax.weights import PRESETS, QuantSpec
from glm_jax.weights.params import is_matrix
from glm_jax.weights.storage import quantised_bytes


class Files(Protocol):
    """What is asked of the files behind the tensors."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Harmless oddities worth telling."""
        ...

    def fingerprint(self) -> str:
        """A hash that changes when the weights may have changed."""
        ...

    def modified(self) -> Mapping[str, int]:
        """When each file was last changed, in nanoseconds."""
        ...


class CheckpointSource(WeightSource):
    """Weights by their names in a checkpoint.

    Args:
        weights: by logical name, as :func:`glm_jax.checkpoint.formats.read_formats` gives them.
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
        weights: Mapping[str, Stored],
        config: Mapping[str, Any],
        files: Files,
        *,
        kind: Kind,
        name: str,
        folder: Path | None,
    ) -> None:
        self.hf_config, self._files, self._weights = config, files, weights
        settled = Settled(Config.from_hf(config), weights)
        kept = {tensor: stored for tensor, stored in weights.items() if tensor not in settled.dropped}
        self.cfg = settled.cfg
        self._slots = assign(self.cfg, kept, settled.aliases)
        self._storage: dict[str, QuantSpec | None] = {}
        self.cfg = split_runs(self.cfg, self.storage)
        self.info = SourceInfo(
            kind=kind,
            name=name,
            folder=folder,
            dtype=main_dtype(self),
            original=Original(settled.mtp_copies, settled.head_copy, self._narrow_dtypes()),
            notes=(*files.notes, *settled.notes, *self._unpacked()),
        )

    def fingerprint(self) -> str:
        """Of the files, with pages of every tensor."""
        return self._files.fingerprint()

    def modified(self) -> Mapping[str, int]:
        """Of every file."""
        return self._files.modified()

    def dtype(self, leaf: Leaf) -> np.dtype[Any]:
        """The dtype of the leaf's tensors; float32 where they differ among themselves."""
        if leaf.spec.dtype:
            return np.dtype(leaf.spec.dtype)
        dtypes = {self._weights[self._slots[slot].name].dtype for slot in _slots_of(leaf)}
        return dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)

    def storage(self, leaf: Leaf) -> QuantSpec | None:
        """That of the leaf's tensors, if it is the same for all."""
        key = f"{leaf.part}/{leaf.name}"
        if key not in self._storage:
            # Norms and routers are not held quantised, whatever a file does with them.
            fixed = not is_matrix(leaf.spec) or leaf.path[-1] == "router"
            specs: set[QuantSpec | None] = {None} if fixed else {self._slot_storage(slot) for slot in _slots_of(leaf)}
            self._storage[key] = specs.pop() if len(specs) == 1 else None
        return self._storage[key]

    def _slot_storage(self, slot: Slot) -> QuantSpec | None:
        tensor = self._slots[slot]
        return slot_storage(tensor, self._weights[tensor.name])

    def pieces(self, leaf: Leaf, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, Piece]]:
        """One per expert, or the rows in one piece; plain ones are views."""
        quantised = self.storage(leaf) is not None
        end = leaf.spec.shape[0 if leaf.slot is None else 1] if stop is None else stop
        for slot in _slots_of(leaf):
            expert = slot[2]
            if expert is not None and not start <= expert < end:
                continue
            value = self._load(slot)
            if quantised:
                stacked = value.map(lambda _, array: array[None]) if expert is not None else value
                yield (start, stacked[start:stop]) if expert is None and len(leaf.shape) > 2 else (expert or 0, stacked)
            else:
                array = plain(value)
                yield (start, array[start:stop]) if expert is None else (expert, array[None])

    def _load(self, slot: Slot) -> Any:
        tensor = self._slots[slot]
        return load(tensor, self._weights[tensor.name], slot)

    def _narrow_dtypes(self) -> dict[str, str]:
        fixed = [leaf for members in self.layout().values() for leaf in members if leaf.spec.dtype]
        names = {f"{leaf.part}/{leaf.name}": self._slots[leaf.part, leaf.name, None].name for leaf in fixed}
        own = {key: self._weights[name].dtype.name for key, name in names.items()}
        return {key: dtype for key, dtype in own.items() if dtype != "float32"}

    def _unpacked(self) -> Iterator[str]:
        """A sentence on weights whose format no storage here holds, and what would."""
        packed = {
            leaf: leaf.size
            for members in self.layout().values()
            for leaf in members
            if self.storage(leaf) is None and any(self._is_packed(slot) for slot in _slots_of(leaf))
        }
        if packed:
            sizes = ", ".join(f'"{name}" {in_gb(quantised_bytes(self.cfg, rules))}' for name, rules in PRESETS.items())
            yield (
                f"{sum(packed.values()):,} weights are quantised in ways that cannot be kept as they are (such as "
                f"{next(iter(packed)).name}), and become plain numbers; with quantize (--quantize) the whole model "
                f"would take: {sizes}"
            )

    def _is_packed(self, slot: Slot) -> bool:
        stored = self._weights[self._slots[slot].name]
        return stored.spec is not None or stored.unpacked


def _slots_of(leaf: Leaf) -> Iterator[Slot]:
    return ((leaf.part, leaf.name, row) for row in slots(leaf))
