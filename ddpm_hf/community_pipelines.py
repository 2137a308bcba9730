"""Where the files of pipelines/ and spaces/ are: inside an installed package, beside it in a source tree."""

from pathlib import Path


def shipped(folder: str) -> Path:
    """Return our folder `pipelines` or `spaces`, which a wheel has inside the package and a source tree beside it."""
    here = Path(__file__).parent
    return here / folder if (here / folder).is_dir() else here.parent / folder


def pipeline_file(name: str) -> Path:
    """Return the file of our community pipeline `name`, e.g. "restoration"."""
    return shipped("pipelines") / f"{name}.py"
