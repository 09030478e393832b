"""Initial weights from counts of neighbouring tokens. The network then predicts nearly as the counts do."""

import math

import torch
from torch import Tensor

from minigpt_pl.data.datamodule import PairCounts
from minigpt_pl.model import MiniGPT

SHRINKAGE = 300.0  # pseudo-count; with a larger one, rare pairs count less
SMALL = 0.1  # factor of the block's outputs, so that the block changes its input little
SIZE = 0.1  # root mean square of the token embeddings: Adam's steps have a fixed size, so small weights learn faster
WAVES = 32  # frequencies of the position embeddings, for previous-token heads
SCORE = 6.0  # attention score of the token that a previous-token head looks for; all others have about 0
POSITIONS = 0.02  # factor of the position embeddings, so that they change the token embeddings little
_OVERSAMPLING = 20  # extra columns of the randomised decomposition


@torch.no_grad()
def start_from_counts(model: MiniGPT, pairs: PairCounts, previous_token_heads: int = 0) -> None:
    """Set the embeddings and the output weights. The output bias must be the log share of each token.

    With `previous_token_heads`, also the position embeddings and some heads of the first block.

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
    if previous_token_heads:
        _start_previous_token_heads(model, previous_token_heads)
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


def _start_previous_token_heads(model: MiniGPT, count: int) -> None:
    """Let head n of the first block attend to the token n + 1 positions before, for n from 0 to `count - 1`.

    The position embeddings become sinusoids of M frequencies (arXiv 1706.03762). A rotation moves a sinusoid by some
    positions. So a head finds an earlier position if its query rotates the sinusoids and its key copies them. With
    frequencies of pi (m + 1/2) / M, the sinusoids of two positions are orthogonal if their distance is below 2M.
    Induction heads were found to need such heads (Elhage et al., A Mathematical Framework for Transformer Circuits,
    2021).
    """
    (length, width), attention = model.position_embedding.weight.shape, model.blocks[0].attention  # L, D
    heads = (attention.num_heads, attention.head_dim)
    waves = min(WAVES, width // 2, attention.head_dim // 2)  # M
    frequencies = math.pi * (torch.arange(waves) + 0.5) / waves
    angles = torch.arange(length)[:, None] * frequencies  # (L, M)
    sinusoids = SIZE * math.sqrt(2) * torch.cat([angles.sin(), angles.cos()], dim=1)  # (L, 2M)
    model.position_embedding.weight[:, : 2 * waves] += sinusoids
    size = math.sqrt(SCORE * math.sqrt(attention.head_dim) / sinusoids[0].square().sum())
    query, key = (layer.weight.view(*heads, width)[..., : 2 * waves] for layer in (attention.query, attention.key))
    for head in range(count):
        cos, sin = (part(frequencies * (head + 1)).diag() for part in (torch.cos, torch.sin))  # (M, M)
        rotation = torch.cat([torch.cat([cos, -sin], dim=1), torch.cat([sin, cos], dim=1)])  # (2M, 2M)
        query[head, : 2 * waves] += size * rotation
        key[head, : 2 * waves] += size * torch.eye(2 * waves)


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
