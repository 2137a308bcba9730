"""The names of the files in a run folder, which of them are published, and the lines of its metrics.jsonl."""

import json
import re
from pathlib import Path

from .community_pipelines import shipped
from .files import parse_json, write_beside, writing
from .manifest import is_complete


# The names of the temporary files and folders that a killed run of this or an earlier version can leave.
HALF_WRITTEN = re.compile(
    r"checkpoint-\d+\.tmp|\.writable\.tmp|\.metrics\.jsonl\.tmp|\.train_config\.json\.tmp|metrics\.tmp|train_config\.tmp"
    r"|\.saving|\.push-\w{8}"
)

DRY_RUN = ".dry_run.png"  # the picture of a dry run is OUTPUT_DIR followed by this, because OUTPUT_DIR is not created


def is_checkpoint_name(name: str) -> bool:
    """Return whether a folder of this name is a checkpoint: checkpoint-<step>."""
    return re.fullmatch(r"checkpoint-[0-9]+", name) is not None


def checkpoint_folders(output_dir) -> list[Path]:
    """Return the folders named checkpoint-<step>, complete or not, oldest first."""
    found = Path(output_dir).glob("checkpoint-*")
    return sorted((path for path in found if is_checkpoint_name(path.name)), key=step_of)


def checkpoints(output_dir) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    return [path for path in checkpoint_folders(output_dir) if is_complete(path)]


def step_of(checkpoint: Path) -> int:
    """Return the optimizer step in the name of a checkpoint."""
    return int(checkpoint.name.split("-")[1])


def files_in(folder: str | Path, patterns: list[str]) -> list[Path]:
    """Return the files of a folder that match patterns, in the order of the patterns. Links are left out.

    Args:
        folder: a folder. It may itself be a link to a folder.
        patterns: paths relative to the folder. In the name of a file, `#` stands for a whole number, and `*` for any
            text that does not begin with a dot.
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


def read_metrics(path: str | Path) -> list[dict]:
    """Return the lines of a metrics.jsonl, oldest first, or [] if the file does not exist.

    Lines that are not complete are left out. A full disk or a kill can cut a line.
    """
    path = Path(path)
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            content = parse_json(line)
        except ValueError:
            continue
        if isinstance(content, dict) and isinstance(content.get("step"), int):
            found.append(content)
    return found


def keep_metrics_up_to(output_dir, step: int):
    """Remove the lines after `step` from the metrics.jsonl of a folder."""
    path = Path(output_dir) / "metrics.jsonl"
    if path.is_file():
        text = "".join(json.dumps(line) + "\n" for line in read_metrics(path) if line["step"] <= step)
        with writing("metrics.jsonl", path):
            write_beside(path, lambda partial: partial.write_text(text, encoding="utf-8"))


WEIGHTS = ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json"]
WEIGHTS += ["diffusion_pytorch_model-#-of-#.safetensors"]  # weights in shards
# model_index.json comes first, so that it is removed first. If a kill leaves a pipeline half removed, it cannot be
# loaded.
PIPELINE = ["model_index.json", "scheduler/scheduler_config.json"]
PIPELINE += ["unet/" + name for name in ("config.json", *WEIGHTS)]
CLASSIFIER = ["classifier/" + name for name in ("config.json", "classifier.py", *WEIGHTS)]
CODE = sorted(path.name for path in shipped("pipelines").glob("*.py"))
CODE += ["class_conditional.py", "classifier_guided.py"]  # earlier versions saved these, not class_guided.py
FIGURES = ["loss.png", "schedule.png", "reverse.png", "reverse.gif", "ddim.png", "guided.png"]
FIGURES = ["figures/" + name for name in FIGURES]
FIGURES += ["figures/ddim_#.png"]  # earlier versions wrote one for each number of steps
# The files that a run replaces in a folder of an earlier run: all that it writes, apart from checkpoints, evaluations,
# the tracker's files, train_config.json, the card and the pipeline's code.
BEST = ["best/" + name for name in (*PIPELINE, *CLASSIFIER, "class_guided.py", "best.json")]
RUN_FILES = [*PIPELINE, *CLASSIFIER, *BEST]
RUN_FILES += ["metrics.jsonl", "samples/epoch_#.png", "figures/forward.png", *FIGURES]
RUN_FILES += ["ema_snapshots/step_#.safetensors"]
# These files say how the model was trained and how good it is. An export copies them, but not best/.
# figures/forward.png and evaluations/*.png are not here, because they show training images, which the user may not be
# allowed to publish.
RECORDS = ["train_config.json", "metrics.jsonl", "samples/epoch_#.png", "evaluations/*.json", *FIGURES]
# Only these files are published. Checkpoints, the tracker's logs and the user's own files are not.
PUBLISHED = [*PIPELINE, *CODE, *CLASSIFIER, "README.md", *RECORDS]
PUBLISHED += ["best/" + name for name in (*PIPELINE, *CODE, *CLASSIFIER)]
