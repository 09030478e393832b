"""The parts of `explore`: samples over a grid of settings, their metrics, a summary, charts and a report."""
