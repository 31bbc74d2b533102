"""Prints resource use of the kernels of a decode step, without a GPU: ``python docs/measurements/kernel_facts.py``.

The kernels have GLM-4.7-Flash's widths with weights in 4 bits (shared experts in 8), one sequence, and a bfloat16 cache
of 8,192 slots. The output is a Markdown table of registers per thread, bytes of stack (spilled registers), warps and
shared memory. The numbers are those of the assembler that comes with Triton; the driver's own assembler, which runs
when a program is loaded, may give others.
"""

import re
import subprocess
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import triton

from pallas_kernels import compiling_for
from pallas_kernels._launch import record_kernels
from pallas_kernels.aot import load_gpu_specs
from pallas_kernels.report_format import markdown_table
from pallas_kernels.specs import Sweep, list_specs

GPUS = {"sm_89": "rtx6000-ada", "sm_90": "h200", "sm_100": "b200", "sm_120": "rtxpro6000"}
SWEEP = Sweep(batch_sizes=(1,), weight_kinds=("int4",), context_lengths=(8192,), cache_kinds=("bfloat16",))


def main() -> None:
    """Compiles the kernels and prints the table."""
    rows = []
    for spec in list_specs(SWEEP):
        weights, state = jax.eval_shape(lambda spec=spec: spec.make_inputs(2))
        cells = [spec.full_name]
        for gpu in GPUS.values():
            with compiling_for(load_gpu_specs()[gpu].target), record_kernels() as kernels:
                jax.eval_shape(lambda w, s, spec=spec: spec.run(w, s, jnp.ones(1, jnp.int32), None)[0], weights, state)
            (kernel,) = kernels
            registers, stack = resource_usage(kernel.cubin)
            cells.append(f"{registers} / {stack} / {kernel.num_warps} / {kernel.shared_memory / 1024:.1f} KB")
        rows.append(cells)
    print(markdown_table(["kernel", *GPUS], rows, text_columns=1))


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """Returns registers per thread and bytes of stack."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        completed = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True)
    match = re.search(r"REG:(\d+) STACK:(\d+)", completed.stdout)
    assert match, completed.stdout
    return int(match[1]), int(match[2])


if __name__ == "__main__":
    main()
