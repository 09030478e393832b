"""python -m minigpt_pl.convert: a model of the seed's Keras code becomes a run folder, and back."""

import dataclasses
import logging
import sys
from pathlib import Path

from minigpt_pl import runs
from minigpt_pl.cli import app
from minigpt_pl.config import ConvertConfig, TrainConfig
from minigpt_pl.errors import InputError
from minigpt_pl.files import write_text
from minigpt_pl.tokenizer import END, PADDING, UNKNOWN, build_tokenizer, list_vocabulary, split_words

log = logging.getLogger(__name__)


def main() -> None:
    app.run("convert", ConvertConfig, convert)


def convert(config: ConvertConfig) -> Path:
    """Import (`from_keras`) or export (`to_keras`).

    Returns:
        The run folder made, or the file written.

    Raises:
        InputError: a file is missing, of another model, or does not fit the other.
    """
    return _import(config) if config.from_keras is not None else _export(config)


def read_vocabulary(path: Path, size: int) -> list[str]:
    """The words of a Keras vocabulary, `[END]` added as the last: it takes the logit that the seed leaves unused.

    Args:
        path: a word a line, first the empty one (padding), then `[UNK]`.
        size: entries wanted, `[END]` included: the model's number of logits.

    Raises:
        InputError: the file cannot be read, or is not the vocabulary of such a model.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"vocabulary={path}: cannot be read ({error}); give a UTF-8 file, a word a line") from error
    # Not splitlines(): it cuts at U+0085 and U+2028 too, which the seed leaves inside words.
    words = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    remedy = "write vectorize_layer.get_vocabulary() of the model's own layer to it, a word a line"
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
        if word in seen:
            raise InputError(f"vocabulary={path}: line {line} repeats line {seen[word]} ({word!r}); {remedy}")
        if line > 2 and split_words(word) != [word]:
            raise InputError(
                f"vocabulary={path}: line {line} ({word!r}) is no single word under the seed's rule; {remedy}"
            )
        seen[word] = line
    return [*words, END]


def _import(config: ConvertConfig) -> Path:
    import yaml

    from minigpt_pl.keras_weights import read_keras

    source, output_dir = Path(config.from_keras), Path(config.output_dir)
    if config.run_name is not None and (output_dir / config.run_name / runs.RECORD).exists():
        raise InputError(f"run_name={config.run_name}: {output_dir / config.run_name} exists; take another name")
    model = read_keras(source)
    vocabulary = read_vocabulary(Path(config.vocabulary), model.arguments["vocab_size"])

    # The command line that a resumed run goes on with: the seed's way of training, at this model's sizes.
    overrides = ["experiment=keras", *(f"model.{name}={value}" for name, value in model.arguments.items())]
    settings = app.to_settings(app.compose("train", overrides))
    folder = runs.make_run_folder(output_dir, config.run_name, "keras")
    build_tokenizer(vocabulary).save(str(folder / "tokenizer.json"))
    _save_checkpoint(folder / "checkpoints" / "last.ckpt", settings, model.state_dict)
    write_text(folder / "config.yaml", yaml.safe_dump(dataclasses.asdict(settings), sort_keys=False))
    runs.update_record(
        folder,
        status="finished",
        overrides=overrides,
        command=sys.argv,
        epochs=0,
        steps=0,
        **{runs.IMPORTED_FROM: str(source)},
    )
    log.info("Run: %s (%s)", folder, ", ".join(f"{name} {value}" for name, value in model.arguments.items()))
    return folder


def _save_checkpoint(path: Path, settings: TrainConfig, weights: dict) -> None:
    """What `Trainer.fit(ckpt_path=...)` needs to begin with these weights, and nothing more."""
    import lightning
    import torch

    from minigpt_pl.training.module import MiniGPTModule

    module = MiniGPTModule(
        model=dataclasses.asdict(settings.model),
        optimizer=dataclasses.asdict(settings.optimizer),
        schedule=dataclasses.asdict(settings.schedule),
        total_steps=1,  # a resumed run counts its own
        end_id=None,
        loss_on_padding=settings.data.loss_on_padding,
        seed=settings.seed,
    )
    module.model.load_state_dict(weights)
    contents = {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": lightning.__version__,
        "state_dict": module.state_dict(),
        # Lightning asks for these two. Empty, they leave the new optimizer as the settings of that day make it; the
        # state of a fresh one would bring today's learning rate with it. Without "loops" it begins at the first epoch.
        "optimizer_states": [],
        "lr_schedulers": [],
        "hyper_parameters": dict(module.hparams),
    }
    path.parent.mkdir(exist_ok=True)
    aside = path.with_name(f".{path.name}")
    torch.save(contents, aside)
    aside.replace(path)


def _export(config: ConvertConfig) -> Path:
    from minigpt_pl.generation.text import load
    from minigpt_pl.keras_weights import write_keras

    for name in ("to_keras", "vocabulary"):
        path = Path(getattr(config, name) or "")
        if path.is_file():
            raise InputError(f"{name}={path}: exists; give another name, or remove it")
        if not path.parent.is_dir():
            raise InputError(f"{name}={path}: there is no folder {path.parent}; make it first")
    target = Path(config.to_keras)
    model = load(runs.choose_checkpoint(Path(config.output_dir), config.run))
    write_keras(target, model.network)
    if config.vocabulary is not None:
        words = list_vocabulary(model.tokenizer)[:-1]  # less [END], which Keras knows nothing of
        write_text(Path(config.vocabulary), "\n".join(words) + "\n")
    log.info("Wrote %s from %s", target, model.checkpoint)
    return target


if __name__ == "__main__":
    main()
