"""Mask secrets in texts that leave the job: passwords in URLs, tokens, and the values of secret variables.

This module imports only the standard library.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

MASK = "***"

_NAME_OF_SECRET = re.compile(
    r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|APIKEY|API_KEY|ACCESS_KEY|ACCOUNT_KEY|STORAGE_KEY|SAS_TOKEN|PRIVATE_KEY)$",
    re.IGNORECASE,
)
_MIN_SECRET = 6
"""Shorter values of secret variables are not looked for: they would be found in the middle of ordinary words."""
_MIN_UNIQUE = 12
"""Shorter values may be in a text by chance, so they are masked but not taken for the secret."""
_URL = re.compile(r"((?<![A-Za-z0-9+.-])[A-Za-z][A-Za-z0-9+.-]{0,20}://)([^\s\"'<>`|]++)")
_PARAMETER = re.compile(r"([?&;#][\w.-]++=)[^&;#]++")
_NAME_OF_PARAMETER = re.compile(
    r"token|secret|passw|pwd|signature|credential|api[_-]?key|access[_-]?key|[?&;#](?:sig|key|auth)=", re.IGNORECASE
)
_WEBHOOK = re.compile(
    r"(hooks\.slack\.com/\w+/|(?:\w+\.)?discord(?:app)?\.com/api/webhooks/|[\w.-]*webhook\.office\.com/).+",
    re.IGNORECASE,
)
"""Addresses that are passwords: whoever knows them may post."""
_remembered: set[str] = set()
"""Secrets that are in no environment variable, such as one of a file of settings."""
_TOKENS = (
    # a token of the Hub; names such as hf_transfer have neither a digit nor a capital
    (re.compile(r"\bhf_(?=[A-Za-z]*[A-Z0-9])[A-Za-z0-9]{8,}"), MASK),
    (re.compile(r"\b(Bearer|Basic) [A-Za-z0-9._~+/=-]{8,}"), rf"\1 {MASK}"),
)


def remember(secret: str) -> None:
    """Mask a secret that was read from somewhere else than the environment, too."""
    _remembered.add(secret.strip())


def redact(text: str) -> str:
    """Mask every secret in a text: in URLs, by the form of tokens, and the values of this process's variables."""
    for secret in _secrets(os.environ):
        text = text.replace(secret, MASK)
    text = mask_urls(text)
    for pattern, replacement in _TOKENS:
        text = pattern.sub(replacement, text)
    return text


def mask_urls(text: str) -> str:
    """Mask the user and password of each URL in a text, its parameters that are secrets, and addresses of webhooks."""
    return _URL.sub(_masked_url, text) if "://" in text else text


def _masked_url(url: re.Match[str]) -> str:
    scheme, rest = url.groups()
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    user, colon, after = authority.partition(":")
    # a password may have characters that belong encoded, so it ends at the last @; host:port/path@revision has none
    has_password = colon and "@" not in user and not re.fullmatch(r"\d{1,5}", after)
    end = rest.rfind("@") if has_password else authority.rfind("@")
    if end >= 0:
        rest = MASK + rest[end:]
    rest = _PARAMETER.sub(
        lambda found: found[1] + MASK if _NAME_OF_PARAMETER.search(found[1]) else found[0],
        rest,
    )
    webhook = _WEBHOOK.fullmatch(rest)
    return scheme + (webhook[1] + MASK if webhook else rest)


def redact_json(value: Any) -> Any:
    """Mask every secret in the texts of JSON data; keys stay as they are."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {key: redact_json(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact_json(entry) for entry in value]
    return value


def has_secret(text: str, variables: Mapping[str, str]) -> bool:
    """Return whether a text contains the value of a secret variable, of this process or of others."""
    secrets = {*_secrets(os.environ), *_secrets(variables)}
    return any(secret in text for secret in secrets if len(secret) >= _MIN_UNIQUE)


def _secrets(variables: Mapping[str, str]) -> list[str]:
    """Return the values of secret variables and the passwords in URLs of others, the longest first."""
    found = set(_remembered)
    for name, value in variables.items():
        if _NAME_OF_SECRET.search(name) and not name.upper().startswith("TAGGER_"):
            found.add(value.strip())
        elif re.fullmatch(r"\s*[A-Za-z][\w+.-]*://\S+@\S*", value):
            found.update(_passwords(value))
    return sorted((secret for secret in found if len(secret) >= _MIN_SECRET), key=len, reverse=True)


def _passwords(url: str) -> Iterator[str]:
    """Yield the password of a URL as it is written and decoded: a library may show either alone."""
    from urllib.parse import unquote

    userinfo, _, _ = url.partition("://")[2].rpartition("@")
    password = userinfo.partition(":")[2]
    if userinfo and "/" not in userinfo.partition(":")[0]:
        yield from (password, unquote(password))
