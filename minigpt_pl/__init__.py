"""A miniature GPT in PyTorch and Lightning: the well-known Keras notebook as a library.

Train in a terminal: python -m minigpt_pl.train experiment=quick. Then, in Python:

    import minigpt_pl
    model = minigpt_pl.load("quick-001")                # a run; load() opens the newest one
    model("this movie is", temperature=0.8, top_k=20)   # a text

Instead of a model, each function also takes the name of a run.

    generate_text(model, "this movie is", num_tokens=60, top_p=0.9, seed=1)    one text
    generate_texts(model, ["the plot", "the cast"], num_samples=3)             three texts per prompt
    stream_text(model, "this movie is")                                        the words, one by one
    generate(model, "this movie is")               records: words, probabilities, ranks, settings, seed
    score(model, "this movie is great")            the probability and rank of each word of a text
    to_frame(generate(model, "this movie is", num_samples=9))                  a pandas DataFrame

A notebook shows a model as a table, and records and scores as coloured words.

`model.network` is a plain torch module: logits, hidden = model.network(ids). `model.tokenizer.encode(text).ids` are
its ids. Bad input raises InputError, which names the argument, its value and the remedy.

More: help(minigpt_pl.generate_text), and the pages in docs/. The other commands: python -m minigpt_pl
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minigpt_pl.errors import InputError
    from minigpt_pl.generation.scoring import ScoredWord, score
    from minigpt_pl.generation.text import Record, generate, generate_text, generate_texts, stream_text
    from minigpt_pl.model import MiniGPT
    from minigpt_pl.notebook import to_frame
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
    "to_frame",
]
_MODULES = ("errors", "notebook", "model", "text_model", "generation.text", "generation.scoring")


def __getattr__(name: str) -> Any:
    """Import a name of `__all__` when it is first used. PyTorch takes seconds; a wrong setting must be told soon."""
    if name in __all__:
        for module in _MODULES:
            if hasattr(found := importlib.import_module(f"{__name__}.{module}"), name):
                return getattr(found, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
