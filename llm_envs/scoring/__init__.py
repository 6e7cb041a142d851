"""Scores of texts: pure functions from a prediction and its references to numbers in [0, 1]."""
