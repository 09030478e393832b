"""Weights as 8-bit and 16-bit integers, for the offline page.

Each row of a matrix has its own fp32 scale: weight = integer * scale. Vectors stay in fp32.

A row of 8-bit integers has errors of up to 0.4 % of its largest weight. Two words can be nearly equally likely, and
then such errors exchange them. So 16 bits are used where they matter and cost little: in the blocks, and in the rows of
the most frequent words. `benchmarks/page.py` measures how often the ten likeliest words are those of the fp32 weights.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from minigpt_pl.model import MiniGPT

LONG_ROWS = 4_000  # rows with 16 bits, of the token embedding and of the output layer: the most frequent words
ALIGNMENT = 4  # bytes; JavaScript needs it for arrays of fp32


def pack(network: MiniGPT) -> tuple[dict[str, dict[str, Any]], bytes]:
    """The weights as bytes, and where each is: name -> `shape`, `start` in bytes, `wide`: the rows with 16 bits.

    A matrix is stored as fp32 scales, 16-bit rows and 8-bit rows. If the embeddings are tied, `output.weight` is left
    out. All numbers are little-endian.
    """
    index: dict[str, dict[str, Any]] = {}
    packed = bytearray()
    for name, parameter in network.named_parameters():  # a tied weight has one name
        weight = parameter.detach().float().cpu()
        index[name] = {"shape": list(weight.shape), "start": len(packed)}
        if weight.dim() == 1:
            parts = [weight.numpy()]
        else:
            wide = LONG_ROWS if len(weight) == network.vocab_size else len(weight)
            wide = index[name]["wide"] = min(wide, len(weight))
            integers, scales = _round(weight, wide)
            parts = [scales, integers[:wide].astype("<i2"), integers[wide:].astype("<i1")]
        for part in parts:
            packed += part.tobytes()
        packed += bytes(-len(packed) % ALIGNMENT)
    return index, bytes(packed)


def unpack(index: dict[str, dict[str, Any]], packed: bytes) -> dict[str, Tensor]:
    """The inverse of `pack`: name -> the rounded weight in fp32, as the page computes with it."""
    weights = {}
    for name, entry in index.items():
        rows, start = entry["shape"][0], entry["start"]
        values = np.frombuffer(packed, "<f4", rows, start)
        if "wide" in entry:
            columns, wide, start = entry["shape"][1], entry["wide"], start + 4 * rows
            long = np.frombuffer(packed, "<i2", wide * columns, start).reshape(wide, columns)
            short = np.frombuffer(packed, "<i1", (rows - wide) * columns, start + 2 * wide * columns)
            integers = np.concatenate([long, short.reshape(rows - wide, columns)], dtype=np.float32)
            values = integers * values[:, None]
        weights[name] = torch.tensor(values)
    return weights


def _round(weight: Tensor, wide: int) -> tuple[np.ndarray, np.ndarray]:
    """Integers (rows, columns) and scales (rows,) in fp32."""
    largest = torch.full((len(weight),), 127.0)
    largest[:wide] = 32767
    scales = weight.abs().amax(dim=1).clamp(min=1e-30) / largest  # (rows,)
    return (weight / scales[:, None]).round().numpy(), scales.numpy()
