"""The architecture of a model (:class:`Config`), and its conversion from and to ``config.json``.

:class:`Config` holds the sizes and constants of the forward pass, and nothing about devices, dtypes or batches. Field
names are those of ``config.json``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from glm_jax.config_validation import is_number, type_problems, value_problems
from glm_jax.errors import ConfigError

LayerKind = Literal["dense", "sparse"]

# Keys without influence on the forward pass.
_IGNORED = frozenset(
    """architectures model_type dtype torch_dtype transformers_version use_cache initializer_range pretraining_tp
    bos_token_id attention_dropout output_router_logits router_aux_loss_coef num_key_value_heads max_length
    tokenizer_class is_decoder is_encoder_decoder add_cross_attention chunk_size_feed_forward id2label label2id
    problem_type return_dict output_hidden_states output_attentions auto_map quantization_config ep_size
    name_or_path _name_or_path sep_token_id cross_attention_hidden_size tf_legacy_loss task_specific_params
    quantization compression_config unsloth_fixed unsloth_version seq_aux aux_loss_alpha num_local_experts""".split()
)
_REQUIRED = """vocab_size hidden_size num_hidden_layers num_attention_heads kv_lora_rank qk_nope_head_dim
    qk_rope_head_dim v_head_dim intermediate_size moe_intermediate_size n_routed_experts num_experts_per_tok""".split()
# Keys that real files may lack, with the defaults of transformers' Glm4MoeLiteConfig.
_DEFAULTS: dict[str, Any] = {
    "q_lora_rank": 768,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.8,
    "num_nextn_predict_layers": 0,
    "rope_interleave": True,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 202_752,
    "tie_word_embeddings": False,
}
_NULLABLE = frozenset({"q_lora_rank"})  # null does not mean the default
_MAX_LAYERS = 1000
# Allowed values of keys that this architecture fixes; () marks keys that are checked elsewhere.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "scoring_func": ("sigmoid", None),
    "topk_method": ("noaux_tc", None),
    "moe_layer_freq": (1, None),
    "partial_rotary_factor": (1.0, 1, None),
    "first_k_dense_replace": (),
    "mlp_layer_types": (),
    "rope_theta": (),
    "rope_scaling": (),
    "rope_parameters": (),
    "head_dim": (),
    "qk_head_dim": (),
    "eos_token_id": (),
    "pad_token_id": (),
}


@dataclasses.dataclass(frozen=True, slots=True)
class LayerGroup:
    """Consecutive layers of one kind, whose parameters are stacked and which run as one scan.

    Attributes:
        kind: "dense" for a plain feed-forward, "sparse" for routed experts.
        start: Index of the first layer.
        count: Number of layers.
    """

    kind: LayerKind
    start: int
    count: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Architecture of a model. Frozen and hashable, so it can be a static argument of ``jax.jit``.

    Letters are axes of the glossary in ARCHITECTURE.md.

    Attributes:
        vocab_size: Rows of the embedding and the head (V).
        hidden_size: Width of the residual stream (D).
        num_hidden_layers: Number of layers (L), without the prediction layer.
        num_attention_heads: Number of attention heads (N).
        q_lora_rank: Width of the query latent (Q); None projects queries directly from the hidden state.
        kv_lora_rank: Width of the key/value latent (R), which the cache holds.
        qk_nope_head_dim: Width of the part of a query or key head without rotary embedding (Hn).
        qk_rope_head_dim: Width of the part with rotary embedding (P); even.
        v_head_dim: Width of a value head (Hv).
        intermediate_size: Width of the feed-forward in dense layers (I).
        moe_intermediate_size: Width of a routed expert (F).
        n_routed_experts: Number of routed experts in a sparse layer (E).
        num_experts_per_tok: Number of routed experts chosen for each token (X).
        mlp_layer_types: Kind of each layer, "dense" or "sparse".
        n_shared_experts: Number of experts that every token uses; they form one feed-forward of width
            ``n_shared_experts * moe_intermediate_size``.
        n_group: Number of groups into which the router divides the experts.
        topk_group: Number of groups from which a token's experts are chosen.
        norm_topk_prob: Whether the weights of the chosen experts are normalized to sum to 1.
        routed_scaling_factor: Factor on the weights of the chosen experts.
        num_nextn_predict_layers: Number of multi-token-prediction (MTP) layers, 0 or 1.
        rope_theta: Base of the rotary frequencies.
        rope_interleave: Whether the rotary embedding pairs neighboring features; if not, it pairs the two halves.
        rms_norm_eps: Epsilon of all norms except the two of ``latent_eps``.
        latent_eps: Epsilon of the ``q_a`` and ``kv_a`` norms inside the attention. transformers uses 1e-6; vLLM,
            SGLang and llama.cpp use ``rms_norm_eps``.
        max_position_embeddings: Longest supported context, in tokens.
        tie_word_embeddings: Whether the head is the embedding.
        eos_token_ids: Token ids that end a completion.
        pad_token_id: Token id for padding; None if the checkpoint has none.
        mtp_own_embeddings: Whether the prediction layer has an embedding and a head that differ from the model's.
        run_starts: Layers that begin a new layer group although their kind is that of the previous layer, because their
            weights are stored in another format. They affect the shapes of the stacked parameters only.

    Raises:
        ConfigError: if a value is invalid; the message names all problems.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    mlp_layer_types: tuple[LayerKind, ...]
    n_shared_experts: int = 1
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    num_nextn_predict_layers: int = 0
    rope_theta: float = 10_000.0
    rope_interleave: bool = True
    rms_norm_eps: float = 1e-5
    latent_eps: float = 1e-6
    max_position_embeddings: int = 202_752
    tie_word_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    mtp_own_embeddings: bool = False
    run_starts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        problems = type_problems(self) or value_problems(self)
        if problems:
            raise ConfigError("impossible config: " + "; ".join(problems))

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key head; its inverse square root is the softmax scale of attention."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache_width(self) -> int:
        """Values per token and layer in the cache: the normalized latent and the rotated key (R + P)."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def shared_width(self) -> int:
        """Width of the feed-forward that the shared experts form together."""
        return self.n_shared_experts * self.moe_intermediate_size

    @property
    def layer_groups(self) -> tuple[LayerGroup, ...]:
        """The layers in order, grouped into consecutive layers of one kind and weight storage.

        The parameters of each group are stacked along a leading layer axis.
        """
        groups: list[LayerGroup] = []
        for layer, kind in enumerate(self.mlp_layer_types):
            if groups and groups[-1].kind == kind and layer not in self.run_starts:
                groups[-1] = dataclasses.replace(groups[-1], count=groups[-1].count + 1)
            else:
                groups.append(LayerGroup(kind, layer, 1))
        return tuple(groups)

    def replace(self, **changes: Any) -> Config:
        """Returns a copy with some fields changed.

        Raises:
            ConfigError: if a new value is invalid.
        """
        return dataclasses.replace(self, **changes)

    @classmethod
    def flash(cls, *, layers: int = 47) -> Config:
        """The architecture of ``zai-org/GLM-4.7-Flash``, or of its first ``layers`` layers."""
        return cls(
            vocab_size=154_880,
            hidden_size=2048,
            num_hidden_layers=layers,
            num_attention_heads=20,
            q_lora_rank=768,
            kv_lora_rank=512,
            qk_nope_head_dim=192,
            qk_rope_head_dim=64,
            v_head_dim=256,
            intermediate_size=10_240,
            moe_intermediate_size=1536,
            n_routed_experts=64,
            num_experts_per_tok=4,
            mlp_layer_types=("dense",) + ("sparse",) * (layers - 1),
            routed_scaling_factor=1.8,
            num_nextn_predict_layers=1,
            rope_theta=1_000_000.0,
            eos_token_ids=(154_820, 154_827, 154_829),
            pad_token_id=154_820,
        )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], *, latent_eps: float | None = None) -> Config:
        """Reads a parsed ``config.json`` in any spelling that real checkpoints use.

        Args:
            config: Parsed file: the original, one saved again by transformers 5, or one written from scratch.
            latent_eps: Epsilon of the ``q_a`` and ``kv_a`` norms; 1e-6 by default, as in transformers.

        Raises:
            ConfigError: for another architecture, an unknown key, keys that contradict each other, or rope scaling.
        """
        config = _resolve_aliases(config)
        _check_keys(config)
        values = {key: config[key] for key in _REQUIRED}
        for key, default in _DEFAULTS.items():
            value = config.get(key, default)
            values[key] = default if value is None and key not in _NULLABLE else value
        return cls(
            **values,
            mlp_layer_types=_layer_types(config),
            rope_theta=_rope_theta(config),
            eos_token_ids=_token_ids(config.get("eos_token_id")),
            pad_token_id=config.get("pad_token_id"),
            latent_eps=1e-6 if latent_eps is None else latent_eps,
        )

    def to_hf(self) -> dict[str, Any]:
        """Returns the ``config.json`` of this model, in the spellings of both transformers and serving engines."""
        names = [*_REQUIRED, *_DEFAULTS]
        first_sparse = next(
            (i for i, kind in enumerate(self.mlp_layer_types) if kind == "sparse"), self.num_hidden_layers
        )
        is_dense_prefix = "dense" not in self.mlp_layer_types[first_sparse:]
        return {
            "architectures": ["Glm4MoeLiteForCausalLM"],
            "model_type": "glm4_moe_lite",
            **{name: getattr(self, name) for name in names},
            "num_key_value_heads": self.num_attention_heads,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "qk_head_dim": self.qk_head_dim,
            "mlp_layer_types": list(self.mlp_layer_types),
            **({"first_k_dense_replace": first_sparse} if is_dense_prefix else {}),
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta, "partial_rotary_factor": 1.0},
            "partial_rotary_factor": 1.0,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "eos_token_id": list(self.eos_token_ids) or None,
            "pad_token_id": self.pad_token_id,
        }


