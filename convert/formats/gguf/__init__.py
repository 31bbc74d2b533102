"""GGUF files of this model (architecture ``deepseek2``): config, weights and tokenizer, all from one file or set."""

from convert.formats.gguf.file import GgufFile, open_gguf

__all__ = ["GgufFile", "open_gguf"]
