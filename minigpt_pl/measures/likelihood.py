"""The loss of each token of a text under a network.

The network predicts each token after a document's first from the tokens before it, at most L = max_length of them. A
document is cut into windows of L inputs. The first window starts at the document's first token and predicts tokens 1 to
L, as in training with cut=truncate. Each further window starts `stride` tokens later and predicts only its last
`stride` tokens. No window crosses into another document.

`document_losses` takes L // 2 as the stride, so a token beyond the first L has L - L // 2 + 1 to L tokens before it.
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
    """The loss of each token except the documents' first ones, without dropout: (T,) fp32, in nats."""
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
        stride: tokens between windows; 1 gives each token all the context that the network can use, but is slowest.
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
    disable = None if show_progress else True  # None: no bar if standard error is not a terminal
    with tqdm(total=len(windows), desc="Network", unit=" windows", leave=False, disable=disable) as progress:
        for batch in (windows[i : i + rows] for i in range(0, len(windows), rows)):
            width = max(end - start for _, start, _, end in batch)
            ids = torch.full((len(batch), width), PADDING_ID)  # (B, L + 1); padding comes last, so it changes nothing
            predicted = torch.zeros(len(batch), width - 1, dtype=torch.bool)  # (B, L)
            for row, (document, start, first, end) in enumerate(batch):
                ids[row, : end - start] = torch.as_tensor(document[start:end])
                predicted[row, first - start - 1 : end - start - 1] = True
            ids, predicted = ids.to(device), predicted.to(device)
            hidden = network.hidden_states(ids[:, :-1])  # (B, L, D)
            yield hidden[predicted], ids[:, 1:][predicted]
            progress.update(len(batch))
