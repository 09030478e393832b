"""From words to token ids: prompts, and the controls that name words."""

import difflib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from minigpt_pl.config import CONTROLS, NUMBER_CONTROLS, WordControls, forced_words_problems, range_problems
from minigpt_pl.errors import InputError
from minigpt_pl.generation.controls import Controls
from minigpt_pl.text_model import TextModel
from minigpt_pl.tokenizer import END, PADDING_ID, UNKNOWN_ID

HUGGING_FACE_NAMES = {"max_new_tokens": "num_tokens", "do_sample": "temperature"}
NOT_IN_VOCABULARY = "not in the model's vocabulary; use words that it knows"


def unknown_words(tokenizer: Tokenizer, prompt: str) -> list[str]:
    """The words of the prompt that are not in the vocabulary, as typed."""
    encoding = tokenizer.encode(prompt)
    return [prompt[slice(*span)] for id_, span in zip(encoding.ids, encoding.offsets, strict=True) if id_ == UNKNOWN_ID]


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[str], setting: str = "prompt") -> list[list[int]]:
    """The ids of the prompts.

    Args:
        setting: name of the setting, for the error messages.

    Raises:
        InputError: one line per prompt without a known word.
    """
    all_ids, problems = [], []
    for prompt in prompts:
        # bpe and char would read the white space at the end, and generate it again.
        ids = _encode(tokenizer, prompt.rstrip()) if isinstance(prompt, str) else None
        if ids is None:
            reason = "is not Unicode text; give it in UTF-8" if isinstance(prompt, str) else "must be a text; quote it"
            problems.append(f"{setting}={prompt!r:.200}: {reason}")
        elif not ids:
            problems.append(f"{setting}={prompt!r:.200}: has no words; give the start of a text")
        elif set(ids) == {UNKNOWN_ID}:
            problems.append(f"{setting}={prompt!r:.200}: the model knows none of its words; use more common words")
        else:
            all_ids.append(ids)
    if problems:
        raise InputError(*problems)
    return all_ids


def controls_on_ids(model: TextModel, values: Mapping[str, Any]) -> tuple[Controls, dict[str, Any]]:
    """Translate controls that name words into controls on token ids.

    Args:
        values: sampling controls by name, as `generate_text` takes them; `max_tokens` is an alias of `num_tokens`.

    Returns:
        The controls on ids, and all controls by name, ready for JSON.

    Raises:
        InputError: one line per control that is unknown, has a wrong type, is out of range or names unknown words.
    """
    values = dict(values)
    numbers_of_tokens = [values.pop(name, None) for name in ("num_tokens", "max_tokens")]
    counts = [count for count in numbers_of_tokens if count is not None]
    choices = ", ".join(CONTROLS)
    unknown = [name for name in values if name not in CONTROLS]
    problems = []
    for name in unknown:
        known = HUGGING_FACE_NAMES.get(name)
        names = [known] if known else difflib.get_close_matches(name, CONTROLS, 1)
        similar = [f"did you mean {choice}? " for choice in names]
        problems.append(f"{name}={values[name]!r}: no such control; {''.join(similar)}choose from {choices}")
    if len(counts) > 1:
        problems.append(f"max_tokens={counts[1]}: is an alias of num_tokens; give one of them")
    if problems:
        raise InputError(*problems)
    given = WordControls(*counts, **values)
    if problems := [*range_problems(given), *forced_words_problems(given.forced_words)]:
        raise InputError(*problems)
    tokenizer, forced_words = model.tokenizer, given.forced_words or {}
    banned, stops = (
        {word: _encode(tokenizer, word) or [] for word in words} for words in (given.banned_words, given.stop_words)
    )
    if unused := [word for word, ids in banned.items() if not ids or UNKNOWN_ID in ids]:
        warnings.warn(f"banned_words={unused}: not in the model's vocabulary, so it has no effect", stacklevel=2)
    forced_ids: dict[int, int] = {}
    problems += _forced_problems(tokenizer, forced_words, given.num_tokens, forced_ids)
    for word, ids in stops.items():
        if not ids or UNKNOWN_ID in ids:
            problems.append(f"stop_words={[word]}: {NOT_IN_VOCABULARY}")
        elif ids in banned.values():
            problems.append(f"stop_words={[word]}: banned_words has it too; leave it out of one of them")
    for word, ids in banned.items():
        if len(ids) == 1 and ids[0] in forced_ids.values():
            problems.append(f"banned_words={[word]}: forced_words has it too; leave it out of one of them")
    never_generated = [PADDING_ID, UNKNOWN_ID]
    end_id = tokenizer.token_to_id(END)
    if model.end_id is None and end_id is not None:  # a network trained without [END] would generate it at random
        never_generated.append(end_id)
    try:
        controls = Controls(
            **{name: getattr(given, name) for name in NUMBER_CONTROLS},
            vocab_size=model.network.vocab_size,
            end_id=model.end_id,
            banned_ids=[*never_generated, *(ids[0] for ids in banned.values() if len(ids) == 1)],
            banned_sequences=[ids for ids in banned.values() if len(ids) > 1 and UNKNOWN_ID not in ids],
            stop_sequences=[ids for ids in stops.values() if ids],
            forced_ids=forced_ids,
        )
    except InputError as error:
        problems += error.problems
    if problems:
        raise InputError(*problems)
    settings = {name: getattr(controls, name) for name in NUMBER_CONTROLS}
    settings = {name: value.item() if hasattr(value, "item") else value for name, value in settings.items()}  # NumPy
    words = {"banned_words": [*banned], "stop_words": [*stops], "forced_words": dict(forced_words)}
    return controls, settings | words


def _encode(tokenizer: Tokenizer, text: str) -> list[int] | None:
    """The ids of a text; None if it has a lone surrogate, which stands for a byte that is not UTF-8."""
    try:
        return list(tokenizer.encode(text).ids)
    except (UnicodeEncodeError, TypeError):
        return None


def _forced_problems(
    tokenizer: Tokenizer, words: Mapping[int, str], num_tokens: int, forced_ids: dict[int, int]
) -> Iterator[str]:
    """Fill `forced_ids` (position -> id). Yield one line for each entry that is impossible."""
    for position, word in words.items():
        ids = _encode(tokenizer, word) or []
        positions = range(position, position + len(ids))
        name = f"forced_words={{{position}: {word!r}}}"
        if not ids or UNKNOWN_ID in ids:
            yield f"{name}: {NOT_IN_VOCABULARY}"
        elif position < 0:
            yield f"{name}: positions start at 0, the first new token; give 0 or more"
        elif positions[-1] >= num_tokens:
            yield f"{name}: position {positions[-1]} must be below num_tokens={num_tokens}; raise num_tokens"
        elif taken := [at for at in positions if at in forced_ids]:
            yield f"{name}: position {taken[0]} is taken; leave room for {len(ids)} tokens"
        else:
            forced_ids |= dict(zip(positions, ids, strict=True))
