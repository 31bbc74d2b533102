"""Parser of optional text options. It is apart from the other shared parts because only it needs tyro.

``glm_jax.bench.short`` runs where tyro is not installed.
"""

from __future__ import annotations

from tyro.constructors import PrimitiveConstructorSpec


def optional_text(metavar: str) -> PrimitiveConstructorSpec[str | None]:
    """Parser of an optional text argument that keeps the text as typed; tyro would read "None" as no text."""
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: words[0],
        is_instance=lambda value: value is None or isinstance(value, str),
        str_from_instance=lambda value: [] if value is None else [value],
    )
