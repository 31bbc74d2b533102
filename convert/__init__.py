"""Checkpoints in and out: ``python -m convert SRC DST``."""
