"""Publish a run to the Hugging Face Hub, in exactly one commit."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING

from job import report
from job.config.validators import MAX_REPO_NAME, allowed_name, repo_id
from job.errors import InvalidInputError, PublishError
from job.hub import access
from job.hub import client as hub
from job.runs import shutdown
from job.runs.run_folder import MODEL_CARD, RunFolder
from job.runs.sealed_files import NotSealedError, open_sealed, read_regular
from job.settings import Hub, Settings
from job.system.paths import WEIGHT_SUFFIXES
from job.system.progress import Progress
from job.types import Published, TokenInfo, Verdict

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, GitCommitInfo, HfApi

log = logging.getLogger(__name__)

EXTRA_FILES = ("metrics.json", *report.CARD_PICTURES)
"""Files of the run that are published in addition to its adapter and its manifest."""
WEIGHTS = "adapter/adapter_model.safetensors"
MAX_CARD_BYTES = 2**20
"""The model card has no checksum, because it may be edited before it is pushed."""


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
    if settings.hub.repo is not None:
        return settings.hub.repo
    base = Path(settings.base.model)
    name = base.stem if base.suffix.lower() in WEIGHT_SUFFIXES else base.name
    repo = f"{owner.user}/{allowed_name(name, MAX_REPO_NAME - len('-tagger'))}-tagger"
    try:
        return repo_id(repo)
    except ValueError:
        raise InvalidInputError(f"{repo} is not a possible name of a repo; set TAGGER_HUB_REPO to owner/name") from None


def push(run: RunFolder, repo: str, settings: Hub, verdict: Verdict | None = None) -> Published:
    """Commit the run's adapter, metrics, manifest and loss curve to the repo, all in one commit.

    With a verdict that names a published commit, the commit is a candidate for `promote`: it goes to a branch of its
    own that starts there. The commit's description holds a marker: the run, a digest of its weights and the verdict.
    Each attempt looks for it first, so that a commit whose response was lost is found instead of repeated, and pushing
    the same run twice makes one commit. Each attempt names the head it saw as parent, so it fails and is retried if
    another commit came in between.

    What is committed are the files with recorded checksums, as they were when these were recorded, and the model card.
    Whether the repo is still private is asked before each upload and again right before each commit.

    Raises PublishError if the Hub refuses, or cannot be reached for TAGGER_HUB_RETRY_MINUTES, if the repo is public
    although TAGGER_HUB_PRIVATE is set, or if a file has changed.
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
            with ExitStack() as opened:
                operations = _commit_operations(run, opened, merged=settings.merge)
                access.require_private(repo, settings)
                _upload(client, repo, operations, branch)
                access.require_private(repo, settings)
                shutdown.check()  # an interrupted run publishes nothing
                commit = client.create_commit(
                    repo,
                    operations=operations,
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


def _upload(client: HfApi, repo: str, operations: list[CommitOperationAdd], branch: str | None) -> None:
    """Upload the contents of the large files, with a progress bar or lines."""
    from job.hub.transport import sent_bytes_reported_to

    total = sum(operation.upload_info.size for operation in operations)
    with Progress("upload", total, "B") as progress, sent_bytes_reported_to(progress.add):
        client.preupload_lfs_files(repo, operations, revision=branch)


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
    recorded = _checksums(run).get(WEIGHTS)
    if recorded is None:
        raise _not_sealed(run, f"{WEIGHTS} has no recorded checksum")
    gate = "" if verdict is None or verdict.parent_commit is None else f", gate: {verdict.verdict}"
    return f"Run {run.path.name}, weights {str(recorded['sha256'])[:16]}{gate}"


def _commit_operations(run: RunFolder, opened: ExitStack, *, merged: bool) -> list[CommitOperationAdd]:
    """List the files to commit, with their verified contents: those with checksums, the card and the manifest.

    Nothing else is published that lies in the folders: no editor's backup, no link, no checkpoint.
    """
    from huggingface_hub import CommitOperationAdd

    contents: dict[str, bytes | BufferedReader] = {"manifest.json": run.manifest_text().encode()}
    try:
        for name, recorded in _checksums(run).items():
            if (target := _target(name, merged=merged)) is not None:
                contents[target] = content = open_sealed(run.path, name, recorded)
                if not isinstance(content, bytes):
                    opened.enter_context(content)
        contents["README.md"] = read_regular(run.path, MODEL_CARD, MAX_CARD_BYTES)
    except NotSealedError as error:
        raise _not_sealed(run, str(error)) from None
    _log_left_out(run, contents, merged=merged)
    return [CommitOperationAdd(path_in_repo=name, path_or_fileobj=contents[name]) for name in sorted(contents)]


def _target(name: str, *, merged: bool) -> str | None:
    """Return the path in the repo of a file of the run; None if it is not published."""
    if any(part.startswith(".") for part in name.split("/")):
        return None
    if name.startswith("adapter/") and name != MODEL_CARD:
        return name.removeprefix("adapter/")
    return name if name in EXTRA_FILES or (merged and name.startswith("merged/")) else None


def _log_left_out(run: RunFolder, published: Mapping[str, object], *, merged: bool) -> None:
    """Log which files in the published folders are not uploaded, because the run did not write them."""
    found = [*run.adapter.iterdir(), *((run.path / "merged").iterdir() if merged else ())]
    names = [file.relative_to(run.path).as_posix() for file in found if not file.is_dir() or file.is_symlink()]
    left_out = sorted(name for name in names if name.removeprefix("adapter/") not in published)
    if left_out:
        log.warning(
            "push: %d files that the run did not write are not uploaded: %s", len(left_out), ", ".join(left_out[:5])
        )


def _checksums(run: RunFolder) -> dict[str, dict[str, int | str]]:
    checksums: dict[str, dict[str, int | str]] = run.manifest.get("checksums", {})
    return checksums


def _not_sealed(run: RunFolder, problem: str) -> PublishError:
    return PublishError(
        f"nothing was uploaded, because in {run.path} {problem}. Restore it, or run the job again with the same "
        "settings: it recreates what has changed"
    )
