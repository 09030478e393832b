"""A miniature GPT in PyTorch and Lightning: the well-known Keras notebook as a library.

Example:
    >>> import minigpt_pl
    >>> model = minigpt_pl.load("outputs/quick-001")
    >>> minigpt_pl.generate_text(model, "this movie is", num_tokens=60, temperature=0.8, top_k=20)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
_MODULES = ("errors", "model", "text_model", "generation.text", "generation.scoring")


def __getattr__(name: str) -> Any:
    """Import a name of `__all__` when it is first used. PyTorch takes seconds; a wrong setting must be told soon."""
    if name in __all__:
        for module in _MODULES:
            if hasattr(found := importlib.import_module(f"{__name__}.{module}"), name):
                return getattr(found, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
