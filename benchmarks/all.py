"""Runs all benchmarks: prints their tables and writes their results to one JSON file.

    python benchmarks/all.py RUN [--source FOLDER] [--rounds N] [--json benchmarks.json]

RUN is a trained run folder. FOLDER holds IMDB in the hub's layout (default: the packaged reviews). Takes about half an
hour, or a third of that with --rounds 1.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--source")
    parser.add_argument("--rounds", type=int, help="rounds of each benchmark; default: its own number")
    parser.add_argument("--json", type=Path, default=Path("benchmarks.json"))
    arguments = parser.parse_args()
    rounds = ["--rounds", str(arguments.rounds)] if arguments.rounds else []
    start_up = [arguments.run, *rounds] + (["--source", arguments.source] if arguments.source else [])
    results = {}
    for name, options in {
        "training_step": rounds, "step_sizes": rounds, "sampling": rounds, "start_up": start_up
    }.items():  # fmt: skip
        print(f"\n{name}\n", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            answer = Path(folder, "result.json")
            subprocess.run([sys.executable, HERE / f"{name}.py", *options, "--json", answer], check=True)
            results[name] = json.loads(answer.read_text())
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
