"""The bytes of single tokens, from which text is decoded token by token.

A token may hold part of a UTF-8 character, so tokens are joined as bytes and decoded once. Three kinds of decoder are
supported: ``ByteLevel`` (GLM's own, where each character of a token names a byte by GPT-2's table), a sequence of
``Replace``/``ByteFallback``/``Fuse``/``Strip`` (from SentencePiece conversions), and no decoder (tokens are words,
joined by spaces).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from glm_jax.errors import CheckpointError

_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class TokenByteDecoder:
    """The rules by which a tokenizer's ordinary tokens become text.

    Attributes:
        to_bytes: Maps the string of a token to its bytes.
        separator: Bytes between any two tokens.
        max_leading_spaces: Maximum number of spaces dropped at the start of the text.
    """

    to_bytes: Callable[[str], bytes]
    separator: bytes = b""
    max_leading_spaces: int = 0


@dataclass(frozen=True, slots=True)
class _SequenceDecoder:
    """Token to bytes by the per-token steps of a ``Sequence`` decoder."""

    replacements: tuple[tuple[str, str], ...]
    byte_fallback: bool

    def __call__(self, token: str) -> bytes:
        if self.byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        for old, new in self.replacements:
            token = token.replace(old, new)
        return token.encode()


def unicode_to_bytes() -> dict[str, int]:
    """GPT-2's table from 256 printable characters to bytes.

    Printable Latin-1 characters name their own byte; the other bytes are named by characters from U+0100 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


@dataclass(frozen=True, slots=True)
class _ByteLevelDecoder:
    """Byte-level token to bytes. A token with a character outside the table is encoded as UTF-8."""

    table: dict[str, int] = field(default_factory=unicode_to_bytes)

    def __call__(self, token: str) -> bytes:
        try:
            return bytes([self.table[character] for character in token])
        except KeyError:
            return token.encode()


def parse_decoder(decoder: dict[str, Any] | None) -> TokenByteDecoder:
    """Reads the ``decoder`` entry of a ``tokenizer.json``.

    Raises:
        CheckpointError: if a step is unknown or does not work token by token.
    """
    if decoder is None:
        return TokenByteDecoder(str.encode, separator=b" ")
    if decoder.get("type") == "ByteLevel":
        return TokenByteDecoder(_ByteLevelDecoder())
    steps = decoder.get("decoders", []) if decoder.get("type") == "Sequence" else [decoder]
    replacements: list[tuple[str, str]] = []
    leading_spaces = 0
    for step in steps:
        match step:
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                replacements.append((old, new))
            case {"type": "Strip", "content": " ", "start": int(leading_spaces), "stop": 0}:
                pass
            case {"type": "ByteFallback" | "Fuse"}:
                pass
            case _:
                raise CheckpointError(
                    f"the tokenizer's decoder has a step that is not supported: {json.dumps(step)[:200]}; "
                    "GLM-4.7-Flash has ByteLevel"
                )
    byte_fallback = any(step["type"] == "ByteFallback" for step in steps)
    return TokenByteDecoder(_SequenceDecoder(tuple(replacements), byte_fallback), max_leading_spaces=leading_spaces)
