"""The same command a second time: what is whole is kept, what is not is written again, another model never mixed in."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from convert.__main__ import main
from convert.pipeline import convert_checkpoint
from glm_jax.checkpoint.folder.layout import STATE_FOLDER
from glm_jax.checkpoint.folder.manifest import load_manifest
from glm_jax.checkpoint.sources.open import open_source
from glm_jax.checkpoint.write import conversion_state, orbax_target
from glm_jax.errors import CheckpointError
from tests.builders import hf_checkpoints, hf_configs
from tests.checkpoint.assertions import assert_same_tensors, read_converted_folder

ROOT = Path(__file__).parents[2]
CONFIG = hf_configs.odd_size_config()
FORMS = ["orbax", "safetensors"]
TENSORS = hf_checkpoints.random_tensors(CONFIG, 0, dtype=ml_dtypes.bfloat16)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A source, and what its two conversions give."""
    folder = tmp_path_factory.mktemp("base")
    write_source(folder / "hf", TENSORS)
    for to in FORMS:
        convert_checkpoint(folder / "hf", folder / to, to=to)
    return folder


@pytest.fixture
def source(base):
    return base / "hf"


@pytest.fixture(params=FORMS)
def to(request):
    return request.param


@pytest.fixture
def done(base, to, tmp_path):
    """A finished conversion that a test may damage."""
    return shutil.copytree(base / to, tmp_path / "out")


def write_source(folder, tensors):
    hf_checkpoints.write_checkpoint(folder, CONFIG, tensors, shards=2)
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        (folder / name).write_text(f'{{"{name}": 1}}')
    return folder


def same(base, to, folder):
    """Whether a folder is what an undisturbed conversion gives, byte by byte, and nothing more."""
    if to == "orbax":
        assert read_converted_folder(folder) == read_converted_folder(base / to)
    else:
        assert_same_tensors(base / to, folder)
    plain = [path for path in (base / to).iterdir() if path.is_file()]
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == sorted(path.name for path in plain)
    for path in plain:
        assert (folder / path.name).read_bytes() == path.read_bytes(), path.name


def a_file(folder, to):
    return folder / ("parts/layer-00001/moe.up/c/3/0/0" if to == "orbax" else "model-00001-of-00001.safetensors")


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path):
    os.truncate(path, path.stat().st_size - 1)


def grow(path):
    with path.open("ab") as file:
        file.write(b"\0")


@pytest.mark.parametrize("damage", [Path.unlink, cut, grow])
def test_finished_folder_is_mended(base, source, to, done, damage):
    damage(a_file(done, to))
    report = convert_checkpoint(source, done, to=to)
    assert report.written == 1
    same(base, to, done)


@pytest.mark.parametrize("name", ["", "moe.gate", "moe.gate/zarr.json", "moe.gate/c/0", "_METADATA"])
def test_missing_pieces_of_a_part_are_written(base, source, tmp_path, name):
    out = shutil.copytree(base / "orbax", tmp_path / "out")
    path = out / "parts" / "layer-00001" / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    report = convert_checkpoint(source, out)
    assert (report.written, report.kept) == (1, 4)
    same(base, "orbax", out)


def test_part_that_is_too_many_goes(base, source, tmp_path):
    out = shutil.copytree(base / "orbax", tmp_path / "out")
    shutil.copytree(out / "parts" / "layer-00001", out / "parts" / "layer-00009")
    assert convert_checkpoint(source, out).written == 0
    same(base, "orbax", out)


def test_changed_bytes_are_mended_under_check(base, source, to, done):
    flip(a_file(done, to))
    assert convert_checkpoint(source, done, to=to).written == 0  # sizes tell nothing
    assert convert_checkpoint(source, done, to=to, check=True).written == 1
    same(base, to, done)
    assert convert_checkpoint(source, done, to=to, check=True).written == 0


def test_force_starts_over(base, source, to, done):
    flip(a_file(done, to))
    report = convert_checkpoint(source, done, to=to, force=True)
    assert report.kept == 0
    same(base, to, done)


def test_damaged_manifest_is_written_anew(base, source, tmp_path):
    out = shutil.copytree(base / "orbax", tmp_path / "out")
    fields = json.loads((out / "manifest.json").read_text())
    del fields["parts"]["layer-00001"]["moe.up"]
    (out / "manifest.json").write_text(json.dumps(fields))
    convert_checkpoint(source, out)
    same(base, "orbax", out)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json"])
def test_asset_files_are_repaired(base, source, to, done, name):
    (done / name).write_text("{}")
    assert convert_checkpoint(source, done, to=to).written == 0
    same(base, to, done)
    (done / name).unlink()
    assert convert_checkpoint(source, done, to=to).written == 0
    same(base, to, done)


