"""Instructions that turn codes into bfloat16, in an interpreter of their own: Triton's knows no assembly."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.tiles import BITS_PER_QVALUE, decode_qvalues

pytestmark = pytest.mark.kernels
KINDS = ["int4", "uint4", "fp4", "int8", "uint8", "fp8", "bfloat16"]


def number(text):
    return np.uint32(int(text[2:], 16)) if text.startswith("0f") else np.uint32(int(text, 0))


def as_float(bits):
    return np.asarray(bits, np.uint32).view(np.float32)


def halves(word):
    """The two bfloat16 of registers, as float32: the low one first."""
    return as_float(word << np.uint32(16)), as_float(word & np.uint32(0xFFFF0000))


def rounded(value):
    """Float32 to the bits of bfloat16, ties to even."""
    bits = np.asarray(value, np.float32).view(np.uint32)
    return (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)


def together(low, high):
    return rounded(low) | (rounded(high) << np.uint32(16))


def prmt(a, b, selector):
    """Four of eight bytes: the PTX manual, "prmt", default mode."""
    parts = [(word >> np.uint32(8 * i)) & np.uint32(255) for word in (a, b) for i in range(4)]
    chosen = [parts[(int(selector) >> (4 * i)) & 15] for i in range(4)]
    return sum(part << np.uint32(8 * i) for i, part in enumerate(chosen))


def lop3(a, b, c, table):
    assert int(table) == 0xEA  # (0xF0 & 0xCC) | 0xAA
    return (a & b) | c


def fma(a, b, c):
    low, high = (x.astype(np.float64) * y + z for x, y, z in zip(*map(halves, (a, b, c)), strict=True))
    return together(low.astype(np.float32), high.astype(np.float32))


OPERATIONS = {
    "mov.b32": lambda a: a,
    "xor.b32": lambda a, b: a ^ b,
    "and.b32": lambda a, b: a & b,
    "shl.b32": lambda a, b: a << b,
    "shr.u32": lambda a, b: a >> b,
    "prmt.b32": prmt,
    "lop3.b32": lop3,
    "add.f32": lambda a, b: (as_float(a) + as_float(b)).view(np.uint32),
    "cvt.rn.bf16x2.f32": lambda a, b: together(as_float(b), as_float(a)),
    "fma.rn.bf16x2": fma,
}


def run(text, first, second):
    """What the instructions make of registers: arrays of uint32."""
    registers = {"$1": first, "$2": second}
    declared = set(re.findall(r"\w+", " ".join(re.findall(r"\.reg \.\w+ ([^;]+);", text))))
    body = re.sub(r"\.reg [^;]+;", "", text).strip("{} ")
    for line in filter(None, (part.strip() for part in body.split(";"))):
        name, rest = line.split(" ", 1)
        to, *given = (part.strip() for part in rest.split(","))
        assert to == "$0" or to in declared
        values = [registers[x] if x in registers else np.full_like(first, number(x)) for x in given]
        if name in ("prmt.b32", "lop3.b32"):
            values[-1] = number(given[-1])
        registers[to] = OPERATIONS[name](*values)
    return registers["$0"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_code_in_every_place(kind):
    """Each beside random neighbors, which must not be seen."""
    from pallas_kernels._dequantize import dequant_ptx

    bits, rng = BITS_PER_QVALUE[kind], np.random.default_rng(0)
    codes = np.arange(1 << bits, dtype=np.uint32)
    expected = np.asarray(decode_qvalues(jnp.asarray(codes), kind))
    for place in range(32 // bits):
        shift, hole = np.uint32(place * bits), np.uint32(((1 << bits) - 1) << (place * bits))
        noise = [rng.integers(0, 1 << 32, codes.size, np.uint32) & ~hole for _ in range(2)]
        low, high = halves(
            run(dequant_ptx(kind, place), noise[0] | (codes << shift), noise[1] | (codes[::-1] << shift))
        )
        finite = np.isfinite(expected)  # a weight is never one of the others
        np.testing.assert_array_equal(low[finite], expected[finite])
        np.testing.assert_array_equal(high[finite[::-1]], expected[::-1][finite[::-1]])
