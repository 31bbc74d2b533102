"""What a caller gets back. Host only: this module imports no JAX."""

from __future__ import annotations

import dataclasses
from typing import Literal

from glm_jax.text import Message, ToolCall

FinishReason = Literal["stop", "length", "tool_calls", "abort"]


@dataclasses.dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of one written token, in the model's own distribution.

    Attributes:
        token_id: the token.
        logprob: natural logarithm of its probability, before any sampling option.
        top: the most likely ids at this place with theirs, the most likely first; as many as were asked for.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Completion:
    """One completion.

    Attributes:
        text: without the stop string or stop token that ended it.
        token_ids: as drawn; a stop token that ended it is the last one.
        finish_reason: "stop" (a stop token or string), "length" (``max_tokens`` or the context), "abort".
        logprobs: one per token, if asked for.
        seed: draws the same tokens again.
        prompt_tokens: length of the prompt.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    seed: int
    prompt_tokens: int
    logprobs: tuple[TokenLogprob, ...] | None = None

    @property
    def completion_tokens(self) -> int:
        """Number of tokens drawn."""
        return len(self.token_ids)


@dataclasses.dataclass(frozen=True, slots=True)
class ChatCompletion(Completion):
    """An answer, split into its parts.

    Attributes:
        message: reasoning, content and tool calls.
    """

    message: Message = dataclasses.field(default_factory=lambda: Message(None, None, [], "stop", []))

    @property
    def content(self) -> str | None:
        """The answer's text."""
        return self.message.content

    @property
    def reasoning(self) -> str | None:
        """The thinking before it."""
        return self.message.reasoning

    @property
    def tool_calls(self) -> list[ToolCall]:
        """Complete calls, in order."""
        return self.message.tool_calls


@dataclasses.dataclass(frozen=True, slots=True)
class StreamChunk:
    """A piece of a stream.

    Attributes:
        text: new text; never ends inside a character or inside what may become a stop string.
        token_ids: the tokens drawn since the last piece.
        finish_reason: set on the last piece of its completion.
        index: which of the ``n`` completions.
        completion: the whole, on the last piece.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    index: int = 0
    completion: Completion | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Score:
    """Log-probability of a given continuation.

    Attributes:
        total: their sum.
        token_logprobs: of each token given all before it.
        token_ids: of the continuation.
    """

    total: float
    token_logprobs: tuple[float, ...]
    token_ids: tuple[int, ...]
