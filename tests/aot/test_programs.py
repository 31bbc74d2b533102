"""The real model's generation loop, compiled for absent GPUs: launches, graphs, memory."""

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
    result = compiled(gpu, quantize, batch, context, cache)
    kernels = result["kernels"]
    layers, experts = FLASH.num_hidden_layers, FLASH.num_hidden_layers - 1
    # Eight in a layer of experts; three of them are projections or the router, by one kernel.
    assert (
        kernels["absorbed_q_proj_kernel"]
        == kernels["flash_decode_kernel"]
        == kernels["combine_v_proj_kernel"]
        == layers
    )
    assert kernels["gate_up_kernel"] == layers
    assert kernels["down_kernel"] == experts
    assert kernels["fused_linear_kernel"] <= 3 * experts + 3  # and the dense layer's three
    assert kernels["lm_head_sample_kernel"] == 1  # which samples, too
    assert result["launches_per_token"] <= 391
    assert result["graph_pieces"] == 1
    assert result["launches_outside_graphs"] == 0
    assert result["copies_per_token"] == 0
    assert result["collectives"] == []
    # The cache and the sampler's state are updated in place, and no weight is copied.
    assert result["alias_bytes"] >= result["cache_bytes"]
    assert result["temp_bytes"] < 64e6
    assert result["fits"]


def test_the_generation_loop_on_four_cards():
    """Heads, widths and vocabulary are split: a layer has two sums over devices, each added to the residual stream."""
    argument = {
        "gpu": "b200",
        "config": dataclasses.asdict(FLASH),
        "quantize": "int4",
        "batch": 1,
        "context": 8192,
        "cache_dtype": "bfloat16",
        "devices": 4,
    }
    result = aot.run_in_child("glm_jax.engine.aot:compile_decode", argument)
    layers = FLASH.num_hidden_layers
    # One more sum for the embedding; the logits are gathered.
    assert Counter(result["collectives"]) == {"kAllReduce": 2 * layers + 1, "kAllGather": 1}
    assert result["kernels"]["gate_up_kernel"] == result["kernels"]["flash_decode_kernel"] == layers
    assert result["launches_per_token"] <= 12 * layers + 60
    assert result["graph_pieces"] <= 2  # that of a token, and the setup before the loop
    assert result["launches_outside_graphs"] <= 1  # the condition of the loop, copied to the host
    assert result["alias_bytes"] >= result["cache_bytes"]
    assert result["temp_bytes"] < 64e6
    assert result["argument_bytes"] < 17.5e9 / 3  # a quarter of 17 GB, the embedding and replicated weights


@pytest.mark.parametrize(("slots", "cache"), [(4096, "bfloat16"), (202_752, "bfloat16"), (202_752, "fp8")])
def test_the_attention_of_a_prompt(slots, cache):
    """A chunk of 512 tokens: its memory does not grow with the context, and nothing is copied to be read."""
    argument = {"gpu": "h200", "batch": 1, "tokens": 512, "slots": slots, "cache_dtype": cache}
    result = aot.run_in_child("tests.aot.prefill_programs:compile_prefill", argument)
    # A short context, and a whole one or its first chunk of keys.
    assert result["before"].count("flash_attention_kernel") == 2
    assert result["loop"].count("flash_attention_kernel") == (slots > 4096)
    assert len(result["loop"]) <= 8
    assert "kCopy" not in result["loop"]
    assert (result["graph_pieces"], result["launches_outside_graphs"]) == (1, 0)
    # Keys and values of 4,096 slots take 73 MB, and float32 results 10 MB each.
    assert result["temp_bytes"] < 110e6


@pytest.mark.parametrize(("gpu", "chunk"), [("rtx6000-ada", 2048), ("h200", 2048), ("h200", 128)])
def test_a_chunk_of_a_prompt(gpu, chunk):
    """No scores of all keys (5 GB), no expert that computes tokens of others, no untiled matrix."""
    argument = {
        "gpu": gpu,
        "config": dataclasses.asdict(FLASH),
        "quantize": "int4",
        "batch": 1,
        "context": 32_768,
        "chunk": chunk,
        "cache_dtype": "bfloat16",
    }
    result = aot.run_in_child("glm_jax.engine.aot:compile_prefill", argument)
    # Those of the dense layer and of the loop over the others; attention over a first chunk of keys and over more.
    assert result["graph_pieces"] == 1
    assert result["kernels"]["gated_linear_unit_kernel"] == 1 + 2
    assert result["kernels"]["grouped_matmul_kernel"] == (4 + 1) + (4 + 2)
    assert result["kernels"]["flash_attention_kernel"] >= 2 * 2
    assert result["alias_bytes"] >= result["cache_bytes"]
    assert result["temp_bytes"] < 500e6
    assert result["fits"]


def test_filters_are_few_launches():
    """Four launches for each of two searches, one before and one after them; and the head writes logits."""
    result = compiled("rtx6000-ada", "int4", 1, 1024, "bfloat16", temperature=1.0, top_p=0.95)
    kernels = result["kernels"]
    assert [kernels[name] for name in ("logits_stats_kernel", "radix_select_kernel", "sample_kernel")] == [1, 8, 1]
    assert result["launches_per_token"] <= 400
    assert result["copies_per_token"] == 0
    assert (result["graph_pieces"], result["launches_outside_graphs"]) == (1, 0)


def test_all_sampling_options_at_once_are_one_graph():
    """Also for more than eight rows, whose (token, expert) pairs are sorted by a kernel first."""
    everything = {"temperature": 1.0, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.1, "logprobs": 5}
    result = compiled("h200", "int4", 16, 1024, "bfloat16", **everything)
    assert result["kernels"]["dispatch_kernel"] == FLASH.num_hidden_layers - 1
    assert result["launches_per_token"] <= 480
    assert result["copies_per_token"] == 0
    assert (result["graph_pieces"], result["launches_outside_graphs"]) == (1, 0)


def test_an_unknown_gpu_is_refused():
    with pytest.raises(aot.AotError, match="no description of a GPU called 'tpu'; there are rtx6000-ada"):
        aot.find_gpu_spec("tpu")


def test_an_error_of_the_child_is_one_line():
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
