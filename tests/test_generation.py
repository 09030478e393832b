import copy
import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from minigpt_pl import InputError, MiniGPT, TextModel, generate, generate_text, generate_texts, score, stream_text
from minigpt_pl.generation import filters, text
from minigpt_pl.generation.controls import Controls
from minigpt_pl.generation.engine import generate_ids
from minigpt_pl.generation.prompts import unknown_words
from minigpt_pl.generation.text import BATCH_TEXTS
from minigpt_pl.tokenizer import build_tokenizer

WORDS = ["", "[UNK]", *["the", "a", "cat", "dog", "sees", "likes", ",", ".", "'s", "-known", "well", "it"], "[END]"]
END_ID = len(WORDS) - 1


@pytest.fixture(scope="module")
def network() -> MiniGPT:
    torch.manual_seed(1)
    model = MiniGPT(len(WORDS), max_length=6, embed_dim=8, num_heads=2, head_dim=4, feed_forward_dim=8).eval()
    torch.nn.init.normal_(model.output.weight)  # so that the context matters
    return model


@pytest.fixture(scope="module")
def model(network) -> TextModel:
    return TextModel(network, build_tokenizer(WORDS), END_ID)


def controls(**changes) -> Controls:
    return Controls(**({"vocab_size": len(WORDS), "num_tokens": 20, "temperature": 1.0, "top_k": None} | changes))


class TestEngine:
    @pytest.mark.parametrize("length", [1, 5, 6, 7, 9])
    def test_greedy_is_the_argmax_of_a_full_forward_on_the_last_tokens(self, network, length):
        text = [2 + i % 9 for i in range(length)]
        new = generate_ids(network, [text], controls(temperature=0), [0])[0]
        for id_ in new:
            assert id_ == int(network(torch.tensor([text[-6:]]))[0][0, -1].argmax())
            text.append(id_)
        assert len(new) == 20

    def test_context_is_the_last_tokens_not_the_first(self, network):
        first, second = [2, 3, 4, 5, 6, 7, 8], [9, 3, 4, 5, 6, 7, 8]
        assert generate_ids(network, [first], controls(), [0]) == generate_ids(network, [second], controls(), [0])
        assert generate_ids(network, [first], controls(), [0]) != generate_ids(
            network, [first[:-1] + [2]], controls(), [0]
        )

    def test_a_text_is_the_same_in_any_company(self, network):
        prompts, seeds = [[2], [3, 4, 5, 6, 7, 8, 9, 2], [4, 5]], [1, 2, 3]
        together = generate_ids(network, prompts, controls(), seeds)
        alone = [generate_ids(network, [p], controls(), [s])[0] for p, s in zip(prompts, seeds, strict=True)]
        assert together == alone
        assert generate_ids(network, prompts, controls(), [4, 5, 6]) != together

    def test_the_end_token_ends_a_text(self, network):
        ended = [
            (with_end, without)
            for seed in range(20)
            for with_end, without in [
                (
                    generate_ids(network, [[2]], controls(end_id=END_ID), [seed])[0],
                    generate_ids(network, [[2]], controls(), [seed])[0],
                )
            ]
        ]
        assert any(END_ID in without for _, without in ended)
        for with_end, without in ended:
            assert with_end == (without[: without.index(END_ID)] if END_ID in without else without)

    def test_banned_tokens_are_never_drawn(self, network):
        free = generate_ids(network, [[2]] * 30, controls(), range(30))
        banned = generate_ids(network, [[2]] * 30, controls(banned_ids=[0, 1, 4]), range(30))
        assert {0, 1, 4} & set(sum(free, [])) and not {0, 1, 4} & set(sum(banned, []))

    def test_draws_follow_the_probabilities(self, network):
        drawn = generate_ids(network, [[2]] * 4000, controls(num_tokens=1, temperature=0.7, top_k=3), range(4000))
        frequencies = torch.bincount(torch.tensor(sum(drawn, [])), minlength=len(WORDS)) / 4000
        values, ids = (network(torch.tensor([[2]]))[0][0, -1] / 0.7).topk(3)
        expected = torch.zeros(len(WORDS)).index_put((ids,), values.softmax(0))
        assert_close(frequencies, expected, atol=0.03, rtol=0)


