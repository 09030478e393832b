"""The probability of each word of a text, whoever wrote it."""

from dataclasses import dataclass

from minigpt_pl.cpu.linear import inference_without_autocast
from minigpt_pl.generation.engine import probabilities_and_ranks
from minigpt_pl.generation.prompts import encode_prompts
from minigpt_pl.measures.likelihood import predictions
from minigpt_pl.text_model import TextModel
from minigpt_pl.tokenizer import UNKNOWN_ID


@dataclass(frozen=True)
class ScoredWord:
    """A word of a text, and what the model thought of it.

    Attributes:
        text: with the space before it, if it takes one; `[UNK]` for an unknown word. Joined, the words are
            `tokenizer.decode(tokenizer.encode(text).ids)`.
        probability: given the words before it, in [0, 1]. None for the first: the network has learned to go on with a
            text, not to begin one.
        rank: among all words of the vocabulary, 1 for the likeliest; None for the first.
        known: whether it is in the vocabulary. The probability of an unknown word is that of any unknown word.
    """

    text: str
    probability: float | None
    rank: int | None
    known: bool


def score(model: TextModel, text: str) -> list[ScoredWord]:
    """How likely a model finds each word of a text.

    Args:
        model: from `load`.
        text: any text, long ones too; a word is predicted from the last `max_length` before it, as when it is written.

    Raises:
        InputError: the text has no words, or none that the model knows.

    Example:
        >>> for word in score(model, "this movie is great"):
        ...     print(word.text, word.probability, word.rank)
    """
    ids = encode_prompts(model.tokenizer, [text], "text")[0]
    probabilities: list[float | None] = [None]
    ranks: list[int | None] = [None]
    with inference_without_autocast(model.network):
        for hidden, targets in predictions(model.network, [ids], stride=1, show_progress=False):
            for rows, wanted in zip(hidden.split(256), targets.split(256), strict=True):
                some_probabilities, some_ranks = probabilities_and_ranks(model.network.output(rows), wanted)
                probabilities += some_probabilities
                ranks += some_ranks
    # Whether a word takes a space depends on itself alone, but a text's first never has one.
    begin = model.tokenizer.decode(ids[:1])
    later = model.tokenizer.decode_batch([[ids[0], id_] for id_ in ids[1:]])
    texts = [begin, *(both[len(begin) :] for both in later)]
    known = [id_ != UNKNOWN_ID for id_ in ids]
    return [ScoredWord(*word) for word in zip(texts, probabilities, ranks, known, strict=True)]
