"""Where the files of pipelines/ and spaces/ are: inside an installed package, beside it in a source tree."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def shipped(folder: str) -> Path:
    """Return our folder `pipelines` or `spaces`, which a wheel has inside the package and a source tree beside it."""
    here = Path(__file__).parent
    return here / folder if (here / folder).is_dir() else here.parent / folder


def pipeline_file(name: str) -> Path:
    """Return the file of our community pipeline `name`, e.g. "restoration"."""
    return shipped("pipelines") / f"{name}.py"


def pipeline_module(name: str) -> ModuleType:
    """Return the module of our community pipeline `name`, loaded once: rows added to its tables stay."""
    known_as = f"{__package__}_pipeline_{name}"
    if known_as not in sys.modules:
        spec = importlib.util.spec_from_file_location(known_as, pipeline_file(name))
        module = importlib.util.module_from_spec(spec)
        sys.modules[known_as] = module
        spec.loader.exec_module(module)
    return sys.modules[known_as]
