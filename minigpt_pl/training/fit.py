"""Trains a model with given settings, and writes the run folder."""

import dataclasses
import logging
import shutil
import sys
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch import loggers as lightning_loggers
from lightning.pytorch.loggers import Logger
from lightning.pytorch.tuner.tuning import Tuner

from minigpt_pl import runs, signals
from minigpt_pl.config import TOKENIZERS, ModelConfig, TrainConfig, WandbConfig
from minigpt_pl.cpu.allocator import keep_freed_memory
from minigpt_pl.data import cache
from minigpt_pl.data.corpus import same_source
from minigpt_pl.data.datamodule import TextDataModule
from minigpt_pl.errors import InputError
from minigpt_pl.files import make_folder, remove_temporaries, temporary_path, write_figure
from minigpt_pl.tokenizer import NUM_SPECIAL, UNKNOWN_ID, load_tokenizer
from minigpt_pl.training import cluster
from minigpt_pl.training.checkpointing import SaveAndStop
from minigpt_pl.training.checks import check_machine, check_resume, check_text
from minigpt_pl.training.initial_weights import start_from_counts
from minigpt_pl.training.memory import check_memory
from minigpt_pl.training.metrics import Metrics
from minigpt_pl.training.module import MiniGPTModule
from minigpt_pl.training.resume import is_complete, is_interrupted
from minigpt_pl.training.run_record import RunRecord, finish
from minigpt_pl.training.text_generator import TextGenerator
from minigpt_pl.training.trainer import (
    batches_per_epoch,
    build_trainer,
    max_seconds,
    precision,
    processes,
)

log = logging.getLogger(__name__)

MANY_UNKNOWN = 0.2  # share of [UNK] among the tokens; IMDB with 20,000 words has 0.03


def fit(config: TrainConfig, name_prefix: str, overrides: list[str], resume_from: Path | None) -> Path:
    """Train a model and write its run folder.

    Args:
        name_prefix: start of the run's name if `config.run_name` is None.
        overrides: settings given on the command line. The record keeps them for a later resume.
        resume_from: a checkpoint in a run folder: the run continues from it. A run folder without a checkpoint: its run
            begins again. None for a new run.

    Returns:
        The run folder.

    Raises:
        InputError: the text, the machine or the checkpoint does not fit the settings.
        Interrupted: a signal has stopped the training, after the checkpoint was written.
    """
    _choose_messages(config.trainer.profiler)
    if config.trainer.strategy != "fsdp2":  # which frees gathered weights; keeping them takes a third more memory
        keep_freed_memory()
    L.seed_everything(config.seed, verbose=False)
    group = cluster.join()
    check_machine(config)
    check_memory(config, NUM_SPECIAL + 1)  # for the smallest vocabulary, because encoding can take minutes
    if config.find_learning_rate:
        return _find_learning_rate(config)
    record = {"status": "running", "overrides": overrides, "command": sys.argv}

    def choose_folder() -> str:
        if resume_from is not None:
            return str(resume_from if (resume_from / runs.RECORD).is_file() else resume_from.parent.parent)
        # Before the text is encoded, so that resume=auto finds a run that is killed meanwhile.
        return str(runs.make_run_folder(Path(config.output_dir), config.run_name, name_prefix, **record))

    folder = Path(group.decide("run folder", choose_folder))
    signals.advice = runs.how_to_continue(folder)
    group.launch(config.trainer.devices or 1)
    with ExitStack() as stack:
        if group.is_first:
            stack.callback(runs.lock(folder).release)
            for place in (folder, folder / "checkpoints"):
                remove_temporaries(place, of_all_machines=True)
        try:
            _fit(config, folder, record, resume_from if resume_from != folder else None)
        except InputError:
            is_new = resume_from is None and group.is_first
            if is_new and folder.exists() and not (folder / "config.yaml").exists():
                # The training has not started: the folder has only the record. Another run takes the name of an empty
                # folder, so give it another name first.
                shutil.rmtree(folder.replace(temporary_path(folder)))
            raise
    return folder


