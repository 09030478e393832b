"""Cross-entropy of an output layer that never holds all the logits.

At the seed's sizes a batch has 10,240 x 20,000 logits: 0.8 GB that would be written and read several times.
Here a chunk of rows is multiplied, turned into losses and gradients while it lies in the cache, and forgotten.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minigpt_pl.cpu.linear import PackedLinear, by_onednn

# Bytes and rows of a chunk of logits, at most. On a CPU 512 rows of the seed's in bf16 stay in a last-level cache; what
# a GPU likes best is not measured yet.
CPU_CHUNK = 21 * 2**20, 512
GPU_CHUNK = 512 * 2**20, 2**14
# Where Python may look at a tensor's values for nothing; on a GPU it would wait for all that is queued before.
READ_IS_FREE = ("cpu",)


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
        ignore_index: targets of this id do not count; on a CPU their rows are left out before the product.

    Returns:
        A scalar. Differentiable once, with respect to hidden, weight and bias.
    """
    device = hidden.device.type
    hidden, targets = hidden.flatten(0, -2), targets.flatten()  # (N, D), (N,)
    counted = torch.ones_like(targets) if ignore_index is None else targets != ignore_index  # (N,)
    if device in READ_IS_FREE and ignore_index is not None:
        hidden, targets, counted = hidden[counted], targets[counted], counted[counted]
    product_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return _LinearCrossEntropy.apply(hidden, weight, bias, targets, counted.to(hidden.dtype), product_dtype)


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """Each target's own loss, for evaluation: no gradient.

    Args:
        hidden, weight, bias, targets: as in `linear_cross_entropy`.

    Returns:
        fp32 losses in nats, of the shape of `targets`.
    """
    rows = _chunk_rows(len(weight), torch.float32, hidden.device)
    losses = [
        F.cross_entropy(F.linear(chunk, weight, bias).float(), ids, reduction="none")
        for chunk, ids in zip(hidden.flatten(0, -2).split(rows), targets.flatten().split(rows), strict=True)
    ]
    return torch.cat(losses).view(targets.shape)


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradients are made in the forward pass, chunk by chunk, while the probabilities are at hand.

    On a CPU a chunk's logits, its probabilities and their gradients lie in the same memory: the passes between the
    three products are as few as can be. On a GPU nothing depends on the values of a tensor, so that Python runs ahead.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, counted, product_dtype):
        # hidden (N, D), weight (V, D), bias (V,), targets (N,); counted (N,): 1, or 0 for a row that does not count
        with torch.autocast(hidden.device.type, enabled=False):
            need_gradients, count = any(ctx.needs_input_grad), len(hidden)
            rows = _chunk_rows(len(weight), product_dtype, hidden.device)
            # Every chunk has all its rows, the last one by zeros: oneDNN keeps some 25 MB for each shape it meets.
            missing = -count % rows
            hidden_, targets, counted = (
                F.pad(hidden.to(product_dtype), (0, 0, 0, missing)), F.pad(targets, (0, missing)),
                F.pad(counted, (0, missing)),
            )  # fmt: skip
            weight_ = weight.to(product_dtype)
            output, output_transposed = PackedLinear(weight_, bias, rows), PackedLinear(weight_.T, rows=rows)
            loss = hidden.new_zeros(())
            if need_gradients:
                grad_hidden = hidden.new_empty(hidden_.shape)
                grad_weight, grad_bias = torch.zeros_like(weight), torch.zeros_like(bias)
            for start in range(0, count, rows):
                chunk, ids, counts = (
                    x[start : start + rows] for x in (hidden_, targets, counted)
                )  # (C, D), (C,) twice
                logits = output(chunk)  # (C, V)
                if hidden.device.type in READ_IS_FREE:
                    probabilities = torch.softmax(logits, dim=-1, out=logits)
                    losses = _losses(probabilities, ids, chunk, weight_, bias)
                    probabilities[count - start :] = 0
                else:
                    log_probabilities = logits.log_softmax(dim=-1, dtype=hidden.dtype)
                    losses = -log_probabilities.gather(1, ids[:, None])[:, 0]
                    probabilities = log_probabilities.exp_().mul_(counts[:, None]).to(product_dtype)
                loss += losses @ counts
                if not need_gradients:
                    continue
                grad_logits = probabilities
                grad_logits[torch.arange(rows, device=ids.device), ids] -= counts.to(product_dtype)
                grad_bias += grad_logits.sum(dim=0)
                grad_hidden[start : start + rows] = output_transposed(grad_logits)
                grad_weight += _transposed_product(grad_logits, chunk)
        if need_gradients:
            ctx.save_for_backward(grad_hidden[:count], grad_weight, grad_bias)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        return grad_output * grad_hidden, grad_output * grad_weight, grad_output * grad_bias, None, None, None


def _losses(probabilities: Tensor, ids: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """-log of each row's probability of its id: (C, V), (C,) -> (C,), in the bias's type."""
    chosen = probabilities.gather(1, ids[:, None])[:, 0].to(bias.dtype)
    losses = -chosen.log()
    if not chosen.all():  # a loss above 87 nats: the probability is below the smallest number
        far = (chosen == 0).nonzero()[:, 0]
        logits = F.linear(hidden[far], weight, bias.to(weight.dtype)).to(bias.dtype)
        losses[far] = F.cross_entropy(logits, ids[far], reduction="none")
    return losses


def _transposed_product(a: Tensor, b: Tensor) -> Tensor:
    """a.T @ b: (C, V), (C, D) -> (V, D). In fp32 by oneDNN, for its rate; in bf16 PyTorch's is oneDNN's."""
    if a.dtype == torch.float32 and by_onednn(a):
        return torch.ops.mkldnn._linear_pointwise(a.T, b.T, None, "none", [], "")
    return a.T @ b


def _chunk_rows(vocab_size: int, dtype: torch.dtype, device: torch.device) -> int:
    chunk_bytes, most_rows = CPU_CHUNK if device.type == "cpu" else GPU_CHUNK
    return min(max(chunk_bytes // (vocab_size * dtype.itemsize) // 64 * 64, 64), most_rows)
