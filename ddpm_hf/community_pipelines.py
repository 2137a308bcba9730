"""Find and load the files of pipelines/ and spaces/."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def shipped(folder: str) -> Path:
    """Return the path of our folder `pipelines` or `spaces`.

    In an installation it is inside the package; in a source tree it is next to the package.
    """
    here = Path(__file__).parent
    return here / folder if (here / folder).is_dir() else here.parent / folder


def pipeline_file(name: str) -> Path:
    """Return the path of our community pipeline `name`, e.g. "restoration"."""
    return shipped("pipelines") / f"{name}.py"


def pipeline_module(name: str) -> ModuleType:
    """Return the module of our community pipeline `name`.

    The module is loaded only once, so an entry that you add to one of its dicts, e.g. OPERATORS, stays there.
    """
    module_name = f"{__package__}_pipeline_{name}"
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, pipeline_file(name))
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        spec.loader.exec_module(module)
    return sys.modules[module_name]
