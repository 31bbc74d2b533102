"""The leaf of a parameter tree, in every storage."""

from typing import TypeAlias

import jax

from glm_jax.weights.weight_matrix import WeightMatrix

Weight: TypeAlias = jax.Array | WeightMatrix
Weights: TypeAlias = dict[str, Weight]  # the parameters of one block by short name: q_a, kv_a, …, gate, up, down
