"""Publish an adapter to the Hugging Face Hub."""

from __future__ import annotations

import logging
from pathlib import Path

from job.results import Published, PushFailed, Refused
from job.settings import Hub, Settings

log = logging.getLogger(__name__)


def check(settings: Hub) -> None:
    """Raise Refused when the settings ask for a push that cannot happen."""
    if settings.push == "always" and _token() is None:
        raise Refused("TAGGER_HUB_PUSH=always needs a token and there is none; set HF_TOKEN, or TAGGER_HUB_PUSH=never")


def push(adapter: Path, settings: Settings) -> Published | None:
    """Upload the run's adapter in one commit; None when the settings or a missing token say not to.

    Raises PushFailed when the Hub could not be reached or refused.
    """
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    hub, token = settings.hub, _token()
    if hub.push == "never" or token is None:
        why = "as TAGGER_HUB_PUSH=never says" if hub.push == "never" else "for there is no token (HF_TOKEN)"
        log.info("push: not pushed, %s; the adapter is in %s", why, adapter)
        return None
    api = HfApi(token=token, library_name="tagger-job")
    try:
        repo = hub.repo or f"{api.whoami()['name']}/{Path(settings.base.model).stem}-tagger"
        api.create_repo(repo, private=hub.private, exist_ok=True)
        if hub.private and not api.repo_info(repo).private:
            raise PushFailed(
                f"{repo} is public and TAGGER_HUB_PRIVATE=true: nothing was pushed, the adapter is in {adapter}. "
                "Name another TAGGER_HUB_REPO, make the repo private, or set TAGGER_HUB_PRIVATE=false"
            )
        if hub.revision is not None:
            api.create_branch(repo, branch=hub.revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=adapter,
            commit_message=hub.commit_message,
            revision=hub.revision,
        )
    except (HfHubHTTPError, httpx2.HTTPError, OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split()).replace(token, "***")
        raise PushFailed(f"publishing failed ({reason}); the adapter is whole in {adapter}") from None
    log.info("push: %s", commit.commit_url)
    return Published(repo, commit.oid, commit.commit_url)


def _token() -> str | None:
    from huggingface_hub import get_token

    return get_token()
