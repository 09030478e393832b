"""A miniature GPT in PyTorch and Lightning: the well-known Keras notebook as a library.

Example:
    >>> import minigpt_pl
    >>> model = minigpt_pl.load("outputs/quick-001")
    >>> minigpt_pl.generate_text(model, "this movie is", num_tokens=60, temperature=0.8, top_k=20)
"""

from minigpt_pl.errors import InputError
from minigpt_pl.generation.scoring import ScoredWord, score
from minigpt_pl.generation.text import Record, generate, generate_text, generate_texts, stream_text
from minigpt_pl.model import MiniGPT
from minigpt_pl.text_model import TextModel, load

__all__ = [
    "InputError",
    "MiniGPT",
    "Record",
    "ScoredWord",
    "TextModel",
    "generate",
    "generate_text",
    "generate_texts",
    "load",
    "score",
    "stream_text",
]
