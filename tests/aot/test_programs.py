"""The real model's generation loop, compiled for cards that are not here: launches, graphs, memory."""

import dataclasses

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
    return aot.in_child("glm_jax.aot:decode", argument)


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


def test_filters_are_few_launches():
    """Four for each of the two searches, one before and one after them; and the head leaves logits."""
    made = compiled("rtx6000-ada", "int4", 1, 1024, "bfloat16", temperature=1.0, top_p=0.95)
    kernels = made["kernels"]
    assert [kernels[name] for name in ("survey_kernel", "narrow_kernel", "draw_kernel")] == [1, 8, 1]
    assert made["launches_per_token"] <= 400
    assert made["copies_per_token"] == 0
    assert (made["graph_pieces"], made["launches_outside_graphs"]) == (1, 0)


def test_a_card_that_nobody_described():
    with pytest.raises(aot.AotError, match="no description of a GPU called 'tpu'; there are rtx6000-ada"):
        aot.card("tpu")


def test_what_goes_wrong_in_the_child_is_said_in_one_line():
    with pytest.raises(aot.AotError, match=r"^compiling failed: .*no description of a GPU called 'none'"):
        aot.in_child("glm_jax.aot:decode", {"gpu": "none", "config": dataclasses.asdict(FLASH)})


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
    thunks = list(aot.read_thunks(text))
    assert [(t.kind, t.loops, t.graphs) for t in thunks] == [
        ("kCopy", 0, 0),
        ("kWhile", 0, 0),
        ("kCustomKernel", 0, 0),
        ("kCommandBuffer", 1, 0),
        ("kCustomKernel", 1, 1),
        ("kCopy", 1, 1),
        ("kAllReduceStart", 1, 0),
        ("kCustomKernel", 0, 0),
    ]
    report = aot.Report(thunks=tuple(thunks), argument_bytes=0, output_bytes=0, alias_bytes=0, temp_bytes=0)
    assert [t.name or t.kind for t in report.launches()] == ["first", "kCopy", "kAllReduceStart"]
    assert (report.graphs, report.outside, report.collectives) == (1, 4, ["kAllReduceStart"])
