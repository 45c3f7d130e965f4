"""What is no answer of the Hub ends as a sentence: with code 2 before training, with code 4 after it."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from hub import WRITE_TOKEN, Fault, Hub, Repo
from huggingface_hub.errors import HfHubHTTPError
from tiny_run import REPO, move_to_hub, set_tiny_environment

from job.cli import main
from job.hub import access, answers, client
from job.settings import Hub as HubSettings

COMMIT = "c0ffee" * 7
ODD = {
    "html": b"<!doctype html><title>Sign in to the network</title>",
    "empty": b"",
    "cut off": b'{"name": "ada", "orgs": [{"na',
    "deep": b"[" * 100_000,
    "a list": b"[1, 2]",
    "an object": b"{}",
    "null": b"null",
    "a number": b"17",
    "not UTF-8": b'{"name": "\xff\xfe"}',
    "UTF-16": '{"name": "ada"}'.encode("utf-16"),
    "NaN": b"NaN",
}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, loopback_hub: Hub, llama: Path) -> Hub:
    monkeypatch.setattr(client, "CHECK_SECONDS", 1.0)
    hub = move_to_hub(set_tiny_environment(monkeypatch, llama), loopback_hub, llama)
    hub.models[REPO] = Repo(REPO, private=True)
    return hub


def odd(pattern: str, content: bytes, status: int = 200, times: int = 99, **headers: str) -> Fault:
    return Fault(pattern, "answer", times=times, status=status, content=content, headers=headers)


@pytest.mark.parametrize("content", ODD.values(), ids=ODD)
@pytest.mark.parametrize(
    "call",
    [
        "GET /api/whoami-v2",
        f"GET /api/models/{REPO}",
        f"GET /api/models/{REPO}/revision/main",
        f"GET /api/models/{REPO}/commits/main",
        f"GET /api/models/{REPO}/refs",
        f"GET /api/models/{REPO}/tree/main",
        f"POST /api/models/{REPO}/paths-info/main",
        f"POST /api/models/{REPO}/preupload/main",
        f"POST /api/models/{REPO}/commit/main",
        f"POST /{REPO}.git/info/lfs/objects/batch",
        "POST /api/repos/create",
        "GET /api/datasets/tiny/sayings/revision/main",
    ],
)
def test_an_odd_answer_is_refused_for_each_call(call: str, content: bytes) -> None:
    if content == ODD["a list"] and call.endswith(("commits/main", "tree/main", "paths-info/main")):
        content = b"[1, null]"
    with pytest.raises(answers.HubAnswerError, match="is no answer of the Hub: ") as refused:
        answers.check(call, content)
    assert call in str(refused.value)
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize(
    ("call", "content", "field"),
    [
        ("GET /api/whoami-v2", {"name": 7}, "name"),
        ("GET /api/whoami-v2", {"name": "ada", "orgs": {}}, "orgs"),
        ("GET /api/whoami-v2", {"name": "ada", "auth": {"accessToken": "x"}}, "auth.accessToken"),
        ("GET /api/models/a/b", {"id": "a/b", "sha": None}, "sha"),
        ("GET /api/models/a/b", {"id": "a/b", "sha": "../../x"}, "sha"),
        ("GET /api/models/a/b", {"id": "a/b", "sha": COMMIT, "private": "false"}, "private"),
        ("GET /api/models/a/b", {"id": "a/b", "sha": COMMIT, "siblings": [{"rfilename": "../x"}]}, "rfilename"),
        ("GET /api/models/gpt2", {"id": "gpt2", "sha": COMMIT, "siblings": [{"rfilename": "/etc/x"}]}, "rfilename"),
        ("GET /api/models/a/b/refs", {"branches": [], "tags": {}}, "tags"),
        ("GET /api/models/a/b/tree/main", [{"type": "file", "path": "a/../../b", "oid": "1", "size": 1}], "path"),
        ("GET /api/models/a/b/tree/main", [{"type": "file", "path": "a", "oid": "1", "size": -1}], "size"),
        ("POST /api/models/a/b/commit/main", {"commitUrl": "x", "commitOid": "HEAD"}, "commitOid"),
    ],
)
def test_a_field_of_another_shape_is_named(call: str, content: object, field: str) -> None:
    with pytest.raises(answers.HubAnswerError, match=rf"is no answer of the Hub: \S*{field}"):
        answers.check(call, json.dumps(content).encode())


def test_fields_that_nobody_reads_are_left_out(loopback_hub: Hub) -> None:
    about = {"id": "a/b", "sha": COMMIT, "private": True, "safetensors": 3, "cardData": {"license": ["mit"], "x": []}}
    loopback_hub.faults = [odd("/api/models/a/b", json.dumps(about | {"lastModified": 1, "gguf": []}).encode())]
    info = client.api().repo_info("a/b")
    assert (info.sha, info.private, info.card_data.license) == (COMMIT, True, ["mit"])


@pytest.mark.parametrize(
    "content", [b"[]", b"[" * 10_000, b"\xff", b'{"error": {}, "errors": [1, {}]}', b"<html>", b"3", b""]
)
@pytest.mark.parametrize("status", [400, 403, 500])
def test_odd_error_bodies_are_errors_of_the_hub(loopback_hub: Hub, content: bytes, status: int) -> None:
    loopback_hub.faults = [odd("whoami", content, status)]
    with pytest.raises(HfHubHTTPError) as error:
        client.api().whoami(token="hf_any")
    assert error.value.response.status_code == status


def test_an_error_message_of_the_hub_is_shown_short_and_printable() -> None:
    found = answers.error_content(json.dumps({"error": "no\x1b[31m" + "x" * 10_000}).encode(), "application/json")
    [text] = json.loads(found)["error"]
    assert text.startswith("no [31mxxx")
    assert len(text) == answers.LONGEST_ERROR
    assert json.loads(answers.error_content(b"not found", "text/plain")) == {"error": ["not found"]}


@pytest.mark.parametrize(
    ("headers", "found"),
    [
        ({}, True),
        ({"x-repo-commit": "../../x", "etag": '"1"'}, True),
        ({"x-repo-commit": "../../x"}, False),
        ({"x-repo-commit": COMMIT, "etag": '"../x"'}, True),
        ({"x-repo-commit": COMMIT, "etag": '"1"', "x-linked-etag": '".."'}, True),
    ],
)
def test_headers_that_would_lead_out_of_the_cache_are_refused(headers: dict[str, str], found: bool) -> None:
    with pytest.raises(answers.HubAnswerError, match="is no answer of the Hub"):
        answers.check_file_headers("HEAD /a/b/resolve/main/x", headers, found=found)


def test_retry_after_is_a_number_or_a_date_or_nothing() -> None:
    in_a_minute = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    assert 55 < answers.retry_after(in_a_minute) <= 60
    assert answers.retry_after("7") == 7
    assert answers.retry_after("9" * 5000) == 1e9
    past = "Wed, 21 Oct 2015 07:28:00 GMT"
    for nothing in (None, "", "-5", "soon", "1e3", "²", "nan", past, "Wed, 31 Feb 2026 07:28:00 GMT", "Wed, 21 Oct"):
        assert answers.retry_after(nothing) == 0, nothing


TOMORROW = format_datetime(datetime.now(UTC) + timedelta(days=1), usegmt=True)


@pytest.mark.parametrize(
    ("call", "value"),
    [
        ("GET /api/whoami", "3600"),
        ("GET /api/whoami", "9" * 400),
        ("GET /api/whoami", TOMORROW),
        ("/commits/main", "3600"),  # the client itself tries again, five times
    ],
    ids=["an hour", "for ever", "tomorrow", "in the client"],
)
def test_a_long_retry_after_is_not_waited_for(
    loopback_hub: Hub, monkeypatch: pytest.MonkeyPatch, call: str, value: str
) -> None:
    monkeypatch.setattr("job.hub.transport.MAX_CLIENT_WAIT", 0)
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    loopback_hub.models[REPO] = Repo(REPO, private=True)
    loopback_hub.faults = [Fault(call, "status", times=99, status=429, headers={"Retry-After": value})]
    started = time.monotonic()
    with pytest.raises(HfHubHTTPError):
        client.retry(client.api().whoami if "whoami" in call else lambda: client.list_commits(REPO, None), 60, "hub")
    assert time.monotonic() - started < 12


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("whoami", "the Hub cannot be reached (what came back for GET /api/whoami-v2 is no answer"),
        (f"GET /api/models/{REPO}", "the Hub cannot be reached (what came back for GET /api/models/ada/tiny-tagger is"),
        ("GET /api/models/tiny/llama", "the Hub cannot be reached (what came back for GET /api/models/tiny/llama is"),
        (
            "GET /api/datasets/tiny/sayings",
            "the Hub cannot be reached (what came back for GET /api/datasets/tiny/s",
        ),
    ],
)
@pytest.mark.parametrize("content", [ODD["html"], b'{"name": null, "id": 3, "sha": []}'], ids=["html", "odd"])
def test_before_training_an_odd_answer_ends_with_2(
    tiny: Hub, capsys: pytest.CaptureFixture[str], pattern: str, message: str, content: bytes
) -> None:
    tiny.faults = [odd(rf"{pattern}(-v2|/revision/main)?$", content)]
    assert main(["check"]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


MANIFESTS = {
    **{name: content for name, content in ODD.items() if name != "an object"},
    "settings": b'{"settings": [1]}',
    "dataset": b'{"settings": {"TAGGER_LORA_R": 3}, "dataset": "x"}',
}


@pytest.mark.parametrize("content", MANIFESTS.values(), ids=MANIFESTS)
def test_an_odd_published_manifest_ends_with_2(
    tiny: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.setenv("TAGGER_EVAL_GATE", "floor")
    tiny.models[REPO].commit("main", "odd", {"manifest.json": content})
    for command in ("sample", "retrain") if content in (MANIFESTS["deep"], MANIFESTS["settings"]) else ("sample",):
        assert main([command]) == 2
        err = capsys.readouterr().err
        assert f"manifest.json of the adapter in {REPO} cannot be read (manifest.json" in err
        assert "Traceback" not in err


def test_after_training_an_odd_answer_ends_with_4(tiny: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    command: list[str] = []
    for call in ("commits/main", "preupload/main", "/lfs/objects/batch", "POST /api/models/.*/commit/main"):
        for content in (ODD["html"], ODD["a number"], b'{"files": [{}], "objects": [{}], "commitOid": 1}'):
            tiny.faults = [odd(call, content)]
            code = main(command)
            err = capsys.readouterr().err
            assert code == 4, err
            assert "publishing failed (what came back for" in err, (call, content)
            assert "Finish with: TAGGER_RUN_ID=tiny tagger-job push" in err
            assert "Traceback" not in err
            command = ["push"]  # it is trained, and the rest is quick
    tiny.faults = []
    assert main(command) == 0
    assert tiny.models[REPO].titles == ["initial commit", "basic training"]


def test_a_list_of_commits_without_any_is_no_answer(loopback_hub: Hub) -> None:
    loopback_hub.faults = [odd("commits/main", b"[]")]
    with pytest.raises(answers.HubAnswerError, match="names no commit of ada/tiny-tagger at main"):
        client.list_commits(REPO, None)


def test_a_licence_of_any_shape_is_read(loopback_hub: Hub) -> None:
    for number, (licence, expected) in enumerate(
        [("mit", "mit"), (["mit", "gpl"], "mit"), ([], None), ({"a": 1}, None), (3, None), (None, None), ("  ", None)]
    ):
        name = f"big/model{number}"
        loopback_hub.models[name] = Repo(name, licence=licence)  # type: ignore[arg-type]
        assert access.resolve_revision("model", name, None).licence == expected


def test_the_name_of_another_licence_is_read(loopback_hub: Hub) -> None:
    card = {"license": "other", "license_name": "tongyi-qianwen"}
    about = {"id": "big/model", "sha": COMMIT, "private": False, "cardData": card, "siblings": []}
    loopback_hub.models["big/model"] = Repo("big/model")
    loopback_hub.faults = [odd("GET /api/models/big/model$", json.dumps(about).encode())]
    assert access.resolve_revision("model", "big/model", None).licence == "tongyi-qianwen"


def test_an_endless_list_has_an_end(loopback_hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("job.hub.transport.MAX_REQUESTS", 20)
    page = [{"id": COMMIT, "title": "x", "message": "", "authors": [], "date": "2026-01-01T00:00:00.000Z"}]
    link = f'<{loopback_hub.url}/api/models/{REPO}/commits/main?p=1>; rel="next"'
    loopback_hub.faults = [odd("commits/main", json.dumps(page).encode(), times=1000, Link=link)]
    started = time.monotonic()
    with pytest.raises(answers.HubAnswerError, match="have no end"):
        client.retry(lambda: client.list_commits(REPO, None), 0, "hub")
    assert time.monotonic() - started < 10


def test_a_repo_without_a_manifest_has_an_empty_one(loopback_hub: Hub) -> None:
    loopback_hub.models[REPO] = Repo(REPO)
    assert client.published_manifest(HubSettings(repo=REPO)) == {}
