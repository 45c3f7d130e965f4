"""Publish a run to the Hugging Face Hub: one commit, exactly once, and finished later if it must be."""

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
"""The files of the run that are published with its adapter."""


def prepare_repo(settings: Settings) -> str | None:
    """The repo that this run will be pushed to, made if it was not there; None when nothing will be pushed.

    Raises InvalidInputError, before anything is spent, for whatever would refuse the push afterwards.
    """
    wanted = settings.hub.push
    lacking = [("a token (HF_TOKEN)", hub.token() is None), ("the network", hub.is_offline())]
    if settings.eval.gate == "published" and (wanted == "never" or any(is_missing for _, is_missing in lacking)):
        raise InvalidInputError(
            "TAGGER_EVAL_GATE=published compares with what a Hub repo has and publishes there, and nothing can be "
            "pushed: it needs HF_TOKEN, the network, and a TAGGER_HUB_PUSH other than never. Provide them, or set it "
            "to floor or off"
        )
    if wanted == "never":
        return None
    for missing, is_missing in lacking:
        if is_missing and wanted == "always":
            raise InvalidInputError(
                f"TAGGER_HUB_PUSH=always needs {missing} and there is none; provide it, or set it to never"
            )
        if is_missing:
            log.info("push: nothing will be pushed, for there is not %s", missing)
            return None
    who = access.token_info()
    repo = repo_name(settings, who)
    access.prepare_repo(repo, who, private=settings.hub.private)
    return repo


def repo_name(settings: Settings, who: TokenInfo) -> str:
    """The repo that is named, or else the one that is named for the base model."""
    return settings.hub.repo or f"{who.user}/{Path(settings.base.model).stem}-tagger"


def push(run: RunFolder, repo: str, settings: Hub, verdict: Verdict | None = None) -> Published:
    """Commit the run's adapter, metrics, manifest and pictures to the repo, all in one commit.

    What was compared with a commit is pushed to a branch of its own that begins there: a candidate for
    `promote`. The commit's message names the run, a digest of its weights and the verdict. That is looked for
    before each attempt, so that a commit whose answer was lost is found and not made again, and that
    pushing the same run twice makes one commit. Each attempt stands on the head that was looked at: a
    commit that came in between makes it fail and be done again on the new head.
    Raises PublishError when the Hub refuses, or could not be reached for TAGGER_HUB_RETRY_MINUTES.
    """
    client = hub.api()
    parent = None if verdict is None else verdict.parent
    branch = settings.revision if parent is None else candidate_branch(run, parent)
    mark = f"Run {run.path.name}, weights {file_digest(run.adapter / 'adapter_model.safetensors')[:16]}"
    if verdict is not None and parent is not None:
        mark += f", gate: {verdict.verdict}"

    def attempt() -> Published:
        commits = client.list_repo_commits(repo, revision=branch)
        made = [commit.commit_id for commit in commits_after(commits, parent) if mark in commit.message]
        if not made:
            shutdown.check()  # what was interrupted publishes nothing
            commit = client.create_commit(
                repo,
                operations=_commit_operations(run, merged=settings.merge),
                commit_message=settings.commit_message,
                commit_description=mark,
                revision=branch,
                parent_commit=commits[0].commit_id,
            )
            made = [commit.oid]
        return Published(repo, made[0], f"{client.endpoint}/{repo}/commit/{made[0]}")

    with publish_errors_for(run):
        if branch is not None:
            hub.ensure_branch(repo, branch, parent)
        return hub.retry(attempt, 60 * settings.retry_minutes, "push")


def candidate_branch(run: RunFolder, parent: str) -> str:
    """The branch for what a run would put in the place of this commit."""
    return f"candidate-{re.sub(r'[^A-Za-z0-9_-]+', '-', run.path.name)}-{parent[:7]}"


def commits_after(commits: Iterable[GitCommitInfo], parent: str | None) -> list[GitCommitInfo]:
    """Of a branch's commits, newest first, those that came after this one; all without one."""
    return list(itertools.takewhile(lambda commit: commit.commit_id != parent, commits))


def publish_errors_for(
    run: RunFolder, command: str = "TAGGER_RUN_ID={run} tagger-job push"
) -> AbstractContextManager[None]:
    """Within, what the Hub fails with becomes PublishError, which says that nothing is lost."""
    finish = command.format(run=run.path.name)
    return hub.publish_errors("publishing failed", f"everything is saved in {run.path}. Finish with: {finish}")


def _commit_operations(run: RunFolder, *, merged: bool) -> list[CommitOperationAdd]:
    """The files of the commit: never a checkpoint, and nothing of the run that is not named here."""
    from huggingface_hub import CommitOperationAdd

    files = {file.name: file for file in sorted(run.adapter.iterdir())}
    if merged:
        files |= {f"merged/{file.name}": file for file in sorted((run.path / "merged").iterdir())}
    files |= {name: run.path / name for name in EXTRA_FILES if (run.path / name).is_file()}
    return [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in files.items()]
