"""Every kernel of a step and of a prompt, at the real model's shapes, compiled for every architecture we promise."""

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
SAMPLER = {"survey_kernel", "narrow_kernel", "draw_kernel"}  # what looks at logits multiplies no matrices
BY_ARCHITECTURE = {89: "rtx6000-ada", 90: "h200", 100: "b200", 120: "rtxpro6000"}


def tool(name):
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


@dataclasses.dataclass
class Facts:
    """What the assembler made of a kernel."""

    registers: int
    stack: int
    instructions: list[str]

    @classmethod
    def of(cls, cubin):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            usage, code = (
                subprocess.run([tool(name), option, file.name], capture_output=True, text=True, check=True).stdout
                for name, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
            )
        registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
        found = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]+)", code, re.MULTILINE)
        return cls(registers, stack, found)

    def count(self, pattern):
        return sum(bool(re.match(pattern, name)) for name in self.instructions)


@functools.cache
def kernels(card, preset, batch, cache_dtype):
    """Name and kernel of each that a step launches: a dense layer and two of experts have them all."""
    cfg = Config.flash(layers=3)
    params = abstract_params(cfg, jnp.bfloat16, storage=plan_storage(cfg, QUANT_PRESETS[preset])[0])
    params.pop("mtp")
    tiled = jax.eval_shape(tile_params, _without_bfloat16_bits(params))
    cache = jax.eval_shape(lambda: LatentCache.create(cfg, batch, 8192, cache_dtype))
    tokens = jax.ShapeDtypeStruct((batch, 1), jnp.int32)
    with compiling_for(load_gpu_specs()[card].target), record_kernels() as made:
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
    return {(kernel.name, kernel.ptx): kernel for kernel in made}


# Each takes a minute: every architecture and every case here, all pairs of them in the long tests.
HERE = {(89, 1, "fp8"), (89, 32, "int8"), (90, 1, "bfloat16"), (100, 32, "int8"), (120, 1, "fp8")}
CASES = [
    pytest.param(architecture, *case, marks=() if (architecture, *case[1:]) in HERE else pytest.mark.soak)
    for architecture in BY_ARCHITECTURE
    for case in [("int4", 1, "bfloat16"), ("int4-small", 1, "fp8"), ("int4", 32, "int8")]
]


@pytest.mark.parametrize(("architecture", "preset", "batch", "cache"), CASES)
def test_kernels_of_a_step(architecture, preset, batch, cache):
    found = kernels(BY_ARCHITECTURE[architecture], preset, batch, cache)
    names = {name for name, _ in found}
    assert names >= {
        "linear_kernel",
        "queries_kernel",
        "attend_kernel",
        "values_kernel",
        "gate_up_kernel",
        "down_kernel",
        "head_kernel",
    } | SAMPLER | ({"plan_kernel"} if batch > 8 else set())
    limit = load_gpu_specs()[BY_ARCHITECTURE[architecture]].shared_memory_per_block
    for (name, _), kernel in found.items():
        facts = Facts.of(kernel.cubin)
        assert facts.stack == 0, f"{name} spills {facts.stack} bytes"
        assert facts.count(r"(LDL|STL)\b") == 0, name
        assert kernel.shared_memory <= limit
        assert facts.registers * 32 * kernel.num_warps <= 65536
        if name in SAMPLER:
            assert facts.count(r"LDG\S*\.128"), f"{name} loads nothing 16 bytes at a time"
            assert name != "narrow_kernel" or facts.count("RED"), "sums that nobody waits for"
            continue
        if name == "plan_kernel":  # sorts; it multiplies nothing
            continue
        assert facts.count("HMMA") + facts.count("HGMMA") + facts.count("UTC.*MMA"), f"{name} has no tensor instruction"
        # Rows of 8 bits are widened on their way to shared memory, and so are loaded, not copied.
        loads = r"LDG\S*\.128" if name == "attend_kernel" and cache in ("int8", "fp8") else r"LDGSTS\S*\.128"
        assert facts.count(loads), f"{name} copies nothing 16 bytes at a time"


@pytest.mark.parametrize("architecture", BY_ARCHITECTURE)
def test_products_of_a_prompt(architecture):
    """Weights are unpacked once for a block of rows, in shared memory, and multiplied by tensor cores."""
    card = load_gpu_specs()[BY_ARCHITECTURE[architecture]]
    found = list_specs(Sweep(weight_kinds=("int4",), prefill_lengths=(2048,)), ["matmul", "gated"])
    assert len(found) == 2
    for case in found:
        arrays = jax.eval_shape(functools.partial(case.make_inputs, 2))
        with compiling_for(card.target), record_kernels() as made:
            jax.eval_shape(lambda g, s, run=case.run: run(g, s, jnp.ones(1, jnp.int32), None)[0], *arrays)
        (kernel,) = made
        facts = Facts.of(kernel.cubin)
        assert (facts.stack, facts.count(r"(LDL|STL)\b")) == (0, 0), case.full_name
        assert kernel.shared_memory <= card.shared_memory_per_block
        assert facts.count(PRODUCTS[architecture][0]), f"{case.full_name} has no tensor instruction"
        assert facts.count(r"LDGSTS\S*\.128"), f"{case.full_name} copies nothing 16 bytes at a time"


# Instructions of the tensor cores, and how many of them two loops need, one without a mask and one with it: each of
# eight warps, for 128 queries by 16 keys; each of two groups of warps, for 128 by 64. On sm_100 more come before them.
PRODUCTS = {89: ("HMMA", 2 * 64), 90: ("HGMMA", 2 * 24), 100: ("UTC.*MMA", None), 120: ("HMMA", 2 * 64)}


@functools.cache
def kernels_of_a_prompt(card):
    with compiling_for(load_gpu_specs()[card].target), record_kernels() as made:
        prefill_programs.trace_prefill(1, 512, 202_752, "bfloat16")
    return made


@pytest.mark.parametrize("architecture", BY_ARCHITECTURE)
def test_kernels_of_a_prompt(architecture):
    """Over a short context, over the first stretch of a long one and over the others."""
    made = kernels_of_a_prompt(BY_ARCHITECTURE[architecture])
    assert [kernel.name for kernel in made] == 3 * ["flash_kernel"]
    pattern, count = PRODUCTS[architecture]
    for kernel in made:
        facts = Facts.of(kernel.cubin)
        assert (facts.stack, facts.count(r"(LDL|STL)\b")) == (0, 0)
        assert kernel.shared_memory <= load_gpu_specs()[BY_ARCHITECTURE[architecture]].shared_memory_per_block
        assert facts.registers * 32 * kernel.num_warps <= 65536
        # Exactly as many as the work needs: no warp computes what another one does.
        found = facts.count(pattern)
        assert found >= 2 * 24 if count is None else found == count
        assert facts.count(r"LDGSTS\S*\.128"), "copies nothing 16 bytes at a time"
        # Products of one tile follow each other, and are not waited for one by one.
        assert facts.count(r"WARPGROUP\.DEPBAR") < facts.count("HGMMA") / 2 or architecture != 90
