"""The tag head: fitted on hidden states, equal after save and load and in every batch, refused if it does not fit."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import zoo
from conftest import CPU, make_settings
from hub import Fault, Hub
from processes import run_together
from safetensors.torch import load_file, save_file
from tiny_run import REPO, move_to_hub, read_lines, set_tiny_environment

from job.cli import main
from job.decoding.config import initial_config
from job.decoding.head import HEAD_NAME, TagHead, fit_head, fit_logistic, mean_hidden_states
from job.decoding.scorers import Scorers
from job.distributed.group import Group
from job.errors import DivergedError, InvalidInputError
from job.evaluate import fit
from job.freeze import freeze
from job.lora import add_adapters, save_adapter
from job.quantize import load_model, load_tokenizer
from job.sample import Tagger, load_tagger
from job.settings import Settings
from job.system import logging_setup
from job.types import Example

WORDS = ("rain", "bread", "sea")
EXAMPLES = [Example(f"{word} {'and ' * (i % 5)}{word}", (word, "all")) for i, word in enumerate(WORDS * 6)]
TEXTS = ["rain rain", "bread, and a much longer text about bread and all that is baked of it", "sea"]
ROUNDING = 2e-4
"""Batches of another width round hidden states, and confidences have four digits."""


@pytest.fixture(scope="module")
def adapter(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with a head, in a folder."""
    folder = tmp_path_factory.mktemp("head")
    logging_setup.configure()  # the filters of warnings
    tagger, model = new_tagger(make_settings(llama, folder, sample={"decoding": "head"}))
    tagger.set_scorers(fit(tagger, EXAMPLES))
    save_adapter(model, load_tokenizer(make_settings(llama, folder).base), folder, make_settings(llama, folder).base)
    tagger.decoding.save(folder)
    tagger.scorers.save(folder)
    return folder


def new_tagger(settings: Settings) -> tuple[Tagger, peft.PeftModel]:
    model = load_model(settings.base, CPU)
    freeze(model)
    adapted = add_adapters(model, settings.lora, seed=1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(0))
    decoding = initial_config(settings.sample, EXAMPLES)
    return Tagger(adapted, load_tokenizer(settings.base), settings, CPU, decoding), adapted


def confidences(tagger: Tagger, texts: list[str] = TEXTS) -> list[dict[str, float]]:
    return [dict(zip(answer.tags, answer.confidences, strict=True)) for answer in tagger.tag(texts)]


def test_a_head_learns_what_the_texts_say(llama: Path, adapter: Path, tmp_path: Path) -> None:
    found = confidences(load_tagger(make_settings(llama, tmp_path), adapter, CPU))
    for word, tags in zip(WORDS, found, strict=True):
        assert max(WORDS, key=lambda other: tags.get(other, 0.0)) == word
        assert tags["all"] > 0.9, "a tag of all texts"


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_a_quantized_base_model_has_a_head(llama: Path, tmp_path: Path, quantize: str) -> None:
    tagger, _ = new_tagger(make_settings(llama, tmp_path, base={"quantize": quantize}, sample={"decoding": "head"}))
    tagger.set_scorers(fit(tagger, EXAMPLES))
    assert [max(WORDS, key=lambda word: tags.get(word, 0.0)) for tags in confidences(tagger)] == list(WORDS)


def test_a_loaded_head_answers_alike_in_every_batch(llama: Path, adapter: Path, tmp_path: Path) -> None:
    alone, together = (
        confidences(load_tagger(make_settings(llama, tmp_path, sample={"batch_size": size}), adapter, CPU))
        for size in (1, 3)
    )
    for one, other in zip(alone, together, strict=True):
        assert one.keys() == other.keys()
        assert one == pytest.approx(other, abs=ROUNDING)


@pytest.mark.parametrize("architecture", ["bloom", "llama"])
def test_padding_does_not_change_hidden_states(
    request: pytest.FixtureRequest, tmp_path: Path, architecture: str
) -> None:
    settings = make_settings(request.getfixturevalue(architecture), tmp_path)
    model, tokenizer = load_model(settings.base, CPU).eval(), load_tokenizer(settings.base)
    prompts = [tokenizer(text).input_ids for text in TEXTS]
    width = max(map(len, prompts))
    ids = torch.tensor([prompt + [tokenizer.pad_token_id] * (width - len(prompt)) for prompt in prompts])
    mask = torch.tensor([[1] * len(prompt) + [0] * (width - len(prompt)) for prompt in prompts])
    with torch.inference_mode():
        together = mean_hidden_states(model, ids, mask)
        for prompt, states in zip(prompts, together, strict=True):
            every = model(input_ids=torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1]
            assert torch.allclose(every[0].mean(0), states, atol=1e-5)


