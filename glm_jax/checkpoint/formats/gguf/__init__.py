"""GGUF files of this model (architecture ``deepseek2``): config, weights and tokenizer, all from one file or set."""

from glm_jax.checkpoint.formats.gguf.file import GgufModel, open_gguf

__all__ = ["GgufModel", "open_gguf"]
