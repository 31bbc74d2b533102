"""Learned rounding: it keeps what it must, it helps, and it can be gone on with."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.calibrate import CalibratedSource, CalibrationConfig
from convert.calibrate.calibrated_source import MIN_EXPERT_TOKENS
from convert.calibrate.signround import SignRoundConfig, quantize_by_search, supports_signround, tune_block
from convert.pipeline import convert_checkpoint
from glm_jax.checkpoint.sources.open import open_source
from glm_jax.config import Config
from glm_jax.errors import CheckpointError, MemoryPlanError, QuantError
from glm_jax.weights import QUANT_PRESETS, QuantSpec, dequantize
from tests.builders.calibration_checkpoint import write_calibration_checkpoint

SPEC = QuantSpec(kind="int4", block=(1, 8))
QUICK = SignRoundConfig(steps=30, batch_size=4)
TEXT = CalibrationConfig(max_windows=8, window_tokens=32)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_source(write_calibration_checkpoint(tmp_path_factory.mktemp("calibratable")))


def calibrated(source, **options):
    return CalibratedSource(source, QUANT_PRESETS["int4-small"], **{"calibration": TEXT, "config": QUICK, **options})


def arrays(source, part):
    """The quantized arrays of a part by name."""
    made = {}
    for leaf in source.layout()[part]:
        if source.quant_spec(leaf):
            pieces = [piece for _, piece in source.iter_chunks(leaf)]
            made[leaf.name] = jax.tree.map(lambda *parts: np.concatenate([np.asarray(p) for p in parts]), *pieces)
    return made


def product(weights, x):
    """A block of one matrix."""
    return jnp.einsum("bti,oi->bto", x, weights["w",])


def problem(seed=0, rank=6):
    """Inputs of a low rank, so that errors of one column can make up for those of another."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((16, 32)).astype(np.float32)
    x = (rng.standard_normal((8, 16, rank)) @ rng.standard_normal((rank, 32))).astype(np.float32)
    return {("w",): jnp.asarray(w)}, x, np.einsum("bti,oi->bto", x, w)


def tuned(plain, x, y, *, learn=1.0, settings=SignRoundConfig(steps=100)):
    start = {path: quantize_by_search(weight, SPEC, "float32") for path, weight in plain.items()}
    mask = {("w",): jnp.float32(learn)}
    steps = []
    made, before, after = tune_block(product, plain, start, mask, x, y, settings, steps.append)
    assert steps == [1] * settings.steps
    return start, made, before, after


def test_it_lowers_the_error_of_the_output_and_says_by_how_much():
    plain, x, y = problem()
    start, made, before, after = tuned(plain, x, y)

    def error(weight):
        return float(np.mean((np.einsum("bti,oi->bto", x, np.asarray(dequantize(weight))) - y) ** 2))

    assert after < 0.7 * before
    assert np.isclose(error(start["w",]), before, rtol=1e-4)
    assert np.isclose(error(made["w",]), after, rtol=1e-4)


def test_where_learning_does_not_help_the_start_is_kept():
    """With inputs that have nothing to do with each other, rounding to nearest is the best there is."""
    plain, x, _ = problem(rank=32)
    x = np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)
    start, made, before, after = tuned(plain, x, np.einsum("bti,oi->bto", x, np.asarray(plain["w",])))
    assert after >= before
    assert np.array_equal(made["w",].codes, start["w",].codes)


def test_codes_move_by_one_at_most_and_scales_within_their_limits():
    plain, x, y = problem(1)
    start, made, _, _ = tuned(plain, x, y)
    ratio = np.asarray(made["w",].scales, np.float32) / np.asarray(start["w",].scales, np.float32)
    assert 0.5 <= ratio.min() <= ratio.max() <= 1.25 * (1 + 2.0**-8)
    step = np.repeat(np.asarray(made["w",].scales, np.float32), 8, axis=-1)
    moved = np.abs(np.asarray(dequantize(made["w",])) - np.asarray(plain["w",]))
    inside = np.abs(np.asarray(plain["w",])) < 6.5 * step
    assert (moved[inside] <= 1.001 * step[inside]).all()


def test_what_is_not_to_be_learned_keeps_its_codes():
    plain, x, y = problem(2)
    start, made, before, after = tuned(plain, x, y, learn=0.0)
    assert before == after
    for name, array in start["w",].components().items():
        assert np.array_equal(array, made["w",].components()[name])


def test_the_same_settings_give_the_same_bits():
    plain, x, y = problem(3)
    first, second = tuned(plain, x, y)[1], tuned(plain, x, y)[1]
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))


@pytest.mark.parametrize(
    ("spec", "can"),
    [
        (SPEC, True),
        (QuantSpec(kind="int8", block=(1, 0)), True),
        (QuantSpec(kind="int4", zero="point"), False),
        (QuantSpec(kind="fp8"), False),
    ],
)
def test_which_storages_can_be_learned(spec, can):
    assert supports_signround(spec) == can


