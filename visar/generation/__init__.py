"""Generation: a loaded model with its drafters, calls of it, and their outputs. Independent of diffusers."""
