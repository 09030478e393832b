"""The parts of `explore`: samples for a grid of settings, their metrics, a summary, charts and a report."""
