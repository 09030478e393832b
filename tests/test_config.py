"""Every conf file composes to valid settings, and every wrong setting gives one clear line."""

from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from minigpt_pl.cli import app
from minigpt_pl.config import (
    ConvertConfig,
    ExploreConfig,
    ImdbConfig,
    PrepareConfig,
    SampleConfig,
    TextConfig,
    TrainConfig,
    check,
)
from minigpt_pl.errors import InputError

CONF = Path(app.CONFIG_DIR)
CHOICES = [f"{group.name}={path.stem}" for group in CONF.iterdir() if group.is_dir() for path in group.glob("*.yaml")]


def settings(*overrides: str) -> TrainConfig:
    return app.to_settings(app.compose("train", overrides))


@pytest.mark.parametrize("choice", CHOICES)
def test_every_file_of_conf_composes_to_valid_settings(choice):
    extra = ["data.path=my.txt"] if choice == "data=text" else []
    if choice.startswith("explore="):
        assert isinstance(app.to_settings(app.compose("explore", [choice])), ExploreConfig)
    else:
        assert isinstance(settings(choice, *extra), TrainConfig)


@pytest.mark.parametrize(
    "schema", [TrainConfig, SampleConfig, ExploreConfig, ConvertConfig, PrepareConfig, ImdbConfig, TextConfig]
)
def test_every_setting_is_documented(schema):
    for field in fields(schema):
        if is_dataclass(field.type):
            test_every_setting_is_documented(field.type)
        else:
            assert len(field.metadata["doc"]) > 5, field.name


def changed(*overrides: str) -> set[str]:
    """The settings that differ from the defaults."""

    def flat(config) -> dict:
        def walk(value, prefix):
            for key, item in value.items():
                if isinstance(item, dict):
                    yield from walk(item, f"{prefix}{key}.")
                else:
                    yield f"{prefix}{key}", item

        return dict(walk(OmegaConf.to_container(config), ""))

    before, after = flat(app.compose("train", [])), flat(app.compose("train", overrides))
    return {name for name in after if after[name] != before.get(name)}


def test_keras_differs_from_the_defaults_only_by_the_notebooks_faults():
    assert changed("experiment=keras") == {"data.end_token", "data.loss_on_padding", "data.validation_share"}


def test_the_defaults_are_the_notebooks():
    config = settings()
    optimizer, generator = config.optimizer, config.text_generator
    assert (config.trainer.max_epochs, config.data.batch_size, config.data.cut) == (25, 128, "truncate")
    assert (optimizer.name, optimizer.learning_rate, optimizer.epsilon) == ("keras_adam", 1e-3, 1e-7)
    assert (optimizer.second_moment, config.schedule.name) == (None, "constant")
    assert (generator.num_tokens, generator.top_k, generator.temperature) == (40, 10, 1.0)


def test_the_cache_is_in_the_output_folder():
    assert settings("output_dir=elsewhere").data.cache_dir == "elsewhere/cache"
    assert settings("output_dir=elsewhere", "data.cache_dir=mine").data.cache_dir == "mine"


@pytest.mark.parametrize("override", ["model.tie_embeddings=true", "optimizer.name=adamw"])
def test_these_need_no_second_setting(override):
    assert settings(override).optimizer.second_moment is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.embed_dim=0", "model.embed_dim=0: must be at least 1"),
        ("model.dropout=1.0", "model.dropout=1.0: must be at least 0 and below 1"),
        ("model.dropout=nan", "model.dropout=nan: must be a finite number"),
        ("optimizer.learning_rate=0", "optimizer.learning_rate=0.0: must be above 0"),
        ("optimizer.learning_rate=1e40", "optimizer.learning_rate=1e.40: must be above 0 and at most 1000"),
        ("schedule.name=step", "schedule.name=step: must be one of constant, linear, cosine"),
        ("data.cut=chop", "data.cut=chop: must be one of truncate, pack"),
        ("output_dir=''", "output_dir=: must not be empty"),
        ("+x=1", "x: no such setting"),
        ("+model.width=1", "model.width: no such setting"),
        ("trainer.max_time=9m", "trainer.max_time=9m: must be DD:HH:MM:SS"),
        ("run_name=a/b", "run_name=a/b: must be a plain folder name"),
        ("text_generator.prompts=[]", r"text_generator.prompts=\[\]: give a prompt"),
        ("output_dir=${nothing}", "Interpolation key 'nothing' not found"),
        ("schedule.final_ratio=0.1", "schedule.final_ratio=0.1: has no effect with schedule.name=constant"),
        ("data=text", r"data.path=\?\?\?: must be given"),
    ],
)
def test_problems_name_setting_value_and_remedy(override, message):
    with pytest.raises(InputError, match=message):
        settings(override)


