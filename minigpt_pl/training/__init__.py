"""The training: training step, optimizer, schedule, callbacks, run record. It uses Lightning."""
