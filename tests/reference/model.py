"""The whole model and the MTP layer in NumPy, from Hugging Face tensors."""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, Literal

import numpy as np

from tests.reference import layers
from tests.reference.layers import Array

AttentionForm = Literal["expanded", "absorbed"]
ActivationRecord = MutableMapping[str, Array]
Edits = Mapping[str, Callable[[Array], Array]]


class ReferenceModel:
    """One checkpoint's model. Activations are [T, D] of one sequence; a cache has one [S, R + P] array per layer."""

    def __init__(
        self,
        tensors: Mapping[str, Array],
        config: Mapping[str, Any],
        *,
        dtype: Any = np.float64,
        latent_eps: float = 1e-6,
    ) -> None:
        self.dtype = np.dtype(dtype)
        self.tensors = {name: np.asarray(value).astype(self.dtype) for name, value in tensors.items()}
        self.config: dict[str, Any] = {
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "n_shared_experts": 1,
            **config,
        }
        self.layers: int = config["num_hidden_layers"]
        self.kinds = layer_kinds(config)
        self.theta = rope_theta(config)
        self.latent_eps = latent_eps
        self.record: ActivationRecord | None = None
        self.edits: Edits = {}

    # -- interface ----------------------------------------------------------------------------------------

    def empty_cache(self) -> list[Array]:
        """Returns a cache without positions; the last entry belongs to the prediction layer."""
        width = self.config["kv_lora_rank"] + self.config["qk_rope_head_dim"]
        return [np.zeros((0, width), self.dtype) for _ in range(self.layers + 1)]

    def hidden(
        self,
        tokens: Sequence[int] | Array,
        cache: list[Array] | None = None,
        *,
        form: AttentionForm = "expanded",
        record: ActivationRecord | None = None,
        edits: Edits | None = None,
    ) -> Array:
        """Hidden states after the final norm [T, D]; the positions follow those in `cache`, which is extended."""
        self.record, self.edits = record, edits or {}
        cache = self.empty_cache() if cache is None else cache
        h = self._hook("embed", self.tensors["model.embed_tokens.weight"][np.asarray(tokens)])
        for layer, kind in enumerate(self.kinds):
            h, cache[layer] = self._block(layer, kind, h, cache[layer], form)
        return self._hook("norm", self._norm("model.norm", h))

    def head(self, hidden: Array) -> Array:
        """Logits [T, V]."""
        tied = self.config.get("tie_word_embeddings", False)
        return layers.linear(hidden, self.tensors["model.embed_tokens.weight" if tied else "lm_head.weight"])

    def logits(self, tokens: Sequence[int] | Array, cache: list[Array] | None = None, **options: Any) -> Array:
        """Logits [T, V] of every position; the options are those of `hidden`."""
        return self.head(self.hidden(tokens, cache, **options))

    def greedy(self, tokens: Sequence[int] | Array, count: int) -> list[int]:
        """Generates `count` greedy tokens after the prompt, with the absorbed form and the cache."""
        cache = self.empty_cache()
        new = [int(np.argmax(self.logits(tokens, cache)[-1]))]
        while len(new) < count:
            new.append(int(np.argmax(self.logits(new[-1:], cache, form="absorbed")[-1])))
        return new

    def draft(
        self,
        hidden: Array,
        next_tokens: Sequence[int] | Array,
        cache: list[Array] | None = None,
        *,
        form: AttentionForm = "expanded",
    ) -> tuple[Array, Array]:
        """MTP: from hidden (after the final norm) of position p and token p+1, (logits [T, V] for p+2, state [T, D]).

        The state is the one after the shared head's norm, which a second draft step takes as its hidden.
        """
        self.record, self.edits = None, {}
        cache = self.empty_cache() if cache is None else cache
        own = f"model.layers.{self.layers}"
        embedding = self._first_present(f"{own}.embed_tokens.weight", "model.embed_tokens.weight")
        token = self._norm(f"{own}.enorm", embedding[np.asarray(next_tokens)])
        state = self._norm(f"{own}.hnorm", hidden)
        mixed = layers.linear(np.concatenate([token, state], axis=-1), self.tensors[f"{own}.eh_proj.weight"])
        mixed, cache[self.layers] = self._block(self.layers, "sparse", mixed, cache[self.layers], form)
        out = self._norm(f"{own}.shared_head.norm", mixed)
        head = f"{own}.shared_head.head.weight"
        return (layers.linear(out, self.tensors[head]) if head in self.tensors else self.head(out)), out

    # -- parts ----------------------------------------------------------------------------------------------------

    def _block(self, layer: int, kind: str, h: Array, latent: Array, form: AttentionForm) -> tuple[Array, Array]:
        name, tensor = f"block.{layer}", f"model.layers.{layer}"
        h = self._hook(f"{name}.in", h)
        attended, latent = self.attention(layer, self._norm(f"{tensor}.input_layernorm", h), latent, form)
        h = h + self._hook(f"{name}.attn", attended)
        x = self._norm(f"{tensor}.post_attention_layernorm", h)
        if kind == "dense":
            h = h + self._hook(f"{name}.mlp", self._swiglu(f"{tensor}.mlp", x))
        else:
            h = h + self._hook(f"{name}.moe", self.moe(layer, x))
        return self._hook(f"{name}.out", h), latent

    def attention(self, layer: int, x: Array, latent: Array, form: AttentionForm = "expanded") -> tuple[Array, Array]:
        """Attention of normed input x [T, D]: (output [T, D], the cache with the new positions)."""
        c, name = self.config, f"model.layers.{layer}.self_attn"
        heads, nope, rank = c["num_attention_heads"], c["qk_nope_head_dim"], c["kv_lora_rank"]
        start = len(latent)
        positions = np.arange(start, start + len(x))
        interleave = c.get("rope_interleave", True)
        q = self._queries(name, x).reshape(len(x), heads, nope + c["qk_rope_head_dim"])
        q[..., nope:] = layers.apply_rope(q[..., nope:], positions, self.theta, interleave)
        new = layers.linear(x, self.tensors[f"{name}.kv_a_proj_with_mqa.weight"])
        content = self._norm(f"{name}.kv_a_layernorm", new[:, :rank], self.latent_eps)
        turned = layers.apply_rope(new[:, rank:], positions, self.theta, interleave)
        latent = np.concatenate([latent, np.concatenate([content, turned], axis=-1)])
        both = self.tensors[f"{name}.kv_b_proj.weight"].reshape(heads, nope + c["v_head_dim"], rank)
        attend = layers.attend_expanded if form == "expanded" else layers.attend_absorbed
        out = attend(q, latent, both[:, :nope], both[:, nope:], rank, start)
        return layers.linear(out.reshape(len(x), -1), self.tensors[f"{name}.o_proj.weight"]), latent

    def _queries(self, name: str, x: Array) -> Array:
        if self.config["q_lora_rank"] is None:
            return layers.linear(x, self.tensors[f"{name}.q_proj.weight"])
        low = layers.linear(x, self.tensors[f"{name}.q_a_proj.weight"])
        low = self._norm(f"{name}.q_a_layernorm", low, self.latent_eps)
        return layers.linear(low, self.tensors[f"{name}.q_b_proj.weight"])

    def moe(self, layer: int, x: Array) -> Array:
        """Routed plus shared experts of normed input x [T, D]."""
        name, mlp = f"block.{layer}.moe", f"model.layers.{layer}.mlp"
        logits = layers.linear(x, self.tensors[f"{mlp}.gate.weight"])
        weights = layers.route(logits, self.tensors[f"{mlp}.gate.e_score_correction_bias"], self.config)
        weights = self._hook(f"{name}.router", weights)
        routed = np.zeros_like(x)
        for expert in np.flatnonzero(weights.any(axis=0)):
            routed += weights[:, expert, None] * self._swiglu(f"{mlp}.experts.{expert}", x)
        routed = self._hook(f"{name}.experts", routed)
        return routed + self._swiglu(f"{mlp}.shared_experts", x) if self.config["n_shared_experts"] else routed

    def _swiglu(self, name: str, x: Array) -> Array:
        gate, up, down = (self.tensors[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))
        return layers.swiglu(x, gate, up, down)

    def _norm(self, name: str, x: Array, eps: float | None = None) -> Array:
        return layers.rms_norm(x, self.tensors[f"{name}.weight"], self.config["rms_norm_eps"] if eps is None else eps)

    def _first_present(self, first: str, second: str) -> Array:
        return self.tensors[first if first in self.tensors else second]

    def _hook(self, name: str, value: Array) -> Array:
        """Edits a named activation if there is an edit for it, then records it."""
        if name in self.edits:
            value = self.edits[name](value)
        if self.record is not None:
            self.record[name] = value.copy()
        return value


def layer_kinds(config: Mapping[str, Any]) -> list[str]:
    """ "dense" or "sparse" for each layer: `mlp_layer_types`, else `first_k_dense_replace`, else one dense layer."""
    if config.get("mlp_layer_types") is not None:
        return list(config["mlp_layer_types"])
    dense, layers_ = config.get("first_k_dense_replace", 1), config["num_hidden_layers"]
    return ["dense"] * dense + ["sparse"] * (layers_ - dense)


def rope_theta(config: Mapping[str, Any]) -> float:
    """The rotary base from either spelling."""
    parameters = config.get("rope_parameters") or {}
    return float(parameters.get("rope_theta", config.get("rope_theta", 10000.0)))
