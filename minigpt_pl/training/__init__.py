"""The training step, the optimizer and its schedule, callbacks. The only part that knows Lightning, with `data`."""
