"""Secrets are masked in every text that leaves the job, and other texts stay as they are."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import make_settings

from job.config.redaction import has_secret, mask_urls, redact
from job.errors import GateRejected, InvalidInputError, PublishError, print_error
from job.hub import client

ROOT = Path(__file__).parents[1]
SECRET = "pa55w0rd-of-ada"


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        (f"https://ada:{SECRET}@hub.example/x failed", "https://***@hub.example/x failed"),
        (f"http://:{SECRET}@proxy:3128", "http://***@proxy:3128"),
        (f"socks5h://{SECRET}@proxy:1080", "socks5h://***@proxy:1080"),
        (f"'s3://key:{SECRET}@bucket/rows.jsonl' cannot", "'s3://***@bucket/rows.jsonl' cannot"),
        (f"s3://key:a/b+{SECRET}@bucket", "s3://***@bucket"),
        (f"https://me:a@b{SECRET}@host/", "https://***@host/"),
        (f"https://h/x?a=1&X-Amz-Signature={SECRET}&b=2", "https://h/x?a=1&X-Amz-Signature=***&b=2"),
        (f"s3://bucket/x?secret_key={SECRET}", "s3://bucket/x?secret_key=***"),
        (f"az://c/x?sig={SECRET}#part", "az://c/x?sig=***#part"),
        (f"https://hooks.slack.com/services/T0/B0/{SECRET}", "https://hooks.slack.com/services/***"),
        (f"https://discord.com/api/webhooks/1/{SECRET}", "https://discord.com/api/webhooks/***"),
        ("token hf_AbcdEfgh1234 refused", "token *** refused"),
        (f"Authorization: Bearer {SECRET}", "Authorization: Bearer ***"),
    ],
)
def test_a_secret_is_masked_by_its_form(text: str, masked: str) -> None:
    assert redact(text) == masked


@pytest.mark.parametrize(
    "text",
    [
        "hf_hub_download of huggingface_hub, with hf_transfer",
        "hf://datasets/ada/quotes@main/train.jsonl",
        "https://host:8080/path@v1 and https://github.com/a/b@v2?page=3&order=new",
        "mail ada@example.org: 3 tokens, key=value",
    ],
)
def test_other_texts_stay_as_they_are(text: str) -> None:
    assert redact(text) == text


def test_values_of_secret_variables_are_masked_wherever_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("ALL_PROXY", "http://ada:p%40ss-word@proxy:80")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "parallel")
    text = "got 0123456789abcdef, p%40ss-word and p@ss-word in parallel"
    assert redact(text) == "got ***, *** and *** in parallel"
    assert has_secret(text, {})
    assert has_secret(f"for {SECRET}", {"MY_PASSWORD": SECRET})
    assert not has_secret("an ordinary text", {"MY_PASSWORD": SECRET})


def test_every_error_and_its_print_are_masked(capsys: pytest.CaptureFixture[str]) -> None:
    text = f"https://ada:{SECRET}@host failed"
    for error in (
        InvalidInputError(text, text),
        PublishError(text),
        GateRejected(text),
        client.hub_unreachable(OSError(text)),
    ):
        assert SECRET not in str(error) + repr(error)
    print_error(text)
    assert capsys.readouterr().err == "error: https://***@host failed\n"


def test_lines_of_library_loggers_are_masked(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("a_library")
    log.warning("request to %s", f"https://ada:{SECRET}@host")
    try:
        raise OSError(f"http://ada:{SECRET}@proxy does not respond")
    except OSError:
        log.exception("failed")
    assert "request to https://***@host" in caplog.text
    assert "OSError: http://***@proxy does not respond" in caplog.text
    assert SECRET not in caplog.text


@pytest.mark.parametrize(
    "crash",
    ["raise OSError(url)", "import threading; t = threading.Thread(target=lambda: open(url)); t.start(); t.join()"],
)
def test_tracebacks_and_warnings_are_masked(crash: str) -> None:
    code = (
        "import os, warnings; from job.system import logging_setup; logging_setup.configure();"
        f"url = os.environ['HF_ENDPOINT']; warnings.warn(url); {crash}"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_ENDPOINT": f"https://ada:{SECRET}@hub.example"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert "Traceback" in done.stderr
    assert done.stderr.count("https://***@hub.example") >= 2
    assert SECRET not in done.stderr


def test_no_value_of_the_settings_has_a_password(tmp_path: Path) -> None:
    plain = make_settings(tmp_path, tmp_path, data={"dataset": "s3://bucket/rows.jsonl"})
    settings = make_settings(tmp_path, tmp_path, data={"dataset": f"s3://key:{SECRET}@bucket/rows.jsonl"})
    assert settings.data.dataset.endswith(f"{SECRET}@bucket/rows.jsonl"), "what reads the data needs it"
    assert SECRET not in json.dumps(settings.values())
    assert settings.values()["TAGGER_DATA_DATASET"] == "s3://***@bucket/rows.jsonl"
    newer = make_settings(tmp_path, tmp_path, data={"dataset": "s3://key:another@bucket/rows.jsonl"})
    assert newer.digest() == settings.digest() != plain.digest(), "a new password is not another run"


def test_the_address_of_a_commit_has_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"https://ada:{SECRET}@hub.example")
    assert client.commit_url("ada/tagger", "c0ffee") == "https://***@hub.example/ada/tagger/commit/c0ffee"
    assert mask_urls("no address") == "no address"


@pytest.mark.parametrize("text", ["https://a:" + "a" * 100_000, "https://a:b" * 10_000, "x://?" + "token" * 20_000])
def test_long_texts_are_masked_in_linear_time(text: str) -> None:
    started = time.monotonic()
    redact(text)
    assert time.monotonic() - started < 2
