"""A text that is read while the training runs."""

import signal
import threading
from types import SimpleNamespace

import numpy as np
import pyarrow
import pytest
import torch
from conftest import EVERY_STEP, checkpoint, imdb_config, losses, run_main, text_config, train
from pyarrow import parquet

from minigpt_pl.data import parquet as parquet_module
from minigpt_pl.data import streaming
from minigpt_pl.data.corpus import held_out_texts, open_corpus
from minigpt_pl.data.datamodule import TextDataModule
from minigpt_pl.errors import InputError, TextLostError
from minigpt_pl.signals import Interrupted


@pytest.fixture
def folder(story, tmp_path, monkeypatch):
    """Three Parquet files with the story, in row groups of 10 documents. Chunks have 20 rows, windows about 64."""
    monkeypatch.setattr(parquet_module, "CHUNK_ROWS", 20)
    monkeypatch.setattr(parquet_module, "WAITS", (0, 0))
    monkeypatch.setattr(streaming, "WINDOW_ROWS", 64)
    lines = story.read_text().splitlines()
    (tmp_path / "text").mkdir()
    for i in range(3):
        table = pyarrow.table({"text": [*lines[i * 100 : (i + 1) * 100], " ", None]})
        parquet.write_table(table, tmp_path / "text" / f"{i}.parquet", row_group_size=10)
    return tmp_path / "text"


def make(folder, **changes) -> TextDataModule:
    options = {"batch_size": 16, "streaming": True, "sample_documents": 100, "cache_dir": str(folder.parent / "cache")}
    datamodule = TextDataModule(text_config(folder, **options | changes), 26, 16)
    datamodule.setup()
    return datamodule


def texts_of(datamodule, batches) -> list[str]:
    """The sequences as words, with the last target."""
    whole = [torch.cat([batch.inputs, batch.targets[:, -1:]], 1).tolist() for batch in batches]
    return [datamodule.tokenizer.decode(row) for rows in whole for row in rows]


def take(datamodule, number: int) -> list[str]:
    """The sequences of the next batches, over the ends of epochs."""
    loader, batches = datamodule.train_dataloader(), []
    while len(batches) < number:
        batches += [batch for _, batch in zip(range(number - len(batches)), loader, strict=False)]
    return texts_of(datamodule, batches)


