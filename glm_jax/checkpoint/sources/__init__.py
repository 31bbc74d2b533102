"""Weight sources: every kind of checkpoint behind one interface."""
