"""Put a revision of the repo in the place of the published one: promotion of a candidate, or a rollback."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from job.errors import InvalidInputError, PublishError
from job.hub import client as hub
from job.push import commits_after
from job.runs import shutdown
from job.runs.run_folder import RunFolder
from job.settings import Hub
from job.types import Published

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationCopy, CommitOperationDelete, HfApi

PRESERVED_FILES = ".gitattributes"
"""How the repo keeps its files is not part of what is published."""


def promote(repo: str, revision: str, settings: Hub, *, parent: str | None = None) -> Published:
    """Make the files of the published branch those of a revision, by one commit, and tag it v1, v2, ...

    The commit stands on `parent`, or without one on the head that is found now; where another commit
    has come since, nothing is overwritten. Files are copied on the Hub's side. A commit that was made
    already, its answer lost, is found by its message.
    Raises InvalidInputError when the revision is not there or holds no adapter, and PublishError when there was
    another writer; errors of the client are its own.
    """
    client = hub.api()
    wanted = _resolve_adapter_commit(client, repo, revision)
    mark = f"Promotes {wanted}"
    seconds = 60 * settings.retry_minutes
    stands_on = parent or hub.branch_head(repo, settings.revision)

    def attempt() -> str:
        commits = client.list_repo_commits(repo, revision=settings.revision)
        newer = commits_after(commits, stands_on)
        if made := [commit.commit_id for commit in newer if mark in commit.message]:
            return made[0]
        if newer:
            raise PublishError(
                f"{repo} was at {stands_on[:12]} when it was compared with, and someone has published "
                f"{newer[0].commit_id[:12]} ({newer[0].title}) since; nothing was overwritten. The same command again "
                "compares with that one"
            )
        if parent is None and (stands_on == wanted or mark in commits[0].message):
            return stands_on
        operations = _commit_operations(client, repo, wanted, stands_on)
        if not operations:
            return stands_on
        source = client.list_repo_commits(repo, revision=wanted)[0]
        shutdown.check()  # what was interrupted publishes nothing
        return client.create_commit(
            repo,
            operations=operations,
            commit_message=f"promote {wanted[:12]}",
            commit_description=f"{source.message}\n\n{mark}".strip(),
            revision=settings.revision,
            parent_commit=stands_on,
        ).oid

    commit = hub.retry(attempt, seconds, "promote")
    tag = hub.retry(lambda: _version_tag(client, repo, commit), seconds, "promote")
    return Published(repo, commit, f"{client.endpoint}/{repo}/commit/{commit}", tag)


def was_promoted(run: RunFolder, repo: str, settings: Hub, parent: str) -> bool:
    """Whether this run's candidate was promoted onto this commit."""
    candidate = run.manifest.get("candidate")
    if candidate is None:
        return False
    client = hub.api()
    commits = hub.retry(
        lambda: client.list_repo_commits(repo, revision=settings.revision), 60 * settings.retry_minutes, "promote"
    )
    return any(commit.commit_id == parent for commit in commits) and any(
        f"Promotes {candidate}" in commit.message for commit in commits_after(commits, parent)
    )


def _resolve_adapter_commit(client: HfApi, repo: str, revision: str) -> str:
    """The hash of the commit that a name stands for; raises InvalidInputError when it is none that holds an adapter."""
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
            f"{repo} at {revision} holds no adapter: {', '.join(sorted(missing))} is not there; name another"
        )
    return str(info.sha)


def _commit_operations(
    client: HfApi, repo: str, revision: str, onto: str
) -> list[CommitOperationCopy | CommitOperationDelete]:
    """What makes the files of a commit those of a revision."""
    from huggingface_hub import CommitOperationCopy, CommitOperationDelete
    from huggingface_hub.hf_api import RepoFile

    def files(at: str) -> dict[str, str]:
        tree = client.list_repo_tree(repo, recursive=True, revision=at)
        return {file.path: file.blob_id for file in tree if isinstance(file, RepoFile) and file.path != PRESERVED_FILES}

    wanted, there = files(revision), files(onto)
    return [
        *(CommitOperationCopy(path, path, revision) for path, blob in wanted.items() if there.get(path) != blob),
        *(CommitOperationDelete(path) for path in there.keys() - wanted.keys()),
    ]


def _version_tag(client: HfApi, repo: str, commit: str) -> str:
    """The version tag of a commit: the one it has, or the next number."""
    versions = {
        tag.name: tag.target_commit for tag in client.list_repo_refs(repo).tags if re.fullmatch(r"v\d+", tag.name)
    }
    if had := [name for name, target in versions.items() if target == commit]:
        return had[0]
    number = 1 + max((int(name[1:]) for name in versions), default=0)
    client.create_tag(repo, tag=f"v{number}", revision=commit, exist_ok=True)
    return _version_tag(client, repo, commit)  # another writer may have taken the number
