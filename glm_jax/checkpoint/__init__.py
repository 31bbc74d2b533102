"""Bytes in and out: checkpoints of any supported format into parameters, and parameters into checkpoints."""

from glm_jax.checkpoint.loader import OutputFormat as OutputFormat
from glm_jax.checkpoint.loader import SourceInfo as SourceInfo
from glm_jax.checkpoint.loader import WeightSource as WeightSource
from glm_jax.checkpoint.loader import load as load
from glm_jax.checkpoint.loader import load_params as load_params
from glm_jax.checkpoint.loader import open_source as open_source
from glm_jax.checkpoint.loader import quantize_source as quantize_source
from glm_jax.checkpoint.loader import save as save
from glm_jax.checkpoint.loader import source_storage as source_storage
