"""The formulas of one layer, on plain arrays of one sequence; each row is a token."""

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def linear(x: Array, weight: Array) -> Array:
    """Multiplies `x` [..., in] by a stored matrix [out, in]."""
    return x @ weight.T


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Root-mean-square norm over the last axis; no 1 is added to the weight."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def sigmoid(x: Array) -> Array:
    """Logistic function, written so that it cannot overflow."""
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + small), small / (1 + small))


def swiglu(x: Array, gate: Array, up: Array, down: Array) -> Array:
    """down(silu(gate(x)) * up(x))."""
    g = linear(x, gate)
    return linear(g * sigmoid(g) * linear(x, up), down)


def softmax(x: Array) -> Array:
    """Softmax over the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def apply_rope(x: Array, positions: Array, theta: float, interleave: bool) -> Array:
    """Rotary embedding of `x` [T, ..., P]: pair j turns by position * theta^(-2j/P), in place.

    A pair is (2j, 2j+1) when `interleave`, else (j, j + P/2).
    """
    pairs = x.shape[-1] // 2
    frequency = theta ** (-np.arange(pairs, dtype=x.dtype) * 2 / x.shape[-1])
    angle = (positions.astype(x.dtype)[:, None] * frequency).reshape(len(x), *[1] * (x.ndim - 2), pairs)
    first, second = (slice(0, None, 2), slice(1, None, 2)) if interleave else (slice(0, pairs), slice(pairs, None))
    out = np.empty_like(x)
    out[..., first] = x[..., first] * np.cos(angle) - x[..., second] * np.sin(angle)
    out[..., second] = x[..., first] * np.sin(angle) + x[..., second] * np.cos(angle)
    return out


def attend_expanded(q: Array, latent: Array, key: Array, value: Array, rank: int, start: int) -> Array:
    """Attention whose keys and values of every head are computed from the latent; returns [T, heads, v]."""
    content, position_part = latent[:, :rank], latent[:, rank:]
    nope = key.shape[1]
    k = np.einsum("sc,hnc->hsn", content, key)
    v = np.einsum("sc,hvc->hsv", content, value)
    scores = np.einsum("thn,hsn->hts", q[..., :nope], k) + np.einsum("thp,sp->hts", q[..., nope:], position_part)
    return np.einsum("hts,hsv->thv", _attention_weights(scores, q.shape[-1], start), v)


def attend_absorbed(q: Array, latent: Array, key: Array, value: Array, rank: int, start: int) -> Array:
    """Attention with the key matrix absorbed into the query and the value matrix into the result; [T, heads, v]."""
    content = latent[:, :rank]
    nope = key.shape[1]
    absorbed = np.concatenate([np.einsum("thn,hnc->thc", q[..., :nope], key), q[..., nope:]], axis=-1)
    scores = np.einsum("thw,sw->hts", absorbed, latent)
    mixed = np.einsum("hts,sc->thc", _attention_weights(scores, q.shape[-1], start), content)
    return np.einsum("thc,hvc->thv", mixed, value)


def _attention_weights(scores: Array, head: int, start: int) -> Array:
    """Causal softmax of scores [heads, T, S]; query t has position start + t; the scale is the expanded head's."""
    _, queries, keys = scores.shape
    visible = np.arange(keys)[None, :] <= start + np.arange(queries)[:, None]
    return softmax(np.where(visible[None], scores / np.sqrt(np.asarray(head, scores.dtype)), -np.inf))


def route(logits: Array, bias: Array, config: dict[str, Any]) -> Array:
    """Combination weights [T, E] from router logits: 0 for every expert that is not selected.

    The scores are sigmoids, and the bias only affects the selection. A group's score is the sum of its two best
    biased scores, and only experts of the `topk_group` best groups can be selected.
    """
    weights = np.zeros_like(logits)
    for token, row in enumerate(logits):
        scores = sigmoid(row)
        chosen = select_experts(scores + bias, config["n_group"], config["topk_group"], config["num_experts_per_tok"])
        kept = scores[chosen]
        if config["norm_topk_prob"]:
            kept = kept / (kept.sum() + 1e-20)
        weights[token, chosen] = kept * config["routed_scaling_factor"]
    return weights


def select_experts(biased: Array, groups: int, kept_groups: int, count: int) -> list[int]:
    """Expert ids selected for one token from its biased scores [E]."""
    size = len(biased) // groups
    members = [range(g * size, (g + 1) * size) for g in range(groups)]
    if groups > 1:
        worth = [sum(sorted(biased[list(m)])[-2:]) for m in members]
        members = [members[g] for g in sorted(range(groups), key=lambda g: -worth[g])[:kept_groups]]
    candidates = [e for m in members for e in m]
    return sorted(candidates, key=lambda e: -biased[e])[:count]
