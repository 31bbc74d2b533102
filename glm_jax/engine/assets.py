"""What lies beside a checkpoint's weights: tokenizer, chat template, generation defaults. Imports no JAX."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from glm_jax.config import Config
from glm_jax.errors import CheckpointError
from glm_jax.sampling import SamplingParams
from glm_jax.text import Tokenizer, read_template
from glm_jax.text.tokenizer import load_tokenizer

_GENERATION_CONFIG = "generation_config.json"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelAssets:
    """The companions of one model's weights.

    Attributes:
        tokenizer: text to ids and back.
        chat_template: its own chat template, or None.
        default_sampling_params: sampling options used where a call gives none.
        eos_ids: all ids that end an answer, those of config.json and those of generation_config.json.
    """

    tokenizer: Tokenizer
    chat_template: str | None
    default_sampling_params: SamplingParams
    eos_ids: tuple[int, ...]

    @classmethod
    def load(cls, cfg: Config, folder: Path | None) -> Self:
        """Those in a checkpoint's folder; for made-up weights, which have none, the miniature's tokenizer.

        Raises:
            CheckpointError: if a file is missing that cannot be, or damaged.
            SamplingError: if a default is impossible.
        """
        generation = {} if folder is None else _generation_config(folder / _GENERATION_CONFIG)
        return cls(
            tokenizer=load_tokenizer(cfg, folder),
            chat_template=None if folder is None else read_template(folder),
            default_sampling_params=SamplingParams.from_generation_config(generation),
            eos_ids=_eos_ids(cfg, generation.get("eos_token_id")),
        )


def _generation_config(path: Path) -> Mapping[str, Any]:
    try:
        read = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(read, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return read


def _eos_ids(cfg: Config, given: Any) -> tuple[int, ...]:
    more = given if isinstance(given, list) else [] if given is None else [given]
    for token in more:
        if type(token) is not int or not 0 <= token < cfg.vocab_size:
            raise CheckpointError(f"{_GENERATION_CONFIG}: eos_token_id {token!r} is no id of this model")
    return tuple(dict.fromkeys((*cfg.eos_token_ids, *more)))
