"""Properties of a checkpoint that its parameters do not show."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True, slots=True)
class RoundTripInfo:
    """What is needed, besides the parameters, to write a checkpoint back bit for bit.

    Attributes:
        mtp_copies: Tensors ("embed", "head") that the prediction layer stored as copies of the model's own.
        head_copy: Whether a model with tied embeddings stored a head tensor as well.
        dtypes: Original dtype of each array that is kept in another dtype, by ``layer checkpoint/name``.
    """

    mtp_copies: tuple[str, ...] = ()
    head_copy: bool = False
    dtypes: Mapping[str, str] = dataclasses.field(default_factory=dict)
