"""The seed's Keras model as a file: which array is which weight, read and written. Needs h5py, not Keras.

Keras 3 stores a model's weights in HDF5, one group a layer, and a `.keras` file is a zip that holds such a file:

    layers/token_and_position_embedding/token_emb/vars/0
    layers/transformer_block/att/query_dense/vars/0 (kernel), vars/1 (bias)
    layers/dense/vars/0, vars/1

Groups are named after classes and attributes, not after the layers' automatic names (`transformer_block_3`). A layer
is recognised by the attributes of the seed's classes inside its group, so the classes may be named otherwise.
"""

import io
import json
import os
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minigpt_pl.errors import InputError
from minigpt_pl.model import MiniGPT

_WEIGHTS_IN_ZIP, _CONFIG_IN_ZIP = "model.weights.h5", "config.json"
_ASK_FOR_SEED_MODEL = "give a file of the seed's model, saved by Keras 3 as .keras or .weights.h5"


class _Part(NamedTuple):
    """One weighted part of a layer, in Keras and here.

    Attributes:
        keras: its group inside the layer's.
        ours: its name inside the module that corresponds to the layer.
        arrays: the dimensions of `vars/0`, `vars/1`: V vocabulary, L length, D width, H heads, K head width, F hidden
            width of the feed-forward part. `in>out` is a kernel, which PyTorch keeps as (out, in).
    """

    keras: str
    ours: str
    arrays: tuple[str, ...]


_EMBEDDINGS = (_Part("token_emb/", "token_embedding", ("VD",)), _Part("pos_emb/", "position_embedding", ("LD",)))
_BLOCK = (
    _Part("att/query_dense/", "attention.query", ("D>HK", "HK")),
    _Part("att/key_dense/", "attention.key", ("D>HK", "HK")),
    _Part("att/value_dense/", "attention.value", ("D>HK", "HK")),
    _Part("att/output_dense/", "attention.output", ("HK>D", "D")),
    _Part("layernorm1/", "attention_norm", ("D", "D")),
    _Part("ffn/layers/dense/", "feed_forward.0", ("D>F", "F")),
    _Part("ffn/layers/dense_1/", "feed_forward.2", ("F>D", "D")),
    _Part("layernorm2/", "feed_forward_norm", ("D", "D")),
)
_OUTPUT = (_Part("", "output", ("D>V", "V")),)

_ARGUMENTS = {  # of MiniGPT
    "V": "vocab_size",
    "L": "max_length",
    "D": "embed_dim",
    "H": "num_heads",
    "K": "head_dim",
    "F": "feed_forward_dim",
}


@dataclass(frozen=True)
class KerasModel:
    """What a Keras file holds of the model.

    Attributes:
        arguments: of `MiniGPT`. The dropout is the seed's 0.1 where the file does not tell it (`.weights.h5`).
        state_dict: of that MiniGPT, the file's bits.
    """

    arguments: dict[str, Any]
    state_dict: dict[str, Tensor]


def read_keras(path: Path) -> KerasModel:
    """Read a `.keras` or `.weights.h5` file of the seed's model, of any sizes and any number of blocks.

    Raises:
        InputError: the file cannot be read, or is not of the seed's model.
    """
    layers, config = _read_layers(path)
    dimensions: dict[str, int] = {}
    state: dict[str, Tensor] = {}
    num_blocks = 0
    for name, parts in _recognised(path, layers):
        prefix = ""
        if parts is _BLOCK:
            prefix = f"blocks.{num_blocks}."
            num_blocks += 1
        for part, number, axes in _arrays(parts):
            where = f"layers/{name}/{part.keras}vars/{number}"
            array = layers[name][f"{part.keras}vars/{number}"]
            _check_array(path, where, array, axes.replace(">", ""), dimensions)
            state[f"{prefix}{part.ours}.{_parameter(number)}"] = _to_torch(array, axes)
    arguments = {argument: dimensions[letter] for letter, argument in _ARGUMENTS.items()}
    arguments |= {"num_blocks": num_blocks, "dropout": _dropout(config), "tie_embeddings": False}
    return KerasModel(arguments, state)


def write_keras(path: Path, network: MiniGPT) -> None:
    """Write a `.weights.h5` for `model.load_weights` of the seed's Keras model of the same sizes.

    A network with tied embeddings is written with two equal matrices, as the seed's model has two.

    Raises:
        InputError: it cannot be written.
    """
    sizes = {
        "H": network.blocks[0].attention.num_heads,
        "K": network.blocks[0].attention.head_dim,
    }
    state = network.state_dict()
    layers = [("token_and_position_embedding", _EMBEDDINGS, "")]
    layers += [(f"transformer_block{f'_{i}' if i else ''}", _BLOCK, f"blocks.{i}.") for i in range(len(network.blocks))]
    layers += [("dense", _OUTPUT, "")]
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with _h5py().File(aside, "w") as file:
            file.create_group("vars")  # the model's own, of which there are none; Keras 3.3 asks for it
            for name, parts, prefix in layers:
                for part, number, axes in _arrays(parts):
                    tensor = state[f"{prefix}{part.ours}.{_parameter(number)}"]
                    file[f"layers/{name}/{part.keras}vars/{number}"] = _to_keras(tensor, axes, sizes)
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise InputError(f"to_keras={path}: cannot be written ({error}); give a file in a folder of yours") from error


def _arrays(parts: tuple[_Part, ...]) -> Iterator[tuple[_Part, int, str]]:
    for part in parts:
        for number, axes in enumerate(part.arrays):
            yield part, number, axes


