"""Adam as Keras computes it, the second moment of a word embedding, and the learning-rate schedule."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.adam import adam
from torch.optim.optimizer import ParamsT

from minigpt_pl.config import OptimizerConfig, ScheduleConfig


class SquaresByOccurrence:
    """For each word of an embedding: the sum of the squared gradients of its occurrences.

    In TensorFlow, the gradient of an embedding has one row per occurrence of a word. TensorFlow squares each row, then
    adds the rows of the same word. PyTorch adds first, then squares. `KerasAdam` uses the sums of this class for the
    second moment of the embedding, so that it equals that of Keras on TensorFlow.

    You only create the object; a hook on the embedding collects the squares in each backward pass.

    Args:
        embedding: the layer. No other layer may use its weight: a tied output layer adds a dense gradient.
    """

    def __init__(self, embedding: nn.Embedding):
        self.embedding = embedding
        self.sums: Tensor | None = None  # (V, D)
        embedding.register_forward_hook(self._watch)

    def _watch(self, embedding: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        if output.requires_grad:
            hook: Callable[[Tensor], None] = partial(self._add, args[0])
            output.register_hook(hook)  # type: ignore[no-untyped-call]

    def _add(self, ids: Tensor, grad: Tensor) -> None:
        """Add the squares of one backward pass. ids (B, L), grad (B, L, D)."""
        weight = self.embedding.weight
        # The N processes average their gradients, so each row is divided by N.
        squares = (grad.flatten(0, -2).to(weight.dtype) / _num_processes()).square_()  # (B * L, D)
        if self.sums is None:
            self.sums = torch.zeros_like(weight)
        self.sums.index_add_(0, ids.flatten(), squares)

    def scale(self, factor: Tensor) -> None:
        """Apply gradient clipping to the sums: multiply them by factor²."""
        if self.sums is not None:
            self.sums.mul_(factor**2)

    def pop(self) -> Tensor | None:
        """Return the sums over all processes, (V, D), and reset them. None if there was no backward pass."""
        sums, self.sums = self.sums, None
        if sums is not None and _num_processes() > 1:
            dist.all_reduce(sums)
        return sums


def _num_processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class KerasAdam(torch.optim.Optimizer):
    """Adam with the update of Keras: `lr * sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps)`.

    PyTorch adds epsilon to the corrected root `sqrt(v / (1 - b2^t))`, as in Algorithm 1 of the paper (arXiv 1412.6980).
    Keras uses the more efficient form from section 2 of the paper. PyTorch's kernel computes the same if its epsilon is
    `eps / sqrt(1 - b2^t)`.

    Args:
        params: parameters or parameter groups.
        lr, betas, eps: as in `keras.optimizers.Adam`, with the same defaults.
        weight_decay: decoupled weight decay (arXiv 1711.05101).
        squares: gives the second moment of one embedding. If None, all parameters use `grad ** 2`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-7,
        weight_decay: float = 0.0,
        squares: SquaresByOccurrence | None = None,
    ):
        # `keras_steps` is a copy of the state's `step` as a Python int: reading a tensor on a GPU would synchronise.
        # `fused` tells `load_state_dict` to put `step` on the parameter's device.
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "fused": True, "keras_steps": 0}
        super().__init__(params, defaults)
        self.squares = squares

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        squares = None if self.squares is None else self.squares.pop()
        for group in self.param_groups:
            group["keras_steps"] += 1
            dense = []
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if not (state := self.state[parameter]):
                    state["step"] = torch.zeros((), device=parameter.device)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
                if squares is not None and self.squares and parameter is self.squares.embedding.weight:
                    self._update_by_occurrence(parameter, squares, group)
                else:
                    dense.append(parameter)
            self._update(dense, group)
        return loss

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        states = [self.state[parameter] for parameter in parameters]
        (beta1, beta2), steps = group["betas"], group["keras_steps"]
        options: dict[str, Any] = {"lr": group["lr"], "weight_decay": group["weight_decay"]}
        options |= {"beta1": beta1, "beta2": beta2, "eps": group["eps"] / math.sqrt(1 - beta2**steps)}
        options |= {"fused": True, "decoupled_weight_decay": True, "amsgrad": False, "maximize": False}
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        first, second, counts = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
        adam(parameters, grads, first, second, [], counts, **options)

    def _update_by_occurrence(self, parameter: Tensor, squares: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2), steps = self.state[parameter], group["betas"], group["keras_steps"]
        correction1, correction2 = 1 - beta1**steps, math.sqrt(1 - beta2**steps)
        state["step"] += 1
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        state["exp_avg"].lerp_(parameter.grad, 1 - beta1)
        state["exp_avg_sq"].lerp_(squares, 1 - beta2)
        root = torch.sqrt(state["exp_avg_sq"], out=squares)  # reuses the memory of `squares`
        denominator = root.div_(correction2).add_(group["eps"] / correction2)
        parameter.addcdiv_(state["exp_avg"], denominator, value=-group["lr"] / correction1)


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, squares: SquaresByOccurrence | None
) -> torch.optim.Optimizer:
    """Build the optimizer from the settings, for all parameters of the model."""
    options: dict[str, Any] = {"lr": config.learning_rate, "betas": (config.beta1, config.beta2)}
    options |= {"eps": config.epsilon, "weight_decay": config.weight_decay}
    if config.name == "adamw":
        return torch.optim.AdamW(model.parameters(), fused=True, **options)
    return KerasAdam(model.parameters(), squares=squares, **options)


def learning_rate_factor(step: int, total_steps: int, config: ScheduleConfig) -> float:
    """The learning rate of a step, as a share of `optimizer.learning_rate`.

    Args:
        step: number of steps before this one.
        total_steps: steps of the whole training; linear and cosine schedules end there.

    Returns:
        During the `warmup_steps`, the share grows linearly to 1. Then it stays at 1 (constant), or it falls to
        `final_ratio` at the last step (linear; cosine: arXiv 1608.03983).
    """
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if config.name == "constant":
        return 1.0
    progress = min((step - config.warmup_steps) / max(total_steps - 1 - config.warmup_steps, 1), 1.0)
    remaining = 1 - progress if config.name == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.final_ratio + (1 - config.final_ratio) * remaining
