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
    """The schedule: a main stage of ``steps`` and a finishing one of ``finish_steps``.

    The main stage warms up, keeps the rate, and lowers it to zero over its last ``decay_steps``. Nothing before
    the decay depends on ``steps``, so a resumed run may still be given another length. The prediction layer joins at
    ``mtp_from``; rows of library code become longer at ``long_from``. The finishing stage is mostly conversations, at
    ``finish_rate`` of the highest rate falling to zero.
    """

    steps: int
    decay_steps: int
    mtp_from: int
    long_from: int
    finish_steps: int = 0
    warmup_steps: int = 40
    short: Rows = Rows(12, 256)
    long: Rows = Rows(6, 512)
    chat: Rows = Rows(2, 512)
    finish_code: Rows = Rows(2, 512)
    finish_chat: Rows = Rows(6, 512)
    tool_share: float = 0.12
    finish_tool_share: float = 0.06
    seed: int = 0
    matrix_rate: float = 0.02
    vector_rate: float = 0.003
    finish_rate: float = 0.6
    embed_factor: float = 4.0
    weight_decay: float = 0.05
    mtp_weight: float = 0.3
    bias_rate: float = 0.01
    prompt_weight: float = 0.1

    @property
    def total_steps(self) -> int:
        """Steps of both stages."""
        return self.steps + self.finish_steps

    def finishing(self, step: int) -> bool:
        """Whether a step belongs to the finishing stage."""
        return step >= self.steps

    def code(self, step: int) -> Rows:
        """The rows of library code in a step."""
        if self.finishing(step):
            return self.finish_code
        return self.short if step < self.long_from else self.long

    def conversations(self, step: int) -> Rows:
        """The rows of conversations in a step."""
        return self.finish_chat if self.finishing(step) else self.chat

    def trains_mtp(self, step: int) -> bool:
        """Whether the prediction layer is part of a step."""
        return step >= self.mtp_from

    def code_rows(self, step: int) -> int:
        """Rows of library code, of the length of this step, read before it."""
        return sum(self.code(s).count for s in range(step) if self.code(s).length == self.code(step).length)

    def tokens(self, step: int) -> int:
        """Tokens seen before a step, of all kinds."""
        return sum(self.code(s).tokens + self.conversations(s).tokens for s in range(step))

    def rate(self, step: int) -> float:
        """The learning rate of a step as a share of the highest."""
        if self.finishing(step):
            return self.finish_rate * (self.total_steps - step) / self.finish_steps
        return max(0.0, min(1.0, (step + 1) / self.warmup_steps, (self.steps - step) / self.decay_steps))
