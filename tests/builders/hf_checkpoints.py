"""Small Hugging Face checkpoints for tests: random tensors, files, and the parameter tree that they make.

`to_params` maps tensors to the parameter tree without our code, so it also checks the loader.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors.numpy

from glm_jax.config import Config
from tests.builders.hf_configs import layer_kinds

Tensors = dict[str, np.ndarray[Any, Any]]


def tensor_shapes(config: Mapping[str, Any], *, own_mtp: bool = True) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor; `own_mtp` adds the prediction layer's own embedding and head."""
    wide, vocab = config["hidden_size"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, wide), "model.norm.weight": (wide,)}
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (vocab, wide)
    for layer, kind in enumerate(layer_kinds(config)):
        parts = _norm_shapes(config) | _attention_shapes(config)
        parts |= _swiglu_shapes("mlp", wide, config["intermediate_size"]) if kind == "dense" else _moe_shapes(config)
        if kind == "mtp":
            parts |= _mtp_shapes(config, own_mtp)
        shapes |= {_full_name(layer, part): shape for part, shape in parts.items()}
    return shapes


def _full_name(layer: int, part: str) -> str:
    return f"model.layers.{layer}.{part}" + ("" if part.endswith("_bias") else ".weight")


def _norm_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (config["hidden_size"],))


def _attention_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    c, wide, heads, low = config, config["hidden_size"], config["num_attention_heads"], config["q_lora_rank"]
    rank, nope, rope, value = (
        c["kv_lora_rank"],
        c["qk_nope_head_dim"],
        c["qk_rope_head_dim"],
        c["v_head_dim"],
    )
    queries: dict[str, tuple[int, ...]] = {"q_proj": (heads * (nope + rope), wide)}
    if low is not None:
        queries = {"q_a_proj": (low, wide), "q_a_layernorm": (low,), "q_b_proj": (heads * (nope + rope), low)}
    rest: dict[str, tuple[int, ...]] = {
        "kv_a_proj_with_mqa": (rank + rope, wide),
        "kv_a_layernorm": (rank,),
        "kv_b_proj": (heads * (nope + value), rank),
        "o_proj": (wide, heads * value),
    }
    return {f"self_attn.{name}": shape for name, shape in (queries | rest).items()}


def _swiglu_shapes(name: str, wide: int, inner: int) -> dict[str, tuple[int, ...]]:
    shapes = {"gate": (inner, wide), "up": (inner, wide), "down": (wide, inner)}
    return {f"{name}.{part}_proj": shape for part, shape in shapes.items()}


def _moe_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    wide, inner, experts = config["hidden_size"], config["moe_intermediate_size"], config["n_routed_experts"]
    shapes: dict[str, tuple[int, ...]] = {
        "mlp.gate": (experts, wide),
        "mlp.gate.e_score_correction_bias": (experts,),
    }
    for expert in range(experts):
        shapes |= _swiglu_shapes(f"mlp.experts.{expert}", wide, inner)
    shared = config["n_shared_experts"]
    return shapes | (_swiglu_shapes("mlp.shared_experts", wide, inner * shared) if shared else {})


def _mtp_shapes(config: Mapping[str, Any], own: bool) -> dict[str, tuple[int, ...]]:
    wide, vocab = config["hidden_size"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("enorm", "hnorm", "shared_head.norm"), (wide,))
    shapes["eh_proj"] = (wide, 2 * wide)
    return shapes | ({"embed_tokens": (vocab, wide), "shared_head.head": (vocab, wide)} if own else {})


