"""Text in, text out: `generate_text` and its variants for many prompts, for streams, and for records."""

import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from minigpt_pl.config import NumberControls
from minigpt_pl.errors import InputError
from minigpt_pl.generation.controls import Controls
from minigpt_pl.generation.engine import generate_ids, stream_ids
from minigpt_pl.generation.prompts import controls_on_ids, encode_prompts, unknown_words
from minigpt_pl.text_model import TextModel

BATCH_TEXTS = 256  # generated at once; limits the memory for a thousand prompts
MAX_SAMPLES = 100_000  # per prompt and call


@dataclass(frozen=True)
class Record:
    """A generated text with all details.

    Attributes:
        prompt: as given.
        text: the prompt without trailing white space, then `tokens`, joined.
        tokens: the new words, each with the space before it, if it has one.
        probabilities: of each token in the network's own distribution: temperature 1, no controls, all words.
        ranks: of each token in the same distribution; 1 is the likeliest.
        entropies: of the distribution after the controls, from which each token was drawn; in bits.
        unknown_words: words of the prompt that are not in the vocabulary.
        settings: all controls by name.
        seed: the random seed that gives this text again.
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


def generate_text(
    model: TextModel,
    prompt: str,
    num_tokens: int | None = None,
    temperature: float = NumberControls.temperature,
    top_k: int | None = NumberControls.top_k,
    seed: int | None = None,
    **controls: Any,
) -> str:
    """Continue a prompt. This is the call of the notebook's homework.

    Args:
        model: from `load`.
        prompt: any text. It is split into words as the training text was.
        num_tokens: number of new tokens, 60 by default. Fewer only if the model ends the text. `max_tokens`, the name
            in the notebook's code, is an alias.
        temperature: 0 (greedy) or above. Below 1 the text is safer, above 1 it is bolder.
        top_k: draw from the k likeliest words, 1 to the size of the vocabulary; None: from all words.
        seed: random seed, 0 to 2**31 - 1. The same seed gives the same text. None: a new text each time.
        controls: all other fields of `config.WordControls`: `min_tokens`, `top_p`, `min_p`, `typical_p`,
            `repetition_penalty`, `no_repeat_ngram_size`, `num_beams`, `length_penalty`, `banned_words`, `stop_words`
            and `forced_words`.

    Returns:
        The prompt without trailing white space, and its continuation.

    Raises:
        InputError: a value is out of range, or the model knows no word of the prompt.

    Example:
        >>> model = minigpt_pl.load("outputs/quick-001")
        >>> generate_text(model, "this movie is", num_tokens=60, temperature=0.8, top_k=20)
    """
    return generate_texts(model, [prompt], num_tokens, temperature, top_k, seed, 1, **controls)[0][0]


def generate_texts(
    model: TextModel,
    prompts: str | Iterable[str],
    num_tokens: int | None = None,
    temperature: float = NumberControls.temperature,
    top_k: int | None = NumberControls.top_k,
    seed: int | None = None,
    num_samples: int = 1,
    **controls: Any,
) -> list[list[str]]:
    """`num_samples` texts for each prompt: a list of texts per prompt, in the order of the prompts.

    Sample i of each prompt has the random seed `seed + i`. Other arguments and errors: `generate_text`.
    """
    controls |= {"num_tokens": num_tokens, "temperature": temperature, "top_k": top_k}
    request = _prepare(model, prompts, seed, num_samples, controls)
    texts: list[str] = []
    for jobs in request.batches():
        new_ids = generate_ids(model.prepared, [job.ids for job in jobs], request.controls, [job.seed for job in jobs])
        texts += [
            job.prompt.rstrip() + decode_continuation(model.tokenizer, ids)
            for job, ids in zip(jobs, new_ids, strict=True)
        ]
    return [texts[i : i + num_samples] for i in range(0, len(texts), num_samples)]


def generate(
    model: TextModel,
    prompts: str | Iterable[str],
    num_tokens: int | None = None,
    temperature: float = NumberControls.temperature,
    top_k: int | None = NumberControls.top_k,
    seed: int | None = None,
    num_samples: int = 1,
    **controls: Any,
) -> list[Record]:
    """The texts of `generate_texts` as a flat list of records with all details."""
    controls |= {"num_tokens": num_tokens, "temperature": temperature, "top_k": top_k}
    return list(stream_records(model, prompts, seed, num_samples, **controls))


def stream_text(
    model: TextModel,
    prompt: str,
    num_tokens: int | None = None,
    temperature: float = NumberControls.temperature,
    top_k: int | None = NumberControls.top_k,
    seed: int | None = None,
    **controls: Any,
) -> Iterator[str]:
    """The new words of `generate_text`, one by one. Each comes with the space before it, if it has one.

    Example:
        >>> for word in stream_text(model, "this movie is"):
        ...     print(word, end="", flush=True)
    """
    controls |= {"num_tokens": num_tokens, "temperature": temperature, "top_k": top_k}
    return (word for word, _ in stream_words(model, prompt, seed, **controls))


def stream_words(
    model: TextModel, prompt: str, seed: int | None = None, with_probabilities: bool = False, **controls: Any
) -> Iterator[tuple[str, float | None]]:
    """`stream_text` with the probability of each word as in `Record`. It is None unless requested."""
    request = _prepare(model, [prompt], seed, 1, controls)
    [job] = request.jobs
    steps = stream_ids(model.prepared, [job.ids], request.controls, [job.seed], with_probabilities)
    return (
        (decode_continuation(model.tokenizer, step.ids), step.probabilities[0] if with_probabilities else None)
        for step in steps
        if step.ids != [request.controls.end_id]
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
    request = _prepare(model, prompts, seed, num_samples, controls)
    return (record for jobs in request.batches() for record in _records(model, jobs, request, with_probabilities))


class _Job(NamedTuple):
    """One text to generate."""

    prompt: str
    ids: list[int]
    seed: int


class _Request(NamedTuple):
    controls: Controls
    settings: dict[str, Any]  # all controls by name, for the records
    jobs: list[_Job]

    def batches(self) -> Iterator[list[_Job]]:
        return (self.jobs[start : start + BATCH_TEXTS] for start in range(0, len(self.jobs), BATCH_TEXTS))


def _prepare(
    model: TextModel, prompts: str | Iterable[str], seed: int | None, num_samples: int, controls: dict[str, Any]
) -> _Request:
    """Check everything, and translate words to ids."""
    if not isinstance(model, TextModel):
        raise InputError(f"model={model!r:.60}: must be the result of minigpt_pl.load(RUN)")
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    problems: list[str] = []
    try:
        on_ids, settings = controls_on_ids(model, controls)
    except InputError as error:
        problems += error.problems
    if not 1 <= num_samples <= MAX_SAMPLES:
        problems.append(f"num_samples={num_samples}: must be 1 to {MAX_SAMPLES:,}; use other seeds for more")
    elif num_samples > 1:
        problems += [
            f"num_samples={num_samples}: all texts are the same with {name}={value}; set num_samples=1"
            for name, value in (("temperature", 0), ("top_k", 1))
            if controls.get(name) == value
        ]
    largest_seed = 2**31 - max(num_samples, 1)  # each sample has a seed of its own
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, Integral)):
        problems.append(f"seed={seed!r}: must be a whole number")
    elif seed is not None and not 0 <= seed <= largest_seed:
        problems.append(f"seed={seed}: must be 0 to {largest_seed}, because each of num_samples={num_samples} adds 1")
    if problems:
        raise InputError(*problems)
    first_seed = secrets.randbelow(largest_seed + 1) if seed is None else int(seed)
    jobs = [
        _Job(prompt, ids, first_seed + sample)
        for prompt, ids in zip(prompts, encode_prompts(model.tokenizer, prompts), strict=True)
        for sample in range(num_samples)
    ]
    return _Request(on_ids, settings, jobs)


def _records(model: TextModel, jobs: Sequence[_Job], request: _Request, with_probabilities: bool) -> Iterator[Record]:
    checkpoint = None if model.checkpoint is None else str(model.checkpoint)
    records = [
        Record(prompt, "", [], [], [], [], unknown_words(model.tokenizer, prompt), request.settings, seed, checkpoint)
        for prompt, _, seed in jobs
    ]
    prompts, seeds = [job.ids for job in jobs], [job.seed for job in jobs]
    for step in stream_ids(model.prepared, prompts, request.controls, seeds, with_probabilities):
        for row, (text, id_) in enumerate(zip(step.texts, step.ids, strict=True)):
            if id_ != request.controls.end_id:
                record = records[text]
                record.tokens.append(decode_continuation(model.tokenizer, [id_]))
                if with_probabilities:
                    record.probabilities.append(step.probabilities[row])
                    record.ranks.append(step.ranks[row])
                    record.entropies.append(step.entropies[row])
    for record in records:
        yield replace(record, text=record.prompt.rstrip() + "".join(record.tokens))


def decode_continuation(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of tokens that follow others.

    Whether a word takes a space before it depends on the word alone. Only the first word of a text has none.
    """
    return str(tokenizer.decode([*ids[:1], *ids]))[len(tokenizer.decode(ids[:1])) :]
