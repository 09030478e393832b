"""FSDP2: the processes share the weights, the gradients and the state of the optimizer."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.tensor import DTensor, distribute_tensor

from minigpt_pl.checkpoints import read_checkpoint
from minigpt_pl.runs import META
from minigpt_pl.sharded_checkpoints import WEIGHT, ShardReader, join, split


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, with the checkpoints of this project.

    Lightning's own writes a checkpoint in place, so a kill damages it. `CheckpointWriter` writes it atomically.
    `MiniGPTModule.configure_model` shards the model.

    Args:
        processes: their number, over all nodes.
    """

    def __init__(self, processes: int):
        super().__init__(data_parallel_size=processes, tensor_parallel_size=1)

    # As for the other strategies: the state dicts of the model and of the optimizer, with a DTensor for each tensor.
    lightning_restore_optimizer = Strategy.lightning_restore_optimizer
    lightning_module_state_dict = Strategy.lightning_module_state_dict
    load_model_state_dict = Strategy.load_model_state_dict
    optimizer_state = Strategy.optimizer_state
    load_optimizer_state_dict = Strategy.load_optimizer_state_dict

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        self.checkpoint_io.save_checkpoint(checkpoint, filepath)  # in all processes

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Each process gets its part of each tensor, from a sharded checkpoint or from one file."""
        path = Path(checkpoint_path)
        weights = Strategy.lightning_module_state_dict(self)
        parameters = [parameter for group in self.optimizers[0].param_groups for parameter in group["params"]]

        def target(name: str) -> DTensor:  # a tensor of the same sizes and parts
            index, weight = name.split("/")
            found: DTensor = weights[weight] if index == WEIGHT else parameters[int(index)]
            return found

        tensors: dict[str, Tensor]
        if path.is_file():
            contents, whole = split(read_checkpoint(path))
            tensors = {
                name: distribute_tensor(tensor, (part := target(name)).device_mesh, part.placements, src_data_rank=None)
                for name, tensor in whole.items()
            }
        else:
            contents, reader = torch.load(path / META, weights_only=True), ShardReader(path)
            names = reader.read_metadata().state_dict_metadata
            tensors = {name: torch.empty_like(target(name).detach()) for name in names}
            load(tensors, storage_reader=reader)
        return join(contents, tensors)
