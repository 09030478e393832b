"""The loss of a training step, and the effect of each setting."""

import itertools
import json
import math
import re
import shutil
import signal
import threading
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import EVERY_STEP, TINY_RUN, checkpoint, losses, run_module, train
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves

from minigpt_pl import generate_text, load, runs
from minigpt_pl import loss as loss_module
from minigpt_pl.checkpoints import newest_checkpoint
from minigpt_pl.errors import InputError
from minigpt_pl.loss import sampled_cross_entropy
from minigpt_pl.training import module, progress
from minigpt_pl.training.checkpointing import SaveAndStop, StopAtNaN
from minigpt_pl.training.fit import _build_module, _open_text
from minigpt_pl.training.loss_curve import read_metrics

NO_DROPOUT = "model.dropout=0"


class TestLoss:
    def test_it_learns(self, tiny_config):
        folder = train(tiny_config("trainer.max_epochs=8", "optimizer.learning_rate=0.01", EVERY_STEP))
        assert list(losses(folder).values())[0] > 3, "it starts near log(26): all words are equally likely"
        assert list(losses(folder, "val/loss").values())[-1] < 0.8

    def test_values_of_a_validation(self, tiny_config):
        """Compared with the plain formula, for the weights of the checkpoint."""
        config = tiny_config("trainer.max_epochs=1", "data.loss_on_padding=true")
        folder = train(config)
        data = _open_text(config, None)
        network = load(folder / "checkpoints" / "last.ckpt").network
        end_id = data.corpus.tokenizer.token_to_id("[END]")
        every, words = [], []
        for batch in data.val_dataloader():
            with torch.no_grad():
                losses_BL = torch.nn.functional.cross_entropy(
                    network(batch.inputs)[0].transpose(1, 2), batch.targets, reduction="none"
                )
            every.append(losses_BL.flatten())
            words.append(losses_BL[(batch.targets > 1) & (batch.targets != end_id)])
        every, words = torch.cat(every).mean().item(), torch.cat(words).mean().item()
        assert losses(folder, "val/loss").popitem()[1] == pytest.approx(every, abs=1e-5)
        assert losses(folder, "val/word_loss").popitem()[1] == pytest.approx(words, abs=1e-5)
        assert every < words, "padding is easy to predict, so the default does not count it"

    def test_the_mean_of_an_epoch_is_over_targets(self, tiny_config):
        config = tiny_config("trainer.max_epochs=1", EVERY_STEP, "data.cut=pack", "data.batch_size=50")
        folder = train(config)
        weights = [batch.num_targets for batch in _open_text(config, None).train_dataloader()]
        steps = list(losses(folder).values())
        assert len(set(weights)) > 1, "the batches have the same size"
        mean = sum(w * s for w, s in zip(weights, steps, strict=True)) / sum(weights)
        assert losses(folder, "train/epoch_loss").popitem()[1] == pytest.approx(mean, abs=1e-5)

    @pytest.mark.parametrize("loss_on_padding", ["true", "false"])
    def test_unigram_bias_starts_at_the_shares_of_the_words(self, tiny_config, loss_on_padding):
        options = [EVERY_STEP, "trainer.max_steps=1", f"data.loss_on_padding={loss_on_padding}", "data.cut=pack"]
        without = losses(train(tiny_config(*options)))[0]
        config = tiny_config(*options, "unigram_bias=true", "optimizer.learning_rate=1e-30")
        folder = train(config)
        shares = torch.zeros(26)
        for batch in _open_text(config, None).train_dataloader():
            ids = batch.targets[batch.targets >= (loss_on_padding == "false")]
            shares += torch.bincount(ids.flatten(), minlength=26)
        bias = checkpoint(folder)["state_dict"]["model.output.bias"]
        assert_close(bias, ((shares + 1) / (shares + 1).sum()).log(), atol=1e-4, rtol=0)
        assert losses(folder)[0] < without - 0.2

    @pytest.mark.parametrize("loss_on_padding", ["true", "false"])
    def test_bigram_weights_start_near_the_counts_of_pairs(self, tiny_config, loss_on_padding):
        options = [EVERY_STEP, "trainer.max_steps=1", "unigram_bias=true", NO_DROPOUT, "optimizer.learning_rate=1e-30"]
        options += [f"data.loss_on_padding={loss_on_padding}", "data.validation_share=0"]
        unigrams = losses(train(tiny_config(*options)))[0]
        config = tiny_config(*options, "bigram_weights=true")
        folder = train(config)
        bigrams = losses(folder)[0]
        datamodule = _open_text(config, None)
        first, second, counts = datamodule.pair_counts()
        table = torch.full((26, 26), 1e-9).index_put((first, second), counts.float())
        log_p = (table / table.sum(1, keepdim=True)).log()
        [batch, *_] = datamodule.train_dataloader()
        of_counts = -log_p[batch.inputs, batch.targets]
        counted = (batch.targets != 0) | (loss_on_padding == "true")
        of_counts = of_counts[counted].mean().item()
        gained = (unigrams - bigrams) / (unigrams - of_counts)
        assert gained > 0.4, f"{unigrams:.2f} -> {bigrams:.2f}; the counts have {of_counts:.2f}"
        embeddings = checkpoint(folder)["state_dict"]["model.token_embedding.weight"]
        squares = embeddings[first].square().mean(1)  # of the first token of each pair
        assert_close((squares * counts).sum() / counts.sum(), torch.tensor(0.1**2), atol=1e-4, rtol=0)

    def test_pairs_do_not_cross_documents(self, tiny_config):
        """Whole documents are counted, and the sequences once more."""
        config = tiny_config("model.max_length=4", "data.validation_share=0")
        datamodule = _open_text(config, None)
        corpus, end_id = datamodule.corpus.train, datamodule.vocab_size - 1
        expected = torch.zeros(26, 26, dtype=torch.int64)
        for start, stop in itertools.pairwise(corpus.offsets):
            document = corpus.tokens[start:stop].tolist()
            for pair in [*itertools.pairwise(document), *itertools.pairwise(document[:5])]:
                expected[pair] += 1
        first, second, counts = datamodule.pair_counts()
        assert torch.equal(torch.zeros_like(expected).index_put((first, second), counts), expected)
        assert expected[:, end_id].sum() > 0 == expected[end_id].sum()

    def test_candidates_train_nearly_as_all_tokens(self, tiny_config, monkeypatch):
        options = ["trainer.max_steps=60", NO_DROPOUT, "trainer.max_epochs=9", "data.validation_share=0.3"]
        last = lambda folder: list(losses(folder, "val/loss").values())[-1]  # noqa: E731
        whole = last(train(tiny_config(*options, "run_name=whole")))
        calls = []
        monkeypatch.setattr(module, "sampled_cross_entropy", lambda *a: calls.append(a[5]) or sampled_cross_entropy(*a))
        some = last(train(tiny_config(*options, "softmax_candidates=4", "run_name=some")))
        assert calls == [4] * 60
        assert some == pytest.approx(whole, abs=0.1)

    def test_losses_of_a_partial_last_step(self, tiny_config):
        """18 batches, 4 in a step: the last step has 2. No update changes the weights here."""
        frozen = ["optimizer.learning_rate=1e-30", NO_DROPOUT, EVERY_STEP, "trainer.max_epochs=1"]
        config = tiny_config(*frozen, "trainer.accumulate_grad_batches=4")
        folder = train(config)
        network = load(folder / "checkpoints" / "last.ckpt").network
        sums, counts = [], []
        for batch in _open_text(config, None).train_dataloader():
            with torch.no_grad():
                logits = network(batch.inputs)[0].transpose(1, 2)
            sums.append(torch.nn.functional.cross_entropy(logits, batch.targets, ignore_index=0, reduction="sum"))
            counts.append(batch.num_targets)
        assert len(counts) % 4 == 2
        mean = sum(sums).item() / sum(counts)
        assert losses(folder, "train/epoch_loss").popitem()[1] == pytest.approx(mean, abs=1e-5)
        assert list(losses(folder).values())[-1] == pytest.approx(sums[-1].item() / counts[-1], abs=1e-5)

    def test_steps_of_the_schedule_do_not_depend_on_the_processes(self, tiny_config):
        """The last batch has one sequence."""
        one = tiny_config("data.max_sequences=161", "trainer.max_epochs=2")
        two = tiny_config("data.max_sequences=161", "trainer.max_epochs=2", "trainer.devices=2")
        steps = [_build_module(config, _open_text(config, None)).total_steps for config in (one, two)]
        assert steps == [22, 22]

    def test_accumulated_batches_are_one_large_batch(self, tiny_config):
        large = train(tiny_config("trainer.max_epochs=1", NO_DROPOUT, "data.batch_size=32"))
        small = train(tiny_config("trainer.max_epochs=1", NO_DROPOUT, "trainer.accumulate_grad_batches=2"))
        assert checkpoint(large)["global_step"] == checkpoint(small)["global_step"]
        for name, weight in checkpoint(large)["state_dict"].items():
            if "token_embedding" not in name:  # its second moment sums over occurrences, so it depends on the batches
                assert_close(checkpoint(small)["state_dict"][name], weight, atol=2e-4, rtol=0)

    def test_seed_fixes_everything(self, tiny_config):
        first, again, other = (
            checkpoint(train(tiny_config("trainer.max_steps=5", f"seed={seed}")))["state_dict"] for seed in (1, 1, 2)
        )
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert not torch.equal(first["model.output.weight"], other["model.output.weight"])

    def test_texts_do_not_change_the_training(self, tiny_config):
        without = train(tiny_config("trainer.max_epochs=2"))
        texts = train(tiny_config("trainer.max_epochs=2", "text_generator.every_n_epochs=1"))
        a, b = checkpoint(without)["state_dict"], checkpoint(texts)["state_dict"]
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_step_on_a_gpu_never_synchronises(monkeypatch, tiny_config, clip):
    """The code for GPUs, run on a CPU: no operation gives Python a value, or a shape that depends on one."""
    monkeypatch.setattr(loss_module, "SYNC_FREE_DEVICES", ())
    waits = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            masks = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor) and x.dtype == torch.bool]
            if func.__name__.split(".")[0] in ("_local_scalar_dense", "nonzero", "masked_select", "equal"):
                waits.append(str(func))
            elif func.__name__.startswith("index") and masks:
                waits.append(f"{func} with a mask")
            return func(*args, **(kwargs or {}))

    config = tiny_config()
    module = _build_module(config, _open_text(config, None))
    module.trainer = SimpleNamespace(world_size=1, accumulate_grad_batches=1, current_epoch=0, global_rank=0)
    module.log_dict = lambda *args, **kwargs: None
    optimizer = module.configure_optimizers()["optimizer"]
    for batch in itertools.islice(_open_text(config, None).train_dataloader(), 2):
        with Watch():
            module.training_step(batch, 0).backward()
            module.configure_gradient_clipping(optimizer, clip)
            optimizer.step()
    assert not waits


