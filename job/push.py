"""Publish a run to the Hugging Face Hub, in exactly one commit."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from job.errors import InvalidInputError
from job.hub import access
from job.hub import client as hub
from job.runs import shutdown
from job.runs.checksums import file_digest
from job.runs.run_folder import RunFolder
from job.settings import Hub, Settings
from job.types import Published, TokenInfo, Verdict

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, GitCommitInfo

log = logging.getLogger(__name__)

EXTRA_FILES = ("metrics.json", "manifest.json", "loss.svg")
"""Files of the run that are published in addition to its adapter."""


def prepare_repo(settings: Settings) -> str | None:
    """Return the repo that this run will be pushed to, created if it does not exist; None if nothing will be pushed.

    Raises InvalidInputError, before any training, for everything that would make the push fail later.
    """
    push_mode = settings.hub.push
    requirements = {"a token (HF_TOKEN)": hub.token() is not None, "the network": not hub.is_offline()}
    missing = [name for name, is_met in requirements.items() if not is_met]
    if settings.eval.gate == "published" and (push_mode == "never" or missing):
        raise InvalidInputError(
            "TAGGER_EVAL_GATE=published compares with the published adapter and publishes to its repo, but nothing can "
            "be pushed: it needs HF_TOKEN, the network, and a TAGGER_HUB_PUSH other than never. Provide them, or set "
            "TAGGER_EVAL_GATE to floor or off"
        )
    if push_mode == "never":
        return None
    if missing and push_mode == "always":
        raise InvalidInputError(
            f"TAGGER_HUB_PUSH=always needs {missing[0]}, which is missing; provide it, or set TAGGER_HUB_PUSH=never"
        )
    if missing:
        log.info("push: nothing will be pushed, because %s is missing", missing[0])
        return None
    owner = access.token_info()
    repo = repo_name(settings, owner)
    access.prepare_repo(repo, owner, private=settings.hub.private)
    return repo


def repo_name(settings: Settings, owner: TokenInfo) -> str:
    """Return TAGGER_HUB_REPO, or else a name made from the token's user and the base model."""
    return settings.hub.repo or f"{owner.user}/{Path(settings.base.model).stem}-tagger"


def push(run: RunFolder, repo: str, settings: Hub, verdict: Verdict | None = None) -> Published:
    """Commit the run's adapter, metrics, manifest and loss curve to the repo, all in one commit.

    With a verdict that names a published commit, the commit is a candidate for `promote`: it goes to a branch of its
    own that starts there. The commit's description holds a marker: the run, a digest of its weights and the verdict.
    Each attempt looks for it first, so that a commit whose response was lost is found instead of repeated, and pushing
    the same run twice makes one commit. Each attempt names the head it saw as parent, so it fails and is retried if
    another commit came in between.

    Raises PublishError if the Hub refuses, or cannot be reached for TAGGER_HUB_RETRY_MINUTES.
    """
    client = hub.api()
    base_commit = None if verdict is None else verdict.parent_commit
    branch = settings.revision if base_commit is None else candidate_branch(run, base_commit)
    commit_marker = _commit_marker(run, verdict)

    def push_once() -> Published:
        commits = hub.list_commits(repo, branch)
        newer = commits_after(commits, base_commit)
        commit = next((commit.commit_id for commit in newer if commit_marker in commit.message), None)
        if commit is None:
            shutdown.check()  # an interrupted run publishes nothing
            commit = client.create_commit(
                repo,
                operations=_commit_operations(run, merged=settings.merge),
                commit_message=settings.commit_message,
                commit_description=commit_marker,
                revision=branch,
                parent_commit=commits[0].commit_id,
            ).oid
        return Published(repo, commit, hub.commit_url(repo, commit))

    with publish_errors_for(run):
        if branch is not None:
            hub.ensure_branch(repo, branch, base_commit)
        return hub.retry(push_once, 60 * settings.retry_minutes, "push")


def candidate_branch(run: RunFolder, base_commit: str) -> str:
    """Return the name of the branch for a run's adapter that may replace what is published at `base_commit`."""
    return f"candidate-{re.sub(r'[^A-Za-z0-9_-]+', '-', run.path.name)}-{base_commit[:7]}"


def commits_after(commits: Iterable[GitCommitInfo], base_commit: str | None) -> list[GitCommitInfo]:
    """Return a branch's commits (newest first) that came after `base_commit`; all of them for None."""
    return list(itertools.takewhile(lambda commit: commit.commit_id != base_commit, commits))


def publish_errors_for(
    run: RunFolder, advice: str = "Finish with: TAGGER_RUN_ID={run} tagger-job push"
) -> AbstractContextManager[None]:
    """Turn errors of the Hub's client into a PublishError that names the saved run and says how to finish it."""
    advice = advice.format(run=run.path.name)
    return hub.publish_errors("publishing failed", f"everything is saved in {run.path}. {advice}")


def _commit_marker(run: RunFolder, verdict: Verdict | None) -> str:
    """Return the line that identifies the run's commit among others."""
    weights = file_digest(run.adapter / "adapter_model.safetensors")[:16]
    gate = "" if verdict is None or verdict.parent_commit is None else f", gate: {verdict.verdict}"
    return f"Run {run.path.name}, weights {weights}{gate}"


def _commit_operations(run: RunFolder, *, merged: bool) -> list[CommitOperationAdd]:
    """List the files to commit: never a checkpoint, and no file of the run that is not named here."""
    from huggingface_hub import CommitOperationAdd

    files = {file.name: file for file in sorted(run.adapter.iterdir())}
    if merged:
        files |= {f"merged/{file.name}": file for file in sorted((run.path / "merged").iterdir())}
    files |= {name: run.path / name for name in EXTRA_FILES if (run.path / name).is_file()}
    return [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in files.items()]
