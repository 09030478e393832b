"""The interface of the offline page, in Chromium. test_export_html.py has the tests of its engine."""

import json
import re
from dataclasses import fields
from urllib.parse import parse_qs

import pytest
import torch

from minigpt_pl.exporting import html
from minigpt_pl.exporting.quantization import pack, unpack
from minigpt_pl.generation.prompts import controls_on_ids
from minigpt_pl.generation.text import Record
from minigpt_pl.model import MiniGPT
from minigpt_pl.text_model import TextModel
from minigpt_pl.tokenizer import build_tokenizer

WORDS = ["the", "movie", "is", "a", "good", "film", ".", ",", "'s", *(f"word{i}" for i in range(288))]
SAMPLES = [
    {"epoch": epoch, "step": 50 * epoch, "prompt": prompt, "text": f"{prompt} text {epoch}"}
    for epoch in (1, 2, 3)
    for prompt in ("the movie", "a film")
]
LEVELS = range(6)
LIGHT, DARK = {"color_scheme": "light"}, {"color_scheme": "dark"}
CONTRAST = """element => {
    let behind = element;
    while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
    const [ink, paper] = [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor].map(colour => {
        const parts = colour.match(/[\\d.]+/g).slice(0, 3).map(Number);
        const [r, g, b] = parts.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    });
    return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
}"""


@pytest.fixture(scope="module")
def make_page(tmp_path_factory):
    """A function that writes the page of a random network, and returns the path and the model."""

    def make(num_blocks=1, samples=SAMPLES):
        torch.manual_seed(0)
        network = MiniGPT(len(WORDS) + 3, 16, 32, 2, feed_forward_dim=32, num_blocks=num_blocks).eval()
        for parameter in network.parameters():
            parameter.data += 0.15 * torch.randn_like(parameter)
        network.output.bias.data[[0, 1, -1]] = -30  # no padding and no [UNK]; the text does not end by itself
        network.load_state_dict(unpack(*pack(network)))  # the page computes with these weights
        folder = tmp_path_factory.mktemp("runs") / "tiny"
        folder.mkdir()
        (folder / "config.yaml").write_text("model: {}\ndata: {}\n")
        if samples:
            (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
            rows = "".join(f"{step},{9 - step / 50},{7 if step == 100 else ''}\n" for step in range(0, 151, 10))
            (folder / "metrics.csv").write_text("step,train/loss,val/loss\n" + rows)
        model = TextModel(network, build_tokenizer(["", "[UNK]", *WORDS, "[END]"]), end_id=len(WORDS) + 2)
        html.write(folder / "tiny.html", model, folder)
        return folder / "tiny.html", model

    return make


@pytest.fixture(scope="module")
def made(make_page):
    return make_page()


@pytest.fixture
def start(browser, made):
    """A function that opens the page. Afterwards, no error and no request must have occurred."""
    contexts, problems = [], []

    def start(hash="", path=made[0], **options):
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | LIGHT | options))
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "request",
            lambda request: problems.extend([request.url] * (not request.url.startswith(("file:", "data:", "blob:")))),
        )
        page.goto(f"{path.as_uri()}{hash}")
        return page

    yield start
    for context in contexts:
        context.close()
    assert problems == []


@pytest.fixture
def page(start):
    return start()


@pytest.fixture
def slow_page(page):
    """The page in a browser whose processor is ten times slower, so that a fast machine has not written all words."""
    session = page.context.new_cdp_session(page)
    session.send("Emulation.setCPUThrottlingRate", {"rate": 10})
    yield page
    session.send("Emulation.setCPUThrottlingRate", {"rate": 1})


def wait(page, selector, text):
    """Wait until the element has this text. `page.wait_for_function` needs eval, which the page's policy forbids."""
    page.locator(selector, has_text=re.compile(text)).wait_for()


def write(page, button="#write"):
    """Press a button that writes a text, and return the new words."""
    page.click(button)
    wait(page, "#write", "^Write$")
    return new_words(page)


def new_words(page):
    return page.locator("#words [role=option]").all_inner_texts()


def bars(page):
    """The words of the panel, with their probabilities before and after the controls, as widths."""
    script = """rows => rows.map(row => [
        row.querySelector(".word").innerText, ...[...row.querySelectorAll(".track span")].map(bar => bar.style.width)
    ])"""
    return page.locator("#bars button").evaluate_all(script)


