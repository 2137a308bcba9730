"""List the names of the files in a run folder, and say which of them are published."""

import re
from pathlib import Path

from .community_pipelines import shipped


# The files that a run writes. Not listed: checkpoints, the tracker's folder, train_config.json and the model card.
RUN_FILES = ["model_index.json", "unet", "scheduler", "classifier", "best", "evaluations", "metrics.jsonl"]
RUN_FILES += ["samples/epoch_*.png"]
RUN_FILES += ["figures/" + name for name in ("loss.png", "schedule.png", "forward.png", "reverse.*", "ddim_*.png")]
# Temporary files that a killed run can leave.
HALF_WRITTEN = [".writable.tmp", "checkpoint-*.tmp", "metrics.tmp", "train_config.tmp", ".push-*"]


def checkpoints(output_dir) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    found = [path.parent for path in Path(output_dir).glob("checkpoint-*/state.pt")]
    return sorted((path for path in found if re.fullmatch(r"checkpoint-\d+", path.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the optimizer step, which the name of a checkpoint ends with."""
    return int(checkpoint.name.split("-")[1])


# Only these files are published. Checkpoints, the tracker's logs and the user's own files are not.
PUBLISHED = ["model_index.json", "unet", "scheduler", "README.md", "train_config.json", "metrics.jsonl", "samples"]
PUBLISHED += ["figures", "evaluations", "best", "classifier"]
PUBLISHED += sorted(path.name for path in shipped("pipelines").glob("*.py"))
PUBLISHED += ["class_conditional.py", "classifier_guided.py"]  # from before class_guided.py
# These files show training images, and the user may not have the right to publish those.
PRIVATE = ["evaluations/*.png", "figures/forward.png"]
# An export copies these files, because they say how the model was trained and how good it is. It does not copy `best/`
# and checkpoints.
RECORDS = ["train_config.json", "metrics.jsonl", "samples", "figures", "evaluations"]
