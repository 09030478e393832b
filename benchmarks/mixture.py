"""A network mixed with the Kneser-Ney model of its training text and with a cache of the document.

    python benchmarks/mixture.py FOLDER RUN

FOLDER holds IMDB in the hub's layout, RUN is a run that was trained on it. Prints the word perplexity of reviews 2,501
to 5,000 of `unsupervised`. A gate gives the weights of a mixture for each word, from what is before the word. It is
trained on the first 1,000 reviews. A mixture is not one network.
"""

import argparse
from collections import Counter, defaultdict
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from minigpt_pl import MiniGPT, TextModel, load
from minigpt_pl.config import ImdbConfig
from minigpt_pl.data.corpus import Corpus, Ids, open_corpus
from minigpt_pl.generation.inference import inference_without_autocast
from minigpt_pl.loss import token_losses
from minigpt_pl.measures.likelihood import predictions
from minigpt_pl.measures.ngrams import NGramModel
from minigpt_pl.tokenizer import UNKNOWN_ID

FIRST_WORDS = 80
ORDERS = (2, 3, 5)  # of the Kneser-Ney models
NETWORK, KNESER_NEY, CACHE = [0], [1, 2, 3], [4, 5]  # columns of `Words.probabilities`
MIXTURES = {
    "network": NETWORK,
    "Kneser-Ney": KNESER_NEY[-1:],
    "Kneser-Ney, cache": KNESER_NEY + CACHE,
    "network, Kneser-Ney": NETWORK + KNESER_NEY,
    "network, cache": NETWORK + CACHE,
    "network, Kneser-Ney, cache": NETWORK + KNESER_NEY + CACHE,
}
GATE_WIDTH, GATE_BATCH, GATE_PASSES = 64, 1024, 4


class Words(NamedTuple):
    """The known words of some documents, without the first word of each document."""

    probabilities: Tensor  # (N, 6): by the network, by counts of 2, 3 and 5 words, by the cache of words and of pairs
    hidden: Tensor  # (N, D): the network's hidden states that predict the words
    places: Tensor  # (N, 2): log of the number of words before, and whether the word before occurred earlier
    first: Tensor  # (N,) bool: among the first 80 words of its document


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("run")
    arguments = parser.parse_args()
    model = load(arguments.run)
    corpus = open_reviews(arguments.folder, model)
    documents = documents_of(corpus.validation)
    tokens, offsets = corpus.train.tokens, corpus.train.offsets
    tokens, offsets = np.delete(tokens, offsets[1:] - 1), offsets - np.arange(len(offsets))
    ngrams = NGramModel.fit(tokens, offsets, model.network.vocab_size, max(ORDERS), show_progress=True)
    tuning, final = (measure(model.network, ngrams, documents[part]) for part in (slice(1000), slice(2500, 5000)))
    print(f"\n| mixture | first {FIRST_WORDS} words | all words |\n|---|---|---|")
    for name, columns in MIXTURES.items():
        losses = mix(columns, tuning, final)
        print(f"| {name} | {losses[final.first].mean().exp():.1f} | {losses.mean().exp():.1f} |", flush=True)


def open_reviews(folder: str, model: TextModel) -> Corpus:
    """IMDB with the first 5,000 reviews of `unsupervised` as held-out reviews."""
    return open_corpus(ImdbConfig(source=folder, validation_documents=5000), model.network.vocab_size, model.tokenizer)


def documents_of(reviews: Ids | None) -> list[np.ndarray]:
    """The ids of each review, without [END]."""
    assert reviews is not None, "FOLDER has no split `unsupervised`"
    return [reviews.tokens[start : end - 1] for start, end in pairwise(reviews.offsets)]


def measure(network: MiniGPT, ngrams: NGramModel, documents: list[np.ndarray]) -> Words:
    hidden, losses = [], []
    with inference_without_autocast(network):
        for states, targets in predictions(network, documents, network.max_length // 2, show_progress=True):
            hidden.append(states)
            losses.append(token_losses(states, network.output.weight, network.output.bias, targets))
    columns = [torch.cat(losses).neg().exp().numpy()]
    for order in ORDERS:
        counts = NGramModel(ngrams.vocab_size, ngrams.orders[:order])
        columns.append(np.exp(np.concatenate([counts.log_probabilities(document)[1:] for document in documents])))
    cached = np.concatenate([cache(document) for document in documents])  # (T, 3)
    before = np.concatenate([np.arange(1, len(document)) for document in documents])
    known = np.concatenate([document[1:] for document in documents]) > UNKNOWN_ID
    probabilities, places = np.stack([*columns, *cached[:, :2].T], 1), np.stack([np.log(before), cached[:, 2]], 1)
    of_words = [torch.from_numpy(values[known]).float() for values in (probabilities, places)]
    return Words(of_words[0], torch.cat(hidden)[known], of_words[1], torch.from_numpy(before[known] < FIRST_WORDS))


def cache(document: np.ndarray) -> np.ndarray:
    """For each word after the first: its share among the words before it, its share among those that followed the word
    before it, and whether there were such words: (T,) -> (T - 1, 3). Without such words, the two shares are equal."""
    words: Counter[int] = Counter()
    followers: defaultdict[int, Counter[int]] = defaultdict(Counter)
    rows = np.empty((len(document) - 1, 3))
    for place, (before, word) in enumerate(pairwise(map(int, document))):
        words[before] += 1
        share, after = words[word] / (place + 1), followers[before]
        rows[place] = share, after[word] / after.total() if after else share, bool(after)
        after[word] += 1
    return rows


def mix(columns: list[int], tuning: Words, final: Words) -> Tensor:
    """The losses (N,) of the words of `final` by a mixture of some columns, whose gate is trained on `tuning`."""
    if len(columns) == 1:
        return -final.probabilities[:, columns[0]].log()
    torch.manual_seed(0)
    inputs = [torch.cat([words.hidden, words.places], 1) if 0 in columns else words.places for words in (tuning, final)]
    mean, deviation = inputs[0].mean(0), inputs[0].std(0)
    inputs = [(x - mean) / deviation for x in inputs]
    layers = nn.Linear(inputs[0].shape[1], GATE_WIDTH), nn.ReLU(), nn.Linear(GATE_WIDTH, len(columns))
    gate = nn.Sequential(nn.Dropout(0.1), *layers, nn.Softmax(dim=1))  # (N, D + 2) -> (N, C)
    probabilities = tuning.probabilities[:, columns]
    optimizer = torch.optim.AdamW(gate.parameters(), lr=2e-3)
    steps = GATE_PASSES * (len(probabilities) // GATE_BATCH)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, steps)
    for _ in range(GATE_PASSES):
        for batch in torch.randperm(len(probabilities)).split(GATE_BATCH)[: steps // GATE_PASSES]:
            optimizer.zero_grad()
            (gate(inputs[0][batch]) * probabilities[batch]).sum(1).log().mean().neg().backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        losses: Tensor = -(gate.eval()(inputs[1]) * final.probabilities[:, columns]).sum(1).log()
    return losses


if __name__ == "__main__":
    main()
