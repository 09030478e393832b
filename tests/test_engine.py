"""The engine, compared with full forward passes and with itself in other batches."""

import math
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.testing import assert_close

from minigpt_pl import InputError, MiniGPT
from minigpt_pl.cpu import int8
from minigpt_pl.cpu.threads import FreeCores
from minigpt_pl.generation import decoders, engine, filters
from minigpt_pl.generation.controls import Controls
from minigpt_pl.generation.engine import draw, generate_ids, stream_ids
from minigpt_pl.generation.inference import InferenceModel

SIZE, WINDOW = 2000, 12  # large enough for the 8-bit pre-selection and for `_top_indices`

needs_int8 = pytest.mark.skipif(not int8.HAS_INT8, reason="no exact 8-bit products")


def network(num_blocks: int = 1, **changes) -> MiniGPT:
    sizes = {"vocab_size": SIZE, "max_length": WINDOW, "embed_dim": 32, "num_heads": 2, "head_dim": 24}
    torch.manual_seed(num_blocks)
    model = MiniGPT(**(sizes | {"feed_forward_dim": 40, "num_blocks": num_blocks} | changes)).eval()
    for parameter in model.parameters():  # large, so that position, context and every bias matter
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def random_prompts(*lengths: int, size: int = SIZE) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(size, (length,), generator=generator).tolist() for length in lengths]


@torch.inference_mode()
def generate_simply(model: MiniGPT, prompt: list[int], controls: Controls, seed: int) -> list[int]:
    """What `generate_ids` must return. One text; a full forward pass and all logits for each token."""
    text, uniform = list(prompt), torch.rand(controls.num_tokens, generator=torch.Generator().manual_seed(seed))
    for position, number in enumerate(uniform):
        logits = model(torch.tensor([text[-model.max_length :]]))[0][:, -1]
        logits = filters.process(logits, controls, torch.tensor([text]), position)
        if controls.temperature == 0:
            text.append(int(logits.argmax()))
        else:
            cumulative = filters.warp(logits, controls).softmax(-1).cumsum(-1)[0]
            text.append(int((cumulative <= number * cumulative[-1]).sum()))
        if text[-1] == controls.end_id:
            return text[len(prompt) : -1]
        if position + 1 >= controls.min_tokens and any(text[-len(ids) :] == ids for ids in controls.stop_sequences):
            break
    return text[len(prompt) :]


class TestDecoders:
    @pytest.mark.parametrize("changes", [{}, {"token_shift": True}, {"token_shift": True, "head_dim": 5}], ids=str)
    @pytest.mark.parametrize(
        "lengths", [(1, 5, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW, 2), (1, 4, 2), (4, 4)], ids=str
    )
    @pytest.mark.parametrize("num_heads", [1, 3])
    @pytest.mark.parametrize("num_blocks", [1, 2, 3, 4])
    def test_equal_a_full_forward_pass_at_every_step(self, num_blocks, num_heads, lengths, changes, monkeypatch):
        monkeypatch.setattr(decoders, "SPARE_SLOTS", 5)
        model = network(num_blocks, num_heads=num_heads, **changes)
        texts = random_prompts(*lengths)
        with torch.inference_mode():
            decoder = decoders.start(InferenceModel(model), texts)
            for step in range(2 * WINDOW + 3):
                full = [model.hidden_states(torch.tensor([text[-WINDOW:]]))[0, -1] for text in texts]
                assert_close(decoder.last_hidden(), torch.stack(full), atol=1e-5, rtol=0)
                if step in (3, WINDOW):  # some texts end
                    rest = torch.arange(len(texts))[torch.arange(len(texts)) != 1]
                    texts = [texts[i] for i in rest]
                    decoder.keep(rest)
                ids = torch.randint(SIZE, (len(texts),))
                decoder.append(ids)
                texts = [[*text, int(id_)] for text, id_ in zip(texts, ids, strict=True)]

    @pytest.mark.parametrize("num_blocks", [1, 2])
    def test_a_window_of_one_token(self, num_blocks):
        model = network(num_blocks, max_length=1)
        controls = Controls(vocab_size=SIZE, num_tokens=5)
        assert generate_ids(model, [[3, 4]], controls, [0]) == [generate_simply(model, [3, 4], controls, 0)]


