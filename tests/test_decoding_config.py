"""An adapter says how it is decoded; settings that are given win."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from job.decoding.config import FILE, MOST, Decoding, for_training, of_adapter
from job.settings import Sample
from job.types import Example, Refused

TRAIN = [Example("one", ("rain", "music")), Example("two", ("été", "rain"))]
SEEN = ("rain", "music", "été")


def test_what_is_saved_with_an_adapter_is_read_from_it(tmp_path: Path) -> None:
    saved = replace(for_training(Sample(decoding="likely", max_tags=5, places=3), TRAIN), threshold=0.07)
    assert saved == Decoding("likely", "closed", SEEN, 0.07, 5, 3)
    saved.save(tmp_path)
    assert of_adapter(Sample(), tmp_path) == saved
    assert of_adapter(Sample(threshold="auto"), tmp_path) == saved


def test_settings_that_are_given_win_over_the_adapters(tmp_path: Path) -> None:
    for_training(Sample(), TRAIN).save(tmp_path)
    assert of_adapter(Sample(), tmp_path) == Decoding("list", "open", SEEN, 0.0, MOST)
    given = Sample(vocabulary="seen", threshold=0.3, max_tags=2, places=4)
    assert of_adapter(given, tmp_path) == Decoding("list", "closed", SEEN, 0.3, 2, 4)
    (tmp_path / "tags.txt").write_text("\ufeffa tag\n\n  another \na tag\n", encoding="utf-8")
    listed = of_adapter(Sample(vocabulary=str(tmp_path / "tags.txt")), tmp_path)
    assert (listed.vocabulary, listed.tags) == ("closed", ("a tag", "another"))


def test_an_adapter_from_before_places_has_the_threshold_of_one(tmp_path: Path) -> None:
    for_training(Sample(decoding="likely"), TRAIN).save(tmp_path)
    assert of_adapter(Sample(), tmp_path).places == MOST
    found = json.loads((tmp_path / FILE).read_text())
    del found["places"]
    (tmp_path / FILE).write_text(json.dumps(found))
    assert of_adapter(Sample(), tmp_path).places == 1


def test_an_adapter_without_the_file_is_open_and_knows_no_tags(tmp_path: Path) -> None:
    assert of_adapter(Sample(), tmp_path) == Decoding("list", "open", (), 0.0, MOST)
    with pytest.raises(Refused, match="has no tagger.json with the tags it was trained on"):
        of_adapter(Sample(vocabulary="seen"), tmp_path)


@pytest.mark.parametrize("text", ["no JSON", "{}", '{"schema_version": 2}', '{"schema_version": 1, "tags": 3}', "[]"])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(Refused, match="tagger.json of the adapter in .* cannot be read"):
        of_adapter(Sample(), tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("threshold", "high"),
        ("threshold", "auto"),
        ("max_tags", 0),
        ("places", 0),
        ("places", None),
        ("threshold", None),
        ("decoding", "beam"),
        ("vocabulary", "all"),
        ("tags", [1]),
        ("tags", "abc"),
    ],
)
def test_a_file_with_values_that_none_could_set_is_refused(tmp_path: Path, name: str, value: object) -> None:
    for_training(Sample(), TRAIN).save(tmp_path)
    found = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps(found | {name: value}))
    with pytest.raises(Refused, match="tagger.json of the adapter in .* cannot be read"):
        of_adapter(Sample(), tmp_path)


def test_likely_tags_of_an_open_vocabulary_are_refused(tmp_path: Path) -> None:
    for_training(Sample(decoding="likely"), TRAIN).save(tmp_path)
    with pytest.raises(Refused, match="set TAGGER_SAMPLE_VOCABULARY to seen or to a file"):
        of_adapter(Sample(vocabulary="open"), tmp_path)
    assert of_adapter(Sample(vocabulary="open", decoding="list"), tmp_path).decoding == "list"


def test_a_vocabulary_file_that_lists_nothing_is_refused(tmp_path: Path) -> None:
    for content, message in ((None, "cannot be read"), ("\n \n", "has no tags"), (b"\xff\xfe\x00", "cannot be read")):
        file = tmp_path / "tags.txt"
        if content is not None:
            file.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(Refused, match=message):
            for_training(Sample(vocabulary=str(file)), TRAIN)
