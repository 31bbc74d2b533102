"""One token per row from its logits.

The order of the steps, and what each does, is that of vLLM (``vllm/v1/sample/sampler.py``, the docstring of
``Sampler``; the definitions in ``sample/ops/topk_topp_sampler.py`` and ``model_executor/layers/utils.py``):

1. ``logit_bias`` is added.
2. ``repetition_penalty``: logits of tokens in the prompt or the output are divided by it when positive and multiplied
   when not.
3. ``frequency_penalty`` times the occurrences in the output, then ``presence_penalty`` once, are subtracted.
4. Ids the tokenizer does not have are masked, whatever their bias.
5. Rows with temperature 0 take the highest score, the lowest id among equals. For the others, in this order:
6. ``temperature`` divides.
7. ``min_p`` keeps tokens with at least that fraction of the highest probability.
8. ``top_k`` keeps the k highest, all that equal the k-th included.
9. ``top_p`` keeps a token if those above it have less than p of what steps 7 and 8 left; equals of the last included.
10. One of what is left is drawn, by the argmax of the log-probability and noise of (seed, position, id).

transformers has ``min_p`` after ``top_p``; the two differ only where both are used. vLLM drops some of several tokens
that are equal at the edge of ``top_p``, as its sort falls; here equals are never told apart.

Nothing is sorted, and nothing depends on the other rows: see :mod:`~glm_jax.sampling.numerics` and
:mod:`~glm_jax.sampling.gumbel_noise`.
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

_Pair = tuple[jax.Array, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SampleResult:
    """What one step drew; the last three are None unless ``state.features.logprobs`` asks for them.

    Log-probabilities are of the model's own distribution over all its ``V`` ids, before every step of the sampler
    (vLLM's default, ``raw_logprobs``). The most likely ids are those the tokenizer has, the lower first among equals;
    -1 with -inf stands where there are no more.

    Attributes:
        tokens: int32 ``[B]``.
        ok: bool ``[B]``; False where the logits have NaN or +inf, or leave nothing to draw. NaN counts as -inf and +inf
            as the largest float, so the token is still an id the tokenizer has.
        logprob: float32 ``[B]``, of ``tokens``.
        top_ids: int32 ``[B, n]``, the most likely first.
        top_logprobs: float32 ``[B, n]``.
    """

    tokens: jax.Array
    ok: jax.Array
    logprob: jax.Array | None
    top_ids: jax.Array | None
    top_logprobs: jax.Array | None


def sample(logits: jax.Array, state: SamplerState, positions: jax.Array) -> SampleResult:
    """Draws one token per row; pure, for use inside ``jit``, ``scan`` and ``while_loop``.

    Args:
        logits: float32 ``[B, V]``, of the model.
        state: the rows, whose static ``features`` decide what is compiled; :func:`~glm_jax.sampling.update_state` it with
            what was drawn.
        positions: int32 ``[B]``, the position in the sequence that the drawn token will have: the prompt's length for
            the first one.

    Raises:
        ValueError: if the logits are not a float32 matrix.
    """
    if logits.ndim != 2 or logits.dtype != jnp.float32:
        raise ValueError(f"sampling needs float32 logits [B, V], got {logits.dtype} {list(logits.shape)}")
    logits = all_gather_vocab(logits)
    exists = valid_token_mask(state, logits)
    scores = process_logits(logits, state)
    _, tokens = masked_argmax(_selection_scores(scores, state, positions), exists)
    broken = (exists & (jnp.isnan(logits) | (logits == jnp.inf))).any(-1)
    ok = ~broken & (scores > -jnp.inf).any(-1)
    if state.features.logprobs is None:
        return SampleResult(tokens=tokens, ok=ok, logprob=None, top_ids=None, top_logprobs=None)
    logprobs = compute_logprobs(logits)
    chosen = jnp.where(token_ids_like(logits) == tokens[:, None], logprobs, -jnp.inf).max(-1)
    top_ids, top_logprobs = top_k_logprobs(logprobs, exists, state.features.logprobs)
    return SampleResult(tokens=tokens, ok=ok, logprob=chosen, top_ids=top_ids, top_logprobs=top_logprobs)


def _selection_scores(scores: jax.Array, state: SamplerState, positions: jax.Array) -> jax.Array:
    """What the argmax is taken of: the scores of a greedy row, noisy log-probabilities of any other."""
    if state.features.greedy_only:
        return scores
    gap = apply_filters(scores, state) if state.features.filters else score_gaps(scores, state.temperature)
    noisy = gumbel_noise(state.seeds, positions, token_ids_like(scores)) - gap
    return jnp.where((state.temperature > 0)[:, None], noisy, scores)


def compute_logprobs(logits: jax.Array) -> jax.Array:
    """Of the model's own distribution, float32 ``[B, V]`` like the logits; never NaN."""
    logits = clamp_non_finite(logits)
    gap = score_gaps(logits, jnp.ones_like(logits.max(-1)))
    total = jnp.maximum(deterministic_sum(jnp.exp(-gap)), 1.0)  # below 1 only when nothing is possible: -inf, not NaN
    return -gap - jnp.log(total)[:, None]


def top_k_logprobs(logprobs: jax.Array, exists: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The ``count`` highest among the ids that exist, and those ids, ``[B, count]``: one pass for each.

    Each pass takes the next in the order (value down, id up). ``lax.top_k`` would sort the vocabulary on a GPU for more
    than 16, and its layout rules differ.
    """
    ids = token_ids_like(logprobs)
    nobody = logprobs.shape[-1]

    def following(last: _Pair, _: None) -> tuple[_Pair, _Pair]:
        value, index = last[0][:, None], last[1][:, None]
        later = (logprobs < value) | ((logprobs == value) & (ids > index))
        best, first = masked_argmax(logprobs, exists & later)
        return (best, first), (best, jnp.where(first == nobody, NO_TOKEN, first))

    start = jnp.full_like(logprobs.max(-1), jnp.inf)
    # Spelled out: a loop inside the loop over tokens is not part of its CUDA graph.
    first = (start, jnp.zeros_like(start, dtype=jnp.int32))
    _, (values, indices) = lax.scan(following, first, length=count, unroll=True)
    return indices.T, values.T
