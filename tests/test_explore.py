import json
import math
import os
import re
import shutil
import warnings

import numpy as np
import pytest
from conftest import HOSTILE, PROMPTS, TINY_RUN, records, run_main, run_module
from scipy import stats

from minigpt_pl import InputError, MiniGPT, TextModel, load
from minigpt_pl.cli import app
from minigpt_pl.exploration import samples as samples_
from minigpt_pl.exploration.markup import MarkedSample, Table, Text, escape_markdown
from minigpt_pl.exploration.metrics import METRICS
from minigpt_pl.exploration.report import _prompt_rows, _worst
from minigpt_pl.exploration.samples import check_grid, label, read_prompts, settings_grid, varied_controls
from minigpt_pl.exploration.summary import (
    Estimate,
    bootstrap,
    by_prompt,
    effect,
    estimate_text,
    ranked_settings,
    summarize,
)
from minigpt_pl.tokenizer import build_tokenizer

SMALL = ["run=tiny", "prompts=prompts.yaml", "num_tokens=12", "num_seeds=2"]
SMALL += ["temperature=[0.5,1.5]", "top_k=[1,5,null]"]


def settings(*overrides: str):
    return app.to_settings(app.compose("explore", overrides))


@pytest.fixture(scope="module")
def explored(trained, tmp_path_factory):
    """A folder with a small run and an exploration of it, made by the command line."""
    cwd = tmp_path_factory.mktemp("explored")
    shutil.copytree(trained, cwd, dirs_exist_ok=True)
    (cwd / "prompts.yaml").write_text(PROMPTS)
    done = run_module("explore", *SMALL, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return cwd


def test_json_has_no_nan():
    record = {"a": [1.5, (math.nan, 2)], "b": {"c": math.nan, "d": "nan"}}
    assert samples_.without_nan(record) == {"a": [1.5, [None, 2]], "b": {"c": None, "d": "nan"}}


class TestGrid:
    def test_the_default_grid(self):
        grid = settings_grid(settings())
        assert len(grid) == 26  # 5 x 6; 5 of them are greedy, which is one setting
        assert varied_controls(grid) == ["temperature", "top_k"]
        labels = [label(setting, ["temperature", "top_k"]) for setting in grid[:3]]
        assert labels == ["greedy", "temperature=0.2 top_k=2", "temperature=0.2 top_k=10"]

    def test_any_control_can_vary(self):
        grid = settings_grid(settings("temperature=[0,0.7]", "top_k=[null]", "repetition_penalty=[1.0,1.3]"))
        labels = ["repetition_penalty=1", "repetition_penalty=1.3"]
        expected = [*(f"greedy {text}" for text in labels), *labels]
        assert [label(setting, varied_controls(grid)) for setting in grid] == expected

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            (["temperature=[0.5,-1]"], "temperature=[0.5, -1.0]: must be at least 0"),
            (["top_k=[0]"], "top_k=[0]: must be at least 1"),
            (["top_p=[0.5,1.5]"], "top_p=[0.5, 1.5]: must be above 0 and at most 1"),
            (["temperature=[nan]"], "temperature=[nan]: must be a finite number"),
            (["num_seeds=0"], "num_seeds=0: must be at least 1"),
        ],
    )
    def test_values_out_of_range(self, overrides, message):
        with pytest.raises(InputError) as error:
            settings(*overrides)
        assert str(error.value).startswith(message)

    def test_the_default_grid_works_with_eight_words(self):
        model = TextModel(
            MiniGPT(vocab_size=8, max_length=8, embed_dim=8, num_heads=1, feed_forward_dim=8),
            build_tokenizer(["", "[UNK]", "the", "cat", "a", "dog", "sees", "[END]"]),
            end_id=7,
        )
        grid = check_grid(settings(), model, [("short", "the cat")])
        assert {setting["top_k"] for setting in grid} == {1, 2, None}
        with pytest.raises(InputError, match="top_k=10: the model has only 8 words; give at most that, or None"):
            check_grid(settings("top_k=[2,10]"), model, [("short", "the cat")])

    def test_values_that_the_model_cannot_use(self, trained):
        model, prompts = load(trained / "outputs/tiny"), [("short", "the cat")]
        with pytest.raises(InputError) as error:
            check_grid(settings("top_k=[5,999]", "min_tokens=[0,99]"), model, prompts)
        assert [line[:12] for line in error.value.problems] == ["top_k=999: t", "min_tokens=9"]
        with pytest.raises(InputError, match=r"temperature=\[\]: must have at least one value"):
            check_grid(settings("temperature=[]"), model, prompts)
        with pytest.raises(InputError, match="prompts=my.yaml: prompt='xyzzy qwert'"):
            check_grid(settings("top_k=[5]", "prompts=my.yaml"), model, [("short", "xyzzy qwert")])
        with pytest.raises(InputError) as error:
            check_grid(settings("top_k=[5]"), model, [*prompts, ("short", "xyzzy"), ("long", "qwert")])
        [line] = error.value.problems
        assert line.startswith("prompts: the model knows no word of 2 of the 3 default prompts; give prompts=FILE")

    def test_unknown_words_and_equal_prompts_are_named(self, trained, caplog):
        prompts = [("short", prompt) for prompt in ("the cat", "The Cat", "a xyzzy dog")]
        check_grid(settings("top_k=[5]"), load(trained / "outputs/tiny"), prompts)
        assert caplog.messages == [
            "'The Cat': the network reads the same as for 'the cat', so these texts count twice.",
            "'a xyzzy dog': not in the vocabulary, so the network reads [UNK]: xyzzy",
            "3 prompts are few: the intervals of the report will be too narrow. Ten are better.",
        ]
        caplog.clear()
        check_grid(settings("top_k=[5]"), load(trained / "outputs/tiny"), [("short", f"the cat {w}") for w in "aaaaa"])
        assert not [line for line in caplog.messages if "are few" in line]

    def test_many_texts_need_confirmation(self, trained):
        model, prompts = load(trained / "outputs/tiny"), [("short", "the cat")] * 12
        wanted = ["num_seeds=300", "top_k=[5]", "num_tokens=3"]
        with pytest.raises(InputError, match=r"confirm=false: 18,000 texts .* minutes .* add confirm=true"):
            check_grid(settings(*wanted), model, prompts)
        assert len(check_grid(settings(*wanted, "confirm=true"), model, prompts)) == 5


