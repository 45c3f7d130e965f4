"""Replace the published adapter by another revision of the repo: promotion of a candidate, or rollback."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from job.errors import InvalidInputError, PublishError
from job.hub import access
from job.hub import client as hub
from job.push import commits_after
from job.runs import shutdown
from job.runs.run_folder import RunFolder
from job.settings import Hub
from job.types import Published

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationCopy, CommitOperationDelete, HfApi

PRESERVED_FILES = (".gitattributes",)
"""Never copied or deleted: the repo's own configuration, not part of an adapter."""


def promote(repo: str, revision: str, settings: Hub, *, parent_commit: str | None = None) -> Published:
    """Make the published branch hold the files of `revision`, in one commit, and tag the commit v1, v2, ...

    `parent_commit` is the commit that the new one must follow; None stands for the branch's present head. If another
    commit came after it, nothing is overwritten. The Hub copies the files itself. A commit that an earlier attempt made
    without receiving the response is found by its description.

    Raises InvalidInputError if the revision does not exist or holds no adapter, and PublishError if somebody else has
    published in between, or if the repo is public although TAGGER_HUB_PRIVATE is set. Other errors are those of the
    Hub's client.
    """
    client = hub.api()
    source = _resolve_adapter_commit(client, repo, revision)
    seconds = 60 * settings.retry_minutes
    parent_commit = parent_commit or hub.branch_head(repo, settings.revision)
    commit = hub.retry(
        lambda: _promote_once(client, repo, source, settings, parent_commit=parent_commit),
        seconds,
        "promote",
    )
    tag = hub.retry(lambda: _version_tag(client, repo, commit), seconds, "promote")
    return Published(repo, commit, hub.commit_url(repo, commit), tag)


def _promote_once(client: HfApi, repo: str, source: str, settings: Hub, *, parent_commit: str) -> str:
    """Return the commit of the published branch that holds the files of `source`, made now unless it exists already."""
    branch = settings.revision
    commits = hub.list_commits(repo, branch)
    commit_marker = _commit_marker(source)
    newer = commits_after(commits, parent_commit)
    for commit in newer:
        if commit_marker in commit.message:
            return commit.commit_id
    if newer:
        raise PublishError(
            f"{repo} was at {parent_commit[:12]} when the adapters were compared, and someone has published "
            f"{newer[0].commit_id[:12]} ({newer[0].title}) since; nothing was overwritten. Run the same command again "
            "to compare with that commit"
        )
    if parent_commit == source or commit_marker in commits[0].message:
        return parent_commit
    operations = _commit_operations(client, repo, source, parent_commit)
    if not operations:
        return parent_commit
    source_message = hub.list_commits(repo, source)[0].message
    access.require_private(repo, settings)
    shutdown.check()  # an interrupted run publishes nothing
    return client.create_commit(
        repo,
        operations=operations,
        commit_message=f"promote {source[:12]}",
        commit_description=f"{source_message}\n\n{commit_marker}".strip(),
        revision=branch,
        parent_commit=parent_commit,
    ).oid


def was_promoted(run: RunFolder, repo: str, settings: Hub, base_commit: str) -> bool:
    """Return whether this run's candidate was promoted after the commit that it was compared with."""
    candidate = run.manifest.get("candidate")
    if candidate is None:
        return False
    commits = hub.retry(lambda: hub.list_commits(repo, settings.revision), 60 * settings.retry_minutes, "promote")
    newer = commits_after(commits, base_commit)
    return len(newer) < len(commits) and any(_commit_marker(candidate) in commit.message for commit in newer)


def _commit_marker(source: str) -> str:
    """Return the line by which the commit that promotes `source` is found again."""
    return f"Promotes {source}"


def _resolve_adapter_commit(client: HfApi, repo: str, revision: str) -> str:
    """Return the commit hash of a revision; raises InvalidInputError if it does not exist or holds no adapter."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = hub.retry(lambda: client.model_info(repo, revision=revision), hub.CHECK_SECONDS, "hub")
    except RevisionNotFoundError:
        raise InvalidInputError(
            f"{repo} has no revision {revision}; expected a branch, a tag such as v1, or a commit"
        ) from None
    except RepositoryNotFoundError:
        raise InvalidInputError(
            f"{repo} is not on the Hub, or HF_TOKEN may not read it; check TAGGER_HUB_REPO"
        ) from None
    missing = {"adapter_config.json", "adapter_model.safetensors"} - {file.rfilename for file in info.siblings or ()}
    if missing:
        raise InvalidInputError(
            f"{repo} at {revision} holds no adapter: {', '.join(sorted(missing))} is missing; name another revision"
        )
    return str(info.sha)


def _commit_operations(
    client: HfApi, repo: str, source: str, base_commit: str
) -> list[CommitOperationCopy | CommitOperationDelete]:
    """List the operations that turn the files of `base_commit` into those of `source`."""
    from huggingface_hub import CommitOperationCopy, CommitOperationDelete
    from huggingface_hub.hf_api import RepoFile

    def blobs(revision: str) -> dict[str, str]:
        tree = client.list_repo_tree(repo, recursive=True, revision=revision)
        files = (file for file in tree if isinstance(file, RepoFile) and file.path not in PRESERVED_FILES)
        return {file.path: file.blob_id for file in files}

    new, old = blobs(source), blobs(base_commit)
    return [
        *(CommitOperationCopy(path, path, source) for path, blob in new.items() if old.get(path) != blob),
        *(CommitOperationDelete(path) for path in old.keys() - new.keys()),
    ]


def _version_tag(client: HfApi, repo: str, commit: str) -> str:
    """Return the version tag of a commit, creating the next number if it has none."""
    versions = {
        tag.name: tag.target_commit for tag in client.list_repo_refs(repo).tags if re.fullmatch(r"v\d+", tag.name)
    }
    if existing := [name for name, target in versions.items() if target == commit]:
        return existing[0]
    number = 1 + max((int(name[1:]) for name in versions), default=0)
    client.create_tag(repo, tag=f"v{number}", revision=commit, exist_ok=True)
    return _version_tag(client, repo, commit)  # somebody else may have taken the number
