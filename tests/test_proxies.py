"""Proxies that cannot work are refused before anything is downloaded, and others are left to the client."""

from __future__ import annotations

from pathlib import Path

import httpx2
import pytest
from hub import Hub
from tiny_run import move_to_hub, set_tiny_environment

from job.cli import main
from job.errors import InvalidInputError
from job.hub.proxies import VARIABLES, check_proxies


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.mark.parametrize("name", ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "https_proxy"])
@pytest.mark.parametrize(
    "value",
    [
        "ftp://proxy:3128",
        "socks4://proxy:1080",
        "socks5://proxy:1080",
        "http://user:secret-word@proxy:port",
        "http://proxy:99999",
        "http://proxy:0",
        "http://:3128",
        "http://",
        "//proxy:3128",
        "http:/proxy:3128",
        "http://[::1",
        " http://proxy:3128",
    ],
)
def test_a_proxy_that_cannot_work_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(
        InvalidInputError, match=f"^{name} names a proxy that cannot work: .*; expected http://"
    ) as error:
        check_proxies()
    assert "secret-word" not in str(error.value)
    assert len(str(error.value)) <= 300
    monkeypatch.setenv("NO_PROXY", "localhost, *")
    check_proxies()


@pytest.mark.parametrize(
    "value", ["http://proxy:3128", "https://user:p%40ss@proxy", "proxy:3128", "http://[::1]:80/", ""]
)
def test_a_proxy_that_the_client_takes_is_not_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("HTTPS_PROXY", value)
    check_proxies()
    httpx2.Client().close()


@pytest.mark.parametrize("command", ["run", "prefetch", "sample"])
def test_a_command_that_needs_the_hub_ends_with_2_and_downloads_nothing(
    monkeypatch: pytest.MonkeyPatch,
    loopback_hub: Hub,
    llama: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    move_to_hub(set_tiny_environment(monkeypatch, llama), loopback_hub, llama)
    monkeypatch.setenv("ALL_PROXY", "socks5://proxy:1080")
    assert main([command]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines
    assert sum("SOCKS needs the Python package socksio" in line for line in lines) == 1
    assert loopback_hub.requests == []
