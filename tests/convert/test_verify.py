"""``python -m convert.verify`` and ``python -m convert.compare``: figures against NumPy, files, refusals."""

import json
import re

import jax
import numpy as np
import pytest

from convert import compare
from convert.quality import chat_tasks, divergence, models, task_scoring
from convert.quality.position_metrics import PositionMetrics
from convert.quality.weight_errors import WEIGHT_KINDS, model_sizes, weight_errors, weight_kind
from convert.verify import __main__ as verify
from glm_jax import checkpoint
from glm_jax.checkpoint.sources.build import build_array
from glm_jax.checkpoint.sources.open import open_source, tiny_folder
from glm_jax.cli.common import BAD_INPUT, OK, run_and_exit
from glm_jax.engine.assets import ModelAssets
from glm_jax.errors import CheckpointError, GlmError, MemoryPlanError, PromptError
from glm_jax.memory import planner
from tests.builders import hf_checkpoints
from tests.builders.llm_checkpoints import CONFIG, write_random_model, write_scripted_model
from tests.reference import ReferenceModel

TEXT = "def area(w, h):\n    return w * h\n\nprint(area(3, 4))  # twelve\n" * 3
WINDOW = 16


@pytest.fixture(scope="module", autouse=True)
def quick_compile():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A random model, and the same with noise of a twentieth in every matrix but the router's."""
    first = write_random_model(tmp_path_factory.mktemp("first"))
    second = write_random_model(tmp_path_factory.mktemp("second"))
    rng = np.random.default_rng(1)
    noisy = {
        name: (t + 0.05 * t.std() * rng.standard_normal(t.shape)).astype(np.float32)
        if t.ndim == 2 and not name.endswith("mlp.gate.weight")
        else t
        for name, t in hf_checkpoints.read_tensors(first).items()
    }
    for file in second.glob("*.safetensors*"):
        file.unlink()
    eos = {key: json.loads((first / "config.json").read_text())[key] for key in ("eos_token_id", "pad_token_id")}
    hf_checkpoints.write_checkpoint(second, {**CONFIG, **eos}, noisy)
    return first, second


def side(folder, cache_dtype="float32", **quantized):
    source = open_source(folder)
    assets = ModelAssets.load(source.cfg, folder)
    return models.load_compared_model(
        models.quantize_by_preset(source, **quantized) if quantized else source,
        assets,
        dtype="float32",
        cache_dtype=cache_dtype,
    )


@pytest.fixture(scope="module")
def pair(folders):
    return side(folders[0]), side(folders[1])


@pytest.fixture(scope="module")
def ids(pair):
    return pair[0].llm.tokenizer.encode(TEXT)


# ------------------------------------------------------------------------------------------- predictions


def log_softmax(logits):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def test_every_figure_is_that_of_the_reference_in_float64(folders, pair, ids):
    (found,) = divergence.measure_divergence(pair[0], [pair[1]], [ids], window=WINDOW)
    rows, lengths = divergence.split_windows([ids], WINDOW)
    theirs = [ReferenceModel(hf_checkpoints.read_tensors(folder), CONFIG) for folder in folders]
    gap_seen = 0.0
    for row, length, i in zip(rows, lengths, range(4), strict=False):
        logits = [reference.logits(row[:length]) for reference in theirs]
        log_p, log_q = map(log_softmax, logits)
        change = np.abs(np.exp(log_q) - np.exp(log_p)).sum(axis=-1)
        # What the error allowed to float32 logits, in either model, can do to a divergence.
        allowed = 4 * 2e-5 * (1 + max(np.abs(x).max() for x in logits))
        exact = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
        assert np.all(np.abs(found.kl[i, :length] - exact) <= allowed * change + allowed**2)
        assert exact.min() > 1e-5
        best = np.sort(logits[0], axis=-1)[:, -2:]
        np.testing.assert_allclose(found.gap[i, :length], best[:, 1] - best[:, 0], atol=allowed)
        clear = best[:, 1] - best[:, 0] > allowed
        same = logits[0].argmax(-1) == logits[1].argmax(-1)
        assert np.array_equal(found.agree[i, :length][clear], same[clear])
        target = row[1 : length + 1]
        np.testing.assert_allclose(found.reference_nll[i, :length], -log_p[np.arange(length), target], atol=allowed)
        np.testing.assert_allclose(found.nll[i, :length], -log_q[np.arange(length), target], atol=allowed)
        gap_seen = max(gap_seen, best.max())
    assert gap_seen > 0


