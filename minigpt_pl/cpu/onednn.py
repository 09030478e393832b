"""oneDNN's matrix products in fp32 and bf16. `torch.compile` uses the same private PyTorch operators.

Each one is tried once, at import. If it is missing (macOS on ARM) or computes wrong values, the callers use `F.linear`.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def pack(weight: Tensor, rows: int) -> Tensor:
    """Copy a weight (out, in) into oneDNN's layout for an x with this number of rows."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
    return packed


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`: (rows, in), (out, in) and (out,) -> (rows, out). The weight may be packed."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


def supports(weight: Tensor) -> bool:
    """Whether oneDNN multiplies tensors of this device and dtype."""
    has_type = (weight.dtype == torch.float32 and HAS_FP32) or (weight.dtype == torch.bfloat16 and HAS_BF16)
    return weight.device.type == "cpu" and has_type


def works(check: Callable[[], bool]) -> bool:
    """The result of a check; False if an operator is missing from this build of PyTorch."""
    try:
        return check()
    except (AttributeError, RuntimeError):
        return False


def _fp32_works() -> bool:
    ones = torch.ones(2, 2, dtype=torch.float32, device="cpu")
    return torch.equal(linear(ones, pack(ones, 2)), 2 * ones)


HAS_FP32 = works(_fp32_works)
HAS_BF16 = HAS_FP32 and works(lambda: torch.ops.mkldnn._is_mkldnn_bf16_supported())
BF16_IS_FAST = HAS_BF16 and works(  # faster than fp32
    lambda: torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
)
