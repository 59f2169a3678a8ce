"""Model families, one folder each. `visar.families.registry` finds them without importing models."""
