"""``python -m convert`` as a person runs it: exit codes, messages, full disks."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from convert.__main__ import main
from convert.pipeline import convert_checkpoint
from glm_jax.checkpoint.sources.open import open_source
from tests.builders import hf_checkpoints, hf_configs
from tests.checkpoint.assertions import assert_same_tensors, read_converted_folder

ROOT = Path(__file__).parents[2]
CONFIG = hf_configs.odd_size_config(hidden_size=256, moe_intermediate_size=64)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    return hf_checkpoints.write_checkpoint(
        folder, CONFIG, hf_checkpoints.random_tensors(CONFIG, 0, dtype=hf_checkpoints.BFLOAT16)
    )


def run(*arguments):
    command = [sys.executable, "-m", "convert", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_there_and_back(source, tmp_path):
    there = run(source, tmp_path / "ours", "--check")
    assert there.returncode == 0, there.stderr
    assert there.stdout.startswith(f"{tmp_path / 'ours'}: 0.0")
    for label in ("checking: ", "converting: ", "verifying: "):
        assert label in there.stderr
    assert "WARNING" not in there.stderr
    back = run(tmp_path / "ours", tmp_path / "back", "--to", "safetensors")
    assert back.returncode == 0, back.stderr
    assert_same_tensors(source, tmp_path / "back")


def test_notes_are_told(tmp_path, capsys):
    tensors = hf_checkpoints.random_tensors(CONFIG, 0)
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("model.layers.3.")}
    hf_checkpoints.write_checkpoint(tmp_path / "hf", CONFIG, kept)
    assert main([str(tmp_path / "hf"), str(tmp_path / "ours"), "--dtype", "bfloat16"]) == 0
    assert "note: layer 3 (multi-token prediction) has no tensors here" in capsys.readouterr().err
    assert open_source(tmp_path / "ours").info.dtype == "bfloat16"


def test_bad_input_is_one_line_and_two(tmp_path, capsys):
    assert main([str(tmp_path / "none"), str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: there is no folder")
    assert captured.err.count("\n") == 1


def test_usage_errors_are_two():
    result = run("only-one")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr


def test_force(source, tmp_path):
    assert main([str(source), str(tmp_path / "out")]) == 0
    assert main([str(source), str(tmp_path / "out"), "--dtype", "float32"]) == 2
    assert main([str(source), str(tmp_path / "out"), "--dtype", "float32", "--force"]) == 0
    assert main([str(source), str(tmp_path / "out"), "--dtype", "float32"]) == 0


# No file may grow past 100 kB; the larger arrays, and the shards, need more.
LIMITED = """
import resource, sys
from convert.__main__ import main
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
sys.exit(main())
"""


@pytest.mark.parametrize("to", ["orbax", "safetensors"])
def test_file_that_cannot_grow(source, tmp_path, to):
    """The system refuses a write in the middle; finished parts stay, and the same command resumes."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", LIMITED, str(source), str(out), "--to", to]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 2
    lines = [line for line in result.stderr.splitlines() if "GB, " not in line]
    assert lines == [f"error: the disk of {out} is full: make room and run the same command again to continue"]
    report = convert_checkpoint(source, tmp_path / "out", to=to)
    if to == "orbax":
        assert report.kept == 3  # the prediction layer has the first array that is too large
        convert_checkpoint(source, tmp_path / "fresh")
        assert read_converted_folder(tmp_path / "out") == read_converted_folder(tmp_path / "fresh")
    else:
        assert_same_tensors(source, tmp_path / "out")


@pytest.mark.parametrize("code", ["EACCES", "EROFS", "EPERM"])
def test_unwritable_folder(source, tmp_path, monkeypatch, capsys, code):
    number = getattr(errno, code)

    def mkdir(*_, **__):
        raise OSError(number, os.strerror(number), str(tmp_path / "out"))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    assert main([str(source), str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: cannot write to {tmp_path / 'out'}")
    assert os.strerror(number) in err


def test_folder_without_permission(source, restricted_folder, capsys):
    folder, with_permissions = restricted_folder
    shutil.copytree(source, folder / "source")
    (folder / "locked").mkdir(mode=0o500)
    with with_permissions():
        assert main([str(folder / "source"), str(folder / "locked" / "out")]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: cannot write to {folder / 'locked' / 'out'}")
    assert "Permission denied" in err
