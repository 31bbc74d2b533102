"""One completion being written, as the host sees it: ids to text, stop strings, the end. Imports no JAX."""

from __future__ import annotations

import dataclasses

from glm_jax.completion import Completion, FinishReason, Piece, TokenLogprob
from glm_jax.sampling import SamplingParams
from glm_jax.text import Tokenizer


@dataclasses.dataclass(slots=True, kw_only=True)
class Row:
    """A completion in progress.

    Attributes:
        prompt_ids: of its prompt.
        params: its options.
        seed: its own.
        budget: tokens it may write, at most ``params.max_tokens``.
        index: among the ``n`` of its prompt.
        order: of its prompt in the call.
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
    _decoder: object = None

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
            self.token_ids.append(token)
            if logprobs:
                self.logprobs.append(logprobs[i])
            self._advance(token)
        return self._piece(taken) if taken else None

    def abort(self) -> Piece:
        """Ends the row from outside."""
        self.finish = self.finish or "abort"
        self._flush()
        return self._piece([])

    def completion(self) -> Completion:
        """The finished completion."""
        return Completion(
            text=self._text,
            token_ids=tuple(self.token_ids),
            finish_reason=self.finish or "abort",
            seed=self.seed,
            prompt_tokens=len(self.prompt_ids),
            logprobs=tuple(self.logprobs) if self.params.logprobs is not None else None,
        )

    def _advance(self, token: int) -> None:
        if token in self.stop_ids:
            self.finish = "stop"
            self._flush()
            return
        self._append(self._decoder.feed(token))  # type: ignore[attr-defined]
        if not self.finish and len(self.token_ids) >= self.budget:
            self.finish = "length"
            self._flush()

    def _flush(self) -> None:
        reason = self.finish
        self._append(self._decoder.flush())  # type: ignore[attr-defined]
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