def figures(page):
    """The words of the panel and their figures."""
    return page.locator("#bars button").evaluate_all("rows => rows.map(r => r.ariaLabel)")


def distribution(model, ids):
    """The probabilities of the next word."""
    with torch.inference_mode():
        return model.network(torch.tensor([ids[-model.network.max_length :]]))[0][0, -1].softmax(dim=-1)


class TestPrompt:
    def test_words_appear_while_the_user_types(self, page):
        page.fill("#prompt", "A good Film, ")
        wait(page, "#prompt-state", "^4 words.$")
        assert page.locator("#chips > span").all_inner_texts() == ["A", "good", "Film", ","]
        page.locator("#prompt").press_sequentially("xyz")
        wait(page, "#prompt-state", "5 words. Underlined: 1 not in the vocabulary")
        (unknown,) = page.locator("#chips .unknown").all()
        assert unknown.get_attribute("title") == "not in the vocabulary"
        assert unknown.text_content() == "xyz (not in the vocabulary)"  # for screen readers
        assert "dotted" in unknown.evaluate("word => getComputedStyle(word).textDecorationStyle")

    def test_html_is_text(self, page):
        prompt = "<img src=x onerror=alert(1)> <script>alert(2)</script> the </textarea>"
        page.fill("#prompt", prompt)
        write(page)
        assert page.locator("main img, main script").count() == 0
        assert page.inner_text("#text-prompt") == prompt
        wait(page, "#versions", re.escape(prompt[-40:]))

    def test_a_prompt_of_a_megabyte(self, page):
        times = page.evaluate("""() => new Promise(resolve => {
            const prompt = document.getElementById("prompt"), times = [];
            prompt.value = "good film ".repeat(100000);
            prompt.dispatchEvent(new Event("input"));
            let last = performance.now(), frames = 0;
            const frame = () => {
                times.push(performance.now() - last);
                last = performance.now();
                if (++frames < 30) requestAnimationFrame(frame); else resolve(times);
            };
            requestAnimationFrame(frame);
        })""")
        wait(page, "#prompt-state", "Only the last 16 words count")
        assert max(times) < 1500 and page.locator("#chips > span").count() == 16
        assert len(write(page)) == 60
        assert "prompt" not in parse_qs(page.url.partition("#")[2])

    def test_a_prompt_without_known_words(self, page):
        for prompt, problem in ((" ", "Type the start"), ("xyz zyx", "knows none of these words")):
            page.fill("#prompt", prompt)
            page.click("#write")
            wait(page, "#status", problem)
            assert page.locator("#bars button").first.is_hidden() and page.locator("#versions li").count() == 0


