"""The names of a run folder's files, and which of them are published."""

import re
from pathlib import Path

from .community_pipelines import shipped


# The files that a run writes, apart from checkpoints, the tracker's folder, train_config.json and the card.
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
    """Return the step in the name of a checkpoint."""
    return int(checkpoint.name.split("-")[1])


def files_in(folder: str | Path, patterns: list[str]) -> list[Path]:
    """Return the files of a folder that patterns name, in the order of the patterns. No link is followed.

    Args:
        folder: may itself be a link, but what is in it may not.
        patterns: paths in the folder. In the name of a file `#` is any number, and `*` any name without a dot first.
    """
    root = Path(folder).resolve()
    found = []
    for pattern in map(Path, patterns):
        name = re.escape(pattern.name).replace(r"\#", "[0-9]+").replace(r"\*", "[^.].*")
        parent = Path(folder, pattern.parent)
        for path in sorted(parent.iterdir()) if parent.is_dir() else []:
            # Resolving gives another path if the file, or a folder on the way to it, is a link.
            is_real = path.is_file() and path.resolve() == root / pattern.parent / path.name
            if re.fullmatch(name, path.name) and is_real:
                found.append(path)
    return found


WEIGHTS = ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json"]
WEIGHTS += ["diffusion_pytorch_model-#-of-#.safetensors"]  # in shards
PIPELINE = ["model_index.json", "scheduler/scheduler_config.json"]
PIPELINE += ["unet/" + name for name in ("config.json", *WEIGHTS)]
PIPELINE += sorted(path.name for path in shipped("pipelines").glob("*.py"))
PIPELINE += ["class_conditional.py", "classifier_guided.py"]  # earlier versions saved these, not class_guided.py
CLASSIFIER = ["classifier/" + name for name in ("config.json", "classifier.py", *WEIGHTS)]
# What says how the model was trained and how good it is. An export copies it, but not best/. Pictures of training
# images, figures/forward.png and evaluations/*.png, are not here: the user may not be allowed to publish them.
RECORDS = ["train_config.json", "metrics.jsonl", "samples/epoch_#.png", "evaluations/*.json"]
RECORDS += ["figures/" + name for name in ("loss.png", "schedule.png", "reverse.png", "reverse.gif", "ddim_#.png")]
# Only these files are published. Checkpoints, the tracker's logs and the user's own files are not.
PUBLISHED = [*PIPELINE, *CLASSIFIER, "README.md", *RECORDS, *("best/" + name for name in (*PIPELINE, *CLASSIFIER))]
