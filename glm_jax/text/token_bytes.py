"""What each token of a tokenizer stands for, in bytes, so that text can be put together token by token.

A token may hold part of a UTF-8 character, so tokens are joined as bytes and decoded once. Three kinds of decoder are
understood: ``ByteLevel`` (GLM's own: each character of a token names one byte, the table of GPT-2), a sequence of
``Replace``/``ByteFallback``/``Fuse``/``Strip`` (what conversions from SentencePiece write), and none at all (tokens are
words, joined by spaces).
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
    """How ordinary tokens become bytes, and how bytes become text.

    Attributes:
        to_bytes: the bytes that one token's string stands for.
        separator: put between any two tokens.
        max_leading_spaces: the most spaces to drop at the very start of a text.
    """

    to_bytes: Callable[[str], bytes]
    separator: bytes = b""
    max_leading_spaces: int = 0


@dataclass(frozen=True, slots=True)
class _SequenceDecoder:
    """One token through the steps of a ``Sequence`` decoder that look at a token alone."""

    replacements: tuple[tuple[str, str], ...]
    byte_fallback: bool

    def __call__(self, token: str) -> bytes:
        if self.byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        for old, new in self.replacements:
            token = token.replace(old, new)
        return token.encode()


def unicode_to_bytes() -> dict[str, int]:
    """The byte that each of 256 printable characters names (GPT-2's table: Latin-1's own, the rest from U+0100)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


@dataclass(frozen=True, slots=True)
class _ByteLevelDecoder:
    """One byte-level token; a token with a character outside the table stands for itself."""

    table: dict[str, int] = field(default_factory=unicode_to_bytes)

    def __call__(self, token: str) -> bytes:
        try:
            return bytes([self.table[character] for character in token])
        except KeyError:
            return token.encode()


def parse_decoder(decoder: dict[str, Any] | None) -> TokenByteDecoder:
    """Reads the ``decoder`` entry of a ``tokenizer.json``.

    Raises:
        CheckpointError: if it has a step that cannot be done token by token, or one that is not known.
    """
    if decoder is None:
        return TokenByteDecoder(str.encode, separator=b" ")
    if decoder.get("type") == "ByteLevel":
        return TokenByteDecoder(_ByteLevelDecoder())
    steps = decoder.get("decoders", []) if decoder.get("type") == "Sequence" else [decoder]
    replacements: list[tuple[str, str]] = []
    strip = 0
    for step in steps:
        match step:
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                replacements.append((old, new))
            case {"type": "Strip", "content": " ", "start": int(strip), "stop": 0}:
                pass
            case {"type": "ByteFallback" | "Fuse"}:
                pass
            case _:
                raise CheckpointError(
                    f"the tokenizer's decoder has a step that is not supported: {json.dumps(step)[:200]}; "
                    "GLM-4.7-Flash has ByteLevel"
                )
    fallback = any(step["type"] == "ByteFallback" for step in steps)
    return TokenByteDecoder(_SequenceDecoder(tuple(replacements), fallback), max_leading_spaces=strip)
