"""Text in, text out: `load` a run, `generate_text` from it; with `generate` and `stream_text` more than the string."""

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from minigpt_pl.config import CONTROLS
from minigpt_pl.errors import InputError
from minigpt_pl.generation.controls import Controls
from minigpt_pl.generation.engine import generate_ids, stream_ids
from minigpt_pl.generation.prompts import UNKNOWN_WORD, encode_prompts, forced_ids_of, unknown_words, word_ids
from minigpt_pl.model import MiniGPT
from minigpt_pl.runs import find_checkpoint, load_network
from minigpt_pl.tokenizer import END, PADDING_ID, UNKNOWN_ID, load_tokenizer

BATCH_TEXTS = 256  # written at once; bounds the memory for a thousand prompts
MOST_SAMPLES = 100_000  # of a prompt in one call
# The controls that are the same for words and for ids.
NUMBERS = tuple(name for name in CONTROLS if not name.endswith("_words"))


@dataclass
class TextModel:
    """A network with its words: what `load` gives and `generate_text` takes.

    Attributes:
        end_id: the token that ends a text; None: the network was trained without one.
        checkpoint: where it was read from.
    """

    network: MiniGPT
    tokenizer: Tokenizer
    end_id: int | None
    checkpoint: Path | None = None


@dataclass(frozen=True)
class Record:
    """A text and all that is known of it.

    Attributes:
        prompt: as given.
        text: the prompt, less white space at its end, and its continuation: `tokens`, joined.
        tokens: the new words, each with the space before it, if it has one.
        probabilities: what the network itself gave each token: temperature 1, no controls, over the whole vocabulary.
        ranks: 1 where the token was the network's likeliest.
        entropies: of the distribution that each was drawn from, after the controls; bits, 0 where nothing was drawn.
        unknown_words: the prompt's words that are not in the vocabulary.
        settings: every control.
        seed: with which this text comes again.
        checkpoint: what wrote it; None: a network that was not loaded.
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


def load(path: str | Path) -> TextModel:
    """Load a trained model.

    Args:
        path: a run folder (its best checkpoint, else its last), or a checkpoint inside one.

    Raises:
        InputError: there is none, or it is not one of ours.
    """
    checkpoint = find_checkpoint(Path(path))
    network, end_id = load_network(checkpoint)
    tokenizer = load_tokenizer(checkpoint.parent.parent / "tokenizer.json")
    if tokenizer.get_vocab_size() != network.vocab_size:
        raise InputError(
            f"{checkpoint}: {network.vocab_size} logits, but the tokenizer.json beside it has"
            f" {tokenizer.get_vocab_size()} entries; copy both from the same run"
        )
    return TextModel(network.eval(), tokenizer, end_id, checkpoint)


def generate_text(
    model: TextModel,
    prompt: str,
    num_tokens: int | None = None,
    temperature: float = 0.8,
    top_k: int | None = 20,
    seed: int | None = None,
    **controls,
) -> str:
    """Continue a prompt: the seed homework's call.

    Args:
        model: from `load`.
        prompt: any text; it is split into words as the training text was.
        num_tokens: new tokens, 60 unless given; fewer only where the model ends the text itself. The seed's own code
            calls it `max_tokens`, which is taken too.
        temperature: 0 (greedy) or above; under 1 is safer, over 1 is bolder.
        top_k: draw from this many likeliest words, 1 to the vocabulary's size; None: from all.
        seed: 0 to 2**31 - 1; the same seed gives the same text; None: a new one each time.
        controls: `banned_words`: never written; one of several tokens, as "it's", is never written as a whole
            (`[UNK]` is always banned). `stop_words`: each ends the text once `min_tokens` stand, and is its last.
            `forced_words`: place among the new tokens (0 the first) -> the word or words that begin there, whatever
            `no_repeat_ngram_size` says. And those of `generation.controls.Controls`, which gives their ranges:
            `min_tokens`, `top_p`, `min_p`, `typical_p`, `repetition_penalty`, `no_repeat_ngram_size`, `num_beams`,
            `length_penalty`.

    Returns:
        The prompt as given, less white space at its end, and its continuation.

    Raises:
        InputError: a value out of range, or a prompt without a word that the model knows.

    Example:
        >>> model = minigpt_pl.load("outputs/quick-001")
        >>> generate_text(model, "this movie is", num_tokens=60, temperature=0.8, top_k=20)
    """
    return generate_texts(model, [prompt], num_tokens, temperature, top_k, seed, 1, **controls)[0][0]


def generate_texts(
    model: TextModel,
    prompts: Sequence[str],
    num_tokens: int | None = None,
    temperature: float = 0.8,
    top_k: int | None = 20,
    seed: int | None = None,
    num_samples: int = 1,
    **controls,
) -> list[list[str]]:
    """`generate_text` for many prompts at once: `num_samples` texts for each, in the prompts' order.

    Sample i of any prompt is drawn with seed + i, so a text is the same alone and in company. The other arguments are
    those of `generate_text`, and so are the errors.
    """
    controls |= {"num_tokens": num_tokens, "temperature": temperature, "top_k": top_k}
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    on_ids, _, jobs = _prepare(model, prompts, seed, num_samples, **controls)
    new_ids: list[list[int]] = []
    for start in range(0, len(jobs), BATCH_TEXTS):
        _, ids, seeds = zip(*jobs[start : start + BATCH_TEXTS], strict=True)
        new_ids += generate_ids(model.network, ids, on_ids, seeds)
    texts = [
        prompt.rstrip() + _written(model.tokenizer, new) for (prompt, _, _), new in zip(jobs, new_ids, strict=True)
    ]
    return [texts[i : i + num_samples] for i in range(0, len(texts), num_samples)]


def generate(
    model: TextModel,
    prompts: str | Sequence[str],
    num_tokens: int | None = None,
    temperature: float = 0.8,
    top_k: int | None = 20,
    seed: int | None = None,
    num_samples: int = 1,
    **controls,
) -> list[Record]:
    """The texts of `generate_texts`, which has the same arguments and errors, with all that is known of each.

    Args:
        prompts: one, or many.

    Returns:
        The records, prompt by prompt.
    """
    prompts = [prompts] if isinstance(prompts, str) else prompts
    controls |= {"num_tokens": num_tokens, "temperature": temperature, "top_k": top_k}
    return list(stream_records(model, prompts, seed, num_samples, **controls))


def stream_text(
    model: TextModel,
    prompt: str,
    num_tokens: int | None = None,
    temperature: float = 0.8,
    top_k: int | None = 20,
    seed: int | None = None,
    **controls,
) -> Iterator[str]:
    """The new words as they are made, each with the space before it, if it has one.

    Arguments and errors are those of `generate_text`, whose text this is: `prompt.rstrip()` and the words, joined.

    Example:
        >>> for word in stream_text(model, "this movie is"):
        ...     print(word, end="", flush=True)
    """
    controls |= {"num_tokens": num_tokens, "temperature": temperature, "top_k": top_k, "seed": seed}
    return (word for word, _ in stream_words(model, prompt, **controls))


def stream_words(
    model: TextModel, prompt: str, seed: int | None = None, with_probabilities: bool = False, **controls
) -> Iterator[tuple[str, float | None]]:
    """`stream_text` with the probability of each word, as in `Record`; None unless asked for."""
    on_ids, _, [(_, ids, seed)] = _prepare(model, [prompt], seed, 1, **controls)
    steps = stream_ids(model.network, [ids], on_ids, [seed], with_probabilities)
    return (
        (_written(model.tokenizer, step.ids), step.probabilities[0] if with_probabilities else None)
        for step in steps
        if step.ids != [on_ids.end_id]
    )


def stream_records(
    model: TextModel,
    prompts: Sequence[str],
    seed: int | None = None,
    num_samples: int = 1,
    with_probabilities: bool = True,
    **controls,
) -> Iterator[Record]:
    """`generate` for texts too many to wait for: `BATCH_TEXTS` are made at once. Errors come before the first.

    Without `with_probabilities` their `probabilities`, `ranks` and `entropies` stay empty, and they take less time.
    """
    on_ids, settings, jobs = _prepare(model, prompts, seed, num_samples, **controls)
    batches = (jobs[start : start + BATCH_TEXTS] for start in range(0, len(jobs), BATCH_TEXTS))
    return (record for batch in batches for record in _records(model, batch, on_ids, settings, with_probabilities))


def _prepare(
    model: TextModel,
    prompts: Sequence[str],
    seed: int | None,
    num_samples: int,
    *,
    num_tokens: int | None = None,
    max_tokens: int | None = None,
    banned_words: Sequence[str] = (),
    stop_words: Sequence[str] = (),
    forced_words: Mapping[int, str] | None = None,
    **numbers,
) -> tuple[Controls, dict[str, Any], list[tuple[str, list[int], int]]]:
    """The controls on ids, all of them as a person reads them, and the prompt, its ids and the seed of each text."""
    if not isinstance(model, TextModel):
        raise InputError(f"model={model!r:.60}: must be what minigpt_pl.load(RUN) gives")
    tokenizer, network = model.tokenizer, model.network
    whole = {"num_tokens": num_tokens, "max_tokens": max_tokens, "seed": seed}
    forced_words = {} if forced_words is None else forced_words
    if problems := _wrong_types(numbers, whole, {"banned_words": banned_words, "stop_words": stop_words}, forced_words):
        raise InputError(*problems)
    if num_tokens is not None and max_tokens is not None:
        problems.append(f"max_tokens={max_tokens}: is another name for num_tokens={num_tokens}; give one of them")
    given = [count for count in (num_tokens, max_tokens) if count is not None]
    num_tokens = given[0] if given else Controls.num_tokens
    banned, stops = ([word_ids(tokenizer, word) for word in words] for words in (banned_words, stop_words))
    problems += [
        f"stop_words={[word]}: {UNKNOWN_WORD}"
        for word, ids in zip(stop_words, stops, strict=True)
        if not ids or UNKNOWN_ID in ids
    ]
    problems += [
        f"stop_words={[word]}: stands in banned_words too, so it never comes; leave it out of one"
        for word, ids in zip(stop_words, stops, strict=True)
        if ids in banned
    ]
    forced_ids, impossible = forced_ids_of(tokenizer, forced_words, num_tokens)
    problems += impossible
    problems += [
        f"banned_words={[word]}: stands in forced_words too; leave it out of one"
        for word, ids in zip(banned_words, banned, strict=True)
        if len(ids) == 1 and ids[0] in forced_ids.values()
    ]
    # A network that was trained without [END] knows nothing of it, and would write it at random.
    never = (PADDING_ID, UNKNOWN_ID, *([tokenizer.token_to_id(END)] if model.end_id is None else []))
    if not 1 <= num_samples <= MOST_SAMPLES:
        problems.append(f"num_samples={num_samples}: must be 1 to {MOST_SAMPLES:,}; other seeds give more")
    for name, value in (("temperature", 0), ("top_k", 1)):
        if num_samples > 1 and numbers.get(name) == value:
            problems.append(f"num_samples={num_samples}: with {name}={value} all would be the same text; give 1")
    largest_seed = 2**31 - max(num_samples, 1)  # so that each sample's own can be given again
    if seed is not None and not 0 <= seed <= largest_seed:
        problems.append(f"seed={seed}: must be 0 to {largest_seed}, as num_samples={num_samples} take one each")
    try:
        controls = Controls(
            vocab_size=network.vocab_size,
            num_tokens=num_tokens,
            end_id=model.end_id,
            banned_ids=(*never, *(ids[0] for ids in banned if len(ids) == 1)),
            banned_sequences=[ids for ids in banned if len(ids) > 1 and UNKNOWN_ID not in ids],
            stop_sequences=[ids for ids in stops if ids],
            forced_ids=forced_ids,
            **numbers,
        )
    except InputError as error:
        problems += error.problems
    if problems:
        raise InputError(*problems)
    seed = secrets.randbelow(largest_seed + 1) if seed is None else int(seed)
    jobs = [
        (prompt, ids, seed + i)
        for prompt, ids in zip(prompts, encode_prompts(tokenizer, prompts), strict=True)
        for i in range(num_samples)
    ]
    settings = {name: _plain_number(getattr(controls, name)) for name in NUMBERS}
    words = {"banned_words": [*banned_words], "stop_words": [*stop_words], "forced_words": dict(forced_words)}
    return controls, settings | words, jobs


def _wrong_types(numbers: dict[str, Any], whole: dict[str, Any], lists: dict[str, Any], forced_words: Any) -> list[str]:
    """What a caller from Python, or YAML, gave that no later check could read."""
    problems = [f"{name}={numbers[name]!r}: no such control; one of {', '.join(CONTROLS)}"
                for name in numbers.keys() - set(NUMBERS)]  # fmt: skip
    problems += [
        f"{name}={words!r}: must be a list of words, as ['good', 'bad']"
        for name, words in lists.items()
        if not isinstance(words, Sequence) or isinstance(words, str) or not all(isinstance(word, str) for word in words)
    ]
    problems += [
        f"{name}={value!r}: must be a whole number"
        for name, value in whole.items()
        if value is not None and (isinstance(value, bool) or not isinstance(value, Integral))
    ]
    if not isinstance(forced_words, Mapping) or not all(
        isinstance(place, int) and isinstance(word, str) for place, word in forced_words.items()
    ):
        problems.append(f"forced_words={forced_words!r}: must be words by their places, as {{0: 'a', 5: 'film'}}")
    return problems


def _plain_number(value: Any) -> int | float | None:
    """NumPy's as Python's, which JSON takes."""
    return value.item() if hasattr(value, "item") else value


def _records(
    model: TextModel,
    jobs: Sequence[tuple[str, list[int], int]],
    controls: Controls,
    settings: dict[str, Any],
    with_probabilities: bool,
) -> Iterator[Record]:
    prompts, ids, seeds = zip(*jobs, strict=True)
    checkpoint = None if model.checkpoint is None else str(model.checkpoint)
    records = [
        Record(prompt, "", [], [], [], [], unknown_words(model.tokenizer, prompt), settings, seed, checkpoint)
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    for step in stream_ids(model.network, ids, controls, seeds, with_probabilities):
        for row, (text, id_) in enumerate(zip(step.texts, step.ids, strict=True)):
            if id_ != controls.end_id:
                record = records[text]
                record.tokens.append(_written(model.tokenizer, [id_]))
                if with_probabilities:
                    record.probabilities.append(step.probabilities[row])
                    record.ranks.append(step.ranks[row])
                    record.entropies.append(step.entropies[row])
    for record in records:
        yield replace(record, text=record.prompt.rstrip() + "".join(record.tokens))


def _written(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The words as they stand after others."""
    # Each word brings its own space; only at the beginning of a text it is left out.
    return tokenizer.decode([*ids[:1], *ids])[len(tokenizer.decode(ids[:1])) :]
