"""The description of a quantized matrix: the kind of its codes, and which of them share a scale."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self, get_args

import jax.numpy as jnp
import numpy as np

from glm_jax.errors import QuantError
from glm_jax.sharding import LogicalAxis

QuantDtype = Literal["int4", "int8", "fp8", "fp4"]
ScaleDtype = Literal["float32", "bfloat16", "float16", "e4m3", "e8m0"]
ZeroPointKind = Literal["none", "point", "bias"]
GlobalScaleKind = Literal["none", "multiply", "divide"]

_CODE_BITS: dict[str, int] = {"int4": 4, "fp4": 4, "int8": 8, "fp8": 8}
_BIT_PATTERN_SCALES = ("e4m3", "e8m0")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class QuantSpec:
    """How the values of a matrix ``[O, I]`` are stored; frozen, hashable, and without any data.

    Let ``s`` be the float32 scale of a block (``scale``, multiplied or divided by ``outer``), ``u`` or ``q`` a code,
    ``z`` a zero point and ``b`` a bias of the block. Then the value in float32 is::

        int4   none (u - 8) s      point (u - z) s      bias u s + b       u = 0 .. 15
        int8   none q s            point (u - z) s      bias u s + b       q = -128 .. 127, u = 0 .. 255
        fp8    e4m3(u) s           float8 with 4 bits of exponent and 3 of mantissa, without infinities
        fp4    e2m1(u) s           sign and one of 0, 0.5, 1, 1.5, 2, 3, 4, 6

    Attributes:
        kind: Number format of the codes.
        block: (outputs, inputs) that share a scale; 0 means all of them. ``(1, 64)`` is groups of 64 inputs,
            ``(1, 0)`` a scale per output, ``(128, 128)`` square blocks, ``(32, 1)`` groups of 32 outputs. The last
            block of a row or column may be cut off.
        scale: Dtype of the scales; "e4m3" and "e8m0" are held as bit patterns.
        zero: Zero point or bias stored beside each scale.
        outer: How one more float32 scale for the whole matrix applies, if there is one.
        permuted: Whether the stored columns are a permutation of the inputs, stored too (GPTQ's activation order).

    Raises:
        QuantError: If the fields contradict each other.
    """

    kind: QuantDtype
    block: tuple[int, int] = (1, 64)
    scale: ScaleDtype = "bfloat16"
    zero: ZeroPointKind = "none"
    outer: GlobalScaleKind = "none"
    permuted: bool = False

    def __post_init__(self) -> None:
        if problem := _invalid_reason(self):
            raise QuantError(f"impossible quantization {self!r}: {problem}")

    @property
    def bits(self) -> int:
        """Bits per code."""
        return _CODE_BITS[self.kind]

    @property
    def values_per_byte(self) -> int:
        """Codes per byte."""
        return 8 // self.bits

    @property
    def name(self) -> str:
        """Short description, such as ``int4 g64 bfloat16``."""
        rows, columns = self.block
        block = {(1, 0): "per output", (0, 0): "per matrix"}.get((rows, columns))
        block = block or (f"g{columns}" if rows == 1 else f"{rows or 'all'}x{columns or 'all'}")
        zeros = {"none": [], "point": ["zero points"], "bias": ["biases"]}[self.zero]
        return " ".join([self.kind, block, self.scale, *zeros, *(["permuted"] if self.permuted else [])])

    def component_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        """Shape and dtype of each stored array of a weight ``[*stack, O, I]``.

        Raises:
            QuantError: If a matrix of this shape does not pack into whole bytes.
        """
        if len(shape) < 2 or shape[-1] % self.values_per_byte:
            raise QuantError(
                f"{self.kind} packs {self.values_per_byte} inputs to a byte: a matrix {list(shape)} does not fit"
            )
        *stack, outputs, inputs = shape
        rows, columns = self.block
        blocks: tuple[int, ...] = (*stack, -(-outputs // (rows or outputs)), -(-inputs // (columns or inputs)))
        parts: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {
            "codes": ((*stack, outputs, inputs // self.values_per_byte), self._code_dtype),
            "scales": (blocks, self.scale_dtype),
        }
        if self.zero != "none":
            parts["zeros"] = (blocks, self._zero_dtype)
        if self.outer != "none":
            parts["outer"] = (tuple(stack), np.dtype(np.float32))
        if self.permuted:
            parts["permutation"] = ((*stack, inputs), np.dtype(np.int32))
        return parts

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes that a weight of this shape takes."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.component_shapes(shape).values())

    @property
    def _code_dtype(self) -> np.dtype[Any]:
        return np.dtype(np.int8 if self.kind == "int8" and self.zero == "none" else np.uint8)

    @property
    def scale_dtype(self) -> np.dtype[Any]:
        """Dtype of the stored array of scales."""
        return np.dtype(np.uint8) if self.scale in _BIT_PATTERN_SCALES else np.dtype(jnp.dtype(self.scale))

    @property
    def _zero_dtype(self) -> np.dtype[Any]:
        if self.zero == "bias":
            return self.scale_dtype
        return np.dtype(np.uint8 if self.kind == "int4" else np.int16)  # GPTQ's zero points go up to 16 and 256

    def to_json(self) -> dict[str, Any]:
        """The spec as JSON values; :meth:`from_json` is the inverse."""
        return dataclasses.asdict(self) | {"block": list(self.block)}

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Reads the JSON values that :meth:`to_json` writes.

        Raises:
            QuantError: For any other value.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(value, Mapping) or not {"kind"} <= set(value) <= names:
            raise QuantError(f"a quantization has {', '.join(sorted(names))}, not {value!r}")
        block = value.get("block", (1, 64))
        if not isinstance(block, (list, tuple)):
            raise QuantError(f"block must be [outputs, inputs], not {block!r}")
        return cls(**{**value, "block": tuple(block)})


def _invalid_reason(spec: QuantSpec) -> str | None:
    choices = {"kind": QuantDtype, "scale": ScaleDtype, "zero": ZeroPointKind, "outer": GlobalScaleKind}
    for name, kinds in choices.items():
        if getattr(spec, name) not in get_args(kinds):
            return f"{name} must be one of {', '.join(get_args(kinds))}"
    if type(spec.permuted) is not bool:
        return "permuted must be true or false"
    block = spec.block
    if len(block) != 2 or any(type(n) is not int or not 0 <= n < 1 << 31 for n in block):
        return "block must be two whole numbers, 0 for all"
    if spec.zero != "none" and (spec.kind not in ("int4", "int8") or spec.scale in _BIT_PATTERN_SCALES):
        return "only integers with 16- or 32-bit scales have zero points or biases"
    return None


def component_axes(
    name: str, shape: tuple[int, ...], axes: Sequence[LogicalAxis | None]
) -> tuple[LogicalAxis | None, ...]:
    """Logical axes of one stored array of a quantized weight: those of the weight that the array has too.

    Args:
        name: Name of the array, as in :meth:`QuantSpec.component_shapes`.
        shape: Shape of the array.
        axes: Logical axes of the weight ``[*stack, O, I]``.
    """
    *stack, _, inputs = axes
    if name == "outer":
        return tuple(stack)
    if name == "permutation":
        return (*stack, inputs)
    # One block along an axis serves all devices.
    return tuple(axis if size > 1 else None for axis, size in zip(axes, shape, strict=True))
