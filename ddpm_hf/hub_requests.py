"""Send requests to the Hub, each with a time limit. A server that is silent, slow or not the Hub causes an error."""

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

# HTTPError belongs to httpx. Import it from huggingface_hub, which decides which major version of httpx is used.
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalEntryNotFoundError
from huggingface_hub.utils import get_session


API = HfApi()
ANSWER_SECONDS = 30  # limit for a few small requests together
SILENT_SECONDS = 60  # limit for the time without a byte, in a longer request
SLOWEST = 50_000  # bytes per second; a slower transfer is given up
UNKNOWN_SIZE = 1_000_000_000  # bytes; assumed if a repository does not state its size
# What `ask_hub` raises for a valid name. OfflineModeIsEnabled and TimeoutError are OSErrors.
HUB_ERRORS = (HTTPError, OSError)


def in_thread(function: Callable, lock=None) -> Future:
    """Start `function()` in a thread that does not keep the process alive. Return a Future of its result.

    Args:
        lock: the thread waits for this lock and holds it while the function runs. While the thread waits, the future
            can be cancelled.
    """
    future = Future()

    def run():
        with lock or contextlib.nullcontext():
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as error:
                    future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def ask_hub(request: Callable, seconds: float | None = None):
    """Call `request`, a function that uses huggingface_hub, and return its result. Give up after a time limit.

    Args:
        seconds: the limit for the whole request; default: ANSWER_SECONDS. A limit for each read is not enough,
            because a server may send a byte now and then.

    Raises:
        HFValidationError: for a name that is not the name of a repository.
        HTTPError: if the Hub refuses or cannot be reached.
        OSError: if offline mode is enabled, or if the answer is not from the Hub.
        TimeoutError: if no answer came in time.
    """
    seconds = ANSWER_SECONDS if seconds is None else seconds
    session = get_session()
    if session.timeout.read is None:  # without a limit, a thread that we gave up on would wait for ever
        session.timeout = SILENT_SECONDS
    future = in_thread(request)
    try:
        return future.result(seconds)
    except (HFValidationError, HTTPError):
        raise
    except TimeoutError:
        raise TimeoutError(f"no complete answer in {seconds:.0f} s") from None
    except OSError:
        raise
    except Exception as error:  # parsing an unexpected answer may raise anything
        raise ConnectionError("the answer is not from the Hub, but perhaps from a proxy or a login page") from error


def transfer_seconds(size: int) -> float:
    """Return the time limit of a transfer of `size` bytes, in seconds: 120 + `size` / SLOWEST."""
    return 120 + size / SLOWEST


def download(repo_id: str, patterns: list[str], ignore: str | None = None) -> Path:
    """Download the files of a repository that match `patterns`. Return their folder in HuggingFace's cache.

    Files that match the pattern `ignore` are left out. Files that are in the cache are not downloaded again. If a
    request to the Hub fails, the cached files are used.

    Raises:
        HFValidationError: for a name that is not the name of a repository.
        HTTPError, OSError: if a request to the Hub fails, and the repository is not in the cache.
    """
    options = {"allow_patterns": patterns, "ignore_patterns": ignore}
    try:
        files = ask_hub(lambda: API.model_info(repo_id, files_metadata=True)).siblings
        sizes = [file.size for file in files or []]
        seconds = transfer_seconds(sum(sizes) if sizes and None not in sizes else UNKNOWN_SIZE)
        return Path(ask_hub(lambda: snapshot_download(repo_id, **options), seconds))
    except HFValidationError:
        raise
    except HUB_ERRORS:
        try:
            return Path(snapshot_download(repo_id, local_files_only=True, **options))
        except LocalEntryNotFoundError:
            pass
        raise


def short_reason(error: Exception) -> str:
    """Return a few words on why a request failed. They never contain the token."""
    if isinstance(error, HfHubHTTPError):
        return f"{error.response.status_code} {error.response.reason_phrase}"
    reason = str(error).partition("\n")[0]
    if "Bearer" in reason:  # the error of a header that cannot be sent quotes it
        return "the access token has a character that cannot be sent, e.g. a line break"
    return reason or type(error).__name__


def is_denied(error: Exception) -> bool:
    """Return whether a request failed because the token is missing, wrong or lacks the permission."""
    is_refused = isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403, 404)
    return is_refused or "Bearer" in str(error)  # see short_reason


def is_final(error: Exception) -> bool:
    """Return whether a retry is useless, because the Hub would refuse it or time out again."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in {*range(400, 500)} - {408, 429}
    return isinstance(error, TimeoutError)
