"""The LightningModule: one training step, the measures of a validation."""

import dataclasses
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn

from minigpt_pl.config import OptimizerConfig, ScheduleConfig
from minigpt_pl.data.batches import Batch
from minigpt_pl.loss import linear_cross_entropy, token_losses
from minigpt_pl.model import MiniGPT
from minigpt_pl.tokenizer import PADDING_ID, UNKNOWN_ID
from minigpt_pl.training.optimizers import build_optimizer, learning_rate_factor, record_squares_by_occurrence


class MiniGPTModule(L.LightningModule):
    """Trains a MiniGPT. All arguments are plain values, so its checkpoints load with `weights_only=True`.

    Args:
        model: the arguments of `MiniGPT`.
        optimizer: the fields of `OptimizerConfig`.
        schedule: the fields of `ScheduleConfig`.
        total_steps: optimizer steps of the whole training, for the schedule's end.
        end_id: the end token, which is no word; None where texts have no end.
        loss_on_padding: count padding in the loss.
        seed: with the epoch, the batch and the process it fixes the dropout of a step.
    """

    def __init__(
        self,
        model: dict[str, Any],
        optimizer: dict[str, Any],
        schedule: dict[str, Any],
        total_steps: int,
        end_id: int | None,
        loss_on_padding: bool,
        seed: int,
    ):
        super().__init__()
        self.save_hyperparameters(logger=False)  # config.yaml holds them
        self.model = MiniGPT(**model)
        self.optimizer_config, self.schedule_config = OptimizerConfig(**optimizer), ScheduleConfig(**schedule)
        self.learning_rate = self.optimizer_config.learning_rate  # where the learning-rate finder puts its proposal
        self.ignore_index = None if loss_on_padding else PADDING_ID
        self.epoch_sums = torch.zeros(2, dtype=torch.float64)  # loss and counted targets of the epoch, this process's
        if self.optimizer_config.second_moment == "by_occurrence":
            record_squares_by_occurrence(self.model.token_embedding, lambda: self.trainer.world_size)

    # -------------------------------------------------------------------------------------------- training

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # The randomness of a step is a function of its place, so a resumed run draws the same dropout.
        place = (self.hparams.seed, self.current_epoch, batch_idx, self.global_rank)
        torch.manual_seed(hash(place) % 2**63)  # hash() of a tuple of ints is the same in every process

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        hidden = self.model.hidden_states(batch.inputs)  # (B, L, D)
        output = self.model.output
        total = linear_cross_entropy(hidden, output.weight, output.bias, batch.targets, self.ignore_index)
        loss = total / batch.targets_per_share
        targets = max(int(batch.targets_per_share), 1)  # weighs the epoch's mean by targets
        self.log("train/loss", loss, sync_dist=True, batch_size=targets)
        self.log("train/perplexity", loss.detach().exp(), sync_dist=True, batch_size=targets)
        device = "cpu" if loss.device.type == "mps" else loss.device  # MPS has no fp64
        self.epoch_sums = self.epoch_sums.to(device)
        self.epoch_sums[0] += total.detach().to(device)
        self.epoch_sums[1] += batch.targets_per_share
        return loss

    def on_train_epoch_end(self) -> None:
        loss, targets = self._over_processes(self.epoch_sums).tolist()
        self.log("train/epoch_loss", loss / targets, sync_dist=True)
        if self.trainer.is_last_batch:  # else the run ends inside the epoch, and a resumed one goes on adding
            self.epoch_sums = torch.zeros_like(self.epoch_sums)

    def _over_processes(self, sums: Tensor) -> Tensor:
        return (
            sums
            if self.trainer.world_size == 1
            else self.trainer.strategy.reduce(sums.to(self.device), reduce_op="sum")
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["epoch_sums"] = self._over_processes(self.epoch_sums).cpu()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.global_rank == 0 and "epoch_sums" in checkpoint:  # `convert` writes none
            self.epoch_sums = checkpoint["epoch_sums"]

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        # Lightning refuses to clip for fused optimizers under any mixed precision, for the sake of fp16's scaler.
        # bf16, the only mixed precision of the settings, has none.
        if gradient_clip_val is None:
            return
        norm = nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)
        squared_grad = getattr(self.model.token_embedding.weight, "squared_grad", None)
        if squared_grad is not None:
            squared_grad.mul_((gradient_clip_val / (norm + 1e-6)).clamp(max=1.0) ** 2)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad()  # Lightning waits until the next forward pass has made the new gradients beside them

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        squared_grad = getattr(self.model.token_embedding.weight, "squared_grad", None)
        if squared_grad is not None and self.trainer.world_size > 1:
            torch.distributed.all_reduce(squared_grad)

    def configure_optimizers(self) -> dict[str, Any]:
        config = dataclasses.replace(self.optimizer_config, learning_rate=self.learning_rate)
        optimizer = build_optimizer(self.model, config)

        def factor(step: int) -> float:
            return learning_rate_factor(step, self.hparams.total_steps, self.schedule_config)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # ------------------------------------------------------------------------------------------ validation

    def on_validation_epoch_start(self) -> None:
        # loss and number of counted targets; loss and number of words (no padding, [UNK] or [END])
        self.validation_sums = torch.zeros(4, dtype=torch.float64)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        hidden = self.model.hidden_states(batch.inputs)
        losses = token_losses(hidden, self.model.output.weight, self.model.output.bias, batch.targets)  # (B, L)
        counted = batch.targets != (-1 if self.ignore_index is None else self.ignore_index)
        words = (batch.targets != PADDING_ID) & (batch.targets != UNKNOWN_ID)
        if self.hparams.end_id is not None:
            words &= batch.targets != self.hparams.end_id
        sums = [losses[counted].sum(), counted.sum(), losses[words].sum(), words.sum()]
        self.validation_sums += torch.stack([value.double() for value in sums]).cpu()

    def on_validation_epoch_end(self) -> None:
        sums = self._over_processes(self.validation_sums)
        loss, word_loss = sums[0] / sums[1], sums[2] / sums[3]  # without a known word the latter is NaN
        self.log_dict(
            {
                "val/loss": loss,
                "val/perplexity": loss.exp(),
                "val/word_loss": word_loss,
                "val/word_perplexity": word_loss.exp(),
            },
            sync_dist=True,
        )
