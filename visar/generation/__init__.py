"""Generation: a loaded model, its samplers and drafters, and what one call of them gives. No diffusers in here."""
