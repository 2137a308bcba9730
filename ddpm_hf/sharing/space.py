"""Publish the demo of a model as a Gradio Space on the Hub."""

import shutil
import tempfile
from pathlib import Path

from .. import hub_requests
from ..community_pipelines import shipped
from ..errors import UserError
from ..hub_requests import API, HUB_ERRORS, ask_hub, short_reason, transfer_seconds
from ..models import judge
from .card_usage import PIPELINES
from .hub import create_repository, is_hub_id, retry


# The files of spaces/ to upload. A list, because a clone may hold other files beside them.
SPACE = ["README.md", "app.py", "checks.py", "compare.html", "compare.js", "connections.py", "images.py", "model.py"]
SPACE += ["page.css", "requirements.txt", "sketch.html", "sketch.js", "uploads.py", "widgets.py", "tabs/__init__.py"]
SPACE += ["tabs/compare.py", "tabs/generate.py", "tabs/how_it_works.py", "tabs/restore.py"]


def push_space(model: str, name: str | None = None, *, private: bool = False, token: str | None = None) -> str:
    """Upload spaces/ and pipelines/ as a Space with a demo of a model on the Hub. Return the Space's URL.

    Args:
        model: the model's Hub id, e.g. "me/ddpm-mnist".
        name: the Space's name, as NAME or USER/NAME. None: the model's name followed by -demo.
        private: create the Space as private. If it exists, it must be private already.
        token: an access token of the Hub. None: the token of `hf auth login`.

    Raises:
        UserError: for a model that is not on the Hub, a Space that cannot be written to, or an upload that failed.
    """
    if not is_hub_id(model):
        raise UserError(
            f"{model} is not a Hub id, and a Space cannot see this disk: push the model first, then give USER/NAME."
        )
    try:
        found = ask_hub(lambda: API.file_exists(model, "model_index.json", token=token))
    except HUB_ERRORS as error:
        raise UserError(f"{API.endpoint} does not answer ({short_reason(error)}): check the network.") from None
    if not found:
        raise UserError(
            f"{model} is not a pipeline on {API.endpoint}, or your token cannot read it: push it first, or log in."
        )
    name = name or f"{model.rpartition('/')[2]}-demo"
    with tempfile.TemporaryDirectory() as folder:
        write_space(Path(folder), model)
        space_id = create_repository(name, private, token, repo_type="space", space_sdk="gradio")

        def upload():
            API.add_space_variable(space_id, "DDPM_MODEL", model, token=token)
            API.upload_folder(
                repo_id=space_id, repo_type="space", folder_path=folder, token=token, commit_message=f"Show {model}"
            )

        seconds = transfer_seconds(0)  # the files are small
        again = f"push it again with `python -m ddpm_hf push-space {model}`"
        if not retry(lambda: ask_hub(upload, seconds), space_id, again):
            raise UserError(f"the Space {space_id} is not up to date: see the warning above, then push again.")
    return f"{API.endpoint}/spaces/{space_id}"


def write_space(folder: Path, model: str):
    """Write the files of the Space that shows `model` into an empty folder."""
    for part in ("pipelines", "tabs"):
        (folder / part).mkdir()
    for name in PIPELINES:
        shutil.copyfile(shipped("pipelines") / f"{name}.py", folder / "pipelines" / f"{name}.py")
    for name in SPACE:
        shutil.copyfile(shipped("spaces") / name, folder / name)
    for module in (judge, hub_requests):
        shutil.copyfile(module.__file__, folder / Path(module.__file__).name)
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8").replace("\n---\n", f"\nmodels:\n- {model}\n---\n", 1)
    card.write_text(text, encoding="utf-8")
