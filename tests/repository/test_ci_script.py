"""``.ci/run`` with a stand-in for make: which stages it runs, what it reports, and how it ends."""

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TARGETS = [
    "venv",
    "lint",
    "test",
    ".venv-parity/.stamp",
    "test-parity",
    "test-kernels",
    "test-newest",
    "test-aot",
    "wheel",
]
# A slow target says that it began, and that it was told to end; one that fails waits for the slow one to begin.
FAKE_MAKE = """#!/usr/bin/env bash
target=${!#}
echo "made $target"
if [ "$target" = "$SLOW" ]; then
  trap 'touch ended; exit' TERM
  touch began
  sleep 60 &
  wait
fi
if [ "$target" = "$FAILS" ]; then
  until [ "$SLOW" = none ] || [ -e began ]; do sleep 0.01; done
  exit 3
fi
"""


@pytest.fixture
def run(tmp_path):
    """Runs a copy of the script, with a target that fails and one that takes a minute."""
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "make").write_text(FAKE_MAKE)
    (tmp_path / "bin" / "make").chmod(0o755)
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"

    def start(fails="none", slow="none"):
        return subprocess.run(
            [tmp_path / ".ci" / "run"],
            env={**os.environ, "PATH": path, "FAILS": fails, "SLOW": slow},
            capture_output=True,
            text=True,
            check=False,
            timeout=50,
        )

    return start


def test_every_stage_runs_once_and_says_how_long_it_took(run):
    done = run()
    assert done.returncode == 0, done.stderr
    assert sorted(re.findall(r"(?m)^made (.+)$", done.stdout)) == sorted(TARGETS)
    summary = done.stdout.partition("all stages passed in ")[2].splitlines()[1:]
    assert len(summary) == len(TARGETS) + 1  # and the system's packages
    assert all(re.fullmatch(r"[a-z-]+ +\d+\.\d min", line) for line in summary)


@pytest.mark.parametrize("fails", ["test", ".venv-parity/.stamp", "test-newest"])
def test_the_first_failure_ends_it_with_that_status(run, fails):
    done = run(fails=fails)
    assert done.returncode == 3
    assert re.search(r"ci: stage '.+' failed with exit status 3 after \d+\.\d min", done.stderr)
    assert "wheel" not in done.stdout


def test_a_failure_ends_the_stages_in_the_background(run, tmp_path):
    assert run(fails="test", slow=".venv-parity/.stamp").returncode == 3
    for _ in range(1000):
        if (tmp_path / "ended").exists():
            return
        time.sleep(0.01)
    pytest.fail("the stage in the background goes on")


def test_the_real_targets_exist():
    targets = re.findall(r"(?m)^([a-z./-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert set(TARGETS) <= set(targets)
