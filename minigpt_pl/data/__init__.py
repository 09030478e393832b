"""Text to batches: where text comes from, its ids and their cache, the order of batches, the DataModule."""
