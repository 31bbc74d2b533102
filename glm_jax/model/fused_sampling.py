"""The sampler by kernels, for models that are run by kernels: the same tokens in few launches."""

import jax
import jax.numpy as jnp

from glm_jax.model.fused_decode import ResidualStream
from glm_jax.ops.tiled_matmul import flatten_stack
from glm_jax.sampling.penalties import apply_bias_and_penalties
from glm_jax.sampling.sampler import SampleResult, compute_logprobs, top_k_logprobs
from glm_jax.sampling.state import SamplerState, valid_token_mask
from glm_jax.weights import TiledWeight
from pallas_kernels.quant_matmul import SumSq, fused_linear
from pallas_kernels.sample import SamplingTensors, Vocabulary, lm_head_sample, sample_logits


def sample_from_residual(
    states: ResidualStream, weight: TiledWeight, state: SamplerState, positions: jax.Array, *, eps: float
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
    squares = SumSq(states.sum_sq, 0, states.sum_sq.shape[1])
    vocabulary = Vocabulary(state.valid_vocab, state.unused_ids)
    rows = SamplingTensors(
        temperature=state.temperature,
        top_k=state.top_k,
        top_p=state.top_p,
        min_p=state.min_p,
        seeds=state.seeds,
        positions=positions,
    )
    if not (features.filters or features.penalties or features.bias) and features.logprobs is None:
        found, _ = lm_head_sample(
            states.norm_scaled,
            weight.tiles,
            rows,
            vocabulary,
            states.counters,
            has_random=drawn,
            sum_sq=squares,
            eps=eps,
        )
        return SampleResult(tokens=found.tokens, ok=found.ok, logprob=None, top_ids=None, top_logprobs=None)
    stack, place = flatten_stack(weight.tiles, ())
    made, counters = fused_linear(
        states.norm_scaled, stack, place, states.counters, sum_sq=squares, eps=eps, dtype=jnp.float32
    )
    logits = made.out
    found, _ = sample_logits(
        apply_bias_and_penalties(logits, state),
        rows,
        vocabulary,
        counters,
        has_random=drawn,
        has_filters=features.filters,
        return_logprob=features.logprobs is not None,
        logits=logits if features.penalties or features.bias else None,
    )
    top_ids = top_logprobs = None
    if features.logprobs is not None:
        top_ids, top_logprobs = top_k_logprobs(
            compute_logprobs(logits), valid_token_mask(state, logits), features.logprobs
        )
    return SampleResult(
        tokens=found.tokens, ok=found.ok, logprob=found.logprob, top_ids=top_ids, top_logprobs=top_logprobs
    )
