"""One completion being written, as the host sees it: ids to text, stop strings, the end. Imports no JAX."""

from __future__ import annotations

import dataclasses

from glm_jax.engine.outputs import Completion, FinishReason, Piece, TokenLogprob
from glm_jax.sampling import SamplingParams
from glm_jax.text import StreamDecoder, Tokenizer


@dataclasses.dataclass(slots=True, kw_only=True)
class Row:
    """A completion in progress.

    Attributes:
        tokenizer: of its text.
        prompt_ids: of its prompt.
        params: its options.
        seed: its own.
        budget: tokens it may write, at most ``params.max_tokens``.
        stop_ids: tokens that end it.
        index: among the ``n`` of its prompt.
        order: of its prompt in the call.
        token_ids: written so far.
        logprobs: of ``token_ids``, where they were asked for.
        finish: why it ended, or None while it goes on.
    """

    tokenizer: Tokenizer
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    budget: int
    stop_ids: frozenset[int]
    index: int = 0
    order: int = 0
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)
    finish: FinishReason | None = None
    _text: str = ""
    _shown: int = 0
    _decoder: StreamDecoder = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self._decoder = self.tokenizer.stream()

    def feed(self, tokens: list[int], logprobs: list[TokenLogprob] | None = None) -> Piece | None:
        """Takes new tokens; returns what can be shown, or None if nothing changed.

        Tokens after the one that ends the row are ignored.
        """
        taken: list[int] = []
        for i, token in enumerate(tokens):
            if self.finish:
                break
            taken.append(token)
            if logprobs:
                self.logprobs.append(logprobs[i])
            self._advance(token)
        return self._piece(taken) if taken else None

    def completion(self) -> Completion:
        """The completion as it stands."""
        return Completion(
            text=self._text,
            token_ids=tuple(self.token_ids),
            finish_reason=self.finish or "abort",
            seed=self.seed,
            prompt_tokens=len(self.prompt_ids),
            logprobs=tuple(self.logprobs) if self.params.logprobs is not None else None,
        )

    def _advance(self, token: int) -> None:
        self.token_ids.append(token)
        if token in self.stop_ids:
            self._end("stop")
            return
        self._append(self._decoder.feed(token))
        if not self.finish and len(self.token_ids) >= self.budget:
            self._end("length")

    def _end(self, reason: FinishReason) -> None:
        # What the decoder still held is text too, and may complete a stop string.
        self._append(self._decoder.flush())
        self.finish = self.finish or reason

    def _append(self, text: str) -> None:
        """Adds text; ends the row at the first stop string in it."""
        if not text:
            return
        # A match may begin in earlier text, but not before what has been shown.
        self._text += text
        found = [at for stop in self.params.stop if (at := self._text.find(stop, self._shown)) >= 0]
        if found:
            self._text = self._text[: min(found)]
            self.finish = "stop"

    def _piece(self, tokens: list[int]) -> Piece:
        end = len(self._text) if self.finish else len(self._text) - self._held()
        text, self._shown = self._text[self._shown : end], end
        done = self.completion() if self.finish else None
        return Piece(text, tuple(tokens), self.finish, self.index, done)

    def _held(self) -> int:
        """Length of the longest end of the text that may grow into a stop string."""
        longest = max((len(stop) for stop in self.params.stop), default=0) - 1
        tail = self._text[max(self._shown, len(self._text) - longest) :] if longest > 0 else ""
        for start in range(len(tail)):
            if any(stop.startswith(tail[start:]) for stop in self.params.stop):
                return len(tail) - start
        return 0
