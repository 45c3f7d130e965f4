"""Types of settings, with their validators. This module imports nothing from the job.

A validator raises ValueError with what is allowed; `settings.describe_error` adds the variable and its value.
"""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, SecretStr
from pydantic_settings import NoDecode

MAX_REPO_NAME = 96
"""Characters that the Hub's client allows for an owner and for a name."""


def _comma_separated(value: object) -> object:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _json_list(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        texts = json.loads(value)
    except (ValueError, RecursionError):
        texts = None
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError('expected a JSON list of texts, for example ["a text", "another text"]')
    if not all(text.strip() for text in texts):
        raise ValueError("a text in the list is empty; remove it")
    return tuple(texts)


def _separator(value: object) -> object:
    """Add a space on each side that has no white space, because env files strip it from values."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        raise ValueError("expected a text that is not only white space, for example ' ->: '")
    before = "" if value[0].isspace() else " "
    after = "" if value[-1].isspace() else " "
    return before + value + after


def _example_count(value: float) -> float:
    if value >= 1 and value != int(value):
        raise ValueError("expected a fraction below 1, or a whole number of examples")
    return value


def _shard(value: str) -> str:
    match = re.fullmatch(r"(auto|\d{1,7})(?:/(\d{1,7}))?", value)
    index, count = match.groups() if match else ("", None)
    valid = index == "auto" and (count is None or int(count) >= 1)
    if not valid and (count is None or not index or index == "auto" or int(index) >= int(count)):
        raise ValueError("expected auto, auto/n, or i/n with i from 0 to n - 1, for example 0/8")
    return value


def _threshold(value: object) -> object:
    try:
        if value == "auto" or 0 <= float(str(value)) < 1:
            return value
    except ValueError:
        pass
    raise ValueError("expected auto, or a number from 0 to below 1")


def _not_blank(value: str) -> str:
    if not value.strip():
        raise ValueError("expected a name, not only white space")
    return value


def repo_id(value: str) -> str:
    """Accept what the Hub's client accepts."""
    if value.count("/") != 1 or not all(value.split("/")):
        raise ValueError("expected owner/name")
    name = rf"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{{0,{MAX_REPO_NAME - 2}}}[A-Za-z0-9_])?"
    if not re.fullmatch(rf"{name}/{name}", value) or "--" in value or ".." in value or value.endswith(".git"):
        raise ValueError(
            "expected owner/name, each of at most 96 ASCII letters, digits, '_', '.' and '-', not beginning or ending "
            "with '.' or '-', without '--' or '..', and not ending in .git"
        )
    return value


def _git_revision(value: str) -> str:
    """Accept what git accepts as the name of a branch or tag, or as a commit."""
    forbidden = re.search(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|/\.|\.lock(?:/|$)", value)
    if forbidden or value.startswith(("-", "/", ".")) or value.endswith(("/", ".")) or value == "@":
        raise ValueError("expected the name of a branch or tag, or a commit, as git allows them")
    return value


def allowed_name(text: str, most: int) -> str:
    """Return a text as a name for the Hub and for folders: at most `most` ASCII letters, digits, '_', '.' and '-'."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", plain)
    name = re.sub(r"-{2,}", "-", re.sub(r"\.{2,}", ".", name)).strip("-._")[:most].strip("-._")
    return name.removesuffix(".git") or "model"


def parse_budget(value: str) -> tuple[float, str]:
    """Return a budget as an amount above 0 with its unit: seconds (`s`), or US dollars (`$`)."""
    match = re.fullmatch(r"(\$?)([0-9]+(?:\.[0-9]+)?)([smh]?)", value.strip())
    if match is None or bool(match[1]) == bool(match[3]) or float(match[2]) == 0:
        raise ValueError("expected a time such as 90s, 30m or 2h, or US dollars such as $3")
    if match[1]:
        return float(match[2]), "$"
    return float(match[2]) * {"s": 1, "m": 60, "h": 3600}[match[3]], "s"


def _store_url(value: str) -> str:
    """Check the URL of a run store; a wrong one may hold a secret and is not shown in full."""
    match = re.fullmatch(r"(?:(s3|gs|az)://([^/@\s]+)|(hf)://buckets/[\w.-]+/[\w.-]+|(file)://)(/\S*)?", value)
    if match is None or "@" in value or (match[4] and not (match[5] or "").strip("/")):
        raise ValueError(
            "expected s3://, gs:// or az:// with a bucket, hf://buckets/<owner>/<bucket>, or file:/// with a path; a "
            "prefix may follow, and there may be no user or password"
        )
    return value.rstrip("/")


def _budget(value: str) -> str:
    parse_budget(value)
    return value.strip()


def _webhook(value: SecretStr) -> SecretStr:
    text = value.get_secret_value().strip()
    try:
        parts = urlsplit(text)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid or not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError("expected the URL of a webhook, such as https://hooks.example.com/services/…")
    return SecretStr(text)


def _run_id(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", value):
        raise ValueError("expected letters, digits, '_', '.' and '-', beginning with a letter or digit")
    return value


def _cloud_name(value: str) -> str:
    if not re.fullmatch(r"[\w.-]+", value, re.ASCII):
        raise ValueError("expected letters, digits, '_', '.' and '-'")
    return value


def _cron(value: str) -> str:
    fields, ranges = value.split(), ((0, 59), (0, 23), (1, 31), (1, 12), (0, 7))
    if value != "never" and not (len(fields) == 5 and all(map(_is_cron_field, fields, ranges))):
        raise ValueError("expected minute, hour, day of the month, month, day of the week, for example 23 4 * * 1")
    return " ".join(fields)


def _is_cron_field(field: str, limits: tuple[int, int]) -> bool:
    parts = [re.fullmatch(r"(?:\*|(\d{1,2})(?:-(\d{1,2}))?)(?:/([1-9]\d?))?", part) for part in field.split(",")]
    return all(
        part is not None and all(limits[0] <= int(number) <= limits[1] for number in part.group(1, 2) if number)
        for part in parts
    )


StoreUrl = Annotated[str, AfterValidator(_store_url)]
Budget = Annotated[str, AfterValidator(_budget)]
Identifier = Annotated[str, Field(min_length=1, max_length=1024), AfterValidator(_not_blank)]
NameList = Annotated[tuple[Identifier, ...], NoDecode, BeforeValidator(_comma_separated)]
TextList = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_json_list)]
Separator = Annotated[str, BeforeValidator(_separator)]
ExampleCount = Annotated[float, AfterValidator(_example_count)]
Threshold = Annotated[float | Literal["auto"], BeforeValidator(_threshold)]
Shard = Annotated[str, AfterValidator(_shard)]
GitRevision = Annotated[str, Field(min_length=1, max_length=255), AfterValidator(_git_revision)]
RepoId = Annotated[str, AfterValidator(repo_id)]
RunId = Annotated[str, Field(max_length=128), AfterValidator(_run_id)]
TrackerList = Annotated[
    tuple[Literal["wandb", "mlflow", "tensorboard", "trackio"], ...], NoDecode, BeforeValidator(_comma_separated)
]
Webhook = Annotated[
    SecretStr, Field(max_length=2048), AfterValidator(_webhook), PlainSerializer(lambda _: None, when_used="json")
]
"""A URL that is a password: whoever knows it may post. As JSON it is null, so that it is in no file."""
CloudName = Annotated[str, Field(max_length=63), AfterValidator(_cloud_name)]
Cron = Annotated[str, AfterValidator(_cron)]


def is_unicode(text: str) -> bool:
    """Check that a text can be written as UTF-8: environment variables and JSON can hold lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
