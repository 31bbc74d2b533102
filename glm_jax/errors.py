"""Errors that a user can cause. Each message states the problem and what to do about it.

Commands print ``error: <message>`` and exit with status 2. Any other exception that reaches the user is a bug.
"""


class GlmError(Exception):
    """Base class of all errors that a user can cause."""


class ConfigError(GlmError, ValueError):
    """A ``config.json`` or :class:`~glm_jax.Config` that this stack cannot run."""


class CheckpointError(GlmError):
    """A checkpoint whose files are missing, damaged, of an unknown format or not allowed."""


class PromptError(GlmError, ValueError):
    """An invalid prompt, message list or tool declaration."""


class SamplingError(GlmError, ValueError):
    """A sampling option that is unknown or out of range."""


class MemoryPlanError(GlmError):
    """A model, context length or batch that does not fit into device memory."""


class ShardingError(GlmError, ValueError):
    """A device mesh over which the model cannot be split."""


class QuantError(GlmError, ValueError):
    """A quantization that does not exist or does not fit a matrix."""
