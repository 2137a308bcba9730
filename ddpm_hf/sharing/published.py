"""Copy the files of a run or an export that may be published, without access tokens and paths of this machine."""

import logging
import mmap
import re
import shutil
from pathlib import Path

from huggingface_hub import get_token

from ..errors import UserError
from ..evaluation.records import is_record
from ..files import read_json
from ..provenance import hide_paths
from ..run_folder import CLASSIFIER, PIPELINE, files_in


logger = logging.getLogger(__name__)
TOKEN = rb"hf_[A-Za-z0-9]{30,}"


def copy_published(folder: Path, target: Path, patterns: list[str], token: str | None = None):
    """Copy the files of `folder` that match `patterns` to `target`, an existing folder; see `files_in`.

    A file that holds an access token, or a JSON file that cannot be read, is left out with a warning. A JSON file in
    `evaluations` is left out if it is not a record. The copies contain no paths of this machine.

    Args:
        token: a token to look for, besides the token of `hf auth login` and any text that looks like a token.
    """
    tokens = [each.encode() for each in (token, get_token()) if each]
    for source in files_in(folder, patterns):
        if holds_token(source, tokens):
            logger.warning("%s holds an access token and is not published: remove the token from it.", source)
        elif is_ours(source):
            copy = target / source.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)
    hide_paths(target)


def check_weights(folder: Path):
    """Raise a UserError if a folder has no weights that can be published, e.g. because its `unet` is a link."""
    if not any(path.suffix == ".safetensors" for path in files_in(folder, [*PIPELINE, *CLASSIFIER])):
        raise UserError(
            f"{folder} has no weights to push (no .safetensors file in unet or classifier; links are not followed): "
            "put the files themselves there, e.g. with `cp -rL`."
        )


def holds_token(path: Path, tokens: list[bytes]) -> bool:
    """Return whether the bytes of a file contain one of the tokens, or text that looks like a Hub token."""
    if path.stat().st_size == 0:
        return False  # an empty file cannot be mapped
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return any(content.find(token) >= 0 for token in tokens) or re.search(TOKEN, content) is not None


def is_ours(path: Path) -> bool:
    """Return whether a file may be published.

    A JSON file that cannot be read may not be published, and a warning names it. In `evaluations`, a JSON file must
    be a record.
    """
    if path.suffix != ".json":
        return True
    try:
        content = read_json(path)
    except UserError as error:
        logger.warning("Not published: %s", error)
        return False
    return path.parent.name != "evaluations" or is_record(content)
