"""The engine: sessions (model, cache, guidance), counter-based noise, and the loop that runs a sampler."""
