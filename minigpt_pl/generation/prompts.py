"""Words to ids: prompts, and the controls that name words."""

from collections.abc import Mapping, Sequence

from tokenizers import Tokenizer

from minigpt_pl.errors import InputError
from minigpt_pl.tokenizer import UNKNOWN_ID

UNKNOWN_WORD = "not in the model's vocabulary; use words that it knows"


def unknown_words(tokenizer: Tokenizer, prompt: str) -> list[str]:
    """The prompt's words, as typed, that are not in the vocabulary."""
    encoding = tokenizer.encode(prompt)
    return [
        prompt[slice(*place)] for id_, place in zip(encoding.ids, encoding.offsets, strict=True) if id_ == UNKNOWN_ID
    ]


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[str], setting: str = "prompt") -> list[list[int]]:
    """The prompts' ids.

    Args:
        setting: named in the error.

    Raises:
        InputError: one line for each prompt that has no word, or none that the model knows.
    """
    all_ids, problems = [], []
    for prompt in prompts:
        if not isinstance(prompt, str):
            problems.append(f"{setting}={prompt!r}: must be a text; give it in quotes")
            continue
        try:
            all_ids.append(tokenizer.encode(prompt).ids)
        except (UnicodeEncodeError, TypeError):  # half a surrogate pair: bytes that were no UTF-8
            problems.append(f"{setting}={prompt!r}: is not Unicode text; give it in UTF-8")
            continue
        if not all_ids[-1]:
            problems.append(f"{setting}={prompt!r}: has no words; give the beginning of a text")
        elif all(id_ == UNKNOWN_ID for id_ in all_ids[-1]):
            problems.append(f"{setting}={prompt!r}: none of its words is in the model's vocabulary; use commoner words")
    if problems:
        raise InputError(*problems)
    return all_ids


def word_ids(tokenizer: Tokenizer, word: str) -> list[int]:
    """The ids of a word of the controls; none for a text without words."""
    try:
        return tokenizer.encode(word).ids
    except (UnicodeEncodeError, TypeError):  # half a surrogate pair: no text has it
        return [UNKNOWN_ID]


def forced_ids_of(tokenizer: Tokenizer, words: Mapping[int, str], num_tokens: int) -> tuple[dict[int, int], list[str]]:
    """The `forced_words` by place, as place -> id, and a line for each that cannot be."""
    forced, problems = {}, []
    for place, text in words.items():
        ids = word_ids(tokenizer, text)
        name = f"forced_words={{{place}: {text!r}}}"
        if not ids or UNKNOWN_ID in ids:
            problems.append(f"{name}: {UNKNOWN_WORD}")
        elif taken := [at for at in range(place, place + len(ids)) if at in forced]:
            problems.append(f"{name}: place {taken[0]} is taken by another; leave room for {len(ids)} tokens")
        elif place < 0:
            problems.append(f"{name}: places are counted from 0, the first new token; give 0 or more")
        elif place + len(ids) > num_tokens:
            last = place + len(ids) - 1
            problems.append(f"{name}: place {last} is beyond the last, {num_tokens - 1}; raise num_tokens={num_tokens}")
        else:
            forced |= dict(enumerate(ids, place))
    return forced, problems