def test_a_head_computes_no_logits(llama: Path, adapter: Path, tmp_path: Path) -> None:
    tagger = load_tagger(make_settings(llama, tmp_path), adapter, CPU)
    model: Any = tagger._model
    model.get_output_embeddings().register_forward_hook(lambda *_: pytest.fail("the logits were computed"))
    assert confidences(tagger)


def test_each_tag_has_its_own_optimum() -> None:
    from sklearn.linear_model import LogisticRegression

    generator = torch.Generator().manual_seed(0)
    features = torch.randn(80, 6, generator=generator, dtype=torch.float64)
    noise = torch.randn(80, 3, generator=generator, dtype=torch.float64)
    labels = (features[:, :3] + noise > 0.5).double()
    labels = torch.cat([labels, torch.ones(80, 1), torch.zeros(80, 1)], 1)
    weight, bias = fit_logistic(features, labels, 2.0)
    for column in range(3):
        expected = LogisticRegression(C=1 / 2, tol=1e-10, max_iter=1000).fit(features, labels[:, column])
        assert weight[column].numpy() == pytest.approx(expected.coef_[0], abs=1e-3)
        assert float(bias[column]) == pytest.approx(float(expected.intercept_[0]), abs=1e-3)
    assert torch.isfinite(bias).all() and float(bias[3]) == -float(bias[4]) > 4
    again = fit_logistic(features, labels, 2.0)
    assert torch.equal(again[0], weight) and torch.equal(again[1], bias), "it is not deterministic"


def test_rare_tags_are_not_learned_and_hidden_states_must_be_numbers() -> None:
    examples = [*EXAMPLES, Example("once", ("rare", "rain"))]
    states = torch.randn(len(examples), 4, generator=torch.Generator().manual_seed(0))
    head = fit_head(states, examples, ("all", "rain", "rare", "never"))
    assert head.tags == ("all", "rain")
    states[3, 1] = torch.nan
    with pytest.raises(DivergedError, match="hidden states are not finite numbers, so no tag head can be fitted"):
        fit_head(states, examples, ("all", "rain"))
    with pytest.raises(InvalidInputError, match="hidden states are not finite numbers, so the tag head cannot answer"):
        head.probabilities(states)
    with pytest.raises(InvalidInputError, match="no tag is on 2 training examples"):
        fit_head(torch.zeros(len(examples), 4), examples, ("rare",))


def test_the_same_head_has_the_same_bytes(adapter: Path, tmp_path: Path) -> None:
    content = (adapter / HEAD_NAME).read_bytes()
    assert TagHead.load(adapter / HEAD_NAME).to_bytes() == content
    assert Scorers.from_bytes({HEAD_NAME: content}).files() == {HEAD_NAME: content}


def test_a_loaded_head_rounds_as_the_fitted_one_does(adapter: Path) -> None:
    head = TagHead.load(adapter / HEAD_NAME)
    assert all(getattr(head, name).data_ptr() % 64 == 0 for name in ("weight", "bias", "mean", "scale"))