class TestEngine:
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"top_k": None},
            {"top_k": 1},
            {"top_k": SIZE},
            {"temperature": 0},
            {"temperature": 0, "repetition_penalty": 3.0},
            {"temperature": 1.5, "top_k": 200},
            {"top_p": 0.7},
            {"top_p": 0.7, "top_k": None},
            {"min_p": 0.2, "typical_p": 0.6},
            {"typical_p": 0.6, "top_k": None},
            {"repetition_penalty": 1.7},
            {"no_repeat_ngram_size": 1, "top_k": 2},
            {"end_id": 7, "top_k": None, "temperature": 10.0},
            {"min_tokens": 10, "end_id": 11, "forced_ids": {10: 11}},
            {"banned_ids": range(500), "banned_sequences": [[600], [601, 602]]},
            {"forced_ids": {0: 5, 7: 6, 19: 7}, "banned_ids": [5]},
            {"forced_ids": {2: 5, 3: 6, 9: 7}, "stop_sequences": [[6, 5], [5, 6]]},
            {"forced_ids": {2: 5, 3: 6, 4: 7, 9: 7}, "stop_sequences": [[5, 6], [7]], "min_tokens": 5},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("num_blocks", [1, 2])
    def test_equals_the_plain_loop(self, num_blocks, changes):
        model, prompts, seeds = network(num_blocks), random_prompts(1, 4, WINDOW, 2 * WINDOW), [3, 4, 5, 6]
        controls = Controls(**({"vocab_size": SIZE, "num_tokens": 20} | changes))
        expected = [generate_simply(model, prompt, controls, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        assert generate_ids(model, prompts, controls, seeds) == expected

    @pytest.mark.parametrize(
        ("num_blocks", "num_heads", "number", "width", "length"),
        [(1, 2, 1, 256, WINDOW), (1, 6, 2, 256, WINDOW), (1, 3, 2, 50, 9), (1, 2, 1, 102, 80), (2, 2, 2, 256, WINDOW)],
    )
    def test_a_text_does_not_depend_on_its_batch(self, num_blocks, num_heads, number, width, length):
        """Hidden states and logits are equal up to rounding."""
        sizes = {"embed_dim": width, "num_heads": num_heads, "head_dim": width, "feed_forward_dim": 5 * width}
        model = InferenceModel(network(num_blocks, max_length=length, **sizes))
        prompts = random_prompts(*(1 + i % (2 * WINDOW) for i in range(30)))
        torch.set_num_threads(number)
        try:
            with torch.inference_mode():
                alone = torch.cat([self._states(model, [prompt]) for prompt in prompts])
                for size in (2, 3, 7, 16, 30):
                    groups = [prompts[i : i + size] for i in range(0, len(prompts), size)]
                    together = torch.cat([self._states(model, group) for group in groups])
                    assert_close(together, alone, atol=2e-5, rtol=1e-5, msg=f"batches of {size}")
        finally:
            torch.set_num_threads(1)

    @staticmethod
    def _states(model, prompts):
        """(B, 4, D + V): hidden states and logits of four steps. The texts determine the new ids."""
        decoder, states = decoders.start(model, prompts), []
        for step in range(4):
            hidden = decoder.last_hidden()
            states.append(torch.cat([hidden, model.network.output(hidden)], dim=1))
            decoder.append(torch.tensor([(prompt[0] + step) % SIZE for prompt in prompts]))
        return torch.stack(states, dim=1)

    @pytest.mark.parametrize(
        ("changes", "push"),
        [({}, 4), ({"top_k": None, "temperature": 2.0}, 6), ({"repetition_penalty": 1.3}, 4)],
        ids=str,
    )
    def test_a_seed_gives_the_same_text_in_any_batch(self, changes, push):
        model, prompts, seeds = network(), random_prompts(*(1 + i % 30 for i in range(60))), range(60)
        controls = Controls(**({"vocab_size": SIZE, "num_tokens": 25, "end_id": 3} | changes))
        model.output.bias.data[3] += push  # texts end, and the batch shrinks
        together = generate_ids(model, prompts, controls, seeds)
        assert len({len(ids) for ids in together}) > 5
        for size in (1, 7, 16):
            groups = [range(i, min(i + size, 60)) for i in range(0, 60, size)]
            parts = [generate_ids(model, [prompts[i] for i in group], controls, group) for group in groups]
            assert sum(parts, []) == together, size

    @pytest.mark.parametrize(
        "changes",
        [{}, {"top_k": None, "temperature": 3.0}, {"temperature": 0}, {"repetition_penalty": 1.3}, {"num_beams": 2}],
        ids=str,
    )
    @pytest.mark.parametrize("num_blocks", [1, 2])
    def test_steps_with_probabilities(self, num_blocks, changes):
        """They are the network's own, for any controls, and they change no text."""
        model, prompts = network(num_blocks), random_prompts(1, 5, 2 * WINDOW)
        changes = changes | ({"temperature": 0} if "num_beams" in changes else {})
        controls = Controls(**({"vocab_size": SIZE, "num_tokens": 16, "end_id": 3, "stop_sequences": [[9]]} | changes))
        model.output.bias.data[3] += 3.5
        steps = list(stream_ids(model, prompts, controls, [1, 2, 3], with_probabilities=True))
        bare = list(stream_ids(model, prompts, controls, [1, 2, 3]))
        assert [step[:2] for step in bare] == [step[:2] for step in steps] and not any(bare[0][2:])
        texts = [list(prompt) for prompt in prompts]
        for step in steps:
            assert len({len(values) for values in step}) == 1
            for text, id_, probability, rank, entropy in zip(*step, strict=True):
                with torch.inference_mode():
                    logits = model(torch.tensor([texts[text][-WINDOW:]]))[0][0, -1]
                    own = filters.process(logits[None], controls, torch.tensor([texts[text]]), len(texts[text]))
                assert probability == pytest.approx(float(logits.softmax(-1)[id_]), rel=1e-4)
                order = logits.sort(descending=True)
                assert order.values[rank - 1] == pytest.approx(float(logits[id_]), abs=1e-5)
                drawn_from = filters.warp(own, controls).softmax(-1) if controls.temperature else torch.ones(1)
                assert entropy == pytest.approx(-float(drawn_from.xlogy(drawn_from).sum()) / math.log(2), abs=1e-3)
                texts[text].append(id_)
        new = [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]
        assert [[id_ for id_ in ids if id_ != 3] for ids in new] == generate_ids(model, prompts, controls, [1, 2, 3])

    @pytest.mark.parametrize("num_beams", [1, 2])
    def test_no_prompts(self, num_beams):
        controls = Controls(vocab_size=SIZE, temperature=0, num_beams=num_beams)
        assert generate_ids(network(), [], controls, []) == [] == [*stream_ids(network(), [], controls, [])]

    def test_a_stream_may_be_left(self):
        stream = stream_ids(network(), [[5]], Controls(vocab_size=SIZE), [0])
        next(stream)
        assert not torch.is_inference_mode_enabled(), "the caller's loop body must not be in inference mode"
        stream.close()
        assert not torch.is_inference_mode_enabled()

    def test_with_more_tokens_a_text_goes_on(self):
        texts = [generate_ids(network(), [[5]], Controls(vocab_size=SIZE, num_tokens=n), [1])[0] for n in (7, 40)]
        assert len(texts[0]) == 7 and texts[1][:7] == texts[0]

    def test_other_seeds_give_other_texts(self):
        controls = Controls(vocab_size=SIZE, num_tokens=10)
        assert len(set(map(tuple, generate_ids(network(), [[5]] * 20, controls, range(20))))) > 15

    @needs_int8
    @pytest.mark.parametrize("rows", [1, 8, 100])
    @pytest.mark.parametrize("top_k", [1, 10, 60])
    def test_the_8_bit_preselection_finds_the_top_tokens_and_their_exact_logits(self, top_k, rows):
        model = InferenceModel(network())
        output = engine._OutputLayer(model, Controls(vocab_size=SIZE, top_k=top_k))
        hidden = torch.randn(500, 32)
        with torch.inference_mode():
            exact, found = model.network.output(hidden), [output.candidates(x, None, 0) for x in hidden.split(rows)]
            logits, ids = map(torch.cat, zip(*found, strict=True))
            approximate = torch.cat([output.int8_layer(x, output.bias) for x in hidden.split(rows)])
        assert 0.001 < float((approximate - exact).std() / exact.std()) < 0.02
        assert_close(logits, exact.gather(1, ids), atol=1e-5, rtol=1e-5)
        assert torch.equal(ids, exact.topk(top_k).indices.sort().values)

    @needs_int8
    @pytest.mark.parametrize(
        ("changes", "preselects"),
        [
            ({"top_k": 100}, True),
            ({"top_k": 101}, False),
            ({"top_k": None}, False),
            ({"repetition_penalty": 1.1}, False),
            ({"temperature": 0, "top_k": None}, True),
        ],
    )
    def test_when_the_8_bit_preselection_is_used(self, changes, preselects):
        output = engine._OutputLayer(InferenceModel(network()), Controls(vocab_size=SIZE, **changes))
        assert (output.int8_layer is not None) is preselects

    @pytest.mark.parametrize("part", ["blocks.0.feed_forward_norm.weight", "output.weight"])
    def test_a_network_too_inexact_in_8_bits_is_computed_in_full(self, part):
        model = network()
        model.get_parameter(part).data[..., 3] *= 1000  # in 8 bits one large channel rounds the others to 0
        assert InferenceModel(model).int8_output is None
        expected = [generate_simply(model, [2, 3], Controls(vocab_size=SIZE, num_tokens=20), seed) for seed in range(5)]
        assert generate_ids(model, [[2, 3]] * 5, Controls(vocab_size=SIZE, num_tokens=20), range(5)) == expected

    @pytest.mark.parametrize("changes", [{}, {"temperature": 0}, {"banned_ids": range(500)}], ids=str)
    def test_a_text_is_the_same_without_the_8_bit_preselection(self, changes, monkeypatch):
        prompts, controls = random_prompts(*range(1, 30)), Controls(vocab_size=SIZE, num_tokens=30, **changes)
        here = generate_ids(network(), prompts, controls, range(29))
        monkeypatch.setattr(int8, "HAS_INT8", False)
        assert generate_ids(network(), prompts, controls, range(29)) == here

    def test_no_token_left(self):
        controls = Controls(vocab_size=15, num_tokens=20, top_k=3, no_repeat_ngram_size=1)
        with pytest.raises(InputError, match="no token is left after 14 new tokens.*no_repeat_ngram_size"):
            generate_ids(network(vocab_size=15), [[2]], controls, [0])

    @pytest.mark.parametrize("temperature", [0, 1])
    @pytest.mark.parametrize("part", ["output.weight", "output.bias"])
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_one_diverged_token_raises(self, part, value, temperature):
        model = network()
        model.get_parameter(part).data[5] = value
        with pytest.raises(ValueError, match="NaN"):
            generate_ids(model, [[2]], Controls(vocab_size=SIZE, temperature=temperature), [0])

    @pytest.mark.parametrize("part", ["blocks.0.attention.value.bias", "token_embedding.weight", "output.bias"])
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("top_k", [20, None])
    def test_a_diverged_network_raises(self, part, value, top_k):
        model = network()
        model.get_parameter(part).data[...] = value
        with pytest.raises(ValueError, match="NaN"):
            generate_ids(model, [[2]], Controls(vocab_size=SIZE, top_k=top_k), [0])

    def test_the_network_is_not_changed(self):
        model = network()
        before = {name: type(module) for name, module in model.named_modules()}
        generate_ids(model, [[2]], Controls(vocab_size=SIZE, num_tokens=2), [0])
        assert {name: type(module) for name, module in model.named_modules()} == before

    @pytest.mark.parametrize("num_blocks", [1, 2])
    def test_an_inference_model_gives_the_same_texts_as_its_network(self, num_blocks):
        model, controls = network(num_blocks), Controls(vocab_size=SIZE, num_tokens=10)
        prepared = InferenceModel(model)
        for _ in range(2):
            assert generate_ids(prepared, [[2, 3]], controls, [0]) == generate_ids(model, [[2, 3]], controls, [0])
            assert [step.ids for step in stream_ids(prepared, [[2, 3]], controls, [0])]

    @pytest.mark.parametrize("num_blocks", [1, 2])
    @pytest.mark.parametrize("tie_embeddings", [True, False])
    def test_an_inference_model_detects_changed_weights(self, num_blocks, tie_embeddings):
        model, changed = network(num_blocks, tie_embeddings=tie_embeddings), 0
        controls = Controls(vocab_size=SIZE, num_tokens=10)
        for name, weight in model.named_parameters():
            prepared, before = InferenceModel(model), generate_ids(model, [[2, 3]], controls, [0])
            assert prepared.is_current()
            version = weight._version
            weight.data.copy_(weight.data.flip(0))  # the same sum
            assert weight._version == version, "PyTorch now counts writes to .data; is_current could use that"
            assert prepared.is_current() is (name == "token_embedding.weight" and not tie_embeddings), name
            after = generate_ids(model, [[2, 3]], controls, [0])
            assert after == [generate_simply(model, [2, 3], controls, 0)], name
            changed += after != before
        assert changed > 0.7 * len(list(model.parameters()))

    def test_the_token_embedding_may_change_in_place(self):
        model, controls = network(), Controls(vocab_size=SIZE, num_tokens=10)
        prepared = InferenceModel(model)
        with torch.no_grad():
            model.token_embedding.weight.copy_(model.token_embedding.weight.flip(0))
        assert prepared.is_current()
        assert generate_ids(prepared, [[2, 3]], controls, [0]) == [generate_simply(model, [2, 3], controls, 0)]

    @pytest.mark.parametrize("change", ["optimizer", "double", "embedding", "state"])
    def test_an_inference_model_detects_other_changes(self, change):
        model = network()
        prepared = InferenceModel(model)
        assert prepared.is_current()
        if change == "optimizer":
            model(torch.tensor([[2, 3]]))[0].sum().backward()
            torch.optim.Adam(model.parameters(), fused=True).step()
        elif change == "double":
            model.double()
        elif change == "embedding":
            model.token_embedding.weight = torch.nn.Parameter(model.token_embedding.weight.detach().flip(0))
        else:
            model.load_state_dict(
                network(vocab_size=SIZE, dropout=0.5).state_dict() | {"output.bias": torch.ones(SIZE)}
            )
        assert not prepared.is_current()

    def test_column_major_weights(self):
        model, other, controls = network(), network(), Controls(vocab_size=SIZE, num_tokens=10)
        other.output.weight.data = other.output.weight.data.T.contiguous().T
        assert (InferenceModel(other).int8_output is not None) is int8.HAS_INT8
        texts = [generate_ids(each, [[2, 3]] * 9, controls, range(9)) for each in (model, other)]
        assert texts[0] == texts[1]

    def test_half_precision_draws_in_fp32(self):
        hidden, controls = torch.zeros(1, 32, dtype=torch.bfloat16), Controls(vocab_size=SIZE, top_k=None)
        output = engine._OutputLayer(InferenceModel(network().bfloat16()), controls)
        assert output.candidates(hidden, torch.zeros(1, 0, dtype=torch.long), 0)[0].dtype == torch.float32

    def test_threads_may_share_a_network(self):
        controls, before, ready = Controls(vocab_size=SIZE, num_tokens=1), sys.getswitchinterval(), threading.Barrier(2)

        def write(model):
            ready.wait()
            return generate_ids(model, [[2]], controls, [0])

        sys.setswitchinterval(1e-6)
        try:
            with ThreadPoolExecutor(2) as pool:
                for _ in range(100):
                    model = InferenceModel(network())
                    texts = list(pool.map(write, [model, model]))
                    assert texts[0] == texts[1]
        finally:
            sys.setswitchinterval(before)

    def test_an_inference_model_is_in_eval_mode(self):
        model = network(dropout=0.5).train()
        assert not any(module.training for module in InferenceModel(model).network.modules()) and model.training


class TestThreads:
    @pytest.fixture(autouse=True)
    def three_threads(self):
        torch.set_num_threads(3)
        yield
        torch.set_num_threads(1)

    @pytest.mark.parametrize("changes", [{}, {"top_k": None, "temperature": 2.0}, {"repetition_penalty": 1.3}], ids=str)
    @pytest.mark.parametrize("num_blocks", [1, 2])
    def test_their_number_changes_no_text(self, num_blocks, changes, monkeypatch):
        model, controls = InferenceModel(network(num_blocks)), Controls(vocab_size=SIZE, num_tokens=15, **changes)
        prompts, texts = random_prompts(*range(1, 31, 3)), []
        for number in (1, 2, 3):
            monkeypatch.setattr(FreeCores, "_free_cores", lambda self, enough, number=number: number)
            alone = [generate_ids(model, [prompt], controls, [seed])[0] for seed, prompt in enumerate(prompts)]
            texts += [alone, generate_ids(model, prompts, controls, range(10))]
        assert all(each == texts[0] for each in texts)

    @pytest.mark.parametrize("write", [generate_ids, lambda *inputs: list(stream_ids(*inputs))])
    def test_one_while_all_cores_are_busy(self, write, monkeypatch):
        used, last_hidden = [], decoders.OneBlockDecoder.last_hidden

        def watched(self):
            used.append(torch.get_num_threads())
            return last_hidden(self)

        monkeypatch.setattr(decoders.OneBlockDecoder, "last_hidden", watched)
        monkeypatch.setattr(FreeCores, "_free_cores", lambda self, enough: 1)
        write(network(), [[5]], Controls(vocab_size=SIZE, num_tokens=4), [0])
        assert used == [1] * 4 and torch.get_num_threads() == 3

    def test_the_caller_of_a_stream_has_all(self, monkeypatch):
        monkeypatch.setattr(FreeCores, "_free_cores", lambda self, enough: 1)
        for _ in stream_ids(network(), [[5]], Controls(vocab_size=SIZE, num_tokens=4), [0]):
            assert torch.get_num_threads() == 3


class TestBeams:
    SIZE, END = 40, 3

    @pytest.fixture
    def model(self):
        return network(vocab_size=self.SIZE)

    @pytest.fixture
    def hugging_face(self, model):
        """The same network and window for Hugging Face's `generate`."""
        from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
        from transformers.modeling_outputs import CausalLMOutput

        class Wrapped(PreTrainedModel, GenerationMixin):
            def forward(self, input_ids, **_):
                return CausalLMOutput(logits=self.network(input_ids[:, -WINDOW:])[0])

            def prepare_inputs_for_generation(self, input_ids, **_):
                return {"input_ids": input_ids}

        wrapped = Wrapped(PreTrainedConfig(vocab_size=self.SIZE, eos_token_id=self.END, pad_token_id=self.END))
        wrapped.network = model
        return wrapped

    @pytest.mark.parametrize(
        ("ours", "theirs"),
        [
            ({}, {}),
            ({"length_penalty": 0.0}, {}),
            ({"length_penalty": 3.0}, {}),
            ({"length_penalty": -2.0}, {}),
            ({"min_tokens": 6}, {"min_new_tokens": 6}),
            ({"repetition_penalty": 1.4}, {"repetition_penalty": 1.4}),
            ({"no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 2}),
            ({"banned_ids": [5, 6], "banned_sequences": [[7, 8]]}, {"bad_words_ids": [[5], [6], [7, 8]]}),
            ({"end_id": None}, {"eos_token_id": None}),
        ],
        ids=str,
    )
    def test_equal_hugging_face(self, model, hugging_face, ours, theirs):
        lengths, beyond_greedy = set(), 0
        for num_beams, end in ((2, 1.0), (5, 0.0), (3, 2.0), (5, 4.0)):
            with torch.no_grad():
                model.output.bias[self.END] += end
            for prompt in random_prompts(1, 4, WINDOW + 3, size=self.SIZE):
                settings = {"vocab_size": self.SIZE, "num_tokens": 15, "end_id": self.END, "temperature": 0} | ours
                controls = Controls(**settings, num_beams=num_beams)
                found = generate_ids(model, [prompt], controls, [0])[0]
                names = {"length_penalty": controls.length_penalty, "num_beams": num_beams, "use_cache": False} | theirs
                expected = hugging_face.generate(torch.tensor([prompt]), max_new_tokens=15, **names)[0, len(prompt) :]
                assert found == [id_ for id_ in expected.tolist() if id_ != settings["end_id"]]
                lengths.add(len(found))
                greedy = Controls(**settings | {"length_penalty": 1.0})
                beyond_greedy += found != generate_ids(model, [prompt], greedy, [0])[0]
            with torch.no_grad():
                model.output.bias[self.END] -= end
        assert beyond_greedy and (settings["end_id"] is None or len(lengths) > 1)

    @pytest.mark.parametrize(("min_tokens", "length"), [(0, 2), (2, 2), (3, 4), (4, 4), (5, 9)])
    def test_stop_words_end_a_beam(self, model, min_tokens, length):
        controls = Controls(
            vocab_size=self.SIZE,
            num_tokens=9,
            temperature=0,
            num_beams=4,
            stop_sequences=[[8]],
            min_tokens=min_tokens,
            forced_ids={1: 8, 3: 8},
            banned_ids=[8],
        )
        assert [len(ids) for ids in generate_ids(model, [[5], [6, 7]], controls, [0, 0])] == [length] * 2

    def test_no_token_left(self, model):
        controls = Controls(
            vocab_size=self.SIZE, num_tokens=50, temperature=0, num_beams=2, no_repeat_ngram_size=1, top_k=None
        )
        with pytest.raises(InputError, match="no token is left after 39 new tokens"):
            generate_ids(model, [[2]], controls, [0])


class TestDraw:
    def test_excluded_tokens_are_never_drawn(self):
        inf = float("inf")
        logits = torch.tensor([[-inf, 0.0, -inf, 0.0, -inf]] * 3)
        assert draw(logits, torch.tensor([0.0, 0.4999, 1 - 2**-24])).flatten().tolist() == [1, 1, 3]

    def test_follows_the_probabilities(self):
        logits = torch.randn(1, 30)
        uniform = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
        drawn = draw(logits.expand(len(uniform), -1), uniform).flatten()
        assert_close(drawn.bincount(minlength=30) / len(uniform), logits.softmax(-1)[0], atol=5e-3, rtol=0)


class TestControls:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"num_tokens": 0}, "num_tokens=0: must be at least 1"),
            ({"min_tokens": 61}, "min_tokens=61: must be at most num_tokens=60"),
            ({"min_tokens": -1}, "min_tokens=-1: must be at least 0"),
            ({"temperature": float("nan")}, "temperature=nan: must be a finite number"),
            ({"temperature": -1e-9}, "temperature=-1e-09: must be at least 0"),
            ({"temperature": float("inf")}, "temperature=inf: must be a finite number"),
            ({"top_k": 0}, "top_k=0: must be at least 1"),
            ({"top_k": 16}, "top_k=16: must be 1 to 15"),
            ({"top_p": 0.0}, "top_p=0.0: must be above 0"),
            ({"top_p": 1.1}, "top_p=1.1: must be above 0"),
            ({"top_p": float("nan")}, "top_p=nan: must be a finite number"),
            ({"min_p": -0.1}, "min_p=-0.1: must be at least 0 and at most 1"),
            ({"min_p": 1.1}, "min_p=1.1: must be at least 0 and at most 1"),
            ({"typical_p": 0}, "typical_p=0: must be above 0"),
            ({"typical_p": 1.01}, "typical_p=1.01: must be above 0"),
            ({"repetition_penalty": 0.0}, "repetition_penalty=0.0: must be above 0"),
            ({"repetition_penalty": float("inf")}, "repetition_penalty=inf: must be a finite number"),
            ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size=-1: must be at least 0"),
            ({"end_id": 15}, "end_id=15: must be 0 to 14"),
            ({"banned_ids": [15]}, r"banned_ids=\[15\]: must be 0 to 14"),
            ({"banned_ids": [-1]}, r"banned_ids=\[-1\]: must be 0 to 14"),
            ({"banned_ids": range(15)}, "banned_ids: all 15 tokens are banned"),
            ({"banned_ids": range(14), "end_id": 14, "min_tokens": 1}, "banned_ids: all 15 tokens are banned"),
            ({"banned_sequences": [[1], []]}, "banned_sequences=.*at least one id"),
            ({"banned_sequences": [[1, 15]]}, "banned_sequences=.*each 0 to 14"),
            ({"forced_ids": {60: 1}}, "forced_ids={60: 1}: positions must be 0 to 59"),
            ({"forced_ids": {0: 15}}, "forced_ids={0: 15}: positions.*ids 0 to 14"),
            ({"stop_sequences": [[]]}, r"stop_sequences=\[\[\]\].*at least one id"),
            ({"stop_sequences": [[-1]]}, r"stop_sequences=\[\[-1\]\].*each 0 to 14"),
            ({"num_beams": 0}, "num_beams=0: must be at least 1"),
            ({"num_beams": 8, "temperature": 0}, "num_beams=8: must be at most 7"),
            ({"num_beams": 2}, "num_beams=2: beam search does not draw at random; set temperature=0"),
            ({"length_penalty": float("nan")}, "length_penalty=nan: must be a finite number$"),
            ({"length_penalty": 2.0}, "length_penalty=2.0: has no effect without beam search; set num_beams=2"),
        ],
        ids=str,
    )
    def test_out_of_range(self, changes, message):
        with pytest.raises(InputError, match=message) as caught:
            Controls(**({"vocab_size": 15, "top_k": None} | changes))
        assert len(caught.value.problems) == 1

    def test_all_problems_at_once(self):
        with pytest.raises(InputError) as caught:
            Controls(vocab_size=15, num_tokens=0, temperature=-1, top_k=0, top_p=2)
        assert [problem.split("=")[0] for problem in caught.value.problems] == [
            "num_tokens",
            "temperature",
            "top_k",
            "top_p",
        ]

    def test_the_default_top_k_fits_every_vocabulary(self):
        assert Controls(vocab_size=15).top_k == 15 and Controls(vocab_size=21).top_k == 20

    def test_the_ends_of_the_ranges(self):
        Controls(vocab_size=15, num_tokens=1, min_tokens=1, temperature=0, top_k=15, top_p=1, min_p=1, typical_p=1)
