"""All kernels of a decode step and of a prompt, at the real model's shapes, compiled for every supported GPU."""

import dataclasses
import functools
import re
import subprocess
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from glm_jax.cache import LatentCache
from glm_jax.config import Config
from glm_jax.engine.aot import _without_bfloat16_bits
from glm_jax.model import GLM
from glm_jax.sampling import SamplerState, SamplingParams
from glm_jax.weights import QUANT_PRESETS
from glm_jax.weights.storage import abstract_params, plan_storage
from glm_jax.weights.tiling import tile_params
from pallas_kernels import compiling_for
from pallas_kernels._launch import record_kernels
from pallas_kernels.aot import load_gpu_specs
from pallas_kernels.specs import Sweep, list_specs
from tests.aot import prefill_programs

pytestmark = pytest.mark.aot
SAMPLER = {"logits_stats_kernel", "radix_select_kernel", "sample_kernel"}  # without matrix products
GPU_BY_ARCHITECTURE = {89: "rtx6000-ada", 90: "h200", 100: "b200", 120: "rtxpro6000"}


def nvidia_tool(name):
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


@dataclasses.dataclass
class CubinStats:
    """Resources and instructions of an assembled kernel."""

    registers: int
    stack: int
    instructions: list[str]

    @classmethod
    def from_cubin(cls, cubin):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            usage, code = (
                subprocess.run(
                    [nvidia_tool(name), option, file.name], capture_output=True, text=True, check=True
                ).stdout
                for name, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
            )
        registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
        instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]+)", code, re.MULTILINE)
        return cls(registers, stack, instructions)

    def count(self, pattern):
        return sum(bool(re.match(pattern, name)) for name in self.instructions)


@functools.cache
def decode_kernels(card, preset, batch, cache_dtype):
    """Kernels of a decode step by name and PTX; a dense layer and two of experts have all of them."""
    cfg = Config.flash(layers=3)
    params = abstract_params(cfg, jnp.bfloat16, storage=plan_storage(cfg, QUANT_PRESETS[preset])[0])
    params.pop("mtp")
    tiled = jax.eval_shape(tile_params, _without_bfloat16_bits(params))
    cache = jax.eval_shape(lambda: LatentCache.create(cfg, batch, 8192, cache_dtype))
    tokens = jax.ShapeDtypeStruct((batch, 1), jnp.int32)
    with compiling_for(load_gpu_specs()[card].target), record_kernels() as recorded:
        for options in ({"temperature": 0}, {"top_p": 1}, {"top_p": 0.9, "logprobs": 0}):
            rows = SamplerState.create(
                [SamplingParams(**options)] * batch,
                [0] * batch,
                [()] * batch,
                vocab_size=cfg.vocab_size,
                valid_vocab=154_856,
            )
            step = functools.partial(GLM(cfg).apply, method="decode_and_sample")
            jax.eval_shape(lambda p, *given, step=step: step({"params": p}, *given), tiled, tokens, tokens, cache, rows)
    return {(kernel.name, kernel.ptx): kernel for kernel in recorded}


# Each takes a minute: every architecture and every case once by default, all pairs of them in the long tests.
DEFAULT_CASES = {(89, 1, "fp8"), (89, 32, "int8"), (90, 1, "bfloat16"), (100, 32, "int8"), (120, 1, "fp8")}
CASES = [
    pytest.param(architecture, *case, marks=() if (architecture, *case[1:]) in DEFAULT_CASES else pytest.mark.soak)
    for architecture in GPU_BY_ARCHITECTURE
    for case in [("int4", 1, "bfloat16"), ("int4-small", 1, "fp8"), ("int4", 32, "int8")]
]


