"""Divergence of one model's next-token distributions from another's, position by position over a text."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from convert.quality.models import ComparedModel
from convert.quality.position_metrics import METRIC_NAMES, PositionMetrics
from convert.quality.statistics import Array
from glm_jax.cache.latent import LatentCache
from glm_jax.checkpoint.progress import progress_bar
from glm_jax.engine.scoring import prefill_chunk_logits
from glm_jax.errors import GlmError, PromptError

_LOGITS_PER_BATCH = 1 << 23  # of one model: 32 MB, and a few times that during the comparison


def split_windows(texts: Sequence[Sequence[int]], window: int, max_tokens: int | None = None) -> tuple[Array, Array]:
    """Splits token ids into windows, each of which predicts all of its tokens but the first.

    The last token of a window is the first of the next, so every token of a text but its first is predicted once.

    Args:
        texts: Token ids of each text.
        window: Predicted positions per window.
        max_tokens: Approximate number of tokens to predict, in whole windows spread evenly over the texts; all if
            ``None``.

    Returns:
        Token ids, int32 ``[W, window + 1]`` padded on the right, and the number of predicted positions of each window,
        int32 ``[W]``.

    Raises:
        PromptError: if there is no token to predict.
    """
    windows = [ids[i : i + window + 1] for ids in texts for i in range(0, len(ids) - 1, window)]
    if not windows:
        raise PromptError("the text is too short: at least two tokens are needed")
    if max_tokens is not None:
        count = min(len(windows), -(-max_tokens // window))
        windows = [windows[i] for i in np.linspace(0, len(windows) - 1, count).round().astype(int)]
    tokens = np.zeros((len(windows), window + 1), np.int32)
    for row, ids in zip(tokens, windows, strict=True):
        row[: len(ids)] = ids
    return tokens, np.asarray([len(ids) - 1 for ids in windows], np.int32)


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
        reference: The reference model.
        others: Models with the reference's vocabulary.
        texts: Token ids of each text; a window never spans two texts.
        window: Predicted positions per window.
        max_tokens: Approximate number of tokens to compare; all if ``None``.
        progress: Whether to show progress on stderr.

    Returns:
        The metrics of each of ``others``.

    Raises:
        GlmError: if a model's logits are NaN or infinite.
        PromptError: if the texts are too short.
    """
    tokens, lengths = split_windows(texts, window, max_tokens)
    batch_size = int(np.clip(_LOGITS_PER_BATCH // (window * reference.cfg.vocab_size), 1, len(tokens)))
    metrics: list[list[Array]] = [[] for _ in others]
    total = int(lengths.sum())
    with progress_bar("comparing predictions", total, unit="tokens", show=progress) as advance:
        for start in range(0, len(tokens), batch_size):
            batch = tokens[start : start + batch_size]
            batch = np.pad(batch, ((0, batch_size - len(batch)), (0, 0)))  # one shape for all batches
            inputs, targets = batch[:, :-1], batch[:, 1:]
            reference_logits = _logits(reference, inputs)
            for model_metrics, model in zip(metrics, others, strict=True):
                model_metrics.append(np.asarray(_compare(reference_logits, _logits(model, inputs), targets)))
            advance(int(lengths[start : start + batch_size].sum()))
    text_hash = hashlib.sha256(tokens.tobytes() + lengths.tobytes()).hexdigest()
    padding = np.arange(window)[None] >= lengths[:, None]
    return [_position_metrics(np.concatenate(m, axis=1)[:, : len(tokens)], padding, text_hash) for m in metrics]


def _position_metrics(metrics: Array, padding: Array, text_hash: str) -> PositionMetrics:
    if not np.isfinite(metrics[:, ~padding]).all():
        raise GlmError("a model's logits are NaN or infinite: `python -m convert SRC DST --check` finds bad weights")
    metrics = np.where(padding, np.float32(np.nan), metrics)
    return PositionMetrics(**dict(zip(METRIC_NAMES, metrics, strict=True)), text=text_hash)


def _logits(model: ComparedModel, tokens: Array) -> jax.Array:
    """Returns logits float32 ``[B, T, V]`` of tokens ``int32 [B, T]``, by way of the model's own cache dtype."""
    batch_size, length = tokens.shape
    cache = LatentCache.create(model.cfg, batch_size, length, model.cache_dtype)
    return prefill_chunk_logits(model.llm.model, model.llm.params, cache, tokens, np.int32(0))[1]


@jax.jit
def _compare(reference: jax.Array, other: jax.Array, targets: Array) -> jax.Array:
    """Returns the metrics float32 ``[5, B, T]`` of logits ``[B, T, V]``; one window at a time, to save memory."""

    def compare(window: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        return _compare_window(*window)

    return jnp.moveaxis(jax.lax.map(compare, (reference, other, jnp.asarray(targets))), 1, 0)


def _compare_window(reference: jax.Array, other: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns the metrics float32 ``[5, T]`` of one window's logits ``[T, V]``, in the order of ``METRIC_NAMES``."""
    log_p, log_q = jax.nn.log_softmax(reference), jax.nn.log_softmax(other)

    def nll(log_probabilities: jax.Array) -> jax.Array:
        return -jnp.take_along_axis(log_probabilities, targets[:, None], axis=-1)[:, 0]

    top2 = jax.lax.top_k(reference, 2)[0]
    agree = (jnp.argmax(reference, axis=-1) == jnp.argmax(other, axis=-1)).astype(jnp.float32)
    return jnp.stack([kl_divergence(log_p, log_q), nll(log_p), nll(log_q), agree, top2[:, 0] - top2[:, 1]])


def kl_divergence(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """Returns KL(p || q) in nats of log-probabilities float32 ``[..., V]``; accurate however close the two are.

    With d = log q - log p, the divergence is the sum of p (exp(d) - 1 - d), because the probabilities of both sum to
    one. No term is negative, and normalization errors enter only in second order, whereas the terms of the sum of
    p (-d) cancel.
    """
    d = log_q - log_p
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    # Near zero, where exp(d) - 1 - d would cancel, its series is used; elsewhere q, because exp(d) may overflow.
    series = d * d * (1 / 2 + d * (1 / 6 + d * (1 / 24 + d * (1 / 120 + d / 720))))
    return jnp.sum(jnp.where(jnp.abs(d) < 0.25, p * series, (q - p) - p * d), axis=-1)
