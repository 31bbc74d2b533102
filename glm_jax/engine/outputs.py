"""Results of a call: completions, chunks of a stream, scores. Imports no JAX."""

from __future__ import annotations

import dataclasses

from glm_jax.text.output_types import FinishReason, Message, ToolCall


@dataclasses.dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of one generated token in the model's own distribution, before any sampling option.

    Attributes:
        token_id: Generated token.
        logprob: Natural logarithm of the token's probability.
        top: Most likely tokens at this position as (token id, logprob), the most likely first; as many as the sampling
            option ``logprobs`` says.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Completion:
    """One completion of a prompt.

    Attributes:
        text: Generated text, without the stop string or stop token that ended it.
        token_ids: Generated tokens; a stop token that ended the completion is the last one.
        finish_reason: "stop" (a stop token or stop string), "length" (``max_tokens`` or the context), "abort", or in
            a chat "tool_calls".
        seed: Seed that generates the same tokens again.
        prompt_tokens: Length of the prompt in tokens.
        logprobs: One entry per generated token, or None without the sampling option ``logprobs``.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    seed: int
    prompt_tokens: int
    logprobs: tuple[TokenLogprob, ...] | None = None

    @property
    def completion_tokens(self) -> int:
        """Number of generated tokens."""
        return len(self.token_ids)


@dataclasses.dataclass(frozen=True, slots=True)
class ChatCompletion(Completion):
    """The completion of a chat prompt, parsed into reasoning, content and tool calls.

    Attributes:
        message: Parsed message.
    """

    message: Message = dataclasses.field(default_factory=lambda: Message(None, None, [], "stop", []))

    @property
    def content(self) -> str | None:
        """Text of the answer."""
        return self.message.content

    @property
    def reasoning(self) -> str | None:
        """Text of the thinking that precedes the answer."""
        return self.message.reasoning

    @property
    def tool_calls(self) -> list[ToolCall]:
        """Complete tool calls, in order."""
        return self.message.tool_calls


@dataclasses.dataclass(frozen=True, slots=True)
class StreamChunk:
    """New text of one completion in a stream.

    Attributes:
        text: New text; it never ends inside a character or inside a possible stop string.
        token_ids: Tokens generated since the previous chunk.
        finish_reason: Why the completion ended; None on every chunk but its last.
        index: Index of the completion among the ``n`` of its prompt.
        completion: The whole completion, on its last chunk.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    index: int = 0
    completion: Completion | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Score:
    """Log-probability of a continuation after a prompt, in natural logarithms.

    Attributes:
        total: Sum of ``token_logprobs``.
        token_logprobs: Log-probability of each token of the continuation, given all tokens before it.
        token_ids: Tokens of the continuation.
    """

    total: float
    token_logprobs: tuple[float, ...]
    token_ids: tuple[int, ...]
