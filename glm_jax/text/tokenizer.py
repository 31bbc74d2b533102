"""Text to token ids and back, on the ``tokenizers`` package, one token at a time where that is asked for."""

from __future__ import annotations

import codecs
import json
import operator
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Final, Self, SupportsIndex

import tokenizers

from glm_jax.config import Config
from glm_jax.errors import CheckpointError, PromptError
from glm_jax.text.token_bytes import TokenByteDecoder, parse_decoder

MAX_TEXT_LENGTH: Final = 1 << 22
"""Longest text that is encoded at once: twenty characters for each token of the longest context."""

STRUCTURAL_TAGS: Final = frozenset(
    f"<{slash}{name}>"
    for name in ("think", "tool_call", "arg_key", "arg_value", "tool_response")
    for slash in ("", "/")
)
"""Tags that shape an answer. They are text to a reader of the answer, so they never count as special tokens."""

_SURROGATE: Final = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True, eq=False)
class Tokenizer:
    """A ``tokenizer.json``; make one with :meth:`from_file` or :meth:`from_dir`.

    Attributes:
        model_vocab: rows of the model's embedding, which may be more than the tokenizer knows.
        vocab_size: number of ids that the tokenizer knows.
        unused_ids: ids of the model that stand for no token; sampling must never choose them.
        special_ids: ids that ``skip_special`` leaves out. The tags in :data:`STRUCTURAL_TAGS` are never among them, also
            where a file marks them as special.
    """

    model_vocab: int
    vocab_size: int
    unused_ids: tuple[int, ...]
    special_ids: frozenset[int]
    _backend: tokenizers.Tokenizer
    _added_tokens: dict[int, bytes]
    _byte_decoder: TokenByteDecoder

    @classmethod
    def from_file(cls, path: str | Path, *, model_vocab: int) -> Self:
        """Reads a ``tokenizer.json`` for a model with ``model_vocab`` embedding rows.

        Raises:
            CheckpointError: if the file is missing, damaged, not a tokenizer, or knows ids that the model has not.
        """
        backend = _read(Path(path))
        backend.no_padding()
        backend.no_truncation()
        added = backend.get_added_tokens_decoder()
        known = set(backend.get_vocab(with_added_tokens=True).values())
        if known and max(known) >= model_vocab:
            raise CheckpointError(
                f"{path} has token id {max(known)}, but the model has only {model_vocab} embedding rows: "
                "take the tokenizer.json that belongs to this model"
            )
        decoder = None if backend.decoder is None else json.loads(backend.decoder.__getstate__())
        return cls(
            model_vocab=model_vocab,
            vocab_size=len(known),
            unused_ids=tuple(i for i in range(model_vocab) if i not in known),
            special_ids=frozenset(i for i, t in added.items() if t.special and t.content not in STRUCTURAL_TAGS),
            _backend=backend,
            _added_tokens={i: token.content.encode() for i, token in added.items()},
            _byte_decoder=parse_decoder(decoder),
        )

    @classmethod
    def from_dir(cls, folder: str | Path, *, model_vocab: int) -> Self:
        """Reads ``tokenizer.json`` in a checkpoint's folder; as :meth:`from_file`."""
        return cls.from_file(Path(folder) / "tokenizer.json", model_vocab=model_vocab)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. Special tokens written in it are recognized; none is added at either end.

        Raises:
            PromptError: if the text holds a lone surrogate or is longer than :data:`MAX_TEXT_LENGTH`.
        """
        if not isinstance(text, str):
            raise PromptError(f"a prompt must be a str, not {type(text).__name__}; decode bytes as UTF-8 first")
        if len(text) > MAX_TEXT_LENGTH:
            raise PromptError(
                f"the text has {len(text):,} characters, and at most {MAX_TEXT_LENGTH:,} can be encoded: shorten it"
            )
        if found := _SURROGATE.search(text):
            raise PromptError(
                f"the text is not valid Unicode: character {found.start()} is the lone surrogate "
                f"U+{ord(found[0]):04X}; read the input as UTF-8"
            )
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[SupportsIndex], skip_special: bool = True) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD, and unused ids nothing.

        Raises:
            PromptError: if an id is not one of the model's.
        """
        parts = [part for part in (self.token_bytes(i, skip_special) for i in ids) if part is not None]
        return _drop_spaces(self._byte_decoder.separator.join(parts), self._byte_decoder.max_leading_spaces).decode(
            errors="replace"
        )

    def stream(self, skip_special: bool = True) -> StreamDecoder:
        """A decoder for ids that come one at a time."""
        return StreamDecoder(self, skip_special)

    def token_bytes(self, token_id: SupportsIndex, skip_special: bool = False) -> bytes | None:
        """The bytes that one id stands for (part of a character, maybe); None where it stands for no text at all.

        Raises:
            PromptError: if the id is not one of the model's.
        """
        index = operator.index(token_id)
        if not 0 <= index < self.model_vocab:
            raise PromptError(f"token id {index} is outside the model's vocabulary, 0 to {self.model_vocab - 1}")
        if skip_special and index in self.special_ids:
            return None
        if index in self._added_tokens:
            return self._added_tokens[index]
        token = self._backend.id_to_token(index)
        return None if token is None else self._byte_decoder.to_bytes(token)

    def token_to_id(self, token: str) -> int | None:
        """The id of a token given as the vocabulary spells it, or None."""
        return self._backend.token_to_id(token)


