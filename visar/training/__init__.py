"""Training of visar's own models: `visar train tokenizer` and `visar train ar`."""
