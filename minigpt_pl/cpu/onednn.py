"""oneDNN's matrix products: the only private PyTorch operators of this package.

`torch.compile` emits the same operators. Each one is tried once, at import. Where it is missing (macOS on ARM) or
wrong, the callers use `F.linear`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def pack(weight: Tensor, rows: int) -> Tensor:
    """Copy a weight (out, in) into the layout that suits oneDNN for x with this number of rows."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
    return packed


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`: (rows, in), (out, in) and (out,) -> (rows, out). The weight may be packed."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


def pack_int8(weight: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pack an int8 weight (out, in) and the scales (out,) of its rows for `linear_int8`."""
    zero_points = torch.zeros(len(weight), dtype=torch.int64, device="cpu")
    return torch.ops.onednn.qlinear_prepack(weight.contiguous(), None), scales, zero_points


def linear_int8(x: Tensor, x_scale: float, packed: tuple[Tensor, Tensor, Tensor], bias: Tensor) -> Tensor:
    """`x_scale * (x - 128) @ (scales * weight).T + bias`, with exact sums. uint8 (rows, in) -> fp32 (rows, out)."""
    output: tuple[Any, ...] = (1.0, 0, torch.float32, "none", [], "")  # scale, zero point, type, no post-operation
    result: Tensor = torch.ops.onednn.qlinear_pointwise(x, x_scale, 128, *packed, bias, *output)
    return result


def _fp32_works() -> bool:
    ones = torch.ones(2, 2, dtype=torch.float32, device="cpu")
    return torch.equal(linear(ones, pack(ones, 2)), 2 * ones)


def _int8_works() -> bool:
    # Without VNNI, oneDNN adds pairs of products in 16 bits. The pairs here would overflow: 2 * 255 * 127 > 2**15.
    x = torch.full((1, 64), 255, dtype=torch.uint8, device="cpu")
    weight = torch.full((16, 64), 127, dtype=torch.int8, device="cpu")
    scales = torch.ones(16, dtype=torch.float32, device="cpu")
    sums = linear_int8(x, 1.0, pack_int8(weight, scales), torch.zeros_like(scales))
    return torch.cpu._is_vnni_supported() and bool((sums == 64 * 127 * 127).all())


def _has_bf16_units() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _try(check: Callable[[], bool]) -> bool:
    try:
        return check()
    except (AttributeError, RuntimeError):  # the operator is not in this build
        return False


HAS_FP32 = torch.backends.mkldnn.is_available() and _try(_fp32_works)
HAS_BF16 = HAS_FP32 and _try(lambda: torch.ops.mkldnn._is_mkldnn_bf16_supported())
HAS_INT8 = HAS_FP32 and _try(_int8_works)
BF16_IS_FAST = HAS_BF16 and _try(_has_bf16_units)  # faster than fp32


def supports(weight: Tensor) -> bool:
    """Whether oneDNN multiplies tensors of this device and type."""
    has_type = (weight.dtype == torch.float32 and HAS_FP32) or (weight.dtype == torch.bfloat16 and HAS_BF16)
    return weight.device.type == "cpu" and has_type


def supports_int8(weight: Tensor) -> bool:
    """Whether oneDNN multiplies an 8-bit copy of this fp32 weight, with exact sums."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and HAS_INT8
