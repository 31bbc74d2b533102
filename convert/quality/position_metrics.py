"""Metrics of two models' predictions at every position of a text, and their file format."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from convert.quality.statistics import Array, bootstrap_mean, summarize_distribution
from glm_jax.errors import GlmError

CONFIDENT_GAP_NATS = 0.5
METRIC_NAMES = ("kl", "reference_nll", "nll", "agree", "gap")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PositionMetrics:
    """Metrics at every position of every window, each float32 ``[windows, positions]``; NaN pads short windows.

    Attributes:
        kl: KL(reference || other) in nats.
        reference_nll: Negative log-likelihood of the next token under the reference, in nats.
        nll: Negative log-likelihood of the next token under the other model, in nats.
        agree: 1 where both models have the same most likely token, else 0.
        gap: Nats between the reference's two most likely tokens.
        text: Hash of the windows' tokens.
    """

    kl: Array
    reference_nll: Array
    nll: Array
    agree: Array
    gap: Array
    text: str

    def summary(self) -> dict[str, Any]:
        """Returns the figures of the report; the interval of the mean resamples whole windows."""
        valid = ~np.isnan(self.kl)
        confident = valid & (self.gap > CONFIDENT_GAP_NATS)
        _, low, high = bootstrap_mean(self.kl)
        return {
            "tokens": int(valid.sum()),
            "windows": len(self.kl),
            "window": self.kl.shape[1],
            "kl": {**summarize_distribution(self.kl), "mean_95": [low, high]},
            "perplexity": {"reference": _perplexity(self.reference_nll), "model": _perplexity(self.nll)},
            "top1": {
                "agreement": float(self.agree[valid].mean(dtype=np.float64)),
                "sure_nats": CONFIDENT_GAP_NATS,
                "sure_positions": int(confident.sum()),
                "sure_agreement": float(self.agree[confident].mean(dtype=np.float64)) if confident.any() else None,
            },
        }

    def save(self, path: Path) -> None:
        """Writes the arrays as one compressed ``.npz`` file."""
        with path.open("wb") as file:  # NumPy would add a suffix to a path
            np.savez_compressed(
                file, text=np.asarray(self.text), **{name: getattr(self, name) for name in METRIC_NAMES}
            )

    @classmethod
    def load(cls, path: Path) -> PositionMetrics:
        """Reads a file that :meth:`save` wrote.

        Raises:
            GlmError: if the file cannot be read, or is another kind of file.
        """
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                fields = {name: stored[name] for name in METRIC_NAMES}
                text = str(stored["text"])
        except OSError as error:
            raise GlmError(f"cannot read {path}: {error.strerror or error}") from None
        except Exception:  # damaged archives raise various errors of zipfile and zlib
            raise GlmError(f"{path} is not a file that `python -m convert.verify --positions` wrote") from None
        shapes = {array.shape for array in fields.values()}
        if len(shapes) != 1 or any(a.dtype != np.float32 or a.ndim != 2 for a in fields.values()):
            raise GlmError(f"{path} is not a file that `python -m convert.verify --positions` wrote")
        return cls(**fields, text=text)


def _perplexity(nll: Array) -> float:
    return float(np.exp(np.nanmean(nll, dtype=np.float64)))