@pytest.mark.parametrize("size", [1e-3, 0.1, 1.0, 30.0])
def test_divergence_is_accurate_however_small(size):
    rng = np.random.default_rng(0)
    logits = (3 * rng.standard_normal((5, 400))).astype(np.float32)
    other = (logits + size * rng.standard_normal(logits.shape)).astype(np.float32)
    found = np.asarray(divergence.kl_divergence(jax.nn.log_softmax(logits), jax.nn.log_softmax(other)))
    log_p, log_q = log_softmax(logits.astype(np.float64)), log_softmax(other.astype(np.float64))
    exact = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    # Each log-probability is off by a few units in its last place; the terms are summed in float32.
    unit = 4 * np.finfo(np.float32).eps * max(np.abs(log_p).max(), np.abs(log_q).max())
    change = np.abs(np.exp(log_q) - np.exp(log_p)).sum(axis=-1)
    assert np.all(np.abs(found - exact) <= unit * change + unit**2 + 1e-6 * exact)
    assert np.all(found > 0)


def test_a_distribution_that_excludes_a_token_is_not_nan():
    log_p = jax.nn.log_softmax(np.asarray([[0.0, -300.0], [-300.0, 0.0]], np.float32))
    log_q = jax.nn.log_softmax(np.asarray([[-300.0, 0.0], [-300.0, 0.0]], np.float32))
    np.testing.assert_allclose(divergence.kl_divergence(log_p, log_q), [300.0, 0.0])


def test_identical_models_do_not_differ_at_all(pair, ids):
    (found,) = divergence.measure_divergence(pair[0], [pair[0]], [ids], window=WINDOW)
    summary = found.summary()
    assert summary["kl"] == {"mean": 0.0, "median": 0.0, "p99": 0.0, "max": 0.0, "mean_95": [0.0, 0.0]}
    assert summary["top1"]["agreement"] == 1.0
    assert summary["perplexity"]["reference"] == summary["perplexity"]["model"]
    assert summary["tokens"] == len(ids) - 1


def test_the_summary_counts_what_is_there(pair, ids):
    (found,) = divergence.measure_divergence(pair[0], [pair[1]], [ids, ids[:5]], window=WINDOW)
    kl = found.kl[~np.isnan(found.kl)].astype(np.float64)
    assert len(kl) == len(ids) + 5 - 2
    summary = found.summary()
    assert summary["tokens"] == len(kl)
    assert summary["kl"]["mean"] == pytest.approx(kl.mean(), rel=1e-12)
    assert summary["kl"]["max"] == kl.max()
    assert summary["kl"]["median"] == np.median(kl)
    low, high = summary["kl"]["mean_95"]
    assert low < kl.mean() < high
    sure = found.gap > 0.5
    assert summary["top1"]["sure_positions"] == sure.sum() > 0
    assert summary["top1"]["sure_agreement"] == pytest.approx(found.agree[sure].mean())
    nll = found.nll[~np.isnan(found.nll)].astype(np.float64)
    assert summary["perplexity"]["model"] == pytest.approx(np.exp(nll.mean()))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_an_8_bit_cache_alone_is_a_difference(folders, pair, ids, kind):
    rounded = side(folders[0], cache_dtype=kind)
    (found,) = divergence.measure_divergence(pair[0], [rounded], [ids], window=WINDOW)
    assert 0 < found.summary()["kl"]["mean"] < 0.1


def test_every_token_but_the_first_of_a_text_is_predicted_once():
    texts = [list(range(100, 100 + n)) for n in (1, 2, 9, 17)]
    rows, lengths = divergence.split_windows(texts, 8)
    predicted = [token for row, n in zip(rows, lengths, strict=True) for token in row[1 : n + 1]]
    assert sorted(predicted) == sorted(token for text in texts for token in text[1:])
    fewer, _ = divergence.split_windows([list(range(1001))], 10, max_tokens=100)
    assert len(fewer) == 10
    assert (fewer[0][0], fewer[-1][0]) == (0, 990)


# ----------------------------------------------------------------------------------------------- weights


