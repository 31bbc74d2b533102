"""Interface of a model that the benchmark can time."""

from __future__ import annotations

import dataclasses
from typing import Protocol, TypeVar

import numpy as np

DecodeStart = TypeVar("DecodeStart")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LoadStats:
    """Cost of loading a model.

    Attributes:
        seconds: Time taken.
        weight_bytes: Bytes of the parameters.
        peak_bytes: Peak of the host memory above its level before loading, ``None`` if unknown.
    """

    seconds: float
    weight_bytes: int
    peak_bytes: int | None


class BenchBackend(Protocol[DecodeStart]):
    """A model that can be timed; ``DecodeStart`` is the state that :meth:`decode` can start from repeatedly.

    Attributes:
        name: Name in reports.
        load_stats: Cost of loading the model.
        compile_seconds: Time spent in first calls with a shape since the caller last set this to zero.
    """

    name: str
    load_stats: LoadStats
    compile_seconds: float

    def prefill(self, prompts: np.ndarray) -> tuple[float, np.ndarray]:
        """Prefills prompts into a new cache.

        Args:
            prompts: ``int32 [B, T]``.

        Returns:
            Seconds, and the most likely next tokens ``int [B]``.
        """
        ...

    def start(self, prompts: np.ndarray, tokens: int) -> DecodeStart:
        """Prefills prompts ``int32 [B, T]`` and returns a state with room for ``tokens`` more tokens."""
        ...

    def decode(self, state: DecodeStart, tokens: int) -> tuple[float, np.ndarray]:
        """Runs ``tokens`` greedy steps from a state; returns seconds and the tokens ``int [B, tokens]``."""
        ...
