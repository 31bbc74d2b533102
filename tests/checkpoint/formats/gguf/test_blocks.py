"""Every tensor type decodes to ggml's numbers, bit for bit."""

import sys
import tracemalloc

import gguf
import numpy as np
import pytest

from glm_jax.checkpoint.formats.gguf.blocks import EXPANDED_TYPES, REPACKED_TYPES, expand_blocks, repack_blocks
from glm_jax.checkpoint.formats.gguf.ggml_types import GGML_TYPES
from glm_jax.errors import CheckpointError
from glm_jax.weights import dequantize
from tests.builders.gguf_files import FLOAT16_OFFSETS, gguf_dequantize, random_blocks

BY_NAME = {kind.name: kind for kind in GGML_TYPES.values()}
EXPECTED_SPECS = {
    "Q4_0": ("int4", 32, "float16", "none"),
    "Q4_1": ("int4", 32, "float16", "bias"),
    "Q5_0": ("int8", 32, "float16", "none"),
    "Q5_1": ("int8", 32, "float16", "bias"),
    "Q8_0": ("int8", 32, "float16", "none"),
    "Q2_K": ("int4", 16, "float32", "bias"),
    "Q3_K": ("int4", 16, "float32", "none"),
    "Q4_K": ("int4", 32, "float32", "bias"),
    "Q5_K": ("int8", 32, "float32", "bias"),
    "Q6_K": ("int8", 16, "float32", "none"),
    "IQ4_NL": ("int8", 32, "float16", "none"),
    "IQ4_XS": ("int8", 32, "float32", "none"),
    "MXFP4": ("fp4", 32, "e8m0", "none"),
}


def assert_same_bits(ours, expected):
    assert ours.dtype == expected.dtype == np.float32
    assert ours.shape == expected.shape
    np.testing.assert_array_equal(ours.view(np.uint32), expected.view(np.uint32))


def test_the_table_of_types_is_the_packages():
    known = {kind.value: (kind.name, *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType}
    assert {n: (t.name, t.block_size, t.type_size) for n, t in GGML_TYPES.items() if n in known} == known


@pytest.mark.parametrize("kind", REPACKED_TYPES)
@pytest.mark.parametrize("shape", [(3, 512), (2, 5, 256)])
def test_repacked_values_are_ggmls(kind, shape):
    tensor = random_blocks(kind, shape)
    ours = repack_blocks(tensor[0], BY_NAME[kind], "x")
    assert ours.shape == shape
    assert (ours.spec.kind, ours.spec.block[1], ours.spec.scale, ours.spec.zero) == EXPECTED_SPECS[kind]
    assert ours.spec.block[0] == 1
    assert {k: (a.shape, a.dtype) for k, a in ours.components().items()} == ours.spec.component_shapes(shape)
    assert_same_bits(dequantize(ours), gguf_dequantize(tensor))


@pytest.mark.parametrize("kind", REPACKED_TYPES)
def test_a_matrix_of_many_chunks_is_repacked_alike(kind, monkeypatch):
    tensor = random_blocks(kind, (7, 1024))
    monkeypatch.setattr("glm_jax.checkpoint.formats.gguf.blocks._CHUNK_VALUES", 1280)
    assert_same_bits(dequantize(repack_blocks(tensor[0], BY_NAME[kind], "x")), gguf_dequantize(tensor))


@pytest.mark.parametrize("kind", sorted(set(REPACKED_TYPES) - {"MXFP4"}))
def test_zeros_small_and_negative_scales_are_kept(kind):
    raw, _ = random_blocks(kind, (4, 2048))
    blocks = raw.reshape(-1, BY_NAME[kind].type_size)
    odd = np.array([0.0, -0.0, 6e-8, -6e-8, 65504.0, -65504.0, 1.0, -0.125], "<f2")
    for shift, at in enumerate(FLOAT16_OFFSETS[kind]):
        blocks[:, at : at + 2] = np.resize(np.roll(odd, shift), len(blocks)).view(np.uint8).reshape(-1, 2)
    assert_same_bits(dequantize(repack_blocks(raw, BY_NAME[kind], "x")), gguf_dequantize((raw, kind)))


def test_every_scale_and_code_of_mxfp4():
    codes = np.tile(np.arange(16, dtype=np.uint8) * 16 + np.arange(15, -1, -1, dtype=np.uint8), (255, 1))
    raw = np.concatenate([np.arange(255, dtype=np.uint8)[:, None], codes], axis=1)
    with np.errstate(over="ignore"):  # 6 times 2^127 is infinite, in both
        ours = dequantize(repack_blocks(raw, BY_NAME["MXFP4"], "x"))
        assert_same_bits(ours, gguf_dequantize((raw, "MXFP4")))
    assert np.isinf(ours[254]).any()
    assert np.abs(ours[0][ours[0] != 0]).min() == 2.0**-128


def test_a_scale_of_mxfp4_that_is_no_number_is_refused():
    raw, _ = random_blocks("MXFP4", (2, 64))
    raw[1, 17] = 255
    with pytest.raises(CheckpointError, match=r"blk\.0\.x has a block whose scale is not a number"):
        repack_blocks(raw, BY_NAME["MXFP4"], "blk.0.x")


@pytest.mark.parametrize("kind", sorted(EXPANDED_TYPES))
def test_other_types_are_expanded_by_the_package(kind, monkeypatch):
    monkeypatch.setattr("glm_jax.checkpoint.formats.gguf.blocks._CHUNK_VALUES", 1500)
    tensor = random_blocks(kind, (2, 3, 512))
    assert_same_bits(expand_blocks(tensor[0], BY_NAME[kind], "x"), gguf_dequantize(tensor))


def test_the_package_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r'x is of type IQ2_S, .*pip install "glm-jax\[gguf\]"'):
        expand_blocks(random_blocks("IQ2_S", (1, 256))[0], BY_NAME["IQ2_S"], "x")


def test_a_type_that_the_package_does_not_know_is_named():
    with pytest.raises(CheckpointError, match="x is of type Q1_0, which the installed gguf package cannot read"):
        expand_blocks(np.zeros((1, 18), np.uint8), BY_NAME["Q1_0"], "x")


def test_no_type_is_read_in_two_ways():
    assert not EXPANDED_TYPES & set(REPACKED_TYPES)
    assert set(EXPECTED_SPECS) == set(REPACKED_TYPES)


def test_memory_stays_near_the_matrix():
    raw, kind = random_blocks("Q6_K", (2048, 2048))
    repack_blocks(raw[:1], BY_NAME[kind], "x")
    tracemalloc.start()
    ours = repack_blocks(raw, BY_NAME[kind], "x")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < ours.nbytes + 16 * (1 << 20)
