"""Model families, one folder each. `visar.families.registry` finds them; nothing heavy is imported before."""
