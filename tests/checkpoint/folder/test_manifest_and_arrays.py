"""Converted folders that are damaged, changed, or written by a newer version are rejected with a clear message."""

import json
import shutil

import pytest

from convert.pipeline import convert_checkpoint
from glm_jax.checkpoint.folder.manifest import MANIFEST_VERSION, Manifest
from glm_jax.checkpoint.sources.build import build_array
from glm_jax.checkpoint.sources.open import open_source
from glm_jax.errors import CheckpointError
from tests.builders import hf_checkpoints, hf_configs

CONFIG = hf_configs.odd_size_config()


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    base = tmp_path_factory.mktemp("base")
    hf_checkpoints.write_checkpoint(
        base / "hf", CONFIG, hf_checkpoints.random_tensors(CONFIG, 0, dtype=hf_checkpoints.BFLOAT16)
    )
    convert_checkpoint(base / "hf", base / "ours")
    return base / "ours"


@pytest.fixture
def folder(pristine, tmp_path):
    """A converted folder that a test may damage."""
    return shutil.copytree(pristine, tmp_path / "ours")


def edit(folder, change, file="manifest.json"):
    fields = json.loads((folder / file).read_text())
    change(fields)
    (folder / file).write_text(json.dumps(fields))


def read_all(folder):
    source = open_source(folder)
    return [build_array(source, leaf) for members in source.layout().values() for leaf in members]


def refused(folder, *words):
    with pytest.raises(CheckpointError) as caught:
        read_all(folder)
    for word in words:
        assert word in str(caught.value)


def test_manifest_survives_its_own_text(pristine):
    text = (pristine / "manifest.json").read_text()
    assert Manifest.from_json(text, pristine).to_json() == text


def test_newer_format_version(folder):
    edit(folder, lambda m: m.update(format_version=MANIFEST_VERSION + 1, surprise=[]))
    refused(folder, f"format version {MANIFEST_VERSION + 1}", f"up to version {MANIFEST_VERSION}", "update it")


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(format="other"),
        lambda m: m.update(format_version="1"),
        lambda m: m.update(format_version=0),
        lambda m: m.pop("config"),
        lambda m: m["config"].pop("vocab_size"),
        lambda m: m["config"].update(model_type="llama"),
        lambda m: m["config"].update(latent_eps="x"),
        lambda m: m.update(parts=[]),
        lambda m: m.update(dtype="int4"),
        lambda m: m.update(original=None),
        lambda m: m["original"].update(dtypes={"a": "float64"}),
        lambda m: m["parts"].update(rest=None),
        lambda m: m["parts"]["rest"].update(embed={}),
        lambda m: m["parts"]["rest"]["embed"].update(shape=[-1, 2]),
        lambda m: m["parts"]["rest"]["embed"].update(dtype="int12"),
        lambda m: m["parts"]["rest"]["embed"].update(sha256="abc"),
    ],
)
def test_damaged_manifest(folder, change):
    edit(folder, change)
    refused(folder, "manifest.json is damaged", "convert again")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 99_999, '{"format": "glm-jax"}'])
def test_manifest_that_is_not_one(folder, text):
    (folder / "manifest.json").write_text(text)
    refused(folder, "manifest.json is damaged")


def test_arrays_that_the_config_needs(folder):
    def change(manifest):
        del manifest["parts"]["layer-00001"]["moe.gate"]
        manifest["parts"]["rest"]["extra"] = manifest["parts"]["rest"]["embed"]
        manifest["parts"]["rest"]["norm"]["shape"] = [41]

    edit(folder, change)
    words = ["1 arrays missing: layer-00001/moe.gate", "1 arrays unknown: rest/extra", "wrong shape: rest/norm"]
    refused(folder, *words)


def test_missing_layer_checkpoint(folder):
    shutil.rmtree(folder / "parts" / "layer-00001")
    refused(folder, "lacks layer checkpoints that its manifest lists: layer-00001")


def test_extra_layer_checkpoint(folder):
    shutil.copytree(folder / "parts" / "layer-00001", folder / "parts" / "layer-00009")
    refused(folder, "layer checkpoints that its manifest does not list: layer-00009")


def test_no_layer_checkpoints_at_all(folder):
    shutil.rmtree(folder / "parts")
    refused(folder, "cannot read", "parts")


def test_missing_array(folder):
    shutil.rmtree(folder / "parts" / "layer-00002" / "moe.router")
    refused(folder, "layer-00002/moe.router is missing or damaged", "convert again")


def test_missing_chunk_is_not_read_as_zeros(folder):
    (folder / "parts" / "layer-00002" / "moe.up" / "c" / "3" / "0" / "0").unlink()
    refused(folder, "layer-00002/moe.up is missing or damaged")


def test_truncated_chunk(folder):
    path = folder / "parts" / "rest" / "embed" / "c" / "0" / "0"
    path.write_bytes(path.read_bytes()[:-3])
    refused(folder, "rest/embed is missing or damaged")


def test_array_of_another_shape(folder):
    for part in ("layer-00001", "layer-00002"):
        shutil.rmtree(folder / "parts" / part / "moe.router")
    shutil.copytree(folder / "parts" / "layer-00001" / "attn.o", folder / "parts" / "layer-00001" / "moe.router")
    refused(folder, "layer-00001/moe.router is bfloat16 [40, 45], the manifest says bfloat16 [7, 40]")


def test_changed_config(folder):
    edit(folder, lambda c: c.update(rope_theta=5.0), "config.json")
    refused(folder, "disagree on rope_theta", "convert again")


def test_missing_config(folder):
    (folder / "config.json").unlink()
    refused(folder, "has no config.json")


def test_moved_folder_still_opens(folder, tmp_path):
    """A converted folder holds no absolute paths."""
    moved = folder.rename(tmp_path / "elsewhere")
    assert all(array.size for array in read_all(moved))
