"""Measures what an 8-bit latent cache costs the built-in miniature: ``python docs/measurements/cache_8bit.py``.

The script feeds the first 700 tokens of some of this repository's files to the model with float32 weights. For each
cache dtype it prints the Kullback-Leibler divergence, in nats, of the next token's distribution from that with a
float32 cache, and how often both agree on the most likely token.
"""

from pathlib import Path

import numpy as np

from glm_jax.cache.latent import CACHE_DTYPES
from glm_jax.llm import LLM

ROOT = Path(__file__).parents[2]
FILES = (
    "glm_jax/engine/request.py",
    "glm_jax/ops/mla.py",
    "glm_jax/text/output_parser.py",
    "glm_jax/checkpoint/sources/hub.py",
    "README.md",
)
TOKENS = 700


def main() -> None:
    """Measures and prints a line per dtype."""
    texts = [(ROOT / file).read_text(encoding="utf-8") for file in FILES]
    exact = log_probs("float32", texts)
    print(f"{len(exact):,} tokens      mean KL      99 %      largest   same first token")
    for cache_dtype in CACHE_DTYPES:
        approximate = log_probs(cache_dtype, texts)
        kl = (np.exp(exact) * (exact - approximate)).sum(axis=-1)
        same = (exact.argmax(-1) == approximate.argmax(-1)).mean()
        print(f"{cache_dtype:12} {kl.mean():14.2e} {np.quantile(kl, 0.99):9.2e} {kl.max():12.2e} {same:12.2%}")


def log_probs(cache_dtype: str, texts: list[str]) -> np.ndarray:
    """Returns the log-probabilities after every token of every text, ``float64 [T, V]``."""
    llm = LLM.load("tiny", dtype="float32", cache_dtype=cache_dtype)
    logits_by_text = [llm.logits(llm.tokenizer.encode(text)[:TOKENS]) for text in texts]
    logits = np.concatenate(logits_by_text).astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


if __name__ == "__main__":
    main()