def test_errors_of_weights_are_numpys(folders):
    first, second = map(open_source, folders)
    found = weight_errors(first, second)
    total = {}
    for part, members in first.layout().items():
        for leaf in members:
            weight, other = (build_array(source, leaf).astype(np.float64) for source in (first, second))
            exact = np.linalg.norm(weight - other) / np.linalg.norm(weight)
            assert found["by_matrix"][f"{part}/{leaf.name}"] == pytest.approx(exact, rel=1e-5, abs=0), leaf
            error, square = total.get(weight_kind(leaf), (0, 0))
            total[weight_kind(leaf)] = (error + ((weight - other) ** 2).sum(), square + (weight**2).sum())
    assert set(total) == set(WEIGHT_KINDS)
    for kind, (error, square) in total.items():
        assert found["by_kind"][kind] == pytest.approx(np.sqrt(error / square), rel=1e-5, abs=0), kind
    assert found["by_kind"]["router"] == found["by_kind"]["norms and biases"] == 0
    assert set(found["by_layer"]) == set(first.layout())


def test_pieces_of_other_heights_are_the_same_rows(folders, monkeypatch):
    first, second = map(open_source, folders)
    expected = weight_errors(first, second)
    pieces = type(first).iter_chunks
    monkeypatch.setattr(
        type(first),
        "iter_chunks",
        lambda self, leaf: (
            (row + i, piece[i : i + 3]) if self is second else (row + i, piece[i : i + 5])
            for row, piece in pieces(self, leaf)
            for i in range(0, len(piece), 3 if self is second else 5)
        ),
    )
    found = weight_errors(first, second)
    assert found["by_matrix"] == pytest.approx(expected["by_matrix"], rel=1e-5)


def test_bytes_are_those_of_the_loaded_arrays(folders):
    source = open_source(folders[0])
    for model in (
        source,
        models.quantize_by_preset(source, "int8"),
        models.quantize_by_preset(source, "int4-small", "rtn"),
    ):
        cfg, params, _ = checkpoint.load(model, dtype="bfloat16")
        mtp = sum(leaf.nbytes for leaf in jax.tree.leaves(params.pop("mtp")))
        main = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        found = model_sizes(model)
        assert (found["main"]["bytes"], found["mtp"]["bytes"]) == (main, mtp)
        assert found["bits_per_weight"] == 8 * main / found["main"]["parameters"]
        assert cfg.num_nextn_predict_layers == 1


def test_a_model_without_prediction_layer_is_compared_in_the_rest(folders, tmp_path):
    tensors = {n: t for n, t in hf_checkpoints.read_tensors(folders[0]).items() if not n.startswith("model.layers.3.")}
    bare = open_source(hf_checkpoints.write_checkpoint(tmp_path, CONFIG, tensors))
    first = open_source(folders[0])
    models.check_same_architecture(first.cfg, bare.cfg)
    found = weight_errors(first, bare)
    assert "prediction layer" not in found["by_kind"]
    assert set(found["by_matrix"].values()) == {0.0}
    assert model_sizes(bare)["mtp"] == {"parameters": 0, "bytes": 0}


def test_nan_weights_are_named(folders, tmp_path):
    tensors = hf_checkpoints.read_tensors(folders[0])
    tensors["lm_head.weight"][3, 3] = np.nan
    bad = open_source(hf_checkpoints.write_checkpoint(tmp_path, CONFIG, tensors))
    with pytest.raises(CheckpointError, match="rest head holds NaN"):
        weight_errors(open_source(folders[0]), bad)


# -------------------------------------------------------------------------------------------- chat tasks


def task(answer, **changes):
    message = {"role": "user", "content": "hi"}
    made = {"kind": "say", "messages": [message], "tools": [], "thinking": False, "answer": answer, "calls": []}
    return {**made, **changes}


