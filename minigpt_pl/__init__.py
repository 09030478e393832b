"""The miniature GPT of the well-known notebook, as software.

import minigpt_pl
model = minigpt_pl.load("outputs/quick-001")
minigpt_pl.generate_text(model, "this movie is", num_tokens=60, temperature=0.8, top_k=20)
"""

from minigpt_pl.errors import InputError
from minigpt_pl.generation.text import TextModel, generate_text, generate_texts, load
from minigpt_pl.measures.likelihood import ScoredWord, score
from minigpt_pl.model import MiniGPT

__all__ = ["InputError", "MiniGPT", "ScoredWord", "TextModel", "generate_text", "generate_texts", "load", "score"]
