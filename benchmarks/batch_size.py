"""The gradient noise scale: up to which batch size does a larger batch save steps?

    python benchmarks/batch_size.py CHECKPOINT... [--batches 64]

Run it in the folder where the run was trained. It computes the simple noise scale of McCandlish et al. (2018,
arXiv 1812.06162, appendix A.1) from the gradients of many small batches. With batches below this size, twice the
sequences need about half the steps. Above it, they save less and less. The scale grows during a training, so give
several checkpoints.
"""

import argparse
from pathlib import Path

import torch

from minigpt_pl import load
from minigpt_pl.data.batches import BatchLoader, Sequences
from minigpt_pl.data.corpus import open_run_corpus
from minigpt_pl.tokenizer import PADDING_ID

SIZE = 32  # sequences per small batch


def noise_scale(checkpoint: Path, batches: int) -> float:
    """Sequences per batch at which the noise of the gradient is as large as the gradient."""
    model = load(checkpoint)
    data, corpus = open_run_corpus(checkpoint.parent.parent, model.tokenizer, None)
    length, ignored = model.network.max_length, None if data.loss_on_padding else PADDING_ID
    sequences = Sequences(corpus.train, length, data.cut, data.end_token, data.loss_on_padding)
    squares = 0.0  # sum of the squared norms of the gradients
    parameters = list(model.network.parameters())
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for batch in BatchLoader(sequences, SIZE, seed=0, max_batches=batches):
        loss = model.network.loss(batch.inputs, batch.targets, ignored) / batch.num_targets
        gradients = torch.autograd.grad(loss, parameters)
        squares += sum(float(gradient.square().sum()) for gradient in gradients)
        torch._foreach_add_(total, gradients)
    small, large = squares / batches, sum(float((sum_ / batches).square().sum()) for sum_ in total)
    squared_gradient = (batches * large - small) / (batches - 1)  # without the noise that is left in the mean
    variance = (small - squared_gradient) * SIZE  # of the gradient of one sequence
    return variance / squared_gradient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--batches", type=int, default=64, help=f"batches of {SIZE} sequences")
    arguments = parser.parse_args()
    for checkpoint in arguments.checkpoints:
        step = torch.load(checkpoint, weights_only=True)["global_step"]
        scale = noise_scale(checkpoint, arguments.batches)
        print(f"{checkpoint}: step {step}, noise scale {scale:,.0f} sequences", flush=True)


if __name__ == "__main__":
    main()
