"""Tests of ``glm_jax.text``."""