class TestPrompts:
    def test_the_quick_exploration(self):
        config = settings("explore=quick")
        assert len(settings_grid(config)) == 6 and (config.num_seeds, config.num_real) == (2, 500)

    def test_the_default_set(self):
        prompts = read_prompts(samples_.Path(app.CONFIG_DIR) / "prompts.yaml")
        assert len(prompts) >= 12
        lengths = {kind: [len(p.split()) for k, p in prompts if k == kind] for kind, _ in prompts}
        assert {"short", "medium", "long", "ambiguous", "incomplete", "out_of_domain"} <= set(lengths)
        assert all(2 <= n <= 4 for n in lengths["short"]) and all(5 <= n <= 8 for n in lengths["medium"])
        assert min(lengths["long"]) > 8

    def test_comments_and_a_number_sign_in_quotes(self, tmp_path):
        text = "short:  # 2 words\n  # - no prompt\n  - 'movie #1 is'\n  - c# is\n  - \"the cat\"  # animals\n"
        (tmp_path / "p.yaml").write_text(text)
        assert read_prompts(tmp_path / "p.yaml") == [("short", text) for text in ("movie #1 is", "c# is", "the cat")]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "must begin with a kind, such as short:"),
            ("- the cat", "must begin with a kind, such as short:"),
            ("short:\n  - a cat\nlong:\n  -the cat", "the kind long has no list of prompts; start each prompt with -"),
            ("short:\n  - movie #1 is", "line 2: the words after # do not count; write the prompt in single quotes"),
            ("short:\n  - a cat\n  - #1 movie", "line 3: the words after # do not count; write the prompt in single"),
            ('short:\n  - "good" is not', "line 2: expected <block end>.*; write the prompt in single quotes"),
            ("short: []", "has no prompt"),
            ("short:\n  - the cat\n    - a dog", "'the cat - a dog' stands on several lines; start each - in the same"),
            ("short:\n\t- the cat", r"line 2: found character '\\t' that cannot start any token; write the prompt in"),
            (
                "short:\n  - the cat\n - a dog",
                "line 3: expected <block end>.*, or put the same number of spaces before each -",
            ),
            ("short: a cat", "the kind short has no list of prompts"),
            ("short: [[10]]", r"\['10'\] is not text; write it in quotes"),
            ("short: [a cat]\nlong: [b]\nshort: [c]", "the kind short occurs twice; put its prompts under one name"),
            ("short:\n  - the end: good or bad", "prompt that starts with 'the end:' has a colon; write it in quotes"),
            ("short:\n  - the end: no", "the prompt that starts with 'the end:' has a colon"),
            ('short:\n  - "the end\n  - a cat\n', "line 2: a quotation mark is not closed; close it"),
            ("short: [a cat]\nlong: [a cat]", "'a cat' occurs twice"),
            ("short: [a", r"line 1: expected ',' or '\]', but got '<stream end>'; write the prompt in"),
        ],
    )
    def test_bad_prompt_files(self, tmp_path, text, message):
        (tmp_path / "p.yaml").write_text(text)
        with pytest.raises(InputError, match=message):
            read_prompts(tmp_path / "p.yaml")


