"""Measures how fast XLA:CPU reads bfloat16 experts inside a loop: ``python docs/measurements/cpu_bfloat16.py``.

One token passes through four of sixteen full-width experts (2048 x 1536, 37.7 M weights). The weights are stored as
float32, as bfloat16, and as the bits of bfloat16 (:class:`glm_jax.weights.Bfloat16Bits`). The script prints the best of
twenty runs for each.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from glm_jax.ops.experts import apply_experts
from glm_jax.ops.router import Routing
from glm_jax.weights import Bfloat16Bits

NUM_EXPERTS, NUM_ACTIVE, HIDDEN, WIDTH = 16, 4, 2048, 1536
SHAPES = {"gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
ENCODERS: dict[str, Callable[[jax.Array], Any]] = {
    "float32": lambda w: w.astype(jnp.float32),
    "bfloat16": lambda w: w,
    "bits of bfloat16": Bfloat16Bits.from_array,
}


def main() -> None:
    """Measures and prints a line per way to store the weights."""
    x = jax.random.normal(jax.random.key(0), (1, HIDDEN), jnp.float32)
    routing = Routing(jnp.asarray([[3, 7, 1, 9]], jnp.int32), jnp.full((1, NUM_ACTIVE), 0.25, jnp.float32))
    stacks = {
        name: jax.random.normal(jax.random.key(i), (1, NUM_EXPERTS, *shape), jnp.bfloat16)
        for i, (name, shape) in enumerate(SHAPES.items())
    }
    weights_read = NUM_ACTIVE * 3 * HIDDEN * WIDTH
    for name, encode in ENCODERS.items():
        seconds = best_seconds(20, x, routing, {key: encode(value) for key, value in stacks.items()})
        print(f"{name:18} {weights_read / seconds / 1e9:6.2f} G weights/s")


def best_seconds(repeats: int, x: jax.Array, routing: Routing, w: dict[str, Any]) -> float:
    """Returns the seconds of the fastest of several calls, after one that compiles."""
    call = jax.jit(lambda x, w: apply_experts(x, routing, w, jnp.int32(0), method="pairs"))
    jax.block_until_ready(call(x, w))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call(x, w))
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    main()
