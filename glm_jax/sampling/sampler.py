"""Samples one token per row from its logits; this page lists the order of all sampling steps.

The steps and their order are those of vLLM (the docstring of ``Sampler`` in ``vllm/v1/sample/sampler.py``; definitions
in ``vllm/v1/sample/ops/topk_topp_sampler.py`` and ``vllm/model_executor/layers/utils.py``). Steps 1 to 4 are in
:mod:`glm_jax.sampling.penalties`, steps 6 to 9 in :mod:`glm_jax.sampling.thresholds`, steps 5 and 10 in this module:

1. ``logit_bias`` is added to the logits (``_apply_logit_bias``).
2. ``repetition_penalty`` divides positive and multiplies negative logits of tokens in the prompt or the output
   (``_apply_penalties``).
3. ``frequency_penalty`` times the occurrences in the output is subtracted, then ``presence_penalty`` once
   (``_apply_penalties``).
4. Ids that the tokenizer does not know are masked, whatever their bias (``process_logits``).
5. Rows with temperature 0 take the highest score, and the lowest id among equal ones. All other rows continue:
6. ``temperature`` divides the scores (``score_gaps``).
7. ``min_p`` keeps tokens with at least this fraction of the highest probability (``_apply_min_p``).
8. ``top_k`` keeps the k highest scores, and all that equal the k-th (``_apply_top_k``).
9. ``top_p`` keeps a token if the more likely ones have less than p of the probability left by steps 7 and 8; tokens
   equal to the last one kept are kept too (``_apply_top_p``).
10. One of the remaining tokens is sampled: the argmax of log-probability plus Gumbel noise, which is a function of
    (seed, position, token id) (``_selection_scores``).

transformers applies ``min_p`` after ``top_p``; results differ only if both are used. Of several equal tokens at the
edge of ``top_p`` vLLM drops some, in the arbitrary order of its sort; here equal tokens are always treated alike.

Nothing is sorted, and a row's token does not depend on the other rows: see :mod:`glm_jax.sampling.numerics` and
:mod:`glm_jax.sampling.gumbel`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from glm_jax.sampling.batch_arrays import NO_TOKEN
from glm_jax.sampling.gumbel import gumbel_noise
from glm_jax.sampling.numerics import all_gather_vocab, deterministic_sum, masked_argmax, token_ids_like
from glm_jax.sampling.penalties import clamp_non_finite, process_logits
from glm_jax.sampling.state import SamplerState, valid_token_mask
from glm_jax.sampling.thresholds import apply_filters, score_gaps

_ValueAndIndex = tuple[jax.Array, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SampleResult:
    """Sampled tokens; the last three fields are None if ``state.features.logprobs`` is None.

    Log-probabilities are natural logarithms in the model's own distribution over all ``V`` ids, before every step of
    the sampler (vLLM's default, ``raw_logprobs``). The most likely ids include only ids that the tokenizer knows, the
    lower id first among equal ones, padded with id -1 and log-probability -inf.

    Attributes:
        tokens: ``int32 [B]``, sampled tokens.
        ok: ``bool [B]``; False if the logits contain NaN or +inf or exclude every token. NaN is treated as -inf and
            +inf as the largest float32, so the token is an id that the tokenizer knows even then.
        logprob: ``float32 [B]``, log-probabilities of ``tokens``.
        top_ids: ``int32 [B, n]``, the n most likely ids, the most likely first.
        top_logprobs: ``float32 [B, n]``, log-probabilities of ``top_ids``.
    """

    tokens: jax.Array
    ok: jax.Array
    logprob: jax.Array | None
    top_ids: jax.Array | None
    top_logprobs: jax.Array | None


def sample(logits: jax.Array, state: SamplerState, positions: jax.Array) -> SampleResult:
    """Samples one token per row; a pure function for use inside ``jit``, ``scan`` and ``while_loop``.

    Args:
        logits: ``float32 [B, V]``, output of the model.
        state: Sampling state of the batch; its static ``features`` decide what is compiled. Pass the sampled tokens to
            :func:`~glm_jax.sampling.update_state` before the next call.
        positions: ``int32 [B]``, position that the sampled token will have in its sequence; the length of the prompt
            for the first one.

    Raises:
        ValueError: if the logits are not a float32 matrix.
    """
    if logits.ndim != 2 or logits.dtype != jnp.float32:
        raise ValueError(f"sampling needs float32 logits [B, V], got {logits.dtype} {list(logits.shape)}")
    logits = all_gather_vocab(logits)
    is_valid = valid_token_mask(state, logits)
    scores = process_logits(logits, state)
    _, tokens = masked_argmax(_selection_scores(scores, state, positions), is_valid)
    broken = (is_valid & (jnp.isnan(logits) | (logits == jnp.inf))).any(-1)
    ok = ~broken & (scores > -jnp.inf).any(-1)
    if state.features.logprobs is None:
        return SampleResult(tokens=tokens, ok=ok, logprob=None, top_ids=None, top_logprobs=None)
    logprobs = compute_logprobs(logits)
    chosen = jnp.where(token_ids_like(logits) == tokens[:, None], logprobs, -jnp.inf).max(-1)
    top_ids, top_logprobs = top_k_logprobs(logprobs, is_valid, state.features.logprobs)
    return SampleResult(tokens=tokens, ok=ok, logprob=chosen, top_ids=top_ids, top_logprobs=top_logprobs)


def _selection_scores(scores: jax.Array, state: SamplerState, positions: jax.Array) -> jax.Array:
    """Values whose argmax is the token: plain scores of greedy rows, noisy log-probabilities of all others."""
    if state.features.greedy_only:
        return scores
    gap = apply_filters(scores, state) if state.features.filters else score_gaps(scores, state.temperature)
    noisy = gumbel_noise(state.seeds, positions, token_ids_like(scores)) - gap
    return jnp.where((state.temperature > 0)[:, None], noisy, scores)


def compute_logprobs(logits: jax.Array) -> jax.Array:
    """Log-probabilities ``float32 [B, V]`` of ``float32 [B, V]`` logits, before any sampling step; never NaN."""
    logits = clamp_non_finite(logits)
    gap = score_gaps(logits, jnp.ones_like(logits.max(-1)))
    total = jnp.maximum(deterministic_sum(jnp.exp(-gap)), 1.0)  # below 1 only if all are -inf: avoids NaN
    return -gap - jnp.log(total)[:, None]


def top_k_logprobs(logprobs: jax.Array, is_valid: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The ``count`` most likely valid ids and their log-probabilities.

    Each takes one pass over the vocabulary, in the order (value descending, id ascending). ``lax.top_k`` would sort the
    vocabulary on a GPU for more than 16, and its sharding rules differ.

    Args:
        logprobs: ``float32 [B, V]``.
        is_valid: ``bool [B, V]``, ids that may be reported.
        count: Number of ids per row.

    Returns:
        Ids ``int32 [B, count]``, padded with -1, and log-probabilities ``float32 [B, count]``, padded with -inf.
    """
    ids = token_ids_like(logprobs)
    none_left = logprobs.shape[-1]

    def next_best(previous: _ValueAndIndex, _: None) -> tuple[_ValueAndIndex, _ValueAndIndex]:
        value, index = previous[0][:, None], previous[1][:, None]
        comes_later = (logprobs < value) | ((logprobs == value) & (ids > index))
        best, first = masked_argmax(logprobs, is_valid & comes_later)
        return (best, first), (best, jnp.where(first == none_left, NO_TOKEN, first))

    infinity = jnp.full_like(logprobs.max(-1), jnp.inf)
    start = (infinity, jnp.zeros_like(infinity, dtype=jnp.int32))
    # Unrolled, because a loop inside the decode loop would not be part of its CUDA graph.
    _, (values, indices) = lax.scan(next_best, start, length=count, unroll=True)
    return indices.T, values.T
