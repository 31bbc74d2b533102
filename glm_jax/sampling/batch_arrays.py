"""Sampling options as NumPy arrays, one row per completion; checked against the vocabulary."""

from collections.abc import Sequence

import numpy as np

from glm_jax.errors import SamplingError
from glm_jax.sampling.params import SEED_BITS, SamplingParams

_SMALLEST_BUCKET = 8
NO_TOKEN = -1


def check_batch(
    params: Sequence[SamplingParams],
    seeds: Sequence[int],
    prompt_ids: Sequence[Sequence[int]],
    vocab_size: int,
    valid_vocab: int,
) -> None:
    """Refuses rows that do not belong together or to this vocabulary."""
    if not len(params) == len(seeds) == len(prompt_ids) > 0:
        raise SamplingError(
            f"a batch has as many options as seeds and prompts, and at least one: "
            f"got {len(params)}, {len(seeds)} and {len(prompt_ids)}"
        )
    if not 0 < valid_vocab <= vocab_size:
        raise SamplingError(f"valid_vocab must be in [1, {vocab_size}], the width of the logits, got {valid_vocab}")
    for seed in seeds:
        if not 0 <= seed < 2**SEED_BITS:
            raise SamplingError(f"a seed must be in [0, 2**{SEED_BITS}), got {seed}")
    for row, prompt in zip(params, prompt_ids, strict=True):
        _check_ids("logit_bias", tuple(row.logit_bias or ()), vocab_size)
        _check_ids("stop_token_ids", row.stop_token_ids, vocab_size)
        _check_ids("the prompt", prompt, vocab_size)


def _check_ids(where: str, ids: Sequence[int], vocab_size: int) -> None:
    if len(ids) == 0:
        return
    lowest, highest = min(ids), max(ids)
    if lowest < 0 or highest >= vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise SamplingError(f"{where}: token id {wrong} is outside the model's vocabulary, [0, {vocab_size})")


def scalar_arrays(params: Sequence[SamplingParams]) -> dict[str, np.ndarray]:
    """The leaves with one number per row. Filters of a greedy row are switched off: they cannot change its token."""

    def column(dtype: type, values: Sequence[float]) -> np.ndarray:
        return np.asarray(values, dtype=dtype)

    return {
        "temperature": column(np.float32, [0.0 if p.greedy else p.temperature for p in params]),
        "top_k": column(np.int32, [0 if p.greedy else p.top_k for p in params]),
        "top_p": column(np.float32, [1.0 if p.greedy else p.top_p for p in params]),
        "min_p": column(np.float32, [0.0 if p.greedy else p.min_p for p in params]),
        "repetition": column(np.float32, [p.repetition_penalty for p in params]),
        "presence": column(np.float32, [p.presence_penalty for p in params]),
        "frequency": column(np.float32, [p.frequency_penalty for p in params]),
    }


def split_seeds(seeds: Sequence[int]) -> np.ndarray:
    """Uint32 ``[B, 2]``, the high half first."""
    return np.asarray([(seed >> 32, seed & 0xFFFFFFFF) for seed in seeds], dtype=np.uint32)


def stop_id_array(params: Sequence[SamplingParams], eos_ids: Sequence[int]) -> np.ndarray:
    """Int32 ``[B, M]``: each row's own ids and, unless it ignores them, the checkpoint's."""
    return _pad_to_bucket([(*p.stop_token_ids, *(() if p.ignore_eos else eos_ids)) for p in params], NO_TOKEN, np.int32)


def bias_arrays(params: Sequence[SamplingParams], vocab_size: int) -> dict[str, np.ndarray]:
    """The ids and values of each row's bias; the filling is an id that no scatter writes."""
    biases = [p.logit_bias or {} for p in params]
    return {
        "bias_ids": _pad_to_bucket([tuple(b) for b in biases], vocab_size, np.int32),
        "bias_values": _pad_to_bucket([tuple(b.values()) for b in biases], 0.0, np.float32),
    }


def penalty_arrays(prompt_ids: Sequence[Sequence[int]], vocab_size: int) -> dict[str, np.ndarray]:
    """What the penalties look at, before the first token."""
    in_prompt = np.zeros((len(prompt_ids), vocab_size), dtype=bool)
    for row, prompt in zip(in_prompt, prompt_ids, strict=True):
        row[np.asarray(prompt, dtype=np.int64)] = True
    return {"counts": np.zeros(in_prompt.shape, dtype=np.int32), "in_prompt": in_prompt}


def _pad_to_bucket(lists: Sequence[Sequence[float]], filling: float, dtype: type) -> np.ndarray:
    """A table as wide as the next power of two, so that few widths are ever compiled."""
    longest = max(len(values) for values in lists)
    width = max(_SMALLEST_BUCKET, 1 << max(longest - 1, 0).bit_length())
    return np.asarray([[*values, *[filling] * (width - len(values))] for values in lists], dtype=dtype)
