"""Cross-entropy of an output layer that never holds all the logits.

At the seed's sizes a batch has 10,240 x 20,000 logits: 0.8 GB that would be written and read several times.
Here a chunk of rows is multiplied, turned into losses and gradients while it lies in the cache, and forgotten.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ROWS = 256  # 256 x 20,000 fp32 logits are 20 MB: near the size of a last-level cache


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, ignore_index: int | None = None
) -> Tensor:
    """Sum over all targets of `-log softmax(hidden @ weight.T + bias)[target]`, in nats.

    Equal to `F.cross_entropy(logits, targets, reduction="sum")`. Under autocast the three matrix products run
    in autocast's type; softmax, losses and the sums of gradients stay in the type of `hidden`.

    Args:
        hidden: (..., D).
        weight: (V, D).
        bias: (V,).
        targets: (...), integers in [0, V).
        ignore_index: targets of this id do not count; their rows are left out before the product.

    Returns:
        A scalar. Differentiable once, with respect to hidden, weight and bias.
    """
    hidden, targets = _flat_counted(hidden, targets, ignore_index)
    device = hidden.device.type
    product_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return _LinearCrossEntropy.apply(hidden, weight, bias, targets, product_dtype)


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """Each target's own loss, for evaluation: no gradient.

    Args:
        hidden, weight, bias, targets: as in `linear_cross_entropy`.

    Returns:
        fp32 losses in nats, of the shape of `targets`.
    """
    losses = [
        F.cross_entropy(F.linear(rows, weight, bias).float(), ids, reduction="none")
        for rows, ids in zip(hidden.flatten(0, -2).split(CHUNK_ROWS), targets.flatten().split(CHUNK_ROWS), strict=True)
    ]
    return torch.cat(losses).view(targets.shape)


def _flat_counted(hidden: Tensor, targets: Tensor, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    hidden, targets = hidden.flatten(0, -2), targets.flatten()  # (N, D), (N,)
    if ignore_index is None:
        return hidden, targets
    counted = targets != ignore_index
    return hidden[counted], targets[counted]


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradients are made in the forward pass, chunk by chunk, while the probabilities are at hand."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, product_dtype):
        # hidden (N, D), weight (V, D), bias (V,), targets (N,)
        with torch.autocast(hidden.device.type, enabled=False):
            need_gradients, count = any(ctx.needs_input_grad), len(hidden)
            # Every chunk has all its rows, the last one by zeros: oneDNN keeps some 25 MB for each shape it meets.
            missing = -count % CHUNK_ROWS
            hidden_, weight_ = F.pad(hidden.to(product_dtype), (0, 0, 0, missing)), weight.to(product_dtype)
            targets = F.pad(targets, (0, missing))
            loss = hidden.new_zeros(())
            if need_gradients:
                grad_hidden = hidden.new_empty(hidden_.shape)
                grad_weight, grad_bias = torch.zeros_like(weight), torch.zeros_like(bias)
            for start in range(0, count, CHUNK_ROWS):
                rows, counted = slice(start, start + CHUNK_ROWS), count - start  # counted may be more than a chunk
                ids = targets[rows, None]  # (C, 1)
                logits = (hidden_[rows] @ weight_.T).to(hidden.dtype).add_(bias)  # (C, V)
                log_probs = torch.log_softmax(logits, dim=-1)
                loss -= log_probs.gather(1, ids)[:counted].sum()
                if not need_gradients:
                    continue
                grad_logits = torch.exp(log_probs, out=log_probs)
                grad_logits.scatter_add_(1, ids, grad_logits.new_full(ids.shape, -1.0))
                grad_bias += grad_logits[:counted].sum(dim=0)
                grad_logits = grad_logits.to(product_dtype)
                grad_hidden[rows] = grad_logits @ weight_  # (C, V) @ (V, D)
                grad_weight += grad_logits.T @ hidden_[rows]  # (V, C) @ (C, D); the zeros add nothing
        if need_gradients:
            ctx.save_for_backward(grad_hidden[:count], grad_weight, grad_bias)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        return grad_output * grad_hidden, grad_output * grad_weight, grad_output * grad_bias, None, None
