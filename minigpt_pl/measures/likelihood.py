"""The loss of each token of a text under a network.

The network predicts a token from the tokens before it in the same document, at most L = max_length of them. Documents
are cut into windows of L + 1 tokens. With L = 6 and stride = 3 (i: only input, P: predicted):

    token     0  1  2  3  4  5  6  7  8  9
    window 1  i  P  P  P  P  P  P
    window 2           i  i  i  i  P  P  P

`document_losses` uses stride = L // 2. So each token after the first window has L - L // 2 + 1 to L tokens of context.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from minigpt_pl.cpu.linear import inference_without_autocast, pack_linear_layers
from minigpt_pl.loss import token_losses
from minigpt_pl.model import MiniGPT
from minigpt_pl.tokenizer import PADDING_ID

BATCH_TOKENS = 8192

Document = Sequence[int] | np.ndarray


def document_losses(network: MiniGPT, documents: Sequence[Document], show_progress: bool = False) -> np.ndarray:
    """The loss of each token, except the first token of each document: (T,) fp32, in nats. Dropout is off."""
    weight, bias = network.output.weight, network.output.bias
    stride = max(network.max_length // 2, 1)
    losses = [np.zeros(0, np.float32)]
    with inference_without_autocast(network):
        for hidden, targets in predictions(network, documents, stride, show_progress):
            losses.append(token_losses(hidden, weight, bias, targets).numpy(force=True))
    return np.concatenate(losses)


def predictions(
    network: MiniGPT, documents: Sequence[Document], stride: int, show_progress: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of hidden states (N, D) and of the ids (N,) that they predict, in the order of the documents.

    Args:
        stride: tokens from the start of a window to the next start; 1 gives the longest context, but is slowest.
    """
    from tqdm import tqdm  # comes with lightning

    network, length = pack_linear_layers(network), network.max_length
    windows: list[tuple[Document, int, int, int]] = []  # document, start, first target, end; inputs: start to end - 2
    for document in documents:
        first = 1
        while first < len(document):
            start = 0 if first == 1 else first + stride - length - 1
            end = min(start + length + 1, len(document))
            windows.append((document, start, first, end))
            first = end
    rows = max(BATCH_TOKENS // length, 1)
    device = network.output.weight.device
    disable = None if show_progress else True  # with None, tqdm draws no bar if the output is not a terminal
    with tqdm(total=len(windows), desc="Network", unit=" windows", leave=False, disable=disable) as progress:
        for batch in (windows[i : i + rows] for i in range(0, len(windows), rows)):
            width = max(end - start for _, start, _, end in batch)
            ids = torch.full((len(batch), width), PADDING_ID)  # (B, L + 1); padding comes last, so no token sees it
            predicted = torch.zeros(len(batch), width - 1, dtype=torch.bool)  # (B, L)
            for row, (document, start, first, end) in enumerate(batch):
                ids[row, : end - start] = torch.as_tensor(document[start:end])
                predicted[row, first - start - 1 : end - start - 1] = True
            ids, predicted = ids.to(device), predicted.to(device)
            hidden = network.hidden_states(ids[:, :-1])  # (B, L, D)
            yield hidden[predicted], ids[:, 1:][predicted]
            progress.update(len(batch))
