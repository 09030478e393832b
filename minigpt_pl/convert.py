"""python -m minigpt_pl.convert: import the notebook's Keras model as a run folder, or export a run."""

import dataclasses
import logging
import sys
from pathlib import Path
from typing import Any

from minigpt_pl import runs
from minigpt_pl.cli import app
from minigpt_pl.config import ConvertConfig, TrainConfig
from minigpt_pl.errors import InputError
from minigpt_pl.files import atomic_write, read_text, write_text
from minigpt_pl.tokenizer import (
    END,
    NOTEBOOK,
    PADDING,
    UNKNOWN,
    build_tokenizer,
    fingerprint,
    list_vocabulary,
    rules_of,
    split_words,
)

log = logging.getLogger(__name__)


def main() -> None:
    app.run("convert", convert)


def convert(config: ConvertConfig) -> Path:
    """Import (`from_keras`) or export (`to_keras`, `to_torch`) a model. Returns the new run folder, or the new file.

    Raises:
        InputError: a file is missing or contains another model, or the files do not belong together.
    """
    if config.from_keras is not None and config.vocabulary is not None:
        return _import(config, Path(config.from_keras), Path(config.vocabulary))
    if config.to_torch is not None:
        return _join(config, Path(config.to_torch))
    return _export(config, Path(config.to_keras or ""))


def read_vocabulary(path: Path, size: int) -> list[str]:
    """The words of a Keras vocabulary, and `[END]`. It takes the one logit that the notebook does not use.

    Args:
        path: a file with one word per line. The first is empty (padding), the second is `[UNK]`.
        size: number of entries including `[END]`: the model's number of logits.

    Raises:
        InputError: the file cannot be read, or is not the vocabulary of a model of this size.
    """
    remedy = "write vectorize_layer.get_vocabulary() of this model to it, one word per line"
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise InputError(f"vocabulary={path}: cannot be read ({error}); {remedy}, in UTF-8") from error
    # Not splitlines(): it also splits at U+0085 and U+2028, which the notebook keeps inside words.
    words = text.removesuffix("\n").split("\n")
    if words[:2] != [PADDING, UNKNOWN]:
        raise InputError(
            f"vocabulary={path}: must begin with an empty line (padding) and {UNKNOWN}, not {words[:2]}; {remedy}"
        )
    if len(words) != size - 1:
        raise InputError(
            f"vocabulary={path}: has {len(words):,} entries; a model with {size:,} logits has {size - 1:,}; {remedy}"
        )
    seen: dict[str, int] = {}
    for line, word in enumerate(words, start=1):
        if (first := seen.setdefault(word, line)) != line:
            raise InputError(f"vocabulary={path}: line {line} repeats line {first} ({word!r}); {remedy}")
        if line > 2 and split_words(word) != [word]:
            raise InputError(f"vocabulary={path}: line {line} ({word!r}) is not one word of the notebook; {remedy}")
    return [*words, END]


def _import(config: ConvertConfig, source: Path, vocabulary: Path) -> Path:
    import yaml

    from minigpt_pl.keras_weights import read_keras

    output_dir = Path(config.output_dir)
    if config.run_name is not None and (output_dir / config.run_name / runs.RECORD).exists():
        raise InputError(f"run_name={config.run_name}: {output_dir / config.run_name} exists; choose another name")
    model = read_keras(source)
    words = read_vocabulary(vocabulary, model.arguments["vocab_size"])

    # `train resume=` continues with these overrides: the notebook's training, with the sizes of this model.
    overrides = ["experiment=keras", *(f"model.{name}={value}" for name, value in model.arguments.items())]
    settings = app.to_settings(app.compose("train", overrides))
    folder = runs.make_run_folder(output_dir, config.run_name, "keras", command=sys.argv, overrides=overrides)
    tokenizer = build_tokenizer(words)
    tokenizer.save(str(folder / "tokenizer.json"))
    _save_checkpoint(folder / "checkpoints" / "last.ckpt", settings, model.state_dict, fingerprint(tokenizer))
    write_text(folder / "config.yaml", yaml.safe_dump(dataclasses.asdict(settings), sort_keys=False))
    runs.update_record(folder, status="finished", epochs=0, steps=0, **{runs.IMPORTED_FROM: str(source)})
    log.info("Run: %s (%s)", folder, ", ".join(f"{name} {value}" for name, value in model.arguments.items()))
    return folder


def _save_checkpoint(path: Path, settings: TrainConfig, weights: dict[str, Any], tokenizer: str) -> None:
    """Write the parts of a Lightning checkpoint that `Trainer.fit(ckpt_path=...)` needs to start with these weights."""
    import lightning

    from minigpt_pl.training.module import MiniGPTModule

    module = MiniGPTModule(
        model=dataclasses.asdict(settings.model),
        optimizer=dataclasses.asdict(settings.optimizer),
        schedule=dataclasses.asdict(settings.schedule),
        total_steps=1,  # a resumed run counts its own steps
        end_id=None,
        loss_on_padding=settings.data.loss_on_padding,
        seed=settings.seed,
    )
    module.model.load_state_dict(weights)
    contents = {"epoch": 0, "global_step": 0, "pytorch-lightning_version": lightning.__version__}
    # Lightning needs these two. With empty lists a resumed run uses the learning rate of its own settings.
    contents |= {"optimizer_states": [], "lr_schedulers": [], "TextDataModule": {"tokenizer": tokenizer}}
    contents |= {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
    path.parent.mkdir()
    _write(path, contents)


def _write(path: Path, contents: dict[str, Any]) -> None:
    import torch

    with atomic_write(path) as temporary:
        torch.save(contents, temporary)


def _join(config: ConvertConfig, target: Path) -> Path:
    """Write the checkpoint of a run, sharded or not, as one file. It can be resumed, too."""
    from minigpt_pl.checkpoints import choose_checkpoint, read_whole_checkpoint

    _check_new("to_torch", target)
    checkpoint = choose_checkpoint(Path(config.output_dir), config.run)
    contents = read_whole_checkpoint(checkpoint)
    contents.pop("files", None)
    _write(target, contents)
    log.info("Wrote %s from %s", target, checkpoint)
    return target


def _check_new(name: str, path: Path) -> None:
    if path.exists():
        raise InputError(f"{name}={path}: exists; choose another name, or remove it")
    if not path.parent.is_dir():
        raise InputError(f"{name}={path}: there is no folder {path.parent}; create it first")


def _export(config: ConvertConfig, target: Path) -> Path:
    from minigpt_pl.checkpoints import choose_checkpoint
    from minigpt_pl.keras_weights import write_keras
    from minigpt_pl.text_model import load

    vocabulary = target.with_name("vocab.txt") if config.vocabulary is None else Path(config.vocabulary)
    for name, path in {"to_keras": target, "vocabulary": vocabulary}.items():
        _check_new(name, path)
    model = load(choose_checkpoint(Path(config.output_dir), config.run))
    if (rules := rules_of(model.tokenizer)) != NOTEBOOK:
        raise InputError(
            f"run={model.checkpoint}: Keras's TextVectorization cannot split text as {rules}; use `export transformers`"
        )
    write_keras(target, model.network)
    words = list_vocabulary(model.tokenizer)[:-1]  # without [END], which Keras does not know
    write_text(vocabulary, "\n".join(words) + "\n")
    log.info("Wrote %s and %s from %s", target, vocabulary, model.checkpoint)
    return target


if __name__ == "__main__":
    main()