def _resolve_aliases(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Renames ``num_local_experts``, transformers' alias, to ``n_routed_experts``."""
    alias, experts = config.get("num_local_experts"), config.get("n_routed_experts")
    if alias is None:
        return config
    if experts is not None and experts != alias:
        raise ConfigError(f"n_routed_experts is {experts!r} and num_local_experts, its other name, is {alias!r}")
    return {**config, "n_routed_experts": alias}


def _check_keys(config: Mapping[str, Any]) -> None:
    model_type = config.get("model_type", "glm4_moe_lite")
    if model_type != "glm4_moe_lite":
        raise ConfigError(f"model_type is {model_type!r}; this stack runs glm4_moe_lite (GLM-4.7-Flash and relatives)")
    missing = [key for key in _REQUIRED if config.get(key) is None]
    if missing:
        raise ConfigError(f"config.json lacks {', '.join(missing)}")
    for key in _REQUIRED:
        _require_int(key, config[key])
    known = {*_REQUIRED, *_DEFAULTS, *_FIXED, *_IGNORED}
    # An unknown key that is null or false has no effect.
    unknown = [key for key, value in config.items() if key not in known and value is not None and value is not False]
    if unknown:
        raise ConfigError(f"config.json has keys this version does not understand: {', '.join(sorted(unknown))}")
    for key, allowed in _FIXED.items():
        if allowed and config.get(key, allowed[0]) not in allowed:
            raise ConfigError(f"{key} is {config[key]!r}; this architecture has {allowed[0]!r}")
    _check_head_dims(config)


def _check_head_dims(config: Mapping[str, Any]) -> None:
    rope, nope = config["qk_rope_head_dim"], config["qk_nope_head_dim"]
    # transformers writes the rope width as ``head_dim``; no size here depends on it.
    for key, expected in (("head_dim", (rope, rope + nope)), ("qk_head_dim", (rope + nope,))):
        if config.get(key) is not None and config[key] not in expected:
            raise ConfigError(
                f"{key} is {config[key]}, but qk_nope_head_dim {nope} and qk_rope_head_dim {rope} disagree"
            )


def _layer_types(config: Mapping[str, Any]) -> tuple[LayerKind, ...]:
    layers, kinds = config["num_hidden_layers"], config.get("mlp_layer_types")
    dense_count = config.get("first_k_dense_replace")
    if layers > _MAX_LAYERS:
        raise ConfigError(f"num_hidden_layers is {layers:,}; at most {_MAX_LAYERS:,} are understood")
    if dense_count is not None:
        _require_int("first_k_dense_replace", dense_count)
    first_sparse = 1 if dense_count is None else dense_count
    by_count: tuple[LayerKind, ...] = tuple("dense" if i < first_sparse else "sparse" for i in range(layers))
    if kinds is None:
        return by_count
    if not isinstance(kinds, (list, tuple)) or any(kind not in ("dense", "sparse") for kind in kinds):
        raise ConfigError(f"mlp_layer_types must list 'dense' or 'sparse' for each layer, not {kinds!r}")
    if dense_count is not None and tuple(kinds) != by_count:
        raise ConfigError(
            f"mlp_layer_types has {list(kinds).count('dense')} dense layers, first_k_dense_replace says {dense_count}: "
            "transformers follows the first, serving engines the second; correct config.json"
        )
    return tuple(kinds)


_ROPE_KEYS = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})


