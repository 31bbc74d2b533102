"""Bit packing: streams of every width, AWQ's column order, and round trips through whole formats."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm_jax.checkpoint.formats.bit_packing import (
    AWQ_REVERSE_ORDER,
    packed_word_count,
    reorder_awq_columns,
    unpack_bits,
)
from glm_jax.weights import dequantize
from tests.checkpoint.formats import golden_cases


def pack(values, bits):
    """Packs by definition, with Python's integers: value i starts at bit i·bits of one long number."""
    number = sum(int(value) << (bits * i) for i, value in enumerate(values))
    count = -(-len(values) * bits // 32)
    return np.frombuffer(number.to_bytes(4 * count, "little"), np.uint32)


@st.composite
def streams(draw):
    bits = draw(st.integers(2, 8))
    values = draw(st.lists(st.integers(0, (1 << bits) - 1), min_size=1, max_size=100))
    return bits, values


@given(streams())
def test_streams_round_trip(stream):
    bits, values = stream
    words = pack(values, bits)
    assert len(words) == packed_word_count(len(values), bits)
    np.testing.assert_array_equal(unpack_bits(words, bits, len(values)), values)


@given(st.integers(2, 8), st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_rows_are_streams_of_their_own(bits, count, seed):
    values = np.random.default_rng(seed).integers(0, 1 << bits, (2, 3, count))
    words = np.apply_along_axis(lambda row: pack(row, bits), -1, values)
    unpacked = unpack_bits(words.view(np.int32), bits, count)
    assert unpacked.dtype == np.uint8
    np.testing.assert_array_equal(unpacked, values)


def test_a_stream_of_more_words_than_values_is_cut():
    np.testing.assert_array_equal(unpack_bits(np.array([0x76543210, 0xFFFFFFFF], np.uint32), 4, 6), range(6))


def test_known_words():
    assert list(pack(range(8), 4)) == [0x76543210]
    columns = np.empty(8, int)
    columns[list(AWQ_REVERSE_ORDER)] = range(8)
    assert list(pack(columns, 4)) == [0x75316420]
    np.testing.assert_array_equal(reorder_awq_columns(unpack_bits(pack(columns, 4), 4, 8)), range(8))


@given(st.integers(1, 5), st.integers(4, 7), st.integers(0, 2**32 - 1))
def test_awq_order_round_trips(blocks, bits, seed):
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (3, 8 * blocks))
    stored = np.empty_like(codes)
    for column in range(codes.shape[1]):
        block, offset = divmod(column, 8)
        stored[:, 8 * block + AWQ_REVERSE_ORDER[offset]] = codes[:, column]
    words = np.apply_along_axis(lambda row: pack(row, bits), -1, stored)
    np.testing.assert_array_equal(reorder_awq_columns(unpack_bits(words, bits, codes.shape[1])), codes)


@given(st.sampled_from([2, 3, 4, 5, 6, 8]), st.integers(1, 3), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_mlx_round_trips(tmp_path_factory, bits, outputs, groups, seed):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 1 << bits, (outputs, 32 * groups))
    scales, biases = rng.normal(size=(2, outputs, groups)).astype(np.float16)
    parts = {"weight": np.apply_along_axis(lambda row: pack(row, bits), -1, codes), "scales": scales, "biases": biases}
    config = {"bits": bits, "group_size": 32, "mode": "affine"}
    stored = golden_cases.read_weight(tmp_path_factory.mktemp("mlx"), parts, config)
    spread = [np.repeat(part.astype(np.float32), 32, -1) for part in (scales, biases)]
    values = codes.astype(np.float32) * spread[0] + spread[1]
    np.testing.assert_array_equal(dequantize(stored.load(None)), values)


@given(
    st.sampled_from([2, 3, 4, 5, 6, 8]),
    st.integers(1, 9),
    st.integers(1, 3),
    st.sampled_from([7, 16, 24]),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_compressed_tensors_round_trips(tmp_path_factory, bits, outputs, groups, group, symmetric, seed):
    """Matrices with an odd number of 4-bit inputs are dequantized."""
    rng = np.random.default_rng(seed)
    inputs, middle = groups * group, 1 << (bits - 1)
    codes = rng.integers(0, 1 << bits, (outputs, inputs))
    zeros = np.full((outputs, groups), middle) if symmetric else rng.integers(0, 1 << bits, (outputs, groups))
    scales = rng.uniform(0.5, 2, (outputs, groups)).astype(ml_dtypes.bfloat16)
    parts = {
        "weight_packed": np.apply_along_axis(lambda row: pack(row, bits), -1, codes).view(np.int32),
        "weight_scale": scales,
        "weight_shape": np.array([outputs, inputs]),
    }
    if not symmetric:
        parts["weight_zero_point"] = np.apply_along_axis(lambda row: pack(row, bits), 0, zeros).view(np.int32)
    weights = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": group, "symmetric": symmetric}
    config = {"quant_method": "compressed-tensors", "config_groups": {"g": {"targets": ["Linear"], "weights": weights}}}
    stored = golden_cases.read_weight(tmp_path_factory.mktemp("ct"), parts, config)
    unpacked = stored.load(None)
    dense = bits <= 4 and inputs % 2 == 1
    assert (stored.spec is None) == dense == isinstance(unpacked, np.ndarray)
    assert stored.dtype == (np.float32 if dense else ml_dtypes.bfloat16)
    points, spread = (np.repeat(part.astype(np.float32), group, -1) for part in (zeros, scales))
    np.testing.assert_array_equal(np.asarray(unpacked), (codes.astype(np.float32) - points) * spread)


def gptq_parts(codes, zeros, scales, index=None):
    parts = {
        "qweight": np.apply_along_axis(lambda row: pack(row, 4), 0, codes.T).view(np.int32),
        "qzeros": np.apply_along_axis(lambda row: pack(row, 4), 1, zeros.T).view(np.int32),
        "scales": np.ascontiguousarray(scales.T),
    }
    return parts if index is None else parts | {"g_idx": index.astype(np.int32)}


GPTQ = {"quant_method": "gptq", "bits": 4, "sym": False, "checkpoint_format": "gptq_v2"}


@pytest.mark.parametrize(
    ("inputs", "group", "sizes"),
    [(32, 8, [8, 8, 8, 8]), (32, 8, [7, 9, 8, 8]), (24, 16, [16, 8]), (15, 15, [15]), (30, 15, [15, 15])],
)
def test_gptq_groups_of_any_size(tmp_path, inputs, group, sizes):
    """Equal groups stay quantized, also in activation order; matrices with other groups are dequantized."""
    rng = np.random.default_rng(3)
    index = np.repeat(np.arange(len(sizes)), sizes)
    order = index[rng.permutation(inputs)]
    codes = rng.integers(0, 16, (8, inputs))
    zeros, scales = rng.integers(0, 16, (8, len(sizes))), rng.uniform(1, 2, (8, len(sizes))).astype(np.float16)
    for ordered, groups in ((False, index), (True, order)):
        config = GPTQ | {"desc_act": ordered, "group_size": group}
        if not ordered and sizes == [7, 9, 8, 8]:
            continue
        stored = golden_cases.read_weight(tmp_path / str(ordered), gptq_parts(codes, zeros, scales, groups), config)
        values = (codes - zeros[:, groups]).astype(np.float32) * scales.astype(np.float32)[:, groups]
        np.testing.assert_array_equal(np.asarray(stored.load(None)), values)
        regular = len(set(sizes)) == 1 and inputs % 2 == 0
        assert (stored.spec is not None) == regular
        assert stored.dtype == (np.float16 if regular else np.float32)
