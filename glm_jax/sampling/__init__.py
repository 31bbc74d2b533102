"""Logits to tokens: options on the host, rows on the device, a fixed order of steps.

``SamplingParams`` needs no JAX; the rest is imported when first asked for, so that a command can read its options
before it decides how JAX starts.

>>> from glm_jax.sampling import SamplerState, SamplingParams, sample, update_state, is_stop, completion_seeds
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from glm_jax.sampling.features import SamplerFeatures as SamplerFeatures
    from glm_jax.sampling.params import SamplingParams as SamplingParams
    from glm_jax.sampling.params import completion_seeds as completion_seeds
    from glm_jax.sampling.sampler import SampleResult as SampleResult
    from glm_jax.sampling.sampler import sample as sample
    from glm_jax.sampling.state import SamplerState as SamplerState
    from glm_jax.sampling.state import is_stop as is_stop
    from glm_jax.sampling.state import update_state as update_state

# Public name -> the module that defines it.
_HOMES = {
    "SampleResult": "sampler",
    "SamplerFeatures": "features",
    "SamplerState": "state",
    "SamplingParams": "params",
    "completion_seeds": "params",
    "is_stop": "state",
    "sample": "sampler",
    "update_state": "state",
}

__all__ = [
    "SampleResult",
    "SamplerFeatures",
    "SamplerState",
    "SamplingParams",
    "completion_seeds",
    "is_stop",
    "sample",
    "update_state",
]


def __getattr__(name: str) -> object:
    """Imports the module behind a public name the first time it is asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
