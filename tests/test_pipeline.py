"""Complete runs: their files, what a resume repeats, and what is published."""

from __future__ import annotations

import json
import pkgutil
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from conftest import SAYINGS
from hub import WRITE_TOKEN, Fault, Hub
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from test_atomic import largest_file
from tiny_run import REPO, move_to_hub, read_lines, set_tiny_environment
from transformers import AutoModelForCausalLM

from job import data
from job.cli import main
from job.dataset.split import split_calibration
from job.dataset.tags import drop_rare_tags
from job.settings import Settings

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, llama: Path) -> pytest.MonkeyPatch:
    return set_tiny_environment(monkeypatch, llama)


@pytest.fixture
def published(tiny: pytest.MonkeyPatch, loopback_hub: Hub, llama: Path) -> Hub:
    return move_to_hub(tiny, loopback_hub, llama)


def test_a_run_does_every_chapter_and_is_not_repeated(
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
    assert set(scores) == {"most_common_tags", "tfidf", "base", "adapter"}
    assert {score["n"] for score in scores.values()} == {8}
    assert [entry["step"] for entry in read_lines(run / "log.jsonl")] == [1, 2, 3]
    assert len(read_lines(run / "predictions.jsonl")) == 8
    fields = {"text", "gold", "predicted", "raw", "confidences"}
    assert set(read_lines(run / "predictions.jsonl")[0]) == fields
    prompts = [sample["prompt"] for sample in read_lines(run / "samples.jsonl")]
    assert prompts == ["a song about rain ->:", "two coins ->:"]
    files = {file.name for file in (run / "adapter").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md"} <= files

    before = {file: file.stat().st_mtime_ns for file in run.rglob("*") if file.is_file()}
    assert main(["run"]) == 0
    assert "already complete" in caplog.text
    capsys.readouterr()
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*") if file.is_file()} == before

    assert main(["sample", "another text", "and one more"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.partition(" ->: ")[0] for line in out] == ["another text", "and one more"]
    tiny.setenv("TAGGER_SAMPLE_OUTPUT", "new/answers.jsonl")
    assert main(["sample"]) == 0
    assert read_lines(Path("new/answers.jsonl")) == read_lines(run / "samples.jsonl")


def test_an_adapter_keeps_its_vocabulary_and_threshold(
    tiny: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, loopback_hub: Hub
) -> None:
    tiny.setenv("HF_TOKEN", WRITE_TOKEN)
    tiny.setenv("TAGGER_HUB_REPO", REPO)
    variables = {
        "TAGGER_SAMPLE_DECODING": "marginal",
        "TAGGER_SAMPLE_THRESHOLD": "auto",
        "TAGGER_DATA_TAG_ORDER": "shuffled",
        "TAGGER_DATA_MIN_TAG_COUNT": "3",
    }
    for name, value in variables.items():
        tiny.setenv(name, value)
    settings = Settings()
    examples = split_calibration(data.load(settings.data), settings.data).train
    trained_tags = {tag for example in drop_rare_tags(examples, settings.data.min_tag_count) for tag in example.tags}
    assert trained_tags < {tag for example in examples for tag in example.tags}
    assert main([]) == 0
    run = tmp_path / "runs" / "tiny"
    [(threshold, calibration)] = re.findall(
        r"threshold ([\d.]+), micro-F1 [\d.]+ on (\d+) training examples set aside", caplog.text
    )
    decoding = json.loads((run / "adapter" / "tagger.json").read_text())
    dataset = json.loads((run / "manifest.json").read_text())["dataset"]
    assert decoding["threshold"] == float(threshold)
    assert (decoding["decoding"], decoding["vocabulary"]) == ("marginal", "closed")
    assert set(decoding["tags"]) == trained_tags
    assert dataset["train"] + int(calibration) + dataset["near_duplicates"] + dataset["held_out"] <= 60
    for sample in read_lines(run / "samples.jsonl"):
        assert set(sample["tags"]) <= set(decoding["tags"])
        assert sample["confidences"] == sorted(sample["confidences"], reverse=True)
        assert all(confidence >= decoding["threshold"] for confidence in sample["confidences"])
    for name in variables:
        tiny.delenv(name)
    tiny.setenv("TAGGER_SAMPLE_OUTPUT", "answers.jsonl")
    assert main(["sample"]) == 0
    assert read_lines(Path("answers.jsonl")) == read_lines(run / "samples.jsonl")
    tiny.setenv("TAGGER_SAMPLE_THRESHOLD", "0.99")
    assert main(["sample"]) == 0
    assert all(sample["tags"] == [] for sample in read_lines(Path("answers.jsonl")))


def test_a_changed_vocabulary_file_is_another_run(
    tiny: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tags = tmp_path / "tags.txt"
    tags.write_text("rain\nsea\n")
    tiny.setenv("TAGGER_SAMPLE_VOCABULARY", str(tags))
    assert main([]) == 0
    run = tmp_path / "runs" / "tiny"
    assert json.loads((run / "adapter" / "tagger.json").read_text())["tags"] == ["rain", "sea"]
    assert {tag for sample in read_lines(run / "samples.jsonl") for tag in sample["tags"]} <= {"rain", "sea"}
    tags.write_text("rain\nwind\n")
    capsys.readouterr()
    assert main([]) == 2
    assert f"the contents of {SAYINGS} or {tags} have changed" in capsys.readouterr().err
    tags.unlink()
    assert main([]) == 2
    assert f"TAGGER_SAMPLE_VOCABULARY={tags} cannot be read" in capsys.readouterr().err


def test_a_run_on_the_hub_pins_revisions_and_publishes(
    published: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out.splitlines()
    repo = published.models[REPO]
    head = repo.branches["main"][-1]
    assert out[-1] == f"the adapter is at {published.url}/{REPO}/commit/{head.oid}"
    assert repo.private
    assert repo.titles == ["initial commit", "basic training"]

    run = tmp_path / "runs" / "tiny"
    assert set(head.files) == {
        *(file.name for file in (run / "adapter").iterdir()),
        *("metrics.json", "manifest.json", "scores.svg", "loss.svg"),
    }
    manifest = json.loads((run / "manifest.json").read_text())
    base, sayings = published.models["tiny/llama"], published.datasets["tiny/sayings"]
    assert manifest["settings"]["TAGGER_BASE_REVISION"] == base.branches["main"][-1].oid
    assert manifest["settings"]["TAGGER_DATA_REVISION"] == sayings.branches["main"][-1].oid
    config = json.loads(head.files["adapter_config.json"])
    assert config["base_model_name_or_path"] == "tiny/llama"
    assert config["revision"] == base.branches["main"][-1].oid
    card = yaml.safe_load(head.files["README.md"].decode().split("---")[1])
    assert (card["base_model"], card["datasets"], card["license"]) == ("tiny/llama", ["tiny/sayings"], "apache-2.0")
    snippet = head.files["README.md"].decode().split("```python\n")[1].split("```")[0]
    exec(snippet.replace("owner/name", REPO), {})
    assert len(capsys.readouterr().out) > 1
    scores = json.loads(head.files["metrics.json"])["scores"]["adapter"]
    assert card["model-index"][0]["results"][0]["metrics"][0]["value"] == round(scores["f1"], 4)

    requests = published.requests
    assert not [request for request in requests if "pytorch_model.bin" in request or "own.py" in request]
    downloaded = max(i for i, request in enumerate(requests) if "/tiny/llama/resolve/" in request)
    first_of_push = next(i for i, request in enumerate(requests) if f"GET /api/models/{REPO}/commits/main" in request)
    assert requests[downloaded + 1 : first_of_push] == [], "no request between check and push"
    # HEAD alone if another test has downloaded the same weights: blobs are cached by their content
    loaded_back = f"/{REPO}/resolve/{head.oid}/adapter_model.safetensors"
    assert any(request.endswith(loaded_back) for request in requests[first_of_push:])
    for file in run.rglob("*"):
        assert not file.is_file() or WRITE_TOKEN.encode() not in file.read_bytes(), file


def test_after_a_failed_push_the_same_command_does_not_train(
    published: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    published.faults = [Fault("/commit/main", "status", times=99, status=500)]
    assert main([]) == 4
    weights = tmp_path / "runs" / "tiny" / "adapter" / "adapter_model.safetensors"
    trained = weights.read_bytes()
    published.faults = []
    assert main([]) == 0
    assert "already trained and evaluated" in caplog.text
    assert weights.read_bytes() == trained
    assert published.models[REPO].titles == ["initial commit", "basic training"]


def test_a_merged_model_is_published_and_loads_without_peft(
    published: Hub, tiny: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tiny.setenv("TAGGER_HUB_MERGE", "true")
    assert main([]) == 0
    head = published.models[REPO].branches["main"][-1]
    assert {"merged/model.safetensors", "merged/config.json", "merged/tokenizer.json"} <= set(head.files)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / "tiny" / "merged")
    assert not hasattr(merged, "peft_config")


def test_an_adapter_that_the_hub_altered_ends_with_4(
    published: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def swap() -> None:  # the Hub returns other weights than it received
        head = published.models[REPO].branches["main"][-1]
        weights = load_safetensors(head.files["adapter_model.safetensors"])
        noise = {name: torch.randn_like(weight) * 10 for name, weight in weights.items()}
        head.files["adapter_model.safetensors"] = save_safetensors(noise)

    published.faults = [Fault(f"HEAD /{REPO}/resolve/.*safetensors", "before", action=swap)]
    assert main([]) == 4
    assert "what was saved is not what was trained" in capsys.readouterr().err
    assert json.loads((tmp_path / "runs" / "tiny" / "manifest.json").read_text())["status"] == "passed"


def test_a_complete_run_is_published_once_pushing_is_allowed(
    published: Hub, tiny: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tiny.setenv("TAGGER_HUB_PUSH", "never")
    assert main([]) == 0
    assert REPO not in published.models
    tiny.setenv("TAGGER_HUB_PUSH", "always")
    assert main([]) == 0
    assert "already trained and evaluated" in caplog.text
    assert published.models[REPO].titles == ["initial commit", "basic training"]
    assert main([]) == 0
    assert "nothing is repeated" in caplog.text


def test_a_push_that_cannot_be_read_back_is_not_made_twice(published: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    published.faults = [Fault(f"HEAD /{REPO}/resolve", "status", times=99, status=404)]
    assert main([]) == 4
    assert "cannot be loaded back" in capsys.readouterr().err
    published.faults = []
    assert main(["push"]) == 0
    assert published.models[REPO].titles == ["initial commit", "basic training"]


def test_a_disk_too_full_for_checkpoints_does_not_end_the_run(
    tiny: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "runs" / "tiny"
    with largest_file(80_000):  # an adapter fits, a checkpoint is three times as large
        assert main([]) == 0
    assert "train: the checkpoint of step 3 could not be written to runs/tiny (File too large)" in caplog.text
    assert not list((run / "checkpoints").glob("checkpoint-*"))
    assert json.loads((run / "manifest.json").read_text())["status"] == "complete"


def test_finished_chapters_are_not_repeated_after_a_resume(
    published: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()

    def count_calls(place: str) -> None:
        original = pkgutil.resolve_name(place)
        monkeypatch.setattr(place, lambda *a, **k: calls.update([place]) or original(*a, **k))

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for place in (steps := "torch.optim.AdamW.step", evaluations := "job.evaluate.evaluate"):
        count_calls(place)
    reached = []
    for place in (
        "job.training.trainer.Trainer.run",
        "job.results.save_metrics",
        "job.report.save_card",
        "job.push.push",
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, interrupt)
            assert main([]) == 75
        assert REPO not in published.models or published.models[REPO].titles == ["initial commit"]
        reached.append((calls[evaluations], calls[steps]))
    assert reached == [(0, 0), (2, 3), (2, 3), (2, 3)]
    assert main([]) == 0
    assert (calls[evaluations], calls[steps]) == (2, 3)
    assert published.models[REPO].titles == ["initial commit", "basic training"]


def test_a_named_run_resumes_with_its_recorded_revisions(
    published: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("job.results.save_metrics", interrupt)
        assert main([]) == 75
    for repo in (published.models["tiny/llama"], published.datasets["tiny/sayings"]):
        repo.commit("main", "newer", {"more.txt": b"since then"})
    assert main([]) == 0
    settings = json.loads((tmp_path / "runs" / "tiny" / "manifest.json").read_text())["settings"]
    assert settings["TAGGER_BASE_REVISION"] == published.models["tiny/llama"].branches["main"][-2].oid


def test_altered_or_deleted_results_are_recreated(
    tiny: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert main([]) == 0
    weights, losses = (tmp_path / "runs" / "tiny" / name for name in ("adapter/adapter_model.safetensors", "log.jsonl"))
    original = [file.read_bytes() for file in (weights, losses)]
    weights.write_bytes(original[0][:-1] + b"?")
    assert main([]) == 0
    assert "adapter_model.safetensors has changed since it was written; it is recreated" in caplog.text
    losses.unlink()
    assert main([]) == 0
    assert [file.read_bytes() for file in (weights, losses)] == original
