"""Sampling in few kernels, for models that kernels run; the sampled tokens are those of the reference."""

import jax
import jax.numpy as jnp

from glm_jax.model.fused_decode import ResidualStream
from glm_jax.sampling.penalties import apply_bias_and_penalties
from glm_jax.sampling.sampler import SampleResult, compute_logprobs, top_k_logprobs
from glm_jax.sampling.state import SamplerState, valid_token_mask
from glm_jax.weights.tiled_weight import flatten_stack
from pallas_kernels.quant_matmul import SumSq, fused_linear
from pallas_kernels.sample import SamplingTensors, Vocabulary, lm_head_sample, sample_logits
from pallas_kernels.tiles import Tiles


@jax.named_scope("sample")
def sample_from_residual(
    stream: ResidualStream, head: Tiles, state: SamplerState, positions: jax.Array, *, eps: float
) -> SampleResult:
    """Samples one token per row from the residual stream after the last layer; see :func:`glm_jax.sampling.sample`.

    Where nothing but a temperature acts on the logits, the kernel that computes them samples too, and never writes
    them. Otherwise thresholds are searched for by eight bits of the scores at a time.

    Args:
        stream: Residual stream of ``B`` tokens.
        head: The head ``[V, D]`` in tiles.
        state: Sampling options and history of the rows.
        positions: ``int32 [B]``, positions of the newest tokens; the sampled tokens take the next ones.
        eps: Epsilon of the final norm.
    """
    features, has_random = state.features, not state.features.greedy_only
    sum_sq = SumSq(stream.sum_sq, 0, stream.sum_sq.shape[1])
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
        sampled, _ = lm_head_sample(
            stream.norm_scaled,
            head,
            rows,
            vocabulary,
            stream.counters,
            has_random=has_random,
            sum_sq=sum_sq,
            eps=eps,
        )
        return SampleResult(tokens=sampled.tokens, ok=sampled.ok, logprob=None, top_ids=None, top_logprobs=None)
    product, counters = fused_linear(
        stream.norm_scaled, *flatten_stack(head, ()), stream.counters, sum_sq=sum_sq, eps=eps, dtype=jnp.float32
    )
    logits = product.out
    sampled, _ = sample_logits(
        apply_bias_and_penalties(logits, state),
        rows,
        vocabulary,
        counters,
        has_random=has_random,
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
        tokens=sampled.tokens, ok=sampled.ok, logprob=sampled.logprob, top_ids=top_ids, top_logprobs=top_logprobs
    )
