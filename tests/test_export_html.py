"""The offline page: its engine computes what Python computes, and the command writes it or says why not.

The interface of the page has its own tests, in test_page.py.
"""

import base64
import functools
import json
import math
import random
import re
import shutil
import webbrowser
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from conftest import run_main
from test_command_line import assert_refused

import minigpt_pl
from minigpt_pl.config import NumberControls
from minigpt_pl.exporting import html
from minigpt_pl.exporting.quantization import LONG_ROWS, pack, unpack
from minigpt_pl.generation import filters
from minigpt_pl.generation.controls import Controls
from minigpt_pl.generation.text import decode_continuation
from minigpt_pl.model import MiniGPT
from minigpt_pl.text_model import TextModel
from minigpt_pl.tokenizer import PADDING_ID, UNKNOWN_ID, build_tokenizer, build_vocabulary, count_words

SIZES = {
    "one block": dict(vocab_size=LONG_ROWS + 500, max_length=20, embed_dim=32, num_heads=2, feed_forward_dim=40),
    "three blocks": dict(
        vocab_size=300,
        max_length=12,
        embed_dim=24,
        num_heads=3,
        head_dim=10,
        feed_forward_dim=30,
        num_blocks=3,
        tie_embeddings=True,
        token_shift=True,
    ),
}
TOP_10 = """([contexts]) => contexts.map(ids => {
    const logits = engine.logits(ids);
    return MiniGPT.top(logits, 10).map(id => [id, logits[id]]);
})"""
GENERATE = """([ids, controls, count]) => {
    const steps = [];
    for (const step of engine.generate(ids, controls, MiniGPT.random(0))) {
        if (steps.push(step) === count) break;
    }
    return steps;
}"""


def random_model(**sizes) -> TextModel:
    """A network with random weights, large enough that the words differ in probability and the heads attend unevenly.

    Its weights are those that the page computes with.
    """
    torch.manual_seed(0)
    network = MiniGPT(**sizes).eval()
    for parameter in network.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    network.load_state_dict(unpack(*pack(network)), strict=not sizes.get("tie_embeddings"))
    words = [f"{'-,x'[i % 3]}{i}" for i in range(sizes["vocab_size"] - 3)]
    return TextModel(network, build_tokenizer(["", "[UNK]", *words, "[END]"]), end_id=sizes["vocab_size"] - 1)


# JSON writes a number such as 1.0 as 1.
numbers = functools.partial(torch.tensor, dtype=torch.float32)


