"""Ideas that make one block learn faster, each trained for some steps. docs/frontier.md has the rule and the log.

    python benchmarks/frontier.py FOLDER [--ideas base pairs ...] [--steps 100] [--seeds 1] [--held-out 250] [--final]

FOLDER holds IMDB in the hub's layout. Each idea trains the notebook's network on the first 81 words of the reviews, in
fp32. The 53 reviews that are also held out are left out. In each round every idea trains once, with the same sequences.
Prints the seconds of training, the seconds of a step, and the loss of held-out reviews. The first include the
preparation of the initial weights. The loss counts padding, as in docs/fast.md.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from minigpt_pl import MiniGPT
from minigpt_pl.config import ImdbConfig, ScheduleConfig
from minigpt_pl.data.datamodule import PairCounts, TextDataModule
from minigpt_pl.loss import linear_cross_entropy, sampled_cross_entropy, token_losses
from minigpt_pl.training.initial_weights import SIZE, start_from_counts
from minigpt_pl.training.optimizers import KerasAdam, SquaresByOccurrence, learning_rate_factor

V, L, D = 20_000, 80, 256  # words, positions, width


@dataclass(frozen=True)
class Idea:
    """How a network trains. The defaults are those of the idea `base`.

    Attributes:
        counts: start from counts of word pairs (`bigram_weights`).
        candidates: of the softmax (`softmax_candidates`); 0 means all words.
        rows_only: Adam updates a row of the embeddings, or of the output weights, only in steps in which it is used.
        pairs: rows of a table of vectors that are added to the input, one per pair of neighbouring words. By its hash,
            or with `frequent_pairs` for the most frequent pairs only.
        pair_counts: the vectors start from counts of the word after the pair. `pair_shrinkage` and `pair_scale` are the
            pseudo-count and a factor.
        triples: the same for three words, by their hash.
        *_rate: multiples of the learning rate, for a part of the network.
        small: factor of the block's outputs at the start.
        embedding_size: root mean square of the embeddings from counts. The first predictions hardly depend on it.
        mix_before: add the embedding of the word before, times a learned vector.
        skip: add the embeddings to the block's output, times a learned vector.
        token_shift: half of the channels of keys and values come from the word before (`model.token_shift`).
        value_embeddings: add a second embedding of the words to the input of the attention's values.
        muon: learning rate of Muon for the block's matrices; 0 means Adam.
        short: share of the steps, at the start, with only 40 words.
        later_words: share of the steps, at the start, with later pieces of the reviews instead of their first words.
        grow: batches of 16, then 32, then 64 sequences.
        average: decay of an average of the weights, which replaces them at the end; 0 means none.
    """

    learning_rate: float = 5e-3
    schedule: str = "linear"
    warmup_steps: int = 10
    batch_size: int = 32
    counts: bool = True
    candidates: int = 2048
    rows_only: bool = True
    pairs: int = 0
    frequent_pairs: bool = False
    pair_counts: bool = False
    pair_shrinkage: float = 300.0
    pair_scale: float = 1.0
    triples: int = 0
    embedding_rate: float = 1.0
    output_rate: float = 1.0
    pair_rate: float = 1.0
    block_rate: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.999
    small: float = 1.0
    embedding_size: float = 1.0
    mix_before: bool = False
    skip: bool = False
    token_shift: bool = False
    value_embeddings: bool = False
    heads: int = 2
    head_dim: int = 256
    feed_forward_dim: int = 256
    activation: type[nn.Module] = nn.ReLU
    norm_first: bool = False
    muon: float = 0.0
    short: float = 0.0
    later_words: float = 0.0
    grow: bool = False
    average: float = 0.0


class SquaredReLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


_BASE = Idea()
_PAIRS = replace(_BASE, pairs=65_536)
_COUNTED = replace(_PAIRS, pair_counts=True)
_FOUR_HEADS = replace(_COUNTED, pair_shrinkage=100.0, heads=4, head_dim=64)
IDEAS = {
    "random weights": Idea(learning_rate=8e-3, counts=False, candidates=0, rows_only=False),
    "counts": replace(_BASE, candidates=0, rows_only=False),
    "counts, 2048 candidates": replace(_BASE, rows_only=False),
    "base": _BASE,  # counts, 2048 candidates, Adam for the rows in use
    "512 candidates": replace(_BASE, candidates=512),
    "1024 candidates": replace(_BASE, candidates=1024),
    "4096 candidates": replace(_BASE, candidates=4096),
    "rate 2e-3": replace(_BASE, learning_rate=2e-3),
    "rate 3e-3": replace(_BASE, learning_rate=3e-3),
    "rate 8e-3": replace(_BASE, learning_rate=8e-3),
    "rate of embeddings x 0.5": replace(_BASE, embedding_rate=0.5),
    "rate of output x 0.5": replace(_BASE, output_rate=0.5),
    "rate of block x 0.5": replace(_BASE, block_rate=0.5),
    "rate of block x 2": replace(_BASE, block_rate=2.0),
    "rate of embeddings x 3": replace(_BASE, embedding_rate=3.0),
    "embeddings 0.3": replace(_BASE, embedding_size=0.3),
    "embeddings 0.1": replace(_BASE, embedding_size=0.1),
    "embeddings 0.03": replace(_BASE, embedding_size=0.03),
    "cosine": replace(_BASE, schedule="cosine"),
    "no warm-up": replace(_BASE, warmup_steps=0),
    "batch 16": replace(_BASE, batch_size=16),
    "batch 64": replace(_BASE, batch_size=64),
    "growing batches": replace(_BASE, grow=True),
    "half the steps with 40 words": replace(_BASE, short=0.5),
    "beta1 0.8": replace(_BASE, beta1=0.8),
    "beta2 0.99": replace(_BASE, beta2=0.99),
    "beta2 0.95": replace(_BASE, beta2=0.95),
    "average 0.9": replace(_BASE, average=0.9),
    "Muon 0.02": replace(_BASE, muon=0.02),
    "Muon 0.005": replace(_BASE, muon=0.005),
    "block starts 3 x larger": replace(_BASE, small=3.0),
    "8 heads of 32": replace(_BASE, heads=8, head_dim=32),
    "4 heads of 64": replace(_BASE, heads=4, head_dim=64),
    "feed-forward 1024": replace(_BASE, feed_forward_dim=1024),
    "GELU": replace(_BASE, activation=nn.GELU),
    "squared ReLU": replace(_BASE, activation=SquaredReLU),
    "norm first": replace(_BASE, norm_first=True),
    "later words first": replace(_BASE, later_words=0.6),
    "mix of the word before": replace(_BASE, mix_before=True),
    "skip": replace(_BASE, skip=True),
    "token shift": replace(_BASE, token_shift=True),
    "value embeddings": replace(_BASE, value_embeddings=True),
    "pairs": _PAIRS,
    "pairs, 262,144": replace(_PAIRS, pairs=262_144),
    "pairs, the most frequent": replace(_PAIRS, frequent_pairs=True),
    "pairs and triples": replace(_PAIRS, triples=262_144),
    "pairs from counts": _COUNTED,
    "pairs from counts, half as long": replace(_COUNTED, pair_scale=0.5),
    "pairs from counts, shrinkage 100": replace(_COUNTED, pair_shrinkage=100.0),
    "pairs from counts, shrinkage 1000": replace(_COUNTED, pair_shrinkage=1000.0),
    "pairs from counts, 262,144": replace(_COUNTED, pairs=262_144),
    "pairs from counts, rate 3e-3": replace(_COUNTED, learning_rate=3e-3),
    "pairs from counts, rate 8e-3": replace(_COUNTED, learning_rate=8e-3),
    "pairs from counts, 4 heads": _FOUR_HEADS,
    "pairs from counts, 4 heads, rate 3e-3": replace(_FOUR_HEADS, learning_rate=3e-3),
}


@dataclass(frozen=True)
class Reviews:
    train: Tensor  # (N, L + 1) ids: the first words of each review, padded with 0
    later: Tensor  # (P, L + 1): the words after them, cut into pieces
    held_out: Tensor  # (M, L + 1): the first reviews of `unsupervised`
    final: Tensor  # the same of reviews 2,501 to 5,000
    all_tokens: np.ndarray  # the training reviews one after the other; the id V - 1 ends each of them
    shares: Tensor  # (V,)
    datamodule: TextDataModule


class Rows:
    """A matrix (R, D), trained by Adam. A row changes only in steps that use it."""

    def __init__(self, weight: Tensor, idea: Idea, rate: float):
        self.weight, self.idea, self.rate, self.steps = weight.detach(), idea, rate, 0
        self.first, self.second = torch.zeros_like(self.weight), torch.zeros_like(self.weight)

    def __getitem__(self, ids: Tensor) -> Tensor:
        """(...) -> (..., D). The leaf of the graph has only the rows that occur."""
        self.used, places = ids.unique(return_inverse=True)
        self.leaf = self.weight[self.used].requires_grad_(torch.is_grad_enabled())
        return F.embedding(places, self.leaf)

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        self.steps += 1
        beta1, beta2, gradient = self.idea.beta1, self.idea.beta2, self.leaf.grad
        first = self.first[self.used].lerp_(gradient, 1 - beta1)
        second = self.second[self.used].lerp_(gradient.square(), 1 - beta2)
        self.first[self.used], self.second[self.used] = first, second
        rate = learning_rate * self.rate * math.sqrt(1 - beta2**self.steps) / (1 - beta1**self.steps)
        self.weight.index_add_(0, self.used, first / (second.sqrt() + 1e-7), alpha=-rate)


class Muon:
    """https://kellerjordan.github.io/posts/muon: the update of a matrix is its momentum, made nearly orthogonal."""

    def __init__(self, parameters: list[Tensor], learning_rate: float):
        self.momenta = [(parameter, torch.zeros_like(parameter)) for parameter in parameters]
        self.learning_rate = learning_rate

    @torch.no_grad()
    def step(self, factor: float) -> None:
        for parameter, momentum in self.momenta:
            momentum.mul_(0.95).add_(parameter.grad)
            x = parameter.grad.add(momentum, alpha=0.95)
            x /= x.norm() + 1e-7
            for _ in range(5):  # Newton-Schulz
                a = x @ x.T
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
            parameter.add_(x, alpha=-self.learning_rate * factor * max(1, x.shape[0] / x.shape[1]) ** 0.5)
            parameter.grad = None


