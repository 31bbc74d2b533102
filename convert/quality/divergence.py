"""How far one model's next-token distributions are from another's, position by position over a text."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.quality.models import ComparedModel
from convert.quality.statistics import bootstrap_mean, summarize_distribution
from glm_jax.cache.latent import LatentCache
from glm_jax.checkpoint.progress import progress_bar
from glm_jax.engine.scoring import prefill_chunk_logits
from glm_jax.errors import GlmError, PromptError

CONFIDENT_GAP_NATS = 0.5
_LOGITS_PER_BATCH = 1 << 23  # of one model: 32 MB, and a few times that while they are compared
_METRIC_NAMES = ("kl", "reference_nll", "nll", "agree", "gap")

Array = np.ndarray[Any, np.dtype[Any]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PositionMetrics:
    """What was found at every position of every window; float32 ``[windows, positions]``, NaN where a window is short.

    Attributes:
        kl: KL(reference || other) in nats.
        reference_nll: of the token that follows, under the reference.
        nll: the same under the other model.
        agree: 1 where both have the same most likely token, else 0.
        gap: nats between the reference's two most likely tokens.
        text: hash of the windows' tokens.
    """

    kl: Array
    reference_nll: Array
    nll: Array
    agree: Array
    gap: Array
    text: str

    def summary(self) -> dict[str, Any]:
        """The figures of the report; the interval of the mean is from windows drawn anew."""
        there = ~np.isnan(self.kl)
        sure = there & (self.gap > CONFIDENT_GAP_NATS)
        _, low, high = bootstrap_mean(self.kl)
        return {
            "tokens": int(there.sum()),
            "windows": len(self.kl),
            "window": self.kl.shape[1],
            "kl": {**summarize_distribution(self.kl), "mean_95": [low, high]},
            "perplexity": {"reference": _perplexity(self.reference_nll), "model": _perplexity(self.nll)},
            "top1": {
                "agreement": float(self.agree[there].mean(dtype=np.float64)),
                "sure_nats": CONFIDENT_GAP_NATS,
                "sure_positions": int(sure.sum()),
                "sure_agreement": float(self.agree[sure].mean(dtype=np.float64)) if sure.any() else None,
            },
        }

    def save(self, path: Path) -> None:
        """Writes the arrays as one compressed ``.npz`` file."""
        with path.open("wb") as file:  # given a name, NumPy would add a suffix
            np.savez_compressed(
                file, text=np.asarray(self.text), **{name: getattr(self, name) for name in _METRIC_NAMES}
            )

    @classmethod
    def load(cls, path: Path) -> PositionMetrics:
        """Reads what :meth:`save_cases` wrote.

        Raises:
            GlmError: if it is something else.
        """
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                fields = {name: stored[name] for name in _METRIC_NAMES}
                text = str(stored["text"])
        except OSError as error:
            raise GlmError(f"cannot read {path}: {error.strerror or error}") from None
        except Exception:  # damaged archives raise whatever zipfile and zlib do
            raise GlmError(f"{path} is not a file that `python -m convert.verify --positions` wrote") from None
        shapes = {array.shape for array in fields.values()}
        if len(shapes) != 1 or any(a.dtype != np.float32 or a.ndim != 2 for a in fields.values()):
            raise GlmError(f"{path} is not a file that `python -m convert.verify --positions` wrote")
        return cls(**fields, text=text)


def split_windows(texts: Sequence[Sequence[int]], window: int, max_tokens: int | None = None) -> tuple[Array, Array]:
    """Token ids cut into windows, each of which predicts the tokens after its first.

    The last token of a window is the first of the next, so that every token of a text but its first is predicted once.

    Args:
        texts: token ids of each text.
        window: positions of a window.
        max_tokens: predict about this many, in whole windows spread evenly over the texts; all unless given.

    Returns:
        int32 ``[W, window + 1]`` padded on the right, and int32 ``[W]``, how many positions of each predict a token.

    Raises:
        PromptError: if no token is left to predict.
    """
    parts = [ids[i : i + window + 1] for ids in texts for i in range(0, len(ids) - 1, window)]
    if not parts:
        raise PromptError("the text is too short: at least two tokens are needed")
    if max_tokens is not None:
        count = min(len(parts), -(-max_tokens // window))
        parts = [parts[i] for i in np.linspace(0, len(parts) - 1, count).round().astype(int)]
    rows = np.zeros((len(parts), window + 1), np.int32)
    for row, part in zip(rows, parts, strict=True):
        row[: len(part)] = part
    return rows, np.asarray([len(part) - 1 for part in parts], np.int32)


def measure_divergence(
    reference: ComparedModel,
    others: Sequence[ComparedModel],
    texts: Sequence[Sequence[int]],
    *,
    window: int = 512,
    max_tokens: int | None = None,
    progress: bool = False,
) -> list[PositionMetrics]:
    """Compares models with a reference on a text, a few windows of logits at a time.

    Args:
        reference: the model that the others should be like.
        others: with its vocabulary.
        texts: token ids of each text; a window never spans two.
        window: positions of a window.
        max_tokens: about how many to look at; all unless given.
        progress: show it on stderr.

    Returns:
        One for each of ``others``.

    Raises:
        GlmError: if a model's logits are NaN or infinite.
        PromptError: if the texts are too short.
    """
    rows, lengths = split_windows(texts, window, max_tokens)
    batch = int(np.clip(_LOGITS_PER_BATCH // (window * reference.cfg.vocab_size), 1, len(rows)))
    found: list[list[Array]] = [[] for _ in others]
    total = int(lengths.sum())
    with progress_bar("comparing predictions", total, unit="tokens", show=progress) as advance:
        for start in range(0, len(rows), batch):
            part = np.pad(rows[start : start + batch], ((0, batch - len(rows[start : start + batch])), (0, 0)))
            exact = _logits(reference, part[:, :-1])
            for each, other in zip(found, others, strict=True):
                each.append(np.asarray(_compare(exact, _logits(other, part[:, :-1]), part[:, 1:])))
            advance(int(lengths[start : start + batch].sum()))
    text = hashlib.sha256(rows.tobytes() + lengths.tobytes()).hexdigest()
    padding = np.arange(window)[None] >= lengths[:, None]
    return [_make_position_metrics(np.concatenate(each, axis=1)[:, : len(rows)], padding, text) for each in found]


def _make_position_metrics(fields: Array, padding: Array, text: str) -> PositionMetrics:
    if not np.isfinite(fields[:, ~padding]).all():
        raise GlmError("a model's logits are NaN or infinite: `python -m convert SRC DST --check` finds bad weights")
    fields = np.where(padding, np.float32(np.nan), fields)
    return PositionMetrics(**dict(zip(_METRIC_NAMES, fields, strict=True)), text=text)


def _logits(side: ComparedModel, tokens: Array) -> jax.Array:
    """float32 ``[B, T, V]``, by way of the cache that the model would write with."""
    rows, length = tokens.shape
    cache = LatentCache.create(side.cfg, rows, length, side.cache_dtype)
    return prefill_chunk_logits(side.llm.model, side.llm.params, cache, tokens, np.int32(0))[1]


@jax.jit
def _compare(reference: jax.Array, other: jax.Array, targets: jax.Array) -> jax.Array:
    """The five numbers of every position, float32 ``[5, B, T]``; one window at a time, to hold few copies of it."""

    def one(window: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        return _compare_window(*window)

    each = jax.lax.map(one, (reference, other, targets))
    return jnp.moveaxis(each, 1, 0)


def _compare_window(reference: jax.Array, other: jax.Array, targets: jax.Array) -> jax.Array:
    log_p, log_q = jax.nn.log_softmax(reference), jax.nn.log_softmax(other)

    def of_target(log_probabilities: jax.Array) -> jax.Array:
        return -jnp.take_along_axis(log_probabilities, targets[:, None], axis=-1)[:, 0]

    best = jax.lax.top_k(reference, 2)[0]
    same = jnp.argmax(reference, axis=-1) == jnp.argmax(other, axis=-1)
    kl = kl_divergence(log_p, log_q)
    return jnp.stack([kl, of_target(log_p), of_target(log_q), same.astype(jnp.float32), best[:, 0] - best[:, 1]])


def kl_divergence(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """KL(p || q) in nats of log-probabilities ``[..., V]``, accurate in float32 however close the two are.

    With d = log q - log p it is the sum of p (exp(d) - 1 - d), for the probabilities of both sum to one. No term is
    negative, and an error of the normalization counts to second order only, where the terms of sum p (-d) cancel.
    """
    d = log_q - log_p
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    # exp(d) - 1 - d by its series where the difference would cancel; elsewhere through q, for exp(d) may overflow.
    series = d * d * (1 / 2 + d * (1 / 6 + d * (1 / 24 + d * (1 / 120 + d / 720))))
    return jnp.sum(jnp.where(jnp.abs(d) < 0.25, p * series, (q - p) - p * d), axis=-1)


def _perplexity(nll: Array) -> float:
    return float(np.exp(np.nanmean(nll, dtype=np.float64)))
