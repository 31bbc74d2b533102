"""Accelerator kernels: arrays in, arrays out, knowing nothing of any model.

There is none yet: every operation runs its reference implementation in ``glm_jax.ops``, compiled by XLA.
"""
