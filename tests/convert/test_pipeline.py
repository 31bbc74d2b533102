"""Conversions: bit-equal there and back, verified, resumable, and clear about what they cannot do."""

import functools
import json
import shutil

import ml_dtypes
import numpy as np
import pytest

from convert.pipeline import convert_checkpoint
from glm_jax.checkpoint.folder import arrays
from glm_jax.checkpoint.folder.layout import STATE_FOLDER
from glm_jax.checkpoint.folder.manifest import load_manifest
from glm_jax.checkpoint.safetensors.writer import split_into_shards
from glm_jax.checkpoint.sources.open import open_source
from glm_jax.checkpoint.write import conversion, orbax_target, safetensors_target
from glm_jax.config import Config
from glm_jax.errors import CheckpointError
from tests.builders import hf_checkpoints, hf_configs
from tests.checkpoint.assertions import assert_same_tensors, read_converted_folder

CONFIG = hf_configs.odd_size_config()
BF16 = ml_dtypes.bfloat16


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A small bf16 checkpoint with a tokenizer beside it."""
    folder = tmp_path_factory.mktemp("source")
    hf_checkpoints.write_checkpoint(folder, CONFIG, hf_checkpoints.random_tensors(CONFIG, 0, dtype=BF16))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (folder / name).write_text(f'{{"{name}": 1}}')
    return folder


CASES = {
    "float32": (hf_configs.odd_size_config(), {}),
    "bfloat16": (hf_configs.odd_size_config(), {"dtype": BF16}),
    "float16": (hf_configs.odd_size_config(), {"dtype": np.float16}),
    "own embeddings": (hf_configs.odd_size_config(), {"own_mtp": True}),
    "resaved": (hf_configs.resaved_config(**hf_configs.ODD_SIZES), {}),
    "full-rank queries": (hf_configs.odd_size_config(q_lora_rank=None), {}),
    "two shared experts": (hf_configs.odd_size_config(n_shared_experts=2, first_k_dense_replace=2), {}),
    "tied": (hf_configs.odd_size_config(tie_word_embeddings=True), {}),
    "no prediction layer": (hf_configs.odd_size_config(num_nextn_predict_layers=0), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_round_trip_is_bit_equal(tmp_path, case):
    config, options = CASES[case]
    hf_checkpoints.write_checkpoint(tmp_path / "hf", config, hf_checkpoints.random_tensors(config, 1, **options))
    convert_checkpoint(tmp_path / "hf", tmp_path / "ours")
    convert_checkpoint(tmp_path / "ours", tmp_path / "back", to="safetensors")
    assert_same_tensors(tmp_path / "hf", tmp_path / "back")
    assert Config.from_hf(json.loads((tmp_path / "back" / "config.json").read_text())) == Config.from_hf(config)


def test_round_trip_keeps_oddities(tmp_path):
    """A bf16 router bias, one prediction copy of two, and a tied model's head tensor come back as they were."""
    config = hf_configs.odd_size_config(tie_word_embeddings=True)
    tensors = hf_checkpoints.random_tensors(config, 1, dtype=BF16)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    del tensors["model.layers.3.shared_head.head.weight"]
    bias = "model.layers.2.mlp.gate.e_score_correction_bias"
    tensors[bias] = tensors[bias].astype(BF16)
    hf_checkpoints.write_checkpoint(tmp_path / "hf", config, tensors)
    convert_checkpoint(tmp_path / "hf", tmp_path / "ours")
    convert_checkpoint(tmp_path / "ours", tmp_path / "back", to="safetensors")
    assert_same_tensors(tmp_path / "hf", tmp_path / "back")


def test_round_trip_of_one_own_copy(tmp_path):
    tensors = hf_checkpoints.random_tensors(CONFIG, 1, own_mtp=True)
    del tensors["model.layers.3.embed_tokens.weight"]
    hf_checkpoints.write_checkpoint(tmp_path / "hf", CONFIG, tensors)
    convert_checkpoint(tmp_path / "hf", tmp_path / "ours")
    convert_checkpoint(tmp_path / "ours", tmp_path / "back", to="safetensors")
    assert_same_tensors(tmp_path / "hf", tmp_path / "back")


