"""Sampling options of a batch as NumPy arrays, one row per completion, checked against the vocabulary."""

from collections.abc import Sequence

import numpy as np

from glm_jax.errors import SamplingError
from glm_jax.sampling.params import SEED_BITS, SamplingParams

_MIN_WIDTH = 8
NO_TOKEN = -1
"""Padding of token id arrays."""


def check_batch(
    params: Sequence[SamplingParams],
    seeds: Sequence[int],
    prompt_ids: Sequence[Sequence[int]],
    vocab_size: int,
    valid_vocab: int,
) -> None:
    """Checks that options, seeds and prompts match each other and the vocabulary.

    Raises:
        SamplingError: if their numbers differ, or a seed, ``valid_vocab`` or a token id is out of range.
    """
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
    for options, prompt in zip(params, prompt_ids, strict=True):
        _check_ids("logit_bias", tuple(options.logit_bias or ()), vocab_size)
        _check_ids("stop_token_ids", options.stop_token_ids, vocab_size)
        _check_ids("the prompt", prompt, vocab_size)


def _check_ids(where: str, ids: Sequence[int], vocab_size: int) -> None:
    if len(ids) == 0:
        return
    lowest, highest = min(ids), max(ids)
    if lowest < 0 or highest >= vocab_size:
        invalid = lowest if lowest < 0 else highest
        raise SamplingError(f"{where}: token id {invalid} is outside the model's vocabulary, [0, {vocab_size})")


def scalar_arrays(params: Sequence[SamplingParams]) -> dict[str, np.ndarray]:
    """The options with one number per row, each ``[B]``.

    Filters of a greedy row are switched off, because they cannot change its token.
    """

    def column(dtype: type, values: Sequence[float]) -> np.ndarray:
        return np.asarray(values, dtype=dtype)

    return {
        "temperature": column(np.float32, [0.0 if p.greedy else p.temperature for p in params]),
        "top_k": column(np.int32, [0 if p.greedy else p.top_k for p in params]),
        "top_p": column(np.float32, [1.0 if p.greedy else p.top_p for p in params]),
        "min_p": column(np.float32, [0.0 if p.greedy else p.min_p for p in params]),
        "repetition_penalty": column(np.float32, [p.repetition_penalty for p in params]),
        "presence_penalty": column(np.float32, [p.presence_penalty for p in params]),
        "frequency_penalty": column(np.float32, [p.frequency_penalty for p in params]),
    }


def split_seeds(seeds: Sequence[int]) -> np.ndarray:
    """Seeds of 63 bits as ``uint32 [B, 2]``, the high half first."""
    return np.asarray([(seed >> 32, seed & 0xFFFFFFFF) for seed in seeds], dtype=np.uint32)


def stop_id_array(params: Sequence[SamplingParams], eos_ids: Sequence[int]) -> np.ndarray:
    """Stop ids ``int32 [B, M]``: each row's own and, unless it ignores them, the checkpoint's end-of-sequence ids."""
    return _pad_to_bucket([(*p.stop_token_ids, *(() if p.ignore_eos else eos_ids)) for p in params], NO_TOKEN, np.int32)


def bias_arrays(params: Sequence[SamplingParams], vocab_size: int) -> dict[str, np.ndarray]:
    """Logit biases: ids ``int32 [B, K]`` and values ``float32 [B, K]``.

    Unused entries have the id ``vocab_size``, which a scatter with ``mode="drop"`` ignores.
    """
    biases = [p.logit_bias or {} for p in params]
    return {
        "bias_ids": _pad_to_bucket([tuple(b) for b in biases], vocab_size, np.int32),
        "bias_values": _pad_to_bucket([tuple(b.values()) for b in biases], 0.0, np.float32),
    }


def penalty_arrays(prompt_ids: Sequence[Sequence[int]], vocab_size: int) -> dict[str, np.ndarray]:
    """Penalty inputs before the first output token: ``counts`` ``int32 [B, V]`` and ``in_prompt`` ``bool [B, V]``."""
    in_prompt = np.zeros((len(prompt_ids), vocab_size), dtype=bool)
    for row, prompt in zip(in_prompt, prompt_ids, strict=True):
        row[np.asarray(prompt, dtype=np.int64)] = True
    return {"counts": np.zeros(in_prompt.shape, dtype=np.int32), "in_prompt": in_prompt}


def _pad_to_bucket(lists: Sequence[Sequence[float]], padding: float, dtype: type) -> np.ndarray:
    """Pads the lists to the next power of two, so that few widths are ever compiled."""
    longest = max(len(values) for values in lists)
    width = max(_MIN_WIDTH, 1 << max(longest - 1, 0).bit_length())
    return np.asarray([[*values, *[padding] * (width - len(values))] for values in lists], dtype=dtype)
