"""Every file of a run folder, and which of them are published."""

import re
from pathlib import Path

from .community_pipelines import shipped


# What a run writes beside checkpoints, the tracker's folder and the card.
RUN_FILES = ["model_index.json", "unet", "scheduler", "classifier", "best", "evaluations", "metrics.jsonl"]
RUN_FILES += ["samples/epoch_*.png"]
RUN_FILES += ["figures/" + name for name in ("loss.png", "schedule.png", "forward.png", "reverse.*", "ddim_*.png")]
# What a kill can leave of them.
HALF_WRITTEN = [".writable.tmp", "checkpoint-*.tmp", "metrics.tmp", "train_config.tmp", ".push-*"]


def checkpoints(output_dir) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    found = [path.parent for path in Path(output_dir).glob("checkpoint-*/state.pt")]
    ours = [path for path in found if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(ours, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the step in the name of a checkpoint."""
    return int(checkpoint.name.split("-")[1])


# Nothing else leaves a run folder: no checkpoint, no tracker's logs, nothing that a user put there.
PUBLISHED = ["model_index.json", "unet", "scheduler", "README.md", "train_config.json", "metrics.jsonl", "samples"]
PUBLISHED += ["figures", "evaluations", "best", "classifier"]
PUBLISHED += sorted(path.name for path in shipped("pipelines").glob("*.py"))
PUBLISHED += ["class_conditional.py", "classifier_guided.py"]  # of folders saved before class_guided.py
# Training images, which need not be anybody's to publish.
PRIVATE = ["evaluations/*.png", "figures/forward.png"]
# What a run has that says how its model came about and how good it is; `best/` and checkpoints stay behind.
RECORDS = ["train_config.json", "metrics.jsonl", "samples", "figures", "evaluations"]
