"""From settings to a trained run folder: text, module, Trainer, record."""

import dataclasses
import importlib.util
import logging
import os
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
import yaml
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities import rank_zero_only
from tokenizers import Tokenizer

from minigpt_pl import runs
from minigpt_pl.checkpoints import read_checkpoint
from minigpt_pl.config import ImdbConfig, TrainConfig
from minigpt_pl.cpu.allocator import keep_freed_memory
from minigpt_pl.data.corpus import Corpus
from minigpt_pl.data.datamodule import TextDataModule
from minigpt_pl.errors import InputError
from minigpt_pl.files import write_figure, write_text
from minigpt_pl.generation.prompts import encode_prompts
from minigpt_pl.runs import IMPORTED_FROM
from minigpt_pl.tokenizer import END, UNKNOWN_ID, load_tokenizer
from minigpt_pl.training import loss_curve
from minigpt_pl.training.callbacks import Interrupted
from minigpt_pl.training.module import MiniGPTModule
from minigpt_pl.training.trainer import build_trainer, precision, processes, validates

log = logging.getLogger(__name__)


def fit(config: TrainConfig, name_prefix: str, overrides: list[str], resume_from: Path | None) -> Path:
    """Train into a run folder.

    Args:
        name_prefix: of the run's name, where the settings give none.
        overrides: the command line's settings, kept in the record for a later resume.
        resume_from: a checkpoint in the run folder to go on with.

    Returns:
        The run folder.

    Raises:
        InputError: the text, the machine or the checkpoint does not fit the settings.
        Interrupted: a signal ended it; the last checkpoint is written.
    """
    # What matters of Lightning's lines, we say; its profilers have no other way to print.
    logging.getLogger("lightning.pytorch").setLevel(logging.INFO if config.trainer.profiler else logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch").handlers.clear()  # it would print each line a second time
    first_process = rank_zero_only.rank == 0
    if not first_process:
        logging.getLogger().setLevel(logging.ERROR)
    _quiet_known_warnings()

    keep_freed_memory()
    L.seed_everything(config.seed, verbose=False)
    datamodule = TextDataModule(config, _imported_tokenizer(resume_from))
    module = _build_module(config, datamodule)
    if config.unigram_bias:
        module.model.output.bias.data.copy_(datamodule.target_shares().log())
    if config.trainer.compile:
        for block in module.model.blocks:
            block.compile()  # in place, so that the checkpoint's names stay
    prompts = _prompts(config, datamodule.corpus)
    _check_surroundings(config, datamodule)
    if not validates(config, datamodule):
        log.info("Nothing is held out: there will be no val/loss.")
    if config.find_learning_rate:
        return _find_learning_rate(config, module, datamodule)
    if resume_from is not None:
        folder = resume_from.parent.parent
        if _steps_done(resume_from, folder, module, datamodule) >= module.hparams.total_steps:
            log.info("Nothing is left to do: trainer.max_epochs and trainer.max_steps say when it ends.")
            return folder
    elif first_process:
        begin_again = config.resume == "auto"
        folder = runs.make_run_folder(Path(config.output_dir), config.run_name, name_prefix, begin_again)
    else:
        folder = Path(config.output_dir)  # ModelCheckpoint takes the first process's; nothing else writes here
    lock = runs.lock(folder) if first_process else None
    trainer = build_trainer(config, folder, datamodule, prompts, resume_from)
    if first_process:
        datamodule.corpus.tokenizer.save(str(folder / "tokenizer.json"))
        write_text(folder / "config.yaml", yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))
        runs.update_record(folder, status="running", overrides=overrides, **_circumstances(trainer, datamodule))
        parameters = sum(parameter.numel() for parameter in module.parameters())
        log.info("Run: %s (%s parameters, %s)", folder, f"{parameters:,}", trainer.precision)

    status = "failed"
    try:
        trainer.fit(module, datamodule=datamodule, ckpt_path=resume_from, weights_only=True)
        status = "finished"
    except (Interrupted, KeyboardInterrupt, SystemExit):  # the last: how Lightning answers a second Ctrl-C
        status = "interrupted"
        raise
    finally:
        if first_process:
            runs.update_record(folder, status=status, epochs=trainer.current_epoch, steps=trainer.global_step)
            if (folder / "metrics.csv").exists():
                loss_curve.draw(folder)
            log.info("Run %s: %s after %s steps.", folder, status, trainer.global_step)
            lock.release()
    return folder


