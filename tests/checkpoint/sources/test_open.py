"""Source strings: paths, hub ids, the miniature, made-up weights, and everything that is none of them."""

import types

import huggingface_hub
import huggingface_hub.constants
import numpy as np
import pytest
from huggingface_hub import errors

from glm_jax.checkpoint.sources import hub, open
from glm_jax.checkpoint.sources.build import build_array
from glm_jax.checkpoint.sources.open import open_source
from glm_jax.checkpoint.sources.synthetic import SyntheticSource, SyntheticSpec
from glm_jax.config import Config
from glm_jax.errors import CheckpointError
from glm_jax.weights.params import leaves_with_path
from glm_jax.weights.random_init import init_params
from tests.builders import hf_checkpoints, hf_configs

CONFIG = hf_configs.odd_size_config()


def refused(source, *words):
    with pytest.raises(CheckpointError) as caught:
        open_source(source)
    for word in words:
        assert word in str(caught.value)


def test_folder_by_path_or_text(tmp_path):
    hf_checkpoints.write_checkpoint(tmp_path, CONFIG, hf_checkpoints.random_tensors(CONFIG, 0))
    assert open_source(tmp_path).cfg == open_source(str(tmp_path)).cfg
    assert open_source(tmp_path).info.folder == tmp_path


def test_home_folder_is_understood(tmp_path, monkeypatch):
    hf_checkpoints.write_checkpoint(tmp_path / "model", CONFIG, hf_checkpoints.random_tensors(CONFIG, 0))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_source("~/model").info.kind == "huggingface"


def test_path_that_is_not_there(tmp_path):
    refused(tmp_path / "none", "there is no folder", "hub id")
    refused("", "no source given")


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "weights.pth"])
def test_pickle_as_the_source(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    refused(tmp_path / name, "is a pickle file, and loading one can run any code")


def test_single_file_as_the_source(tmp_path):
    hf_checkpoints.write_checkpoint(tmp_path, CONFIG, hf_checkpoints.random_tensors(CONFIG, 0), shards=1)
    refused(tmp_path / "model-00001-of-00001.safetensors", "is a file: give a .gguf file, or the folder")


def test_miniature_is_a_folder_of_the_package():
    assert open.tiny_folder().parts[-2:] == ("glm_jax", "tiny")


class FakeHub:
    """Stands for huggingface_hub.snapshot_download."""

    def __init__(self, result):
        self.result, self.calls = result, []

    def __call__(self, repo, **options):
        self.calls.append((repo, options))
        if isinstance(self.result, Exception):
            raise self.result
        return str(self.result)


def fake_hub(monkeypatch, result):
    fake = FakeHub(result)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    return fake


def test_hub_id(tmp_path, monkeypatch):
    hf_checkpoints.write_checkpoint(tmp_path, CONFIG, hf_checkpoints.random_tensors(CONFIG, 0))
    fake = fake_hub(monkeypatch, tmp_path)
    source = open_source("zai-org/GLM-4.7-Flash")
    assert source.info.name == "zai-org/GLM-4.7-Flash"
    ((repo, options),) = fake.calls
    assert repo == "zai-org/GLM-4.7-Flash"
    assert options["allow_patterns"] == ["*.safetensors", "*.json", "*.jinja"]


def http_error(kind, message="401 Client Error"):
    response = types.SimpleNamespace(headers={}, request=None)
    return getattr(errors, kind)(message, response=response)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (http_error("GatedRepoError"), ["is gated", "accept its terms", "hf auth login"]),
        (http_error("RepositoryNotFoundError"), ["no Hugging Face repository of that name"]),
        (http_error("HfHubHTTPError", "503 down"), ["downloading org/model failed", "503 down"]),
        (errors.LocalEntryNotFoundError("x"), ["HF_HUB_OFFLINE", "local cache"]),
        (errors.OfflineModeIsEnabled("x"), ["cannot be reached"]),
        (OSError(28, "No space left on device"), ["downloading org/model failed", "No space left"]),
    ],
    ids=["gated", "missing", "server", "not cached", "offline", "disk"],
)
def test_hub_errors_are_explained(monkeypatch, error, words):
    fake_hub(monkeypatch, error)
    refused("org/model", *words)


