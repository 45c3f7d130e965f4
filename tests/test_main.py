"""The whole job from the command line: its files, its exit codes, its sentences."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import SAYINGS
from hub import WRITE_TOKEN, Hub

from job.__main__ import main

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, llama: Path) -> pytest.MonkeyPatch:
    """The environment of a run that takes seconds."""
    variables = {
        "TAGGER_BASE_MODEL": str(llama),
        "TAGGER_DATA_DATASET": str(SAYINGS),
        "TAGGER_DATA_LIMIT": "60",
        "TAGGER_DATA_EVAL_SIZE": "8",
        "TAGGER_TRAIN_MAX_STEPS": "3",
        "TAGGER_TRAIN_WARMUP_STEPS": "1",
        "TAGGER_TRAIN_LOGGING_STEPS": "1",
        "TAGGER_SAMPLE_MAX_NEW_TOKENS": "12",
        "TAGGER_SAMPLE_PROMPTS": '["a song about rain", "two coins ->: "]',
        "TAGGER_RUN_DEVICE": "cpu",
        "TAGGER_RUN_ID": "tiny",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_run_goes_through_every_chapter_and_is_not_done_again(
    tiny: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out.splitlines()
    run = tmp_path / "runs" / "tiny"
    assert out[-1] == "not pushed; the adapter is in runs/tiny/adapter"
    assert [line.partition(" ->: ")[0] for line in out[:-1]] == ["a song about rain", "two coins"]

    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["status"] == "complete"
    assert manifest["settings"]["TAGGER_BASE_QUANTIZE"] == "int8"
    assert set(manifest["timings"]) == {"load", "evaluate_base", "train", "evaluate", "push", "sample"}
    scores = json.loads((run / "metrics.json").read_text())["scores"]
    assert set(scores) == {"most_common_tags", "base", "adapter"}
    assert {score["n"] for score in scores.values()} == {8}
    assert [entry["step"] for entry in lines(run / "log.jsonl")] == [1, 2, 3]
    assert len(lines(run / "predictions.jsonl")) == 8
    assert set(lines(run / "predictions.jsonl")[0]) == {"text", "gold", "predicted", "raw"}
    assert [sample["prompt"] for sample in lines(run / "samples.jsonl")] == ["a song about rain ->:", "two coins ->:"]
    files = {file.name for file in (run / "adapter").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md"} <= files

    before = {file: file.stat().st_mtime_ns for file in run.rglob("*")}
    assert main(["run"]) == 0
    assert "complete already" in caplog.text
    capsys.readouterr()
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*")} == before

    assert main(["sample", "another text", "and one more"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.partition(" ->: ")[0] for line in out] == ["another text", "and one more"]
    tiny.setenv("TAGGER_SAMPLE_OUTPUT", "new/answers.jsonl")
    assert main(["sample"]) == 0
    assert lines(Path("new/answers.jsonl")) == lines(run / "samples.jsonl")


def test_a_gate_that_is_not_reached_ends_with_3_and_keeps_everything(
    tiny: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.setenv("TAGGER_EVAL_GATE", "floor")
    tiny.setenv("TAGGER_EVAL_MIN_F1", "0.99")
    assert main([]) == 3
    assert "below TAGGER_EVAL_MIN_F1=0.99: it is not published" in capsys.readouterr().err
    assert (tmp_path / "runs" / "tiny" / "adapter" / "adapter_model.safetensors").is_file()


def test_what_was_pushed_is_what_is_sampled(tiny: pytest.MonkeyPatch, tmp_path: Path, loopback_hub: Hub) -> None:
    tiny.setenv("HF_HUB_OFFLINE", "0")
    tiny.setenv("HF_ENDPOINT", loopback_hub.url)
    tiny.setenv("HF_TOKEN", WRITE_TOKEN)
    tiny.setenv("HF_HOME", str(tmp_path / "hf"))
    tiny.setenv("TAGGER_HUB_REPO", "ada/tiny-tagger")
    tiny.setenv("PYTHONPATH", str(ROOT))
    tiny.chdir(tmp_path)
    done = subprocess.run([sys.executable, "-m", "job"], capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
    commit = loopback_hub.repos["ada/tiny-tagger"].branches["main"][-1]
    assert done.stdout.splitlines()[-1] == f"the adapter is at {loopback_hub.url}/ada/tiny-tagger/commit/{commit.oid}"
    assert f"GET /ada/tiny-tagger/resolve/{commit.oid}/adapter_model.safetensors" in loopback_hub.requests
    adapter = tmp_path / "runs" / "tiny" / "adapter"
    assert commit.files == {file.name: file.read_bytes() for file in adapter.iterdir()}
    for file in (tmp_path / "runs").rglob("*"):
        assert not file.is_file() or WRITE_TOKEN.encode() not in file.read_bytes(), file


def test_a_push_that_fails_ends_with_4_and_the_same_command_finishes_it(
    tiny: pytest.MonkeyPatch, tmp_path: Path, loopback_hub: Hub
) -> None:
    tiny.setenv("HF_HUB_OFFLINE", "0")
    tiny.setenv("HF_ENDPOINT", loopback_hub.url)
    tiny.setenv("HF_TOKEN", WRITE_TOKEN)
    tiny.setenv("HF_HOME", str(tmp_path / "hf"))
    tiny.setenv("TAGGER_HUB_REPO", "ada/tiny-tagger")
    tiny.setenv("PYTHONPATH", str(ROOT))
    command = [sys.executable, "-m", "job"]
    loopback_hub.fail_at = "commit/main"
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 4, done.stderr
    assert "publishing failed" in done.stderr
    assert "Traceback" not in done.stderr
    adapter = tmp_path / "runs" / "tiny" / "adapter"
    trained = (adapter / "adapter_model.safetensors").read_bytes()
    loopback_hub.fail_at = None
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert "train: all 3 steps are in runs/tiny/checkpoints/checkpoint-3" in done.stderr
    assert (adapter / "adapter_model.safetensors").read_bytes() == trained
    assert len(loopback_hub.repos["ada/tiny-tagger"].branches["main"]) == 2


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"TAGGER_LORA_RANK": "8"}, ["TAGGER_LORA_RANK is not a setting"]),
        ({"TAGGER_DATA_DATASET": "absent.jsonl"}, ["absent.jsonl does not exist"]),
        ({"TAGGER_DATA_DATASET": "empty.jsonl"}, ["empty.jsonl has no rows"]),
        ({"TAGGER_DATA_TEXT_COLUMN": "text"}, ["no column 'text'; it has quote, tags"]),
        ({"TAGGER_DATA_EVAL_SIZE": "59.0", "TAGGER_DATA_LIMIT": "59"}, ["holds out all of TAGGER_DATA_LIMIT=59"]),
        ({"TAGGER_DATA_SEPARATOR": "  "}, ["only white space"]),
        ({"TAGGER_BASE_MODEL": "./absent"}, ["./absent does not exist"]),
        ({"TAGGER_BASE_MODEL": "empty"}, ["empty has no config.json"]),
        ({"TAGGER_RUN_DIR": "/proc/runs"}, ["cannot be written", "TAGGER_RUN_DIR"]),
        ({"TAGGER_RUN_DEVICE": "auto", "TAGGER_TRAIN_PRECISION": "fp16"}, ["fp16 needs a GPU"]),
        ({"TAGGER_LORA_TARGETS": "nothing"}, ["no module named nothing", "q_proj"]),
        ({"TAGGER_HUB_PUSH": "always"}, ["needs a token"]),
        ({"TAGGER_SAMPLE_INPUT": "absent.txt"}, ["absent.txt cannot be read"]),
        ({"TAGGER_SAMPLE_OUTPUT": "/proc/answers.jsonl"}, ["cannot be written", "TAGGER_SAMPLE_OUTPUT"]),
        (
            {"TAGGER_DATA_DATASET": "absent.jsonl", "TAGGER_BASE_MODEL": "./absent", "TAGGER_RUN_DIR": "/proc/runs"},
            ["absent.jsonl does not exist", "./absent does not exist", "/proc/runs cannot be written"],
        ),
    ],
)
def test_what_is_refused_ends_with_2_a_sentence_and_nothing_written(
    tiny: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    variables: dict[str, str],
    said: list[str],
) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "empty").mkdir()
    for name, value in variables.items():
        tiny.setenv(name, value)
    before = sorted(tmp_path.rglob("*"))
    assert main([]) == 2
    err = capsys.readouterr().err
    for sentence in said:
        assert sentence in err
    assert "Traceback" not in err
    assert sorted(tmp_path.rglob("*")) == before


def test_data_and_model_are_refused_before_anything_heavy_is_imported(llama: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from job.__main__ import main; assert main([]) == 2;"
        "heavy = {'torch', 'transformers', 'peft'} & set(sys.modules); assert not heavy, heavy"
    )
    environ = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "TAGGER_BASE_MODEL": "./absent",
        "TAGGER_DATA_DATASET": str(SAYINGS),
        "TAGGER_DATA_EVAL_SIZE": "100000",
    }
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "./absent does not exist" in done.stderr
    assert "the data has 600 examples" in done.stderr


def test_every_command_is_in_the_help_and_in_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for command in ("run", "sample", "settings"):
        assert f"    {command} " in shown
        assert f"`tagger-job {command}" in readme
    for module in sorted((ROOT / "job").glob("*.py")):
        assert f"job/{module.name}" in readme, "the README has one line a file"
