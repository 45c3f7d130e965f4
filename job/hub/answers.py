"""The Hub's answers that the job reads, by call. An answer that does not look like one of these is refused.

The Hub's client takes the shape of answers for granted and raises KeyError, TypeError, AttributeError or RecursionError
for others, which could also be defects of the job. So answers are checked first, and reduced to the fields that
are described here.
"""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

LONGEST_ERROR = 500
"""Characters of the Hub's own error message that are shown."""


class HubAnswerError(OSError):
    """What came back is no answer of the Hub: wrong in form, too large, or too slow."""


class HubTimeoutError(HubAnswerError):
    """The Hub took too long to answer, which may be temporary."""


def _relative(path: str) -> str:
    """Accept a path of a file in a repo: hosts that are not the Hub could send one that leads out of the cache."""
    if path.startswith("/") or ".." in PurePosixPath(path).parts or "\0" in path or "\\" in path:
        raise ValueError("not a path in a repo")
    return path


def _date(text: str) -> str:
    from huggingface_hub.utils import parse_datetime  # type: ignore[attr-defined]

    parse_datetime(text)
    return text


_Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{40,64}$")]
_Path = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_relative)]
_Size = Annotated[int, Field(ge=0)]


class _Answer(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())


class _Named(_Answer):
    name: str


class _Entity(_Answer):
    name: str | None = None


class _Scope(_Answer):
    entity: _Entity | None = None
    permissions: list[str] | None = None


class _FineGrained(_Answer):
    scoped: list[_Scope] | None = None


class _AccessToken(_Answer):
    role: str | None = None
    fineGrained: _FineGrained | None = None  # noqa: N815 - the Hub's name


class _Auth(_Answer):
    accessToken: _AccessToken | None = None  # noqa: N815


class Account(_Named):
    """The account of a token, and what the token may do."""

    orgs: list[_Named] | None = None
    auth: _Auth | None = None


class _Created(_Answer):
    url: str


class _SiblingLfs(_Answer):
    size: _Size
    sha256: _Hash
    pointerSize: _Size  # noqa: N815


class _Sibling(_Answer):
    rfilename: _Path
    size: _Size | None = None
    blobId: str | None = None  # noqa: N815
    lfs: _SiblingLfs | None = None


class _Card(_Answer):
    license: Any = None
    """Whatever a stranger wrote into the card of a base model; `access.licence_of` reads it."""
    license_name: Any = None


class _RepoInfo(_Answer):
    id: str
    sha: _Hash
    private: bool | None = None
    gated: bool | str | None = None
    disabled: bool | None = None
    tags: list[str] | None = None
    siblings: list[_Sibling] | None = None
    cardData: _Card | None = None  # noqa: N815


class _Author(_Answer):
    user: str | None = None


class _Commit(_Answer):
    id: _Hash
    title: str
    message: str
    authors: list[_Author] = []
    date: Annotated[str, AfterValidator(_date)]


class _Ref(_Answer):
    name: str
    ref: str
    targetCommit: _Hash  # noqa: N815


class _Refs(_Answer):
    branches: list[_Ref]
    tags: list[_Ref]
    converts: list[_Ref] = []


class _EntryLfs(_Answer):
    oid: _Hash
    size: _Size
    pointerSize: _Size  # noqa: N815


class _Entry(_Answer):
    type: str
    path: _Path
    oid: str
    size: _Size = 0
    lfs: _EntryLfs | None = None
    xetHash: str | None = None  # noqa: N815


class _UploadMode(_Answer):
    path: str
    uploadMode: str  # noqa: N815
    shouldIgnore: bool  # noqa: N815
    oid: str | None = None


class _Preupload(_Answer):
    files: list[_UploadMode]


class _Committed(_Answer):
    commitUrl: str  # noqa: N815
    commitOid: _Hash  # noqa: N815
    hookOutput: str | None = None  # noqa: N815
    pullRequestUrl: str | None = None  # noqa: N815


class _Message(_Answer):
    message: str


class _Validation(_Answer):
    errors: list[_Message] = []
    warnings: list[_Message] = []


class _LfsAction(_Answer):
    href: str
    header: dict[str, str] | None = None


class _LfsActions(_Answer):
    upload: _LfsAction | None = None
    verify: _LfsAction | None = None


class _LfsError(_Answer):
    code: int
    message: str


class _LfsObject(_Answer):
    oid: _Hash
    size: _Size
    actions: _LfsActions = _LfsActions()
    error: _LfsError | None = None


class _LfsBatch(_Answer):
    transfer: str | None = None
    objects: list[_LfsObject]


class _BucketEntry(_Answer):
    type: Literal["file", "directory"]
    path: _Path
    size: _Size = 0
    xetHash: _Hash = "0" * 64  # noqa: N815
    mtime: Annotated[str, AfterValidator(_date)] | None = None
    uploadedAt: Annotated[str, AfterValidator(_date)] | None = None  # noqa: N815


