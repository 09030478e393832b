"""`data.tokenizer=bpe` and `char`, and `data.lowercase=false`: the tokenizers, and the commands on such runs."""

import json
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import EVERY_STEP, TINY_RUN, losses, run_main, text_config
from hypothesis import given
from hypothesis import strategies as st
from test_tokenizer import PATIENT, TEXT

import minigpt_pl
from minigpt_pl.data import encoding
from minigpt_pl.data.corpus import encode_text, held_out_texts, open_corpus, open_run_corpus
from minigpt_pl.data.datamodule import TextDataModule
from minigpt_pl.errors import InputError
from minigpt_pl.measures.ngrams import NGramModel
from minigpt_pl.tokenizer import (
    END,
    NOTEBOOK,
    UNKNOWN_ID,
    Rules,
    build_tokenizer,
    build_vocabulary,
    fingerprint,
    list_vocabulary,
    load_tokenizer,
    piece_encoder,
    portable,
    rename_padding,
    rules_of,
    train_bpe,
)

LINES = f"{TEXT}\n\n  Die Großmutter läuft,\tund die Katzen laufen.\n中文没有空格。\n" * 3
ALL_RULES = [Rules(kind, lowercase) for kind in ("word", "bpe", "char") for lowercase in (True, False)]


def make(rules: Rules, text: str = LINES, vocab_size: int = 150):
    counts = Counter(rules.split(text))
    if rules.kind == "bpe":
        return train_bpe(counts, vocab_size, rules.lowercase)
    return build_tokenizer(build_vocabulary(counts, vocab_size), rules)


TOKENIZERS = {rules: make(rules) for rules in ALL_RULES}
each = pytest.mark.parametrize("rules", ALL_RULES, ids=lambda rules: f"{rules.kind}-{rules.lowercase}")


@each
@PATIENT
@given(text=st.text() | st.text(alphabet="aB 'sé\n\t-.1中"))
def test_pieces_give_the_ids_of_the_whole_text(rules, text):
    tokenizer = TOKENIZERS[rules]
    encode = piece_encoder(tokenizer)
    assert [id_ for piece in rules.split(text) for id_ in encode(piece)] == tokenizer.encode(text).ids


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_decoding_gives_the_text_with_its_white_space(kind):
    text = "Katzen  laufen,\n\n\tund it's 3.5/10. 中文"
    for lowercase, expected in ((False, text), (True, text.lower())):
        tokenizer = TOKENIZERS[Rules(kind, lowercase)]
        assert tokenizer.decode(tokenizer.encode(text).ids) == expected
    ids = tokenizer.encode("cat ☃").ids
    assert ids[-1] == UNKNOWN_ID and UNKNOWN_ID not in ids[:-1]


def test_words_keep_their_capitals():
    rules = Rules("word", lowercase=False)
    tokenizer = TOKENIZERS[rules]
    assert tokenizer.encode("Die Katzen").tokens == ["Die", "Katzen"]
    assert tokenizer.encode("die katzen").tokens == ["die", "[UNK]"]
    ids = make(rules, "IT'S a Real-Life a b").encode("IT'S a Real-Life").ids
    assert make(rules, "IT'S a Real-Life a b").decode(ids) == "IT'S a Real-Life"


def test_bpe_learns_frequent_pairs_first():
    tokens = list_vocabulary(train_bpe({"aaab": 5, " ab": 20, "c": 1}, 11, lowercase=False))
    assert tokens[:2] == ["", "[UNK]"] and tokens[-1] == END and len(tokens) <= 11
    assert {*tokens[2:6]} == {"a", "b", " ", "c"} and tokens[6:8] == ["ab", " ab"]


def test_bpe_keeps_room_for_pairs():
    """A text with more characters than half of the vocabulary: the rarest become [UNK]."""
    text = {chr(0x4E00 + i): 100 - i for i in range(50)} | {"ab": 1000}
    tokens = list_vocabulary(train_bpe(text, 23, lowercase=False))
    assert len(tokens) <= 23 and "ab" in tokens and chr(0x4E00) in tokens and chr(0x4E00 + 49) not in tokens


