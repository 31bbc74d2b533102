"""Small tokenizers and tool declarations for the tests of ``glm_jax.text``."""

from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

GLM_SPECIAL_TOKENS = [
    "<|endoftext|>",
    "[MASK]",
    "[gMASK]",
    "<sop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
]
TAG_TOKENS = [f"<{slash}{name}>" for name in ("think", "tool_call", "arg_key", "arg_value") for slash in ("", "/")]
CORPUS = [
    "def fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)\n",
    "naïve café, 天气很好 🙂🙃 👨‍👩‍👧 e\u0301",
] * 4


def write_byte_level_tokenizer(path: Path, tags_are_special: bool = False) -> Path:
    """Writes a tokenizer like GLM's: byte-level BPE, special tokens, and tags that are added but not special."""
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in GLM_SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(text, special=tags_are_special, normalized=False) for text in TAG_TOKENS])
    tokenizer.save(str(path))
    return path


def write_byte_fallback_tokenizer(path: Path) -> Path:
    """Writes a tokenizer like a SentencePiece conversion: "▁" for a space, and a token for each byte."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "é", "▁a", "ab"]
    merges = [("▁", "a"), ("a", "b")]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("<s>", special=True, normalized=False)])
    tokenizer.save(str(path))
    return path


def make_tool(name: str, **properties) -> dict:
    """Declares a tool with these parameters."""
    parameters = {"type": "object", "properties": properties, "required": list(properties)[:1]}
    return {"type": "function", "function": {"name": name, "description": f"Does {name}.", "parameters": parameters}}


WEATHER_TOOL = make_tool("get_weather", city={"type": "string"}, days={"type": "integer"}, exact={"type": "boolean"})
SEARCH_TOOL = make_tool(
    "search", query={"type": "string"}, filters={"type": "object"}, limit={"type": ["integer", "null"]}
)
TIME_TOOL = make_tool("get_time")
TOOLS = [WEATHER_TOOL, SEARCH_TOOL, TIME_TOOL]
