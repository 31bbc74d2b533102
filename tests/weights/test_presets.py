"""Presets: the matrices that each one quantizes, and group sizes that fit."""

import json

import pytest

from glm_jax.config import Config
from glm_jax.errors import QuantError
from glm_jax.sharding import Rules
from glm_jax.weights import QUANT_PRESETS, QuantRules, QuantSpec
from glm_jax.weights.params import is_matrix, leaves_with_path, param_specs
from glm_jax.weights.presets import fit_group_size
from glm_jax.weights.storage import plan_storage

FLASH = Config.flash(layers=3)
KINDS = {"int4": {"int4", "int8"}, "int4-small": {"int4"}, "int4-experts": {"int4"}, "int8": {"int8"}}


@pytest.mark.parametrize("name", QUANT_PRESETS)
def test_a_preset_never_touches_routers_norms_and_biases(name):
    storage, notes = plan_storage(FLASH, QUANT_PRESETS[name])
    assert not notes
    quantized = dict(storage.specs)
    assert {spec.kind for spec in quantized.values()} == KINDS[name]
    for path, spec in leaves_with_path(param_specs(FLASH)):
        if "router" in path[-1] or "norm" in path[-1] or not is_matrix(spec):
            assert path not in quantized
        elif name != "int4-experts":
            assert path in quantized


def test_the_experts_preset_leaves_everything_else():
    quantized = {path for path, _ in plan_storage(FLASH, QUANT_PRESETS["int4-experts"])[0].specs}
    assert {path[-1] for path in quantized} == {"gate", "up", "down"}
    assert {path[-2] for path in quantized} == {"moe"}


def test_each_kind_of_matrix_has_its_own_rule():
    fields = "experts shared_experts dense_mlp attention head embedding mtp".split()
    for name in fields:
        rules = QuantRules(**{"mtp": None, name: QuantSpec(kind="int8", block=(1, 0))})
        paths = {path for path, _ in plan_storage(FLASH, rules)[0].specs}
        assert paths
        in_mtp = {path for path in paths if path[0] == "mtp"}
        assert bool(in_mtp) == (name == "mtp")
        others = QuantRules(
            **{key: QuantSpec(kind="int8", block=(1, 0)) for key in fields if key != name} | {name: None}
        )
        assert not paths & {path for path, _ in plan_storage(FLASH, others)[0].specs}


def test_the_prediction_layer_is_one_of_the_layers_unless_told_otherwise():
    storage, _ = plan_storage(FLASH, QUANT_PRESETS["int4"])
    kinds = {path[1:]: spec.kind for path, spec in storage.specs if path[0] == "mtp"}
    assert (kinds["moe", "gate"], kinds["moe", "shared_gate"], kinds["attn", "o"], kinds["eh_proj",]) == (
        *("int4", "int8", "int8", "int8"),
    )


@pytest.mark.parametrize("name", QUANT_PRESETS)
def test_json_round_trip(name):
    assert QuantRules.from_json(json.loads(json.dumps(QUANT_PRESETS[name].to_json()))) == QUANT_PRESETS[name]
    assert QuantRules.resolve(name) is QUANT_PRESETS[name]


@pytest.mark.parametrize("value", [{"expert": None}, {"experts": "int4"}, {"experts": {"kind": "int5"}}, []])
def test_rules_that_are_none_are_refused(value):
    with pytest.raises(QuantError):
        QuantRules.from_json(value)


def test_unknown_presets_are_listed():
    with pytest.raises(QuantError, match="no quantization 'int3'; there are int4, int4-small, int4-experts, int8"):
        QuantRules.resolve("int3")


@pytest.mark.parametrize(
    ("shape", "local", "columns"),
    [
        ((8, 128), None, 64),
        ((8, 96), None, 32),
        ((8, 40), None, 8),
        ((8, 36), None, None),
        ((8, 63), None, None),
        ((8, 1536), 384, 64),
        ((8, 192), 48, 16),
        ((8, 96), 12, None),
    ],
)
def test_groups_shrink_until_they_divide(shape, local, columns):
    fitted = fit_group_size(QuantSpec(kind="int4", block=(1, 64)), shape, local)
    assert (fitted.block[1] if fitted else None) == columns


def test_a_scale_per_output_always_fits():
    spec = QuantSpec(kind="int8", block=(1, 0))
    assert fit_group_size(spec, (8, 63)) == spec


def test_what_no_group_divides_is_said():
    cfg = FLASH.replace(moe_intermediate_size=1532)
    storage, notes = plan_storage(cfg, QUANT_PRESETS["int4"])
    assert storage.get(("runs", "1", "moe", "down")) is None
    assert storage.get(("runs", "1", "moe", "gate")) is not None
    assert len(notes) == 1
    assert "runs/1/moe/down" in notes[0]


def test_a_group_is_never_wider_than_the_width_on_a_device():
    cfg = FLASH.replace(moe_intermediate_size=192)
    rules = Rules(heads="model", ffn="model", vocab="model")
    spec = plan_storage(cfg, QUANT_PRESETS["int4"], rules, {"data": 1, "model": 4})[0].get(("runs", "1", "moe", "down"))
    assert spec is not None
    assert spec.block == (1, 16)  # 192 / 4 = 48