class TestText:
    def test_words_stream_in_until_the_user_stops(self, slow_page):
        page = slow_page
        page.fill("#num_tokens", "2000")
        page.click("#write")
        wait(page, "#words", "word")
        assert page.inner_text("#write") == "Stop"
        page.click("#write")
        wait(page, "#status", "Stopped after")
        count = len(new_words(page))
        assert 0 < count < 2000
        page.wait_for_timeout(100)
        assert len(new_words(page)) == count
        page.fill("#num_tokens", "7")
        assert len(write(page, "#go-on")) == count + 7

    def test_the_page_reacts_while_it_writes(self, slow_page):
        page = slow_page
        gaps = page.evaluate("""() => new Promise(resolve => {
            const count = document.getElementById("num_tokens"), gaps = [];
            count.value = 2000;
            count.dispatchEvent(new Event("input"));
            document.getElementById("write").click();
            let last = performance.now();
            const timer = setInterval(() => {
                gaps.push(performance.now() - last);
                last = performance.now();
                if (gaps.length === 8) { clearInterval(timer); resolve(gaps); }
            }, 10);
        })""")
        assert page.inner_text("#write") == "Stop"  # it still writes
        assert max(gaps) < 1000
        page.keyboard.press("Escape")
        wait(page, "#status", "Stopped")

    def test_colours_and_labels_are_those_of_the_probability(self, page, made):
        words = write(page)
        ids = made[1].tokenizer.encode(page.input_value("#prompt")).ids
        options = page.locator("#words [role=option]")
        seen = options.evaluate_all("all => all.map(o => [o.className, o.title, o.ariaLabel])")
        for word, (colour, title, label) in zip(words, seen, strict=True):
            probabilities = distribution(made[1], ids)
            ids.append(made[1].tokenizer.token_to_id(word))
            probability, rank = probabilities[ids[-1]].item(), int((probabilities > probabilities[ids[-1]]).sum()) + 1
            shown = re.fullmatch(re.escape(word) + r": probability ([\d.]+) %, rank (\d+)", title)
            assert float(shown[1]) == pytest.approx(100 * probability, rel=0.06) and int(shown[2]) == rank
            lowest = [0.5, 0.2, 0.05, 0.01, 0.001, 0]
            level = next(i for i in LEVELS if probability >= lowest[i])
            assert colour.startswith(f"coloured level-{level}") and title == label

    @pytest.mark.parametrize("scheme", [LIGHT, DARK])
    def test_contrast(self, start, scheme):
        page = start(**scheme)
        write(page)
        legend = page.locator("#legend .coloured").all()
        assert (
            len(legend) == 6
            and len({word.evaluate("w => getComputedStyle(w).backgroundColor") for word in legend}) == 6
        )
        page.fill("#seed", "-1")
        for selector in ("#write", "#text-prompt", "#prompt-help", ".figures", "#chips > span", "#number-problem"):
            assert page.locator(selector).first.evaluate(CONTRAST) >= 4.5, selector
        assert min(word.evaluate(CONTRAST) for word in legend) >= 7

    def test_the_same_seed_gives_the_same_text(self, page):
        first, second = write(page), write(page)
        assert first != second
        page.uncheck("#new-seed")
        assert write(page) == second
        page.fill("#num_tokens", "25")
        write(page)
        page.fill("#num_tokens", "35")
        assert write(page, "#go-on") == second  # each place has its own random number


class TestVersions:
    def test_another_word(self, page, made):
        words = write(page)
        page.locator("#words [role=option]").nth(4).click()
        assert page.inner_text("#panel-title") == f"Word 5: {words[4]}"
        ids = [made[1].tokenizer.token_to_id(word) for word in words[:4]]
        ids = made[1].tokenizer.encode(page.input_value("#prompt")).ids + ids
        likeliest = distribution(made[1], ids).topk(10)
        for label, id_, probability in zip(figures(page), *(likeliest.indices, likeliest.values), strict=False):
            word, before = re.match(r"(?:Chosen: |Go on with )(\S+), ([\d.]+) % before", label).groups()
            assert word == made[1].tokenizer.id_to_token(int(id_))
            assert float(before) == pytest.approx(100 * float(probability), rel=0.06)
        other = next(row for row in page.locator("#bars button").all() if row.get_attribute("aria-current") == "false")
        name = other.locator(".word").inner_text()
        other.click()
        wait(page, "#status", "Finished after 55 new words")
        changed = new_words(page)
        assert changed[:5] == [*words[:4], name] and len(changed) == 60
        branch = page.locator("#versions > li > ol > li > button")
        assert branch.inner_text() == f"2 word 5: “{name}” instead of “{words[4]}”"
        assert branch.get_attribute("aria-current") == "true"

        page.click("#undo")
        assert new_words(page) == words and page.is_disabled("#undo")
        page.click("#redo")
        assert new_words(page) == changed and page.is_disabled("#redo")
        page.keyboard.press("Control+z")
        assert new_words(page) == words
        branch.click()
        assert new_words(page) == changed

    def test_a_changed_prompt_keeps_the_versions(self, page):
        words = write(page)
        page.fill("#prompt", "a film")
        wait(page, "#text-prompt", "^a film$")
        assert new_words(page) == [] and page.locator("#versions [aria-current]").count() == 0
        page.click("#undo")
        assert new_words(page) == words and page.input_value("#prompt") == "the movie"
        assert page.is_disabled("#undo") and page.is_disabled("#redo")

    def test_the_mouse_shows_and_a_click_keeps(self, page):
        words = write(page)
        page.locator("#words [role=option]").nth(2).hover()
        wait(page, "#panel-title", f"^Word 3: {re.escape(words[2])}$")
        page.locator("#words [role=option]").nth(7).click()
        page.locator("#words [role=option]").nth(2).hover()
        page.wait_for_timeout(250)
        assert page.inner_text("#panel-title").startswith("Word 8")
        page.click("#to-next")
        assert page.inner_text("#panel-title") == "Next word"


