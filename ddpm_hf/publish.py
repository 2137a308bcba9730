"""`push` and `push-space`: a finished model, and a page that shows it, on the Hub."""

import shutil
import tempfile
from pathlib import Path

from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

from . import UserError
from .card import check_has_model, write_card
from .hub import API, create_repository, finish_push, is_hub_id, persist, push, reason
from .saving import shipped


SUFFIXES = [".py", ".md", ".txt", ".css", ".html", ".js"]  # what a Space is made of


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


def push_space_command(arguments):
    """Run `python -m ddpm_hf push-space` with its parsed flags: upload spaces/ and pipelines/, naming the model.

    Raises:
        UserError: for a model that is not on the Hub, a Space that cannot be written to, or an upload that failed.
    """
    model, token = arguments.model, arguments.hub_token
    if not is_hub_id(model):
        raise UserError(f"{model} is no Hub id, and a Space cannot see this disk: push it first, give USER/NAME.")
    try:
        found = API.file_exists(model, "model_index.json", token=token)
    except (HTTPError, OfflineModeIsEnabled) as error:
        raise UserError(f"{API.endpoint} does not answer ({reason(error)}): check the network.") from None
    if not found:
        raise UserError(f"{model} is no pipeline on {API.endpoint}, or not for you to see: push it first.")
    name = arguments.hub_model_id or f"{model.rpartition('/')[2]}-demo"
    private = arguments.hub_private_repo
    space_id = create_repository(name, private, token, repo_type="space", space_sdk="gradio")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "pipelines").mkdir()
        for path in shipped("pipelines").glob("*.py"):
            shutil.copyfile(path, Path(folder, "pipelines", path.name))
        for path in shipped("spaces").rglob("*"):
            if path.suffix in SUFFIXES:
                target = Path(folder, path.relative_to(shipped("spaces")))
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)
        card = Path(folder, "README.md")
        card.write_text(card.read_text().replace("\n---\n", f"\nmodels:\n- {model}\n---\n", 1))

        def upload():
            API.add_space_variable(space_id, "DDPM_MODEL", model, token=token)
            API.upload_folder(
                repo_id=space_id, repo_type="space", folder_path=folder, token=token, commit_message=f"Show {model}"
            )

        if not persist(upload, space_id, f"`python -m ddpm_hf push-space {model}` tries again"):
            raise UserError(f"the Space {space_id} is not up to date: see the warning above, then push again.")
    print(f"The Space is on {API.endpoint}/spaces/{space_id}.")
    print(f"If {model} is private, give the Space a secret HF_TOKEN that may read it, in its settings.")