def test_straight_to_safetensors_in_many_shards(tmp_path, source, monkeypatch):
    monkeypatch.setattr(safetensors_target, "split_into_shards", functools.partial(split_into_shards, max_bytes=20_000))
    report = convert_checkpoint(source, tmp_path / "copy", to="safetensors")
    files = sorted(p.name for p in (tmp_path / "copy").glob("*.safetensors"))
    assert len(files) == report.written > 5
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert_same_tensors(source, tmp_path / "copy")
    index = json.loads((tmp_path / "copy" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in hf_checkpoints.read_tensors(source).values())
    assert open_source(tmp_path / "copy").info.notes == ()


def test_parts_are_plain_orbax_checkpoints(tmp_path, source):
    convert_checkpoint(source, tmp_path / "ours")
    _, arrays = read_converted_folder(tmp_path / "ours")
    tensors = hf_checkpoints.read_tensors(source)
    assert sorted(arrays) == ["layer-00000", "layer-00001", "layer-00002", "mtp", "rest"]
    name, shape, data = arrays["layer-00001"]["moe.gate"]
    assert (name, shape) == ("bfloat16", (7, 12, 40))
    experts = [tensors[f"model.layers.1.mlp.experts.{e}.gate_proj.weight"] for e in range(7)]
    assert data == np.stack(experts).tobytes()


def test_equal_runs_are_equal(tmp_path, source):
    convert_checkpoint(source, tmp_path / "a")
    convert_checkpoint(source, tmp_path / "b")
    assert read_converted_folder(tmp_path / "a") == read_converted_folder(tmp_path / "b")


def test_asset_files_are_copied(tmp_path, source):
    for to in ("orbax", "safetensors"):
        convert_checkpoint(source, tmp_path / to, to=to)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
            assert (tmp_path / to / name).read_bytes() == (source / name).read_bytes()
        assert not (tmp_path / to / STATE_FOLDER).exists()


def test_config_keys_survive(tmp_path):
    config = {**CONFIG, "transformers_version": "5.0.0rc0", "torch_dtype": "float32"}
    hf_checkpoints.write_checkpoint(tmp_path / "hf", config, hf_checkpoints.random_tensors(CONFIG, 0))
    convert_checkpoint(tmp_path / "hf", tmp_path / "ours", dtype="bfloat16")
    convert_checkpoint(tmp_path / "ours", tmp_path / "back", to="safetensors")
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert back["transformers_version"] == "5.0.0rc0"
    assert back["dtype"] == back["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(("before", "after"), [(np.float32, "bfloat16"), (BF16, "float32"), (np.float16, "float32")])
def test_other_dtype(tmp_path, before, after):
    tensors = hf_checkpoints.random_tensors(CONFIG, 0, dtype=before)
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    tensors[bias] = tensors[bias].astype(before)
    hf_checkpoints.write_checkpoint(tmp_path / "hf", CONFIG, tensors)
    convert_checkpoint(tmp_path / "hf", tmp_path / "ours", dtype=after)
    convert_checkpoint(tmp_path / "ours", tmp_path / "back", to="safetensors")
    back = hf_checkpoints.read_tensors(tmp_path / "back")
    for name, tensor in tensors.items():
        wanted = np.float32 if "bias" in name else np.dtype(after)
        assert back[name].dtype == wanted
        assert np.array_equal(back[name], tensor.astype(wanted)), name


def test_finished_folder_is_left_alone(tmp_path, source):
    for to in ("orbax", "safetensors"):
        convert_checkpoint(source, tmp_path / to, to=to)
        before = {p: p.stat().st_mtime_ns for p in sorted((tmp_path / to).rglob("*")) if p.is_file()}
        report = convert_checkpoint(source, tmp_path / to, to=to)
        assert report.written == 0
        assert report.kept > 0
        assert {p: p.stat().st_mtime_ns for p in sorted((tmp_path / to).rglob("*")) if p.is_file()} == before


@pytest.mark.parametrize("to", ["orbax", "safetensors"])
def test_other_options_need_force(tmp_path, source, to):
    convert_checkpoint(source, tmp_path / "out", to=to)
    with pytest.raises(CheckpointError, match=r"with other options.*--force"):
        convert_checkpoint(source, tmp_path / "out", to=to, dtype="float32")
    convert_checkpoint(source, tmp_path / "out", to=to, dtype="float32", force=True)
    convert_checkpoint(source, tmp_path / "fresh", to=to, dtype="float32")
    assert open_source(tmp_path / "out").info.dtype == "float32"
    if to == "orbax":
        assert read_converted_folder(tmp_path / "out") == read_converted_folder(tmp_path / "fresh")


def test_force_may_change_the_form(tmp_path, source):
    convert_checkpoint(source, tmp_path / "out")
    convert_checkpoint(source, tmp_path / "out", to="safetensors", force=True)
    assert not (tmp_path / "out" / "parts").exists()
    assert not (tmp_path / "out" / "manifest.json").exists()
    convert_checkpoint(source, tmp_path / "out", force=True)
    assert not list((tmp_path / "out").glob("*.safetensors*"))
    convert_checkpoint(source, tmp_path / "fresh")
    assert read_converted_folder(tmp_path / "out") == read_converted_folder(tmp_path / "fresh")


def test_another_source_needs_force(tmp_path, source):
    convert_checkpoint(source, tmp_path / "out")
    other = hf_checkpoints.write_checkpoint(tmp_path / "hf", CONFIG, hf_checkpoints.random_tensors(CONFIG, 5))
    with pytest.raises(CheckpointError, match="from another source"):
        convert_checkpoint(other, tmp_path / "out")


@pytest.mark.parametrize("force", [False, True])
def test_foreign_folders_are_never_written(tmp_path, source, force):
    """Not even with force: what a user keeps there is not ours to delete."""
    hf_checkpoints.write_checkpoint(tmp_path / "theirs", CONFIG, hf_checkpoints.random_tensors(CONFIG, 0))
    before = sorted((tmp_path / "theirs").iterdir())
    with pytest.raises(CheckpointError, match="holds other files: choose a new or empty folder"):
        convert_checkpoint(source, tmp_path / "theirs", force=force)
    assert sorted((tmp_path / "theirs").iterdir()) == before


def test_destination_is_the_source(source):
    with pytest.raises(CheckpointError, match="is the source"):
        convert_checkpoint(source, source, force=True)


def test_destination_is_a_file(tmp_path, source):
    (tmp_path / "out").write_text("")
    with pytest.raises(CheckpointError, match="cannot write to"):
        convert_checkpoint(source, tmp_path / "out")


class Stop(Exception):
    """Stands for a crash."""


def stop_after(monkeypatch, count):
    """Lets `count` parts be written, and fails at the next."""
    real, written = orbax_target.write_layer_checkpoint, []

    def write(folder, part, leaves, arrays):
        if len(written) == count:
            raise Stop
        real(folder, part, leaves, arrays)
        written.append(part)

    monkeypatch.setattr(orbax_target, "write_layer_checkpoint", write)


def test_stopped_conversion_goes_on(tmp_path, source, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stop):
            convert_checkpoint(source, tmp_path / "out")
    with pytest.raises(CheckpointError, match="unfinished conversion"):
        open_source(tmp_path / "out")
    report = convert_checkpoint(source, tmp_path / "out")
    assert (report.written, report.kept) == (3, 2)
    convert_checkpoint(source, tmp_path / "fresh")
    assert read_converted_folder(tmp_path / "out") == read_converted_folder(tmp_path / "fresh")


def test_stopped_conversion_of_something_else(tmp_path, source, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stop):
            convert_checkpoint(source, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"holds a conversion of .* to orbax, dtype unchanged, .*--force"):
        convert_checkpoint(source, tmp_path / "out", dtype="float32")
    convert_checkpoint(source, tmp_path / "out", dtype="float32", force=True)
    convert_checkpoint(source, tmp_path / "fresh", dtype="float32")
    assert read_converted_folder(tmp_path / "out") == read_converted_folder(tmp_path / "fresh")


def test_parts_without_a_record_do_not_count(tmp_path, source, monkeypatch):
    """Also not when they look complete: the kill may have come before the record was on disk."""
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Stop):
            convert_checkpoint(source, tmp_path / "out")
    work = tmp_path / "out" / STATE_FOLDER
    (work / "layer-00001.json").unlink()
    (work / "layer-00002.json").write_text('{"half')
    shutil.rmtree(tmp_path / "out" / "parts" / "layer-00001" / "attn.norm", ignore_errors=True)
    assert convert_checkpoint(source, tmp_path / "out").kept == 1
    convert_checkpoint(source, tmp_path / "fresh")
    assert read_converted_folder(tmp_path / "out") == read_converted_folder(tmp_path / "fresh")


def test_source_that_changed_between_runs(tmp_path, monkeypatch):
    folder = hf_checkpoints.write_checkpoint(tmp_path / "hf", CONFIG, hf_checkpoints.random_tensors(CONFIG, 0))
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(Stop):
            convert_checkpoint(folder, tmp_path / "out")
    (folder / "config.json").write_text(json.dumps({**CONFIG, "rope_theta": 5.0}))
    with pytest.raises(CheckpointError, match="from another source or with other options"):
        convert_checkpoint(folder, tmp_path / "out")


def test_second_writer_is_refused(tmp_path, source, monkeypatch):
    real = orbax_target.write_layer_checkpoint

    def write(folder, part, leaves, arrays):
        with pytest.raises(CheckpointError, match="another conversion is writing"):
            convert_checkpoint(source, folder)
        real(folder, part, leaves, arrays)

    monkeypatch.setattr(orbax_target, "write_layer_checkpoint", write)
    convert_checkpoint(source, tmp_path / "out")


@pytest.mark.parametrize("to", ["orbax", "safetensors"])
def test_verification_catches_what_the_disk_changed(tmp_path, source, monkeypatch, to):
    """A byte that changes after it was written is found, named, and written anew by the next run."""
    real = conversion._verify_shards

    def damage(state, target, bar):
        pattern = "parts/layer-00001/moe.up/c/*/*/*" if to == "orbax" else "*.safetensors"
        path = sorted(state.folder.glob(pattern))[0]
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        return real(state, target, bar)

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "_verify_shards", damage)
        with pytest.raises(CheckpointError, match="do not read back") as caught:
            convert_checkpoint(source, tmp_path / "out", to=to)
    assert ("layer-00001/moe.up" if to == "orbax" else "model-00001-of-00001.safetensors/") in str(caught.value)
    assert convert_checkpoint(source, tmp_path / "out", to=to).written == 1


