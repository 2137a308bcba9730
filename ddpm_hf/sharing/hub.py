"""Create repositories on the Hub, and push to them in the background."""

import logging
import re
import tempfile
import threading
import time
from concurrent.futures import Future
from pathlib import Path

from huggingface_hub.errors import HFValidationError

from ..errors import UserError
from ..hub_requests import API, HUB_ERRORS, ask_hub, in_thread, is_denied, is_final, short_reason, transfer_seconds
from ..run_folder import PUBLISHED, files_in
from .published import check_weights, copy_published


logger = logging.getLogger(__name__)
WAITS = (5, 30, 120)  # seconds to wait before each new attempt of a push
LOG_IN = "log in with `hf auth login`, or give a --hub_token with write access to this repository"
PUSHING = threading.Lock()  # held by the push that is uploading, so that pushes reach the Hub one after another


def is_hub_id(name: str) -> bool:
    """Return whether a name has the form USER/NAME, and there is no file or folder of this name here."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None and not Path(name).exists()


def create_repository(name: str, private: bool = False, token: str | None = None, **space) -> str:
    """Create a repository if it does not exist yet. Return its id, e.g. `me/ddpm-cifar10`.

    A run calls this function before its first step. If it cannot push, it fails before the training and not after it.

    Args:
        private: whether the repository must be private. If False, a new one gets the default of its owner on the Hub.
        space: for a Space, the arguments `repo_type` and `space_sdk` of `HfApi.create_repo`.

    Raises:
        UserError: if the Hub cannot be reached or refuses, if the answer is not from the Hub, or if a private
            repository is required and a public one exists.
    """
    kind = {"repo_type": space.get("repo_type")}

    def create() -> tuple[str, bool]:
        # False would ask for a public repository. None asks for the default, which an organisation can set to private.
        repo_id = API.create_repo(name, token=token, private=private or None, exist_ok=True, **space).repo_id
        # Check that the token can write: create_repo does not check it if the repository exists.
        API.auth_check(repo_id, token=token, write=True, **kind)
        return repo_id, API.repo_info(repo_id, token=token, **kind).private

    try:
        repo_id, is_private = ask_hub(create)
    except HFValidationError:
        raise UserError(f"{name!r} cannot name a repository: give --hub_model_id NAME or USER/NAME.") from None
    except HUB_ERRORS as error:
        remedy = LOG_IN if is_denied(error) else "check the network, or push later"
        raise UserError(f"cannot push to {name!r} on {API.endpoint} ({short_reason(error)}): {remedy}.") from None
    if private and is_private is not True:
        raise UserError(f"{repo_id} exists and is public: make it private, or choose another --hub_model_id.")
    return repo_id


def push_in_background(
    output_dir: str | Path, repo_id: str, token: str | None, message: str, *, replaces: "Future[bool] | None" = None
) -> "Future[bool]":
    """Start to upload a run as one commit. Return a future of a bool: True if the upload succeeded.

    The files are copied first by `copy_published`, so that training can go on writing. Files that the Hub already has
    are not sent again. A push that fails is tried again. If the last attempt fails too, this logs a warning and raises
    no error, because a network failure must not end hours of training.

    Args:
        replaces: an earlier push of the same run. If its upload has not begun, the push is cancelled, and its copy of
            the files is removed. So the disk never has more than two copies of the files.
    """
    if replaces is not None:
        replaces.cancel()
    try:
        check_weights(Path(output_dir))
    except UserError as error:
        logger.warning("Nothing was pushed to %s: %s", repo_id, error)
        return in_thread(lambda: False)
    try:
        snapshot = tempfile.TemporaryDirectory(prefix=".push-", dir=output_dir, ignore_cleanup_errors=True)
        copy_published(Path(output_dir), Path(snapshot.name), PUBLISHED, token)
    except OSError as error:
        logger.warning(
            "Nothing was pushed to %s, because the files could not be copied (%s): free some space and push again.",
            repo_id,
            error,
        )
        return in_thread(lambda: False)
    target = {"repo_id": repo_id, "folder_path": snapshot.name, "commit_message": message, "token": token}
    seconds = upload_seconds(output_dir)

    def push() -> bool:
        with snapshot:
            return retry(
                lambda: ask_hub(lambda: API.upload_folder(**target), seconds),
                repo_id,
                push_again(output_dir, repo_id),
            )

    pushing = in_thread(push, PUSHING)
    pushing.add_done_callback(lambda done: snapshot.cleanup() if done.cancelled() else None)
    return pushing


def upload_seconds(output_dir: str | Path) -> float:
    """Return how many seconds one attempt to upload a run may take."""
    return transfer_seconds(sum(path.stat().st_size for path in files_in(output_dir, PUBLISHED)))


def push_again(output_dir: str | Path, repo_id: str) -> str:
    """Return a text that says how to push a run again."""
    return f"push it again with `python -m ddpm_hf push {output_dir} --hub_model_id {repo_id}`"


def wait_for_push(pushing: "Future[bool]", output_dir: str | Path, repo_id: str) -> bool:
    """Wait for the last push of a run, and return whether it succeeded. If it takes too long, log a warning."""
    seconds = sum(WAITS) + upload_seconds(output_dir)
    try:
        return pushing.result(seconds)
    except TimeoutError:
        logger.warning(
            "The push to %s was not complete after %.0f s: %s.", repo_id, seconds, push_again(output_dir, repo_id)
        )
        return False


def retry(upload, repo_id: str, remedy: str) -> bool:
    """Call `upload` until it succeeds, at most 1 + len(WAITS) times. Return whether it succeeded.

    After a final error (see `is_final`), do not try again. Each failure is logged as a warning. The last warning ends
    with `remedy`.
    """
    for wait in (*WAITS, None):
        try:
            upload()
            return True
        except Exception as error:
            if wait is None or is_final(error):
                more = f"{LOG_IN}; then " if is_denied(error) else ""
                logger.warning("The push to %s failed (%s): %s%s.", repo_id, short_reason(error), more, remedy)
                return False
            logger.warning("The push to %s failed (%s): trying again in %g s.", repo_id, short_reason(error), wait)
            time.sleep(wait)