@pytest.fixture(scope="module")
def learned(source):
    """A calibration that was asked for its layers in turn, and what it gave for the second."""
    made = calibrated(source)
    parts = {part: arrays(made, part) for part in ("layer-00000", "layer-00001", "mtp")}
    return made, parts["layer-00001"]


def test_layers_are_learned_in_turn(learned):
    notes = learned[0].conversion_notes()
    assert [note.partition(":")[0] for note in notes] == ["layer-00000", "layer-00001", "mtp"]
    for note in notes[:2]:
        before, after = (float(word) for word in note.partition("output ")[2].split(";")[0].split(" -> "))
        assert after < before


def test_embedding_and_head_are_searched(source):
    made = calibrated(source)
    for leaf in made.layout()["rest"]:
        if spec := made.quant_spec(leaf):
            (piece,) = (piece for _, piece in made.iter_chunks(leaf))
            assert np.array_equal(
                dequantize(piece), dequantize(made.quantize_chunk(_values(source, "rest", leaf.name), spec))
            )


def _values(source, part, name):
    (leaf,) = (leaf for leaf in source.layout()[part] if leaf.name == name)
    return np.concatenate([np.asarray(piece) for _, piece in source.iter_chunks(leaf)])


def test_experts_that_saw_little_are_listed_and_left_to_the_search(source):
    few = calibrated(source, calibration=CalibrationConfig(max_windows=8, window_tokens=16))
    searched = few.__class__.__mro__[1](source, QUANT_PRESETS["int4-small"])  # what it falls back to
    learned, plainly = arrays(few, "layer-00001"), arrays(searched, "layer-00001")
    note = few.conversion_notes()[-1] if few.conversion_notes() else ""
    listed = json.loads(note.partition("left to the search: ")[2] or "[]")
    assert listed, f"every expert had {MIN_EXPERT_TOKENS} tokens: {note}"
    for expert in range(7):
        for name in ("moe.gate", "moe.up", "moe.down"):
            same = np.array_equal(learned[name].codes[expert], plainly[name].codes[expert])
            assert same or expert not in listed


def test_asking_for_a_later_layer_first_learns_those_before(source, learned):
    late = arrays(calibrated(source), "layer-00001")
    assert all(np.array_equal(late[name].codes, learned[1][name].codes) for name in late)


def test_another_text_is_another_conversion(source, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 400)
    other = calibrated(source, calibration=CalibrationConfig(path=path, max_windows=8, window_tokens=32))
    assert other.fingerprint() != calibrated(source).fingerprint()
    assert calibrated(source).fingerprint() == calibrated(source).fingerprint()


def test_too_little_memory_is_said_before_the_first_layer(source, tmp_path, monkeypatch):
    monkeypatch.setattr("convert.calibrate.calibrated_source.available_device_memory", lambda device: 1000)
    with pytest.raises(MemoryPlanError, match=r"learned rounding needs about .* use --method mse"):
        convert_checkpoint(source, tmp_path / "out", quantize="int4", method="signround")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.txt", "too short", "has 3 tokens: calibrating takes at least 2,048"),
        ("a.jsonl", '{"text": "a"}\nnot json', "line 2 is not JSON"),
        ("a.jsonl", '{"words": "a"}', 'line 1 must be an object with "text" or "messages"'),
    ],
)
def test_texts_that_will_not_do(source, tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError) as caught:
        CalibrationConfig(path=tmp_path / name).load_windows(source.cfg, source.info.folder)
    assert words in str(caught.value)


def test_texts_that_cannot_be_read(source, tmp_path):
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="is not text in UTF-8"):
        CalibrationConfig(path=tmp_path / "bytes.txt").load_windows(source.cfg, source.info.folder)
    with pytest.raises(CheckpointError, match="cannot read"):
        CalibrationConfig(path=tmp_path / "nowhere.txt").load_windows(source.cfg, source.info.folder)


def test_conversations_are_rendered(source, tmp_path):
    turns = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "One two three. " * 60}]
    lines = [json.dumps({"messages": turns})] * 40
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    windows = CalibrationConfig(path=tmp_path / "a.jsonl", max_windows=16, window_tokens=64).load_windows(
        source.cfg, source.info.folder
    )
    assert windows.shape == (16, 64)
    assert windows.dtype == np.int32


def test_the_miniature_s_own_text_holds_nothing_that_was_held_out():
    from convert.calibrate.calibration_data import _STDLIB_FILES
    from examples.tiny_recipe.corpus import LibraryFile

    assert not any(LibraryFile(name, "", "").held_out for name in _STDLIB_FILES)
    windows = CalibrationConfig().load_windows(
        Config.from_hf(open_source("tiny").hf_config), open_source("tiny").info.folder
    )
    assert windows.shape == (256, 256)


def test_a_text_without_a_use_is_refused(source, tmp_path):
    with pytest.raises(QuantError, match="uses no calibration text"):
        convert_checkpoint(source, tmp_path / "out", quantize="int4", calibration=TEXT)
    with pytest.raises(QuantError, match="a calibration text is for quantizing"):
        convert_checkpoint(source, tmp_path / "out", calibration=TEXT)
