"""The safetensors header parser agrees with the format's own writer, and rejects all other files clearly."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import example, given
from hypothesis import strategies as st

from glm_jax.checkpoint.messages import printable
from glm_jax.checkpoint.safetensors.header import (
    MAX_HEADER_BYTES,
    SAFETENSORS_DTYPE_NAMES,
    SAFETENSORS_DTYPES,
    parse_header,
    parse_header_length,
)
from glm_jax.checkpoint.safetensors.reader import SafetensorsFile
from glm_jax.errors import CheckpointError


def file_bytes(fields, data=b"", *, length=None):
    raw = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def parse(blob):
    """Parses the header of a file with these bytes, as `SafetensorsFile` does."""
    length = parse_header_length(blob[:8], len(blob), "x.safetensors")
    return parse_header(blob[8 : 8 + length], len(blob), "x.safetensors")


def tensor(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize("name", [n for n in SAFETENSORS_DTYPES if n != "F8_E8M0"])
def test_agrees_with_the_formats_own_writer(tmp_path, name):
    dtype = SAFETENSORS_DTYPES[name]
    arrays = {
        "matrix": np.arange(12).reshape(3, 4).astype(dtype),
        "scalar": np.ones((), dtype),
        "empty": np.zeros((0, 5), dtype),
        "vector": np.arange(7).astype(dtype),
    }
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file(arrays, path, metadata={"format": "pt"})
    shard = SafetensorsFile(path)
    assert dict(shard.header.metadata) == {"format": "pt"}
    assert set(shard.header.tensors) == set(arrays)
    for key, array in arrays.items():
        got = shard.get_tensor(key)
        assert got.dtype == array.dtype
        assert got.shape == array.shape
        assert got.tobytes() == array.tobytes()
        assert not got.flags.writeable or got.size == 0


def test_views_share_the_mapped_file(tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file({"a": np.arange(1000, dtype=np.float32)}, path)
    shard = SafetensorsFile(path)
    assert np.shares_memory(shard.get_tensor("a"), shard.get_tensor("a")[10:20])
    assert not shard.get_tensor("a").flags.owndata


def test_dtype_names_are_one_to_one():
    assert {SAFETENSORS_DTYPE_NAMES[dtype]: dtype for dtype in SAFETENSORS_DTYPES.values()} == SAFETENSORS_DTYPES
    assert SAFETENSORS_DTYPES["BF16"] == ml_dtypes.bfloat16


@pytest.mark.parametrize(
    ("blob", "words"),
    [
        (b"", "0 bytes, too few"),
        (b"\x01\x02\x03", "too few"),
        (file_bytes({}, length=10_000), "truncated"),
        (file_bytes({}, length=2**64 - 1), "truncated"),
        (file_bytes(b"{"), "not valid JSON"),
        (file_bytes(b""), "not valid JSON"),
        (file_bytes(b"\xff\xfe{}"), "not valid JSON"),
        (file_bytes(b"[1, 2]"), "must be a JSON object"),
        (file_bytes(b"[" * 50_000), "not valid JSON"),
        (file_bytes(b'{"a": ' + b"9" * 5000 + b"}"), "not valid JSON"),
        (file_bytes(b'{"a": {}, "a": {}}'), "names a twice"),
        (file_bytes({"__metadata__": {"a": 1}}), "__metadata__"),
        (file_bytes({"__metadata__": []}), "__metadata__"),
        (file_bytes({"a": 1}), "must have dtype, shape and data_offsets"),
        (file_bytes({"a": {"dtype": "F32", "shape": [2]}}), "must have dtype, shape and data_offsets"),
        (file_bytes({"a": {**tensor(), "more": 1}}), "must have dtype, shape and data_offsets"),
        (file_bytes({"a": tensor("F4")}, b"x" * 8), "has dtype F4; known are"),
        (file_bytes({"a": {**tensor(), "dtype": ["F32"]}}, b"x" * 8), "has dtype"),
        (file_bytes({"a": tensor(shape=[-2])}, b"x" * 8), "non-negative integers"),
        (file_bytes({"a": tensor(shape=[2.0])}, b"x" * 8), "non-negative integers"),
        (file_bytes({"a": tensor(shape=[True])}, b"x" * 8), "non-negative integers"),
        (file_bytes({"a": tensor(shape=[2**70], offsets=(0, 2**72))}, b"x" * 8), "non-negative integers"),
        (file_bytes({"a": tensor(shape=[1] * 40)}, b"x" * 8), "non-negative integers"),
        (file_bytes({"a": tensor(offsets=(0, 8, 9))}, b"x" * 8), "non-negative integers"),
        (file_bytes({"a": tensor(offsets=(8, 0))}, b"x" * 8), "-8 bytes where F32"),
        (file_bytes({"a": tensor(offsets=(0, 4))}, b"x" * 4), "4 bytes where F32 [2] needs 8"),
        (file_bytes({"a": tensor(shape=[2**40, 2**40])}, b"x" * 8), "8 bytes where F32"),
        (file_bytes({"a": tensor()}, b"x" * 7), "truncated: tensor a ends at byte"),
        (file_bytes({"a": tensor(offsets=(8, 16))}, b"x" * 16), "leaves a gap of 8 bytes"),
        (file_bytes({"a": tensor(), "b": tensor(offsets=(4, 12))}, b"x" * 12), "tensor b overlaps"),
        (file_bytes({"a": tensor(), "b": tensor()}, b"x" * 8), "overlaps"),
        (file_bytes({"a": tensor(), "b": tensor(offsets=(12, 20))}, b"x" * 20), "tensor b leaves a gap of 4"),
        (file_bytes({"a": tensor()}, b"x" * 9), "1 bytes after the last tensor"),
        (file_bytes({}, b"x"), "1 bytes after the last tensor"),
        (b"PK\x03\x04" + b"pickle" * 50, "truncated or not a safetensors file"),
    ],
)
def test_damage_is_named(blob, words):
    with pytest.raises(CheckpointError) as caught:
        parse(blob)
    assert words in str(caught.value)


def test_huge_header_is_refused_before_it_is_read():
    with pytest.raises(CheckpointError, match="announces a header"):
        parse_header_length(struct.pack("<Q", MAX_HEADER_BYTES + 1), 10 * MAX_HEADER_BYTES, "x")


GOOD = file_bytes(
    {
        "__metadata__": {"format": "pt"},
        "a": tensor("BF16", (3, 2), (0, 12)),
        "b": tensor("F32", (2,), (12, 20)),
        "c": tensor("U8", (0,), (20, 20)),
    },
    bytes(range(20)),
)


@given(st.data())
def test_mutated_files_never_crash(data):
    """Any change of any bytes gives a consistent header or a CheckpointError, never another exception."""
    blob = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(blob) - 1))
        action = data.draw(st.sampled_from(["set", "cut", "insert", "drop"]))
        if action == "set":
            blob[at] = data.draw(st.integers(0, 255))
        elif action == "cut" and at > 0:
            del blob[at:]
        elif action == "insert":
            blob[at:at] = data.draw(st.binary(min_size=1, max_size=9))
        elif len(blob) > 1:
            del blob[at]
    assert_sound(bytes(blob))


_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(list(SAFETENSORS_DTYPES)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
_SIZES = st.lists(st.integers(-1, 2**65), max_size=3)
_ENTRIES = st.fixed_dictionaries(
    {"dtype": st.sampled_from([*SAFETENSORS_DTYPES, "X"]), "shape": _SIZES, "data_offsets": _SIZES}
)


@given(st.dictionaries(st.text(max_size=6), _ENTRIES | _VALUES, max_size=4), st.binary(max_size=64))
@example({"\ud800": tensor()}, b"x" * 8)
def test_arbitrary_headers_never_crash(fields, data):
    assert_sound(file_bytes(json.dumps(fields).encode("utf-8", "surrogatepass"), data))


@given(st.binary(max_size=200))
def test_arbitrary_bytes_never_crash(blob):
    assert_sound(blob)


def assert_sound(blob):
    try:
        header = parse(blob)
    except CheckpointError as error:
        str(error).encode("utf-8")  # printable everywhere
        return
    at = 8 + int.from_bytes(blob[:8], "little")
    for entry in sorted(header.tensors.values(), key=lambda e: (e.begin, e.end)):
        assert entry.begin == at
        assert entry.end - entry.begin == np.prod(entry.shape, dtype=object) * entry.dtype.itemsize
        at = entry.end
    assert at == len(blob)


@given(st.text(max_size=300))
def test_printable_text_is_short_and_safe(text):
    shown = printable(text)
    shown.encode("utf-8")
    assert all(c.isprintable() for c in shown)
