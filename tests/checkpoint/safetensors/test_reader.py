"""Folders of shards are read lazily; shards that do not form one checkpoint are named."""

import json
import os

import numpy as np
import pytest
import safetensors.numpy

from glm_jax.checkpoint.mapped_file import SAMPLE_PAGE_BYTES
from glm_jax.checkpoint.messages import format_names
from glm_jax.checkpoint.safetensors.reader import INDEX_NAME, SafetensorsReader
from glm_jax.errors import CheckpointError

A = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16)}
B = {"c": np.zeros((3, 1), np.float32)}


@pytest.fixture
def folder(tmp_path):
    """Two shards and their index."""
    save(tmp_path, "model-00001-of-00002.safetensors", A)
    save(tmp_path, "model-00002-of-00002.safetensors", B)
    write_index(tmp_path, {"a": 1, "b": 1, "c": 2})
    return tmp_path


def save(folder, name, tensors):
    safetensors.numpy.save_file(tensors, folder / name)


def write_index(folder, homes, total=44):
    weight_map = {n: s if isinstance(s, str) else f"model-{s:05d}-of-00002.safetensors" for n, s in homes.items()}
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))


def refused(folder, *words):
    with pytest.raises(CheckpointError) as caught:
        SafetensorsReader.open(folder)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_reads_every_tensor(folder):
    reader = SafetensorsReader.open(folder)
    assert sorted(reader) == ["a", "b", "c"]
    for name, array in {**A, **B}.items():
        assert np.array_equal(reader.get_tensor(name), array)
        assert reader.tensor_info(name).shape == array.shape

    assert "a" in reader
    assert "x" not in reader
    assert reader.notes == ()


def test_without_index(folder):
    (folder / INDEX_NAME).unlink()
    assert sorted(SafetensorsReader.open(folder)) == ["a", "b", "c"]


def test_single_file(tmp_path):
    save(tmp_path, "model.safetensors", A)
    save(tmp_path, "adapter.safetensors", {"a": np.zeros(1, np.float32)})
    assert sorted(SafetensorsReader.open(tmp_path)) == ["a", "b"]


def test_symlinks_as_in_the_hub_cache(folder, tmp_path_factory):
    snapshot = tmp_path_factory.mktemp("snapshot")
    for path in folder.iterdir():
        (snapshot / path.name).symlink_to(os.path.relpath(path, snapshot))
    assert np.array_equal(SafetensorsReader.open(snapshot).get_tensor("a"), A["a"])


def test_fingerprint_follows_headers(folder):
    first = SafetensorsReader.open(folder).fingerprint()
    assert SafetensorsReader.open(folder).fingerprint() == first
    save(folder, "model-00002-of-00002.safetensors", {"c": np.zeros((1, 3), np.float32)})
    assert SafetensorsReader.open(folder).fingerprint() != first


def test_fingerprint_follows_names(folder):
    first = SafetensorsReader.open(folder).fingerprint()
    (folder / INDEX_NAME).unlink()
    for path in sorted(folder.glob("*.safetensors")):
        path.rename(folder / path.name.replace("model-", "model-x-"))
    assert SafetensorsReader.open(folder).fingerprint() != first


