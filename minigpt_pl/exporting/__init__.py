"""Writes a run in the formats of `python -m minigpt_pl.export`."""
