"""Probes of a network: the probabilities that it gives to a text, and how it uses its context.

Losses are in nats per token, entropies in bits. The networks must be in eval mode.
"""

import copy
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from minigpt_pl.cpu.linear import pack_linear_layers
from minigpt_pl.loss import token_losses
from minigpt_pl.measures.likelihood import predictions
from minigpt_pl.model import MiniGPT
from minigpt_pl.tokenizer import NUM_SPECIAL, UNKNOWN_ID

ROWS = 64  # rows of logits at a time. With 20,000 words they take 5 MB and fit in the cache; 512 rows are half as fast
CONTEXTS = (1, 2, 5, 10, 20, 40, 80)  # words


class TextScores(NamedTuple):
    """Means over the words of a text. Each is predicted from all words before it, at most the model's `max_length`.

    A far lower loss than that of real held-out text means dull text. A far higher loss means strange text.
    """

    loss: float  # -log p of the words at temperature 1, without controls
    entropy: float  # of the probabilities of all words, in [0, log2 V]
    unknown: float  # probability of [UNK]; a high value means that the model lacks a word


@torch.inference_mode()
def score_texts(
    network: MiniGPT, texts: Sequence[tuple[Sequence[int], Sequence[int]]], show_progress: bool = False
) -> list[TextScores]:
    """Score texts. Each is (context ids, ids), with at least one context id. The scores of an empty text are nan."""
    output = pack_linear_layers(network).output
    documents = [[*context, *ids] for context, ids in texts]
    scores = []  # (N, 3) of each batch
    for hidden, targets in predictions(network, documents, stride=1, show_progress=show_progress):
        for rows, ids in zip(torch.split(hidden, ROWS), torch.split(targets, ROWS), strict=True):
            log_p = output(rows).log_softmax(dim=-1)  # (R, V)
            p = log_p.exp()
            entropy = torch.linalg.vecdot(p, log_p) / -math.log(2)
            scores.append(torch.stack([-log_p.gather(1, ids[:, None])[:, 0], entropy, p[:, UNKNOWN_ID]], dim=1))
    all_scores = torch.cat(scores).cpu().numpy() if scores else np.zeros((0, 3))
    ends = np.cumsum([len(document) - 1 for document in documents])
    return [
        TextScores(*map(float, all_scores[end - len(ids) : end].mean(axis=0))) if ids else TextScores(*[math.nan] * 3)
        for end, (_, ids) in zip(ends, texts, strict=True)
    ]


def non_overlapping_windows(tokens: np.ndarray, offsets: np.ndarray, length: int, max_windows: int) -> Tensor:
    """Windows of `length` ids, each inside one document, evenly spread over a text as in `NGramModel.fit`: (B, length).

    The last token of each document is left out, because it is the end token.
    """
    documents = pairwise(offsets.tolist())
    starts = np.array([start for a, b in documents for start in range(a, b - length, length)], dtype=np.int64)
    if len(starts) > max_windows:
        starts = starts[np.linspace(0, len(starts) - 1, max_windows, dtype=int)]
    return torch.from_numpy(tokens[starts[:, None] + np.arange(length)].astype(np.int64))


@torch.inference_mode()
def loss_by_context(network: MiniGPT, windows: Tensor) -> dict[int, np.ndarray]:
    """Losses (B',) of the same words, predicted from only the last c words. The keys are the c of `CONTEXTS` up to L.

    Args:
        windows: (B, L + 1), L at most `max_length`; the last id is the target. Windows with the target `[UNK]` do not
            count. If there are no windows, the result is empty.
    """
    if not len(windows):
        return {}
    windows, longest = windows[windows[:, -1] != UNKNOWN_ID], windows.shape[1] - 1
    contexts = [*(c for c in CONTEXTS if c < longest), longest]
    network, losses = pack_linear_layers(network), {}
    weight, bias = network.output.weight, network.output.bias
    for c in contexts:
        parts = torch.split(windows[:, -c - 1 : -1], ROWS)
        hidden = torch.cat([network.hidden_states(part)[:, -1] for part in parts])  # (B', D)
        losses[c] = token_losses(hidden, weight, bias, windows[:, -1]).cpu().numpy()
    return losses


@torch.inference_mode()
def induction_losses(network: MiniGPT, texts: Tensor) -> dict[str, np.ndarray]:
    """Test whether the network continues a sequence that occurred before. After Olsson et al., arXiv 2209.11895.

    A network that can copy predicts a repeated half far better than its first occurrence. For this it needs an
    induction head, which finds an earlier occurrence of the current word and predicts the word after it. An induction
    head takes two attention layers, or keys from the word before (`model.token_shift`). The notebook's block can only
    learn that a word makes another word more likely.

    Args:
        texts: (B, L) ids of real text, with L at least 2 and at most half of `max_length`.

    Returns:
        Losses (B, L - 1) of the second half of a sequence, without its first word.
        "random, again": the second half repeats the first half (random words).
        "random, first": the two halves differ (random words). "real, again" and "real, first": the same with `texts`.
    """
    network, (count, length) = pack_linear_layers(network), texts.shape
    weight, bias = network.output.weight, network.output.bias
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(NUM_SPECIAL - 1, network.vocab_size - 1, (2, count, length), generator=generator)
    halves = {
        "random, first": (drawn[0], drawn[1]),
        "random, again": (drawn[1], drawn[1]),
        "real, first": (texts.roll(1, 0), texts),
        "real, again": (texts, texts),
    }
    losses = {}
    for name, (first, second) in halves.items():
        hidden = network.hidden_states(torch.cat([first, second[:, :-1]], dim=1))[:, length:]  # (B, L - 1, D)
        losses[name] = token_losses(hidden, weight, bias, second[:, 1:]).cpu().numpy()
    return losses


@torch.inference_mode()
def attention_maps(network: MiniGPT, ids: Sequence[int]) -> Tensor:
    """Attention weights of each head for up to `max_length` ids: (blocks, H, L, L). In row i, positions j > i are 0."""
    x = network.embed(torch.tensor([list(ids)], device=network.output.weight.device))  # (1, L, D)
    maps = []
    for block in cast(Any, network.blocks):  # PyTorch does not declare the type of its items
        maps.append(block.attention.attention_weights(x)[0])
        x = block(x)
    return torch.stack(maps).cpu()


def attention_by_distance(network: MiniGPT, texts: Tensor) -> np.ndarray:
    """Mean attention weight at each distance, for the words in the second half: (B, L) -> (blocks, H, L / 2)."""
    half = texts.shape[1] // 2
    maps = torch.stack([attention_maps(network, text) for text in texts.tolist()]).mean(dim=0)  # (blocks, H, L, L)
    rows, distances = torch.arange(half, 2 * half), torch.arange(half)
    means: np.ndarray = maps[:, :, rows[:, None], rows[:, None] - distances].mean(dim=2).numpy()
    return means


def limit_context(network: MiniGPT, length: int) -> MiniGPT:
    """A copy of the network that sees only the last `length` words. Both use the same weights."""
    shorter = copy.deepcopy(network, {id(parameter): parameter for parameter in network.parameters()})
    shorter.max_length = length
    shorter.position_embedding.weight = torch.nn.Parameter(network.position_embedding.weight[:length])
    return shorter.eval()
