"""Approximate matrix products in 8-bit integers."""

import math

import torch
from torch import Tensor

from minigpt_pl.cpu import onednn
from minigpt_pl.cpu.linear import pad_rows
from minigpt_pl.errors import DIVERGED


class Int8Linear:
    """Approximate `x @ weight.T + bias` by dynamic quantization to 8 bits.

    Each row of the weight has its own scale. The rows of x share one scale, which each call computes. The error is
    about 2 % of the result's standard deviation. It is much larger if a few inputs are far larger than the others.
    For 64 rows and a weight of 20,000 x 256 this takes 55 % of the time of bf16.

    Args:
        weight: (out, in) in fp32, for which `onednn.supports_int8` is True. Later changes have no effect.

    Raises:
        ValueError: the weight, or x in a later call, has a value that is NaN or infinite.
    """

    def __init__(self, weight: Tensor):
        scales = weight.abs().amax(dim=1).clamp_(min=1e-30).div_(127)  # (out,)
        if not scales.isfinite().all():
            raise ValueError(DIVERGED)
        self.packed = onednn.pack_int8((weight / scales[:, None]).round_().char(), scales)

    def __call__(self, x: Tensor, bias: Tensor) -> Tensor:
        """(rows, in) and (out,) -> (rows, out)."""
        largest = float(x.abs().max())
        if not math.isfinite(largest):
            raise ValueError(DIVERGED)
        scale = max(largest, 1e-30) / 127
        quantized = torch.add(128.5, x, alpha=1 / scale).byte()  # byte() truncates, so 128.5 rounds; 128 means 0
        return onednn.linear_int8(pad_rows(quantized), scale, self.packed, bias)[: len(x)]
