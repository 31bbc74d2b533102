"""Shared parts of the commands: exit codes, streams and logging in small processes; options, text, environment."""

import io
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from glm_jax.cli import common
from glm_jax.errors import PromptError

ROOT = Path(__file__).resolve().parents[2]
FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


def command(body: str) -> list[str]:
    """A process that runs `body` as the main function of a command, with SIGINT not ignored."""
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    head = "import os, signal, sys, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    source = f"{head}from glm_jax.cli import common\nfrom glm_jax.errors import PromptError\ndef main():\n{lines}\n"
    return [sys.executable, "-c", f"{source}common.run_and_exit(main)"]


def run(body, **options):
    return subprocess.run(command(body), cwd=ROOT, capture_output=True, text=True, timeout=60, check=False, **options)


@pytest.mark.parametrize(
    ("body", "code", "err"),
    [
        ("return 0", 0, ""),
        ("return 130", 130, ""),
        ("raise PromptError('no prompt')", 2, "error: no prompt\n"),
        ("raise FileNotFoundError(2, 'not there', 'x')", 1, "error: [Errno 2] not there: 'x'\n"),
        ("os.kill(os.getpid(), signal.SIGINT); time.sleep(30)", 130, "interrupted\n"),
    ],
    ids=["done", "its own", "user", "system", "interrupted"],
)
def test_exit_codes(body, code, err):
    done = run(body)
    assert (done.returncode, done.stderr, done.stdout) == (code, err, "")


def test_log_messages_are_plain_lines_shown_once():
    body = """
import logging
logging.basicConfig()
logging.getLogger("glm_jax.engine").info("compiling took 3 s")
logging.getLogger("convert").warning("note: %s", "a warning")
logging.getLogger("other").info("not ours")
return 0
"""
    assert run(body.strip()).stderr == "compiling took 3 s\nnote: a warning\n"


def test_logging_is_restored_after_the_command():
    logger = logging.getLogger("glm_jax")
    before = (logger.level, logger.propagate, list(logger.handlers))
    with common.log_to_stderr():
        assert logger.isEnabledFor(logging.INFO)
    assert (logger.level, logger.propagate, logger.handlers) == before


def test_a_bug_shows_its_traceback():
    done = run("raise KeyError('x')")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_a_reader_that_leaves_ends_the_command_quietly():
    body = "while True:\n    print('more and more', flush=True)"
    with subprocess.Popen(command(body), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.read(1) == b"m"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_a_reader_that_leaves_before_the_last_flush():
    body = "print('held back')\nsys.stderr.close()\ntime.sleep(1)\nreturn 0"
    with subprocess.Popen(command(body), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has /dev/full")
def test_a_full_disk_under_stdout_is_a_failure_in_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command("print('x')\nreturn 0"), cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (1, "error: [Errno 28] No space left on device\n")


def test_streams_that_are_closed_are_empty_ones():
    body = "print('nobody reads this', file=sys.stderr)\nprint(repr(sys.stdin.read()))\nreturn 3"
    for closed in ("<&-", ">&-", "2>&-", "<&- >&- 2>&-"):
        words = ["sh", "-c", f'exec "$@" {closed}', "sh", *command(body)]
        done = subprocess.run(
            words, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 3, closed
        assert done.stdout == ("" if ">&-" in closed.replace("2>&-", "") else "''\n")


def test_a_character_the_terminal_lacks_is_escaped():
    done = run("print('naïve 🙂')\nreturn 0", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout) == (0, "na\\xefve \\U0001f642\n")


def test_interrupted_from_outside():
    body = "print('ready', flush=True)\ntime.sleep(60)"
    with subprocess.Popen(
        command(body), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == "interrupted\n"
    assert process.returncode == 130


@pytest.mark.parametrize("given", [{}, {FRACTIONS[0]: "0.5"}, {FRACTIONS[1]: "0.5"}, {FRACTIONS[0]: ""}], ids=str)
def test_the_environments_own_share_of_memory_wins(monkeypatch, given):
    """The setting has two names; with both set, jaxlib would refuse to start."""
    for name in FRACTIONS:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    common.set_memory_fraction(0.9)
    found = {name: value for name in FRACTIONS if (value := os.environ.get(name))}
    assert found == ({name: value for name, value in given.items() if value} or {FRACTIONS[1]: "0.9"})


@pytest.mark.parametrize("fraction", [0, -0.5, 1.01, float("nan")])
def test_an_impossible_share_of_memory_is_refused(monkeypatch, fraction):
    monkeypatch.delenv(FRACTIONS[1], raising=False)
    with pytest.raises(PromptError, match=r"--memory-fraction must be in \(0, 1\]"):
        common.set_memory_fraction(fraction)
    assert FRACTIONS[1] not in os.environ


def test_text_is_read_as_it_is(tmp_path, monkeypatch):
    text = "naïve\r\n天气\n"
    (tmp_path / "prompt").write_bytes(text.encode())
    assert common.read_prompt_text(str(tmp_path / "prompt")) == text
    monkeypatch.setenv("HOME", str(tmp_path))
    assert common.read_prompt_text("~/prompt") == text
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert common.read_prompt_text("-") == text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "cannot read {}: No such file or directory"),
        (".", "cannot read {}: Is a directory"),
        ("nul\0l", "cannot read {}: embedded null byte"),
        ("latin1", r"{} is not UTF-8 (byte 0xef at offset 2): convert it first, with iconv for example"),
        ("half", r"{} is not UTF-8 (byte 0xf0 at offset 1): convert it first, with iconv for example"),
    ],
)
def test_text_that_cannot_be_read(tmp_path, name, message):
    (tmp_path / "latin1").write_bytes(b"na\xefve")
    (tmp_path / "half").write_bytes(b"x\xf0\x9f")
    path = str(tmp_path / name)
    with pytest.raises(PromptError) as caught:
        common.read_prompt_text(path)
    assert str(caught.value) == message.format(path)


def test_the_home_of_an_unknown_user():
    with pytest.raises(PromptError, match="cannot read ~nobody-here/x: No such file"):
        common.read_prompt_text("~nobody-here/x")


def test_stdin_that_is_not_utf8(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    with pytest.raises(PromptError, match="stdin is not UTF-8"):
        common.read_prompt_text("-")
