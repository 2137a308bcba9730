"""Write files completely or not at all. Read JSON files and check their type."""

import contextlib
import errno
import json
import math
import os
import shutil
import stat
import tempfile
import zipfile
from pathlib import Path

from safetensors import SafetensorError

from .errors import UserError, reason_of


MAX_NAME = 230  # bytes; file systems allow 255, and we add suffixes such as .sheet.png and .tmp
MAX_UNPACKED = 100  # largest ratio of unpacked to packed size; images and features stay below 20, zeros reach 1,000
MAX_JSON_BYTES = 16_000_000
MAX_DIGITS = 40  # of a whole number in JSON; seeds have up to 20
MAX_JSON_DEPTH = 64  # files of ddpm_hf and configs of diffusers are nested only a few levels deep
# What to do if writing fails for a reason other than a full disk or a missing permission.
ADVICE = dict.fromkeys(
    [errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.ELOOP, errno.ENAMETOOLONG], "give another path"
)
ADVICE |= dict.fromkeys([errno.EEXIST, errno.ENOTEMPTY], "remove what is there, or give another path")
TOO_DEEP = f"it is nested more than {MAX_JSON_DEPTH} levels deep"


@contextlib.contextmanager
def writing(what: str, path, *, also: tuple = ()):
    """In a `with` block that writes, turn the errors of a full disk or a read-only folder into a UserError.

    Args:
        also: more exceptions that mean that writing failed. For torch.save, this is RuntimeError. A block with
            RuntimeError in `also` must not compute, because a computation can raise RuntimeError too.
    """
    try:
        yield
    except (OSError, SafetensorError, *also) as error:
        advice = ADVICE.get(getattr(error, "errno", None), "free some space or allow writing")
        raise UserError(f"{what} could not be written to {path} ({reason_of(error)}): {advice}.") from error


def is_utf_8(path: Path) -> bool:
    """Return whether a path is valid UTF-8, as safetensors needs it. Linux allows any bytes."""
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def write_beside(path: Path, write):
    """Call `write(temporary path)`, then rename that file to `path`. A kill thus leaves no incomplete `path`.

    If writing fails, e.g. because the disk is full, the temporary file is removed.
    """
    partial = path.with_name(f".{path.name}.tmp")
    try:
        # Writing to a link would overwrite another file, and opening a pipe would wait for ever.
        if os.path.lexists(partial) and not stat.S_ISREG(partial.lstat().st_mode):
            partial.unlink()
        write(partial)
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def check_output(flag: str, given: str | Path) -> Path:
    """Return the path that an output flag gives, after checking that it can be written. Nothing is written.

    Raises:
        UserError: for a path without a name (`.` or `/`), a name that is too long, a link to a file that does not
            exist, or a folder that is not writable.
    """
    path = Path(given)
    if path.name in ("", "..") or "\0" in str(path):
        raise UserError(f"{flag} is {str(given)!r}, which does not name a file or folder: give a name.")
    if len(os.fsencode(path.name)) > MAX_NAME or any(len(os.fsencode(part)) > 255 for part in path.parts):
        raise UserError(f"{flag} has a name of more than {MAX_NAME} bytes: give a shorter name.")
    if path.is_symlink() and not path.exists():
        raise UserError(
            f"{flag} is {given}, a link to a file that does not exist: remove the link, or give another path."
        )
    parent = next(parent for parent in Path(os.path.abspath(path)).parents if os.path.lexists(parent))
    if not os.path.isdir(parent) or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{flag} is {given}, but nothing can be written in {parent}: give another path.")
    return path


def check_new_output(flag: str, given: str | Path) -> Path:
    """Return the path of a new folder, checked as in `check_output`. Raise a UserError if the path exists already."""
    path = check_output(flag, given)
    if os.path.lexists(path):
        raise UserError(f"{path} already exists: give another folder, or remove this one.")
    return path


