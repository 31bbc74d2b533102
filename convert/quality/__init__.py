"""How close one model's weights and words are to another's: what ``python -m convert.verify`` measures."""
