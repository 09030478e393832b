"""What the network itself says: how sure it is of a text, and which of the words before it makes use of.

All losses are in nats a token, entropies in bits.
"""

import copy
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minigpt_pl.cpu.linear import pack_linear_layers
from minigpt_pl.model import MiniGPT
from minigpt_pl.tokenizer import NUM_SPECIAL, UNKNOWN_ID

ROWS = 64  # rows of logits at once: 5 MB at 20,000 words, which caches hold; 512 take twice the time
CONTEXTS = (1, 2, 5, 10, 20, 40, 80)  # words


class TextScores(NamedTuple):
    """Means over the words of a text, each given all that stands before it (the model's `max_length` at most).

    Attributes:
        loss: -log p of the words that stand there, at temperature 1 and with no control: its exponential is the model's
            own perplexity. Real held-out text shows what is usual; far lower is dull, far higher is strange.
        entropy: of the model's distribution, in bits, in [0, log2 V]: how open it finds what comes next.
        unknown: the probability it gives `[UNK]`, which is never written: how often it lacks a word, in [0, 1].
    """

    loss: float
    entropy: float
    unknown: float


@torch.inference_mode()
def score_texts(network: MiniGPT, texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[TextScores]:
    """Score texts given as (context ids, ids); nan for an empty text.

    Args:
        network: in eval mode.
    """
    network, device = pack_linear_layers(network), network.output.weight.device
    hidden, targets, sizes = [], [], [len(ids) for _, ids in texts]
    for context, ids in texts:
        hidden.append(_hidden_before(network, [*context, *ids], len(ids)))
        targets.append(torch.tensor(ids, dtype=torch.long, device=device))
    values = _from_hidden(network, torch.cat(hidden), torch.cat(targets)).cpu().numpy()  # (N, 3)
    ends = np.cumsum(sizes)
    return [
        TextScores(*map(float, values[end - size : end].mean(axis=0))) if size else TextScores(*[float("nan")] * 3)
        for end, size in zip(ends, sizes, strict=True)
    ]


def _hidden_before(network: MiniGPT, ids: list[int], count: int) -> Tensor:
    """The hidden states that the last `count` ids are predicted from. (count, D)"""
    length = network.max_length
    inputs = torch.tensor(ids[:-1], dtype=torch.long, device=network.output.weight.device)
    hidden = network.hidden_states(inputs[None, :length])[0]  # (L, D)
    if len(inputs) > length:  # from here on the window slides, and each word is the last of its own
        windows = inputs.unfold(0, length, 1)[1:]  # (B, W)
        hidden = torch.cat([hidden, *(network.hidden_states(part)[:, -1] for part in windows.split(ROWS))])
    return hidden[len(hidden) - count :]


def _from_hidden(network: MiniGPT, hidden: Tensor, targets: Tensor) -> Tensor:
    """(N, D), (N,) -> (N, 3): -log p of the target, entropy, probability of [UNK]."""
    parts = []
    for rows, ids in zip(hidden.split(ROWS), targets.split(ROWS), strict=True):
        logits = network.output(rows)  # (R, V)
        largest, places = logits.max(dim=-1, keepdim=True)
        probabilities = logits.softmax(dim=-1)
        normalizer = (largest - probabilities.gather(1, places).log())[:, 0]  # log of the sum of exp(logits)
        loss = normalizer - logits.gather(1, ids[:, None])[:, 0]
        entropy = (normalizer - torch.linalg.vecdot(probabilities, logits)) / math.log(2)
        parts.append(torch.stack([loss, entropy, probabilities[:, UNKNOWN_ID]], dim=1))
    return torch.cat(parts) if parts else hidden.new_zeros(0, 3)


@torch.inference_mode()
def last_losses(network: MiniGPT, sequences: Tensor) -> Tensor:
    """The loss of each sequence's last id given those before it: (B, L + 1) -> (B,)."""
    network = pack_linear_layers(network)
    hidden = [network.hidden_states(part[:, :-1])[:, -1] for part in sequences.split(ROWS)]
    return _from_hidden(network, torch.cat(hidden), sequences[:, -1])[:, 0]


def windows_of(tokens: np.ndarray, offsets: np.ndarray, length: int, most: int) -> Tensor:
    """Rows of `length` ids, each from one document and overlapping none, spread over the text: (B, length)."""
    starts = np.concatenate([
        np.arange(a, b - length, length) for a, b in zip(offsets, offsets[1:], strict=False)  # without its end token
    ])  # fmt: skip
    starts = starts[np.linspace(0, len(starts) - 1, min(most, len(starts)), dtype=int)] if len(starts) else starts
    return torch.from_numpy(tokens[starts[:, None].astype(int) + np.arange(length)].astype(np.int64))


def loss_by_context(network: MiniGPT, windows: Tensor) -> dict[int, np.ndarray]:
    """How much the words further back help: the loss of the same words given only the last c words before them.

    Args:
        windows: (B, L + 1), L at most `max_length`; the last id is the one predicted. `[UNK]` as a target is left out.

    Returns:
        c -> (B',) losses, of the same targets for each c of `CONTEXTS` up to L.
    """
    windows = windows[windows[:, -1] != UNKNOWN_ID]
    longest = windows.shape[1] - 1
    contexts = sorted({c for c in CONTEXTS if c < longest} | {longest})
    return {c: last_losses(network, windows[:, -c - 1 :]).cpu().numpy() for c in contexts}


def copying_losses(network: MiniGPT, texts: Tensor, seed: int = 0) -> dict[str, np.ndarray]:
    """Does the network go on with what stood there before? Two tests, after Olsson et al., arXiv 2209.11895.

    A network that can copy predicts the second of two equal halves far better than the first. That needs a head which
    looks for where the present word stood before and takes the word after it: an induction head. It takes two
    layers of attention; one block can only learn that a word makes another likelier.

    Args:
        texts: (B, L) ids of real text, with L at most half of `max_length`, at least 2.
        seed: of the words drawn at random.

    Returns:
        Losses (B, L - 1) of a text's second to last word: "random, first" and "random, again" for words drawn evenly,
        in two equal halves; "real, first" (after another real text), "real, again" (after itself).
    """
    count, length = texts.shape
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(NUM_SPECIAL - 1, network.vocab_size - 1, (2, count, length), generator=generator)
    pairs = {
        "random, first": (drawn[0], drawn[1]),
        "random, again": (drawn[1], drawn[1]),
        "real, first": (texts.roll(1, 0), texts),
        "real, again": (texts, texts),
    }
    return {name: _losses_of_second(network, *halves) for name, halves in pairs.items()}


@torch.inference_mode()
def _losses_of_second(network: MiniGPT, first: Tensor, second: Tensor) -> np.ndarray:
    network, (count, length) = pack_linear_layers(network), second.shape
    hidden = network.hidden_states(torch.cat([first, second[:, :-1]], dim=1))[:, length:]  # (B, L - 1, D)
    losses = _from_hidden(network, hidden.flatten(0, 1), second[:, 1:].flatten())[:, 0]
    return losses.view(count, length - 1).cpu().numpy()


@torch.inference_mode()
def attention_maps(network: MiniGPT, ids: Sequence[int]) -> Tensor:
    """Where each head of each block looks, for up to `max_length` ids: (blocks, H, L, L), row i over places j <= i."""
    x, maps = network.embed(torch.tensor([list(ids)], device=network.output.weight.device)), []
    for block in network.blocks:
        maps.append(block.attention.attention_weights(x)[0])
        x = block(x)
    return torch.stack(maps).cpu()


def attention_by_distance(network: MiniGPT, texts: Tensor) -> np.ndarray:
    """The mean weight of the word d places back, from the second half of the places: (B, L) -> (blocks, H, L / 2)."""
    half = texts.shape[1] // 2
    maps = torch.stack([attention_maps(network, text) for text in texts.tolist()]).mean(dim=0)  # (blocks, H, L, L)
    rows = torch.arange(half, 2 * half)
    distances = torch.arange(half)
    return maps[:, :, rows[:, None], rows[:, None] - distances].mean(dim=2).numpy()


def with_context(network: MiniGPT, length: int) -> MiniGPT:
    """The same network, able to see only the last `length` words. Weights are shared."""
    shorter = copy.deepcopy(network, {id(parameter): parameter for parameter in network.parameters()})
    shorter.max_length = length
    shorter.position_embedding = torch.nn.Embedding.from_pretrained(network.position_embedding.weight[:length])
    return shorter.eval()
