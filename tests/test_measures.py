import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minigpt_pl import MiniGPT
from minigpt_pl.measures import copying, probes, repetition
from minigpt_pl.measures.failures import (
    FALSE_ALARMS,
    KINDS,
    FailureDetector,
    Span,
    TopicModel,
    _merge_overlaps,
    brackets,
    loops,
    skeleton,
)
from minigpt_pl.measures.ngrams import NGramModel
from minigpt_pl.tokenizer import build_tokenizer, build_vocabulary, count_words, split_words


class TestRepetition:
    def test_distinct_counts_different_ngrams(self):
        ids = [1, 2, 1, 2, 1]  # pairs 12 21 12 21, triples 121 212 121
        assert repetition.distinct(ids, 1) == 2 / 5
        assert repetition.distinct(ids, 2) == 2 / 4
        assert repetition.distinct(ids, 3) == 2 / 3
        assert math.isnan(repetition.distinct([1, 2], 3))

    def test_recurring_is_the_weighted_share_of_the_second_half(self):
        # Second half 2 9 7 9 30. 9 occurs in the first half, 2 and 30 in the context. Weights: 0 for 2, 2 for 30.
        weights = np.array([0, 0, 0, *[1] * 27, 2])
        assert repetition.recurring([30, 2], [1, 9, 6, 3, 2, 9, 7, 9, 30], weights) == 4 / 5
        assert repetition.recurring([], [9, 8, 7, 6], weights) == 0
        assert math.isnan(repetition.recurring([9], [9, 9, 1, 2], weights))

    def test_repeated_is_the_share_that_already_occurred(self):
        ids = [1, 2, 3, 4, 1, 2, 3, 4, 5]  # 1234 2341 3412 4123 1234 2345
        assert repetition.repeated(ids, 4) == pytest.approx(1 / 6)
        assert repetition.repeated(range(9), 4) == 0

    @pytest.mark.parametrize(
        ("ids", "loop"),
        [
            ([1, 2, 3, 4], (0, 0, 0)),
            ([], (0, 0, 0)),
            ([5, 1, 1, 1, 2], (1, 1, 3)),
            ([9, 1, 2, 3, 1, 2, 3, 1, 8], (1, 3, 7)),  # two turns and a third
            ([1, 2, 3, 1, 2, 9], (0, 0, 0)),  # less than two turns
            ([1, 1, 2, 3, 2, 3, 2, 4], (2, 2, 5)),  # the longest, not the first
            ([1, 1, 2, 3, 3], (0, 1, 2)),  # equal length and period: the first
            ([1, 2, 1, 2, 9, 3, 3, 3, 3], (5, 1, 4)),  # equal length: the shortest period
            (split_words("i was a lot of the movie, i was a lot of the movie."), (0, 7, 14)),  # marks do not count
            (split_words("well, so it is. so it is! wait ..."), (2, 3, 6)),
            (split_words("wait ! ! ! !"), (0, 0, 0)),
        ],
    )
    def test_longest_loop(self, ids, loop):
        assert repetition.longest_loop(ids) == loop

    def test_self_bleu(self):
        one, other = split_words("the cat sees the dog and runs"), split_words("a king likes no ship at all")
        assert repetition.self_bleu([one, one]) == pytest.approx([100, 100])
        assert max(repetition.self_bleu([one, other])) < 10
        assert math.isnan(repetition.self_bleu([one])[0])
        # BLEU by hand: 6 of 7 words, 4 of 6 pairs, 2 of 5 triples, 1 of 4 runs of 4 words; equal length.
        changed = split_words("the cat sees the king and runs")
        by_hand = 100 * math.prod([6 / 7, 4 / 6, 2 / 5, 1 / 4]) ** 0.25
        assert repetition.self_bleu([changed, one])[0] == pytest.approx(by_hand)


