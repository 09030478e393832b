"""python -m minigpt_pl.export: write a run as an HTML page, for transformers, for onnxruntime, or as all of them."""

import dataclasses
import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from minigpt_pl.cli import app
from minigpt_pl.config import ExportConfig
from minigpt_pl.errors import DIVERGED, InputError
from minigpt_pl.files import atomic_write, make_folder, remove

if TYPE_CHECKING:
    from minigpt_pl.text_model import TextModel

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
        InputError: there is no such run, its weights are NaN or infinite, it changes during the export, a package is
            missing, or the result cannot be written. Nothing is half-written.
    """
    from minigpt_pl.checkpoints import choose_checkpoint
    from minigpt_pl.exporting import html, manifest
    from minigpt_pl.runs import read_record
    from minigpt_pl.text_model import load

    checkpoint = choose_checkpoint(Path(config.output_dir), config.run)
    before = _version(checkpoint)
    run_folder = checkpoint.absolute().parent.parent
    is_page = config.format == "html"
    path = Path(config.path or run_folder / "export" / (f"{run_folder.name}.html" if is_page else config.format))
    is_ours = html.is_page if is_page else manifest.is_export
    if os.path.exists(path) and not is_ours(path):  # Path.exists raises an error for a name that is too long
        kind = "a page" if is_page else "a folder"
        raise InputError(f"path={path}: exists, and is not {kind} of this command; choose another name, or remove it")
    model = load(checkpoint)
    if not all(weight.isfinite().all() for weight in model.network.parameters()):
        raise InputError(f"checkpoint={checkpoint}: {DIVERGED}")
    parent_is_new = not path.parent.exists()
    make_folder(path.parent, "path")
    try:
        with atomic_write(path) as temporary:
            if is_page:
                html.write(temporary, model, run_folder, config.confirm)
            else:
                _write_folder(temporary, config, model, run_folder)
                manifest.write(temporary, run_folder.name, checkpoint, model.tokenizer)
            if _version(checkpoint) != before:
                raise InputError(f"run={run_folder.name}: changed during the export; wait until its training ends")
            if path.is_dir():
                remove(path)  # a folder cannot be renamed to one that has files
    except OSError as error:
        raise InputError(f"path={path}: cannot be written ({error.strerror}); give another path") from error
    finally:
        if parent_is_new and not any(path.parent.iterdir()):
            path.parent.rmdir()
    size = sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())
    log.info("Wrote %s (%.1f MB) from %s", path, size / 1e6, checkpoint)
    if (status := read_record(run_folder).get("status", "finished")) != "finished":
        name = run_folder.name
        log.warning("The run %s is not finished (its status is %s). train resume=%s continues it.", name, status, name)
    if config.push is not None:
        from minigpt_pl.exporting import hugging_face

        log.info("Uploaded to %s", hugging_face.push(path, config.push))
    return path


def _write_folder(folder: Path, config: ExportConfig, model: "TextModel", run_folder: Path) -> None:
    """Write the folder of a format. That of `all` has a subfolder for each of the others, and the page."""
    from minigpt_pl.exporting import html, hugging_face, onnx
    from minigpt_pl.exporting.readme import readme

    folder.mkdir()
    if config.format == "all":
        html.write(folder / f"{run_folder.name}.html", model, run_folder, config.confirm)
        for name in ("transformers", "onnx"):
            _write_folder(folder / name, dataclasses.replace(config, format=name), model, run_folder)
        return
    figures = {}
    if config.format == "transformers":
        hugging_face.write_model(folder, model)
    else:
        onnx.write_model(folder, model)
    if config.format == "onnx" and config.int8:
        figures["8-bit weights"] = cost = onnx.quantize(folder, model, run_folder, config.source)
        print(*(f"{label}: {text}" for label, text in cost.items()), sep="\n")
    usage = hugging_face.USAGE if config.format == "transformers" else onnx.USAGE
    text = readme(model, run_folder, config.license, config.format, usage, figures)
    (folder / "README.md").write_text(text, encoding="utf-8")


def _version(checkpoint: Path) -> list[tuple[int, int, int]]:
    """Differs if a file of the checkpoint or the tokenizer has been replaced."""
    files = [checkpoint, *checkpoint.glob("*"), checkpoint.parent.parent / "tokenizer.json"]
    stats = [file.stat() for file in sorted(files) if file.exists()]
    return [(stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats]


if __name__ == "__main__":
    main()
