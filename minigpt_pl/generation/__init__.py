"""New text: filters on logits, the engine on token ids, text in and text out. Knows nothing of training."""
