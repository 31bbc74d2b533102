"""A folder as Hugging Face repositories have it, read through the rule table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.header import TensorEntry
from convert.layout import Leaf
from convert.quantised import refuse_quantised
from convert.reader import Array, Reader
from convert.rules import Slot, Tensor, assign, slots, split
from convert.source import Original, SourceInfo, WeightSource, main_dtype, read_config
from glm_jax.config import Config
from glm_jax.errors import CheckpointError

_COMPARE_ROWS = 4096
_COPIES = {"embed": "embed_tokens.weight", "head": "shared_head.head.weight"}
_PREDICTION_ONLY = ("enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight")


class HuggingFaceSource(WeightSource):
    """Weights of a safetensors folder, as zero-copy views of its files.

    Raises:
        CheckpointError: for anything wrong with the folder; tensors that do not fit the config are listed together.
        ConfigError: for a ``config.json`` that this stack cannot run.
    """

    def __init__(self, folder: Path, name: str | None = None) -> None:
        self.hf_config = read_config(folder)
        self._reader = Reader.open(folder)
        entries = {tensor: self._reader.entry(tensor) for tensor in self._reader}
        refuse_quantised(self.hf_config, entries, folder)
        settled = _Settled(Config.from_hf(self.hf_config), self._reader)
        self.cfg = settled.cfg
        kept = {tensor: entry for tensor, entry in entries.items() if tensor not in settled.dropped}
        self._slots = assign(self.cfg, kept, settled.aliases)
        self.info = SourceInfo(
            kind="huggingface",
            name=name or str(folder),
            folder=folder,
            dtype=main_dtype(self),
            original=Original(settled.mtp_copies, settled.head_copy, self._narrow_dtypes(kept)),
            notes=(*self._reader.notes, *settled.notes),
        )

    def fingerprint(self) -> str:
        """Of the files, with pages of every tensor."""
        return self._reader.fingerprint()

    def modified(self) -> Mapping[str, int]:
        """Of every shard."""
        return self._reader.modified()

    def dtype(self, leaf: Leaf) -> np.dtype[Any]:
        """The dtype of the leaf's tensors; float32 where they differ among themselves."""
        if leaf.spec.dtype:
            return np.dtype(leaf.spec.dtype)
        dtypes = {self._reader.entry(self._slots[slot].name).dtype for slot in _slots_of(leaf)}
        return dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)

    def pieces(self, leaf: Leaf, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, Array]]:
        """Views: one per expert, or the rows in one piece."""
        for slot in _slots_of(leaf):
            expert = slot[2]
            if expert is None:
                yield start, self._view(slot)[start:stop]
            elif start <= expert < (leaf.shape[0] if stop is None else stop):
                yield expert, self._view(slot)[None]

    def _view(self, slot: Slot) -> Array:
        tensor: Tensor = self._slots[slot]
        return split(tensor, self._reader.get(tensor.name), slot)

    def _narrow_dtypes(self, entries: Mapping[str, TensorEntry]) -> dict[str, str]:
        fixed = [leaf for members in self.layout().values() for leaf in members if leaf.spec.dtype]
        names = {f"{leaf.part}/{leaf.name}": self._slots[leaf.part, leaf.name, None].name for leaf in fixed}
        own = {key: entries[name].dtype.name for key, name in names.items()}
        return {key: dtype for key, dtype in own.items() if dtype != "float32"}


def _slots_of(leaf: Leaf) -> Iterator[Slot]:
    return ((leaf.part, leaf.name, row) for row in slots(leaf))


class _Settled:
    """What only the tensors can tell: whether there is a prediction layer, and which tensors are mere copies."""

    def __init__(self, cfg: Config, reader: Reader) -> None:
        self.cfg, self._reader = cfg, reader
        self.dropped: set[str] = set()
        self.aliases: dict[str, str] = {}
        self.notes: list[str] = []
        self.mtp_copies: tuple[str, ...] = ()
        self._mains = {"embed": "model.embed_tokens.weight", "head": "lm_head.weight"}
        self.head_copy = self._settle_head()
        self._settle_prediction()
        if self.cfg.num_nextn_predict_layers:
            self._settle_copies()

    def _settle_head(self) -> bool:
        """Whether a tied model has a head tensor, which must then be the embedding."""
        head, embed = self._mains["head"], self._mains["embed"]
        if not self.cfg.tie_word_embeddings:
            return False
        self._mains["head"] = embed
        if head not in self._reader:
            return False
        if not self._same(head, embed):
            raise CheckpointError(
                "config.json says tie_word_embeddings, but lm_head.weight differs from model.embed_tokens.weight: "
                "set tie_word_embeddings to false, or remove the tensor"
            )
        self.dropped.add(head)
        return True

    def _settle_prediction(self) -> None:
        layer = self.cfg.num_hidden_layers
        prefix = f"model.layers.{layer}."
        claimed = self.cfg.num_nextn_predict_layers == 1
        if claimed and not any(name.startswith(prefix) for name in self._reader):
            self.cfg = self.cfg.replace(num_nextn_predict_layers=0)
            self.notes.append(f"layer {layer} (multi-token prediction) has no tensors here: loaded without it")
        elif not claimed and any(prefix + name in self._reader for name in _PREDICTION_ONLY):
            self.cfg = self.cfg.replace(num_nextn_predict_layers=1)
            self.notes.append(f"layer {layer} (multi-token prediction) is here although config.json does not say so")

    def _settle_copies(self) -> None:
        prefix = f"model.layers.{self.cfg.num_hidden_layers}."
        names = {key: prefix + name for key, name in _COPIES.items()}
        self.mtp_copies = tuple(key for key, name in names.items() if name in self._reader)
        if all(self._same(names[key], self._mains[key]) for key in self.mtp_copies):
            self.dropped.update(names[key] for key in self.mtp_copies)
            return
        self.cfg = self.cfg.replace(mtp_own_embeddings=True)
        absent = [key for key in names if key not in self.mtp_copies and self._mains[key] in self._reader]
        self.aliases = {names[key]: self._mains[key] for key in absent}

    def _same(self, name: str, main: str) -> bool:
        """Whether two tensors are equal bit for bit. A missing main tensor is reported elsewhere."""
        if main not in self._reader:
            return True
        a, b = self._reader.get(name), self._reader.get(main)
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        a, b = np.atleast_1d(a), np.atleast_1d(b)
        rows = range(0, len(a), _COMPARE_ROWS)
        return all(a[i : i + _COMPARE_ROWS].tobytes() == b[i : i + _COMPARE_ROWS].tobytes() for i in rows)