class StreamDecoder:
    """Decodes ids one at a time: the pieces, joined, are what :meth:`Tokenizer.decode` gives for all the ids.

    A piece never ends inside a character. At most three bytes are held back, and no id is looked at twice.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._separator = b""
        self._strip = tokenizer._byte_decoder.max_leading_spaces

    def feed(self, token_id: SupportsIndex) -> str:
        """The text that this id completes, maybe none.

        Raises:
            PromptError: if the id is not one of the model's.
        """
        data = self._tokenizer.token_bytes(token_id, self._skip_special)
        if data is None:
            return ""
        data = self._separator + data
        self._separator = self._tokenizer._byte_decoder.separator
        if self._strip and data:
            kept = _drop_spaces(data, self._strip)
            self._strip = 0 if kept else self._strip - len(data)
            data = kept
        return self._utf8.decode(data)

    def flush(self) -> str:
        """Ends the text: U+FFFD for bytes still held back, else nothing."""
        return self._utf8.decode(b"", final=True)


def _drop_spaces(data: bytes, limit: int) -> bytes:
    """``data`` without its leading spaces, at most ``limit`` of them."""
    return data[min(limit, len(data) - len(data.lstrip(b" "))) :]


def _read(path: Path) -> tokenizers.Tokenizer:
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"there is no {path}: copy the checkpoint's tokenizer.json there") from None
    except UnicodeDecodeError:
        raise CheckpointError(f"{path} is damaged or no tokenizer: it is not UTF-8 text") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the package raises plain Exception
        raise CheckpointError(f"{path} {_describe_problem(text, error)}") from error


def _describe_problem(text: str, error: Exception) -> str:
    if text.startswith("version https://git-lfs"):
        return "is only a Git LFS pointer: fetch the file itself with `git lfs pull`"
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return "is damaged: it is not complete JSON; download it again"
    if not isinstance(content, dict) or "model" not in content:
        return 'is not a tokenizer: it has no "model"; the file wanted is the checkpoint\'s tokenizer.json'
    return f"is not a tokenizer that the tokenizers package {tokenizers.__version__} can read: {error}"


def load_tokenizer(cfg: Config, folder: Path | None) -> Tokenizer:
    """The checkpoint's tokenizer; for made-up weights, which have none, the miniature's."""
    home = Path(str(files("glm_jax") / "tiny")) if folder is None else folder
    return Tokenizer.from_dir(home, model_vocab=cfg.vocab_size)


def valid_vocab_size(tokenizer: Tokenizer) -> int:
    """Ids from here on stand for no token; they end the vocabulary."""
    unused = set(tokenizer.unused_ids)
    last = tokenizer.model_vocab
    while last - 1 in unused:
        last -= 1
    return last
