"""``python -m glm_jax.bench``: tokens per second of this program and of a peer, measured in turn in one run."""
