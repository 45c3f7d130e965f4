"""Retraining, end to end against a Hub on loopback, can only make what is published better."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub import WRITE_TOKEN, Fault, Hub, Repo

from job import data
from job.cli import main
from job.settings import Data

ROOT = Path(__file__).parents[1]
REPO = "ada/tiny-tagger"
WEIGHTS = "adapter_model.safetensors"
HARDLY, WELL = "1", "30"
"""Steps after which the tiny model says nothing, and after which it says the tag that most texts have."""


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
        "TAGGER_TRAIN_MAX_STEPS": WELL,
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
    """Most of them with one tag, which is soon learned."""
    texts = [" ".join(str(row["quote"]).split()[:8]) for row in rows]
    tagged = [{"quote": text, "tags": ["rain" if i % 5 else "sea"]} for i, text in enumerate(texts)]
    return "".join(json.dumps(row) + "\n" for row in tagged).encode()


def verdict(content: bytes) -> dict[str, Any]:
    return dict(json.loads(content)["gate"])


def violations(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> Iterator[str]:
    """What of a value is not as the JSON schema has it, for the keywords that are used here."""
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rpartition("/")[2]]
    kinds = {"object": dict, "array": list, "string": str, "number": (int, float), "integer": int, "null": type(None)}
    wanted = schema.get("type", [])
    if wanted and not any(isinstance(value, kinds[kind]) for kind in ([wanted] if isinstance(wanted, str) else wanted)):
        yield f"{value!r} is no {wanted}"
    if value != schema.get("const", value) or value not in schema.get("enum", [value]):
        yield f"{value!r} is not allowed"
    if isinstance(value, dict):
        yield from (f"{name} is missing" for name in schema.get("required", []) if name not in value)
        for name, inner in value.items():
            rule = schema.get("properties", {}).get(name, schema.get("additionalProperties", {}))
            yield from violations(inner, rule, root) if rule is not False else [f"{name} is unknown"]


def candidates(repo: Repo) -> list[str]:
    return [branch for branch in repo.branches if branch.startswith("candidate-")]


def publish(env: pytest.MonkeyPatch, steps: str) -> int:
    env.setenv("TAGGER_TRAIN_MAX_STEPS", steps)
    return main(["retrain"])


def test_the_first_is_published_by_the_floor_a_better_one_promoted_and_a_worse_one_refused(
    env: pytest.MonkeyPatch, loopback_hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert publish(env, HARDLY) == 0
    repo = loopback_hub.models[REPO]
    first = repo.branches["main"][-1]
    assert repo.titles[0] == "initial commit"
    assert first.title.startswith("promote ")
    assert first.files == repo.branches[candidates(repo)[0]][-1].files
    assert verdict(first.files["metrics.json"])["reason"].endswith("nothing is published yet")
    assert repo.tags == {"v1": first.oid}

    assert publish(env, WELL) == 0
    better = repo.branches["main"][-1]
    judged = verdict(better.files["metrics.json"])
    assert (judged["verdict"], judged["parent"]) == ("pass", first.oid)
    assert judged["published_f1"] < judged["f1"]
    assert judged["interval"][0] > 0
    assert json.loads(better.files["metrics.json"])["scores"]["published"]["f1"] == judged["published_f1"]
    assert repo.tags == {"v1": first.oid, "v2": better.oid}
    assert better.files[WEIGHTS] != first.files[WEIGHTS]

    capsys.readouterr()
    env.setenv("TAGGER_RUN_DIR", "elsewhere")  # where nobody remembers that this has been published before
    assert publish(env, HARDLY) == 3
    assert repo.branches["main"][-1] == better
    assert repo.tags.keys() == {"v1", "v2"}
    left = repo.branches[candidates(repo)[-1]][-1]
    assert verdict(left.files["metrics.json"])["verdict"] == "fail"
    err = capsys.readouterr().err
    assert "so it is worse: it is not published" in err
    assert f"`tagger-job promote --revision {left.oid}` would publish it" in err

    schema = json.loads((ROOT / "job" / "runs" / "report.schema.json").read_text())
    reports = [json.loads(file.read_text()) for file in Path().glob("*/*/report.json")]
    assert sorted(report["outcome"] for report in reports) == ["published", "published", "refused"]
    for report in reports:
        assert list(violations(report, schema, schema)) == []
    refused = next(report for report in reports if report["outcome"] == "refused")
    assert (refused["revision"], refused["gate"]["verdict"]) == (left.oid, "fail")
    assert list(violations(refused | {"outcome": "lost"}, schema, schema)) != []
    page = next(Path("elsewhere").glob("*/report.md")).read_text()
    assert "Fail, by TAGGER_EVAL_GATE=published: the adapter's micro-F1 is" in page
    html = next(Path("elsewhere").glob("*/report.html")).read_text()
    assert html.count("<svg") == 3 and "<td>rain</td>" in html
    assert {"| published |", "| tfidf |", "| rain |"} <= {
        line[: line.index("|", 1) + 1] for line in page.split("\n") if "|" in line
    }

    requests = len(loopback_hub.requests)
    assert publish(env, HARDLY) == 3, "nothing is trained or pushed again, and the verdict is the same"
    assert not [request for request in loopback_hub.requests[requests:] if "/commit/" in request]
    assert repo.branches["main"][-1] == better
    env.setenv("TAGGER_RUN_DIR", "forgotten")
    capsys.readouterr()
    assert publish(env, HARDLY) == 3
    assert "not trained again, for nothing has changed since" in capsys.readouterr().err
    assert not Path("forgotten").exists()
    env.setenv("TAGGER_EVAL_TOLERANCE", "1")
    assert publish(env, HARDLY) == 0, "another tolerance is another question"
    assert verdict(repo.branches["main"][-1].files["metrics.json"])["verdict"] == "pass"


def test_a_candidate_that_learned_from_shuffled_tags_is_refused(
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
    known = data.load(Data(dataset=str(tmp_path / "data.jsonl"), eval_size=0.3)).train
    mixed = random.Random(0).sample([true[example.text] for example in known], len(known))
    shuffled = true | {example.text: tag for example, tag in zip(known, mixed, strict=True)}
    sayings = loopback_hub.datasets["tiny/sayings"]
    sayings.commit("main", "what is true", {"train.jsonl": published_data(true)})
    env.setenv("TAGGER_SAMPLE_VOCABULARY", "seen")
    assert publish(env, "40") == 0
    repo = loopback_hub.models[REPO]
    good = repo.branches["main"][-1]
    assert json.loads(good.files["metrics.json"])["scores"]["adapter"]["f1"] > 0.8
    sayings.commit("main", "tags of other texts", {"train.jsonl": published_data(shuffled)})
    assert publish(env, "40") == 3
    assert repo.branches["main"][-1] == good
    judged = verdict(repo.branches[candidates(repo)[-1]][-1].files["metrics.json"])
    assert judged["verdict"] == "fail"
    assert judged["published_f1"] > 0.8
    assert judged["interval"][1] < 0
    env.setenv("TAGGER_SAMPLE_THRESHOLD", "0.99")  # is for the new one: the published one keeps to its own
    assert publish(env, "40") == 3
    assert (
        verdict(repo.branches[candidates(repo)[-1]][-1].files["metrics.json"])["published_f1"] == judged["published_f1"]
    )


def test_nothing_is_done_when_nothing_has_changed_and_all_is_when_the_data_have(
    env: pytest.MonkeyPatch, loopback_hub: Hub, capsys: pytest.CaptureFixture[str], rows: list[dict[str, Any]]
) -> None:
    assert publish(env, WELL) == 0
    repo = loopback_hub.models[REPO]
    env.setenv("TAGGER_RUN_DIR", "elsewhere")  # a runner of CI begins with an empty disk
    env.delenv("TAGGER_EVAL_GATE")  # retrain has its own
    capsys.readouterr()
    assert publish(env, WELL) == 0
    assert "nothing to do: base model, data and settings are those of what ada/tiny-tagger" in capsys.readouterr().out
    assert not Path("elsewhere").exists()
    for changed in (loopback_hub.datasets["tiny/sayings"], loopback_hub.models["tiny/llama"]):
        changed.commit("main", "note", {"NOTE.md": b"changes no result, and is another commit"})
        before = len(repo.titles)
        assert publish(env, WELL) == 0
        assert len(repo.titles) == before + 1
    assert verdict(repo.branches["main"][-1].files["metrics.json"])["difference"] == 0


def test_another_writer_between_comparison_and_promotion_is_not_overwritten(
    env: pytest.MonkeyPatch, loopback_hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert publish(env, HARDLY) == 0
    repo = loopback_hub.models[REPO]
    for pattern, when in (("/commit/main", "after the look"), ("/branch/candidate-", "before the look")):
        loopback_hub.faults = [
            Fault(pattern, "before", action=lambda: repo.commit("main", "by another writer", {"THEIRS.md": b"theirs"}))
        ]
        head = len(repo.titles)
        capsys.readouterr()
        assert publish(env, WELL) == 4, when
        assert "and someone has published" in (err := capsys.readouterr().err), when
        assert "(by another writer) since; nothing was overwritten" in err
        assert len(repo.titles) == head + 1
    assert publish(env, WELL) == 0, "compared anew"
    published = repo.branches["main"][-1]
    assert published.files["THEIRS.md"] == b"theirs"
    assert verdict(published.files["metrics.json"])["parent"] == repo.branches["main"][-2].oid


@pytest.mark.parametrize("kind", ["lose_answer", "status"])
def test_a_promotion_is_made_once_whatever_happens_on_the_way(
    env: pytest.MonkeyPatch, loopback_hub: Hub, kind: Any
) -> None:
    loopback_hub.faults = [Fault("/commit/main", kind), Fault("/tag/", kind)]
    assert publish(env, WELL) == 0
    repo = loopback_hub.models[REPO]
    assert len(repo.titles) == 2
    assert repo.tags == {"v1": repo.branches["main"][-1].oid}
    assert len(candidates(repo)) == 1


def test_what_was_promoted_before_the_end_is_not_promoted_again(
    env: pytest.MonkeyPatch, loopback_hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("job.promote._version_tag", interrupt)
        assert publish(env, WELL) == 75
    repo = loopback_hub.models[REPO]
    assert (len(repo.titles), repo.tags) == (2, {})
    assert publish(env, WELL) == 0
    assert (len(repo.titles), len(candidates(repo)), list(repo.tags)) == (2, 1, ["v1"])


def test_promote_publishes_a_refused_candidate_and_rolls_back_without_loading_anything(
    env: pytest.MonkeyPatch, loopback_hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert publish(env, WELL) == 0
    assert publish(env, HARDLY) == 3
    repo = loopback_hub.models[REPO]
    good, left = repo.branches["main"][-1], repo.branches[candidates(repo)[-1]][-1]
    assert main(["promote", "--revision", candidates(repo)[-1]]) == 0
    assert repo.branches["main"][-1].files == left.files

    code = (
        "import sys; from job.cli import main; assert main(['promote', '--revision', 'v1']) == 0;"
        "heavy = {'torch', 'transformers', 'peft', 'sklearn'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == 0
    assert repo.branches["main"][-1].files == good.files
    assert list(repo.tags) == ["v1", "v2", "v3"]
    assert repo.tags["v3"] == repo.branches["main"][-1].oid
    capsys.readouterr()
    assert main(["promote", "--revision", "v1"]) == 0, "which it is already"
    assert capsys.readouterr().out == f"{loopback_hub.url}/{REPO}/commit/{repo.tags['v3']} is published, as v3\n"
    assert len(repo.titles) == 4


def test_a_rollback_removes_what_was_not_there_and_keeps_how_files_are_stored(
    env: pytest.MonkeyPatch, loopback_hub: Hub
) -> None:
    repo = loopback_hub.models[REPO] = Repo(REPO, private=True)
    first = repo.commit("main", "one", {"adapter_config.json": b"{}", WEIGHTS: b"1"}).oid
    loopback_hub.objects |= {"6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b": b"1"}
    repo.commit("main", "two", {WEIGHTS: b"2", "merged/config.json": b"{}", ".gitattributes": b"lfs"})
    assert main(["promote", "--revision", first]) == 0
    assert repo.branches["main"][-1].files == {"adapter_config.json": b"{}", WEIGHTS: b"1", ".gitattributes": b"lfs"}


@pytest.mark.parametrize(
    ("revision", "said"),
    [("v9", "has no revision v9; expected a branch, a tag such as v1, or a commit"), ("main", "holds no adapter")],
)
def test_what_cannot_be_promoted_ends_with_2_and_a_sentence(
    env: pytest.MonkeyPatch, loopback_hub: Hub, capsys: pytest.CaptureFixture[str], revision: str, said: str
) -> None:
    loopback_hub.models[REPO] = Repo(REPO, private=True)
    assert main(["promote", "--revision", revision]) == 2
    assert said in capsys.readouterr().err
    assert loopback_hub.models[REPO].titles == ["initial commit"]
    env.setenv("TAGGER_HUB_REPO", "ada/absent")
    assert main(["promote", "--revision", revision]) == 2
    assert "ada/absent is not on the Hub" in capsys.readouterr().err
    assert "ada/absent" not in loopback_hub.models
    env.delenv("HF_TOKEN")
    assert main(["promote", "--revision", revision]) == 2
    assert "there is no token; set HF_TOKEN" in capsys.readouterr().err


def test_a_promotion_that_the_hub_refuses_ends_with_4_and_a_sentence(
    env: pytest.MonkeyPatch, loopback_hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    repo = loopback_hub.models[REPO] = Repo(REPO, private=True)
    first = repo.commit("main", "one", {"adapter_config.json": b"{}", WEIGHTS: b"1"}).oid
    repo.commit("main", "two", {"adapter_config.json": b"{ }"})
    loopback_hub.faults = [Fault("/commit/main", "status", status=403)]
    assert main(["promote", "--revision", first]) == 4
    assert "ada/tiny-tagger could not be changed (" in (err := capsys.readouterr().err)
    assert "403" in err
    assert repo.titles == ["initial commit", "one", "two"]


def test_a_published_adapter_that_no_longer_loads_is_not_replaced_unseen(
    env: pytest.MonkeyPatch, loopback_hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert publish(env, WELL) == 0
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


def test_what_can_be_known_before_training_ends_with_2_and_a_sentence(
    env: pytest.MonkeyPatch, loopback_hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(said: str, **variables: str) -> None:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            assert main(["run"]) == 2
            assert said in capsys.readouterr().err
        assert not Path("runs").exists()

    refused("nothing can be pushed: it needs HF_TOKEN", TAGGER_HUB_PUSH="never")
    refused("nothing can be pushed: it needs HF_TOKEN", HF_TOKEN="")
    refused("needs 30 held-out examples or more to tell two adapters apart, and has 12", TAGGER_DATA_EVAL_SIZE="12")
    refused("and has 9; raise TAGGER_DATA_EVAL_SIZE (or TAGGER_EVAL_LIMIT)", TAGGER_EVAL_LIMIT="9")
    repo = loopback_hub.models[REPO]
    repo.commit("main", "another's", {"adapter_config.json": b'{"base_model_name_or_path": "big/base"}'})
    refused("was trained on big/base, not on tiny/llama, so they are not compared. Set TAGGER_BASE_MODEL=big/base")
    repo.commit("main", "damaged", {"adapter_config.json": b"["})
    refused("the adapter published in ada/tiny-tagger cannot be read")


def test_evaluate_scores_what_is_published(
    env: pytest.MonkeyPatch, loopback_hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert publish(env, WELL) == 0
    metrics = json.loads(loopback_hub.models[REPO].branches["main"][-1].files["metrics.json"])
    capsys.readouterr()
    assert main(["evaluate"]) == 0
    out = capsys.readouterr().out
    assert metrics["split"]["sha256"] in out
    assert f"| {metrics['scores']['adapter']['f1']:.3f} |" in out
