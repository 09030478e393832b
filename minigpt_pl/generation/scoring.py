"""The probability of each word of a text."""

from dataclasses import dataclass
from pathlib import Path

import torch

from minigpt_pl import notebook
from minigpt_pl.cpu.linear import inference_without_autocast
from minigpt_pl.generation.engine import probabilities_and_ranks
from minigpt_pl.generation.prompts import encode_prompts
from minigpt_pl.measures.likelihood import predictions
from minigpt_pl.text_model import TextModel, open_model
from minigpt_pl.tokenizer import UNKNOWN_ID


@dataclass(frozen=True)
class ScoredWord:
    """A word of a text, with the model's prediction for it.

    Attributes:
        text: the word (`[UNK]` if unknown) with the space before it. Joined, the words are the decoded text.
        probability: probability after the words before it, 0 to 1. None for the first word: nothing comes before it.
        rank: its rank in the vocabulary; 1 is the likeliest. None for the first word.
        known: whether the word is in the vocabulary. An unknown word has the probability of all unknown words together.
    """

    text: str
    probability: float | None
    rank: int | None
    known: bool


class ScoredWords(list[ScoredWord]):
    """A list of words that a notebook shows as a text, with each word coloured by its probability."""

    def _repr_html_(self) -> str:
        words = [notebook.coloured(word.text, word.probability, word.rank) for word in self]
        return notebook.paragraph(words, notebook.LEGEND)


def score(model: TextModel | str | Path, text: str) -> ScoredWords:
    """The probability and rank of each word of a text.

    Args:
        model: a model from `load`. Or a run or its folder, which is then loaded.
        text: of any length. The context of a word is the last `max_length` words before it, as in generation.

    Raises:
        InputError: the text has no word that the model knows.

    Example:
        >>> for word in score(model, "this movie is great"):
        ...     print(word.text, word.probability, word.rank)
    """
    model = open_model(model)
    ids = encode_prompts(model.tokenizer, [text], "text")[0]
    probabilities: list[float | None] = [None]
    ranks: list[int | None] = [None]
    with inference_without_autocast(model.network):
        for hidden, targets in predictions(model.network, [ids], stride=1, show_progress=False):
            for rows, ids_ in zip(torch.split(hidden, 256), torch.split(targets, 256), strict=True):
                more_probabilities, more_ranks = probabilities_and_ranks(model.network.output(rows), ids_)
                probabilities += more_probabilities
                ranks += more_ranks
    # Decoding puts no space before the first word of a text. So decode each other word together with the first one.
    first = model.tokenizer.decode(ids[:1])
    pairs = model.tokenizer.decode_batch([[ids[0], id_] for id_ in ids[1:]])
    words = [first, *(pair[len(first) :] for pair in pairs)]
    known = [id_ != UNKNOWN_ID for id_ in ids]
    return ScoredWords(ScoredWord(*fields) for fields in zip(words, probabilities, ranks, known, strict=True))
