"""What a token may do on the Hub, and which commit a name stands for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from job.errors import InvalidInputError
from job.types import HubRevision, TokenInfo

if TYPE_CHECKING:
    pass
from job.hub import client

Kind = Literal["model", "dataset"]


def token_info() -> TokenInfo:
    """Whose token it is; raises InvalidInputError when the Hub does not know it or cannot be reached."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    if not (client.token() or "").isascii():
        raise InvalidInputError("HF_TOKEN is not valid: it holds characters that no token has; copy it again")
    try:
        said = client.retry(client.api().whoami, client.CHECK_SECONDS, "hub")
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise InvalidInputError(
                "HF_TOKEN is not valid: the Hub does not know it. Make a new one with write access under "
                "Settings, Access Tokens, or unset it to train without publishing"
            ) from None
        raise client.hub_unreachable(error) from None
    except (httpx2.HTTPError, OSError) as error:
        raise client.hub_unreachable(error) from None
    access = said.get("auth", {}).get("accessToken", {})
    fine_grained = access.get("fineGrained", {})
    writable = {
        scope["entity"]["name"]
        for scope in fine_grained.get("scoped", [])
        if "repo.write" in scope.get("permissions", []) and "name" in scope.get("entity", {})
    }
    return TokenInfo(
        user=said["name"],
        organizations=tuple(org["name"] for org in said.get("orgs", [])),
        role=access.get("role", "write"),
        writable=frozenset(writable),
    )


def prepare_repo(repo: str, who: TokenInfo, *, private: bool) -> None:
    """Make sure that the repo is there, is private if wanted, and takes this token's commits.

    Raises InvalidInputError for a namespace that is not the token's, a token that may not write, and a public
    repo that was meant to be private.
    """
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    namespace = repo.partition("/")[0]
    if namespace not in (who.user, *who.organizations):
        mine = ", ".join((who.user, *who.organizations))
        raise InvalidInputError(f"TAGGER_HUB_REPO={repo}: the namespace {namespace} is not the token's; it has {mine}")
    if who.role == "read":
        raise InvalidInputError(
            "HF_TOKEN may only read; publishing needs one with write access. Make one under Settings, Access Tokens, "
            "or set TAGGER_HUB_PUSH=never"
        )
    if who.role == "fineGrained" and not who.writable & {namespace, repo}:
        raise InvalidInputError(
            f"HF_TOKEN is fine-grained and may not write to repos of {namespace}; allow it under Settings, Access "
            "Tokens, or set TAGGER_HUB_PUSH=never"
        )
    api = client.api()

    def prepare() -> bool:
        try:
            is_private = bool(api.repo_info(repo).private)
        except RepositoryNotFoundError:
            api.create_repo(repo, private=private, exist_ok=True)
            is_private = bool(api.repo_info(repo).private)
        api.auth_check(repo, write=True)
        return is_private

    try:
        is_private = client.retry(prepare, client.CHECK_SECONDS, "hub")
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
            f"{repo} is public and TAGGER_HUB_PRIVATE=true; nothing is pushed there. Make the repo private, name "
            "another TAGGER_HUB_REPO, or set TAGGER_HUB_PRIVATE=false"
        )


def resolve_revision(kind: Kind, name: str, revision: str | None) -> HubRevision:
    """The commit hash and licence of a model or data set at a revision, or at its head.

    Raises InvalidInputError, each in its own words, when it is missing or gated, or has no such revision.
    """
    import httpx2
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    variable = {"model": "TAGGER_BASE_MODEL", "dataset": "TAGGER_DATA_DATASET"}[kind]
    what = {"model": "base model", "dataset": "data set"}[kind]
    api = client.api()

    def ask() -> HubRevision:
        validate_repo_id(name)
        api.auth_check(name, repo_type=kind)
        info = api.repo_info(name, repo_type=kind, revision=revision)
        files = [file.rfilename for file in getattr(info, "siblings", None) or []]
        if kind == "model" and files and not any(file.endswith(".safetensors") for file in files):
            raise InvalidInputError(
                f"the base model {name} has no weights in safetensors, and pickles are not read because they can run "
                "code; name another revision or model (TAGGER_BASE_MODEL)"
            )
        return HubRevision(str(info.sha), getattr(getattr(info, "card_data", None), "license", None))

    try:
        return client.retry(ask, client.CHECK_SECONDS, "hub")
    except GatedRepoError:
        raise InvalidInputError(
            f"the {what} {name} is gated; accept its terms on its page on the Hub with the account of HF_TOKEN, "
            f"or set {variable} to another"
        ) from None
    except RepositoryNotFoundError:
        raise InvalidInputError(
            f"the {what} {name} is not on the Hub, or is private and HF_TOKEN may not read it; check {variable}"
        ) from None
    except RevisionNotFoundError:
        raise InvalidInputError(
            f"the {what} {name} has no revision {revision}; check {variable.rpartition('_')[0]}_REVISION"
        ) from None
    except HFValidationError:
        raise InvalidInputError(
            f"{variable}={name} is neither a local path that exists nor a Hub id; expected owner/name"
        ) from None
    except (httpx2.HTTPError, OSError) as error:
        raise client.hub_unreachable(error) from None