def test_a_pass_has_every_training_document_once(folder, story):
    whole, datamodule = text_config(story, cache_dir=str(folder.parent / "cache")), make(folder)
    lines = [
        line for line in story.read_text().splitlines() if line not in {*held_out_texts(whole, datamodule.tokenizer)}
    ]
    assert 270 < len(lines) < 300
    expected = [datamodule.tokenizer.decode(datamodule.tokenizer.encode(line).ids) for line in lines]
    sequences = take(datamodule, 2 * len(lines) // 16)
    first, second = sequences[: len(lines)], sequences[len(lines) : 2 * len(lines)]
    words = [[" ".join(text.split()[:9]) for text in texts] for texts in (first, expected)]
    assert sorted(words[0]) == sorted(words[1]) and first != second
    assert len(datamodule.train_dataloader()) * 16 == pytest.approx(len(lines), abs=40), "an epoch is about a pass"


def test_words_and_held_out_text_come_from_the_first_documents(folder):
    datamodule = make(folder, validation_share=0.2)
    record = datamodule.corpus.record
    assert record["train_documents"] + record["validation_documents"] == 100 and record["streamed_rows"] == 306
    held_out = [text.lower() for text in held_out_texts(datamodule.data, datamodule.tokenizer)]
    assert len(held_out) == record["validation_documents"]
    trained = {text.removesuffix(" [END]") for text in take(datamodule, 30)}
    known = [datamodule.tokenizer.decode(datamodule.tokenizer.encode(text).ids[:17]) for text in held_out]
    assert not trained & {*known}


@pytest.mark.parametrize("cut", ["truncate", "pack"])
def test_a_validation_text_is_not_trained_on(folder, story, tmp_path, cut):
    held_out = story.read_text().splitlines()[30:60]
    (tmp_path / "held_out.txt").write_text("\n".join(held_out) + "\n")
    datamodule = make(folder, validation_path=str(tmp_path / "held_out.txt"), cut=cut)
    assert len(datamodule.corpus.held_out) == 30 and datamodule.corpus.record["validation_documents"] == 30
    if cut == "truncate":
        documents = {datamodule.tokenizer.decode(datamodule.tokenizer.encode(line).ids[:17]) for line in held_out}
        trained = [text.removesuffix(" [END]") for text in take(datamodule, 20)]
        assert not documents & {*trained} and len({*trained}) > 200


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("done", [1, 4, 5, 17, 19, 23])
def test_resume_is_exact_with_any_number_of_processes(folder, done, accumulate):
    datamodule = make(folder)

    def loader(rank=0, world_size=1):
        options = {"rank": rank, "world_size": world_size, "accumulate": accumulate}
        return datamodule._build_train_loader(datamodule._train_sequences, **options)

    def batches(made, number):
        found = []
        while len(found) < number:
            found += [batch for _, batch in zip(range(number - len(found)), made, strict=False)]
        return found

    expected = batches(loader(), 40)
    interrupted = loader()
    batches(interrupted, done)
    assert len(interrupted.state()) == 5
    parts = [loader(rank, 2) for rank in range(2)]
    for part in parts:
        part.restore(interrupted.state())
    for whole, *pair in zip(expected[done:], *(batches(part, 40 - done) for part in parts), strict=True):
        assert all(torch.equal(batch.inputs, whole.inputs[rank::2]) for rank, batch in enumerate(pair))
        assert all((b.num_targets, b.step_targets) == (whole.num_targets, whole.step_targets) for b in pair)
        assert whole.num_targets == sum(int((b.targets != 0).sum()) for b in pair)


def test_a_streamed_run_continues_exactly_after_a_signal(folder, tiny_config, monkeypatch):
    from minigpt_pl.training import checkpointing

    options = [f"data.path={folder}", "data.streaming=true", "data.sample_documents=100", "model.vocab_size=26"]
    options += ["trainer.max_epochs=2", EVERY_STEP]
    whole = train(tiny_config(*options, "run_name=whole"))

    def press_ctrl_c(self, trainer, *args):
        if (trainer.current_epoch, args[-1]) == (1, 4):
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(checkpointing.StopAtNaN, "on_train_batch_end", press_ctrl_c)
        train(tiny_config(*options, "run_name=parts"))
    parts = whole.with_name("parts")
    train(tiny_config(*options, "run_name=parts"), resume_from=parts / "checkpoints" / "last.ckpt")
    first, second = checkpoint(whole), checkpoint(parts)
    assert all(torch.equal(first["state_dict"][name], second["state_dict"][name]) for name in first["state_dict"])
    assert losses(whole) == losses(parts)


def test_a_lost_text_ends_the_training_with_a_checkpoint(folder, tiny_config, tmp_path):
    """The files are gone after the first window. The run continues when they are back."""
    options = [f"data.path={folder}", "data.streaming=true", "data.sample_documents=100", "model.vocab_size=26"]
    options += ["trainer.max_epochs=2", EVERY_STEP, "run_name=mine"]
    reads, rows = [], parquet_module._rows

    def lose_after_15(*arguments):
        reads.append(arguments)
        if len(reads) > 15:
            raise ConnectionResetError("the connection is gone")
        return rows(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet_module, "_rows", lose_after_15)
        with pytest.raises(TextLostError, match="data.path=.*: cannot be read any more .the connection is gone.; mend"):
            train(tiny_config(*options))
    run = tmp_path / "outputs" / "mine"
    steps = checkpoint(run)["global_step"]
    assert 0 < steps < 17
    train(tiny_config(*options), resume_from=run / "checkpoints" / "last.ckpt")
    assert [*losses(run)] == list(range(len(losses(run)))) or checkpoint(run)["global_step"] > steps
    whole = train(tiny_config(*options, "run_name=whole"))
    assert losses(run) == losses(whole)


def test_the_next_window_is_read_ahead(folder, monkeypatch):
    datamodule, read = make(folder), threading.Event()
    read_window = streaming.StreamLoader._read

    def read_and_tell(self, pass_number, chunks, number):
        window = read_window(self, pass_number, chunks, number)
        if number == 1:
            read.set()
        return window

    monkeypatch.setattr(streaming.StreamLoader, "_read", read_and_tell)
    next(iter(datamodule.train_dataloader()))
    assert read.wait(60), "nothing was read ahead"


def test_errors_of_the_disk_are_tried_again(folder, monkeypatch, caplog):
    whole = take(make(folder), 20)
    rows, failures = parquet_module._rows, []

    def fail_in_the_middle(*arguments):
        for number, row in enumerate(rows(*arguments)):
            if number == 7 and len(failures) < 5 and failures.count(arguments[1]) < 2:
                failures.append(arguments[1])
                raise OSError("stale file handle")
            yield row

    monkeypatch.setattr(parquet_module, "_rows", fail_in_the_middle)
    assert take(make(folder), 20) == whole and len(failures) == 5
    assert caplog.text.count("cannot be read (OSError). Trying again in 0 s.") == 5


@pytest.mark.parametrize(
    ("named", "seconds"), [("30", 30), ("3", 5), ("99999", 600), ("Wed, 21 Oct 2015 07:28:00 GMT", 5)]
)
def test_the_time_of_retry_after_is_waited(folder, monkeypatch, named, seconds):
    """Older versions of huggingface_hub do not wait so long."""
    datamodule, rows, errors, waits = make(folder), parquet_module._rows, [OSError("busy")], []
    errors[0].response = SimpleNamespace(status_code=429, headers={"Retry-After": named})

    def fail_once(*arguments):
        if errors:
            raise errors.pop()
        return rows(*arguments)

    monkeypatch.setattr(parquet_module, "_rows", fail_once)
    monkeypatch.setattr(parquet_module, "WAITS", (5,))
    monkeypatch.setattr(parquet_module.time, "sleep", waits.append)
    take(datamodule, 1)
    assert waits == [seconds]


def test_a_window_is_shuffled(folder, monkeypatch):
    windows, read_window = [], streaming.StreamLoader._read
    monkeypatch.setattr(streaming.StreamLoader, "_read", lambda *a: windows.append(w := read_window(*a)) or w)
    take(make(folder), 4)
    first, second, *_ = (window.rows.tolist() for window in windows)
    assert sorted(first) == [*range(len(first))] != first and first[:20] != second[:20]


def test_memory_holds_two_windows(folder):
    windows = []
    read_window = streaming.StreamLoader._read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming.StreamLoader, "_read", lambda *a: windows.append(len((w := read_window(*a)).rows)) or w)
        take(make(folder), 4)
    assert len(windows) <= 3 and max(windows) <= 64 + 20


