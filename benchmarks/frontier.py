"""Ideas that make one block learn faster, compared with `experiment=fast`. docs/frontier.md has the rule and the log.

    python benchmarks/frontier.py FOLDER [--ideas fast counts ...] [--steps 100] [--seeds 1] [--held-out 250]

FOLDER holds IMDB in the hub's layout. Each idea trains the notebook's network on the first 81 words of the reviews, in
fp32. In each round every idea trains once, with the same sequences. Prints the seconds of training with the preparation
of the initial weights, their ratio to the first idea in the same round, and the loss of held-out reviews with padding,
as docs/fast.md counts it. Needs the extra `explore` (scipy).
"""

import argparse
import math
import statistics
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import coo_matrix, csr_matrix
from torch import Tensor, nn

from minigpt_pl import MiniGPT
from minigpt_pl.config import ImdbConfig, ScheduleConfig
from minigpt_pl.data.batches import Sequences
from minigpt_pl.data.corpus import open_corpus
from minigpt_pl.loss import linear_cross_entropy, token_losses
from minigpt_pl.training.optimizers import KerasAdam, SquaresByOccurrence, learning_rate_factor

V, L, D = 20_000, 80, 256  # words, positions, width


@dataclass(frozen=True)
class Recipe:
    """How an idea trains. The defaults are those of `experiment=fast`, with fewer steps.

    Attributes:
        counts: start from counts of word pairs, see `start_from_counts`.
        shrinkage: pseudo-count of that start; larger values trust rare pairs less.
        candidates: words that are drawn for the sampled softmax; 0 means the full softmax.
        bigrams: rows of a table of vectors that are added to the input: one vector per hash of (word before, word).
        embedding_rate: learning rate of the embeddings, as a multiple of `learning_rate`.
    """

    learning_rate: float = 8e-3
    warmup_steps: int = 10
    batch_size: int = 32
    counts: bool = False
    shrinkage: float = 300.0
    candidates: int = 0
    full_softmax_at_end: float = 0.05  # share of the steps
    bigrams: int = 0
    embedding_rate: float = 1.0
    beta2: float = 0.999


_COUNTS = Recipe(counts=True, learning_rate=5e-3)
_SAMPLED = replace(_COUNTS, candidates=4096)
IDEAS = {
    "fast": Recipe(),
    "counts": _COUNTS,
    "counts, 4096 candidates": _SAMPLED,
    "counts, 2048 candidates": replace(_SAMPLED, candidates=2048),
    "counts, 4096 candidates, bigrams": replace(_SAMPLED, bigrams=65_536),
    "counts, 4096 candidates, rate 3e-3": replace(_SAMPLED, learning_rate=3e-3),
    "counts, 4096 candidates, beta2 0.99": replace(_SAMPLED, beta2=0.99),
    "counts, 4096 candidates, half the rate for embeddings": replace(_SAMPLED, embedding_rate=0.5),
    "counts, 4096 candidates, batch 16": replace(_SAMPLED, batch_size=16),
}


@dataclass(frozen=True)
class Reviews:
    train: Tensor  # (N, L + 1) ids: the first words of each review, padded with 0
    held_out: Tensor  # (M, L + 1)
    all_tokens: np.ndarray  # the training reviews one after the other; the id V - 1 ends each of them


