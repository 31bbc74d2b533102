"""The header parser agrees with the gguf package on valid files, and rejects all others quickly and clearly."""

import io
import struct

import gguf
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from glm_jax.checkpoint.formats.gguf import open_gguf
from glm_jax.checkpoint.formats.gguf.header import MAX_GGUF_HEADER_BYTES, MAX_STRINGS, read_gguf_header
from glm_jax.errors import CheckpointError
from tests.builders.gguf_files import architecture_fields, random_blocks, small_mtp_config, to_gguf_tensors, write_gguf
from tests.builders.hf_checkpoints import random_tensors

CONFIG = small_mtp_config(num_hidden_layers=1, n_routed_experts=2, num_experts_per_tok=1)
FIELDS = architecture_fields(CONFIG) | {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "glm4",
    "tokenizer.ggml.tokens": ["a", "b", "ab"],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.chat_template": "{{ x }}",
    "tokenizer.ggml.scores": [0.5, 1.5, -2.0],
    "tokenizer.ggml.token_type": [1, 1, 1],
    "general.name": "näme",
    "a.bool": True,
    "a.float": 0.25,
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("header") / "good.gguf"
    return write_gguf(path, to_gguf_tensors(random_tensors(CONFIG, 0), CONFIG), FIELDS)


def string(text):
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def field(key, kind, raw):
    return string(key) + struct.pack("<I", kind) + raw


def info(name="t", shape=(4,), kind=0, offset=0):
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def blob(fields=(), tensors=(), data=b"", *, magic=b"GGUF", version=3, counts=None, align=32):
    head = magic + struct.pack("<IQQ", version, *(counts or (len(tensors), len(fields))))
    head += b"".join(fields) + b"".join(tensors)
    return head + bytes(-len(head) % align) + data


def parse(raw, size=None):
    return read_gguf_header(io.BytesIO(raw), len(raw) if size is None else size, "x.gguf")


def test_agrees_with_the_package(tmp_path):
    """Every kind of field and several tensor types, written by the package, read the same here."""
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "deepseek2")
    numbers = {"uint8": 200, "int8": -3, "uint16": 60_000, "int16": -9, "uint32": 2**31, "int32": -5}
    for kind, value in (numbers | {"uint64": 2**40, "int64": -(2**40), "float64": 0.1, "bool": False}).items():
        getattr(writer, f"add_{kind}")(f"n.{kind}", value)
    writer.add_float32("n.float32", 0.1)
    writer.add_array("l.text", ["x", "", "ÿ"])
    writer.add_array("l.number", [3, -4])
    for kind in ("Q4_K", "Q8_0", "IQ4_XS"):
        raw, _ = random_blocks(kind, (3, 512))
        writer.add_tensor(f"{kind}.weight", raw, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.add_tensor("plain", np.arange(30, dtype=np.float16).reshape(2, 3, 5))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = parse((tmp_path / "x.gguf").read_bytes())
    package_reader = gguf.GGUFReader(tmp_path / "x.gguf")
    named = {key: f.contents() for key, f in package_reader.fields.items() if not key.startswith("GGUF.")}
    assert set(header.fields) == set(named)
    for key, expected in named.items():
        value = header.fields[key]
        if isinstance(value, list):
            assert [text.decode() for text in value] == expected
        else:
            assert (value.tolist() if isinstance(value, np.ndarray) else value) == expected
    assert list(header.tensors) == [t.name for t in package_reader.tensors]
    for tensor in package_reader.tensors:
        entry = header.tensors[tensor.name]
        assert (entry.type.name, entry.shape) == (tensor.tensor_type.name, tuple(tensor.shape[::-1].tolist()))
        assert (entry.begin, entry.end) == (tensor.data_offset, tensor.data_offset + tensor.n_bytes)


ONE = field("general.alignment", 4, struct.pack("<I", 64))


def test_alignment_and_version_two():
    header = parse(blob([ONE], [info()], bytes(16), align=64, version=2))
    assert header.tensors["t"].begin % 64 == 0


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "x.gguf has 0 bytes, too few for a GGUF file: download it again"),
        (b"GGUF" + bytes(10), "14 bytes, too few"),
        (blob(magic=b"GGML"), "is not a GGUF file: it begins with b'GGML'"),
        (b"version https://git-lfs.github.com/spec/v1", "only a Git LFS pointer"),
        (blob(version=1), "is GGUF version 1; versions 2 and 3 can be read"),
        (blob(version=4), "is GGUF version 4"),
        (blob(version=0), "is GGUF version 0"),
        (blob(version=3 << 24), "is a big-endian GGUF file"),
        (blob(counts=(2**60, 0)), "a header of 1152921504606846976 tensors and 0 fields is damaged"),
        (blob(counts=(0, 2**60)), "a header of 0 tensors and 1152921504606846976 fields is damaged"),
        (blob(counts=(100, 0)), "a header of 100 tensors and 0 fields goes beyond the file"),
        (blob(counts=(0, 100)), "goes beyond the file, which has 32 bytes: it is truncated or damaged"),
        (blob([struct.pack("<Q", 2**60) + bytes(20)]), "a string in the header goes beyond the file"),
        (blob([field("a", 99, b"")]), "field a has the unknown type 99"),
        (blob([field(b"\xff\xfe", 4, bytes(4))]), "a field's name is not UTF-8"),
        (blob([field("a\nb", 8, string(b"\xff"))]), r"field a\nb is not UTF-8 text"),
        (blob([field("a", 9, struct.pack("<IQ", 4, 2**60))]), "field a, a list of 1152921504606846976, goes beyond"),
        (blob([field("a", 9, struct.pack("<IQ", 8, 2**60))]), "field a, a list of 1152921504606846976, goes beyond"),
        (blob([field("a", 9, struct.pack("<IQ", 9, 1) + bytes(8))]), "field a has the unknown type 9"),
        (blob([field("a", 4, bytes(4))] * 2), "x.gguf has the field a twice"),
        (blob([field("general.alignment", 4, struct.pack("<I", 24))]), "general.alignment is 24, not a power of two"),
        (blob([field("general.alignment", 4, bytes(4))]), "general.alignment is 0, not a power of two"),
        (blob([field("general.alignment", 8, string("x"))]), "general.alignment must be a whole number, not 'x'"),
        (blob([], [info()], bytes(8)), "x.gguf is truncated: tensor t ends at byte 80, the file at 72"),
        (blob([], [info(shape=(2**62,))], bytes(8)), "x.gguf is truncated: tensor t ends at byte"),
        (blob([], [info(shape=(2**63, 2**63, 2**63, 2**63))], bytes(8)), "x.gguf is truncated: tensor t ends at byte"),
        (blob([], [info(offset=2**63)], bytes(16)), "x.gguf is truncated: tensor t ends at byte"),
        (blob([], [info(offset=8)], bytes(64)), "tensor t is at offset 8, which is not a multiple of 32"),
        (blob([], [info(kind=4)], bytes(16)), "tensor t has the unknown GGUF type 4: get a file quantized with"),
        (blob([], [info(kind=31)], bytes(16)), "tensor t has the unknown GGUF type 31"),
        (blob([], [info(shape=())], bytes(16)), "tensor t has 0 dimensions"),
        (blob([], [info(shape=(1,) * 5)], bytes(16)), "tensor t has 5 dimensions"),
        (blob([], [info(shape=(0, 4))], bytes(16)), "tensor t is [4, 0], which F32, with its blocks of 1, cannot be"),
        (blob([], [info(shape=(48,), kind=8)], bytes(99)), "tensor t is [48], which Q8_0, with its blocks of 32"),
        (blob([], [info(), info()], bytes(16)), "x.gguf has the tensor t twice"),
        (blob([], [info("a"), info("b")], bytes(16)), "tensor b overlaps the one before it"),
        (blob([], [info(b"\xff")], bytes(16)), "a tensor's name is not UTF-8"),
    ],
)
def test_refused_in_words(raw, words):
    with pytest.raises(CheckpointError) as caught:
        parse(raw)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


