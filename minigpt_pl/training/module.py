"""The LightningModule: training step, validation step and optimizer of the model."""

from dataclasses import asdict, replace
from typing import Any

import lightning.pytorch as L
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from minigpt_pl.config import ModelConfig, OptimizerConfig, ScheduleConfig, optimizer_problems
from minigpt_pl.data.batches import Batch
from minigpt_pl.errors import InputError
from minigpt_pl.loss import sampled_cross_entropy
from minigpt_pl.model import MiniGPT
from minigpt_pl.tokenizer import PADDING_ID, UNKNOWN_ID
from minigpt_pl.training.optimizers import SquaresByOccurrence, build_optimizer, learning_rate_factor


class MiniGPTModule(L.LightningModule):
    """Trains a `MiniGPT`. All arguments are plain values, so its checkpoints load with `weights_only=True`.

    Args:
        model: fields of `ModelConfig`. `vocab_size` must equal `TextDataModule.vocab_size`.
        optimizer: fields of `OptimizerConfig`. If `second_moment` is None, the module chooses it.
        schedule: fields of `ScheduleConfig`.
        total_steps: optimizer steps of the whole training, at which linear and cosine schedules end. If None, the
            Trainer estimates it.
        end_id: id of [END], which does not count as a word; None if the text has no [END].
        loss_on_padding: whether padding counts in the loss; must equal `DataConfig.loss_on_padding`.
        seed: random seed of dropout and of the softmax's candidates.
        softmax_candidates: as in `TrainConfig`. It needs the attribute `target_shares`.

    Attributes:
        target_shares: share of each token among the training targets, (V,), as from `TextDataModule.target_shares`.

    Raises:
        InputError: the optimizer does not fit the model.
    """

    def __init__(
        self,
        model: dict[str, Any] | None = None,
        optimizer: dict[str, Any] | None = None,
        schedule: dict[str, Any] | None = None,
        total_steps: int | None = None,
        end_id: int | None = None,
        loss_on_padding: bool = False,
        seed: int = 0,
        softmax_candidates: int | None = None,
    ):
        super().__init__()
        model_config, optimizer_config = ModelConfig(**(model or {})), OptimizerConfig(**(optimizer or {}))
        if problems := list(optimizer_problems(optimizer_config, model_config)):
            raise InputError(*problems)
        if optimizer_config.second_moment is None:
            fits = optimizer_config.name == "keras_adam" and not model_config.tie_embeddings
            optimizer_config.second_moment = "by_occurrence" if fits else "dense"
        self.optimizer_config, self.schedule_config = optimizer_config, ScheduleConfig(**(schedule or {}))
        self.total_steps, self.end_id, self.seed = total_steps, end_id, seed
        self.softmax_candidates = softmax_candidates
        self.target_shares: Tensor | None = None
        self.ignore_index = None if loss_on_padding else PADDING_ID
        self.save_hyperparameters(logger=False)
        with_defaults = {"model": asdict(model_config), "optimizer": asdict(optimizer_config)}
        self.hparams.update(with_defaults, schedule=asdict(self.schedule_config))

        self.model = MiniGPT(**asdict(model_config))
        self.learning_rate = optimizer_config.learning_rate  # Lightning's learning-rate finder sets it
        by_occurrence = optimizer_config.second_moment == "by_occurrence"
        self.squares = SquaresByOccurrence(self.model.token_embedding) if by_occurrence else None
        self.epoch_sums = torch.zeros(2, dtype=torch.float64)  # this epoch: loss of this process, targets of all

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        total = self._loss(batch, batch_idx)
        self.epoch_sums[0] += total.detach().to(self.epoch_sums.device)
        self.epoch_sums[1] += batch.num_targets
        # Several processes wait for each other here, so they share only the losses that are written or shown.
        if self.trainer.world_size == 1 or self._loss_is_due(batch_idx):
            loss = self._sum_over_processes(total.detach()) / batch.num_targets
            self.log_dict({"train/loss": loss, "train/perplexity": loss.exp()}, batch_size=batch.num_targets)
        # Lightning averages over batches and processes. This average must be the mean over all targets of the step.
        shares = self.trainer.accumulate_grad_batches * self.trainer.world_size
        return total / (batch.step_targets / shares)

    def _loss(self, batch: Batch, batch_idx: int) -> Tensor:
        """The sum of the losses of a batch: among all tokens, or among candidates."""
        seeds, count = self._dropout_seeds(batch, batch_idx), self.softmax_candidates
        if count is None:
            return self.model.loss(batch.inputs, batch.targets, self.ignore_index, seeds)
        assert self.target_shares is not None, "set target_shares, as from TextDataModule.target_shares()"
        hidden, output = self.model.hidden_states(batch.inputs, seeds), self.model.output
        place = hash((self.seed, self.current_epoch, batch_idx, self.global_rank))  # so a resumed run draws the same
        generator, shares = torch.Generator().manual_seed(abs(place)), self.target_shares.to(hidden.device)
        of_output = hidden, output.weight, output.bias
        return sampled_cross_entropy(*of_output, batch.targets, shares, count, generator, self.ignore_index)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        losses = self.model.token_losses(batch.inputs, batch.targets)  # (B, L)
        counted = batch.targets != (-1 if self.ignore_index is None else self.ignore_index)
        words = (batch.targets != PADDING_ID) & (batch.targets != UNKNOWN_ID)
        if self.end_id is not None:
            words &= batch.targets != self.end_id
        sums = [losses[counted].sum(), counted.sum(), losses[words].sum(), words.sum()]
        self.validation_sums += torch.stack([value.double() for value in sums]).cpu()

    def configure_model(self) -> None:
        """Shard the model if the strategy is Lightning's `ModelParallelStrategy` (FSDP2)."""
        if self.device_mesh is None or isinstance(self.model, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]
        for block in self.model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        for method in ("loss", "token_losses"):  # they gather the weights, as `forward` does
            register_fsdp_forward_method(self.model, method)

    def whole_network(self) -> MiniGPT:
        """The network with all its weights. All processes must call it; with FSDP2, only the first gets the weights."""
        if not isinstance(self.model, FSDPModule):
            return self.model
        weights = get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        with torch.device("meta"):
            network = MiniGPT(**self.hparams["model"])
        network.load_state_dict(weights, strict=self.global_rank == 0, assign=True)
        return network

    def configure_optimizers(self) -> OptimizerLRScheduler:
        config = replace(self.optimizer_config, learning_rate=self.learning_rate)
        optimizer = build_optimizer(self.model, config, self.squares)
        total_steps = self.total_steps
        if total_steps is None:  # a constant schedule does not need it
            estimated = self.schedule_config.name != "constant"
            total_steps = int(self.trainer.estimated_stepping_batches) if estimated else 0

        def factor(step: int) -> float:
            return learning_rate_factor(step, total_steps, self.schedule_config)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # ---------------------------------------------------------------------------------------------- training

    def on_train_start(self) -> None:
        if self.device.type != "mps":  # MPS has no fp64
            self.epoch_sums = self.epoch_sums.to(self.device)

    def _dropout_seeds(self, batch: Batch, batch_idx: int) -> Tensor:
        """(B,): they depend on the place of the sequence in the training. So neither a resume nor the number of
        processes changes them.
        """
        place = hash((self.seed, self.current_epoch, batch_idx))  # Python hashes integers the same in every process
        numbers = self.global_rank + self.trainer.world_size * torch.arange(len(batch.inputs), device=self.device)
        return place + (numbers << 16)  # the layers add numbers below 2**16

    def _loss_is_due(self, batch_idx: int) -> bool:
        """Whether a row of metrics.csv needs the loss of this batch, or the last line of the progress."""
        if self.trainer.is_last_batch:
            return True
        interval, step = self.trainer.log_every_n_steps, self.trainer.global_step + 1  # type: ignore[attr-defined]
        ends_step = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0
        return ends_step and (step == self.total_steps or bool(interval and step % interval == 0))

    def _sum_over_processes(self, value: Tensor) -> Tensor:
        if self.trainer.world_size > 1:
            value = value.to(self.device, copy=True)
            dist.all_reduce(value)  # Lightning's `reduce` would add a barrier
        return value

    def on_train_epoch_start(self) -> None:  # not called if a resumed run continues inside an epoch
        self.epoch_sums.zero_()

    def epoch_loss(self) -> float:
        """The mean loss per target in this epoch so far. All processes must call it."""
        return float(self._sum_over_processes(self.epoch_sums[0]) / self.epoch_sums[1])

    def on_train_epoch_end(self) -> None:
        self.log("train/epoch_loss", self.epoch_loss(), sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["epoch_sums"] = torch.stack([self._sum_over_processes(self.epoch_sums[0]), self.epoch_sums[1]]).cpu()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "epoch_sums" in checkpoint:  # checkpoints of `convert` have none
            self.epoch_sums = checkpoint["epoch_sums"]
            if self.global_rank:
                self.epoch_sums[0] = 0  # the first process has the sum of all

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        # Lightning refuses to clip for fused optimizers in mixed precision, because of fp16. We do not use fp16.
        if gradient_clip_val is not None:
            norm = nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)
            if self.squares is not None:
                self.squares.scale((gradient_clip_val / (norm + 1e-6)).clamp(max=1.0))

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad()  # Lightning alone would keep the old gradients during the next forward pass

    # -------------------------------------------------------------------------------------------- validation

    def on_validation_epoch_start(self) -> None:
        # The total loss and the number of the counted targets, then of the words (not padding, [UNK] or [END]).
        self.validation_sums = torch.zeros(4, dtype=torch.float64)

    def on_validation_epoch_end(self) -> None:
        sums = self._sum_over_processes(self.validation_sums)
        loss, word_loss = sums[0] / sums[1], sums[2] / sums[3]  # word_loss is NaN if no target is a known word
        values = {"val/loss": loss, "val/perplexity": loss.exp()}
        values |= {"val/word_loss": word_loss, "val/word_perplexity": word_loss.exp()}
        self.log_dict(values, sync_dist=True)
