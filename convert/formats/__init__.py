"""Checkpoint formats, each as weights under their logical names."""
