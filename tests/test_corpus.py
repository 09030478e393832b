"""The encoded text and its cache."""

import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from conftest import imdb_config, text_config

from minigpt_pl.data import encoding, sources
from minigpt_pl.data.corpus import encode_text, open_corpus, open_run_corpus
from minigpt_pl.data.sources import Source
from minigpt_pl.errors import InputError
from minigpt_pl.files import is_running
from minigpt_pl.tokenizer import NOTEBOOK, split_words


@pytest.fixture
def config(story, tmp_path):
    return text_config(story, cache_dir=str(tmp_path / "cache"), validation_share=0.2)


def documents(corpus, ids):
    return [corpus.tokenizer.decode(ids.tokens[a : b - 1]) for a, b in zip(ids.offsets, ids.offsets[1:], strict=False)]


def test_every_document_is_encoded_once_with_an_end(config, story):
    corpus = open_corpus(config, 200)
    lines = [line.lower() for line in story.read_text().splitlines()]
    train, validation = documents(corpus, corpus.train), documents(corpus, corpus.validation)
    assert sorted(train + validation) == sorted(lines)
    end_id = corpus.tokenizer.token_to_id("[END]")
    assert (corpus.train.tokens[corpus.train.offsets[1:] - 1] == end_id).all()
    assert (corpus.train.tokens == end_id).sum() == len(train)
    assert corpus.record["train_documents"] == len(train)


def test_held_out_share_is_chosen_by_content(config):
    corpus = open_corpus(config, 200)
    train, validation = documents(corpus, corpus.train), documents(corpus, corpus.validation)
    assert 0.1 < len(validation) / (len(train) + len(validation)) < 0.3
    assert not set(train) & set(validation), "a document is in both splits"
    assert max(Counter(train + validation).values()) > 1, "the text has no duplicates"


def test_the_vocabulary_comes_from_the_training_text_only(config, tmp_path):
    (tmp_path / "a.txt").write_text("one two three one\n")
    (tmp_path / "b.txt").write_text("four one\n")
    config = text_config(tmp_path / "a.txt", validation_path=str(tmp_path / "b.txt"), cache_dir=config.cache_dir)
    corpus = open_corpus(config, 200)
    assert set(corpus.tokenizer.get_vocab()) == {"", "[UNK]", "one", "two", "three", "[END]"}
    assert documents(corpus, corpus.validation) == ["[UNK] one"]


def test_duplicates_of_validation_documents_are_not_trained_on(config, tmp_path):
    (tmp_path / "a.txt").write_text("kept\nshared\nkept too\nshared\n")
    (tmp_path / "b.txt").write_text("shared\n")
    config = text_config(tmp_path / "a.txt", validation_path=str(tmp_path / "b.txt"), cache_dir=config.cache_dir)
    corpus = open_corpus(config, 200)
    assert documents(corpus, corpus.train) == ["kept", "kept too"]
    assert corpus.record["validation_duplicates_left_out"] == 2


def test_a_second_start_encodes_nothing(config, monkeypatch):
    first = open_corpus(config, 200)
    monkeypatch.setattr(encoding, "encode", lambda *_: pytest.fail("encoded again"))
    second = open_corpus(config, 200)
    assert isinstance(second.train.tokens, np.memmap) and second.train.tokens.dtype == np.uint16
    assert np.array_equal(first.train.tokens, second.train.tokens)


def test_a_changed_text_or_setting_is_encoded_again(config, story, tmp_path):
    copy = tmp_path / "copy.txt"
    copy.write_text(story.read_text())
    config.path = str(copy)
    fingerprints = {open_corpus(config, 200).record["fingerprint"], open_corpus(config, 150).record["fingerprint"]}
    copy.write_text(story.read_text() + "One more line.\n")
    fingerprints.add(open_corpus(config, 200).record["fingerprint"])
    config.validation_share = 0.1
    fingerprints.add(open_corpus(config, 200).record["fingerprint"])
    assert len(fingerprints) == 4


def test_a_run_opens_the_reviews_that_auto_took(story, tmp_path, monkeypatch):
    """It does not ask the hub again: the hub could now have an answer, and give another text."""
    lines = story.read_text().splitlines()
    small = Source("IMDB reviews, packaged", {"packaged": "small"}, lambda: iter(lines), None)
    monkeypatch.setattr(sources, "_packaged_reviews", lambda: small)
    monkeypatch.setattr(sources, "hub_revision", mock.Mock(side_effect=[OSError("silent"), "0123456789"]))
    data = imdb_config("auto", cache_dir=str(tmp_path / "cache"))
    corpus = open_corpus(data, 200)
    (tmp_path / "config.yaml").write_text(json.dumps({"data": asdict(data), "model": {"vocab_size": 200}}))
    (tmp_path / "run.json").write_text(json.dumps({"text": corpus.record}))
    opened, again = open_run_corpus(tmp_path, corpus.tokenizer, None)
    assert again.record == corpus.record and opened.source == "packaged"
    (tmp_path / "run.json").write_text(json.dumps({"text": corpus.record | {"source": "imdb from the hub"}}))
    with pytest.raises(InputError, match=r"^data.source=hub: .* cannot be reached"):
        monkeypatch.setattr(sources, "hub_revision", mock.Mock(side_effect=OSError("silent")))
        open_run_corpus(tmp_path, corpus.tokenizer, None)
    assert open_run_corpus(tmp_path, corpus.tokenizer, "auto")[1].record == corpus.record  # asks again


