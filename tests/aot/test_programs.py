"""The real model's generation loop, compiled for cards that are not here: launches, graphs, memory."""

import dataclasses
from collections import Counter

import pytest

from glm_jax.config import Config
from pallas_kernels import aot

pytestmark = pytest.mark.aot
FLASH = Config.flash()
CASES = [
    ("rtx6000-ada", "int4", 1, 32_768, "bfloat16"),
    ("rtxpro6000", "int4-small", 1, 1024, "fp8"),
    ("h100", "int4", 8, 8192, "bfloat16"),
    ("h200", "int4-small", 1, 32_768, "bfloat16"),
    ("b200", "int4", 1, 1024, "int8"),
]


def compiled(gpu, quantize, batch, context, cache, **sampling):
    argument = {
        "gpu": gpu,
        "config": dataclasses.asdict(FLASH),
        "quantize": quantize,
        "batch": batch,
        "context": context,
        "cache_dtype": cache,
        "sampling": sampling,
    }
    return aot.run_in_child("glm_jax.engine.aot:compile_decode", argument)


@pytest.mark.parametrize(("gpu", "quantize", "batch", "context", "cache"), CASES)
def test_the_generation_loop(gpu, quantize, batch, context, cache):
    made = compiled(gpu, quantize, batch, context, cache)
    kernels = made["kernels"]
    layers, experts = FLASH.num_hidden_layers, FLASH.num_hidden_layers - 1
    # Eight for a layer of experts: two projections and the router are one kernel.
    assert kernels["queries_kernel"] == kernels["attend_kernel"] == kernels["values_kernel"] == layers
    assert kernels["gate_up_kernel"] == layers
    assert kernels["down_kernel"] == experts
    assert kernels["linear_kernel"] <= 3 * experts + 3  # and the dense layer's three
    assert kernels["head_kernel"] == 1  # which draws, too
    assert made["launches_per_token"] <= 391
    assert made["graph_pieces"] == 1
    assert made["launches_outside_graphs"] == 0
    assert made["copies_per_token"] == 0
    assert made["collectives"] == []
    # The cache and the state of the rows are taken over, nothing of them is copied; no second copy of any weight.
    assert made["alias_bytes"] >= made["cache_bytes"]
    assert made["temp_bytes"] < 64e6
    assert made["fits"]


def test_the_generation_loop_on_four_cards():
    """Heads, widths and vocabulary split: two sums over devices a layer, and what adds each to the residual stream."""
    argument = {
        "gpu": "b200",
        "config": dataclasses.asdict(FLASH),
        "quantize": "int4",
        "batch": 1,
        "context": 8192,
        "cache_dtype": "bfloat16",
        "devices": 4,
    }
    made = aot.run_in_child("glm_jax.engine.aot:compile_decode", argument)
    layers = FLASH.num_hidden_layers
    # And one of the embedding; the logits are gathered.
    assert Counter(made["collectives"]) == {"kAllReduce": 2 * layers + 1, "kAllGather": 1}
    assert made["kernels"]["gate_up_kernel"] == made["kernels"]["attend_kernel"] == layers
    assert made["launches_per_token"] <= 12 * layers + 60
    assert made["graph_pieces"] <= 2  # the token's, and what is set up before the loop
    assert made["launches_outside_graphs"] <= 1  # whether to go on, to the host
    assert made["alias_bytes"] >= made["cache_bytes"]
    assert made["temp_bytes"] < 64e6
    assert made["argument_bytes"] < 17.5e9 / 3  # of 17 GB a quarter, the embedding and what is not split


@pytest.mark.parametrize(("slots", "cache"), [(4096, "bfloat16"), (202_752, "bfloat16"), (202_752, "fp8")])
def test_the_attention_of_a_prompt(slots, cache):
    """A chunk of 512 tokens: what it needs does not grow with the context, and nothing is copied to be read."""
    argument = {"gpu": "h200", "batch": 1, "tokens": 512, "slots": slots, "cache_dtype": cache}
    made = aot.run_in_child("tests.aot.prefill_programs:program", argument)
    # A short context, and a whole one or its first stretch.
    assert made["before"].count("flash_kernel") == 2
    assert made["of_a_stretch"].count("flash_kernel") == (slots > 4096)
    assert len(made["of_a_stretch"]) <= 8
    assert "kCopy" not in made["of_a_stretch"]
    assert (made["graph_pieces"], made["launches_outside_graphs"]) == (1, 0)
    # Keys and values of 4,096 slots are 73 MB; then come results in float32, 10 MB each.
    assert made["temp_bytes"] < 110e6


