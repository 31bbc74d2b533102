"""Which requests run together. Imports no JAX."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from glm_jax.engine.request import Request


def make_batches(
    requests: Sequence[Request], max_batch_size: int, fits: Callable[[Sequence[Request]], bool]
) -> Iterator[list[Request]]:
    """Rows in batches of similar length; completions of one prompt stay together where they fit.

    Args:
        requests: of a call.
        max_batch_size: rows of a batch.
        fits: whether a batch does; a single row must.
    """
    left = sorted(requests, key=lambda row: (len(row.prompt_ids), row.prompt_index, row.index))
    while left:
        count = min(max_batch_size, len(left))
        while count > 1 and not fits(left[:count]):
            count = 1 << (count - 1).bit_length() - 1  # batches are padded to powers of two: anything between is waste
        yield left[:count]
        left = left[count:]
