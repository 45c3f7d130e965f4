"""tagger.json: what is saved with an adapter, and how the settings override it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hub import Hub, Repo

from job.decoding.config import CONFIG_NAME, DEFAULT_CONFIG, DEFAULT_MAX_TAGS, check_tags, initial_config, load_config
from job.errors import InvalidInputError
from job.settings import Sample
from job.types import Example

TRAIN = [Example("one", ("rain", "music")), Example("two", ("été", "rain"))]
SEEN = ("rain", "music", "été")


def config(**values: object) -> object:
    return DEFAULT_CONFIG.model_copy(update=values)


def edit(folder: Path, **values: object) -> None:
    """Change fields of the tagger.json in a folder."""
    file = folder / CONFIG_NAME
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | values), encoding="utf-8")


def publish(loopback_hub: Hub, content: bytes) -> None:
    repo = loopback_hub.models["ada/tagger"] = Repo("ada/tagger")
    repo.commit("main", "an adapter", {CONFIG_NAME: content})


def test_a_saved_config_is_read_back(tmp_path: Path) -> None:
    initial = initial_config(Sample(decoding="marginal", max_tags=5, max_positions=3), TRAIN)
    assert initial == config(decoding="marginal", vocabulary="closed", tags=SEEN, max_tags=5, max_positions=3)
    saved = initial.model_copy(update={"threshold": 0.07})
    saved.save(tmp_path)
    assert load_config(Sample(), tmp_path) == saved
    assert load_config(Sample(threshold="auto"), tmp_path) == saved


def test_a_config_is_read_from_a_hub_repo(loopback_hub: Hub, tmp_path: Path) -> None:
    saved = initial_config(Sample(decoding="marginal"), TRAIN)
    saved.save(tmp_path)
    publish(loopback_hub, (tmp_path / CONFIG_NAME).read_bytes())
    assert load_config(Sample(), "ada/tagger") == saved


def test_settings_override_the_saved_config(tmp_path: Path) -> None:
    initial_config(Sample(), TRAIN).save(tmp_path)
    assert load_config(Sample(), tmp_path) == config(tags=SEEN)
    settings = Sample(vocabulary="seen", threshold=0.3, max_tags=2, max_positions=4)
    expected = config(vocabulary="closed", tags=SEEN, threshold=0.3, max_tags=2, max_positions=4)
    assert load_config(settings, tmp_path) == expected


def test_a_vocabulary_file_replaces_the_saved_tags(tmp_path: Path) -> None:
    initial_config(Sample(), TRAIN).save(tmp_path)
    (tmp_path / "tags.txt").write_text("\ufeffa tag\n\n  another \na tag\n", encoding="utf-8")
    loaded = load_config(Sample(vocabulary=str(tmp_path / "tags.txt")), tmp_path)
    assert (loaded.vocabulary, loaded.tags) == ("closed", ("a tag", "another"))


def test_a_file_without_max_positions_has_one_position(tmp_path: Path) -> None:
    initial_config(Sample(decoding="marginal"), TRAIN).save(tmp_path)
    assert load_config(Sample(), tmp_path).max_positions == DEFAULT_MAX_TAGS
    found = json.loads((tmp_path / CONFIG_NAME).read_text(encoding="utf-8"))
    del found["max_positions"]
    (tmp_path / CONFIG_NAME).write_text(json.dumps(found), encoding="utf-8")
    assert load_config(Sample(), tmp_path).max_positions == 1


def test_an_adapter_without_the_file_knows_no_tags(tmp_path: Path) -> None:
    assert load_config(Sample(), tmp_path) == DEFAULT_CONFIG
    with pytest.raises(InvalidInputError, match="has no tagger.json with the tags it was trained on"):
        load_config(Sample(vocabulary="seen"), tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"no JSON", b"\xff\xfe", b"[]", b"null", b"{}", b'{"schema_version": 1, "tags": 3}', b'{"schema_version": 1'],
)
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / CONFIG_NAME).write_bytes(content)
    with pytest.raises(InvalidInputError, match="tagger.json of the adapter in .* cannot be read") as refusal:
        load_config(Sample(), tmp_path)
    assert len(refusal.value.problems) == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("schema_version", 2),
        ("schema_version", None),
        ("threshold", "high"),
        ("threshold", "auto"),
        ("threshold", 1.0),
        ("threshold", float("nan")),
        ("threshold", None),
        ("max_tags", 0),
        ("max_tags", 1001),
        ("max_positions", 0),
        ("max_positions", None),
        ("decoding", "beam"),
        ("decoding", "likely"),
        ("vocabulary", "all"),
        ("tags", [1]),
        ("tags", "abc"),
        ("tags", ["rain", " "]),
        ("tags", ["rain", "rain"]),
        ("tags", ["\ud800"]),
        ("tags", ["x" * 5000]),
        ("tags", [str(i) for i in range(200_001)]),
        ("temperature", 0.7),
    ],
)
def test_a_bad_field_is_refused_by_name(tmp_path: Path, field: str, value: object) -> None:
    initial_config(Sample(), TRAIN).save(tmp_path)
    edit(tmp_path, **{field: value})
    with pytest.raises(InvalidInputError, match=rf"tagger.json of the adapter in .* cannot be read \({field}\b"):
        load_config(Sample(), tmp_path)


def test_a_bad_published_field_is_refused_by_name(loopback_hub: Hub) -> None:
    publish(loopback_hub, b'{"schema_version": 2}')
    with pytest.raises(InvalidInputError, match="tagger.json of the adapter in ada/tagger .*schema_version: .*1"):
        load_config(Sample(), "ada/tagger")


def test_marginal_decoding_of_an_open_vocabulary_is_refused(tmp_path: Path) -> None:
    initial_config(Sample(decoding="marginal"), TRAIN).save(tmp_path)
    with pytest.raises(InvalidInputError, match="set TAGGER_SAMPLE_VOCABULARY to seen or to a file"):
        load_config(Sample(vocabulary="open"), tmp_path)
    assert load_config(Sample(vocabulary="open", decoding="greedy"), tmp_path).decoding == "greedy"


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot be read"), (b"\n \n", "has no tags"), (b"\xff\xfe\x00", "cannot be read")]
)
def test_an_unusable_vocabulary_file_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "tags.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InvalidInputError, match=message):
        initial_config(Sample(vocabulary=str(file)), TRAIN)


def test_tags_that_tagger_json_could_not_hold_are_refused_before_training(tmp_path: Path) -> None:
    check_tags(["rain", "x" * 4096], "")
    with pytest.raises(InvalidInputError, match=r"a tag has 4097 characters \('xxx.* Check the delimiter"):
        check_tags(["rain", "x" * 4097], "Check the delimiter")
    with pytest.raises(InvalidInputError, match="200001 different tags; at most 200000 are possible"):
        check_tags(map(str, range(200_001)), "")
    (tmp_path / "tags.txt").write_text("x" * 4097)
    with pytest.raises(InvalidInputError, match="a tag has 4097 characters .* Shorten TAGGER_SAMPLE_VOCABULARY"):
        load_config(Sample(vocabulary=str(tmp_path / "tags.txt")), tmp_path)
