"""The latent cache in 8 bits: bounds of the rounding error, and equality otherwise."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

from glm_jax.cache import LatentCache
from glm_jax.cache.latent import (
    CACHE_DTYPES,
    LayerCache,
    bytes_per_token,
    bytes_per_token_and_layer,
    canonical_cache_dtype,
    quantize_cache_rows,
)
from glm_jax.config import Config
from glm_jax.errors import ConfigError
from glm_jax.model import GLM
from glm_jax.ops import mla
from glm_jax.sharding import Rules, get_sharding_preset, make_mesh
from glm_jax.weights.storage import abstract_params
from tests.builders.hf_configs import odd_size_config
from tests.builders.jitted_model import QUICK_COMPILE, Array, is_close, make_positions, random_tokens
from tests.builders.small_models import MODEL_VARIANTS, SmallModel
from tests.reference import ReferenceModel, layers

KINDS = ["int8", "fp8"]
# Every value of the format, from its definition: four bits of exponent (7 is 2^0, 0 has no implied one), three more.
E4M3 = [2.0**-6 * m / 8 for m in range(8)] + [
    2.0 ** (e - 7) * (1 + m / 8) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)
]
GRID = {"int8": np.arange(-127.0, 128), "fp8": np.unique([*E4M3, *(-x for x in E4M3)])}
LATENT, ROPE = 14, 6


def decoded(rows: Any, kind: str, latent: int = LATENT, dtype: Any = np.float32) -> Array:
    """Rows `[S, R + P]` as attention reads them back from the cache."""
    codes, scales = jax.jit(quantize_cache_rows, static_argnums=(1, 2))(jnp.asarray(rows)[None], latent, kind)
    return np.asarray(LayerCache(codes, scales).dequantize(latent, dtype))[0]


def parts(rows: Array, latent: int) -> Iterator[Array]:
    yield from np.split(rows, [latent], axis=-1)


def rounded(rows: Array, kind: str, latent: int) -> Array:
    """The same in float64, by looking for the nearest value of the format."""
    grid, out = GRID[kind], []
    for part in parts(rows, latent):
        scale = np.abs(part).max(axis=-1, keepdims=True) / grid[-1]
        at = np.searchsorted((grid[1:] + grid[:-1]) / 2, part / scale)
        out.append(grid[at] * scale)
    return np.concatenate(out, axis=-1)


def margin(rows: Array, kind: str, latent: int) -> float:
    """Distance of any value to where rounding jumps, in units of the scale."""
    middles = (GRID[kind][1:] + GRID[kind][:-1]) / 2
    units = [part / np.abs(part).max(axis=-1, keepdims=True) * GRID[kind][-1] for part in parts(rows, latent)]
    return min(float(np.abs(x[..., None] - middles).min()) for x in units)


# -- one row ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_code_comes_back(kind: str) -> None:
    """The largest value keeps the scale at one."""
    grid = GRID[kind].astype(np.float32)
    row = np.append(grid, np.float32(1))[None]
    assert np.array_equal(decoded(row, kind, latent=len(grid))[:, :-1], row[:, :-1])


@given(st.integers(0, 2**32 - 1), st.integers(-30, 30), st.integers(-30, 30))
@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_those_of_the_format(kind: str, seed: int, latent_size: int, rope_size: int) -> None:
    """Half a step of int8's; of fp8's 1/16 of the value, or half a step of the numbers under 2^-6.

    The quotient is rounded to float32 before, which may cost 2^-24 of 127 (or of the value) more, and so may each of
    three operations after.
    """
    rows = np.random.default_rng(seed).standard_normal((16, LATENT + ROPE)).astype(np.float32)
    rows *= np.float32(2.0) ** np.repeat([latent_size, rope_size], [LATENT, ROPE]).astype(np.float32)
    found = decoded(rows, kind)
    for part, got in zip(parts(rows.astype(np.float64), LATENT), parts(found.astype(np.float64), LATENT), strict=True):
        scale = np.abs(part).max(axis=-1, keepdims=True) / GRID[kind][-1]
        allowed = scale / 2 if kind == "int8" else np.maximum(np.abs(part) / 16, scale / 1024)
        assert (np.abs(got - part) <= allowed + 4 * 2.0**-24 * np.abs(part).max(axis=-1, keepdims=True)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_rounded_as_numpy_rounds_it(kind: str) -> None:
    rows = np.random.default_rng(1).standard_normal((400, LATENT + ROPE))
    rows = rows[[margin(row[None], kind, LATENT) > 1e-3 for row in rows]]
    assert len(rows) > 200
    np.testing.assert_allclose(decoded(rows.astype(np.float32), kind), rounded(rows, kind, LATENT), rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_ties_go_to_even(kind: str) -> None:
    grid = GRID[kind][len(GRID[kind]) // 2 :]
    middles, even = (grid[1:] + grid[:-1]) / 2, [grid[i + i % 2] for i in range(len(grid) - 1)]
    rows = np.append(middles, [grid[-1], 1])[None].astype(np.float32)
    assert decoded(rows, kind, latent=len(grid))[0, :-2].tolist() == even


@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_of_a_row_have_scales_of_their_own(kind: str) -> None:
    rows = np.random.default_rng(2).standard_normal((8, LATENT + ROPE)).astype(np.float32)
    huge = rows.copy()
    huge[:, LATENT:] *= 1e6
    assert np.array_equal(decoded(huge, kind)[:, :LATENT], decoded(rows, kind)[:, :LATENT])


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 1e-36, 3e38])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_zeros_and_of_extreme_sizes_are_finite(kind: str, size: float) -> None:
    rows = np.full((1, LATENT + ROPE), size, np.float32)
    rows[0, LATENT:] = [1, -1, 0, 0, 0, 0]
    found = decoded(rows, kind)
    np.testing.assert_allclose(found[0, :LATENT], size, rtol=1e-6, atol=448 * 1.2e-38)
    assert found[0, LATENT:].tolist() == [1, -1, 0, 0, 0, 0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_not_rounded_away(kind: str, bad: float) -> None:
    rows = np.ones((1, LATENT + ROPE), np.float32)
    rows[0, 3] = bad
    found = decoded(rows, kind)
    assert np.isnan(found[0, :LATENT]).all()
    assert (found[0, LATENT:] == 1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_read_as_what_is_computed_with(kind: str) -> None:
    row = jnp.linspace(-1, 1, LATENT + ROPE)[None, None]
    codes, scales = quantize_cache_rows(row.astype(jnp.bfloat16), LATENT, kind)
    assert LayerCache(codes, scales).dequantize(LATENT, jnp.bfloat16).dtype == jnp.bfloat16
    assert LayerCache(codes, scales, "float32").dequantize(LATENT, jnp.bfloat16).dtype == jnp.float32
    assert LayerCache(row).dequantize(LATENT, jnp.bfloat16) is row


# -- the model --------------------------------------------------------------------------------------------------------

LENGTH = 12


class RoundingReference(ReferenceModel):
    """The reference, which reads its cache as this kind would have stored it."""

    def __init__(self, small: SmallModel, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(small.tensors, small.config)
        self.margin = np.inf
        for name in ("attend_expanded", "attend_absorbed"):
            monkeypatch.setattr(layers, name, self._rounding(getattr(layers, name), kind))

    def _rounding(self, attend: Any, kind: str) -> Any:
        def read(q: Array, rows: Array, *rest: Any) -> Array:
            latent = self.config["kv_lora_rank"]
            self.margin = min(self.margin, margin(rows, kind, latent))
            return attend(q, rounded(rows, kind, latent), *rest)

        return read


def clear_case(small: SmallModel, kind: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Array, list[Array]]:
    """Tokens `[2, T]` and their logits, in which no cached value is so close to where rounding jumps that the
    order of a float32 sum decides."""
    with monkeypatch.context() as patch:
        reference = RoundingReference(small, kind, patch)
        for seed in range(20):
            reference.margin, ids = np.inf, random_tokens(small.config, 2, LENGTH, seed=seed)
            expected = [reference.logits(row) for row in ids]
            if reference.margin > 3e-4:
                return ids, expected
    raise AssertionError("no such tokens")


def run(small: SmallModel, ids: Array, cache: Any, chunk: int, form: str) -> tuple[Array, Any]:
    found = []
    for start in range(0, ids.shape[1], chunk):
        piece = ids[:, start : start + chunk]
        logits, cache = small.apply(piece, positions=make_positions(piece, start), cache=cache, attention=form)
        found.append(np.asarray(logits))
    return np.concatenate(found, axis=1), cache


def empty(small: SmallModel, kind: str, rows: int, **options: Any) -> LatentCache:
    return LatentCache.create(small.cfg, rows, 16, kind, **options)


@pytest.mark.parametrize(("chunk", "form"), [(1, "absorbed"), (4, "expanded"), (12, "absorbed"), (12, "expanded")])
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_steps_and_rows_alone_are_the_reference_with_rounded_rows(
    kind: str, chunk: int, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = MODEL_VARIANTS["odd"]
    ids, expected = clear_case(small, kind, monkeypatch)
    together, cache = run(small, ids, empty(small, kind, 2), chunk, form)
    alone, _ = run(small, ids[1:], empty(small, kind, 1), chunk, form)
    assert is_close(together, np.stack(expected))
    assert is_close(alone[0], expected[1])
    assert not is_close(together, np.stack([small.reference.logits(row) for row in ids])), "nothing was rounded"
    assert cache.data.dtype == (jnp.int8 if kind == "int8" else jnp.uint8)
    assert cache.cache_dtype == kind


def test_the_prediction_layer_has_such_a_cache_too() -> None:
    small = MODEL_VARIANTS["odd"]
    ids = random_tokens(small.config, 1, LENGTH + 1, seed=3)
    hidden = small.reference.hidden(ids[0, :-1])[None].astype(np.float32)
    place = make_positions(ids[:, 1:])
    options: dict[str, Any] = {"method": "draft", "positions": place}
    plain, *_ = small.apply(hidden, ids[:, 1:], cache=small.cache(1, 16, layers=1), **options)
    logits, _, cache = small.apply(hidden, ids[:, 1:], cache=empty(small, "int8", 1, layers=1), **options)
    assert cache.data.shape == (1, 1, 16, 18)
    difference = np.abs(np.asarray(logits) - np.asarray(plain)).max()
    assert 0 < difference < 0.05 * np.abs(np.asarray(plain)).max()


@pytest.mark.parametrize(
    "rules", [get_sharding_preset("latency"), Rules(batch="data", heads="model")], ids=["latency", "rows"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_on_eight_devices(kind: str, rules: Rules, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 136}
    # Rows are split over devices in dense layers only.
    layers = 2 if rules.batch is None else 1
    small = SmallModel(
        odd_size_config(**sizes, moe_intermediate_size=16, intermediate_size=56, num_hidden_layers=layers), seed=40
    )
    mesh = make_mesh(8, (1, 8) if rules.batch is None else (2, 4))
    on_rows = jax.NamedSharding(mesh, rules.spec("batch", None))
    ids, expected = clear_case(small, kind, monkeypatch)
    places = abstract_params(small.cfg, "float32", rules, mesh)
    params = jax.tree.map(lambda value, place: jax.device_put(value, place.sharding), small.params, places)
    cache = empty(small, kind, 2, rules=rules, mesh=mesh)
    call = jax.jit(
        lambda p, t, at, c: GLM(small.cfg, rules).apply({"params": p}, t, at, c), compiler_options=QUICK_COMPILE
    )
    found = []
    with jax.set_mesh(mesh):
        for start in (0, 8):
            piece = ids[:, start : start + 8]
            logits, cache = call(params, *jax.device_put((piece, make_positions(piece, start)), on_rows), cache)
            found.append(np.asarray(logits))
    assert is_close(np.concatenate(found, axis=1), np.stack(expected))
    assert cache.scales is not None
    shard = (2, 2, 16) if rules.batch is None else (1, 1, 16)
    assert cache.data.sharding.shard_shape(cache.data.shape) == (*shard, 18)
    assert cache.scales.sharding.shard_shape(cache.scales.shape) == (*shard, 2)


# -- long contexts ----------------------------------------------------------------------------------------------------


def attend(kind: str, form: Any, slots: int = 2500) -> Any:
    """Attention of the last four tokens of two sequences over `slots` slots, as a function of the cache rows."""
    cfg = MODEL_VARIANTS["odd"].cfg
    w = {name: MODEL_VARIANTS["odd"].params["runs"]["0"]["attn"][name] for name in ("k_b", "v_b")}
    keys = jax.random.split(jax.random.key(0), 2)
    heads = (2, 4, cfg.num_attention_heads)
    q = mla.QueryHeads(
        jax.random.normal(keys[0], (*heads, cfg.qk_nope_head_dim)), jax.random.normal(keys[1], (*heads, 4))
    )
    place = np.stack([np.arange(slots - 4, slots), np.arange(4)]).astype(np.int32)
    values = jax.random.normal(jax.random.key(1), (2, slots, cfg.cache_width))
    rows = LayerCache(*quantize_cache_rows(values, cfg.kv_lora_rank, kind))
    return (lambda rows: mla.mla_attention(cfg, q, rows, jnp.asarray(place), w, 0, form)), rows


@pytest.mark.parametrize("form", ["absorbed", "expanded"])
@pytest.mark.parametrize("kind", KINDS)
def test_long_contexts_in_blocks_of_keys(kind: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call, rows = attend(kind, form)
    blocks = np.asarray(call(rows))
    monkeypatch.setattr(mla, "KEY_BLOCK", 2500)
    assert is_close(blocks, call(rows))
    values = LayerCache(rows.dequantize(LATENT, jnp.float32))
    assert is_close(blocks, call(values))


@pytest.mark.parametrize("form", ["absorbed", "expanded"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_long_context_is_never_widened_at_once(kind: str, form: str) -> None:
    call, rows = attend(kind, form)
    shapes = list(shapes_of(jax.make_jaxpr(call)(rows).jaxpr))
    wide = [shape for shape, dtype in shapes if dtype in ("float32", "float8_e4m3fn") and shape[-1:] == (18,)]
    assert (2, 1024, 18) in wide
    assert max(shape[1] for shape in wide if len(shape) == 3) == 1024
    assert ((2, 3072, 18), "int8" if kind == "int8" else "uint8") in shapes


def shapes_of(jaxpr: Any) -> Iterator[tuple[tuple[int, ...], str]]:
    """Shapes of every intermediate value, those of inner functions included."""
    for equation in jaxpr.eqns:
        yield from ((out.aval.shape, out.aval.dtype.name) for out in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from shapes_of(inner)


# -- names and numbers ------------------------------------------------------------------------------------------------


def test_bytes_of_a_token() -> None:
    """Codes, and two scales of four bytes in each layer."""
    flash, small = Config.flash(), MODEL_VARIANTS["odd"].cfg
    for kind in KINDS:
        assert bytes_per_token_and_layer(flash, kind) == 576 + 8
        assert bytes_per_token(flash, kind) == 47 * 584 == 27_448
        assert bytes_per_token(flash, kind, layers=1) == 584
    for kind in CACHE_DTYPES:
        held = jax.tree.leaves(LatentCache.create(small, 2, 5, kind))
        assert sum(leaf.nbytes for leaf in held) == 2 * 5 * bytes_per_token(small, kind)


@pytest.mark.parametrize(
    ("given_as", "name"),
    [("fp8", "fp8"), (jnp.float8_e4m3fn, "fp8"), (np.dtype("int8"), "int8"), (jnp.bfloat16, "bfloat16")],
)
def test_names_and_dtypes(given_as: Any, name: str) -> None:
    assert canonical_cache_dtype(given_as) == name
    assert LatentCache.create(MODEL_VARIANTS["odd"].cfg, 1, 1, given_as).cache_dtype == name


@pytest.mark.parametrize("wrong", ["int4", "float8_e5m2", "uint8", jnp.float16, "nonsense", 8, None])
def test_other_names_are_refused_with_the_four_that_are(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"^cache_dtype must be bfloat16, float32, int8 or fp8, not "):
        LatentCache.create(MODEL_VARIANTS["odd"].cfg, 1, 1, wrong)


def test_codes_without_scales_and_scales_without_codes_are_refused() -> None:
    small, ids = MODEL_VARIANTS["odd"], random_tokens(MODEL_VARIANTS["odd"].config, 1, 2)
    coded, plain = empty(small, "int8", 1), empty(small, "float32", 1)
    for cache in (LatentCache(coded.data), LatentCache(plain.data, coded.scales)):
        with pytest.raises(ConfigError, match=r"the scales of a cache in (int8|float32) .* not (None|\(3, 1, 16, 2\))"):
            GLM(small.cfg).apply({"params": small.params}, ids, make_positions(ids), cache)
