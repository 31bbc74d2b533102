"""Resolves what ``config.json`` leaves open from the tensors: the prediction layer, and tensors that are copies."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from glm_jax.checkpoint.formats.base import Array, StoredWeight
from glm_jax.config import Config
from glm_jax.errors import CheckpointError
from glm_jax.weights import as_weight_matrix

_COMPARE_ROWS = 4096  # rows compared at a time
_MTP_COPY_NAMES = {"embed": "embed_tokens.weight", "head": "shared_head.head.weight"}
_MTP_ONLY_NAMES = ("enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight")


class ResolvedConfig:
    """Config of a checkpoint, corrected by its tensors.

    Args:
        cfg: Config from ``config.json``.
        weights: Weights of the checkpoint by logical name.

    Attributes:
        cfg: Config that the tensors have: with or without prediction layer, with or without embeddings of its own.
        head_copy: Whether a model with tied embeddings has a head tensor as well.
        mtp_copies: The prediction layer's tensors ("embed", "head") that also exist outside of it.
        redundant_tensors: Names of tensors that equal others bit for bit and need not be loaded.
        aliases: Expected name -> name of the tensor that is loaded instead.
        notes: Corrections to report to the user.

    Raises:
        CheckpointError: If embeddings are tied according to ``config.json``, but the head tensor differs.
    """

    def __init__(self, cfg: Config, weights: Mapping[str, StoredWeight]) -> None:
        self.cfg, self._weights = cfg, weights
        self.redundant_tensors: set[str] = set()
        self.aliases: dict[str, str] = {}
        self.notes: list[str] = []
        self.mtp_copies: tuple[str, ...] = ()
        self._main_names = {"embed": "model.embed_tokens.weight", "head": "lm_head.weight"}
        self.head_copy = self._resolve_tied_head()
        self._resolve_mtp_layer()
        if self.cfg.num_nextn_predict_layers:
            self._resolve_mtp_copies()

    def _resolve_tied_head(self) -> bool:
        """Returns whether a tied model has a head tensor, which must then equal the embedding."""
        head, embed = self._main_names["head"], self._main_names["embed"]
        if not self.cfg.tie_word_embeddings:
            return False
        self._main_names["head"] = embed
        if head not in self._weights:
            return False
        if not self._is_identical(head, embed):
            raise CheckpointError(
                "config.json says tie_word_embeddings, but lm_head.weight differs from model.embed_tokens.weight: "
                "set tie_word_embeddings to false, or remove the tensor"
            )
        self.redundant_tensors.add(head)
        return True

    def _resolve_mtp_layer(self) -> None:
        layer = self.cfg.num_hidden_layers
        prefix = f"model.layers.{layer}."
        claimed = self.cfg.num_nextn_predict_layers == 1
        if claimed and not any(name.startswith(prefix) for name in self._weights):
            self.cfg = self.cfg.replace(num_nextn_predict_layers=0)
            self.notes.append(f"layer {layer} (multi-token prediction) has no tensors here: loaded without it")
        elif not claimed and any(prefix + name in self._weights for name in _MTP_ONLY_NAMES):
            self.cfg = self.cfg.replace(num_nextn_predict_layers=1)
            self.notes.append(f"layer {layer} (multi-token prediction) is here although config.json does not say so")

    def _resolve_mtp_copies(self) -> None:
        prefix = f"model.layers.{self.cfg.num_hidden_layers}."
        names = {key: prefix + name for key, name in _MTP_COPY_NAMES.items()}
        self.mtp_copies = tuple(key for key, name in names.items() if name in self._weights)
        if all(self._is_identical(names[key], self._main_names[key]) for key in self.mtp_copies):
            self.redundant_tensors.update(names[key] for key in self.mtp_copies)
            return
        self.cfg = self.cfg.replace(mtp_own_embeddings=True)
        absent = [key for key in names if key not in self.mtp_copies and self._main_names[key] in self._weights]
        self.aliases = {names[key]: self._main_names[key] for key in absent}

    def _is_identical(self, name: str, main: str) -> bool:
        """Returns whether two tensors are equal bit for bit; a missing main tensor is reported elsewhere."""
        if main not in self._weights:
            return True
        a, b = self._weights[name], self._weights[main]
        if a.shape != b.shape or a.dtype != b.dtype or a.spec != b.spec:
            return False
        first, second = (as_weight_matrix(tensor.load(None)).components() for tensor in (a, b))
        return all(_equal_bits(np.asarray(array), np.asarray(second[name])) for name, array in first.items())


def _equal_bits(a: Array, b: Array) -> bool:
    a, b = np.atleast_1d(a), np.atleast_1d(b)
    rows = range(0, len(a), _COMPARE_ROWS)
    return all(a[i : i + _COMPARE_ROWS].tobytes() == b[i : i + _COMPARE_ROWS].tobytes() for i in rows)
