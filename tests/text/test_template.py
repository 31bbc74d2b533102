"""Chat templates of other checkpoints: their variables, and the limits of the sandbox."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from glm_jax.errors import CheckpointError, PromptError
from glm_jax.text import read_template, render_chat, sandbox
from tests.text.fixtures import TIME_TOOL

ROOT = Path(__file__).resolve().parents[2]
USER = {"role": "user", "content": "hi"}
CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""


def test_another_template_is_rendered():
    messages = [{"role": "developer", "content": [{"type": "text", "text": "é"}]}, {"role": "user", "content": None}]
    expected = "<|im_start|>system\né<|im_end|>\n<|im_start|>user\n<|im_end|>\n"
    assert render_chat(messages, template=CHATML) == expected + "<|im_start|>assistant\n"
    assert render_chat(messages, template=CHATML, add_generation_prompt=False) == expected


def test_variables_of_templates():
    template = "{{ messages | tojson }}|{{ tools | tojson(indent=None) }}|{{ eos_token }}|{{ level }}|{{ missing }}"
    call = {"id": "1", "function": {"name": "f", "arguments": '{"é": 1}'}}
    messages = [
        {"role": "assistant", "content": None, "reasoning": "R", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": [{"output": "a"}, {"output": 2}]},
    ]
    shown = render_chat(messages, [TIME_TOOL], template=template, level=[1]).split("|", 2)
    assert json.loads(shown[0]) == [
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "R",
            "reasoning": "R",
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": {"é": 1}}}],
        },
        {"role": "tool", "content": [{"output": "a"}, {"output": "2"}], "tool_call_id": "1"},
    ]
    assert "é" in shown[0]
    assert json.loads(shown[1]) == [TIME_TOOL]
    assert shown[2] == "<|endoftext|>|[1]|"


def test_extensions_of_templates():
    template = """{% generation %}a{% endgeneration %}
{%- for i in range(5) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}{{ strftime_now('%%') }}"""
    assert render_chat([USER], template=template) == "a01%"


def test_switches_of_another_template():
    template = "{{ 'on' if deep else 'off' }}"
    assert render_chat([USER], template=template, deep=True) == "on"
    assert render_chat([USER], template=template, deep=None) == "off"
    with pytest.raises(PromptError, match="does not know the switch 'enable_thinking'; it reads deep"):
        render_chat([USER], template=template, enable_thinking=True)
    with pytest.raises(PromptError, match="cannot be given to the chat template as JSON"):
        render_chat([USER], template=template, deep=object())


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception.__globals__.os }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "{{ ('%s' | attr('__class__')).__mro__ }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'system'}) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_a_template_cannot_leave_the_sandbox(template):
    with pytest.raises(PromptError, match=r"the checkpoint's chat template (does what its sandbox forbids|fails)"):
        render_chat([USER], template=template)


FAILURES = {
    "refuses the conversation: no system role, please": "{{ raise_exception('no system\nrole, please') }}",
    r"is not valid Jinja \(line 2\): Unexpected end of template": "\n{% if x %}",
    "fails: UndefinedError: 'nothing' is undefined": "{{ nothing.at.all }}",
    "fails: ZeroDivisionError": "{{ 1 // 0 }}",
    "fails: OverflowError: Range too big": "{% for i in range(10 ** 9) %}{% endfor %}",
    "writes more than 1,048,576 bytes": "{% for i in range(90000) %}{{ 'aaaaaaaaaaaaaaa' }}{% endfor %}",
    "writes more than 1,048,576": "{{ 'é' * 600000 }}",
    "needs more than 512 MB of memory": "{{ 'a' * 10 ** 9 }}",
    "fails: RecursionError": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "fails: RecursionError|was stopped by the system": "{{ " + "(" * 20000 + ")" * 20000 + " }}",
}


@pytest.mark.parametrize("message", FAILURES)
def test_a_failing_template_is_one_sentence(message):
    with pytest.raises(PromptError, match=f"^the checkpoint's chat template (?:{message})") as caught:
        render_chat([USER], template=FAILURES[message])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def running_children() -> set[int]:
    children = set()
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            text = status.read_text()
        except OSError:
            continue
        if f"PPid:\t{os.getpid()}\n" in text:
            children.add(int(status.parent.name))
    return children


@pytest.mark.parametrize("way", ["{{ 'a' }}", "{{ '' }}"])
def test_a_template_that_never_ends_is_stopped(way):
    loop = "{% for i in range(99999) %}" * 3 + "{% set x = i %}" + "{% endfor %}" * 3
    before = running_children()
    with pytest.raises(PromptError, match="takes longer than 2 s and was stopped"):
        render_chat([USER], template=f"{way}{loop}")
    assert running_children() <= before


def test_a_child_that_does_not_start_is_one_clear_error(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(PromptError, match=r"cannot start .* to render the chat template"):
        render_chat([USER], template="x")
    monkeypatch.undo()
    monkeypatch.setattr(sandbox, "_CHILD_SCRIPT", tmp_path / "absent.py")
    with pytest.raises(PromptError, match="did not start: is the jinja2 package installed"):
        render_chat([USER], template="x")


def test_a_slow_start_does_not_count_towards_the_timeout(monkeypatch, tmp_path):
    slow = tmp_path / "slow.py"
    slow.write_text(f"import time\ntime.sleep(3)\n{sandbox._CHILD_SCRIPT.read_text()}")
    monkeypatch.setattr(sandbox, "_CHILD_SCRIPT", slow)
    started = time.monotonic()
    assert render_chat([USER], template="x") == "x"
    assert time.monotonic() - started > 3


def test_the_child_does_not_import_the_package():
    limits = {"output_bytes": 9, "memory_bytes": 1 << 30, "cpu_seconds": 9}
    child = subprocess.run(
        [sys.executable, "-X", "importtime", *sandbox._child_command()[1:]],
        input=json.dumps({"template": "x", "variables": {}, "switches": {}, **limits}),
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in child.stderr.splitlines()}
    assert child.stdout == 'ready\n{"text": "x"}'
    assert "jinja2" in loaded
    assert not {"jax", "jaxlib", "numpy", "glm_jax", "tokenizers"} & loaded


def test_the_text_layer_imports_no_jax():
    code = "import sys, glm_jax.text; sys.exit(sorted({'jax', 'jaxlib', 'numpy', 'jinja2'} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_sources_of_a_template(tmp_path):
    assert read_template(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"model_max_length": 128000}')
    assert read_template(tmp_path) is None
    config.write_text('{"chat_template": "A"}')
    assert read_template(tmp_path) == "A"
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert read_template(tmp_path) == "D"
    (tmp_path / "chat_template.jinja").write_text("é", encoding="utf-8")
    assert read_template(tmp_path) == "é"


def test_an_unreadable_template_is_one_clear_error(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        read_template(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="cannot read"):
        read_template(tmp_path)
