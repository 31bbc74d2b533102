"""Operations at the shapes of a real model: what is tested on a card, timed and tuned.

A new operation is a function that yields its cases, and its name in :data:`OPS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from pallas_kernels.specs.base import Arrays as Arrays
from pallas_kernels.specs.base import Case as Case
from pallas_kernels.specs.base import Sweep as Sweep
from pallas_kernels.specs.base import Widths as Widths
from pallas_kernels.specs.base import difference as difference
from pallas_kernels.specs.matmul import linear_cases
from pallas_kernels.specs.mla_decode import attend_cases, queries_cases, values_cases
from pallas_kernels.specs.moe import down_cases, gate_up_cases
from pallas_kernels.specs.prefill import flash_cases, gated_cases, matmul_cases
from pallas_kernels.specs.sampling import head_cases

OPS: dict[str, Callable[[Sweep], Iterator[Case]]] = {
    "linear": linear_cases,
    "queries": queries_cases,
    "attend": attend_cases,
    "values": values_cases,
    "gate_up": gate_up_cases,
    "down": down_cases,
    "matmul": matmul_cases,
    "gated": gated_cases,
    "flash": flash_cases,
    "head": head_cases,
}


def cases(sweep: Sweep, ops: Sequence[str] = (), match: str = "") -> list[Case]:
    """The cases of some operations, all unless given, whose full names contain ``match``.

    Raises:
        ValueError: for an operation that there is not.
    """
    if unknown := [op for op in ops if op not in OPS]:
        raise ValueError(f"no operation {unknown[0]!r}; there are {', '.join(OPS)}")
    found = (case for op in ops or OPS for case in OPS[op](sweep))
    return [case for case in found if match in case.full_name]
