"""A model's life: loaded in every layout, interrupted, saved, released; and models that cannot be loaded."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from glm_jax import checkpoint
from glm_jax.engine import runner
from glm_jax.errors import CheckpointError, GlmError, SamplingError, ShardingError
from glm_jax.llm import LLM
from glm_jax.sampling import SamplingParams
from tests.builders.llm_checkpoints import write_random_model, write_scripted_model

TEXTS = ["def", "def fib(n):\n    return n", "天气很好 🙂", "naïve café, x"]
GREEDY = SamplingParams(temperature=0, max_tokens=12, seed=7, ignore_eos=True)


@pytest.fixture(scope="module")
def expected(llm: LLM) -> list[Any]:
    return llm.generate(TEXTS, GREEDY)


@pytest.mark.parametrize("to", ["orbax", "safetensors"])
def test_a_saved_model_loads_and_generates_the_same(llm, expected, tmp_path, to):
    llm.save(tmp_path / "saved", to=to)
    again = LLM.load(tmp_path / "saved", dtype="float32")
    assert again.generate(TEXTS, GREEDY) == expected
    assert (again.config, again.eos_ids, again.defaults) == (llm.config, llm.eos_ids, llm.defaults)


def test_saving_refuses_other_forms_and_folders_in_use(llm, tmp_path):
    with pytest.raises(GlmError, match="to must be"):
        llm.save(tmp_path / "x", to="gguf")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError):
        llm.save(tmp_path)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_released_model_says_so(folder):
    model = LLM.load(folder, dtype="float32")
    leaves = jax.tree.leaves(model.params)
    model.release()
    assert all(leaf.is_deleted() for leaf in leaves)
    uses: list[Callable[[], Any]] = [
        lambda: model.params,
        lambda: model.generate("def"),
        lambda: model.stream("def"),
        lambda: model.chat([{"role": "user", "content": "x"}]),
        lambda: model.logits("def"),
        lambda: model.logits("def", trace=["embed"]),
        lambda: model.mtp_logits("def"),
        lambda: model.score("def", "x"),
        lambda: model.save(folder / "never"),
    ]
    for use in uses:
        with pytest.raises(GlmError, match="this model was released; load it again"):
            use()
    model.release()


def test_parameters_can_be_replaced(llm, folder, expected):
    other = LLM.load(folder, dtype="float32")
    own = other.params
    other.params = {**own, "head": own["head"][::-1]}
    np.testing.assert_allclose(other.logits("def"), llm.logits("def")[:, ::-1], atol=1e-5, rtol=0)
    other.params = own
    assert other.generate(TEXTS, GREEDY) == expected


@pytest.fixture
def heeding_ctrl_c():
    """Restores the handling of Ctrl-C, which shells let background processes ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupting(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Raises Ctrl-C during decode call number ``after``."""
    steps, calls = runner.decode_steps, []

    def run(*args: Any, **options: Any) -> Any:
        calls.append(1)
        out = steps(*args, **options)
        if len(calls) == after:
            signal.raise_signal(signal.SIGINT)
        return out

    monkeypatch.setattr(runner, "decode_steps", run)


@pytest.mark.usefixtures("heeding_ctrl_c")
@pytest.mark.parametrize("after", [1, 2])
def test_an_interrupted_generation_leaves_the_model_usable(llm, expected, monkeypatch, after):
    with monkeypatch.context() as patch:
        interrupting(patch, after)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(TEXTS, GREEDY)
    assert llm.generate(TEXTS, GREEDY) == expected


@pytest.mark.usefixtures("heeding_ctrl_c")
def test_an_interrupted_stream_leaves_the_model_usable(llm, expected, monkeypatch):
    pieces = []
    with monkeypatch.context() as patch:
        interrupting(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            pieces.extend(piece.text for piece in llm.stream(TEXTS[1], GREEDY))

    def read_until_interrupted():
        for piece in llm.stream(TEXTS[1], GREEDY):
            pieces.append(piece.text)
            if len(pieces) == 6:
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        read_until_interrupted()
    for piece in llm.stream(TEXTS[1], GREEDY):
        assert expected[1].text.startswith(piece.text)
        break
    assert "".join(p.text for p in llm.stream(TEXTS[1], GREEDY)) == expected[1].text
    assert llm.generate(TEXTS, GREEDY) == expected


def test_streams_may_be_mixed(llm, expected):
    first, second = llm.stream(TEXTS[0], GREEDY), llm.stream(TEXTS[1], GREEDY)
    texts = ["", ""]
    for one, two in zip(first, second, strict=True):
        texts[0] += one.text
        texts[1] += two.text
    assert texts == [expected[0].text, expected[1].text]


@pytest.mark.parametrize("sharding", ["latency", "replicated"])
def test_four_devices_generate_the_same_as_one(llm, folder, expected, sharding):
    four = LLM.load(folder, dtype="float32", mesh=4, sharding=sharding)
    assert four.mesh is not None
    assert dict(four.mesh.shape) == {"data": 1, "model": 4}
    assert len(four.params["runs"]["1"]["moe"]["gate"].sharding.device_set) == 4
    assert four.generate(TEXTS, GREEDY) == expected
    if sharding == "latency":
        drawn = {"n": 2, "temperature": 0.8, "top_p": 0.9, "seed": 7, "max_tokens": 4, "ignore_eos": True}
        drawn |= {"logit_bias": {1: 0.5}, "repetition_penalty": 1.2}
        assert [c.token_ids for c in four.generate("def", **drawn)] == [
            c.token_ids for c in llm.generate("def", **drawn)
        ]
        np.testing.assert_allclose(four.logits(TEXTS[1]), llm.logits(TEXTS[1]), atol=1e-4, rtol=0)


def test_one_device_may_be_given_as_a_mesh(folder):
    assert LLM.load(folder, dtype="float32", mesh=1).model.rules.mesh_axes == ()


def test_bfloat16_writes_the_same_where_the_margin_is_clear(tmp_path):
    folder = write_scripted_model(tmp_path / "clear", {"x": ["one ", "two ", "three"]})
    model = LLM.load(folder, cache_dtype="bfloat16")
    assert model.params["embed"].dtype == jax.numpy.bfloat16
    found = model.generate("x", GREEDY, ignore_eos=False)
    assert found.text == "one two three"
    wide = LLM.load(folder).logits([*model.tokenizer.encode("x"), *found.token_ids])
    assert wide.dtype == np.float32
    assert wide.argmax(-1)[:-1].tolist() == list(found.token_ids)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dtype": "float64"}, GlmError, "dtype must be bfloat16 or float32, not 'float64'"),
        ({"cache_dtype": "int4"}, GlmError, "cache_dtype must be bfloat16, float32, int8 or fp8, not 'int4'"),
        ({"max_model_len": 1}, GlmError, "max_model_len must be"),
        ({"max_model_len": 1001}, GlmError, 'max_model_len must be "auto" or 2 to 1,000, not 1001'),
        ({"max_model_len": "long"}, GlmError, "not 'long'"),
        ({"mesh": 99}, ShardingError, "mesh=99 asked for, but 8 cpu device(s) are there"),
        ({"mesh": 3}, ShardingError, "do not divide over 3 devices"),
        ({"sharding": "latency"}, ShardingError, "needs devices to split over: give mesh="),
        ({"mesh": 2, "sharding": "fastest"}, ShardingError, "there are replicated, latency"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_settings_that_cannot_be(folder, options, error, message):
    with pytest.raises(error) as caught:
        LLM.load(folder, **options)
    assert message in str(caught.value)


def test_notes_about_the_source_are_logged_as_warnings(tmp_path, caplog):
    folder = write_random_model(tmp_path / "model", num_nextn_predict_layers=0)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    LLM.load(folder, dtype="float32")
    (record,) = [record for record in caplog.records if record.name.startswith("glm_jax")]
    assert record.levelname == "WARNING"
    assert "(multi-token prediction) has no tensors here" in record.getMessage()
    assert record.getMessage().startswith("note: ")


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="there is no folder"):
        LLM.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("file", "content", "error", "message"),
    [
        ("tokenizer.json", None, CheckpointError, "copy the checkpoint's tokenizer.json there"),
        ("generation_config.json", "{", CheckpointError, "generation_config.json is not valid JSON"),
        ("generation_config.json", "[1]", CheckpointError, "must hold a JSON object"),
        ("generation_config.json", '{"eos_token_id": 384}', CheckpointError, "eos_token_id 384 is no id of this model"),
        ("generation_config.json", '{"eos_token_id": "2"}', CheckpointError, "eos_token_id '2'"),
        ("generation_config.json", '{"temperature": -1}', SamplingError, "generation_config.json: temperature must be"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_damaged_assets_are_found_before_weights_are_read(folder, tmp_path, monkeypatch, file, content, error, message):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / file).unlink()
    if content is not None:
        (copy / file).write_text(content)
    monkeypatch.setattr(checkpoint, "load", lambda *a, **k: pytest.fail("the weights were read first"))
    with pytest.raises(error) as caught:
        LLM.load(copy)
    assert message in str(caught.value)


def test_a_checkpoint_without_generation_config_has_the_usual_defaults(folder, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "generation_config.json").unlink()
    model = LLM.load(copy, dtype="float32")
    assert model.defaults == SamplingParams()
    assert model.eos_ids == tuple(json.loads((copy / "config.json").read_text())["eos_token_id"])
    (copy / "generation_config.json").write_text('{"do_sample": false, "eos_token_id": 7}')
    model = LLM.load(copy, dtype="float32")
    assert (model.defaults.temperature, model.eos_ids[-1]) == (0, 7)