class TestCopying:
    TRAINING = [[2, 3, 4, 5, 6, 7, 8], [9, 8, 7, 6, 5, 4, 3], [1, 1, 1, 1, 1, 3]]

    def copies(self, *ids, ignored_ids=()):
        tokens = np.array([id_ for document in self.TRAINING for id_ in [*document, 99]], dtype=np.uint16)
        offsets = np.cumsum([0, *(len(document) + 1 for document in self.TRAINING)])
        return copying.longest_copies(list(ids), tokens, offsets, ignored_ids)

    def test_the_longest_run_and_its_document(self):
        copy, reverse, none, short = self.copies([5, 3, 4, 5, 6, 7, 2], [6, 5, 4, 3], [2, 4, 6, 8, 3], [3])
        assert (copy.start, copy.length, copy.document) == (1, 5, 0)
        assert copy.seen_4grams == pytest.approx(2 / 4)  # 3456 and 4567, not 5345 and 5672
        assert (reverse.start, reverse.length, reverse.document, reverse.seen_4grams) == (0, 4, 1, 1.0)
        assert (none.length, none.document, none.seen_4grams) == (0, -1, 0.0)
        assert short.length == 0 and math.isnan(short.seen_4grams)

    def test_a_run_in_several_documents_comes_from_the_first(self):
        tokens, offsets = np.array([2, 99, *[3, 4, 5, 6, 99] * 3, 7, 99]), np.array([0, 2, 7, 12, 17, 19])
        (copy,) = copying.longest_copies([[8, 3, 4, 5, 6]], tokens, offsets)
        assert (copy.start, copy.length, copy.document) == (1, 4, 1)

    def test_a_run_never_crosses_documents(self):
        assert self.copies([7, 8, 9, 8])[0].length == 0
        assert self.copies([7, 8, 99, 9, 8])[0].length == 5  # only because the text contains the end id

    def test_ids_that_match_nothing(self):
        assert self.copies([3, 4, 5, 6, 7, 8])[0].length == 6
        assert self.copies([3, 4, 5, 6, 7, 8], ignored_ids=[8])[0].length == 5
        assert self.copies([3, 4, 5, 6, 1, 7, 8], ignored_ids=[1])[0].length == 4

    def test_a_row_of_the_same_word_is_no_copy(self):
        row, inside = self.copies([1, 1, 1, 1, 1], [8, 1, 1, 1, 1, 2, 3, 4, 5, 6])
        assert (row.length, row.seen_4grams) == (0, 0.0)
        assert (inside.start, inside.length) == (5, 5)
        tokens = np.array([3, 4, 5, 5, 6, 7, 8, 99])
        (doubled,) = copying.longest_copies([[3, 4, 5, 5, 6, 7, 8]], tokens, np.array([0, 8]))
        assert (doubled.start, doubled.length) == (0, 7)  # two equal words may follow each other

    def test_equals_a_plain_search_on_random_texts(self):
        rng = np.random.default_rng(0)
        tokens = np.append(rng.integers(2, 6, 400), 7).astype(np.uint16)
        text = "".join(map(str, tokens))
        texts = [rng.integers(2, 6, rng.integers(1, 30)).tolist() for _ in range(40)]
        for ids, copy in zip(texts, copying.longest_copies(texts, tokens, np.array([0, 401])), strict=True):
            runs = [(a, b) for a in range(len(ids)) for b in range(a + 4, len(ids) + 1)]
            runs = [(a, b) for a, b in runs if not any(len({*ids[i : i + 3]}) == 1 for i in range(a, b - 2))]
            copied = [(b - a, -a) for a, b in runs if "".join(map(str, ids[a:b])) in text]
            length, start = max(copied, default=(0, 0))
            assert (copy.length, copy.start) == (length, -start)

    @pytest.mark.slow
    def test_copies_from_13_million_words(self):
        rng = np.random.default_rng(0)
        tokens = rng.zipf(1.2, 13_000_000).clip(2, 9_999).astype(np.uint16)
        tokens[::2] += 10_000  # no word follows itself
        texts = [tokens[i * 1000 : i * 1000 + 60].tolist() for i in range(1000)]
        copies = copying.longest_copies(texts, tokens, np.array([0, len(tokens)]))
        assert all(copy.length == 60 for copy in copies)

    def test_no_texts(self):
        assert self.copies() == []


