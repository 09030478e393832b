"""`sample` as a person uses it: what appears, and when; the session; comparisons; bad input."""

import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from dataclasses import replace

import pytest
from conftest import run_module
from test_command_line import assert_refused

import minigpt_pl
from minigpt_pl import InputError
from minigpt_pl import sample as entry_point
from minigpt_pl.cli import app, display
from minigpt_pl.measures.repetition import distinct


@pytest.fixture
def sample(trained, monkeypatch, capsys):
    """Calls `sample` with these settings and this standard input in this process: (output, errors)."""
    monkeypatch.chdir(trained)

    def call(*overrides: str, typed: str = "") -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed.encode(errors="surrogateescape"))))
        composed = app.compose("sample", ["top_k=5", *overrides])
        entry_point.sample(app.to_settings(composed))
        return capsys.readouterr()

    return call


@pytest.fixture
def model(trained):
    return minigpt_pl.load(trained / "outputs" / "tiny")


COMMAND = [sys.executable, "-m", "minigpt_pl.sample", "top_k=5"]
ENDLESS = ["num_tokens=500000", "min_tokens=500000"]


class TestOneText:
    def test_words_appear_as_they_are_made_until_ctrl_c(self, trained):
        process = subprocess.Popen(
            [*COMMAND, "prompt=the cat", *ENDLESS], cwd=trained, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        beginning = os.read(process.stdout.fileno(), 7)
        while len(beginning) < 100:
            beginning += os.read(process.stdout.fileno(), 100)
        assert process.poll() is None and beginning.startswith(b"the cat ")
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=600)
        assert process.returncode == 130 and rest.endswith(b"\n") and b"Traceback" not in errors

    def test_no_word_waits_for_the_next(self, model, monkeypatch):
        raw, arrived = io.BytesIO(), []
        words = display.stream_words

        def look(*arguments, **controls):
            for word in words(*arguments, **controls):
                arrived.append(raw.getvalue().decode())
                yield word

        monkeypatch.setattr(display, "stream_words", look)
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw))
        display.print_words(model, "the cat", False, num_tokens=5, min_tokens=5, top_k=5, seed=3)
        new = minigpt_pl.generate(model, "the cat", 5, top_k=5, seed=3, min_tokens=5)[0].tokens
        assert arrived == ["the cat" + "".join(new[:count]) for count in range(5)]

    def test_a_reader_that_leaves(self, trained):
        command = " ".join([*COMMAND, "'prompt=the cat'", *ENDLESS, "| head -c 30"])
        done = subprocess.run(command, shell=True, cwd=trained, capture_output=True, text=True, timeout=6000)
        assert len(done.stdout) == 30 and "Error" not in done.stderr and "Exception" not in done.stderr

    def test_streamed_or_not_the_same_text(self, sample):
        alone = sample("prompt=the cat", "seed=3").out
        several = sample("prompt=[the cat, the dog]", "seed=3").out
        assert several.split("\n\n")[0] + "\n" == alone


def test_how_far_many_texts_are(sample):
    errors = sample("prompt=[the cat, the dog]", "num_samples=300", "num_tokens=1").err
    told = [line.split(",")[0] for line in errors.splitlines() if "left" in line]
    assert told == ["256 of 600 texts", "512 of 600 texts"]


