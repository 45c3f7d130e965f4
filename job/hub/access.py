"""Token permissions, and the commits that names on the Hub stand for; checked before training."""

from __future__ import annotations

from typing import Literal

from job.errors import InvalidInputError, PublishError
from job.hub import client
from job.hub.answers import Account
from job.settings import Hub
from job.types import HubRevision, TokenInfo

Role = Literal["model", "dataset", "embedder"]
_LABELS = {"model": "base model", "dataset": "data set", "embedder": "embedding model"}
_VARIABLES = {"model": "TAGGER_BASE_MODEL", "dataset": "TAGGER_DATA_DATASET", "embedder": "TAGGER_EVAL_EMBEDDER"}
_REVISION_VARIABLES = {
    "model": "TAGGER_BASE_REVISION",
    "dataset": "TAGGER_DATA_REVISION",
    "embedder": "TAGGER_EVAL_EMBEDDER_REVISION",
}


def token_info() -> TokenInfo:
    """Return the account and the permissions of the token.

    Raises InvalidInputError if the Hub does not know the token, or cannot be reached.
    """
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    if not (client.token() or "").isascii():
        raise InvalidInputError("HF_TOKEN is not valid: it contains a character that no token has; copy it again")
    try:
        answer = client.retry(client.api().whoami, client.CHECK_SECONDS, "hub")
        account = Account.model_validate(answer)  # the shape was checked when it came
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise InvalidInputError(
                "HF_TOKEN is not valid: the Hub does not know it. Create a token with write access under Settings, "
                "Access Tokens, or unset HF_TOKEN to train without publishing"
            ) from None
        raise client.hub_unreachable(error) from None
    except (httpx2.HTTPError, OSError) as error:
        raise client.hub_unreachable(error) from None
    auth = account.auth and account.auth.accessToken
    scopes = (auth and auth.fineGrained and auth.fineGrained.scoped) or []
    return TokenInfo(
        user=account.name,
        organizations=tuple(organization.name for organization in account.orgs or ()),
        role=(auth and auth.role) or "write",
        writable=frozenset(
            scope.entity.name
            for scope in scopes
            if "repo.write" in (scope.permissions or ()) and scope.entity is not None and scope.entity.name is not None
        ),
    )


def prepare_repo(repo: str, owner: TokenInfo, *, private: bool) -> None:
    """Create the model repo if it does not exist, and check that the token may commit to it.

    Raises InvalidInputError if the token has no access to the namespace or no write permission, if the repo is
    public although `private` is set, or if the Hub cannot be reached.
    """
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    namespace = repo.partition("/")[0]
    _check_permissions(repo, namespace, owner)
    try:
        is_private = client.retry(lambda: _create_if_missing(repo, private=private), client.CHECK_SECONDS, "hub")
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403, 404):
            raise InvalidInputError(
                f"HF_TOKEN may not write to {repo} ({client.error_message(error)}); give it write access to "
                f"{namespace}, or set TAGGER_HUB_PUSH=never"
            ) from None
        raise client.hub_unreachable(error) from None
    except (httpx2.HTTPError, OSError) as error:
        raise client.hub_unreachable(error) from None
    if private and not is_private:
        raise InvalidInputError(
            f"{repo} is public and TAGGER_HUB_PRIVATE=true, so nothing is pushed there. Make the repo private, set "
            "TAGGER_HUB_REPO to another one, or set TAGGER_HUB_PRIVATE=false"
        )


def require_private(repo: str, settings: Hub) -> None:
    """Raise PublishError if the repo is public now, although TAGGER_HUB_PRIVATE is set.

    It was private when the run began, but its owner may have changed that, or may have deleted and recreated it.
    """
    if settings.private and client.api().repo_info(repo).private is not True:
        raise PublishError(
            f"{repo} is public now and TAGGER_HUB_PRIVATE=true, so nothing was uploaded. Make the repo private again, "
            "or set TAGGER_HUB_PRIVATE=false, then run the same command again; what was trained is saved"
        )