class TestMarkedWords:
    @pytest.mark.parametrize(
        ("text", "marked"),
        [
            ("it was very very good", []),
            ("it was very very very good", ["very very"]),
            ("a good film . a good film . a good film . yes", ["a good film . a good film ."]),
            ("wait . . . what", []),
            ("wait . . . . . . . . . . what", [". . . . . . . . ."]),
            ("so i did not like it at all but why i did not like it at all", []),
            ("and i did not like it at all but why and i did not like it at all", ["and i did not like it at all"]),
            ("[UNK] [UNK] [UNK] [UNK] [UNK] met", []),
        ],
    )
    def test_loops(self, text, marked):
        text = text.split(" ")
        assert [" ".join(text[span.start : span.end]) for span in loops(text)] == marked

    def test_the_note_of_a_loop_has_its_period(self):
        assert loops(split_words("so the end the end the end the end"))[0].note == "4 turns of 2 words"

    @pytest.mark.parametrize(
        ("text", "places"),
        [
            ("a film (and a good one) it is", []),
            ("a film, and a good one) it is", [7]),
            ("see it :) and 1) laugh 2) cry", []),
            ("he [the king] sees {the ship}", []),
            ('he said "no" and left', []),
            ('he said "no and left' + " and left" * 30, [2]),
            ("he said (no and left" + " and left" * 30, [2]),
            ("he said (no and left" + " and left" * 18, []),
            ("he said (no and left", []),  # it may still be closed
        ],
    )
    def test_brackets(self, text, places):
        assert [span.start for span in brackets(split_words(text))] == places

    def test_an_unknown_word_may_hide_a_bracket(self):
        assert brackets(["[UNK]", "man", ")"]) == []
        assert brackets(["a", "man", ")"]) != []


class TestSkeleton:
    def test_keeps_the_commonest_words(self):
        assert skeleton(np.array([2, 149, 150, 151, 19_999])).tolist() == [2, 149, 150, 150, 150]


@pytest.fixture(scope="module")
def real(imdb_texts):
    """A detector fitted on 6,000 real reviews and calibrated on 400 held-out ones, and 400 other reviews."""
    reviews = imdb_texts("train")
    random.Random(0).shuffle(reviews)
    reviews = [split_words(review) for review in reviews[:7_500]]
    training, rest = reviews[:6_000], [review for review in reviews[6_000:] if len(review) >= 65][:800]
    vocabulary = build_vocabulary(count_words(" ".join(review) for review in training), 20_000)
    ids = {word: id_ for id_, word in enumerate(vocabulary)}
    encoded = [[*(ids.get(word, 1) for word in review), len(vocabulary) - 1] for review in training]
    tokens, offsets = np.concatenate(encoded), np.cumsum([0, *map(len, encoded)])
    held_out = [([ids.get(w, 1) for w in review[:5]], [ids.get(w, 1) for w in review[5:65]]) for review in rest]
    detector = FailureDetector(
        NGramModel.fit(tokens, offsets, len(vocabulary), 3),
        NGramModel.fit(skeleton(tokens), offsets, 151, 4),
        TopicModel.fit(tokens, offsets, len(vocabulary)),
        build_tokenizer(vocabulary),
        held_out[:400],
    )
    return detector, held_out[400:]


def small_detector(*real_texts) -> FailureDetector:
    """Words 0 to 99 have one topic and 100 to 199 another. 197 is ")", 198 is "good" and 199 is "bad"."""
    tokens, offsets = np.arange(2, 80), np.array([0, 78])
    models = [NGramModel.fit(tokens, offsets, size, 2) for size in (200, 151)]
    topics = TopicModel(np.repeat(np.eye(2), 100, axis=0), np.ones(200))
    return FailureDetector(*models, topics, build_tokenizer([*map(str, range(197)), ")", "good", "bad"]), real_texts)