def random_tensors(config: Mapping[str, Any], seed: int, *, own_mtp: bool = False, dtype: Any = np.float32) -> Tensors:
    """Returns random tensors with non-trivial norms and router biases; their logits have about unit size.

    Without `own_mtp` the prediction layer's embedding and head are copies of the main ones, as in the original.
    """
    rng = np.random.default_rng(seed)
    tensors = {n: _random_tensor(rng, n, s, dtype) for n, s in tensor_shapes(config).items()}
    if not own_mtp and config.get("num_nextn_predict_layers", 0):
        mtp = f"model.layers.{config['num_hidden_layers']}"
        head = "lm_head.weight" if "lm_head.weight" in tensors else "model.embed_tokens.weight"
        tensors[f"{mtp}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
        tensors[f"{mtp}.shared_head.head.weight"] = tensors[head]
    return tensors


def _random_tensor(rng: np.random.Generator, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
    values = rng.standard_normal(shape)
    if name.endswith("e_score_correction_bias"):
        return (0.3 * values).astype(np.float32)
    if "norm" in name:
        return (1 + 0.3 * values).astype(dtype)
    gain = 2.0 if name.endswith("mlp.gate.weight") else 1.0
    return (gain * values / np.sqrt(shape[-1])).astype(dtype)


def write_checkpoint(folder: Path, config: Mapping[str, Any], tensors: Tensors, *, shards: int = 2) -> Path:
    """Writes a Hugging Face folder: config.json, and `shards` safetensors files with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2))
    names = sorted(tensors)
    files = {f"model-{i + 1:05d}-of-{shards:05d}.safetensors": names[i::shards] for i in range(shards)}
    for file, members in files.items():
        safetensors.numpy.save_file({n: tensors[n] for n in members}, folder / file, metadata={"format": "pt"})
    index = {n: file for file, members in files.items() for n in members}
    total = sum(t.nbytes for t in tensors.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


def read_tensors(folder: Path) -> Tensors:
    """Reads every tensor of a folder's safetensors files."""
    tensors: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= safetensors.numpy.load_file(file)
    return tensors


def to_params(tensors: Mapping[str, Any], cfg: Config, dtype: Any = np.float32) -> dict[str, Any]:
    """Maps a checkpoint's tensors to the parameter tree, as NumPy arrays."""
    params: dict[str, Any] = {"embed": tensors["model.embed_tokens.weight"], "norm": tensors["model.norm.weight"]}
    if not cfg.tie_word_embeddings:
        params["head"] = tensors["lm_head.weight"]
    params["runs"] = {
        str(i): _block_params(tensors, cfg, range(run.start, run.start + run.count), run.kind)
        for i, run in enumerate(cfg.layer_groups)
    }
    if cfg.num_nextn_predict_layers:
        params["mtp"] = _mtp_params(tensors, cfg)
    return _cast(params, dtype)


def _cast(tree: dict[str, Any], dtype: Any) -> dict[str, Any]:
    return {
        key: _cast(value, dtype)
        if isinstance(value, dict)
        else np.asarray(value).astype(np.float32 if key == "router_bias" else dtype)
        for key, value in tree.items()
    }


def _mtp_params(tensors: Mapping[str, Any], cfg: Config) -> dict[str, Any]:
    layer = cfg.num_hidden_layers
    name = f"model.layers.{layer}"
    own = {"norm": "shared_head.norm", "enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj"}
    if cfg.mtp_own_embeddings:
        own |= {"embed": "embed_tokens", "head": "shared_head.head"}
    block = _block_params(tensors, cfg, range(layer, layer + 1), "sparse")
    return {key: tensors[f"{name}.{part}.weight"] for key, part in own.items()} | block


def _block_params(tensors: Mapping[str, Any], cfg: Config, members: range, kind: str) -> dict[str, Any]:
    def stack(name: str) -> np.ndarray[Any, Any]:
        return np.stack([tensors[f"model.layers.{i}.{name}"] for i in members])

    def experts(part: str) -> np.ndarray[Any, Any]:
        return np.stack([stack(f"mlp.experts.{e}.{part}_proj.weight") for e in range(cfg.n_routed_experts)], axis=1)

    attn = {"norm": "input_layernorm"} | {
        ours: f"self_attn.{theirs}"
        for ours, theirs in {
            "kv_a": "kv_a_proj_with_mqa",
            "kv_a_norm": "kv_a_layernorm",
            "o": "o_proj",
            **({"q": "q_proj"} if cfg.q_lora_rank is None else {}),
            **({} if cfg.q_lora_rank is None else {"q_a": "q_a_proj", "q_a_norm": "q_a_layernorm", "q_b": "q_b_proj"}),
        }.items()
    }
    out: dict[str, Any] = {"attn": {key: stack(f"{name}.weight") for key, name in attn.items()}}
    both = stack("self_attn.kv_b_proj.weight")
    both = both.reshape(len(members), cfg.num_attention_heads, -1, cfg.kv_lora_rank)
    out["attn"] |= {"k_b": both[:, :, : cfg.qk_nope_head_dim], "v_b": both[:, :, cfg.qk_nope_head_dim :]}
    norm = stack("post_attention_layernorm.weight")
    parts = ("gate", "up", "down")
    if kind == "dense":
        return out | {"mlp": {"norm": norm} | {part: stack(f"mlp.{part}_proj.weight") for part in parts}}
    shared_parts = parts if cfg.n_shared_experts else ()
    shared = {f"shared_{part}": stack(f"mlp.shared_experts.{part}_proj.weight") for part in shared_parts}
    router = {"router": stack("mlp.gate.weight"), "router_bias": stack("mlp.gate.e_score_correction_bias")}
    return out | {"moe": {"norm": norm} | router | {part: experts(part) for part in parts} | shared}


def to_device(params: Any) -> Any:
    """Returns the same tree with JAX arrays."""
    return jax.tree.map(jnp.asarray, params)


BFLOAT16 = ml_dtypes.bfloat16
