"""The filters, compared with Hugging Face's `generate`, which returns the logits before and after its own filters."""

import random

import pytest
import torch
from torch.testing import assert_close

from minigpt_pl.errors import InputError
from minigpt_pl.generation import filters
from minigpt_pl.generation.controls import Controls

SIZE, END, NEW = 40, 3, 12


@pytest.fixture(scope="module")
def hugging_face():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=SIZE, n_positions=64, n_embd=16, n_layer=1, n_head=2, eos_token_id=END)
    model = GPT2LMHeadModel(config).eval()
    model.generation_config.pad_token_id = END
    torch.nn.init.normal_(model.transformer.wte.weight)  # shared with the output layer: large and small logits
    return model


# Our setting, values to test, and Hugging Face's argument for a value.
SETTINGS = {
    "repetition_penalty": ([0.7, 1.3, 5.0], lambda value: {"repetition_penalty": value}),
    "no_repeat_ngram_size": ([1, 2, 3], lambda value: {"no_repeat_ngram_size": value}),
    "banned_ids": ([[5], [0, 1, 7, 9]], lambda ids: {"bad_words_ids": [[id_] for id_ in ids]}),
    "banned_sequences": (
        [[[8, 9], [4]], [[a, b] for a in range(0, SIZE, 2) for b in range(1, SIZE, 2)], [[1, 2, 3, 4, 5, 6, 7, 8, 9]]],
        lambda rows: {"bad_words_ids": rows},
    ),
    "min_tokens": ([4, NEW], lambda value: {"min_new_tokens": value}),
    "temperature": ([0.3, 0.8, 2.0], lambda value: {"temperature": value}),
    "top_k": ([1, 5, SIZE - 1, SIZE], lambda value: {"top_k": value}),
    "top_p": ([1e-9, 0.1, 0.6, 0.95], lambda value: {"top_p": value}),
    "min_p": ([0.02, 0.3, 1.0], lambda value: {"min_p": value}),
    "typical_p": ([0.1, 0.5, 0.9], lambda value: {"typical_p": value}),
}


def choices() -> list[dict]:
    """Each value alone, and 60 combinations."""
    rng = random.Random(0)
    alone = [{name: value} for name, (values, _) in SETTINGS.items() for value in values]
    mixed = [
        {name: rng.choice(SETTINGS[name][0]) for name in rng.sample(list(SETTINGS), rng.randint(2, 7))}
        for _ in range(60)
    ]
    return alone + mixed


def test_the_same_distribution_as_generate_at_every_step(hugging_face):
    steps, filtered = 0, 0
    for number, settings in enumerate(choices()):
        wanted = {"temperature": 1.0, "top_k": None} | settings
        controls = Controls(vocab_size=SIZE, num_tokens=NEW, end_id=END, forced_ids={NEW - 1: 6}, **wanted)
        theirs = {"top_k": 0, "forced_eos_token_id": 6}
        for name, value in settings.items():
            words = theirs.get("bad_words_ids", [])
            theirs |= SETTINGS[name][1](value)
            theirs |= {"bad_words_ids": words + theirs["bad_words_ids"]} if "bad_words_ids" in theirs and words else {}
        torch.manual_seed(number)
        prompt = torch.randint(4, SIZE, (1, 3))
        out = hugging_face.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=True,
            max_new_tokens=NEW,
            output_logits=True,
            output_scores=True,
            return_dict_in_generate=True,
            **theirs,
        )
        for position, (logits, scores) in enumerate(zip(out.logits, out.scores, strict=True)):
            processed = filters.process(logits, controls, out.sequences[:, : 3 + position], position)
            ours, expected = filters.warp(processed, controls).softmax(-1), scores.softmax(-1)
            assert torch.equal(ours == 0, expected == 0), (settings, position)
            assert_close(ours, expected, atol=1e-6, rtol=1e-5, msg=f"{settings} at {position}")
            steps, filtered = steps + 1, filtered + bool((ours == 0).any())
    assert steps > 600 and filtered > 400


