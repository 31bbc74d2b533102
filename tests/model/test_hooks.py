"""Reading and editing activations by name, and the errors of `apply`."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.cache import LatentCache
from glm_jax.errors import ConfigError
from glm_jax.model import GLM, activation_names
from tests.builders.jitted_model import QUICK_COMPILE, Array, is_close, make_positions, random_tokens
from tests.builders.small_models import MODEL_VARIANTS

SMALL = MODEL_VARIANTS["odd"]
NAMES = activation_names(SMALL.cfg)
TOKENS = random_tokens(SMALL.config, 1, 9, seed=20)


def test_names_of_the_contract() -> None:
    dense = [f"block.0.{point}" for point in ("in", "attn", "mlp", "out")]
    sparse = [f"block.{i}.{p}" for i in (1, 2) for p in ("in", "attn", "moe.router", "moe.experts", "moe", "out")]
    assert ("embed", *dense, *sparse, "norm") == NAMES


def change(value: Any, keep: Any, turn: Any) -> Any:
    """Scales an activation and adds it the other way round; (1, 0) is the identity. For NumPy and JAX arrays alike."""
    return value * keep + value[..., ::-1] * turn


@pytest.fixture(scope="module")
def edited() -> Any:
    """One compiled program with an edit at every name; its input says how strong each edit is."""

    def run(params: Any, ids: jax.Array, amounts: jax.Array) -> Any:
        edits = {name: lambda value, i=i: change(value, *amounts[i]) for i, name in enumerate(NAMES)}
        return GLM(SMALL.cfg).apply({"params": params}, ids, edit=edits, trace=NAMES)

    compiled = jax.jit(run, compiler_options=QUICK_COMPILE)

    def call(changes: Mapping[str, tuple[float, float]]) -> Any:
        amounts = [changes.get(name, (1.0, 0.0)) for name in NAMES]
        return compiled(SMALL.params, jnp.asarray(TOKENS), jnp.asarray(amounts, jnp.float32))

    return call


def test_identity_edits_change_nothing(edited: Any) -> None:
    logits, _, trace = edited({})
    record: dict[str, Array] = {}
    assert is_close(np.asarray(logits)[0], SMALL.reference.logits(TOKENS[0], record=record))
    assert all(is_close(np.asarray(trace[name])[0], record[name]) for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_an_edit_acts_where_its_name_says(edited: Any, name: str) -> None:
    logits, _, trace = edited({name: (0.25, -0.5)})
    record: dict[str, Array] = {}
    expected = SMALL.reference.logits(TOKENS[0], record=record, edits={name: lambda value: change(value, 0.25, -0.5)})
    assert is_close(np.asarray(logits)[0], expected)
    assert is_close(np.asarray(trace[name])[0], record[name])  # what is traced is what went on
    assert not is_close(expected, SMALL.reference.logits(TOKENS[0]))


def test_several_edits_at_once(edited: Any) -> None:
    drawn = np.random.default_rng(21).integers(-4, 8, (len(NAMES), 2)) / 8
    changes = {name: (float(keep), float(turn)) for name, (keep, turn) in zip(NAMES, drawn, strict=True)}
    edits = {name: lambda value, a=a: change(value, *a) for name, a in changes.items()}
    assert is_close(np.asarray(edited(changes)[0])[0], SMALL.reference.logits(TOKENS[0], edits=edits))


@pytest.mark.parametrize(
    ("name", "equivalent"),
    [("block.1.moe.router", "block.1.moe.experts"), ("block.1.moe.experts", "block.1.moe.router")],
)
def test_no_routing_is_no_routed_experts(edited: Any, name: str, equivalent: str) -> None:
    """Zero weights and a zero routed sum leave the shared expert alone, in our model and in the reference."""
    zero = np.asarray(edited({name: (0.0, 0.0)})[0])[0]
    assert is_close(zero, SMALL.reference.logits(TOKENS[0], edits={equivalent: np.zeros_like}))


def test_trace_with_a_cache_and_in_the_middle_of_a_row() -> None:
    ids, cache = random_tokens(SMALL.config, 2, 9, seed=22), SMALL.cache(2, 9)
    names = ("block.2.attn", "block.0.mlp", "norm")
    for start in (0, 3, 6):
        piece = ids[:, start : start + 3]
        _, cache, trace = SMALL.apply(piece, positions=make_positions(piece, start), cache=cache, trace=names)
        assert set(trace) == set(names)
    for row in range(2):
        record: dict[str, Array] = {}
        SMALL.reference.hidden(ids[row], record=record)
        assert all(is_close(np.asarray(trace[name])[row], record[name][6:]) for name in names)


# -- what is refused -------------------------------------------------------------------------------------------------


def apply(ids: Any = TOKENS, **options: Any) -> Any:
    return GLM(SMALL.cfg).apply({"params": SMALL.params}, jnp.asarray(ids), **options)


@pytest.mark.parametrize("option", ["trace", "edit"])
def test_unknown_names_are_refused_with_the_nearest(option: str) -> None:
    names = {"block.1.moe.ruoter": jnp.zeros_like}
    with pytest.raises(ConfigError, match=r"block\.1\.moe\.ruoter.*block\.1\.moe\.router"):
        apply(**{option: names if option == "edit" else tuple(names)})


@pytest.mark.parametrize("name", ["block.0.moe.router", "block.1.mlp", "block.3.in", "block.-1.in", "logits"])
def test_names_that_this_model_has_not(name: str) -> None:
    with pytest.raises(ConfigError, match=r"activation_names"):
        apply(trace=(name,))


def test_an_edit_must_keep_the_shape() -> None:
    with pytest.raises(ConfigError, match=r"'block\.0\.attn'.*\(1, 9, 40\).*\(1, 40, 9\)"):
        jax.eval_shape(lambda: apply(edit={"block.0.attn": lambda value: jnp.swapaxes(value, 1, 2)}))


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "one_dimension": (TOKENS[0], {}, r"batch, length.*\(9,\)"),
    "floats": (TOKENS.astype(np.float32), {}, "integers.*float32"),
    "positions_missing": (TOKENS, {"cache": SMALL.cache(1, 9)}, "positions are needed"),
    "positions_shape": (TOKENS, {"positions": np.zeros((1, 8), np.int32)}, r"\(1, 8\).*\(1, 9\)"),
    "cache_rows": (
        TOKENS,
        {"positions": make_positions(TOKENS), "cache": SMALL.cache(2, 9)},
        r"\(3, 2, 9, 18\).*\(3, 1, 9, 18\)",
    ),
    "cache_layers": (
        TOKENS,
        {"positions": make_positions(TOKENS), "cache": SMALL.cache(1, 9, layers=2)},
        r"\(2, 1, 9, 18\)",
    ),
    "cache_width": (
        TOKENS,
        {"positions": make_positions(TOKENS), "cache": LatentCache(jnp.zeros((3, 1, 9, 19)))},
        r"\(3, 1, 9, 19\)",
    ),
}


@pytest.mark.parametrize(("ids", "options", "words"), REFUSED.values(), ids=REFUSED)
def test_wrong_inputs_are_refused(ids: Any, options: dict[str, Any], words: str) -> None:
    arrays = {key: jnp.asarray(value) if isinstance(value, np.ndarray) else value for key, value in options.items()}
    with pytest.raises(ConfigError, match=words):
        apply(ids, **arrays)


def test_draft_refuses_states_and_caches_of_another_shape() -> None:
    def draft(hidden: Any, **options: Any) -> Any:
        return apply(hidden, next_tokens=jnp.asarray(TOKENS), method="draft", **options)

    with pytest.raises(ConfigError, match=r"hidden \(1, 8, 40\).*\(1, 9\)"):
        draft(np.zeros((1, 8, 40), np.float32))
    place = {"positions": jnp.asarray(make_positions(TOKENS)), "cache": SMALL.cache(1, 9)}
    with pytest.raises(ConfigError, match=r"\(3, 1, 9, 18\).*\(1, 1, 9, 18\)"):
        draft(np.zeros((1, 9, 40), np.float32), **place)