def _parameter(number: int) -> str:
    return ("weight", "bias")[number]


def _to_torch(array: np.ndarray, axes: str) -> Tensor:
    if ">" in axes:
        inner = int(np.prod(array.shape[: axes.index(">")]))
        array = array.reshape(inner, -1).T  # (in..., out...) -> (out, in)
    elif axes == "HK":
        array = array.reshape(-1)
    return torch.from_numpy(np.array(array, dtype=np.float32, order="C"))


def _to_keras(tensor: Tensor, axes: str, sizes: Mapping[str, int]) -> np.ndarray:
    array = tensor.numpy().T if ">" in axes else tensor.numpy()  # (out, in) -> (in, out)
    if "HK" in axes:
        heads = (sizes["H"], sizes["K"])
        shape = {"D>HK": (array.shape[0], *heads), "HK>D": (*heads, array.shape[-1]), "HK": heads}[axes]
        array = array.reshape(shape)
    return np.ascontiguousarray(array)


# ---------------------------------------------------------------------------------------- what the file holds


def _read_layers(path: Path) -> tuple[dict[str, dict[str, np.ndarray]], dict]:
    """`{layer: {place inside it: array}}` and the model's configuration (empty for `.weights.h5`)."""
    if not path.is_file():
        raise InputError(f"from_keras={path}: no such file; {_ASK_FOR_SEED_MODEL}")
    if not path.name.endswith((".keras", ".weights.h5")):
        raise InputError(
            f"from_keras={path}: must end in .keras or .weights.h5; in Keras, model.save('model.keras') writes one"
        )
    h5py, config, weights = _h5py(), {}, path
    try:
        if path.suffix == ".keras":
            with zipfile.ZipFile(path) as archive:
                config = json.loads(archive.read(_CONFIG_IN_ZIP))
                weights = io.BytesIO(archive.read(_WEIGHTS_IN_ZIP))
        with h5py.File(weights) as file:
            stored = file.get("layers", {})
            layers = {name: _read_arrays(stored[name], h5py) for name in stored}
    except (OSError, KeyError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"from_keras={path}: cannot be read ({reason}); {_ASK_FOR_SEED_MODEL}") from error
    return layers, config


def _read_arrays(layer: Any, h5py: ModuleType) -> dict[str, np.ndarray]:
    arrays = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            arrays[name] = item[()]

    layer.visititems(visit)
    return arrays


def _h5py() -> ModuleType:
    try:
        import h5py
    except ImportError as error:
        raise InputError("h5py is not installed, and Keras files need it; pip install 'minigpt_pl[keras]'") from error
    return h5py


def _recognised(path: Path, layers: Mapping[str, Mapping]) -> list[tuple[str, tuple[_Part, ...]]]:
    """The layers with weights and what each is: embeddings, blocks in their order, output."""
    kinds = []
    for name, arrays in layers.items():
        if not arrays:
            continue  # the input
        fitting = [
            parts
            for parts in (_EMBEDDINGS, _BLOCK, _OUTPUT)
            if arrays.keys() == {f"{part.keras}vars/{number}" for part, number, _ in _arrays(parts)}
        ]
        if not fitting:
            raise InputError(
                f"from_keras={path}: its layer {name} is none of the seed's"
                f" (TokenAndPositionEmbedding, TransformerBlock, Dense); {_ASK_FOR_SEED_MODEL}"
            )
        kinds.append((name, fitting[0]))
    counts = [sum(parts is kind for _, parts in kinds) for kind in (_EMBEDDINGS, _BLOCK, _OUTPUT)]
    if counts[0] != 1 or counts[1] < 1 or counts[2] != 1:
        raise InputError(
            f"from_keras={path}: holds {counts[0]} embedding, {counts[1]} Transformer and {counts[2]} output layers"
            f" instead of one of each (or more blocks); {_ASK_FOR_SEED_MODEL}"
        )

    def order(item: tuple[str, tuple[_Part, ...]]) -> tuple[int, int]:
        number = re.search(r"_(\d+)$", item[0])  # transformer_block, transformer_block_1, ..., transformer_block_10
        return (_EMBEDDINGS, _BLOCK, _OUTPUT).index(item[1]), int(number[1]) if number else 0

    return sorted(kinds, key=order)


def _check_array(path: Path, where: str, array: np.ndarray, axes: str, dimensions: dict[str, int]) -> None:
    """Take over the dimensions met for the first time; those known must agree."""
    if array.dtype.kind != "f" or array.dtype.itemsize > 4:
        raise InputError(f"from_keras={path}: {where} is {array.dtype}, not float32; train and save it in float32")
    if array.ndim == len(axes):
        for letter, size in zip(axes, array.shape, strict=True):
            dimensions.setdefault(letter, size)
    wanted = tuple(dimensions.get(letter, letter) for letter in axes)
    if array.shape != wanted:
        raise InputError(
            f"from_keras={path}: {where} has shape {array.shape} where {wanted} fits the arrays before it;"
            f" {_ASK_FOR_SEED_MODEL}"
        )


def _dropout(config: dict) -> float:
    """The blocks' `rate`, which Keras keeps with the other arguments of the seed's `TransformerBlock`."""
    layers = config.get("config", {}).get("layers", [])
    rates = {layer["config"]["rate"] for layer in layers if {"rate", "num_heads"} <= layer["config"].keys()}
    return float(rates.pop()) if len(rates) == 1 else 0.1
