"""Reads GGUF files of this model (architecture ``deepseek2``): config, weights and tokenizer.

``header.py`` parses and checks a file's header, ``split_files.py`` finds the files of a model, ``ggml_types.py`` lists
the block types, ``blocks.py`` decodes blocks, ``weights.py`` maps tensor names, ``hf_config.py`` builds the config,
``tokenizer.py`` the tokenizer files, and ``model.py`` puts all of it together.
"""

from glm_jax.checkpoint.formats.gguf.model import GgufModel, open_gguf

__all__ = ["GgufModel", "open_gguf"]
