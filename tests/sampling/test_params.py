"""SamplingParams: accepted and rejected values, error messages, and the sources of defaults."""

import ast
import copy
import dataclasses
import pickle
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

import glm_jax.sampling
from glm_jax.errors import GlmError, SamplingError
from glm_jax.sampling import SamplerFeatures, SamplingParams, completion_seeds

NAN, INF = float("nan"), float("inf")

INVALID = [
    ("temperature", [-0.1, -1, NAN, INF, -INF, 1e7, 10**400, True, "1", None, 1j], r"a number in \[0, 1e6\]"),
    ("top_p", [0, 0.0, 1.0000001, -0.5, NAN, INF, True, "0.9", None], r"a number in \(0, 1\]"),
    ("min_p", [-0.01, 1.01, NAN, False, None], r"a number in \[0, 1\]"),
    ("repetition_penalty", [0, -1, 100.5, NAN, INF, True, None], r"a number in \(0, 100\]"),
    ("presence_penalty", [-2.01, 2.01, NAN, True, None], r"a number in \[-2, 2\]"),
    ("frequency_penalty", [-2.01, 2.01, INF, True, None], r"a number in \[-2, 2\]"),
    ("top_k", [-1, 1.0, 2**31, True, None, "5"], r"an integer from 0 \(off\) to 2147483647"),
    ("max_tokens", [0, -5, 1.5, True, None, 2**31], r"an integer from 1 to 2147483647"),
    ("n", [0, 129, 2.0, True, None], r"an integer in \[1, 128\]"),
    ("seed", [-1, 2**63, 1.0, True, "7"], r"an integer in \[0, 9223372036854775807\]"),
    ("logprobs", [-1, 21, 1.0, True, False], r"an integer in \[0, 20\]"),
    ("ignore_eos", [1, 0, None, "yes"], "True or False"),
    ("stop", ["", ("",), ("a", 3), ("x" * 257,), b"stop", {"a": 1}, 5, None], "a sequence of at most 16 non-empty"),
    ("stop_token_ids", [5, "5", None, {5: 1}], "a sequence of at most 1024 token ids"),
    ("logit_bias", [[(1, 2.0)], 5, "1"], "a mapping of token id to bias"),
]


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [(field, value, expected) for field, values, expected in INVALID for value in values],
    ids=lambda x: repr(x)[:24],
)
def test_invalid_value_error_names_field_range_and_value(field, value, expected):
    with pytest.raises(SamplingError, match=rf"^{field} must be {expected}.*, got ") as caught:
        SamplingParams(**{field: value})
    assert isinstance(caught.value, GlmError)
    assert isinstance(caught.value, ValueError)
    assert len(str(caught.value)) < 300


def test_error_message_has_the_value():
    with pytest.raises(SamplingError, match=r"^top_p must be a number in \(0, 1\], got 1\.5$"):
        SamplingParams(top_p=1.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logit_bias": {-1: 1.0}}, r"logit_bias: a token id must be an integer in \[0, 2147483647\], got -1"),
        ({"logit_bias": {"5": 1.0}}, "logit_bias: a token id must be"),
        ({"logit_bias": {True: 1.0}}, "logit_bias: a token id must be"),
        ({"logit_bias": {7: 100.5}}, r"logit_bias\[7\] must be a number in \[-100, 100\], got 100\.5"),
        ({"logit_bias": {7: NAN}}, r"logit_bias\[7\] must be a number"),
        ({"logit_bias": dict.fromkeys(range(1025), 0.0)}, "logit_bias must have at most 1024 entries, got 1025"),
        ({"stop": ["a"] * 17}, "stop must have at most 16 entries, got 17"),
        ({"stop_token_ids": list(range(1025))}, "stop_token_ids must have at most 1024 entries, got 1025"),
        ({"stop_token_ids": [3, -2]}, r"stop_token_ids: a token id must be an integer in .*, got -2"),
        ({"stop_token_ids": [1.0]}, "stop_token_ids: a token id must be"),
    ],
)
def test_entries_are_checked_one_by_one(options, message):
    with pytest.raises(SamplingError, match=message):
        SamplingParams(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0, "top_p": 1, "min_p": 1, "top_k": 0},
        {"temperature": 1e6, "top_p": 1e-9, "min_p": 0, "top_k": 2**31 - 1},
        {"repetition_penalty": 100, "presence_penalty": -2, "frequency_penalty": 2},
        {"seed": 0, "logprobs": 0, "n": 1, "max_tokens": 1},
        {"seed": 2**63 - 1, "logprobs": 20, "n": 128, "max_tokens": 2**31 - 1},
        {"stop": ("x" * 256,) * 16, "stop_token_ids": tuple(range(1024))},
        {"logit_bias": {i: (-1) ** i * 100 for i in range(1024)}},
    ],
)
def test_the_ends_of_every_range_are_allowed(options):
    SamplingParams(**options)


def test_values_become_plain_python():
    params = SamplingParams(
        temperature=np.float32(0.5),
        top_p=Fraction(1, 2),
        top_k=np.int64(3),
        stop=["a", "b"],
        stop_token_ids=np.arange(2),
        logit_bias={np.int32(9): 1, 4: np.float64(2)},
    )
    assert params == SamplingParams(
        temperature=0.5, top_p=0.5, top_k=3, stop=("a", "b"), stop_token_ids=(0, 1), logit_bias={4: 2.0, 9: 1.0}
    )
    assert [type(x) for x in (params.temperature, params.top_p, params.top_k)] == [float, float, int]
    assert list(params.logit_bias) == [4, 9]
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(logit_bias={}).logit_bias is None


