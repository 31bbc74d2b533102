"""``python -m glm_jax.generate`` as a user runs it, on the built-in miniature.

What needs a real process (signals, terminals, pipes) has one; the rest calls ``main`` and shares one loaded model.
"""

import io
import json
import os
import re
import select
import subprocess
import sys
import termios
import time
from pathlib import Path

import jax
import pytest

from glm_jax import generate
from glm_jax.cli.common import run_and_exit
from glm_jax.llm import LLM
from glm_jax.text import render_chat

ROOT = Path(__file__).resolve().parents[2]
DIM, PLAIN = "\033[2m", "\033[0m"
GREEDY = ("--temperature", "0", "--max-tokens", "8")
NUMBER = r"[\d,]+(\.\d+)?"
CLOSING = re.compile(
    rf"prompt (?P<prompt>{NUMBER}) tokens at {NUMBER} tokens/s \| (?P<written>{NUMBER}) tokens written at {NUMBER} "
    rf"tokens/s \| first token after {NUMBER} s( \| compiling, or loading what was, took {NUMBER} s)? \| "
    rf"peak memory {NUMBER} GB \(process\)"
)
# A process inherits an ignored SIGINT from the parent of the tests, so it is restored here. A process in its own
# session takes its terminal as the controlling one, so that a typed Ctrl-C interrupts it.
STARTER = """
import fcntl, os, runpy, signal, sys, termios
signal.signal(signal.SIGINT, signal.default_int_handler)
if os.getsid(0) == os.getpid() and os.isatty(0):
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
sys.argv[0] = "generate"
runpy.run_module("glm_jax.generate", run_name="__main__", alter_sys=True)
"""


def command(*args):
    return [sys.executable, "-c", STARTER, *args]