class TestControls:
    def test_the_bars_move_with_the_slider(self, page, made):
        rows = bars(page)
        assert len(rows) == 10 and page.locator("#versions li").count() == 0
        for name in ("temperature", "top_k", "top_p", "min_p"):
            page.click("#no-controls")
            for _, before, after in bars(page):
                assert float(before[:-1]) == pytest.approx(float(after[:-1]))
            page.locator(f"#controls-{name}").fill(
                {"temperature": "0.3", "top_k": "30", "top_p": "0.4", "min_p": "0.5"}[name]
            )
            moved = bars(page)
            assert [row[0] for row in moved] == [row[0] for row in rows]
            assert float(moved[0][2][:-1]) > float(moved[0][1][:-1]), name  # the likeliest word becomes likelier
            assert page.input_value(f"#controls-{name}-number") != ""
        page.click("#no-controls")
        page.fill("#prompt", f"the {rows[0][0]}")
        wait(page, "#text-prompt", rows[0][0])
        neutral = dict((word, after) for word, _, after in bars(page))
        page.locator("#controls-repetition_penalty").fill("2")
        assert dict((word, after) for word, _, after in bars(page)) != neutral

    def test_entropy(self, page, made):
        ids = made[1].tokenizer.encode("the movie").ids
        probabilities = distribution(made[1], ids)
        before = -(probabilities * probabilities.log2()).sum().item()
        page.click("#no-controls")
        page.fill("#controls-top_k-number", "3")
        three = probabilities[2:-1].topk(3).values
        three = three / three.sum()
        after = -(three * three.log2()).sum().item()
        text = page.inner_text("#entropy")
        assert text == f"Entropy {before:.2f} → {after:.2f} bits, 3 words left"

    def test_the_slider_of_top_k_reaches_every_size(self, page):
        page.locator("#controls-top_k").fill("100")
        assert page.input_value("#controls-top_k-number") == "" and "298" in page.inner_text("#entropy")
        page.locator("#controls-top_k").fill("0")
        assert page.input_value("#controls-top_k-number") == "1"
        assert page.get_attribute("#controls-top_k", "aria-valuetext") == "1 word"

    def test_bad_values(self, page):
        before = bars(page)
        for name, value in (("temperature", "-1"), ("top_k", "0"), ("top_p", "0"), ("min_p", "2"), ("min_p", "")):
            page.fill(f"#controls-{name}-number", value)
            assert page.inner_text(f"#controls-{name}-problem").endswith(".") and bars(page) == before
            assert page.get_attribute(f"#controls-{name}-number", "aria-invalid") == "true"
        page.click("#defaults")
        assert page.locator("[aria-invalid=true], .problem:visible").count() == 0

    def test_bad_numbers_of_words(self, page):
        page.fill("#num_tokens", "0")
        assert page.inner_text("#number-problem") == "Words must be a whole number from 1 to 2000."
        assert len(write(page)) == 60

    def test_greedy(self, page, made):
        page.fill("#controls-temperature-number", "0")
        assert write(page) == write(page)
        assert "rank 1" in page.locator("#words [role=option]").first.get_attribute("title")


class TestTwoSettings:
    def test_differences_are_marked(self, page):
        page.fill("#controls-b-temperature-number", "5")
        page.fill("#controls-b-top_k-number", "")
        page.click("#compare")
        wait(page, "#difference", "The first difference is word")
        a, b = (page.locator(f"#text-{name} .coloured") for name in "ab")
        words = [
            [*zip(text.all_text_contents(), text.evaluate_all("all => all.map(w => w.className)"), strict=True)]
            for text in (a, b)
        ]
        differs = ["differs" in colour for _, colour in words[0]]
        assert differs == ["differs" in colour for _, colour in words[1]]
        assert differs == [
            one.split(" (")[0] != other.split(" (")[0] for (one, _), (other, _) in zip(*words, strict=True)
        ]
        assert f"word {differs.index(True) + 1}." in page.inner_text("#difference")

    def test_the_same_settings_give_the_same_text(self, page):
        page.fill("#controls-b-temperature-number", "0.8")
        page.click("#compare")
        wait(page, "#difference", "Both texts are the same")
        assert page.locator(".differs").count() == 0 and page.locator("#text-b .coloured").count() == 60
        assert page.locator("#versions li").count() == 2


