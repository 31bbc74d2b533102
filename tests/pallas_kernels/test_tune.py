"""Choosing block sizes: the search by a clock that is not one, the file it writes, and who reads that."""

import dataclasses
import json
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import LaunchError, Target, compiling_for, is_interpreted, timing, tune, tuned
from pallas_kernels._launch import record_kernels
from pallas_kernels.quant_matmul.config import LinearConfig
from pallas_kernels.specs import Sweep, list_specs
from pallas_kernels.tune import CandidateTimer, SearchResult, Unfit, search_config

CARD = Target("NVIDIA Test 1", 90, 132)
RULE = LinearConfig(block_n=64, splits=1, num_warps=4, num_stages=4)
AXES = {"block_n": (32, 64), "splits": (1, 2, 4, 8), "num_warps": (2, 4, 8), "num_stages": (2, 4)}
PROBLEM = tuned.TuningKey("linear", "m1 n64 k64 int4 g64", RULE, AXES)


def test_the_search_changes_one_size_after_the_other():
    best = LinearConfig(block_n=32, splits=4, num_warps=2, num_stages=4)
    asked = []

    def seconds(shape):
        asked.append(shape)
        differences = sum(getattr(shape, name) != getattr(best, name) for name in AXES)
        return 1e-6 * (1 + differences)

    found = search_config(PROBLEM, seconds)
    assert found.config == best
    assert (found.seconds, found.heuristic_seconds) == (1e-6, 4e-6)
    assert len(asked) == len(set(asked)) == found.num_tried  # nothing is timed twice
    assert found.num_tried < 2 * 4 * 3 * 2 / 2


def test_a_gain_within_the_noise_is_none():
    found = search_config(PROBLEM, lambda shape: 1.0 if shape == RULE else 0.99)
    assert found.config == RULE


def test_what_cannot_be_used_is_passed_over_and_counted():
    def seconds(shape):
        if shape.num_stages == 2:
            raise Unfit("too much shared memory")
        if shape.splits == 8:
            raise Unfit("gives something else")
        return 1.0

    found = search_config(PROBLEM, seconds)
    assert (found.config, found.rejections) == (RULE, Counter({"too much shared memory": 1, "gives something else": 1}))
    assert found.to_json()["unfit"] == {"too much shared memory": 1, "gives something else": 1}


def test_where_the_rule_itself_fails_there_is_nothing_to_find():
    def seconds(shape):
        raise Unfit("does not compile")

    with pytest.raises(Unfit):
        search_config(PROBLEM, seconds)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Block sizes of a case without a kernel."""

    num_warps: int = 4


class Scaled:
    """A case whose result, time and failures depend on its block sizes."""

    activation_key, op, name, full_name = "x", "scaled", "all", "scaled/all"

    def make_inputs(self, layers):
        return {"x": jnp.arange(4, dtype=jnp.float32), "w": jnp.ones(layers)}, {}

    def run(self, given, state, place, shape):
        if shape.num_warps == 8:
            raise LaunchError("a kernel needs 999 bytes of shared memory, a card has 9")
        if shape.num_warps == 16:
            raise TypeError("of a compiler")
        wrong = 0.1 if shape.num_warps == 1 else 1e-5 * shape.num_warps
        return given["x"] * given["w"][place[0]] * (1 + wrong), state

    def comparable_outputs(self, given, result, state, place):
        return (result,)

    def bytes_accessed(self, given, state):
        return 1 << 27

    def tolerance(self, dtype):
        return 2.0**-10


def test_a_trial_compares_with_the_rule_before_it_times():
    trial = CandidateTimer(timing.make_arrays(Scaled()), clock=lambda work: work.calls_per_round / 32e6)
    assert [trial(Sizes(warps)) for warps in (4, 2)] == [1e-6, 1e-6]
    for warps, reason in (
        (8, "too much shared memory"),
        (16, r"does not compile or run \(TypeError\)"),
        (1, "gives something else"),
    ):
        with pytest.raises(Unfit, match=reason):
            trial(Sizes(warps))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where files are looked for first."""
    monkeypatch.setenv(tuned.TUNED_DIR_ENV, str(tmp_path))
    tuned._cached_entries.cache_clear()
    yield tmp_path
    tuned._cached_entries.cache_clear()