@pytest.fixture(scope="module", autouse=True)
def quick_compile():
    """Halves the time to compile, here and in the subprocesses, which find the cached programs."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def environment():
    return {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


@pytest.fixture(scope="module")
def llm():
    return LLM.load()


@pytest.fixture
def run(llm, monkeypatch, capsys):
    """Runs the command in this process; returns exit code, stdout and stderr."""
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    monkeypatch.setattr(generate, "_load", lambda _: llm)

    def run(*args, stdin=None):
        piped = io.BytesIO(b"" if stdin is None else stdin)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(piped, encoding="utf-8"))
        monkeypatch.setattr(sys.stdin, "isatty", lambda: stdin is None, raising=False)
        with pytest.raises(SystemExit) as caught:
            run_and_exit(lambda: generate.main(args))
        captured = capsys.readouterr()
        return caught.value.code, captured.out, captured.err

    return run


@pytest.fixture
def refused(run, monkeypatch):
    """Runs a command that must fail before anything is loaded; returns the one line of the error."""

    def refused(*args, stdin=None):
        monkeypatch.setattr(generate, "_load", lambda _: pytest.fail("it was loaded first"))
        code, out, err = run(*args, stdin=stdin)
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err.removeprefix("error: ").removesuffix("\n")

    return refused


@pytest.mark.smoke
def test_a_text_from_a_pipe_is_continued_on_stdout_and_all_else_is_on_stderr(llm):
    expected = llm.generate("def fib(n):", temperature=0, max_tokens=8).text
    done = subprocess.run(
        command(*GREEDY), cwd=ROOT, env=environment(), input=b"def fib(n):", capture_output=True, check=False
    )
    *notices, closing = done.stderr.decode().splitlines()
    assert done.returncode == 0
    assert done.stdout.decode() == expected + "\n"
    found = CLOSING.fullmatch(closing)
    assert found, closing
    assert (found["prompt"], found["written"]) == (str(len(llm.tokenizer.encode("def fib(n):"))), "8")
    assert all(line.startswith("compiling ") for line in notices), notices


def test_every_way_to_give_a_prompt(run, tmp_path, llm):
    text = "--x = 'naïve'\r\n"
    (tmp_path / "prompt").write_bytes(text.encode())
    expected = llm.generate(text, temperature=0, max_tokens=8).text + "\n"
    ways = {
        "argument": run(*GREEDY, "--", text),
        "file": run(*GREEDY, "--prompt-file", str(tmp_path / "prompt")),
        "stdin": run(*GREEDY, stdin=text.encode()),
        "dash": run(*GREEDY, "--prompt-file", "-", stdin=text.encode()),
    }
    assert {way: (code, out) for way, (code, out, _) in ways.items()} == dict.fromkeys(ways, (0, expected))


@pytest.mark.parametrize("prompt", ["None", "-", "True"])
def test_a_prompt_is_taken_as_typed(run, llm, prompt):
    code, out, _ = run(*GREEDY, "--", prompt)
    assert (code, out) == (0, llm.generate(prompt, temperature=0, max_tokens=8).text + "\n")


THREE = ("--n", "3", "--seed", "5", "--max-tokens", "6", "--sampling", '{"logprobs": 2, "top_k": 40}')


@pytest.fixture(scope="module")
def three(llm):
    return llm.generate("import os", n=3, seed=5, max_tokens=6, logprobs=2, top_k=40)


def test_json_is_one_object_per_completion(run, three):
    code, out, err = run("--json", *THREE, "import os")
    records = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert CLOSING.fullmatch(err.splitlines()[-1])
    for record, completion in zip(records, three, strict=True):
        assert record.keys() == {
            *("text", "token_ids", "finish_reason", "prompt_tokens", "completion_tokens", "seed", "logprobs")
        }
        assert record["text"] == completion.text
        assert record["token_ids"] == list(completion.token_ids)
        assert record["finish_reason"] == completion.finish_reason
        assert record["prompt_tokens"] == completion.prompt_tokens
        assert record["completion_tokens"] == len(completion.token_ids)
        assert [len(entry["top"]) for entry in record["logprobs"]] == [2] * len(completion.token_ids)
    assert [record["seed"] for record in records] == [5, 6, 7]


def test_several_texts_are_told_apart_on_stderr(run, three):
    code, out, err = run(*THREE, "import os")
    assert (code, out) == (0, "".join(completion.text + "\n" for completion in three))
    *headings, closing = [line for line in err.splitlines() if not line.startswith("compiling")]
    assert headings == [f"--- {number} of 3, seed {4 + number}" for number in (1, 2, 3)]
    assert CLOSING.fullmatch(closing)


def test_an_answer(run, llm):
    options = ("--chat", "--no-thinking", "--system", "Be brief.", "--temperature", "0", "--max-tokens", "40")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 3 plus 4?"}]
    expected = llm.chat(messages, temperature=0, max_tokens=40, enable_thinking=False)
    code, out, _ = run(*options, "What is 3 plus 4?")
    assert (code, out) == (0, f"{expected.content}\n")
    code, out, _ = run(*options, "--json", "What is 3 plus 4?")
    record = json.loads(out)
    assert record["prompt_tokens"] == expected.prompt_tokens
    assert (record["content"], record["reasoning"], record["tool_calls"]) == (expected.content, None, [])


def test_thinking_comes_before_the_answer(run, llm):
    messages = [{"role": "user", "content": "What is 3 plus 4?"}]
    expected = llm.chat(messages, temperature=0, max_tokens=64)
    assert expected.reasoning
    code, out, _ = run("--chat", "--temperature", "0", "--max-tokens", "64", "What is 3 plus 4?")
    assert code == 0
    assert out.startswith(expected.reasoning)
    assert out.endswith((expected.content or "") + "\n")


def test_options_reach_the_model(run, llm):
    options = ("--top-p", "0.5", "--temperature", "0.7", "--max-tokens", "12", "--seed", "3")
    expected = llm.generate("x", stop=("o", "i"), top_p=0.5, temperature=0.7, max_tokens=12, seed=3)
    code, out, _ = run("--json", "--stop", "o", "--stop", "i", *options, "x")
    assert code == 0
    assert json.loads(out)["token_ids"] == list(expected.token_ids)
    code, out, _ = run("--json", "--sampling", '{"stop": ["o", "i"]}', *options, "x")
    assert json.loads(out)["token_ids"] == list(expected.token_ids)


def test_options_of_loading_reach_the_loader(monkeypatch, capsys, llm):
    asked = {}
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    monkeypatch.setattr(LLM, "load", lambda source, **options: asked.update(options, source=source) or llm)
    options = (
        "--model",
        "m",
        "--quantize",
        "int4",
        "--dtype",
        "float32",
        "--mesh",
        "2",
        "--max-model-len",
        "99",
        "--check",
    )
    assert generate.main([*options, "--max-tokens", "1", "x"]) == 0
    loading = {"dtype": "float32", "mesh": 2, "max_model_len": 99, "check": True}
    assert asked == {"source": "m", "quantize": "int4", **loading}


@pytest.mark.parametrize(
    ("args", "stdin", "message"),
    [
        ((), b"", "the prompt is empty: give at least one character"),
        (("",), None, "the prompt is empty: give at least one character"),
        ((), None, 'no prompt: give one, as in `python -m glm_jax.generate "def fib(n):"`, or --chat to talk'),
        ((), b"na\xefve", "stdin is not UTF-8 (byte 0xef at offset 2): convert it first, with iconv for example"),
        (("na\udcefve",), None, "the prompt is not UTF-8"),
        (("x", "--prompt-file", "y"), None, "give a prompt or --prompt-file, not both"),
        (("--prompt-file", "nowhere"), None, "cannot read nowhere: No such file or directory"),
        (("--prompt-file", ""), b"x", "cannot read '': Is a directory"),
        (("--system", "x", "y"), None, "--system and --no-thinking shape an answer: give --chat too"),
        (("--no-thinking", "y"), None, "--system and --no-thinking shape an answer: give --chat too"),
        (("--chat", "--n", "2"), None, "a conversation has one answer at a time: --n must be 1"),
        (("--chat", "--sampling", '{"n": 2}'), None, "a conversation has one answer at a time: --n must be 1"),
        (("--temperature", "-1", "x"), None, "temperature must be a number in [0, 1e6], got -1.0"),
        (("--temperature", "nan", "x"), None, "temperature must be a number in [0, 1e6], got nan"),
        (("--max-tokens", "0", "x"), None, "max_tokens must be an integer from 1 to 2147483647, got 0"),
        (("--n", "0", "x"), None, "n must be an integer in [1, 128], got 0"),
        (("--stop", "", "x"), None, "non-empty strings"),
        (("--sampling", "{", "x"), None, "--sampling must be a JSON object: Expecting"),
        (("--sampling", "[" * 100_000, "x"), None, "--sampling must be a JSON object: "),
        (("--sampling", "[1]", "x"), None, "--sampling must be a JSON object, not [1]"),
        (("--sampling", '{"temprature": 1}', "x"), None, "unknown sampling option temprature; the options are "),
        (("--sampling", '{"top_k": "x"}', "x"), None, "top_k must be an integer from 0 (off) to 2147483647, got 'x'"),
        (("--sampling", '{"seed": 1}', "--seed", "2", "x"), None, "--seed is in --sampling too: give it once"),
        (("--memory-fraction", "2", "x"), None, "--memory-fraction must be in (0, 1], not 2.0"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, tuple) else None,
)
def test_errors_are_one_line_before_anything_is_loaded(refused, args, stdin, message):
    assert message in refused(*args, stdin=stdin)


def test_a_file_that_is_not_utf8(refused, tmp_path):
    (tmp_path / "prompt").write_bytes(b"x\xff")
    message = refused("--prompt-file", str(tmp_path / "prompt"))
    assert message.startswith(f"{tmp_path / 'prompt'} is not UTF-8 (byte 0xff at offset 1)")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--model", "{}/nowhere", "x"), "there is no folder {}/nowhere"),
        (("--model", "{}", "x"), "{}"),
        (("--model", "~nobody-here/x", "x"), "there is no folder ~nobody-here/x"),
        (("--max-model-len", "1", "x"), 'max_model_len must be "auto" or 2 to'),
        (("--mesh", "0", "x"), "mesh"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, tuple) else None,
)
def test_a_model_that_cannot_be_loaded(monkeypatch, capsys, tmp_path, args, message):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    with pytest.raises(SystemExit) as caught:
        run_and_exit(lambda: generate.main([word.format(tmp_path) for word in args]))
    captured = capsys.readouterr()
    assert (caught.value.code, captured.out) == (2, "")
    assert message.format(tmp_path) in captured.err
    assert captured.err.startswith("error: ")


@pytest.mark.parametrize(
    "args", [("--temprature", "1", "x"), ("one", "two"), ("--n", "x", "y"), ("--dtype", "int8", "x")]
)
def test_usage_errors_are_two_and_name_what_was_wrong(run, args):
    code, out, err = run(*args)
    assert (code, out) == (2, "")
    assert args[1] in err or args[0] in err


# Reading the help must not take the time to import JAX, nor need it.
HELP = """
import sys
from glm_jax.generate import main
try:
    main(["--help"])
