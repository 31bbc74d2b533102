"""Inference of GLM-4.7-Flash in pure JAX.

>>> import glm_jax
>>> llm = glm_jax.LLM.load()                       # the built-in miniature  # doctest: +SKIP
>>> llm.generate("def fib(n):", max_tokens=64).text                          # doctest: +SKIP

Public names are imported on first use, so importing this package imports nothing else: it touches no device, sets no
environment variable and reads no file.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from glm_jax import text as text
    from glm_jax.cache import LatentCache as LatentCache
    from glm_jax.config import Config as Config
    from glm_jax.errors import GlmError as GlmError
    from glm_jax.llm import LLM as LLM
    from glm_jax.model import GLM as GLM
    from glm_jax.sampling import SamplingParams as SamplingParams
    from glm_jax.sharding import Rules as Rules

__version__ = "0.1.0"

# Public name -> the module that defines it.
_HOMES = {
    "GLM": "glm_jax.model",
    "Config": "glm_jax.config",
    "GlmError": "glm_jax.errors",
    "LLM": "glm_jax.llm",
    "LatentCache": "glm_jax.cache",
    "Rules": "glm_jax.sharding",
    "SamplingParams": "glm_jax.sampling",
}
_MODULES = ("text",)

__all__ = [  # noqa: RUF022 (most used first)
    "LLM",
    "SamplingParams",
    "GLM",
    "Config",
    "LatentCache",
    "Rules",
    "GlmError",
    "text",
]


def __getattr__(name: str) -> object:
    """Imports the module that defines a public name when the name is first used."""
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
