"""A run or an export, published on the Hub with its card."""

import logging
from pathlib import Path

from ..errors import UserError
from .card import check_has_model, write_card
from .hub import API, create_repository, finish_push, push


logger = logging.getLogger(__name__)


def publish(folder: str | Path, name: str | None = None, *, private: bool = False, token: str | None = None) -> str:
    """Write the card of a run or an export again and upload what changed; return the address of the repository.

    Args:
        folder: the --output_dir of a run, or an export.
        name: of the repository, NAME or USER/NAME; by default the folder's.
        private: create it private; a repository that exists must be private then.
        token: to push with; by default that of `hf auth login`.

    Raises:
        UserError: for a folder that has no model, a repository that cannot be written to, or an upload that failed.

    Example:
        >>> ddpm_hf.push("runs/digits", "me/ddpm-digits")
        'https://huggingface.co/me/ddpm-digits'
    """
    folder = Path(folder)
    check_has_model(folder)
    repo_id = create_repository(name or folder.resolve().name, private, token)
    if not write_card(folder, repo_id):
        logger.warning("%s was not written by ddpm_hf and is pushed as it is.", folder / "README.md")
    if not finish_push(push(folder, repo_id, token, "Upload by ddpm_hf")):
        raise UserError(f"nothing new is on {repo_id}: see the warning above, then push again.")
    return f"{API.endpoint}/{repo_id}"