finally:
    assert not {"jax", "flax", "numpy.random"} & sys.modules.keys(), "the help took JAX"
"""


def test_the_help_teaches_and_needs_no_jax():
    done = subprocess.run(
        [sys.executable, "-c", HELP], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    options = set(re.findall(r"--[a-z][a-z-]+|--n\b", done.stdout))
    assert options >= {
        "--" + name.replace("_", "-") for name in generate.GenerateOptions.__dataclass_fields__ if name != "prompt"
    }
    for text in ("Examples:", "--chat --no-thinking", "Exit codes: 0 done, 2 bad usage", "(default: 512)"):
        assert text in " ".join(done.stdout.split()), text


def test_a_reader_that_leaves_ends_it_quietly():
    args = command("--max-tokens", "400", "--sampling", '{"ignore_eos": true}', "def fib(n):")
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(args, cwd=ROOT, env=environment(), **streams) as process:
        assert len(process.stdout.read(1)) == 1
        process.stdout.close()
        err = process.stderr.read().decode()
    assert process.returncode == 0
    assert all(line.startswith("compiling ") for line in err.splitlines()), err


class Terminal:
    """The command at its own terminal; collects its output there and on stderr."""

    def __init__(self, *args):
        self.master, slave = os.openpty()
        attributes = termios.tcgetattr(slave)
        attributes[1] &= ~termios.OPOST  # no conversion of line ends
        attributes[3] &= ~termios.ECHO
        termios.tcsetattr(slave, termios.TCSANOW, attributes)
        self.process = subprocess.Popen(
            command(*args),
            cwd=ROOT,
            env=environment(),
            stdin=slave,
            stdout=slave,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        os.close(slave)
        self.out = self.err = b""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.process.stderr.close()
        os.close(self.master)

    def type(self, text):
        os.write(self.master, text.encode())

    def until(self, done):
        """Reads until `done()` or the end of both streams."""
        ends = {self.master: "out", self.process.stderr.fileno(): "err"}
        deadline = time.monotonic() + 120
        while not done() and ends:
            ready, _, _ = select.select(list(ends), [], [], max(0, deadline - time.monotonic()))
            assert ready, (self.out, self.err)
            for stream in ready:
                data = self._read(stream)
                setattr(self, ends[stream], getattr(self, ends[stream]) + data)
                if not data:
                    del ends[stream]
        return self

    @staticmethod
    def _read(stream):
        try:
            return os.read(stream, 1 << 16)
        except OSError:  # Linux reports a closed terminal in this way
            return b""

    def end(self):
        self.until(lambda: False)
        return self.process.wait(timeout=120)


def test_ctrl_c_ends_a_stream_and_the_terminal_is_not_left_dim():
    args = (
        "--chat",
        "--max-tokens",
        "4000",
        "--sampling",
        '{"ignore_eos": true}',
        "--seed",
        "1",
        "Why is the sky blue?",
    )
    with Terminal(*args) as shown:
        shown.until(lambda: len(shown.out) > len(DIM))
        shown.type("\x03")
        code = shown.end()
    assert code == 130
    text = shown.out.decode()
    assert text.startswith(DIM)
    assert re.findall(r"\x1b\[\dm", text)[-1] == PLAIN
    assert text.endswith("\n")
    assert "Traceback" not in shown.err.decode()
    assert CLOSING.fullmatch(shown.err.decode().splitlines()[-1])


def prompts_of(err):
    """Number of tokens of each prompt so far."""
    return [int(found["prompt"].replace(",", "")) for found in CLOSING.finditer(err.decode())]


def test_a_conversation_at_a_terminal(llm):
    """Two turns, each ended by Ctrl-C; the second prompt has the shown part of the first answer. Ctrl-D ends it."""
    options = ("--no-thinking", "--temperature", "0", "--max-tokens", "3000", "--sampling", '{"ignore_eos": true}')
    with Terminal("--chat", *options) as shown:
        shown.until(lambda: b"> " in shown.err + shown.out)
        assert b"Ctrl-C ends an answer, Ctrl-D the conversation." in shown.err
        for turn in (1, 2):
            begun = len(shown.out)
            shown.type("What is 3 plus 4?\n")
            shown.until(lambda: len(shown.out) > begun + 10)  # noqa: B023
            shown.type("\x03")
            shown.until(lambda: len(prompts_of(shown.err)) == turn)  # noqa: B023
            shown.until(lambda: shown.err.endswith(b"> ") or shown.out.endswith(b"> "))
        answered = shown.out.decode()
        shown.type("\x04")
        assert shown.end() == 0
    assert "Traceback" not in shown.err.decode()
    question = {"role": "user", "content": "What is 3 plus 4?"}
    first = answered.removeprefix("> ").partition("\n")[0]
    turns = [question, {"role": "assistant", "content": first}, question]
    lengths = [len(llm.tokenizer.encode(render_chat(t, enable_thinking=False))) for t in ([question], turns)]
    assert prompts_of(shown.err) == lengths