def test_a_failed_encoding_leaves_nothing_behind(config, tmp_path):
    path = tmp_path / "bad.csv"
    path.write_text("text,n\nfine,1\n")
    config = text_config(path, text_column="none", cache_dir=config.cache_dir)
    with pytest.raises(InputError):
        open_corpus(config, 200)
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".lock"]


def _fingerprint(config):
    return open_corpus(config, 200).record["fingerprint"]


def test_processes_that_start_together_share_one_encoding(config, tmp_path):
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(3)
    with ProcessPoolExecutor(3, mp_context=context, initializer=ready.wait) as pool:
        fingerprints = set(pool.map(_fingerprint, [config] * 3))
    assert len(fingerprints) == 1
    assert sum(path.is_dir() for path in (tmp_path / "cache").iterdir()) == 1


def test_a_small_text_gives_a_warning(config, caplog):
    open_corpus(config, 200)
    assert "tokens. With fewer than 1,000,000, expect poor results" in caplog.text


@pytest.mark.parametrize("piece", [1, 7, 2**20])
def test_the_ids_do_not_depend_on_the_size_of_the_pieces(config, monkeypatch, piece):
    monkeypatch.setattr(encoding, "PIECE", piece)
    corpus = open_corpus(config, 200)
    assert corpus.record["content"] == "b9d7111c8a356d6b"  # the ids of version 0.1.0
    assert (len(corpus.train.tokens), len(corpus.validation.tokens)) == (3150 + 225, 1050 + 75)


def test_the_memory_does_not_depend_on_the_length_of_the_text(story, monkeypatch, tmp_path):
    for name, size in {"PIECE": 10_000, "BATCH_CHARACTERS": 100_000, "SHARD_TOKENS": 40_000}.items():
        monkeypatch.setattr(encoding, name, size)
    lines = story.read_text().splitlines()
    peaks = []
    for times in (30, 150):
        documents = partial(itertools.chain.from_iterable, itertools.repeat(lines, times))
        (tmp_path / str(times)).mkdir()
        tracemalloc.start()
        encoding.encode(tmp_path / str(times), Source("story", {}, documents, None), 0.2, 200, NOTEBOOK, None)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]


def test_a_text_that_grows_while_it_is_read(config, story, monkeypatch, tmp_path):
    copy = tmp_path / "copy.txt"
    shutil.copy(story, copy)
    config.path = str(copy)
    encode = encoding.encode

    def grow_and_encode(*arguments):
        with copy.open("a") as file:
            file.write("One more line.\n")
        return encode(*arguments)

    monkeypatch.setattr(encoding, "encode", grow_and_encode)
    with pytest.raises(InputError, match="data.path=.*copy.txt: has changed while it was read; start again"):
        open_corpus(config, 200)
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".lock"]


def test_ids_equal_the_tokenizers_on_real_reviews(imdb, imdb_texts, tmp_path):
    config = imdb_config(str(imdb), train_splits=["unsupervised"], validation_split=None, cache_dir=str(tmp_path))
    config.validation_share = 0.0
    corpus = open_corpus(config, 5_000)
    assert corpus.validation is None
    assert corpus.record["content"] == "52343c4d31d261f4"  # the ids of version 0.1.0
    texts = imdb_texts("unsupervised")
    encoded = corpus.tokenizer.encode_batch(texts)
    assert corpus.record["train_tokens"] == sum(len(split_words(text)) for text in texts)
    for i, expected in enumerate(encoded):
        assert corpus.train.tokens[corpus.train.offsets[i] : corpus.train.offsets[i + 1] - 1].tolist() == expected.ids


@pytest.fixture
def many_shards(monkeypatch):
    """About five shards for the story, of three batches each."""
    for name, size in {"BATCH_CHARACTERS": 1_500, "SHARD_TOKENS": 900, "PIECE": 100}.items():
        monkeypatch.setattr(encoding, name, size)


