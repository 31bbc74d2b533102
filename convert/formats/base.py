"""A weight as a checkpoint stores it, whatever the format."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from glm_jax.quant import QuantizedTensor, QuantSpec

Array = np.ndarray[Any, np.dtype[Any]]


@dataclasses.dataclass(frozen=True, slots=True)
class Stored:
    """A weight in one tensor or several, under its logical name.

    Attributes:
        name: such as ``model.layers.1.self_attn.q_a_proj.weight``.
        shape: of the weight, ``[*stack, O, I]`` (any shape for a plain tensor).
        dtype: of a plain tensor; of a quantised one that in which its own library gives values (float32 where the
            scales have 8 bits).
        spec: how it is stored here, without loss; None for a plain array.
        tensors: names in the file, for messages.
        load: gives the weight, or with a number one row of its leading axis, reading no more than that.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    spec: QuantSpec | None
    tensors: tuple[str, ...]
    load: Callable[[int | None], Array | QuantizedTensor]
