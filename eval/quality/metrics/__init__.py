"""Metrics over features: distances between sets of pictures, and scores of one set. No metric knows a network."""
