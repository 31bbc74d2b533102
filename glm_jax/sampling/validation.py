"""Checks of one option each: the value in its plain type, or a SamplingError that names field, range and value."""

import math
import numbers
import reprlib
from collections.abc import Callable, Iterable, Mapping
from typing import NoReturn, TypeVar

from glm_jax.errors import SamplingError

T = TypeVar("T")


def refuse(field: str, value: object, expected: str) -> NoReturn:
    """Raises the one error all checks share; a huge value is shortened."""
    raise SamplingError(f"{field} must be {expected}, got {reprlib.repr(value)}")


def number(field: str, value: object, expected: str, allowed: Callable[[float], bool]) -> float:
    """A finite real number that satisfies ``allowed``; booleans are refused."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        refuse(field, value, expected)
    try:
        plain = float(value)
    except OverflowError:
        refuse(field, value, expected)
    if not math.isfinite(plain) or not allowed(plain):
        refuse(field, value, expected)
    return plain


def integer(field: str, value: object, low: int, high: int, expected: str | None = None) -> int:
    """A whole number in [low, high]; booleans and floats are refused."""
    expected = expected or f"an integer in [{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not low <= int(value) <= high:
        refuse(field, value, expected)
    return int(value)


def flag(field: str, value: object) -> bool:
    """True or False, and nothing that merely counts as one."""
    if not isinstance(value, bool):
        refuse(field, value, "True or False")
    return value


def _items(field: str, value: object, expected: str, most: int) -> list[object]:
    if isinstance(value, (bytes, Mapping)) or not isinstance(value, Iterable):
        refuse(field, value, expected)
    found = list(value)
    if len(found) > most:
        raise SamplingError(f"{field} must have at most {most} entries, got {len(found)}")
    return found


def strings(field: str, value: object, most: int, longest: int) -> tuple[str, ...]:
    """Up to ``most`` non-empty strings of up to ``longest`` characters; a lone string is a list of one."""
    expected = f"a sequence of at most {most} non-empty strings of at most {longest} characters"
    found = _items(field, [value] if isinstance(value, str) else value, expected, most)
    for item in found:
        if not isinstance(item, str) or not 0 < len(item) <= longest:
            refuse(field, item, expected)
    return tuple(str(item) for item in found)


def token_ids(field: str, value: object, most: int, largest: int) -> tuple[int, ...]:
    """Up to ``most`` token ids."""
    expected = f"a sequence of at most {most} token ids"
    if isinstance(value, str):
        refuse(field, value, expected)
    return tuple(integer(f"{field}: a token id", item, 0, largest) for item in _items(field, value, expected, most))


def biases(field: str, value: object, most: int, largest: int, bound: float) -> dict[int, float] | None:
    """Token id to bias, in order of id, as a new dictionary; an empty one is None."""
    if not isinstance(value, Mapping):
        refuse(field, value, "a mapping of token id to bias")
    if len(value) > most:
        raise SamplingError(f"{field} must have at most {most} entries, got {len(value)}")
    expected = f"a number in [-{bound:g}, {bound:g}]"
    plain = {
        integer(f"{field}: a token id", key, 0, largest): number(
            f"{field}[{key}]", bias, expected, lambda b: abs(b) <= bound
        )
        for key, bias in value.items()
    }
    return dict(sorted(plain.items())) or None


def known(given: Iterable[object], fields: Iterable[str]) -> None:
    """Refuses names that are not options."""
    allowed = sorted(fields)
    unknown = sorted(str(name) for name in given if name not in allowed)
    if unknown:
        raise SamplingError(f"unknown sampling option {', '.join(unknown)}; the options are {', '.join(allowed)}")
