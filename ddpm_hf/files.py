"""Write files completely or not at all. Read JSON files and check their type."""

import contextlib
import json
import shutil
from pathlib import Path

from safetensors import SafetensorError

from .errors import UserError


@contextlib.contextmanager
def writing(what: str, path, *, also: tuple = ()):
    """Turn the errors of a full disk or a read-only folder into a UserError, inside a `with` block that writes.

    Args:
        also: more exceptions that mean a failed write. torch.save raises a bare RuntimeError, whose text differs
            between versions, so a block that calls it, and computes nothing, gives RuntimeError.
    """
    try:
        yield
    except (OSError, SafetensorError, *also) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"{what} could not be written to {path} ({reason}): free some space or allow writing."
        ) from error


def is_utf_8(path: Path) -> bool:
    """Return whether a path is valid UTF-8. Linux allows any bytes, but safetensors loads only from such paths."""
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def write_beside(path: Path, write):
    """Call `write(temporary path)`, then rename that file to `path`. A kill thus leaves no incomplete `path`."""
    partial = path.with_name(f".{path.name}.tmp")
    write(partial)
    partial.replace(path)


def remove(path: Path):
    """Remove a file, a link, or a folder with its content, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read_json(path: Path, *, like: type = dict, missing=None):
    """Return the content of a JSON file. If there is no such file, return `missing`, if that is given.

    Raises:
        UserError: for a file that cannot be read, or whose content is not of the type `like` (dict or list).
    """
    if missing is not None and not path.is_file():
        return missing
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): give a complete JSON file.") from error
    if not isinstance(content, like):
        raise UserError(f"{path} contains a JSON {type(content).__name__}, not a {like.__name__}: give another file.")
    return content


def write_json(path: Path, content):
    """Write JSON with an indent of two spaces, completely or not at all."""
    write_beside(path, lambda partial: partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8"))


def write_npz(path: Path, **arrays):
    """Write arrays as .npz, completely or not at all."""
    import numpy as np  # imported here, because `--help` needs this file and no arrays

    def save(partial):
        with open(partial, "wb") as file:  # numpy would append .npz to a name
            np.savez(file, **arrays)

    write_beside(path, save)
