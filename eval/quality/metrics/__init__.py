"""Metrics over features: distances between sets of images, and scores of one set. No metric knows a network."""
