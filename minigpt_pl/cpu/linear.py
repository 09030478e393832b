"""Products with a matrix that stays the same for a while, by oneDNN where a CPU has it."""

import copy
import functools
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt_pl.errors import DIVERGED
from minigpt_pl.model import MiniGPT

SMALL = 2**18  # values of a weight, 1 MB, that one thread reads about as fast as several
BLOCK = 512  # of up to 1,024 values, oneDNN sums so many in turn, then the sums
FEW = 8  # rows for which FBGEMM's 8-bit products are faster than oneDNN's


class PackedLinear(nn.Module):
    """x @ weight.T + bias, with the weight laid out once for oneDNN, which is called as `torch.compile` calls it.

    In training it is faster: PyTorch's own product lays a bf16 weight out anew each time, a tenth of it, and is MKL's
    in fp32, which on CPUs that are not Intel's reaches half the rate (benchmarks/training_step.py).

    In generation a row is the same beside any others, bit for bit: MKL adds up in another order for the rows that are
    left over from its tiles. oneDNN's were equal for 2 to 256 rows, on 1 to 16 threads. One row of over 1,024 values
    was not, so that one gets a second, of zeros.

    A call of oneDNN takes some 12 microseconds before it begins, which is most of the time of one row by a small
    matrix. `embedding_bag` takes 2, and adds up in the same order. Where eight random rows, on first use, are the same
    by both, bit for bit, it multiplies single rows.

    Where there is no oneDNN, and on a GPU, it is PyTorch's product.

    Args:
        weight: (out, in); used as it is now, fp32 or bf16.
        bias: (out,); None: none.
        rows: how many each x will have; None: any number.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, rows: int | None = None):
        super().__init__()
        self.weight, self.bias, self.rows, self.laid_out, self.by_row = weight, bias, rows, None, None
        self.by_onednn = by_onednn(weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if not self.by_onednn:
            return F.linear(x, self.weight, None if self.bias is None else self.bias.to(x.dtype))
        if self.laid_out is None:  # not before: of a model's products some are never asked for
            self._lay_out()
        rows = x if x.dim() == 2 else x.flatten(0, -2)
        if self.by_row is not None and len(rows) == 1:
            result = self.by_row(rows, self.bias)
        else:
            padded = _padded(rows, 2) if self.rows is None else rows
            result = _onednn_product(padded, self.laid_out, self.bias)[: len(rows)]
        return result if x.dim() == 2 else result.view(*x.shape[:-1], -1)

    def _lay_out(self) -> None:
        laid_out = torch.ops.mkldnn._reorder_linear_weight(self.weight.contiguous(), self.rows or 64)
        if self.rows is None and self.weight.dtype == torch.float32 and self.weight.numel() <= SMALL:
            by_row, random = _RowProduct(self.weight), torch.Generator("cpu").manual_seed(0)
            rows = torch.randn(8, self.weight.shape[1], generator=random, dtype=torch.float32, device="cpu")
            if torch.equal(torch.cat([by_row(x, None) for x in rows.split(1)]), _onednn_product(rows, laid_out, None)):
                self.by_row = by_row
        self.laid_out = laid_out  # last: another thread may wait for it


class _RowProduct:
    """One row by `embedding_bag`: the sum of the weight's columns, each as often as the row's value for it says."""

    def __init__(self, weight: Tensor):
        self.columns = weight.T.contiguous()  # (in, out)
        self.inputs = torch.arange(len(self.columns), device="cpu")
        self.block_starts = torch.arange(0, len(self.columns), BLOCK, device="cpu")

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """(1, in) -> (1, out)."""
        sums = torch.embedding_bag(self.columns, self.inputs, self.block_starts, False, 0, False, x[0], False)[0]
        result = sums if len(sums) == 1 else sums.sum(dim=0, keepdim=True)  # (blocks, out) -> (1, out)
        return result if bias is None else result + bias


def _onednn_product(x: Tensor, laid_out: Tensor, bias: Tensor | None) -> Tensor:
    """(rows, in) -> (rows, out)."""
    return torch.ops.mkldnn._linear_pointwise(x, laid_out, bias, "none", [], "")


class Int8Linear:
    """x @ weight.T + bias to within 2 % or so of the spread of the result, from 8-bit integers.

    A row of the weight has a scale of its own, all rows of x have one ("dynamic quantization"); the sums are exact.
    Where a few of the inputs are far larger than the others, it is a lot less exact.

    Of 20,000 x 256 it takes 55 % of the time of bf16 for 64 rows, by oneDNN. For one row FBGEMM takes half of oneDNN's
    time; it is used as long as PyTorch has it, which says that it will not be for ever.

    Args:
        weight: (out, in) in fp32, where `has_int8_units`; used as it is now.

    Raises:
        ValueError: a value of the weight, or later of x, is NaN or infinite.
    """

    def __init__(self, weight: Tensor):
        self.scales = weight.abs().amax(dim=1).clamp_(min=1e-30).div_(127)  # (out,)
        if not self.scales.isfinite().all():
            raise ValueError(DIVERGED)
        self.integers = (weight / self.scales[:, None]).round_().char().contiguous()  # (out, in)
        self.few = FEW if hasattr(torch, "fbgemm_linear_int8_weight_fp32_activation") else 0

    def __call__(self, x: Tensor, bias: Tensor) -> Tensor:
        """(rows, in) and (out,) -> (rows, out)."""
        largest = float(x.abs().max())
        if not math.isfinite(largest):
            raise ValueError(DIVERGED)
        if len(x) <= self.few:
            sums = torch.fbgemm_linear_int8_weight_fp32_activation(x, self.integers, *self._for_fbgemm)
            return torch.addcmul(bias, sums, self.scales)
        scale = max(largest, 1e-30) / 127
        rows = _padded(torch.add(128.5, x, alpha=1 / scale).byte())  # rounded, 128 standing for 0
        args = (*self._for_onednn, bias, 1.0, 0, torch.float32, "none", [], "")
        return torch.ops.onednn.qlinear_pointwise(rows, scale, 128, *args)[: len(x)]

    @functools.cached_property
    def _for_fbgemm(self) -> tuple:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "fbgemm_.* is deprecated")
            packed, sums = torch.fbgemm_pack_quantized_matrix(self.integers), self.integers.sum(dim=1).int()
            made = packed, sums, 1.0, 0, torch.zeros_like(self.scales)
            torch.fbgemm_linear_int8_weight_fp32_activation(self.integers[:1].float(), self.integers, *made)
        return made

    @functools.cached_property
    def _for_onednn(self) -> tuple[Tensor, Tensor, Tensor]:
        packed = torch.ops.onednn.qlinear_prepack(self.integers, None)
        return packed, self.scales, torch.zeros(len(self.scales), dtype=torch.int64, device="cpu")


def _padded(x: Tensor, least: int = 1) -> Tensor:
    """(rows, in) with some rows more: 1, 2, 4, 8, 16, 32, 48, ... of them, and `least` at least.

    oneDNN makes a kernel for each number of rows, and keeps some MB with it.
    """
    count = max(len(x), least)
    size = 1 << (count - 1).bit_length() if count < 16 else -(-count // 16) * 16
    return x if size == len(x) else F.pad(x, (0, 0, 0, size - len(x)))


def by_onednn(weight: Tensor) -> bool:
    """Whether oneDNN multiplies tensors of this type here."""
    return weight.device.type == "cpu" and (
        (weight.dtype == torch.float32 and torch.backends.mkldnn.is_available())
        or (weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def has_bf16_units() -> bool:
    """Whether this CPU multiplies bf16 matrices faster than fp32 ones."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def has_int8_units(weight: Tensor) -> bool:
    """Whether the weight is in fp32 on a CPU that multiplies 8-bit integers faster, by way of oneDNN."""
    in_fp32 = weight.device.type == "cpu" and weight.dtype == torch.float32
    return in_fp32 and torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()


@contextmanager
def inference_without_autocast(model: MiniGPT) -> Iterator[None]:
    """Without gradients, and in the weights' own precision, whatever autocast says: a `PackedLinear` has no other."""
    with torch.inference_mode(), torch.autocast(model.output.weight.device.type, enabled=False):
        yield


def with_packed_linears(model: MiniGPT) -> MiniGPT:
    """The model in eval mode, its weights shared, with a `PackedLinear` in place of each `nn.Linear`."""
    shared = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for module in list(shared.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(child.weight, child.bias))
    return shared.eval()