def test_asset_files_follow_the_source(base, to, done, tmp_path):
    newer = shutil.copytree(base / "hf", tmp_path / "newer")
    (newer / "chat_template.jinja").write_text("another")
    assert convert_checkpoint(newer, done, to=to).written == 0
    assert (done / "chat_template.jinja").read_text() == "another"


def test_files_of_others_survive_mending(base, source, to, done):
    (done / "adapter.safetensors").write_bytes(b"theirs")
    (done / "special_tokens_map.json").write_text("{}")
    a_file(done, to).unlink()
    convert_checkpoint(source, done, to=to)
    assert (done / "adapter.safetensors").read_bytes() == b"theirs"
    assert (done / "special_tokens_map.json").exists()


def test_zeros_are_whole(tmp_path):
    """Zarr may leave out chunks of zeros; ours are all there, so that a missing one shows."""
    zeros = {name: np.zeros_like(tensor) for name, tensor in TENSORS.items()}
    convert_checkpoint(write_source(tmp_path / "hf", zeros), tmp_path / "out")
    assert convert_checkpoint(tmp_path / "hf", tmp_path / "out").written == 0


def test_arrays_of_several_chunks_are_whole(source, tmp_path, monkeypatch):
    monkeypatch.setattr("glm_jax.checkpoint.folder.arrays.ZARR_CHUNK_BYTES", 1000)
    convert_checkpoint(source, tmp_path / "out")
    assert convert_checkpoint(source, tmp_path / "out").written == 0


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("manifest.json", {"format": "other", "source": "0" * 64}),
        ("manifest.json", {"format": "glm-jax", "source": "zai-org"}),
        ("model.safetensors.index.json", {"metadata": {"source": "zai-org/GLM-4.7-Flash"}, "weight_map": {}}),
    ],
)
def test_files_of_other_programs_are_never_replaced(source, tmp_path, name, fields, force):
    (tmp_path / name).write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match="holds other files"):
        convert_checkpoint(source, tmp_path, force=force)
    assert [path.name for path in tmp_path.iterdir()] == [name]


# --- another source under the same names, sizes and headers


def trained():
    return {name: (tensor + 1).astype(tensor.dtype) for name, tensor in TENSORS.items()}


class Stop(Exception):
    """Stands for a crash."""


def stopped(monkeypatch, source, out):
    """Leaves a conversion that has written two parts."""
    real, written = orbax_target.write_layer_checkpoint, []

    def write(folder, part, leaves, arrays):
        if len(written) == 2:
            raise Stop
        real(folder, part, leaves, arrays)
        written.append(part)

    with monkeypatch.context() as patch:
        patch.setattr(orbax_target, "write_layer_checkpoint", write)
        with pytest.raises(Stop):
            convert_checkpoint(source, out)


def keep_times(source, change):
    times = {path: path.stat().st_mtime_ns for path in source.iterdir()}
    change()
    for path, time in times.items():
        os.utime(path, ns=(time, time))


def test_another_model_is_not_mixed_in(tmp_path, monkeypatch):
    source = write_source(tmp_path / "hf", TENSORS)
    stopped(monkeypatch, source, tmp_path / "out")
    keep_times(source, lambda: write_source(source, trained()))
    with pytest.raises(CheckpointError, match="from another source or with other options"):
        convert_checkpoint(source, tmp_path / "out")


def test_another_model_is_not_up_to_date(to, done, tmp_path):
    source = write_source(tmp_path / "hf", trained())
    with pytest.raises(CheckpointError, match="holds a finished conversion, from another source"):
        convert_checkpoint(source, done, to=to)
    convert_checkpoint(source, done, to=to, force=True)
    again = tmp_path / "again"
    convert_checkpoint(done, again, to="safetensors")
    assert_same_tensors(source, again)


def change_one_byte(source):
    """Where no page is sampled."""
    size = max(path.stat().st_size for path in source.glob("*.safetensors"))
    path = next(path for path in source.glob("*.safetensors") if path.stat().st_size == size)
    flip(path)
    return path.name


def test_a_change_of_a_byte_stops_a_stopped_conversion(tmp_path, monkeypatch):
    source = write_source(tmp_path / "hf", TENSORS)
    monkeypatch.setattr("glm_jax.checkpoint.sources.huggingface.SafetensorsReader.fingerprint", lambda _: "the same")
    stopped(monkeypatch, source, tmp_path / "out")
    name = change_one_byte(source)
    with pytest.raises(CheckpointError, match=rf"since then {name} changed: start over with --force"):
        convert_checkpoint(source, tmp_path / "out")
    assert convert_checkpoint(source, tmp_path / "out", force=True).kept == 0


