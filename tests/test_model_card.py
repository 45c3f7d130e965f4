"""The model card passes the Hub's validation, and names from outside cannot change its layout."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from job.metrics.scores import score
from job.model_card import model_card
from job.runs.markup import code_span
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


def test_the_hub_reads_the_scores_from_the_metadata() -> None:
    [*results] = ModelCard(card(data={"revision": "c0ffee"})).data.eval_results
    expected = {"f1": SCORES["adapter"].f1, "precision": 1.0, "recall": 0.5}
    assert {result.metric_type: result.metric_value for result in results} == pytest.approx(expected, abs=1e-4)
    assert {(result.dataset_name, result.dataset_revision) for result in results} == {
        ("Abirate/english_quotes", "c0ffee")
    }


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


HOSTILE = [
    "`code` ``` <script>alert(1)</script> | x",
    "x\n\n# A heading\n---\nlicense: mit\n---",
    "![x](https://evil.example/x.png) [y](javascript:alert(1))",
    "a: {b: [c]} # & * ! % @ 'd' \"e\"",
    "line\u2028separator \x1b[31m \x85",
    "</code></td><img src=x onerror=alert(1)>",
    "a\\| b",
]


def layout(text: str) -> list[str]:
    """Return the lines that make the structure of a card, with its tables' cells left out."""
    return [
        line.partition(" ")[0] if line.startswith("| ") else line
        for line in text.split("\n")
        if line.startswith(("#", "---", "| ", "|--", "```", "![")) or not line
    ]


@pytest.mark.parametrize("text", HOSTILE)
def test_texts_of_others_change_nothing_but_their_place(text: str) -> None:
    shown = card(text, data={"dataset": text, "separator": text, "tags_column": text, "text_column": f"`{text}`"})
    plain = card("x", data={"dataset": "./x.csv", "separator": "x"})
    assert layout(shown) == layout(plain)
    assert len(shown.splitlines()) == len(shown.split("\n")) - 1, "no other line separators"
    for row in [line for line in shown.split("\n") if line.startswith("| `TAGGER_")]:
        assert len(re.findall(r"(?<!\\)\|", row)) == 3, row
    code = r"(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)"
    body = re.sub(r"\n```python\n.*?\n```\n", "\n", shown.split("\n---\n", 1)[1], flags=re.DOTALL)
    outside = re.sub(code, "", body)
    assert not re.search(r"<|javascript:(?!alert\(1\)\))", outside), outside
    links = re.findall(r"(?<!\\)\[[^]]*(?<!\\)\]\([^)]*\)", outside)
    assert links == ["[micro-F1 of the taggers with 95% intervals](scores.svg)", "[training loss](loss.svg)"]
    assert "\x1b" not in shown
    found = metadata(shown)
    assert found["model-index"][0]["results"][0]["dataset"]["name"] == text
    assert found["license"] == "other"
    compile(shown.split("```python\n")[1].split("\n```")[0], "snippet", "exec")


@pytest.mark.parametrize("text", HOSTILE)
def test_the_name_of_a_base_model_changes_nothing_but_its_place(text: str) -> None:
    shown = card(base={"model": text})
    assert len(shown.splitlines()) == len(shown.split("\n")) - 1, "no other line separators"
    [heading] = [line for line in shown.split("\n") if line.startswith("# ")]
    assert heading.startswith("# A tagger on ")
    assert "\x1b" not in shown
    assert "<" not in heading
    assert not re.search(r"(?<!\\)[`\[\]]", heading), heading


@pytest.mark.parametrize(
    ("licence", "entries"),
    [
        ("mit", {"license": "mit"}),
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("openrail++", {"license": "openrail++"}),
        ("tongyi-qianwen", {"license": "other", "license_name": "tongyi-qianwen"}),
        ("Our Own Licence, v1.2!", {"license": "other", "license_name": "our-own-licence-v1.2"}),
        ("模型", {"license": "other", "license_name": "unnamed"}),
        ("x" * 500, {"license": "other", "license_name": "x" * 64}),
        ("other", {"license": "other", "license_name": "other"}),
        ("a: b\n---\n", {"license": "other", "license_name": "a-b"}),
        (None, {}),
    ],
)
def test_a_licence_that_the_hub_does_not_know_is_other(licence: str | None, entries: dict[str, str]) -> None:
    found = {name: value for name, value in metadata(card(licence)).items() if name.startswith("license")}
    link = {"license_link": "https://huggingface.co/bigscience/bloomz-560m"} if "license_name" in entries else {}
    assert found == {**entries, **link}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("q_proj", "`q_proj`"),
        ("", ""),
        (" ->: ", "`  ->:  `"),
        ("`", "`` ` ``"),
        ("a``b`c", "```a``b`c```"),
        ("a\nb", r"`a\nb`"),
        ("a|b", r"`a\|b`"),
    ],
)
def test_code_in_a_table_is_shown_as_it_is(text: str, shown: str) -> None:
    assert code_span(text, in_table=True) == shown


def test_passwords_are_not_in_the_card() -> None:
    text = card(data={"dataset": "s3://key:very-secret@bucket/x.jsonl"})
    assert "very-secret" not in text
    assert metadata(text)["model-index"][0]["results"][0]["dataset"]["name"] == "s3://***@bucket/x.jsonl"
