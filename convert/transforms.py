"""How one checkpoint tensor becomes parameters, and back. Both directions are views or one copy, never arithmetic."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Transform:
    """A checkpoint tensor as one or several parameters, laid side by side along their axis 1.

    With one parameter the tensor is the parameter. ``merged``: the checkpoint merges the first two axes, as it does
    with ``kv_b_proj`` [N*(Hn+Hv), R], which holds ``k_b`` [N, Hn, R] and ``v_b`` [N, Hv, R].
    """

    merged: bool = False

    def shape(self, targets: Sequence[Shape]) -> Shape:
        """Shape of the checkpoint tensor, given the parameters'."""
        if len(targets) == 1:
            return targets[0]
        first, *rest = targets[0]
        joined = (first, sum(shape[1] for shape in targets), *rest[1:])
        return (joined[0] * joined[1], *joined[2:]) if self.merged else joined

    def split(self, tensor: Array, targets: Sequence[Shape]) -> tuple[Array, ...]:
        """The parameters as views of the tensor."""
        if len(targets) == 1:
            return (tensor,)
        rows = [shape[1] for shape in targets]
        apart = tensor.reshape(targets[0][0], sum(rows), *targets[0][2:])
        return tuple(np.split(apart, np.cumsum(rows)[:-1], axis=1))

    def join(self, pieces: Sequence[Array]) -> Array:
        """The checkpoint tensor of its parameters."""
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces, axis=1).reshape(self.shape([piece.shape for piece in pieces]))


WHOLE = Transform()
HEADS = Transform(merged=True)
