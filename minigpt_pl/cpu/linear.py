"""Linear layers whose weight stays the same for many calls."""

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt_pl.cpu import onednn

Network = TypeVar("Network", bound=nn.Module)


class PackedLinear(nn.Module):
    """Linear layer with a weight that is packed once for oneDNN.

    Computes `x @ weight.T + bias`. `torch.compile` uses the same operator.

    Training: `F.linear` repacks a bf16 weight on every call, which takes 10 % of the time. In fp32 it uses MKL, which
    reaches half of oneDNN's speed on AMD CPUs (benchmarks/training_step.py).

    Generation: a single row uses `F.linear`, which needs 8 instead of 20 microseconds for 256 x 672.

    Where `onednn.supports` is False, for example on a GPU, every call is `F.linear`.

    Args:
        weight: (out, in). oneDNN needs fp32 or bf16. Later changes to its values have no effect.
        bias: (out,), or None.
        rows: number of rows of every x; None if it varies.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None, rows: int | None = None):
        super().__init__()
        self.weight, self.bias, self.rows = weight, bias, rows
        self.uses_onednn = onednn.supports(weight)

    @functools.cached_property
    def packed(self) -> Tensor:  # not in __init__: some layers of a packed network are never called
        return onednn.pack(self.weight, self.rows or 64)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        rows = x.flatten(0, -2)
        if not self.uses_onednn or len(rows) == 1:
            return F.linear(x, self.weight, None if self.bias is None else self.bias.to(x.dtype))
        padded = pad_rows(rows) if self.rows is None else rows
        return onednn.linear(padded, self.packed, self.bias)[: len(rows)].view(*x.shape[:-1], -1)


def pad_rows(x: Tensor) -> Tensor:
    """Append rows of zeros to (rows, in), up to 1, 2, 4, 8, 16, 32, 48, ... rows.

    oneDNN compiles a kernel for each number of rows and keeps several MB for it.
    """
    rows = len(x)
    padded = 1 << (rows - 1).bit_length() if rows < 16 else -(-rows // 16) * 16
    return x if padded == rows else F.pad(x, (0, 0, 0, padded - rows))


def pack_linear_layers(network: Network) -> Network:
    """Copy a network and pack each `nn.Linear`. The copy shares the weights and is in eval mode."""
    packed = copy.deepcopy(network, {id(parameter): parameter for parameter in network.parameters()})
    for module in list(packed.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(child.weight, child.bias))
    return packed.eval()


@contextmanager
def inference_without_autocast(network: nn.Module) -> Iterator[None]:
    """`torch.inference_mode` with autocast off, because a `PackedLinear` works with one dtype."""
    device = next(network.parameters()).device.type
    with torch.inference_mode(), torch.autocast(device, enabled=False):
        yield
