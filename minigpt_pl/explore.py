"""python -m minigpt_pl.explore: measure texts of one run with many settings, or of several runs, in a report."""

import importlib.util
import logging
import re
from pathlib import Path

from minigpt_pl.cli import app
from minigpt_pl.config import GRID, ExploreConfig
from minigpt_pl.cpu.allocator import keep_freed_memory
from minigpt_pl.errors import InputError

log = logging.getLogger(__name__)

REQUIRED_PACKAGES = ("matplotlib", "sklearn", "sacrebleu", "vaderSentiment")  # the extra `explore`


def main() -> None:
    app.run("explore", explore, _values_to_lists)


def explore(config: ExploreConfig) -> None:
    """Generate texts, measure them, and write a report into a folder.

    The files are samples.jsonl, held_out.jsonl, network.json, report.md, report.html and the charts. With `compare`,
    they are those of `exploration.compare`.

    Raises:
        InputError: a run, its tokenizer or its text is missing, or prompts or settings cannot be used.
    """
    keep_freed_memory()
    if missing := [name for name in REQUIRED_PACKAGES if importlib.util.find_spec(name) is None]:
        raise InputError(f"explore: {', '.join(missing)} is not installed; pip install 'minigpt_pl[explore]'")
    from minigpt_pl.checkpoints import choose_checkpoint
    from minigpt_pl.data.corpus import open_run_corpus
    from minigpt_pl.exploration import samples
    from minigpt_pl.exploration.compare import compare
    from minigpt_pl.exploration.metrics import TextMetrics
    from minigpt_pl.exploration.network_study import study_network
    from minigpt_pl.exploration.report import Exploration, report
    from minigpt_pl.files import make_folder
    from minigpt_pl.text_model import load

    prompts = samples.read_prompts(Path(config.prompts or Path(app.CONFIG_DIR) / "prompts.yaml"))
    if config.compare is not None:
        folder = Path(config.folder or Path(config.output_dir) / "compare")
        compare(config, prompts, folder)
        log.info("Comparison: %s and %s", folder / "compare.html", folder / "compare.md")
        return
    checkpoint = choose_checkpoint(Path(config.output_dir), config.run)
    run_folder, model = checkpoint.parent.parent, load(checkpoint)
    grid = samples.check_grid(config, model, prompts)
    data, corpus = open_run_corpus(run_folder, model.tokenizer, config.source)
    held_out = corpus.validation
    if held_out is None:
        raise InputError(f"run={run_folder.name}: has no held-out text; train with data.validation_share above 0")
    folder = Path(config.folder or run_folder / "explore")
    make_folder(folder, "folder")
    log.info("Exploring %s: %d prompts, %d settings", checkpoint, len(prompts), len(grid))
    log.info("If you stop it with Ctrl-C, the same command continues.")
    generated, failed = samples.generate_samples(config, model, prompts, grid, folder)
    for line in failed:
        log.warning("Left out: %s", line)
    if not generated:
        raise InputError("explore: the model can generate no text with these settings; give other settings")
    page = folder / "report.html"  # the last file that is written
    if page.is_file() and all("metrics" in sample for sample in generated):
        log.info("Explored before, so nothing is changed: %s. To explore again, give folder=ANOTHER.", page)
        return
    grid = [setting for setting in grid if any(sample["settings"] == setting for sample in generated)]
    metrics = TextMetrics.fit(model, corpus.train, held_out, config.num_tokens, config.num_real)
    log.info("Measuring %s texts and %s held-out texts.", f"{len(generated):,}", f"{len(metrics.real_texts):,}")
    metrics.add_to(generated)
    samples.write_samples(folder / samples.SAMPLES, generated)
    real_records = metrics.of_real_texts(folder / "held_out.jsonl")
    log.info("Measuring how the network uses its context.")
    network_study = study_network(metrics, held_out, [prompt for _, prompt in prompts], config.num_tokens, folder)
    log.info("Drawing the charts and writing the report.")
    measured = real_records, metrics.num_calibration, network_study
    cut = f", the first {model.network.max_length + 1} tokens of each" if data.cut == "truncate" else ""
    text = f"{corpus.record['source']}{cut}"
    report(Exploration(run_folder.name, text, model, grid, generated, failed, *measured), folder)
    log.info("Report: %s and %s", page, folder / "report.md")


def _values_to_lists(arguments: list[str]) -> list[str]:
    """Write a control with one value, such as `temperature=0.8`, as a list: `temperature=[0.8]`."""
    one_value = re.compile(rf"^({'|'.join(GRID)})=(?!\[)(.*)", re.DOTALL)
    return [one_value.sub(r"\1=[\2]", argument) for argument in arguments]


if __name__ == "__main__":
    main()