class TestSettings:
    """The effect of each setting."""

    @pytest.mark.parametrize("optimizer", ["keras_adam", "adamw"])
    def test_bf16_fused_and_clipped(self, tiny_config, optimizer):
        dense = ["optimizer.second_moment=dense", f"optimizer.name={optimizer}", "optimizer.epsilon=1", NO_DROPOUT]
        options = [*dense, "trainer.max_steps=1", "trainer.precision=bf16-mixed"]
        free = checkpoint(train(tiny_config(*options, "trainer.gradient_clip_val=1e9")))["state_dict"]
        clipped = checkpoint(train(tiny_config(*options, "trainer.gradient_clip_val=0.01")))["state_dict"]
        start = checkpoint(train(tiny_config(*options, "optimizer.learning_rate=1e-30")))["state_dict"]
        moved = [(w["model.output.bias"] - start["model.output.bias"]).norm() for w in (free, clipped)]
        assert moved[1] < 0.5 * moved[0], "with an epsilon of 1 a step is about as long as its gradient"
        exact = checkpoint(train(tiny_config(*dense, "trainer.max_steps=1")))["state_dict"]
        assert not torch.equal(exact["model.output.weight"], free["model.output.weight"]), "no bf16"
        assert free["model.output.weight"].dtype == torch.float32

    def test_clipping_reaches_the_squares_by_occurrence(self, tiny_config):
        options = ["trainer.max_steps=1", "optimizer.epsilon=1e-12", NO_DROPOUT]
        free = checkpoint(train(tiny_config(*options)))["state_dict"]
        clipped = checkpoint(train(tiny_config(*options, "trainer.gradient_clip_val=0.001")))["state_dict"]
        name = "model.token_embedding.weight"
        assert_close(clipped[name], free[name], atol=1e-6, rtol=0)  # the first step of Adam is scale-free

    @pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
    def test_compile(self, tiny_config):
        options = ["trainer.max_steps=2", EVERY_STEP, NO_DROPOUT]
        plain, compiled = (train(tiny_config(*options, f"trainer.compile={on}")) for on in ("false", "true"))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
        assert losses(compiled) == pytest.approx(losses(plain), rel=1e-5)
        assert checkpoint(compiled)["state_dict"].keys() == checkpoint(plain)["state_dict"].keys()

    def test_activation_checkpointing_reaches_the_model(self, tiny_config):
        for on in (False, True):
            config = tiny_config(f"trainer.activation_checkpointing={on}")
            assert _build_module(config, _open_text(config, None)).model.activation_checkpointing == on

    def test_progress_before_the_first_step(self, tiny_config, monkeypatch, capsys):
        monkeypatch.setattr(progress, "LOG_SECONDS", 0)
        train(tiny_config("trainer.max_steps=1", "trainer.progress_bar=true", "trainer.accumulate_grad_batches=3"))
        assert sum(" left" in line for line in capsys.readouterr().err.splitlines()) == 1

    @pytest.mark.parametrize(("seconds", "steps"), [(0, (1, 2)), (1000, (2,))])
    def test_progress_without_a_terminal(self, tiny_config, monkeypatch, capsys, seconds, steps):
        monkeypatch.setattr(progress, "LOG_SECONDS", seconds)
        train(tiny_config("trainer.max_steps=2", "trainer.progress_bar=true"))
        lines = capsys.readouterr().err.splitlines()
        number = r"[\d,]+(\.\d+)?"
        assert sum(" left" in line for line in lines) == len(steps)
        for step in steps:
            line = rf"epoch 1/25  step {step}/2  loss {number}  perplexity {number}  {number} tokens/s  [\d:]+ left"
            assert any(re.fullmatch(line, shown) for shown in lines), lines
        assert any(re.fullmatch(rf"epoch 1, step 2: val/loss {number}, .*", shown) for shown in lines)

    @pytest.mark.parametrize("terminal", [False, True])
    @pytest.mark.parametrize(
        ("until_max_time", "expected"),
        [(math.inf, "0:01:00 left"), (42, "0:00:42 to max_time"), (-1, "0:00:00 to max_time")],
    )
    def test_time_left_counts_the_validations(self, monkeypatch, capsys, terminal, until_max_time, expected):
        """Two steps of 10 s and a validation of 100 s: the third step ends in 60 s, unless `max_time` is earlier."""
        bar, seconds = mock.MagicMock(), iter([0, 20, 120])
        monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
        monkeypatch.setattr(progress, "_rich_bar", lambda: bar)
        monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: terminal, raising=False)
        metrics = {"train/loss": 3.0, "train/perplexity": 20.0, "tokens_per_second": 100.0}
        metrics |= {"val/loss": 3.0, "val/perplexity": 20.0, "val/word_perplexity": 20.0}
        trainer = SimpleNamespace(callback_metrics=metrics, current_epoch=0, max_epochs=1, global_step=0)
        module, shown = SimpleNamespace(hparams={"total_steps": 3}), progress.Progress(lambda: until_max_time)
        shown.on_train_start(trainer, module)
        trainer.global_step = 1
        shown.on_train_batch_end(trainer, module, None, None, 0)
        shown.on_validation_end(trainer, module)
        trainer.global_step = 2
        shown.on_train_batch_end(trainer, module, None, None, 1)
        left = bar.update.call_args.kwargs["left"] if terminal else capsys.readouterr().err.splitlines()[-1]
        assert left.endswith(expected)

    def test_ema(self, tiny_config):
        options = ["trainer.max_epochs=1", "text_generator.every_n_epochs=1", "optimizer.learning_rate=0.1"]
        folder = train(tiny_config(*options, "trainer.ema_decay=0.9"))
        contents = checkpoint(folder)
        weight = "model.output.weight"
        assert not torch.equal(contents["state_dict"][weight], contents["current_model_state"][weight])
        record = json.loads((folder / "samples.jsonl").read_text())
        controls = {name: record[name] for name in ("prompt", "num_tokens", "temperature", "top_k", "seed")}
        last = load(folder / "checkpoints" / "last.ckpt")
        assert generate_text(last, **controls) == record["text"], "the text is not from the average, which is saved"

    def test_early_stopping(self, tiny_config):
        folder = train(tiny_config("trainer.max_epochs=50", "trainer.patience=2", "optimizer.learning_rate=1e-12"))
        assert runs.read_record(folder)["epochs"] <= 4

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            (["trainer.patience=2", "data.validation_share=0"], "trainer.patience=2: nothing is held out"),
            (["trainer.accelerator=gpu"], "trainer.accelerator=gpu: PyTorch finds no GPU here"),
            (["trainer.val_check_interval=999"], "trainer.val_check_interval=999: an epoch has only"),
            (["data.batch_size=1", "trainer.devices=2"], "data.batch_size=1: must be at least the number of processes"),
            (
                ["text_generator.every_n_epochs=1", "text_generator.top_k=99"],
                "text_generator.top_k=99: the text has only 26",
            ),
            (["logger=wandb"], r"logger.name=wandb: not installed; pip install 'minigpt_pl\[wandb\]'"),
        ],
    )
    def test_missing_parts_of_the_environment(self, tiny_config, tmp_path, monkeypatch, overrides, message):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(InputError, match=message):
            train(tiny_config(*overrides))
        assert not [path for path in tmp_path.glob("outputs/*") if path.name != "cache"]

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            (
                ["text_generator.temperature=0.5"],
                "text_generator.temperature=0.5: has no effect with .*every_n_epochs=0",
            ),
            (["find_learning_rate=true", "run_name=mine"], "run_name=mine: has no effect with find_learning_rate"),
        ],
    )
    def test_settings_without_effect_are_refused(self, tiny_config, overrides, message):
        with pytest.raises(InputError, match=message):
            tiny_config(*overrides)

    def test_default_top_k_works_with_eight_words(self, tiny_config, tmp_path):
        (tmp_path / "few.txt").write_text("one two three four five\n" * 40)
        config = tiny_config(f"data.path={tmp_path / 'few.txt'}", "trainer.max_epochs=1", "data.validation_share=0")
        config.text_generator.every_n_epochs = 1
        record = json.loads((train(config) / "samples.jsonl").read_text())
        assert record["top_k"] == 8

    def test_a_vocabulary_that_does_not_fit_the_text(self, tiny_config, tmp_path, caplog):
        file = train(tiny_config("trainer.max_steps=1", "run_name=a")) / "tokenizer.json"
        (tmp_path / "other.txt").write_text("the zebra is a lion\n" * 40)
        options = ["trainer.max_steps=1", "data.validation_share=0", f"data.path={tmp_path / 'other.txt'}"]
        train(tiny_config(*options, f"data.tokenizer={file}", "model.vocab_size=99", "run_name=b"))
        assert "model.vocab_size=99: has no effect, because the model uses the 26 tokens of data." in caplog.text
        assert "50% of the tokens are [UNK], unknown words; give another data.tokenizer." in caplog.text
        caplog.clear()
        train(tiny_config(*options, "run_name=c"))
        assert "[UNK]" not in caplog.text and "no effect" not in caplog.text

    def test_a_default_prompt_without_known_words(self, tiny_config, tmp_path):
        (tmp_path / "x.txt").write_text("  y  \n" * 400)
        options = [f"data.path={tmp_path / 'x.txt'}", "data.tokenizer=bpe", "model.vocab_size=4"]
        with pytest.raises(InputError, match="text_generator.prompts: the default ' ' has no known word; raise model"):
            train(tiny_config(*options, "text_generator.every_n_epochs=1", "data.validation_share=0"))

    def test_documents_of_one_word_have_no_target(self, tiny_config, tmp_path):
        (tmp_path / "words.txt").write_text("cat\ndog\n" * 40)
        with pytest.raises(InputError, match="data.end_token=false: all documents have one word"):
            train(tiny_config(f"data.path={tmp_path / 'words.txt'}", "data.end_token=false", "data.validation_share=0"))

    @pytest.mark.parametrize(
        ("override", "reason"),
        [
            ("trainer.limit_val_batches=0", "trainer.limit_val_batches=0"),
            ("data.validation_share=0", "data.validation_share=0 holds out nothing"),
        ],
    )
    def test_why_there_is_no_validation(self, tiny_config, caplog, override, reason):
        caplog.set_level("INFO")
        train(tiny_config("trainer.max_steps=1", override))
        assert f"This run has no validation ({reason})" in caplog.text

    @pytest.mark.parametrize("change", ["tokenizer=char", "lowercase=false"])
    def test_other_tokens_cannot_continue_a_run(self, tiny_config, change):
        folder = train(tiny_config("trainer.max_steps=1"))
        with pytest.raises(InputError) as error:
            train(tiny_config("trainer.max_steps=2", f"data.{change}"), resume_from=newest_checkpoint(folder))
        name, value = change.split("=")
        assert [line.lower().split(":")[0] for line in error.value.problems] == [f"data.{name}={value}"]

    def test_held_out_documents_of_one_word_have_no_target(self, tiny_config, tmp_path):
        (tmp_path / "words.txt").write_text("cat\ndog\n")
        options = [f"data.validation_path={tmp_path / 'words.txt'}", "data.end_token=false"]
        with pytest.raises(InputError, match="trainer.patience=2: nothing is held out"):
            train(tiny_config(*options, "trainer.patience=2"))
        folder = train(tiny_config(*options, "trainer.max_steps=1", EVERY_STEP))
        assert not any("val/loss" in row for row in read_metrics(folder))

    def test_outside_the_main_thread(self, tiny_config):
        folders = []
        thread = threading.Thread(target=lambda: folders.append(train(tiny_config("trainer.max_steps=1"))))
        thread.start()
        thread.join()
        assert checkpoint(folders[0])["global_step"] == 1

    def test_without_held_out_text_there_is_the_last_checkpoint(self, tiny_config):
        folder = train(tiny_config("trainer.max_epochs=1", "data.validation_share=0"))
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["last.ckpt"]

    def test_last_is_the_last_even_if_an_earlier_one_is_best(self, tiny_config):
        folder = train(tiny_config("trainer.max_epochs=4", "optimizer.learning_rate=0.3"))
        val = losses(folder, "val/loss")
        assert checkpoint(folder)["epoch"] == 3
        assert checkpoint(folder, "best")["global_step"] == min(val, key=val.get) + 1

    def test_max_steps_ends_with_a_validation_and_a_text(self, tiny_config):
        folder = train(tiny_config("trainer.max_steps=3", "text_generator.every_n_epochs=1"))
        assert checkpoint(folder)["global_step"] == 3
        assert list(losses(folder, "val/loss")) == [2]
        assert (folder / "samples.jsonl").exists()

    def test_max_time(self, tiny_config):
        folder = train(tiny_config("trainer.max_epochs=100000", "trainer.max_time='00:00:00:02'"))
        assert runs.read_record(folder)["status"] == "finished"
        steps = checkpoint(folder)["global_step"]
        again = tiny_config("trainer.max_epochs=100000", "trainer.max_time='00:00:00:01'")
        train(again, resume_from=folder / "checkpoints" / "last.ckpt")
        assert checkpoint(folder)["global_step"] == steps + 1, "the time before a resume must count"

    @pytest.mark.parametrize(("more", "steps"), [(-1, 3), (0, 1)])
    def test_max_time_counts_days_hours_minutes_and_seconds(self, tiny_config, monkeypatch, more, steps):
        seconds = ((2 * 24 + 3) * 60 + 4) * 60 + 5
        monkeypatch.setattr(SaveAndStop, "_seconds", lambda self: seconds + more)
        folder = train(tiny_config("trainer.max_steps=3", "trainer.max_time='02:03:04:05'"))
        assert checkpoint(folder)["global_step"] == steps

    @pytest.mark.parametrize("end", ["log line", "max_steps", "max_time", "Ctrl-C"])
    def test_a_diverged_training_stops_and_overwrites_nothing(self, tiny_config, monkeypatch, end):
        folder = train(tiny_config("trainer.max_epochs=1", "run_name=mine"))
        last = folder / "checkpoints" / "last.ckpt"
        before = last.read_bytes()
        contents = torch.load(last, weights_only=True)
        contents["state_dict"]["model.output.bias"].fill_(torch.nan)
        torch.save(contents, folder / "checkpoints" / "broken.ckpt")
        options = ["trainer.max_epochs=2"]
        if end != "log line":
            options.append("trainer.log_every_n_steps=1000")
        if end == "max_steps":
            options.append(f"trainer.max_steps={contents['global_step'] + 2}")
        elif end == "max_time":
            options.append("trainer.max_time='00:00:00:01'")
            monkeypatch.setattr(SaveAndStop, "_seconds", lambda self: 9)
        elif end == "Ctrl-C":
            monkeypatch.setattr(StopAtNaN, "on_train_batch_end", lambda *args: signal.raise_signal(signal.SIGINT))
        with pytest.raises(InputError, match="optimizer.learning_rate=0.001: the training has diverged"):
            train(tiny_config(*options), resume_from=folder / "checkpoints" / "broken.ckpt")
        assert last.read_bytes() == before and runs.read_record(folder)["status"] == "failed"
        assert runs.read_record(folder)["steps"] < 30, "it did not stop inside the epoch"

    def test_learning_rate_finder(self, tiny_config, tmp_path):
        train(tiny_config("find_learning_rate=true"))
        assert (tmp_path / "outputs" / "learning_rate.png").exists()

    def test_logger(self, tiny_config):
        folder = train(tiny_config("trainer.max_steps=2", "logger=tensorboard", EVERY_STEP))
        assert list(folder.glob("events.out.tfevents*")) and losses(folder)

    def test_profiler(self, story, tmp_path):
        options = [*TINY_RUN, f"data.path={story}", "trainer.max_steps=2", "trainer.profiler=simple"]
        done = run_module("train", *options, cwd=tmp_path)
        assert "Action" in done.stderr and "run_training_batch" in done.stderr

    def test_overfitting(self, tiny_config):
        options = ["debug=overfit", "model.embed_dim=32", "optimizer.learning_rate=0.01", "trainer.max_epochs=80"]
        folder = train(tiny_config(*options, "text_generator.every_n_epochs=0"))
        assert list(losses(folder).values())[-1] < 0.5