@pytest.mark.parametrize(("architecture", "preset", "batch", "cache"), CASES)
def test_kernels_of_a_decode_step(architecture, preset, batch, cache):
    found = decode_kernels(GPU_BY_ARCHITECTURE[architecture], preset, batch, cache)
    names = {name for name, _ in found}
    assert names >= {
        "fused_linear_kernel",
        "absorbed_q_proj_kernel",
        "flash_decode_kernel",
        "combine_v_proj_kernel",
        "gate_up_kernel",
        "down_kernel",
        "lm_head_sample_kernel",
    } | SAMPLER | ({"dispatch_kernel"} if batch > 8 else set())
    limit = load_gpu_specs()[GPU_BY_ARCHITECTURE[architecture]].shared_memory_per_block
    for (name, _), kernel in found.items():
        stats = CubinStats.from_cubin(kernel.cubin)
        assert stats.stack == 0, f"{name} spills {stats.stack} bytes"
        assert stats.count(r"(LDL|STL)\b") == 0, name
        assert kernel.shared_memory <= limit
        assert stats.registers * 32 * kernel.num_warps <= 65536
        if name in SAMPLER:
            assert stats.count(r"LDG\S*\.128"), f"{name} has no 16-byte load"
            assert name != "radix_select_kernel" or stats.count("RED"), "has no reduction without a result"
            continue
        if name == "dispatch_kernel":  # without matrix products
            continue
        assert stats.count("HMMA") + stats.count("HGMMA") + stats.count("UTC.*MMA"), f"{name} has no tensor instruction"
        # Rows of 8 bits are widened on their way to shared memory, so they are loaded instead of copied.
        loads = r"LDG\S*\.128" if name == "flash_decode_kernel" and cache in ("int8", "fp8") else r"LDGSTS\S*\.128"
        assert stats.count(loads), f"{name} has no 16-byte copy"


@pytest.mark.parametrize("architecture", GPU_BY_ARCHITECTURE)
def test_products_of_a_prompt(architecture):
    """Weights are dequantized once for a block of rows, in shared memory, and multiplied by tensor cores."""
    card = load_gpu_specs()[GPU_BY_ARCHITECTURE[architecture]]
    specs = list_specs(Sweep(weight_kinds=("int4",), prefill_lengths=(2048,)), ["matmul", "gated"])
    assert len(specs) == 2
    for spec in specs:
        arrays = jax.eval_shape(functools.partial(spec.make_inputs, 2))
        with compiling_for(card.target), record_kernels() as recorded:
            jax.eval_shape(lambda g, s, run=spec.run: run(g, s, jnp.ones(1, jnp.int32))[0], *arrays)
        (kernel,) = recorded
        stats = CubinStats.from_cubin(kernel.cubin)
        assert (stats.stack, stats.count(r"(LDL|STL)\b")) == (0, 0), spec.full_name
        assert kernel.shared_memory <= card.shared_memory_per_block
        assert stats.count(PRODUCTS[architecture][0]), f"{spec.full_name} has no tensor instruction"
        assert stats.count(r"LDGSTS\S*\.128"), f"{spec.full_name} has no 16-byte copy"


# Tensor instructions, and their number in the loop without a mask and the loop with one: for each of eight warps, with
# 128 queries by 16 keys; for each of two warp groups, with 128 by 64. On sm_100 there are more before the loops.
PRODUCTS = {89: ("HMMA", 2 * 64), 90: ("HGMMA", 2 * 24), 100: ("UTC.*MMA", None), 120: ("HMMA", 2 * 64)}


@functools.cache
def prefill_kernels(card):
    with compiling_for(load_gpu_specs()[card].target), record_kernels() as recorded:
        prefill_programs.trace_prefill(1, 512, 202_752, "bfloat16")
    return recorded


@pytest.mark.parametrize("architecture", GPU_BY_ARCHITECTURE)
def test_kernels_of_a_prompt(architecture):
    """Attention over a short context, over the first chunk of keys of a long one and over the others."""
    kernels = prefill_kernels(GPU_BY_ARCHITECTURE[architecture])
    assert [kernel.name for kernel in kernels] == 3 * ["flash_attention_kernel"]
    pattern, count = PRODUCTS[architecture]
    for kernel in kernels:
        stats = CubinStats.from_cubin(kernel.cubin)
        assert (stats.stack, stats.count(r"(LDL|STL)\b")) == (0, 0)
        assert kernel.shared_memory <= load_gpu_specs()[GPU_BY_ARCHITECTURE[architecture]].shared_memory_per_block
        assert stats.registers * 32 * kernel.num_warps <= 65536
        # Exactly as many as the work needs: no two warps compute the same product.
        products = stats.count(pattern)
        assert products >= 2 * 24 if count is None else products == count
        assert stats.count(r"LDGSTS\S*\.128"), "has no 16-byte copy"
        # Products of one tile are issued together instead of awaited one by one.
        assert stats.count(r"WARPGROUP\.DEPBAR") < stats.count("HGMMA") / 2 or architecture != 90