def test_answers_are_marked_and_compared(tmp_path):
    writer = side(write_scripted_model(tmp_path / "a", {"</think>": ["Hel", "lo"]}))
    other = side(write_scripted_model(tmp_path / "b", {"</think>": ["Bye", "!"]}))
    tasks = [task("Hello"), task("Bye!", kind="part"), task("Hello", thinking=True), task("Hello")]
    assets = ModelAssets.load(writer.cfg, tmp_path / "a")
    prompts = chat_tasks.render_prompts(tasks, assets)
    ours, theirs = (chat_tasks.answer_tasks(each, tasks, prompts, max_tokens=8) for each in (writer, other))
    assert [m.is_correct for m in ours[:2]] == [True, False]
    assert [m.is_correct for m in theirs[:2]] == [False, True]
    found = chat_tasks.summarize_comparison(ours, theirs)
    assert found["reference"]["tasks"] == 4
    assert found["difference"] == pytest.approx(
        np.mean(chat_tasks.correct_flags(theirs)) - np.mean(chat_tasks.correct_flags(ours))
    )
    low, high = found["difference_95"]
    assert low <= found["difference"] <= high
    same = chat_tasks.summarize_comparison(ours, ours)
    assert (same["difference"], same["difference_95"]) == (0, [0, 0])


def test_the_miniatures_tasks_can_be_read():
    tasks = task_scoring.read_chat_tasks(tiny_folder() / "heldout_chat.jsonl")
    assert len(tasks) == 625


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "holds no task"),
        ("[1]", "line 1: a task is a JSON object with kind, messages"),
        ('{"kind": "x"}', "line 1: a task is a JSON object"),
        (json.dumps({**task("x"), "calls": 3}), "line 1: calls must be a list"),
    ],
)
def test_bad_tasks_are_refused(tmp_path, line, words):
    file = tmp_path / "tasks.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(PromptError, match=re.escape(words)):
        task_scoring.read_chat_tasks(file)


# ---------------------------------------------------------------------------------------------- commands


def run(main, *arguments):
    with pytest.raises(SystemExit) as caught:
        run_and_exit(lambda: main([str(argument) for argument in arguments]))
    return caught.value.code


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "held_out.txt"
    file.write_text(TEXT)
    return file


def test_report_files_and_comparison(folders, text, tmp_path, capsys):
    first, second = folders
    out = {name: tmp_path / f"{name}.npz" for name in "ab"}
    common = ("--against", first, "--text", text, "--window", WINDOW)
    more = ("--json", tmp_path / "a.json", "--markdown", tmp_path / "a.md", "--positions", out["a"])
    assert run(verify.main, second, *common, *more) == OK
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "a.json").read_text())
    assert set(report) == {"source", "model", "dtype", "weights", "text"}
    assert set(report["weights"]) == {"by_kind", "by_layer", "by_matrix"}
    assert set(report["text"]) == {"files", "tokens", "windows", "window", "kl", "perplexity", "top1"}
    assert (tmp_path / "a.md").read_text() == printed
    assert f"| KL(source, model), mean | {report['text']['kl']['mean']:.3g} nats |" in printed
    assert f"| bits per weight | {report['source']['size']['bits_per_weight']:.2f} |" in printed
    for block in re.findall(r"(?m)(?:^\|.*\n)+", printed):
        assert len({line.count("|") for line in block.splitlines()}) == 1
    quantized = ("--quantize", "int8", "--method", "rtn", "--positions", out["b"])
    assert run(verify.main, first, *common, *quantized) == OK
    assert ", quantized to int8 by rtn, against" in capsys.readouterr().out
    assert run(compare.main, out["a"], out["b"], "--json", tmp_path / "c.json") == OK
    found = json.loads((tmp_path / "c.json").read_text())
    assert found["kl"]["a"] == pytest.approx(report["text"]["kl"]["mean"], rel=1e-6)
    assert found["kl"]["difference"] == pytest.approx(found["kl"]["a"] - found["kl"]["b"], rel=1e-6)
    assert 0 < found["kl"]["difference_95"][0] < found["kl"]["difference"]
    assert "mean KL in nats: A " in capsys.readouterr().out
    assert run(compare.main, out["a"], out["a"]) == OK
    assert "no difference that this text shows" in capsys.readouterr().out


def test_positions_survive_a_file(pair, ids, tmp_path):
    (found,) = divergence.measure_divergence(pair[0], [pair[1]], [ids], window=WINDOW)
    found.save(tmp_path / "x")
    read = PositionMetrics.load(tmp_path / "x")
    assert read.text == found.text
    for name in ("kl", "nll", "reference_nll", "agree", "gap"):
        np.testing.assert_array_equal(getattr(read, name), getattr(found, name))


