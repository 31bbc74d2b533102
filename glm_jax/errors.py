"""Every error a user can cause, with one clear message that says what to do.

Commands print ``error: <message>`` and exit with 2; anything else that escapes is a bug of ours.
"""


class GlmError(Exception):
    """Base of all errors a user can cause."""


class ConfigError(GlmError, ValueError):
    """A ``config.json`` (or a :class:`~glm_jax.Config`) that this stack cannot run."""


class CheckpointError(GlmError):
    """Weights that are missing, damaged, unknown or not allowed."""


class PromptError(GlmError, ValueError):
    """A prompt, message list or model output that cannot be used."""


class SamplingError(GlmError, ValueError):
    """A sampling option outside its range."""


class MemoryPlanError(GlmError):
    """A model, context or batch that does not fit the device."""


class ShardingError(GlmError, ValueError):
    """A mesh that the model cannot be laid out on."""


class QuantError(GlmError, ValueError):
    """A quantization that does not exist, or that does not fit the matrix it is asked for."""