class TestCommand:
    def test_the_folder(self, explored):
        folder = explored / "outputs/tiny/explore"
        charts = {"behaviour", "trade_off", "context", "attention_best", "attention_loop"}
        files = {"samples.jsonl", "held_out.jsonl", "network.json", "plan.json", "report.md", "report.html"}
        assert {path.name for path in folder.iterdir()} == files | {f"{name}.png" for name in charts}
        made = records(explored)
        # 4 prompts: one greedy text, and 2 seeds for each of 4 settings.
        assert len(made) == 4 * (1 + 4 * 2)
        assert {sample["kind"] for sample in made} == {"short", "incomplete", "out_of_domain"}
        assert all(len(sample["words"]) <= 12 and sample["text"].startswith(sample["prompt"]) for sample in made)

    def test_no_loop_in_any_text(self, explored):
        one_word = ["num_tokens=1", "temperature=1", "top_k=all", "num_seeds=1", "folder=one_word", "num_real=3"]
        done = run_main("explore", "run=tiny", "prompts=prompts.yaml", *one_word, cwd=explored)
        assert done.returncode == 0, done.stderr
        assert not (explored / "one_word/attention_loop.png").exists()
        assert len(records(explored, "held_out.jsonl", "one_word")) == 3 < len(records(explored, "held_out.jsonl"))
        assert "### loop: the worst examples\n\nNo text was marked." in (explored / "one_word/report.md").read_text()

    def test_held_out_documents_too_short_to_measure(self, tmp_path):
        """Real texts start after 5 words. Here no document has so many, and the vocabulary has fewer than 20 words."""
        nouns, verbs = ("cat", "dog", "king", "ship", "moon", "door"), ("sees", "likes", "finds", "keeps")
        lines = [f"the {a} {verb} {b}" for a in nouns for verb in verbs for b in nouns]
        (tmp_path / "text.txt").write_text("\n".join(lines))
        (tmp_path / "prompts.yaml").write_text("short: [the cat, the dog]\n")
        given = [*TINY_RUN, "data.path=text.txt", "run_name=tiny", "trainer.max_epochs=1", "data.validation_share=0.2"]
        assert run_main("train", *given, cwd=tmp_path).returncode == 0
        done = run_main("explore", *SMALL, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert records(tmp_path, "held_out.jsonl") == []
        report = (tmp_path / "outputs/tiny/explore/report.md").read_text()
        assert "0 real held-out texts" in report and "| real text | – | – |" in report

    def test_samples_equal_generate_text(self, explored):
        from minigpt_pl import generate_text

        model = load(explored / "outputs/tiny")
        for sample in records(explored)[::5]:
            again = generate_text(model, sample["prompt"], 12, seed=sample["seed"], **sample["settings"])
            assert again == sample["text"]

    def test_the_effect_of_the_length(self, explored):
        from minigpt_pl.measures.repetition import distinct

        report = (explored / "outputs/tiny/explore/report.md").read_text()
        table = report[report.index("| words | repeated phrases") :].splitlines()[2:5]
        for line, length in zip(table, (3, 6, 12), strict=True):
            by_prompt = {}
            for sample in records(explored):
                by_prompt.setdefault(sample["prompt"], []).append(distinct(sample["ids"][:length], 2))
            expected = np.nanmean([np.nanmean(values) for values in by_prompt.values()])
            assert line.startswith(f"| {length} |") and f"| {expected:.2f} [" in line

    def test_each_kind_of_prompt_has_a_row(self, explored):
        report = (explored / "outputs/tiny/explore/report.md").read_text()
        table = report[report.index("| kind | prompts") :].splitlines()[2:5]
        kinds = [["| short", "2"], ["| incomplete", "1"], ["| out of domain", "1"]]
        assert [row.split(" | ")[:2] for row in table] == kinds
        losses = [s["metrics"]["ngram_loss"] for s in records(explored) if s["kind"] == "incomplete"]
        assert f"| {np.mean(losses):.2f} [" in table[1]

    def test_each_prompt_has_a_row(self, explored):
        report = (explored / "outputs/tiny/explore/report.md").read_text()
        table = report[report.index("| prompt | kind") :].splitlines()[2:5]
        rows = _prompt_rows(records(explored))
        assert table == [f"| {' | '.join(row)} |" for row in rows[:3]] and [row[3] for row in rows] == ["9"] * 4

    def test_the_row_of_a_prompt_counts_its_texts(self):
        texts = [("a", "loop"), ("a", None), ("b", None), ("b", "loop"), ("b", "drift")]
        made = [
            {
                "prompt": prompt,
                "kind": "short",
                "failures": [f] if f else [],
                "unknown_in_prompt": ["x", "y"][: prompt == "b"],
            }
            for prompt, f in texts
        ]
        assert _prompt_rows(made) == [["a", "short", "–", "2", "1"], ["b", "short", "x", "3", "2"]]

    def test_commands_are_code(self, explored):
        folder = explored / "outputs/tiny/explore"
        assert "```bash\npython -m minigpt_pl.explore compare=" in (folder / "report.md").read_text()
        assert (folder / "report.html").read_text().count("<pre>python -m minigpt_pl.") == 3

    def test_the_worst_examples_are_different_texts(self):
        span = [{"kind": "loop", "start": 0, "end": 3, "note": ""}]
        texts = [("a", [1]), ("a", [2]), ("b", [1]), ("c", [3])]
        made = [{"prompt": prompt, "ids": ids, "failures": span} for prompt, ids in texts]
        assert _worst(made, "loop") == [made[0], made[3]] and _worst(made, "drift") == []

    def test_report_has_the_figures_of_the_samples(self, explored):
        made = records(explored)
        chosen = [s for s in made if s["settings"]["temperature"] == 1.5 and s["settings"]["top_k"] == 5]
        by = {
            prompt: [s for s in chosen if s["prompt"] == prompt]
            for prompt in ("the cat", "a dog", "the king sees", HOSTILE)
        }
        report = (explored / "outputs/tiny/explore/report.md").read_text()
        behaviour, failures = (
            next(line for line in part.splitlines() if line.startswith("| temperature=1.5 top_k=5 |"))
            for part in (report[report.index("| setting | n-gram loss") :], report[report.index("| setting | loop") :])
        )
        loss = np.mean([np.mean([s["metrics"]["ngram_loss"] for s in group]) for group in by.values()])
        assert f"| {loss:.2f} [" in behaviour
        any_failure = np.mean([np.mean([bool(s["failures"]) for s in group]) for group in by.values()])
        assert failures.split(" | ")[-1].startswith(f"{any_failure:.1%} ")
        real = np.mean([r["metrics"]["loss"] for r in records(explored, "held_out.jsonl")])
        assert "| real text | " in report and f" {real:.2f} [" in report[report.index("| real text |") :][:80]

    def test_reports_print_text_as_people_write(self, explored):
        """No space inside it's and well-known, or before a comma. Marks around words do not change the text."""
        folder = explored / "outputs/tiny/explore"
        texts = {sample["text"] for sample in records(explored)}
        report = (folder / "report.md").read_text()
        shown = [line.split("**: ")[1] for line in report.splitlines() if "**: _" in line and "\\" not in line]
        without_marks = [re.sub(r"</?b>| _\([a-z, ]+\)_|_", "", line) for line in shown]
        assert set(without_marks) <= texts and any("_(" in line for line in shown)
        assert any(", and it's a well-known " in line for line in without_marks)
        copied = [line.split(" | ")[2] for line in report[report.index("| different words") :].splitlines()[2:12]]
        assert any("it's" in run for run in copied) and all(any(run in text for text in texts) for run in copied)
        page = (folder / "report.html").read_text()
        data = json.loads(re.search(r'<script id="data"[^>]*>(.*)</script>', page)[1])
        joined = ["".join([sample["prompt"], *sample["tokens"]]) for sample in data["samples"]]
        assert joined == [sample["text"] for sample in records(explored)]

    def test_metrics_of_a_sample(self, explored):
        from minigpt_pl.measures import repetition

        for sample in records(explored):
            assert sample["metrics"]["distinct_2"] == pytest.approx(repetition.distinct(sample["ids"], 2))
            assert sample["metrics"]["tokens"] == len(sample["words"])

    def test_reports_have_no_absolute_paths(self, explored, story):
        for name in ("report.md", "report.html"):
            report = (explored / "outputs/tiny/explore" / name).read_text()
            assert "story.txt" in report and str(story.parent) not in report and str(explored) not in report

    def test_the_same_command_continues_an_interrupted_one(self, explored, tmp_path):
        shutil.copytree(explored, tmp_path, dirs_exist_ok=True)
        folder = tmp_path / "outputs/tiny/explore"
        lines = (folder / "samples.jsonl").read_text().split("\n")
        marked = json.loads(lines[0]) | {"kept": True}
        half = [json.dumps(marked), *lines[1:9]]
        (folder / "samples.jsonl").write_text("\n".join(half) + "\n" + lines[9][:40])  # the last line is incomplete
        (folder / "report.md").unlink()
        spelled_otherwise = f"run={tmp_path / 'outputs/tiny'}"
        done = run_main("explore", *SMALL, spelled_otherwise, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        again = records(tmp_path)
        assert again[0].pop("kept") and again == records(explored)
        assert (folder / "report.md").read_text() == (explored / "outputs/tiny/explore/report.md").read_text()

    def test_a_finished_exploration_is_not_changed(self, explored, caplog):
        caplog.set_level("INFO")
        report = explored / "outputs/tiny/explore/report.md"
        before, written = report.read_text(), report.stat().st_mtime_ns
        report.write_text(before.replace("_(write here)_", "my answer"))
        done = run_main("explore", *SMALL, cwd=explored)
        assert done.returncode == 0 and "Explored before, so nothing is changed" in caplog.text
        assert "my answer" in report.read_text()
        report.write_text(before)
        os.utime(report, ns=(written, written))

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            (["num_seeds=3"], "has an exploration with other num_seeds; give folder=ANOTHER"),
            (["run=none"], "run=none: no such run folder or checkpoint"),
            (["run=outputs/tiny/checkpoints/last.ckpt"], "has an exploration of another checkpoint than outputs/tiny/"),
            (["prompts=none.yaml"], "prompts=none.yaml: no such file; write /"),
            (["prompts=emty.yml"], "prompts=emty.yml: no such file; did you mean empty.yaml? write /"),
            (["prompts=empty.yaml"], "prompts=empty.yaml: has no prompt"),
            (["top_k=[5,9999]", "folder=new"], "top_k=9999: the model has only"),
            (["banned_words=[the]", "num_tokens=0"], "num_tokens=0: must be at least 1"),
        ],
    )
    def test_bad_input_gives_one_line_and_changes_no_file(self, explored, overrides, message):
        (explored / "empty.yaml").write_text("short: []\n")
        before = {path: path.stat().st_mtime_ns for path in explored.rglob("*") if path.is_file()}
        done = run_main("explore", *SMALL, *overrides, cwd=explored)
        assert done.returncode == 2
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and message in errors[0], done.stderr
        assert "Traceback" not in done.stderr
        after = {path: path.stat().st_mtime_ns for path in explored.rglob("*") if path.is_file()}
        assert before.items() <= {path: after.get(path) for path in before}.items()

    def test_a_run_without_a_tokenizer(self, explored, tmp_path):
        shutil.copytree(explored, tmp_path, dirs_exist_ok=True)
        (tmp_path / "outputs/tiny/tokenizer.json").unlink()
        done = run_main("explore", *SMALL, cwd=tmp_path)
        assert done.returncode == 2 and "tokenizer.json: no such file" in done.stderr.splitlines()[-1]
        assert records(tmp_path) == records(explored)

    def test_a_setting_without_texts_is_left_out(self, explored, caplog):
        # The vocabulary has fewer than 300 words, so no_repeat_ngram_size=1 leaves no word to draw.
        settings = ["num_tokens=300", "num_seeds=1", "temperature=1.0", "min_tokens=300", "top_k=[null]"]
        settings += ["no_repeat_ngram_size=[0,1]", "folder=broken"]
        done = run_main("explore", "run=tiny", "prompts=prompts.yaml", *settings, cwd=explored)
        assert done.returncode == 0, done.stderr
        assert "Left out: no_repeat_ngram_size=1: no token is left" in caplog.text
        assert {s["settings"]["no_repeat_ngram_size"] for s in records(explored, folder="broken")} == {0}
        assert "Left out: " in (explored / "broken/report.md").read_text()

    def test_a_missing_package_names_the_extra(self, explored, tmp_path):
        (tmp_path / "sitecustomize.py").write_text(
            "import importlib.util as u\nfind = u.find_spec\n"
            "u.find_spec = lambda name, *a: None if name == 'sacrebleu' else find(name, *a)\n"
        )
        path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
        done = run_module("explore", *SMALL, cwd=explored, env={"PYTHONPATH": path})
        assert done.returncode == 2
        assert "sacrebleu is not installed; pip install 'minigpt_pl[explore]'" in done.stderr


