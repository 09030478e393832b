"""Which messages of Lightning a user sees."""

import logging
import warnings

from minigpt_pl.training.trainer import is_first_process


def set_up_logs(profiler: str | None) -> None:
    """Show our own messages once, in the first process, and only those warnings of Lightning that matter."""
    # Lightning's profilers print through its logger.
    logging.getLogger("lightning.pytorch").setLevel(logging.INFO if profiler else logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch").handlers.clear()  # otherwise each line appears twice
    if not is_first_process():
        logging.getLogger().setLevel(logging.ERROR)
    for message in (
        "Experiment logs directory",  # the run folder also has other files, and we keep the rows
        "Checkpoint directory .* exists and is not empty",  # a resumed run
        "You're resuming from a checkpoint that ended before the epoch ended",  # our loader resumes exactly
        ".*srun. command is available",
        ".*LeafSpec.* is deprecated",
    ):
        warnings.filterwarnings("ignore", message)
