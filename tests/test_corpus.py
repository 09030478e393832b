"""The encoded text and its cache."""

import itertools
import multiprocessing
import shutil
import tracemalloc
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
import pytest
from conftest import imdb_config, text_config

from minigpt_pl.data import encoding
from minigpt_pl.data.corpus import open_corpus
from minigpt_pl.data.sources import Source
from minigpt_pl.errors import InputError
from minigpt_pl.tokenizer import split_words


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
        encoding.encode(tmp_path / str(times), Source("story", {}, documents, None), 0.2, 200, None)
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
