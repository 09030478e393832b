"""Text in, text out: `generate_text` and its variants for many prompts, for streams, and for records."""

import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Unpack

from tokenizers import Tokenizer

from minigpt_pl import notebook
from minigpt_pl.config import ControlArguments, NumberControls, SampleConfig, range_problems
from minigpt_pl.errors import InputError
from minigpt_pl.generation.controls import Controls, lists_controls
from minigpt_pl.generation.engine import generate_ids, stream_ids
from minigpt_pl.generation.prompts import controls_on_ids, encode_prompts, unknown_words
from minigpt_pl.text_model import TextModel, open_model

BATCH_TEXTS = 256  # texts generated at once; limits the memory for many prompts


@dataclass(frozen=True)
class Record:
    """A generated text with all details.

    Attributes:
        prompt: the prompt as given.
        text: the prompt without trailing white space, then `tokens`, joined.
        tokens: the new words, each with the space before it, if any.
        probabilities: probability of each token at temperature 1, without controls.
        ranks: rank of each token in the same distribution; the likeliest has rank 1.
        entropies: entropy, in bits, of the distribution from which each token was drawn, after the controls.
        unknown_words: words of the prompt that are not in the vocabulary.
        settings: all controls by name.
        seed: the random seed that reproduces this text.
        checkpoint: path of the weights; None if the network was not loaded from a file.
    """

    prompt: str
    text: str
    tokens: list[str]
    probabilities: list[float]
    ranks: list[int]
    entropies: list[float]
    unknown_words: list[str]
    settings: dict[str, Any]
    seed: int
    checkpoint: str | None

    def _repr_html_(self) -> str:
        """For notebooks: the text, with each new word coloured by its probability."""
        words = zip_longest(self.tokens, self.probabilities, self.ranks)  # without probabilities, None
        parts = [(self.prompt.rstrip(), None, None), *words]
        settings = " ".join(f"{name}={value}" for name, value in {**self.settings, "seed": self.seed}.items())
        return notebook.paragraph([notebook.coloured(*part) for part in parts], settings)


class Records(list[Record]):
    """A list of records that a notebook shows as texts."""

    def _repr_html_(self) -> str:
        return "".join(record._repr_html_() for record in self)


@lists_controls
def generate_text(
    model: TextModel | str | Path,
    prompt: str,
    num_tokens: int | None = None,
    temperature: float = NumberControls.temperature,
    top_k: int | None = NumberControls.top_k,
    seed: int | None = None,
    **controls: Unpack[ControlArguments],
) -> str:
    """Continue a prompt. The notebook's homework asks for this function.

    Args:
        model: from `load`. Or a run or its folder, which is then loaded in each call.
        prompt: any text. It is split into words in the same way as the training text.
        num_tokens: number of new tokens, 60 by default. Fewer only if the model ends the text. `max_tokens`, the name
            in the notebook's code, is an alias.
        temperature: 0 (greedy) or above. Below 1 the text is more predictable, above 1 more surprising.
        top_k: draw from the k likeliest words, 1 to the size of the vocabulary; None to draw from all words.
        seed: random seed, 0 to 2**31 - 1. The same seed gives the same text. None for a new text each time.
        controls: the other sampling controls: `min_tokens`, `top_p`, `min_p`, `typical_p`, `repetition_penalty`,
            `no_repeat_ngram_size`, `num_beams`, `length_penalty`, `banned_words`, `stop_words` and `forced_words`.
            docs/sampling.md explains them.

    Returns:
        The prompt without trailing white space, and its continuation.

    Raises:
        InputError: a value is out of range, or the model knows no word of the prompt.

    Example:
        >>> model = minigpt_pl.load("outputs/quick-001")
        >>> generate_text(model, "this movie is", num_tokens=60, temperature=0.8, top_k=20)
    """
    return generate_texts(model, [prompt], num_tokens, temperature, top_k, seed, 1, **controls)[0][0]


@lists_controls
def generate_texts(
    model: TextModel | str | Path,
    prompts: str | Iterable[str],
    num_tokens: int | None = None,
    temperature: float = NumberControls.temperature,
    top_k: int | None = NumberControls.top_k,
    seed: int | None = None,
    num_samples: int = 1,
    **controls: Unpack[ControlArguments],
) -> list[list[str]]:
    """Texts for several prompts: `result[p][i]` is sample i of prompt p, a list of `num_samples` texts per prompt.

    Sample i of each prompt has the random seed `seed + i`. Other arguments and errors: `generate_text`.
    """
    model = open_model(model)
    values = {"num_tokens": num_tokens, "temperature": temperature, "top_k": top_k, **controls}
    on_ids, records, all_ids = _prepare(model, prompts, seed, num_samples, values)
    texts: list[str] = []
    for start in range(0, len(records), BATCH_TEXTS):  # decoding whole texts is faster than decoding each token
        batch, ids = records[start : start + BATCH_TEXTS], all_ids[start : start + BATCH_TEXTS]
        all_new_ids = generate_ids(model.prepared, ids, on_ids, [record.seed for record in batch])
        for record, new_ids in zip(batch, all_new_ids, strict=True):
            texts.append(record.prompt.rstrip() + decode_continuation(model.tokenizer, new_ids))
    return [texts[i : i + num_samples] for i in range(0, len(texts), num_samples)]


