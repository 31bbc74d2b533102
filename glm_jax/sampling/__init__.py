"""Sampling: from logits to tokens, in a fixed order of steps that :mod:`glm_jax.sampling.sampler` lists.

========================  =============================================================================================
``params``                ``SamplingParams``, the options of one request; ``validation`` checks each value
``features``              ``SamplerFeatures``, the options in use by a batch: what a step is compiled for
``state``                 ``SamplerState``, the options of a batch on the device; ``batch_arrays`` builds its arrays
``sampler``               ``sample``: the order of all steps, the choice of the token, log-probabilities
``penalties``             logit bias; repetition, frequency and presence penalties
``thresholds``            temperature, min_p, top_k, top_p
``gumbel``                random noise, a function of (seed, position, token id)
``numerics``              sums, maxima and threshold search that do not depend on the rest of the batch
========================  =============================================================================================

Public names are imported on first use. ``SamplingParams`` needs no JAX, so a command can read its options before it
decides how JAX starts.

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
    """Imports the module that defines a public name when the name is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
