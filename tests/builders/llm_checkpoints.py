"""Small checkpoints with a tokenizer: random ones, and ones that generate the text that a test dictates.

All share one config, so that tests share compiled programs.
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken

from tests.builders.hf_checkpoints import Tensors, random_tensors, write_checkpoint
from tests.builders.hf_configs import HfConfig, odd_size_config
from tests.text.fixtures import write_byte_level_tokenizer

CONTEXT_LENGTH = 1000  # not a power of two
CONFIG: HfConfig = odd_size_config(
    vocab_size=384,
    hidden_size=64,
    num_attention_heads=4,
    num_key_value_heads=4,
    moe_intermediate_size=12,
    intermediate_size=56,
    max_position_embeddings=CONTEXT_LENGTH,
)
EOS_TOKENS = ("<|endoftext|>", "<|user|>", "<|observation|>")
MISSING_VOCAB_TOKEN = "Q"  # the tokenizer loses this one, so its vocabulary has a hole


def write_random_model(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Writes a checkpoint of random weights, with `changes` to its config."""
    tokenizer, config = _tokenizer(folder, []), CONFIG | changes
    return _write(folder, random_tensors(config, seed), tokenizer, config)


def write_scripted_model(folder: Path, scripts: dict[str, Sequence[str]]) -> Path:
    """Writes a checkpoint that follows a script: after each key's token come the pieces of its value, then the end.

    A piece is one token, or a single byte such as "0xE2". No token may occur twice.
    """
    pieces = [piece for script in scripts.values() for piece in script if not piece.startswith("0x")]
    tokenizer = _tokenizer(folder, pieces)
    successors: dict[int, int] = {}
    for start, script in scripts.items():
        path = [_token_id(tokenizer, token) for token in (start, *script, EOS_TOKENS[1])]
        assert not successors.keys() & set(path[:-1]), "a token is in two scripts"
        assert len(set(path)) == len(path), "a token is twice in a script"
        successors |= dict(itertools.pairwise(path))
    return _write(folder, _successor_weights(successors), tokenizer)


def _token_id(tokenizer: tokenizers.Tokenizer, text: str) -> int:
    """Returns the id of a piece; the byte-level alphabet maps bytes to characters."""
    if text.startswith("0x"):
        value = int(text, 16)
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        text = chr(value) if value in printable else chr(256 + others.index(value))
    found = tokenizer.token_to_id(text)
    assert found is not None, text
    return found


def _successor_weights(successors: dict[int, int]) -> Tensors:
    """Returns weights whose layers add nothing, and whose head maps each embedding to the token that follows."""
    tensors = random_tensors(CONFIG, 5)
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name] = np.zeros_like(tensor)
    embed = np.random.default_rng(0).standard_normal((CONFIG["vocab_size"], CONFIG["hidden_size"])).astype(np.float32)
    embed /= np.linalg.norm(embed, axis=1, keepdims=True)
    head = np.zeros_like(embed)
    for token, successor in successors.items():
        head[successor] += 10 * embed[token]
    ones = np.ones(CONFIG["hidden_size"], np.float32)
    return tensors | {"model.embed_tokens.weight": embed, "lm_head.weight": head, "model.norm.weight": ones}


def _tokenizer(folder: Path, pieces: Sequence[str]) -> tokenizers.Tokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    path = write_byte_level_tokenizer(folder / "tokenizer.json")
    content = json.loads(path.read_text(encoding="utf-8"))
    del content["model"]["vocab"][MISSING_VOCAB_TOKEN]
    content["model"]["merges"] = [
        merge for merge in content["model"]["merges"] if MISSING_VOCAB_TOKEN not in "".join(merge)
    ]
    path.write_text(json.dumps(content), encoding="utf-8")
    made = tokenizers.Tokenizer.from_file(str(path))
    made.add_tokens([AddedToken(piece, special=False, normalized=False) for piece in pieces])
    made.save(str(path))
    return made


def _write(folder: Path, tensors: Tensors, tokenizer: tokenizers.Tokenizer, config: HfConfig = CONFIG) -> Path:
    first, *others = (tokenizer.token_to_id(token) for token in EOS_TOKENS)
    write_checkpoint(folder, {**config, "eos_token_id": others[:1], "pad_token_id": first}, tensors)
    # Only this file uses the other two.
    generation: dict[str, Any] = {"eos_token_id": [first, *others], "temperature": 0.8, "top_p": 0.9}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder
