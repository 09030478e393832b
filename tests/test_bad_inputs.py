"""What a user must never see: a traceback, a hang, a lost file, a wrong remedy."""

import dataclasses
import errno
from pathlib import Path

import pytest
from conftest import run_main, train
from drills.bad_inputs import BAD_INPUTS, SAMPLE, TRAIN, make_folder

from minigpt_pl import InputError, MiniGPT, generate_text, generate_texts, load, runs
from minigpt_pl.config import ModelConfig, SampleConfig, TextConfig, TrainConfig, TrainerConfig, check
from minigpt_pl.training import memory


@pytest.fixture(scope="module")
def folder(trained: Path, story: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    make_folder(folder, trained / "outputs" / "tiny", story)
    return folder


def files(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("command", "arguments", "words"),
    BAD_INPUTS,
    ids=[f"{row[0]} {(row[1][-1:] or ['-'])[0][:50]}" for row in BAD_INPUTS],
)
def test_exit_code_2_one_line_and_nothing_lost(folder, command, arguments, words):
    before = files(folder)
    done = run_main(command, *arguments, cwd=folder)
    assert done.returncode == 2, done.stderr
    assert any(line.startswith("error: ") and words in line for line in done.stderr.splitlines()), done.stderr
    assert "Traceback" not in done.stderr
    assert before.items() <= files(folder).items()


@pytest.mark.parametrize(
    ("command", "arguments", "warning"),
    [
        ("sample", [*SAMPLE, "banned_words=[zebra]"], "banned_words=['zebra']: not in the model's vocabulary"),
        ("train", [*TRAIN, "data.text_column=review"], "data.text_column=review: has no effect on .txt files"),
        ("evaluate", ["run=tiny", "text=held.csv", "document=file"], "document=file: has no effect on .csv files"),
    ],
)
def test_a_setting_without_effect_gives_one_warning(folder, command, arguments, warning):
    (folder / "held.csv").write_text("text\nthe cat sees the dog\n")
    done = run_main(command, *arguments, cwd=folder)
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1 and warning in warnings[0]


def test_a_warm_up_without_end_gives_a_warning(tiny_config, caplog):
    train(tiny_config("schedule.warmup_steps=3", "trainer.max_steps=3", "run_name=a"))
    assert "schedule.warmup_steps=3: the training has only 3 steps" in caplog.text
    caplog.clear()
    train(tiny_config("schedule.warmup_steps=2", "trainer.max_steps=3", "run_name=b"))
    assert "warmup_steps" not in caplog.text


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: load(5), "path=5: must be a run, its folder or a checkpoint"),
        (lambda model: generate_text(None, "the"), "model=None: must be a TextModel, or a run"),
        (
            lambda model: generate_text(model, "the", top_k=0),
            "(draw from the k likeliest tokens; all or None means from all)",
        ),
        (lambda model: generate_text(model, "the", top_k=10**6), "the size of the vocabulary, or None for all words"),
        (lambda model: generate_texts(model, None), "prompt=None: must be a text or a list of texts"),
        (lambda model: generate_texts(model, "the", num_samples=1.5), "num_samples=1.5: must be a whole number"),
        (lambda model: generate_texts(model, "the", num_samples=None), "num_samples=None: must be a whole number"),
        (lambda model: generate_text(model, "the", num_tokens=10**30), "num_tokens=1000000000000000000000000000000: "),
        (lambda model: generate_text(model, "the", seed="a"), "seed='a': must be a whole number or None"),
        (lambda model: generate_text(model, "the", forced_words={True: "the"}), "must be words by position"),
        (lambda model: MiniGPT(vocab_size="a"), "vocab_size='a': must be a whole number"),
        (lambda model: MiniGPT(vocab_size=0), "vocab_size=0: must be at least 4"),
        (lambda model: MiniGPT(num_blocks=1.5), "num_blocks=1.5: must be a whole number"),
        (lambda model: check(TrainConfig(model=None, run_name=5)), "model=None: must be of class ModelConfig"),
        (lambda model: check(SampleConfig(num_samples=10**6)), "num_samples=1000000: must be"),
    ],
)
def test_wrong_arguments_in_python(trained, call, message):
    model = load(trained / "outputs" / "tiny")
    with pytest.raises(InputError) as caught:
        call(model)
    assert any(message in problem for problem in caught.value.problems), caught.value


class TestMemory:
    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"tie_embeddings": True, "num_blocks": 3},
            {"num_heads": 3, "head_dim": 5, "embed_dim": 7, "max_length": 9},
        ],
    )
    def test_the_number_of_parameters_is_that_of_the_network(self, settings):
        config = dataclasses.replace(ModelConfig(vocab_size=50, feed_forward_dim=11), **settings)
        network = MiniGPT(**dataclasses.asdict(config))
        assert memory.num_parameters(config) == sum(weight.numel() for weight in network.parameters())

    def test_the_notebooks_model(self):
        assert memory.num_parameters(ModelConfig()) == 10_939_168

    def test_a_warning_above_half(self, monkeypatch, caplog):
        config = TrainConfig(data=TextConfig(path="a"), trainer=TrainerConfig(accelerator="cpu"))
        config.model.embed_dim = 5000
        needed = memory.training_bytes(config)
        for share, warns in ((2.1, False), (1.9, True)):
            monkeypatch.setattr(memory, "machine_bytes", lambda share=share: needed * share)
            caplog.clear()
            memory.check_memory(config, config.model.vocab_size)
            assert ("model.embed_dim=5000: the training needs at least" in caplog.text) == warns
        monkeypatch.setattr(memory, "machine_bytes", lambda: needed * 0.9)
        with pytest.raises(InputError, match="model.embed_dim=5000: the training needs at least"):
            memory.check_memory(config, config.model.vocab_size)

    def test_processes_of_fsdp2_share_the_weights(self):
        def needed(**options):
            trainer = TrainerConfig(accelerator="cpu", precision="32-true", **options)
            config = TrainConfig(data=TextConfig(path="a", batch_size=8), trainer=trainer)
            return memory.training_bytes(config)

        weights = 4 * memory.num_parameters(ModelConfig()) * 4
        assert needed(devices=4, strategy="ddp") - needed(devices=4, strategy="fsdp2") == weights * 3 // 4

    def test_checkpointing_keeps_the_inputs_of_the_blocks_and_one_block(self):
        def per_block(checkpointing):
            one, two = (
                memory.training_bytes(
                    TrainConfig(
                        data=TextConfig(path="a", batch_size=1),
                        model=ModelConfig(num_blocks=number, max_length=1),
                        trainer=TrainerConfig(precision="32-true", activation_checkpointing=checkpointing),
                    )
                )
                - 16 * memory.num_parameters(ModelConfig(num_blocks=number, max_length=1))
                for number in (1, 2)
            )
            return two - one

        assert per_block(False) == 4 * (2 * 256 + 4 * 512 + 256) and per_block(True) == 4 * 256

    @pytest.mark.parametrize(
        ("line", "file"),
        [("0::/job/step", "job/memory.max"), ("4:memory:/job/step", "memory/job/step/memory.limit_in_bytes")],
    )
    def test_the_limit_of_a_container(self, monkeypatch, tmp_path, line, file):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / "cgroup").write_text(f"1:cpu:/\n{line}\n")
        monkeypatch.setattr(memory, "CONTROL_GROUPS", (tmp_path / "cgroup", tmp_path))
        physical = memory.machine_bytes()
        (tmp_path / file).write_text("max\n")
        assert memory.machine_bytes() == physical
        (tmp_path / file).write_text("1000000\n")
        assert memory.machine_bytes() == 1_000_000


def test_a_read_only_output_folder(tmp_path, monkeypatch):
    def refuse(path, *arguments, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(runs, "make_folder", lambda *arguments: None)
    monkeypatch.setattr(Path, "mkdir", refuse)  # root may write everywhere
    with pytest.raises(InputError, match=f"^output_dir={tmp_path}: cannot create .*Permission denied.*; give another"):
        runs.make_run_folder(tmp_path, "name", "run")
