"""What a call measured. Imports no JAX."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(slots=True)
class Timing:
    """What one call measured, in seconds and tokens.

    Attributes:
        prompt_tokens: run through the model.
        completion_tokens: drawn.
        prefill_s: until the prompts were in the cache and each row had its first token, without compilation.
        decode_s: for all further tokens, without compilation.
        first_token_s: from the call to the first token, all included.
        first_tokens: how many of the tokens were the first of their row.
        compile_s: first calls of a shape, which compile, or find what an earlier run compiled.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    first_token_s: float = 0.0
    first_tokens: int = 0
    compile_s: float = 0.0

    def add_compile(self, seconds: float) -> None:
        """Counts the first call of a shape."""
        self.compile_s += seconds

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens per second after the first of each row, all rows together."""
        return (self.completion_tokens - self.first_tokens) / self.decode_s if self.decode_s else 0.0