def _rope_theta(config: Mapping[str, Any]) -> float:
    scaling = config.get("rope_scaling") or {}
    parameters = config.get("rope_parameters") or {}
    for key, rope in (("rope_scaling", scaling), ("rope_parameters", parameters)):
        if not isinstance(rope, Mapping):
            raise ConfigError(f"{key} must be a dictionary or null, not {rope!r}")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise ConfigError(
                f"rope type {kind!r} is not supported: GLM-4.7-Flash has no rope scaling "
                "(its context is 202,752 tokens without it)"
            )
        unknown = [name for name, value in rope.items() if name not in _ROPE_KEYS and value is not None]
        if unknown:
            raise ConfigError(f"{key} has keys this version does not understand: {', '.join(sorted(unknown))}")
        if rope.get("partial_rotary_factor", 1.0) not in (1.0, None):
            raise ConfigError(f"partial_rotary_factor is {rope['partial_rotary_factor']}; this architecture has 1.0")
    stated = [part["rope_theta"] for part in (config, scaling, parameters) if part.get("rope_theta") is not None]
    for theta in stated:
        if not is_number(theta):
            raise ConfigError(f"rope_theta must be a number, not {theta!r}")
    thetas = {float(theta) for theta in stated} or {10_000.0}  # without any rope key: transformers' default
    if len(thetas) > 1:
        raise ConfigError(f"rope_theta and rope_parameters.rope_theta disagree: {sorted(thetas)}")
    return thetas.pop()


def _token_ids(value: Any) -> tuple[int, ...]:
    ids = [] if value is None else value if isinstance(value, (list, tuple)) else [value]
    for token in ids:
        _require_int("eos_token_id", token)
    return tuple(ids)


def _require_int(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ConfigError(f"{name} must be a non-negative integer, not {value!r}")
