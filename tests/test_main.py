"""The whole job from the command line: its files, its exit codes, its sentences."""

from __future__ import annotations

import json
import os
import pkgutil
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import SAYINGS
from hub import READ_TOKEN, WRITE_TOKEN, Fault, Hub, Repo
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from test_atomic import largest_file
from transformers import AutoModelForCausalLM

from job import data
from job.cli import main
from job.dataset.split import split_calibration
from job.dataset.tags import drop_rare_tags
from job.settings import Settings

ROOT = Path(__file__).parents[1]
REPO = "ada/tiny-tagger"


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
    assert set(scores) == {"most_common_tags", "tfidf", "base", "adapter"}
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


def test_an_adapter_is_used_with_the_tags_and_the_threshold_that_it_was_published_with(
    tiny: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, loopback_hub: Hub
) -> None:
    tiny.setenv("HF_TOKEN", WRITE_TOKEN)
    tiny.setenv("TAGGER_HUB_REPO", REPO)
    chosen = {
        "TAGGER_SAMPLE_DECODING": "marginal",
        "TAGGER_SAMPLE_THRESHOLD": "auto",
        "TAGGER_DATA_TAG_ORDER": "shuffled",
        "TAGGER_DATA_MIN_TAG_COUNT": "3",
    }
    for name, value in chosen.items():
        tiny.setenv(name, value)
    settings = Settings()
    examples = split_calibration(data.load(settings.data), settings.data).train
    taught = {tag for example in drop_rare_tags(examples, settings.data.min_tag_count) for tag in example.tags}
    assert taught < {tag for example in examples for tag in example.tags}
    assert main([]) == 0
    run = tmp_path / "runs" / "tiny"
    [said] = re.findall(r"threshold ([\d.]+), micro-F1 [\d.]+ on (\d+) training examples set aside", caplog.text)
    decoding = json.loads((run / "adapter" / "tagger.json").read_text())
    dataset = json.loads((run / "manifest.json").read_text())["dataset"]
    assert decoding["threshold"] == float(said[0])
    assert (decoding["decoding"], decoding["vocabulary"]) == ("marginal", "closed")
    assert set(decoding["tags"]) == taught
    assert dataset["train"] + int(said[1]) + dataset["near_duplicates"] + dataset["held_out"] <= 60
    for sample in lines(run / "samples.jsonl"):
        assert set(sample["tags"]) <= set(decoding["tags"])
        assert sample["confidences"] == sorted(sample["confidences"], reverse=True)
        assert all(confidence >= decoding["threshold"] for confidence in sample["confidences"])
    for name in chosen:
        tiny.delenv(name)
    tiny.setenv("TAGGER_SAMPLE_OUTPUT", "answers.jsonl")
    assert main(["sample"]) == 0
    assert lines(Path("answers.jsonl")) == lines(run / "samples.jsonl")
    tiny.setenv("TAGGER_SAMPLE_THRESHOLD", "0.99")
    assert main(["sample"]) == 0
    assert all(sample["tags"] == [] for sample in lines(Path("answers.jsonl")))


