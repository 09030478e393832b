"""Output layer and cross-entropy in one function; the full logits are never stored.

At the notebook's sizes, a batch has 10,240 x 20,000 logits. In fp32 these 0.8 GB are written and read several times.
So the rows are processed in chunks. Losses and gradients are computed while a chunk's logits are in the cache.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minigpt_pl.cpu import onednn
from minigpt_pl.cpu.linear import PackedLinear

# Largest chunk of logits: (bytes, rows). On a CPU, 512 rows of the notebook's logits in bf16 fit the last-level cache.
CPU_CHUNK = 21 * 2**20, 512
GPU_CHUNK = 512 * 2**20, 2**14  # not tuned
SAMPLING_POWER = 0.6  # candidates are drawn in proportion to share ** 0.6
CANDIDATE_MULTIPLE = 256
SYNC_FREE_DEVICES = ("cpu",)  # on these devices, Python can read a tensor's value without waiting


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, ignore_index: int | None = None
) -> Tensor:
    """Sum over all targets of `-log softmax(hidden @ weight.T + bias)[target]`, in nats.

    Equals `F.cross_entropy(logits, targets, reduction="sum")`. Under autocast, the three matrix products use the
    dtype of autocast. Losses and gradient sums use the dtype of `hidden`.

    Args:
        hidden: (..., D).
        weight: (V, D).
        bias: (V,).
        targets: (...), integers in [0, V).
        ignore_index: targets with this id do not count. On a CPU, their rows are not computed. None if all count.

    Returns:
        A scalar. It has first derivatives with respect to hidden, weight and bias.
    """
    device = hidden.device.type
    hidden, targets = hidden.flatten(0, -2), targets.flatten()  # (N, D), (N,)
    counted = torch.ones_like(targets) if ignore_index is None else targets != ignore_index  # (N,)
    if device in SYNC_FREE_DEVICES and ignore_index is not None:
        hidden, targets, counted = hidden[counted], targets[counted], counted[counted]
    product_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    arguments = (hidden, weight, bias, targets, counted.to(hidden.dtype), product_dtype)
    loss: Tensor = _LinearCrossEntropy.apply(*arguments)  # type: ignore[no-untyped-call]
    return loss


def sampled_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Tensor,
    shares: Tensor,
    num_candidates: int,
    generator: torch.Generator,
    ignore_index: int | None = None,
) -> Tensor:
    """`linear_cross_entropy` among candidates only: an estimate that takes less time (arXiv 1412.2007).

    The candidates are all targets, and words that are drawn independently, more often if they are frequent. The logit
    of a candidate is lowered by the log of the probability that it is one. So, on average, the candidates stand for all
    words.

    Args:
        hidden, weight, bias, targets, ignore_index: as in `linear_cross_entropy`.
        shares: (V,), share of each word among all targets of the training.
        num_candidates: about so many words are drawn, 1 to V.
        generator: draws them; a generator of the CPU.
    """
    hidden, targets = hidden.flatten(0, -2), targets.flatten()  # (N, D), (N,)
    if ignore_index is not None:
        counted = targets != ignore_index
        hidden, targets = hidden[counted], targets[counted]
    frequencies = shares**SAMPLING_POWER
    drawn_with = 1 - (-num_candidates * frequencies / frequencies.sum()).exp()  # (V,)
    is_candidate = torch.rand(len(shares), generator=generator).to(shares.device) < drawn_with
    is_candidate[targets] = True
    candidates = is_candidate.nonzero()[:, 0]  # (C,)
    is_target_with = 1 - (1 - shares[candidates]) ** len(targets)
    chance = 1 - (1 - drawn_with[candidates]) * (1 - is_target_with)
    # oneDNN keeps memory for each C, so add candidates of probability 0 up to a multiple.
    missing = -len(candidates) % CANDIDATE_MULTIPLE
    corrected = F.pad(bias[candidates] - chance.log(), (0, missing), value=-math.inf)  # (C,)
    number = is_candidate.cumsum(0) - 1  # (V,): the position of each candidate
    return linear_cross_entropy(hidden, weight[F.pad(candidates, (0, missing))], corrected, number[targets])


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """The loss of each target, without gradients.

    Args:
        hidden, weight, bias, targets: as in `linear_cross_entropy`.

    Returns:
        fp32 losses in nats, in the shape of `targets`.
    """
    rows = _chunk_rows(len(weight), torch.float32, hidden.device)
    parts = zip(torch.split(hidden.flatten(0, -2), rows), torch.split(targets.flatten(), rows), strict=True)
    losses = [F.cross_entropy(F.linear(chunk, weight, bias).float(), ids, reduction="none") for chunk, ids in parts]
    return torch.cat(losses).view(targets.shape)


class _LinearCrossEntropy(torch.autograd.Function):
    """The forward pass also computes the gradients, chunk by chunk, because the probabilities are already there.

    On a CPU, the logits, probabilities and gradients of a chunk share one buffer. This saves memory traffic. On a GPU,
    no Python branch reads a tensor's value, so Python never waits for the GPU.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, counts: Tensor, dtype: torch.dtype
    ) -> Tensor:
        # hidden (N, D), weight (V, D), bias (V,), targets (N,); counts (N,): 1, or 0 for ignored targets
        with torch.autocast(hidden.device.type, enabled=False):
            need_gradients, count = any(ctx.needs_input_grad), len(hidden)
            rows = _chunk_rows(len(weight), dtype, hidden.device)  # C
            # Pad the last chunk to C rows: oneDNN keeps about 25 MB for each number of rows.
            missing = -count % rows
            padded = F.pad(hidden.to(dtype), (0, 0, 0, missing))
            targets, counts = F.pad(targets, (0, missing)), F.pad(counts, (0, missing))
            weight_ = weight.to(dtype)
            output, output_transposed = PackedLinear(weight_, bias, rows), PackedLinear(weight_.T, rows=rows)
            loss = hidden.new_zeros(())
            if need_gradients:
                grad_hidden = hidden.new_empty(padded.shape)
                grad_weight, grad_bias = torch.zeros_like(weight), torch.zeros_like(bias)
            for start in range(0, count, rows):
                chunk, ids, counted = (x[start : start + rows] for x in (padded, targets, counts))  # (C, D), (C,), (C,)
                logits = output(chunk)  # (C, V)
                if hidden.device.type in SYNC_FREE_DEVICES:
                    probabilities = torch.softmax(logits, dim=-1, out=logits)
                    losses = _losses(probabilities, ids, chunk, weight_, bias)  # (C,)
                    probabilities[count - start :] = 0  # padding
                else:
                    log_probabilities = logits.log_softmax(dim=-1, dtype=hidden.dtype)
                    losses = -log_probabilities.gather(1, ids[:, None])[:, 0]  # (C,)
                    probabilities = log_probabilities.exp_().mul_(counted[:, None]).to(dtype)
                loss += losses @ counted
                if not need_gradients:
                    continue
                grad_logits = probabilities  # the next line subtracts 1 at each target
                grad_logits[torch.arange(rows, device=ids.device), ids] -= counted.to(dtype)
                grad_bias += grad_logits.sum(dim=0)
                grad_hidden[start : start + rows] = output_transposed(grad_logits)  # (C, V) @ (V, D)
                if dtype == torch.float32 and onednn.supports(weight_):  # faster; for bf16, `@` already uses oneDNN
                    grad_weight += onednn.linear(grad_logits.T, chunk.T)  # (V, C) @ (C, D)
                else:
                    grad_weight += grad_logits.T @ chunk
        if need_gradients:
            ctx.save_for_backward(grad_hidden[:count], grad_weight, grad_bias)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        return grad_output * grad_hidden, grad_output * grad_weight, grad_output * grad_bias, None, None, None


def _losses(probabilities: Tensor, ids: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """-log probability of each row's id: (C, V), (C,) -> (C,), in the dtype of the bias."""
    chosen = probabilities.gather(1, ids[:, None])[:, 0].to(bias.dtype)
    losses = -chosen.log()
    if not chosen.all():  # the loss is above 87 nats: its probability underflows to 0
        rows = (chosen == 0).nonzero()[:, 0]
        logits = F.linear(hidden[rows], weight, bias.to(weight.dtype)).to(bias.dtype)
        losses[rows] = F.cross_entropy(logits, ids[rows], reduction="none")
    return losses


def _chunk_rows(vocab_size: int, dtype: torch.dtype, device: torch.device) -> int:
    chunk_bytes, max_rows = CPU_CHUNK if device.type == "cpu" else GPU_CHUNK
    return min(max(chunk_bytes // (vocab_size * dtype.itemsize) // 64 * 64, 64), max_rows)
