"""Answers are lists of tags, in the order of the texts; adapters that cannot be loaded are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny_tokenizers
import torch
from conftest import CPU, make_settings
from hub import Hub, Repo
from safetensors.torch import load_file, save_file

from job.decoding.config import initial_config
from job.errors import InvalidInputError
from job.freeze import freeze
from job.lora import add_adapters, save_adapter
from job.quantize import load_model, load_tokenizer
from job.sample import BATCH_TOKENS, Tagger, load_tagger
from job.settings import Settings
from job.types import Example

KNOWN = [Example("a text", ("music", "rain", "don't", "the sea")), Example("another", ("rain", "rainfall", "a,b"))]
LONG_TEXT = "a much longer text about the rain and all that falls with it"


def make_tagger(settings: Settings, model: Any = None) -> Tagger:
    model = load_model(settings.base, CPU) if model is None else model
    return Tagger(model, load_tokenizer(settings.base), settings, CPU, initial_config(settings.sample, KNOWN))


def overfit(settings: Settings) -> Any:
    """Train the tiny model until its answers are likely, but not certain: random weights give nearly equal logits."""
    model, tokenizer = load_model(settings.base, CPU), load_tokenizer(settings.base)
    pairs = [("a song", "['rain', 'music']"), ("a song", "['music', 'the sea']"), (LONG_TEXT, "['rain', 'rainfall']")]
    batch = [torch.tensor([tokenizer(f"{text} ->: {tags}").input_ids]) for text, tags in pairs]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(30):
        loss = sum(model(input_ids=ids, labels=ids).loss for ids in batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def test_tags_that_the_tokenizer_cannot_tell_apart_are_counted(
    llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = make_settings(llama, tmp_path, sample={"vocabulary": "seen"})
    model = load_model(settings.base, CPU)
    known = [Example("Rome", ("日本", "life", "Life")), Example("Tokyo", ("東京",))]
    for tokenizer in (load_tokenizer(settings.base), tiny_tokenizers.build("no_bytes")):
        Tagger(model, tokenizer, settings, CPU, initial_config(settings.sample, known))
    lines = [record.getMessage() for record in caplog.records if record.name == "job.sample"]
    assert len(lines) == 1
    assert "1 tags of the vocabulary are in no answer" in lines[0] and "'東京' like '日本'" in lines[0]


@pytest.fixture
def adapter(llama: Path, tmp_path: Path) -> Path:
    settings = make_settings(llama, tmp_path)
    model = load_model(settings.base, CPU)
    freeze(model)
    adapted = add_adapters(model, settings.lora, seed=1)
    save_adapter(adapted, load_tokenizer(settings.base), tmp_path / "adapter", settings.base)
    return tmp_path / "adapter"


@pytest.mark.parametrize("decoding", ["greedy", "marginal"])
@pytest.mark.parametrize("architecture", ["bloom", "llama"])
def test_an_answer_does_not_depend_on_the_other_texts(
    request: pytest.FixtureRequest, tmp_path: Path, architecture: str, decoding: str
) -> None:
    folder = request.getfixturevalue(architecture)
    model = overfit(make_settings(folder, tmp_path))
    texts = ["a song", LONG_TEXT, "bread", "the last of all"]
    alone, together = (
        make_tagger(
            make_settings(folder, tmp_path, sample={"batch_size": size, "decoding": decoding, "max_new_tokens": 40}),
            model,
        ).tag(texts)
        for size in (1, 3)
    )
    assert [answer.text for answer in together] == texts
    assert together == alone
    assert together[0].tags


def test_a_batch_keeps_to_its_tokens(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = make_settings(llama, tmp_path, sample={"max_new_tokens": 12})
    model = load_model(settings.base, CPU)
    batches: list[tuple[int, int]] = []

    def note(_: object, __: object, inputs: dict[str, Any]) -> None:
        rows, width = inputs["input_ids"].shape
        if width > 1:  # the prompts; later passes have one token
            batches.append((rows, width))

    model.register_forward_pre_hook(note, with_kwargs=True)
    tagger = make_tagger(settings, model)
    texts = [*(["rain"] * 9), LONG_TEXT]
    answers = tagger.tag(texts)
    [(rows, _)] = batches
    assert rows == 10
    batches.clear()
    tagger.tag(["rain"])
    [(_, short)] = batches
    budget = 4 * (short + 12)
    monkeypatch.setitem(BATCH_TOKENS, "cpu", budget)
    batches.clear()
    assert tagger.tag(texts) == answers
    assert sorted(rows for rows, _ in batches) == [1, 1, 4, 4]
    assert all(rows == 1 or rows * (width + 12) <= budget for rows, width in batches)


@pytest.mark.parametrize("decoding", ["greedy", "marginal"])
def test_a_batch_is_divided_where_memory_runs_out(
    llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, decoding: str
) -> None:
    sample = {"decoding": decoding, "vocabulary": "seen", "max_new_tokens": 12}
    settings = make_settings(llama, tmp_path, sample=sample)
    model = load_model(settings.base, CPU)
    texts = ["rain", "a song", "bread", "two friends", "the sea"]
    expected = make_tagger(settings, model).tag(texts)
    widest: list[int] = []

    def allocate(_: object, __: object, inputs: dict[str, Any]) -> None:
        rows, width = inputs["input_ids"].shape
        if width > 1:  # the prompts
            widest.append(rows)
            if rows > 2:
                raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    model.register_forward_pre_hook(allocate, with_kwargs=True)
    tagger = make_tagger(settings, model)
    assert [answer.tags for answer in tagger.tag(texts)] == [answer.tags for answer in expected]
    assert widest[:2] == [5, 2], "half of five texts"
    assert "out of memory; at most 2 texts now share a forward pass" in caplog.text
    widest.clear()
    tagger.tag(texts)
    assert max(widest) == 2, "later batches are not tried with more"


def test_a_single_text_that_does_not_fit_into_memory_is_an_error(llama: Path, tmp_path: Path) -> None:
    settings = make_settings(llama, tmp_path)
    model = load_model(settings.base, CPU)

    def allocate(*_: object) -> None:
        raise MemoryError

    model.register_forward_pre_hook(allocate)
    with pytest.raises(MemoryError):
        make_tagger(settings, model).tag(["rain"])


def test_generation_stops_when_all_lists_are_closed(llama: Path, tmp_path: Path) -> None:
    sample = {"vocabulary": "seen", "max_tags": 1, "max_new_tokens": 100}
    settings = make_settings(llama, tmp_path, data={"max_length": 256}, sample=sample)
    model = load_model(settings.base, CPU)
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    answers = make_tagger(settings, model).tag(["a song", "bread"])
    assert all(answer.well_formed and len(answer.tags) == 1 for answer in answers)
    tokenizer = load_tokenizer(settings.base)
    assert len(passes) == max(len(tokenizer(f" [{answer.tags[0]!r}]").input_ids) for answer in answers)


@pytest.mark.parametrize("decoding", ["greedy", "marginal"])
def test_tags_below_the_threshold_are_left_out(llama: Path, tmp_path: Path, decoding: str) -> None:
    sample = {"vocabulary": "seen", "decoding": decoding, "max_new_tokens": 40}
    settings = make_settings(llama, tmp_path, sample=sample)
    tagger = make_tagger(settings, overfit(settings))
    [every] = tagger.tag(["a song"])
    assert len(set(every.confidences)) > 1
    threshold = sorted(every.confidences)[-1] - 1e-6
    tagger.decoding = tagger.decoding.model_copy(update={"threshold": threshold})
    [kept] = tagger.tag(["a song"])
    expected = [pair for pair in zip(every.tags, every.confidences, strict=True) if pair[1] > threshold]
    assert list(zip(kept.tags, kept.confidences, strict=True)) == expected
    assert 0 < len(expected) < len(every.tags)
    assert kept.raw == every.raw, "the raw answer keeps what the threshold leaves out"


def test_marginal_answers_are_sorted_by_confidence(llama: Path, tmp_path: Path) -> None:
    settings = make_settings(llama, tmp_path, sample={"decoding": "marginal", "max_new_tokens": 40})
    tagger = make_tagger(settings, overfit(settings))
    [every] = tagger.tag(["a song"])
    assert len(every.tags) > 2
    assert list(every.confidences) == sorted(every.confidences, reverse=True)
    tagger.decoding = tagger.decoding.model_copy(update={"max_tags": 2})
    [answer] = tagger.tag(["a song"])
    assert answer.tags == every.tags[:2]


def test_a_saved_adapter_is_loaded(llama: Path, adapter: Path, tmp_path: Path) -> None:
    [answer] = load_tagger(make_settings(llama, tmp_path), adapter, CPU).tag(["a song"])
    assert answer.text == "a song"


def test_an_adapter_of_another_base_model_is_refused(bloom: Path, llama: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InvalidInputError, match=f"was trained on {llama}, not on {bloom}; set TAGGER_BASE_MODEL={llama}"
    ):
        load_tagger(make_settings(bloom, tmp_path), adapter, CPU)


def test_an_absent_adapter_is_refused(settings: Settings, tmp_path: Path) -> None:
    for source in (tmp_path / "nothing", "ada/nothing"):
        with pytest.raises(InvalidInputError, match=f"there is no adapter to read in {source}: "):
            load_tagger(settings, source, CPU)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"peft_type": None}, "peft_type"),
        ({"peft_type": "X"}, "peft_type"),
        ({"r": "many"}, "r"),
        ({"r": 0}, "r"),
        ({"lora_alpha": "x"}, "lora_alpha"),
        ({"lora_dropout": "x"}, "lora_dropout"),
        ({"target_modules": 3}, "target_modules"),
    ],
)
def test_a_damaged_adapter_config_is_refused_by_field(
    settings: Settings, adapter: Path, change: dict[str, object], field: str
) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | change), encoding="utf-8")
    with pytest.raises(InvalidInputError, match=rf"there is no adapter to read in .*: {field}\b"):
        load_tagger(settings, adapter, CPU)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\xfe"])
def test_an_adapter_config_that_is_none_is_refused(settings: Settings, adapter: Path, content: bytes) -> None:
    (adapter / "adapter_config.json").write_bytes(content)
    with pytest.raises(InvalidInputError, match="there is no adapter to read in"):
        load_tagger(settings, adapter, CPU)


def widen(file: Path) -> None:
    save_file({name: torch.cat([tensor, tensor]) for name, tensor in load_file(file).items()}, file)


@pytest.mark.parametrize(
    "damage",
    [
        Path.unlink,
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(b"x" * 1000),
        lambda file: file.write_bytes(file.read_bytes()[:-100]),
        widen,
    ],
    ids=["absent", "empty", "noise", "truncated", "other shapes"],
)
def test_damaged_adapter_weights_are_refused(
    settings: Settings, adapter: Path, damage: Callable[[Path], object]
) -> None:
    damage(adapter / "adapter_model.safetensors")
    with pytest.raises(InvalidInputError, match="the weights of the adapter in .* cannot be read"):
        load_tagger(settings, adapter, CPU)


def test_an_adapter_without_safetensors_is_refused(settings: Settings, adapter: Path, loopback_hub: Hub) -> None:
    weights = adapter / "adapter_model.safetensors"
    torch.save(load_file(weights), adapter / "adapter_model.bin")
    weights.unlink()
    repo = loopback_hub.models["ada/pickled"] = Repo("ada/pickled")
    repo.commit("main", "pickle", {file.name: file.read_bytes() for file in adapter.iterdir()})
    for source in (adapter, "ada/pickled"):
        with pytest.raises(InvalidInputError) as refused:
            load_tagger(settings, source, CPU)
        assert refused.value.problems == (
            f"the weights of the adapter in {source} cannot be read: there is no adapter_model.safetensors, and "
            "pickles are not read because they can run code; train or fetch it again",
        )


@pytest.mark.parametrize("error", [TypeError("a defect"), torch.OutOfMemoryError("CUDA out of memory")])
def test_other_errors_in_loading_are_not_the_adapter_s(
    settings: Settings, adapter: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(peft.PeftModel, "from_pretrained", fail)
    with pytest.raises(type(error)):
        load_tagger(settings, adapter, CPU)
