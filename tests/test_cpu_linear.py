"""The same bits for a row alone and beside others, in little memory."""

import functools
import math
import resource
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from minigpt_pl.cpu import linear
from minigpt_pl.cpu.linear import FEW, Int8Linear, PackedLinear, has_int8_units

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN")


def product(inside: int, outside: int, bias: bool = True) -> PackedLinear:
    torch.manual_seed(inside)
    return PackedLinear(torch.randn(outside, inside), torch.randn(outside) if bias else None)


@needs_onednn
@pytest.mark.parametrize(("inside", "outside"), [(1, 3), (256, 256), (672, 256), (256, 672), (513, 30), (1184, 512)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_row_alone_and_beside_others(inside, outside, bias):
    ours, x = product(inside, outside, bias), torch.randn(33, inside)
    together = ours(x)
    assert_close(together, F.linear(x, ours.weight, ours.bias), atol=1e-4, rtol=1e-4)
    for row, expected in zip(x, together, strict=True):
        assert torch.equal(ours(row[None]), expected[None])
        assert torch.equal(ours(row.view(1, 1, -1)), expected.view(1, 1, -1))


def test_more_dimensions():
    ours, x = product(8, 5), torch.randn(2, 3, 4, 8)
    assert_close(ours(x), F.linear(x, ours.weight, ours.bias), atol=1e-5, rtol=1e-5)


@needs_onednn
@pytest.mark.parametrize(("inside", "outside", "is_small"), [(256, 256, True), (512, 512, True), (513, 512, False)])
def test_small_matrices_multiply_a_row_without_onednn(inside, outside, is_small, monkeypatch):
    calls, ours = [], product(inside, outside)
    ours(torch.zeros(1, inside))
    monkeypatch.setattr(torch, "embedding_bag", _counted(torch.embedding_bag, calls))
    ours(torch.randn(1, inside)), ours(torch.randn(2, inside))
    if ours.by_row is None and is_small:
        pytest.skip("embedding_bag adds up in another order than oneDNN here")
    assert len(calls) == is_small


@needs_onednn
def test_where_embedding_bag_adds_up_in_another_order(monkeypatch):
    def otherwise(columns, *args):
        sums, *rest = bag(columns.double(), *args[:5], args[5].double(), *args[6:])
        return sums.float(), *rest

    bag, x = torch.embedding_bag, torch.randn(5, 256)
    expected = product(256, 256)(x)
    monkeypatch.setattr(torch, "embedding_bag", otherwise)
    ours = product(256, 256)
    assert torch.equal(ours(x[:1]), expected[:1]) and ours.by_row is None
    ours.by_row = linear._RowProduct(ours.weight)
    assert not torch.equal(ours(x[:1]), expected[:1])


@pytest.mark.parametrize("rows", [1, 8, 9, 33])
@pytest.mark.parametrize("with_fbgemm", [True, False])
@pytest.mark.parametrize("by_columns", [True, False])
def test_rough_products(rows, with_fbgemm, by_columns, monkeypatch):
    torch.manual_seed(0)
    weight, bias, x = torch.randn(300, 64) * torch.rand(300, 1), torch.randn(300), torch.randn(rows, 64)
    if not has_int8_units(weight):
        pytest.skip("no int8 units")
    if by_columns:
        weight = weight.T.contiguous().T
    calls, name = [], "fbgemm_linear_int8_weight_fp32_activation"  # PyTorch says that it will be removed
    if with_fbgemm:
        monkeypatch.setattr(torch, name, _counted(getattr(torch, name), calls))
    else:
        monkeypatch.delattr(torch, name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        error = Int8Linear(weight)(x, bias) - F.linear(x, weight, bias)
    assert 0 < float(error.std() / F.linear(x, weight, bias).std()) < 0.02
    assert bool(calls) is (with_fbgemm and rows <= FEW)
    for bad in (math.nan, math.inf, -math.inf):
        x[-1, 3] = bad
        with pytest.raises(ValueError, match="NaN"):
            Int8Linear(weight)(x, bias)


@pytest.mark.parametrize("rough", [False, True])
def test_batches_of_all_sizes_keep_little_memory(rough):
    weight, bias = torch.randn(20_000, 64), torch.zeros(20_000)
    if not has_int8_units(weight):
        pytest.skip("no int8 units")
    ours = functools.partial(Int8Linear(weight), bias=bias) if rough else PackedLinear(weight)
    assert ours(torch.randn(160, 64)).shape == (160, 20_000)
    before = _resident()
    for rows in range(1, 161):
        assert ours(torch.randn(rows, 64)).shape == (rows, 20_000)
    assert _resident() - before < 100e6


def _resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _counted(function, calls: list):
    def counted(*args):
        calls.append(args)
        return function(*args)

    return counted
