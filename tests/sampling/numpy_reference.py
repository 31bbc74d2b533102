"""Reference sampler for one row: NumPy, float64, with a sort."""

import numpy as np

from glm_jax.sampling import SamplerState

# Largest error of a sum of probabilities in float32; tokens closer than this to a threshold are not compared.
THRESHOLD_TOLERANCE = 1e-5


def penalized_logits(logits, params, prompt=(), output=(), valid_vocab=None):
    """Applies bias, repetition, frequency and presence penalties and the mask of unknown ids, in vLLM's order."""
    result = np.where(np.isnan(logits), -np.inf, np.minimum(logits, np.finfo(np.float32).max)).astype(np.float64)
    for token, bias in (params.logit_bias or {}).items():
        result[token] += bias
    for token in {*prompt, *output}:
        factor = params.repetition_penalty
        result[token] = result[token] / factor if result[token] > 0 else result[token] * factor
    for token in set(output):
        result[token] -= params.frequency_penalty * list(output).count(token) + params.presence_penalty
    result[valid_vocab if valid_vocab is not None else len(result) :] = -np.inf
    return result


def probabilities(values):
    weights = np.exp(values - values.max())
    return weights / weights.sum()


def probability_above(values):
    """Total probability of all strictly more likely tokens, for each token."""
    order = np.argsort(-values, kind="stable")
    total = np.concatenate([[0.0], np.cumsum(probabilities(values)[order])])
    descending = values[order]
    first_equal = np.searchsorted(-descending, -descending, side="left")
    result = np.empty_like(values)
    result[order] = total[first_equal]
    return result


def kept_tokens(values, params):
    """Which tokens the filters keep, and for which of them float32 is precise enough to decide."""
    values = values / params.temperature
    certain = values.max() - values < 80  # beyond, float32 may round the probability to 0
    if params.min_p > 0:
        threshold = values.max() + np.log(params.min_p)
        certain &= np.abs(values - threshold) > THRESHOLD_TOLERANCE * (1 + np.abs(values.max() - threshold))
        values = np.where(values >= threshold, values, -np.inf)
    if 0 < params.top_k < len(values):
        values = np.where(values >= np.sort(values)[-params.top_k], values, -np.inf)
    keep = values > -np.inf
    if params.top_p < 1:
        above = probability_above(values)
        certain &= np.abs(above - params.top_p) > THRESHOLD_TOLERANCE
        keep &= above < params.top_p
    return keep, certain


def make_sampler_state(params, width, *, seed=0, prompt=(), valid_vocab=None, **options):
    """A sampling state of one row."""
    return SamplerState.create(
        [params], [seed], [prompt], vocab_size=width, valid_vocab=valid_vocab or width, **options
    )
