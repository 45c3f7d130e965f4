"""Blends: weights from calibration examples, TF-IDF without pickles, and adapters that were calibrated for others."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_settings
from hub import Hub
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from test_head import EXAMPLES, ROUNDING, TEXTS, confidences, new_tagger
from tiny_run import REPO, move_to_hub, read_lines, set_tiny_environment

from job.cli import main
from job.decoding.blend import Blend, fit_blend, only
from job.decoding.config import initial_config, load_config
from job.decoding.equivalence import same_answer
from job.decoding.tfidf import TFIDF_NAME, Tfidf, fit_tfidf
from job.errors import InvalidInputError
from job.evaluate import calibrate, fit
from job.inference import fetch_adapter
from job.settings import Sample
from job.types import Example

GOOD_AND_BAD = ("head", "tfidf")


def calibration(seed: int, texts: int = 300) -> tuple[dict[str, list[dict[str, float]]], list[list[str]]]:
    """Return what a part that knows the tags and one that guesses found, and the gold tags."""
    draw = random.Random(seed)
    gold = [[tag for tag in "abcdef" if draw.random() < 0.3] for _ in range(texts)]
    good = [
        {tag: draw.uniform(0.2, 0.9) if tag in tags else draw.uniform(0.02, 0.5) for tag in "abcdef"} for tags in gold
    ]
    bad = [{tag: draw.uniform(0.02, 0.9) for tag in "abcdef"} for _ in gold]
    return dict(zip(GOOD_AND_BAD, (good, bad), strict=True)), gold


def test_a_part_that_knows_the_tags_gets_the_weight() -> None:
    found, gold = calibration(0)
    blend = fit_blend(found, gold)
    assert blend.weights["head"] > 5 * blend.weights["tfidf"] >= 0
    assert blend == fit_blend(found, gold), "it is not deterministic"
    blended = blend.combine({part: every[0] for part, every in found.items()})
    assert set(blended) <= set("abcdef")
    mean = sum(blended.get(tag, 0.0) for tag in "abcdef")
    assert 0 < mean < 6


def test_a_part_that_contradicts_gets_no_weight() -> None:
    found, gold = calibration(1)
    found["tfidf"] = [{tag: 1 - value for tag, value in tags.items()} for tags in found["head"]]
    assert fit_blend(found, gold).weights["tfidf"] == 0


@pytest.mark.parametrize("gold", [[], ["a"]], ids=["no tag correct", "all correct"])
def test_weights_without_evidence_are_equal(gold: list[str]) -> None:
    blend = fit_blend({"head": [{"a": 0.3}], "tfidf": [{"a": 0.6}]}, [gold])
    assert blend == Blend(weights={"head": 0.5, "tfidf": 0.5})


def test_a_part_that_does_not_know_a_tag_says_nothing_against_it() -> None:
    blend = Blend(weights={"head": 1.0, "tfidf": 2.0})
    found = {"head": {"a": 0.5, "b": 0.2, "c": 1.0}, "tfidf": {"a": 0.8, "d": 0.1}}
    assert blend.combine(found) == pytest.approx({"a": 1 - 0.5 * 0.2**2, "b": 0.2, "c": 0.9999, "d": 1 - 0.9**2})
    assert only("head").combine({"head": {"a": 0.25}}) == pytest.approx({"a": 0.25})
    assert Blend(weights={"head": 0.001}).combine({"head": {"a": 0.5}}) == {}, "below 0.01"


def test_the_weights_are_the_best_ones() -> None:
    found, gold = calibration(2)

    def log_loss(weights: dict[Any, float]) -> float:
        blended = [
            Blend(weights=weights).combine({p: every[n] for p, every in found.items()}) for n in range(len(gold))
        ]
        return -sum(
            math.log(row.get(tag, 0.0) if tag in tags else 1 - row.get(tag, 0.0))
            for row, tags in zip(blended, gold, strict=True)
            for tag in row
        )

    best = dict(fit_blend(found, gold).weights)
    for part in best:
        for step in (-0.02, 0.02):
            other = best | {part: max(0.0, best[part] + step)}
            assert log_loss(best) <= log_loss(other)


def test_tfidf_computes_what_scikit_learn_does(tmp_path: Path) -> None:
    examples = [*EXAMPLES, Example("Rain, rain and ÄRGER: it's 2 a.m.", ("rain", "night")), Example("?!", ("rain",))]
    tfidf = fit_tfidf(examples, ("rain", "sea", "night"))
    assert tfidf.tags == ("rain", "sea"), "a tag of one example is not learned"
    vectorizer = TfidfVectorizer(sublinear_tf=True, token_pattern=r"\w+").fit([e.text for e in examples])
    texts = ["rain, RAIN and ärger", "bread sea sea", "unknown", ""]
    probabilities = tfidf.probabilities(texts)
    for column, tag in enumerate(tfidf.tags):
        regression = LogisticRegression(C=30, class_weight="balanced", solver="liblinear", random_state=0)
        regression.fit(vectorizer.transform([e.text for e in examples]), [tag in e.tags for e in examples])
        expected = regression.predict_proba(vectorizer.transform(texts))[:, 1]
        assert probabilities[:, column].numpy() == pytest.approx(expected, abs=1e-5)
    file = tmp_path / TFIDF_NAME
    file.write_bytes(tfidf.to_bytes())
    loaded = Tfidf.load(file)
    assert torch.equal(loaded.probabilities(texts), probabilities) and loaded.to_bytes() == file.read_bytes()
    assert fit_tfidf(examples, ("rain", "sea", "night")).to_bytes() == file.read_bytes(), "it is not deterministic"


def test_texts_without_words_have_the_tags_of_all() -> None:
    tfidf = fit_tfidf([Example("?!", ("x", "y"))] * 9 + [Example("...", ("x",))], ("x", "y"))
    [row] = tfidf.probabilities(["?"]).tolist()
    assert row[0] > row[1] > 0.8


def test_a_blend_is_calibrated_and_depends_on_no_other_text(llama: Path, tmp_path: Path) -> None:
    settings = make_settings(llama, tmp_path, sample={"decoding": "marginal+head+tfidf", "max_new_tokens": 24})
    tagger, _ = new_tagger(settings)
    tagger.set_scorers(fit(tagger, EXAMPLES))
    curve = calibrate(tagger, [Example(f"{e.text} too", e.tags) for e in EXAMPLES])
    blend = tagger.decoding.blend
    assert blend is not None and set(blend.weights) == {"marginal", "head", "tfidf"}
    assert max(point.f1 for point in curve) > 0.9
    for text, together in zip(TEXTS, confidences(tagger), strict=True):
        [alone] = confidences(tagger, [text])
        assert alone == pytest.approx(together, abs=10 * ROUNDING)


def test_a_part_without_weight_is_not_computed(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tagger, _ = new_tagger(make_settings(llama, tmp_path, sample={"decoding": "marginal+head"}))
    tagger.set_scorers(fit(tagger, EXAMPLES))
    blend = Blend(weights={"marginal": 0.0, "head": 1.0})
    tagger.decoding = tagger.decoding.model_copy(update={"blend": blend})
    monkeypatch.setattr("job.sample.tag_marginals", lambda *_, **__: pytest.fail("it generated"))
    assert all(confidences(tagger))


@pytest.mark.parametrize(
    ("decoding", "problem"),
    [
        (
            "marginal+head",
            r"has no weights for TAGGER_SAMPLE_DECODING=marginal\+head: it was calibrated for head\+tfidf",
        ),
        ("head", None),
        ("marginal", None),
        (None, None),
    ],
)
def test_an_adapter_knows_the_blends_it_was_calibrated_for(tmp_path: Path, decoding: Any, problem: str | None) -> None:
    saved = initial_config(Sample(decoding="head+tfidf"), EXAMPLES)
    files = {"head": "head.safetensors", "tfidf": TFIDF_NAME}
    saved.model_copy(update={**files, "blend": Blend(weights={"head": 0.7, "tfidf": 0.2})}).save(tmp_path)
    if problem is None:
        assert load_config(Sample(decoding=decoding), tmp_path).decoding == (decoding or "head+tfidf")
        return
    with pytest.raises(InvalidInputError, match=problem):
        load_config(Sample(decoding=decoding), tmp_path)


def test_a_blend_tolerates_a_tie_but_not_another_adapter() -> None:
    decoding = initial_config(Sample(decoding="marginal+head", threshold=0.1), EXAMPLES)

    def answer(raw: str, **tags: float) -> dict[str, Any]:
        return {"raw": raw, "tags": list(tags), "confidences": list(tags.values())}

    old = answer("['rain', 'sea']", rain=0.6, sea=0.4)
    assert same_answer(old, answer("['rain', 'sea']", rain=0.63, sea=0.37), decoding)
    assert not same_answer(old, answer("['rain', 'sea']", rain=0.5, sea=0.4), decoding)
    assert same_answer(old, answer("['sea', 'rain']", rain=0.61, sea=0.38), decoding)
    assert not same_answer(old, answer("['sea', 'rain']", rain=0.3, sea=0.4), decoding)


VARIABLES = {"TAGGER_SAMPLE_DECODING": "head+tfidf", "TAGGER_SAMPLE_THRESHOLD": "auto", "TAGGER_BASE_QUANTIZE": "none"}


def test_a_blend_comes_back_through_the_hub_and_a_resume(
    monkeypatch: pytest.MonkeyPatch,
    loopback_hub: Hub,
    llama: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny = move_to_hub(set_tiny_environment(monkeypatch, llama), loopback_hub, llama) and monkeypatch
    tiny.setenv("TAGGER_SAMPLE_DECODING", "head+tfidf")
    assert main([]) == 2
    assert "TAGGER_SAMPLE_DECODING=head+tfidf finds its weights on calibration examples" in capsys.readouterr().err
    for name, value in VARIABLES.items():
        tiny.setenv(name, value)
    run = tmp_path / "runs" / "tiny"

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with tiny.context() as patch:
        patch.setattr("job.results.save_metrics", interrupt)
        assert main([]) == 75
    content = {file.name: file.read_bytes() for file in run.glob("checkpoints/scorers-*/*")}
    with tiny.context() as patch:  # a resumed run fits nothing again
        patch.setattr("job.evaluate.calibrate", interrupt)
        patch.setattr("job.evaluate.fit_tfidf", interrupt)
        assert main([]) == 0
    decoding = json.loads((run / "adapter" / "tagger.json").read_text())
    assert set(decoding["blend"]["weights"]) == {"head", "tfidf"}
    assert json.loads((run / "manifest.json").read_text())["threshold"]["blend"] == decoding["blend"]
    published = loopback_hub.models[REPO].branches["main"][-1].files
    assert {name: published[name] for name in content} == content
    assert set(content) == {"head.safetensors", TFIDF_NAME}
    folder = fetch_adapter(REPO, None, 5)
    assert folder is not None and all((folder / name).is_file() for name in content), "for processes that work offline"
    samples = read_lines(run / "samples.jsonl")
    for name in VARIABLES:
        tiny.delenv(name)
    tiny.setenv("TAGGER_SAMPLE_OUTPUT", "answers.jsonl")
    assert main(["sample"]) == 0
    for old, new in zip(samples, read_lines(Path("answers.jsonl")), strict=True):
        assert new["tags"] == old["tags"] and new["confidences"] == pytest.approx(old["confidences"], abs=ROUNDING)
