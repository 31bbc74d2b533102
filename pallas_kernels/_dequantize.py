"""Dequantization as Triton device functions: the step of the matrix kernels between loading and multiplying weights.

For bfloat16, packed weights are dequantized in pairs, which share a register, by PTX that is written out: a compiler
that sees one qvalue at a time needs twice as many instructions, and on cards with fast memory a product with few rows
waits for these instructions rather than for the memory. The float32 form is plain Triton, for the interpreter and for
float32 activations.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decode_qvalue(qvalue, KIND: tl.constexpr, DTYPE: tl.constexpr):
    """Values of qvalues (uint32), in the dtype of the products.

    A 4-bit integer becomes the low bits of the bfloat16 128, whose unit in the last place it is, and an 8-bit integer
    those of the float32 2^23; an exact subtraction leaves the value. So 4 bits need no conversion instruction.
    """
    if KIND == "int4" or KIND == "uint4":
        zero_point: tl.constexpr = 8 if KIND == "int4" else 0
        if DTYPE == tl.bfloat16:
            return (qvalue | 0x4300).to(tl.uint16).to(tl.bfloat16, bitcast=True) - (128.0 + zero_point)
        return ((qvalue | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + zero_point)).to(DTYPE)
    if KIND == "int8" or KIND == "uint8":
        sign_bit: tl.constexpr = 128 if KIND == "int8" else 0
        return (((qvalue ^ sign_bit) | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + sign_bit)).to(DTYPE)
    if KIND == "fp8":
        # The same bits, shifted into a float16, are the value times 2^-8, subnormal numbers included.
        half = (((qvalue & 0x80) << 8) | ((qvalue & 0x7F) << 7)).to(tl.uint16).to(tl.float16, bitcast=True)
        return (half.to(tl.float32) * 256.0).to(DTYPE)
    if KIND == "fp4":
        half = (((qvalue & 8) << 12) | ((qvalue & 7) << 9)).to(tl.uint16).to(tl.float16, bitcast=True)
        return (half.to(tl.float32) * 16384.0).to(DTYPE)
    if KIND == "bfloat16":
        if DTYPE == tl.bfloat16:
            return qvalue.to(tl.uint16).to(tl.bfloat16, bitcast=True)
        return (qvalue << 16).to(tl.float32, bitcast=True).to(DTYPE)
    return qvalue.to(tl.float32, bitcast=True).to(DTYPE)


# ``constexpr_function`` makes these functions part of the key of Triton's cache of compiled kernels.
@triton.constexpr_function
def dequant_ptx(kind: str, i: int) -> str:
    """PTX that writes two bfloat16 values to ``$0``: the i-th qvalues of the packed words ``$1`` and ``$2``.

    Integers become the low bits of a number whose unit in the last place they are, which is then subtracted: the
    bfloat16 128 for 4 bits, the float32 2^23 for 8. Floats of 4 and 8 bits, shifted to the exponent and mantissa of a
    bfloat16, are too small by a power of two, subnormal numbers included, and are multiplied by it.
    """
    if kind == "bfloat16":
        return _ptx_block([_select_halves("$0", i)])
    if kind in ("int8", "uint8"):
        flip, subtrahend = ("0x80808080", "0fCB000080") if kind == "int8" else ("0", "0fCB000000")
        lines = ["mov.b32 one, 0x4B000000"]
        for name, word in (("a", "$1"), ("b", "$2")):
            lines += [f"xor.b32 {name}, {word}, {flip}", f"prmt.b32 {name}, one, {name}, 0x300{4 + i}"]
            lines += [f"mov.b32 f{name}, {name}", f"add.f32 f{name}, f{name}, {subtrahend}"]
        return _ptx_block([*lines, "cvt.rn.bf16x2.f32 $0, fb, fa"])
    if kind == "fp8":
        byte_selector = f"0x{4 + i}{4 + i}{i}{i}"
        return _ptx_block(
            [
                f"prmt.b32 a, $1, $2, {byte_selector}",
                "shr.u32 b, a, 4",
                "and.b32 b, b, 0x07F007F0",
                *_apply_sign("a", 120),
            ]
        )
    shift = 4 * (i % 4)
    if kind == "fp4":
        move = f"shl.b32 b, a, {6 - shift}" if shift <= 6 else f"shr.u32 b, a, {shift - 6}"
        sign = f"shl.b32 a, a, {12 - shift}"
        return _ptx_block([_select_halves("a", i // 4), move, "and.b32 b, b, 0x01C001C0", sign, *_apply_sign("a", 126)])
    subtrahend = {"int4": "0xC308C308", "uint4": "0xC300C300"}[kind]
    return _ptx_block(
        [
            _select_halves("a", i // 4),
            f"shr.u32 a, a, {shift}",
            "lop3.b32 a, a, 0x000F000F, 0x43004300, 0xEA",  # (a & 15) | 128.0
            *_ptx_fma("a", "0x3F803F80", subtrahend),
        ]
    )


@triton.constexpr_function
def _ptx_block(lines: list[str]) -> str:
    return "{ .reg .b32 a, b, one, two; .reg .f32 fa, fb; " + "".join(f"{line}; " for line in lines) + "}"


@triton.constexpr_function
def _select_halves(register: str, half: int) -> str:
    """Line that packs the low (0) or high (1) halves of both words into a register."""
    return f"prmt.b32 {register}, $1, $2, {('0x5410', '0x7632')[half]}"


@triton.constexpr_function
def _apply_sign(signs: str, power: int) -> list[str]:
    """Lines that give the magnitudes in ``b`` these signs and multiply them by a power of two."""
    factor = (127 + power) << 7
    return [f"lop3.b32 b, {signs}, 0x80008000, b, 0xEA", *_ptx_fma("b", f"0x{factor:04X}{factor:04X}", "0x80008000")]


@triton.constexpr_function
def _ptx_fma(register: str, factor: str, summand: str) -> list[str]:
    return [f"mov.b32 one, {factor}", f"mov.b32 two, {summand}", f"fma.rn.bf16x2 $0, {register}, one, two"]


@triton.jit
def dequant_plane(packed, i: tl.constexpr, LAYOUT: tl.constexpr, DTYPE: tl.constexpr):
    """Values of the i-th qvalues of packed words, before scale and offset; i is a constant."""
    if LAYOUT.qvalues_per_word > 1 and DTYPE == tl.bfloat16:
        text: tl.constexpr = dequant_ptx(LAYOUT.kind, i)
        return tl.inline_asm_elementwise(text, "=r,r,r", [packed], dtype=tl.bfloat16, is_pure=True, pack=2)
    return dequant_planes(packed, i, LAYOUT, DTYPE)


@triton.jit
def dequant_planes(packed, i, LAYOUT: tl.constexpr, DTYPE: tl.constexpr):
    """Like :func:`dequant_plane` for any i: a value of the kernel, or a tensor that broadcasts against the words."""
    KIND: tl.constexpr = LAYOUT.kind
    if LAYOUT.qvalues_per_word == 1:
        return decode_qvalue(packed, KIND, DTYPE)
    bits: tl.constexpr = 32 // LAYOUT.qvalues_per_word
    return decode_qvalue((packed >> (bits * i)) & ((1 << bits) - 1), KIND, DTYPE)
