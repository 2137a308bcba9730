"""Files that are written whole or not at all."""

import contextlib
import shutil
from pathlib import Path

from safetensors import SafetensorError

from .errors import UserError


@contextlib.contextmanager
def writing(what: str, path):
    """Turn the several errors of a full disk or a read-only folder into one sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{what} could not be written to {path} ({error}): free some space or allow writing."
        ) from error
    except RuntimeError as error:
        # torch.save reports a failed write as a bare RuntimeError, see pytorch/pytorch#112190.
        if "PytorchStreamWriter" not in str(error) and "iostream" not in str(error):
            raise
        raise UserError(f"{what} could not be written to {path} (disk full?): free some space.") from error


def write_beside(path: Path, write):
    """Call `write` on a name beside `path`, then rename: a kill leaves a whole file or none."""
    partial = path.with_name(f".{path.name}.tmp")
    write(partial)
    partial.replace(path)


def remove(path: Path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
