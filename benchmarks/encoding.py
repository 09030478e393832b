"""Memory and speed of `prepare`, and the rate of the loader.

    python benchmarks/encoding.py FOLDER [--megabytes 200 2000] [--rounds 3] [--json FILE]

FOLDER gets made-up text with 200,000 different words, and its encoded forms: about 2.5 times the largest size. Each
measurement is a process of its own. The memory is the sum over all its processes, in proportional set size (Linux). The
page cache does not count. The speeds with one and two processes take turns, and the figures are medians.
"""

import argparse
import itertools
import json
import random
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

STEP_SECONDS, BATCH_SIZE = 0.48, 128  # a training step of the default model on two cores of a server CPU

LOAD = """
import sys, time
from pathlib import Path
from minigpt_pl.data import batches
from minigpt_pl.data.corpus import read_corpus
batches.WINDOW = int(sys.argv[2])
train = read_corpus(Path(sys.argv[1])).train
loader = batches.BatchLoader(batches.Sequences(train, 80, "pack", True, False), 128, seed=0)
start = time.perf_counter()
iterator = iter(loader)
next(iterator)
first = time.perf_counter() - start
for number, _ in zip(range(2000), iterator):
    pass
rate = 128 * (number + 1) / (time.perf_counter() - start - first)
print(len(train.sizes), len(loader) * 128, first, rate)
"""


def make_text(path: Path, megabytes: int) -> None:
    """Write documents whose words have Zipf's frequencies."""
    rng = random.Random(0)
    words = [f"w{i}" for i in range(200_000)]
    totals = list(itertools.accumulate(1 / rank for rank in range(1, len(words) + 1)))
    block = [" ".join(rng.choices(words, cum_weights=totals, k=rng.randint(50, 400))) for _ in range(10_000)]
    with path.open("w") as file:
        for number in itertools.count():
            file.writelines(f"n{number} {line}\n" for line in block)
            if file.tell() > megabytes * 1e6:
                return


def memory(process_id: int) -> int:
    """Megabytes of anonymous memory of a process and its children."""
    total = 0
    for process in [process_id, *children(process_id)]:
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has ended
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss_Anon:"))
    return total // 1000


def children(process_id: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{process_id}/task/{process_id}/children").read_text().split()]
    except OSError:
        return []


def prepare(text: Path, processes: int) -> tuple[Path, float, int, int]:
    """Encode a text. Returns the encoded folder, tokens per second, megabytes of memory, and its tokens."""
    output = text.parent / f"out-{processes}"
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "minigpt_pl.prepare", "data=text", f"data.path={text}", f"output_dir={output}"]
    start, most = time.perf_counter(), 0
    process = subprocess.Popen([*command, f"processes={processes}"], stdout=subprocess.PIPE, text=True)
    while process.poll() is None:
        most = max(most, memory(process.pid))
        time.sleep(0.2)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(process.returncode)
    (folder,) = (path for path in (output / "cache").iterdir() if path.is_dir())
    tokens = json.loads((folder / "manifest.json").read_text())["counts"]["train_tokens"]
    return folder, tokens / seconds, most, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[200, 2000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for megabytes in options.megabytes:
        text = folder / f"{megabytes}.txt"
        if not text.exists():
            make_text(text, megabytes)
        found = [prepare(text, processes) for _ in range(options.rounds) for processes in (1, 2)]
        for processes, results in ((1, found[::2]), (2, found[1::2])):
            rate = statistics.median(result[1] for result in results)
            most, tokens = max(result[2] for result in results), results[0][3]
            rows.append(
                {"MB": megabytes, "processes": processes, "tokens": tokens, "tokens/s": rate, "memory MB": most}
            )
            print(
                f"{megabytes:6,} MB, {processes} processes: {rate / 1e6:5.2f} million tokens/s, {most:,} MB", flush=True
            )
    for window in (2**24, 2**18):
        arguments = [sys.executable, "-c", LOAD, str(found[-1][0]), str(window)]
        done = subprocess.run(arguments, capture_output=True, text=True, check=True)
        shards, sequences, first, rate = map(float, done.stdout.split())
        needed = BATCH_SIZE / STEP_SECONDS
        rows.append({"window": window, "shards": shards, "sequences": sequences, "first batch s": first, "rate": rate})
        print(
            f"loader, windows of {window:,}: {rate:,.0f} sequences/s of {shards:.0f} shards with {sequences:,.0f}"
            f" sequences, {rate / needed:,.0f} times the rate of the training; {first:.2f} s to the first batch"
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
