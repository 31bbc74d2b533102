"""Checks of single option values.

Each check returns the value as a plain Python type, or raises a SamplingError that names the field, the allowed range
and the value.
"""

import math
import numbers
import reprlib
from collections.abc import Callable, Iterable, Mapping
from typing import NoReturn, TypeVar

from glm_jax.errors import SamplingError

T = TypeVar("T")


def raise_invalid(field: str, value: object, expected: str) -> NoReturn:
    """Raises the error that all checks share; the text of a long value is shortened.

    Raises:
        SamplingError: always.
    """
    raise SamplingError(f"{field} must be {expected}, got {reprlib.repr(value)}")


def check_number(field: str, value: object, expected: str, is_allowed: Callable[[float], bool]) -> float:
    """Returns a finite real number that satisfies ``is_allowed``; booleans are rejected."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise_invalid(field, value, expected)
    try:
        plain = float(value)
    except OverflowError:
        raise_invalid(field, value, expected)
    if not math.isfinite(plain) or not is_allowed(plain):
        raise_invalid(field, value, expected)
    return plain


def check_integer(field: str, value: object, low: int, high: int, expected: str | None = None) -> int:
    """Returns an integer in [low, high]; booleans and floats are rejected."""
    expected = expected or f"an integer in [{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not low <= int(value) <= high:
        raise_invalid(field, value, expected)
    return int(value)


def check_bool(field: str, value: object) -> bool:
    """Returns True or False; other truthy or falsy values are rejected."""
    if not isinstance(value, bool):
        raise_invalid(field, value, "True or False")
    return value


def _check_items(field: str, value: object, expected: str, max_items: int) -> list[object]:
    if isinstance(value, (bytes, Mapping)) or not isinstance(value, Iterable):
        raise_invalid(field, value, expected)
    items = list(value)
    if len(items) > max_items:
        raise SamplingError(f"{field} must have at most {max_items} entries, got {len(items)}")
    return items


def check_strings(field: str, value: object, max_items: int, max_length: int) -> tuple[str, ...]:
    """Returns up to ``max_items`` non-empty strings of up to ``max_length`` characters; a single string is accepted."""
    expected = f"a sequence of at most {max_items} non-empty strings of at most {max_length} characters"
    items = _check_items(field, [value] if isinstance(value, str) else value, expected, max_items)
    for item in items:
        if not isinstance(item, str) or not 0 < len(item) <= max_length:
            raise_invalid(field, item, expected)
    return tuple(str(item) for item in items)


def check_token_ids(field: str, value: object, max_items: int, max_id: int) -> tuple[int, ...]:
    """Returns up to ``max_items`` token ids in [0, max_id]."""
    expected = f"a sequence of at most {max_items} token ids"
    if isinstance(value, str):
        raise_invalid(field, value, expected)
    return tuple(
        check_integer(f"{field}: a token id", item, 0, max_id)
        for item in _check_items(field, value, expected, max_items)
    )


def check_logit_bias(field: str, value: object, max_items: int, max_id: int, bound: float) -> dict[int, float] | None:
    """Returns token id to bias as a new dictionary sorted by id; None if it is empty."""
    if not isinstance(value, Mapping):
        raise_invalid(field, value, "a mapping of token id to bias")
    if len(value) > max_items:
        raise SamplingError(f"{field} must have at most {max_items} entries, got {len(value)}")
    expected = f"a number in [-{bound:g}, {bound:g}]"
    plain = {
        check_integer(f"{field}: a token id", key, 0, max_id): check_number(
            f"{field}[{key}]", bias, expected, lambda b: abs(b) <= bound
        )
        for key, bias in value.items()
    }
    return dict(sorted(plain.items())) or None


def check_option_names(names: Iterable[object], fields: Iterable[str]) -> None:
    """Rejects names that are not sampling options.

    Raises:
        SamplingError: if a name is not among ``fields``; the message lists the options.
    """
    allowed = sorted(fields)
    unknown = sorted(str(name) for name in names if name not in allowed)
    if unknown:
        raise SamplingError(f"unknown sampling option {', '.join(unknown)}; the options are {', '.join(allowed)}")
