"""The sampler by kernels, for models that are run by kernels: the same tokens in few launches."""

import jax
import jax.numpy as jnp

from glm_jax.model.fused_decode import Stream
from glm_jax.ops.tiled_matmul import flattened
from glm_jax.sampling.penalties import adjusted
from glm_jax.sampling.sampler import SampleResult, log_probabilities, most_likely
from glm_jax.sampling.state import SamplerState, existing
from glm_jax.weights import TiledWeight
from pallas_kernels.quant_matmul import Squares, linear
from pallas_kernels.sample import Rows, Vocabulary, draw, head


def sample_states(
    states: Stream, weight: TiledWeight, state: SamplerState, positions: jax.Array, *, eps: float
) -> SampleResult:
    """Draws one token per row from what the layers left; see :func:`glm_jax.sampling.sample`.

    Where nothing but a temperature acts on the logits, the kernel that computes them draws too, and they are written
    nowhere. Otherwise thresholds are searched for by eight bits of the scores at a time.

    Args:
        states: of ``B`` tokens.
        weight: the head, ``[V, D]``.
        state: the rows.
        positions: int32 ``[B]``, of the newest tokens; those that are drawn will have the next ones.
        eps: of the final norm.
    """
    features, drawn = state.features, not state.features.greedy_only
    squares = Squares(states.squares, 0, states.squares.shape[1])
    vocabulary = Vocabulary(state.valid_vocab, state.unused_ids)
    rows = Rows(
        temperature=state.temperature,
        top_k=state.top_k,
        top_p=state.top_p,
        min_p=state.min_p,
        seeds=state.seeds,
        positions=positions,
    )
    if not (features.filters or features.penalties or features.bias) and features.logprobs is None:
        found, _ = head(
            states.scaled, weight.tiles, rows, vocabulary, states.counters, drawn=drawn, squares=squares, eps=eps
        )
        return SampleResult(tokens=found.tokens, ok=found.ok, logprob=None, top_ids=None, top_logprobs=None)
    stack, place = flattened(weight.tiles, ())
    made, counters = linear(states.scaled, stack, place, states.counters, squares=squares, eps=eps, dtype=jnp.float32)
    logits = made.out
    found, _ = draw(
        adjusted(logits, state),
        rows,
        vocabulary,
        counters,
        drawn=drawn,
        filters=features.filters,
        logprob=features.logprobs is not None,
        logits=logits if features.penalties or features.bias else None,
    )
    top_ids = top_logprobs = None
    if features.logprobs is not None:
        top_ids, top_logprobs = most_likely(log_probabilities(logits), existing(state, logits), features.logprobs)
    return SampleResult(
        tokens=found.tokens, ok=found.ok, logprob=found.logprob, top_ids=top_ids, top_logprobs=top_logprobs
    )
