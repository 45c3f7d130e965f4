"""Retraining, end to end against a Hub on loopback, only replaces the published adapter by one that is no worse."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
from hub import WRITE_TOKEN, Commit, Fault, Hub, Repo
from json_schema import violations

from job import data
from job.cli import main
from job.settings import Data

ROOT = Path(__file__).parents[1]
REPO = "ada/tiny-tagger"
WEIGHTS = "adapter_model.safetensors"
TOO_FEW, ENOUGH = "1", "30"
"""Training steps after which the tiny model gives no tag, and after which it gives the most frequent one."""


@pytest.fixture
def env(
    monkeypatch: pytest.MonkeyPatch, loopback_hub: Hub, llama: Path, rows: list[dict[str, Any]]
) -> pytest.MonkeyPatch:
    base = loopback_hub.models["tiny/llama"] = Repo("tiny/llama")
    base.commit("main", "weights", {file.name: file.read_bytes() for file in llama.iterdir()})
    sayings = loopback_hub.datasets["tiny/sayings"] = Repo("tiny/sayings")
    sayings.commit("main", "data", {"train.jsonl": lines(rows[:160])})
    variables = {
        "HF_TOKEN": WRITE_TOKEN,
        "TAGGER_BASE_MODEL": "tiny/llama",
        "TAGGER_BASE_QUANTIZE": "none",
        "TAGGER_DATA_DATASET": "tiny/sayings",
        "TAGGER_DATA_EVAL_SIZE": "0.3",
        "TAGGER_LORA_R": "64",
        "TAGGER_LORA_TARGETS": "all-linear",
        "TAGGER_TRAIN_MAX_STEPS": ENOUGH,
        "TAGGER_TRAIN_WARMUP_STEPS": "1",
        "TAGGER_TRAIN_LEARNING_RATE": "1e-2",
        "TAGGER_SAMPLE_MAX_NEW_TOKENS": "8",
        "TAGGER_RUN_DEVICE": "cpu",
        "TAGGER_EVAL_GATE": "published",
        "TAGGER_HUB_REPO": REPO,
        "TAGGER_HUB_RETRY_MINUTES": "0.1",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def lines(rows: list[dict[str, Any]]) -> bytes:
    """Return the rows as JSON lines, 4 of 5 with the same tag, which is learned in few steps."""
    texts = [" ".join(str(row["quote"]).split()[:8]) for row in rows]
    tagged = [{"quote": text, "tags": ["rain" if i % 5 else "sea"]} for i, text in enumerate(texts)]
    return "".join(json.dumps(row) + "\n" for row in tagged).encode()


def verdict(commit: Commit) -> dict[str, Any]:
    return dict(json.loads(commit.files["metrics.json"])["gate"])


def candidates(repo: Repo) -> list[str]:
    return [branch for branch in repo.branches if branch.startswith("candidate-")]


def publish(env: pytest.MonkeyPatch, steps: str) -> int:
    env.setenv("TAGGER_TRAIN_MAX_STEPS", steps)
    return main(["retrain"])


def test_better_adapters_are_promoted_and_worse_ones_rejected(
    env: pytest.MonkeyPatch, loopback_hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert publish(env, TOO_FEW) == 0
    repo = loopback_hub.models[REPO]
    first = repo.branches["main"][-1]
    assert repo.titles[0] == "initial commit"
    assert first.title.startswith("promote ")
    assert first.files == repo.branches[candidates(repo)[0]][-1].files
    assert verdict(first)["reason"].endswith("nothing is published yet")
    assert repo.tags == {"v1": first.oid}

    assert publish(env, ENOUGH) == 0
    better = repo.branches["main"][-1]
    gate = verdict(better)
    assert (gate["verdict"], gate["parent_commit"]) == ("pass", first.oid)
    assert gate["published_f1"] < gate["f1"]
    assert gate["interval"][0] > 0
    assert json.loads(better.files["metrics.json"])["scores"]["published"]["f1"] == gate["published_f1"]
    assert repo.tags == {"v1": first.oid, "v2": better.oid}
    assert better.files[WEIGHTS] != first.files[WEIGHTS]

    capsys.readouterr()
    env.setenv("TAGGER_RUN_DIR", "elsewhere")  # a disk without the earlier runs
    assert publish(env, TOO_FEW) == 3
    assert repo.branches["main"][-1] == better
    assert repo.tags.keys() == {"v1", "v2"}
    rejected = repo.branches[candidates(repo)[-1]][-1]
    assert verdict(rejected)["verdict"] == "fail"
    err = capsys.readouterr().err
    assert "so it is worse. The adapter was not published; it is at" in err
    assert f"`tagger-job promote --revision {rejected.oid}` would publish it" in err

    schema = json.loads((ROOT / "job" / "runs" / "report.schema.json").read_text())
    reports = [json.loads(file.read_text()) for file in Path().glob("*/*/report.json")]
    assert sorted(report["outcome"] for report in reports) == ["published", "published", "refused"]
    for report in reports:
        assert list(violations(report, schema, schema)) == []
    report = next(report for report in reports if report["outcome"] == "refused")
    assert (report["revision"], report["gate"]["verdict"]) == (rejected.oid, "fail")
    assert list(violations(report | {"outcome": "lost"}, schema, schema)) != []
    page = next(Path("elsewhere").glob("*/report.md")).read_text()
    assert "Fail, by TAGGER_EVAL_GATE=published: the adapter's micro-F1 is" in page
    html = next(Path("elsewhere").glob("*/report.html")).read_text()
    assert html.count("<svg") == 4 and '<td dir="auto">rain</td>' in html
    assert {"| published |", "| tfidf |", "| rain |"} <= {
        line[: line.index("|", 1) + 1] for line in page.split("\n") if "|" in line
    }

    requests = len(loopback_hub.requests)
    assert publish(env, TOO_FEW) == 3, "the same run is rejected again without training or a push"
    assert not [request for request in loopback_hub.requests[requests:] if "/commit/" in request]
    assert repo.branches["main"][-1] == better
    env.setenv("TAGGER_RUN_DIR", "forgotten")
    capsys.readouterr()
    assert publish(env, TOO_FEW) == 3
    assert "not trained again, because nothing has changed since" in capsys.readouterr().err
    assert not Path("forgotten").exists()
    env.setenv("TAGGER_EVAL_TOLERANCE", "1")
    assert publish(env, TOO_FEW) == 0, "with another tolerance it is compared again"
    assert verdict(repo.branches["main"][-1])["verdict"] == "pass"


def test_a_candidate_trained_on_shuffled_tags_is_rejected(
    env: pytest.MonkeyPatch, loopback_hub: Hub, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    words = ["rain", "bread", "sea"]
    texts = [
        " ".join([word] * 4 + str(row["quote"]).split()[:3]) for row, word in zip(rows[:240], words * 80, strict=True)
    ]
    true = dict(zip(texts, words * 80, strict=True))

    def published_data(tags: dict[str, str]) -> bytes:
        return "".join(json.dumps({"quote": text, "tags": [tag]}) + "\n" for text, tag in tags.items()).encode()

    (tmp_path / "data.jsonl").write_bytes(published_data(true))
    train = data.load(Data(dataset=str(tmp_path / "data.jsonl"), eval_size=0.3)).train
    mixed = random.Random(0).sample([true[example.text] for example in train], len(train))
    shuffled = true | {example.text: tag for example, tag in zip(train, mixed, strict=True)}
    sayings = loopback_hub.datasets["tiny/sayings"]
    sayings.commit("main", "true tags", {"train.jsonl": published_data(true)})
    env.setenv("TAGGER_SAMPLE_VOCABULARY", "seen")
    assert publish(env, "40") == 0
    repo = loopback_hub.models[REPO]
    good = repo.branches["main"][-1]
    assert json.loads(good.files["metrics.json"])["scores"]["adapter"]["f1"] > 0.8
    sayings.commit("main", "shuffled tags", {"train.jsonl": published_data(shuffled)})
    assert publish(env, "40") == 3
    assert repo.branches["main"][-1] == good
    gate = verdict(repo.branches[candidates(repo)[-1]][-1])
    assert gate["verdict"] == "fail"
    assert gate["published_f1"] > 0.8
    assert gate["interval"][1] < 0
    env.setenv("TAGGER_SAMPLE_THRESHOLD", "0.99")  # only for the new adapter: the published one keeps its own
    assert publish(env, "40") == 3
    assert verdict(repo.branches[candidates(repo)[-1]][-1])["published_f1"] == gate["published_f1"]


def test_retraining_only_happens_if_inputs_have_changed(
    env: pytest.MonkeyPatch, loopback_hub: Hub, capsys: pytest.CaptureFixture[str], rows: list[dict[str, Any]]
) -> None:
    assert publish(env, ENOUGH) == 0
    repo = loopback_hub.models[REPO]
    env.setenv("TAGGER_RUN_DIR", "elsewhere")  # as on a CI runner, whose disk is empty
    env.delenv("TAGGER_EVAL_GATE")  # retrain sets the gate itself
    capsys.readouterr()
    assert publish(env, ENOUGH) == 0
    assert "nothing to do: ada/tiny-tagger was published with the same base model, data" in capsys.readouterr().out
    assert not Path("elsewhere").exists()
    for changed in (loopback_hub.datasets["tiny/sayings"], loopback_hub.models["tiny/llama"]):
        changed.commit("main", "note", {"NOTE.md": b"a new commit with the same data"})
        before = len(repo.titles)
        assert publish(env, ENOUGH) == 0
        assert len(repo.titles) == before + 1
    assert verdict(repo.branches["main"][-1])["difference"] == 0


def test_a_commit_made_by_others_is_not_overwritten(
    env: pytest.MonkeyPatch, loopback_hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert publish(env, TOO_FEW) == 0
    repo = loopback_hub.models[REPO]
    for pattern, when in (
        ("/commit/main", "after the head was read"),
        ("/branch/candidate-", "before the head was read"),
    ):
        loopback_hub.faults = [
            Fault(pattern, "before", action=lambda: repo.commit("main", "by another writer", {"THEIRS.md": b"theirs"}))
        ]
        head = len(repo.titles)
        capsys.readouterr()
        assert publish(env, ENOUGH) == 4, when
        assert "and someone has published" in (err := capsys.readouterr().err), when
        assert "(by another writer) since; nothing was overwritten" in err
        assert len(repo.titles) == head + 1
    assert publish(env, ENOUGH) == 0, "compared with the new head"
    published = repo.branches["main"][-1]
    assert published.files["THEIRS.md"] == b"theirs"
    assert verdict(published)["parent_commit"] == repo.branches["main"][-2].oid


@pytest.mark.parametrize("kind", ["lose_answer", "status"])
def test_a_promotion_is_made_once_despite_faults(env: pytest.MonkeyPatch, loopback_hub: Hub, kind: Any) -> None:
    loopback_hub.faults = [Fault("/commit/main", kind), Fault("/tag/", kind)]
    assert publish(env, TOO_FEW) == 0
    repo = loopback_hub.models[REPO]
    assert len(repo.titles) == 2
    assert repo.tags == {"v1": repo.branches["main"][-1].oid}
    assert len(candidates(repo)) == 1


def test_an_interrupted_promotion_is_not_repeated(env: pytest.MonkeyPatch, loopback_hub: Hub) -> None:
    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    loopback_hub.faults = [Fault("POST .*/tag/", "drop", action=interrupt)]
    assert publish(env, TOO_FEW) == 75
    repo = loopback_hub.models[REPO]
    assert (len(repo.titles), repo.tags) == (2, {})
    assert publish(env, TOO_FEW) == 0
    assert (len(repo.titles), len(candidates(repo)), list(repo.tags)) == (2, 1, ["v1"])


def test_a_damaged_published_adapter_is_only_replaced_by_hand(
    env: pytest.MonkeyPatch, loopback_hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert publish(env, TOO_FEW) == 0
    repo = loopback_hub.models[REPO]
    repo.commit("main", "damaged", {WEIGHTS: b"not weights"})
    env.setenv("TAGGER_TRAIN_SEED", "7")
    assert main(["retrain"]) == 3
    err = capsys.readouterr().err
    assert "insufficient evidence: the adapter published in ada/tiny-tagger at " in err
    assert "no longer loads" in err
    assert repo.titles[-1] == "damaged"
    assert main(["promote", "--revision", candidates(repo)[-1]]) == 0
    assert repo.branches["main"][-1].files[WEIGHTS] != b"not weights"


def test_evaluate_scores_the_published_adapter(
    env: pytest.MonkeyPatch, loopback_hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert publish(env, ENOUGH) == 0
    metrics = json.loads(loopback_hub.models[REPO].branches["main"][-1].files["metrics.json"])
    capsys.readouterr()
    assert main(["evaluate"]) == 0
    out = capsys.readouterr().out
    assert metrics["split"]["sha256"] in out
    assert f"| {metrics['scores']['adapter']['f1']:.3f} |" in out
