"""Loads parameters from checkpoints of every supported format, and saves parameters as checkpoints."""

from glm_jax.checkpoint.loader import load as load
from glm_jax.checkpoint.loader import load_params as load_params
from glm_jax.checkpoint.loader import quantize_source as quantize_source
from glm_jax.checkpoint.loader import save as save
from glm_jax.checkpoint.sources.base import SourceInfo as SourceInfo
from glm_jax.checkpoint.sources.base import WeightSource as WeightSource
from glm_jax.checkpoint.sources.open import open_source as open_source
from glm_jax.checkpoint.sources.storage import source_storage as source_storage
from glm_jax.checkpoint.write.conversion import OutputFormat as OutputFormat
