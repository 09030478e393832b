"""Text in, text out: `load` a run, `generate_text` from it."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from minigpt_pl.errors import InputError
from minigpt_pl.generation.controls import Controls
from minigpt_pl.generation.engine import generate_ids
from minigpt_pl.model import MiniGPT
from minigpt_pl.runs import find_checkpoint, load_network
from minigpt_pl.tokenizer import END, PADDING_ID, UNKNOWN_ID, load_tokenizer

BATCH_TEXTS = 256  # written at once; bounds the memory for a thousand prompts


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
    num_tokens: int = 60,
    temperature: float = 0.8,
    top_k: int | None = 20,
    seed: int | None = None,
    **controls,
) -> str:
    """Continue a prompt: the seed homework's call.

    Args:
        model: from `load`.
        prompt: any text; it is split into words as the training text was.
        num_tokens: new tokens; fewer only where the model ends the text itself.
        temperature: 0 (greedy) or above; under 1 is safer, over 1 is bolder.
        top_k: draw from this many likeliest words, 1 to the vocabulary's size; None: from all.
        seed: the same seed gives the same text; None: a new one each time.
        controls: others of `generate_texts`, as `top_p`, `repetition_penalty` or `banned_words`.

    Returns:
        The prompt as given, and its continuation.

    Raises:
        InputError: a value out of range, or a prompt without a word that the model knows.

    Example:
        >>> model = minigpt_pl.load("outputs/quick-001")
        >>> generate_text(model, "this movie is", num_tokens=60, temperature=0.8, top_k=20)
    """
    return generate_texts(model, [prompt], num_tokens, temperature, top_k, seed, **controls)[0][0]


def generate_texts(
    model: TextModel,
    prompts: Sequence[str],
    num_tokens: int = 60,
    temperature: float = 0.8,
    top_k: int | None = 20,
    seed: int | None = None,
    num_samples: int = 1,
    *,
    min_tokens: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    typical_p: float = 1.0,
    repetition_penalty: float = 1.0,
    no_repeat_ngram_size: int = 0,
    banned_words: Sequence[str] = (),
    forced_words: Mapping[int, str] | None = None,
) -> list[list[str]]:
    """`generate_text` for many prompts at once: `num_samples` texts for each, in the prompts' order.

    Sample i of any prompt is drawn with seed + i, so a text is the same alone and in company.

    Args:
        banned_words: never written; one of several tokens, as "it's", is never written as a whole. `[UNK]` is
            always banned.
        forced_words: place among the new tokens (0 the first) -> the word or words that begin there.

    The other arguments are those of `generate_text` and of `Controls`, which gives their ranges; so are the errors.
    """
    forced_ids, problems = _forced_ids(model.tokenizer, forced_words or {}, num_tokens)
    banned = [encoding.ids for encoding in model.tokenizer.encode_batch(list(banned_words))]
    # A network that was trained without [END] knows nothing of it, and would write it at random.
    never = (PADDING_ID, UNKNOWN_ID, *([model.tokenizer.token_to_id(END)] if model.end_id is None else []))
    if num_samples < 1:
        problems.append(f"num_samples={num_samples}: must be at least 1")
    try:
        controls = Controls(
            vocab_size=model.network.vocab_size, num_tokens=num_tokens, min_tokens=min_tokens, end_id=model.end_id,
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, typical_p=typical_p,
            repetition_penalty=repetition_penalty, no_repeat_ngram_size=no_repeat_ngram_size,
            banned_ids=(*never, *(ids[0] for ids in banned if len(ids) == 1)),
            banned_sequences=[ids for ids in banned if len(ids) > 1 and UNKNOWN_ID not in ids],
            forced_ids=forced_ids,
        )  # fmt: skip
    except InputError as error:
        problems += error.problems
    if problems:
        raise InputError(*problems)
    prompt_ids = encode_prompts(model.tokenizer, prompts)
    seed = secrets.randbelow(2**31) if seed is None else seed
    jobs = [(ids, seed + i) for ids in prompt_ids for i in range(num_samples)]
    new_ids: list[list[int]] = []
    for start in range(0, len(jobs), BATCH_TEXTS):
        ids, seeds = zip(*jobs[start : start + BATCH_TEXTS], strict=True)
        new_ids += generate_ids(model.network, ids, controls, seeds)
    texts = [
        prompts[i // num_samples].rstrip() + _continuation(model.tokenizer, ids, new)
        for i, ((ids, _), new) in enumerate(zip(jobs, new_ids, strict=True))
    ]
    return [texts[i : i + num_samples] for i in range(0, len(texts), num_samples)]


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


def _forced_ids(tokenizer: Tokenizer, words: Mapping[int, str], num_tokens: int) -> tuple[dict[int, int], list[str]]:
    """Place -> id, and a line for each that cannot be."""
    forced, problems = {}, []
    for place, text in words.items():
        ids = tokenizer.encode(text).ids
        name = f"forced_words={{{place}: {text!r}}}"
        if not ids or UNKNOWN_ID in ids:
            problems.append(f"{name}: not in the model's vocabulary; use words that it knows")
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


def _continuation(tokenizer: Tokenizer, prompt_ids: Sequence[int], new_ids: list[int]) -> str:
    # Each word brings its own space, so the text of a beginning is the beginning of the text.
    known = [id_ for id_ in prompt_ids if id_ != UNKNOWN_ID][:1]
    return tokenizer.decode([*known, *new_ids])[len(tokenizer.decode(known)) :]