class TestFailureDetector:
    def test_drift_computed_by_hand(self):
        # Before the second half: 20 words of one topic, and 5 of the other, which recur among the 20 of the half.
        drift = small_detector().detect(range(150, 155), [*range(2, 22), *range(150, 170)])[1]["drift"]
        assert drift == pytest.approx(1 - 5 / math.hypot(20, 5) - 2 * 5 / 20)

    def test_a_window_of_words_follows_the_context(self):
        detector, ids = small_detector(), np.array([30, 31, 32, 8, 7, 40, 41])
        highest = detector.detect(ids[:1], ids[1:])[1]
        for kind, model in [("grammar", detector.skeletons), ("nonsense", detector.words)]:
            assert highest[kind] == pytest.approx(-model.log_probabilities(ids)[1:].mean())

    def test_sentiment_is_compared_with_all_earlier_windows(self):
        text = [198] * 20 + [2] * 20 + [199] * 20
        assert small_detector().detect([], text)[1]["sentiment"] > 1.5, "from 0 to the lowest score it is 1"

    def test_words_of_the_context_are_not_marked(self):
        spans, _ = small_detector().detect([2, 2, 2, 198, 197], [3, 3, 3, 198, 197])
        assert [(span.kind, span.start, span.end) for span in spans] == [("loop", 1, 3), ("bracket", 4, 5)]

    def test_topics_ignore_unknown_words(self):
        topics = TopicModel.fit(np.array([1, 2, 3, 1, 4, 5, 1, 2, 5]), np.array([0, 3, 6, 9]), 6)
        in_two, in_one = math.log(4 / 3) + 1, math.log(4 / 2) + 1  # documents; weights of scikit-learn
        assert topics.weights == pytest.approx([0, 0, in_two, in_one, in_one, in_two])

    def test_a_score_equal_to_the_threshold_is_not_marked(self):
        text = [2], list(range(30, 80))
        detector = small_detector(text)
        spans, highest = detector.detect(*text)
        assert spans == [] and highest == detector.thresholds

    def test_overlapping_spans_keep_the_note_of_the_longest(self):
        spans = [Span("loop", 5, 20, "long"), Span("loop", 0, 7, "first"), Span("loop", 9, 12, "inside")]
        assert _merge_overlaps(spans) == [Span("loop", 0, 20, "long")]

    def share(self, detector, texts) -> dict[str, float]:
        found = [{span.kind for span in detector.detect(*text)[0]} for text in texts]
        return {kind: sum(kind in kinds for kinds in found) / len(texts) for kind in KINDS}

    def test_false_alarms_on_real_reviews(self, real):
        detector, held_out = real
        shares = self.share(detector, held_out)
        print(shares)
        assert shares["loop"] < 0.02 and shares["bracket"] < 0.05
        for kind in ("grammar", "nonsense", "drift", "sentiment"):
            assert 0 < shares[kind] < 2.2 * FALSE_ALARMS, kind

    def test_planted_failures_are_found(self, real):
        detector, held_out = real
        rng, usual = random.Random(0), self.share(*real)

        def planted(change) -> dict[str, float]:
            return self.share(detector, [(context, change(list(ids))) for context, ids in held_out])

        assert planted(lambda ids: ids[:30] + ids[25:30] * 3)["loop"] == 1
        shuffled = planted(lambda ids: ids[:20] + rng.sample(ids[20:40], 20) + ids[40:])
        assert shuffled["grammar"] > usual["grammar"] + 0.4
        drawn = planted(lambda ids: ids[:20] + [rng.randrange(2, 19_000) for _ in range(20)] + ids[40:])
        assert drawn["nonsense"] > 0.9
        others = rng.sample(held_out, len(held_out))
        spliced = [(a[0], a[1][:30] + b[1][30:]) for a, b in zip(held_out, others, strict=True)]
        print(self.share(detector, spliced)["drift"], usual["drift"])
        assert self.share(detector, spliced)["drift"] > 2.5 * usual["drift"]

    def test_planted_words_are_marked(self, real):
        detector, held_out = real
        rng, hits = random.Random(0), 0
        for context, ids in held_out:
            strange = [*ids[:20], *(rng.randrange(2_000, 19_000) for _ in range(10)), *ids[30:]]
            spans = [span for span in detector.detect(context, strange)[0] if span.kind == "nonsense"]
            hits += any(span.start < 30 and span.end > 20 for span in spans)
        assert hits > 0.8 * len(held_out)

    def test_praise_that_turns_to_blame(self, real):
        detector, _ = real
        ids = detector.tokenizer.get_vocab()
        praise = "this film is great and wonderful and i love it it is the best and most beautiful film ever made"
        blame = "it is awful and terrible and i hate it it is the worst and most horrible film ever made so bad"
        flip, same = ([ids[word] for word in f"{praise} {second}".split()] for second in (blame, praise))
        assert "sentiment" in {span.kind for span in detector.detect([], flip)[0]}
        assert "sentiment" not in {span.kind for span in detector.detect([], same)[0]}

    def test_a_text_shorter_than_a_window(self, real):
        spans, worst = real[0].detect([5, 6], [7])
        assert spans == [] and all(map(math.isnan, worst.values()))


@pytest.fixture(scope="module", params=[1, 2])
def model(request) -> MiniGPT:
    torch.manual_seed(0)
    sizes = {"embed_dim": 8, "num_heads": 2, "head_dim": 4, "feed_forward_dim": 8, "num_blocks": request.param}
    return MiniGPT(30, max_length=12, **sizes).eval()