def test_offline_mode_is_honored(monkeypatch, tmp_path):
    """The real client, offline and with an empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    refused("some-org/some-model", "not in the local cache", "HF_HUB_OFFLINE")


@pytest.mark.parametrize("text", ["zai-org/GLM-4.7-Flash", "a/b", "org_1/m.o-d_el"])
def test_hub_ids(text):
    assert hub.is_hub_id(text)


@pytest.mark.parametrize("text", ["a", "a/b/c", "../b", "/a/b", "a/b ", "a b/c", "~/b", "./b", "-a/b", ""])
def test_not_hub_ids(text):
    assert not hub.is_hub_id(text)


def test_synthetic_strings():
    assert SyntheticSpec.parse("synthetic:flash") == SyntheticSpec(Config.flash(), 0)
    spec = SyntheticSpec.parse("synthetic:flash?layers=4&seed=7&mtp=0")
    assert spec == SyntheticSpec(Config.flash(layers=4).replace(num_nextn_predict_layers=0), 7)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("synthetic:", "no synthetic model ''; there is flash"),
        ("synthetic:huge", "no synthetic model 'huge'"),
        ("synthetic:flash?depth=4", "no setting 'depth'; there are layers, seed, mtp"),
        ("synthetic:flash?layers=four", "layers must be a whole number, not 'four'"),
        ("synthetic:flash?layers=-1", "layers must be a whole number"),
        ("synthetic:flash?layers=", "layers must be a whole number"),
        ("synthetic:flash?layers=0", "layers must be 1 to 1000"),
        ("synthetic:flash?layers=9999", "layers must be 1 to 1000"),
        ("synthetic:flash?mtp=2", "mtp 0 or 1"),
        ("synthetic:flash?seed=1&seed=2", "each given once"),
        ("synthetic:flash?layers=²", "whole number"),
    ],
)
def test_bad_synthetic_strings(text, words):
    refused(text, words)


@pytest.mark.parametrize(
    ("dtype", "parts"), [("float32", ("layer-00000", "layer-00001", "mtp", "rest")), ("bfloat16", ("rest",))]
)
def test_synthetic_weights_are_the_initializers(dtype, parts):
    """Drawn matrix by matrix, or all at once on the device: the same bits."""
    cfg = Config.from_hf(hf_configs.odd_size_config(num_hidden_layers=2))
    source = SyntheticSource(SyntheticSpec(cfg, 3), open.FLOAT_DTYPES[dtype], "synthetic")
    params = dict(leaves_with_path(init_params(cfg, 3, dtype)))
    for leaf in (leaf for part in parts for leaf in source.layout()[part]):
        whole = np.asarray(params[leaf.param_path])
        wanted = whole if leaf.stack_index is None else whole[leaf.stack_index]
        got = build_array(source, leaf)
        assert got.dtype == wanted.dtype
        assert got.tobytes() == wanted.tobytes(), leaf


def test_synthetic_rows_can_be_asked_for_alone():
    cfg = Config.from_hf(CONFIG)
    source = SyntheticSource(SyntheticSpec(cfg, 3), np.dtype(np.float32), "synthetic")
    leaf = next(leaf for leaf in source.layout()["layer-00001"] if leaf.name == "moe.down")
    whole = build_array(source, leaf)
    for row, piece in source.iter_chunks(leaf, 2, 5):
        assert np.array_equal(piece, whole[row : row + len(piece)])


def test_seeds_differ():
    cfg = Config.from_hf(CONFIG)
    a, b = (SyntheticSource(SyntheticSpec(cfg, seed), np.dtype(np.float32), "") for seed in (0, 1))
    leaf = a.layout()["rest"][0]
    assert not np.array_equal(build_array(a, leaf), build_array(b, leaf))
    assert a.fingerprint() != b.fingerprint()


@pytest.mark.parametrize("text", ['{"name": "an app"}', '{"format": "other", "source": "x"}', "[]", "{", "[" * 99_999])
def test_folder_with_the_manifest_of_another_program(tmp_path, text):
    hf_checkpoints.write_checkpoint(tmp_path, CONFIG, hf_checkpoints.random_tensors(CONFIG, 0))
    (tmp_path / "manifest.json").write_text(text)
    assert open_source(tmp_path).info.kind == "huggingface"
