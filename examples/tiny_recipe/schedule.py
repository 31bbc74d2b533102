"""The architecture of the miniature and the training schedule."""

from __future__ import annotations

import dataclasses

from examples.tiny_recipe.tokenizer import MODEL_VOCAB, SPECIAL_IDS
from glm_jax.config import Config


def tiny_config() -> Config:
    """The architecture of the miniature: GLM-4.7-Flash with every size scaled down."""
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
class BatchShape:
    """Number of rows in a batch, and length of each row in tokens."""

    count: int
    length: int

    @property
    def tokens(self) -> int:
        """Number of tokens in all rows."""
        return self.count * self.length


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A stage of the training: the batches and weights of the steps from ``start`` on.

    Attributes:
        start: First step of the stage.
        code: Rows of library code in each batch.
        chat: Rows of conversations in each batch.
        mtp: Whether the prediction layer is trained.
        tool_share: Share of conversations that are about tools.
        hard_share: Share of questions that are sampled from the hard kinds only.
        chat_weight: Weight of the mean loss over conversations; library code has the rest.
    """

    start: int
    code: BatchShape
    chat: BatchShape
    mtp: bool = True
    tool_share: float = 0.06
    hard_share: float = 0.0
    chat_weight: float = 0.5

    @property
    def tokens(self) -> int:
        """Number of tokens in all rows."""
        return self.code.tokens + self.chat.tokens


STAGES = (
    Stage(start=0, code=BatchShape(6, 256), chat=BatchShape(4, 384), mtp=False),
    Stage(start=1000, code=BatchShape(6, 256), chat=BatchShape(4, 384)),
    Stage(start=1400, code=BatchShape(3, 512), chat=BatchShape(4, 384)),
    Stage(start=1500, code=BatchShape(2, 512), chat=BatchShape(6, 384), tool_share=0.1, chat_weight=0.7),
    Stage(
        start=1850, code=BatchShape(2, 512), chat=BatchShape(6, 384), tool_share=0.1, chat_weight=0.7, hard_share=0.6
    ),
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSchedule:
    """The training schedule: the learning rate warms up, stays constant, and decays linearly to zero.

    Nothing before the decay depends on ``steps``, so a resumed run may continue to a different length.

    Attributes:
        steps: Number of training steps.
        decay_steps: Number of last steps over which the learning rate decays.
        stages: Stages in order of their first step.
        warmup_steps: Number of first steps over which the learning rate rises.
        seed: Seed of the parameters and the data.
        matrix_rate: Highest learning rate of Muon, for matrices.
        vector_rate: Highest learning rate of Adam, for all other parameters.
        embed_factor: Factor on the learning rate of the embedding.
        weight_decay: Weight decay of the matrices.
        mtp_weight: Weight of the prediction layer's loss.
        bias_rate: Highest change of a router bias per step.
        prompt_weight: Weight of prompt tokens in the loss; answer tokens have 1.
    """

    steps: int
    decay_steps: int
    stages: tuple[Stage, ...] = STAGES
    warmup_steps: int = 40
    seed: int = 0
    matrix_rate: float = 0.02
    vector_rate: float = 0.003
    embed_factor: float = 4.0
    weight_decay: float = 0.05
    mtp_weight: float = 0.3
    bias_rate: float = 0.01
    prompt_weight: float = 0.1

    def stage(self, step: int) -> Stage:
        """The stage of a step."""
        return next(stage for stage in reversed(self.stages) if stage.start <= step)

    def code_rows_before(self, step: int) -> int:
        """Number of rows of library code read before a step, among those as long as the step's."""
        length = self.stage(step).code.length
        return sum(stage.code.count * steps for stage, steps in self._before(step) if stage.code.length == length)

    def tokens_before(self, step: int) -> int:
        """Number of tokens seen before a step."""
        return sum(stage.tokens * steps for stage, steps in self._before(step))

    def _before(self, step: int) -> list[tuple[Stage, int]]:
        """Each stage and the number of its steps before this step."""
        ends = [*(stage.start for stage in self.stages[1:]), step]
        return [(s, max(0, min(end, step) - s.start)) for s, end in zip(self.stages, ends, strict=True)]

    def learning_rate_scale(self, step: int) -> float:
        """The learning rate of a step as a fraction of the highest."""
        return max(0.0, min(1.0, (step + 1) / self.warmup_steps, (self.steps - step) / self.decay_steps))
