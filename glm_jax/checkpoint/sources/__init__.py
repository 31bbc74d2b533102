"""Weight sources: one interface for reading every kind of checkpoint."""