@lists_controls
def generate(
    model: TextModel | str | Path,
    prompts: str | Iterable[str],
    num_tokens: int | None = None,
    *,
    temperature: float = NumberControls.temperature,
    top_k: int | None = NumberControls.top_k,
    seed: int | None = None,
    num_samples: int = 1,
    **controls: Unpack[ControlArguments],
) -> Records:
    """The texts of `generate_texts` as a flat list of records with all details. The arguments are the same."""
    values: dict[str, Any] = {"num_tokens": num_tokens, "temperature": temperature, "top_k": top_k, **controls}
    return Records(stream_records(open_model(model), prompts, seed, num_samples, **values))


@lists_controls
def stream_text(
    model: TextModel | str | Path,
    prompt: str,
    num_tokens: int | None = None,
    *,
    temperature: float = NumberControls.temperature,
    top_k: int | None = NumberControls.top_k,
    seed: int | None = None,
    **controls: Unpack[ControlArguments],
) -> Iterator[str]:
    """The new words of `generate_text`, one by one. Each has the space before it, if any. The arguments are the same.

    Example:
        >>> for word in stream_text(model, "this movie is", temperature=0.8, top_k=20):
        ...     print(word, end="", flush=True)
    """
    values: dict[str, Any] = {"num_tokens": num_tokens, "temperature": temperature, "top_k": top_k, **controls}
    return (word for word, _ in stream_words(open_model(model), prompt, seed, **values))


def stream_words(
    model: TextModel, prompt: str, seed: int | None = None, with_probabilities: bool = False, **controls: Any
) -> Iterator[tuple[str, float | None]]:
    """`stream_text` with the probability of each word as in `Record`. It is None unless requested."""
    on_ids, [record], prompts = _prepare(model, [prompt], seed, 1, controls)
    steps = stream_ids(model.prepared, prompts, on_ids, [record.seed], with_probabilities)
    return (
        (decode_continuation(model.tokenizer, step.ids), step.probabilities[0] if with_probabilities else None)
        for step in steps
        if step.ids != [on_ids.end_id]
    )


def stream_records(
    model: TextModel,
    prompts: str | Iterable[str],
    seed: int | None = None,
    num_samples: int = 1,
    with_probabilities: bool = True,
    **controls: Any,
) -> Iterator[Record]:
    """The records of `generate`, in batches of `BATCH_TEXTS`. Errors come before the first record.

    Without `with_probabilities` the fields `probabilities`, `ranks` and `entropies` stay empty, which is faster.
    """
    return _complete(model, *_prepare(model, prompts, seed, num_samples, controls), with_probabilities)


def _prepare(
    model: TextModel, prompts: str | Iterable[str], seed: int | None, num_samples: int, controls: dict[str, Any]
) -> tuple[Controls, list[Record], list[list[int]]]:
    """Check everything. Returns the controls on ids, and for each text an empty record and the ids of its prompt."""
    if not isinstance(prompts, Iterable):
        raise InputError(f"prompt={prompts!r}: must be a text or a list of texts")
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    problems = [*range_problems(SampleConfig(num_samples=num_samples, seed=seed))]
    if problems:
        raise InputError(*problems)
    try:
        on_ids, settings = controls_on_ids(model, controls)
    except InputError as error:
        problems += error.problems
    if num_samples > 1:
        problems += [
            f"num_samples={num_samples}: all texts are the same with {name}={value}; set num_samples=1"
            for name, value in (("temperature", 0), ("top_k", 1))
            if controls.get(name) == value
        ]
    largest_seed = 2**31 - num_samples  # each sample has its own seed
    if seed is not None and seed > largest_seed:
        problems.append(f"seed={seed}: must be 0 to {largest_seed}, because each of num_samples={num_samples} adds 1")
    if problems:
        raise InputError(*problems)
    first_seed = secrets.randbelow(largest_seed + 1) if seed is None else int(seed)
    checkpoint = None if model.checkpoint is None else str(model.checkpoint)
    records, all_ids = [], []
    for prompt, ids in zip(prompts, encode_prompts(model.tokenizer, prompts), strict=True):
        unknown = unknown_words(model.tokenizer, prompt)
        for sample in range(num_samples):
            records.append(Record(prompt, "", [], [], [], [], unknown, settings, first_seed + sample, checkpoint))
            all_ids.append(ids)
    return on_ids, records, all_ids


def _complete(
    model: TextModel, controls: Controls, records: list[Record], prompts: list[list[int]], with_probabilities: bool
) -> Iterator[Record]:
    """Generate the words of the records."""
    words: dict[int, str] = {}  # decoded tokens
    for start in range(0, len(records), BATCH_TEXTS):
        batch = records[start : start + BATCH_TEXTS]
        batch_ids, seeds = prompts[start : start + BATCH_TEXTS], [record.seed for record in batch]
        for step in stream_ids(model.prepared, batch_ids, controls, seeds, with_probabilities):
            for row, (text, id_) in enumerate(zip(step.texts, step.ids, strict=True)):
                if id_ == controls.end_id:
                    continue
                if id_ not in words:
                    words[id_] = decode_continuation(model.tokenizer, [id_])
                batch[text].tokens.append(words[id_])
                if with_probabilities:
                    batch[text].probabilities.append(step.probabilities[row])
                    batch[text].ranks.append(step.ranks[row])
                    batch[text].entropies.append(step.entropies[row])
        for record in batch:
            yield replace(record, text=record.prompt.rstrip() + "".join(record.tokens))


def decode_continuation(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of tokens that follow others.

    Only the word decides if it has a space before it. The first word of a text never has one.
    """
    return str(tokenizer.decode([*ids[:1], *ids]))[len(tokenizer.decode(ids[:1])) :]
