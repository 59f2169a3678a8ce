"""Model families: weights and arithmetic, nothing of samplers, caches or guidance."""