class TestSummary:
    def test_bootstrap_equals_scipy(self):
        values = np.random.default_rng(1).gamma(2.0, size=(40, 1))
        mean, low, high = bootstrap(values)
        theirs = stats.bootstrap((values[:, 0],), np.mean, method="percentile", rng=0).confidence_interval
        assert mean == pytest.approx(values.mean())
        assert (low, high) == pytest.approx(tuple(theirs), rel=0.03)

    def test_bootstrap_resamples_the_texts_of_a_prompt(self):
        values = np.random.default_rng(1).gamma(2.0, size=(1, 40))  # one prompt: only its texts vary
        _, low, high = bootstrap(values)
        theirs = stats.bootstrap((values[0],), np.mean, method="percentile", rng=0).confidence_interval
        assert (low, high) == pytest.approx(tuple(theirs), rel=0.03)

    def test_a_draw_without_values_does_not_count(self):
        # One draw in four of a prompt has only nan, and so has one draw in sixteen of both prompts.
        assert bootstrap(np.array([[5.0, np.nan], [np.nan, 5.0]])) == (5, 5, 5)
        values = np.full((6, 2), 5.0)
        values[:, 1] = np.nan
        assert bootstrap(values) == (5, 5, 5)

    def test_more_texts_of_a_prompt_do_not_narrow_the_interval(self):
        prompts = np.random.default_rng(1).normal(size=(6, 1))
        alone, copies = bootstrap(prompts), bootstrap(np.repeat(prompts, 50, axis=1))
        assert copies.high - copies.low == pytest.approx(alone.high - alone.low, rel=0.1)

    def test_bootstrap_leaves_out_nan(self):
        values = np.array([[1.0, np.nan], [3.0, 5.0], [np.nan, np.nan]])
        assert bootstrap(values).mean == pytest.approx((1 + 4) / 2)
        assert math.isnan(bootstrap(np.full((2, 2), np.nan)).mean)

    @staticmethod
    def sample(prompt, seed, temperature, loss, kinds=(), top_k=5):
        chosen = {"temperature": temperature, "top_k": top_k}
        marks = [{"kind": kind, "start": 0, "end": 1, "note": ""} for kind in kinds]
        names = {**dict.fromkeys(METRICS, 0.0), "ngram_loss": loss}
        return {"prompt": prompt, "seed": seed, "settings": chosen, "metrics": names, "failures": marks}

    def test_by_prompt(self):
        some = [self.sample("a", 0, 1, 1.0), self.sample("b", 0, 1, 3.0, ["loop"]), self.sample("a", 1, 1, 2.0)]
        assert by_prompt(some, "ngram_loss")[0].tolist() == [1.0, 2.0]
        assert by_prompt(some, "failure: loop")[1, 0] == 1 and by_prompt(some, "failure: drift")[1, 0] == 0

    def test_effect_is_the_difference_prompt_by_prompt(self):
        rng = np.random.default_rng(0)
        some = [
            self.sample(prompt, seed, t, 10 * i + t + 0.01 * rng.normal())
            for i, prompt in enumerate("abcd")
            for seed in range(3)
            for t in (0.5, 1.0, 2.0)
        ]
        some += [self.sample(prompt, 0, 0.0, 99.0, top_k=1) for prompt in "abcd"]  # greedy: left out
        low, high, difference = effect(some, "temperature", "ngram_loss")
        assert (low, high) == (0.5, 2.0) and difference.mean == pytest.approx(1.5, abs=0.02)
        assert difference.high - difference.low < 0.1  # the differences between the prompts, 10, do not count

    def test_the_values_of_other_controls_are_not_resampled(self):
        """The temperature changes the loss by 1 for each top_k, and top_k changes it by 10."""
        some = [
            self.sample(prompt, seed, t, t + (top_k or 15), top_k=top_k)
            for prompt in "abcd"
            for seed in range(2)
            for t in (1.0, 2.0)
            for top_k in (5, None)
        ]
        assert effect(some, "temperature", "ngram_loss")[2] == (1, 1, 1)

    def test_the_effect_at_each_value_of_the_other_control(self, explored):
        report = (explored / "outputs/tiny/explore/report.md").read_text()
        header = report[report.index("| measure | all texts") :].splitlines()
        assert header[0] == "| measure | all texts | top_k=5 | top_k=all |", "top_k=1 is greedy"
        row = next(line for line in header if line.startswith("| n-gram loss"))
        found = [float(cell.split(" [")[0]) for cell in row.strip("| ").split(" | ")[1:]]
        for cell, top_k in zip(found[1:], (5, None), strict=True):
            made = [s for s in records(explored) if s["settings"]["top_k"] == top_k]
            low, high = (
                np.mean([s["metrics"]["ngram_loss"] for s in made if s["settings"]["temperature"] == t])
                for t in (0.5, 1.5)
            )
            assert cell == pytest.approx(high - low, abs=0.006)
        assert abs(found[1] - found[2]) > 0.05 and found[0] == pytest.approx(sum(found[1:]) / 2, abs=0.006)

    def test_no_effect_on_a_metric_without_values(self):
        some = [self.sample("a", 0, t, None) for t in (0.5, 2.0)]
        with warnings.catch_warnings(action="error"):
            assert all(map(math.isnan, effect(some, "temperature", "ngram_loss")[2]))

    def test_the_rule(self):
        losses, failing = {0.5: 2.0, 1.0: 3.0, 1.5: 2.5}, {0.5: ["loop"], 1.0: [], 1.5: []}
        grid = [{"temperature": t, "top_k": 5} for t in losses]
        some = [self.sample(p, s, t, losses[t], failing[t]) for p in "abc" for s in range(4) for t in losses]
        for real, order in ((3.1, [1, 2, 0]), (2.4, [2, 1, 0]), (math.nan, [1, 2, 0])):
            real_text = {"ngram_loss": Estimate(*[real] * 3)}
            assert ranked_settings(summarize(some, grid), real_text) == order  # the setting with loops is the last one

    def test_a_share_of_no_or_all_texts_has_no_interval(self):
        assert estimate_text(bootstrap(np.zeros((3, 2))), percent=True) == "0.0%"
        assert "[" in estimate_text(bootstrap(np.array([[0.0, 1.0], [0.0, 0.0]])), percent=True)

    def test_no_limit_is_the_highest_value(self):
        some = [self.sample("a", 0, 1, loss, top_k=k) for k, loss in ((None, 3.0), (5, 1.0))]
        assert effect(some, "top_k", "ngram_loss") == (5, None, (2, 2, 2))


