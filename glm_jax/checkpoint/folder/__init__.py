"""The converted folder: its layout, manifest and arrays on disk."""
