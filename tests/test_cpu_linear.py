"""Products of oneDNN: their values, their memory, and `F.linear` where oneDNN lacks them."""

import functools
import math
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from minigpt_pl.cpu import int8, onednn
from minigpt_pl.cpu.int8 import Int8Linear
from minigpt_pl.cpu.linear import PackedLinear
from minigpt_pl.generation.controls import Controls
from minigpt_pl.generation.engine import generate_ids
from minigpt_pl.loss import linear_cross_entropy
from minigpt_pl.model import MiniGPT

needs_onednn = pytest.mark.skipif(not onednn.HAS_FP32, reason="no oneDNN")
needs_int8 = pytest.mark.skipif(not int8.HAS_INT8, reason="no exact 8-bit products")


def packed_linear(inputs: int, outputs: int, bias: bool = True) -> PackedLinear:
    torch.manual_seed(inputs)
    return PackedLinear(torch.randn(outputs, inputs), torch.randn(outputs) if bias else None)


@needs_onednn
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 3), (256, 256), (672, 256), (256, 672), (513, 30), (1184, 512)])
@pytest.mark.parametrize("bias", [True, False])
def test_packed_linear_equals_linear(inputs, outputs, bias):
    layer, x = packed_linear(inputs, outputs, bias), torch.randn(33, inputs)
    expected = F.linear(x, layer.weight, layer.bias)
    assert_close(layer(x), expected, atol=1e-4, rtol=1e-4)
    for row, expected_row in zip(x, expected, strict=True):
        assert_close(layer(row.view(1, 1, -1)), expected_row.view(1, 1, -1), atol=1e-4, rtol=1e-4)


@needs_onednn
@pytest.mark.parametrize(("inputs", "outputs"), [(256, 256), (672, 256), (1184, 512)])
def test_two_or_more_rows_do_not_depend_on_each_other(inputs, outputs):
    layer, x = packed_linear(inputs, outputs), torch.randn(64, inputs)
    together = layer(x)
    for size in (2, 3, 5, 16, 33):
        parts = [layer(part) for part in x.split(size) if len(part) > 1]
        assert torch.equal(torch.cat(parts), together[: sum(map(len, parts))]), size


def test_more_dimensions():
    layer, x = packed_linear(8, 5), torch.randn(2, 3, 4, 8)
    assert_close(layer(x), F.linear(x, layer.weight, layer.bias), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types(dtype):
    weight, bias, x = torch.randn(5, 8, dtype=dtype), torch.randn(5), torch.randn(4, 8, dtype=dtype)
    result = PackedLinear(weight, bias)(x)
    assert result.dtype == dtype
    assert_close(result, F.linear(x, weight, bias.to(dtype)), atol=0.1 if dtype == torch.bfloat16 else 1e-12, rtol=0)


@needs_int8
@pytest.mark.parametrize("rows", [1, 8, 9, 33])
@pytest.mark.parametrize("column_major", [True, False])
def test_int8_linear_is_near_linear(rows, column_major):
    torch.manual_seed(0)
    weight, bias, x = torch.randn(300, 64) * torch.rand(300, 1), torch.randn(300), torch.randn(rows, 64)
    if column_major:
        weight = weight.T.contiguous().T
    error = Int8Linear(weight)(x, bias) - F.linear(x, weight, bias)
    assert 0 < float(error.std() / F.linear(x, weight, bias).std()) < 0.02
    for bad in (math.nan, math.inf, -math.inf):
        x[-1, 3] = bad
        with pytest.raises(ValueError, match="NaN"):
            Int8Linear(weight)(x, bias)


@needs_int8
def test_int8_linear_rounds_to_the_nearest_integer():
    """All numbers are positive, so truncation would make every result too small."""
    torch.manual_seed(0)
    weight, x = torch.rand(300, 64), torch.rand(33, 64)
    error = Int8Linear(weight)(x, torch.zeros(300)) - F.linear(x, weight)
    assert error.mean().abs() < error.std()


@needs_int8
@pytest.mark.parametrize("in_8_bits", [False, True])
def test_batches_of_all_sizes_need_little_memory(in_8_bits):
    weight, bias = torch.randn(20_000, 64), torch.zeros(20_000)
    layer = functools.partial(Int8Linear(weight), bias=bias) if in_8_bits else PackedLinear(weight)
    assert layer(torch.randn(160, 64)).shape == (160, 20_000)
    before = _resident_memory()
    for rows in range(1, 161):
        assert layer(torch.randn(rows, 64)).shape == (rows, 20_000)
    assert _resident_memory() - before < 100e6


def _resident_memory() -> int:
    """Memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_a_build_without_onednn(monkeypatch):
    """Without the private operators, the loss and the generated texts are the same."""

    def loss_and_texts():
        torch.manual_seed(0)
        model = MiniGPT(2000, 12, 32, 2, 24, 40).eval()
        weight, bias = model.output.weight, model.output.bias
        loss = linear_cross_entropy(torch.ones(9, 32), weight, bias, torch.arange(9))
        controls = Controls(vocab_size=2000, num_tokens=20)
        return loss, generate_ids(model, [[2, 3], [5]], controls, [0, 1]), PackedLinear(weight)(torch.ones(3, 32))

    expected = loss_and_texts()
    monkeypatch.setattr(onednn, "HAS_FP32", False)
    monkeypatch.setattr(onednn, "HAS_BF16", False)
    monkeypatch.setattr(int8, "HAS_INT8", False)
    monkeypatch.setattr(torch, "ops", None)  # a call would fail
    assert_close(loss_and_texts(), expected)


def test_an_operator_that_is_missing_or_fails():
    def fails():
        raise NotImplementedError

    assert onednn.works(lambda: torch.ops.onednn.no_such_operator()) is False
    assert onednn.works(fails) is False
    assert onednn.works(lambda: True) is True


@pytest.mark.skipif(sys.platform != "linux" or "ONEDNN_MAX_CPU_ISA" in os.environ, reason="unknown CPU features")
def test_8_bit_products_are_used_where_the_cpu_has_vnni():
    """Otherwise the tests with `needs_int8` would skip themselves silently."""
    assert int8.HAS_INT8 is ("avx512_vnni" in Path("/proc/cpuinfo").read_text().split())


@needs_int8
@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE"])
def test_inexact_8_bit_products_are_not_used(isa):
    """Without VNNI, oneDNN adds pairs of 8-bit products in 16 bits, which overflows."""
    code = "from minigpt_pl.cpu import int8, onednn; print(onednn.HAS_FP32, int8.HAS_INT8)"
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": isa}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "False"], done.stderr