@contextlib.contextmanager
def new_folder(path: Path):
    """Give a `with` block an empty folder to fill. After the block, rename this folder to `path`.

    If the block fails, the folder is removed instead. Until then it is next to `path` under a random name, so that it
    cannot be a folder of the user.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as temporary:
        new = Path(temporary, path.name)  # a subfolder, because only the owner may read `temporary`
        new.mkdir()
        yield new
        new.rename(path)


def remove(path: Path):
    """Remove a file, a link, or a folder with its content, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read_json(path: Path, *, missing: dict | None = None) -> dict:
    """Return the JSON object in a file. If the file does not exist and `missing` is given, return `missing`.

    Raises:
        UserError: if the file cannot be read, is too large, holds something else, or is refused by `parse_json`.
    """
    if missing is not None and not path.exists():
        return missing
    try:
        if path.exists() and not path.is_file():  # reading a pipe or a device could wait forever
            raise ValueError("it is not a regular file")
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"it is larger than {MAX_JSON_BYTES // 10**6} MB")
        content = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): give a complete JSON file.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} contains a JSON {type(content).__name__}, not a dict: give another file.")
    return content


def parse_json(text: str):
    """Return the content of a JSON text from an untrusted source.

    Raises:
        ValueError: for text that is not JSON, is nested more than MAX_JSON_DEPTH levels deep, or has a whole number
            of more than MAX_DIGITS digits. Also for a string with half of a surrogate pair, because such a string
            cannot be written to a file.
    """
    try:
        content = json.loads(text, parse_int=_whole_number)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    level = [content]
    for _ in range(MAX_JSON_DEPTH):
        inner = []
        for value in level:
            if isinstance(value, dict):
                inner += [*value, *value.values()]
            elif isinstance(value, list):
                inner += value
            elif isinstance(value, str):
                value.encode()  # raises UnicodeEncodeError, a ValueError, for half of a surrogate pair
        if not inner:
            return content
        level = inner
    raise ValueError(TOO_DEEP)


def _whole_number(text: str) -> int:
    """Return a whole number of a JSON text. Raise a ValueError if it has more than MAX_DIGITS digits.

    Adding a float to a number of hundreds of digits would fail.
    """
    if len(text) > MAX_DIGITS:
        raise ValueError(f"it has a whole number of more than {MAX_DIGITS} digits")
    return int(text)


def write_json(path: Path, content):
    """Write JSON with an indent of two spaces, completely or not at all."""
    write_beside(path, lambda partial: partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8"))


def read_npz(path: Path, choose, advice: str) -> dict:
    """Return a dict of the arrays of an .npz that `choose` selects by name. Refuse pickles and decompression bombs.

    Args:
        choose: a function that takes the list of all names and returns the names to read.
        advice: what to do if the file cannot be read.

    Raises:
        UserError: if the file cannot be read, or unpacks to more than MAX_UNPACKED times its size.
    """
    import numpy as np  # imported here to keep `--help` fast

    try:
        if not path.is_file():  # reading a pipe or a device could wait forever
            raise ValueError("it is not a file")
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            names = choose(list(members))
            for name in names:
                _check_member(archive, members[name])
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in names}
    except Exception as error:  # a broken file may raise anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path} cannot be read as .npz ({reason}): {advice}.") from error


def _check_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo):
    """Raise a ValueError if an array in an .npz has another size than its header says, or is a decompression bomb."""
    if member.file_size > max(MAX_UNPACKED * member.compress_size, 100_000_000):
        raise ValueError(f"{member.filename} unpacks to more than {MAX_UNPACKED} times its size")
    with archive.open(member) as file:
        check_npy(file, member.file_size, member.filename)


def check_npy(file, size: int, name: str = "it"):
    """Raise a ValueError if a .npy file of `size` bytes has another size than its header says, or holds objects.

    Otherwise a small file could claim an array that does not fit into memory.
    """
    import numpy as np

    file.seek(0)
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(file)
    if dtype.hasobject:
        raise ValueError(f"{name} holds Python objects, not numbers")
    if file.tell() + math.prod(shape) * dtype.itemsize != size:
        raise ValueError(f"{name} does not have the size that its header says")


def write_npz(path: Path, **arrays):
    """Write arrays as .npz, completely or not at all."""
    import numpy as np  # imported here to keep `--help` fast

    def save(partial):
        with open(partial, "wb") as file:  # given a name, numpy would append .npz
            np.savez(file, **arrays)

    write_beside(path, save)
