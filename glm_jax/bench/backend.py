"""What the sides of a comparison have in common."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import numpy as np


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LoadStats:
    """How a side was loaded.

    Attributes:
        seconds: taken.
        weight_bytes: of the parameters.
        peak_bytes: the most host memory in use meanwhile, above that at the start; ``None`` where it is not known.
    """

    seconds: float
    weight_bytes: int
    peak_bytes: int | None


class BenchBackend(Protocol):
    """A model that can be timed.

    Attributes:
        name: in reports.
        loaded: how it was loaded.
        compile_seconds: spent in first calls of a shape since it was last set to zero.
    """

    name: str
    loaded: LoadStats
    compile_seconds: float

    def prefill(self, prompts: np.ndarray) -> tuple[float, Any]:
        """Seconds to run prompts int32 ``[B, T]`` into a new cache, and the most likely next tokens ``[B]``."""
        ...

    def start(self, prompts: np.ndarray, tokens: int) -> Any:
        """A state after the prompts with room for ``tokens`` more, from which :meth:`decode` can run many times."""
        ...

    def decode(self, state: Any, tokens: int) -> tuple[float, np.ndarray]:
        """Seconds for ``tokens`` greedy steps from ``state``, and the tokens ``[B, tokens]``."""
        ...