def copy_with(adapter: Path, folder: Path, *, drop: str = "", about: object = None, **tensors: torch.Tensor) -> Path:
    """Copy an adapter, and change the tensors or the metadata of its head."""
    folder.mkdir()
    for file in adapter.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    found = load_file(folder / HEAD_NAME) | tensors
    found.pop(drop, None)
    known = {"tags": TagHead.load(adapter / HEAD_NAME).tags}
    save_file(found, folder / HEAD_NAME, {"head": json.dumps(known if about is None else about)})
    return folder


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"drop": "bias"}, "its tensors are"),
        ({"bias": torch.zeros(9)}, "bias has the shape [9] instead of [4]"),
        ({"mean": torch.zeros(64, dtype=torch.float16)}, "mean is torch.float16 instead of float32"),
        ({"bias": torch.full((4,), torch.nan)}, "bias has values that are not finite numbers"),
        ({"scale": torch.zeros(64)}, "scale has values that are not positive"),
        ({"about": {"tags": []}}, "tags: tuple should have at least 1 item"),
        ({"about": {"tags": ["a", "b", "c", "rain"]}}, "has 3 tags that its tagger.json does not have, such as 'a'"),
        (
            {"mean": torch.zeros(7), "scale": torch.ones(7), "weight": torch.zeros(4, 7)},
            "was fitted on hidden states of size 7, and the base model has 64",
        ),
    ],
)
def test_a_head_that_does_not_fit_is_refused(
    llama: Path, adapter: Path, tmp_path: Path, changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(InvalidInputError) as refusal:
        load_tagger(make_settings(llama, tmp_path), copy_with(adapter, tmp_path / "changed", **changes), CPU).tag(TEXTS)
    assert problem in str(refusal.value)


def test_an_adapter_without_a_head_is_refused(llama: Path, adapter: Path, tmp_path: Path) -> None:
    folder = copy_with(adapter, tmp_path / "copy")
    (folder / HEAD_NAME).unlink()
    with pytest.raises(InvalidInputError, match=r"head\.safetensors of the adapter in .* cannot be read"):
        load_tagger(make_settings(llama, tmp_path), folder, CPU)
    initial_config(make_settings(llama, tmp_path).sample, EXAMPLES).save(folder)
    with pytest.raises(InvalidInputError, match=r"has no head\.safetensors, which TAGGER_SAMPLE_DECODING=head needs"):
        load_tagger(make_settings(llama, tmp_path, sample={"decoding": "head"}), folder, CPU)
    assert load_tagger(make_settings(llama, tmp_path), folder, CPU).tag(TEXTS), "greedy decoding needs none"


def test_a_vocabulary_file_restricts_the_head(llama: Path, adapter: Path, tmp_path: Path) -> None:
    file = tmp_path / "tags.txt"
    file.write_text("sea\nunknown\n")
    settings = make_settings(llama, tmp_path, sample={"vocabulary": str(file)})
    assert [set(tags) <= {"sea"} for tags in confidences(load_tagger(settings, adapter, CPU))] == [True] * 3
    file.write_text("unknown\n")
    with pytest.raises(InvalidInputError, match="knows no tag of the vocabulary"):
        load_tagger(settings, adapter, CPU)


@pytest.mark.parametrize("name", ["bart", "rwkv", "xlstm", "mamba", "opt"])
def test_every_kind_of_architecture_has_hidden_states(name: str, tmp_path: Path) -> None:
    zoo.save_model(name, tmp_path / "model")
    settings = make_settings(tmp_path / "model", tmp_path)
    decoding = initial_config(settings.sample, EXAMPLES)
    tagger = Tagger(load_model(settings.base, CPU), load_tokenizer(settings.base), settings, CPU, decoding)
    alone = torch.cat([tagger.hidden_states([text]) for text in TEXTS])
    assert torch.allclose(tagger.hidden_states(TEXTS), alone, atol=1e-5 * float(alone.abs().max()))


def test_two_processes_have_the_head_of_one(llama: Path, tmp_path: Path) -> None:
    settings = make_settings(llama, tmp_path, sample={"decoding": "head", "batch_size": 2})

    def work(group: Group | None) -> Any:
        tagger, _ = new_tagger(settings)
        if group is not None and group.rank > 0:
            return tagger.follow(group)
        if group is not None:
            tagger.join(group)
        tagger.set_scorers(fit(tagger, EXAMPLES))
        with tagger.without_scorers():
            greedy = [answer.raw for answer in tagger.tag(TEXTS)]
        answers = [tagger.scorers.files()[HEAD_NAME].hex(), greedy, confidences(tagger)]
        if group is not None:
            group.send({"do": "end"})
        return answers

    assert run_together(2, work, tmp_path / "together") == work(None)


VARIABLES = {"TAGGER_SAMPLE_DECODING": "head", "TAGGER_SAMPLE_THRESHOLD": "auto", "TAGGER_BASE_QUANTIZE": "none"}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, llama: Path) -> pytest.MonkeyPatch:
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    return set_tiny_environment(monkeypatch, llama)


