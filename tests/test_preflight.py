"""The checks before a run find every problem at once and write nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import CPU, make_settings
from hub import WRITE_TOKEN, Hub, Repo
from tiny_run import store_manifest

from job import preflight
from job.cli import main
from job.errors import InvalidInputError
from job.settings import Settings

REPO = "ada/tiny-tagger"


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, loopback_hub: Hub, rows: list[dict[str, Any]]) -> Hub:
    """A Hub with a base model, a data set of 40 texts and an empty repo of the token's user."""
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    base = loopback_hub.models["tiny/llama"] = Repo("tiny/llama", licence="apache-2.0")
    base.commit("main", "weights", {"model.safetensors": b""})
    sayings = loopback_hub.datasets["tiny/sayings"] = Repo("tiny/sayings")
    lines = "".join(json.dumps({"quote": row["quote"], "tags": row["tags"]}) + "\n" for row in rows[:40])
    sayings.commit("main", "data", {"train.jsonl": lines.encode()})
    loopback_hub.models[REPO] = Repo(REPO, private=True)
    return loopback_hub


def settings(**groups: dict[str, Any]) -> Settings:
    values: dict[str, dict[str, Any]] = {
        "base": {"model": "tiny/llama"},
        "data": {"dataset": "tiny/sayings", "eval_size": 30},
        "eval": {"gate": "published"},
        "hub": {"repo": REPO},
    }
    return Settings.model_validate({name: values.get(name, {}) | groups.get(name, {}) for name in values | groups})


def test_the_check_says_how_a_step_is_shared(llama: Path, tmp_path: Path) -> None:
    checked = preflight.check(make_settings(llama, tmp_path, run={"processes": 2}, hub={"push": "never"}))
    assert preflight.processes_here(checked.settings) == 2
    line = preflight.check_machine(checked, 2).describe()[-1]
    assert re.fullmatch(
        r"processes: 2 on this machine; 16 examples of a step have about (\d+) tokens, \d+ for each: below about 2,000 "
        "more processes bring nothing; raise TAGGER_TRAIN_BATCH_SIZE",
        line,
    ), line
    assert "processes" not in "".join(preflight.check_machine(checked).describe())


def test_what_processes_need_survives_json(llama: Path, tmp_path: Path) -> None:
    settings = make_settings(llama, tmp_path, hub={"push": "never"}, sample={"threshold": "auto"})
    checked = preflight.check(settings)
    received = preflight.PreflightResult.from_json(json.loads(json.dumps(checked.as_json())))
    assert received.examples == checked.examples
    assert received.run.path == checked.run.path
    assert received.settings.result_values() == checked.settings.result_values()
    assert received.facts(CPU) == checked.facts(CPU)


def test_names_become_commits_and_nothing_is_written(world: Hub) -> None:
    checked = preflight.check(settings())
    assert checked.settings.base.revision == world.models["tiny/llama"].branches["main"][-1].oid
    assert checked.settings.data.revision == world.datasets["tiny/sayings"].branches["main"][-1].oid
    assert (checked.repo, checked.licence) == (REPO, "apache-2.0")
    assert len(checked.examples.held_out) == 30
    assert not checked.run.started
    assert list(Path().iterdir()) == []


def test_every_problem_is_reported_at_once(world: Hub) -> None:
    with pytest.raises(InvalidInputError) as error:
        preflight.check(
            settings(
                base={"model": "tiny/absent"},
                data={"dataset": "absent.jsonl"},
                hub={"push": "never"},
                sample={"input": Path("absent.txt"), "vocabulary": "absent.tags"},
                run={"dir": Path("/proc/runs")},
            )
        )
    messages = [
        "tiny/absent is not",
        "nothing can be pushed",
        "absent.txt cannot",
        "absent.tags cannot",
        "absent.jsonl does",
    ]
    assert len(error.value.problems) == 6
    for message, problem in zip([*messages, "/proc/runs cannot be written"], error.value.problems, strict=True):
        assert message in problem


def test_no_data_set_is_downloaded_after_a_problem(world: Hub) -> None:
    with pytest.raises(InvalidInputError, match="tiny/absent is not on the Hub"):
        preflight.check(settings(base={"model": "tiny/absent"}))
    assert not [request for request in world.requests if "train.jsonl" in request]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"data": {"eval_size": 12}}, "needs at least 30 held-out examples to tell two adapters apart, and has 12"),
        ({"eval": {"limit": 9}}, "and has 9; raise TAGGER_DATA_EVAL_SIZE (or TAGGER_EVAL_LIMIT)"),
    ],
)
def test_too_few_examples_for_the_gate_are_an_error(world: Hub, groups: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError) as error:
        preflight.check(settings(**groups))
    assert message in str(error.value)
    assert not Path("runs").exists()


def test_the_published_gate_needs_a_push(world: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidInputError, match="nothing can be pushed: it needs HF_TOKEN"):
        preflight.check(settings(hub={"push": "never"}))
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(InvalidInputError, match="nothing can be pushed: it needs HF_TOKEN"):
        preflight.check(settings())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            b'{"base_model_name_or_path": "big/base"}',
            "was trained on big/base, not on tiny/llama, so they cannot be compared. Set TAGGER_BASE_MODEL=big/base",
        ),
        (b"[", f"the adapter published in {REPO} cannot be read"),
    ],
)
def test_an_incomparable_published_adapter_is_an_error(world: Hub, config: bytes, message: str) -> None:
    world.models[REPO].commit("main", "theirs", {"adapter_config.json": config})
    with pytest.raises(InvalidInputError) as error:
        preflight.check(settings())
    assert message in str(error.value)
    assert preflight.check(settings(eval={"gate": "floor"})).repo == REPO


def test_a_published_adapter_of_the_same_inputs_is_recognised(world: Hub) -> None:
    checked = preflight.check(settings())
    assert not preflight.already_published(checked)
    world.models[REPO].commit("main", "ours", {"manifest.json": json.dumps(checked.run.manifest).encode()})
    assert preflight.already_published(preflight.check(settings()))
    assert not preflight.already_published(preflight.check(settings(lora={"r": 8})))
    world.datasets["tiny/sayings"].commit("main", "note", {"NOTE.md": b"a new commit"})
    assert not preflight.already_published(preflight.check(settings()))


def test_a_complete_run_that_only_the_store_has_is_complete(
    world: Hub, tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = world.models["tiny/llama"]
    base.commit("main", "all", {file.name: file.read_bytes() for file in llama.iterdir()})
    stored = settings(run={"store": f"file://{tmp_path}/store"})
    checked = preflight.check(stored)
    world.models[REPO].commit("main", "ours", {"manifest.json": json.dumps(checked.run.manifest).encode()})
    for status in ("running", "complete"):
        manifest = checked.run.manifest | {"status": status, "published": None}
        store_manifest(str(stored.run.store), checked.run.path.name, json.dumps(manifest).encode())
        is_complete = status == "complete"
        found = preflight.check(stored)
        assert (found.complete, preflight.already_published(found)) == (is_complete, is_complete), status
    for group, values in {"base": stored.base, "data": stored.data, "eval": stored.eval, "hub": stored.hub}.items():
        for name in values.model_fields_set:
            monkeypatch.setenv(f"TAGGER_{group}_{name}".upper(), str(getattr(values, name)))
    monkeypatch.setenv("TAGGER_RUN_STORE", str(stored.run.store))
    assert main(["check", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["run"]["complete"] is True
    assert "is recreated" not in printed.err
    assert main(["retrain"]) == 0
    assert "nothing to do" in capsys.readouterr().out
