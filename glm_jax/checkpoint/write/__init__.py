"""Checkpoints written to disk: converted folders and Hugging Face folders."""
