"""The checks of `python -m minigpt_pl.doctor`."""