def test_a_change_of_a_byte_shows_under_check(tmp_path, monkeypatch, to):
    source = write_source(tmp_path / "hf", TENSORS)
    monkeypatch.setattr("glm_jax.checkpoint.sources.huggingface.SafetensorsReader.fingerprint", lambda _: "the same")
    convert_checkpoint(source, tmp_path / "out", to=to)
    change_one_byte(source)
    assert convert_checkpoint(source, tmp_path / "out", to=to, check=True).written == 1
    convert_checkpoint(tmp_path / "out", tmp_path / "again", to="safetensors")
    assert_same_tensors(source, tmp_path / "again")


def test_equal_copies_give_equal_manifests(base, source, tmp_path, monkeypatch):
    """Times decide about going on, and nothing else."""
    copy = write_source(tmp_path / "hf", TENSORS)
    convert_checkpoint(copy, tmp_path / "out")
    assert read_converted_folder(tmp_path / "out") == read_converted_folder(base / "orbax")
    assert load_manifest(tmp_path / "out").source_fingerprint == load_manifest(base / "orbax").source_fingerprint


def test_force_starts_a_stopped_conversion_over(base, source, tmp_path, monkeypatch):
    stopped(monkeypatch, source, tmp_path / "out")
    flip(tmp_path / "out" / "parts" / "layer-00001" / "moe.up" / "c" / "3" / "0" / "0")
    assert convert_checkpoint(source, tmp_path / "out", force=True).kept == 0
    same(base, "orbax", tmp_path / "out")


def test_killed_mending_goes_on(base, source, tmp_path, monkeypatch):
    out = shutil.copytree(base / "orbax", tmp_path / "out")
    for part in ("layer-00000", "layer-00001", "rest"):
        shutil.rmtree(out / "parts" / part)
    stopped(monkeypatch, source, out)
    with pytest.raises(CheckpointError, match="unfinished conversion"):
        open_source(out)
    report = convert_checkpoint(source, out)
    assert (report.written, report.kept) == (1, 4)
    same(base, "orbax", out)


# --- places that cannot be written, sources that cannot be read


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system where no folder can be made")
@pytest.mark.parametrize("name", ["x", "x/y"])
def test_place_that_can_never_work(source, capsys, name):
    assert main([str(source), f"/proc/{name}"]) == 2
    reason = "cannot be made a folder (No such file or directory): choose another destination"
    assert capsys.readouterr().err == f"error: /proc/{name} {reason}\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "no destination given"), ("a\0b", "cannot be a folder"), ("/tmp/" + "a" * 5000, "choose another")],
)
def test_destination_that_is_no_name(source, text, words):
    with pytest.raises(CheckpointError, match=words):
        convert_checkpoint(source, text)


def test_loop_of_links_as_the_destination(source, tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(CheckpointError, match=r"cannot be a folder|cannot be made a folder"):
        convert_checkpoint(source, tmp_path / "loop")


def failing_read(monkeypatch, matching):
    """Reading the source's file fails as a dying disk does."""
    for name in ("open", "read_bytes"):
        real = getattr(Path, name)

        def read(path, *args, real=real, **kwargs):
            if matching(path):
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
            return real(path, *args, **kwargs)

        monkeypatch.setattr(Path, name, read)


@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "tokenizer.json"])
def test_failing_source_is_not_a_failing_destination(base, tmp_path, monkeypatch, to, name):
    source = shutil.copytree(base / "hf", tmp_path / "hf")
    weights = open_source(source)
    fingerprint = weights.fingerprint()
    monkeypatch.setattr(weights, "fingerprint", lambda: fingerprint)
    for shard in weights._files.shards.values():
        shard._map = None  # opening compared tensors, for which it mapped the file
    failing_read(monkeypatch, lambda path: path == source / name)
    with pytest.raises(CheckpointError) as caught:
        convert_checkpoint(weights, tmp_path / "out", to=to)
    assert str(caught.value) == f"cannot read {source / name}: Input/output error"


def test_full_disk_under_force_says_how_to_go_on(source, tmp_path, monkeypatch):
    def write(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(orbax_target, "write_layer_checkpoint", write)
    with pytest.raises(CheckpointError, match="run the same command again without --force to continue"):
        convert_checkpoint(source, tmp_path / "out", force=True)


def test_without_locks(source, tmp_path):
    """On a system that has no fcntl everything works, without the protection."""
    code = "import sys; sys.modules['fcntl'] = None; from convert.__main__ import main; sys.exit(main())"
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "out"), "--to", "safetensors"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "out" / STATE_FOLDER).exists()
    assert conversion_state.read_finished_key(tmp_path / "out")