@pytest.mark.parametrize(
    "override",
    [
        "optimizer.second_moment=by_occurrence",
        "trainer.ema_decay=0.9",
        "trainer.precision=64-true",
        "find_learning_rate=true",
        "softmax_candidates=9",
    ],
)
def test_what_needs_all_weights_in_one_process(override):
    with pytest.raises(InputError, match=f"^{override}: .*trainer.strategy=fsdp2.*; (use|leave)"):
        settings("trainer.strategy=fsdp2", override)


TEXT = ("data=text", "data.path=my.txt")
NO_TEXTS = "text_generator.every_n_epochs=0"
CONFLICTS = [
    ("train", [*TEXT, "data.validation_path=held.txt", "data.validation_share=0.1"], ["data.validation_share=0.1"]),
    ("train", ["find_learning_rate=true", "run_name=a", "resume=b"], ["run_name=a", "resume=b"]),
    (
        "train",
        ["trainer.limit_val_batches=0", "trainer.check_val_every_n_epoch=2", "trainer.patience=3"],
        ["trainer.check_val_every_n_epoch=2", "trainer.patience=3"],
    ),
    (
        "train",
        ["trainer.limit_val_batches=0", "trainer.val_check_interval=9"],
        ["trainer.val_check_interval=9"],
    ),
    (
        "train",
        [NO_TEXTS, "text_generator.num_tokens=9", "text_generator.top_k=null", "text_generator.prompts=[a]"],
        ["text_generator.prompts=['a']", "text_generator.num_tokens=9", "text_generator.top_k=None"],
    ),
    ("train", [NO_TEXTS, "text_generator.temperature=0.5"], ["text_generator.temperature=0.5"]),
    (
        "sample",
        ["interactive=true", "prompts_file=a", "compare={top_k: [1]}", "format=jsonl"],
        ["prompts_file=a", "compare={'top_k': [1]}", "format=jsonl"],
    ),
    ("sample", ["interactive=true", "prompt=a"], ["prompt=a"]),
    ("convert", ["to_keras=a.weights.h5", "run_name=b"], ["run_name=b"]),
    ("convert", ["to_torch=a.ckpt", "run_name=b", "vocabulary=v.txt"], ["run_name=b", "vocabulary=v.txt"]),
    ("convert", ["from_keras=a", "vocabulary=v.txt", "run=b"], ["run=b"]),
]


@pytest.mark.parametrize(("command", "overrides", "refused"), CONFLICTS, ids=str)
def test_settings_without_effect_are_refused(command, overrides, refused):
    with pytest.raises(InputError) as caught:
        app.to_settings(app.compose(command, overrides))
    assert [problem.split(": has no effect with ")[0] for problem in caught.value.problems] == refused


