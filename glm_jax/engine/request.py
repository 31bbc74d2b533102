"""One completion being written, as the host sees it: ids to text, stop strings, the end. Imports no JAX."""

from __future__ import annotations

import dataclasses

from glm_jax.engine.outputs import Completion, FinishReason, StreamChunk, TokenLogprob
from glm_jax.sampling import SamplingParams
from glm_jax.text import StreamDecoder, Tokenizer


@dataclasses.dataclass(slots=True, kw_only=True)
class Request:
    """A completion in progress.

    Attributes:
        tokenizer: of its text.
        prompt_ids: of its prompt.
        params: its options.
        seed: its own.
        max_new_tokens: tokens it may write, at most ``params.max_tokens``.
        stop_ids: tokens that end it.
        index: among the ``n`` of its prompt.
        prompt_index: of its prompt in the call.
        token_ids: written so far.
        logprobs: of ``token_ids``, where they were asked for.
        finish_reason: why it ended, or None while it goes on.
    """

    tokenizer: Tokenizer
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    max_new_tokens: int
    stop_ids: frozenset[int]
    index: int = 0
    prompt_index: int = 0
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)
    finish_reason: FinishReason | None = None
    _text: str = ""
    _num_emitted_chars: int = 0
    _decoder: StreamDecoder = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self._decoder = self.tokenizer.stream()

    def append_tokens(self, tokens: list[int], logprobs: list[TokenLogprob] | None = None) -> StreamChunk | None:
        """Takes new tokens; returns what can be shown, or None if nothing changed.

        Tokens after the one that ends the row are ignored.
        """
        taken: list[int] = []
        for i, token in enumerate(tokens):
            if self.finish_reason:
                break
            taken.append(token)
            if logprobs:
                self.logprobs.append(logprobs[i])
            self._append_token(token)
        return self._next_chunk(taken) if taken else None

    def to_completion(self) -> Completion:
        """The completion as it stands."""
        return Completion(
            text=self._text,
            token_ids=tuple(self.token_ids),
            finish_reason=self.finish_reason or "abort",
            seed=self.seed,
            prompt_tokens=len(self.prompt_ids),
            logprobs=tuple(self.logprobs) if self.params.logprobs is not None else None,
        )

    def _append_token(self, token: int) -> None:
        self.token_ids.append(token)
        if token in self.stop_ids:
            self._finish("stop")
            return
        self._append_text(self._decoder.feed(token))
        if not self.finish_reason and len(self.token_ids) >= self.max_new_tokens:
            self._finish("length")

    def _finish(self, reason: FinishReason) -> None:
        # What the decoder still held is text too, and may complete a stop string.
        self._append_text(self._decoder.flush())
        self.finish_reason = self.finish_reason or reason

    def _append_text(self, text: str) -> None:
        """Adds text; ends the row at the first stop string in it."""
        if not text:
            return
        # A match may begin in earlier text, but not before what has been shown.
        self._text += text
        found = [at for stop in self.params.stop if (at := self._text.find(stop, self._num_emitted_chars)) >= 0]
        if found:
            self._text = self._text[: min(found)]
            self.finish_reason = "stop"

    def _next_chunk(self, tokens: list[int]) -> StreamChunk:
        end = len(self._text) if self.finish_reason else len(self._text) - self._held_back_length()
        text, self._num_emitted_chars = self._text[self._num_emitted_chars : end], end
        done = self.to_completion() if self.finish_reason else None
        return StreamChunk(text, tuple(tokens), self.finish_reason, self.index, done)

    def _held_back_length(self) -> int:
        """Length of the longest end of the text that may grow into a stop string."""
        longest = max((len(stop) for stop in self.params.stop), default=0) - 1
        tail = self._text[max(self._num_emitted_chars, len(self._text) - longest) :] if longest > 0 else ""
        for start in range(len(tail)):
            if any(stop.startswith(tail[start:]) for stop in self.params.stop):
                return len(tail) - start
        return 0
