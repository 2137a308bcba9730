"""List the files of a checkpoint with their sizes and hashes, so that damage and mix-ups are noticed.

The file manifest.json is written last. Checkpoints of earlier versions have no manifest. In these, damage is noticed
only if a file is missing or cannot be read.
"""

import contextlib
import hashlib
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from .errors import UserError, reason_of
from .files import read_json, write_json


MANIFEST = "manifest.json"


def write_manifest(folder: Path, step: int):
    """Write the manifest of a checkpoint: its optimizer step, and the size and SHA-256 of each file in `folder`."""
    names = sorted(path.name for path in folder.iterdir())
    with ThreadPoolExecutor() as pool:  # hashing releases the GIL
        hashes = list(pool.map(lambda name: file_hash(folder / name), names))
    sizes = [(folder / name).stat().st_size for name in names]
    files = {name: {"size": size, "sha256": digest} for name, size, digest in zip(names, sizes, hashes)}
    write_json(folder / MANIFEST, {"step": step, "files": files})


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(checkpoint: Path) -> dict | None:
    """Return the manifest of a checkpoint, or None if an earlier version wrote the checkpoint.

    Raises:
        UserError: if the manifest is damaged.
    """
    if not (checkpoint / MANIFEST).exists():
        return None
    manifest = read_json(checkpoint / MANIFEST)
    step, files = manifest.get("step"), manifest.get("files")
    if not isinstance(step, int) or not isinstance(files, dict) or not all(map(_is_entry, files.items())):
        raise damaged(checkpoint, f"{MANIFEST} does not have a step and files")
    return manifest


def _is_entry(item: tuple) -> bool:
    name, entry = item
    is_name = re.fullmatch(r"[\w-][\w.-]*", name) is not None
    return is_name and isinstance(entry, dict) and isinstance(entry.get("size"), int) and "sha256" in entry


def is_complete(checkpoint: Path) -> bool:
    """Return whether a checkpoint has all its files. If it has a manifest, the sizes of the files are checked too."""
    needed = ("state.pt", "model.safetensors", "optimizer.bin")
    # Earlier versions removed a checkpoint file by file, so a kill could leave a part of it.
    if not all((checkpoint / name).is_file() for name in needed):
        return False
    try:
        manifest = read_manifest(checkpoint)
    except UserError:
        return False
    return manifest is None or not any(wrong_sizes(checkpoint, manifest))


def wrong_sizes(checkpoint: Path, manifest: dict):
    """Yield a reason for each file in a manifest that is missing or has another size."""
    for name, entry in manifest["files"].items():
        size = (checkpoint / name).stat().st_size if (checkpoint / name).is_file() else None
        if size != entry["size"]:
            yield f"{name} is missing" if size is None else f"{name} has {size} bytes instead of {entry['size']}"


def check_files(checkpoint: Path, names: list[str] | None = None):
    """Raise a UserError if a checkpoint does not match its manifest. Without a manifest, check nothing.

    Args:
        names: the files whose hashes are checked. None: all files.

    Raises:
        UserError: if a file is missing or is not the one that was saved, or if the checkpoint was renamed.
    """
    manifest = read_manifest(checkpoint)
    if manifest is None:
        return
    if checkpoint.name != f"checkpoint-{manifest['step']}":
        raise UserError(
            f"{checkpoint} holds step {manifest['step']}: rename it to checkpoint-{manifest['step']}, or give another."
        )
    for reason in wrong_sizes(checkpoint, manifest):
        raise damaged(checkpoint, reason)
    for name in names or manifest["files"]:
        if name not in manifest["files"]:
            raise damaged(checkpoint, f"{name} is not in its {MANIFEST}")
        if file_hash(checkpoint / name) != manifest["files"][name]["sha256"]:
            raise damaged(checkpoint, f"{name} has another hash than the file that was saved")


def damaged(checkpoint: Path, reason: str) -> UserError:
    """Return the error of a damaged checkpoint."""
    return UserError(f"{checkpoint} is damaged ({reason}): remove it and take an earlier one.")


@contextlib.contextmanager
def reading(checkpoint: Path):
    """In a `with` block that reads a checkpoint, turn every error into a UserError, except if memory ran out.

    Damaged files, and files of other programs, raise too many kinds of errors to list them.
    """
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise damaged(checkpoint, reason_of(error)) from error
