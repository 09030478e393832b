"""Speed, size and accuracy of the offline page.

    python benchmarks/page.py RUN [--contexts 1000] [--rounds 5] [--long-rows 0 4000] [--json FILE]

RUN is a trained run folder. Chromium runs without a window, on one core, together with this process.

Accuracy: half of the contexts are parts of texts that the network writes at temperature 1 without other controls. The
other half are random words. Their lengths are 1 to `max_length`. PyTorch computes with the rounded weights of the page,
and with the run's own fp32 weights. `--long-rows` also measures other numbers of words with 16 bits.
"""

import argparse
import copy
import json
import os
import random
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from playwright.sync_api import sync_playwright

import minigpt_pl
from minigpt_pl.config import ExportConfig
from minigpt_pl.export import export
from minigpt_pl.exporting import quantization
from minigpt_pl.generation.controls import Controls
from minigpt_pl.generation.engine import generate_ids
from minigpt_pl.model import MiniGPT

TOP = """contexts => contexts.map(ids => {
    const logits = engine.logits(ids);
    return MiniGPT.top(logits, 10).map(id => [id, logits[id]]);
})"""
WORDS_PER_SECOND = """([ids, controls, skipped, count]) => {
    const texts = engine.generate(ids, controls, MiniGPT.random(0));
    for (let i = 0; i < skipped; i++) texts.next();
    const start = performance.now();
    for (let i = 0; i < count; i++) if (texts.next().done) throw new Error("the text has ended");
    return count / (performance.now() - start) * 1000;
}"""
GREEDY = """([ids, count]) => {
    const words = [];
    for (const step of engine.generate(ids, {temperature: 0}, MiniGPT.random(0))) {
        if (words.push(step.id) === count) break;
    }
    return words;
}"""


def contexts_of(model: minigpt_pl.TextModel, count: int) -> list[list[int]]:
    """Contexts of all lengths: parts of generated texts, and random words."""
    rng, size, longest = random.Random(0), model.network.vocab_size, model.network.max_length
    controls = Controls(num_tokens=2 * longest, temperature=1.0, top_k=None, vocab_size=size, banned_ids=[0, 1])
    starts = [[word] for word in rng.choices(range(2, 1000), k=count // 2)]
    texts = generate_ids(model.prepared, starts, controls, range(count // 2))
    contexts = []
    for i, text in enumerate(texts):
        length = 1 + i % longest
        end = rng.randrange(length, len(text) + 1)
        contexts.append(text[end - length : end])
    return contexts + [rng.choices(range(2, size - 1), k=1 + i % longest) for i in range(count // 2)]


def top_10(network: MiniGPT, contexts: list[list[int]]) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Ids of the ten likeliest words after each context, and all logits."""
    with torch.inference_mode():
        logits = [network.output(network.hidden_states(torch.tensor([ids]))[0, -1]) for ids in contexts]
    return [row.topk(10).indices.tolist() for row in logits], logits


def agreement(found: list[list[int]], expected: list[list[int]]) -> dict[str, float]:
    pairs = list(zip(found, expected, strict=True))
    return {
        "same ten words in the same order": statistics.mean(a == b for a, b in pairs),
        "same ten words": statistics.mean({*a} == {*b} for a, b in pairs),
        "same likeliest word": statistics.mean(a[0] == b[0] for a, b in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--contexts", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--long-rows", type=int, nargs="*", default=[])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # Chromium inherits it

    model = minigpt_pl.load(arguments.run)
    contexts, middle = contexts_of(model, arguments.contexts), arguments.contexts // 2
    exact, exact_logits = top_10(model.network, contexts)
    results: dict[str, object] = {}
    for rows in [*arguments.long_rows, quantization.LONG_ROWS]:  # the page has the last number
        quantization.LONG_ROWS = rows
        tensors, weights = quantization.pack(model.network)
        rounded = copy.deepcopy(model.network)
        rounded.load_state_dict(quantization.unpack(tensors, weights), strict=False)  # tied weights have one name
        same_weights, same_logits = top_10(rounded, contexts)
        results[f"{rows} words with 16 bits, and fp32 weights"] = {
            "MB in the file": len(weights) * 4 / 3 / 1e6,
            "generated texts": agreement(same_weights[:middle], exact[:middle]),
            "random words": agreement(same_weights[middle:], exact[middle:]),
        }
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        start = time.perf_counter()
        path = export(ExportConfig(run=str(arguments.run), format="html", path=f"{folder}/page.html"))
        results |= {"export, s": time.perf_counter() - start, "size, MB": path.stat().st_size / 1e6}
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium") or shutil.which("google-chrome"), args=["--no-sandbox"]
        )
        seconds = []
        for _ in range(arguments.rounds):
            page = browser.new_page()
            start = time.perf_counter()
            page.goto(path.as_uri())
            page.fill("#num_tokens", "1")
            page.click("#write")
            page.locator("#words > *").first.wait_for()
            seconds.append(time.perf_counter() - start)
            page.close()
        results["from opening to the first word, s"] = statistics.median(seconds)
        page = browser.new_page()
        page.goto(path.as_uri())
        load = "() => { const start = performance.now(); const data = JSON.parse(document.getElementById('data')"
        load += ".textContent); window.engine = MiniGPT.load(data); return (performance.now() - start) / 1000; }"
        results["engine, s"] = statistics.median(page.evaluate(load) for _ in range(arguments.rounds))
        ids = model.tokenizer.encode("this movie is").ids
        longest, never_ends = model.network.max_length, {"temperature": 1, "top_k": 20, "min_p": 0}
        for name, skipped, controls in (
            ("words per second, inside the window", 0, never_ends),
            ("words per second, past the window", longest, never_ends),
            ("words per second, past the window, top_p", longest, {"temperature": 1, "top_p": 0.9}),
        ):
            prompt = ids if skipped else ids[:2]
            rates = [page.evaluate(WORDS_PER_SECOND, [prompt, controls, skipped, 70]) for _ in range(arguments.rounds)]
            results[name] = statistics.median(rates)
        top_10s = page.evaluate(TOP, contexts)
        tops = [[id_ for id_, _ in top] for top in top_10s]
        results["page and rounded weights"] = agreement(tops, same_weights)
        for name, logits in (("rounded", same_logits), ("fp32", exact_logits)):
            errors = [abs(value - logits[i][id_]) for i, top in enumerate(top_10s) for id_, value in top]
            results[f"largest difference of a logit, {name} weights"] = float(max(errors))
        greedy = {"rounded": 0, "fp32": 0}
        prompts = [text[:5] for text in contexts[: len(contexts) // 2] if len(text) >= 5][:10]
        greedy_texts = [page.evaluate(GREEDY, [prompt, 200]) for prompt in prompts]
        controls = Controls(
            num_tokens=200, temperature=0.0, vocab_size=model.network.vocab_size, end_id=model.end_id, banned_ids=[0, 1]
        )
        for name, network in (("rounded", rounded), ("fp32", model.network)):
            for prompt, found in zip(prompts, greedy_texts, strict=True):
                greedy[name] += generate_ids(network, [prompt], controls, [0]) == [found]
        results["greedy texts of 200 words that are equal"] = greedy | {"of": len(prompts)}
        browser.close()
    for name, value in results.items():
        print(f"{name}: {value}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