class Network(nn.Module):
    """`MiniGPT` with the parts of an idea. Its tables are trained by `Rows`, all other weights are parameters."""

    def __init__(self, idea: Idea):
        super().__init__()
        self.idea, self.frequent = idea, None
        sizes = {"num_heads": idea.heads, "head_dim": idea.head_dim, "feed_forward_dim": idea.feed_forward_dim}
        self.gpt = MiniGPT(V, L, D, dropout=0.0, token_shift=idea.token_shift, **sizes)
        self.gpt.blocks[0].feed_forward[1] = idea.activation()
        self.before = nn.Parameter(torch.zeros(D)) if idea.mix_before else None
        self.skip = nn.Parameter(torch.zeros(D)) if idea.skip else None
        self.rows: dict[str, Rows] = {}

    def make_rows(self, pair_weight: Tensor | None) -> None:
        idea, gpt = self.idea, self.gpt
        weights = {
            "tokens": (gpt.token_embedding.weight.requires_grad_(False), idea.embedding_rate),
            "output": (gpt.output.weight.requires_grad_(False), idea.output_rate),
            "pairs": (torch.zeros(idea.pairs, D) if pair_weight is None else pair_weight, idea.pair_rate),
            "triples": (torch.zeros(idea.triples, D), idea.pair_rate),
            "values": (torch.zeros(V if idea.value_embeddings else 0, D), idea.embedding_rate),
        }
        self.rows = {name: Rows(weight, idea, rate) for name, (weight, rate) in weights.items() if len(weight)}

    def forward(self, ids: Tensor) -> Tensor:
        """(B, L) -> hidden states (B, L, D)."""
        if not self.rows:
            return self.gpt.hidden_states(ids)
        x = self.rows["tokens"][ids] + self.gpt.position_embedding.weight[: ids.shape[1]]
        before, two_before = F.pad(ids[:, :-1], (1, 0)), F.pad(ids[:, :-2], (2, 0))
        if "pairs" in self.rows:
            x = x + self.rows["pairs"][self._pair(before, ids)]
        if "triples" in self.rows:
            key = ids * 1_000_003 + before * 19_997 + two_before * 7_919_113
            x = x + self.rows["triples"][key % self.idea.triples]
        if self.before is not None:
            x = x + self.before * F.pad(x[:, :-1], (0, 0, 1, 0))
        hidden = self._block(x, self.rows["values"][ids] if "values" in self.rows else None)
        return hidden if self.skip is None else hidden + self.skip * x

    def _pair(self, first: Tensor, second: Tensor) -> Tensor:
        """The row of each pair. With `frequent_pairs` or `pair_counts`, row 0 is that of all others."""
        if self.frequent is None:
            return (second * 1_000_003 + first) % self.idea.pairs
        key = first * V + second
        place = torch.searchsorted(self.frequent, key).clamp_(max=len(self.frequent) - 1)
        return torch.where(self.frequent[place] == key, place + 1, 0)

    def _block(self, x: Tensor, of_values: Tensor | None) -> Tensor:
        block = self.gpt.blocks[0]
        attention = block.attention
        if self.idea.norm_first:
            x = x + attention(block.attention_norm(x))
            return F.layer_norm(x + block.feed_forward(block.feed_forward_norm(x)), (D,))
        if of_values is None:
            return block(x)
        query, key, _ = attention.project(x)
        value = attention.value(x + of_values).view(*x.shape[:2], *query.shape[1::2]).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return block.after_attention(x, attention.merge_heads(mixed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--ideas", nargs="+", default=list(IDEAS), choices=list(IDEAS), metavar="IDEA")
    parser.add_argument("--steps", type=int, default=100, help="steps of 32 sequences; other batches get as many words")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--held-out", type=int, default=250, help="reviews of `unsupervised`")
    parser.add_argument("--final", action="store_true", help="also print the loss of reviews 2,501 to 5,000")
    parser.add_argument("--every", type=int, default=0, help="also print the loss after every so many steps")
    arguments = parser.parse_args()
    reviews = read_reviews(arguments.folder, arguments.held_out)
    results: dict[str, list[tuple[float, ...]]] = {name: [] for name in arguments.ideas}
    for seed in range(arguments.seeds):
        for name, found in results.items():
            print(f"{name}, seed {seed}", flush=True)
            found.append(train(IDEAS[name], reviews, arguments.steps, seed, arguments.every, arguments.final))
    losses_of = ["held-out loss", *(["of reviews 2,501 to 5,000"] if arguments.final else [])]
    print(f"\n| idea | seconds | of a step | {' | '.join(losses_of)} |\n|---|---|---|{'---|' * len(losses_of)}")
    for name, found in results.items():
        seconds, of_step, *losses = zip(*found, strict=True)
        of_seeds = " | ".join(", ".join(f"{loss:.3f}" for loss in losses_of_seeds) for losses_of_seeds in losses)
        print(f"| {name} | {statistics.median(seconds):.0f} | {statistics.median(of_step):.2f} | {of_seeds} |")


def read_reviews(folder: str, held_out: int, tokenizer: Tokenizer | None = None) -> Reviews:
    config = ImdbConfig(source=folder, end_token=False, loss_on_padding=True, validation_documents=5000)
    datamodule = TextDataModule(config, V, L, tokenizer=tokenizer)
    datamodule.setup()
    train, validation = datamodule._train_sequences, datamodule._val_sequences
    assert validation is not None, "FOLDER has no split `unsupervised`"
    shown = train[np.arange(len(train))], validation[np.arange(held_out)], validation[np.arange(2500, 5000)]
    tokens = np.asarray(datamodule.corpus.train.tokens)
    ends = np.flatnonzero(tokens == V - 1)
    starts = [np.arange(first + L, end - L, L) for first, end in zip(np.append(0, ends[:-1] + 1), ends, strict=True)]
    later = torch.from_numpy(tokens[np.concatenate(starts)[:, None] + np.arange(L + 1)].astype(np.int64))
    return Reviews(shown[0], later, *shown[1:], tokens, datamodule.target_shares(), datamodule)


def train(idea: Idea, reviews: Reviews, steps_of_32: int, seed: int, every: int, final: bool) -> tuple[float, ...]:
    """Train one network. Returns the seconds of all, the seconds of a step, and its held-out losses."""
    torch.manual_seed(seed)
    start = time.perf_counter()
    network = Network(idea)
    prepare(network, reviews)
    preparation = time.perf_counter() - start
    gpt, tables, squares = network.gpt, list(network.rows.values()), None
    matrices = [p for p in gpt.blocks.parameters() if p.ndim == 2] if idea.muon else []
    muon = Muon(matrices, idea.muon)
    by_adam = [p for p in network.parameters() if p.requires_grad and all(p is not matrix for matrix in matrices)]
    if not tables:
        squares = SquaresByOccurrence(gpt.token_embedding)
    optimizer = KerasAdam(by_adam, betas=(idea.beta1, idea.beta2), squares=squares)
    schedule = ScheduleConfig(name=idea.schedule, warmup_steps=idea.warmup_steps)
    generator = torch.Generator().manual_seed(seed)
    order = np.random.default_rng(seed).permutation(len(reviews.train))
    later_order = np.random.default_rng(seed).permutation(len(reviews.later))
    total, done, steps, average = steps_of_32 * 32, 0, 0, None
    start, paused = time.perf_counter(), 0.0
    while done < total:
        part = done / total
        size = (16 if part < 0.4 else 32 if part < 0.7 else 64) if idea.grow else idea.batch_size
        steps_of_idea = total // idea.batch_size
        factor = learning_rate_factor(int(part * steps_of_idea), steps_of_idea, schedule)
        if part < idea.later_words:
            ids = reviews.later[np.take(later_order, range(done, done + size), mode="wrap")]
        else:
            ids = reviews.train[np.take(order, range(done, done + size), mode="wrap")]
        ids = ids[:, :41] if part < idea.short else ids
        loss = loss_of(network, ids, reviews.shares, idea.candidates, generator)
        loss.backward()
        for table in tables:
            table.step(idea.learning_rate * factor)
        muon.step(factor)
        optimizer.param_groups[0]["lr"] = idea.learning_rate * factor * idea.block_rate
        optimizer.step()
        optimizer.zero_grad()
        done, steps = done + size, steps + 1
        if idea.average and part > 0.3:
            weights = [table.weight for table in tables] + [p.data for p in by_adam]
            average = average or [weight.clone() for weight in weights]
            if steps % 5 == 0:
                torch._foreach_lerp_(average, weights, 1 - idea.average)
        if every and steps % every == 0:
            now = time.perf_counter()
            loss, seconds = evaluate(network, gpt.output, reviews.held_out), preparation + now - start - paused
            print(f"  {steps} steps, {seconds:.0f} s: {loss:.4f}", flush=True)
            paused += time.perf_counter() - now
    of_steps = time.perf_counter() - start - paused
    for weight, mean in zip(weights, average, strict=True) if average else ():
        weight.copy_(mean)
    losses = [
        evaluate(network, gpt.output, held_out) for held_out in (reviews.held_out, *([reviews.final] if final else []))
    ]
    seconds, of_step = preparation + of_steps, of_steps / max(steps, 1)
    print(f"  {seconds:.0f} s, {preparation:.1f} s before the first step, {of_step:.3f} s a step: {losses}", flush=True)
    return seconds, of_step, *losses


@torch.no_grad()
def prepare(network: Network, reviews: Reviews) -> None:
    """Set the initial weights."""
    idea, gpt, pair_weight = network.idea, network.gpt, None
    gpt.output.bias.copy_(reviews.shares.log())
    if idea.counts:
        pairs = reviews.datamodule.pair_counts()
        start_from_counts(gpt, pairs)
        for name, weight in gpt.named_parameters():
            if name.endswith(("attention.output.weight", "feed_forward.2.weight")):
                weight.mul_(idea.small)
        gpt.token_embedding.weight.mul_(idea.embedding_size / SIZE)
        gpt.position_embedding.weight.mul_(idea.embedding_size / SIZE)
    if idea.frequent_pairs or idea.pair_counts:
        network.frequent, following = count_triples(reviews, idea.pairs - 1)
        if idea.pair_counts:
            pair_weight = vectors_of_pairs(gpt, idea, pairs, network.frequent, following)
    if idea.rows_only:
        network.make_rows(pair_weight)


def count_triples(reviews: Reviews, number: int) -> tuple[Tensor, PairCounts]:
    """The most frequent pairs, as sorted keys `first * V + second` (P,), and which words follow them."""
    tokens = torch.from_numpy(reviews.all_tokens.astype(np.int64))
    first, second, third = tokens[:-2], tokens[1:-1], tokens[2:]
    inside = (first != V - 1) & (second != V - 1) & (third != V - 1)
    keys, third = (first * V + second)[inside], third[inside]
    different, counts = keys.unique(return_counts=True)
    frequent = different[counts.topk(number).indices.sort().values]
    place = torch.searchsorted(frequent, keys).clamp_(max=number - 1)
    known = frequent[place] == keys
    triples, counts = (place[known] * V + third[known]).unique(return_counts=True)
    return frequent, PairCounts(triples // V, triples % V, counts)


def vectors_of_pairs(gpt: MiniGPT, idea: Idea, pairs: PairCounts, frequent: Tensor, following: PairCounts) -> Tensor:
    """(P + 1, D): vectors that move the prediction from the counts of pairs to those of triples. Row 0 is 0.

    The matrix log(1 + c / (k p)) has a row for each pair and a column for the word after it. c counts the triple, p is
    the probability of the third word after the second, by the counts of pairs. The vectors fit it by least squares.
    """
    second, third = frequent[following.first] % V, following.second
    of_pair = torch.zeros(V * V, dtype=torch.float32)
    of_pair[pairs.first * V + pairs.second] = pairs.counts.float()
    share = torch.zeros(V).index_add_(0, pairs.second, pairs.counts.float()) / pairs.counts.sum()
    of_second = torch.zeros(V).index_add_(0, pairs.first, pairs.counts.float())
    p = (of_pair[second * V + third] + 100 * share[third]) / (of_second[second] + 100)
    values = torch.log1p(following.counts / (idea.pair_shrinkage * p)) * share[third]
    weight = gpt.output.weight - share @ gpt.output.weight  # (V, D): a constant in a row changes no probability
    gram = weight.T @ (weight * share[:, None])
    gram += 1e-2 * gram.trace() / D * torch.eye(D)
    size = (len(frequent), V)
    matrix = torch.sparse_coo_tensor(torch.stack([following.first, third]), values, size, check_invariants=False)
    vectors = torch.linalg.solve(gram, (matrix @ weight).T).T  # (P, D)
    length = gpt.token_embedding.weight.norm(dim=1)[frequent % V, None] / math.sqrt(D)  # the block divides by it
    return F.pad(idea.pair_scale * vectors * length, (0, 0, 1, 0))


def loss_of(network: Network, ids: Tensor, shares: Tensor, candidates: int, generator: torch.Generator) -> Tensor:
    """The mean loss of a batch (B, L + 1)."""
    hidden, targets, bias = network(ids[:, :-1]), ids[:, 1:], network.gpt.output.bias
    weight = network.rows["output"] if network.rows else network.gpt.output.weight  # both give rows by their numbers
    if candidates:
        loss = sampled_cross_entropy(hidden, weight, bias, targets, shares, candidates, generator)
    else:
        loss = linear_cross_entropy(hidden, weight[torch.arange(V)] if network.rows else weight, bias, targets)
    return loss / targets.numel()


@torch.no_grad()
def evaluate(hidden_states: Callable[[Tensor], Tensor], output: nn.Linear, held_out: Tensor) -> float:
    """The mean loss of held-out reviews (M, L + 1)."""
    losses = [
        token_losses(hidden_states(ids[:, :-1]), output.weight, output.bias, ids[:, 1:]).mean()
        for ids in held_out.split(50)
    ]
    return statistics.fmean(map(float, losses))


if __name__ == "__main__":
    main()