class TestMarkdown:
    """Marks in a text must not become formatting."""

    def test_marks_are_escaped(self):
        assert escape_markdown("*a* `b` <c> d|e # _f_ $g$ \\ &lt;") == (
            r"\*a\* \`b\` \<c\> d\|e \# \_f\_ \$g\$ \\ \&lt;"
        )
        assert escape_markdown("[a](b) [c][d] [e]: f") == r"[a\](b) [c\][d] [e\]: f"
        assert escape_markdown("two\nlines") == "two lines"

    def test_harmless_marks_stay(self):
        assert escape_markdown("ngram_loss 1.50 [1.20, 1.80] [UNK]") == "ngram_loss 1.50 [1.20, 1.80] [UNK]"

    def test_all_blocks_escape(self):
        texts = [Text(f"{mark}*t*") for mark in ("## ", "Question: ", "")]
        for block in [*texts, Table(["*t*"], [["*c*"]]), MarkedSample("*t*", "*p*", [" *w*"], [])]:
            assert not re.search(r"(?<![*\\])\*\w\*", block.markdown()), block

    def test_marked_words(self):
        failures = [{"kind": "loop", "start": 1, "end": 3}, {"kind": "bracket", "start": 2, "end": 3}]
        marked = MarkedSample("t", "a film", [",", " it", "'s", ")"], failures)
        assert marked.markdown() == "**t**: _a film_, <b>it</b> _(loop)_<b>'s</b> _(bracket, loop)_)"


