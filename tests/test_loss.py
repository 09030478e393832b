import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from minigpt_pl import loss as loss_module
from minigpt_pl.loss import linear_cross_entropy, sampled_cross_entropy, token_losses


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    # 5 x 8 rows need several chunks; the last one is short.
    monkeypatch.setattr(loss_module, "_chunk_rows", lambda vocab_size, dtype, device: 7)


def example(dtype=torch.float32, requires_grad=True):
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 8, 12), (30, 12), (30,)]
    tensors = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    targets = torch.randint(30, (5, 8), generator=generator)
    targets[0, 3:] = 0
    return [t.requires_grad_(requires_grad) for t in tensors], targets


def reference(hidden, weight, bias, targets, ignore_index=None):
    logits = F.linear(hidden, weight, bias).flatten(0, 1)
    return F.cross_entropy(
        logits, targets.flatten(), ignore_index=-100 if ignore_index is None else ignore_index, reduction="sum"
    )


@pytest.fixture(params=["cpu", "gpu"])
def device_path(request, monkeypatch):
    """Both paths through the loss. The GPU's path also runs on a CPU."""
    if request.param == "gpu":
        monkeypatch.setattr(loss_module, "SYNC_FREE_DEVICES", ())


@pytest.mark.parametrize("ignore_index", [None, 0])
def test_values_and_gradients_equal_the_plain_loss(device_path, ignore_index):
    tensors, targets = example()
    ours = linear_cross_entropy(*tensors, targets, ignore_index)
    plain = reference(*tensors, targets, ignore_index)
    assert_close(ours, plain, rtol=1e-5, atol=0)
    for a, b in zip(torch.autograd.grad(ours / 3, tensors), torch.autograd.grad(plain / 3, tensors), strict=True):
        assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_gradcheck_in_fp64(device_path):
    tensors, targets = example(torch.float64)
    assert torch.autograd.gradcheck(lambda *t: linear_cross_entropy(*t, targets, 0), tensors)


