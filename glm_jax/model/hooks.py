"""Named activations that research reads (``trace``) or replaces (``edit``) during a forward pass."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence

import jax

from glm_jax.config import Config
from glm_jax.errors import ConfigError

EditFn = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, slots=True)
class ActivationHooks:
    """Named points where activations are read (``trace``) or replaced (``edit``) during one call.

    Attributes:
        trace: Names of activations to record.
        edit: Functions by name; the result of a function replaces the activation.
        recorded: Recorded activations by name, filled during the call.
    """

    trace: frozenset[str] = frozenset()
    edit: Mapping[str, EditFn] = dataclasses.field(default_factory=dict)
    recorded: dict[str, jax.Array] = dataclasses.field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.trace or self.edit)

    def __call__(self, name: str, value: jax.Array) -> jax.Array:
        """Passes the activation ``name`` through its hook.

        Raises:
            ConfigError: If an edit changes the shape.
        """
        if name in self.edit:
            edited = self.edit[name](value)
            if edited.shape != value.shape:
                raise ConfigError(
                    f"the edit of {name!r} must return the shape {value.shape} it was given, not {edited.shape}"
                )
            value = edited.astype(value.dtype)
        if name in self.trace:
            self.recorded[name] = value
        return value


def hook_names(kind: str, name: str) -> tuple[str, ...]:
    """Names of the activations of one block.

    Args:
        kind: "dense" or "sparse".
        name: Prefix, such as ``block.3``.
    """
    inner = ("mlp",) if kind == "dense" else ("moe.router", "moe.experts", "moe")
    return tuple(f"{name}.{point}" for point in ("in", "attn", *inner, "out"))


def activation_names(cfg: Config) -> tuple[str, ...]:
    """All names that ``trace`` and ``edit`` accept, in the order of computation."""
    blocks = [hook_names(kind, f"block.{i}") for i, kind in enumerate(cfg.mlp_layer_types)]
    return ("embed", *(name for names in blocks for name in names), "norm")


def check_activation_names(cfg: Config, names: Sequence[str]) -> None:
    """Checks names of activations.

    Raises:
        ConfigError: For an unknown name, with the closest known ones.
    """
    known = activation_names(cfg)
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, 3) or ["embed", "block.0.out", "norm"]
            raise ConfigError(
                f"no activation {name!r}; there are for example {', '.join(close)} (see activation_names)"
            )
