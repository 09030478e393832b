"""python -m minigpt_pl.prepare: encode a large text in parallel processes, before the training."""

import os
from pathlib import Path

from minigpt_pl.config import PrepareConfig


def main() -> None:
    # Each encoding process imports this file, and does not need Hydra.
    from minigpt_pl.cli import app

    app.run("prepare", prepare)


def prepare(config: PrepareConfig) -> Path:
    """Encode the text that the settings name, or continue a killed encoding. Returns the folder of the encoded text.

    If the text is already encoded, every byte is checked, and a damaged text is encoded again.

    Raises:
        InputError: the text cannot be found or read, or the cache cannot be written.
    """
    from minigpt_pl.data.corpus import encode_text, read_corpus

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = cores if config.processes is None else config.processes
    folder = encode_text(config.data, config.model.vocab_size, processes=processes, check_all=True)
    counts = read_corpus(folder).record
    print(f"{folder}: {counts['train_tokens']:,} training tokens, {counts['vocab_size']:,} words in the vocabulary")
    return folder


if __name__ == "__main__":
    main()
