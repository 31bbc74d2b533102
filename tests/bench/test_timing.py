"""Summaries of times, and the comparison of peers."""

import numpy as np

from glm_jax.bench.timing import decode_metrics, summarize, time_interleaved


def test_summarize():
    assert summarize([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "all": [3.0, 1.0, 2.0]}


def test_decode_metrics():
    metrics = decode_metrics([2.0, 4.0, 1.0], batch=8, tokens=100)
    assert metrics["ms_per_token_of_one_row"]["median"] == 20
    assert metrics["tokens_per_s_of_one_row"]["median"] == 50
    assert metrics["tokens_per_s_of_all_rows"]["median"] == 400


class FakeBackend:
    """A backend, and its timed call, with given times."""

    def __init__(self, name, seconds, tokens=(1, 2)):
        self.name, self.seconds, self.tokens, self.compile_seconds = name, iter(seconds), np.asarray([tokens]), 9.0

    def __call__(self):
        return next(self.seconds), self.tokens


def test_peers_are_compared_round_by_round():
    backends = [FakeBackend("glm_jax", [9, 1, 2]), FakeBackend("a", [9, 3, 2], (1, 3)), FakeBackend("b", [9, 4, 1])]
    seconds, comparison = time_interleaved(backends, backends, repeats=2)
    assert seconds == [[1, 2], [3, 2], [4, 1]]
    assert {name: ratio["all"] for name, ratio in comparison["ratio"].items()} == {"a": [3.0, 1.0], "b": [4.0, 0.5]}
    assert comparison["same_tokens"] == {"a": 0.5, "b": 1.0}
    assert [backend.compile_seconds for backend in backends] == [0, 0, 0]


def test_without_peers_nothing_is_compared():
    backend = FakeBackend("glm_jax", [9, 1])
    assert time_interleaved([backend], [backend], repeats=1) == ([[1]], {})
