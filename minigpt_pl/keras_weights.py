"""Reads and writes the weights of the notebook's Keras model. Needs h5py, but not Keras.

Keras 3 stores weights in an HDF5 file, with one group per layer. A `.keras` file is a zip that contains it:

    layers/token_and_position_embedding/token_emb/vars/0
    layers/transformer_block/att/query_dense/vars/0 (kernel), vars/1 (bias)
    layers/dense/vars/0, vars/1

The group of a layer has the name of its class. A class may have another name than in the
notebook, so we recognise a layer by the names of the arrays in its group.
"""

import io
import json
import math
import re
import textwrap
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minigpt_pl.errors import InputError
from minigpt_pl.files import atomic_write
from minigpt_pl.model import MiniGPT

_MAX_RATIO = 100  # of the sizes of unpacked and packed weights; random numbers hardly shrink
_REMEDY = "give the notebook's model, saved by Keras 3 as .keras or .weights.h5"

Arrays = Mapping[str, tuple[str, str]]


def _arrays(*parts: tuple[str, ...]) -> Arrays:
    """Make `{place in the group of the Keras layer: (name of our parameter, axes)}`.

    Args:
        parts: the place of a part in the layer's group, the name of our module, and the axes of `vars/0` and `vars/1`.
            V vocabulary, L length, D width, H heads, K head width, F hidden width. `in>out` marks a kernel, which
            PyTorch stores as (out, in).
    """
    return {
        f"{place}vars/{number}": (f"{module}.{'bias' if number else 'weight'}", axes)
        for place, module, *all_axes in parts
        for number, axes in enumerate(all_axes)
    }


_EMBEDDINGS = _arrays(("token_emb/", "token_embedding", "VD"), ("pos_emb/", "position_embedding", "LD"))
_BLOCK = _arrays(
    ("att/query_dense/", "attention.query", "D>HK", "HK"),
    ("att/key_dense/", "attention.key", "D>HK", "HK"),
    ("att/value_dense/", "attention.value", "D>HK", "HK"),
    ("att/output_dense/", "attention.output", "HK>D", "D"),
    ("layernorm1/", "attention_norm", "D", "D"),
    ("ffn/layers/dense/", "feed_forward.0", "D>F", "F"),
    ("ffn/layers/dense_1/", "feed_forward.2", "F>D", "D"),
    ("layernorm2/", "feed_forward_norm", "D", "D"),
)
_OUTPUT = _arrays(("", "output", "D>V", "V"))
_KINDS = (_EMBEDDINGS, _BLOCK, _OUTPUT)

# Axis -> argument of MiniGPT.
_ARGUMENTS = dict(V="vocab_size", L="max_length", D="embed_dim", H="num_heads", K="head_dim", F="feed_forward_dim")


class KerasModel(NamedTuple):
    """The contents of a Keras file.

    Attributes:
        arguments: those of `MiniGPT`. `dropout` is the common rate of all blocks in a `.keras` file, else 0.1.
        state_dict: the weights for that `MiniGPT`, equal to those in the file bit for bit.
    """

    arguments: dict[str, Any]
    state_dict: dict[str, Tensor]


def read_keras(path: Path) -> KerasModel:
    """Read a `.keras` or `.weights.h5` file of the notebook's model, with any sizes and any number of blocks.

    Raises:
        InputError: the file cannot be read, or contains another model.
    """
    layers, config = _read_layers(path)
    sizes: dict[str, int] = {}
    state: dict[str, Tensor] = {}
    num_blocks = 0
    for name, kind in _recognize(path, layers):
        prefix = f"blocks.{num_blocks}." if kind is _BLOCK else ""
        num_blocks += kind is _BLOCK
        for place, (parameter, axes) in kind.items():
            array = layers[name][place]
            _check_array(path, f"layers/{name}/{place}", array, axes.replace(">", ""), sizes)
            state[prefix + parameter] = _to_torch(array, axes)
    keras_layers = [layer["config"] for layer in config.get("config", {}).get("layers", [])]
    rates = {float(layer["rate"]) for layer in keras_layers if {"rate", "num_heads"} <= layer.keys()}  # of the blocks
    arguments: dict[str, Any] = {argument: sizes[axis] for axis, argument in _ARGUMENTS.items()}
    arguments |= {"num_blocks": num_blocks, "dropout": rates.pop() if len(rates) == 1 else 0.1, "tie_embeddings": False}
    return KerasModel(arguments, state)


def write_keras(path: Path, network: MiniGPT) -> None:
    """Write a `.weights.h5` file for `load_weights` of the notebook's Keras model with the same sizes.

    The notebook's model has two separate matrices for tied embeddings, so the file contains the matrix twice.

    Raises:
        InputError: the notebook's model has no token shift, or the file cannot be written.
    """
    if network.arguments.token_shift:
        raise InputError(
            f"to_keras={path}: the notebook's model has no token shift, and this run has model.token_shift=true;"
            " convert another run"
        )
    state = network.state_dict()
    attention: Any = network.blocks[0].attention
    sizes = {"H": attention.num_heads, "K": attention.head_dim, "F": len(state["blocks.0.feed_forward.0.bias"])}
    sizes["V"], sizes["D"] = state["token_embedding.weight"].shape
    sizes["L"] = network.max_length
    layers = [("token_and_position_embedding", _EMBEDDINGS, "")]
    layers += [(f"transformer_block{f'_{i}' if i else ''}", _BLOCK, f"blocks.{i}.") for i in range(len(network.blocks))]
    layers += [("dense", _OUTPUT, "")]
    try:
        with atomic_write(path) as temporary, _h5py().File(temporary, "w") as file:
            file.create_group("vars")  # for weights outside the layers; Keras 3.3 needs it, even if empty
            for name, kind, prefix in layers:
                for place, (parameter, axes) in kind.items():
                    file[f"layers/{name}/{place}"] = _to_keras(state[prefix + parameter], axes, sizes)
    except OSError as error:
        raise InputError(f"to_keras={path}: cannot be written ({error}); give a file in another folder") from error


