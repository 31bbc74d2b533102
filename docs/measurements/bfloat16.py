"""Measures what computing in bfloat16 costs the built-in miniature: ``python docs/measurements/bfloat16.py``.

The script feeds a text to two models with the same weights, rounded to bfloat16: one computes in bfloat16, the other in
float32. It prints the Kullback-Leibler divergence of the next token's distributions in nats. The tests on a GPU
(``tests/gpu/test_model.py``) compare it with the difference between kernels and reference.
"""

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.llm import LLM
from glm_jax.model.glm import GLM

CODE = """def fib(n):
    if n < 2:
        return n
    return fib(n - 1) + fib(n - 2)

for i in range(10):
    print(i, fib(i))
"""


def main() -> None:
    """Measures and prints the divergence."""
    llm = LLM.load("tiny", dtype="float32")
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), llm.params)
    ids = jnp.asarray([llm.tokenizer.encode(CODE)], jnp.int32)

    def log_probs(dtype: jnp.dtype) -> np.ndarray:
        """Returns ``float32 [T, V]``."""
        params = jax.tree.map(lambda x: x.astype(dtype), rounded)
        logits = jax.jit(lambda p, t: GLM(llm.config).apply({"params": p}, t)[0])(params, ids)
        return np.asarray(jax.nn.log_softmax(logits[0].astype(jnp.float32)))

    exact, approximate = (log_probs(jnp.dtype(dtype)) for dtype in (jnp.float32, jnp.bfloat16))
    kl = (np.exp(exact) * (exact - approximate)).sum(axis=-1)
    same = (exact.argmax(-1) == approximate.argmax(-1)).mean()
    print(f"{len(kl)} tokens: mean KL {kl.mean():.1e}, largest {kl.max():.1e}, same first token {same:.0%}")


if __name__ == "__main__":
    main()