@pytest.mark.parametrize(("gpu", "chunk"), [("rtx6000-ada", 2048), ("h200", 2048), ("h200", 128)])
def test_a_chunk_of_a_prompt(gpu, chunk):
    """No scores of all keys (5 GB of these), no expert that computes tokens of others, no matrix out of its tiles."""
    argument = {
        "gpu": gpu,
        "config": dataclasses.asdict(FLASH),
        "quantize": "int4",
        "batch": 1,
        "context": 32_768,
        "chunk": chunk,
        "cache_dtype": "bfloat16",
    }
    made = aot.run_in_child("glm_jax.engine.aot:compile_prefill", argument)
    # The dense layer's, and those of the loop over the others; attention over a first stretch and over more.
    assert made["graph_pieces"] == 1
    assert made["kernels"]["gated_kernel"] == 1 + 2
    assert made["kernels"]["matmul_kernel"] == (4 + 1) + (4 + 2)
    assert made["kernels"]["flash_kernel"] >= 2 * 2
    assert made["alias_bytes"] >= made["cache_bytes"]
    assert made["temp_bytes"] < 500e6
    assert made["fits"]


def test_filters_are_few_launches():
    """Four for each of the two searches, one before and one after them; and the head leaves logits."""
    made = compiled("rtx6000-ada", "int4", 1, 1024, "bfloat16", temperature=1.0, top_p=0.95)
    kernels = made["kernels"]
    assert [kernels[name] for name in ("survey_kernel", "narrow_kernel", "draw_kernel")] == [1, 8, 1]
    assert made["launches_per_token"] <= 400
    assert made["copies_per_token"] == 0
    assert (made["graph_pieces"], made["launches_outside_graphs"]) == (1, 0)


def test_everything_that_can_be_asked_for_is_one_graph():
    """Also for more rows than eight, whose pairs of token and expert a kernel sorts first."""
    everything = {"temperature": 1.0, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.1, "logprobs": 5}
    made = compiled("h200", "int4", 16, 1024, "bfloat16", **everything)
    assert made["kernels"]["plan_kernel"] == FLASH.num_hidden_layers - 1
    assert made["launches_per_token"] <= 480
    assert made["copies_per_token"] == 0
    assert (made["graph_pieces"], made["launches_outside_graphs"]) == (1, 0)


def test_a_card_that_nobody_described():
    with pytest.raises(aot.AotError, match="no description of a GPU called 'tpu'; there are rtx6000-ada"):
        aot.find_gpu_spec("tpu")


def test_what_goes_wrong_in_the_child_is_said_in_one_line():
    with pytest.raises(aot.AotError, match=r"^compiling failed: .*no description of a GPU called 'none'"):
        aot.run_in_child("glm_jax.engine.aot:compile_decode", {"gpu": "none", "config": dataclasses.asdict(FLASH)})


def test_reading_the_list_of_launches():
    text = """\
001: kCopy  [source       | next=004 (3)] kCopy
004: kWhile [prev=003 (1) | sink        ]
condition:
    005: kCustomKernel [source | sink] wrapped_compare grid: [1, 1, 1] threads: [1, 1, 1]
  body:
    000: kCommandBuffer [source | sink]
        006: kCustomKernel [source       | sink         ] first grid: [1, 1, 1] threads: [1, 1, 1]
        007: kCopy         [prev=011 (1) | next=013 (1) ] kCopy
    008: kAllReduceStart [prev=1 | next=2]
009: kCustomKernel [source | sink] after grid: [1, 1, 1]
"""
    thunks = list(aot.parse_thunks(text))
    assert [(t.kind, t.loop_depth, t.graph_depth) for t in thunks] == [
        ("kCopy", 0, 0),
        ("kWhile", 0, 0),
        ("kCustomKernel", 0, 0),
        ("kCommandBuffer", 1, 0),
        ("kCustomKernel", 1, 1),
        ("kCopy", 1, 1),
        ("kAllReduceStart", 1, 0),
        ("kCustomKernel", 0, 0),
    ]
    report = aot.CompileReport(thunks=tuple(thunks), argument_bytes=0, output_bytes=0, alias_bytes=0, temp_bytes=0)
    assert [t.name or t.kind for t in report.launches()] == ["first", "kCopy", "kAllReduceStart"]
    assert (report.num_cuda_graphs, report.num_ungraphed_launches, report.collectives) == (1, 4, ["kAllReduceStart"])
