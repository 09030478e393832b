"""python -m minigpt_pl.export: write a run as one HTML page that runs the model in a browser (`export html`)."""

import logging
import re
from pathlib import Path

from minigpt_pl.cli import app
from minigpt_pl.config import ExportConfig
from minigpt_pl.errors import DIVERGED, InputError
from minigpt_pl.files import atomic_write, make_folder

log = logging.getLogger(__name__)


def main() -> None:
    app.run("export", export, name_the_format)


def name_the_format(arguments: list[str]) -> list[str]:
    """Turn the first word into a setting: `export html` means `format=html`."""
    if arguments and re.fullmatch(r"\w+", arguments[0]):
        return [f"format={arguments[0]}", *arguments[1:]]
    return arguments


def export(config: ExportConfig) -> Path:
    """Write the run in the format, and return the path of the result. An earlier export is replaced.

    Raises:
        InputError: there is no such run, its weights are NaN or infinite, it changes during the export, or the result
            cannot be written. Nothing is half-written.
    """
    from minigpt_pl.checkpoints import choose_checkpoint
    from minigpt_pl.exporting import html
    from minigpt_pl.text_model import load

    checkpoint = choose_checkpoint(Path(config.output_dir), config.run)
    before = _version(checkpoint)
    run_folder = checkpoint.absolute().parent.parent
    path = Path(config.path or run_folder / "export" / f"{run_folder.name}.html")
    if path.exists() and not html.is_page(path):
        raise InputError(f"path={path}: exists, and is not a page of this command; choose another name, or remove it")
    model = load(checkpoint)
    if not all(weight.isfinite().all() for weight in model.network.parameters()):
        raise InputError(f"checkpoint={checkpoint}: {DIVERGED}")
    make_folder(path.parent, "path")
    try:
        with atomic_write(path) as temporary:
            html.write(temporary, model, run_folder, config.confirm)
            if _version(checkpoint) != before:
                raise InputError(f"run={run_folder.name}: changed during the export; wait until its training ends")
    except OSError as error:
        raise InputError(f"path={path}: cannot be written ({error.strerror}); give another path") from error
    log.info("Wrote %s (%.1f MB) from %s", path, path.stat().st_size / 1e6, checkpoint)
    return path


def _version(checkpoint: Path) -> list[tuple[int, int, int]]:
    """Differs if a file of the checkpoint or the tokenizer has been replaced."""
    files = [checkpoint, *checkpoint.glob("*"), checkpoint.parent.parent / "tokenizer.json"]
    stats = [file.stat() for file in sorted(files) if file.exists()]
    return [(stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats]


if __name__ == "__main__":
    main()