class TestPage:
    @pytest.fixture
    def open_page(self, browser, explored):
        """A function that opens the report. At the end, no script has failed, and nothing but the file was read."""
        messages, requests, pages = [], [], []

        def open_page(width=1280, **options):
            page = browser.new_context(viewport={"width": width, "height": 900}, **options).new_page()
            page.set_default_timeout(600_000)
            page.on("console", lambda message: messages.append(message.text))
            page.on("pageerror", lambda error: messages.append(str(error)))
            page.on("request", lambda request: requests.append(request.url))
            page.goto(f"file://{explored}/outputs/tiny/explore/report.html")
            pages.append(page)
            return page

        yield open_page
        for page in pages:
            page.context.close()
        assert messages == []
        assert [url for url in requests if not url.startswith(("file:", "data:", "blob:"))] == []

    @pytest.fixture
    def page(self, open_page):
        return open_page()

    def test_tables_sort_by_number(self, page):
        table = page.locator("table:has(button:text-is('own loss'))").first
        header = table.locator("th", has_text="n-gram loss")
        header.locator("button").focus()
        for order, name in ((1, "ascending"), (-1, "descending")):
            page.keyboard.press("Enter")
            numbers = [float(text.split()[0]) for text in table.locator("tbody tr td:nth-child(2)").all_inner_texts()]
            assert numbers == sorted(numbers, reverse=order < 0) and len(set(numbers)) > 2
            assert header.get_attribute("aria-sort") == name

    @pytest.mark.parametrize("colour_scheme", ["light", "dark"])
    def test_a_phone(self, open_page, colour_scheme):
        """Nothing is wider than the screen. A table has one cell per line, with the name of its column."""
        page = open_page(390, color_scheme=colour_scheme)
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        assert page.locator("svg").evaluate_all("all => all.every(svg => svg.getBoundingClientRect().width <= 360)")
        assert page.locator("svg text").first.evaluate("text => getComputedStyle(text).fill") == (
            page.evaluate("getComputedStyle(document.body).color")
        )
        frames = page.locator(".scroll")
        assert frames.evaluate_all("all => all.every(frame => frame.scrollWidth === frame.clientWidth)")
        cells = "all => all.map(cell => [getComputedStyle(cell, '::before').content, cell.dataset.number])"
        for table in ("table:has(button:text-is('self-BLEU'))", "#samples"):
            row = page.locator(f"{table} >> tbody tr").first.locator("td")
            names = page.locator(f"{table} >> th").all_text_contents()[: row.count()]
            found = row.evaluate_all(cells)
            assert [name for name, _ in found] == [f'"{name}: "' for name in names]
            assert dict(zip(names, (number for _, number in found), strict=True))["different pairs"] is not None
            left = row.evaluate_all("all => all.map(cell => cell.getBoundingClientRect().left)")
            assert max(left) - min(left) < 1
        page.get_by_label("Filter by prompt").fill("no such words")
        assert page.locator("#samples tbody tr:visible").count() == 0

    def test_dark_mode(self, open_page):
        colours = [
            open_page(color_scheme=scheme).evaluate("getComputedStyle(document.body).backgroundColor")
            for scheme in ("light", "dark")
        ]
        assert colours == ["rgb(255, 255, 255)", "rgb(21, 24, 29)"]

    @pytest.mark.parametrize("width", [390, 1280])
    def test_the_contents_stay_in_view(self, open_page, width):
        page = open_page(width)
        if width < 1000:
            page.locator("nav summary").click()
        page.locator("nav a", has_text="Q4 B").click()
        page.wait_for_function("document.querySelector('nav [aria-current]')?.textContent.startsWith('Q4 B')")
        assert page.locator("nav").bounding_box()["y"] == 0
        assert page.locator("nav li").last.is_visible() == (width > 1000)

    @pytest.mark.parametrize("colour_scheme", ["light", "dark"])
    def test_accessibility(self, open_page, colour_scheme):
        """axe-core finds no problem: contrast, names, roles, headings, keyboard."""
        axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install 'minigpt_pl[test]'")
        found = axe.Axe().run(open_page(color_scheme=colour_scheme)).response["violations"]
        assert [(problem["id"], problem["nodes"][0]["html"][:200]) for problem in found] == []

    def test_answers_stay(self, page):
        answer, name = page.locator(".answer").nth(1), page.get_by_label("Name")
        answer.click()
        page.keyboard.type("Short prompts <b>drift</b>.")
        name.fill('Ada "A" L.')
        page.reload()
        assert (answer.inner_text(), name.input_value()) == ("Short prompts <b>drift</b>.", 'Ada "A" L.')

    def test_a_saved_page_has_the_answers(self, page, open_page, tmp_path):
        page.locator(".answer").first.fill("two\nlines")
        page.get_by_label("Name").fill('Ada "A" L.')
        with page.expect_download() as download:
            page.locator("#save").click()
        download.value.save_as(tmp_path / "homework-report.html")
        saved = open_page()
        saved.goto(f"file://{tmp_path}/homework-report.html")
        assert saved.locator(".answer").first.inner_text() == "two\nlines"
        assert saved.get_by_label("Name").input_value() == 'Ada "A" L.'
        assert saved.locator("#samples tbody tr").count() == page.locator("#samples tbody tr").count()
        with saved.expect_download() as again:
            saved.locator("#save").click()
        assert again.value.suggested_filename == download.value.suggested_filename == "homework-report.html"

    def test_print(self, page):
        """On A4 paper, no table is wider than the page, and what needs a mouse is left out."""
        page.emulate_media(media="print")
        page.set_viewport_size({"width": 672, "height": 1000})  # 178 mm at 96 dots per inch
        assert page.evaluate("document.documentElement.scrollWidth") == 672
        wide = "all => all.filter(table => table.offsetWidth && table.scrollWidth > 672).length"
        assert page.locator("table").evaluate_all(wide) == 0
        assert not any(page.locator(part).first.is_visible() for part in ("nav", "#save", "#samples", "#side"))
        assert page.get_by_label("Course").is_visible() and page.locator(".answer").first.is_visible()

    def test_samples_filter(self, page, explored):
        made = records(explored)
        rows = page.locator("#samples tbody tr")
        assert rows.count() == len(made)
        page.fill("#words", "greedy king")
        shown = [row for row in rows.all() if row.is_visible()]
        assert len(shown) == 1 and page.inner_text("#count") == f"1 of {len(made)} texts"

    def test_samples_side_by_side(self, page, explored):
        page.select_option("#prompt", "a dog")
        page.locator("#side select").nth(1).select_option("temperature=1.5 top_k=5")
        samples = [s for s in records(explored) if s["prompt"] == "a dog" and s["seed"] == 0]
        (sample,) = [s for s in samples if (s["settings"]["temperature"], s["settings"]["top_k"]) == (1.5, 5)]
        text = page.locator("#side div p").nth(1).inner_text()
        assert text == sample["text"]
        measures = page.locator("#side dl").nth(1).inner_text()
        assert f"n-gram loss\n{sample['metrics']['ngram_loss']:.4g}"[:16] in measures and "null" not in measures

    def test_failures_are_marked_on_the_words(self, page, explored):
        marked = [(s, span) for s in records(explored) for span in s["failures"]]
        assert marked
        assert page.locator("#samples mark").count() >= len({id(s) for s, _ in marked})

    def test_texts_are_not_interpreted_as_html(self, page):
        assert page.locator("img").count() == 0  # the fixture also checks that no request was made
        assert page.locator("#prompt option").all_inner_texts()[-1] == HOSTILE
