"""Timing of one call of the model. Imports no JAX."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(slots=True)
class Timing:
    """Token counts and seconds of one call.

    Attributes:
        prompt_tokens: Prompt tokens that ran through the model; a prompt that several completions share counts once.
        completion_tokens: Tokens that were generated.
        prefill_s: Seconds until every request had its first token, without compilation.
        decode_s: Seconds for all later tokens, without compilation.
        first_token_s: Seconds from the call to the first token, compilation included.
        first_tokens: Generated tokens that were the first of their request; their time counts as prefill.
        compile_s: Seconds spent in the first call of each compiled shape, whether it compiled or read a cached program.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    first_token_s: float = 0.0
    first_tokens: int = 0
    compile_s: float = 0.0

    def add_compile(self, seconds: float) -> None:
        """Adds the seconds of the first call of a shape."""
        self.compile_s += seconds

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens per second; 0 before anything ran."""
        return self.prompt_tokens / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens per second after each request's first, summed over all requests; 0 before anything ran."""
        return (self.completion_tokens - self.first_tokens) / self.decode_s if self.decode_s else 0.0
