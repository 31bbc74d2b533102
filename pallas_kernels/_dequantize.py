"""Codes to values, as Triton device functions: what the matrix kernels do between loading weights and multiplying them.

For bfloat16 it is done on two values at a time, which share a register, in instructions written out: a compiler that is
given one code at a time needs twice as many, and on cards with fast memory it is they, and not the memory, that a
product with few rows waits for. The float32 form is plain Triton, for the interpreter and for float32 activations.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decode_qvalue(code, KIND: tl.constexpr, DT: tl.constexpr):
    """The values of codes, in the dtype that products are computed in.

    Integers of 4 bits take the low bits of the bfloat16 128, whose unit they are, and those of 8 bits the low bits of
    the float32 2^23; a subtraction, which is exact, leaves the value. No conversion instruction is needed for 4 bits.
    """
    if KIND == "int4" or KIND == "uint4":
        zero: tl.constexpr = 8 if KIND == "int4" else 0
        if DT == tl.bfloat16:
            return (code | 0x4300).to(tl.uint16).to(tl.bfloat16, bitcast=True) - (128.0 + zero)
        return ((code | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + zero)).to(DT)
    if KIND == "int8" or KIND == "uint8":
        flip: tl.constexpr = 128 if KIND == "int8" else 0
        return (((code ^ flip) | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + flip)).to(DT)
    if KIND == "fp8":
        # As float16 the same bits, moved, stand for the value times 2^-8, subnormal numbers included.
        half = (((code & 0x80) << 8) | ((code & 0x7F) << 7)).to(tl.uint16).to(tl.float16, bitcast=True)
        return (half.to(tl.float32) * 256.0).to(DT)
    if KIND == "fp4":
        half = (((code & 8) << 12) | ((code & 7) << 9)).to(tl.uint16).to(tl.float16, bitcast=True)
        return (half.to(tl.float32) * 16384.0).to(DT)
    if KIND == "bfloat16":
        if DT == tl.bfloat16:
            return code.to(tl.uint16).to(tl.bfloat16, bitcast=True)
        return (code << 16).to(tl.float32, bitcast=True).to(DT)
    return code.to(tl.float32, bitcast=True).to(DT)


# Triton's cache of compiled kernels takes account of these functions, all marked for it.
@triton.constexpr_function
def dequant_ptx(kind: str, i: int) -> str:
    """PTX that makes ``$0``, two bfloat16 values, of the i-th codes of the words ``$1`` and ``$2``.

    Where codes are to be numbers, they become the low bits of a number whose unit they are, which is then subtracted:
    of the bfloat16 128 for 4 bits, of the float32 2^23 for 8. Floats of 4 and 8 bits, moved to where bfloat16 has its
    exponent and mantissa, are too small by a power of two, subnormal numbers too.
    """
    if kind == "bfloat16":
        return _ptx_block([_select_halves("$0", i)])
    if kind in ("int8", "uint8"):
        flip, less = ("0x80808080", "0fCB000080") if kind == "int8" else ("0", "0fCB000000")
        lines = ["mov.b32 one, 0x4B000000"]
        for name, word in (("a", "$1"), ("b", "$2")):
            lines += [f"xor.b32 {name}, {word}, {flip}", f"prmt.b32 {name}, one, {name}, 0x300{4 + i}"]
            lines += [f"mov.b32 f{name}, {name}", f"add.f32 f{name}, f{name}, {less}"]
        return _ptx_block([*lines, "cvt.rn.bf16x2.f32 $0, fb, fa"])
    if kind == "fp8":
        both = f"0x{4 + i}{4 + i}{i}{i}"
        return _ptx_block(
            [f"prmt.b32 a, $1, $2, {both}", "shr.u32 b, a, 4", "and.b32 b, b, 0x07F007F0", *_apply_sign("a", 120)]
        )
    place = 4 * (i % 4)
    if kind == "fp4":
        move = f"shl.b32 b, a, {6 - place}" if place <= 6 else f"shr.u32 b, a, {place - 6}"
        sign = f"shl.b32 a, a, {12 - place}"
        return _ptx_block([_select_halves("a", i // 4), move, "and.b32 b, b, 0x01C001C0", sign, *_apply_sign("a", 126)])
    less = {"int4": "0xC308C308", "uint4": "0xC300C300"}[kind]
    return _ptx_block(
        [
            _select_halves("a", i // 4),
            f"shr.u32 a, a, {place}",
            "lop3.b32 a, a, 0x000F000F, 0x43004300, 0xEA",  # (a & 15) | 128.0
            *_ptx_fma("a", "0x3F803F80", less),
        ]
    )


@triton.constexpr_function
def _ptx_block(lines: list[str]) -> str:
    return "{ .reg .b32 a, b, one, two; .reg .f32 fa, fb; " + "".join(f"{line}; " for line in lines) + "}"


@triton.constexpr_function
def _select_halves(to: str, which: int) -> str:
    """The low or the high halves of both words."""
    return f"prmt.b32 {to}, $1, $2, {('0x5410', '0x7632')[which]}"


@triton.constexpr_function
def _apply_sign(signs: str, power: int) -> list[str]:
    """Magnitudes in b, with these signs, times a power of two."""
    factor = (127 + power) << 7
    return [f"lop3.b32 b, {signs}, 0x80008000, b, 0xEA", *_ptx_fma("b", f"0x{factor:04X}{factor:04X}", "0x80008000")]


@triton.constexpr_function
def _ptx_fma(name: str, factor: str, add: str) -> list[str]:
    return [f"mov.b32 one, {factor}", f"mov.b32 two, {add}", f"fma.rn.bf16x2 $0, {name}, one, two"]


@triton.jit
def dequant_plane(words, i: tl.constexpr, KIND: tl.constexpr, PER_WORD: tl.constexpr, DT: tl.constexpr):
    """The values of the i-th codes of words, of which each holds so many."""
    if PER_WORD > 1 and DT == tl.bfloat16:
        text: tl.constexpr = dequant_ptx(KIND, i)
        return tl.inline_asm_elementwise(text, "=r,r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2)
    return dequant_planes(words, i, KIND, PER_WORD, DT)


@triton.jit
def dequant_planes(words, i, KIND: tl.constexpr, PER_WORD: tl.constexpr, DT: tl.constexpr):
    """The same for any i, which may be known to the kernel only, or several."""
    if PER_WORD == 1:
        return decode_qvalue(words, KIND, DT)
    bits: tl.constexpr = 32 // PER_WORD
    return decode_qvalue((words >> (bits * i)) & ((1 << bits) - 1), KIND, DT)