class Network(nn.Module):
    """`MiniGPT`, with vectors of word pairs in its input if the recipe has them."""

    def __init__(self, recipe: Recipe):
        super().__init__()
        self.gpt = MiniGPT(V, L, D, dropout=0.0)
        self.pairs = nn.Embedding(recipe.bigrams, D) if recipe.bigrams else None
        if self.pairs is not None:
            nn.init.zeros_(self.pairs.weight)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, L) -> hidden states (B, L, D)."""
        x = self.gpt.embed(ids)
        if self.pairs is not None:
            key = ids * 1_000_003 + F.pad(ids[:, :-1], (1, 0))
            x = x + self.pairs(key % self.pairs.num_embeddings)
        return self.gpt.blocks[0](x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--ideas", nargs="+", default=list(IDEAS), choices=list(IDEAS), metavar="IDEA")
    parser.add_argument("--steps", type=int, default=100, help="steps of 32 sequences; other batches get as many words")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--held-out", type=int, default=250, help="reviews of `unsupervised`")
    arguments = parser.parse_args()
    reviews = read_reviews(arguments.folder, arguments.held_out)
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in arguments.ideas}
    for seed in range(arguments.seeds):
        for name, found in results.items():
            found.append(train(IDEAS[name], reviews, arguments.steps, seed))
            print(f"{name}, seed {seed}: {found[-1][0]:.0f} s, loss {found[-1][1]:.4f}", flush=True)
    first = results[arguments.ideas[0]]
    print(f"\n| idea | seconds | ratio | held-out loss, {arguments.seeds} seeds |\n|---|---|---|---|")
    for name, found in results.items():
        ratio = statistics.median(seconds / base for (seconds, _), (base, _) in zip(found, first, strict=True))
        losses = ", ".join(f"{loss:.3f}" for _, loss in found)
        print(f"| {name} | {statistics.median(seconds for seconds, _ in found):.0f} | {ratio:.2f} | {losses} |")


def read_reviews(folder: str, held_out: int) -> Reviews:
    config = ImdbConfig(source=folder, end_token=False, loss_on_padding=True, validation_documents=1000)
    corpus = open_corpus(config, V)
    assert corpus.validation is not None, "FOLDER has no split `unsupervised`"
    train, validation = (
        Sequences(ids, L, "truncate", end_token=False, count_padding=True) for ids in (corpus.train, corpus.validation)
    )
    shown = train[np.arange(len(train))], validation[np.arange(held_out)]
    return Reviews(*shown, np.asarray(corpus.train.tokens))


def train(recipe: Recipe, reviews: Reviews, steps_of_32: int, seed: int) -> tuple[float, float]:
    """Train one network. Returns the seconds and the loss on the held-out reviews."""
    torch.manual_seed(seed)
    start = time.perf_counter()
    network = Network(recipe)
    gpt = network.gpt
    counts = torch.bincount(reviews.train.flatten(), minlength=V) + 0.5
    shares = counts / counts.sum()
    with torch.no_grad():
        gpt.output.bias.copy_(shares.log())
        if recipe.counts:
            start_from_counts(gpt, reviews, recipe.shrinkage)
    embeddings = [weight for name, weight in network.named_parameters() if "embedding" in name or "pairs" in name]
    others = [*gpt.output.parameters(), *gpt.blocks.parameters()]
    groups = [{"params": embeddings, "share": recipe.embedding_rate}, {"params": others, "share": 1.0}]
    squares = SquaresByOccurrence(gpt.token_embedding)
    optimizer = KerasAdam(groups, betas=(0.9, recipe.beta2), squares=squares)
    schedule = ScheduleConfig(name="linear", warmup_steps=recipe.warmup_steps)
    steps = steps_of_32 * 32 // recipe.batch_size
    order = np.random.default_rng(seed).permutation(len(reviews.train))
    for step in range(steps):
        rate = recipe.learning_rate * learning_rate_factor(step, steps, schedule)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["share"]
        chosen = np.take(order, range(step * recipe.batch_size, (step + 1) * recipe.batch_size), mode="wrap")
        ids = reviews.train[chosen]
        hidden, targets = network(ids[:, :-1]), ids[:, 1:]
        if recipe.candidates and step < steps * (1 - recipe.full_softmax_at_end):
            loss = sampled_cross_entropy(hidden, gpt.output, targets, recipe.candidates, shares)
        else:
            loss = linear_cross_entropy(hidden, gpt.output.weight, gpt.output.bias, targets)
        (loss / targets.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - start
    with torch.no_grad():
        losses = [
            token_losses(network(ids[:, :-1]), gpt.output.weight, gpt.output.bias, ids[:, 1:]).mean()
            for ids in reviews.held_out.split(50)
        ]
    return seconds, statistics.fmean(map(float, losses))


def sampled_cross_entropy(hidden: Tensor, output: nn.Linear, targets: Tensor, count: int, shares: Tensor) -> Tensor:
    """The loss among candidates only (Jean et al., arXiv 1412.2007), summed over all targets.

    The candidates are the targets of the batch and `count` words, drawn with probabilities p^0.6. The logit of each is
    corrected by the log of the probability that it is a candidate.

    Args:
        hidden, targets: (B, L, D) and (B, L).
        shares: (V,), p of each word in the training text.
    """
    weights = shares**0.6 / (shares**0.6).sum()
    drawn = torch.multinomial(weights.float(), count)
    candidates = torch.cat([targets.unique(), drawn]).unique()  # (C,)
    not_drawn = (1 - weights[candidates]) ** count * (1 - shares[candidates]) ** targets.numel()
    number = torch.zeros(V, dtype=torch.int64)
    number[candidates] = torch.arange(len(candidates))
    bias = output.bias[candidates] - (1 - not_drawn).log().float()
    return linear_cross_entropy(hidden, output.weight[candidates], bias, number[targets])


def start_from_counts(gpt: MiniGPT, reviews: Reviews, shrinkage: float) -> None:
    """Set embeddings and output weights from counts of word pairs. The network then predicts nearly as the counts do.

    The matrix log(1 + c / (k p)) has a row for each word and a column for the word after it. c counts the pair, p is
    the share of the second word, and k is the shrinkage. Up to a constant per row, this is the shrunk pointwise mutual
    information. Its singular vectors, weighted by the roots of the frequencies, become embeddings (Levy and Goldberg,
    NIPS 2014). The output weights fit the matrix to the block's output for each embedding, by weighted least squares.
    Attention, feed-forward network and positions start small, so that the block changes little.
    """
    rng = np.random.default_rng(0)
    pairs = _count_pairs(reviews)
    first, second = (np.maximum(np.asarray(pairs.sum(axis)).ravel(), 0.5) for axis in (1, 0))  # (V,) each
    entries = pairs.tocoo()
    values = np.log1p(entries.data / (shrinkage * second[entries.col] / second.sum()))
    rows, columns = np.sqrt(first), np.sqrt(second)
    weighted = values * rows[entries.row] * columns[entries.col]
    matrix = csr_matrix((weighted.astype(np.float32), (entries.row, entries.col)), shape=(V, V))
    # Randomised singular value decomposition (Halko et al., arXiv 0909.4061).
    basis, _ = np.linalg.qr(matrix @ rng.standard_normal((V, D + 20)).astype(np.float32))
    for _ in range(2):
        basis, _ = np.linalg.qr(matrix.T @ basis)
        basis, _ = np.linalg.qr(matrix @ basis)
    left, singular, _ = np.linalg.svd((matrix.T @ basis).T, full_matrices=False)
    embeddings = (basis @ left)[:, :D] * np.sqrt(singular[:D]) / rows[:, None]
    embeddings /= math.sqrt((embeddings**2 * first[:, None]).sum() / first.sum() / D)
    gpt.token_embedding.weight.copy_(torch.from_numpy(embeddings))
    gpt.position_embedding.weight.mul_(0.2)
    gpt.blocks[0].attention.output.weight.mul_(0.1)
    gpt.blocks[0].feed_forward[2].weight.mul_(0.1)
    hidden = gpt.blocks[0](gpt.token_embedding.weight[:, None])[:, 0].double().numpy()  # (V, D): each word alone
    hidden = np.hstack([hidden, np.ones((V, 1))])  # (V, D + 1): for the bias
    left_side = hidden.T @ (hidden * first[:, None]) + 1e-3 * first.sum() * np.eye(D + 1)
    right_side = (matrix.T @ (hidden * rows[:, None]).astype(np.float32)).T / columns
    solution = torch.from_numpy(np.linalg.solve(left_side, right_side))  # (D + 1, V)
    gpt.output.weight.copy_(solution[:D].T)
    gpt.output.bias.add_(solution[D])


def _count_pairs(reviews: Reviews) -> csr_matrix:
    """(V, V): how often a word follows another, in the whole reviews and once more in their first words."""
    end, tokens = V - 1, reviews.all_tokens.astype(np.int64)
    inside = (tokens[:-1] != end) & (tokens[1:] != end)
    first, second = (reviews.train[:, part].numpy().ravel() for part in (slice(-1), slice(1, None)))
    shown = (first != 0) | (second != 0)  # padding after padding teaches nothing
    rows = np.concatenate([tokens[:-1][inside], first[shown]])
    columns = np.concatenate([tokens[1:][inside], second[shown]])
    counts = coo_matrix((np.ones(len(rows), np.float32), (rows, columns)), shape=(V, V)).tocsr()
    counts.sum_duplicates()
    return counts


if __name__ == "__main__":
    main()
