"""How likely a network finds a text: a loss for each token, and its means.

Each token after a document's first is predicted from those before it in its document. A network sees at most L =
max_length of them, so a document is cut into windows of L inputs. The first window predicts tokens 1 to L, all of them
from the document's very beginning: what the network was trained on with cut=truncate. Each further window lies L // 2
tokens on and predicts only its last L // 2 tokens: a token beyond the first L has between L - L // 2 + 1 and L tokens
before it. No window crosses into another document. (`generation.scoring` moves the window by one token.)
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minigpt_pl.cpu.linear import inference_without_autocast, pack_linear_layers
from minigpt_pl.loss import token_losses
from minigpt_pl.measures.ngrams import NGramModel
from minigpt_pl.model import MiniGPT
from minigpt_pl.tokenizer import PADDING_ID, UNKNOWN_ID

BATCH_TOKENS = 8192
RANKS = 10, 100, 1_000, 10_000  # ends of the bands of word frequency
SPELLING_ORDER = 5


def document_losses(network: MiniGPT, documents: Sequence[Sequence[int]], show_progress: bool = False) -> np.ndarray:
    """The loss of each token but the documents' first.

    Args:
        network: its dropout is left out.
        documents: each one's ids.

    Returns:
        (T,) fp32 losses in nats, document after document.
    """
    output = network.output
    with inference_without_autocast(network):
        losses = [
            token_losses(hidden, output.weight, output.bias, targets).numpy(force=True)
            for hidden, targets in predictions(network, documents, max(network.max_length // 2, 1), show_progress)
        ]
    return np.concatenate(losses) if losses else np.zeros(0, np.float32)


def _windows(length: int, max_length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Of a document of `length` tokens: start, first target, end. The inputs are start to end - 2."""
    first = 1
    while first < length:
        start = 0 if first == 1 else first + stride - max_length - 1
        end = min(start + max_length + 1, length)
        yield start, first, end
        first = end


def predictions(
    network: MiniGPT, documents: Sequence[Sequence[int]], stride: int, show_progress: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batch by batch the hidden states (N, D) that predict, and the ids (N,) that they should.

    Args:
        stride: by how many tokens a window moves on: 1 gives each token all the context there is, and takes longest.
    """
    from tqdm import tqdm  # comes with lightning

    network, length = pack_linear_layers(network), network.max_length
    windows = [(document, window) for document in documents for window in _windows(len(document), length, stride)]
    rows = max(BATCH_TOKENS // length, 1)
    device = network.output.weight.device
    with tqdm(
        total=len(windows), desc="Network", unit=" windows", leave=False, disable=None if show_progress else True
    ) as progress:
        for batch in (windows[i : i + rows] for i in range(0, len(windows), rows)):
            width = max(end - start for _, (start, _, end) in batch)
            ids = torch.full((len(batch), width), PADDING_ID)  # (B, L + 1); what comes later changes nothing
            predicted = torch.zeros(len(batch), width - 1, dtype=torch.bool)
            for row, (document, (start, first, end)) in enumerate(batch):
                ids[row, : end - start] = torch.as_tensor(document[start:end])
                predicted[row, first - start - 1 : end - start - 1] = True
            ids, predicted = ids.to(device), predicted.to(device)
            hidden = network.hidden_states(ids[:, :-1])  # (B, L, D)
            yield hidden[predicted], ids[:, 1:][predicted]
            progress.update(len(batch))


def spelling_nats(unknown: Counter[str], vocabulary: Sequence[str]) -> float:
    """Nats to spell out words that are not in a vocabulary.

    Byte by byte, its end included, under a Kneser-Ney model of the vocabulary's own words: with the loss of `[UNK]`,
    a code that another vocabulary's losses can be compared with.

    Args:
        unknown: how often each occurs.
        vocabulary: known words, each counted once.
    """
    end, spelled = 256, [word.encode() for word in vocabulary]
    letters = np.array([byte for word in spelled for byte in (*word, end)])
    offsets = np.cumsum([0, *(len(word) + 1 for word in spelled)])
    model = NGramModel.fit(letters, offsets, vocab_size=257, order=SPELLING_ORDER)
    return -sum(
        count * float(model.log_probabilities(np.array([*word.encode(), end])).sum()) for word, count in unknown.items()
    )


def summarise(
    losses: Mapping[str, np.ndarray], documents: Sequence[np.ndarray], max_length: int, end_id: int | None
) -> dict[str, Any]:
    """Means of several models' losses over the same tokens.

    Args:
        losses: model -> (T,) nats, in the order of `document_losses`.
        documents: each one's ids.
        max_length: L of the network.
        end_id: the end token, which is no word; None where documents have none.

    Returns:
        Plain values, ready for JSON. All losses are in nats a token, perplexities are exp(loss).

        - beginning, whole: tokens 1 to L of the documents, and all of them: for each model loss, perplexity,
          word_loss and word_perplexity (words only: no [UNK] and no [END], as val/word_perplexity in training).
        - by_position: the loss by the number of tokens before it in the document. Beyond L a network sees no more.
        - by_frequency: the loss by the rank of the word's frequency in the training text, and of [UNK] and [END].
    """
    targets = np.concatenate([document[1:] for document in documents])
    positions = np.concatenate([np.arange(1, len(document)) for document in documents])  # tokens before it
    word = (targets != UNKNOWN_ID) & (targets != (-1 if end_id is None else end_id))

    def means(part: np.ndarray) -> dict[str, Any]:
        result: dict[str, Any] = {"tokens": int(part.sum()), "words": int((part & word).sum())}
        for name, values in losses.items():
            loss, word_loss = float(values[part].mean()), float(values[part & word].mean())
            result[name] = {
                "loss": loss,
                "perplexity": math.exp(loss),
                "word_loss": word_loss,
                "word_perplexity": math.exp(word_loss),
            }
        return result

    def bands(parts: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
        return [
            {"band": band, "tokens": int(part.sum())}
            | {name: float(values[part].mean()) for name, values in losses.items()}
            for band, part in parts.items()
            if part.any()
        ]

    ranks = targets.astype(np.int64) - UNKNOWN_ID  # the vocabulary lists words by frequency
    doubling = [2**power for power in range(max_length.bit_length()) if 2**power < max_length]
    frequency = _bands(np.where(word, ranks, 0), RANKS) | {"[UNK]": targets == UNKNOWN_ID}
    if end_id is not None:
        frequency["[END]"] = targets == end_id
    return {
        "beginning": means(positions <= max_length),
        "whole": means(np.ones(len(targets), bool)),
        "by_position": bands(_bands(positions, [*doubling, max_length])),
        "by_frequency": bands(frequency),
    }


def _bands(values: np.ndarray, ends: Sequence[int]) -> dict[str, np.ndarray]:
    """Name -> where the values, from 1 on, lie in that band; 0 is in none."""
    parts = {}
    for before, end in zip([0, *ends[:-1]], ends, strict=True):
        name = f"{before + 1:,}-{end:,}" if end > before + 1 else f"{end:,}"
        parts[name] = (before < values) & (values <= end)
    return parts | {f"over {ends[-1]:,}": values > ends[-1]}
