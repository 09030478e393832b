"""Words and ids are those of the seed's TextVectorization."""

import json
import random

import numpy as np
import pytest

from minigpt_pl.tokenizer import END, build_tokenizer, build_vocabulary, count_words

from .programs import SEED_VOCABULARY, run_keras

LENGTH = 81
HOSTILE = [
    "",
    " ",
    "\t\n\x0b\x0c\r ",
    "It's real-life, isn't it?",
    "I",
    "movie.",
    "ÉCOLE Ünïcode ÀÉ İstanbul ǅ ß ẞ ſ K Ω",
    "the<br />movie<br /><br />the",
    "<br/>the<br>the<BR />the<Br />the< br />the<br  />the<br\t/>the<br /><br /the",
    "<<br />br /><br />",
    r"back\slash the\movie \ \\ \n a\.b",
    "tab\tnew\nline\rreturn\x0bvertical\x0cfeed",
    "no\u00a0break the\u00a0movie \u00a0 \u2003em\u2003 \u0085next\u0085line \u2028 \u2029 \u3000",
    "zero\u200bwidth \ufeffbom\ufeff joi\u200dner soft\u00adhyphen",
    "emoji 😀 👩‍👩‍👧‍👦 🏳️‍🌈 the😀movie",
    "e\u0301 combining n\u0303",
    "the\0movie \0 \0the the\0",
    "\x01\x02\x1b[31mred\x7f\x1c\x1d\x1e\x1f",
    "[UNK] [unk] [END] [end] '' [PAD]",
    "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~",
    "...!!!???---''\"\"((()))",
    "$$$ $1 \\1 \\0 %s {0} {{}} ${x}",
    "“curly” ‘quotes’ – en — em … ellipsis «guillemets» ¿qué? ¡no!",
    "Привет мир 你好世界 こんにちは العالم नमस्ते",
    "x" * 5_000,
    "the " * 500,
    "\ud7ff\ue000\ufffd\U0010ffff",
]


def random_strings(count: int) -> list[str]:
    pieces = [*"aAzZ09 \t\n\r\x0b\x0c\0\\.,'-<>/[]^", "<br />", "<BR />", "the", "Movie", "É", "\u00a0", "\u0085", "😀"]
    rng = random.Random(0)
    return ["".join(rng.choices(pieces, k=rng.randrange(1, 30))) for _ in range(count)]


@pytest.fixture(scope="module")
def groups(reviews) -> dict[str, tuple[list[str], int]]:
    """Texts, and the size of their vocabulary: the seed's for the reviews. The hostile strings get all their words, or
    nearly all would be [UNK] and equal for that."""
    return {"reviews": (reviews, SEED_VOCABULARY), "hostile": (HOSTILE + random_strings(2_000), 1_000_000)}


@pytest.fixture(scope="module")
def vectorized(groups, tmp_path_factory) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    """What Keras on TensorFlow makes of each group: ids and vocabulary."""
    folder = tmp_path_factory.mktemp("vectorize")
    given = {group: (texts, size - 1) for group, (texts, size) in groups.items()}
    results = run_keras("tensorflow", "vectorize", folder, {"groups": given, "length": LENGTH})
    return results, json.loads((folder / "vocabularies.json").read_text())


@pytest.mark.parametrize("group", ["reviews", "hostile"])
def test_the_vocabulary_is_the_same_list(group, vectorized, groups, within):
    (texts, size), theirs = groups[group], vectorized[1][group]
    counts = count_words(texts)
    ours = build_vocabulary(counts, size)
    at_the_end = sum(count == counts[theirs[-1]] for count in counts.values())
    assert at_the_end > 1_000  # where the list ends, ties decide
    # get_vocabulary() goes through NumPy's strings, which lose NULs at the end; the ids show that the layer keeps them.
    assert [word.rstrip("\0") for word in ours] == [*theirs, END]
    within(f"vocabulary of the {group}, {len(theirs):,} entries, differing", 0, 0, 0)


@pytest.mark.parametrize("group", ["reviews", "hostile"])
def test_ids_are_the_same(group, vectorized, groups, within):
    (texts, size), results = groups[group], vectorized[0]
    tokenizer = build_tokenizer(build_vocabulary(count_words(texts), size))
    ours = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    lengths = results[f"lengths_{group}"]
    theirs = [ids.tolist() for ids in np.split(results[f"all_ids_{group}"], np.cumsum(lengths)[:-1])]
    wrong = [case for case in zip(texts, ours, theirs, strict=True) if case[1] != case[2]]
    assert not wrong, wrong[0]
    within(f"ids of {len(texts):,} {group}, texts differing", len(wrong), 0, 0)

    cut = np.zeros((len(texts), LENGTH), int)
    for row, ids in zip(cut, ours, strict=True):
        row[: min(len(ids), LENGTH)] = ids[:LENGTH]
    within(f"ids of {len(texts):,} {group}, the first 81 with padding", cut, results[f"cut_ids_{group}"], 0)
