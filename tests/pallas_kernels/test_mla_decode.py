"""Attention over the latent cache: queries and the new row, shares of the attention, values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.mla_decode import AttentionDims, LatentCacheArrays, absorbed_q_proj, combine_v_proj, flash_decode
from pallas_kernels.mla_decode.config import FlashDecodeConfig, ProjectionConfig, flash_decode_heuristic
from tests.pallas_kernels.builders import assert_close, make_random_tiles, random_normal, random_sum_sq
from tests.pallas_kernels.references import absorbed_q_proj_ref, combine_v_proj_ref, flash_decode_ref

pytestmark = pytest.mark.kernels
LAYERS, ONE = 3, jnp.ones(1, jnp.int32)
CODES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32, "int8": jnp.int8, "fp8": jnp.uint8}


def sizes(heads=3, nope=32, rope=32, latent=128, value=32, query_latent=64, interleave=True):
    return AttentionDims(
        heads=heads, nope=nope, rope=rope, latent=latent, value_dim=value, query_latent=query_latent,
        interleave=interleave, eps=1e-5,
    )  # fmt: skip


def cache_of(rng, att, kind, batch, slots):
    shape = (LAYERS, batch, slots, att.latent + att.rope)
    if kind in ("bfloat16", "float32"):
        return LatentCacheArrays(random_normal(rng, *shape, dtype=CODES[kind]))
    codes = rng.integers(-127, 128, shape) if kind == "int8" else rng.integers(0, 0x7F, shape)
    scales = rng.uniform(0.001, 0.02, (*shape[:3], 2)) / (1 if kind == "int8" else 2)
    return LatentCacheArrays(jnp.asarray(codes, CODES[kind]), jnp.asarray(scales, jnp.float32))


def new_tokens(rng, m):
    """What the projection before leaves: rows, sums of squares of both latents, cosines and sines."""
    both, angles = random_sum_sq(rng, m, 6), rng.standard_normal((m, 16))
    latents = (type(both)(both.partials, 0, 2), type(both)(both.partials, 2, 4))
    return (
        random_normal(rng, m, 64 + 160),
        latents,
        jnp.asarray(np.stack([np.cos(angles), np.sin(angles)]), jnp.float32),
    )


def positions_of(rng, batch, tokens, slots):
    first = rng.integers(0, slots - tokens, (batch, 1))
    return jnp.asarray(first + np.arange(tokens), jnp.int32).reshape(-1)


@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize(
    ("batch", "tokens"),
    [(1, 1), pytest.param(3, 1, marks=pytest.mark.soak), (2, 3), pytest.param(17, 1, marks=pytest.mark.soak)],
)
def test_attention_and_values(kind, batch, tokens):
    rng = np.random.default_rng([batch, tokens])
    att, slots = sizes(), 96
    cache = cache_of(rng, att, kind, batch, slots)
    query = random_normal(rng, batch * tokens, att.heads, att.latent + att.rope)
    positions = positions_of(rng, batch, tokens, slots)
    v_b = make_random_tiles(rng, (2, att.heads, att.value_dim, att.latent), "int8")
    expected = combine_v_proj_ref(
        att, flash_decode_ref(att, query, cache, ONE, positions, cache_layer_offset=1), ONE, v_b, dtype=jnp.float32
    )
    for splits in (1, 4):
        shape = FlashDecodeConfig(block_q=16, block_s=16, splits=splits)
        parts = jax.jit(lambda q, c, s=shape: flash_decode(att, q, c, ONE, positions, cache_layer_offset=1, config=s))(
            query, cache
        )
        assert_close(combine_v_proj_ref(att, parts, ONE, v_b, dtype=jnp.float32), expected)
        assert_close(jax.jit(lambda p: combine_v_proj(att, p, ONE, v_b, dtype=jnp.float32))(parts), expected)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65, 1023])
def test_every_length_of_a_context(length):
    """At and around the edges of blocks and shares, with what nobody has written behind it."""
    rng = np.random.default_rng(length)
    att = sizes(heads=2)
    codes = np.array(random_normal(rng, LAYERS, 1, 1024, 160))
    codes[:, :, length:] = np.nan
    cache, query = LatentCacheArrays(jnp.asarray(codes)), random_normal(rng, 1, 2, 160)
    positions = jnp.full(1, length - 1, jnp.int32)
    parts = flash_decode(att, query, cache, ONE, positions, config=FlashDecodeConfig(block_q=16, block_s=32, splits=8))
    clean = LatentCacheArrays(jnp.nan_to_num(cache.data))
    v_b = make_random_tiles(rng, (2, 2, 32, 128), "float32")
    expected = combine_v_proj_ref(att, flash_decode_ref(att, query, clean, ONE, positions), ONE, v_b, dtype=jnp.float32)
    assert_close(combine_v_proj(att, parts, ONE, v_b, dtype=jnp.float32), expected)


def test_more_queries_than_a_program_takes():
    """Two tokens of 20 heads are three blocks of 16 queries."""
    rng = np.random.default_rng(0)
    att, batch, tokens = sizes(heads=20), 2, 2
    query, positions = random_normal(rng, batch * tokens, 20, 160), positions_of(rng, batch, tokens, 48)
    cache, v_b = cache_of(rng, att, "float32", batch, 48), make_random_tiles(rng, (2, 20, 32, 128), "float32")
    expected = combine_v_proj_ref(att, flash_decode_ref(att, query, cache, ONE, positions), ONE, v_b, dtype=jnp.float32)
    for block in (16, 32):
        parts = flash_decode(
            att, query, cache, ONE, positions, config=FlashDecodeConfig(block_q=block, block_s=16, splits=2)
        )
        assert_close(combine_v_proj(att, parts, ONE, v_b, dtype=jnp.float32), expected)


def test_more_rows_of_queries_than_a_program_takes():
    rng = np.random.default_rng(0)
    att, m = sizes(), 18
    a, latents, table = new_tokens(rng, m)
    given = (att, a, latents, ONE, positions_of(rng, m, 1, 48), table)
    weights = (
        make_random_tiles(rng, (2, 3 * 64, 64), "int8"),
        make_random_tiles(rng, (2, 3, 128, 32), "int8", input_scale_sets=1),
    )
    cache = cache_of(rng, att, "float32", m, 48)
    expected, after = absorbed_q_proj_ref(*given, *weights, cache, dtype=jnp.float32)
    for block in (16, 32):
        shape = ProjectionConfig(block_m=block)
        found, written = absorbed_q_proj(*given, *weights, cache, dtype=jnp.float32, config=shape)
        assert_close(found, expected)
        assert_close(written.data, after.data)


@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("weights", ["int4", "int8", "float32"])
def test_queries_and_the_new_row(kind, weights):
    rng = np.random.default_rng(0)
    batch, tokens, slots = 2, 2, 48
    att = sizes(interleave=weights != "int8")
    m = batch * tokens
    a, latents, table = new_tokens(rng, m)
    q_b = make_random_tiles(rng, (2, 3 * 64, 64), weights, 32 if weights == "int4" else 0)
    k_b = make_random_tiles(rng, (2, 3, 128, 32), weights, input_scale_sets=0 if weights == "float32" else 2)
    cache, positions = cache_of(rng, att, kind, batch, slots), positions_of(rng, batch, tokens, slots)
    given = (att, a, latents, ONE, positions, table, q_b, k_b)
    expected, after = absorbed_q_proj_ref(*given, cache, cache_layer_offset=1, dtype=jnp.float32)
    for per in (1, 2):
        run = jax.jit(
            lambda c, p=per: absorbed_q_proj(
                *given, c, cache_layer_offset=1, dtype=jnp.float32, config=ProjectionConfig(tiles_per_program=p)
            )
        )
        found, written = run(cache)
        assert_close(found, expected)
        if kind in ("int8", "fp8"):
            # A value exactly between two codes may fall to either side: the next code, in a few of the new ones.
            steps = np.abs(np.asarray(written.data, np.int32) - np.asarray(after.data, np.int32))
            assert steps.max() <= 1
            assert np.count_nonzero(steps) <= 2
            assert_close(written.scales, after.scales)
        else:
            assert_close(written.data, after.data, 1e-2 if kind == "bfloat16" else 2e-6)


@pytest.mark.parametrize("position", [32, -1])
def test_rows_beyond_the_cache_are_dropped(position):
    rng = np.random.default_rng(0)
    att, slots = sizes(), 32
    cache = cache_of(rng, att, "float32", 2, slots)
    both = random_sum_sq(rng, 2, 6)
    latents = (type(both)(both.partials, 0, 2), type(both)(both.partials, 2, 4))
    _, written = absorbed_q_proj(
        att, random_normal(rng, 2, 224), latents, ONE, jnp.full(2, position, jnp.int32), random_normal(rng, 2, 2, 16),
        make_random_tiles(rng, (2, 192, 64), "int8"),
        make_random_tiles(rng, (2, 3, 128, 32), "int8", input_scale_sets=1), cache, dtype=jnp.float32,
    )  # fmt: skip
    np.testing.assert_array_equal(written.data, cache.data)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_row_that_is_not_finite_reads_as_nan(kind):
    """Damage is found, and not rounded away."""
    rng = np.random.default_rng(0)
    att = sizes()
    cache = cache_of(rng, att, kind, 1, 32)
    both = random_sum_sq(rng, 1, 6)
    latents = (type(both)(both.partials, 0, 2), type(both)(both.partials, 2, 4))
    a = random_normal(rng, 1, 224).at[0, 64 + 5].set(jnp.nan).at[0, 64 + 128 + 3].set(jnp.inf)
    _, written = absorbed_q_proj(
        att, a, latents, ONE, jnp.zeros(1, jnp.int32), random_normal(rng, 2, 1, 16),
        make_random_tiles(rng, (2, 192, 64), "int8"),
        make_random_tiles(rng, (2, 3, 128, 32), "int8", input_scale_sets=1), cache, dtype=jnp.float32,
    )  # fmt: skip
    codes = np.asarray(written.data[1, 0, 0].astype(jnp.float32))
    assert not np.isfinite(np.asarray(written.scales[1, 0, 0])).any()
    with np.errstate(invalid="ignore"):
        assert np.isnan(codes[:128] * np.asarray(written.scales[1, 0, 0, 0])).all()


def test_real_widths():
    """Twenty heads of 192 + 64 over latents of 512, a short context."""
    rng = np.random.default_rng(0)
    att = sizes(heads=20, nope=192, rope=64, latent=512, value=256, query_latent=768)
    cache, query = cache_of(rng, att, "float32", 1, 64), random_normal(rng, 1, 20, 576)
    positions = jnp.full(1, 40, jnp.int32)
    v_b = make_random_tiles(rng, (1, 20, 64, 512), "int4", 64)
    zero = jnp.zeros(1, jnp.int32)
    parts = flash_decode(att, query, cache, zero, positions, config=FlashDecodeConfig(splits=2))
    narrow = sizes(heads=20, nope=192, rope=64, latent=512, value=64, query_latent=768)
    expected = combine_v_proj_ref(
        narrow, flash_decode_ref(att, query, cache, zero, positions), zero, v_b, dtype=jnp.float32
    )
    assert_close(combine_v_proj(narrow, parts, zero, v_b, dtype=jnp.float32), expected)


@pytest.mark.parametrize("memory", [101_376, 232_448])
@pytest.mark.parametrize("itemsize", [1, 2, 4])
@pytest.mark.parametrize("slots", [256, 1024, 32_768, 262_144])
@pytest.mark.parametrize("batch", [1, 8, 64, 256])
def test_shares_that_are_chosen_without_a_measurement(memory, itemsize, slots, batch):
    shape = flash_decode_heuristic(20, batch, slots, 576, itemsize, memory, 142)
    assert shape.splits & (shape.splits - 1) == 0
    assert shape.splits == 1 or batch * shape.splits <= 142


def in_pages(rng, cache, page):
    """The same rows in pages that lie in any order, among pages of others."""
    layers, batch, slots = cache.data.shape[:3]
    count = batch * slots // page
    pages = rng.permutation(count + 3)[:count].reshape(batch, -1)

    def moved(rows):
        pool = np.array(random_normal(rng, layers, count + 3, page, rows.shape[-1])).astype(rows.dtype)
        pool[:, pages.reshape(-1)] = np.asarray(rows).reshape(layers, count, page, -1)
        return jnp.asarray(pool)

    scales = None if cache.scales is None else moved(cache.scales)
    return LatentCacheArrays(moved(cache.data), scales, jnp.asarray(pages, jnp.int32))


def in_one_piece(cache):
    layers, _, _, width = cache.data.shape
    return np.asarray(cache.data)[:, np.asarray(cache.page_table)].reshape(layers, cache.batch_size, -1, width)


@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize(
    "newest",
    [
        31,
        32,
        pytest.param(63, marks=pytest.mark.soak),
        pytest.param(64, marks=pytest.mark.soak),
        pytest.param(95, marks=pytest.mark.soak),
    ],
)
def test_a_cache_in_pages(kind, newest):
    """At and around the edges of pages: what is read, and where the new rows of several tokens go."""
    rng = np.random.default_rng(newest)
    att, batch, tokens = sizes(heads=2), 2, 2
    plain = cache_of(rng, att, kind, batch, 96)
    cache = in_pages(rng, plain, 32)
    positions = jnp.asarray([newest - 1, newest, 5, 6], jnp.int32)
    query = random_normal(rng, batch * tokens, att.heads, att.latent + att.rope)
    v_b = make_random_tiles(rng, (2, att.heads, att.value_dim, att.latent), "float32")
    expected = combine_v_proj_ref(att, flash_decode_ref(att, query, plain, ONE, positions), ONE, v_b, dtype=jnp.float32)
    parts = flash_decode(att, query, cache, ONE, positions, config=FlashDecodeConfig(block_q=16, block_s=16, splits=2))
    assert_close(combine_v_proj(att, parts, ONE, v_b, dtype=jnp.float32), expected)
    assert_close(
        combine_v_proj_ref(att, flash_decode_ref(att, query, cache, ONE, positions), ONE, v_b, dtype=jnp.float32),
        expected,
    )
    a, latents, table = new_tokens(rng, batch * tokens)
    q_b, k_b = make_random_tiles(rng, (2, 2 * 64, 64), "float32"), make_random_tiles(rng, (2, 2, 128, 32), "float32")
    given = (att, a, latents, ONE, positions, table, q_b, k_b)
    _, plain_after = absorbed_q_proj_ref(*given, plain, dtype=jnp.float32)
    _, after = absorbed_q_proj(*given, cache, dtype=jnp.float32)
    _, by_reference = absorbed_q_proj_ref(*given, cache, dtype=jnp.float32)
    np.testing.assert_array_equal(in_one_piece(by_reference), np.asarray(plain_after.data))
    found, wanted = in_one_piece(after), np.asarray(plain_after.data)
    if kind in ("int8", "fp8"):  # a value between two codes may fall to either
        assert np.count_nonzero(found != wanted) <= 2
    else:
        assert_close(found, wanted, 1e-2 if kind == "bfloat16" else 2e-6)


def test_pages_that_hold_no_whole_block():
    rng = np.random.default_rng(0)
    att = sizes(heads=2)
    cache = in_pages(rng, cache_of(rng, att, "float32", 1, 96), 24)
    query, positions = random_normal(rng, 1, 2, att.latent + att.rope), jnp.zeros(1, jnp.int32)
    config = FlashDecodeConfig(block_q=16, block_s=16)
    with pytest.raises(NotImplementedError, match="pages of 24 slots cannot be read 16 at a time"):
        flash_decode(att, query, cache, ONE, positions, config=config, implementation="triton")
    expected = flash_decode_ref(att, query, cache, ONE, positions)
    np.testing.assert_array_equal(flash_decode(att, query, cache, ONE, positions, config=config).acc, expected.acc)
