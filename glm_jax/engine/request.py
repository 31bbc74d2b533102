"""State of one request on the host: detokenization, stop strings, finish reason. Imports no JAX."""

from __future__ import annotations

import dataclasses

from glm_jax.engine.outputs import Completion, StreamChunk, TokenLogprob
from glm_jax.sampling import SamplingParams
from glm_jax.text import StreamDecoder, Tokenizer
from glm_jax.text.output_types import FinishReason


@dataclasses.dataclass(slots=True, kw_only=True)
class Request:
    """One completion in progress; a prompt with ``n`` completions makes ``n`` requests.

    Attributes:
        tokenizer: Tokenizer that decodes this request's text.
        prompt_ids: Token ids of the prompt.
        params: Sampling options.
        seed: Seed of this completion.
        max_new_tokens: Most tokens to generate: ``params.max_tokens``, or fewer where the context ends before.
        stop_ids: Token ids that end the completion.
        index: Index of this completion among the ``n`` of its prompt.
        prompt_index: Index of the prompt in the call.
        token_ids: Tokens generated so far.
        logprobs: Log-probabilities of ``token_ids``; empty without the sampling option ``logprobs``.
        finish_reason: Why the completion ended; None while it is running.
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
        """Appends generated tokens and returns the new text; tokens after the end of the completion are ignored.

        Args:
            tokens: Generated tokens, in order.
            logprobs: One entry per token, or None.

        Returns:
            The chunk, whose text may be empty, or None if no token was appended.
        """
        appended: list[int] = []
        for i, token in enumerate(tokens):
            if self.finish_reason:
                break
            appended.append(token)
            if logprobs:
                self.logprobs.append(logprobs[i])
            self._append_token(token)
        return self._next_chunk(appended) if appended else None

    def to_completion(self) -> Completion:
        """The completion so far; its finish reason is "abort" while the request is running."""
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
        # The bytes left in the decoder are text too, and may complete a stop string.
        self._append_text(self._decoder.flush())
        self.finish_reason = self.finish_reason or reason

    def _append_text(self, text: str) -> None:
        """Appends text and finishes the request at the first stop string."""
        if not text:
            return
        # A match may start in earlier text, but not in text that was already emitted.
        self._text += text
        matches = [self._text.find(stop, self._num_emitted_chars) for stop in self.params.stop]
        if starts := [start for start in matches if start >= 0]:
            self._text = self._text[: min(starts)]
            self.finish_reason = "stop"

    def _next_chunk(self, tokens: list[int]) -> StreamChunk:
        end = len(self._text) if self.finish_reason else len(self._text) - self._held_back_length()
        text, self._num_emitted_chars = self._text[self._num_emitted_chars : end], end
        completion = self.to_completion() if self.finish_reason else None
        return StreamChunk(text, tuple(tokens), self.finish_reason, self.index, completion)

    def _held_back_length(self) -> int:
        """Length of the longest suffix of the text that is the beginning of a stop string."""
        longest = max((len(stop) for stop in self.params.stop), default=0) - 1
        tail = self._text[max(self._num_emitted_chars, len(self._text) - longest) :] if longest > 0 else ""
        for start in range(len(tail)):
            if any(stop.startswith(tail[start:]) for stop in self.params.stop):
                return len(tail) - start
        return 0
