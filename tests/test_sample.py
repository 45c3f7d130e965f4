"""Answers are read out of whatever the model writes, in the order of the texts."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import CPU, make_settings

from job.decoding.config import initial_config
from job.errors import InvalidInputError
from job.freeze import freeze
from job.lora import add_adapters, save_adapter
from job.quantize import load_model, load_tokenizer
from job.sample import Tagger, load_tagger
from job.settings import Settings
from job.types import Example

KNOWN = [Example("a text", ("music", "rain", "don't", "the sea")), Example("another", ("rain", "rainfall", "a,b"))]


def tagger(settings: Settings) -> Tagger:
    model = load_model(settings.base, CPU)
    return Tagger(model, load_tokenizer(settings.base), settings, CPU, initial_config(settings.sample, KNOWN))


@pytest.mark.parametrize("architecture", ["bloom", "llama"])
def test_an_answer_does_not_depend_on_the_texts_beside_it(
    request: pytest.FixtureRequest, tmp_path: Path, architecture: str
) -> None:
    folder = request.getfixturevalue(architecture)
    texts = ["a song", "a much longer text about the rain and all that falls with it", "bread", "the last of all"]
    alone = tagger(make_settings(folder, tmp_path, sample={"batch_size": 1})).tag(texts)
    together = tagger(make_settings(folder, tmp_path, sample={"batch_size": 3})).tag(texts)
    assert [answer.text for answer in together] == texts
    assert together == alone


def test_a_batch_keeps_to_its_tokens(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tagger(make_settings(llama, tmp_path))
    texts = [*(["rain"] * 9), "a much longer text about the rain and all that falls with it"]
    batches: list[list[int]] = []
    lists = made._greedy
    monkeypatch.setattr(made, "_greedy", lambda ids: batches.append([len(i) for i in ids]) or lists(ids))
    freely = made.tag(texts)
    assert len(batches) == 1
    budget = 4 * (min(map(min, batches)) + 12)
    monkeypatch.setattr("job.sample.BATCH_TOKENS", budget)
    batches.clear()
    assert made.tag(texts) == freely
    assert len(batches) > 2
    assert all(len(batch) == 1 or len(batch) * (max(batch) + 12) <= budget for batch in batches)


def test_generation_stops_when_all_lists_are_closed(llama: Path, tmp_path: Path) -> None:
    sample = {"vocabulary": "seen", "max_tags": 1, "max_new_tokens": 100}
    made = tagger(make_settings(llama, tmp_path, data={"max_length": 256}, sample=sample))
    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    made._model.register_forward_hook(count)
    answers = made.tag(["a song", "bread"])
    assert all(answer.well_formed and len(answer.tags) == 1 for answer in answers)
    assert passes == max(len(made._tokenizer(f" [{answer.tags[0]!r}]").input_ids) for answer in answers)


def test_tags_below_the_threshold_are_left_out(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tagger(make_settings(llama, tmp_path, sample={"threshold": 0.5}))
    written = ("['rain', 'sea']", [("rain", 0.2), ("sea", 0.5)], True)
    monkeypatch.setattr(made, "_greedy", lambda prompts: [written for _ in prompts])
    [answer] = made.tag(["a song"])
    assert (answer.tags, answer.confidences) == (("sea",), (0.5,))
    assert answer.raw == "['rain', 'sea']"


def test_an_adapter_of_another_base_model_is_refused(llama: Path, bloom: Path, tmp_path: Path) -> None:
    settings = make_settings(llama, tmp_path)
    model = load_model(settings.base, CPU)
    freeze(model)
    save_adapter(
        add_adapters(model, settings.lora, seed=1), load_tokenizer(settings.base), tmp_path / "adapter", settings.base
    )
    load_tagger(settings, tmp_path / "adapter", CPU).tag(["a song"])
    with pytest.raises(
        InvalidInputError, match=f"was trained on {llama}, not on {bloom}; set TAGGER_BASE_MODEL={llama}"
    ):
        load_tagger(make_settings(bloom, tmp_path), tmp_path / "adapter", CPU)
    with pytest.raises(InvalidInputError, match="there is no adapter to read in"):
        load_tagger(settings, tmp_path / "nothing", CPU)
