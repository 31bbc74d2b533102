"""A model with its latent cache in 8 bits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.llm import LLM
from glm_jax.sampling import SamplingParams

TEXTS = ["def", "def fib(n):\n    return n"]
DRAWN = SamplingParams(temperature=0.8, top_p=0.9, max_tokens=12, seed=7, ignore_eos=True)
PROGRAM = '''"""Words of a text, and how often each occurs."""

import argparse
import collections
import json
import sys
from pathlib import Path


class Counter:
    """Counts words; a word is what stands between spaces, without its punctuation."""

    def __init__(self, lower=True):
        self.lower = lower
        self.counts = collections.defaultdict(int)

    def add(self, text):
        for word in text.split():
            word = word.strip(".,;:!?()[]")
            if not word:
                continue
            if self.lower:
                word = word.lower()
            self.counts[word] += 1

    def most_common(self, limit=10):
        ordered = sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        return ordered[:limit]


def read(path):
    """The text of a file, or of standard input."""
    if path == "-":
        return sys.stdin.read()
    return Path(path).read_text(encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", default=["-"])
    parser.add_argument("--limit", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    counter = Counter()
    for path in options.files:
        counter.add(read(path))
    found = counter.most_common(options.limit)
    if options.json:
        print(json.dumps(dict(found)))
    else:
        for word, count in found:
            print(f"{count:6} {word}")


if __name__ == "__main__":
    main()
'''


@pytest.fixture(scope="module", params=["int8", "fp8"])
def narrow(request, folder):
    """The random checkpoint in float32, with an 8-bit cache."""
    return LLM.load(folder, dtype="float32", cache_dtype=request.param)


def test_a_batch_equals_each_prompt_alone_in_many_steps_or_one_by_one(narrow):
    together = narrow.generate(TEXTS, DRAWN)
    assert together == [narrow.generate(text, DRAWN) for text in TEXTS]
    streamed = [token for piece in narrow.stream(TEXTS[1], DRAWN) for token in piece.token_ids]
    assert tuple(streamed) == together[1].token_ids


def test_completions_of_one_prompt_are_copies_of_its_cache(narrow):
    several = narrow.generate(TEXTS[1], DRAWN, n=2)
    assert several[0] == narrow.generate(TEXTS[1], DRAWN)
    assert several[0].token_ids != several[1].token_ids


def test_over_devices(folder):
    alone, split = (LLM.load(folder, dtype="float32", cache_dtype="int8", mesh=devices) for devices in (None, 4))
    found = [[completion.token_ids for completion in model.generate(TEXTS, DRAWN)] for model in (alone, split)]
    assert found[0] == found[1]


def test_the_memory_plan_has_the_size_of_the_cache(narrow):
    kind, cfg = narrow._memory_model.placement.cache_dtype, narrow.config
    cache = narrow._make_runner().allocate_cache(1, 100)
    assert (cache.cache_dtype, cache.capacity, cache.dequant_dtype) == (kind, 128, "float32")
    assert cache.data.nbytes + cache.scales.nbytes == narrow._memory_model.requirement(1, 128).cache
    assert cache.scales.nbytes == cfg.num_hidden_layers * 128 * 2 * 4


def test_activations_keep_their_dtype(folder):
    model = LLM.load(folder, cache_dtype="int8")
    cache = model._make_runner().allocate_cache(1, 4)
    place = jnp.arange(4, dtype=jnp.int32)[None]
    call = functools.partial(model.model.apply, method="hidden")
    hidden, after = jax.eval_shape(call, {"params": model.params}, place + 3, place, cache)
    assert hidden.dtype == jnp.bfloat16
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, cache)


def distributions(cache_dtype):
    model = LLM.load("tiny", dtype="float32", cache_dtype=cache_dtype)
    logits = model.logits(model.tokenizer.encode(PROGRAM)).astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def test_the_miniature_predicts_nearly_the_same():
    """Mean divergence in nats; docs/measurements/cache_8bit.py has more of it.

    Divergence grows with the square of the errors: about 0.6 % of a value's spread in int8, where the largest of 128
    values is 2.7 spreads (2.7 / 127 / sqrt(12)), and about 2.5 % of a value in fp8 (1/16 at most, spread evenly).
    """
    exact = distributions("float32")
    kl = {kind: (np.exp(exact) * (exact - distributions(kind))).sum(axis=-1).mean() for kind in ("int8", "fp8")}
    assert 0 < kl["int8"] < 1e-3
    assert kl["int8"] < kl["fp8"] < 5e-3
