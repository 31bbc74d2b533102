"""Progress: a bar on a terminal, plain lines elsewhere, nothing when not asked for."""

import io

import pytest

from glm_jax.checkpoint import progress
from glm_jax.checkpoint.progress import progress_bar


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


def test_terminal_gets_a_bar():
    stream = Terminal()
    with progress_bar("converting", 2_000_000, stream=stream) as advance:
        advance(500_000)
        advance(1_500_000)
    text = stream.getvalue()
    assert "converting" in text
    assert "2.0/2.0 MB" in text


def test_elsewhere_a_last_line(monkeypatch):
    clock = iter(float(i) for i in range(100))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    with progress_bar("loading", 3_000_000_000, stream=stream) as advance:
        for _ in range(3):
            advance(1_000_000_000)
    assert stream.getvalue() == "loading: 3.00 of 3.00 GB, 1000 MB/s, 0 s left\n"


def test_elsewhere_a_line_now_and_then(monkeypatch):
    clock = iter(float(4 * i) for i in range(100))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    with progress_bar("loading", 10_000_000_000, stream=stream) as advance:
        for _ in range(10):
            advance(1_000_000_000)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 5
    assert lines[0] == "loading: 2.00 of 10.00 GB, 250 MB/s, 32 s left"


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_nothing_when_not_asked_for(stream):
    with progress_bar("loading", 10, show=False, stream=stream) as advance:
        advance(10)
    assert stream.getvalue() == ""


def test_nothing_to_do_is_not_an_error():
    with progress_bar("loading", 0, stream=io.StringIO()):
        pass
