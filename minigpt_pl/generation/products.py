"""Matrix products that give a row the same result in any batch, bit for bit."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt_pl.model import MiniGPT


class Product(nn.Module):
    """x @ weight.T + bias, with the weight laid out once for oneDNN.

    PyTorch's own product is MKL's in fp32, which adds up in another order for the rows that are left over from its
    tiles, so that a row's last bits depend on how many stand beside it. oneDNN's, called as `torch.compile` calls it,
    were equal for 1 to 256 rows, on 1 and 2 threads, and take half the time with the weight laid out. Where there is
    no oneDNN, and on a GPU, it is PyTorch's.

    Args:
        weight: (out, in); used as it is now, fp32 or bf16.
        bias: (out,); None: none.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.weight, self.bias, self.laid_out = weight, bias, None
        self.by_onednn = weight.device.type == "cpu" and (
            (weight.dtype == torch.float32 and torch.backends.mkldnn.is_available())
            or (weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if not self.by_onednn:
            return F.linear(x, self.weight, self.bias)
        if self.laid_out is None:  # not before: of a model's products some are never asked for
            self.laid_out = torch.ops.mkldnn._reorder_linear_weight(self.weight, 64)
        rows = x.flatten(0, -2)
        # oneDNN makes a kernel for each number of rows, and keeps some MB with it: so 1, 2, 4, 8, 16, 32, 48, ...
        count = len(rows)
        size = 1 << (count - 1).bit_length() if count < 16 else -(-count // 16) * 16
        if size > count:
            rows = F.pad(rows, (0, 0, 0, size - count))
        result = torch.ops.mkldnn._linear_pointwise(rows, self.laid_out, self.bias, "none", [], "")
        return result[:count].view(*x.shape[:-1], -1)


def with_products(model: MiniGPT) -> MiniGPT:
    """The model, its weights shared, with a `Product` in place of each `nn.Linear`."""
    shared = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for module in list(shared.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Product(child.weight, child.bias))
    return shared
