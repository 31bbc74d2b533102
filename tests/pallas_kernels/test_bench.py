"""Timing kernels: what is measured of which cases, and what is written of it; by a clock that is not one."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.config import Config
from pallas_kernels import LaunchError, bench, machine_info, random_arrays, timing
from pallas_kernels.report_format import markdown_table, parse_sizes, write_report
from pallas_kernels.specs import SPEC_BUILDERS, ModelDims, Sweep, list_specs, relative_errors
from pallas_kernels.tiles import BITS_PER_QVALUE, dequantize_tiles

SMALL = Sweep(
    dims=ModelDims(
        hidden=128, heads=2, nope=32, rope=32, value=32, latent=128, query_latent=64, experts=6, experts_per_token=2,
        expert_width=64, dense_width=96, vocab=130,
    ),
    batch_sizes=(2,), weight_kinds=("int4",), context_lengths=(64,), prefill_lengths=(16,), cache_kinds=("int8",),
)  # fmt: skip


def test_the_widths_are_those_of_the_model():
    flash, w = Config.flash(), ModelDims()
    assert (w.hidden, w.heads, w.vocab) == (flash.hidden_size, flash.num_attention_heads, flash.vocab_size)
    assert (w.nope, w.rope, w.value) == (flash.qk_nope_head_dim, flash.qk_rope_head_dim, flash.v_head_dim)
    assert (w.latent, w.query_latent) == (flash.kv_lora_rank, flash.q_lora_rank)
    assert (w.experts, w.experts_per_token) == (flash.n_routed_experts, flash.num_experts_per_tok)
    assert (w.expert_width, w.dense_width) == (flash.moe_intermediate_size, flash.intermediate_size)


def test_cases_are_found_by_operation_and_name():
    every = list_specs(Sweep())
    assert {case.op for case in every} == set(SPEC_BUILDERS)
    assert len({case.full_name for case in every}) == len(every)
    found = list_specs(Sweep(), ["linear", "down"], "int4/m8")
    assert [case.full_name for case in found] == [
        "linear/qkv_a/int4/m8", "linear/o/int4/m8", "linear/dense_down/int4/m8", "linear/logits/int4/m8", "down/int4/m8"
    ]  # fmt: skip
    with pytest.raises(ValueError, match="no operation 'mla'; there are linear, queries, attend"):
        list_specs(Sweep(), ["mla"])


@pytest.mark.parametrize("case", list_specs(SMALL), ids=lambda case: case.full_name)
def test_bytes_are_those_of_one_layer(case):
    (given, state), (more, _) = (jax.eval_shape(lambda n=n: case.make_inputs(n)) for n in (1, 2))
    one, two = (sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays)) for arrays in (given, more))
    given, state = jax.jit(case.make_inputs, static_argnums=0)(2)
    read = case.bytes_accessed(given, state)
    if case.op in ("gate_up", "down"):  # not all experts
        assert 0.2 * (two - one) < read < two - one + 50_000
    elif case.op == "values":  # shares of the attention are read as well
        assert two - one < read < two
    else:
        assert two - one < read < two - one + 50_000


@pytest.mark.parametrize(
    ("op", "name", "weights", "more"),
    [
        ("linear", "o/int4/m1", 2048 * 5120 * 4.25 / 8, 0),
        ("queries", "int8/m1", 5120 * 768 + 20 * 512 * 192, 0),
        ("values", "int8/m1", 20 * 512 * 256, 64 * 20 * (512 + 2) * 4),  # shares of the attention
    ],
)
def test_reading_the_real_model_takes_what_its_matrices_weigh(op, name, weights, more):
    (case,) = list_specs(Sweep(batch_sizes=(1,)), [op], name)
    read = case.bytes_accessed(*jax.jit(case.make_inputs, static_argnums=0)(1))
    assert weights + more < read < 1.02 * weights + more + 60_000  # scales and activations


def test_layers_are_enough_that_no_cache_holds_them(monkeypatch):
    monkeypatch.setattr(timing, "_CACHE_FLUSH_BYTES", 1 << 20)
    (case,) = list_specs(SMALL, ["linear"], "o/")
    arrays = timing.make_arrays(case)
    assert arrays.layers == min(128, -(-(1 << 20) // arrays.nbytes))
    assert arrays.inputs["weight"].stack == (arrays.layers,)
    monkeypatch.setattr(timing, "_CACHE_FLUSH_BYTES", 1)
    assert timing.make_arrays(case).layers == 2


class Doubling:
    """A case that needs no kernel: it doubles a layer, and counts its calls."""

    def __init__(self):
        self.activation_key, self.op, self.name = "x", "double", "all"

    def make_inputs(self, layers):
        return {"x": jnp.ones(4), "w": jnp.arange(layers, dtype=jnp.float32)}, {"calls": jnp.zeros((), jnp.int32)}

    def run(self, given, state, place, shape):
        out = given["x"] * given["w"][place[0]] * 2
        return (out, out), {"calls": state["calls"] + 1}

    def bytes_accessed(self, given, state):
        return 1 << 26


def test_a_round_calls_every_place_and_keeps_what_it_gives():
    arrays = timing.make_arrays(Doubling())
    assert arrays.layers == 4
    program = jax.jit(timing.build_rounds_program(arrays.spec, None))
    places = [jnp.full(1, i, jnp.int32) for i in (0, 1, 2, 3, 1)]
    state, outs = program(arrays.inputs, arrays.state, places, jnp.int32(0), np.int32(3))
    assert int(state["calls"]) == 15
    assert [len(out) for out in outs] == [1] * 5  # the same array twice is one
    assert [float(out[0][0]) for out in outs] == [0, 2, 4, 6, 2]


def test_a_loop_runs_as_often_as_it_is_told():
    work = timing.build_loop(timing.make_arrays(Doubling()))
    assert work.calls_per_round == 32
    work.run_rounds(1)
    work.run_rounds(3)  # what it has taken over is its own


def test_the_time_of_a_call_is_the_median_of_long_runs(monkeypatch):
    now, counts = [0.0], []
    slow = iter([1.0, 1.0, 1.0, 3.0, 2.0])

    def rounds(count):
        counts.append(count)
        now[0] += 0.001 * count * (next(slow) if len(counts) > 1 else 100)

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    found = timing.measure_seconds_per_call(timing.TimedLoop(rounds, 8), repeats=4, min_seconds=0.0195)
    assert counts == [1, 1, 20, 20, 20, 20]
    assert found == pytest.approx(0.0015 / 8)


def test_a_copy_counts_what_is_read_and_written(monkeypatch):
    now = [0.0]

    def clock():
        now[0] += 1.0
        return now[0]

    monkeypatch.setattr(timing, "_COPY_BYTES", 1 << 16)
    monkeypatch.setattr(timing.time, "perf_counter", clock)
    assert timing.measure_copy_bandwidth(repeats=2) == 2 * (1 << 16) * timing._COPIES


def test_results_have_bandwidth_and_failures_a_reason():
    def seconds(arrays):
        if arrays.spec.op == "down":
            raise LaunchError("too much shared memory\nand more")
        if arrays.spec.op == "values":
            raise TypeError("wrong")
        return 1e-6

    results = list(bench.run_benchmarks(list_specs(SMALL, ["attend", "down", "values"]), 1e12, seconds))
    good, no_memory, wrong = results
    assert (good["us"], good["bytes_per_s"]) == (1.0, good["bytes"] * 1e6)
    assert good["of_copy"] == good["bytes"] / 1e6
    assert no_memory["failed"] == "too much shared memory"
    assert wrong["failed"] == "TypeError: wrong"
    facts = {"device": "a card", "bandwidth": 1e12, "python": "3", "versions": {"jax": "1"}, "commit": None}
    text = bench.render_kernel_report({"machine": facts, "results": results})
    assert "| attend | int8/m2/s64 | 1.00 |" in text
    assert "| down | int4/m2 | failed |  |  |" in text
    assert [bench.format_result(result).split(":")[0] for result in results] == [
        "attend/int8/m2/s64",
        "down/int4/m2",
        "values/int4/m2",
    ]


def test_the_command_writes_after_every_case(monkeypatch, tmp_path, capsys):
    seen = []
    monkeypatch.setattr(bench, "unsupported_reason", lambda folder: None)
    monkeypatch.setattr(timing, "measure_copy_bandwidth", lambda: 1e12)

    def measured(wanted, bandwidth):
        for i, case in enumerate(wanted):
            seen.append(len(json.loads((tmp_path / "cpu-kernels.json").read_text())["results"]) if i else 0)
            yield {"op": case.op, "case": case.name, "failed": "no card"}

    monkeypatch.setattr(bench, "run_benchmarks", measured)
    args = ["--ops", "linear", "--match", "o/", "--batch", "1,8", "--kinds", "int4", "--out", str(tmp_path)]
    assert bench.main(args) == 1
    assert seen == [0, 1]
    assert (tmp_path / "cpu-kernels.md").read_text() in capsys.readouterr().out


def test_without_a_card_there_is_nothing_to_time(capsys):
    assert bench.main(["--short"]) == 2
    assert "times are those of a GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--ops", "mla"], "no 'mla'; there are linear"),
        (["--kinds", "int3"], "no 'int3'"),
        (["--batch", "0"], "positive numbers"),
        (["--caches", "int4"], "no 'int4'"),
    ],
)
def test_bad_options_are_refused(args, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        bench.main(args)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit) as exit_:
        bench.main(["--help"])
    assert exit_.value.code == 0
    assert "--match" in capsys.readouterr().out


def test_the_short_set_has_every_operation():
    options = bench.build_bench_parser().parse_args(["--short"])
    assert {case.op for case in bench.select_specs(options)} == set(SPEC_BUILDERS)
    assert len(bench.select_specs(options)) < len(bench.select_specs(bench.build_bench_parser().parse_args([])))


def test_numbers_tables_and_files(tmp_path):
    assert parse_sizes("1, 8K") == (1, 8192)
    assert markdown_table(["a", "b"], [["x", "1"]], text_columns=1) == "| a | b |\n| --- | ---: |\n| x | 1 |"
    write_report(tmp_path / "a.json", {"x": 1})
    write_report(tmp_path / "a.md", "text\n")
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.md"]


@pytest.mark.parametrize("kind", BITS_PER_QVALUE)
def test_random_weights_have_the_size_that_is_asked_for(kind):
    group = 64 if BITS_PER_QVALUE[kind] == 4 else 0
    values = np.asarray(
        dequantize_tiles(jax.jit(lambda: random_arrays.random_tiles((2, 130, 256), kind, group, seed=1))())
    )
    assert values.shape == (2, 130, 256)
    assert 0.95 / 16 < values.std() < 1.1 / 16
    assert abs(values.mean()) < 0.02 / 16
    assert abs(np.corrcoef(values[0].ravel(), values[1].ravel())[0, 1]) < 0.03


def test_random_factors_are_of_the_inputs():
    made = random_arrays.random_tiles((2, 3, 128, 64), "int8", seed=1, num_input_scale_sets=2)
    assert made.input_scales.shape == (2, 3, 2, 64)
    assert 0.9 / 8 < np.asarray(dequantize_tiles(made)).std() < 1.1 / 8


@pytest.mark.parametrize("kind", ["bfloat16", "float32", "int8", "fp8"])
def test_random_rows_of_a_cache_are_of_size_one(kind):
    codes, scales = random_arrays.random_cache_rows((2, 3, 64, 48), kind, 5)
    values = jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn) if kind == "fp8" else codes
    values = np.asarray(values.astype(jnp.float32)) * (1.0 if scales is None else np.asarray(scales)[0, 0, 0, 0])
    assert np.isfinite(values).all()
    assert 0.9 < values.std() < 1.1
    assert (scales is None) == (kind in ("bfloat16", "float32"))


def test_differences_are_relative_and_never_hide_nan():
    one = jnp.asarray([1.0, 4.0])
    assert relative_errors([one], [jnp.asarray([1.0, 2.0])]) == [1.0]
    assert relative_errors([one, one], [one, one]) == [0.0, 0.0]
    assert relative_errors([jnp.asarray([jnp.nan, 4.0])], [one]) == [float("inf")]
    assert relative_errors([one[:1]], [one]) == [float("inf")]


def test_what_a_card_says_of_itself(monkeypatch, tmp_path):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        "#!/bin/sh\n"
        "echo 'NVIDIA H200, 580.1, 143771 MiB, 1980 MHz, 3201 MHz, 1980 MHz, 3201 MHz, 700 W, Enabled, 30, 0x0'\n"
    )
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = machine_info.nvidia_smi()
    assert (found["name"], found["driver_version"], found["clocks.sm"]) == ("NVIDIA H200", "580.1", "1980 MHz")
    smi.write_text("#!/bin/sh\necho broken; exit 1\n")
    assert machine_info.nvidia_smi() == {}
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert machine_info.nvidia_smi() == {}
    assert machine_info.slugify("NVIDIA RTX 6000 Ada") == "nvidia-rtx-6000-ada"
