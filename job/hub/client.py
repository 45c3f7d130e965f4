"""The client of the Hugging Face Hub: retries, downloads, published JSON files."""

from __future__ import annotations

import functools
import json
import logging
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from job.config.redaction import MASK, mask_urls, redact
from job.errors import InvalidInputError, PublishError
from job.hub.answers import HubAnswerError, HubTimeoutError
from job.hub.proxies import check_proxies
from job.settings import Hub
from job.system.events import event
from job.system.hub_token import token as token

if TYPE_CHECKING:
    from huggingface_hub import GitCommitInfo, HfApi

    from job.system.progress import Progress

log = logging.getLogger(__name__)

T = TypeVar("T")
LONGEST_MESSAGE = 1000
"""Characters of an error's message that are shown."""
CHECK_SECONDS = 30.0
"""How long a check before training is retried. Short, because a failure then loses no work."""
RETRYABLE_STATUSES = (408, 412, 425, 429, 500, 502, 503, 504)
"""HTTP statuses of transient failures; 412 means that another commit was made in the meantime."""


def api() -> HfApi:
    """Return a client whose answers are checked, and limited in size and time."""
    from huggingface_hub import HfApi

    bound_requests()
    return HfApi(token=token() or False, library_name="tagger-job")


def bound_requests() -> None:
    """Make every later request of huggingface_hub, by other libraries too, one whose answer is checked and limited.

    Raises InvalidInputError if the environment names a proxy that cannot work.
    """
    if not is_offline():
        check_proxies()
    _set_client_factory()


@functools.cache
def _set_client_factory() -> None:
    from huggingface_hub import set_client_factory

    from job.hub.transport import bounded_client

    set_client_factory(bounded_client)


def commit_url(repo: str, commit: str) -> str:
    """Return the address of a commit's page; HF_ENDPOINT may hold a password, which is masked."""
    from huggingface_hub import constants

    return mask_urls(f"{constants.ENDPOINT}/{repo}/commit/{commit}")


def is_offline() -> bool:
    """Return whether HF_HUB_OFFLINE forbids requests to the Hub."""
    from huggingface_hub import constants

    return bool(constants.is_offline_mode())


def retry(step: Callable[[], T], seconds: float, what: str) -> T:
    """Return the result of `step`, retried for up to `seconds` while it fails with a transient error.

    The waits are 1, 2, 4, ... 60 s with 20% jitter, or the Hub's Retry-After if that is longer. `what` starts the log
    line of each failure. Raises the last error of `step`; an answer that is none of the Hub's is not waited out.
    """
    from job.hub.transport import step_budget

    deadline = time.monotonic() + seconds
    pause = 1.0
    while True:
        try:
            with step_budget():
                return step()
        except Exception as error:
            delay = retry_delay(error)
            if delay is None:
                raise
            wait = max(delay, pause * random.uniform(0.8, 1.2))
            if time.monotonic() + wait > deadline:
                raise
            reason = error_message(error)
            extra = event("retry", what=what, error=reason, seconds=round(wait, 1))
            log.warning("%s: %s; retrying in %.0f s", what, reason, wait, extra=extra)
            time.sleep(wait)
            pause = min(60.0, 2 * pause)


def retry_delay(error: BaseException) -> float | None:
    """Return the seconds the Hub asks to wait before a retry (0 if it does not say); None for a permanent error."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HubTimeoutError):
        return 0.0
    if isinstance(error, HfHubHTTPError):
        if error.response.status_code not in RETRYABLE_STATUSES:
            return None
        return float(error.response.extensions.get("retry_after", 0.0))
    if isinstance(error, httpx2.TransportError) and not isinstance(error, httpx2.UnsupportedProtocol):
        return 0.0
    # huggingface_hub wraps the error of a large file's upload
    return retry_delay(error.__cause__) if error.__cause__ is not None else None


def error_message(error: BaseException) -> str:
    """Return the message of a client's error, on one line and with secrets masked."""
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
    text = " ".join(str(cause).split()) or type(cause).__name__
    text = text if len(text) <= LONGEST_MESSAGE else f"{text[: LONGEST_MESSAGE - 3]}..."
    secret = token()
    return redact(text.replace(secret, MASK) if secret else text)


def published_manifest(settings: Hub) -> dict[str, Any]:
    """Return the manifest published with the repo's adapter; empty if there is none.

    If it has `settings` and `dataset`, both are JSON objects; what is in them has not been checked.

    Raises InvalidInputError if it cannot be read.
    """
    assert settings.repo is not None
    try:
        return read_manifest(settings.repo, settings.revision)
    except HubFileError as error:
        raise InvalidInputError(
            f"manifest.json of the adapter in {settings.repo} cannot be read ({error}); check TAGGER_HUB_REPO, "
            "TAGGER_HUB_REVISION and HF_TOKEN"
        ) from None


