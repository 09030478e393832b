"""A network mixed with the Kneser-Ney model of its training text and with a document cache.

    python benchmarks/mixture.py FOLDER RUN

FOLDER holds IMDB in the hub's layout, RUN is a run that was trained on it. Prints the word perplexity of reviews 2,501
to 5,000 of `unsupervised`. The weights of a mixture come from the first 1,000 reviews. A mixture is not one network.
"""

import argparse
from collections import Counter
from itertools import pairwise

import numpy as np
import torch

from minigpt_pl import MiniGPT, load
from minigpt_pl.config import ImdbConfig
from minigpt_pl.data.corpus import open_corpus
from minigpt_pl.measures.likelihood import document_losses
from minigpt_pl.measures.ngrams import NGramModel
from minigpt_pl.tokenizer import UNKNOWN_ID

ORDER = 5  # of the Kneser-Ney model
FIRST_WORDS = 80
BANDS = (5, 20, 40, 80, 160)  # tokens before a word; each band has its own weights
MIXTURES = {
    "network": [0],
    "Kneser-Ney": [1],
    "Kneser-Ney, cache": [1, 2],
    "network, Kneser-Ney": [0, 1],
    "network, cache": [0, 2],
    "network, Kneser-Ney, cache": [0, 1, 2],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("run")
    arguments = parser.parse_args()
    model = load(arguments.run)
    vocab_size = model.network.vocab_size
    corpus = open_corpus(ImdbConfig(source=arguments.folder, validation_documents=5000), vocab_size, model.tokenizer)
    held_out = corpus.validation
    assert held_out is not None, "FOLDER has no split `unsupervised`"
    documents = [held_out.tokens[start : end - 1] for start, end in pairwise(held_out.offsets)]  # without [END]
    tokens, offsets = corpus.train.tokens, corpus.train.offsets
    tokens, offsets = np.delete(tokens, offsets[1:] - 1), offsets - np.arange(len(offsets))
    ngrams = NGramModel.fit(tokens, offsets, vocab_size, ORDER, show_progress=True)
    tuning, final = (measure(model.network, ngrams, documents[part]) for part in (slice(1000), slice(2500, 5000)))
    print(f"\n| mixture | first {FIRST_WORDS} words | all words |\n|---|---|---|")
    for name, columns in MIXTURES.items():
        losses = mix(columns, *tuning, *final)
        first = final[1] < FIRST_WORDS
        print(f"| {name} | {np.exp(losses[first].mean()):.1f} | {np.exp(losses.mean()):.1f} |", flush=True)


def measure(network: MiniGPT, ngrams: NGramModel, documents: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Of each known word after the first: its probabilities (N, 3), and the number of tokens before it (N,)."""
    by_network = np.exp(-document_losses(network, documents, show_progress=True))
    by_counts = np.exp(np.concatenate([ngrams.log_probabilities(document)[1:] for document in documents]))
    cache, before = [], []
    for document in documents:
        counts: Counter[int] = Counter()
        for place, token in enumerate(map(int, document)):
            if place:
                cache.append(counts[token] / place)
                before.append(place)
            counts[token] += 1
    words = np.concatenate([document[1:] for document in documents]) > UNKNOWN_ID
    return np.stack([by_network, by_counts, cache], axis=1)[words], np.array(before)[words]


def mix(
    columns: list[int], tuning: np.ndarray, tuning_before: np.ndarray, final: np.ndarray, final_before: np.ndarray
) -> np.ndarray:
    """The losses (N,) of a linear mixture. Its weights are fitted to `tuning` by EM, for each band of positions."""
    losses = np.empty(len(final))
    bands = np.digitize(tuning_before, BANDS), np.digitize(final_before, BANDS)
    for band in range(len(BANDS) + 1):
        probabilities = torch.from_numpy(tuning[bands[0] == band][:, columns])
        weights = torch.full((len(columns),), 1 / len(columns), dtype=torch.float64)
        for _ in range(100):
            parts = probabilities * weights
            weights = (parts / parts.sum(1, keepdim=True)).mean(0)
        losses[bands[1] == band] = -np.log(final[bands[1] == band][:, columns] @ weights.numpy())
    return losses


if __name__ == "__main__":
    main()