class TestFilters:
    LOGITS = torch.tensor([[1.0, 3.0, 2.0, 2.0], [0.0, -1.0, 5.0, 4.0]])

    def test_top_k(self):
        inf = float("inf")
        assert filters.top_k(self.LOGITS, 1).tolist() == [[-inf, 3, -inf, -inf], [-inf, -inf, 5, -inf]]
        assert filters.top_k(self.LOGITS, 2).tolist() == [[-inf, 3, 2, 2], [-inf, -inf, 5, 4]]
        assert torch.equal(filters.top_k(self.LOGITS, 4), self.LOGITS)

    def test_temperature_sharpens_and_flattens(self):
        cold, warm, hot = (filters.temperature(self.LOGITS, t).softmax(-1).max() for t in (0.5, 1.0, 2.0))
        assert cold > warm > hot

    @pytest.mark.parametrize(("value", "largest"), [(1e-300, 1.0), (1e-40, 1.0), (1e300, 1 / 3)])
    def test_extreme_temperatures(self, value, largest):
        logits = filters.ban(self.LOGITS, [0])
        probabilities = filters.temperature(logits, value).softmax(-1)
        assert_close(probabilities.max(-1).values, torch.full((2,), largest))
        assert (probabilities[:, 0] == 0).all()

    def test_ban(self):
        assert filters.ban(self.LOGITS, [0, 3])[:, [0, 3]].isinf().all()
        assert torch.equal(filters.ban(self.LOGITS, []), self.LOGITS)


