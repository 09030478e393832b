"""All the benchmarks, one after the other: their tables on the screen, their JSON in a folder.

    python benchmarks/all.py RUN [--source FOLDER] [--json benchmarks.json]

RUN is a trained run folder; FOLDER holds IMDB in the hub's layout (default: the packaged reviews). About half an hour.
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
    parser.add_argument("--json", type=Path, default=Path("benchmarks.json"))
    arguments = parser.parse_args()
    start_up = [arguments.run] + (["--source", arguments.source] if arguments.source else [])
    results = {}
    for name, options in {"training_step": [], "step_sizes": [], "sampling": [], "start_up": start_up}.items():
        print(f"\n{name}\n", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            answer = Path(folder, "result.json")
            subprocess.run([sys.executable, HERE / f"{name}.py", *options, "--json", answer], check=True)
            results[name] = json.loads(answer.read_text())
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
