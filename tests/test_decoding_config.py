"""An adapter says how it is decoded; settings that are given win."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from job.decoding.config import CONFIG_NAME, DEFAULT_MAX_TAGS, DecodingConfig, initial_config, load_config
from job.errors import InvalidInputError
from job.settings import Sample
from job.types import Example

TRAIN = [Example("one", ("rain", "music")), Example("two", ("été", "rain"))]
SEEN = ("rain", "music", "été")


def test_what_is_saved_with_an_adapter_is_read_from_it(tmp_path: Path) -> None:
    saved = replace(initial_config(Sample(decoding="marginal", max_tags=5, max_positions=3), TRAIN), threshold=0.07)
    assert saved == DecodingConfig("marginal", "closed", SEEN, 0.07, 5, 3)
    saved.save(tmp_path)
    assert load_config(Sample(), tmp_path) == saved
    assert load_config(Sample(threshold="auto"), tmp_path) == saved


def test_settings_that_are_given_win_over_the_adapters(tmp_path: Path) -> None:
    initial_config(Sample(), TRAIN).save(tmp_path)
    assert load_config(Sample(), tmp_path) == DecodingConfig("greedy", "open", SEEN, 0.0, DEFAULT_MAX_TAGS)
    given = Sample(vocabulary="seen", threshold=0.3, max_tags=2, max_positions=4)
    assert load_config(given, tmp_path) == DecodingConfig("greedy", "closed", SEEN, 0.3, 2, 4)
    (tmp_path / "tags.txt").write_text("\ufeffa tag\n\n  another \na tag\n", encoding="utf-8")
    listed = load_config(Sample(vocabulary=str(tmp_path / "tags.txt")), tmp_path)
    assert (listed.vocabulary, listed.tags) == ("closed", ("a tag", "another"))


def test_an_adapter_from_before_places_has_the_threshold_of_one(tmp_path: Path) -> None:
    initial_config(Sample(decoding="marginal"), TRAIN).save(tmp_path)
    assert load_config(Sample(), tmp_path).max_positions == DEFAULT_MAX_TAGS
    found = json.loads((tmp_path / CONFIG_NAME).read_text())
    del found["max_positions"]
    (tmp_path / CONFIG_NAME).write_text(json.dumps(found))
    assert load_config(Sample(), tmp_path).max_positions == 1


def test_an_adapter_without_the_file_is_open_and_knows_no_tags(tmp_path: Path) -> None:
    assert load_config(Sample(), tmp_path) == DecodingConfig("greedy", "open", (), 0.0, DEFAULT_MAX_TAGS)
    with pytest.raises(InvalidInputError, match="has no tagger.json with the tags it was trained on"):
        load_config(Sample(vocabulary="seen"), tmp_path)


@pytest.mark.parametrize("text", ["no JSON", "{}", '{"schema_version": 2}', '{"schema_version": 1, "tags": 3}', "[]"])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / CONFIG_NAME).write_text(text)
    with pytest.raises(InvalidInputError, match="tagger.json of the adapter in .* cannot be read"):
        load_config(Sample(), tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("threshold", "high"),
        ("threshold", "auto"),
        ("max_tags", 0),
        ("max_positions", 0),
        ("max_positions", None),
        ("threshold", None),
        ("decoding", "beam"),
        ("vocabulary", "all"),
        ("tags", [1]),
        ("tags", "abc"),
    ],
)
def test_a_file_with_values_that_none_could_set_is_refused(tmp_path: Path, name: str, value: object) -> None:
    initial_config(Sample(), TRAIN).save(tmp_path)
    found = json.loads((tmp_path / CONFIG_NAME).read_text())
    (tmp_path / CONFIG_NAME).write_text(json.dumps(found | {name: value}))
    with pytest.raises(InvalidInputError, match="tagger.json of the adapter in .* cannot be read"):
        load_config(Sample(), tmp_path)


def test_likely_tags_of_an_open_vocabulary_are_refused(tmp_path: Path) -> None:
    initial_config(Sample(decoding="marginal"), TRAIN).save(tmp_path)
    with pytest.raises(InvalidInputError, match="set TAGGER_SAMPLE_VOCABULARY to seen or to a file"):
        load_config(Sample(vocabulary="open"), tmp_path)
    assert load_config(Sample(vocabulary="open", decoding="greedy"), tmp_path).decoding == "greedy"


def test_a_vocabulary_file_that_lists_nothing_is_refused(tmp_path: Path) -> None:
    for content, message in ((None, "cannot be read"), ("\n \n", "has no tags"), (b"\xff\xfe\x00", "cannot be read")):
        file = tmp_path / "tags.txt"
        if content is not None:
            file.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(InvalidInputError, match=message):
            initial_config(Sample(vocabulary=str(file)), TRAIN)