def _contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("validation", [False, True])
def test_shards_contain_the_same_text(config, story, tmp_path, monkeypatch, validation):
    if validation:
        (tmp_path / "held_out.txt").write_text("\n".join(story.read_text().splitlines()[250:] + ["A new word."]) + "\n")
        config.validation_path = str(tmp_path / "held_out.txt")
    whole = open_corpus(config, 20)
    config.cache_dir += "-shards"
    for name, size in {"BATCH_CHARACTERS": 1_500, "SHARD_TOKENS": 900, "PIECE": 100}.items():
        monkeypatch.setattr(encoding, name, size)
    parts = open_corpus(config, 20)
    assert len(parts.train.sizes) > 3
    for split in ("train", "validation"):
        for name in ("tokens", "offsets"):
            assert np.array_equal(getattr(getattr(parts, split), name), getattr(getattr(whole, split), name)), name
    assert {**parts.record, "content": ""} == {**whole.record, "content": ""}
    assert parts.tokenizer.to_str() == whole.tokenizer.to_str()


def test_the_files_do_not_depend_on_the_number_of_processes(config, many_shards):
    alone = encode_text(config, 20)
    config.cache_dir += "-2"
    assert _contents(encode_text(config, 20, processes=2)) == _contents(alone)


def test_processes_that_encode_do_not_import_torch():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import minigpt_pl.data.encoding"], capture_output=True, text=True
    )
    assert done.returncode == 0 and " numpy\n" in done.stderr and " torch\n" not in done.stderr


def _encode_and_die(config, moment: str, processes: int) -> None:
    """Encodes the text, and kills this process in the third shard or in the second pass."""
    encoding.BATCH_CHARACTERS, encoding.SHARD_TOKENS, encoding.PIECE = 1_500, 900, 100
    finish = encoding.write_text

    def finish_and_die(path, text):
        if path.name == "shard-00002" and moment == "in the third shard":
            workers = [child.pid for child in multiprocessing.active_children()]
            Path(config.cache_dir, "workers.json").write_text(json.dumps(workers))
            os.kill(os.getpid(), signal.SIGKILL)
        finish(path, text)

    encoding.write_text = finish_and_die
    if moment == "in the second pass":
        encoding.np.save = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    encode_text(config, 20, processes=processes)


@pytest.mark.parametrize(
    ("moment", "processes"), [("in the third shard", 1), ("in the second pass", 1), ("in the third shard", 2)]
)
def test_a_killed_encoding_continues(config, many_shards, monkeypatch, caplog, moment, processes):
    caplog.set_level("INFO")
    expected = _contents(encode_text(config, 20))
    config.cache_dir += "-killed"
    process = multiprocessing.get_context("spawn").Process(target=_encode_and_die, args=(config, moment, processes))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    workers = Path(config.cache_dir, "workers.json")
    running = json.loads(workers.read_text()) if workers.exists() else []
    assert len(running) == (2 if processes == 2 else 0)
    for _ in range(600):
        running = [process_id for process_id in running if is_running(process_id)]
        if running:
            time.sleep(0.1)
    assert not running, "they wait for a killed process"
    (leftover,) = (path for path in Path(config.cache_dir).iterdir() if path.is_dir())
    finished = len([*leftover.glob("shard-*")])
    assert finished == 2 if moment == "in the third shard" else finished > 3
    encoded, encode = [], encoding._encode_batch
    monkeypatch.setattr(
        encoding,
        "_encode_batch",
        lambda rules, batch: encoded.append(len(sum(batch[1].values(), []))) or encode(rules, batch),
    )
    assert _contents(encode_text(config, 20)) == expected
    assert 0 < sum(encoded) < 250 if moment == "in the third shard" else not encoded, (
        "a finished shard was encoded again"
    )
    assert "Continuing a killed encoding" in caplog.text
    assert not [path for path in Path(config.cache_dir).iterdir() if path.name.startswith(".")]


def test_a_shard_that_was_cut_by_a_power_cut_is_encoded_again(config, many_shards):
    expected = _contents(encode_text(config, 20))
    config.cache_dir += "-killed"
    process = multiprocessing.get_context("spawn").Process(
        target=_encode_and_die, args=(config, "in the second pass", 1)
    )
    process.start()
    process.join()
    (leftover,) = (path for path in Path(config.cache_dir).iterdir() if path.is_dir())
    os.truncate(leftover / "train-00001.provisional", 400)
    assert _contents(encode_text(config, 20)) == expected


def test_a_failed_encoding_keeps_its_finished_shards(config, story, many_shards, tmp_path):
    (tmp_path / "bad.jsonl").write_text(
        "".join(json.dumps({"text": line}) + "\n" for line in story.read_text().splitlines())
    )
    config = text_config(tmp_path / "bad.jsonl", cache_dir=config.cache_dir)
    read = encoding._read

    def fail_at_the_end(*arguments):
        yield from itertools.islice(read(*arguments), 200)
        raise InputError("the hub is gone")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(InputError, match="the hub is gone"):
        patch.setattr(encoding, "_read", fail_at_the_end)
        encode_text(config, 20)
    (leftover,) = (path for path in Path(config.cache_dir).iterdir() if path.is_dir())
    assert [*leftover.glob("shard-*")]
    encode_text(config, 20)
    assert not leftover.exists()
