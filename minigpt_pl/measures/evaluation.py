"""Compare a network with n-gram models on the same text: loss, perplexity and bits per byte."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import chain, pairwise
from typing import Any

import numpy as np
from tqdm import tqdm  # comes with lightning

from minigpt_pl.data.corpus import Ids
from minigpt_pl.errors import DIVERGED, InputError
from minigpt_pl.measures.likelihood import document_losses
from minigpt_pl.measures.ngrams import NGramModel
from minigpt_pl.text_model import TextModel
from minigpt_pl.tokenizer import NUM_SPECIAL, UNKNOWN_ID, list_vocabulary, piece_encoder, rules_of

NETWORK = "network"
NGRAM_ORDERS = {"unigram": 1, "bigram": 2, "5-gram": 5}  # all with modified Kneser-Ney smoothing
MODELS = (*NGRAM_ORDERS, NETWORK)
RANKS = 10, 100, 1_000, 10_000  # the last frequency rank of each band
SPELLING_ORDER = 5
MAX_LOSS = 700  # nats; exp of more overflows


def evaluate_texts(model: TextModel, texts: Sequence[str], train: Ids, description: str) -> dict[str, Any]:
    """Evaluate a network, and n-gram models of its training text, on the same documents.

    The result contains counts and the summary of `summarize_losses`. It can be written as JSON. Bits per byte = (losses
    of all tokens + unigram losses of the first words + spelling of the unknown words, all in bits) / bytes.

    Args:
        texts: documents, each with at least one word.
        description: name of the texts, for the result and for errors.

    Raises:
        InputError: no document has a known word after its first word.
    """
    vocabulary = list_vocabulary(model.tokenizer)
    known = dict.fromkeys(vocabulary[NUM_SPECIAL - 1 : -1])
    rules, ids_of = rules_of(model.tokenizer), cache(piece_encoder(model.tokenizer))
    end = [] if model.end_id is None else [model.end_id]
    documents: list[np.ndarray] = []
    unknown: Counter[str] = Counter()
    for text in texts:
        pieces = rules.split(text)
        symbols = chain.from_iterable(pieces) if rules.kind == "bpe" else pieces  # bpe knows a character or not
        unknown.update(symbol for symbol in symbols if symbol not in known)
        documents.append(np.array([*chain.from_iterable(map(ids_of, pieces)), *end]))
    if not any(np.isin(document[1:], range(UNKNOWN_ID + 1, len(vocabulary) - 1)).any() for document in documents):
        raise InputError(f"{description}: no document has a known word after its first word; give other text")

    network_losses = document_losses(model.network, documents, show_progress=True)
    if not (network_losses < MAX_LOSS).all():  # NaN is not below
        raise InputError(f"checkpoint={model.checkpoint}: {DIVERGED}")
    losses, first_words_nats = ngram_losses(documents, train, len(vocabulary), model.end_id)
    losses[NETWORK] = network_losses
    ranks = frequency_ranks(train.tokens, len(vocabulary))
    summary = summarize_losses(losses, documents, ranks, model.network.max_length, model.end_id)

    num_bytes = sum(len(text.encode()) for text in texts)
    spelling = spelling_nats(unknown, [*known])
    for name, values in losses.items():
        total = float(values.sum(dtype=np.float64)) + first_words_nats + spelling
        summary["whole"][name]["bits_per_byte"] = total / math.log(2) / num_bytes
    return {
        "checkpoint": str(model.checkpoint),
        "text": description,
        "documents": len(documents),
        "bytes": num_bytes,
        "unknown_words": unknown.total(),
        "spelling_bits_per_byte": spelling / math.log(2) / num_bytes,
        "max_length": model.network.max_length,
        **summary,
    }


def ngram_losses(
    documents: Sequence[np.ndarray], train: Ids, vocab_size: int, end_id: int | None
) -> tuple[dict[str, np.ndarray], float]:
    """Losses of the n-gram models, in the order of `document_losses`, and the unigram loss of all first words, in nats.

    If `end_id` is None, the n-grams are counted without the end tokens of the training text.
    """
    tokens, offsets = train.tokens, train.offsets
    if end_id is None:
        tokens, offsets = np.delete(tokens, offsets[1:] - 1), offsets - np.arange(len(offsets))
    losses, first_words_nats = {}, 0.0
    for name, order in NGRAM_ORDERS.items():
        ngrams = NGramModel.fit(tokens, offsets, vocab_size, order, show_progress=True)
        progress = tqdm(documents, desc=f"{name} losses", unit=" documents", disable=None, leave=False)
        nats = [-ngrams.log_probabilities(document) for document in progress]
        losses[name] = np.concatenate([values[1:] for values in nats])
        if order == 1:
            first_words_nats = float(sum(values[0] for values in nats))
    return losses, first_words_nats


def frequency_ranks(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """(V,): the rank of each token by its frequency in the text; 1 is the most frequent. 0 for special tokens."""
    counts = np.bincount(tokens, minlength=vocab_size)[NUM_SPECIAL - 1 : -1]
    ranks = np.zeros(vocab_size, dtype=np.int64)
    ranks[NUM_SPECIAL - 1 + np.argsort(-counts, kind="stable")] = np.arange(1, len(counts) + 1)
    return ranks


def spelling_nats(unknown: Counter[str], vocabulary: Sequence[str]) -> float:
    """The cost, in nats, to spell the unknown words: all bytes and the end mark of each word.

    The spelling model is a Kneser-Ney byte 5-gram model. Its training text is the vocabulary, with each word once. The
    loss of `[UNK]` plus this cost describe the unknown words fully. So models of other vocabularies can be compared.
    """
    known = [np.array([*word.encode(), 256]) for word in vocabulary]  # 256 is the end mark
    model = NGramModel.fit(np.concatenate(known), np.cumsum([0, *map(len, known)]), 257, SPELLING_ORDER)
    unknown_bytes = {word: np.array([*word.encode(), 256]) for word in unknown}
    return -sum(unknown[word] * float(model.log_probabilities(ids).sum()) for word, ids in unknown_bytes.items())


def summarize_losses(
    losses: Mapping[str, np.ndarray],
    documents: Sequence[np.ndarray],
    ranks: np.ndarray,
    max_length: int,
    end_id: int | None,
) -> dict[str, Any]:
    """Mean losses of several models on the same tokens, in nats per token. The result can be written as JSON.

    - beginning: tokens 1 to L = max_length of each document; whole: all tokens. Each model has loss, perplexity
      (exp(loss)), word_loss and word_perplexity. The last two leave out [UNK] and [END], as val/word_perplexity does.
      They are None if no word is left.
    - by_position: loss by the number of tokens before the token in its document. A network sees the last L of them.
    - by_frequency: loss by the frequency rank of the word in the training text. [UNK] and [END] have their own rows.

    Args:
        losses: name of the model -> (T,) nats, in the order of `document_losses`.
        ranks: of `frequency_ranks`.
        end_id: the end token, which is not a word; None if the documents have none.
    """
    targets = np.concatenate([document[1:] for document in documents]).astype(np.int64)
    positions = np.concatenate([np.arange(1, len(document)) for document in documents])
    end_id = -1 if end_id is None else end_id  # no text contains -1
    is_word = (targets != UNKNOWN_ID) & (targets != end_id)

    def means(part: np.ndarray) -> dict[str, Any]:
        result: dict[str, Any] = {"tokens": int(part.sum()), "words": int((part & is_word).sum())}
        for name, values in losses.items():
            loss, words = float(values[part].mean()), values[part & is_word]
            word_loss = float(words.mean()) if len(words) else None  # JSON has no NaN
            result[name] = {"loss": loss, "perplexity": math.exp(loss), "word_loss": word_loss}
            result[name]["word_perplexity"] = None if word_loss is None else math.exp(word_loss)
        return result

    def rows(bands: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
        return [
            {"band": band, "tokens": int(part.sum())} | {name: float(v[part].mean()) for name, v in losses.items()}
            for band, part in bands.items()
            if part.any()
        ]

    powers_of_2 = [2**power for power in range(max_length.bit_length()) if 2**power < max_length]
    by_frequency = _bands(np.where(is_word, ranks[targets], 0), RANKS) | {
        "[UNK]": targets == UNKNOWN_ID,
        "[END]": targets == end_id,
    }
    return {
        "beginning": means(positions <= max_length),
        "whole": means(np.ones(len(targets), bool)),
        "by_position": rows(_bands(positions, [*powers_of_2, max_length])),
        "by_frequency": rows(by_frequency),
    }


def _bands(values: np.ndarray, ends: Sequence[int]) -> dict[str, np.ndarray]:
    """The name of each band, with a mask of its values. Bands start at 1, so a value of 0 is in no band."""
    bands = {}
    for before, end in pairwise([0, *ends]):
        name = f"{before + 1:,}-{end:,}" if end > before + 1 else f"{end:,}"
        bands[name] = (before < values) & (values <= end)
    return bands | {f"over {ends[-1]:,}": values > ends[-1]}