def test_a_head_comes_back_through_the_hub_merged_and_resumed(
    tiny: pytest.MonkeyPatch, loopback_hub: Hub, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    move_to_hub(tiny, loopback_hub, llama)
    tiny.setenv("TAGGER_HUB_MERGE", "true")
    run = tmp_path / "runs" / "tiny"

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with tiny.context() as patch:
        patch.setattr("job.results.save_metrics", interrupt)
        assert main([]) == 75
    [cached] = run.glob("checkpoints/scorers-*/head.safetensors")
    content = cached.read_bytes()
    with tiny.context() as patch:  # a resumed run does not fit it again
        patch.setattr("job.evaluate.fit_head", interrupt)
        assert main([]) == 0
    decoding = json.loads((run / "adapter" / "tagger.json").read_text())
    assert (decoding["decoding"], decoding["vocabulary"], decoding["head"]) == ("head", "closed", HEAD_NAME)
    assert 0 < decoding["threshold"] < 1
    assert (run / "adapter" / HEAD_NAME).read_bytes() == content
    assert loopback_hub.models[REPO].branches["main"][-1].files[HEAD_NAME] == content
    samples = read_lines(run / "samples.jsonl")
    assert all(sample["raw"] == "" and sample["well_formed"] for sample in samples)
    shutil.rmtree(run)
    for name in VARIABLES:
        tiny.delenv(name)
    tiny.setenv("TAGGER_SAMPLE_OUTPUT", "answers.jsonl")
    assert main(["sample"]) == 0
    for old, new in zip(samples, read_lines(Path("answers.jsonl")), strict=True):
        assert new["tags"] == old["tags"] and new["confidences"] == pytest.approx(old["confidences"], abs=ROUNDING)
    tiny.setenv("TAGGER_SAMPLE_DECODING", "greedy")
    assert main(["sample"]) == 0
    del loopback_hub.models[REPO].branches["main"][-1].files[HEAD_NAME]
    tiny.delenv("TAGGER_SAMPLE_DECODING")
    tiny.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    capsys.readouterr()
    assert main(["sample"]) == 2
    assert "head.safetensors of the adapter in ada/tiny-tagger cannot be read" in capsys.readouterr().err


def test_an_altered_head_on_the_hub_ends_with_4(
    tiny: pytest.MonkeyPatch, loopback_hub: Hub, llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    move_to_hub(tiny, loopback_hub, llama)

    def swap() -> None:
        files = loopback_hub.models[REPO].branches["main"][-1].files
        Path("head").write_bytes(files[HEAD_NAME])
        head = TagHead.load(Path("head"))
        files[HEAD_NAME] = replace(head, bias=head.bias + 5).to_bytes()

    loopback_hub.faults = [Fault(f"HEAD /{REPO}/resolve/.*head.safetensors", "before", action=swap)]
    assert main([]) == 4
    assert "what was saved is not what was trained" in capsys.readouterr().err


def test_a_head_tags_files_in_parts_as_one_answer_each(tiny: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert main([]) == 0
    rows = [json.dumps({"quote": f"{word} and number {i}"}) for i, word in enumerate(WORDS * 4)]
    Path("in.jsonl").write_text("\n".join(rows))
    tiny.setenv("TAGGER_TAG_INPUT", "in.jsonl")
    found = {}
    for rows_of_a_part in ("100", "5"):
        tiny.setenv("TAGGER_TAG_OUTPUT", f"out{rows_of_a_part}.jsonl")
        tiny.setenv("TAGGER_TAG_PART_ROWS", rows_of_a_part)
        assert main(["tag"]) == 0
        found[rows_of_a_part] = read_lines(Path(f"out{rows_of_a_part}.jsonl"))
    for one, other in zip(*found.values(), strict=True):
        assert one["tags"] == other["tags"] and one["confidences"] == pytest.approx(other["confidences"], abs=ROUNDING)
    tagger = json.loads(Path(".out5.jsonl.parts/_SUCCESS.json").read_text())["tagger"]
    content = (tmp_path / "runs" / "tiny" / "adapter" / HEAD_NAME).read_bytes()
    assert tagger["head"] == f"sha256:{hashlib.sha256(content).hexdigest()[:16]}"


def test_a_head_with_nothing_to_learn_is_refused_before_training(
    tiny: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("tags.txt").write_text("a tag that no text has\n")
    tiny.setenv("TAGGER_SAMPLE_VOCABULARY", "tags.txt")
    assert main(["run"]) == 2
    assert "no tag is on 2 training examples" in capsys.readouterr().err
    tiny.setenv("TAGGER_SAMPLE_VOCABULARY", "open")
    assert main(["run"]) == 2
    assert "TAGGER_SAMPLE_DECODING=head computes a probability for each tag of a vocabulary" in capsys.readouterr().err
