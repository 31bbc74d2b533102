"""The implementations of an operation, and how one is selected."""

from __future__ import annotations

from typing import Literal, get_args

from pallas_kernels._launch import unavailable_reason

Implementation = Literal["triton", "reference"]


def select_implementation(
    implementation: Implementation | None = None, unsupported_reason: str | None = None
) -> Implementation:
    """Selects the implementation of one call.

    Args:
        implementation: ``None`` for the best one available, which always works; a name for that one alone.
        unsupported_reason: Why the kernel cannot take this call, or ``None`` if it can.

    Raises:
        NotImplementedError: If "triton" is named and cannot run, with the reason.
        ValueError: For an unknown name.
    """
    if implementation is not None and implementation not in get_args(Implementation):
        raise ValueError(f"implementation must be one of {get_args(Implementation)}, not {implementation!r}")
    if implementation == "reference":
        return "reference"
    reason = unavailable_reason() or unsupported_reason
    if reason is None:
        return "triton"
    if implementation == "triton":
        raise NotImplementedError(f"the implementation 'triton' cannot run: {reason}")
    return "reference"