def test_a_terminal_gets_lines_that_break_between_words(model, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("COLUMNS", "40")
    record = minigpt_pl.generate(model, "the cat\nand the dog", 60, top_k=5, seed=3, min_tokens=60)[0]
    text = display.as_text(record, False)
    assert all(len(line) <= 40 for line in text.split("\n")) and len(text.split("\n")) > 4
    assert text.replace("\n", " ") == record.text.replace("\n", " ")
    display.print_words(model, record.prompt, False, seed=3, **record.settings)
    assert capsys.readouterr().out == text + "\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    assert display.as_text(record, False) == record.text


class TestFormats:
    def test_jsonl(self, sample, model):
        lines = sample("prompt=[the cat, zebra the]", "num_samples=2", "seed=3", "format=jsonl", "stop_words=[a]").out
        records = [json.loads(line) for line in lines.splitlines()]
        expected = minigpt_pl.generate(
            model, ["the cat", "zebra the"], top_k=5, seed=3, num_samples=2, stop_words=["a"]
        )
        assert [minigpt_pl.Record(**record) for record in records] == [
            # JSON has names for places, and paths as they were given
            minigpt_pl.Record(**vars(record) | {"checkpoint": "outputs/tiny/checkpoints/best.ckpt"})
            for record in expected
        ]
        assert records[2]["unknown_words"] == ["zebra"] and set(records[0]["settings"]) > {"top_p", "stop_words"}

    def test_markdown(self, sample):
        text = sample("prompt=[the *cat*, the dog]", "seed=3", "format=markdown", "num_tokens=4").out
        plain = sample("prompt=[the *cat*, the dog]", "seed=3", "num_tokens=4").out
        assert [line for line in text.splitlines() if line.startswith("#")] == ["## the \\*cat\\*", "## the dog"]
        quoted = [line[2:].replace("\\", "") for line in text.splitlines() if line.startswith(">")]
        assert quoted == plain.strip().split("\n\n")
        lines = display.as_markdown(minigpt_pl.Record("a", "a b\n\n  c *d\n", [], [], [], [], [], {}, 1, None))
        assert "\n\n> a b\n>\n> c \\*d\n\n" in lines, "the line breaks of the text are lost"
        assert "Not in the vocabulary: \\*cat" in text and "temperature=0.8" in text and "best.ckpt" in text

    @pytest.mark.parametrize("samples", [1, 2])
    def test_probabilities_without_colours(self, sample, model, samples):
        text = sample("prompt=the cat", "seed=3", "show=probabilities", "num_tokens=6", f"num_samples={samples}").out
        record = minigpt_pl.generate(model, "the cat", 6, top_k=5, seed=3)[0]
        words = [f"{word}({p:.2g})" for word, p in zip(record.tokens, record.probabilities, strict=True)]
        assert text.split("\n")[0] == "the cat" + "".join(words)

    def test_colours_of_probabilities(self, monkeypatch):
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.delenv("NO_COLOR", raising=False)
        words = [
            display.with_probability(" cat", probability) for probability in (1.0, 0.5, 0.49, 0.1, 0.05, 0.001, 0.0)
        ]
        codes = [re.fullmatch(r"\x1b\[(\d+)m cat\x1b\[0m", word)[1] for word in words]
        assert codes == ["32", "32", "36", "36", "33", "31", "31"]
        for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
            with monkeypatch.context() as changed:
                changed.setenv(name, value)
                assert display.with_probability(" cat", 0.125) == " cat(0.12)"

    def test_control_characters_of_a_prompt_do_not_reach_a_terminal(self, sample, monkeypatch):
        prompt = "the \x1b[2J\tcat\u00a0and \x9b1m"
        options = [*entry_point.quote_prompts([f"prompt={prompt}"]), "num_tokens=3", "seed=1"]
        for more in ([], ["num_samples=2"]):
            assert sample(*options, *more).out.startswith(prompt)
            with monkeypatch.context() as changed:
                for stream in (sys.stdout, sys.stderr):
                    changed.setattr(stream, "isatty", lambda: True, raising=False)
                shown = sample(*options, *more)
            assert shown.out.startswith("the \ufffd[2J\tcat\u00a0and \ufffd1m") and "\x1b" not in shown.out
            assert "not in the vocabulary: \ufffd [2J" in shown.err and "\x1b" not in shown.err

    def test_control_characters_of_new_words_do_not_reach_a_terminal(self, model, monkeypatch):
        record = replace(minigpt_pl.generate(model, "the cat", 1, top_k=5)[0], tokens=[" \x1b[2J"], probabilities=[0.9])
        assert display.as_text(record, False) == "the cat \x1b[2J"
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
        assert display.as_text(record, False) == "the cat \ufffd[2J"
        assert "\ufffd[2J" in display.as_text(record, True) and "\x1b[2J" not in display.as_text(record, True)

    def test_words_on_the_command_line(self, sample):
        options = ["prompt=the cat", "num_tokens=40", "seed=1", "min_tokens=4"]
        forced = sample(*options, "forced_words={0: dog, 3: well-known}").out
        words = minigpt_pl.tokenizer.split_words(forced)
        assert words[2] == "dog" and words[5:7] == ["well", "-known"]
        assert sample(*options, "forced_words={6: dog}", "stop_words=[dog]").out.endswith(" dog\n")

    def test_beams(self, sample, model):
        expected = minigpt_pl.generate_text(model, "the cat", 9, 0, 5, num_beams=4, length_penalty=-1.0)
        options = ["prompt=the cat", "num_tokens=9", "temperature=0", "num_beams=4", "length_penalty=-1"]
        assert sample(*options).out == expected + "\n"


class TestCompare:
    GRID = "compare={temperature: [0, 3.0], top_k: [2, 20]}"

    def test_every_combination_with_its_measures(self, sample, model):
        options = ["prompt=[the cat, the dog]", "seed=3", "num_tokens=15", "min_tokens=15", self.GRID]
        records = [json.loads(line) for line in sample(*options, "format=jsonl").out.splitlines()]
        cells = [(record["settings"]["temperature"], record["settings"]["top_k"]) for record in records]
        assert cells == [(t, k) for t in (0, 3) for k in (2, 20) for _ in range(2)]
        assert {record["seed"] for record in records} == {3}
        for record in records:
            text = minigpt_pl.generate_text(model, record["prompt"], seed=3, **record["settings"])
            assert text == record["text"]
            assert record["measures"]["distinct-2"] == distinct(record["tokens"], 2)
            assert record["measures"]["entropy"] == pytest.approx(sum(record["entropies"]) / 15)
        assert records[0]["text"] == records[2]["text"] != records[-2]["text"]
        assert records[0]["measures"]["entropy"] == 0 < records[-2]["measures"]["entropy"]
        printed = sample(*options).out
        rows = [re.split(r" *\| *", line.strip("| ")) for line in printed.splitlines() if line.startswith("|")]
        head = "temperature top_k entropy distinct-1 distinct-2 distinct-3 repeated-4"
        assert rows[0] == head.split() and len(rows) == 6 and len({len(row) for row in rows}) == 1
        entropy = (records[-2]["measures"]["entropy"] + records[-1]["measures"]["entropy"]) / 2
        assert rows[5][:3] == ["3.0", "20", f"{entropy:.3f}"]
        assert printed.startswith(f"[temperature=0.0 top_k=2]\n{records[0]['text']}\n\n[temperature=0.0 top_k=2]\n")
        assert rows == [
            re.split(r" *\| *", line.strip("| "))
            for line in sample(*options, "format=markdown").out.splitlines()
            if line.startswith("|")
        ]

    def test_without_a_seed_all_have_one(self, sample):
        lines = sample("prompt=the cat", "format=jsonl", "compare={top_p: [0.5, 0.9, 1.0]}").out.splitlines()
        assert len({json.loads(line)["seed"] for line in lines}) == 1

    def test_texts_too_short_for_a_measure(self, sample):
        text = sample("prompt=the cat", "num_tokens=1", "compare={top_k: [3]}").out
        assert re.search(r"\|\s+- \|\s+- \|\s+- \|$", text.strip())
        line = sample("prompt=the cat", "num_tokens=1", "compare={top_k: [3]}", "format=jsonl").out
        assert json.loads(line)["measures"]["distinct-2"] is None

    @pytest.mark.parametrize(
        ("compare", "message"),
        [
            ("compare=[1]", "compare=[1]: must be lists of values by setting"),
            ("compare={}", "compare={}: must be lists"),
            ("compare={length_penalty: [1.0, 2.0]}", "length_penalty=2.0: has no effect without beam search"),
            ("compare={temperature: 1}", "must be lists of values by setting"),
            ("compare={temperature: []}", "must be lists of values by setting"),
            ("compare={seed: [1, 2]}", "cannot compare seed; choose from num_tokens"),
            ("compare={temperature: [1, warm]}", "temperature=warm: "),
            ("compare={temperature: [1, -1]}", "temperature=-1.0: must be at least 0"),
            ("compare={top_k: [1, 100]}", "top_k=100: must be 1 to 26"),
            ("compare={stop_words: [[zebra]]}", "stop_words=['zebra']: not in the model's vocabulary"),
        ],
    )
    def test_bad_input(self, sample, capsys, compare, message):
        with pytest.raises(InputError) as caught:
            sample("prompt=the cat", compare)
        assert message in str(caught.value) and len(caught.value.problems) == 1
        assert capsys.readouterr().out == "", "nothing is written before all is seen to be good"


class TestInteractive:
    def test_prompts_and_commands_from_a_pipe(self, sample, model):
        typed = """
            the cat
            /temperature 3
            /top_k null
            /num_tokens 9
            the cat
            /temperature
            /banned_words the a
            /stop_words dog king
            /forced_words {0: ship, 2: well-known}
            the cat
            /num_samples 2
            /show probabilities
            the cat
            /settings
            /help
            /quit now
            the dog
        """
        out, errors = sample("interactive=true", "seed=3", typed=typed)
        words = {"banned_words": ["the", "a"], "stop_words": ["dog", "king"]}
        words["forced_words"] = {0: "ship", 2: "well-known"}
        records = minigpt_pl.generate(model, "the cat", 9, top_k=None, seed=3, num_samples=2, **words)
        expected = [
            minigpt_pl.generate_text(model, "the cat", 60, 0.8, 5, 3),
            minigpt_pl.generate_text(model, "the cat", 9, 3.0, None, 3),
            records[0].text,
            "\n\n".join(display.as_text(record, True) for record in records),
        ]
        beginning = "\n".join(expected) + "\n"
        assert out.startswith(beginning) and "the dog" not in out[len(beginning) :]
        assert "  top_k=null\n" in out
        rest = out[len(beginning) :]
        assert "  temperature=0.8\n" in rest and "  stop_words=['dog', 'king']\n" in rest
        assert "  temperature: randomness" in rest and errors.count("error") == 0

    def test_bad_lines_cost_one_line_and_change_nothing(self, sample, model):
        bad = {
            "/temprature 1": "/temprature: no such command; /help lists them",
            "/": "/: no such command",
            "/temperature warm": "temperature=warm: ",
            "/temperature -1": "temperature=-1.0: must be at least 0",
            "/temperature nan": "temperature=nan: must be a finite number",
            "/temperature 1 2": "temperature=1 2: ",
            "/temperature null": "temperature=None: ",
            "/top_k 0": "top_k=0: must be at least 1",
            "/top_k 27": "top_k=27: must be 1 to 26",
            "/min_tokens 61": "min_tokens=61: must be at most num_tokens=60",
            "/num_beams 2": "num_beams=2: beam search does not draw at random",
            "/show colours": "show=colours: must be probabilities",
            "/seed -1": "seed=-1: must be at least 0",
            "/stop_words zebra": "stop_words=['zebra']: not in the model's vocabulary",
            "/forced_words 0": "/forced_words 0: alternate positions and words, as in /forced_words 0 good 5 bad",
            "/forced_words x cat": "/forced_words x cat: alternate positions and words",
            "/forced_words {x: cat}": "forced_words={'x': 'cat'}: must be words by position",
            "/stop_words [dog": "/stop_words [dog: cannot be read; close the bracket, or quote the words",
            "/forced_words 99 cat": "forced_words={99: 'cat'}: position 99 must be below num_tokens=60",
            "/run other": "/run: no such command",
            "zebra": "prompt='zebra': the model knows none of its words",
            "the \udcff": "prompt='the \\udcff': is not Unicode text",
        }
        out, errors = sample("interactive=true", "seed=3", typed="\n".join([*bad, "the cat"]))
        lines = [line.removeprefix("error: ") for line in errors.splitlines() if line.startswith("error: ")]
        assert len(lines) == len(bad)
        for line, message in zip(lines, bad.values(), strict=True):
            assert line.startswith(message)
        assert out == minigpt_pl.generate_text(model, "the cat", 60, 0.8, 5, 3) + "\n"

    def test_in_a_terminal(self, trained):
        terminal = Terminal([*COMMAND, "interactive=true", "seed=3", "show=probabilities"], trained)
        terminal.wait_for("> ")
        terminal.type("/num_tok\t 4\nthe cat\n")  # Tab completes
        first = terminal.wait_for("the cat\x1b", "\n> ")
        assert re.search(r"the cat(\x1b\[3\dm[^\x1b]+\x1b\[0m){4}\r\n", first)
        terminal.type("\x1b[A\n")  # the line before, from the history
        assert re.search(r"the cat(\x1b\[3\dm[^\x1b]+\x1b\[0m){4}\r\n", terminal.wait_for("the cat\x1b", "\n> "))
        terminal.type("the ki\t\n")
        terminal.wait_for("the king\x1b", "\n> ")
        terminal.type("/num_tokens 500000\n/min_tokens 500000\nthe cat\n")
        terminal.wait_for("the cat\x1b")
        terminal.type("\x03")  # Ctrl-C stops the text ...
        terminal.wait_for("\n> ")
        terminal.type("the do")
        terminal.wait_for("the do")
        terminal.type("\x03")  # ... or the line
        terminal.wait_for("\n> ")
        terminal.type("/settings\n")  # and not the session
        terminal.wait_for("num_tokens=500000", "\n> ")
        terminal.type("\x04")
        assert terminal.process.wait(timeout=600) == 0
        assert "Traceback" not in terminal.seen

    def test_no_colour(self, trained):
        options = ["interactive=true", "seed=3", "show=probabilities", "num_tokens=3"]
        terminal = Terminal([*COMMAND, *options], trained, NO_COLOR="1")
        terminal.wait_for("> ")
        terminal.type("the cat\n")
        assert re.search(r"the cat( ?[^\s()]+\(\d[.\de-]*\)){3}\r\n", terminal.wait_for(")\r\n", "> "))
        terminal.type("/quit\n")
        assert terminal.process.wait(timeout=600) == 0


class Terminal:
    """A process whose terminal this is."""

    def __init__(self, command: list[str], cwd, **environment: str):
        self.ours, theirs = pty.openpty()
        self.seen = ""
        environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | environment
        self.process = subprocess.Popen(
            command, cwd=cwd, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0), env=environment | {"TERM": "xterm"},
        )  # fmt: skip
        os.close(theirs)

    def type(self, text: str) -> None:
        os.write(self.ours, text.encode())

    def wait_for(self, *marks: str) -> str:
        """What appears until the marks have stood there in this order."""
        new, deadline = "", time.monotonic() + 600
        while not re.search(".*".join(map(re.escape, marks)), new, re.DOTALL):
            assert time.monotonic() < deadline and self.process.poll() is None, (marks, self.seen)
            if select.select([self.ours], [], [], 1)[0]:
                new, self.seen = (
                    text + read for read in [os.read(self.ours, 1000).decode()] for text in (new, self.seen)
                )
            else:  # CPython's input() overlooks a Ctrl-C just before it waits for a key, until the next signal
                self.process.send_signal(signal.SIGWINCH)  # the window has changed: no effect on a program
        return new


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "messages"),
        [
            (["format=html"], ["format=html: must be one of text, jsonl, markdown"]),
            (["show=colours"], ["show=colours: must be probabilities"]),
            (["format=jsonl", "show=probabilities"], ["show=probabilities: needs format=text"]),
            (["forced_words=[cat]"], ["forced_words=['cat']: must be words by position"]),
            (["forced_words={a: cat}"], ["forced_words={'a': 'cat'}: must be words by position"]),
            (["forced_words={0: 10}"], ["forced_words={0: 10}: must be words by position"]),
            (["forced_words={0: zebra}"], ["forced_words={0: 'zebra'}: not in the model's vocabulary"]),
            (["stop_words=[zebra, the]"], ["stop_words=['zebra']: not in the model's vocabulary"]),
            (["num_beams=0"], ["num_beams=0: must be at least 1"]),
            (["num_beams=3"], ["num_beams=3: beam search does not draw at random"]),
            (["num_beams=14", "temperature=0"], ["num_beams=14: must be at most 13"]),
            (["length_penalty=inf"], ["length_penalty=inf: must be a finite number"]),
            (["num_samples=2", "temperature=0"], ["num_samples=2: all texts are the same with temperature=0"]),
            (["num_samples=2", "top_k=1"], ["num_samples=2: all texts are the same with top_k=1"]),
            (["interactive=true"], ["prompt=the cat: has no effect with interactive=true"]),
        ],
        ids=str,
    )
    def test_one_line_each(self, sample, arguments, messages):
        with pytest.raises(InputError) as caught:
            sample("prompt=the cat", *arguments)
        assert len(caught.value.problems) == len(messages)
        for problem, message in zip(caught.value.problems, messages, strict=True):
            assert message in problem

    def test_on_the_command_line(self, trained):
        done = run_module("sample", "prompt=a", "format=html", "forced_words={0: 1}", "compare=3", cwd=trained)
        assert_refused(done, "format=html", "forced_words={0: 1}", "compare=3")
        command = " ".join([*COMMAND, "interactive=true <&-"])
        done = subprocess.run(command, shell=True, cwd=trained, capture_output=True, text=True, timeout=6000)
        assert_refused(done, "interactive=true: standard input is closed")
