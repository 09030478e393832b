"""Approximate matrix products in 8-bit integers. They are private PyTorch operators, as in `onednn`."""

import math

import torch
from torch import Tensor

from minigpt_pl.cpu import onednn
from minigpt_pl.cpu.linear import pad_rows
from minigpt_pl.errors import DIVERGED, InputError


class Int8Linear:
    """Approximate `x @ weight.T + bias` by dynamic quantization to 8 bits.

    Each row of the weight has its own scale. The rows of x share one scale, which each call computes. The error is
    about 2 % of the result's standard deviation. It is much larger if a few inputs are far larger than the others.
    For 64 rows and a weight of 20,000 x 256 this takes 55 % of the time of bf16.

    Args:
        weight: (out, in) in fp32 on the CPU, where `HAS_INT8` is True. Later changes to its values have no effect.

    Raises:
        ValueError: the weight, or x in a later call, has a value that is NaN or infinite.
    """

    def __init__(self, weight: Tensor):
        scales = weight.abs().amax(dim=1).clamp_(min=1e-30).div_(127)  # (out,)
        if not scales.isfinite().all():
            raise InputError(f"model: {DIVERGED}")
        integers = (weight / scales[:, None]).round_().char().contiguous()  # (out, in)
        packed = torch.ops.onednn.qlinear_prepack(integers, None)
        self.weight = (packed, scales, torch.zeros(len(scales), dtype=torch.int64, device="cpu"))  # last: zero points

    def __call__(self, x: Tensor, bias: Tensor) -> Tensor:
        """(rows, in) and (out,) -> (rows, out)."""
        largest = float(x.abs().max())
        if not math.isfinite(largest):
            raise InputError(f"model: {DIVERGED}")
        scale = max(largest, 1e-30) / 127
        integers = torch.add(128.5, x, alpha=1 / scale).byte()  # byte() truncates, so add 0.5; 128 is the zero point
        inputs = (pad_rows(integers), scale, 128, *self.weight, bias)
        output: Tensor = torch.ops.onednn.qlinear_pointwise(*inputs, 1.0, 0, torch.float32, "none", [], "")
        return output[: len(x)]


def _sums_are_exact() -> bool:
    # Without VNNI, oneDNN adds pairs of products in 16 bits. A weight of 1 becomes 127, the largest integer, so the
    # pairs overflow. ONEDNN_MAX_CPU_ISA can turn off VNNI on a CPU that has it.
    ones = torch.ones(16, 64, dtype=torch.float32, device="cpu")
    error = Int8Linear(ones)(ones, torch.full_like(ones[0, :16], -64))
    return torch.cpu._is_vnni_supported() and bool((error.abs() < 0.01).all())


HAS_INT8 = onednn.works(_sums_are_exact)
