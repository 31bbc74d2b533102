"""Batches as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from examples.tiny_recipe.conversations import Conversation, Render, sample_conversation
from examples.tiny_recipe.schedule import BatchShape, Stage, TrainingSchedule
from examples.tiny_recipe.tokenizer import SPECIAL_IDS

# A row carries two tokens more than it has positions: the next-token target and the one after it for the MTP layer.
TARGET_LOOKAHEAD = 2


class TokenBatch(NamedTuple):
    """Rows of one length: tokens int32 [B, T+2] and the weight float32 [B, T+2] of each as a target."""

    tokens: np.ndarray
    weights: np.ndarray


class Batches:
    """The training batches of a plan.

    Library files follow each other in one stream, ``<|endoftext|>`` before each; its windows are read in a new random
    order in each pass. Rows of conversations are drawn for the step, so no conversation comes back.
    """

    def __init__(self, plan: TrainingSchedule, tokenizer: Tokenizer, texts: Sequence[str], render: Render) -> None:
        start = SPECIAL_IDS["<|endoftext|>"]
        self._plan, self._tokenizer, self._render = plan, tokenizer, render
        encoded = tokenizer.encode_batch(list(texts))
        self._stream = np.concatenate([np.asarray([start, *e.ids], np.uint16) for e in encoded])
        self._order: tuple[tuple[int, int], np.ndarray] = ((0, 0), np.zeros(0, np.int64))

    @property
    def epoch_tokens(self) -> int:
        """Library tokens in one pass."""
        return len(self._stream)

    def __call__(self, step: int) -> tuple[TokenBatch, TokenBatch]:
        """The library code and the conversations of a step."""
        return self._code_rows(self._plan.code_rows_before(step), self._plan.stage(step).code), self._chat_rows(step)

    def _code_rows(self, first: int, rows: BatchShape) -> TokenBatch:
        tokens = np.stack([self._window(first + i, rows.length) for i in range(rows.count)])
        return TokenBatch(tokens.astype(np.int32), np.ones(tokens.shape, np.float32))

    def _window(self, number: int, length: int) -> np.ndarray:
        count = (self.epoch_tokens - TARGET_LOOKAHEAD) // length
        place = self._permutation(number // count, count)[number % count]
        return self._stream[place * length : place * length + length + TARGET_LOOKAHEAD]

    def _permutation(self, number: int, count: int) -> np.ndarray:
        if self._order[0] != (number, count):
            self._order = ((number, count), np.random.default_rng([self._plan.seed, number, count]).permutation(count))
        return self._order[1]

    def _chat_rows(self, step: int) -> TokenBatch:
        rng, stage = Random(f"chat {self._plan.seed} {step}"), self._plan.stage(step)
        drawn = [self._chat_row(rng, stage) for _ in range(stage.chat.count)]
        tokens, weights = (np.stack(part) for part in zip(*drawn, strict=True))
        return TokenBatch(tokens.astype(np.int32), weights)

    def _chat_row(self, rng: Random, stage: Stage) -> tuple[np.ndarray, np.ndarray]:
        size = stage.chat.length + TARGET_LOOKAHEAD
        tokens = np.full(size, SPECIAL_IDS["<|endoftext|>"], np.uint16)
        weights = np.zeros(size, np.float32)
        used = 0
        while True:
            drawn = sample_conversation(rng, stage.tool_share, stage.hard_share)
            ids, weight = encode_conversation(drawn, self._tokenizer, self._render, self._plan.prompt_weight)
            if used + len(ids) > size:
                if used:
                    return tokens, weights
                continue
            tokens[used : used + len(ids)], weights[used : used + len(ids)] = ids, weight
            used += len(ids)


def encode_conversation(
    conversation: Conversation, tokenizer: Tokenizer, render: Render, prompt_weight: float
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [N] and weights [N]: 1 for what the assistant says and the token after it, else ``prompt_weight``."""
    ids = np.asarray(tokenizer.encode(conversation.text(render)).ids, np.uint16)
    spoken = np.zeros(len(ids), bool)
    speaking = False
    for i, token in enumerate(ids.tolist()):
        spoken[i] = speaking
        if token == SPECIAL_IDS["<|assistant|>"]:
            speaking = True
        elif token in _ROLES:
            speaking = False
    return ids, np.where(spoken, np.float32(1), np.float32(prompt_weight)).astype(np.float32)


_ROLES = frozenset(SPECIAL_IDS[t] for t in ("<|user|>", "<|observation|>", "<|system|>"))
