"""Keep visitors' uploads in a folder of their own, open no other file, and limit the uploads in number and size."""

import contextlib
import os
import stat
import tempfile
from pathlib import Path
from typing import BinaryIO

from checks import Refused


MAX_KEPT = 100_000_000  # bytes of all uploads and zips together
MAX_FILES = 1_000
NOT_AN_UPLOAD = "This is not an image that was uploaded here in the last half hour: upload it again."
OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def make_folder() -> Path:
    """Create a new folder, which gradio will use for uploads and zips. Call it before gradio is imported."""
    folder = Path(tempfile.mkdtemp(prefix="ddpm-space-", dir=os.environ.get("GRADIO_TEMP_DIR"))).resolve()
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    return folder


def open_upload(upload) -> BinaryIO:
    """Open the file that a visitor uploaded. `upload` is {"path": ...}, as the page and gradio_client send it.

    Gradio stores an upload as FOLDER/HASH/NAME. The hash depends on a secret, so only a visitor who uploaded a file,
    or was given its path, knows the path.

    Raises:
        Refused: for anything else, such as another file of this machine, a link or a device. It is not opened.
    """
    path = upload.get("path") if isinstance(upload, dict) else None
    if path is None:
        raise Refused("No image is uploaded yet: upload one, or choose another source.")
    try:
        if not _is_upload(path):
            raise Refused(NOT_AN_UPLOAD)
        file = os.fdopen(os.open(path, OPEN_FLAGS), "rb")
    except (OSError, ValueError) as error:  # it was deleted, or its name has a NUL or is too long
        raise Refused(NOT_AN_UPLOAD) from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # it was replaced since it was checked
        file.close()
        raise Refused(NOT_AN_UPLOAD)
    return file


def _is_upload(path) -> bool:
    """Return whether a path is FOLDER/HASH/NAME, without links and `..`, and a regular file. Nothing is opened."""
    if not isinstance(path, str) or os.path.realpath(path) != path:
        return False
    folder = os.environ["GRADIO_TEMP_DIR"]
    return os.path.dirname(os.path.dirname(path)) == folder and stat.S_ISREG(os.lstat(path).st_mode)


def delete_oldest(folder: Path):
    """Delete the oldest files below the folder of uploads until at most MAX_KEPT bytes in MAX_FILES files are left."""
    files = []
    for place, _, names in os.walk(folder):
        for path in (Path(place, name) for name in names):
            with contextlib.suppress(FileNotFoundError):  # gradio and other requests delete files too
                about = path.lstat()
                files.append((about.st_mtime, about.st_size, path))
    kept, count = sum(size for _, size, _ in files), len(files)
    for _, size, path in sorted(files):
        if kept <= MAX_KEPT and count <= MAX_FILES:
            break
        path.unlink(missing_ok=True)
        kept, count = kept - size, count - 1
        if path.parent != folder:
            with contextlib.suppress(OSError):  # it has other files
                path.parent.rmdir()