class TestText:
    def test_a_network_that_learned_no_end_never_writes_it(self, network):
        tokenizer, texts, network = build_tokenizer(WORDS), {}, copy.deepcopy(network)
        torch.nn.init.constant_(network.output.bias[END_ID:], 3.0)
        for end_id in (END_ID, None):
            model = TextModel(network, tokenizer, end_id)
            texts[end_id] = [generate_text(model, "the", 20, 1.0, None, seed) for seed in range(20)]
        lengths = {end: {len(tokenizer.encode(text).ids) for text in group} for end, group in texts.items()}
        assert lengths[None] == {21} and min(lengths[END_ID]) < 21
        assert not any("[END]" in text for text in texts[None])

    def test_all_unusable_prompts_are_named(self, model):
        with pytest.raises(InputError) as caught:
            generate_texts(model, ["the", "", "xyzzy", "\ud800"], top_k=5)
        assert [problem.split(":")[0] for problem in caught.value.problems] == [
            "prompt=''", "prompt='xyzzy'", "prompt='\\ud800'",
        ]  # fmt: skip

    @pytest.mark.parametrize("num_samples", [0, 10**9])
    def test_so_many_samples(self, model, num_samples):
        with pytest.raises(InputError, match=f"num_samples={num_samples}: must be at least 1 and at most 100000"):
            generate_texts(model, ["the"], top_k=5, num_samples=num_samples)

    def test_the_prompt_stays_as_typed_and_the_rest_reads_well(self, model):
        text = generate_text(model, "It's a  Well-KNOWN zebra ", num_tokens=8, temperature=0, top_k=None)
        assert text.startswith("It's a  Well-KNOWN zebra")
        ids = model.tokenizer.encode("It's a  Well-KNOWN zebra").ids
        new = generate_ids(
            model.network, [ids], controls(num_tokens=8, temperature=0, banned_ids=(0, 1), end_id=END_ID), [1]
        )[0]
        assert model.tokenizer.encode(text).ids == ids + new

    def test_exactly_num_tokens_unless_the_text_ends(self, model):
        lengths = {
            len(model.tokenizer.encode(generate_text(model, "the cat", num_tokens=n, top_k=5, seed=seed)).ids) - 2 - n
            for n in (1, 7, 30)
            for seed in range(10)
        }
        assert 0 in lengths and max(lengths) == 0

    def test_neither_padding_nor_unknown_is_written(self, model):
        texts = sum(generate_texts(model, ["the dog"], 30, 5.0, None, seed=0, num_samples=30), [])
        assert not any("[UNK]" in text or "  " in text for text in texts)

    def test_seed(self, model):
        def write(seed):
            return generate_text(model, "the", num_tokens=30, temperature=2.0, top_k=None, seed=seed)

        assert write(3) == write(3) != write(4)
        assert write(None) != write(None)

    def test_samples_of_many_prompts_keep_their_order_and_their_text(self, model):
        prompts = ["the cat", "a dog likes", "it"]
        together = generate_texts(model, prompts, 10, 1.0, None, seed=5, num_samples=2)
        assert [len(group) for group in together] == [2, 2, 2]
        for prompt, group in zip(prompts, together, strict=True):
            assert group[0] == generate_text(model, prompt, 10, 1.0, None, seed=5)
            assert group[1] == generate_text(model, prompt, 10, 1.0, None, seed=6)

    def test_a_thousand_prompts(self, model):
        texts = generate_texts(model, ["the cat"] * 1000, num_tokens=2, seed=0, top_k=3)
        assert len(texts) == 1000 and len({group[0] for group in texts}) == 1

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"prompt": ""}, "has no words"),
            ({"prompt": " \n"}, "has no words"),
            ({"prompt": "zebra xylophone"}, "the model knows none of its words"),
            ({"prompt": "the \udcff cat"}, "is not Unicode text"),
            ({"num_tokens": 0}, "num_tokens=0"),
            ({"temperature": -0.1}, "temperature=-0.1"),
            ({"temperature": float("nan")}, "temperature=nan"),
            ({"temperature": float("inf")}, "temperature=inf"),
            ({"top_k": 0}, "top_k=0: must be at least 1"),
            ({"top_k": 16}, "top_k=16: must be 1 to 15"),
        ],
    )
    def test_bad_input(self, model, changes, message):
        with pytest.raises(InputError, match=message):
            generate_text(**({"model": model, "prompt": "the cat", "top_k": 3} | changes))

    def test_controls_reach_the_text(self, model):
        def write(**controls):
            return generate_text(model, "the", num_tokens=30, temperature=3.0, top_k=None, seed=0, **controls)

        plain = write()
        for controls in (
            {"top_p": 0.3}, {"min_p": 0.9}, {"typical_p": 0.2}, {"repetition_penalty": 9.0},
            {"no_repeat_ngram_size": 2}, {"banned_words": ["cat", "dog"]}, {"forced_words": {1: "well-known"}},
        ):  # fmt: skip
            assert write(**controls) != plain, controls

    def test_a_text_does_not_end_before_min_tokens(self, model):
        def lengths(**controls):
            texts = generate_texts(model, ["the"], 20, 1.0, None, 0, 40, **controls)[0]
            return [len(model.tokenizer.encode(text).ids) - 1 for text in texts]

        assert min(lengths()) < 8 <= min(lengths(min_tokens=8)) < 20

    def test_banned_words(self, model):
        texts = generate_texts(model, ["the"], 30, 5.0, None, 0, 30)[0]
        assert any("cat" in text for text in texts) and any("it's" in text for text in texts)
        # Words that the model does not know are never written anyway; one of two tokens is left out as a whole.
        texts = generate_texts(model, ["the"], 30, 5.0, None, 0, 30, banned_words=["Cat", "it's", "zebra", "a zebra"])[
            0
        ]
        assert not any("cat" in text or "it's" in text for text in texts)
        assert any("it" in text for text in texts) and any("'s" in text for text in texts)
        assert any(" a " in text for text in texts)

    def test_forced_words(self, model):
        texts = generate_texts(model, ["the"], 6, 1.0, 5, 0, 10, forced_words={0: "dog", 3: "well-known"}, min_tokens=6)
        words = [model.tokenizer.encode(text).tokens[1:] for text in texts[0]]
        assert all(row[0] == "dog" and row[3:5] == ["well", "-known"] for row in words)
        assert len({tuple(row) for row in words}) > 1

    def test_forced_words_that_cannot_be(self, model):
        with pytest.raises(InputError) as caught:
            generate_text(
                model, "the", 9, top_k=99, forced_words={0: "zebra", 2: "", 4: "well-known", 5: "cat", 9: "dog"}
            )
        assert [problem.split(": must")[0].split(": not")[0] for problem in caught.value.problems] == [
            "forced_words={0: 'zebra'}",
            "forced_words={2: ''}",
            "forced_words={5: 'cat'}: position 5 is taken; leave room for 1 tokens",
            "forced_words={9: 'dog'}: position 9 must be below num_tokens=9; raise num_tokens",
            "top_k=99",
        ]

    def test_a_position_below_zero(self, model):
        with pytest.raises(InputError, match="forced_words={-1: 'dog'}: positions start at 0, the first new token"):
            generate_text(model, "the", 9, top_k=5, forced_words={-1: "dog"})

    def test_all_problems_are_named_at_once(self, model):
        with pytest.raises(InputError, match="(?s)num_tokens=0.*temperature=-1.*top_k=0"):
            generate_text(model, "the", num_tokens=0, temperature=-1, top_k=0)

    def test_unknown_words_as_typed(self, model):
        assert unknown_words(model.tokenizer, "The Zebra sees it's CAT-like") == ["Zebra", "-like"]

    @pytest.mark.parametrize("words", [["cat"], ["it's"], [".", "well-known"]], ids=str)
    def test_stop_words_end_a_text_as_its_last(self, model, words):
        free = generate_texts(model, ["the"], 40, 5.0, None, 0, 30)[0]
        stopped = generate_texts(model, ["the"], 40, 5.0, None, 0, 30, stop_words=words)[0]
        patient = generate_texts(model, ["the"], 40, 5.0, None, 0, 30, stop_words=words, min_tokens=9)[0]
        assert stopped != free and any(text.endswith(tuple(words)) for text in stopped)
        assert all(long.startswith(text) for text, long in zip(stopped, free, strict=True))
        assert not any(word in text[3:-1] for text in stopped for word in (words[0] + " ", words[0] + ","))
        assert min(len(model.tokenizer.encode(text).ids) for text in patient) == 10
        assert any(text.endswith(tuple(words)) for text in patient)

    def test_words_that_cannot_be(self, model):
        with pytest.raises(InputError) as caught:
            generate_text(model, "the", 9, top_k=5, stop_words=["zebra", "", "\udcff"], forced_words={0: "\udcff"})
        assert [problem.split(": not in the model's vocabulary")[0] for problem in caught.value.problems] == [
            r"forced_words={0: '\udcff'}",
            "stop_words=['zebra']",
            "stop_words=['']",
            r"stop_words=['\udcff']",
        ]
        with pytest.raises(InputError, match="(?s)banned_words='cat': must be a list.*stop_words=.3.: must be a list"):
            generate_text(model, "the", 9, top_k=5, banned_words="cat", stop_words=[3])
        assert generate_text(model, "the", 9, top_k=5, seed=0, banned_words=["\udcff"])

    def test_words_that_contradict_each_other(self, model):
        with pytest.raises(InputError) as caught:
            generate_text(
                model, "the", 9, top_k=5, banned_words=["cat", "dog", "well-known"], stop_words=["well-known"],
                forced_words={0: "dog", 4: "the cat"},
            )  # fmt: skip
        assert list(caught.value.problems) == [
            "stop_words=['well-known']: banned_words has it too; leave it out of one of them",
            "banned_words=['cat']: forced_words has it too; leave it out of one of them",
            "banned_words=['dog']: forced_words has it too; leave it out of one of them",
        ]

    def test_beams(self, model):
        with pytest.raises(InputError, match="num_beams=3: beam search does not draw at random; set temperature=0"):
            generate_text(model, "the", num_beams=3, top_k=5)
        with pytest.raises(InputError, match="num_samples=2: all texts are the same with temperature=0"):
            generate_texts(model, ["the"], num_beams=3, temperature=0, top_k=None, num_samples=2)
        greedy, wide = (generate_text(model, "the", 9, 0, None, num_beams=beams) for beams in (1, 4))
        assert wide != greedy and wide == "".join(
            ["the", *stream_text(model, "the", 9, temperature=0, top_k=None, num_beams=4)]
        )

    @pytest.mark.parametrize("greedy", [{"temperature": 0, "top_k": 5}, {"top_k": 1}])
    def test_samples_that_would_all_be_the_same(self, model, greedy):
        with pytest.raises(InputError, match="num_samples=2: all texts are the same with (temperature=0|top_k=1)"):
            generate_texts(model, ["the"], num_samples=2, **greedy)
        assert generate_texts(model, ["the", "a"], num_samples=1, **greedy)

    def test_the_seeds_name_for_num_tokens(self, model):
        def write(**controls):
            return generate_text(model, "the", top_k=5, seed=3, **controls)

        assert write(max_tokens=7) == write(num_tokens=7) != write(num_tokens=30) and write() == write(num_tokens=60)
        with pytest.raises(InputError, match="max_tokens=7: is an alias of num_tokens; give one of them"):
            write(max_tokens=7, num_tokens=7)
        with pytest.raises(InputError, match="num_tokens=0: must be at least 1"):
            write(max_tokens=0)

    @pytest.mark.parametrize("seed", [-1, 2**31])
    def test_seeds_out_of_range(self, model, seed):
        with pytest.raises(InputError, match=f"seed={seed}: must be at least 0 and at most 2147483647"):
            generate_text(model, "the", top_k=5, seed=seed)
        with pytest.raises(InputError, match="seed=2147483647: must be 0 to 2147483646"):
            generate(model, "the", top_k=5, seed=2**31 - 1, num_samples=2)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"num_tokens": 5.0}, "num_tokens=5.0: must be a whole number"),
            ({"num_tokens": True}, "num_tokens=True: must be a whole number"),
            ({"max_tokens": "5"}, "num_tokens='5': must be a whole number"),
            ({"top_k": 2.5}, "top_k=2.5: must be a whole number"),
            ({"temperature": "1"}, "temperature='1': must be a number"),
            ({"temperature": None}, "temperature=None: must be a number"),
            ({"no_repeat_ngram_size": 1.5}, "no_repeat_ngram_size=1.5: must be a whole number"),
            ({"seed": 1.5}, "seed=1.5: must be a whole number"),
            ({"seed": True}, "seed=True: must be a whole number"),
            ({"banned_words": None}, "banned_words=None: must be a list"),
            ({"stop_words": 3}, "stop_words=3: must be a list"),
            ({"forced_words": ["a"]}, r"forced_words=\['a'\]: must be words by position, as {0: 'a'"),
            ({"forced_words": {"0": "a"}}, "forced_words={'0': 'a'}: must be words by position"),
            ({"forced_words": {0: 5}}, "forced_words={0: 5}: must be words by position"),
            (
                {"topk": 5},
                r"topk=5: no such control; did you mean top_k\? choose from num_tokens, min_tokens, temp.*, top_k",
            ),
            ({"max_new_tokens": 5}, r"max_new_tokens=5: no such control; did you mean num_tokens\?"),
            ({"prompt": 5}, "prompt=5: must be a text"),
            ({"prompt": ["the"]}, r"prompt=\['the'\]: must be a text"),
        ],
        ids=str,
    )
    def test_wrong_types(self, model, given, message):
        with pytest.raises(InputError, match=message):
            generate_text(model, **({"prompt": "the", "top_k": 5} | given))

    def test_a_path_without_a_run(self):
        with pytest.raises(InputError, match="path=outputs/none: no such run folder or checkpoint"):
            generate_text("outputs/none", "the")

    def test_numbers_of_numpy(self, model):
        record = generate(model, "the", np.int64(4), temperature=np.float32(0.5), top_k=np.int32(5), seed=np.int64(3))[
            0
        ]
        assert record == generate(model, "the", 4, temperature=0.5, top_k=5, seed=3)[0]
        assert json.loads(json.dumps(dataclasses.asdict(record)))["settings"]["num_tokens"] == 4

    @pytest.mark.parametrize("surroundings", ["autocast", "train", "double"])
    def test_the_same_text_in_any_surroundings(self, model, surroundings):
        def written():
            return generate(model, "the cat", 20, temperature=1.5, top_k=None, seed=3), score(
                model, "the cat likes the dog"
            )

        expected = written()
        try:
            if surroundings == "train":
                model.network.train()
            elif surroundings == "double":
                torch.set_default_dtype(torch.float64)
            with torch.autocast("cpu", torch.bfloat16, enabled=surroundings == "autocast"):
                assert written() == expected
        finally:
            model.network.eval()
            torch.set_default_dtype(torch.float32)

    def test_a_stream_that_python_ends_with_is_closed_in_silence(self, trained):
        code = """if True:
            import minigpt_pl
            stream = minigpt_pl.stream_text(minigpt_pl.load("outputs/tiny"), "the cat", top_k=5, seed=1)
            print(next(stream))
        """
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=trained)
        assert (done.returncode, done.stderr) == (0, "") and done.stdout

    def test_one_prompt_or_many(self, model):
        expected = generate_texts(model, ["the cat"], 4, top_k=5, seed=1)
        assert generate_texts(model, "the cat", 4, top_k=5, seed=1) == expected
        assert generate_texts(model, iter(["the cat"]), 4, top_k=5, seed=1) == expected

    def test_one_text_is_not_several(self, model):
        for write in (generate_text, stream_text):
            with pytest.raises((TypeError, InputError), match="num_samples"):
                write(model, "the", top_k=5, num_samples=2)

    def test_a_prompt_of_ten_thousand_words(self, model):
        prompt = "a cat likes it , zebra " * 2000 + "the dog"
        short = generate_text(model, "likes it, zebra the dog", 9, top_k=5, seed=0)  # one window full
        assert generate_text(model, prompt, 9, top_k=5, seed=0) == prompt + short.removeprefix(
            "likes it, zebra the dog"
        )

    def test_control_characters_belong_to_words(self, model):
        prompt = "the\x00cat \x1b[31mdog\x07 cat\x85the the"
        assert unknown_words(model.tokenizer, prompt) == ["the\x00cat", "\x1b", "[31mdog\x07", "cat\x85the"]
        text = generate_text(model, prompt, 5, top_k=5, seed=0)
        assert text.startswith(prompt) and not set("\x00\x1b\x07\x85") & set(text[len(prompt) :])

    def test_little_is_in_memory_at_once(self, model, monkeypatch):
        sizes = []
        inner = text.stream_ids

        def spy(network, prompts, *arguments):
            sizes.append(len(prompts))
            return inner(network, prompts, *arguments)

        monkeypatch.setattr(text, "stream_ids", spy)
        records = text.stream_records(model, ["the cat"] * (2 * BATCH_TEXTS + 3), num_tokens=2, top_k=3)
        assert sizes == [] and next(records).prompt == "the cat" and sizes == [BATCH_TEXTS]
        assert len(list(records)) == 2 * BATCH_TEXTS + 2 and sizes == [BATCH_TEXTS, BATCH_TEXTS, 3]