def read_manifest(repo: str, revision: str | None) -> dict[str, Any]:
    """Return the manifest at a revision of a repo, as `published_manifest` does; raises HubFileError."""
    manifest = published_json(repo, revision, "manifest.json") or {}
    for name in ("settings", "dataset"):
        if not isinstance(manifest.get(name, {}), dict):
            raise HubFileError(f"manifest.json: {name} is not a JSON object")
    return manifest


class HubFileError(Exception):
    """A published file cannot be downloaded, or has unexpected content."""


def published_json(repo: str, revision: str | None, name: str) -> dict[str, Any] | None:
    """Return a published JSON object; None if the repo has no such revision or file.

    Raises HubFileError if the file cannot be downloaded or holds no JSON object.
    """
    import httpx2
    from huggingface_hub.errors import RemoteEntryNotFoundError, RevisionNotFoundError

    try:
        content = read_json(retry(lambda: download_metadata(repo, revision, name), CHECK_SECONDS, "hub"))
    except (RemoteEntryNotFoundError, RevisionNotFoundError):
        return None
    except (httpx2.HTTPError, OSError, ValueError) as error:
        raise HubFileError(error_message(error)) from None
    return content


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that must hold a JSON object; raises ValueError with a short reason, or OSError."""
    try:
        content = json.loads(path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError:
        raise ValueError(f"{path.name} is not UTF-8") from None
    except RecursionError:
        raise ValueError(f"{path.name} is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    return content


def download(repo: str, revision: str | None, name: str) -> Path:
    """Return the path of a repo's file in the cache, downloading it if it is missing there."""
    from huggingface_hub import hf_hub_download

    bound_requests()
    return Path(hf_hub_download(repo, name, revision=revision, token=token() or False))


def download_metadata(repo: str, revision: str | None, name: str) -> Path:
    """Return the path of a small file of a repo, as `download` does; raises HubAnswerError when it is not small."""
    from job.hub.transport import MAX_ANSWER_BYTES, small_files

    with small_files():
        path = download(repo, revision, name)
    if path.stat().st_size > MAX_ANSWER_BYTES:  # cached by another program
        raise HubAnswerError(f"{name} of {repo} has more than {MAX_ANSWER_BYTES} bytes")
    return path


def safetensors_header(repo: str, revision: str | None, name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of each tensor in a repo's safetensors file, of which only the header is downloaded.

    Raises ValueError, with the name of the file, if it is missing or damaged, or an error of the Hub's client.
    """
    from huggingface_hub.errors import RemoteEntryNotFoundError, SafetensorsParsingError

    try:
        metadata = retry(
            lambda: api().parse_safetensors_file_metadata(repo, name, revision=revision), CHECK_SECONDS, "hub"
        )
    except RemoteEntryNotFoundError:
        raise ValueError(f"{name} is missing") from None
    except SafetensorsParsingError:
        raise ValueError(f"{name} is damaged: its header is not that of a safetensors file") from None
    return {key: (str(tensor.dtype), tuple(tensor.shape)) for key, tensor in metadata.tensors.items()}


def bytes_reported_to(progress: Progress) -> type[Any]:
    """Return the class of bars for `snapshot_download`, which count in `progress` what is written to disk."""
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **options: Any) -> None:
            # one bar counts files, one what the network brings, and this one what is complete of a known total
            self._counts = "total_fmt" in options.get("bar_format", "")
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            if self._counts:
                progress.total = int(self.total or 0)
                progress.add(int(n or 0))
            return None

    return Bar


@contextmanager
def publish_errors(what: str, remedy: str) -> Iterator[None]:
    """Turn errors of the Hub's client into PublishError: `what` failed, and `remedy` finishes it."""
    import httpx2

    try:
        yield
    except (httpx2.HTTPError, OSError, RuntimeError, ValueError) as error:
        raise PublishError(f"{what} ({error_message(error)}); {remedy}") from None


def list_commits(repo: str, revision: str | None) -> list[GitCommitInfo]:
    """Return the commits of a branch (None: main), the newest first; raises HubAnswerError if there are none."""
    commits = api().list_repo_commits(repo, revision=revision)
    if not commits:
        raise HubAnswerError(f"the Hub names no commit of {repo} at {revision or 'main'}")
    return commits


def branch_head(repo: str, branch: str | None) -> str:
    """Return the hash of a branch's newest commit (None: main), creating the branch if it does not exist."""
    if branch is not None:
        ensure_branch(repo, branch, None)
    return retry(lambda: str(api().repo_info(repo, revision=branch).sha), CHECK_SECONDS, "hub")


def ensure_branch(repo: str, branch: str, start: str | None) -> None:
    """Create a branch at the commit `start`, or at the head of main for None, unless the branch exists."""
    retry(lambda: api().create_branch(repo, branch=branch, revision=start, exist_ok=True), CHECK_SECONDS, "hub")


def hub_unreachable(error: BaseException) -> InvalidInputError:
    """Return the error to raise when the Hub does not respond."""
    return InvalidInputError(
        f"the Hub cannot be reached ({error_message(error)}); check the network and HF_ENDPOINT, or set "
        "HF_HUB_OFFLINE=1 to use what is cached and publish nothing"
    )
