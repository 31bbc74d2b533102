"""How the built-in miniature is made: data, tokenizer, training, evaluation and card."""
