"""From text to batches: the sources of text, the token ids and their cache, the order of batches, the DataModule."""