def test_check_lists_bad_weights_before_writing(tmp_path):
    tensors = hf_checkpoints.random_tensors(CONFIG, 0, dtype=BF16)
    tensors["model.layers.1.mlp.experts.3.up_proj.weight"][1, 2] = np.nan
    tensors["model.layers.1.mlp.experts.5.up_proj.weight"][0, 0] = -np.inf
    tensors["lm_head.weight"][4, 4] = np.inf
    folder = hf_checkpoints.write_checkpoint(tmp_path / "hf", CONFIG, tensors)
    convert_checkpoint(folder, tmp_path / "unchecked")
    with pytest.raises(CheckpointError) as caught:
        convert_checkpoint(folder, tmp_path / "out", check=True)
    assert "NaN or infinite: layer-00001/moe.up (2), rest/head (1)" in str(caught.value)
    assert not (tmp_path / "out" / "parts").exists()


def test_too_little_room_is_said_before_anything_is_written(tmp_path, source, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match=r"needs 0\.03 GB more, 0\.00 GB are free"):
        convert_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out" / "parts").exists()


def test_manifest_names_dtype_and_parts(tmp_path, source):
    convert_checkpoint(source, tmp_path / "out")
    manifest = load_manifest(tmp_path / "out")
    assert manifest.dtype == "bfloat16"
    record = manifest.array_records["layer-00002"]["moe.router_bias"]
    assert (record.dtype, record.shape) == ("float32", (7,))
    assert "time" not in (tmp_path / "out" / "manifest.json").read_text()


def test_chunks_hold_one_expert_each(tmp_path, source):
    convert_checkpoint(source, tmp_path / "out")
    files = list((arrays.layer_checkpoint_folder(tmp_path / "out", "layer-00001") / "moe.down" / "c").rglob("0"))
    assert len([p for p in files if p.is_file()]) == 7
