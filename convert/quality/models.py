"""The models of a comparison: checks that they are comparable, and loads them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax

from glm_jax import checkpoint
from glm_jax.checkpoint.sources.base import WeightSource
from glm_jax.checkpoint.sources.quantized import RequantizedSource
from glm_jax.config import Config
from glm_jax.engine.assets import ModelAssets
from glm_jax.errors import CheckpointError, MemoryPlanError, PromptError
from glm_jax.llm import LLM
from glm_jax.memory import MemoryPlan, plan_memory_on_devices
from glm_jax.weights import QuantRules
from glm_jax.weights.quantization import QuantMethod

# Config fields that may differ between two forms of one model: storage of the weights, limits of the reader, and
# properties whose effect the measurement shows.
_IGNORED_CONFIG_FIELDS = frozenset(
    """run_starts num_nextn_predict_layers mtp_own_embeddings max_position_embeddings eos_token_ids pad_token_id
    latent_eps""".split()
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ComparedModel:
    """A model that is loaded for a comparison.

    Attributes:
        llm: The loaded model.
        cache_dtype: Dtype of its latent cache.
    """

    llm: LLM
    cache_dtype: str

    @property
    def cfg(self) -> Config:
        """Config of the model."""
        return self.llm.config


def quantize_by_preset(source: WeightSource, quantize: str | None, method: QuantMethod = "mse") -> WeightSource:
    """Wraps a source so that its matrices are quantized while they are read; returns it unchanged without a preset.

    Args:
        source: The weights.
        quantize: Name of a preset, or ``None``.
        method: Method of choosing the scales.

    Raises:
        QuantError: for an unknown preset.
    """
    rules = QuantRules.resolve(quantize)
    return source if rules is None else RequantizedSource(source, rules, method, dtype="float32")


def check_same_architecture(reference: Config, other: Config) -> None:
    """Checks that two models are forms of the same model.

    Raises:
        CheckpointError: if vocabulary or architecture differ; names the fields.
    """
    if reference.vocab_size != other.vocab_size:
        raise CheckpointError(
            f"the vocabularies differ: {reference.vocab_size:,} tokens in the source and {other.vocab_size:,} here; "
            "only models with the same tokens can be compared"
        )
    names = [field.name for field in dataclasses.fields(Config) if field.name not in _IGNORED_CONFIG_FIELDS]
    different = [name for name in names if _differs(reference, other, name)]
    changed = [f"{name} {getattr(reference, name)!r} and {getattr(other, name)!r}" for name in different]
    if changed:
        raise CheckpointError(
            f"these are different models ({'; '.join(changed[:5])}): give --against the checkpoint that this one was "
            "made from"
        )


def _differs(reference: Config, other: Config, name: str) -> bool:
    value, other_value = getattr(reference, name), getattr(other, name)
    if isinstance(value, float):  # some formats store numbers in float32
        return not math.isclose(value, other_value, rel_tol=1e-6)
    return value != other_value


def encode_texts(texts: Sequence[str], reference: ModelAssets, other: ModelAssets) -> list[list[int]]:
    """Returns the token ids of texts.

    Raises:
        CheckpointError: if the two tokenizers give different ids.
        PromptError: if all texts are empty.
    """
    if not any(text.strip() for text in texts):
        raise PromptError("the text is empty: give a file with a few thousand words like those the model is for")
    ids = [reference.tokenizer.encode(text) for text in texts]
    if ids != [other.tokenizer.encode(text) for text in texts]:
        raise CheckpointError("the tokenizers of the two models differ: they give this text other token ids")
    return ids


def load_compared_model(
    source: WeightSource, assets: ModelAssets, *, dtype: str, cache_dtype: str = "float32", progress: bool = False
) -> ComparedModel:
    """Loads the model of an open source on the default device, without its prediction layer.

    Args:
        source: The weights.
        assets: Tokenizer and chat template.
        dtype: Dtype of activations and of weights that are not quantized.
        cache_dtype: Dtype of the latent cache.
        progress: Whether to show progress on stderr.
    """
    cfg, params, info = checkpoint.load(source, dtype=dtype, mtp=False, progress=progress)
    return ComparedModel(llm=LLM(cfg, params, assets, info=info, cache_dtype=cache_dtype), cache_dtype=cache_dtype)


def require_device_memory(reference: WeightSource, other: WeightSource, *, dtype: str, window: int) -> None:
    """Checks that both models fit on the default device together.

    Args:
        reference: Source of the reference model.
        other: Source of the other model.
        dtype: Dtype of activations and of weights that are not quantized.
        window: Tokens per window.

    Raises:
        MemoryPlanError: if they do not fit; states the sizes and the alternatives.
    """
    plans = [_memory_plan(source, dtype, window) for source in (reference, other)]
    logits = 8 * 4 * window * reference.cfg.vocab_size
    need = plans[0].requirement.total + plans[1].weight_bytes + logits
    if need > plans[0].device_bytes:
        raise MemoryPlanError(
            f"both models together need {need / 1e9:.1f} GB ({plans[0].weight_bytes / 1e9:.1f} and "
            f"{plans[1].weight_bytes / 1e9:.1f} GB of weights in {dtype}, the rest for {window:,} tokens at work), and "
            f"{plans[0].device_bytes / 1e9:.1f} GB can be had: halve the first with --dtype bfloat16, or compare the "
            "weights alone with --weights-only, which needs hardly any memory"
        )


def _memory_plan(source: WeightSource, dtype: str, window: int) -> MemoryPlan:
    storage = checkpoint.source_storage(source)
    # The plan rejects a context longer than the model's.
    context = min(window, source.cfg.max_position_embeddings)
    return plan_memory_on_devices(
        source.cfg, jax.devices()[:1], dtype=dtype, storage=storage, context=context, mtp=False
    )