def random_contexts(model: TextModel, count: int) -> list[list[int]]:
    """Contexts of all lengths up to one and a half windows."""
    rng, longest = random.Random(0), model.network.max_length * 3 // 2
    return [rng.choices(range(1, model.network.vocab_size), k=1 + i % longest) for i in range(count)]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run folder without a checkpoint: `page_data` takes the model from its caller."""
    folder = tmp_path_factory.mktemp("runs") / "random"
    folder.mkdir()
    (folder / "config.yaml").write_text("model: {}\ndata: {}\n")
    return folder


@pytest.fixture(scope="module")
def start(browser, run_folder):
    """A function that opens a page with the engine of a model. Its variable is `engine`."""

    def start(model):
        page = browser.new_page()
        page.add_script_tag(path=html.PARTS / "engine.js")
        page.evaluate("data => { window.engine = MiniGPT.load(data); }", html.page_data(model, run_folder))
        return page

    return start


@pytest.fixture(scope="module", params=SIZES)
def engine(request, start):
    """A model, and a page with its engine."""
    model = random_model(**SIZES[request.param])
    return model, start(model)


@pytest.fixture(scope="module", params=[False, True], ids=["", "token shift"])
def one_block(request, start):
    model = random_model(**SIZES["one block"], token_shift=request.param)
    return model, start(model)


class TestNetwork:
    def test_logits(self, engine):
        model, page = engine
        contexts = random_contexts(model, 300)
        found = page.evaluate(TOP_10, [contexts])
        with torch.inference_mode():
            for ids, top in zip(contexts, found, strict=True):
                logits = model.network(torch.tensor([ids[-model.network.max_length :]]))[0][0, -1]
                expected = logits.topk(10)
                assert [id_ for id_, _ in top] == expected.indices.tolist()
                assert torch.allclose(numbers([value for _, value in top]), expected.values, atol=1e-4)

    def test_a_text_that_grows_and_changes(self, engine, run_folder):
        """The engine keeps the positions that have not changed. A new engine gives the same logits."""
        model, page = engine
        words = random_contexts(model, 30)[-1]
        contexts = [words[:n] for n in range(1, len(words), 5)]
        contexts += [words[:5], words[:5], words[:3] + words[6:9], words[:4] + [2], words]
        script = "([all, data]) => all.map(ids => [engine, MiniGPT.load(data)].map(one => [...one.logits(ids)]))"
        for kept, new in page.evaluate(script, [contexts, html.page_data(model, run_folder)]):
            assert kept == new

    def test_attention(self, engine):
        model, page = engine
        network = model.network
        for ids in random_contexts(model, 30)[::5]:
            found = page.evaluate(
                "ids => engine.attention(ids).weights.map(block => block.map(head => [...head]))", ids
            )
            assert len(found) == len(network.blocks)
            with torch.inference_mode():
                x = network.embed(torch.tensor([ids[-network.max_length :]]))  # (1, L, D)
                for block, weights in zip(network.blocks, found, strict=True):
                    expected = block.attention.attention_weights(x)[0, :, -1]  # (H, L)
                    assert torch.allclose(numbers(weights), expected, atol=1e-5)
                    x = block(x)

    def test_contributions(self, one_block):
        """They add up to the logit, and equal the derivatives that autograd finds with the same things fixed."""
        model, page = one_block
        for ids in random_contexts(model, 30)[3::4]:
            word = random.Random(len(ids)).randrange(model.network.vocab_size)
            found = page.evaluate(
                "([ids, id]) => { const {positions, own, bias} = engine.contributions(ids, id);"
                "return [[...positions], own, bias, engine.logits(ids)[id]]; }",
                [ids, word],
            )
            positions, own, bias, logit = found
            assert sum(positions) + own + bias == pytest.approx(logit, abs=1e-4)
            expected = derivatives(model.network, ids[-model.network.max_length :], word)
            assert torch.allclose(numbers([*positions, own]), expected, atol=1e-4)

    def test_no_contributions_of_several_blocks(self, start):
        page = start(random_model(**SIZES["three blocks"]))
        assert page.evaluate("engine.contributions([5], 5)") is None


def derivatives(network, ids, word):
    """How the logit of a word changes with a factor for each value vector and for the last input: (L + 1,).

    Attention weights, deviations of the norms and the pattern of the ReLU are fixed. So the logit is linear in the
    factors, and each derivative is a contribution.
    """
    block, x = network.blocks[0], network.embed(torch.tensor([ids])).detach()[0]  # (L, D)
    factors = torch.ones(len(ids) + 1, requires_grad=True)

    def norm(layer, y):
        deviation = (y.var(correction=0) + layer.eps).sqrt().detach()
        return (y - y.mean()) / deviation * layer.weight + layer.bias

    attention = block.attention
    weights = attention.attention_weights(x[None])[0, :, -1].detach()  # (H, L)
    values = attention.value(x).view(len(ids), attention.num_heads, -1) * factors[:-1, None, None]  # (L, H, K)
    values = attention.shift(values.transpose(0, 1)[None])[0]  # (H, L, K)
    attended = attention.output(torch.einsum("hl,hlk->hk", weights, values).flatten())  # (D,)
    middle = norm(block.attention_norm, x[-1] * factors[-1] + attended)
    hidden = block.feed_forward[0](middle)  # (F,)
    end = norm(block.feed_forward_norm, middle + block.feed_forward[2](hidden * (hidden > 0).detach()))
    return torch.autograd.grad(network.output(end)[word], factors)[0]


class TestWeights:
    @pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
    def test_error_of_the_rounding(self, sizes):
        torch.manual_seed(0)
        network = MiniGPT(**sizes)
        rounded = unpack(*pack(network))
        for name, weight in network.named_parameters():
            error = (rounded.pop(name) - weight).abs()
            if weight.dim() == 1:
                assert error.max() == 0
                continue
            half_a_step = weight.abs().amax(dim=1, keepdim=True) / (2 * 32767)
            if len(weight) == network.vocab_size:
                half_a_step[LONG_ROWS:] *= 32767 / 127
            assert (error <= half_a_step * 1.001 + 1e-7).all()
        assert rounded == {}

    def test_eight_bits_for_rare_words(self):
        network = MiniGPT(**SIZES["one block"])
        rows, width = network.token_embedding.weight.shape
        index, _ = pack(network)
        size = index["position_embedding.weight"]["start"]
        assert size == rows * 4 + LONG_ROWS * width * 2 + (rows - LONG_ROWS) * width

    def test_missing_weights(self, one_block, run_folder):
        model, page = one_block
        data = html.page_data(model, run_folder)
        data["weights"] = data["weights"][: len(data["weights"]) // 8 * 4]
        message = page.evaluate("data => { try { MiniGPT.load(data); } catch (error) { return error.message; } }", data)
        assert message == "Some weights are missing; copy this file again."

    def test_a_browser_without_from_base64(self, one_block, run_folder):
        model, page = one_block
        script = """data => {
            const fromBase64 = Uint8Array.fromBase64;
            Uint8Array.fromBase64 = undefined;
            const logits = [...MiniGPT.load(data).logits([5])];
            Uint8Array.fromBase64 = fromBase64;
            return [logits, [...engine.logits([5])]];
        }"""
        slow, fast = page.evaluate(script, html.page_data(model, run_folder))
        assert slow == fast


HOSTILE = [
    *("It's", "don't", "real-life", "'ll", "'t", '"', "'", "--", "x", "film", "FILM", "3.5", "a_b", "\\n", "\\", "`"),
    *(
        "<br />",
        "<BR />",
        "<br/>",
        "<br  />",
        "</script>",
        "<script>",
        "<!--",
        "]]>",
        "&amp;",
        "&lt;",
        "${x}",
        "{{data}}",
    ),
    *("\u00a0", "\u0085", "\u2028", "\u2029", "\u200b", "\u200d", "\ufeff", "\u3000", "\u1680", "\u180e", "\ufffd"),
    *("É", "é", "e\u0301", "İ", "ı", "ß", "ẞ", "ſ", "K", "Σ", "ς", "ﬁ", "Ǆ", "ñ", "Ω", "中文", "한국", "ไทย", "ـ", "א"),
    *("😀", "👩‍👩‍👧", "🏳️‍🌈", "𝔘", "\U0010ffff", "\ue000", "\x00", "\x01", "\x1b", "\x1c", "\x1f", "\x7f", "\x9f"),
    *(" ", "  ", "\t", "\n", "\r", "\r\n", "\v", "\f", *"!#$%&()*+,-./:;<=>?@[]^_{|}~", "[UNK]", "[END]", "__proto__"),
]


@pytest.fixture(scope="module")
def texts():
    rng = random.Random(0)
    any_character = [chr(code) for code in range(0x3000)]
    parts = [*HOSTILE, *rng.sample(any_character, 300)]
    return ["".join(rng.choices(parts, k=rng.randrange(40))) for _ in range(2_000)]


@pytest.fixture(scope="module")
def words(start, texts):
    """A tokenizer that knows the words of half of the texts, and a page that knows the same words."""
    vocabulary = build_vocabulary(count_words(texts[::2]), 20_000)
    network = MiniGPT(vocab_size=len(vocabulary), max_length=4, embed_dim=4, feed_forward_dim=4)
    tokenizer = build_tokenizer(vocabulary)
    return tokenizer, start(TextModel(network, tokenizer, end_id=len(vocabulary) - 1))


class TestWords:
    def test_hostile_strings(self, words, texts):
        tokenizer, page = words
        found = page.evaluate("texts => texts.map(text => engine.tokenize(text))", texts)
        unknown = 0
        for text, tokens in zip(texts, found, strict=True):
            encoding = tokenizer.encode(text)
            assert [token["id"] for token in tokens] == encoding.ids, repr(text)
            assert [token["text"] for token in tokens] == [text[slice(*span)] for span in encoding.offsets], repr(text)
            assert [token["unknown"] for token in tokens] == [id_ == UNKNOWN_ID for id_ in encoding.ids]
            unknown += encoding.ids.count(UNKNOWN_ID)
        assert 1_000 < unknown < sum(map(len, found)) / 2

    def test_half_a_character(self, words):
        """A browser can produce text that Python cannot represent."""
        _, page = words
        found = page.evaluate("engine.tokenize('film \\ud800 film')")
        assert [token["unknown"] for token in found] == [False, True, False]

    def test_text_of_ids(self, words):
        tokenizer, page = words
        rng, size = random.Random(1), tokenizer.get_vocab_size()
        all_ids = [rng.choices(range(size), k=rng.randrange(1, 30)) for _ in range(500)]
        found = page.evaluate("all => all.map(ids => [engine.pieces(ids), engine.detokenize(ids)])", all_ids)
        for ids, (pieces, text) in zip(all_ids, found, strict=True):
            assert text == tokenizer.decode(ids) == "".join(pieces) and len(pieces) == len(ids)
        each = page.evaluate("engine.vocabulary.map((_, id) => engine.piece(id))")
        assert each == [decode_continuation(tokenizer, [id_]) for id_ in range(size)]


NUMBERS = [control for control in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")]


def random_controls(rng: random.Random, size: int) -> dict:
    values = {
        "temperature": rng.choice([0, 1e-9, 0.3, 0.8, 1, 1.7, 50]),
        "top_k": rng.choice([None, 1, 2, 20, 150, size]),
        "top_p": rng.choice([1e-6, 0.3, 0.9, 0.999, 1]),
        "min_p": rng.choice([0, 1e-4, 0.1, 1]),
        "repetition_penalty": rng.choice([0.5, 1, 1.3, 100]),
    }
    return {name: values[name] for name in rng.sample(NUMBERS, rng.randrange(1, 6))}


class TestControls:
    def test_distribution(self, start):
        page, rng, size = start(random_model(**SIZES["three blocks"])), random.Random(0), 300
        torch.manual_seed(0)
        cases = [
            (
                (torch.randn(size) * rng.choice([0.1, 1, 5])).tolist(),
                rng.choices(range(size), k=rng.randrange(1, 100)),
                random_controls(rng, size),
            )
            for _ in range(200)
        ]
        script = """cases => cases.map(([logits, ids, controls]) => {
            const found = engine.distribution(Float32Array.from(logits), ids, controls);
            return {...found, after: [...found.after], probabilities: [...found.probabilities]};
        })"""
        for (values, ids, controls), found in zip(cases, page.evaluate(script, cases), strict=True):
            logits = torch.tensor([values])
            before = logits.softmax(dim=-1)[0]
            neutral = {"temperature": 1, "top_k": None} | controls
            on_ids = Controls(**neutral, vocab_size=size, banned_ids=[PADDING_ID, UNKNOWN_ID])
            processed = filters.process(logits, on_ids, torch.tensor([ids]), 0)
            if on_ids.temperature == 0:
                after = F.one_hot(processed.argmax(dim=-1), size).float()[0]
            else:
                after = filters.warp(processed, on_ids).softmax(dim=-1)[0]
            assert torch.allclose(numbers(found["after"]), after, atol=2e-5), controls
            assert torch.allclose(numbers(found["probabilities"]), before, atol=1e-6)
            for name, expected in (("entropyBefore", before), ("entropy", after)):
                bits = torch.special.entr(expected.double()).sum().item() / math.log(2)
                assert found[name] == pytest.approx(bits, abs=1e-3)
            assert found["order"] == before.topk(10).indices.tolist()
            assert len(found["orderAfter"]) == min(10, (after > 0).sum())

    def test_no_control_means_no_effect(self, one_block):
        _, page = one_block
        script = """controls => {
            const {probabilities, after} = engine.distribution(engine.logits([7, 8]), [7, 8], controls);
            const rest = 1 - probabilities[0] - probabilities[1];
            return Math.max(...after.map((p, id) => Math.abs(p - (id < 2 ? 0 : probabilities[id] / rest))));
        }"""
        off = {"temperature": 1, "top_k": None, "top_p": 1, "min_p": 0, "repetition_penalty": 1}
        assert page.evaluate(script, {}) < 1e-7 and page.evaluate(script, off) < 1e-7
        assert page.evaluate(script, off | {"temperature": 0.5}) > 1e-4

    def test_draws_follow_the_distribution(self, one_block):
        _, page = one_block
        script = """() => {
            const after = new Float32Array(engine.vocabulary.length);
            [after[3], after[5], after[4000]] = [0.5, 0.2, 0.3];
            const random = MiniGPT.random(1), counts = {};
            for (let i = 0; i < 20000; i++) {
                const id = engine.draw(after, random);
                counts[id] = (counts[id] ?? 0) + 1 / 20000;
            }
            return counts;
        }"""
        counts = page.evaluate(script)
        assert counts == pytest.approx({"3": 0.5, "5": 0.2, "4000": 0.3}, abs=0.015)

    def test_random_numbers(self, one_block):
        _, page = one_block
        draw = "seed => { const random = MiniGPT.random(seed); return Array.from({length: 5000}, () => random()); }"
        drawn, same, other = (page.evaluate(draw, seed) for seed in (0, 0, 1))
        assert drawn == same != other and min(drawn) >= 0 and max(drawn) < 1
        assert other[:3] == [
            0.6270739405881613,
            0.002735721180215478,
            0.5274470399599522,
        ]  # mulberry32, computed in Python
        deciles = [sum(int(10 * number) == i for number in drawn) for i in range(10)]
        assert min(deciles) > 400 and max(deciles) < 600


class TestTexts:
    @pytest.mark.parametrize("controls", [{}, {"repetition_penalty": 1.5}], ids=["greedy", "with a penalty"])
    def test_greedy_texts(self, engine, controls):
        """200 words, ten windows: the same words, probabilities, ranks and entropies as in Python."""
        model, page = engine
        controls |= {"temperature": 0}
        prompt = " ".join(f"{'-,x'[i % 3]}{i}" for i in (5, 9, 4))
        (record,) = minigpt_pl.generate(model, prompt, num_tokens=200, seed=0, **controls)
        ids = model.tokenizer.encode(prompt).ids
        steps = page.evaluate(GENERATE, [ids, controls, 200])
        assert [decode_continuation(model.tokenizer, [step["id"]]) for step in steps] == record.tokens
        assert len(steps) > 50 and [step["rank"] for step in steps] == record.ranks
        for name, values in (("probability", record.probabilities), ("entropy", record.entropies)):
            assert [step[name] for step in steps] == pytest.approx(values, abs=1e-4)

    def test_drawn_texts(self, one_block):
        model, page = one_block
        controls = {"temperature": 0.9, "top_k": 50, "top_p": 0.9}
        steps = page.evaluate(GENERATE, [[5, 6], controls, 60])
        assert steps == page.evaluate(GENERATE, [[5, 6], controls, 60])
        text = [5, 6]
        for step in steps:
            with torch.inference_mode():
                logits = model.network(torch.tensor([text[-model.network.max_length :]]))[0][0, -1]
            assert step["probability"] == pytest.approx(float(logits.softmax(dim=-1)[step["id"]]), abs=1e-5)
            assert [word["id"] for word in step["top"]] == logits.topk(10).indices.tolist() and step["rank"] <= 52
            text.append(step["id"])
        assert len(set(text)) > 20

    def test_the_end(self, start):
        model = random_model(**SIZES["three blocks"])
        model.network.output.bias.data[model.end_id] += 100
        assert start(model).evaluate(GENERATE, [[5], {"temperature": 1}, 50]) == []
        model.end_id = None  # trained without [END], so it is never drawn
        steps = start(model).evaluate(GENERATE, [[5], {"temperature": 1}, 50])
        assert len(steps) == 50 and model.network.vocab_size - 1 not in [step["id"] for step in steps]

    def test_nothing_to_continue(self, one_block):
        _, page = one_block
        message = page.evaluate("() => { try { engine.logits([]); } catch (error) { return error.message; } }")
        assert message == "Give at least one word."


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the small run, for a test to change."""
    shutil.copytree(trained / "outputs", tmp_path / "outputs")
    return tmp_path / "outputs" / "tiny"