class Endless(io.RawIOBase):
    """An endless file of any claimed size, which counts the bytes that are read."""

    def __init__(self, front):
        self.front, self.at, self.total = front, 0, 0

    def read(self, count=-1):
        data = self.front[self.at : self.at + count].ljust(count, b"\0")
        self.at, self.total = self.at + count, self.total + count
        return data


@pytest.mark.parametrize(
    ("claim", "words"),
    [
        (field("a", 8, struct.pack("<Q", 2**40)), "the header has more than"),
        (field("a", 9, struct.pack("<IQ", 10, 2**37)), "the header has more than"),
        (field("a", 9, struct.pack("<IQ", 8, MAX_STRINGS + 1)), "is longer than any vocabulary"),
        (struct.pack("<Q", MAX_GGUF_HEADER_BYTES), "the header has more than"),
    ],
)
def test_a_huge_file_is_not_read_to_refuse_it(claim, words):
    file = Endless(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + claim)
    with pytest.raises(CheckpointError, match=words):
        read_gguf_header(file, 2**45, "x.gguf")
    assert file.total < 1000


def test_a_file_cut_anywhere_is_refused(good, tmp_path):
    raw = good.read_bytes()
    header = parse(raw)
    end = max(entry.end for entry in header.tensors.values())
    for cut in [*range(0, 700, 7), *range(700, end, 997), end - 1]:
        with pytest.raises(CheckpointError):
            parse(raw[:cut])
    parse(raw[:end])


def complaint(path):
    """Error message of opening the file and reading all of it; None if that works."""
    try:
        opened = open_gguf(path)
        opened.fingerprint()
        for stored in opened.weights.values():
            with np.errstate(all="ignore"):
                stored.load(None)
        opened.asset_files()
    except CheckpointError as error:
        return str(error)
    return None


def printable_or_none(text):
    return text is None or (text.isprintable() and text)


def test_the_good_file_works(good):
    assert complaint(good) is None


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory):
    return tmp_path_factory.mktemp("spoilt") / "x.gguf"


@given(data=st.data())
def test_any_bytes_of_a_header_may_be_wrong(good, spoilt, data):
    raw = bytearray(good.read_bytes())
    length = min(entry.begin for entry in parse(bytes(raw)).tensors.values())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, length - 1))
        raw[at] = data.draw(st.integers(0, 255) | st.just(raw[at] ^ 1) | st.just(0xFF))
    spoilt.write_bytes(raw)
    assert printable_or_none(complaint(spoilt))


@given(data=st.data())
def test_any_number_of_a_header_may_be_huge(good, spoilt, data):
    raw = bytearray(good.read_bytes())
    length = min(entry.begin for entry in parse(bytes(raw)).tensors.values())
    at = data.draw(st.integers(4, length - 8))
    raw[at : at + 8] = struct.pack("<Q", data.draw(st.sampled_from([2**64 - 1, 2**63, 2**60, 2**32, 2**31, 0])))
    spoilt.write_bytes(raw)
    assert printable_or_none(complaint(spoilt))


@given(rest=st.binary(max_size=200))
@example(rest=b"")
def test_any_bytes_behind_the_magic(rest):
    with pytest.raises(CheckpointError) as caught:
        parse(b"GGUF\x03\0\0\0" + rest + b"\xff" * 200)
    assert str(caught.value).isprintable()
