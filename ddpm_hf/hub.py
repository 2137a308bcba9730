"""What leaves the machine: repositories on the Hub, and pushes to them that nothing waits for."""

import logging
import re
import shutil
import tempfile
import time
from concurrent.futures import Future
from pathlib import Path

from huggingface_hub import HfApi, get_token

# HTTPError is httpx's, whichever major version of httpx huggingface_hub is built on.
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled

from . import UserError
from .record import hide_paths
from .saving import shipped


logger = logging.getLogger(__name__)
# One for the process: it has one worker thread, so pushes arrive in the order they were made.
API = HfApi()
# Nothing else leaves a run folder: no checkpoint, no tracker's logs, nothing that a user put there.
PUBLISHED = ["model_index.json", "unet", "scheduler", "README.md", "train_config.json", "metrics.jsonl", "samples"]
PUBLISHED += ["figures", "evaluations", "best", "classifier"]
PUBLISHED += sorted(path.name for path in shipped("pipelines").glob("*.py"))
PUBLISHED += ["class_conditional.py", "classifier_guided.py"]  # of folders saved before class_guided.py
# Training images, which need not be anybody's to publish.
PRIVATE = ["evaluations/*.png", "figures/forward.png"]
TOKEN = r"\bhf_[A-Za-z0-9]{30,}"
WAITS = (5, 30, 120)  # seconds before each new attempt of a push
LOG_IN = "log in with `hf auth login`, or give --hub_token a token that may write there"


def is_hub_id(name: str) -> bool:
    """Return whether a name is that of a repository, USER/NAME, and not of something on this disk."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None and not Path(name).exists()


def create_repository(name: str, private: bool = False, token: str | None = None, **space) -> str:
    """Create a repository unless it exists; return its id, e.g. `me/ddpm-cifar10`.

    A run calls it before its first step: what cannot be pushed is to fail before training, not after.

    Args:
        private: ask for a private one; if not, it is what the Hub makes it.
        space: `repo_type="space"` and further arguments of `HfApi.create_repo`, of a Space.

    Raises:
        UserError: the Hub cannot be reached or refuses, or a public repository is where a private one is asked for.
    """
    kind = {"repo_type": space.get("repo_type")}
    try:
        # None leaves it to the Hub, where an organisation may have private as its default.
        repo_id = API.create_repo(name, token=token, private=private or None, exist_ok=True, **space).repo_id
        # create_repo is content if the repository exists, even with a token that may only read.
        API.auth_check(repo_id, token=token, write=True, **kind)
        is_private = API.repo_info(repo_id, token=token, **kind).private
    except HFValidationError:
        raise UserError(f"{name!r} cannot name a repository: give --hub_model_id NAME or USER/NAME.") from None
    except (HTTPError, OfflineModeIsEnabled) as error:
        remedy = LOG_IN if refused(error) else "check the network; a training may do without and push later"
        raise UserError(f"cannot push to {name!r} on {API.endpoint} ({reason(error)}): {remedy}.") from None
    if private and not is_private:
        raise UserError(f"{repo_id} exists and is public: make it private, or choose another --hub_model_id.")
    return repo_id


def reason(error: Exception) -> str:
    """Say in a few words why a request failed; the token is only in the request's headers, never in these words."""
    if isinstance(error, HfHubHTTPError):
        return f"{error.response.status_code} {error.response.reason_phrase}"
    return str(error).partition("\n")[0] or type(error).__name__


def refused(error: Exception) -> bool:
    """Return whether the Hub said no, and would say it again."""
    return isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403, 404)


def hopeless(error: Exception) -> bool:
    """Return whether the same request would be refused again."""
    return isinstance(error, HfHubHTTPError) and error.response.status_code in {*range(400, 500)} - {408, 429}


def push(output_dir: str | Path, repo_id: str, token: str | None, message: str) -> "Future[bool]":
    """Upload the run as it is now, in the background, as one commit; `finish_push` waits for it.

    The files are copied first, so that training may go on writing. One that holds a token stays here, with a warning;
    of local paths only the last parts are told. A push that fails is tried again, and in the end it is a warning too,
    whatever the reason: no network may end hours of training. Files that the Hub has already are not sent again.
    """
    secrets = "|".join([TOKEN, *map(re.escape, filter(None, [token, get_token()]))]).encode()
    paths = [path for name in PUBLISHED for path in [Path(output_dir, name), *Path(output_dir, name).rglob("*")]]
    try:
        frozen = tempfile.TemporaryDirectory(prefix=".push-", dir=output_dir, ignore_cleanup_errors=True)
        for source in filter(Path.is_file, paths):
            target = Path(frozen.name, source.relative_to(output_dir))
            if source.suffix in (".json", ".jsonl", ".md") and re.search(secrets, source.read_bytes()):
                logger.warning("%s holds an access token and was not pushed: remove the token from it.", source)
            elif any(source.match(private) for private in PRIVATE):
                continue
            elif "/." not in f"/{source.relative_to(output_dir).as_posix()}":  # half-written files start with a dot
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
        hide_paths(Path(frozen.name))
    except OSError as error:
        logger.warning(
            "Nothing was pushed to %s, for want of a copy (%s): free some space, push again.", repo_id, error
        )
        return API.run_as_future(lambda: False)

    def upload():
        with frozen as folder:
            return persist(
                lambda: API.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message, token=token),
                repo_id,
                f"the run is whole here, `python -m ddpm_hf push {output_dir} --hub_model_id {repo_id}` tries again",
            )

    return API.run_as_future(upload)


def persist(upload, repo_id: str, remedy: str) -> bool:
    """Call `upload` until it succeeds, a few times at most; return whether it did, having warned of each failure."""
    for wait in (*WAITS, None):
        try:
            upload()
            return True
        except Exception as error:
            if wait is None or hopeless(error):
                more = f"{LOG_IN}; then " if refused(error) else ""
                logger.warning("The push to %s failed (%s): %s%s.", repo_id, reason(error), more, remedy)
                return False
            logger.warning("The push to %s failed (%s): trying again in %g s.", repo_id, reason(error), wait)
            time.sleep(wait)


def finish_push(future: "Future[bool]") -> bool:
    """Wait for a push and return whether it arrived; if not, it has warned already."""
    return future.result()
