"""What a run was: every flag, the versions, the data and the commit, kept in train_config.json."""

import json
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path, PurePosixPath, PureWindowsPath

from .checkpoints import writing


PACKAGES = ["ddpm_hf", "torch", "diffusers", "accelerate", "datasets", "transformers", "numpy", "pillow"]


def describe(run) -> dict:
    """Return the facts of a Run before its first step, with a "summary" for people."""
    config, accelerator, data = run.config, run.accelerator, run.train_set
    parameters = sum(parameter.numel() for parameter in run.network.parameters())
    held_out = 0 if run.validation_set is None else run.validation_set.num_images
    images = "a stream of" if data.num_images is None else f"{data.num_images:,}"
    summary = (
        f"{images} images of {data.resolution}x{data.resolution}x{data.channels} ({held_out:,} held out), "
        f"{parameters / 1e6:.1f} M parameters, {run.total_steps:,} steps of {run.global_batch} images = "
        f"{run.total_steps * run.global_batch / run.num_images:.1f} epochs, on {accelerator.num_processes} x "
        f"{accelerator.device.type}, mixed precision {config.mixed_precision}"
    )
    return {
        "summary": summary,
        "command": command(),
        "parameters": parameters,
        "num_images": data.num_images,
        "num_validation_images": held_out,
        "channels": data.channels,
        "class_names": data.class_names,
        "data_fingerprint": data.fingerprint,
        "global_batch_size": run.global_batch,
        "total_steps": run.total_steps,
        "num_processes": accelerator.num_processes,
        "device": accelerator.device.type,
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "git_commit": git_commit(),
    }


def write_record(run):
    """Write train_config.json: {"flags": ..., and the facts}. The token is in neither."""
    path = Path(run.config.output_dir) / "train_config.json"
    with writing("train_config.json", path):
        partial = path.with_suffix(".tmp")
        partial.write_text(json.dumps({"flags": run.config.to_dict(), **run.facts}, indent=2) + "\n")
        partial.replace(path)


def command() -> str:
    """Return the command line of this process as one may show it to anybody: no token, no path of this machine."""
    program = Path(sys.argv[0])
    name = "-m ddpm_hf" if program.name == "__main__.py" else program.name
    return " ".join(["python", name, shlex.join(without_paths(without_token(sys.argv[1:])))]).strip()


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


def without_token(arguments: list[str]) -> list[str]:
    """Return the command line with the value of --hub_token blotted out."""
    shown, hide = [], False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        is_token = name in ("--hub_token", "--hub-token")
        shown.append("***" if hide else f"{name}=***" if is_token and equals else argument)
        hide = is_token and not equals
    return shown


def git_commit() -> str | None:
    """Return the commit of the source tree that has this package, or None outside one or without git."""

    def git(*arguments):
        answer = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
        return answer.stdout.strip() if answer.returncode == 0 else ""

    try:
        # An installed package may lie in somebody else's repository, which does not track it.
        return git("rev-parse", "HEAD") or None if git("ls-files", Path(__file__).name) else None
    except OSError:
        return None
