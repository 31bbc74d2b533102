"""Attention of prompts: the kernel over keys of every head, results put together, and the way from the latents."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_jax.cache import LatentCache
from glm_jax.cache.latent import CACHE_DTYPES, quantize_cache_rows
from glm_jax.config import Config
from glm_jax.ops import mla, mla_prefill
from pallas_kernels.aot import load_gpu_specs
from pallas_kernels.mla_prefill import flash_attention, merge_attn_states
from pallas_kernels.mla_prefill.config import FlashAttentionConfig, flash_attention_heuristic, heads_per_wave
from pallas_kernels.mla_prefill.op import EMPTY_LSE, padded_width
from pallas_kernels.mla_prefill.reference import flash_attention_ref
from tests.pallas_kernels.builders import assert_close, random_normal

pytestmark = pytest.mark.kernels
LAYERS, LAYER = 3, 1
SMALL = FlashAttentionConfig(block_m=16, block_n=16, heads_per_wave=3)
# Head width of its own, shared, of values: full tiles; tiles with room; one half of values; the real ones.
WIDTHS = [(48, 16, 32), (40, 8, 20), (16, 16, 16), (192, 64, 256)]


def given_to(rng, batch, tokens, keys, heads, widths=WIDTHS[0], dtype=jnp.float32):
    nope, rope, value = widths
    return (
        random_normal(rng, batch, tokens, heads, nope + rope, dtype=dtype),
        random_normal(rng, batch, keys, heads, nope, dtype=dtype),
        random_normal(rng, batch, keys, rope, dtype=dtype),
        random_normal(rng, batch, keys, heads, value, dtype=dtype),
    )


def positions_of(*rows):
    return jnp.asarray(rows, jnp.int32)


def slot(first):
    return jnp.full(1, first, jnp.int32)


def check(arrays, positions, first=0, *, shape=SMALL, scale=0.2, dtype=None):
    given = (*arrays, positions, slot(first))
    out, lse = jax.jit(lambda *a: flash_attention(*a, scale=scale, dtype=dtype, config=shape))(*given)
    expected, expected_lse = jax.jit(lambda *a: flash_attention_ref(*a, scale=scale, dtype=dtype))(*given)
    assert out.dtype == expected.dtype
    assert_close(out, expected)
    nothing = np.asarray(expected_lse) == np.float32(EMPTY_LSE)
    np.testing.assert_array_equal(np.asarray(lse) == np.float32(EMPTY_LSE), nothing)
    assert_close(np.asarray(lse)[~nothing], np.asarray(expected_lse)[~nothing])
    assert not np.asarray(out)[nothing].any()
    return out, lse


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize(("batch", "tokens", "keys", "heads"), [(1, 17, 33, 2), (3, 5, 20, 1)])
def test_rows_of_different_lengths(batch, tokens, keys, heads, widths):
    rng = np.random.default_rng([batch, tokens])
    first = rng.integers(0, keys - tokens + 1, (batch, 1))
    positions = jnp.asarray(first + np.arange(tokens), jnp.int32)
    check(given_to(rng, batch, tokens, keys, heads, widths), positions + 1000, 1000)


@pytest.mark.parametrize("first", [0, 7])
@pytest.mark.parametrize("keys", [1, 15, 16, 17, 33])
def test_every_position(keys, first):
    """From before the first key to behind the last, so every edge of a block of keys or queries."""
    rng = np.random.default_rng(keys)
    positions = positions_of(range(first - 2, first + keys + 3))
    check(given_to(rng, 1, positions.shape[1], keys, 1), positions[:, ::-1] if first else positions, first)


def test_positions_in_any_order():
    rng = np.random.default_rng(0)
    positions = jnp.asarray(rng.integers(-3, 50, (2, 37)), jnp.int32)
    check(given_to(rng, 2, 37, 41, 1), positions, 2)


def test_one_query_and_one_key():
    rng = np.random.default_rng(0)
    arrays = given_to(rng, 1, 1, 1, 1)
    out, lse = check(arrays, positions_of([0]))
    np.testing.assert_array_equal(out, arrays[3])
    score = float(jnp.sum(arrays[0][0, 0, 0] * jnp.concatenate([arrays[1][0, 0, 0], arrays[2][0, 0]])))
    assert_close(lse, np.full((1, 1, 1), 0.2 * score))


@pytest.mark.parametrize("padding", [-(1 << 31), -1, 0, (1 << 31) - 1])
def test_padding_may_have_any_position(padding):
    rng = np.random.default_rng(0)
    arrays = given_to(rng, 2, 20, 24, 1)
    rows = np.asarray([range(4, 24), range(20)])
    full, _ = check(arrays, jnp.asarray(rows, jnp.int32))
    rows[1, 13:] = padding
    out, lse = flash_attention(*arrays, jnp.asarray(rows, jnp.int32), slot(0), scale=0.2, config=SMALL)
    assert_close(out[0], full[0])
    assert_close(out[1, :13], full[1, :13])
    assert np.isfinite(np.asarray(out)).all()
    assert np.isfinite(np.asarray(lse)).all()


def test_keys_that_no_query_of_the_row_sees_may_hold_anything():
    rng = np.random.default_rng(0)
    arrays = given_to(rng, 2, 18, 50, 1)
    positions = positions_of(range(18), range(15, 33))
    expected, expected_lse = check(arrays, positions)
    hidden = jnp.arange(50, dtype=jnp.int32)[None] > jnp.max(positions, axis=1)[:, None]

    def spoilt(x):
        return jnp.where(hidden.reshape(2, 50, *[1] * (x.ndim - 2)), jnp.nan, x)

    q, *others = arrays
    out, lse = flash_attention(q, *map(spoilt, others), positions, slot(0), scale=0.2, config=SMALL)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(lse, expected_lse)


@pytest.mark.parametrize("which", [1, 2, 3])
def test_damage_is_found(which):
    """A NaN in a key or value shows in the queries that see it, and in none before it."""
    rng = np.random.default_rng(0)
    arrays = list(given_to(rng, 1, 24, 24, 1))
    arrays[which] = arrays[which].at[0, 17].set(jnp.nan)
    out, _ = flash_attention(
        *arrays, positions_of(range(24)), slot(0), scale=0.2, config=FlashAttentionConfig(block_m=16, block_n=16)
    )
    assert np.isnan(np.asarray(out[0, 17:])).all()
    assert np.isfinite(np.asarray(out[0, :16])).all()


def test_large_scores():
    """The largest score of a row is taken off before its exponentials are: none overflows, whatever their order."""
    rng = np.random.default_rng(0)
    q, nope, rope, v = given_to(rng, 1, 20, 40, 1)
    nope = nope * jnp.linspace(1, 60, 40, dtype=jnp.float32)[None, :, None, None]
    out, _ = flash_attention(q, nope, rope, v, positions_of(range(20, 40)), slot(0), scale=1.0, config=SMALL)
    expected, _ = flash_attention_ref(q, nope, rope, v, positions_of(range(20, 40)), slot(0), scale=1.0)
    # Scores of hundreds have an error of 1e-5, which their exponentials have too.
    assert_close(out, expected, 2e-4)
    assert float(jnp.max(jnp.abs(jnp.einsum("bthn,bshn->bhts", q[..., :48], nope)))) > 500


def test_bfloat16_and_the_dtype_of_the_result():
    rng = np.random.default_rng(0)
    arrays = given_to(rng, 1, 17, 20, 1, dtype=jnp.bfloat16)
    positions = positions_of(range(3, 20))
    exact, lse = check(arrays, positions, dtype=jnp.float32)
    rounded, same = flash_attention(*arrays, positions, slot(0), scale=0.2, config=SMALL)
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_array_equal(lse, same)
    assert_close(rounded, exact, 2.0**-7)


def test_the_order_of_programs_changes_no_bit():
    rng = np.random.default_rng(0)
    arrays, positions = given_to(rng, 2, 20, 20, 2), positions_of(range(20), range(20))

    def run(together):
        return flash_attention(
            *arrays, positions, slot(0), scale=0.2, config=FlashAttentionConfig(block_m=16, heads_per_wave=together)
        )

    expected = run(4)
    for together in (1, 2, 3, 5):
        for one, other in zip(run(together), expected, strict=True):
            np.testing.assert_array_equal(one, other)


@settings(max_examples=12)
@given(st.data())
def test_any_shape(data):
    batch, tokens, keys, heads = (data.draw(st.integers(1, most)) for most in (2, 36, 40, 2))
    widths = (data.draw(st.integers(1, 40)), data.draw(st.integers(1, 20)), data.draw(st.integers(1, 70)))
    first, seed = data.draw(st.integers(0, 100)), data.draw(st.integers(0, 1000))
    rng = np.random.default_rng(seed)
    lowest = rng.integers(first - 5, first + keys + 5, (batch, 1))
    positions = jnp.asarray(lowest + np.arange(tokens), jnp.int32)
    block_m, block_n = data.draw(st.sampled_from([(16, 16), (32, 16), (16, 32)]))
    shape = FlashAttentionConfig(
        block_m=block_m, block_n=block_n, heads_per_wave=data.draw(st.integers(1, batch * heads))
    )
    check(given_to(rng, batch, tokens, keys, heads, widths), positions, first, shape=shape)


def test_shapes_must_belong_together():
    rng = np.random.default_rng(0)
    q, nope, rope, v = given_to(rng, 1, 4, 8, 2)
    where = positions_of(range(4))
    for wrong in ((q, nope, rope[:, :7], v), (q[..., :60], nope, rope, v), (q, nope, rope, v[:, :, :1])):
        with pytest.raises(ValueError, match="do not belong together"):
            flash_attention(*wrong, where, slot(0), scale=1.0)
    huge = [jax.ShapeDtypeStruct((1, 1 << 19, 20, n), jnp.bfloat16) for n in (192, 256)]
    queries, shared = (
        jax.ShapeDtypeStruct((1, 4, 20, 256), jnp.bfloat16),
        jax.ShapeDtypeStruct((1, 1 << 19, 64), "bfloat16"),
    )
    with pytest.raises(ValueError, match="too many for one launch"):
        jax.eval_shape(lambda *a: flash_attention(*a, where, slot(0), scale=1.0), queries, huge[0], shared, huge[1])


# ------------------------------------------------------------------------------------------ parts of the keys


@pytest.mark.parametrize("cuts", [(16,), (1, 2), (20, 33), (7, 30, 44)])
def test_results_over_parts_of_the_keys_are_one(cuts):
    rng = np.random.default_rng(0)
    q, *others = given_to(rng, 2, 21, 45, 1)
    # Some queries see nothing of any part, and most nothing of some.
    positions = positions_of(range(24, 45), range(-2, 19))
    whole = flash_attention_ref(q, *others, positions, slot(0), scale=0.2)
    edges = (0, *cuts, 45)
    parts = [
        flash_attention(q, *(x[:, a:b] for x in others), positions, slot(a), scale=0.2, config=SMALL)
        for a, b in itertools.pairwise(edges)
    ]
    for order in (parts, parts[::-1]):
        out, lse = order[0]
        for other in order[1:]:
            out, lse = jax.jit(merge_attn_states)((out, lse), other)
        assert_close(out, whole[0])
        seen = np.asarray(whole[1]) != np.float32(EMPTY_LSE)
        np.testing.assert_array_equal(np.asarray(lse) != np.float32(EMPTY_LSE), seen)
        assert_close(np.asarray(lse)[seen], np.asarray(whole[1])[seen])
        assert seen.any()
        assert not np.asarray(out)[~seen].any()


# ------------------------------------------------------------------------------------------ from the latents


def small():
    changes = {"num_attention_heads": 2, "kv_lora_rank": 32, "qk_nope_head_dim": 24, "qk_rope_head_dim": 8}
    return Config.flash(layers=2).replace(**changes, v_head_dim=20)


def cache_of(rng, cfg, kind, batch, slots):
    values = random_normal(rng, LAYERS, batch, slots, cfg.cache_width)
    codes, scales = quantize_cache_rows(
        values if kind in ("int8", "fp8") else values.astype(kind), cfg.kv_lora_rank, kind
    )
    return LatentCache(codes, scales)


def weights_of(rng, cfg):
    sizes = (cfg.qk_nope_head_dim, cfg.v_head_dim)
    return [random_normal(rng, cfg.num_attention_heads, n, cfg.kv_lora_rank) * cfg.kv_lora_rank**-0.5 for n in sizes]


def by_reference(cfg, query, cache, positions, weights):
    q = mla.QueryHeads(*jnp.split(query, [cfg.qk_nope_head_dim], axis=-1))
    stacked = {name: matrix[None] for name, matrix in zip(("k_b", "v_b"), weights, strict=True)}
    return jax.jit(lambda *a: mla.mla_attention(cfg, *a, 0, "expanded"))(q, cache.layer(LAYER), positions, stacked)


def by_kernel(cfg, query, cache, positions, weights, stretch=None, short=mla_prefill.SHORT_CONTEXT):
    run = jax.jit(lambda *arrays: mla_prefill.prefill_attention(cfg, *arrays, kv_chunk=stretch, short_context=short))
    return run(query, cache, jnp.int32(LAYER), positions, *weights)


@pytest.mark.parametrize("kind", CACHE_DTYPES)
@pytest.mark.parametrize("stretch", [None, 33])
def test_attention_from_the_latents(kind, stretch):
    cfg, rng = small(), np.random.default_rng(0)
    cache, weights = cache_of(rng, cfg, kind, 2, 100), weights_of(rng, cfg)
    query = random_normal(rng, 2, 20, 2, cfg.qk_head_dim)
    positions = positions_of(range(20), range(80, 100))
    expected = by_reference(cfg, query, cache, positions, weights)
    assert_close(by_kernel(cfg, query, cache, positions, weights, stretch), expected)


@pytest.mark.parametrize("stretch", [1, 5, 6, 11, 12, 13])
def test_stretches_of_any_size(stretch):
    cfg, rng = small(), np.random.default_rng(0)
    cache, weights = cache_of(rng, cfg, "float32", 1, 12), weights_of(rng, cfg)
    query, positions = random_normal(rng, 1, 3, 2, cfg.qk_head_dim), positions_of([3, 6, 11])
    expected = by_reference(cfg, query, cache, positions, weights)
    assert_close(by_kernel(cfg, query, cache, positions, weights, stretch), expected)


def test_a_chunk_after_a_prefix_is_the_end_of_the_whole_prompt():
    cfg, rng = small(), np.random.default_rng(1)
    cache, weights = cache_of(rng, cfg, "float32", 1, 64), weights_of(rng, cfg)
    query, positions = random_normal(rng, 1, 50, 2, cfg.qk_head_dim), positions_of(range(50))
    whole = by_kernel(cfg, query, cache, positions, weights)
    for start, stop in ((0, 17), (17, 33), (33, 50)):
        chunk = by_kernel(cfg, query[:, start:stop], cache, positions[:, start:stop], weights, 20)
        assert_close(chunk, whole[:, start:stop])


def test_stretches_above_every_position_are_not_read():
    cfg, rng = small(), np.random.default_rng(2)
    cache, weights = cache_of(rng, cfg, "float32", 2, 90), weights_of(rng, cfg)
    query, positions = random_normal(rng, 2, 10, 2, cfg.qk_head_dim), positions_of(range(10), range(30, 40))
    expected = by_reference(cfg, query, cache, positions, weights)
    spoilt = LatentCache(cache.data.at[LAYER, :, 40:].set(jnp.nan))
    assert_close(by_kernel(cfg, query, spoilt, positions, weights, 20), expected)


@pytest.mark.parametrize("last", [15, 16])
@pytest.mark.parametrize("stretch", [None, 12])
def test_a_short_context_in_a_large_cache(last, stretch):
    """All positions below, and one at the limit."""
    cfg, rng = small(), np.random.default_rng(3)
    cache, weights = cache_of(rng, cfg, "float32", 2, 48), weights_of(rng, cfg)
    query, positions = random_normal(rng, 2, 5, 2, cfg.qk_head_dim), positions_of(range(5), range(last - 4, last + 1))
    expected = by_reference(cfg, query, cache, positions, weights)
    spoilt = LatentCache(cache.data.at[LAYER, :, 17:].set(jnp.nan))
    assert_close(by_kernel(cfg, query, spoilt, positions, weights, stretch, 16), expected)


def test_one_stretch_is_one_launch():
    """Nothing is put together where there is nothing to put together."""
    cfg, rng = small(), np.random.default_rng(0)
    cache, weights = cache_of(rng, cfg, "float32", 1, 64), weights_of(rng, cfg)
    query, positions = random_normal(rng, 1, 20, 2, cfg.qk_head_dim), positions_of(range(20))

    def primitives(stretch):
        given = (query, cache, jnp.int32(LAYER), positions, *weights)
        return str(jax.make_jaxpr(lambda *a: mla_prefill.prefill_attention(cfg, *a, kv_chunk=stretch))(*given))

    assert "while" not in primitives(None)
    assert primitives(None).count("pure_callback[") == 1
    assert "while" in primitives(32)


# ------------------------------------------------------------------------------------------------ block sizes


@pytest.mark.parametrize("name", load_gpu_specs())
@pytest.mark.parametrize(
    ("widths", "itemsize", "queries"),
    [((256, 256), 2, 128), ((128, 128), 2, 128), ((256, 512), 2, 64), ((256, 256), 4, 32)],
)
def test_blocks_fit_into_shared_memory(name, widths, itemsize, queries):
    target = load_gpu_specs()[name].target
    shape = flash_attention_heuristic(
        512, 20, widths, itemsize, target.capability, target.shared_memory, target.multiprocessors
    )
    tiles = (shape.block_m * widths[0] + 2 * shape.block_n * sum(widths)) * itemsize
    assert tiles < target.shared_memory
    assert shape.block_m >= queries
    assert shape.block_m == 16 * shape.num_warps


@pytest.mark.parametrize(("blocks", "heads", "expected"), [(4, 20, 20), (4, 160, 33), (64, 20, 3), (200, 20, 1)])
def test_heads_that_fill_a_card(blocks, heads, expected):
    assert heads_per_wave(blocks, heads, 132) == expected


def test_widths_of_tiles():
    assert [padded_width(n) for n in (1, 16, 17, 128, 192, 256)] == [16, 16, 32, 128, 256, 256]
