"""The client of the Hugging Face Hub: retries, downloads, published JSON files."""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from job.errors import InvalidInputError, PublishError
from job.settings import Hub

if TYPE_CHECKING:
    from huggingface_hub import HfApi


log = logging.getLogger(__name__)

T = TypeVar("T")
SECRET_FILE = Path("/run/secrets/hf_token")
CHECK_SECONDS = 30.0
"""How long a check before training keeps trying: nothing is lost yet if it gives up."""
RETRYABLE_STATUSES = (408, 412, 425, 429, 500, 502, 503, 504)
"""Statuses that may pass by themselves; 412 says that another commit came in between."""


def token() -> str | None:
    """The token of HF_TOKEN or of a login on this machine, else the one of a mounted secret."""
    from huggingface_hub import get_token

    found = get_token()
    if found is None and SECRET_FILE.is_file():
        found = SECRET_FILE.read_text(encoding="utf-8").strip() or None
    return found


def api() -> HfApi:
    """The client. A silent connection ends after a minute; the library's own would wait for ever."""
    import httpx2
    from huggingface_hub import HfApi, set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    def with_timeout() -> httpx2.Client:
        client = default_client_factory()
        client.timeout = httpx2.Timeout(60, connect=10)
        return client

    set_client_factory(with_timeout)
    return HfApi(token=token() or False, library_name="tagger-job")


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids asking the Hub."""
    from huggingface_hub import constants

    return bool(constants.is_offline_mode())


def retry(step: Callable[[], T], seconds: float, what: str) -> T:
    """Do a step, again when it fails in a way that may pass, for up to so many seconds.

    Waits 1, 2, 4, ... 60 s, a little at random, or what the Hub's Retry-After says if that is more.
    """
    deadline = time.monotonic() + seconds
    pause = 1.0
    while True:
        try:
            return step()
        except Exception as error:
            wait = retry_delay(error)
            if wait is None:
                raise
            wait = max(wait, pause * random.uniform(0.8, 1.2))
            if time.monotonic() + wait > deadline:
                raise
            log.warning("%s: %s; again in %.0f s", what, error_message(error), wait)
            time.sleep(wait)
            pause = min(60.0, 2 * pause)


def retry_delay(error: BaseException) -> float | None:
    """How long the Hub asks to wait before trying again; None for an error that would come again."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        if error.response.status_code not in RETRYABLE_STATUSES:
            return None
        after = error.response.headers.get("Retry-After", "")
        return float(after) if after.isdigit() else 0.0
    if isinstance(error, httpx2.TransportError) and not isinstance(error, httpx2.UnsupportedProtocol):
        return 0.0
    # a failed upload of a large file comes wrapped
    return retry_delay(error.__cause__) if error.__cause__ is not None else None


def error_message(error: BaseException) -> str:
    """What an error of the client says, on one line and without the token."""
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
    text = " ".join(str(cause).split()) or type(cause).__name__
    secret = token()
    return text.replace(secret, "***") if secret else text


def published_manifest(settings: Hub) -> dict[str, Any]:
    """The manifest that was published with the repo's adapter; empty where there is none."""
    assert settings.repo is not None
    try:
        return published_json(settings.repo, settings.revision, "manifest.json") or {}
    except HubFileError as error:
        raise InvalidInputError(
            f"the adapter's repo {settings.repo} cannot be read ({error}); check TAGGER_HUB_REPO, "
            "TAGGER_HUB_REVISION and HF_TOKEN"
        ) from None


class HubFileError(Exception):
    """A published file that cannot be fetched, or is not what it should be."""


def published_json(repo: str, revision: str | None, name: str) -> dict[str, Any] | None:
    """A JSON object that was published; None when the repo, the revision or the file is not there.

    Raises Unreadable when it cannot be fetched or is something else.
    """
    import httpx2
    from huggingface_hub.errors import RemoteEntryNotFoundError, RevisionNotFoundError

    try:
        path = retry(lambda: download(repo, revision, name), CHECK_SECONDS, "hub")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (RemoteEntryNotFoundError, RevisionNotFoundError):
        return None
    except (httpx2.HTTPError, OSError, ValueError) as error:
        raise HubFileError(error_message(error)) from None
    if not isinstance(found, dict):
        raise HubFileError(f"{name} is not a JSON object")
    return found


def download(repo: str, revision: str | None, name: str) -> Path:
    """Where a file of a repo is on this machine, fetched if it must be."""
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repo, name, revision=revision, token=token() or False))


@contextmanager
def publish_errors(what: str, remedy: str) -> Iterator[None]:
    """Within, what the Hub fails with becomes PublishError, which says what could not be done and what finishes it."""
    import httpx2

    try:
        yield
    except (httpx2.HTTPError, OSError, RuntimeError, ValueError) as error:
        raise PublishError(f"{what} ({error_message(error)}); {remedy}") from None


def branch_head(repo: str, branch: str | None) -> str:
    """The commit at the head of a branch, main without one; the branch is made if it is not there."""
    if branch is not None:
        ensure_branch(repo, branch, None)
    return retry(lambda: str(api().repo_info(repo, revision=branch).sha), CHECK_SECONDS, "hub")


def ensure_branch(repo: str, branch: str, start: str | None) -> None:
    """Make a branch that begins at a commit, or at the head of main, unless it is there."""
    retry(lambda: api().create_branch(repo, branch=branch, revision=start, exist_ok=True), CHECK_SECONDS, "hub")


def hub_unreachable(error: BaseException) -> InvalidInputError:
    """The sentence for a Hub that does not answer."""
    return InvalidInputError(
        f"the Hub cannot be asked ({error_message(error)}); check the network and HF_ENDPOINT, or set HF_HUB_OFFLINE=1 "
        "to use what is cached and publish nothing"
    )
