"""A Triton kernel as the launcher sees it: a function with named operands."""

from __future__ import annotations

import dataclasses
import pkgutil
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import jax

# A ``tl.constexpr`` argument: a number, a string, a Triton dtype or a frozen dataclass of these.
Constant: TypeAlias = Hashable


class LaunchError(Exception):
    """A kernel cannot be compiled or launched."""


class TritonKernel(Protocol):
    """A function decorated with ``triton.jit``, compiled or interpreted."""

    @property
    def arg_names(self) -> Sequence[str]:
        """Names of the parameters, in order."""
        ...

    def __getitem__(self, grid: Any, /) -> Any:
        """Returns the launcher for a grid of programs."""
        ...


class KernelModule:
    """The kernels of one ``triton.py``, imported on first use: Triton is optional, and slow to import.

    Args:
        name: Full name of the module.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, kernel: str) -> TritonKernel:
        return pkgutil.resolve_name(f"{self._name}:{kernel}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Operands:
    """The pointer parameters of a kernel, in the order of its signature.

    Attributes:
        inputs: Names of the inputs.
        outputs: Shapes and dtypes of the outputs, by name.
        aliases: Name of an input to the name of the output that reuses its memory.
    """

    inputs: tuple[str, ...]
    outputs: Mapping[str, jax.ShapeDtypeStruct]
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def alias_indices(self) -> dict[int, int]:
        """Aliases by position, the form that XLA and jax-triton take."""
        outputs = list(self.outputs)
        return {self.inputs.index(source): outputs.index(target) for source, target in self.aliases.items()}