class TestInside:
    def test_attention_and_contributions(self, page, made):
        write(page)
        page.locator("#words [role=option]").nth(3).click()
        context = ["the", "movie", *new_words(page)[:3]]
        wait(page, "#inside-word", "as word 4, after")
        heads = page.locator("#attention .word-bars")
        assert heads.count() == 2
        ids = [made[1].tokenizer.token_to_id(word) for word in context]
        with torch.inference_mode():
            network = made[1].network
            weights = network.blocks[0].attention.attention_weights(network.embed(torch.tensor([ids])))[0, :, -1]
            word = new_words(page)[3]
            logits = network(torch.tensor([ids]))[0][0, -1]
        for head, row in zip(heads.all(), weights, strict=True):
            columns = head.locator("[role=listitem]")
            assert columns.locator(".word").all_inner_texts() == context
            shown = [float(label.split()[-2]) for label in columns.evaluate_all("all => all.map(c => c.title)")]
            assert shown == pytest.approx([100 * float(weight) for weight in row], rel=0.06)
            heights = head.locator(".bar").evaluate_all("all => all.map(bar => parseFloat(bar.style.height))")
            assert heights == pytest.approx([100 * float(weight / row.max()) for weight in row], abs=0.1)
        shown = page.locator("#contribution-bars [role=listitem]").evaluate_all("all => all.map(c => c.title)")
        columns = [float(title.split(": ")[1].replace("−", "-")) for title in shown]
        for index in (0, 1):  # the word of the text, and the likeliest word or the one after it
            page.select_option("#explained", index=index)
            name = page.locator("#explained option").nth(index).inner_text()
            text = page.inner_text("#contribution-sum").replace("−", "-")
            parts = [float(number) for number in re.findall(r"[+-]\d+\.\d+", text)]
            assert f"the logit of “{name}”" in text and sum(parts[:3]) == pytest.approx(parts[3], abs=0.02)
            assert parts[3] == pytest.approx(logits[made[1].tokenizer.token_to_id(name)].item(), abs=0.01)
            if index == 0:
                assert name == word and sum(columns) == pytest.approx(parts[0], abs=0.05)

    def test_several_blocks_have_no_contributions(self, start, make_page):
        page = start(path=make_page(num_blocks=2)[0])
        wait(page, "#no-contributions", "this network has several blocks")
        assert page.locator("#contributions").is_hidden()
        assert page.locator("#attention h4").all_inner_texts() == [
            f"Block {b}, head {h}" for b in (1, 2) for h in (1, 2)
        ]


class TestRun:
    def test_epochs(self, page):
        assert page.inner_text("#epoch-facts") == "After epoch 3, step 150:"
        marker = page.locator("#loss-curve .marker")
        last = float(marker.get_attribute("x1"))
        page.select_option("#epoch-prompt", "a film")
        page.locator("#epoch").fill("0")
        assert page.inner_text("#epoch-text") == "a film text 1"
        assert float(marker.get_attribute("x1")) < last
        assert len(page.get_attribute("#loss-curve .train", "points").split()) == 16
        assert "training loss goes from 9.00 to 6.00" in page.locator("#loss-curve title").text_content()

    def test_a_run_without_texts(self, start, make_page):
        page = start(path=make_page(samples=[])[0])
        assert page.locator("#epochs").is_hidden() and page.locator("#card").is_visible()

    def test_card(self, page, made):
        for heading, rows in json.loads(re.search(r'id="data">(.*?)</script>', made[0].read_text())[1])["card"].items():
            section = page.locator("#card > div", has=page.locator("h3", has_text=re.compile(f"^{heading}$")))
            assert section.locator("dt").all_inner_texts() == [*rows]
            assert section.locator("dd").all_inner_texts() == [*rows.values()]


