"""Quantized checkpoints of every format against transformers on their dequantized values."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from compressed_tensors import QuantizationConfig
from transformers import AutoModelForCausalLM

from convert.pipeline import convert_checkpoint
from glm_jax.checkpoint import load
from glm_jax.config import Config
from glm_jax.weights import QuantizedTensor, QuantRules, QuantSpec
from tests.builders import gguf_files, hf_checkpoints, quantized_checkpoints
from tests.builders.hf_configs import from_scratch_config, original_config, resaved_config
from tests.builders.jitted_model import JittedModel, is_close, random_tokens
from tests.builders.quantized_formats import FORMATS, FORMATS_BY_NAME, MLX_FORMAT, Array
from tests.parity import hf_models

LENGTH = 12
ALL = ("experts", "shared", "attention", "dense", "head", "mtp")


def variants() -> list[Any]:
    """Lists each format once; together they cover every choice of modules and spelling."""
    kinds = [("experts",), ALL[:3], ALL, ("experts", "attention"), ("shared", "dense")]
    spellings = [original_config, resaved_config, from_scratch_config]
    return [
        pytest.param(form, kinds[i % 5], spellings[i % 3], id=f"{form.name}-{'-'.join(kinds[i % 5])}")
        for i, form in enumerate((*FORMATS, MLX_FORMAT))
    ]


@pytest.mark.parametrize(("form", "kinds", "spelling"), variants())
def test_logits(form: Any, kinds: Sequence[str], spelling: Any, tmp_path: Path) -> None:
    pair = quantized_checkpoints.write_checkpoint_pair(tmp_path, form, kinds, spelling)
    cfg, params, _ = load(pair.quantized, dtype="float32")
    assert any(isinstance(leaf, QuantizedTensor) for leaf in _held(params))
    _check(pair.config, JittedModel(cfg, params), pair.dequantized)


def _held(tree: Any) -> list[Any]:
    return [leaf for value in tree.values() for leaf in (_held(value) if isinstance(value, dict) else [value])]


def _check(config: dict[str, Any], ours: JittedModel, plain: Path) -> None:
    ids = random_tokens(config, 2, LENGTH)
    assert is_close(
        ours.apply(ids, attention="expanded")[0], hf_models.compute_logits(hf_models.load_model(plain), ids)
    )


@pytest.mark.parametrize("name", ["compressed-tensors", "nvfp4"])
def test_prediction_layer(name: str, tmp_path: Path) -> None:
    """The quantized prediction layer gives the logits of the unquantized one, which other parity tests cover."""
    pair = quantized_checkpoints.write_checkpoint_pair(tmp_path, FORMATS_BY_NAME[name], ALL)
    ids, drafts = random_tokens(pair.config, 2, LENGTH), []
    for folder in (pair.quantized, pair.dequantized):
        cfg, params, _ = load(folder, dtype="float32")
        hidden = np.random.default_rng(9).standard_normal((2, LENGTH, cfg.hidden_size)).astype(np.float32)
        drafts.append(JittedModel(cfg, params).apply(hidden, ids, method="draft")[0])
    assert is_close(*drafts)


# GGUF types and the tensors that have them; K types need 256 inputs. Types without a quantizer get random blocks.
GGUF = {"Q8_0": 1, "Q4_0": 1, "F16": 1, "Q4_K": 8, "Q6_K": 8}


@pytest.mark.parametrize("kind", GGUF)
def test_gguf(kind: str, tmp_path: Path) -> None:
    """transformers gets the values that the gguf package dequantizes; kv_b is split into its halves."""
    sizes = {"moe_intermediate_size": 256, "intermediate_size": 256, "hidden_size": 256} if GGUF[kind] == 8 else {}
    config = original_config(**{**quantized_checkpoints.QUANTIZABLE_SIZES, "v_head_dim": 32, **sizes})
    tensors = hf_checkpoints.random_tensors(config, len(kind))
    made = gguf_files.to_gguf_tensors(tensors, config)
    packed = {name: _gguf_tensor(name, array, kind) for name, array in made.items()}
    values = {name: gguf_files.gguf_dequantize(t) if isinstance(t, tuple) else t for name, t in packed.items()}
    file = gguf_files.write_gguf(tmp_path / "model.gguf", packed, gguf_files.architecture_fields(config))
    cfg, params, _ = load(file, dtype="float32")
    plain = hf_checkpoints.write_checkpoint(tmp_path / "plain", config, _from_gguf(values, tensors, config))
    _check(config, JittedModel(cfg, params), plain)


def _gguf_tensor(name: str, array: Array, kind: str) -> Any:
    if array.ndim < 2 or "ffn_gate_inp" in name:
        return array
    if kind not in ("Q4_K", "Q6_K"):
        return gguf.quants.quantize(array, gguf.GGMLQuantizationType[kind]), kind
    if array.shape[-1] % 256:
        return array
    raw, _ = gguf_files.random_blocks(kind, array.shape, len(name))
    blocks = raw.reshape(-1, gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1])
    # With these scales the values are as large as those of a model.
    large = gguf_files.gguf_dequantize((raw, kind)).std() * array.shape[-1] ** 0.5
    for at in gguf_files.FLOAT16_OFFSETS[kind]:
        half = np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16)
        blocks[:, at : at + 2] = (half / large).astype(np.float16).view(np.uint8)
    return raw, kind


def _from_gguf(
    values: dict[str, Array], tensors: hf_checkpoints.Tensors, config: dict[str, Any]
) -> hf_checkpoints.Tensors:
    """Inverts `to_gguf_tensors` by sending the index of every value through it."""
    ends = np.cumsum([tensor.size for tensor in tensors.values()])
    numbers = {
        name: np.arange(end - tensor.size, end).reshape(tensor.shape)
        for end, (name, tensor) in zip(ends, tensors.items(), strict=True)
    }
    flat = np.empty(ends[-1], np.float32)
    for name, places in gguf_files.to_gguf_tensors(numbers, config).items():
        flat[places.reshape(-1)] = np.asarray(values[name], np.float32).reshape(-1)
    return {name: flat[places] for name, places in numbers.items()}


FLOAT4 = QuantSpec(kind="int4", block=(1, 32), scale="float32")
FLOAT8 = QuantSpec(kind="int8", block=(1, 0), scale="float32")
POINT4 = QuantSpec(kind="int4", block=(1, 32), scale="float32", zero="point")
DENSE = ("shared_experts", "dense_mlp", "attention", "head", "embedding")
EXPORTS = {
    "int4 and int8": QuantRules(experts=FLOAT4, **dict.fromkeys(DENSE, FLOAT8)),
    "int4": QuantRules(experts=FLOAT4, **dict.fromkeys(DENSE, FLOAT4)),
    "int8 experts": QuantRules(experts=FLOAT8),
    "no prediction layer": QuantRules(experts=FLOAT4, **dict.fromkeys(DENSE, FLOAT8), mtp=None),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_transformers_loads_our_export(name: str, tmp_path: Path) -> None:
    """transformers reads every weight of an export bit for bit, and gives the same logits."""
    folder, plain, config = _exported(tmp_path, EXPORTS[name])
    ids = random_tokens(config, 2, LENGTH)
    expected = hf_models.load_model(plain)
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    assert all(key.startswith("model.layers.2.") for key in report["unexpected_keys"])
    logits = hf_models.compute_logits(model.eval(), ids)  # the first call unpacks
    weights = model.state_dict()
    assert all(torch.equal(weights[key], tensor) for key, tensor in expected.state_dict().items())
    assert np.array_equal(logits, hf_models.compute_logits(expected, ids))


def _exported(tmp_path: Path, rules: QuantRules | str) -> tuple[Path, Path, dict[str, Any]]:
    """Exports a quantized checkpoint, and an unquantized one of the same values."""
    config = original_config(**quantized_checkpoints.QUANTIZABLE_SIZES)
    source = hf_checkpoints.write_checkpoint(tmp_path / "hf", config, hf_checkpoints.random_tensors(config, 7))
    convert_checkpoint(source, tmp_path / "ours", quantize=rules, method="rtn", dtype="float32")
    convert_checkpoint(tmp_path / "ours", tmp_path / "export", to="safetensors")
    cfg, params, _ = load(tmp_path / "ours", dtype="float32")
    values = {name: np.asarray(value, np.float32) for name, value in _named(params, cfg).items()}
    return tmp_path / "export", hf_checkpoints.write_checkpoint(tmp_path / "plain", config, values), config


def _named(params: Any, cfg: Config) -> hf_checkpoints.Tensors:
    """Returns checkpoint tensors of our parameters, by sending names through `to_params`."""
    shapes = hf_checkpoints.tensor_shapes(
        json.loads(json.dumps(cfg.to_hf())) | {"num_nextn_predict_layers": 0}, own_mtp=False
    )
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes.values()])
    numbers = {
        name: np.arange(end - int(np.prod(shape)), end).reshape(shape)
        for end, (name, shape) in zip(ends, shapes.items(), strict=True)
    }
    flat = np.empty(ends[-1], np.float32)
    main = cfg.replace(num_nextn_predict_layers=0)
    places = hf_checkpoints.to_params(numbers, main, np.int64)
    _scatter(flat, places, params)
    return {name: flat[at] for name, at in numbers.items()}


def _scatter(flat: Array, places: Any, params: Any) -> None:
    for key, at in places.items():
        if isinstance(at, dict):
            _scatter(flat, at, params[key])
        else:
            flat[at.astype(np.int64).reshape(-1)] = np.asarray(params[key], np.float32).reshape(-1)


@pytest.mark.parametrize("rules", ["int4", "int8", "int4-small", QuantRules(experts=POINT4, attention=POINT4)])
def test_compressed_tensors_reads_our_modules(rules: Any, tmp_path: Path) -> None:
    """compressed-tensors decompresses every packed module to our values, zero points included."""
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.utils.match import match_name

    folder, plain, _ = _exported(tmp_path, rules)
    section = json.loads((folder / "config.json").read_text())["quantization_config"]
    described = QuantizationConfig.model_validate(section)
    tensors, values = hf_checkpoints.read_tensors(folder), hf_checkpoints.read_tensors(plain)
    modules = [name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")]
    for module in modules:
        (scheme,) = (
            group
            for group in described.config_groups.values()
            if not isinstance(group, list) and any(match_name(module, target) for target in group.targets)
        )
        parts = {
            name.rpartition(".")[2]: _torch(tensor)
            for name, tensor in tensors.items()
            if name.startswith(f"{module}.weight")
        }
        weight = PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
        if not module.startswith("model.layers.2."):
            # compressed-tensors rounds to the dtype of the scales.
            assert torch.equal(weight, torch.from_numpy(values[f"{module}.weight"]).to(weight.dtype)), module
    assert len(modules) > 20


def _torch(array: Array) -> torch.Tensor:
    if array.dtype == hf_checkpoints.BFLOAT16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def test_an_export_of_a_download(tmp_path: Path) -> None:
    """A GPTQ checkpoint exported as compressed-tensors gives the same logits in transformers."""
    pair = quantized_checkpoints.write_checkpoint_pair(
        tmp_path, FORMATS_BY_NAME["gptq-symmetric"], ALL[:4], resaved_config
    )
    convert_checkpoint(pair.quantized, tmp_path / "out", to="safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, attn_implementation="eager")
    ids = random_tokens(pair.config, 2, LENGTH)
    cfg, params, _ = load(tmp_path / "out", dtype="float32")
    expected = hf_models.compute_logits(hf_models.load_model(pair.dequantized), ids)
    assert is_close(JittedModel(cfg, params).apply(ids)[0], expected)
    # transformers computes the experts' values in the dtype of their scales, float16.
    assert np.abs(hf_models.compute_logits(model.eval(), ids) - expected).max() <= 2e-3 * (1 + np.abs(expected).max())
