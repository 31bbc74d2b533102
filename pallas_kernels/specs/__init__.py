"""Specifications of all operations at the shapes of a real model, for tests on a GPU, benchmarks and tuning.

A new operation adds a function that yields its specifications, and its name in :data:`SPEC_BUILDERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from pallas_kernels.specs.base import Arrays as Arrays
from pallas_kernels.specs.base import KernelSpec as KernelSpec
from pallas_kernels.specs.base import ModelDims as ModelDims
from pallas_kernels.specs.base import Sweep as Sweep
from pallas_kernels.specs.base import relative_errors as relative_errors
from pallas_kernels.specs.matmul import fused_linear_specs
from pallas_kernels.specs.mla_decode import absorbed_q_proj_specs, combine_v_proj_specs, flash_decode_specs
from pallas_kernels.specs.moe import down_specs, gate_up_specs
from pallas_kernels.specs.prefill import flash_attention_specs, gated_linear_unit_specs, grouped_matmul_specs
from pallas_kernels.specs.sampling import lm_head_sample_specs

SPEC_BUILDERS: dict[str, Callable[[Sweep], Iterator[KernelSpec]]] = {
    "linear": fused_linear_specs,
    "queries": absorbed_q_proj_specs,
    "attend": flash_decode_specs,
    "values": combine_v_proj_specs,
    "gate_up": gate_up_specs,
    "down": down_specs,
    "matmul": grouped_matmul_specs,
    "gated": gated_linear_unit_specs,
    "flash": flash_attention_specs,
    "head": lm_head_sample_specs,
}


def list_specs(sweep: Sweep, ops: Sequence[str] = (), match: str = "") -> list[KernelSpec]:
    """Returns the specifications of some operations (by default all) whose full names contain ``match``.

    Raises:
        ValueError: For an unknown operation.
    """
    if unknown := [op for op in ops if op not in SPEC_BUILDERS]:
        raise ValueError(f"no operation {unknown[0]!r}; there are {', '.join(SPEC_BUILDERS)}")
    specs = (spec for op in ops or SPEC_BUILDERS for spec in SPEC_BUILDERS[op](sweep))
    return [spec for spec in specs if match in spec.full_name]