def linear_cases():
    return list_specs(Sweep(batch_sizes=(1, 8), weight_kinds=("int4",)), ["linear"], "o/")


def fake(case, problem):
    if case.name.endswith("m8"):
        raise RuntimeError("broken\nand more")
    return SearchResult(dataclasses.replace(problem.heuristic, num_warps=8), 1e-6, 2e-6, 5, Counter(why=1))


def test_the_file_is_written_case_by_case_and_taken_up_again(folder, capsys):
    path, kept = folder / tuned.tuned_filename(CARD.name), {}
    assert path.name == "nvidia-test-1.json"
    assert tune.tune(linear_cases(), path, CARD.name, kept, search_spec=fake) == 1
    assert "linear/o/int4/m8: failed, RuntimeError: broken" in capsys.readouterr().err
    held = json.loads(path.read_text())
    assert held["device"] == CARD.name
    assert set(held["machine"]) >= {"device", "versions", "commit"}
    (entry,) = held["ops"]["linear"].values()
    assert (entry["us"], entry["rule_us"], entry["tried"], entry["unfit"]) == (1.0, 2.0, 5, {"why": 1})
    assert tuned.load_tuned(path, CARD.name) == kept

    asked = []

    def other(case, problem):
        asked.append(case.name)
        return SearchResult(problem.heuristic, 3e-6, 3e-6, 1, Counter())

    assert tune.tune(linear_cases(), path, CARD.name, kept, search_spec=other) == 0
    assert asked == ["o/int4/m8"]  # the other was there
    assert tune.tune(linear_cases(), path, CARD.name, kept, retune=True, search_spec=other) == 0
    assert len(asked) == 3
    assert len(json.loads(path.read_text())["ops"]["linear"]) == 2


def test_a_run_ends_in_time(folder, monkeypatch, capsys):
    now = iter([0.0, 10.0, 70.0])
    monkeypatch.setattr(tune.time, "monotonic", lambda: next(now))
    kept = {}
    every = [*linear_cases()[:1], *linear_cases()]
    tune.tune(every, folder / "x.json", CARD.name, kept, minutes=1, search_spec=fake)
    assert len(kept["linear"]) == 1
    assert "stopped after 1 minutes: the same command goes on" in capsys.readouterr().err


def write_file(folder, shape, device=CARD.name, op="linear", key=PROBLEM.key):
    entry = {"shape": shape, "us": 1.0}
    (folder / tuned.tuned_filename(CARD.name)).write_text(json.dumps({"device": device, "ops": {op: {key: entry}}}))


def test_what_was_measured_is_used_on_that_card_alone(folder):
    chosen = dataclasses.asdict(LinearConfig(block_n=32, splits=2, num_stages=2))
    write_file(folder, chosen)
    assert tuned.lookup_config(PROBLEM) is RULE  # no card here
    with compiling_for(CARD):
        assert tuned.lookup_config(PROBLEM) == LinearConfig(**chosen)
        assert tuned.lookup_config(dataclasses.replace(PROBLEM, key="another")) is RULE
        assert tuned.lookup_config(dataclasses.replace(PROBLEM, op="another")) is RULE
    with compiling_for(Target("NVIDIA Test 2", 90, 132)):
        assert tuned.lookup_config(PROBLEM) is RULE


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"block_n": 48}, "block_n cannot be 48"),
        ({"num_warps": 3}, "num_warps cannot be 3"),
        ({"num_stages": 99}, "num_stages cannot be 99"),
        ({"splits": "2"}, "splits cannot be '2'"),
        ({"splits": True}, "splits cannot be True"),
        ({"more": 1}, "linear has block_m, block_n, num_stages, num_warps, splits, not"),
    ],
)
def test_sizes_that_cannot_be_are_refused_by_name(folder, change, why):
    write_file(folder, tuned.config_to_json(RULE) | change)
    with compiling_for(CARD), pytest.raises(LaunchError, match=why) as error:
        tuned.lookup_config(PROBLEM)
    assert str(folder) in str(error.value)
    assert "pallas_kernels.tune" in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"device": "x", "ops": {"linear": {"a": 1}}}', "\\xff"])