_BUCKET = r"/api/buckets/[^/]+/[^/]+"
_REPO = r"/api/(?:models|datasets)/[^/]+(?:/[^/]+)?"
_CALLS: tuple[tuple[str, TypeAdapter[Any] | None], ...] = (
    (r"GET /api/whoami-v2", TypeAdapter(Account)),
    (r"POST /api/repos/create", TypeAdapter(_Created)),
    (r"POST /api/validate-yaml", TypeAdapter(_Validation)),
    (rf"GET {_REPO}/auth-check(?:/.*)?", None),  # only its status is read
    (rf"GET {_REPO}/commits/.+", TypeAdapter(list[_Commit])),
    (rf"GET {_REPO}/refs", TypeAdapter(_Refs)),
    (rf"GET {_REPO}/tree/.+", TypeAdapter(list[_Entry])),
    (rf"POST {_REPO}/paths-info/.+", TypeAdapter(list[_Entry])),
    (rf"POST {_REPO}/preupload/.+", TypeAdapter(_Preupload)),
    (rf"POST {_REPO}/commit/.+", TypeAdapter(_Committed)),
    (rf"GET {_REPO}(?:/revision/.+)?", TypeAdapter(_RepoInfo)),
    (rf"GET {_BUCKET}/tree(?:/.+)?", TypeAdapter(list[_BucketEntry])),
    (rf"POST {_BUCKET}/paths-info", TypeAdapter(list[_BucketEntry])),
    (r"POST /.+\.git/info/lfs/objects/batch", TypeAdapter(_LfsBatch)),
)


def check(call: str, content: bytes) -> bytes:
    """Return the content of a successful answer to a call (`GET /api/...`), reduced to the fields that are read.

    The answer to a call that is not in the table stays as it is. Raises HubAnswerError.
    """
    answer = next((answer for pattern, answer in _CALLS if re.fullmatch(pattern, call)), None)
    if answer is None:
        return content
    try:
        return answer.dump_json(answer.validate_json(content), exclude_unset=True)
    except ValidationError as error:
        raise HubAnswerError(f"what came back for {call} is no answer of the Hub: {_reason(content, error)}") from None


def _reason(content: bytes, error: ValidationError) -> str:
    if content.lstrip()[:1] == b"<":
        return "it is HTML"
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    field = ".".join(map(str, first["loc"]))
    message = str(first["msg"]).removeprefix("Value error, ")
    return f"{field[:100]}: {message[:200]}" if field else message[:200]


def error_content(content: bytes, content_type: str) -> bytes:
    """Return the body of an error status as JSON in the form that the Hub's client reads, its messages shortened."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        is_text = content.lstrip()[:1] != b"<" and "html" not in content_type.lower()
        found = {"error": content.decode("utf-8", "replace")} if is_text else {}
    found = found if isinstance(found, dict) else {}
    error = found.get("error")
    errors = error if isinstance(error, list) else [error]
    details = [entry.get("message") for entry in _dicts(found.get("errors"))]
    warnings = [entry.get("message") for entry in _dicts(found.get("warnings"))]
    texts = {
        "error": [_shown(text) for text in errors[:20] if isinstance(text, str) and text.strip()],
        "errors": [{"message": _shown(text)} for text in details[:20] if isinstance(text, str)],
        "warnings": [{"message": _shown(text)} for text in warnings[:20] if isinstance(text, str)],
    }
    return json.dumps({name: entries for name, entries in texts.items() if entries}).encode()


def _dicts(value: object) -> list[dict[str, Any]]:
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _shown(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text[:LONGEST_ERROR])


def check_file_headers(call: str, headers: dict[str, str], *, found: bool) -> None:
    """Check the headers that become names of files in the cache; `found` says that the file exists.

    Raises HubAnswerError.
    """
    commit = headers.get("x-repo-commit")
    if (commit is None and found) or (commit is not None and not re.fullmatch(r"[0-9a-f]{40,64}", commit)):
        raise HubAnswerError(f"what came back for {call} is no answer of the Hub: it names no commit")
    for name in ("etag", "x-linked-etag"):
        etag = headers.get(name, '""').removeprefix("W/").strip('"')
        if (found and not re.fullmatch(r"[\w.-]{0,256}", etag, re.ASCII)) or etag in (".", ".."):
            raise HubAnswerError(f"what came back for {call} is no answer of the Hub: its {name} is not a digest")


def retry_after(value: str | None) -> float:
    """Return the seconds that a Retry-After header asks to wait; 0 without one, or for one that means nothing."""
    text = (value or "").strip()
    if re.fullmatch(r"[0-9]+", text):
        return float(text) if len(text) <= 9 else 1e9
    if re.fullmatch(r"[A-Z][a-z]{2}, \d{2} [A-Z][a-z]{2} \d{4} \d{2}:\d{2}:\d{2} GMT", text, re.ASCII):
        try:
            return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
        except (ValueError, TypeError):  # such as the 31st of February
            return 0.0
    return 0.0