def test_bf16_products_stay_within_their_rounding(device_path):
    tensors, targets = example()
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_cross_entropy(*tensors, targets)
    assert ours.dtype == torch.float32
    exact = reference(*tensors, targets)
    assert ours.item() != exact.item(), "the products were not in bf16"
    assert_close(ours, exact, rtol=2**-8, atol=0)
    for a, b in zip(torch.autograd.grad(ours, tensors), torch.autograd.grad(exact, tensors), strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 2**-6 * b.norm()


def test_without_gradients(device_path):
    tensors, targets = example(requires_grad=False)
    assert_close(linear_cross_entropy(*tensors, targets), reference(*tensors, targets), rtol=1e-5, atol=0)


def test_sums_over_bf16_logits_are_in_fp32(device_path):
    """All logits are equal, so each probability is 1 / 32, which is exact in bf16."""
    hidden, weight, bias = torch.ones(1029, 4), torch.zeros(32, 4), torch.zeros(32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(
            hidden, weight.requires_grad_(), bias.requires_grad_(), torch.ones(1029, dtype=torch.long)
        )
    assert_close(loss.item(), 1029 * math.log(32), rtol=1e-5, atol=0)
    for gradient in torch.autograd.grad(loss, [weight, bias]):
        assert (gradient[0] == 1029 / 32).all()


def test_only_ignored_targets_is_zero(device_path):
    tensors, targets = example()
    assert linear_cross_entropy(*tensors, torch.zeros_like(targets), 0).item() == 0


def test_chunk_sizes(monkeypatch):
    monkeypatch.undo()
    cpu = torch.device("cpu")
    assert loss_module._chunk_rows(20_000, torch.bfloat16, cpu) == 512
    assert loss_module._chunk_rows(20_000, torch.float32, cpu) == 256
    assert loss_module._chunk_rows(10**7, torch.float32, cpu) == 64
    assert loss_module._chunk_rows(26, torch.float32, cpu) == 512, "more rows would be padding in a small batch"
    assert loss_module._chunk_rows(20_000, torch.bfloat16, torch.device("cuda")) == 13_376


@pytest.mark.parametrize("bf16", [False, True])
def test_losses_whose_probability_underflows(device_path, bf16):
    tensors, targets = example()
    tensors[2] = (tensors[2].detach() * 300).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        ours = linear_cross_entropy(*tensors, targets)
    plain = reference(*tensors, targets)
    assert plain / targets.numel() > 200
    assert_close(ours, plain, rtol=2**-7 if bf16 else 1e-5, atol=0)
    for a, b in zip(torch.autograd.grad(ours, tensors), torch.autograd.grad(plain, tensors), strict=True):
        assert (a - b).norm() < (2**-5 if bf16 else 1e-4) * b.norm()


def test_no_tensor_has_all_logits():
    hidden, weight, bias = torch.zeros(64, 4), torch.zeros(1000, 4, requires_grad=True), torch.zeros(1000)
    sizes = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            sizes.append(result.numel() if isinstance(result, torch.Tensor) else 0)
            return result

    with Recorder():
        linear_cross_entropy(hidden, weight, bias, torch.zeros(64, dtype=torch.long)).backward()
    assert max(sizes) == 7 * 1000


def test_products_have_the_same_shape_for_any_number_of_targets():
    shapes = set()

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten.mm.default, torch.ops.mkldnn._linear_pointwise.default):
                shapes.add(tuple(tuple(tensor.shape) for tensor in args[:2]))
            return func(*args, **(kwargs or {}))

    for rows in (1, 6, 7, 9, 20):
        with Recorder():
            targets = torch.ones(rows, dtype=torch.long)
            linear_cross_entropy(torch.ones(rows, 4, requires_grad=True), torch.ones(9, 4), torch.ones(9), targets)
    assert len(shapes) == 3, "oneDNN keeps memory for each shape"


def test_token_losses():
    tensors, targets = example(requires_grad=False)
    losses = token_losses(*tensors, targets)
    assert losses.shape == targets.shape
    plain = F.cross_entropy(F.linear(*tensors).flatten(0, 1), targets.flatten(), reduction="none").view(5, 8)
    assert_close(losses, plain)


def test_token_losses_of_bf16_products_are_in_fp32():
    tensors, targets = example(requires_grad=False)
    rounded = [tensor.bfloat16() for tensor in tensors]
    logits = F.linear(*rounded).float().flatten(0, 1)
    exact = F.cross_entropy(logits, targets.flatten(), reduction="none").view(5, 8)
    assert_close(token_losses(*rounded, targets), exact, rtol=1e-6, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(token_losses(*tensors, targets), exact, rtol=2**-6, atol=2**-6)


def test_the_gpu_path_has_its_softmax_in_fp32(monkeypatch):
    monkeypatch.setattr(loss_module, "SYNC_FREE_DEVICES", ())
    tensors, targets = example(requires_grad=False)
    tensors = [tensor.sign() for tensor in tensors]  # small integers: the products are exact in bf16
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_cross_entropy(*tensors, targets)
    assert_close(ours, reference(*tensors, targets), rtol=1e-6, atol=0)


class TestCandidates:
    def shares(self):
        counts = torch.arange(30, 0, -1.0)
        return counts / counts.sum()

    @pytest.mark.parametrize("ignore_index", [None, 0])
    def test_if_all_words_are_candidates_it_is_the_whole_loss(self, ignore_index):
        tensors, targets = example()
        arguments = (self.shares(), 10**6, torch.Generator(), ignore_index)
        ours = sampled_cross_entropy(*tensors, targets, *arguments)
        whole = linear_cross_entropy(*tensors, targets, ignore_index)
        assert_close(ours, whole)
        for a, b in zip(torch.autograd.grad(ours, tensors), torch.autograd.grad(whole, tensors), strict=True):
            assert_close(a, b, rtol=1e-5, atol=1e-5)

    def test_the_right_probabilities_have_no_gradient_on_average(self):
        """A bias at log p is the best one. Without the correction, its gradient would not be 0."""
        shares, generator = self.shares(), torch.Generator().manual_seed(0)
        hidden, weight, bias = torch.zeros(60, 4), torch.zeros(30, 4), shares.log().requires_grad_()
        total, squares = torch.zeros(30), torch.zeros(30)
        for _ in range(3000):
            targets = torch.multinomial(shares, 60, replacement=True, generator=generator)
            loss = sampled_cross_entropy(hidden, weight, bias, targets, shares, 8, generator)
            [gradient] = torch.autograd.grad(loss, bias)
            total, squares = total + gradient, squares + gradient.square()
        error = (squares / 3000).sqrt() / 3000**0.5
        assert (total / 3000).abs().div(error).square().mean() < 2, "the mean gradient is not 0 within its error"

    def test_only_candidates_are_computed(self):
        tensors, targets = example()
        counted = sampled_cross_entropy(*tensors, targets.clamp(max=3), self.shares(), 4, torch.Generator())
        gradient = torch.autograd.grad(counted, tensors[1])[0]
        changed = gradient.abs().sum(1) > 0  # (V,)
        assert 4 <= changed.sum() < 15 and changed[:4].all()

    def test_the_generator_decides(self):
        tensors, targets = example()
        draw = lambda seed: sampled_cross_entropy(  # noqa: E731
            *tensors, targets, self.shares(), 4, torch.Generator().manual_seed(seed)
        )
        assert draw(1) == draw(1) != draw(2)
