"""Tokenizer, chat template and generation defaults that accompany a checkpoint's weights. Imports no JAX."""

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
    """Everything of a checkpoint that generation needs besides the weights.

    Attributes:
        tokenizer: Tokenizer of the checkpoint.
        chat_template: Source of the checkpoint's own chat template, or None where it has none.
        default_sampling_params: Sampling options used where a call gives none.
        eos_ids: Token ids that end a completion, from config.json and generation_config.json.
    """

    tokenizer: Tokenizer
    chat_template: str | None
    default_sampling_params: SamplingParams
    eos_ids: tuple[int, ...]

    @classmethod
    def load(cls, cfg: Config, folder: Path | None) -> Self:
        """Reads the assets in a checkpoint's folder.

        Args:
            cfg: Architecture of the model.
            folder: Folder of the checkpoint; None for random weights, which use the miniature's tokenizer.

        Raises:
            CheckpointError: if a required file is missing, or a file is damaged.
            SamplingError: if a default has an impossible value.
        """
        generation = {} if folder is None else _read_generation_config(folder / _GENERATION_CONFIG)
        return cls(
            tokenizer=load_tokenizer(cfg, folder),
            chat_template=None if folder is None else read_template(folder),
            default_sampling_params=SamplingParams.from_generation_config(generation),
            eos_ids=_merge_eos_ids(cfg, generation.get("eos_token_id")),
        )


def _read_generation_config(path: Path) -> Mapping[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return config


def _merge_eos_ids(cfg: Config, eos_token_id: Any) -> tuple[int, ...]:
    """The ids of config.json, then those of generation_config.json, which may be one id, a list or null."""
    extra = eos_token_id if isinstance(eos_token_id, list) else [] if eos_token_id is None else [eos_token_id]
    for token in extra:
        if type(token) is not int or not 0 <= token < cfg.vocab_size:
            raise CheckpointError(f"{_GENERATION_CONFIG}: eos_token_id {token!r} is no id of this model")
    return tuple(dict.fromkeys((*cfg.eos_token_ids, *extra)))
