"""Converts checkpoints (``python -m convert``) and measures the result (``convert.verify``, ``convert.compare``)."""
