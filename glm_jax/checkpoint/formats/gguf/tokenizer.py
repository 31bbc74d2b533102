"""Builds tokenizer, chat template and generation config files from the metadata fields of a GGUF file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from glm_jax.checkpoint.formats.gguf.header import MetadataValue
from glm_jax.checkpoint.formats.gguf.hf_config import read_token_id
from glm_jax.checkpoint.messages import printable
from glm_jax.errors import CheckpointError

_PREFIX = "tokenizer.ggml."
_PRE_TOKENIZERS = ("glm4", "chatglm-bpe")  # two names of the same pre-tokenizer
# GLM-4's pre-tokenizer splits text into contractions, words with one character before them, up to three digits,
# punctuation with the line ends after it, and white space.
_SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # values of token_type
_SAMPLING_KEYS = {
    "temp": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


def build_asset_files(fields: Mapping[str, MetadataValue], config: Mapping[str, Any], file: str) -> dict[str, bytes]:
    """Builds the files that accompany a checkpoint's weights.

    Args:
        fields: Metadata fields of the GGUF file.
        config: Config that was built from the same fields.
        file: File name for error messages.

    Returns:
        Contents of the files by file name.

    Raises:
        CheckpointError: If the tokenizer is missing, damaged, or not GLM-4's.
    """
    tokens = _read_tokens(fields, file)
    contents: dict[str, Any] = {
        "tokenizer.json": _tokenizer_json(tokens, fields, file),
        "tokenizer_config.json": _tokenizer_config(tokens, fields, config, file),
        "generation_config.json": _generation_config(fields, config),
    }
    files = {name: json.dumps(content, ensure_ascii=False).encode() for name, content in contents.items()}
    template = fields.get("tokenizer.chat_template")
    if isinstance(template, str) and template:
        files["chat_template.jinja"] = template.encode()
    return files


def _read_tokens(fields: Mapping[str, MetadataValue], file: str) -> list[str]:
    model, pre_tokenizer = fields.get(f"{_PREFIX}model"), fields.get(f"{_PREFIX}pre")
    if model is None:
        raise CheckpointError(f"{file} has no tokenizer: take the tokenizer.json of the original model")
    if model != "gpt2" or pre_tokenizer not in _PRE_TOKENIZERS:
        raise CheckpointError(
            f"{file} has a tokenizer of kind {printable(repr(model))} / {printable(repr(pre_tokenizer))}; "
            "GLM-4.7-Flash has 'gpt2' / 'glm4': take the tokenizer.json of the original model"
        )
    return _read_strings(fields, "tokens", file)


def _read_strings(fields: Mapping[str, MetadataValue], key: str, file: str) -> list[str]:
    value = fields.get(f"{_PREFIX}{key}")
    if not isinstance(value, list):
        raise CheckpointError(f"{file}: {_PREFIX}{key} must be a list of strings")
    try:
        return [text.decode() for text in value]
    except UnicodeDecodeError:
        raise CheckpointError(f"{file}: {_PREFIX}{key} is not UTF-8 text: the file is damaged") from None


def _tokenizer_json(tokens: Sequence[str], fields: Mapping[str, MetadataValue], file: str) -> dict[str, Any]:
    kinds = _read_token_kinds(fields, len(tokens), file)
    # Unused tokens only pad the embedding and must have no text. All others are in the vocabulary. Added tokens are in
    # it too, because the tokenizers library would otherwise give them new ids.
    used = [(i, token, kind) for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind != _UNUSED]
    vocabulary = {token: i for i, token, _ in used}
    if len(vocabulary) != len(used):
        duplicate = next(token for i, token, _ in used if vocabulary[token] != i)
        raise CheckpointError(f"{file} has the token {printable(repr(duplicate))} twice")
    added = [_added_token(i, token, kind) for i, token, kind in used if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": _SPLIT_PATTERN}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _bpe_model(vocabulary, _read_strings(fields, "merges", file), file),
    }


def _read_token_kinds(fields: Mapping[str, MetadataValue], num_tokens: int, file: str) -> list[int]:
    kinds = fields.get(f"{_PREFIX}token_type")
    if not isinstance(kinds, np.ndarray) or len(kinds) != num_tokens or kinds.dtype.kind not in "iu":
        raise CheckpointError(f"{file}: {_PREFIX}token_type must be one number for each of the {num_tokens} tokens")
    kinds = kinds.tolist()
    if unknown := {kind for kind in kinds if not _NORMAL <= kind <= _BYTE}:
        raise CheckpointError(f"{file}: {_PREFIX}token_type has the unknown kind {min(unknown)}")
    return kinds


def _added_token(index: int, token: str, kind: int) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": index, "content": token, **flags, "special": kind != _USER_DEFINED}


def _bpe_model(vocabulary: Mapping[str, int], lines: Sequence[str], file: str) -> dict[str, Any]:
    merges = [line.split(" ") for line in lines]
    for line, merge in zip(lines, merges, strict=True):
        if len(merge) != 2 or any(part not in vocabulary for part in (*merge, "".join(merge))):
            raise CheckpointError(f"{file}: the merge {printable(repr(line))} does not join two tokens into a third")
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": True,
        "vocab": vocabulary,
        "merges": merges,
    }


def _tokenizer_config(
    tokens: Sequence[str], fields: Mapping[str, MetadataValue], config: Mapping[str, Any], file: str
) -> dict[str, Any]:
    special_tokens = {}
    for name, key in (("eos_token", "eos_token_id"), ("pad_token", "padding_token_id")):
        index = read_token_id(fields, _PREFIX + key, file)
        if index is not None:
            if index >= len(tokens):
                raise CheckpointError(f"{file}: {_PREFIX}{key} is {index}, and there are {len(tokens)} tokens")
            special_tokens[name] = tokens[index]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        **special_tokens,
    }


def _generation_config(fields: Mapping[str, MetadataValue], config: Mapping[str, Any]) -> dict[str, Any]:
    values = {name: fields.get(f"general.sampling.{key}") for key, name in _SAMPLING_KEYS.items()}
    sampling = {
        name: _shortest_decimal(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    if sampling.get("top_k", 1) <= 0:  # llama.cpp's "no limit"
        del sampling["top_k"]
    special_ids = {name: config[name] for name in ("eos_token_id", "pad_token_id") if config[name] not in (None, [])}
    return {**special_ids, **sampling}


def _shortest_decimal(value: float) -> float:
    """The intended number behind a float32 of the file: 0.95, not 0.949999988; integers stay integers."""
    return value if isinstance(value, int) else float(str(np.float32(value)))