def test_greedy_equals_generate(hugging_face):
    prompt = torch.tensor([[5, 6, 7]])
    settings = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "min_new_tokens": 5, "do_sample": False}
    settings |= {"attention_mask": torch.ones_like(prompt), "max_new_tokens": NEW}
    banned = int(hugging_face.generate(prompt, **settings)[0, 3])  # the first token without the ban
    out = hugging_face.generate(
        prompt, output_logits=True, return_dict_in_generate=True, bad_words_ids=[[banned]], **settings
    )
    controls = Controls(
        vocab_size=SIZE,
        num_tokens=NEW,
        min_tokens=5,
        end_id=END,
        temperature=0,
        repetition_penalty=1.5,
        no_repeat_ngram_size=2,
        banned_ids=[banned],
    )
    for position, logits in enumerate(out.logits):
        text = out.sequences[:, : 3 + position]
        assert filters.process(logits, controls, text, position).argmax(-1) == out.sequences[:, 3 + position]


def test_extreme_temperatures():
    logits = torch.tensor([[1e9, 2e9], [0, 1e-3]])
    for value in (1e-300, 1e-30, 1e-6):
        assert filters.temperature(logits, value).softmax(-1).tolist() == [[0, 1], [0, 1]]
    assert_close(filters.temperature(logits, 1e300).softmax(-1), torch.full((2, 2), 0.5))


def test_top_p_keeps_the_smallest_set():
    assert filters.top_p(torch.zeros(1, 4), 0.5).isfinite().sum() == 2


def test_typical_p_of_almost_1_keeps_all():
    assert filters.typical_p(torch.randn(100, 50), 1 - 1e-9).isfinite().all()


def test_one_text_without_a_choice_is_enough():
    with pytest.raises(InputError, match="no token is left after 3 new tokens"):
        filters.require_a_choice(torch.tensor([[0.0, 1.0], [-torch.inf, -torch.inf]]), 3)


class TestTexts:
    """Texts of different lengths in one batch. Padding must not change the results."""

    @pytest.mark.parametrize(
        "changes",
        [
            {"repetition_penalty": 2.0},
            {"no_repeat_ngram_size": 1},
            {"no_repeat_ngram_size": 2},
            {"no_repeat_ngram_size": 3},
            {"banned_sequences": [[5, 5, 2], [5, 6], [7], [9, 5]]},
        ],
        ids=str,
    )
    def test_padding_on_the_left(self, changes):
        controls = Controls(vocab_size=12, **({"top_k": None} | changes))
        texts = [[5], [5, 5], [5, 6, 5, 6], [1, 2, 3, 4, 5, 6, 7, 2, 3]]
        logits, longest = torch.randn(len(texts), 12), 9
        padded = torch.tensor([[-1] * (longest - len(text)) + text for text in texts])
        together = filters.process(logits, controls, padded, 0)
        for row, text in enumerate(texts):
            assert torch.equal(
                filters.process(logits[row : row + 1], controls, torch.tensor([text]), 0)[0], together[row]
            )
        assert not torch.equal(together, logits)

    def test_no_repeat_ngram(self):
        text = torch.tensor([[4, 5, 6, 4, 7, 4]])
        for size, excluded in [(1, {4, 5, 6, 7}), (2, {5, 7}), (3, set()), (6, set()), (7, set())]:
            logits = filters.no_repeat_ngram(torch.zeros(1, 9), size, text)
            assert set(logits[0].isinf().nonzero().flatten().tolist()) == excluded, size

    def test_no_tensor_is_changed_in_place(self):
        logits, text = torch.randn(2, 9), torch.tensor([[1, 2, 1], [3, 3, 3]])
        controls = Controls(
            vocab_size=9,
            top_k=4,
            top_p=0.5,
            min_p=0.1,
            typical_p=0.5,
            repetition_penalty=2.0,
            no_repeat_ngram_size=2,
            banned_ids=[0],
            banned_sequences=[[1, 5], [4]],
        )
        before = logits.clone()
        filters.warp(filters.process(logits, controls, text, 0), controls)
        filters.ban_sequences(logits, [[1, 5], [4]], text)
        assert torch.equal(logits, before)
