"""Honest evaluation: the exactness proof (`visar verify`) and speed (`visar bench`)."""
