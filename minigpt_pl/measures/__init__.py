"""Measures of a network and of text. Knows nothing of training."""
