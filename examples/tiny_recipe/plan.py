"""What is trained: the shape of the model and the schedule of the run, all in steps."""

from __future__ import annotations

import dataclasses

from examples.tiny_recipe.tokenizer import MODEL_VOCAB, SPECIAL_IDS
from glm_jax.config import Config


def tiny_config() -> Config:
    """The miniature: GLM-4.7-Flash with every size scaled down."""
    return Config(
        vocab_size=MODEL_VOCAB,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        q_lora_rank=128,
        kv_lora_rank=128,
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
        v_head_dim=32,
        intermediate_size=256,
        moe_intermediate_size=128,
        n_routed_experts=8,
        num_experts_per_tok=4,
        mlp_layer_types=("dense", "sparse", "sparse", "sparse"),
        routed_scaling_factor=1.8,
        num_nextn_predict_layers=1,
        rope_theta=10_000.0,
        max_position_embeddings=4096,
        eos_token_ids=tuple(SPECIAL_IDS[t] for t in ("<|endoftext|>", "<|user|>", "<|observation|>")),
        pad_token_id=SPECIAL_IDS["<|endoftext|>"],
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a batch and the positions of each."""

    count: int
    length: int

    @property
    def tokens(self) -> int:
        """Positions in all rows."""
        return self.count * self.length


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The schedule. Warm-up, constant rate, then a linear decay to zero over the last ``decay_steps``.

    Nothing before the decay depends on ``steps``, so a resumed run may still be given another length. The prediction
    layer joins at ``mtp_from``; rows of library code become longer at ``long_from``.
    """

    steps: int
    decay_steps: int
    mtp_from: int
    long_from: int
    warmup_steps: int = 40
    short: Rows = Rows(12, 256)
    long: Rows = Rows(6, 512)
    chat: Rows = Rows(2, 512)
    seed: int = 0
    matrix_rate: float = 0.02
    vector_rate: float = 0.003
    embed_factor: float = 4.0
    weight_decay: float = 0.05
    mtp_weight: float = 0.3
    bias_rate: float = 0.01
    prompt_weight: float = 0.1

    def code(self, step: int) -> Rows:
        """The rows of library code in a step."""
        return self.short if step < self.long_from else self.long

    def trains_mtp(self, step: int) -> bool:
        """Whether the prediction layer is part of a step."""
        return step >= self.mtp_from

    def code_rows(self, step: int) -> int:
        """Rows of library code, of the length of this step, read before it."""
        return step * self.short.count if step < self.long_from else (step - self.long_from) * self.long.count

    def tokens(self, step: int) -> int:
        """Tokens seen before a step, of all kinds."""
        before = min(step, self.long_from)
        return before * self.short.tokens + (step - before) * self.long.tokens + step * self.chat.tokens

    def rate(self, step: int) -> float:
        """The learning rate of a step as a share of the highest."""
        return max(0.0, min(1.0, (step + 1) / self.warmup_steps, (self.steps - step) / self.decay_steps))