def test_weights_only_reads_no_text(folders, capsys):
    assert run(verify.main, folders[1], "--against", folders[0], "--weights-only") == OK
    assert "KL(" not in capsys.readouterr().out


REFUSED = {
    "there is no text": (),
    "compares no predictions": ("--weights-only", "--text", "TEXT"),
    "--positions needs --text": ("--weights-only", "--positions", "x.npz"),
    "give --quantize too": ("--text", "TEXT", "--method", "rtn"),
    "cannot read": ("--text", "nowhere.txt"),
    "the text is empty": ("--text", "EMPTY"),
    "too short": ("--text", "ONE"),
    "there is no folder": ("--text", "TEXT", "--json", "nowhere/a.json"),
    "--window must be 2 to 1,000": ("--text", "TEXT", "--window", "1001"),
    "--tokens must be at least 1": ("--text", "TEXT", "--tokens", "0"),
    "no quantization 'int5'": ("--text", "TEXT", "--quantize", "int5"),
    "cannot read nothing.jsonl": ("--chat", "nothing.jsonl"),
}


@pytest.mark.parametrize("words", REFUSED)
def test_bad_calls_get_one_line(folders, text, tmp_path, capsys, words):
    files = {"TEXT": text, "EMPTY": tmp_path / "empty", "ONE": tmp_path / "one"}
    files["EMPTY"].write_text(" \n")
    files["ONE"].write_text("x")
    arguments = [files.get(word, word) for word in REFUSED[words]]
    assert run(verify.main, folders[1], "--against", folders[0], *arguments) == BAD_INPUT
    captured = capsys.readouterr()
    last = captured.err.splitlines()[-1]
    assert last.startswith("error: ")
    assert words in last
    assert captured.out == ""


def test_different_models_are_refused(folders, tmp_path):
    first = open_source(folders[0])
    bigger = open_source(write_random_model(tmp_path / "bigger", vocab_size=400))
    with pytest.raises(CheckpointError, match="the vocabularies differ: 384 tokens in the source and 400 here"):
        models.check_same_architecture(first.cfg, bigger.cfg)
    shallow = open_source(write_random_model(tmp_path / "shallow", num_hidden_layers=2))
    with pytest.raises(CheckpointError, match=r"different models \(num_hidden_layers 3 and 2"):
        models.check_same_architecture(first.cfg, shallow.cfg)
    rounded = first.cfg.replace(rms_norm_eps=float(np.float32(first.cfg.rms_norm_eps)), latent_eps=1e-5)
    models.check_same_architecture(first.cfg, rounded)


def test_different_tokenizers_are_refused(folders, tmp_path):
    odd = write_scripted_model(tmp_path, {"</think>": ["area"]})
    ours, theirs = (ModelAssets.load(open_source(folder).cfg, folder) for folder in (folders[0], odd))
    with pytest.raises(CheckpointError, match="tokenizers of the two models differ"):
        models.encode_texts([TEXT], ours, theirs)


def test_models_that_do_not_fit_together_are_refused(folders, monkeypatch):
    monkeypatch.setattr(planner, "available_device_memory", lambda _: 1000)
    first, second = map(open_source, folders)
    with pytest.raises(MemoryPlanError, match="--weights-only"):
        models.require_device_memory(first, second, dtype="float32", window=WINDOW)


def test_files_that_are_no_positions_are_refused(tmp_path, pair, ids):
    (found,) = divergence.measure_divergence(pair[0], [pair[1]], [ids], window=WINDOW)
    found.save(tmp_path / "good")
    (tmp_path / "text").write_text("no archive")
    np.savez(tmp_path / "other.npz", kl=np.zeros(3))
    (tmp_path / "cut").write_bytes((tmp_path / "good").read_bytes()[:-40])
    for name in ("text", "other.npz", "cut"):
        with pytest.raises(GlmError, match="is not a file that"):
            PositionMetrics.load(tmp_path / name)
    with pytest.raises(GlmError, match="cannot read"):
        PositionMetrics.load(tmp_path / "nowhere")
    (shorter,) = divergence.measure_divergence(pair[0], [pair[1]], [ids[:-1]], window=WINDOW)
    shorter.save(tmp_path / "shorter")
    with pytest.raises(PromptError, match="are about different tokens"):
        compare.compare_positions(tmp_path / "good", tmp_path / "shorter")
