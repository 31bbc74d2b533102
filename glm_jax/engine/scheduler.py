"""Decides which requests run together. Imports no JAX."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from glm_jax.engine.request import Request

MAX_BATCH_SIZE = 64


def make_batches(requests: Sequence[Request], fits: Callable[[Sequence[Request]], bool]) -> Iterator[list[Request]]:
    """Groups the requests of a call into batches of similar prompt length, at most :data:`MAX_BATCH_SIZE` each.

    Completions of one prompt stay in one batch where they fit.

    Args:
        requests: Requests of one call.
        fits: Whether a batch fits into memory; a batch of one request is run without asking.
    """
    waiting = sorted(requests, key=lambda request: (len(request.prompt_ids), request.prompt_index, request.index))
    while waiting:
        size = min(MAX_BATCH_SIZE, len(waiting))
        while size > 1 and not fits(waiting[:size]):
            size = 1 << (size - 1).bit_length() - 1  # batches are padded to a power of two, so try the next lower one
        yield waiting[:size]
        waiting = waiting[size:]
