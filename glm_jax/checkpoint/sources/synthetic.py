"""The source for random weights of realistic scale, such as ``synthetic:flash?layers=4&seed=0``; needs no download."""

from __future__ import annotations

import dataclasses
import hashlib
import urllib.parse
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from glm_jax.checkpoint.folder.layout import Leaf
from glm_jax.checkpoint.round_trip import RoundTripInfo
from glm_jax.checkpoint.sources.base import Array, SourceInfo, WeightSource
from glm_jax.config import Config
from glm_jax.errors import CheckpointError
from glm_jax.weights.random_init import random_matrix, random_matrix_on_device

SYNTHETIC_PREFIX = "synthetic:"
_EXAMPLE = f"write {SYNTHETIC_PREFIX}flash?layers=4&seed=0"


@dataclasses.dataclass(frozen=True, slots=True)
class SyntheticSpec:
    """Architecture of a synthetic model, and the seed of its weights."""

    cfg: Config
    seed: int = 0

    @classmethod
    def parse(cls, text: str) -> SyntheticSpec:
        """Parses ``synthetic:NAME?layers=N&seed=N&mtp=0|1``.

        Raises:
            CheckpointError: for unknown names or settings; the message lists the known ones.
        """
        name, _, query = text.removeprefix(SYNTHETIC_PREFIX).partition("?")
        if name != "flash":
            raise CheckpointError(f"no synthetic model {name!r}; there is flash: {_EXAMPLE}")
        pairs = urllib.parse.parse_qsl(query, keep_blank_values=True)
        settings = {"layers": 47, "seed": 0, "mtp": 1}
        for key, value in pairs:
            if key not in settings:
                raise CheckpointError(f"{text}: no setting {key!r}; there are {', '.join(settings)}")
            settings[key] = _parse_number(text, key, value)
        if len(dict(pairs)) != len(pairs) or not 1 <= settings["layers"] <= 1000 or settings["mtp"] not in (0, 1):
            raise CheckpointError(f"{text}: layers must be 1 to 1000, mtp 0 or 1, each given once; {_EXAMPLE}")
        cfg = Config.flash(layers=settings["layers"]).replace(num_nextn_predict_layers=settings["mtp"])
        return cls(cfg, settings["seed"])


def _parse_number(text: str, key: str, value: str) -> int:
    if not (value.isascii() and value.isdigit() and len(value) <= 9):
        raise CheckpointError(f"{text}: {key} must be a whole number, not {value!r}")
    return int(value)


class SyntheticSource(WeightSource):
    """The weights of :func:`glm_jax.weights.random_init.init_params`, sampled matrix by matrix.

    Args:
        spec: Architecture and seed.
        dtype: Dtype of the weights (router biases are always float32).
        name: Source as the user wrote it.
    """

    def __init__(self, spec: SyntheticSpec, dtype: np.dtype[Any], name: str) -> None:
        self.cfg, self.seed, self._dtype = spec.cfg, spec.seed, dtype
        self._fingerprint = hashlib.sha256(f"{spec!r} {dtype.name}".encode()).hexdigest()
        self.hf_config = {**spec.cfg.to_hf(), "dtype": dtype.name}
        copies = ("embed", "head") if spec.cfg.num_nextn_predict_layers else ()
        self.info = SourceInfo(
            kind="synthetic",
            name=name,
            folder=None,
            dtype=dtype.name,
            # The published checkpoint stores these copies too.
            original=RoundTripInfo(mtp_copies=copies),
        )

    def fingerprint(self) -> str:
        """Returns a hash of config, seed and dtype."""
        return self._fingerprint

    def dtype(self, leaf: Leaf) -> np.dtype[Any]:
        """Returns the source's dtype, or the parameter's own where that is fixed."""
        return np.dtype(leaf.spec.dtype) if leaf.spec.dtype else self._dtype

    def iter_chunks(self, leaf: Leaf, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, Array]]:
        """Yields one matrix at a time."""
        if leaf.spec.stack_ndim < 2:
            yield start, self._sample_matrix(leaf, ())[start:stop]
            return
        for row in range(start, leaf.shape[0] if stop is None else stop):
            yield row, self._sample_matrix(leaf, (row,))[None]

    def iter_device_chunks(
        self, leaf: Leaf, start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[int, jax.Array]]:
        """Yields the same chunks as :meth:`iter_chunks`, sampled on JAX's default device."""
        stop, stacked = leaf.shape[0] if stop is None else stop, leaf.spec.stack_ndim >= 2
        for row in range(start, stop) if stacked else (start,):
            matrix = random_matrix_on_device(
                leaf.param_path, leaf.spec, self.seed, self._dtype, leaf.layer, (row,) * stacked
            )
            yield row, matrix[None] if stacked else matrix[start:stop]

    def _sample_matrix(self, leaf: Leaf, index: tuple[int, ...]) -> Array:
        return random_matrix(leaf.param_path, leaf.spec, self.seed, self._dtype, leaf.layer, index)
