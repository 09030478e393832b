"""The words of a text, and their ids."""

import hashlib
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from minigpt_pl.errors import InputError
from minigpt_pl.tokenizer import build_tokenizer, build_vocabulary, count_words, load_tokenizer, split_words

TEXT = (
    "It's a real-life movie, they don't say (really): \"no\" - or 'yes'; he'll give 3.5/10 & 50% off [sic]."
    " We're I'm they've he'd l'amour -7 -x a--b !? ... <br /><br/>< br /> end"
)
TOKENIZER = build_tokenizer(build_vocabulary(count_words([TEXT]), 500))
KNOWN_IDS = st.integers(2, TOKENIZER.get_vocab_size() - 2)
PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("it's real-life", ["it", "'s", "real", "-life"]),
        ("Movie.Good<br />Bad", ["movie", ".good", "bad"]),
        ("a<br/>b", ["a", "<br", "/", ">b"]),
        ("<BR />", []),
        ("É\u00a0x É", ["É\u00a0x", "É"]),
        ("a\\b \\ c", ["a\\b", "\\", "c"]),
        ("one\x0btwo\x0cthree\r\nfour\x85five", ["one", "two", "three", "four\x85five"]),
        ("[UNK] [END]", ["[unk", "]", "[end", "]"]),
        ("don't!!", ["don", "'t", "!", "!"]),
        ("", []),
    ],
)
def test_the_notebooks_rule(text, words):
    assert split_words(text) == words
    tokenizer = build_tokenizer(build_vocabulary(Counter(words), 100))
    assert tokenizer.encode(text).tokens == words


@PATIENT
@given(st.text(st.one_of(st.sampled_from("aZ .'-<br/>\\\t\n\u00a0É😀"), st.characters(exclude_categories=["Cs"]))))
def test_the_pipeline_equals_the_fast_rule(text):
    words = split_words(text)
    assert build_tokenizer(build_vocabulary(Counter(words), 10_000)).encode(text).tokens == words


def test_vocabulary_order():
    counts = Counter({"b": 2, "a": 2, "é": 2, "zz": 2, "often": 9, "once": 1})
    assert build_vocabulary(counts, 8) == ["", "[UNK]", "often", "é", "zz", "b", "a", "[END]"]
    assert len(build_vocabulary(counts, 100)) == 9


def test_vocabulary_of_the_50_000_reviews(imdb_texts):
    vocabulary = build_vocabulary(count_words(imdb_texts("train") + imdb_texts("test")), 20_000)
    assert len(vocabulary) == 20_000
    digest = hashlib.sha256("\n".join(vocabulary[:-1]).encode()).hexdigest()
    assert digest == "de27a312551bb70587c310066a6c4483c9698bd6eb87ab1d924a402552b9f3a4"


@pytest.mark.parametrize(
    "text",
    [
        "it's a real-life movie.",
        "they don't say (really): no!",
        'he said "yes", and i\'m',
        "we're they've he'd he'll",
        "3.5/10, 50%; [sic]",
    ],
)
def test_decoding_reads_well(text):
    tokenizer = build_tokenizer(build_vocabulary(count_words([text]), 100))
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@PATIENT
@given(st.lists(KNOWN_IDS, max_size=40))
def test_decoding_loses_nothing(ids):
    assert TOKENIZER.encode(TOKENIZER.decode(ids)).ids == ids


def test_decoding_loses_nothing_of_real_reviews(imdb_texts):
    texts = imdb_texts("unsupervised")[:2000]
    tokenizer = build_tokenizer(build_vocabulary(count_words(texts), 1_000_000))
    for text in texts:
        ids = tokenizer.encode(text).ids
        assert tokenizer.encode(tokenizer.decode(ids)).ids == ids


def test_other_libraries_load_the_file(tmp_path):
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    ids = TOKENIZER.encode(TEXT).ids
    assert 1 not in ids
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(TEXT).ids == ids
    transformers = pytest.importorskip("transformers", reason="transformers is in the extra `test`")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert fast(TEXT)["input_ids"] == ids
    assert fast.decode(ids) == TOKENIZER.decode(ids)


@pytest.mark.parametrize("contents", ["{}", "no json", '{"version": "1.0"}'])
def test_a_wrong_file_is_named(tmp_path, contents):
    path = tmp_path / "tokenizer.json"
    path.write_text(contents)
    with pytest.raises(InputError, match=r"tokenizer\.json: not a tokenizer"):
        load_tokenizer(path)
