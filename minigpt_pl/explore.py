"""python -m minigpt_pl.explore: the homework as an instrument: samples over a grid of settings, or runs, measured."""

import importlib.util
import logging
import re
from pathlib import Path

from minigpt_pl import runs
from minigpt_pl.cli import app
from minigpt_pl.config import GRID, ExploreConfig
from minigpt_pl.cpu.allocator import keep_freed_memory
from minigpt_pl.errors import InputError

log = logging.getLogger(__name__)

NEEDED = ("matplotlib", "sklearn", "sacrebleu", "vaderSentiment")  # the extra `explore`


def main() -> None:
    app.run("explore", explore, _as_lists)


def explore(config: ExploreConfig) -> Path:
    """Write, measure, report.

    Returns:
        The folder, with samples.jsonl, held_out.jsonl, network.json, report.md, report.html and the charts; of a
        comparison with what `exploration.compare` writes.

    Raises:
        InputError: no such run, no words or text of it, prompts or settings that nothing can be written with.
    """
    keep_freed_memory()
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise InputError(f"explore: {', '.join(missing)} is not installed; pip install 'minigpt_pl[explore]'")
    from minigpt_pl.data.corpus import open_run_corpus
    from minigpt_pl.exploration import compare, judging, network_study, report, samples
    from minigpt_pl.files import make_folder
    from minigpt_pl.generation.text import load

    prompts = samples.read_prompts(Path(config.prompts or Path(app.CONFIG_DIR) / "prompts.yaml"))
    if config.compare is not None:
        folder = Path(config.output_dir) / "compare" if config.folder is None else Path(config.folder)
        compare.compare(config, prompts, folder)
        log.info("Comparison: %s", folder / "compare.md")
        return folder
    checkpoint = runs.choose_checkpoint(Path(config.output_dir), config.run)
    run = checkpoint.parent.parent
    model = load(checkpoint)
    grid = samples.check_grid(config, model, prompts)
    _, corpus = open_run_corpus(run, model.tokenizer, config.source)
    if corpus.validation is None:
        raise InputError(f"run={run.name}: held no text out to compare with; train with data.validation_share above 0")
    folder = run / "explore" if config.folder is None else Path(config.folder)
    make_folder(folder, "folder")
    log.info("Exploring %s: %d prompts, %d settings", checkpoint, len(prompts), len(grid))
    made, broken = samples.make_samples(config, model, prompts, grid, folder)
    for line in broken:
        log.warning("Left out: %s", line)
    if not made:
        raise InputError("explore: nothing could be written with any of the settings; change them")
    judge = judging.Judge.prepare(model, corpus, config.num_tokens)
    log.info("Measuring %s texts and %s held-out ones.", f"{len(made):,}", f"{len(judge.real):,}")
    judge.samples(made)
    samples.write_samples(folder / samples.SAMPLES, made)
    real = judge.real_texts(folder / "held_out.jsonl")
    log.info("Measuring what the network makes of its context.")
    study = network_study.study(judge, corpus, [prompt for _, prompt in prompts], config.num_tokens,
                                folder / "network.json")  # fmt: skip
    log.info("Drawing and writing.")
    report.write(folder, run.name, model, grid, made, real, judge, study, broken, corpus.record["source"])
    log.info("Report: %s and %s", folder / "report.html", folder / "report.md")
    return folder


def _as_lists(arguments: list[str]) -> list[str]:
    """`temperature=0.8` as `temperature=[0.8]`: a control with one value."""
    return [
        re.sub(r"=(?!\[)(.*)", r"=[\1]", argument, flags=re.DOTALL) if argument.split("=")[0] in GRID else argument
        for argument in arguments
    ]


if __name__ == "__main__":
    main()
