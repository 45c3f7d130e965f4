"""A webhook is told how a run ended, whatever it answers, and cannot change that."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from test_events import python
from webhook import SECRET, Behaviour, webhook

from job import notify
from job.config import environment, redaction
from job.errors import GateRejected, InvalidInputError
from job.settings import Settings


def settings(url: str) -> Settings:
    return Settings.model_validate({"run": {"notify": url}})


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_remembered", set())


def test_an_error_is_told_with_its_code_and_what_to_do() -> None:
    with webhook() as hook, pytest.raises(GateRejected), notify.notified(settings(hook.url)):
        raise GateRejected("fail: micro-F1 is 0.2")
    [told] = hook.received
    assert (told["status"], told["exit_code"], told["message"]) == ("refused", 3, "fail: micro-F1 is 0.2")
    assert told["what_to_do"] in told["text"]
    assert told["scores"] is None


@pytest.mark.parametrize(
    ("stop", "code"), [(KeyboardInterrupt(), 75), (ZeroDivisionError("by zero"), 1), (InvalidInputError("no"), 2)]
)
def test_every_end_is_told(stop: BaseException, code: int) -> None:
    with webhook() as hook, pytest.raises(type(stop)), notify.notified(settings(hook.url)):
        raise stop
    assert [told["exit_code"] for told in hook.received] == [code]


def test_secrets_in_a_message_are_masked() -> None:
    with webhook() as hook, pytest.raises(ValueError, match="password"), notify.notified(settings(hook.url)):
        raise ValueError("https://me:password@example.com has no data")
    assert hook.received[0]["message"] == "ValueError: https://***@example.com has no data"
    assert "password" not in str(hook.received)


@pytest.mark.parametrize(
    ("behaviour", "problem"),
    [
        ("error", "HTTP status 500"),
        ("redirect", "HTTP status 307"),
        ("close", "RemoteProtocolError"),
        ("hang", "no answer within 0 s"),
        ("drip", "no answer within 0 s"),
    ],
)
def test_a_broken_webhook_costs_a_warning_and_bounded_time(
    behaviour: Behaviour, problem: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(notify, "SECONDS", 0.4 if problem.startswith("no") else 10.0)
    started = time.monotonic()
    with webhook(behaviour) as hook:
        with notify.notified(settings(hook.url)) as ending:
            ending.result = "the adapter is at home"
        assert time.monotonic() - started < 5
    [line] = caplog.messages
    assert line == f"run: TAGGER_RUN_NOTIFY was not told how the run ended ({problem})"
    assert len(hook.received) == 1  # in particular, a redirection is not followed
    assert SECRET not in caplog.text


@pytest.mark.parametrize("url", ["hooks.example.com/x", "ftp://example.com/x", "https://", "https://ex ample/", "x"])
def test_a_url_that_is_none_is_refused_and_not_shown(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAGGER_RUN_NOTIFY", url)
    with pytest.raises(InvalidInputError) as caught:
        environment.load()
    [problem] = caught.value.problems
    assert problem.startswith("TAGGER_RUN_NOTIFY=***: expected the URL of a webhook, such as https://")


def test_the_url_is_masked_wherever_settings_and_lines_are_shown() -> None:
    Path(".env").write_text(f"TAGGER_RUN_NOTIFY=https://hooks.example.com/{SECRET}\n")
    done = python("-m", "job", "settings")
    assert "TAGGER_RUN_NOTIFY=***   # .env\n" in done.stdout
    loaded = environment.load()
    assert loaded.values()["TAGGER_RUN_NOTIFY"] == "***"
    assert SECRET not in repr(loaded)
    assert SECRET not in loaded.model_dump_json()
    assert Settings.model_validate(loaded.model_dump(mode="json")).run.notify is None
    assert SECRET not in redaction.redact(f"could not reach https://hooks.example.com/{SECRET}")


def test_the_webhook_is_no_part_of_a_run_and_goes_to_other_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAGGER_RUN_NOTIFY", "https://hooks.example.com/x")
    assert environment.load().digest() == Settings().digest()
    assert environment.explicit_values()["TAGGER_RUN_NOTIFY"] == "https://hooks.example.com/x"
    environment.replace_environment({"TAGGER_LORA_R": "4"})  # a machine's own one stays
    assert environment.load().run.notify is not None