def _check_permissions(repo: str, namespace: str, owner: TokenInfo) -> None:
    """Raise InvalidInputError if the token's own description rules out a commit to the repo."""
    if namespace not in (owner.user, *owner.organizations):
        allowed = ", ".join((owner.user, *owner.organizations))
        raise InvalidInputError(
            f"TAGGER_HUB_REPO={repo}: HF_TOKEN has no access to the namespace {namespace}; expected one of {allowed}"
        )
    if owner.role == "read":
        raise InvalidInputError(
            "HF_TOKEN may only read, and publishing needs write access. Create a token with write access under "
            "Settings, Access Tokens, or set TAGGER_HUB_PUSH=never"
        )
    if owner.role == "fineGrained" and not owner.writable & {namespace, repo}:
        raise InvalidInputError(
            f"HF_TOKEN is fine-grained and may not write to repos of {namespace}; allow it under Settings, Access "
            "Tokens, or set TAGGER_HUB_PUSH=never"
        )


def _create_if_missing(repo: str, *, private: bool) -> bool:
    """Create the repo if it does not exist, check write access, and return whether the repo is private."""
    from huggingface_hub.errors import RepositoryNotFoundError

    api = client.api()
    try:
        is_private = bool(api.repo_info(repo).private)
    except RepositoryNotFoundError:
        api.create_repo(repo, private=private, exist_ok=True)
        is_private = bool(api.repo_info(repo).private)
    api.auth_check(repo, write=True)
    return is_private


def resolve_revision(role: Role, name: str, revision: str | None) -> HubRevision:
    """Return the commit hash and licence of a model or data set at a revision, or at its head for None.

    Raises InvalidInputError with a message of its own for each of these: the repo is missing, is gated, has no such
    revision, has no safetensors weights (models only), or the Hub cannot be reached.
    """
    import httpx2
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    variable, repo = _VARIABLES[role], f"the {_LABELS[role]} {name}"
    try:
        return client.retry(lambda: _revision_info(role, name, revision), client.CHECK_SECONDS, "hub")
    except GatedRepoError:
        raise InvalidInputError(
            f"{repo} is gated; accept its terms on its page on the Hub with the account of HF_TOKEN, or set {variable} "
            "to another"
        ) from None
    except RepositoryNotFoundError:
        raise InvalidInputError(
            f"{repo} is not on the Hub, or is private and HF_TOKEN may not read it; check {variable}"
        ) from None
    except RevisionNotFoundError:
        raise InvalidInputError(f"{repo} has no revision {revision}; check {_REVISION_VARIABLES[role]}") from None
    except HFValidationError:
        raise InvalidInputError(
            f"{variable}={name} is neither a local path that exists nor a Hub id; expected owner/name"
        ) from None
    except (httpx2.HTTPError, OSError) as error:
        raise client.hub_unreachable(error) from None


def _revision_info(role: Role, name: str, revision: str | None) -> HubRevision:
    """Ask the Hub once; raises InvalidInputError for a model without safetensors weights."""
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    api = client.api()
    repo_type = "dataset" if role == "dataset" else "model"
    validate_repo_id(name)
    api.auth_check(name, repo_type=repo_type)
    info = api.repo_info(name, repo_type=repo_type, revision=revision)
    files = [file.rfilename for file in getattr(info, "siblings", None) or []]
    if repo_type == "model" and files and not any(file.endswith(".safetensors") for file in files):
        raise InvalidInputError(
            f"the {_LABELS[role]} {name} has no weights in safetensors, and pickles are not read because they can run "
            f"code; choose another revision or model ({_VARIABLES[role]})"
        )
    return HubRevision(str(info.sha), licence_of(info))


def licence_of(info: object) -> str | None:
    """Return the licence that a repo's card names, the first of several; None for anything that is no name.

    For `other`, the name that the card gives to it.
    """
    card = getattr(info, "card_data", None)
    found = getattr(card, "license", None)
    licence = _name(found[0] if isinstance(found, list) and found else found)
    return (_name(getattr(card, "license_name", None)) or licence) if licence == "other" else licence


def _name(value: object) -> str | None:
    return " ".join(value.split())[:200] or None if isinstance(value, str) else None