class TestLinkAndHistory:
    def test_a_link_gives_the_same_text(self, start, page):
        page.fill("#prompt", "a good film & more #1")
        page.fill("#controls-temperature-number", "0.9")
        page.fill("#controls-top_k-number", "")
        words = write(page)
        page.wait_for_timeout(400)
        hash = page.url.partition("#")[2]
        assert parse_qs(hash)["top_k"] == ["null"] and parse_qs(hash)["temperature"] == ["0.9"]
        other = start(f"#{hash}")
        assert other.input_value("#prompt") == "a good film & more #1"
        assert not other.is_checked("#new-seed") and write(other) == words

    def test_copy_link(self, page):
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        page.fill("#controls-min_p-number", "0.25")
        page.click("#copy-link")
        wait(page, "#status", "^The link is copied.$")
        link = page.evaluate("navigator.clipboard.readText()")
        assert link == page.url and "min_p=0.25" in link
        page.evaluate("() => { Clipboard.prototype.writeText = () => Promise.reject(new Error('forbidden')); }")
        page.click("#copy-link")
        wait(page, "#status", "does not allow copying. Copy the address of this page")

    def test_a_bad_link_is_ignored(self, start):
        page = start("#prompt=bad&temperature=hot")
        bad = ["temperature=hot", "seed=-1", "top_k=301", "x=<b>", "min_p=null", "num_tokens=1e9"]
        for field in bad:
            page.evaluate("hash => { location.hash = hash; }", f"prompt=bad&{field}")
            wait(page, "#link-problem", f"^The link is ignored, because {field} must|x=<b> is not a setting")
            assert "\n" not in page.inner_text("#link-problem")
            assert (
                page.input_value("#prompt") == "the movie" and page.input_value("#controls-temperature-number") == "0.8"
            )
        page.evaluate("location.hash = 'prompt=good&num_tokens=3'")
        wait(page, "#text-prompt", "^good$")
        assert page.locator("#link-problem").is_hidden() and len(write(page)) == 3

    def test_download(self, page, made):
        write(page)
        page.locator("#words [role=option]").nth(1).click()
        page.locator("#bars button[aria-current=false]").first.click()
        wait(page, "#status", "Finished")
        chosen = new_words(page)[1]
        page.fill("#prompt", "the xyz movie \n")
        write(page)
        with page.expect_download() as download:
            page.click("#download")
        assert download.value.suggested_filename == "tiny.jsonl"
        records = [json.loads(line) for line in download.value.path().read_text().splitlines()]
        assert len(records) == 3
        model, (_, branch, last) = made[1], records
        settings = controls_on_ids(model, {})[1]
        assert records[0]["settings"] == settings
        assert branch["settings"] == settings | {"forced_words": {"1": chosen}}
        assert last["unknown_words"] == ["xyz"] and last["prompt"] == "the xyz movie \n"
        for values in records:
            record = Record(**values)
            assert [*values] == [field.name for field in fields(Record)]
            assert record.text == record.prompt.rstrip() + "".join(record.tokens)
            ids = model.tokenizer.encode(record.prompt).ids
            for word, probability, rank in zip(record.tokens, record.probabilities, record.ranks, strict=True):
                probabilities = distribution(model, ids)
                ids += model.tokenizer.encode(word).ids
                assert probability == pytest.approx(probabilities[ids[-1]].item(), rel=1e-3)
                assert rank == int((probabilities > probabilities[ids[-1]]).sum()) + 1
            assert len(record.entropies) == len(record.tokens) == 60