def export(run, *arguments):
    return run_main("export", *arguments, cwd=run.parents[1])


def read_page(path) -> dict:
    """The JSON object of a page."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.DOTALL)
    return json.loads(found[1])


def unfinished(folder) -> list[str]:
    return [path.name for path in folder.rglob("*.tmp")]


class TestCommand:
    def test_the_page_has_the_run(self, run, caplog):
        caplog.set_level("INFO")
        done = export(run, "html", "run=tiny")
        assert done.returncode == 0, done.stderr
        page = run / "export" / "tiny.html"
        assert f"Wrote {page} (0.1 MB) from outputs/tiny/checkpoints/best.ckpt" in caplog.messages
        assert unfinished(run) == []
        data, model = read_page(page), minigpt_pl.load(run)
        assert data["settings"] == {name: value for name, value in data["settings"].items() if name != "top_k"} | {
            "top_k": 20
        }
        assert data["settings"].items() >= (asdict(NumberControls()) | {"top_k": 20}).items()
        texts = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
        assert [epoch["text"] for epoch in data["epochs"]] == [text["text"] for text in texts]
        assert len(data["losses"]["val"]) == 2 and len(data["losses"]["train"]) >= 2
        assert data["prompt"] == texts[0]["prompt"] and data["checkpoint"] == "tiny/checkpoints/best.ckpt"
        weights = unpack(data["tensors"], base64.b64decode(data["weights"]))
        for name, weight in model.network.named_parameters():
            assert torch.allclose(weights[name], weight, atol=0.01)
        assert data["card"]["Network"]["Parameters"] == f"{sum(w.numel() for w in model.network.parameters()):,}"
        assert data["card"]["Data"]["Source"] == "story.txt" and data["card"]["Training"]["Epochs"] == "2"

    def test_a_page_names_no_folder_of_the_machine(self, run, story):
        export(run, "html", "run=tiny")
        page = (run / "export" / "tiny.html").read_text()
        assert str(run.parent) not in page and str(story.parent) not in page

    def test_figures_of_evaluate(self, run):
        assert run_main("evaluate", "run=tiny", cwd=run.parents[1]).returncode == 0
        export(run, "html", "run=tiny")
        measured = json.loads((run / "evaluation.json").read_text())["whole"]["network"]
        card = read_page(run / "export" / "tiny.html")["card"]["Held-out text"]
        assert card["Word perplexity, network"] == f"{measured['word_perplexity']:,.2f}"
        assert card["Bits per byte, network"] == f"{measured['bits_per_byte']:.4f}"

    def test_other_path_and_newest_run(self, run):
        assert export(run, "html", "path=new/my page.html").returncode == 0
        page = run.parents[1] / "new" / "my page.html"
        first = page.read_bytes()
        assert export(run, "html", f"path={page}").returncode == 0, "a page is replaced"
        assert page.read_bytes() == first

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "format=???: must be given (the first word of the command: html"),
            (["pdf"], "format=pdf: must be one of"),
            (["run=tiny"], "format=???: must be given"),
            (["html", "run=none"], "run=none: no such run folder or checkpoint"),
            (["html", "output_dir=none"], "output_dir=none: holds no finished run"),
            (["html", "path=outputs"], "path=outputs: exists, and is not a page of this command"),
            (["html", "path=outputs/tiny/run.json"], "run.json: exists, and is not a page of this command"),
            (["html", "path=outputs/tiny/run.json/page.html"], "path=outputs/tiny/run.json: cannot be created"),
            (["html", "path="], "path=: must not be empty"),
            (["html", "now"], "now: is not a setting; write SETTING=VALUE"),
        ],
    )
    def test_bad_input(self, run, arguments, message):
        before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
        assert_refused(export(run, *arguments), message)
        assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_diverged_network(self, run, value):
        path = run / "checkpoints" / "best.ckpt"
        contents = torch.load(path, weights_only=True)
        contents["state_dict"]["model.output.weight"][3, 3] = value
        torch.save(contents, path)
        assert_refused(export(run, "html"), "best.ckpt: the network's values are NaN or infinite")
        assert not (run / "export").exists()

    def test_a_loss_that_diverged(self, run):
        """The weights of an earlier checkpoint can be good."""
        metrics = run / "metrics.csv"
        lines = metrics.read_text().splitlines()
        column = lines[0].split(",").index("train/loss")
        row = lines[1].split(",")
        row[column] = "nan"
        metrics.write_text("\n".join([lines[0], ",".join(row), *lines[2:]]) + "\n")
        assert export(run, "html").returncode == 0

    def test_a_large_page(self, run, monkeypatch):
        monkeypatch.setattr(html, "MAX_MB", 0.01)
        assert_refused(export(run, "html"), "confirm=false: the page would have 0 MB")
        assert unfinished(run) == []
        assert export(run, "html", "confirm=true").returncode == 0

    def test_a_run_that_changes(self, run, monkeypatch):
        def write_slowly(*arguments, write=html.write):
            write(*arguments)
            checkpoint = run / "checkpoints" / "best.ckpt"
            shutil.copy(checkpoint, run / "copy")
            (run / "copy").replace(checkpoint)

        monkeypatch.setattr(html, "write", write_slowly)
        assert_refused(export(run, "html", "run=tiny"), "run=tiny: changed during the export")
        assert not (run / "export").exists()

    def test_a_full_disk(self, run, monkeypatch):
        export(run, "html")
        page = run / "export" / "tiny.html"
        before = page.read_bytes()

        def write_a_part(path, *_):
            path.write_text(html.MARK)
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(html, "write", write_a_part)
        assert_refused(export(run, "html"), f"path={page}: cannot be written (No space left on device)")
        assert page.read_bytes() == before and unfinished(run) == []

    @pytest.mark.parametrize(
        ("name", "contents"),
        [("samples.jsonl", "{}\n"), ("evaluation.json", "[]"), ("config.yaml", "x"), ("run.json", "x")],
    )
    def test_a_damaged_run(self, run, name, contents):
        (run / name).write_text(contents)
        assert_refused(export(run, "html", "run=tiny"), f"{name}: not ")
        assert not (run / "export" / "tiny.html").exists()

    def test_play(self, run, monkeypatch):
        opened = []
        monkeypatch.setattr(webbrowser, "open", lambda url: opened.append(url) or True)
        done = run_main("play", "run=tiny", cwd=run.parents[1])
        page = run / "export" / "tiny.html"
        assert (done.returncode, done.stdout, opened) == (0, "", [page.as_uri()]) and html.is_page(page)
        monkeypatch.setattr(webbrowser, "open", lambda url: False)
        done = run_main("play", cwd=run.parents[1])
        assert done.stdout == f"No browser can be started here. Open this file in one: {page}\n"
        assert_refused(run_main("play", "run=none", cwd=run.parents[1]), "run=none: no such run folder")


ATTACK = "the </script><img src=x.png onerror=alert(1)><script>window.hacked = 1</script> <!-- <b>cat"


class TestSafety:
    @pytest.fixture
    def page(self, run, browser):
        """The page of a run whose name and texts contain HTML."""
        run = run.rename(run.with_name("a<b>&<script>"))
        lines = [json.loads(line) | {"prompt": ATTACK, "text": ATTACK} for line in (run / "samples.jsonl").open()]
        (run / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        done = export(run, "html", f"run='{run.name}'")
        assert done.returncode == 0, done.stderr
        page = browser.new_page()
        messages, requests = [], []
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto((run / "export" / f"{run.name}.html").as_uri())
        assert messages == [] and requests[1:] == ["data:,"] * (len(requests) - 1)
        yield page
        page.close()

    def test_texts_are_shown_as_text(self, page):
        data = page.evaluate("JSON.parse(document.getElementById('data').textContent)")
        assert data["name"] == "a<b>&<script>" and data["epochs"][0]["text"] == ATTACK == data["prompt"]
        assert page.title().startswith("a<b>&<script>")
        assert page.evaluate("document.querySelectorAll('img, b').length") == 0
        assert page.evaluate("window.hacked") is None

    @pytest.mark.parametrize(
        "attempt",
        [
            "() => { const tag = document.createElement('script'); tag.textContent = 'window.hacked = 1';"
            " document.body.append(tag); }",
            "() => { const tag = document.createElement('div'); tag.setAttribute('onclick', 'window.hacked = 1');"
            " document.body.append(tag); tag.click(); }",
            "() => { setTimeout('window.hacked = 1', 0); }",
            "() => fetch('https://example.com').then(() => { window.hacked = 1; }, () => {})",
            "() => { const tag = document.createElement('base'); tag.href = 'https://example.com';"
            " document.head.append(tag); if (document.baseURI !== location.href) window.hacked = 1; }",
        ],
        ids=["script", "handler", "text as code", "request", "base"],
    )
    def test_the_policy(self, page, attempt):
        page.evaluate(attempt)
        page.wait_for_timeout(50)
        assert page.evaluate("window.hacked") is None
