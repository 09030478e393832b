"""Comparisons with Keras itself. Without Keras, or without the real reviews (MINIGPT_IMDB), they are skipped."""

from collections.abc import Callable

import numpy as np
import pytest

from minigpt_pl.tokenizer import build_vocabulary, count_words

from .programs import NUM_REVIEWS, SEED_VOCABULARY, skip_without_keras

differences = pytest.StashKey[dict[str, tuple[float, float]]]()  # what is compared: largest difference, limit


def pytest_configure(config: pytest.Config) -> None:
    config.stash[differences] = {}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.stash[differences]:
        terminalreporter.section("parity with the seed: largest differences")
        for what, (largest, limit) in config.stash[differences].items():
            terminalreporter.write_line(f"{what}: {largest:.3g} (limit {limit:g})")


@pytest.fixture
def within(request: pytest.FixtureRequest) -> Callable[[str, object, object, float], None]:
    """Assert that two arrays are nowhere further apart than a limit. The summary shows the largest difference seen
    under each name."""

    def check(what: str, ours: object, theirs: object, limit: float) -> None:
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        assert ours.shape == theirs.shape
        largest = float(np.abs(ours.astype(np.float64) - theirs).max())
        seen = request.config.stash[differences]
        seen[what] = max(largest, seen.get(what, (0.0, limit))[0]), limit
        assert largest <= limit, f"{what}: {largest:.3g} apart"

    return check


@pytest.fixture(scope="session")
def keras_installed() -> None:
    """To be asked for first where what comes before Keras takes long."""
    skip_without_keras()


@pytest.fixture(scope="session")
def reviews(imdb_texts: Callable[[str], list[str]]) -> list[str]:
    """5,000 real reviews, of both labels."""
    texts = imdb_texts("train")
    return texts[:: len(texts) // NUM_REVIEWS][:NUM_REVIEWS]


@pytest.fixture(scope="session")
def vocabulary(reviews: list[str]) -> list[str]:
    """Ours of these reviews, at the seed's size."""
    return build_vocabulary(count_words(reviews), SEED_VOCABULARY)