def _fit(config: TrainConfig, folder: Path, record: dict[str, Any], checkpoint: Path | None) -> None:
    datamodule = _open_text(config, checkpoint)
    check_memory(config, datamodule.vocab_size)
    module = _build_module(config, datamodule, is_new=checkpoint is None)
    check_text(config, datamodule)
    before = {} if checkpoint is None else check_resume(checkpoint, module, datamodule)
    steps_done = before.get("global_step", 0)
    stop = SaveAndStop(folder / "checkpoints", config.checkpoint, config.trainer.max_steps, max_seconds(config))
    loggers = _build_loggers(config, folder, steps_done) if cluster.join().is_first else []
    metrics = Metrics(folder, loggers)
    callbacks: list[L.Callback] = [metrics]
    if config.text_generator.every_n_epochs:
        callbacks.append(TextGenerator(config, datamodule.corpus, folder, loggers, stop))
    callbacks.append(RunRecord(folder, config, datamodule.corpus))
    if checkpoint is not None and _is_finished_with(config, folder, steps_done):
        log.info("The run is finished. To train longer, change a setting, for example trainer.max_epochs.")
        return
    if steps_done >= module.hparams["total_steps"] and not is_interrupted(before):
        if cluster.join().is_first and is_complete(before) and runs.read_record(folder)["status"] != "finished":
            finish(folder, "finished", before["epoch"] + 1, steps_done)
        log.info("All steps are done. Raise trainer.max_epochs or trainer.max_steps to train longer.")
        return
    if cluster.join().is_first:
        runs.update_record(folder, **record)
    if checkpoint is not None:
        log.info("Resuming from %s.", checkpoint)
    uses_gpus = config.trainer.accelerator != "cpu" and torch.cuda.is_available()
    cluster.join().init_process_group("nccl" if uses_gpus else "gloo")
    trainer = build_trainer(config, folder, datamodule, callbacks, stop)
    trainer.fit(module, datamodule=datamodule, ckpt_path=checkpoint, weights_only=True)


def _is_finished_with(config: TrainConfig, folder: Path, steps_done: int) -> bool:
    """Whether a run has finished with these settings at this step, for example by `patience` or `max_time`."""
    record = runs.read_record(folder)
    if record.get("status") != "finished" or not steps_done == record["steps"] > 0:  # a run of `convert` has 0 steps
        return False
    before = runs.read_settings(folder)
    same = {name: value for name, value in dataclasses.asdict(config).items() if name not in ("resume", "run_name")}
    return all(before.get(name) == value for name, value in same.items())


