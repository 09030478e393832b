"""Expected efficiency of several GPUs, computed from sizes and rates. Nothing is measured.

    python benchmarks/scaling.py [--tflops 400] [--node 8] [--in-node 300] [--between-nodes 40] [--latency 10]

The efficiency is the time of the products, divided by the time of the products and of the exchange. All GPUs add their
gradients with a ring: each one sends and receives 2 (N - 1) / N times the bytes. Inside a node this takes 2 (N - 1)
messages, and between nodes twice the logarithm of their number. DDP does most of the exchange during the backward pass.
This computation assumes that it does not, so it gives lower bounds for these rates.
"""

import argparse
import math

from minigpt_pl import MiniGPT

LARGE = {"vocab_size": 50_000, "max_length": 256, "embed_dim": 768, "num_heads": 12, "head_dim": 64}
MODELS = {"notebook": {}, "large": LARGE | {"feed_forward_dim": 3072, "num_blocks": 12}}
BATCHES = {"notebook": (128, 1024, 8192), "large": (128, 512, 2048)}
GPUS = (2, 8, 16, 64, 256, 1024)


def work(model: MiniGPT) -> float:
    """Floating-point operations of one sequence, forward and backward: 6 per weight of a product and token."""
    length = model.max_length
    weights = sum(layer.weight.numel() for layer in model.modules() if type(layer).__name__ == "Linear")
    heads = sum(block.attention.num_heads * block.attention.head_dim for block in model.blocks)
    return 6 * length * (weights + 2 * length * heads)  # two products of the attention, L by L for each head


def exchange(gigabytes: float, gpus: int, options: argparse.Namespace) -> float:
    """Seconds until all GPUs have the sum."""
    inside, nodes = min(gpus, options.node), math.ceil(gpus / options.node)
    seconds = 2 * (inside - 1) / inside * gigabytes / options.in_node + 2 * (inside - 1) * options.latency * 1e-6
    if nodes > 1:  # each GPU of a node exchanges its share with those of the other nodes
        seconds += 2 * (nodes - 1) / nodes * gigabytes / inside / options.between_nodes
        seconds += 2 * math.ceil(math.log2(nodes)) * options.latency * 1e-6
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tflops", type=float, default=400, help="of one GPU in bf16, as reached in training")
    parser.add_argument("--node", type=int, default=8, help="GPUs of a node")
    parser.add_argument("--in-node", type=float, default=300, help="GB/s of a GPU inside a node")
    parser.add_argument("--between-nodes", type=float, default=40, help="GB/s of a GPU between nodes")
    parser.add_argument("--latency", type=float, default=10, help="microseconds of a message")
    options = parser.parse_args()
    print(
        "| model | sequences per step | ms per step on one GPU | MB of gradients | " + " | ".join(map(str, GPUS)) + " |"
    )
    print("|---" * (len(GPUS) + 4) + "|")
    for name, sizes in MODELS.items():
        model = MiniGPT(**sizes)
        gigabytes = 4e-9 * sum(parameter.numel() for parameter in model.parameters())
        if name == "notebook":  # the squares of the token embedding (optimizer.second_moment)
            gigabytes += 4e-9 * model.token_embedding.weight.numel()
        for batch in BATCHES[name]:
            one = batch * work(model) / options.tflops / 1e12
            shares = [
                f"{one / gpus / (one / gpus + exchange(gigabytes, gpus, options)):.0%}" if gpus <= batch else "-"
                for gpus in GPUS
            ]
            cells = [name, f"{batch:,}", f"{1e3 * one:.1f}", f"{1e3 * gigabytes:.0f}", *shares]
            print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
