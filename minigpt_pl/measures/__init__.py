"""Measures of texts and of networks. They know nothing of training."""