def _choose_messages(profiler: str | None) -> None:
    """Show our own messages in the first process only, and hide warnings of Lightning that do not apply here."""
    # Lightning's profilers print through its logger, with level INFO.
    logging.getLogger("lightning.pytorch").setLevel(logging.INFO if profiler else logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch").handlers.clear()  # otherwise each line appears twice
    if not cluster.join().is_first:
        logging.getLogger().setLevel(logging.ERROR)
        warnings.filterwarnings("ignore")
    for message in (
        "Be aware that when using `ckpt_path`, callbacks used to create",  # checkpoints of older versions
        "You're resuming from a checkpoint that ended before the epoch ended",  # our loader continues exactly
        ".*srun. command is available",  # `cluster.numbers` refuses jobs that need srun
        ".*LeafSpec.* is deprecated",
        "You're using the WeightAveraging callback with a model that overrides",  # ours shards only with fsdp2
    ):
        warnings.filterwarnings("ignore", message)


def _open_text(config: TrainConfig, resume_from: Path | None) -> TextDataModule:
    tokenizer, data = None, config.data
    if resume_from is not None:
        folder = resume_from.parent.parent
        record = runs.read_record(folder)
        data = same_source(data, record)
        if runs.IMPORTED_FROM in record:
            tokenizer = load_tokenizer(folder / "tokenizer.json")  # has the Keras model's words
    model = config.model
    datamodule = TextDataModule(data, model.vocab_size, model.max_length, config.seed, tokenizer)

    def encode() -> str:
        datamodule.prepare_data()
        return str(datamodule.folder)

    def encode_on_this_node() -> str:
        """A node without a shared disk encodes its own copy."""
        is_here = group.is_first or cache.find_damage(Path(of_first)) is None
        return of_first if is_here else encode()

    group = cluster.join()
    settings = {"seed": config.seed}  # and those of all groups, except `data`: nodes may have their own paths
    for name, values in dataclasses.asdict(config).items():
        if isinstance(values, dict) and name != "data":
            settings |= {f"{name}.{setting}": value for setting, value in values.items()}
    group.must_agree("settings", settings, "give all processes the same settings")
    of_first: str = group.decide("text", encode)
    datamodule.folder = Path(group.decide("text of the node", encode_on_this_node, of_node=True))
    datamodule.setup("fit")
    group.must_agree("content", {"data": datamodule.corpus.record["content"]}, "give all nodes the same files")
    of_file = config.data.tokenizer not in TOKENIZERS
    if of_file and model.vocab_size not in (datamodule.vocab_size, ModelConfig.vocab_size):
        words = f"{datamodule.vocab_size:,} tokens of data.tokenizer={config.data.tokenizer}"
        log.warning("model.vocab_size=%d: has no effect, because the model uses the %s.", model.vocab_size, words)
    elif datamodule.vocab_size < model.vocab_size:
        log.info("The vocabulary has only %s tokens.", f"{datamodule.vocab_size:,}")
    unknown = float((datamodule.corpus.train.shard(0).tokens[:1_000_000] == UNKNOWN_ID).mean())
    if unknown > MANY_UNKNOWN:
        remedy = "give another data.tokenizer" if of_file else "raise model.vocab_size"
        log.warning("%.0f%% of the tokens are [UNK], unknown words; %s.", 100 * unknown, remedy)
    return datamodule


def _build_module(config: TrainConfig, datamodule: TextDataModule, is_new: bool = True) -> MiniGPTModule:
    steps_per_epoch = -(-batches_per_epoch(config, datamodule) // config.trainer.accumulate_grad_batches)
    total_steps = config.trainer.max_epochs * steps_per_epoch
    total_steps = min(total_steps, config.trainer.max_steps or total_steps)
    if (warmup_steps := config.schedule.warmup_steps) >= total_steps:
        problem = "the training has only %d steps, so the learning rate never reaches its full value; lower it"
        log.warning(f"schedule.warmup_steps=%d: {problem}", warmup_steps, total_steps)
    # By occurrence, it needs the whole gradient of the embedding.
    second_moment = {"second_moment": "dense"} if config.trainer.strategy == "fsdp2" else {}
    module = MiniGPTModule(
        model=dataclasses.asdict(config.model) | {"vocab_size": datamodule.vocab_size},
        optimizer=dataclasses.asdict(config.optimizer) | second_moment,
        schedule=dataclasses.asdict(config.schedule),
        total_steps=total_steps,
        end_id=datamodule.end_id,
        loss_on_padding=config.data.loss_on_padding,
        seed=config.seed,
        softmax_candidates=config.softmax_candidates,
    )
    if config.unigram_bias:
        module.model.output.bias.data.copy_(datamodule.target_shares().log())
    if config.bigram_weights and is_new:  # a checkpoint replaces all weights
        start_from_counts(module.model, datamodule.pair_counts())
    if config.softmax_candidates is not None:
        module.target_shares = datamodule.target_shares()
    if config.trainer.compile:
        for block in module.model.blocks:
            block.compile()  # in place: the names in checkpoints do not change
    module.model.activation_checkpointing = config.trainer.activation_checkpointing
    return module


def _build_loggers(config: TrainConfig, folder: Path, steps_done: int) -> list[Logger]:
    """The loggers besides metrics.csv. A resumed run writes the steps after its checkpoint again."""
    if config.logger.name == "tensorboard":
        return [lightning_loggers.TensorBoardLogger(folder, name="", version="", purge_step=steps_done)]
    if isinstance(config.logger, WandbConfig):
        project, offline = config.logger.project, config.logger.offline
        return [lightning_loggers.WandbLogger(folder.name, folder, offline=offline, project=project)]
    return []


def _find_learning_rate(config: TrainConfig) -> Path:
    make_folder(Path(config.output_dir), "output_dir")
    datamodule = _open_text(config, None)
    module = _build_module(config, datamodule)
    check_text(config, datamodule)
    output_dir = Path(config.output_dir)
    trainer = L.Trainer(
        **processes(config.trainer),
        precision=precision(config.trainer.precision, config.trainer.accelerator),
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=output_dir,
    )
    finder: Any = Tuner(trainer).lr_find(module, datamodule=datamodule, attr_name="learning_rate")
    picture = output_dir / "learning_rate.png"
    write_figure(picture, finder.plot(suggest=True))
    log.info("Suggestion: optimizer.learning_rate=%.2g (curve: %s)", finder.suggestion(), picture)
    return output_dir
