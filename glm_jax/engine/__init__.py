"""Requests over time: from prompts and options to batches, compiled steps, and completions."""
