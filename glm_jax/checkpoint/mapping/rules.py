"""The rule table: which checkpoint tensor fills which parameters, one rule per tensor, for reading and for export.

``matching.py`` applies the rules to names, and ``assignment.py`` to a whole checkpoint.
"""

from __future__ import annotations

import dataclasses

from glm_jax.checkpoint.folder.layout import MTP, NON_LAYER
from glm_jax.checkpoint.mapping.transforms import IDENTITY, MERGED_HEADS, TRANSPOSED, Transform


@dataclasses.dataclass(frozen=True, slots=True)
class TensorRule:
    """Rule for one kind of checkpoint tensor.

    Attributes:
        name: Name of the tensor without the prefix of its layer; ``{expert}`` stands for an expert's number.
        param_names: Names of the parameters that it fills, within their layer checkpoint.
        transform: Transform between the tensor and the parameters.
        is_exported: Whether exports use this name. Names that only other programs use are read, but never written.
    """

    name: str
    param_names: tuple[str, ...]
    transform: Transform = IDENTITY
    is_exported: bool = True

    @property
    def per_expert(self) -> bool:
        """Whether the checkpoint has one such tensor per expert."""
        return "{expert}" in self.name


def _swiglu(tensor_prefix: str, param_prefix: str) -> list[TensorRule]:
    return [
        TensorRule(f"{tensor_prefix}.{branch}_proj.weight", (f"{param_prefix}{branch}",))
        for branch in ("gate", "up", "down")
    ]


_NON_LAYER = [
    TensorRule("model.embed_tokens.weight", ("embed",)),
    TensorRule("model.norm.weight", ("norm",)),
    TensorRule("lm_head.weight", ("head",)),
]
_ATTENTION = [
    TensorRule("input_layernorm.weight", ("attn.norm",)),
    TensorRule("self_attn.q_a_proj.weight", ("attn.q_a",)),
    TensorRule("self_attn.q_a_layernorm.weight", ("attn.q_a_norm",)),
    TensorRule("self_attn.q_b_proj.weight", ("attn.q_b",)),
    TensorRule("self_attn.q_proj.weight", ("attn.q",)),
    TensorRule("self_attn.kv_a_proj_with_mqa.weight", ("attn.kv_a",)),
    TensorRule("self_attn.kv_a_layernorm.weight", ("attn.kv_a_norm",)),
    TensorRule("self_attn.kv_b_proj.weight", ("attn.k_b", "attn.v_b"), MERGED_HEADS),
    # MLX and GGUF store the two halves of kv_b_proj as separate tensors, the first of them transposed.
    TensorRule("self_attn.embed_q.weight", ("attn.k_b",), TRANSPOSED, is_exported=False),
    TensorRule("self_attn.unembed_out.weight", ("attn.v_b",), is_exported=False),
    TensorRule("self_attn.o_proj.weight", ("attn.o",)),
]
_DENSE = [*_ATTENTION, TensorRule("post_attention_layernorm.weight", ("mlp.norm",)), *_swiglu("mlp", "mlp.")]
_SPARSE = [
    *_ATTENTION,
    TensorRule("post_attention_layernorm.weight", ("moe.norm",)),
    TensorRule("mlp.gate.weight", ("moe.router",)),
    TensorRule("mlp.gate.e_score_correction_bias", ("moe.router_bias",)),
    *_swiglu("mlp.experts.{expert}", "moe."),
    TensorRule("mlp.experts.gate_up_proj", ("moe.gate", "moe.up"), is_exported=False),
    TensorRule("mlp.experts.down_proj", ("moe.down",), is_exported=False),
    # MLX and GGUF store the experts of a layer as one stack.
    *[
        TensorRule(f"mlp.switch_mlp.{branch}_proj.weight", (f"moe.{branch}",), is_exported=False)
        for branch in ("gate", "up", "down")
    ],
    *_swiglu("mlp.shared_experts", "moe.shared_"),
]
_MTP = [
    TensorRule("embed_tokens.weight", ("embed",)),
    TensorRule("enorm.weight", ("enorm",)),
    TensorRule("hnorm.weight", ("hnorm",)),
    TensorRule("eh_proj.weight", ("eh_proj",)),
    *_SPARSE,
    TensorRule("shared_head.norm.weight", ("norm",)),
    TensorRule("shared_head.head.weight", ("head",)),
]
TENSOR_RULES: dict[str, tuple[TensorRule, ...]] = {
    NON_LAYER: tuple(_NON_LAYER),
    "dense": tuple(_DENSE),
    "sparse": tuple(_SPARSE),
    MTP: tuple(_MTP),
}
