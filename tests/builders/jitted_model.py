"""A model under jit for small inputs: it compiles quickly, and once for each kind of call."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.cache import LatentCache
from glm_jax.config import Config
from glm_jax.model import GLM

Array = np.ndarray[Any, Any]

# Halves the compile time; the programs are small and run once or twice.
QUICK_COMPILE: dict[str, Any] = {"xla_backend_optimization_level": 0}


@dataclass(frozen=True)
class JittedModel:
    """A model, its parameters, and its compiled calls."""

    cfg: Config
    params: Any
    compiled: dict[str, Any] = field(default_factory=dict)

    def apply(self, *inputs: Array, **options: Any) -> Any:
        """Calls `GLM.apply` under `jit`; options that are arrays are traced, the others static."""
        arrays = {k: v for k, v in options.items() if isinstance(v, jax.Array | np.ndarray | LatentCache)}
        static = {k: v for k, v in options.items() if k not in arrays}
        key = repr(sorted(static.items()))
        if key not in self.compiled:
            apply = GLM(self.cfg).apply
            call = lambda p, i, a: apply({"params": p}, *i, **a, **static)  # noqa: E731
            self.compiled[key] = jax.jit(call, compiler_options=QUICK_COMPILE)
        return self.compiled[key](self.params, inputs, arrays)

    def cache(self, batch: int, capacity: int, layers: int | None = None) -> LatentCache:
        """Returns an empty float32 cache."""
        return LatentCache.create(self.cfg, batch, capacity, jnp.float32, layers=layers)


def make_positions(tokens: Array, start: int | Sequence[int] | Array = 0) -> Array:
    """Returns positions ``int32 [B, T]`` that begin at `start`, one number for all sequences or one for each."""
    first = np.broadcast_to(np.asarray(start, np.int32), (len(tokens),))
    return first[:, None] + np.arange(tokens.shape[1], dtype=np.int32)[None]


def random_tokens(config: dict[str, Any], *shape: int, seed: int = 0) -> Array:
    """Returns random token ids ``int32 [*shape]``."""
    return np.random.default_rng(seed).integers(0, config["vocab_size"], shape).astype(np.int32)


def tolerance_ratio(actual: Any, expected: Any) -> float:
    """Returns the largest difference as a fraction of the tolerance, 2e-5 x (1 + the largest expected value)."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    return float(np.abs(actual - expected).max() / (2e-5 * (1 + np.abs(expected).max())))


def is_close(actual: Any, expected: Any) -> bool:
    """Whether float32 values are as close to the exact ones as those of transformers."""
    return tolerance_ratio(actual, expected) <= 1
