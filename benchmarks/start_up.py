"""Start-up time of the commands, and speed of encoding text.

    python benchmarks/start_up.py RUN [--source FOLDER] [--rounds 5] [--json FILE]

RUN is a trained run folder. FOLDER holds IMDB in the hub's layout (default: the packaged reviews). Each measurement is
a process of its own. The commands run in turn, and the figures are medians.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# From the end of `import lightning` to the first step. The text is already encoded.
TO_THE_FIRST_STEP = """
import os, sys, time
import lightning.pytorch
start = time.perf_counter()
from minigpt_pl import train
from minigpt_pl.training import metrics
def report(*args):
    print(time.perf_counter() - start, flush=True)
    os._exit(0)
metrics.Metrics.on_train_batch_start = report
sys.argv[1:] = {arguments!r}
train.main()
"""

ENCODE = """
import sys, time
from minigpt_pl.tokenizer import load_tokenizer, split_words
from pathlib import Path
from minigpt_pl.cli import app
from minigpt_pl.data.sources import open_source
config = app.to_settings(app.compose("train", {arguments!r}))
texts = [text for text, _ in zip(open_source(config.data).train(), range(10_000))]
tokenizer = load_tokenizer(Path({tokenizer!r}))
start = time.perf_counter()
words = sum(len(split_words(text)) for text in texts)
middle = time.perf_counter()
tokenizer.encode_batch(texts)
print(words / (middle - start), words / (time.perf_counter() - middle))
"""


def run_python(*arguments: str, cwd: Path) -> tuple[float, str]:
    """Seconds and output of a Python process."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return time.perf_counter() - start, done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--source", default="packaged")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    folder, run = Path(tempfile.mkdtemp()), options.run.resolve()
    source = options.source if options.source == "packaged" else str(Path(options.source).resolve())
    settings = [f"data.source={source}", f"output_dir={folder}"]
    commands = {
        "import torch": ["-c", "import torch"],
        "import lightning": ["-c", "import lightning.pytorch"],
        "sample, one word": ["-m", "minigpt_pl.sample", "prompt=this movie is", f"run={run}", "num_tokens=1"],
    }
    seen = {name: [] for name in [*commands, "train, from the end of `import lightning` to its first step"]}
    run_python("-c", TO_THE_FIRST_STEP.format(arguments=settings), cwd=folder)  # fills the cache
    for _ in range(options.rounds):
        for name, command in commands.items():
            seen[name].append(run_python(*command, cwd=folder)[0])
        first_step = run_python("-c", TO_THE_FIRST_STEP.format(arguments=settings), cwd=folder)[1]
        seen[list(seen)[-1]].append(float(first_step.split()[-1]))
    medians = {name: statistics.median(seconds) for name, seconds in seen.items()}
    encode = ENCODE.format(arguments=settings, tokenizer=str(run / "tokenizer.json"))
    by_words, by_pipeline = map(float, run_python("-c", encode, cwd=folder)[1].split())
    for name, seconds in medians.items():
        print(f"{name:60}{seconds:6.2f} s")
    print(f"{'split_words, which encodes the corpus (one core)':60}{by_words / 1e6:6.2f} million words/s")
    print(f"{'the tokenizers pipeline, in a batch (all cores)':60}{by_pipeline / 1e6:6.2f} million words/s")
    if options.json:
        rates = {"split_words_per_second": by_words, "pipeline_words_per_second": by_pipeline}
        options.json.write_text(json.dumps({"seconds": medians, **rates}, indent=2) + "\n")


if __name__ == "__main__":
    main()
