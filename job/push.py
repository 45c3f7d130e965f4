"""Publish a run to the Hugging Face Hub: one commit, exactly once, and finished later if it must be."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from job import hub, interruption
from job.results import Published, PushFailed, Refused
from job.run_folder import RunFolder
from job.settings import Hub, Settings
from job.whole import file_digest

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

log = logging.getLogger(__name__)

BESIDE_THE_ADAPTER = ("metrics.json", "manifest.json", "loss.svg")
"""The files of the run that are published with its adapter."""


def prepare(settings: Settings) -> str | None:
    """The repo that this run will be pushed to, made if it was not there; None when nothing will be pushed.

    Raises Refused, before anything is spent, for whatever would refuse the push afterwards.
    """
    wanted = settings.hub.push
    if wanted == "never":
        return None
    for missing, is_missing in (("a token (HF_TOKEN)", hub.token() is None), ("the network", hub.is_offline())):
        if is_missing and wanted == "always":
            raise Refused(f"TAGGER_HUB_PUSH=always needs {missing} and there is none; provide it, or set it to never")
        if is_missing:
            log.info("push: nothing will be pushed, for there is not %s", missing)
            return None
    who = hub.account()
    repo = settings.hub.repo or f"{who.user}/{Path(settings.base.model).stem}-tagger"
    hub.prepare_repo(repo, who, private=settings.hub.private)
    return repo


def push(run: RunFolder, repo: str, settings: Hub) -> Published:
    """Commit the run's adapter, metrics, manifest and pictures to the repo, all in one commit.

    The commit's message names the run and a digest of its weights. That is looked for before each
    attempt, so that a commit whose answer was lost is found and not made again, and that pushing the
    same run twice makes one commit. Each attempt stands on the head that was looked at: a commit
    that came in between makes it fail and be done again on the new head.
    Raises PushFailed when the Hub refuses, or could not be reached for TAGGER_HUB_RETRY_MINUTES.
    """
    import httpx2

    client = hub.api()
    identity = f"Run {run.path.name}, weights {file_digest(run.adapter / 'adapter_model.safetensors')[:16]}"

    def attempt() -> Published:
        head, done = _look(client, repo, settings.revision, identity)
        if done is None:
            interruption.check()  # what was interrupted publishes nothing
            done = client.create_commit(
                repo,
                operations=_operations(run, merged=settings.merge),
                commit_message=settings.commit_message,
                commit_description=identity,
                revision=settings.revision,
                parent_commit=head,
            ).oid
        return Published(repo, done, f"{client.endpoint}/{repo}/commit/{done}")

    try:
        if settings.revision is not None:
            branch = settings.revision
            hub.retrying(lambda: client.create_branch(repo, branch=branch, exist_ok=True), 60, "push")
        return hub.retrying(attempt, 60 * settings.retry_minutes, "push")
    except (httpx2.HTTPError, OSError, RuntimeError, ValueError) as error:
        raise PushFailed(
            f"publishing failed ({hub.reason(error)}); everything is saved in {run.path}. "
            f"Finish with: TAGGER_RUN_ID={run.path.name} tagger-job push"
        ) from None


def _look(client: HfApi, repo: str, revision: str | None, identity: str) -> tuple[str, str | None]:
    """The head of the branch, and the commit on it that this run made already, if any."""
    commits = client.list_repo_commits(repo, revision=revision)
    made = next((commit.commit_id for commit in commits if identity in commit.message), None)
    return commits[0].commit_id, made


def _operations(run: RunFolder, *, merged: bool) -> list[CommitOperationAdd]:
    """The files of the commit: never a checkpoint, and nothing of the run that is not named here."""
    from huggingface_hub import CommitOperationAdd

    files = {file.name: file for file in sorted(run.adapter.iterdir())}
    if merged:
        files |= {f"merged/{file.name}": file for file in sorted((run.path / "merged").iterdir())}
    files |= {name: run.path / name for name in BESIDE_THE_ADAPTER if (run.path / name).is_file()}
    return [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in files.items()]
