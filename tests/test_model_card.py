"""The model card passes the Hub's validation, and names from outside cannot change its layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from job.metrics.scores import score
from job.model_card import model_card
from job.settings import Settings

SCORES = {"adapter": score([["x", "y"]], [["x"]])}


def card(licence: str | None = None, **groups: dict[str, Any]) -> str:
    return model_card(Settings.model_validate(groups), SCORES, {"python": "3.11.7", "torch": "2.13.0"}, licence)


def metadata(text: str) -> dict[str, Any]:
    return dict(yaml.safe_load(text.split("---\n")[1]))


def test_the_metadata_names_base_model_data_set_and_licence() -> None:
    text = card("bigscience-bloom-rail-1.0")
    assert metadata(text)["base_model"] == "bigscience/bloomz-560m"
    assert metadata(text)["datasets"] == ["Abirate/english_quotes"]
    assert metadata(text)["license"] == "bigscience-bloom-rail-1.0"
    assert "licence of the base model (bigscience-bloom-rail-1.0)." in text
    assert metadata(text)["model-index"][0]["results"][0]["metrics"][0]["value"] == round(SCORES["adapter"].f1, 4)


def test_local_paths_are_not_in_the_metadata() -> None:
    Path("base").mkdir()
    text = card(base={"model": "./base"}, data={"dataset": "./quotes.jsonl"})
    assert not {"base_model", "datasets", "license"} & metadata(text).keys()
    assert "use the adapter with `tagger-job sample`" in text
    assert "```python" not in text


def test_the_snippet_is_valid_python() -> None:
    text = card(data={"separator": " it's \"a\\b: "}, sample={"max_new_tokens": 7})
    snippet = text.split("```python\n")[1].split("```")[0]
    compile(snippet, "snippet", "exec")
    assert r"""tokenizer('some text it\'s "a\\b:', return_tensors="pt")""" in snippet
    assert "max_new_tokens=7" in snippet


def test_every_setting_that_changes_the_result_is_listed() -> None:
    text = card(lora={"targets": ["q_proj"]}, base={"revision": "c0ffee"})
    assert "at revision `c0ffee`" in text
    assert "| `TAGGER_LORA_TARGETS` | `q_proj` |" in text
    names = set(Settings().result_values())
    assert names <= {line.split("`")[1] for line in text.splitlines() if line.startswith("| `")}
    assert text.endswith("\nMade with python 3.11.7, torch 2.13.0.\n")


def test_names_of_taggers_are_escaped_in_the_table() -> None:
    text = model_card(Settings(), SCORES | {"a|*b*": SCORES["adapter"]}, {}, None)
    assert r"| a\|\*b\* | 1 | 1.000 | 0.500 |" in text