class TestProbes:
    def test_scores_equal_the_plain_forward_pass(self, model):
        ids = torch.randint(2, 30, (20,)).tolist()  # longer than max_length
        score, empty = probes.score_texts(model, [(ids[:3], ids[3:]), (ids[:2], [])])
        logits = torch.stack([model(torch.tensor([ids[max(0, i - 12) : i]]))[0][0, -1] for i in range(3, 20)])
        log_p = logits.log_softmax(-1)
        assert score.loss == pytest.approx(F.nll_loss(log_p, torch.tensor(ids[3:])).item(), rel=1e-5)
        assert score.entropy == pytest.approx(-(log_p.exp() * log_p).sum(-1).mean().item() / math.log(2), rel=1e-5)
        assert score.unknown == pytest.approx(log_p.exp()[:, 1].mean().item(), rel=1e-5)
        assert all(map(math.isnan, empty))

    def test_windows_stay_within_documents(self):
        tokens, offsets = np.arange(30), np.array([0, 11, 14, 24, 30])  # the last token of a document ends it
        windows = probes.non_overlapping_windows(tokens, offsets, 5, 100)
        assert windows.tolist() == [list(range(a, a + 5)) for a in (0, 5, 14, 24)]
        assert len(probes.non_overlapping_windows(tokens, offsets, 5, 2)) == 2

    def test_loss_by_context_sees_the_last_words_only(self, model):
        windows = torch.randint(2, 30, (6, 11))
        unknown = torch.ones(1, 11, dtype=torch.long)  # its target is [UNK]
        losses = probes.loss_by_context(model, torch.cat([unknown, windows]))
        assert list(losses) == [1, 2, 5, 10]
        plain = F.cross_entropy(model(windows[:, 8:10])[0][:, -1], windows[:, 10], reduction="none")
        assert losses[2] == pytest.approx(plain.detach().numpy(), rel=1e-5)

    def test_induction_losses_compare_the_same_words(self, model):
        words = torch.randint(2, 30, (4, 6))
        losses = probes.induction_losses(model, words)
        assert {values.shape for values in losses.values()} == {(4, 5)}
        sequence = torch.cat([words[2], words[2]])
        plain = F.cross_entropy(model(sequence[None, :-1])[0][0, 6:], sequence[7:], reduction="none")
        assert losses["real, again"][2] == pytest.approx(plain.detach().numpy(), rel=1e-5)
        sequence = torch.cat([words[1], words[2]])
        plain = F.cross_entropy(model(sequence[None, :-1])[0][0, 6:], sequence[7:], reduction="none")
        assert losses["real, first"][2] == pytest.approx(plain.detach().numpy(), rel=1e-5)

    def test_induction_losses_of_a_network_that_copies(self):
        # The network predicts the word that it just read, so a repeated word has a low loss.
        torch.manual_seed(0)
        model = MiniGPT(30, max_length=12, embed_dim=30, num_heads=1, feed_forward_dim=8).eval()
        with torch.no_grad():
            model.token_embedding.weight.copy_(torch.eye(30))
            model.position_embedding.weight.zero_()
            model.output.weight.copy_(10 * torch.eye(30))
        losses = probes.induction_losses(model, torch.full((4, 6), 7))
        assert losses["real, again"].mean() < 1 < losses["random, again"].mean()

    def test_attention_maps(self, model):
        maps = probes.attention_maps(model, [3, 4, 5, 6])
        assert maps.shape == (len(model.blocks), 2, 4, 4)
        assert torch.allclose(maps.sum(-1), torch.ones(maps.shape[:-1]))
        by_distance = probes.attention_by_distance(model, torch.tensor([[3, 4, 5, 6]]))
        rows = [2, 3]
        for distance in (0, 1):
            expected = maps[:, :, rows, [row - distance for row in rows]].mean(-1)
            assert torch.allclose(torch.from_numpy(by_distance[..., distance]), expected)

    def test_limit_context_shares_the_weights(self, model):
        from minigpt_pl.generation.controls import Controls
        from minigpt_pl.generation.engine import generate_ids

        shorter = probes.limit_context(model, 3)
        assert shorter.output.weight is model.output.weight and model.max_length == 12
        controls = Controls(vocab_size=30, num_tokens=8, temperature=0, top_k=None)
        new = generate_ids(shorter, [[5, 6, 7, 8]], controls, [0])[0]
        text = [5, 6, 7, 8]
        for id_ in new:
            assert id_ == int(model(torch.tensor([text[-3:]]))[0][0, -1].argmax())
            text.append(id_)
