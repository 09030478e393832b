"""Adam as Keras computes it, and the course of the learning rate."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from minigpt_pl.config import OptimizerConfig, ScheduleConfig


class KerasAdam(torch.optim.Adam):
    """Adam whose update is `lr * sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps)`, as in Keras.

    PyTorch adds epsilon to the *corrected* root instead (so does the paper, arXiv 1412.6980, in its text; Keras
    takes the faster form of its section 2). The two are equal when PyTorch's epsilon is `eps / sqrt(1 - b2^t)`.

    A parameter with an attribute `squared_grad` has its second moment made from that instead of `grad ** 2`. On
    TensorFlow an embedding's gradient arrives as one row an occurrence, and Keras squares the rows *before*
    those of a repeated word are summed; `record_squares_by_occurrence` gathers that sum.

    Args:
        params: parameters, or groups of them.
        lr, betas, eps: as in `keras.optimizers.Adam`, whose defaults these are.
        weight_decay: decoupled (arXiv 1711.05101).
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-7,
        weight_decay: float = 0.0,
    ):
        super().__init__(params, lr, betas, eps, weight_decay, decoupled_weight_decay=True, fused=True)

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        by_occurrence = {}
        for group in self.param_groups:
            group["keras_steps"] = group.get("keras_steps", 0) + 1
            group["eps"] /= math.sqrt(1 - group["betas"][1] ** group["keras_steps"])
            for parameter in group["params"]:
                if getattr(parameter, "squared_grad", None) is not None:
                    self._step_by_occurrence(parameter, group)
                    by_occurrence[parameter], parameter.grad = parameter.grad, None  # the fused step skips it
        super().step()
        for group in self.param_groups:
            group["eps"] *= math.sqrt(1 - group["betas"][1] ** group["keras_steps"])
        for parameter, grad in by_occurrence.items():
            parameter.grad = grad
            parameter.squared_grad.zero_()
        return loss

    def _step_by_occurrence(self, parameter: nn.Parameter, group: dict) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        state["exp_avg"].lerp_(parameter.grad, 1 - beta1)
        state["exp_avg_sq"].lerp_(parameter.squared_grad, 1 - beta2)
        correction2 = math.sqrt(1 - beta2 ** group["keras_steps"])
        root = torch.sqrt(state["exp_avg_sq"], out=parameter.squared_grad)  # which is not needed any more
        denominator = root.div_(correction2).add_(group["eps"])
        parameter.addcdiv_(state["exp_avg"], denominator, value=-group["lr"] / (1 - beta1 ** group["keras_steps"]))


def record_squares_by_occurrence(embedding: nn.Embedding, shares: Callable[[], int] = lambda: 1) -> None:
    """Gather, in `embedding.weight.squared_grad`, the sum over a word's occurrences of its squared gradients.

    Args:
        embedding: its weight must not be used elsewhere (an output layer tied to it has a dense gradient).
        shares: how many processes average their gradients; each holds its rows times that number.
    """
    weight = embedding.weight

    def record(_module: nn.Module, args: tuple, output: Tensor) -> None:
        if not output.requires_grad:
            return
        ids = args[0].flatten()  # (B * L,)

        def accumulate(grad: Tensor) -> None:
            squares = (grad.flatten(0, -2).to(weight.dtype) / shares()).square_()  # (B * L, D)
            if getattr(weight, "squared_grad", None) is None:
                weight.squared_grad = torch.zeros_like(weight)
            weight.squared_grad.index_add_(0, ids, squares)

        output.register_hook(accumulate)

    embedding.register_forward_hook(record)


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer of the settings, over all of the model's parameters."""
    optimizer_class = KerasAdam if config.name == "keras_adam" else torch.optim.AdamW
    return optimizer_class(
        model.parameters(),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        **({} if optimizer_class is KerasAdam else {"fused": True}),
    )


def learning_rate_factor(step: int, total_steps: int, config: ScheduleConfig) -> float:
    """The learning rate of a step, as a share of the full one.

    Args:
        step: steps done before it.
        total_steps: steps of the whole training; the end of the linear or cosine course.

    Returns:
        Linear growth up to 1 over `warmup_steps`, then constant, or down to `final_ratio` at the last step
        (cosine: arXiv 1608.03983).
    """
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if config.name == "constant":
        return 1.0
    progress = min((step - config.warmup_steps) / max(total_steps - 1 - config.warmup_steps, 1), 1.0)
    remaining = 1 - progress if config.name == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.final_ratio + (1 - config.final_ratio) * remaining