def test_a_vocabulary_file_that_changed_is_another_run(
    tiny: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tags = tmp_path / "tags.txt"
    tags.write_text("rain\nsea\n")
    tiny.setenv("TAGGER_SAMPLE_VOCABULARY", str(tags))
    assert main([]) == 0
    run = tmp_path / "runs" / "tiny"
    assert json.loads((run / "adapter" / "tagger.json").read_text())["tags"] == ["rain", "sea"]
    assert {tag for sample in lines(run / "samples.jsonl") for tag in sample["tags"]} <= {"rain", "sea"}
    tags.write_text("rain\nwind\n")
    capsys.readouterr()
    assert main([]) == 2
    assert f"the contents of {SAYINGS} or {tags} have changed" in capsys.readouterr().err
    tags.unlink()
    assert main([]) == 2
    assert f"TAGGER_SAMPLE_VOCABULARY={tags} cannot be read" in capsys.readouterr().err


def test_a_gate_that_is_not_reached_ends_with_3_and_keeps_everything(
    tiny: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.setenv("TAGGER_EVAL_GATE", "floor")
    tiny.setenv("TAGGER_EVAL_MIN_F1", "0.99")
    assert main([]) == 3
    assert "below TAGGER_EVAL_MIN_F1=0.99: it is not published" in capsys.readouterr().err
    tiny.setenv("HF_TOKEN", WRITE_TOKEN)
    tiny.delenv("TAGGER_EVAL_GATE")
    assert main(["push"]) == 2
    assert "was refused by its gate" in capsys.readouterr().err
    assert (tmp_path / "runs" / "tiny" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.fixture
def published(tiny: pytest.MonkeyPatch, loopback_hub: Hub, llama: Path) -> Hub:
    """The tiny run again, with base model, data set and token on the Hub."""
    base = loopback_hub.models["tiny/llama"] = Repo("tiny/llama", licence="apache-2.0")
    base.commit("main", "weights", {file.name: file.read_bytes() for file in llama.iterdir()})
    base.commit("main", "a pickle too", {"pytorch_model.bin": b"never read", "own.py": b"never run"})
    sayings = loopback_hub.datasets["tiny/sayings"] = Repo("tiny/sayings")
    sayings.commit("main", "data", {"train.jsonl": SAYINGS.read_bytes()})
    tiny.setenv("HF_TOKEN", WRITE_TOKEN)
    tiny.setenv("TAGGER_BASE_MODEL", "tiny/llama")
    tiny.setenv("TAGGER_DATA_DATASET", "tiny/sayings")
    tiny.setenv("TAGGER_HUB_REPO", REPO)
    tiny.setenv("TAGGER_HUB_RETRY_MINUTES", "0.02")
    return loopback_hub


def test_a_run_on_the_hub_pins_trains_offline_publishes_and_samples_what_was_published(
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
        *("metrics.json", "manifest.json", "loss.svg"),
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

    asked = published.requests
    assert not [request for request in asked if "pytorch_model.bin" in request or "own.py" in request]
    downloaded = max(i for i, request in enumerate(asked) if "/tiny/llama/resolve/" in request)
    first_of_push = next(i for i, request in enumerate(asked) if f"GET /api/models/{REPO}/commits/main" in request)
    assert asked[downloaded + 1 : first_of_push] == [], "between check and push nothing is asked of the Hub"
    assert f"GET /{REPO}/resolve/{head.oid}/adapter_model.safetensors" in asked[first_of_push:]
    for file in run.rglob("*"):
        assert not file.is_file() or WRITE_TOKEN.encode() not in file.read_bytes(), file


def test_prefetch_downloads_what_a_run_reads_and_makes_nothing(published: Hub, tmp_path: Path) -> None:
    assert main(["prefetch"]) == 0
    asked = published.requests
    for path in ("/tiny/llama/resolve/.*model.safetensors", "/datasets/tiny/sayings/resolve/.*train.jsonl"):
        assert [request for request in asked if re.search(path, request)], path
    assert REPO not in published.models
    assert not (tmp_path / "runs").exists()


def test_a_push_that_fails_ends_with_4_and_one_command_finishes_it(
    published: Hub, tiny: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published.faults = [Fault("/commit/main", "status", times=99, status=500)]
    assert main([]) == 4
    err = capsys.readouterr().err
    assert "publishing failed" in err
    assert "TAGGER_RUN_ID=tiny tagger-job push" in err
    trained = (tmp_path / "runs" / "tiny" / "adapter" / "adapter_model.safetensors").read_bytes()
    published.faults = []
    for name in ("TAGGER_BASE_MODEL", "TAGGER_DATA_DATASET", "TAGGER_TRAIN_MAX_STEPS"):
        tiny.delenv(name)  # a run on disk knows its own
    assert main(["push"]) == 0
    assert published.models[REPO].titles == ["initial commit", "basic training"]
    assert published.models[REPO].branches["main"][-1].files["adapter_model.safetensors"] == trained
    assert json.loads((tmp_path / "runs" / "tiny" / "manifest.json").read_text())["status"] == "complete"
    assert main(["push"]) == 0
    assert published.models[REPO].titles == ["initial commit", "basic training"]


def test_the_same_command_after_a_failed_push_trains_no_step_more(
    published: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    published.faults = [Fault("/commit/main", "status", times=99, status=500)]
    assert main([]) == 4
    weights = tmp_path / "runs" / "tiny" / "adapter" / "adapter_model.safetensors"
    trained = weights.read_bytes()
    published.faults = []
    assert main([]) == 0
    assert "it is trained and evaluated already" in caplog.text
    assert weights.read_bytes() == trained
    assert published.models[REPO].titles == ["initial commit", "basic training"]


def test_the_merged_model_is_published_beside_the_adapter_and_loads_by_itself(
    published: Hub, tiny: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tiny.setenv("TAGGER_HUB_MERGE", "true")
    assert main([]) == 0
    head = published.models[REPO].branches["main"][-1]
    assert {"merged/model.safetensors", "merged/config.json", "merged/tokenizer.json"} <= set(head.files)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / "tiny" / "merged")
    assert not hasattr(merged, "peft_config")


def test_tags_that_changed_on_the_way_through_the_hub_end_with_4(
    published: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def swap() -> None:  # the Hub hands out other weights than those it was given
        head = published.models[REPO].branches["main"][-1]
        weights = load_safetensors(head.files["adapter_model.safetensors"])
        noise = {name: torch.randn_like(weight) * 10 for name, weight in weights.items()}
        head.files["adapter_model.safetensors"] = save_safetensors(noise)

    published.faults = [Fault(f"HEAD /{REPO}/resolve/.*safetensors", "before", action=swap)]
    assert main([]) == 4
    assert "what was saved is not what was trained" in capsys.readouterr().err
    assert json.loads((tmp_path / "runs" / "tiny" / "manifest.json").read_text())["status"] == "passed"


def test_check_says_what_it_looked_at_and_trains_nothing(
    published: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check"]) == 0
    out = capsys.readouterr().out
    base = published.models["tiny/llama"].branches["main"][-1].oid
    assert f"base model: tiny/llama at {base}" in out
    assert (
        "data: 52 examples to train on, 8 held out, 0 rows skipped, 0 near-duplicates of held-out ones left out" in out
    )
    assert f"push: {REPO}" in out
    assert "longest example: " in out
    assert "memory: at least" in out
    assert not (tmp_path / "runs").exists()
    assert not [request for request in published.requests if "safetensors" in request], "a check downloads no weights"


def test_check_measures_the_longest_example_without_its_rare_tags(
    tiny: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"quote": f"song {n}", "tags": ["music", f"only {n} has this rare tag"]} for n in range(30)]
    file = tmp_path / "songs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    tiny.setenv("TAGGER_DATA_DATASET", str(file))
    tokens = []
    for least in ("1", "2"):
        tiny.setenv("TAGGER_DATA_MIN_TAG_COUNT", least)
        assert main(["check"]) == 0
        found = re.search(r"longest example: (\d+) tokens", capsys.readouterr().out)
        assert found is not None
        tokens.append(int(found[1]))
    assert tokens[1] < tokens[0] - 4


def test_a_model_on_the_hub_without_safetensors_is_refused_before_it_is_downloaded(
    published: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    repo = published.models["tiny/llama"] = Repo("tiny/llama")
    repo.commit("main", "weights", {"config.json": b"{}", "pytorch_model.bin": b"never read"})
    assert main([]) == 2
    assert "tiny/llama has no weights in safetensors, and pickles are not read" in capsys.readouterr().err
    assert not [request for request in published.requests if "/resolve/" in request]


def test_check_lists_every_problem_at_once(
    published: Hub, tiny: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.setenv("TAGGER_BASE_MODEL", "tiny/absent")
    tiny.setenv("TAGGER_DATA_REVISION", "v9")
    tiny.setenv("HF_TOKEN", READ_TOKEN)
    tiny.setenv("TAGGER_SAMPLE_INPUT", "absent.txt")
    for command in ("check", "run"):
        assert main([command]) == 2
        err = capsys.readouterr().err
        assert "the base model tiny/absent is not on the Hub" in err
        assert "the data set tiny/sayings has no revision v9" in err
        assert "HF_TOKEN may only read" in err
        assert "absent.txt cannot be read" in err
        assert READ_TOKEN not in err


def test_sample_tags_with_a_published_adapter_by_name_and_revision(
    published: Hub, tiny: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([]) == 0
    capsys.readouterr()
    first = published.models[REPO].branches["main"][-1].oid
    published.models[REPO].commit("main", "broken since", {"adapter_config.json": b"{}"})
    tiny.setenv("TAGGER_HUB_REVISION", first)
    assert main(["sample", "another text"]) == 0
    assert capsys.readouterr().out.startswith("another text ->: ")


def test_a_complete_run_is_published_when_a_token_comes_later(
    published: Hub, tiny: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tiny.setenv("TAGGER_HUB_PUSH", "never")
    assert main([]) == 0
    assert REPO not in published.models
    tiny.setenv("TAGGER_HUB_PUSH", "always")
    assert main([]) == 0
    assert "it is trained and evaluated already" in caplog.text
    assert published.models[REPO].titles == ["initial commit", "basic training"]
    assert main([]) == 0
    assert "nothing is done again" in caplog.text


def test_a_push_that_cannot_be_read_back_ends_with_4_and_is_not_made_twice(
    published: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    published.faults = [Fault(f"HEAD /{REPO}/resolve", "status", times=99, status=404)]
    assert main([]) == 4
    assert "cannot be loaded back" in capsys.readouterr().err
    published.faults = []
    assert main(["push"]) == 0
    assert published.models[REPO].titles == ["initial commit", "basic training"]


def test_sample_uses_an_adapter_as_it_was_trained(
    published: Hub, tiny: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.setenv("TAGGER_DATA_SEPARATOR", "=>")
    assert main([]) == 0
    capsys.readouterr()
    for name in ("TAGGER_DATA_SEPARATOR", "TAGGER_BASE_MODEL"):
        tiny.delenv(name)
    assert main(["sample", "from the Hub"]) == 0
    tiny.delenv("TAGGER_HUB_REPO")
    assert main(["sample", "from the run"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.partition(" => ")[0] for line in out] == ["from the Hub", "from the run"]


@pytest.mark.parametrize("signalled", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_ends_with_75_and_goes_on(
    tiny: pytest.MonkeyPatch, tmp_path: Path, signalled: signal.Signals
) -> None:
    tiny.setenv("TAGGER_TRAIN_MAX_STEPS", "400")
    tiny.setenv("TAGGER_TRAIN_SAVE_STEPS", "10")
    tiny.setenv("PYTHONPATH", str(ROOT))
    with subprocess.Popen([sys.executable, "-m", "job"], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "step 12/400" in line:
                process.send_signal(signalled)
                break
        rest = process.stderr.read()
    assert process.returncode == 75, rest
    assert f"interrupted by {signalled.name}; the same command goes on from what is saved" in rest
    assert "Traceback" not in rest
    assert json.loads((tmp_path / "runs" / "tiny" / "manifest.json").read_text())["status"] == "interrupted"
    assert (tmp_path / "runs" / "tiny" / "checkpoints" / "checkpoint-10").is_dir()


def test_runs_that_were_killed_anywhere_end_as_one_that_was_not() -> None:
    """`make torture` kills many more."""
    torture = [sys.executable, str(ROOT / "tests" / "torture.py"), "--kills", "8"]
    done = subprocess.run(torture, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "runs ended equal, after" in done.stdout


def test_a_disk_that_fills_during_training_costs_checkpoints_and_not_the_run(
    tiny: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "runs" / "tiny"
    with largest_file(50_000):  # an adapter fits, a checkpoint is three times as large
        assert main([]) == 0
    assert "train: step 3 could not be written to runs/tiny (File too large)" in caplog.text
    assert not list((run / "checkpoints").glob("checkpoint-*"))
    assert json.loads((run / "manifest.json").read_text())["status"] == "complete"


def test_a_disk_that_is_full_ends_with_1_and_a_sentence_and_the_run_goes_on_when_there_is_room(
    tiny: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs" / "tiny"
    with largest_file(25_000):
        assert main([]) == 1
    err = capsys.readouterr().err
    assert "adapter cannot be written: File too large. What was saved before is whole: make room" in err
    assert "Traceback" not in err
    assert not (run / "adapter").exists()
    assert not list(run.rglob("*.tmp"))
    assert main([]) == 0
    assert json.loads((run / "manifest.json").read_text())["status"] == "complete"


def test_what_an_interrupted_run_has_done_is_not_done_again(
    published: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()

    def counted(place: str) -> None:
        module, _, name = place.rpartition(".")
        owner = pkgutil.resolve_name(module)
        real = getattr(owner, name)
        monkeypatch.setattr(place, lambda *a, **k: calls.update([place]) or real(*a, **k))

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for place in (steps := "job.training.trainer.Trainer._step", evaluations := "job.evaluate.evaluate"):
        counted(place)
    reached = []
    for place in (
        "job.training.trainer.Trainer.run",
        "job.report.save_metrics",
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


def test_a_named_run_goes_on_with_the_revisions_it_began_with(
    published: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("job.report.save_metrics", interrupt)
        assert main([]) == 75
    for repo in (published.models["tiny/llama"], published.datasets["tiny/sayings"]):
        repo.commit("main", "newer", {"more.txt": b"since then"})
    assert main([]) == 0
    settings = json.loads((tmp_path / "runs" / "tiny" / "manifest.json").read_text())["settings"]
    assert settings["TAGGER_BASE_REVISION"] == published.models["tiny/llama"].branches["main"][-2].oid


def test_a_run_whose_results_were_altered_or_removed_makes_them_again(
    tiny: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert main([]) == 0
    weights, losses = (tmp_path / "runs" / "tiny" / name for name in ("adapter/adapter_model.safetensors", "log.jsonl"))
    made = [file.read_bytes() for file in (weights, losses)]
    weights.write_bytes(made[0][:-1] + b"?")
    assert main([]) == 0
    assert "adapter_model.safetensors has changed since it was written; it is recreated" in caplog.text
    losses.unlink()
    assert main([]) == 0
    assert [file.read_bytes() for file in (weights, losses)] == made


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"TAGGER_LORA_RANK": "8"}, ["TAGGER_LORA_RANK is not a setting"]),
        ({"TAGGER_DATA_DATASET": "absent.jsonl"}, ["absent.jsonl does not exist"]),
        ({"TAGGER_DATA_DATASET": "empty.jsonl"}, ["empty.jsonl has no rows"]),
        ({"TAGGER_DATA_TEXT_COLUMN": "text"}, ["no column 'text'; it has quote, tags"]),
        ({"TAGGER_DATA_EVAL_SIZE": "59.0", "TAGGER_DATA_LIMIT": "59"}, ["holds out all of TAGGER_DATA_LIMIT=59"]),
        ({"TAGGER_DATA_SEPARATOR": "  "}, ["only white space"]),
        (
            {"TAGGER_DATA_MIN_TAG_COUNT": "99", "TAGGER_RUN_DIR": "/proc/runs"},
            ["MIN_TAG_COUNT=99 makes every tag rare", "cannot be written"],
        ),
        ({"TAGGER_BASE_MODEL": "./absent"}, ["./absent does not exist"]),
        ({"TAGGER_BASE_MODEL": "empty"}, ["empty has no config.json"]),
        ({"TAGGER_RUN_DIR": "/proc/runs"}, ["cannot be written", "TAGGER_RUN_DIR"]),
        ({"TAGGER_RUN_DEVICE": "auto", "TAGGER_TRAIN_PRECISION": "fp16"}, ["fp16 needs a GPU"]),
        ({"TAGGER_LORA_TARGETS": "nothing"}, ["no module named nothing", "q_proj"]),
        ({"TAGGER_HUB_PUSH": "always"}, ["needs a token"]),
        ({"TAGGER_SAMPLE_INPUT": "absent.txt"}, ["absent.txt cannot be read"]),
        ({"TAGGER_SAMPLE_OUTPUT": "link"}, ["is not a file that can be replaced"]),
        ({"TAGGER_SAMPLE_OUTPUT": "empty"}, ["is not a file that can be replaced"]),
        ({"TAGGER_SAMPLE_OUTPUT": "empty.jsonl", "TAGGER_SAMPLE_INPUT": "empty.jsonl"}, ["is also read by this job"]),
        ({"TAGGER_LORA_TARGETS": "foo.q_proj"}, ["TAGGER_LORA_TARGETS=foo.q_proj does not fit the model"]),
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
    (tmp_path / "link").symlink_to("empty.jsonl")
    for name, value in variables.items():
        tiny.setenv(name, value)
    before = sorted(tmp_path.rglob("*"))
    assert main([]) == 2
    err = capsys.readouterr().err
    for sentence in said:
        assert sentence in err
    assert "Traceback" not in err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("command", ["run", "check"])
def test_without_a_gpu_auto_says_so_and_refuses_a_model_for_one_before_anything_is_written(
    tiny: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: Any, command: str
) -> None:
    tiny.setattr(torch.cuda, "is_available", lambda: False)
    tiny.setattr("job.system.device.DRIVER_VERSION", tmp_path / "absent")
    tiny.setenv("TAGGER_RUN_DEVICE", "auto")
    with tiny.context() as patch:
        patch.setattr("job.estimate.CPU_PARAMETERS", 1000)
        assert main([command]) == 2
    assert "and this machine has no NVIDIA driver; take a machine with a GPU" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    assert main([command]) == 0
    assert "in fp32, because this machine has no NVIDIA driver" in capsys.readouterr().out + caplog.text


@pytest.mark.parametrize(
    "change",
    [{"model_type": "unheard-of"}, {"model_type": "t5"}, {"hidden_size": "big"}, {"num_hidden_layers": 9}, None],
)
def test_a_config_that_is_none_of_a_language_model_ends_with_2_and_a_sentence(
    tiny: pytest.MonkeyPatch,
    tmp_path: Path,
    llama: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any] | None,
) -> None:
    folder = tmp_path / "odd"
    shutil.copytree(llama, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps([] if change is None else config | change))
    tiny.setenv("TAGGER_BASE_MODEL", str(folder))
    assert main([]) == 2
    err = capsys.readouterr().err
    assert str(folder) in err
    assert "Traceback" not in err
    assert not (tmp_path / "runs").exists()


def test_data_and_model_are_refused_before_anything_heavy_is_imported(llama: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from job.cli import main; assert main([]) == 2;"
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
    for command in ("run", "check", "prefetch", "retrain", "evaluate", "push", "promote", "sample", "settings"):
        assert f"    {command} " in shown
        assert f"`tagger-job {command}" in readme