def test_a_damaged_file_is_refused_by_name(folder, text):
    (folder / tuned.tuned_filename(CARD.name)).write_bytes(text.encode("latin-1"))
    with compiling_for(CARD), pytest.raises(LaunchError, match="cannot be used"):
        tuned.lookup_config(PROBLEM)


def test_a_file_of_another_card_is_refused(folder):
    write_file(folder, tuned.config_to_json(RULE), device="NVIDIA Test 9")
    with compiling_for(CARD), pytest.raises(LaunchError, match="it is of 'NVIDIA Test 9', not of 'NVIDIA Test 1'"):
        tuned.lookup_config(PROBLEM)


@pytest.mark.skipif(is_interpreted(), reason="the interpreter compiles nothing")
@pytest.mark.parametrize(
    "case",
    list_specs(
        Sweep(
            batch_sizes=(2,),
            weight_kinds=("int8",),
            context_lengths=(64,),
            prefill_lengths=(128,),
            cache_kinds=("int8",),
        )
    ),
    ids=lambda c: c.op,
)
def test_every_operation_asks_for_what_was_measured(folder, case):
    """With another number of warps than the rule's, which is seen in what is compiled."""
    pytest.importorskip("triton")
    given, state = jax.eval_shape(lambda: case.make_inputs(2))
    with compiling_for(CARD):
        problem = case.tuning_key(given)
        changed = next(n for n in problem.search_space["num_warps"] if n != problem.heuristic.num_warps)
        write_file(
            folder, tuned.config_to_json(problem.heuristic) | {"num_warps": changed}, op=case.op, key=problem.key
        )
        with record_kernels() as kernels:
            jax.eval_shape(lambda g, s: case.run(g, s, jnp.ones(1, jnp.int32), None)[0], given, state)
    assert {kernel.num_warps for kernel in kernels} == {changed}
    assert problem.op == case.op
    assert set(problem.search_space) <= {field.name for field in dataclasses.fields(problem.heuristic)}


def test_files_that_are_shipped_can_be_used():
    """There is one for a card only if somebody has measured on it."""
    shipped = sorted(tuned.tuned_dirs()[-1].glob("*.json"))
    for path in shipped:
        held = json.loads(path.read_text(encoding="utf-8"))
        assert path.name == tuned.tuned_filename(held["device"])
        assert tuned.load_tuned(path, held["device"])


def test_keys_of_few_rows_are_shared():
    assert [tuned.rows_bucket(rows) for rows in (1, 2, 3, 8, 9, 64)] == ["m1", "m2", "m4", "m8", "m16", "m64"]


def test_without_a_card_there_is_nothing_to_tune(capsys):
    assert tune.main([]) == 2
    assert "times are those of a GPU" in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit) as exit_:
        tune.main(["--help"])
    assert exit_.value.code == 0
    assert "--minutes" in capsys.readouterr().out


def test_the_command_reads_and_writes_where_it_is_told(folder, monkeypatch, capsys):
    monkeypatch.setattr(tune, "unsupported_reason", lambda out: None)
    monkeypatch.setattr(tune, "_search_on_device", fake)
    args = ["--ops", "linear", "--match", "o/", "--batch", "1", "--kinds", "int4", "--out", str(folder)]
    assert tune.main(args) == 0
    assert f"1 choices of block sizes in {folder / 'cpu.json'}" in capsys.readouterr().out
    np.testing.assert_equal(json.loads((folder / "cpu.json").read_text())["device"], "cpu")
