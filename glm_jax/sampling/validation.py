"""Checks of one option each: the value in its plain type, or a SamplingError that names field, range and value."""

import math
import numbers
import reprlib
from collections.abc import Callable, Iterable, Mapping
from typing import NoReturn, TypeVar

from glm_jax.errors import SamplingError

T = TypeVar("T")


def raise_invalid(field: str, value: object, expected: str) -> NoReturn:
    """Raises the one error all checks share; a huge value is shortened."""
    raise SamplingError(f"{field} must be {expected}, got {reprlib.repr(value)}")


def check_number(field: str, value: object, expected: str, allowed: Callable[[float], bool]) -> float:
    """A finite real number that satisfies ``allowed``; booleans are refused."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise_invalid(field, value, expected)
    try:
        plain = float(value)
    except OverflowError:
        raise_invalid(field, value, expected)
    if not math.isfinite(plain) or not allowed(plain):
        raise_invalid(field, value, expected)
    return plain


def check_integer(field: str, value: object, low: int, high: int, expected: str | None = None) -> int:
    """A whole number in [low, high]; booleans and floats are refused."""
    expected = expected or f"an integer in [{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not low <= int(value) <= high:
        raise_invalid(field, value, expected)
    return int(value)


def check_bool(field: str, value: object) -> bool:
    """True or False, and nothing that merely counts as one."""
    if not isinstance(value, bool):
        raise_invalid(field, value, "True or False")
    return value


def _check_items(field: str, value: object, expected: str, most: int) -> list[object]:
    if isinstance(value, (bytes, Mapping)) or not isinstance(value, Iterable):
        raise_invalid(field, value, expected)
    found = list(value)
    if len(found) > most:
        raise SamplingError(f"{field} must have at most {most} entries, got {len(found)}")
    return found


def check_strings(field: str, value: object, max_items: int, max_length: int) -> tuple[str, ...]:
    """Up to ``max_items`` non-empty strings of up to ``max_length`` characters; a lone string is a list of one."""
    expected = f"a sequence of at most {max_items} non-empty strings of at most {max_length} characters"
    found = _check_items(field, [value] if isinstance(value, str) else value, expected, max_items)
    for item in found:
        if not isinstance(item, str) or not 0 < len(item) <= max_length:
            raise_invalid(field, item, expected)
    return tuple(str(item) for item in found)


def check_token_ids(field: str, value: object, max_items: int, max_id: int) -> tuple[int, ...]:
    """Up to ``max_items`` token ids."""
    expected = f"a sequence of at most {max_items} token ids"
    if isinstance(value, str):
        raise_invalid(field, value, expected)
    return tuple(
        check_integer(f"{field}: a token id", item, 0, max_id)
        for item in _check_items(field, value, expected, max_items)
    )


def check_logit_bias(field: str, value: object, max_items: int, max_id: int, bound: float) -> dict[int, float] | None:
    """Token id to bias, in order of id, as a new dictionary; an empty one is None."""
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


def check_option_names(given: Iterable[object], fields: Iterable[str]) -> None:
    """Refuses names that are not options."""
    allowed = sorted(fields)
    unknown = sorted(str(name) for name in given if name not in allowed)
    if unknown:
        raise SamplingError(f"unknown sampling option {', '.join(unknown)}; the options are {', '.join(allowed)}")