@pytest.mark.parametrize(
    ("command", "overrides", "message"),
    [
        ("sample", ["show=probabilities", "format=markdown"], "show=probabilities: needs format=text"),
        ("sample", ["forced_words={a: cat}"], "forced_words={'a': 'cat'}: must be words by position"),
        ("sample", ["compare={}"], "compare={}: must be lists of values by setting"),
        ("sample", ["compare=[1]"], "compare=[1]: must be lists of values by setting"),
        ("sample", ["compare={seed: [1, 2]}"], "compare={'seed': [1, 2]}: cannot compare seed; choose from"),
        ("explore", ["compare=[a]"], "compare=['a']: give two runs or more"),
        ("explore", ["compare=[a,b]", "run=c"], "run=c: compare= already names runs; leave one of them out"),
        ("convert", [], "from_keras=None: give from_keras=FILE to import, or to_keras=FILE"),
        ("convert", ["to_torch=a.ckpt", "to_keras=a.weights.h5"], "from_keras=None: give from_keras=FILE to import"),
        ("convert", ["to_torch=a.pt"], "to_torch=a.pt: must end in .ckpt"),
        ("convert", ["from_keras=a"], "vocabulary=null: from_keras needs it"),
        ("convert", ["to_keras=a.h5"], "to_keras=a.h5: must end in .weights.h5"),
        *(
            ("convert", ["from_keras=a", "vocabulary=v", f"run_name='{name}'"], f"run_name={name}: must be a plain")
            for name in ("a/b", "a\\b", ".a", "  ", "x" * 201)
        ),
    ],
    ids=str,
)
def test_the_rules_of_the_other_commands(command, overrides, message):
    with pytest.raises(InputError) as caught:
        app.to_settings(app.compose(command, overrides))
    assert [problem[: len(message)] for problem in caught.value.problems] == [message]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SampleConfig(num_samples=True), "num_samples=True: must be a whole number"),
        (SampleConfig(num_tokens=2.0), "num_tokens=2.0: must be a whole number"),
        (SampleConfig(temperature="1"), "temperature='1': must be a number"),
        (SampleConfig(top_k="1"), "top_k='1': must be a whole number or None"),
        (SampleConfig(interactive=1), "interactive=1: must be true or false"),
        (SampleConfig(run=3), "run=3: must be a text or None"),
        (SampleConfig(run=""), "run=: must not be empty"),
        (SampleConfig(banned_words="cat"), "banned_words='cat': must be a list, as in [a,b]"),
        (SampleConfig(stop_words=[3]), "stop_words=[3]: must be a list, as in [a,b]"),
        (TrainConfig(data=TextConfig()), "data.path=???: must be given"),
        (TrainConfig(data=ImdbConfig(train_splits=["dev"])), "data.train_splits=['dev']: must be one of train, test"),
    ],
    ids=str,
)
def test_wrong_values_in_python(config, message):
    with pytest.raises(InputError) as caught:
        check(config)
    assert [problem[: len(message)] for problem in caught.value.problems] == [message]


def test_pack_needs_ends():
    with pytest.raises(InputError, match=r"data.end_token=false: data.cut=pack needs \[END\]"):
        settings("data.cut=pack", "data.end_token=false")


def test_all_problems_at_once():
    with pytest.raises(InputError) as caught:
        settings("model.embed_dim=0", "data.cut=chop", "trainer.max_epochs=0", "seed=-1")
    assert len(caught.value.problems) == 4


def test_the_settings_that_need_another_value_of_a_second_setting():
    for overrides in (["optimizer.name=adamw"], ["model.tie_embeddings=true"]):
        with pytest.raises(InputError, match="optimizer.second_moment=by_occurrence: needs "):
            settings("optimizer.second_moment=by_occurrence", *overrides)


def test_change_converts_checks_and_keeps_the_original():
    config = app.to_settings(app.compose("sample", []))
    changed = app.change(config, temperature="0.5", top_k=None)
    assert (changed.temperature, changed.top_k, config.temperature, config.top_k) == (0.5, None, 0.8, 20)
    with pytest.raises(InputError) as caught:
        app.change(config, temperature="warm", top_k="2.5", no_such=1)
    assert caught.value.problems == (
        "temperature=warm: must be a number",
        "top_k=2.5: must be a whole number or None",
        "no_such=1: no such setting; --help lists them",
    )
    with pytest.raises(InputError, match="temperature=-1.0: must be at least 0"):
        app.change(config, temperature=-1)
