"""Push a run or an export to the Hub, with its card."""

import logging
from pathlib import Path

from ..errors import UserError
from .card import check_has_model, checked_text, write_card
from .hub import API, create_repository, push_in_background
from .published import check_weights


logger = logging.getLogger(__name__)


def push(folder: str | Path, name: str | None = None, *, private: bool = False, token: str | None = None) -> str:
    """Write the card of a run or an export again, and upload the files that changed. Return the repository's URL.

    Args:
        folder: the --output_dir of a run, or an export.
        name: the repository's name, as NAME or USER/NAME. None: the folder's name.
        private: create the repository as private. If it exists, it must be private already.
        token: an access token of the Hub. None: the token of `hf auth login`.

    Raises:
        UserError: for a folder without a model, a repository that cannot be written to, or an upload that failed.

    Example:
        >>> ddpm_hf.push("runs/digits", "me/ddpm-digits")
        'https://huggingface.co/me/ddpm-digits'
    """
    folder = Path(folder)
    check_has_model(folder)
    check_weights(folder)
    checked_text(folder)  # raises an error before anything is created on the Hub
    repo_id = create_repository(name or folder.resolve().name, private, token)
    if not write_card(folder, repo_id):
        logger.warning("%s was not written by ddpm_hf and is pushed as it is.", folder / "README.md")
    if not push_in_background(folder, repo_id, token, "Upload by ddpm_hf").result():
        raise UserError(f"nothing was uploaded to {repo_id}: see the warning above, then push again.")
    return f"{API.endpoint}/{repo_id}"