class TestGenerate:
    CONTROLS = {"num_tokens": 12, "temperature": 2.0, "top_k": 6, "seed": 4}

    def test_the_same_texts_with_all_that_is_known(self, model):
        prompts = ["The cat ", "a zebra likes", "it"]
        controls = self.CONTROLS | {"num_tokens": 40, "stop_words": [".", "dog"]}
        texts = generate_texts(model, prompts, num_samples=2, **controls)
        records = generate(model, prompts, num_samples=2, **controls)
        assert [record.text for record in records] == sum(texts, [])
        assert [(record.prompt, record.seed) for record in records] == [(p, s) for p in prompts for s in (4, 5)]
        assert [record.unknown_words for record in records] == [[], [], ["zebra"], ["zebra"], [], []]
        assert len({len(record.tokens) for record in records}) > 1
        for record in records:
            assert record.prompt.rstrip() + "".join(record.tokens) == record.text
            counts = {len(values) for values in (record.probabilities, record.ranks, record.entropies)}
            assert counts == {len(record.tokens)}
            assert record.settings["temperature"] == 2.0 and record.settings["stop_words"] == [".", "dog"]
            assert generate_text(model, record.prompt, seed=record.seed, **record.settings) == record.text

    def test_probabilities_and_ranks(self, model):
        record = generate(model, "the cat", **self.CONTROLS)[0]
        ids = model.tokenizer.encode(record.text).ids
        for place, (probability, rank) in enumerate(zip(record.probabilities, record.ranks, strict=True), 2):
            own = model.network(torch.tensor([ids[:place][-6:]]))[0][0, -1].detach().softmax(-1)
            assert probability == pytest.approx(float(own[ids[place]]), rel=1e-4)
            assert rank == 1 + int((own > own[ids[place]]).sum())

    def test_without_probabilities(self, model):
        full = generate(model, "the", **self.CONTROLS)[0]
        bare = next(text.stream_records(model, ["the"], with_probabilities=False, **self.CONTROLS))
        assert (bare.text, bare.tokens) == (full.text, full.tokens)
        assert bare.probabilities == bare.ranks == bare.entropies == [] != full.ranks

    def test_a_text_that_ends_at_once(self, model):
        network = copy.deepcopy(model.network)
        network.output.bias.data[END_ID] = 1000
        record = generate(TextModel(network, model.tokenizer, END_ID), "the cat ", top_k=5)[0]
        assert record.text == "the cat" and record.tokens == record.probabilities == []

    def test_errors_come_before_the_first(self, model):
        with pytest.raises(InputError, match="top_k=99"):
            text.stream_records(model, ["the"], top_k=99)
        with pytest.raises(InputError, match="top_k=99"):
            stream_text(model, "the", top_k=99)
        with pytest.raises(InputError, match="prompt='': has no words"):
            stream_text(model, "", top_k=5)

    @pytest.mark.parametrize("changes", [{}, {"stop_words": ["."]}, {"temperature": 0}, {"forced_words": {0: "'s"}}])
    def test_the_stream_is_the_text(self, model, changes):
        lengths = set()
        for seed in range(5):
            controls = self.CONTROLS | {"num_tokens": 30, "seed": seed} | changes
            words = list(stream_text(model, "The cat ", **controls))
            assert "".join(["The cat", *words]) == generate_text(model, "The cat ", **controls)
            assert all(word.strip() in WORDS and word == word.rstrip() for word in words)
            lengths.add(len(words))
        assert len(lengths) > 1 or changes == {"temperature": 0}, "some end by themselves"

    def test_words_come_as_they_are_made(self, model, monkeypatch):
        steps = []
        draw = text.stream_ids
        monkeypatch.setattr(
            text, "stream_ids", lambda *arguments: (steps.append(step) or step for step in draw(*arguments))
        )
        stream = stream_text(model, "the", **self.CONTROLS)
        assert next(stream) and len(steps) == 1 and next(stream) and len(steps) == 2