@pytest.mark.parametrize("size", [1, 3 * SAMPLE_PAGE_BYTES, 3 * SAMPLE_PAGE_BYTES + 2, 50 * SAMPLE_PAGE_BYTES])
def test_fingerprint_follows_the_ends_and_the_middle_of_every_tensor(tmp_path, size):
    """The fingerprint changes although names, sizes and headers stay the same."""
    tensors = {"a": np.zeros(7, np.uint8), "b": np.zeros(size, np.uint8), "c": np.zeros(7, np.uint8)}
    save(tmp_path, "model.safetensors", tensors)
    seen = {SafetensorsReader.open(tmp_path).fingerprint()}
    positions = {(name, at) for name, tensor in tensors.items() for at in (0, tensor.size // 2, tensor.size - 1)}
    for name, at in positions:
        changed = {key: tensor.copy() for key, tensor in tensors.items()}
        changed[name][at] = 1
        save(tmp_path, "model.safetensors", changed)
        seen.add(SafetensorsReader.open(tmp_path).fingerprint())
    assert len(seen) == len(positions) + 1


def test_fingerprint_of_a_small_tensor_follows_every_byte(tmp_path):
    for size in (300, 3 * SAMPLE_PAGE_BYTES):
        tensor = np.zeros(size, np.uint8)
        seen = set()
        for at in range(0, size, 97):
            tensor[at] = 1
            save(tmp_path, "model.safetensors", {"a": tensor})
            seen.add(SafetensorsReader.open(tmp_path).fingerprint())
        assert len(seen) == len(range(0, size, 97))


def test_fingerprint_of_a_file_that_shrinks(folder):
    reader = SafetensorsReader.open(folder)
    os.truncate(folder / "model-00001-of-00002.safetensors", 100)
    with pytest.raises(CheckpointError, match="changed while"):
        reader.fingerprint()


def test_file_that_goes_after_it_was_opened(folder):
    reader = SafetensorsReader.open(folder)
    (folder / "model-00001-of-00002.safetensors").unlink()
    for read in (reader.fingerprint, lambda: reader.get_tensor("a")):
        with pytest.raises(CheckpointError, match=r"cannot read .*00001-of-00002.safetensors: No such file"):
            read()


@pytest.mark.parametrize("with_index", [True, False])
def test_missing_shard_is_named(folder, with_index):
    (folder / "model-00002-of-00002.safetensors").unlink()
    if not with_index:
        (folder / INDEX_NAME).unlink()
    refused(folder, "lacks model-00002-of-00002.safetensors", "incomplete")


def test_dangling_symlink_is_a_missing_shard(folder):
    path = folder / "model-00002-of-00002.safetensors"
    path.unlink()
    path.symlink_to("nowhere")
    refused(folder, "lacks model-00002-of-00002.safetensors")


def test_truncated_shard(folder):
    path = folder / "model-00001-of-00002.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    refused(folder, "model-00001-of-00002.safetensors is truncated")


@pytest.mark.parametrize("size", [0, 7, 8, 40])
def test_shard_cut_inside_its_header(folder, size):
    os.truncate(folder / "model-00001-of-00002.safetensors", size)
    refused(folder, "model-00001-of-00002.safetensors")


def test_tensor_in_two_shards(folder):
    save(folder, "model-00002-of-00002.safetensors", {**B, "a": A["a"]})
    refused(folder, "two files", "a (in model-00001-of-00002.safetensors and model-00002-of-00002.safetensors)")


def test_index_lists_a_tensor_that_is_not_there(folder):
    write_index(folder, {"a": 1, "b": 1, "c": 2, "ghost": 2})
    refused(folder, "not in the file it names: ghost (model-00002-of-00002.safetensors)")


def test_index_names_the_wrong_file(folder):
    write_index(folder, {"a": 1, "b": 2, "c": 2})
    refused(folder, "not in the file it names: b (model-00002-of-00002.safetensors)")


def test_tensor_that_the_index_does_not_list(folder):
    write_index(folder, {"a": 1, "c": 2})
    refused(folder, "does not list: b (model-00001-of-00002.safetensors)")


def test_wrong_total_is_only_noted(folder):
    write_index(folder, {"a": 1, "b": 1, "c": 2}, total=43)
    assert SafetensorsReader.open(folder).notes == (f"{INDEX_NAME} says 43 bytes, the files hold 44",)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"weight_map": []}', "[" * 99_999]
)
def test_broken_index(folder, text):
    (folder / INDEX_NAME).write_text(text)
    refused(folder, INDEX_NAME)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "x.txt"])
def test_index_may_only_name_files_beside_it(folder, name):
    write_index(folder, {"a": name})
    refused(folder, "is not a safetensors file beside it")


@pytest.mark.parametrize(
    "name",
    [
        "a" * 5000 + ".safetensors",
        "ä" * 200 + ".safetensors",
        "x\0.safetensors",
        "x\x1b[31m.safetensors",
        "x\n.safetensors",
        "\ud800.safetensors",
        "x\x1b[31m.bin",
        "x\0.pt",
    ],
)
def test_index_names_a_file_that_cannot_be(folder, name):
    write_index(folder, {"a": name})
    with pytest.raises(CheckpointError, match=r"is not a safetensors file beside it|is a pickle file") as caught:
        SafetensorsReader.open(folder)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ["model-00003\x1b[31m-of-00002.safetensors", "model\n.safetensors", "x\x1b[31m.bin"])
def test_names_of_files_are_safe_to_print(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError) as caught:
        SafetensorsReader.open(tmp_path)
    assert str(caught.value).isprintable()


def test_index_may_not_name_pickles(folder):
    write_index(folder, {"a": "pytorch_model-00001-of-00002.bin"})
    refused(folder, "pickle file", "can run any code")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.PTH", "last.ckpt"])
def test_pickles_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    refused(tmp_path, f"{name} is a pickle file", "safetensors")


def test_pickles_beside_safetensors_are_left_alone(folder):
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert len(list(SafetensorsReader.open(folder))) == 3


def test_folder_without_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, "holds no weights")


def test_folder_that_is_not_there(tmp_path):
    refused(tmp_path / "none", "cannot read", "No such file")


def test_file_that_shrinks_after_it_was_opened(folder):
    reader = SafetensorsReader.open(folder)
    os.truncate(folder / "model-00001-of-00002.safetensors", 100)
    with pytest.raises(CheckpointError, match="changed while"):
        reader.get_tensor("a")


def test_long_lists_are_cut():
    text = format_names([f"t{i}" for i in range(500)])
    assert text.endswith("t19 … and 480 more")
