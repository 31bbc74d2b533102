"""What rounding the latent cache costs the built-in miniature: ``python docs/measurements/cache_8bit.py``.

Teacher-forced over the first 700 tokens of some of this repository's files, with float32 weights: the Kullback-Leibler
divergence of the next token's distribution from that with a float32 cache, in nats, and how often both put the same
token first.
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
    """Measures each dtype."""
    texts = [(ROOT / file).read_text(encoding="utf-8") for file in FILES]
    exact = distributions("float32", texts)
    print(f"{len(exact):,} tokens      mean KL      99 %      largest   same first token")
    for kind in CACHE_DTYPES:
        found = distributions(kind, texts)
        kl = (np.exp(exact) * (exact - found)).sum(axis=-1)
        same = (exact.argmax(-1) == found.argmax(-1)).mean()
        print(f"{kind:12} {kl.mean():14.2e} {np.quantile(kl, 0.99):9.2e} {kl.max():12.2e} {same:12.2%}")


def distributions(cache_dtype: str, texts: list[str]) -> np.ndarray:
    """Log-probabilities of every token of every text, ``[T, V]``."""
    llm = LLM.load("tiny", dtype="float32", cache_dtype=cache_dtype)
    rows = [llm.logits(llm.tokenizer.encode(text)[:TOKENS]) for text in texts]
    logits = np.concatenate(rows).astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


if __name__ == "__main__":
    main()
