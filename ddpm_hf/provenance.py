"""What a run was: every flag, the versions, the data and the commit, kept in train_config.json."""

import json
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path, PurePosixPath, PureWindowsPath

from . import __version__


PACKAGES = ["ddpm_hf", "torch", "diffusers", "accelerate", "datasets", "transformers", "numpy", "pillow"]


def program() -> str:
    """Return how to start a command of the package, as this process was: `python -m ddpm_hf`, else `ddpm_hf`."""
    return "python -m ddpm_hf" if Path(sys.argv[0]).parts[-2:] == ("ddpm_hf", "__main__.py") else "ddpm_hf"


def command() -> str:
    """Return the command line of this process as one may show it to anybody: no token, no path of this machine."""
    script = Path(sys.argv[0])
    ours = script.stem == "ddpm_hf" or script.parts[-2:] == ("ddpm_hf", "__main__.py")
    name = program() if ours else f"python {script.name}"
    return f"{name} {shlex.join(without_paths(without_token(sys.argv[1:])))}".strip()


def version(package: str) -> str:
    """Return the version of an installed package; ours is known where it is not installed, too."""
    return __version__ if package == "ddpm_hf" else metadata.version(package)


def without_paths(value):
    """Return JSON, or arguments, with absolute paths, and those that begin with `..` or `~`, cut to the last part."""
    if isinstance(value, dict):
        return {key: without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_paths(inner) for inner in value]
    if not isinstance(value, str):
        return value
    flag, equals, path = value.partition("=") if value.startswith("--") else ("", "", value)
    absolute = PurePosixPath(path).is_absolute() or PureWindowsPath(path).is_absolute()
    away = absolute or path.startswith(("~", "..", "./.."))
    return flag + equals + PureWindowsPath(path).name if away else value


def hide_paths(folder: Path):
    """Rewrite a folder's train_config.json, if it has one, as one may show it to anybody."""
    path = folder / "train_config.json"
    if path.exists():
        record = without_paths(json.loads(path.read_text(encoding="utf-8")))
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def without_token(words: list[str]) -> list[str]:
    """Return the command line with the value of --hub_token blotted out."""
    shown, hide = [], False
    for word in words:
        name, equals, _ = word.partition("=")
        is_token = name in ("--hub_token", "--hub-token")
        shown.append("***" if hide else f"{name}=***" if is_token and equals else word)
        hide = is_token and not equals
    return shown


def git_commit() -> str | None:
    """Return the commit of the source tree that has this package, or None outside one or without git."""

    def git(*words):
        answer = subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
        return answer.stdout.strip() if answer.returncode == 0 else ""

    try:
        # An installed package may lie in somebody else's repository, which does not track it.
        return git("rev-parse", "HEAD") or None if git("ls-files", Path(__file__).name) else None
    except OSError:
        return None
