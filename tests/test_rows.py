"""Rows come from the Hub, from object storage and from folders, and a setting that does not fit is named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import s3
from hub import Hub, Repo

from job.dataset.rows import read_rows
from job.errors import InvalidInputError
from job.settings import Data


def rows(name: str) -> list[dict[str, Any]]:
    return [{"quote": f"text {i} of {name}", "tags": ["a", "b"]} for i in range(3)]


def lines(name: str) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows(name)).encode()


def values(dataset: str, **knobs: Any) -> list[dict[str, Any]]:
    return [dict(row.values) for row in read_rows(Data(dataset=dataset, **knobs))]


@pytest.fixture
def with_configs(loopback_hub: Hub) -> Hub:
    card = (
        "---\nconfigs:\n- config_name: en\n  data_files:\n  - split: train\n    path: en.jsonl\n"
        "  - split: test\n    path: test.jsonl\n- config_name: de\n  data_files: de.jsonl\n---\n"
    )
    repo = loopback_hub.datasets["tiny/configs"] = Repo("tiny/configs")
    files = {f"{name}.jsonl": lines(name) for name in ("en", "de", "test")}
    repo.commit("main", "data", {"README.md": card.encode(), **files})
    return loopback_hub


def test_config_and_split_of_a_hub_data_set_are_chosen(with_configs: Hub) -> None:
    assert values("tiny/configs", config="en") == rows("en")
    assert values("tiny/configs", config="en", split="test") == rows("test")
    assert values("tiny/configs", config="de") == rows("de")


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({}, r"several configs .*\['en', 'de'\].* set TAGGER_DATA_CONFIG"),
        ({"config": "fr"}, r"BuilderConfig 'fr' not found.* set TAGGER_DATA_CONFIG"),
        ({"config": "de", "split": "dev"}, "has no split 'dev' .*set TAGGER_DATA_SPLIT"),
        ({"config": "de", "text_column": "text"}, "no column 'text'; it has 'quote', 'tags'"),
    ],
)
def test_a_setting_that_does_not_fit_is_named(with_configs: Hub, knobs: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message) as refusal:
        values("tiny/configs", **knobs)
    assert "network" not in str(refusal.value)


def test_a_data_set_built_by_a_script_is_refused(loopback_hub: Hub) -> None:
    repo = loopback_hub.datasets["tiny/script"] = Repo("tiny/script")
    repo.commit("main", "code", {"script.py": b"raise SystemExit", "README.md": b"data"})
    with pytest.raises(InvalidInputError, match="built by a script, and scripts are not run"):
        values("tiny/script")


def test_a_file_in_a_repo_is_read_by_its_url(with_configs: Hub) -> None:
    assert values("hf://datasets/tiny/configs/de.jsonl") == rows("de")


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    with s3.serve() as (served, variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        yield served.objects


def test_objects_folders_and_globs_of_s3_are_read(store: dict[str, bytes]) -> None:
    store |= {"data/b.jsonl": lines("b"), "data/a.jsonl": lines("a"), "data/notes.txt": b"none"}
    assert values("s3://bucket/data/a.jsonl") == rows("a")
    assert values("s3://bucket/data/") == rows("a") + rows("b")
    assert values("s3://bucket/data/b*.jsonl") == rows("b")
    store |= {"data/_parts/parts.json": b"none", "data/.hidden.jsonl": b"none", "data/c/_SUCCESS.json": b"none"}
    assert values("s3://bucket/data") == rows("a") + rows("b")
    with pytest.raises(InvalidInputError, match="names no data file"):
        values("s3://bucket/data/absent.jsonl")
