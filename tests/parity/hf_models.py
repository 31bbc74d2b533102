"""Models of transformers: random ones, forward passes with a cache, and the activations of each block."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM

from tests.parity.cases import ParityCase

Array = np.ndarray[Any, Any]


def build_random_model(case: ParityCase) -> Glm4MoeLiteForCausalLM:
    """Returns a float32 model with random parameters and buffers, norms around 1 and router biases around 0."""
    config = _with_explicit_layer_types(case.config)
    model = Glm4MoeLiteForCausalLM(Glm4MoeLiteConfig(**config))
    generator = torch.Generator().manual_seed(case.seed)
    for name, tensor in model.state_dict().items():
        tensor.copy_(_random_tensor(name, tensor.shape, generator))
        if name.endswith("e_score_correction_bias"):
            tensor += case.router_bias_shift
    return model.float().eval()


def _with_explicit_layer_types(config: dict[str, Any]) -> dict[str, Any]:
    """transformers ignores `first_k_dense_replace`, so the layer kinds are spelled out for it."""
    dense = config.get("first_k_dense_replace", 1)
    kinds = ["dense"] * dense + ["sparse"] * (config["num_hidden_layers"] - dense)
    return {"mlp_layer_types": kinds, **{k: v for k, v in config.items() if k not in ("architectures", "model_type")}}


def _random_tensor(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    values = torch.randn(shape, generator=generator)
    if name.endswith("e_score_correction_bias"):
        return 0.3 * values
    if "norm" in name:
        return 1 + 0.3 * values
    gain = 2.0 if name.endswith("mlp.gate.weight") else 1.0
    return gain * values / shape[-1] ** 0.5


def load_model(folder: Path, dtype: torch.dtype = torch.float32) -> Glm4MoeLiteForCausalLM:
    """Loads a folder in transformers, with eager attention and the layer kinds of its config.json."""
    config = Glm4MoeLiteConfig(**_with_explicit_layer_types(json.loads((folder / "config.json").read_text())))
    options: dict[str, Any] = {"attn_implementation": "eager", "dtype": dtype}
    return Glm4MoeLiteForCausalLM.from_pretrained(folder, config=config, **options).eval()


@torch.no_grad()
def compute_logits(model: Glm4MoeLiteForCausalLM, tokens: Array, lengths: Sequence[int] | None = None) -> Array:
    """Returns logits ``float32 [B, T, V]``; with `lengths`, sequences are padded on the right."""
    mask = None if lengths is None else torch.arange(tokens.shape[1])[None] < torch.tensor(lengths)[:, None]
    return model(torch.from_numpy(tokens).long(), attention_mask=mask).logits.float().numpy()


@torch.no_grad()
def greedy_tokens(model: Glm4MoeLiteForCausalLM, tokens: Sequence[int], count: int) -> list[int]:
    """Generates `count` greedy tokens with transformers' own cache."""
    cache = DynamicCache(config=model.config)
    out = model(torch.tensor([list(tokens)]), past_key_values=cache).logits[0, -1]
    new = [int(out.argmax())]
    while len(new) < count:
        new.append(int(model(torch.tensor([new[-1:]]), past_key_values=cache).logits[0, -1].argmax()))
    return new


@torch.no_grad()
def block_activations(model: Glm4MoeLiteForCausalLM, layer: int, x: Array) -> dict[str, Array]:
    """Returns a layer's activations for its input x [B, T, D]: attn, mlp or moe, moe.router, moe.experts, out."""
    seen: dict[str, Any] = {}
    module = model.model.layers[layer]
    parts = {"attn": module.self_attn}
    if model.config.mlp_layer_types[layer] == "dense":
        parts["mlp"] = module.mlp
    else:
        parts |= {"moe": module.mlp, "moe.router": module.mlp.gate, "moe.experts": module.mlp.experts}
    hooks = [part.register_forward_hook(_record_output(seen, name)) for name, part in parts.items()]
    hidden = torch.from_numpy(x)
    positions = torch.arange(x.shape[1])[None]
    causal = torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1)[None, None]
    rotary = model.model.rotary_emb(hidden, positions)
    seen["out"] = module(hidden, attention_mask=causal, position_ids=positions, position_embeddings=rotary)
    for hook in hooks:
        hook.remove()
    return _to_arrays(seen, model.config.n_routed_experts, x.shape)


def _record_output(seen: dict[str, Any], name: str) -> Callable[..., None]:
    def hook(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
        seen[name] = output

    return hook


def _to_arrays(seen: dict[str, Any], experts: int, shape: tuple[int, ...]) -> dict[str, Array]:
    """Returns hook outputs as [B, T, ...], and the router's weights as one column per expert."""
    out = {name: value for name, value in seen.items() if isinstance(value, torch.Tensor)}
    out["attn"] = seen["attn"][0]
    if "moe.router" in seen:
        _, weights, chosen = seen["moe.router"]
        out["moe.router"] = torch.zeros(len(weights), experts).scatter(1, chosen, weights)
    return {name: value.numpy().reshape(*shape[:2], -1) for name, value in out.items()}


def force_routing(model: Glm4MoeLiteForCausalLM, weights: dict[int, Array]) -> None:
    """Makes the routers of these layers return fixed combination weights [B, T, E]."""
    for layer, dense in weights.items():
        router: Any = model.model.layers[layer].mlp.gate
        chosen = torch.from_numpy(dense.reshape(-1, dense.shape[-1])).topk(router.top_k)
        router.register_forward_hook(lambda *_args, c=chosen: (None, c.values, c.indices))
