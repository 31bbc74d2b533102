"""Training: the loss falls, a resumed run gives the same bits, router loads are balanced."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.tiny_recipe.batches import Batches
from examples.tiny_recipe.loss import forward
from examples.tiny_recipe.optimizer import make_optimizer, update_router_biases
from examples.tiny_recipe.train_step import initial_state
from examples.tiny_recipe.training_checkpoint import load_state, save_state
from examples.tiny_recipe.training_loop import RunFiles, train
from glm_jax.model import GLM
from glm_jax.text import render_chat
from tests.tiny.conftest import CODE_TEXTS

pytestmark = pytest.mark.usefixtures("lenient")


@pytest.fixture(scope="module")
def run(small_config, small_plan, tiny_tokenizer):
    batches = Batches(small_plan, tiny_tokenizer, CODE_TEXTS, render_chat)

    def start(folder, stop=None):
        files = RunFiles(folder=folder, log_every=1, save_every=3, probe_every=5)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return train(
                small_config,
                small_plan,
                batches,
                files,
                lambda _: {"bpb": 1.5},
                write_line=lambda _: None,
                stop_step=stop,
            )

    return start


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return run(folder), log(folder)


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def without_times(record):
    return {k: v for k, v in record.items() if k not in ("tokens_per_s", "seconds_left")}


def equal(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


def cosine(a, b):
    return float(np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))


def test_the_loss_falls(whole, small_plan):
    _, records = whole
    assert [record["step"] for record in records] == list(range(1, small_plan.steps + 1))
    assert [record["step"] for record in records if "bpb" in record] == [5, 10, 15, 20]
    for name in ("code", "chat", "draft"):
        losses = [record[name] for record in records if record[name]]
        assert losses[-1] < 0.8 * losses[0]


def test_a_resumed_run_gives_the_same_bits(run, whole, tmp_path):
    state, records = whole
    for stop in (1, 5, 17, None):
        resumed = run(tmp_path, stop)
    assert equal(state, resumed)
    assert list(map(without_times, log(tmp_path))) == list(map(without_times, records))


def test_log_records_after_the_checkpoint_are_dropped(run, tmp_path):
    run(tmp_path, 2)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 0.0}\n')
    run(tmp_path, 4)
    assert [record["step"] for record in log(tmp_path)] == [1, 2, 3, 4]


def test_the_prediction_layer_is_trained_from_its_stage_on(run, small_config, small_plan, tmp_path):
    start = initial_state(small_config, small_plan).params["mtp"]
    before = run(tmp_path, small_plan.stages[1].start).params["mtp"]
    after = run(tmp_path, small_plan.stages[1].start + 2).params["mtp"]
    assert equal(start["enorm"], before["enorm"])
    # Weight decay does not change the direction.
    assert cosine(start["eh_proj"], before["eh_proj"]) > 1 - 1e-6
    assert cosine(before["eh_proj"], after["eh_proj"]) < 1 - 1e-6


def test_the_loss_uses_the_model_itself(small_config, small_plan):
    params = initial_state(small_config, small_plan).params
    tokens = jax.random.randint(jax.random.key(0), (2, 20), 0, small_config.vocab_size, jnp.int32)
    out = forward(small_config, params, tokens, with_mtp=True)
    model = GLM(small_config)
    hidden, _ = model.apply({"params": params}, tokens[:, :-1], method="hidden")
    draft, _, _ = model.apply({"params": params}, hidden, tokens[:, 1:], method="draft")
    logits, _ = model.apply({"params": params}, tokens[:, :-1])
    np.testing.assert_allclose(out.logits, logits, rtol=0, atol=2e-5)
    np.testing.assert_allclose(out.draft, draft, rtol=0, atol=2e-5)
    for load in out.loads.values():
        assert float(load.sum()) == 2 * 19 * small_config.num_experts_per_tok


def test_biases_move_towards_equal_load(small_config, small_plan):
    params = initial_state(small_config, small_plan).params
    load = jnp.asarray([[10.0, 0, 5, 5, 5, 5, 9, 1]])
    moved = update_router_biases(params, {"runs/1": load}, jnp.float32(0.5))
    np.testing.assert_array_equal(moved["runs"]["1"]["moe"]["router_bias"], [[-0.5, 0.5, 0, 0, 0, 0, -0.5, 0.5]])
    np.testing.assert_array_equal(moved["mtp"]["moe"]["router_bias"], params["mtp"]["moe"]["router_bias"])
    untouched = jax.tree.map(lambda a, b: a is b, moved, params)
    assert sum(not same for same in jax.tree.leaves(untouched)) == 1


def test_biases_have_no_other_update(small_config, small_plan):
    state = initial_state(small_config, small_plan)
    gradient = jax.tree.map(jnp.ones_like, state.params)
    gradient["runs"]["1"]["moe"]["router_bias"] = jnp.zeros((1, 8))
    updates, _ = make_optimizer(small_plan).update(gradient, state.optimizer, state.params)
    assert not np.any(updates["runs"]["1"]["moe"]["router_bias"])


def test_a_matrix_update_is_nearly_orthogonal(small_config, small_plan):
    state = initial_state(small_config, small_plan)
    keys = iter(jax.random.split(jax.random.key(1), 200))
    gradient = jax.tree.map(lambda p: jax.random.normal(next(keys), p.shape), state.params)
    plan = dataclasses.replace(small_plan, weight_decay=0.0, matrix_rate=1.0)
    updates, _ = make_optimizer(plan).update(gradient, state.optimizer, state.params)
    for update in (updates["runs"]["1"]["moe"]["gate"][0, 3], updates["runs"]["0"]["attn"]["k_b"][0].reshape(32, 16)):
        values = np.linalg.svd(np.asarray(update), compute_uv=False) / max(1, update.shape[0] / update.shape[1]) ** 0.5
        assert values.min() > 0.4
        assert values.max() < 1.5


def test_a_checkpoint_of_another_model_is_rejected(small_config, small_plan, tmp_path):
    save_state(tmp_path / "state.npz", 3, initial_state(small_config, small_plan))
    other = initial_state(small_config.replace(hidden_size=64), small_plan)
    with pytest.raises(ValueError, match="another model"):
        load_state(tmp_path / "state.npz", other)
