"""What a caller asks of sampling. Host only: this module imports no JAX."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping
from typing import Any, Final

from glm_jax.errors import SamplingError
from glm_jax.sampling import validation

GREEDY_TEMPERATURE: Final = 1e-5
"""Temperatures below this take the most likely token (vLLM's ``_SAMPLING_EPS``)."""

SEED_BITS: Final = 63
_MAX_INT32: Final = 2**31 - 1
_MAX_IDS: Final = 1024
_MAX_STOPS: Final = 16
_MAX_STOP_CHARACTERS: Final = 256
_MAX_LOGPROBS: Final = 20
_MAX_N: Final = 128
_FROM_CHECKPOINT: Final = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when a completion ends.

    The order in which the options act is that of :func:`glm_jax.sampling.sample`.

    Attributes:
        temperature: divides the logits, in [0, 1e6]; 0 takes the most likely token, the lowest id among equals.
        top_p: keeps the fewest most likely tokens that together have this probability, in (0, 1]; 1 is off.
        top_k: keeps this many most likely tokens; 0 is off.
        min_p: keeps tokens at least this fraction as likely as the most likely one, in [0, 1]; 0 is off.
        repetition_penalty: divides positive and multiplies negative logits of tokens in the prompt or the output, in
            (0, 100]; 1 is off.
        presence_penalty: is subtracted once from the logit of each token of the output, in [-2, 2].
        frequency_penalty: is subtracted once per occurrence in the output, in [-2, 2].
        logit_bias: is added to the logits of these ids, each in [-100, 100], at most 1024 of them.
        stop: text that ends a completion: at most 16 strings of 1 to 256 characters; one string may be given alone.
        stop_token_ids: ids that end a completion, at most 1024.
        ignore_eos: goes on past the checkpoint's end-of-sequence ids; ``stop_token_ids`` still end it.
        max_tokens: longest completion, at least 1.
        seed: in [0, 2**63); the same seed gives the same tokens, whatever else runs. None draws one.
        logprobs: None for none, otherwise the log-probability of each chosen token and of this many most likely ones
            (0 to 20).
        n: completions per prompt, 1 to 128, with the seeds of :func:`completion_seeds`.

    Raises:
        SamplingError: if a value is impossible; the message has the field, the range and the value.
    """

    temperature: float = 1.0
    top_p: float = 0.95
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    # Own copy, but a dictionary: a read-only view could be neither pickled nor copied.
    logit_bias: Mapping[int, float] | None = dataclasses.field(default=None, hash=False)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    max_tokens: int = 512
    seed: int | None = None
    logprobs: int | None = None
    n: int = 1

    def __post_init__(self) -> None:
        for name, value in (self._numbers() | self._counts() | self._lists()).items():
            object.__setattr__(self, name, value)

    def _numbers(self) -> dict[str, float]:
        ranges = {
            "temperature": ("a number in [0, 1e6]", lambda x: 0 <= x <= 1e6),
            "top_p": ("a number in (0, 1]", lambda x: 0 < x <= 1),
            "min_p": ("a number in [0, 1]", lambda x: 0 <= x <= 1),
            "repetition_penalty": ("a number in (0, 100]", lambda x: 0 < x <= 100),
            "presence_penalty": ("a number in [-2, 2]", lambda x: -2 <= x <= 2),
            "frequency_penalty": ("a number in [-2, 2]", lambda x: -2 <= x <= 2),
        }
        return {name: validation.check_number(name, getattr(self, name), *rule) for name, rule in ranges.items()}

    def _counts(self) -> dict[str, int | bool | None]:
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

    def _lists(self) -> dict[str, object]:
        bias = self.logit_bias
        return {
            "logit_bias": None
            if bias is None
            else validation.check_logit_bias("logit_bias", bias, _MAX_IDS, _MAX_INT32, 100.0),
            "stop": validation.check_strings("stop", self.stop, _MAX_STOPS, _MAX_STOP_CHARACTERS),
            "stop_token_ids": validation.check_token_ids("stop_token_ids", self.stop_token_ids, _MAX_IDS, _MAX_INT32),
        }

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def filtered(self) -> bool:
        """Whether top_k, top_p or min_p can drop a token that would be drawn."""
        return not self.greedy and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    @property
    def penalized(self) -> bool:
        """Whether earlier tokens change the logits."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def replace(self, **changes: Any) -> SamplingParams:
        """A copy with some options changed, checked again.

        Raises:
            SamplingError: if a value is impossible or a name is no option.
        """
        validation.check_option_names(changes, SAMPLING_FIELDS)
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> SamplingParams:
        """Options as JSON has them: lists for tuples, and ids as the string keys of ``logit_bias``.

        Raises:
            SamplingError: if a value is impossible or a name is no option.
        """
        return cls().replace(**_from_json(options))

    @classmethod
    def from_generation_config(cls, config: Mapping[str, Any]) -> SamplingParams:
        """The defaults a checkpoint asks for in its ``generation_config.json``.

        Read: temperature, top_p, top_k, min_p, repetition_penalty, and ``do_sample``, which when false means
        temperature 0. Absent and null ones keep this class's defaults. Other keys belong to other software or, like a
        length limit, to the call.

        Raises:
            SamplingError: if one of these has an impossible value.
        """
        given = {name: config[name] for name in _FROM_CHECKPOINT if config.get(name) is not None}
        try:
            if config.get("do_sample") is not None and not validation.check_bool("do_sample", config["do_sample"]):
                given["temperature"] = 0.0
            return cls(**given)
        except SamplingError as error:
            raise SamplingError(f"generation_config.json: {error}") from None


SAMPLING_FIELDS: Final = tuple(field.name for field in dataclasses.fields(SamplingParams))


def completion_seeds(params: SamplingParams) -> tuple[int, ...]:
    """The seed of each of the ``n`` completions: ``seed + i`` modulo 2**63, so that each can be had again alone.

    Without a seed the first is drawn at random below 2**53, which survives any JSON reader.
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
