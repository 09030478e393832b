"""Initial weights from counts of neighbouring tokens. The network then predicts nearly as the counts do."""

import math

import torch
from torch import Tensor

from minigpt_pl.data.datamodule import PairCounts
from minigpt_pl.model import MiniGPT

SHRINKAGE = 300.0  # pseudo-count; with a larger one, rare pairs count less
SMALL = 0.1  # factor of the block's outputs, so that the block changes its input little
SIZE = 0.1  # root mean square of the token embeddings: Adam's steps have a fixed size, so small weights learn faster
POSITIONS = 0.02  # factor of the position embeddings, so that they change the token embeddings little
_OVERSAMPLING = 20  # extra columns of the randomised decomposition


@torch.no_grad()
def start_from_counts(model: MiniGPT, pairs: PairCounts) -> None:
    """Set the embeddings and the output weights. The output bias must be the log share of each token.

    The matrix log(1 + c / (k p)) has a row for each token and a column for the token after it. c counts the pair, p is
    the share of the second token, and k is the shrinkage. Up to a constant per row, this is the shrunk pointwise mutual
    information. Its left singular vectors, weighted by the roots of the frequencies, become embeddings (Levy and
    Goldberg, NIPS 2014). The output weights fit the matrix to the network's hidden state for each token alone, by
    weighted least squares.
    """
    vocab_size, width = model.token_embedding.weight.shape  # V, D
    frequency, share, counts = torch.zeros(vocab_size), torch.zeros(vocab_size), pairs.counts.float()
    frequency.index_add_(0, pairs.first, counts).clamp_(min=0.5)  # (V,)
    share.index_add_(0, pairs.second, counts).clamp_(min=0.5)
    row_weights, column_weights = frequency.sqrt(), share.sqrt()
    share /= share.sum()
    values = torch.log1p(counts / (SHRINKAGE * share[pairs.second]))
    weighted = values * row_weights[pairs.first] * column_weights[pairs.second]
    places = torch.stack([pairs.first, pairs.second])
    matrix = torch.sparse_coo_tensor(places, weighted, (vocab_size, vocab_size), check_invariants=False)  # (V, V)

    left, singular = _singular_vectors(matrix, width)  # (V, R), (R,), R <= D
    embeddings = left * singular.sqrt() / row_weights[:, None]
    embeddings *= SIZE / math.sqrt((embeddings.square() * frequency[:, None]).sum() / frequency.sum() / width)
    model.token_embedding.weight[:, : embeddings.shape[1]] = embeddings
    model.position_embedding.weight *= POSITIONS
    for name, weight in model.named_parameters():
        if name.endswith(("attention.output.weight", "feed_forward.2.weight")):
            weight.mul_(SMALL)

    is_training = model.training
    hidden = model.eval().hidden_states(torch.arange(vocab_size)[:, None])[:, 0]  # (V, D): each token alone
    model.train(is_training)
    hidden = torch.cat([hidden, torch.ones(vocab_size, 1)], dim=1)  # (V, D + 1): for the bias
    gram = (hidden.T @ (hidden * frequency[:, None])).double()
    gram += 1e-3 * frequency.sum() * torch.eye(width + 1)
    right_side = (matrix.mT @ (hidden * row_weights[:, None])).T / column_weights  # (D + 1, V)
    solution = torch.linalg.solve(gram, right_side.double()).float()
    model.output.weight.copy_(solution[:width].T)
    model.output.bias.add_(solution[width])


def _singular_vectors(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest singular values (R,) of a matrix (V, V), and their left vectors (V, R). R is at most `count` and V.

    A randomised decomposition with two power iterations (Halko et al., arXiv 0909.4061).
    """
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(matrix @ torch.randn(len(matrix), count + _OVERSAMPLING, generator=generator)).Q
    for _ in range(2):
        basis = torch.linalg.qr(matrix.mT @ basis).Q
        basis = torch.linalg.qr(matrix @ basis).Q
    small = matrix.mT @ basis
    values, vectors = torch.linalg.eigh(small.T @ small)  # ascending
    return (basis @ vectors)[:, -count:], values[-count:].clamp(min=0).sqrt()