class TestEverybody:
    def test_keyboard_only(self, page):
        reached = []

        def tab_to(selector):
            for _ in range(60):
                page.keyboard.press("Tab")
                focused = page.evaluate("document.activeElement.id || document.activeElement.className")
                reached.append(focused)
                outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                assert outline != "none", focused  # the focus is visible
                if page.locator(selector).evaluate_all("all => all.includes(document.activeElement)"):
                    return
            raise AssertionError(f"Tab does not reach {selector}: {reached}")

        tab_to("#skip")
        page.keyboard.press("Enter")
        page.keyboard.press("Control+A")
        page.keyboard.type("a good film")
        page.keyboard.press("Control+Enter")
        wait(page, "#status", "Finished")
        words = new_words(page)
        tab_to("#words [role=option]")
        for _ in range(3):
            page.keyboard.press("ArrowRight")
        assert page.inner_text("#panel-title") == f"Word 4: {words[3]}"
        tab_to("#bars button:not([aria-current=true])")
        page.keyboard.press("Enter")
        wait(page, "#status", "Finished after 5[67]")
        assert new_words(page)[:3] == words[:3] and new_words(page) != words
        page.keyboard.press("Control+z")
        assert new_words(page) == words
        tab_to("#controls-temperature")
        before = page.input_value("#controls-temperature-number")
        page.keyboard.press("ArrowRight")
        assert page.input_value("#controls-temperature-number") != before
        tab_to("#compare")

    def test_arrow_keys_move_between_lines(self, page):
        write(page)
        page.locator("#words [role=option]").first.focus()
        box = "document.activeElement.getBoundingClientRect().top"
        tops = [page.evaluate(box)]
        for key in ("ArrowDown", "ArrowUp", "End", "Home"):
            page.keyboard.press(key)
            tops.append(page.evaluate(box))
        assert tops[1] > tops[0] == tops[2] < tops[3] and tops[4] == tops[0]

    def test_a_screen_reader_hears_the_start_and_the_end(self, page):
        page.evaluate("""() => {
            window.heard = [];
            for (const place of document.querySelectorAll("[role=status], [aria-live]")) {
                new MutationObserver(() => window.heard.push(place.textContent)).observe(
                    place, { childList: true, characterData: true, subtree: true });
            }
        }""")
        write(page)
        heard = page.evaluate("window.heard")
        assert len(heard) == 2 and heard[0] == "Writing …" and heard[1].startswith("Finished after 60 new words")

    def test_every_control_has_a_name(self, page):
        write(page)
        nameless = page.evaluate("""() => [...document.querySelectorAll("button, input, select, textarea")].filter(
            control => !control.labels?.length && !control.ariaLabel && !control.textContent.trim()
        ).map(control => control.outerHTML)""")
        assert nameless == []
        lists = page.locator("[role=list], [role=listbox], ol[id], ul[id]")
        names = lists.evaluate_all("all => all.map(e => e.ariaLabel || e.getAttribute('aria-labelledby'))")
        assert len(names) > 5 and all(names)
        assert (
            page.locator("[style]").evaluate_all("all => all.filter(e => !e.matches('.bar, .track span')).length") == 0
        )

    def test_no_horizontal_scrolling(self, page):
        page.fill("#prompt", "the movie " + "x" * 300)
        page.fill("#controls-b-temperature-number", "5")
        write(page)
        page.locator("#words [role=option]").nth(5).click()
        page.click("#compare")
        wait(page, "#difference", "first difference")
        size = "parseFloat(getComputedStyle(document.querySelector('.text')).fontSize)"
        sizes = [page.evaluate(size)]
        for width in (1280, 390):
            page.set_viewport_size({"width": width, "height": 844})
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.click("#large")
        sizes.append(page.evaluate(size))
        for width in (390, 1280):
            page.set_viewport_size({"width": width, "height": 844})
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert sizes[1] == pytest.approx(1.5 * sizes[0]) and page.get_attribute("#large", "aria-pressed") == "true"

    def test_colours_follow_the_system_and_the_switch(self, start):
        page = start(**DARK)
        paper = lambda: page.evaluate("getComputedStyle(document.documentElement).backgroundColor")  # noqa: E731
        dark = paper()
        page.select_option("#theme", "light")
        light = paper()
        assert dark != light
        page.select_option("#theme", "")
        assert paper() == dark
        page.emulate_media(color_scheme="light")
        page.locator("html[data-theme=light]").wait_for()
        assert paper() == light

    @pytest.mark.parametrize("motion, moves", [("no-preference", True), ("reduce", False)])
    def test_reduced_motion(self, start, motion, moves):
        page = start(reduced_motion=motion)
        duration = page.locator(".track .after").first.evaluate("bar => getComputedStyle(bar).transitionDuration")
        assert (duration not in ("0s", "")) == moves


class TestOldBrowsers:
    def test_a_missing_feature(self, browser, made):
        page = browser.new_page()
        page.add_init_script("delete window.MessageChannel")
        page.goto(made[0].as_uri())
        assert page.inner_text("#loading").startswith("The browser has no MessageChannel. Use")
        assert page.locator("#main").is_hidden()
        page.close()

    def test_without_javascript(self, browser, made):
        page = browser.new_page(java_script_enabled=False)
        page.goto(made[0].as_uri())
        assert "needs JavaScript" in page.inner_text("noscript")
        page.close()
