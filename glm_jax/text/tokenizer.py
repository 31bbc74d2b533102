"""Tokenizer: text to token ids and back, in whole or token by token, based on the ``tokenizers`` package."""

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
"""Maximum number of characters to encode: twenty for each token of the longest context."""

STRUCTURAL_TAGS: Final = frozenset(
    f"<{slash}{name}>"
    for name in ("think", "tool_call", "arg_key", "arg_value", "tool_response")
    for slash in ("", "/")
)
"""Tags that structure an answer. The output parser reads them as text, so they never count as special tokens."""

_SURROGATE: Final = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True, eq=False)
class Tokenizer:
    """A tokenizer read from a ``tokenizer.json`` by :meth:`from_file` or :meth:`from_dir`.

    Attributes:
        model_vocab: Number of rows of the model's embedding, which may exceed ``vocab_size``.
        vocab_size: Number of ids that the tokenizer knows.
        unused_ids: Ids of the model that the tokenizer does not know; they must never be sampled.
        special_ids: Ids that ``skip_special`` leaves out. The tags in :data:`STRUCTURAL_TAGS` are never among them,
            even if the file marks them as special.
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
            CheckpointError: if the file is missing, damaged, not a tokenizer, or has ids that the model lacks.
        """
        backend = _read_backend(Path(path))
        backend.no_padding()
        backend.no_truncation()
        added = backend.get_added_tokens_decoder()
        known_ids = set(backend.get_vocab(with_added_tokens=True).values())
        if known_ids and max(known_ids) >= model_vocab:
            raise CheckpointError(
                f"{path} has token id {max(known_ids)}, but the model has only {model_vocab} embedding rows: "
                "take the tokenizer.json that belongs to this model"
            )
        decoder = None if backend.decoder is None else json.loads(backend.decoder.__getstate__())
        return cls(
            model_vocab=model_vocab,
            vocab_size=len(known_ids),
            unused_ids=tuple(i for i in range(model_vocab) if i not in known_ids),
            special_ids=frozenset(i for i, t in added.items() if t.special and t.content not in STRUCTURAL_TAGS),
            _backend=backend,
            _added_tokens={i: token.content.encode() for i, token in added.items()},
            _byte_decoder=parse_decoder(decoder),
        )

    @classmethod
    def from_dir(cls, folder: str | Path, *, model_vocab: int) -> Self:
        """Reads ``tokenizer.json`` from a checkpoint's folder; see :meth:`from_file`."""
        return cls.from_file(Path(folder) / "tokenizer.json", model_vocab=model_vocab)

    def encode(self, text: str) -> list[int]:
        """Encodes a text to token ids. Special tokens in the text are recognized; none is added at either end.

        Raises:
            PromptError: if the text holds a lone surrogate or is longer than :data:`MAX_TEXT_LENGTH`.
        """
        if not isinstance(text, str):
            raise PromptError(f"a prompt must be a str, not {type(text).__name__}; decode bytes as UTF-8 first")
        if len(text) > MAX_TEXT_LENGTH:
            raise PromptError(
                f"the text has {len(text):,} characters, and at most {MAX_TEXT_LENGTH:,} can be encoded: shorten it"
            )
        if surrogate := _SURROGATE.search(text):
            raise PromptError(
                f"the text is not valid Unicode: character {surrogate.start()} is the lone surrogate "
                f"U+{ord(surrogate[0]):04X}; read the input as UTF-8"
            )
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[SupportsIndex], skip_special: bool = True) -> str:
        """Decodes token ids to text. Invalid UTF-8 becomes U+FFFD; unused ids have no text.

        Raises:
            PromptError: if an id is outside the model's vocabulary.
        """
        tokens = [token for token in (self.token_bytes(i, skip_special) for i in ids) if token is not None]
        data = self._byte_decoder.separator.join(tokens)
        return _drop_spaces(data, self._byte_decoder.max_leading_spaces).decode(errors="replace")

    def stream(self, skip_special: bool = True) -> StreamDecoder:
        """Returns a decoder for ids that arrive one at a time."""
        return StreamDecoder(self, skip_special)

    def token_bytes(self, token_id: SupportsIndex, skip_special: bool = False) -> bytes | None:
        """The bytes of one token, which may be part of a character; None for unused and skipped ids.

        Raises:
            PromptError: if the id is outside the model's vocabulary.
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
        """The id of a token in the vocabulary's spelling; None if there is no such token."""
        return self._backend.token_to_id(token)


class StreamDecoder:
    """Decodes ids one at a time; the joined pieces equal :meth:`Tokenizer.decode` of all ids.

    A piece never ends inside a character. At most three bytes are held back, and each id is decoded once.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._separator = b""
        self._spaces_to_drop = tokenizer._byte_decoder.max_leading_spaces

    def feed(self, token_id: SupportsIndex) -> str:
        """Returns the text that this id completes; "" while a character is incomplete.

        Raises:
            PromptError: if the id is outside the model's vocabulary.
        """
        data = self._tokenizer.token_bytes(token_id, self._skip_special)
        if data is None:
            return ""
        data = self._separator + data
        self._separator = self._tokenizer._byte_decoder.separator
        if self._spaces_to_drop and data:
            stripped = _drop_spaces(data, self._spaces_to_drop)
            self._spaces_to_drop = 0 if stripped else self._spaces_to_drop - len(data)
            data = stripped
        return self._utf8.decode(data)

    def flush(self) -> str:
        """Ends the text. Returns U+FFFD for an incomplete character, otherwise ""."""
        return self._utf8.decode(b"", final=True)


def _drop_spaces(data: bytes, limit: int) -> bytes:
    """Removes at most ``limit`` leading spaces."""
    return data[min(limit, len(data) - len(data.lstrip(b" "))) :]


def _read_backend(path: Path) -> tokenizers.Tokenizer:
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
        return 'is not a tokenizer: it has no "model"; use the checkpoint\'s tokenizer.json'
    return f"is not a tokenizer that the tokenizers package {tokenizers.__version__} can read: {error}"


def load_tokenizer(cfg: Config, folder: Path | None) -> Tokenizer:
    """Loads the checkpoint's tokenizer, or the built-in miniature's for random weights, which have no folder.

    Raises:
        CheckpointError: if the tokenizer cannot be read or does not fit the model.
    """
    folder = Path(str(files("glm_jax") / "tiny")) if folder is None else folder
    return Tokenizer.from_dir(folder, model_vocab=cfg.vocab_size)


def valid_vocab_size(tokenizer: Tokenizer) -> int:
    """The vocabulary size without the unused ids at its end."""
    unused = set(tokenizer.unused_ids)
    size = tokenizer.model_vocab
    while size - 1 in unused:
        size -= 1
    return size
