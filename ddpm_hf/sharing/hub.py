"""Create repositories on the Hub, and push to them in the background."""

import logging
import re
import tempfile
import time
from concurrent.futures import Future
from pathlib import Path

from huggingface_hub import HfApi

# HTTPError belongs to httpx. Import it from huggingface_hub, which decides which major version of httpx is used.
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled

from ..errors import UserError
from ..run_folder import PUBLISHED
from .published import copy_published


logger = logging.getLogger(__name__)
# All pushes use this client. It has one worker thread, so they reach the Hub in the order in which they were started.
API = HfApi()
WAITS = (5, 30, 120)  # seconds to wait before each new attempt of a push
LOG_IN = "log in with `hf auth login`, or give a --hub_token with write access to this repository"


def is_hub_id(name: str) -> bool:
    """Return whether a name has the form USER/NAME of a repository and is not a path on this disk."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None and not Path(name).exists()


def create_repository(name: str, private: bool = False, token: str | None = None, **space) -> str:
    """Create a repository unless it exists; return its id, e.g. `me/ddpm-cifar10`.

    A run calls this before its first step. So a run that cannot push fails before the training instead of after it.

    Args:
        private: require a private repository. False leaves the choice to the Hub.
        space: more arguments of `HfApi.create_repo`, if the repository is a Space: `repo_type="space"` and others.

    Raises:
        UserError: if the Hub cannot be reached or refuses, or if a private repository is required and a public one
            exists.
    """
    kind = {"repo_type": space.get("repo_type")}
    try:
        # False would ask for a public repository. None asks for the default, which an organisation can set to private.
        repo_id = API.create_repo(name, token=token, private=private or None, exist_ok=True, **space).repo_id
        # Check that the token can write: create_repo does not check it if the repository exists.
        API.auth_check(repo_id, token=token, write=True, **kind)
        is_private = API.repo_info(repo_id, token=token, **kind).private
    except HFValidationError:
        raise UserError(f"{name!r} cannot name a repository: give --hub_model_id NAME or USER/NAME.") from None
    except (HTTPError, OfflineModeIsEnabled) as error:
        remedy = LOG_IN if is_denied(error) else "check the network, or train without a push and push later"
        raise UserError(f"cannot push to {name!r} on {API.endpoint} ({short_reason(error)}): {remedy}.") from None
    if private and not is_private:
        raise UserError(f"{repo_id} exists and is public: make it private, or choose another --hub_model_id.")
    return repo_id


def short_reason(error: Exception) -> str:
    """Return a few words on why a request failed. They never hold the token, which is only in the headers."""
    if isinstance(error, HfHubHTTPError):
        return f"{error.response.status_code} {error.response.reason_phrase}"
    return str(error).partition("\n")[0] or type(error).__name__


def is_denied(error: Exception) -> bool:
    """Return whether a request failed because the token is missing, wrong or lacks the permission."""
    return isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403, 404)


def is_final(error: Exception) -> bool:
    """Return whether the Hub would refuse the same request again."""
    return isinstance(error, HfHubHTTPError) and error.response.status_code in {*range(400, 500)} - {408, 429}


def push_in_background(output_dir: str | Path, repo_id: str, token: str | None, message: str) -> "Future[bool]":
    """Start to upload a run as one commit. Return a future of a bool: True if the upload succeeded.

    The files are copied first by `copy_published`, so that training can go on writing. Files that the Hub already has
    are not sent again. A push that fails is tried again. If the last attempt fails too, this is logged as a warning
    and is not an error, because a network failure must not end hours of training.
    """
    try:
        snapshot = tempfile.TemporaryDirectory(prefix=".push-", dir=output_dir, ignore_cleanup_errors=True)
        copy_published(Path(output_dir), Path(snapshot.name), PUBLISHED, token)
    except OSError as error:
        logger.warning(
            "Nothing was pushed to %s, because the files could not be copied (%s): free some space and push again.",
            repo_id,
            error,
        )
        return API.run_as_future(lambda: False)

    def upload():
        with snapshot as folder:
            return retry(
                lambda: API.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message, token=token),
                repo_id,
                f"push it again with `python -m ddpm_hf push {output_dir} --hub_model_id {repo_id}`",
            )

    return API.run_as_future(upload)


def retry(upload, repo_id: str, remedy: str) -> bool:
    """Call `upload` until it succeeds, at most 1 + len(WAITS) times. Return whether it succeeded.

    Each failure is logged as a warning. The last warning ends with `remedy`.
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