def test_is_immutable_hashable_and_copyable():
    bias = {1: 1.0}
    params = SamplingParams(logit_bias=bias, stop="x")
    bias[2] = 2.0
    assert params.logit_bias == {1: 1.0}
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.top_k = 3
    copies = (
        pickle.loads(pickle.dumps(params)),  # noqa: S301
        copy.deepcopy(params),
        SamplingParams.from_dict(dataclasses.asdict(params)),
    )
    for same in copies:
        assert same == params
        assert hash(same) == hash(params)


def test_replace_checks_names_and_values():
    assert SamplingParams().replace(top_k=5, n=2) == SamplingParams(top_k=5, n=2)
    with pytest.raises(SamplingError, match="top_k must be"):
        SamplingParams().replace(top_k=-5)
    with pytest.raises(SamplingError, match=r"unknown sampling option best_of, topp; the options are .*top_p"):
        SamplingParams().replace(topp=0.5, best_of=2, n=1)


def test_from_dict_reads_json():
    options = {"stop": ["a"], "stop_token_ids": [1], "logit_bias": {"10": 1, "2": -1}, "seed": None}
    assert SamplingParams.from_dict(options) == SamplingParams(
        stop=("a",), stop_token_ids=(1,), logit_bias={2: -1.0, 10: 1.0}
    )
    with pytest.raises(SamplingError, match="unknown sampling option temprature"):
        SamplingParams.from_dict({"temprature": 1})
    with pytest.raises(SamplingError, match=r"logit_bias: a token id must be an integer in .*'1\.5'"):
        SamplingParams.from_dict({"logit_bias": {"1.5": 1}})
    with pytest.raises(SamplingError, match="sampling options must be a JSON object"):
        SamplingParams.from_dict([1])


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, SamplingParams()),
        ({"eos_token_id": [1, 2], "transformers_version": "5.0.0", "max_new_tokens": 9}, SamplingParams()),
        ({"do_sample": True, "temperature": 0.6, "top_k": 40}, SamplingParams(temperature=0.6, top_k=40)),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.8}, SamplingParams(temperature=0, top_p=0.8)),
        (
            {"top_p": 1, "min_p": 0.1, "repetition_penalty": 1.1},
            SamplingParams(top_p=1, min_p=0.1, repetition_penalty=1.1),
        ),
        ({"temperature": None, "top_k": None, "do_sample": None}, SamplingParams()),
    ],
)
def test_generation_config(config, expected):
    assert SamplingParams.from_generation_config(config) == expected


@pytest.mark.parametrize("config", [{"temperature": "warm"}, {"top_p": 0}, {"do_sample": "no"}, {"top_k": -1}])
def test_generation_config_with_an_invalid_value(config):
    with pytest.raises(SamplingError, match=rf"^generation_config\.json: {next(iter(config))} must be"):
        SamplingParams.from_generation_config(config)


def test_completion_seeds():
    assert completion_seeds(SamplingParams(seed=5, n=3)) == (5, 6, 7)
    assert completion_seeds(SamplingParams(seed=2**63 - 1, n=2)) == (2**63 - 1, 0)
    random_seeds = {completion_seeds(SamplingParams())[0] for _ in range(8)}
    assert len(random_seeds) == 8
    assert all(0 <= seed < 2**53 for seed in random_seeds)


def test_greedy_filtered_and_penalized():
    assert SamplingParams(temperature=9e-6).greedy
    assert not SamplingParams(temperature=1e-5).greedy
    assert SamplingParams().filtered
    assert not SamplingParams(top_p=1).filtered
    assert not SamplingParams(temperature=0, top_k=3).filtered
    assert SamplingParams(top_p=1, min_p=0.1).filtered
    assert not SamplingParams().penalized
    assert SamplingParams(presence_penalty=-1).penalized


def test_features_of_a_batch():
    greedy = SamplingParams(temperature=0, logprobs=2)
    assert SamplerFeatures.from_params([greedy]) == SamplerFeatures(greedy_only=True, logprobs=2)
    assert SamplerFeatures.from_params([greedy, SamplingParams(top_p=1, logprobs=0)]) == SamplerFeatures(logprobs=2)
    assert SamplerFeatures.from_params([SamplingParams(logit_bias={1: 1.0}, frequency_penalty=1)]) == SamplerFeatures(
        bias=True, penalties=True, filters=True
    )


def test_features_cover_smaller_features():
    everything = SamplerFeatures(penalties=True, filters=True, bias=True, logprobs=5)
    for less in (everything, SamplerFeatures(), SamplerFeatures(greedy_only=True), SamplerFeatures(logprobs=0)):
        assert everything.covers(less)
    for more in (
        SamplerFeatures(logprobs=6),
        SamplerFeatures(logprobs=0),
        SamplerFeatures(bias=True),
        SamplerFeatures(filters=True),
        SamplerFeatures(penalties=True),
    ):
        assert not SamplerFeatures().covers(more)
    assert not SamplerFeatures(greedy_only=True).covers(SamplerFeatures())


def test_options_need_no_jax():
    folder = Path(glm_jax.sampling.__file__).parent
    for name in ("__init__", "params", "validation", "features"):
        tree = ast.parse((folder / f"{name}.py").read_text())
        top = {
            alias.name if isinstance(node, ast.Import) else node.module
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        assert not {module for module in top if module.split(".")[0] == "jax"}
    script = "import sys; from glm_jax.sampling import SamplingParams; SamplingParams(); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False, cwd=folder.parents[1]).returncode == 0


def test_public_names_resolve():
    for name in glm_jax.sampling.__all__:
        assert getattr(glm_jax.sampling, name).__name__ == name
    assert set(glm_jax.sampling.__all__) <= set(dir(glm_jax.sampling))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        glm_jax.sampling.nothing  # noqa: B018
