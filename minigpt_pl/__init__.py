"""The miniature GPT of the well-known notebook, as software.

import minigpt_pl
model = minigpt_pl.load("outputs/quick-001")
minigpt_pl.generate_text(model, "this movie is", num_tokens=60, temperature=0.8, top_k=20)
"""

from minigpt_pl.errors import InputError
from minigpt_pl.generation.scoring import ScoredWord, score
from minigpt_pl.generation.text import (
    Record,
    TextModel,
    generate,
    generate_text,
    generate_texts,
    load,
    stream_text,
)
from minigpt_pl.model import MiniGPT

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