def _imported_tokenizer(resume_from: Path | None) -> Tokenizer | None:
    """The words of a run that `convert` made: they came with the model, whatever text it goes on with."""
    if resume_from is None or IMPORTED_FROM not in runs.read_record(resume_from.parent.parent):
        return None
    return load_tokenizer(resume_from.parent.parent / "tokenizer.json")


def _build_module(config: TrainConfig, datamodule: TextDataModule) -> MiniGPTModule:
    tokenizer = datamodule.corpus.tokenizer
    steps_per_epoch = -(-datamodule.batches_per_epoch() // config.trainer.accumulate_grad_batches)
    total_steps = config.trainer.max_epochs * steps_per_epoch
    words = tokenizer.get_vocab_size()
    second_moment = config.optimizer.second_moment
    if second_moment is None:
        fits = config.optimizer.name == "keras_adam" and not config.model.tie_embeddings
        second_moment = "by_occurrence" if fits else "dense"
    if words < config.model.vocab_size:
        log.info("The text has %s different words, so the model has as many logits.", f"{words:,}")
    return MiniGPTModule(
        model=dataclasses.asdict(config.model) | {"vocab_size": words},
        optimizer=dataclasses.asdict(config.optimizer) | {"second_moment": second_moment},
        schedule=dataclasses.asdict(config.schedule),
        total_steps=min(total_steps, config.trainer.max_steps or total_steps),
        end_id=tokenizer.token_to_id(END) if config.data.end_token else None,
        loss_on_padding=config.data.loss_on_padding,
        seed=config.seed,
    )


def _check_surroundings(config: TrainConfig, datamodule: TextDataModule) -> None:
    """What the settings ask of the machine and of the text, before a folder is made.

    Raises:
        InputError: a device, a package or held-out text is missing.
    """
    settings, problems = config.trainer, []
    if settings.accelerator in ("gpu", "cuda") and not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        problems.append(f"trainer.accelerator={settings.accelerator}: PyTorch finds no GPU here; use auto or cpu")
    elif settings.accelerator == "mps" and not torch.backends.mps.is_available():
        problems.append("trainer.accelerator=mps: there is none here; use auto or cpu")
    elif settings.accelerator != "cpu" and torch.cuda.is_available() and settings.devices > torch.cuda.device_count():
        problems.append(f"trainer.devices={settings.devices}: this machine has {torch.cuda.device_count()} GPUs")
    started = processes(settings)
    by_hand = {"MASTER_ADDR", "SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"} & set(os.environ)
    if settings.num_nodes > 1 and not by_hand:
        problems.append(
            f"trainer.num_nodes={settings.num_nodes}: start it with torchrun on each machine, or set it to 1"
        )
    if config.data.batch_size < started["devices"] * started["num_nodes"]:
        problems.append(f"data.batch_size={config.data.batch_size}: must be at least the number of processes")
    if config.logger.name != "csv" and importlib.util.find_spec(config.logger.name) is None:
        extra = config.logger.name
        problems.append(f"logger.name={extra}: not installed; pip install 'minigpt_pl[{extra}]'")
    if config.find_learning_rate and started["devices"] * started["num_nodes"] > 1:
        problems.append(f"trainer.devices={settings.devices}: find_learning_rate=true needs one process; set it to 1")
    if config.find_learning_rate and importlib.util.find_spec("matplotlib") is None:
        problems.append("find_learning_rate=true: draws with matplotlib; pip install 'minigpt_pl[show]'")
    if settings.patience is not None and not validates(config, datamodule):
        problems.append(
            f"trainer.patience={settings.patience}: nothing is held out to watch; set data.validation_share"
        )
    batches = datamodule.batches_per_epoch()
    if settings.val_check_interval is not None and settings.val_check_interval > batches:
        problems.append(
            f"trainer.val_check_interval={settings.val_check_interval}: an epoch has only {batches} batches; lower it"
        )
    if problems:
        raise InputError(*problems)


def _prompts(config: TrainConfig, corpus: Corpus) -> list[str]:
    """The prompts of the TextGenerator, found usable before anything starts."""
    prompts = config.text_generator.prompts
    if not config.text_generator.every_n_epochs:
        return []
    if prompts is None:
        prompts = ["this movie is"] if isinstance(config.data, ImdbConfig) else [_first_known_words(corpus)]
    encode_prompts(corpus.tokenizer, prompts, "text_generator.prompts")
    top_k, words = config.text_generator.top_k, corpus.tokenizer.get_vocab_size()
    if top_k is not None and top_k > words:
        raise InputError(f"text_generator.top_k={top_k}: the text has only {words} words; lower it, or null for all")
    return prompts


def _first_known_words(corpus: Corpus) -> str:
    tokens = corpus.train.tokens[:10_000]
    known = (tokens != UNKNOWN_ID) & (tokens != corpus.tokenizer.token_to_id(END))
    length = 3 if (known[:-2] & known[1:-1] & known[2:]).any() else 1
    start = int((known[:-2] & known[1:-1] & known[2:]).argmax() if length == 3 else known.argmax())
    return corpus.tokenizer.decode(tokens[start : start + length])


def _steps_done(checkpoint: Path, folder: Path, module: MiniGPTModule, datamodule: TextDataModule) -> int:
    """Steps behind a checkpoint that these settings can go on with; InputError if they cannot."""
    contents = read_checkpoint(checkpoint)
    before, now = contents["hyper_parameters"]["model"], module.hparams["model"]
    problems = [
        f"model.{name}={now[name]}: the checkpoint has {before[name]}; keep it, or begin a new run"
        for name in now
        if now[name] != before[name] and name != "dropout"
    ]
    if contents["optimizer_states"]:  # restored with its settings, which would silently win
        before, now = contents["hyper_parameters"]["optimizer"], module.hparams["optimizer"]
        problems += [
            f"optimizer.{name}={now[name]}: the checkpoint goes on with {before[name]}; keep it, or begin a new run"
            for name in now
            if now[name] != before[name]
        ]
    place = contents.get("TextDataModule", {})
    if place.get("batches_done"):  # inside an epoch, whose order must stay
        problems += [
            f"{name}: the checkpoint stands inside an epoch that began with {place['order'][name]}, not {value};"
            " go on to the epoch's end without a change, or begin a new run"
            for name, value in datamodule.state_dict()["order"].items()
            if value != place["order"][name]
        ]
    record, text_now = runs.read_record(folder), datamodule.corpus.record
    text_before = record.get("text", {})
    untrained = IMPORTED_FROM in record and not text_before  # nothing is known of the text that Keras saw
    if not untrained and text_before.get("fingerprint") != text_now["fingerprint"]:
        problems.append(
            f"data: the text is not the one that {folder} began with ({text_before.get('source')});"
            " give that one, or begin a new run"
        )
    if problems:
        raise InputError(*problems)
    log.info("Going on with %s, %s steps done.", checkpoint, contents["global_step"])
    return contents["global_step"]


def _find_learning_rate(config: TrainConfig, module: MiniGPTModule, datamodule: TextDataModule) -> Path:
    output_dir = Path(config.output_dir)
    trainer = L.Trainer(
        **processes(config.trainer),
        precision=precision(config.trainer.precision, config.trainer.accelerator),
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=output_dir,
    )
    finder = Tuner(trainer).lr_find(module, datamodule=datamodule, attr_name="learning_rate")
    picture = output_dir / "learning_rate.png"
    write_figure(picture, finder.plot(suggest=True))
    log.info("Proposal: optimizer.learning_rate=%.2g (the curve: %s)", finder.suggestion(), picture)
    return output_dir


def _circumstances(trainer: L.Trainer, datamodule: TextDataModule) -> dict[str, Any]:
    packages = ("minigpt_pl", "torch", "lightning", "tokenizers", "datasets", "numpy")
    return {
        "text": datamodule.corpus.record,
        "command": sys.argv,
        "precision": trainer.precision,
        "processes": trainer.world_size,
        "device": str(trainer.strategy.root_device),
        "versions": {"python": sys.version.split()[0]} | {name: version(name) for name in packages},
    }


def _quiet_known_warnings() -> None:
    for message in (
        "Experiment logs directory",  # the run folder holds more than the log, and the rows are kept
        "The 'train_dataloader' does not have many workers",  # the loader slices mapped memory: nothing to wait for
        "The 'val_dataloader' does not have many workers",
        "Checkpoint directory .* exists and is not empty",  # a resumed run
        "You're resuming from a checkpoint that ended before the epoch ended",  # exact here: see data/batches.py
        ".*srun. command is available",
        ".*LeafSpec.* is deprecated",
    ):
        warnings.filterwarnings("ignore", message)
