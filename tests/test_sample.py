"""Answers are read out of whatever the model writes, in the order of the texts."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import CPU, make_settings

from job.freeze import freeze
from job.lora import add_adapters, save_adapter
from job.quantize import load_model, load_tokenizer
from job.results import Refused
from job.sample import Tagger, load_tagger, parse
from job.settings import Settings


@pytest.mark.parametrize(
    ("raw", "tags", "parsed"),
    [
        ("['life', 'love']", ("life", "love"), True),
        ("[\"don't\", 'life']", ("don't", "life"), True),
        (" ['life', 'life ']", ("life",), True),
        ("['life', 'lo", ("life",), False),
        ("['life', love]", ("life",), False),
        ("['life', 3]", ("life",), False),
        ("[]", (), False),
        ("a list of 'life'", (), False),
        ("", (), False),
        ("[" * 9999, (), False),
        (r"['a\dash']", (r"a\dash",), True),
    ],
)
def test_tags_are_read_from_whole_and_broken_lists(raw: str, tags: tuple[str, ...], parsed: bool) -> None:
    assert parse(raw) == (tags, parsed)


def tagger(settings: Settings) -> Tagger:
    model = load_model(settings.base, CPU)
    return Tagger(model, load_tokenizer(settings.base), settings, CPU)


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
    generate = made._generate
    monkeypatch.setattr(made, "_generate", lambda ids: batches.append([len(i) for i in ids]) or generate(ids))
    freely = made.tag(texts)
    assert len(batches) == 1
    budget = 4 * (min(map(min, batches)) + 12)
    monkeypatch.setattr("job.sample.BATCH_TOKENS", budget)
    batches.clear()
    assert made.tag(texts) == freely
    assert len(batches) > 2
    assert all(len(batch) == 1 or len(batch) * (max(batch) + 12) <= budget for batch in batches)


def test_generation_stops_at_the_end_of_the_list(llama: Path, tmp_path: Path) -> None:
    made = tagger(make_settings(llama, tmp_path))
    vocabulary = made._tokenizer.get_vocab()
    assert {vocabulary["]"], made._tokenizer.eos_token_id} <= set(made._stop_ids)
    assert all("]" in made._tokenizer.convert_ids_to_tokens(i) for i in made._stop_ids[1:])


def test_an_adapter_of_another_base_model_is_refused(llama: Path, bloom: Path, tmp_path: Path) -> None:
    settings = make_settings(llama, tmp_path)
    model = load_model(settings.base, CPU)
    freeze(model)
    save_adapter(
        add_adapters(model, settings.lora, seed=1), load_tokenizer(settings.base), tmp_path / "adapter", settings.base
    )
    load_tagger(settings, tmp_path / "adapter", CPU).tag(["a song"])
    with pytest.raises(Refused, match=f"was trained on {llama}, not on {bloom}; set TAGGER_BASE_MODEL={llama}"):
        load_tagger(make_settings(bloom, tmp_path), tmp_path / "adapter", CPU)
    with pytest.raises(Refused, match="there is no adapter to read in"):
        load_tagger(settings, tmp_path / "nothing", CPU)
