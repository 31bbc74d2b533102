"""Training batches as a pure function of the step, so that a resumed run needs no saved data position."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from examples.tiny_recipe.conversations import Conversation, Render, sample_conversation
from examples.tiny_recipe.schedule import BatchShape, Stage, TrainingSchedule
from examples.tiny_recipe.tokenizer import SPECIAL_IDS

# A row has two tokens more than positions: the last targets of the next-token loss and of the prediction layer.
TARGET_LOOKAHEAD = 2


class TokenBatch(NamedTuple):
    """A batch of rows: tokens ``int32 [B, T + 2]`` and their weights as targets ``float32 [B, T + 2]``."""

    tokens: np.ndarray
    weights: np.ndarray


class Batches:
    """The training batches of a schedule.

    Library files form one stream, each after ``<|endoftext|>``; its windows are read in a new random order in each
    epoch. Conversations are sampled anew for each step.
    """

    def __init__(self, plan: TrainingSchedule, tokenizer: Tokenizer, texts: Sequence[str], render: Render) -> None:
        start = SPECIAL_IDS["<|endoftext|>"]
        self._plan, self._tokenizer, self._render = plan, tokenizer, render
        encoded = tokenizer.encode_batch(list(texts))
        self._stream = np.concatenate([np.asarray([start, *e.ids], np.uint16) for e in encoded])
        self._order: tuple[tuple[int, int], np.ndarray] = ((0, 0), np.zeros(0, np.int64))

    @property
    def epoch_tokens(self) -> int:
        """Number of library tokens in one epoch."""
        return len(self._stream)

    def __call__(self, step: int) -> tuple[TokenBatch, TokenBatch]:
        """Returns the rows of library code and the rows of conversations of a step."""
        return self._code_rows(self._plan.code_rows_before(step), self._plan.stage(step).code), self._chat_rows(step)

    def _code_rows(self, first: int, rows: BatchShape) -> TokenBatch:
        tokens = np.stack([self._window(first + i, rows.length) for i in range(rows.count)])
        return TokenBatch(tokens.astype(np.int32), np.ones(tokens.shape, np.float32))

    def _window(self, number: int, length: int) -> np.ndarray:
        count = (self.epoch_tokens - TARGET_LOOKAHEAD) // length
        index = self._permutation(number // count, count)[number % count]
        return self._stream[index * length : index * length + length + TARGET_LOOKAHEAD]

    def _permutation(self, epoch: int, count: int) -> np.ndarray:
        if self._order[0] != (epoch, count):
            self._order = ((epoch, count), np.random.default_rng([self._plan.seed, epoch, count]).permutation(count))
        return self._order[1]

    def _chat_rows(self, step: int) -> TokenBatch:
        rng, stage = Random(f"chat {self._plan.seed} {step}"), self._plan.stage(step)
        rows = [self._chat_row(rng, stage) for _ in range(stage.chat.count)]
        tokens, weights = (np.stack(column) for column in zip(*rows, strict=True))
        return TokenBatch(tokens.astype(np.int32), weights)

    def _chat_row(self, rng: Random, stage: Stage) -> tuple[np.ndarray, np.ndarray]:
        size = stage.chat.length + TARGET_LOOKAHEAD
        tokens = np.full(size, SPECIAL_IDS["<|endoftext|>"], np.uint16)
        weights = np.zeros(size, np.float32)
        used = 0
        while True:
            conversation = sample_conversation(rng, stage.tool_share, stage.hard_share)
            ids, weight = encode_conversation(conversation, self._tokenizer, self._render, self._plan.prompt_weight)
            if used + len(ids) > size:
                if used:
                    return tokens, weights
                continue
            tokens[used : used + len(ids)], weights[used : used + len(ids)] = ids, weight
            used += len(ids)


def encode_conversation(
    conversation: Conversation, tokenizer: Tokenizer, render: Render, prompt_weight: float
) -> tuple[np.ndarray, np.ndarray]:
    """Encodes a conversation to token ids ``uint16 [T]`` and weights ``float32 [T]``.

    Tokens of the assistant, including the one that ends its turn, have weight 1; all others ``prompt_weight``.
    """
    ids = np.asarray(tokenizer.encode(conversation.text(render)).ids, np.uint16)
    is_answer = np.zeros(len(ids), bool)
    in_answer = False
    for i, token in enumerate(ids.tolist()):
        is_answer[i] = in_answer
        if token == SPECIAL_IDS["<|assistant|>"]:
            in_answer = True
        elif token in _OTHER_ROLES:
            in_answer = False
    return ids, np.where(is_answer, np.float32(1), np.float32(prompt_weight)).astype(np.float32)


_OTHER_ROLES = frozenset(SPECIAL_IDS[t] for t in ("<|user|>", "<|observation|>", "<|system|>"))