@each
def test_a_file_keeps_the_rules(rules, tmp_path):
    tokenizer = TOKENIZERS[rules]
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert rules_of(loaded) == rules and loaded.to_str() == tokenizer.to_str()
    assert len({fingerprint(tokenizer) for tokenizer in TOKENIZERS.values()}) == len(ALL_RULES)


@each
def test_a_copy_for_other_tools_and_back(rules):
    copy = portable(TOKENIZERS[rules])
    assert rename_padding(copy, "[PAD]", "").to_str() == TOKENIZERS[rules].to_str()
    assert copy.token_to_id("[PAD]") == 0 and copy.token_to_id("") is None
    prompt, rest = copy.encode("the"), copy.encode(" movie")
    assert "the" + copy.decode(rest.ids) == "the movie" and prompt.ids


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    state = json.loads(TOKENIZERS[NOTEBOOK].to_str())
    for change in ({"pre_tokenizer": None}, {"pre_tokenizer": {"type": "Whitespace"}}, {"normalizer": None}):
        path.write_text(json.dumps(state | change))
        with pytest.raises(InputError, match="not a tokenizer of minigpt_pl"):
            load_tokenizer(path)


class TestEncoding:
    @pytest.fixture
    def config(self, tmp_path):
        lines = [f"Der Hund {i % 7} sieht die Katze {i}.\tUnd it's  neu" for i in range(400)]
        (tmp_path / "text.txt").write_text("\n".join(lines) + "\n")
        return lambda **changes: text_config(tmp_path / "text.txt", cache_dir=str(tmp_path / "cache"), **changes)

    @pytest.mark.parametrize("kind", ["bpe", "char"])
    def test_the_corpus_has_the_ids_of_the_tokenizer(self, kind, config, monkeypatch):
        monkeypatch.setattr(encoding, "PIECE", 50)  # documents and pieces lie across the ends
        corpus = open_corpus(config(tokenizer=kind, validation_share=0.1), 120)
        tokens, offsets = corpus.train.tokens, corpus.train.offsets
        end_id = corpus.tokenizer.token_to_id(END)
        ends = zip(offsets, offsets[1:] - 1, strict=False)
        texts = [corpus.tokenizer.decode(tokens[start:end].tolist()) for start, end in ends]
        assert {*texts} <= {*Path(config().path).read_text().split("\n")} and len(texts) > 300
        assert (tokens[offsets[1:] - 1] == end_id).all() and (tokens == end_id).sum() == len(texts)
        assert tokens[: offsets[1] - 1].tolist() == corpus.tokenizer.encode(texts[0]).ids
        assert corpus.record["train_tokens"] == len(tokens) - len(texts)

    @pytest.mark.parametrize("kind", ["bpe", "char"])
    def test_the_result_does_not_depend_on_processes_and_kills(self, kind, config, tmp_path, monkeypatch):
        def content(folder):
            return json.loads((folder / "manifest.json").read_text())["counts"]["content"]

        one = content(encode_text(config(tokenizer=kind), 120))
        two = replace(config(tokenizer=kind), cache_dir=str(tmp_path / "two"))
        assert content(encode_text(two, 120, processes=2)) == one
        monkeypatch.setattr(encoding, "SHARD_TOKENS", 3000)
        monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 2000)
        whole = replace(config(tokenizer=kind), cache_dir=str(tmp_path / "shards"))
        several = content(encode_text(whole, 120))
        killed = replace(config(tokenizer=kind), cache_dir=str(tmp_path / "killed"))
        make_tokenizer = encoding._make_tokenizer
        monkeypatch.setattr(encoding, "_make_tokenizer", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            encode_text(killed, 120)
        monkeypatch.setattr(encoding, "_make_tokenizer", make_tokenizer)
        assert content(encode_text(killed, 120)) == several

    def test_each_kind_has_its_own_cache(self, config):
        settings = [{}, {"tokenizer": "bpe"}, {"tokenizer": "char"}, {"lowercase": False}, {"lowercase": True}]
        names = [encode_text(config(**changes), 120).name for changes in settings]
        assert len({*names}) == 4 and names[0] == names[-1], "words are lower case by default"
        assert "Hund" in open_corpus(config(tokenizer="char"), 120).tokenizer.decode(
            open_corpus(config(tokenizer="char"), 120).train.tokens[:60].tolist()
        )

    def test_a_text_without_spaces_gets_a_warning(self, tmp_path, caplog):
        path = tmp_path / "chinese.txt"
        path.write_text("\n".join(f"这是第{i}个句子没有空格" for i in range(2000)))
        encode_text(text_config(path, cache_dir=str(tmp_path / "cache")), 200)
        assert re.search(r"1,\d+ of 1,\d+ words differ.*data.tokenizer=bpe or char", caplog.text)
        caplog.clear()
        encode_text(text_config(path, cache_dir=str(tmp_path / "cache"), tokenizer="char"), 200)
        assert "differ" not in caplog.text

    @pytest.mark.parametrize("kind", ["bpe", "char"])
    def test_streaming_gives_the_same_tokens(self, kind, tmp_path):
        import pyarrow
        import pyarrow.parquet

        folder = tmp_path / "parquet"
        folder.mkdir()
        lines = [f"Der Hund {i} sieht it's  die Katze." for i in range(200)]
        pyarrow.parquet.write_table(pyarrow.table({"text": lines}), folder / "part.parquet", row_group_size=20)
        settings = {"tokenizer": kind, "cache_dir": str(tmp_path / "cache"), "batch_size": 4, "sample_documents": 150}
        datamodule = TextDataModule(text_config(folder, streaming=True, **settings), 60, 100)
        datamodule.setup()
        seen = set()
        for batch in datamodule.train_dataloader():
            assert (batch.inputs == datamodule.tokenizer.token_to_id(END)).sum(dim=1).eq(1).all()
            seen |= {datamodule.tokenizer.decode(row).replace(END, "").strip() for row in batch.inputs.tolist()}
        assert len(seen) > 150 and seen <= {*lines}


@pytest.fixture(scope="module", params=["bpe", "char"])
def run(request, tmp_path_factory):
    """A folder with a trained run, outputs/RUN, whose text is documents of several lines."""
    cwd = tmp_path_factory.mktemp(request.param)
    lines = [f"Der Hund {i % 9} sieht die Katze.\n  Und it's neu {i % 4}!" for i in range(300)]
    (cwd / "text.txt").write_text("\n\n".join(lines) + "\n")
    done = run_main(
        "train", *TINY_RUN, "data.path=text.txt", "data.document=paragraph", f"data.tokenizer={request.param}",
        "model.vocab_size=90", f"run_name={request.param}", "trainer.max_epochs=12", "optimizer.learning_rate=0.01",
        EVERY_STEP, cwd=cwd,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return cwd, cwd / "outputs" / request.param


@pytest.mark.slow
class TestCommands:
    def test_sampling(self, run):
        cwd, folder = run
        model = minigpt_pl.load(folder)
        for prompt in ("Der Hund", "Der Hund  ", "Der\tHund"):
            text = minigpt_pl.generate_text(model, prompt, num_tokens=60, temperature=0.5, seed=1)
            assert text.startswith(prompt.rstrip()) and len(text) > len(prompt) + 10
        options = {"num_tokens": 60, "temperature": 0.5, "seed": 1}
        assert minigpt_pl.generate_text(model, "Der Hund \n", **options) == minigpt_pl.generate_text(
            model, "Der Hund", **options
        )
        text = minigpt_pl.generate_text(model, "Der Hund", num_tokens=60, temperature=0.2, seed=1)
        assert re.search(r"Hund \d sieht ", text), "it keeps the spaces between words"
        [record] = minigpt_pl.generate(model, "Der Hund", num_tokens=30, temperature=0.5, seed=1)
        assert record.text == "Der Hund" + "".join(record.tokens) and record.unknown_words == []
        assert "".join(minigpt_pl.stream_text(model, "Der Hund", num_tokens=30, temperature=0.5, seed=1)) == "".join(
            record.tokens
        )
        banned = {"num_tokens": 60, "temperature": 0.2, "seed": 1, "banned_words": [" sieht"]}
        assert " sieht" in text and " sieht" not in minigpt_pl.generate_text(model, "Der Hund", **banned)
        scored = minigpt_pl.score(model, "Der Hund 3 sieht")
        assert "".join(word.text for word in scored) == "Der Hund 3 sieht"
        done = run_main("sample", f"run={folder.name}", "prompt=Der Hund", "show=probabilities", "seed=1", cwd=cwd)
        assert done.returncode == 0 and done.stdout.startswith("Der Hund")
        unknown = run_main("sample", f"run={folder.name}", "prompt=Der ☃", "num_tokens=5", cwd=cwd)
        assert unknown.returncode == 0 and "☃" in unknown.stderr
        assert min(losses(folder, "val/loss").values()) < math.log(90) / 2

    def test_bits_per_byte(self, run):
        cwd, folder = run
        done = run_main("evaluate", f"run={folder.name}", cwd=cwd)
        assert done.returncode == 0, done.stderr
        result = json.loads((folder / "evaluation.json").read_text())
        assert result["unknown_words"] == 0 and result["spelling_bits_per_byte"] == 0
        data, corpus = open_run_corpus(folder, minigpt_pl.load(folder).tokenizer, str(cwd / "text.txt"))
        texts = list(held_out_texts(data, corpus.tokenizer))
        assert result["bytes"] == sum(len(text.encode()) for text in texts)
        documents = np.split(corpus.validation.tokens, corpus.validation.offsets[1:-1])
        assert [text[0] for text in documents] == [corpus.tokenizer.encode(text).ids[0] for text in texts]
        unigrams = NGramModel.fit(corpus.train.tokens, corpus.train.offsets, corpus.tokenizer.get_vocab_size(), 1)
        nats = -sum(float(unigrams.log_probabilities(document)[0]) for document in documents)
        nats += result["whole"]["network"]["loss"] * result["whole"]["tokens"]
        bits_per_byte = result["whole"]["network"]["bits_per_byte"]
        assert bits_per_byte == pytest.approx(nats / math.log(2) / result["bytes"], rel=1e-5)
        bands = {row["band"]: row["tokens"] for row in result["by_frequency"]}
        assert bands["1-10"] > bands["11-100"] and bands["[END]"] == result["documents"]

    def test_exports(self, run):
        cwd, folder = run
        model = minigpt_pl.load(folder)
        expected = minigpt_pl.generate_text(model, "Der Hund", num_tokens=40, temperature=0)
        refused = run_main("export", "html", f"run={folder.name}", cwd=cwd)
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1
        assert f"not data.tokenizer={folder.name} with data.lowercase=false" in refused.stderr
        pytest.importorskip("transformers", reason="no transformers: pip install 'minigpt_pl[export]'")
        done = run_main("export", "transformers", f"run={folder.name}", cwd=cwd)
        assert done.returncode == 0, done.stderr
        again = minigpt_pl.load(folder / "export" / "transformers")
        assert minigpt_pl.generate_text(again, "Der Hund", num_tokens=40, temperature=0) == expected
        from transformers import pipeline

        generator = pipeline("text-generation", str(folder / "export" / "transformers"), trust_remote_code=True)
        assert generator("Der Hund", do_sample=False, max_new_tokens=40)[0]["generated_text"] == expected
        unit = {"bpe": "tokens", "char": "characters"}[folder.name]
        assert f"| Context, in {unit} | 16 |" in (folder / "export" / "transformers" / "README.md").read_text()

    def test_what_needs_words_is_refused(self, run):
        cwd, folder = run
        for command in (
            ["explore", f"run={folder.name}"],
            ["explore", f"compare=[{folder.name},{folder.name}]"],
            ["convert", f"run={folder.name}", "to_keras=model.weights.h5"],
        ):
            done = run_main(*command, cwd=cwd)
            assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
            assert f"data.tokenizer={folder.name}" in done.stderr or "TextVectorization" in done.stderr
            assert not (cwd / "model.weights.h5").exists() and not (folder / "explore").exists()

    def test_another_run_uses_the_file(self, run):
        cwd, folder = run
        settings = [*TINY_RUN, "data.path=text.txt", f"data.tokenizer={folder}/tokenizer.json", "trainer.max_steps=1"]
        done = run_main("train", *settings, "run_name=second", cwd=cwd)
        assert done.returncode == 0, done.stderr
        words = [list_vocabulary(load_tokenizer(path / "tokenizer.json")) for path in (folder, cwd / "outputs/second")]
        assert words[0] == words[1]
        refused = run_main("train", *settings, "data.lowercase=true", cwd=cwd)
        assert refused.returncode == 2 and "data.lowercase=True: has no effect with data.tokenizer=" in refused.stderr