def test_streaming_reads_only_footers_at_a_second_start(folder, monkeypatch):
    make(folder)
    monkeypatch.setattr(parquet_module, "_rows", lambda *_: pytest.fail("the text was read"))
    make(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_column": "review"}, "data.text_column=review: .* has no such column; it has text"),
        ({"sample_documents": 3}, "data.sample_documents=3: they have only 1. different words; raise it, lower model"),
        ({"tokenizer": "none.json"}, "data.tokenizer=none.json: no such file"),
        ({"validation_path": "none.txt"}, "data.validation_path=none.txt: no such file or folder"),
    ],
)
def test_bad_settings(folder, changes, message):
    with pytest.raises(InputError, match=message):
        make(folder, **changes)


def test_a_broken_file_is_named(folder):
    (folder / "1.parquet").write_bytes((folder / "1.parquet").read_bytes()[:300])
    with pytest.raises(InputError, match=r"data.path=1.parquet: cannot be read .*; give complete Parquet files"):
        make(folder)


def test_streaming_needs_parquet(story, tmp_path):
    for config in (text_config(story, streaming=True), imdb_config("packaged", streaming=True)):
        with pytest.raises(
            InputError, match="data.streaming=true: data.(path|source)=.* has no Parquet files to train on"
        ):
            open_corpus(config, 20)
    done = run_main("train", "data=text", f"data.path={story}", "data.sample_documents=5", cwd=tmp_path)
    assert done.stderr == "error: data.sample_documents=5: has no effect with data.streaming=false; leave it out\n"
    done = run_main("train", "data.streaming=true", "data.max_sequences=500", cwd=tmp_path)
    assert done.stderr == "error: data.max_sequences=500: has no effect with data.streaming=true; leave it out\n"


def test_the_words_of_a_given_tokenizer(folder, story, tmp_path):
    open_corpus(text_config(story, cache_dir=str(tmp_path / "a")), 12).tokenizer.save(str(tmp_path / "words.json"))
    given = make(folder, tokenizer=str(tmp_path / "words.json"), sample_documents=5)
    assert given.vocab_size == 12 and given.has_validation is (given.corpus.validation is not None)
    whole = open_corpus(text_config(story, cache_dir=str(tmp_path / "b"), tokenizer=str(tmp_path / "words.json")), 200)
    assert whole.tokenizer.get_vocab_size() == 12 and np.unique(whole.train.tokens).max() == 11


def test_imdb_in_the_hubs_layout(folder, tmp_path):
    (tmp_path / "plain_text").mkdir()
    for i, split in enumerate(("train", "test", "unsupervised")):
        (folder / f"{i}.parquet").rename(tmp_path / "plain_text" / f"{split}-00000-of-00001.parquet")
    config = imdb_config(str(tmp_path), streaming=True, sample_documents=50, validation_documents=7, batch_size=16)
    config.cache_dir = str(tmp_path / "cache")
    corpus = open_corpus(config, 20)
    assert (corpus.record["validation_documents"], corpus.record["streamed_rows"]) == (7, 204)
    assert len(corpus.held_out) == 7
