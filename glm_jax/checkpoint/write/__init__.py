"""Writes checkpoints: converted folders and Hugging Face folders."""
