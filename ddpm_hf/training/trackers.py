"""Log to the experiment tracker of --logger. A tracker that fails never ends a run."""

import functools
import threading
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from ..errors import UserError, reason_of


def start_tracker(config, accelerator):
    """Start the tracker of --logger, if any, and give it the flags of the run.

    Raises:
        UserError: if the tracker cannot start, e.g. because the user is not logged in.
    """
    if config.logger == "none":
        return
    folder = Path(config.output_dir) / config.logging_dir
    # Trackers accept only numbers and text.
    flags = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in config.to_dict().items()}
    hide_tracebacks_of_tensorboard()
    try:
        folder.mkdir(parents=True, exist_ok=True)  # wandb uses another folder if this one is missing
        accelerator.init_trackers("ddpm_hf", config=flags, init_kwargs={"wandb": {"dir": str(folder)}})
    except Exception as error:  # each tracker raises its own errors
        raise UserError(
            f"--logger {config.logger} cannot start ({error}): set it up, or give --logger none."
        ) from error


@functools.cache
def hide_tracebacks_of_tensorboard():
    """Print no traceback if a thread of TensorBoard cannot write. `log` gets the same error and prints a warning."""
    show = threading.excepthook

    def hook(failed):
        if not type(failed.thread).__module__.startswith("tensorboard."):
            show(failed)

    threading.excepthook = hook


def log(accelerator, call: Callable):
    """Call `call(tracker)` for each tracker of a run. If it fails, print a warning and drop this tracker."""
    for tracker in list(accelerator.trackers):
        try:
            call(tracker)
        except Exception as error:  # each tracker raises its own errors
            accelerator.trackers.remove(tracker)
            tqdm.write(
                f"Warning: --logger {tracker.name} failed ({reason_of(error)}), so nothing more is logged to it. "
                "metrics.jsonl still gets all numbers."
            )


def end_trackers(accelerator):
    """Finish all trackers, so that all numbers are stored."""
    log(accelerator, lambda tracker: tracker.finish())
    accelerator.trackers.clear()
