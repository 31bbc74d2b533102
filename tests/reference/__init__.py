"""An independent NumPy implementation of GLM-4.7-Flash, for tests.

Written from the published formulas and from nothing in `glm_jax`: it shares no code, no parameter tree and no config
class with the package. Its inputs are a dict of arrays under their Hugging Face names, and the dict of
`config.json`. It is slow and obvious on purpose: one sequence and one expert at a time, in float64 by default.
"""

from tests.reference.model import ActivationRecord, Edits, ReferenceModel

__all__ = ["ActivationRecord", "Edits", "ReferenceModel"]
