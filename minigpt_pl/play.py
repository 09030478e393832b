"""python -m minigpt_pl.play: open a run in the browser, as one page without a server."""

import logging
import webbrowser
from dataclasses import asdict

from minigpt_pl.cli import app
from minigpt_pl.config import ExportConfig, PlayConfig
from minigpt_pl.export import export

log = logging.getLogger(__name__)


def main() -> None:
    app.run("play", play)


def play(config: PlayConfig) -> None:
    """Write the page of `export html` into the run folder, and open it in the browser.

    Raises:
        InputError: as `export`.
    """
    path = export(ExportConfig(**asdict(config), format="html"))
    if not webbrowser.open(path.as_uri()):
        print(f"No browser can be started here. Open this file in one: {path}")


if __name__ == "__main__":
    main()
