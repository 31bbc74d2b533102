"""What the assembler makes of the kernels of a step, without a GPU: ``python docs/measurements/kernel_facts.py``.

GLM-4.7-Flash's widths in 4 bits (shared experts in 8), one row, a cache of 8,192 slots in bfloat16. Prints a Markdown
table of registers per thread, bytes of stack (what is spilled), warps, and shared memory, by the assembler that Triton
carries; the driver's own, which compiles when a program is loaded, may give other numbers.
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

CARDS = {"sm_89": "rtx6000-ada", "sm_90": "h200", "sm_100": "b200", "sm_120": "rtxpro6000"}
SWEEP = Sweep(batch_sizes=(1,), weight_kinds=("int4",), context_lengths=(8192,), cache_kinds=("bfloat16",))


def main() -> None:
    """Compiles and prints."""
    rows = []
    for case in list_specs(SWEEP):
        given, state = jax.eval_shape(lambda case=case: case.make(2))
        cells = [case.full_name]
        for card in CARDS.values():
            with compiling_for(load_gpu_specs()[card].target), record_kernels() as made:
                jax.eval_shape(lambda g, s, case=case: case.run(g, s, jnp.ones(1, jnp.int32), None)[0], given, state)
            (kernel,) = made
            registers, stack = usage(kernel.cubin)
            cells.append(f"{registers} / {stack} / {kernel.num_warps} / {kernel.shared_memory / 1024:.1f} KB")
        rows.append(cells)
    print(markdown_table(["kernel", *CARDS], rows, text_columns=1))


def usage(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of stack."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    assert found, done.stdout
    return int(found[1]), int(found[2])


if __name__ == "__main__":
    main()
