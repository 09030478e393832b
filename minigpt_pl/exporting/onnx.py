"""A model as an ONNX file, with a script that samples from it. The folder works without this package."""

import json
import logging
import math
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt_pl.cpu.linear import inference_without_autocast
from minigpt_pl.data.corpus import open_run_corpus
from minigpt_pl.errors import InputError
from minigpt_pl.exporting import require
from minigpt_pl.generation.prompts import controls_on_ids
from minigpt_pl.model import MiniGPT
from minigpt_pl.text_model import TextModel
from minigpt_pl.tokenizer import PADDING_ID, portable

MODEL = "model.onnx"
SCRIPT = Path(__file__).with_name("onnx_sample.py")
TOLERANCE = 1e-4  # of the logits, relative to the largest one if that is above 1
MAX_BYTES = 1_900_000_000  # of the weights in one ONNX file; more go to a second file
DOCUMENTS, BATCH = 500, 8  # that measure the perplexity: all, and at once
USAGE = """\
```bash
pip install onnxruntime tokenizers numpy
python sample.py "this movie is"
```

`model.onnx` has the input `ids`, (B, L) int64 token ids, and the output `logits`, (B, L, V). All texts of a batch have
the same length, at most `max_length`. The metadata of the file contain `max_length`, `end_id` and `banned_ids`.
"""


def write_model(folder: Path, model: TextModel) -> None:
    """Write the ONNX file, the tokenizer and the script into `folder`. onnxruntime must compute the same logits.

    Raises:
        InputError: the extra `export` is missing, or onnxruntime computes other logits.
    """
    require("onnx", "onnxscript", "onnxruntime")
    network, controls = model.network, controls_on_ids(model, {})[0]
    settings = {"max_length": network.max_length, "end_id": controls.end_id, "banned_ids": [*controls.banned_ids]}
    weight_bytes = sum(weight.nbytes for weight in network.state_dict().values())
    with _quiet():
        program = _trace(network)
    program.model.metadata_props.update({name: json.dumps(value) for name, value in settings.items()})
    program.save(folder / MODEL, external_data=weight_bytes > MAX_BYTES)
    _check(folder / MODEL, network)
    portable(model.tokenizer).save(str(folder / "tokenizer.json"))
    shutil.copyfile(SCRIPT, folder / "sample.py")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without log lines and warnings about each node of the network."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(logging.NOTSET)


def _trace(network: MiniGPT) -> Any:
    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, ids: Tensor) -> Tensor:
            logits: Tensor = self.network(ids)[0]
            return logits

    example = torch.zeros(2, min(2, network.max_length), dtype=torch.int64)  # (B, L)
    # PyTorch treats a dimension of 1 as fixed.
    length = torch.export.Dim("L", max=network.max_length) if network.max_length > 1 else None
    return torch.onnx.export(
        Logits().eval(),
        (example,),
        input_names=["ids"],
        output_names=["logits"],
        dynamic_shapes={"ids": {0: torch.export.Dim("B"), 1: length}},
        dynamo=True,
        verbose=False,
    )


def _check(path: Path, network: MiniGPT) -> None:
    """Compare the logits for one text and for three, of one word and of the longest context."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path))
    generator = torch.Generator().manual_seed(0)
    for texts, length in ((1, 1), (3, 1), (1, network.max_length), (3, network.max_length)):
        ids = torch.randint(network.vocab_size, (texts, length), generator=generator)  # (B, L)
        with inference_without_autocast(network):
            expected = network(ids)[0]  # (B, L, V)
        computed = torch.from_numpy(session.run(None, {"ids": ids.numpy()})[0])
        difference = float((computed - expected).abs().max() / expected.abs().max().clamp(min=1))
        if not difference <= TOLERANCE:
            raise InputError(
                f"onnxruntime {onnxruntime.__version__}: computes logits that differ by {difference:.1g}; install"
                " another version of it"
            )


def quantize(folder: Path, model: TextModel, run_folder: Path, source: str | None) -> dict[str, str]:
    """Replace the file of `write_model` by one with 8-bit weights. Returns its cost, as texts by label.

    Args:
        run_folder, source: as in `open_run_corpus`. The held-out text of the run measures the cost.

    Raises:
        InputError: the text of the run cannot be found.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    path, small = folder / MODEL, folder / f"int8-{MODEL}"
    label = f"Perplexity of the first {DOCUMENTS} held-out documents"
    corpus = open_run_corpus(run_folder, model.tokenizer, source)[1]
    with _quiet():
        quantize_dynamic(path, small, weight_type=QuantType.QInt8, per_channel=True)
    documents: list[np.ndarray] = []
    if corpus.validation is not None:
        end = -1 if model.end_id is None else None  # the corpus has [END] after each document
        documents = np.split(corpus.validation.tokens, corpus.validation.offsets[1:-1])[:DOCUMENTS]
        documents = [document[:end] for document in documents if len(document[:end]) > 1]
    cost = "not measured, because the run has no held-out text"
    if documents:
        before, after = (perplexity(file, documents, model.network.max_length) for file in (path, small))
        cost = f"{before:,.3f} with 32-bit weights, {after:,.3f} with 8-bit weights"
    for file in folder.glob(f"{MODEL}*"):
        file.unlink()
    small.rename(path)
    return {label: cost}


def perplexity(path: Path, documents: Sequence[np.ndarray], max_length: int) -> float:
    """Perplexity of tokens 2 to max_length + 1 of each document, as onnxruntime computes it. 1 or more.

    Args:
        path: a file of `write_model` or `quantize`.
        documents: token ids, at least two per document.
    """
    import onnxruntime

    session, nats, count = onnxruntime.InferenceSession(str(path)), 0.0, 0
    rows = [torch.as_tensor(document[: max_length + 1].astype(np.int64)) for document in documents]
    for start in range(0, len(rows), BATCH):
        ids = nn.utils.rnn.pad_sequence(rows[start : start + BATCH], batch_first=True, padding_value=PADDING_ID)
        logits = torch.from_numpy(session.run(None, {"ids": ids[:, :-1].numpy()})[0])  # (B, L, V)
        targets = ids[:, 1:].flatten()  # (B*L,)
        nats += float(F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=PADDING_ID, reduction="sum"))
        count += int((targets != PADDING_ID).sum())
    return math.exp(nats / count)
