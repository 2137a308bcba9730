"""`ddpm_hf push`."""

from pathlib import Path

from ..errors import UserError
from ..sharing.card import check_has_model, write_card
from ..sharing.hub import API, create_repository, finish_push, push


def push_command(arguments):
    """Run `python -m ddpm_hf push` with its parsed flags: write the card anew and upload what changed.

    Raises:
        UserError: for a folder that has no model, a repository that cannot be written to, or an upload that failed.
    """
    folder = Path(arguments.run)
    check_has_model(folder)
    name = arguments.hub_model_id or folder.resolve().name
    repo_id = create_repository(name, arguments.hub_private_repo, arguments.hub_token)
    if not write_card(folder, repo_id):
        print(f"{folder / 'README.md'} was not written by ddpm_hf and is pushed as it is.")
    if not finish_push(push(folder, repo_id, arguments.hub_token, "Upload by ddpm_hf")):
        raise UserError(f"nothing new is on {repo_id}: see the warning above, then push again.")
    print(f"The model is on {API.endpoint}/{repo_id}.")
