"""Word perplexity of reviews 2,501 to 5,000 of `unsupervised`, with 95 % intervals. See docs/frontier.md.

    python benchmarks/intervals.py FOLDER RUN [RUN ...]

FOLDER holds IMDB in the hub's layout. The runs were trained with data.validation_documents=1000. Reviews that are in
their training text are left out. Neighbouring reviews are about the same movie. So each bootstrap sample draws blocks
of ten reviews, about one movie each. After the first run, the difference of the loss to that of the first one follows.
"""

import argparse

import numpy as np
from mixture import FIRST_WORDS, documents_of, open_reviews

from minigpt_pl import load
from minigpt_pl.config import ImdbConfig
from minigpt_pl.data.corpus import open_corpus
from minigpt_pl.measures.likelihood import document_losses
from minigpt_pl.tokenizer import UNKNOWN_ID

BLOCK, SAMPLES = 10, 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("runs", nargs="+", metavar="RUN")
    arguments = parser.parse_args()
    first: list[np.ndarray] = []
    for name in arguments.runs:
        model = load(name)
        trained_on = open_corpus(
            ImdbConfig(source=arguments.folder, validation_documents=1000), model.network.vocab_size, model.tokenizer
        )
        seen = {document.tobytes() for document in documents_of(trained_on.train)}
        documents = documents_of(open_reviews(arguments.folder, model).validation)[2500:5000]
        counted = np.concatenate([np.full(len(document) - 1, document.tobytes() not in seen) for document in documents])
        counted &= np.concatenate([document[1:] for document in documents]) > UNKNOWN_ID
        place = np.concatenate([np.arange(1, len(document)) for document in documents])
        block = np.repeat(np.arange(len(documents)) // BLOCK, [len(document) - 1 for document in documents])
        losses = document_losses(model.network, documents, show_progress=True)
        left_out = sum(document.tobytes() in seen for document in documents)
        print(f"{name}: {left_out} reviews are left out", flush=True)
        for number, words in enumerate((counted & (place < FIRST_WORDS), counted)):
            sums, counts = np.bincount(block[words], losses[words]), np.bincount(block[words])  # of each block
            drawn = np.random.default_rng(0).integers(len(sums), size=(SAMPLES, len(sums)))
            low, high = np.exp(np.quantile(sums[drawn].sum(1) / counts[drawn].sum(1), [0.025, 0.975]))
            part = "all words" if number else f"first {FIRST_WORDS} words"
            print(f"  {part}: {np.exp(sums.sum() / counts.sum()):.1f} [{low:.1f}, {high:.1f}]", flush=True)
            if len(first) < 2:
                first.append(sums)
                continue
            less = sums - first[number]
            low, high = np.quantile(less[drawn].sum(1) / counts[drawn].sum(1), [0.025, 0.975])
            mean = less.sum() / counts.sum()
            print(f"    loss minus the first run: {mean:+.4f} [{low:+.4f}, {high:+.4f}]", flush=True)


if __name__ == "__main__":
    main()
