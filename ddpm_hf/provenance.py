"""Record where a result comes from: the command line, the versions and the commit, without tokens and local paths."""

import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path, PurePosixPath, PureWindowsPath

from . import __version__
from .files import read_json, write_json


PACKAGES = ["ddpm_hf", "torch", "diffusers", "accelerate", "datasets", "transformers", "numpy", "pillow"]


def program() -> str:
    """Return how this program was started: `python -m ddpm_hf` or `ddpm_hf`."""
    return "python -m ddpm_hf" if Path(sys.argv[0]).parts[-2:] == ("ddpm_hf", "__main__.py") else "ddpm_hf"


def command() -> str:
    """Return the command line of this process without tokens and local paths, so that it can be published."""
    script = Path(sys.argv[0])
    ours = script.stem == "ddpm_hf" or script.parts[-2:] == ("ddpm_hf", "__main__.py")
    name = program() if ours else f"python {script.name}"
    return f"{name} {shlex.join(without_paths(without_token(sys.argv[1:])))}".strip()


def version(package: str) -> str:
    """Return the version of an installed package, or of `ddpm_hf`, which need not be installed."""
    return __version__ if package == "ddpm_hf" else metadata.version(package)


def without_paths(value):
    """Return JSON values or arguments in which each local path is cut to its last part, the file name.

    A local path is absolute, or begins with `..` or `~`.
    """
    if isinstance(value, dict):
        # Names of classes may look like paths: those of OpenImages are like /m/0199g.
        return {key: inner if key == "class_names" else without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_paths(inner) for inner in value]
    if not isinstance(value, str):
        return value
    flag, equals, path = value.partition("=") if value.startswith("--") else ("", "", value)
    absolute = PurePosixPath(path).is_absolute() or PureWindowsPath(path).is_absolute()
    is_local = absolute or path.startswith(("~", "..", "./.."))
    return flag + equals + PureWindowsPath(path).name if is_local else value


def hide_paths(folder: Path):
    """Remove the paths of this machine from the JSON files of a folder and of the folders in it."""
    for path in folder.rglob("*.json"):
        content = read_json(path)
        # Leave out _name_or_path, in which diffusers stores where a network was loaded from.
        shown = {key: value for key, value in content.items() if key != "_name_or_path"}
        if path.name == "train_config.json":
            shown = without_paths(shown)
        if shown != content:
            write_json(path, shown)


def without_token(words: list[str]) -> list[str]:
    """Return the words of a command line with the value of --hub_token replaced by `***`."""
    shown = []
    hide = False
    for word in words:
        name, equals, _ = word.partition("=")
        is_token = name in ("--hub_token", "--hub-token")
        shown.append("***" if hide else f"{name}=***" if is_token and equals else word)
        hide = is_token and not equals
    return shown


def git_commit() -> str | None:
    """Return the commit of this package's source tree; None if the package is installed or git is missing."""

    def git(*words):
        answer = subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
        return answer.stdout.strip() if answer.returncode == 0 else ""

    try:
        # Check that git tracks this file, because an installed package may be inside another repository.
        return git("rev-parse", "HEAD") or None if git("ls-files", Path(__file__).name) else None
    except OSError:
        return None
