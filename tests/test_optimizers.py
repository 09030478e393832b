"""KerasAdam, the second moment by occurrence, the schedules."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from minigpt_pl.config import ScheduleConfig
from minigpt_pl.training import optimizers
from minigpt_pl.training.optimizers import KerasAdam, SquaresByOccurrence, learning_rate_factor


def keras_adam_by_hand(start, grads, squares, lr=1e-3, b1=0.9, b2=0.999, eps=1e-7):
    """The formula of Keras's Adam, in fp64."""
    w, m, v = start.astype(np.float64), 0.0, 0.0
    for t, (g, s) in enumerate(zip(grads, squares, strict=True), start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * s
        w = w - lr * np.sqrt(1 - b2**t) / (1 - b1**t) * m / (np.sqrt(v) + eps)
    return w


@pytest.fixture
def gradients():
    # So small that epsilon matters: there Keras and PyTorch differ.
    return np.random.default_rng(0).normal(size=(20, 7)) * 1e-6


class GivenSquares:
    """Stands for `SquaresByOccurrence`: sums that the test has chosen."""

    def __init__(self, weight, sums):
        self.embedding, self.sums = SimpleNamespace(weight=weight), iter(sums)

    def pop(self):
        return torch.tensor(next(self.sums), dtype=self.embedding.weight.dtype)


def take_steps(optimizer, weight, gradients, squares=None):
    if squares is not None:
        optimizer.squares = GivenSquares(weight, squares)
    for gradient in gradients:
        weight.grad = torch.tensor(gradient, dtype=weight.dtype)
        optimizer.step()


def test_steps_equal_the_formula_of_keras(gradients):
    weight = nn.Parameter(torch.ones(7, dtype=torch.float64))
    take_steps(KerasAdam([weight]), weight, gradients)
    by_hand = keras_adam_by_hand(np.ones(7), gradients, gradients**2)
    assert_close(weight.detach().numpy(), by_hand, rtol=1e-9, atol=0)
    pytorch = nn.Parameter(torch.ones(7, dtype=torch.float64))
    take_steps(torch.optim.Adam([pytorch], eps=1e-7), pytorch, gradients)
    assert abs(pytorch.detach().numpy() - by_hand).max() > 1e-3, "with these gradients the two formulas are equal"


def test_second_moment_from_given_squares(gradients):
    weight = nn.Parameter(torch.ones(7, dtype=torch.float64))
    squares = gradients**2 / 3
    take_steps(KerasAdam([weight]), weight, gradients, squares)
    assert_close(weight.detach().numpy(), keras_adam_by_hand(np.ones(7), gradients, squares), rtol=1e-9, atol=0)


def test_weight_decay_is_decoupled(gradients):
    for squares in (None, gradients**2):
        plain, decayed = (nn.Parameter(torch.ones(7, dtype=torch.float64)) for _ in range(2))
        take_steps(KerasAdam([plain]), plain, gradients[:1], squares)
        take_steps(KerasAdam([decayed], weight_decay=0.1), decayed, gradients[:1], squares)
        assert_close(decayed, plain - 1e-3 * 0.1, rtol=1e-9, atol=0)


@pytest.mark.parametrize("by_occurrence", [False, True])
def test_state_is_saved_completely(gradients, by_occurrence):
    squares = gradients**2 / 2 if by_occurrence else None
    whole = nn.Parameter(torch.ones(7))
    optimizer = KerasAdam([whole])
    take_steps(optimizer, whole, gradients[:8], squares)
    resumed = nn.Parameter(whole.detach().clone())
    other = KerasAdam([resumed])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    rest = None if squares is None else squares[8:]
    take_steps(optimizer, whole, gradients[8:], rest)
    take_steps(other, resumed, gradients[8:], rest)
    assert torch.equal(whole, resumed)


def test_squares_are_summed_by_occurrence():
    embedding = nn.Embedding(5, 3)
    squares = SquaresByOccurrence(embedding)
    ids = torch.tensor([[1, 2, 1], [1, 4, 2]])
    rows = torch.randn(2, 3, 3)
    (embedding(ids) * rows).sum().backward()
    expected = torch.zeros(5, 3)
    for id_, row in zip(ids.flatten(), rows.view(-1, 3), strict=True):
        expected[id_] += row**2
    assert_close(squares.sums, expected)
    assert not torch.allclose(embedding.weight.grad**2, expected), "no word is repeated"
    squares.scale(torch.tensor(0.5))
    assert_close(squares.pop(), expected / 4)
    assert squares.pop() is None, "the next step starts from zero"


def test_a_step_uses_the_squares_once():
    embedding = nn.Embedding(5, 3)
    squares = SquaresByOccurrence(embedding)
    optimizer = KerasAdam(embedding.parameters(), squares=squares)
    embedding(torch.tensor([1, 1])).sum().backward()
    optimizer.step()
    moment = optimizer.state[embedding.weight]["exp_avg_sq"]
    assert_close(moment[1], torch.full((3,), 2 * 0.001)), "twice the square of 1, not the square of 2"
    assert squares.sums is None


def test_one_of_two_processes_divides_by_two(monkeypatch):
    """The processes average their gradients, so a process's own gradient is twice its part."""
    alone, shared = nn.Embedding(3, 2), nn.Embedding(3, 2)
    squares = SquaresByOccurrence(alone), SquaresByOccurrence(shared)
    ids = torch.tensor([0, 2, 2])
    alone(ids).sum().backward()
    monkeypatch.setattr(optimizers, "_num_processes", lambda: 2)
    (2 * shared(ids)).sum().backward()
    assert_close(squares[0].sums, squares[1].sums)


@pytest.mark.parametrize(
    ("name", "warmup", "final", "factors"),
    [
        ("constant", 0, 0.0, [1, 1, 1, 1, 1]),
        ("constant", 3, 0.0, [0.25, 0.5, 0.75, 1, 1]),
        ("linear", 0, 0.0, [1, 0.75, 0.5, 0.25, 0]),
        ("linear", 2, 0.5, [1 / 3, 2 / 3, 1, 0.75, 0.5]),
        ("cosine", 0, 0.0, [1, 0.853553, 0.5, 0.146447, 0]),
        ("cosine", 0, 0.2, [1, 0.882843, 0.6, 0.317157, 0.2]),
    ],
)
def test_schedules(name, warmup, final, factors):
    config = ScheduleConfig(name=name, warmup_steps=warmup, final_ratio=final)
    assert [learning_rate_factor(step, 5, config) for step in range(5)] == pytest.approx(factors, abs=1e-6)
    assert learning_rate_factor(99, 5, config) == pytest.approx(factors[-1], abs=1e-6)