def _to_torch(array: np.ndarray, axes: str) -> Tensor:
    if ">" in axes:
        fan_in = math.prod(array.shape[: axes.index(">")])
        array = array.reshape(fan_in, -1).T  # (in..., out...) -> (in, out) -> (out, in)
    elif axes == "HK":
        array = array.reshape(-1)  # (H, K) -> (H*K)
    return torch.from_numpy(np.array(array, dtype=np.float32, order="C"))


def _to_keras(tensor: Tensor, axes: str, sizes: Mapping[str, int]) -> np.ndarray:
    array = tensor.numpy().T if ">" in axes else tensor.numpy()  # (out, in) -> (in, out)
    return np.ascontiguousarray(array).reshape([sizes[axis] for axis in axes.replace(">", "")])


# ------------------------------------------------------------------------------------------- reading a file


def _read_layers(path: Path) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, Any]]:
    """`{layer: {place in its group: array}}`, and the model's configuration (empty for `.weights.h5`)."""
    if not path.is_file():
        raise InputError(f"from_keras={path}: no such file; {_REMEDY}")
    if not path.name.endswith((".keras", ".weights.h5")):
        raise InputError(
            f"from_keras={path}: must end in .keras or .weights.h5; in Keras, model.save('model.keras') writes one"
        )
    h5py, config = _h5py(), {}
    weights: Path | io.BytesIO = path
    layers: dict[str, dict[str, np.ndarray]] = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            layer, _, place = name.partition("/")
            check_size(item.nbytes)
            layers.setdefault(layer, {})[place] = item[()]

    def check_size(size: int) -> None:  # before reading; a small file can claim to hold terabytes
        if size > _MAX_RATIO * path.stat().st_size:
            raise ValueError(f"it would become {size / 1e9:,.1f} GB in memory, over {_MAX_RATIO} times its size")

    try:
        if path.suffix == ".keras":
            with zipfile.ZipFile(path) as archive:
                check_size(sum(archive.getinfo(name).file_size for name in ("config.json", "model.weights.h5")))
                config = json.loads(archive.read("config.json"))
                weights = io.BytesIO(archive.read("model.weights.h5"))
        with h5py.File(weights) as file:
            if "layers" in file:
                file["layers"].visititems(visit)
    except (OSError, KeyError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        reason = textwrap.shorten(str(error), 120, placeholder=" ...")
        raise InputError(f"from_keras={path}: cannot be read ({reason}); {_REMEDY}") from error
    return layers, config


def _h5py() -> Any:
    try:
        import h5py
    except ImportError as error:
        raise InputError("h5py is not installed, and Keras files need it; pip install 'minigpt_pl[keras]'") from error
    return h5py


def _recognize(path: Path, layers: Mapping[str, Mapping[str, np.ndarray]]) -> list[tuple[str, Arrays]]:
    """The layers that have weights, with their kinds: embeddings, blocks in their order, output."""
    recognized = [(name, kind) for name, arrays in layers.items() for kind in _KINDS if arrays.keys() == kind.keys()]
    if unknown := layers.keys() - dict(recognized).keys():
        raise InputError(
            f"from_keras={path}: the notebook has no layer like {min(unknown)}"
            f" (it has TokenAndPositionEmbedding, TransformerBlock and Dense); {_REMEDY}"
        )
    # transformer_block, transformer_block_1, ..., transformer_block_10
    recognized.sort(key=lambda layer: int((re.findall(r"_(\d+)$", layer[0]) or [0])[0]))
    embeddings, blocks, outputs = ([layer for layer in recognized if layer[1] is kind] for kind in _KINDS)
    if len(embeddings) != 1 or not blocks or len(outputs) != 1:
        raise InputError(
            f"from_keras={path}: holds {len(embeddings)} embedding, {len(blocks)} Transformer and {len(outputs)} output"
            f" layers, but needs 1, 1 or more, and 1; {_REMEDY}"
        )
    return embeddings + blocks + outputs


def _check_array(path: Path, where: str, array: np.ndarray, axes: str, sizes: dict[str, int]) -> None:
    """Store the size of each new axis in `sizes`. Known axes must have the stored size."""
    if array.dtype.kind != "f" or array.dtype.itemsize > 4:
        raise InputError(f"from_keras={path}: {where} is {array.dtype}, not float32; train and save it in float32")
    if array.ndim == len(axes):
        for axis, size in zip(axes, array.shape, strict=True):
            sizes.setdefault(axis, size)
    expected = tuple(sizes.get(axis, axis) for axis in axes)
    if array.shape != expected:
        raise InputError(
            f"from_keras={path}: {where} has shape {array.shape}, but the arrays before it need {expected}; {_REMEDY}"
        )
