"""Check the proxies that the environment names, before a client of the Hub fails with an error of its own."""

from __future__ import annotations

import importlib.util
import os
from urllib.parse import urlsplit

from job.errors import InvalidInputError

VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
SCHEMES = ("http", "https", "socks5", "socks5h")
EXPECTED = "expected http://host:port, https://host:port or socks5://host:port"


def check_proxies() -> None:
    """Raise InvalidInputError for each proxy that no request could be sent through.

    A client reads all of these variables, also in lower case, when it is created, and not the one alone that it needs.
    An address without a scheme is one of http. The values are not shown, because they may hold a password.
    """
    if any(host.strip() == "*" for name in ("no_proxy", "NO_PROXY") for host in os.environ.get(name, "").split(",")):
        return
    problems = []
    for variable in VARIABLES:
        name = variable.lower() if os.environ.get(variable.lower()) else variable
        if (value := os.environ.get(name)) and (problem := _problem(value)):
            problems.append(f"{name} names a proxy that cannot work: {problem}; {EXPECTED}, or unset {name}")
    if problems:
        raise InvalidInputError(*problems)


def _problem(value: str) -> str | None:
    scheme, has_scheme, rest = value.partition("://")
    if not has_scheme:
        scheme, rest = "http", value
    if scheme.lower() not in SCHEMES:
        return "it begins with no scheme that is supported"
    if any(character.isspace() for character in value):
        return "it has white space in it"
    try:
        address = urlsplit(f"//{rest}")
        host, port = address.hostname, address.port
    except ValueError:
        return "its host or port is not valid"
    if not host or (not has_scheme and address.path.strip("/")):
        return "it has no host"
    if port == 0:
        return "its port is 0"
    if scheme.lower().startswith("socks") and importlib.util.find_spec("socksio") is None:
        return "SOCKS needs the Python package socksio, which is not installed"
    return None
