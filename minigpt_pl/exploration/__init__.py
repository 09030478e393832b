"""What `explore` does: samples over a grid of settings, their measures, a summary, charts, a report."""
