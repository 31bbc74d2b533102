"""``make gpu`` without a GPU: what it runs, what it says, and when it fails; by a stand-in for the interpreter."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FAKE = """#!/usr/bin/env bash
case "$*" in
  -) exit ${LACKS:-0} ;;
  -c*import\\ xdist*) exit 1 ;;
  -m*) echo "$*" >>"$CALLS"; case "$*" in *$FAILS*) exit 3 ;; *) exit 0 ;; esac ;;
esac
"""


def run(tmp_path, fails="nothing", **environment):
    """Exit status, output, and the modules that were run."""
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(FAKE)
    python.chmod(0o755)
    calls.write_text("")
    (tmp_path / "bin").mkdir(exist_ok=True)
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho a card\n")
    smi.chmod(0o755)
    given = {
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}", "HOME": str(tmp_path), "PYTHON": str(python),
        "OUT": str(tmp_path / "out"), "CALLS": str(calls), "FAILS": fails, **environment,
    }  # fmt: skip
    done = subprocess.run([ROOT / ".ci" / "gpu"], env=given, capture_output=True, text=True, check=False)
    return done, calls.read_text().splitlines()


def test_every_stage_runs_and_says_how_long_it_took(tmp_path):
    done, calls = run(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert calls[0].startswith("-m pytest -m gpu tests/gpu")
    short = "glm_jax.bench.short"
    assert [call.split()[1] for call in calls[1:]] == [short, "pallas_kernels.bench", short]
    assert all(call.endswith(str(tmp_path / "out")) for call in calls[1:])
    summary = done.stdout.splitlines()[-len(calls) :]
    assert all(line.endswith("min  passed") for line in summary), done.stdout
    assert "a card" in (tmp_path / "out" / "gpu.log").read_text()


@pytest.mark.parametrize("fails", ["tests/gpu", "short decode"])
def test_a_stage_that_fails_does_not_stop_the_others(tmp_path, fails):
    done, calls = run(tmp_path, fails)
    assert done.returncode == 1
    assert len(calls) == len(run(tmp_path)[1])
    assert done.stdout.count("failed with exit status 3") == 1


def test_the_limits_add_up_to_less_than_the_whole():
    text = (ROOT / ".ci" / "gpu").read_text(encoding="utf-8")
    limits = [
        int(line.split("stage ")[1].split()[1]) for line in text.splitlines() if "stage " in line and "#" not in line
    ]
    (total,) = (int(line.partition("=")[2]) for line in text.splitlines() if line.startswith("total_seconds="))
    assert len(limits) >= 3
    assert sum(limits) < total == 8 * 60


def test_tests_for_a_card_are_only_where_it_is_asked_for():
    """Neither among the tests of `make test`, nor skipped there; what needs an address or a launch count is not run."""
    files = sorted((ROOT / "tests" / "gpu").glob("test_*.py"))
    assert [path.name for path in files] == ["test_card.py", "test_model.py", "test_operations.py", "test_sampler.py"]
    for path in files:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        marks = [
            ast.unparse(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"
        ]
        assert marks == ["pytest.mark.gpu"], path
    asked = subprocess.run(
        [sys.executable, "-c", "import tests.gpu.test_card, tests.gpu.test_model, tests.gpu.test_operations"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert asked.returncode == 0, asked.stderr
