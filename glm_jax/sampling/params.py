"""Sampling options of one request. Host only: this module imports no JAX."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping
from typing import Any, Final

from glm_jax.errors import SamplingError
from glm_jax.sampling import validation

GREEDY_TEMPERATURE: Final = 1e-5
"""Temperatures below this mean greedy decoding (vLLM's ``_SAMPLING_EPS``)."""

SEED_BITS: Final = 63
_MAX_INT32: Final = 2**31 - 1
_MAX_TOKEN_IDS: Final = 1024
_MAX_STOP_STRINGS: Final = 16
_MAX_STOP_LENGTH: Final = 256
_MAX_LOGPROBS: Final = 20
_MAX_N: Final = 128
_GENERATION_CONFIG_KEYS: Final = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when a completion ends.

    :mod:`glm_jax.sampling.sampler` lists the order in which the options are applied.

    Attributes:
        temperature: Divisor of the logits, in [0, 1e6]. 0 selects greedy decoding: the most likely token, and the
            lowest id among equally likely ones.
        top_p: Keeps the smallest set of most likely tokens whose probabilities add up to this, in (0, 1]; 1 is off.
        top_k: Keeps this many most likely tokens; 0 is off.
        min_p: Keeps tokens at least this fraction as likely as the most likely one, in [0, 1]; 0 is off.
        repetition_penalty: Divides positive and multiplies negative logits of tokens that occur in the prompt or the
            output, in (0, 100]; 1 is off.
        presence_penalty: Subtracted once from the logit of each token that occurs in the output, in [-2, 2].
        frequency_penalty: Subtracted from a token's logit once per occurrence in the output, in [-2, 2].
        logit_bias: Number added to the logit of each of these token ids, in [-100, 100]; at most 1024 ids.
        stop: Strings that end the completion: at most 16, of 1 to 256 characters. A single string is accepted.
        stop_token_ids: Token ids that end the completion; at most 1024.
        ignore_eos: Continues past the checkpoint's end-of-sequence ids. ``stop_token_ids`` still end the completion.
        max_tokens: Maximum number of tokens in the completion, at least 1.
        seed: Random seed in [0, 2**63). The same seed gives the same tokens, whatever else runs. None picks one.
        logprobs: None for no log-probabilities. A number reports the log-probability of each chosen token and of that
            many most likely tokens (0 to 20).
        n: Completions per prompt, 1 to 128; :func:`completion_seeds` gives their seeds.

    Raises:
        SamplingError: if a value is out of range; the message names the field, the range and the value.
    """

    temperature: float = 1.0
    top_p: float = 0.95
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    # Copied to a plain dictionary: a read-only view could be neither pickled nor copied.
    logit_bias: Mapping[int, float] | None = dataclasses.field(default=None, hash=False)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    max_tokens: int = 512
    seed: int | None = None
    logprobs: int | None = None
    n: int = 1

    def __post_init__(self) -> None:
        for name, value in (self._checked_numbers() | self._checked_integers() | self._checked_lists()).items():
            object.__setattr__(self, name, value)

    def _checked_numbers(self) -> dict[str, float]:
        ranges = {
            "temperature": ("a number in [0, 1e6]", lambda x: 0 <= x <= 1e6),
            "top_p": ("a number in (0, 1]", lambda x: 0 < x <= 1),
            "min_p": ("a number in [0, 1]", lambda x: 0 <= x <= 1),
            "repetition_penalty": ("a number in (0, 100]", lambda x: 0 < x <= 100),
            "presence_penalty": ("a number in [-2, 2]", lambda x: -2 <= x <= 2),
            "frequency_penalty": ("a number in [-2, 2]", lambda x: -2 <= x <= 2),
        }
        return {name: validation.check_number(name, getattr(self, name), *rule) for name, rule in ranges.items()}

    def _checked_integers(self) -> dict[str, int | bool | None]:
        seed, logprobs = self.seed, self.logprobs
        return {
            "top_k": validation.check_integer(
                "top_k", self.top_k, 0, _MAX_INT32, f"an integer from 0 (off) to {_MAX_INT32}"
            ),
            "max_tokens": validation.check_integer(
                "max_tokens", self.max_tokens, 1, _MAX_INT32, f"an integer from 1 to {_MAX_INT32}"
            ),
            "n": validation.check_integer("n", self.n, 1, _MAX_N),
            "seed": None if seed is None else validation.check_integer("seed", seed, 0, 2**SEED_BITS - 1),
            "logprobs": None if logprobs is None else validation.check_integer("logprobs", logprobs, 0, _MAX_LOGPROBS),
            "ignore_eos": validation.check_bool("ignore_eos", self.ignore_eos),
        }

    def _checked_lists(self) -> dict[str, object]:
        bias = self.logit_bias
        return {
            "logit_bias": None
            if bias is None
            else validation.check_logit_bias("logit_bias", bias, _MAX_TOKEN_IDS, _MAX_INT32, 100.0),
            "stop": validation.check_strings("stop", self.stop, _MAX_STOP_STRINGS, _MAX_STOP_LENGTH),
            "stop_token_ids": validation.check_token_ids(
                "stop_token_ids", self.stop_token_ids, _MAX_TOKEN_IDS, _MAX_INT32
            ),
        }

    @property
    def greedy(self) -> bool:
        """Whether decoding is greedy: the most likely token is always chosen."""
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def filtered(self) -> bool:
        """Whether top_k, top_p or min_p can exclude a token that could otherwise be sampled."""
        return not self.greedy and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    @property
    def penalized(self) -> bool:
        """Whether a penalty makes the logits depend on earlier tokens."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def replace(self, **changes: Any) -> SamplingParams:
        """Returns a copy with some options changed; the new values are checked.

        Raises:
            SamplingError: if a value is out of range or a name is not an option.
        """
        validation.check_option_names(changes, SAMPLING_FIELDS)
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> SamplingParams:
        """Reads options from parsed JSON: lists become tuples, string keys of ``logit_bias`` become token ids.

        Raises:
            SamplingError: if a value is out of range or a name is not an option.
        """
        return cls().replace(**_from_json(options))

    @classmethod
    def from_generation_config(cls, config: Mapping[str, Any]) -> SamplingParams:
        """Reads a checkpoint's recommended options from its ``generation_config.json``.

        The keys read are temperature, top_p, top_k, min_p, repetition_penalty and ``do_sample``; a false ``do_sample``
        means temperature 0. Absent and null keys keep this class's defaults. All other keys are ignored: they belong
        to other software or, like a length limit, to the call.

        Raises:
            SamplingError: if one of these keys has a value out of range.
        """
        options = {name: config[name] for name in _GENERATION_CONFIG_KEYS if config.get(name) is not None}
        try:
            if config.get("do_sample") is not None and not validation.check_bool("do_sample", config["do_sample"]):
                options["temperature"] = 0.0
            return cls(**options)
        except SamplingError as error:
            raise SamplingError(f"generation_config.json: {error}") from None


SAMPLING_FIELDS: Final = tuple(field.name for field in dataclasses.fields(SamplingParams))


def completion_seeds(params: SamplingParams) -> tuple[int, ...]:
    """The seeds of the ``n`` completions: ``(seed + i) % 2**63``, so that each can be reproduced on its own.

    Without a seed the first one is random and below 2**53, which every JSON reader represents exactly.
    """
    first = secrets.randbelow(2**53) if params.seed is None else params.seed
    return tuple((first + index) % 2**SEED_BITS for index in range(params.n))


def _from_json(options: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(options, Mapping):
        validation.raise_invalid("sampling options", options, "a JSON object")
    bias = options.get("logit_bias")
    if not isinstance(bias, Mapping):
        return dict(options)
    return {**options, "logit_bias": {_parse_token_id(key): value for key, value in bias.items()}}


def _parse_token_id(key: object) -> object:
    return int(key) if isinstance(key, str) and key.isascii() and key.isdigit() else key
