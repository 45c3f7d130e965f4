"""The quality bench compares variants on the same texts, and keeps test texts out of training."""

import json
from pathlib import Path

import pytest
from conftest import SAYINGS

from bench import quality
from job.settings import Settings
from job.types import Example


@pytest.fixture
def quotes(tmp_path: Path) -> str:
    file = tmp_path / "quotes.jsonl"
    lines = [{"quote": f"{n} says {n * n} and {n**3 % 97}", "tags": [f"tag{n % 7}", f"rare{n}"]} for n in range(400)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


def test_no_fold_has_a_text_of_the_test_split(quotes: str) -> None:
    rest, test = quality.folds(quotes, quality.TEST)
    hidden = {example.text for example in test}
    assert len(hidden) > 20
    for fold in (1, 2, 3):
        train, development = quality.folds(quotes, fold)
        texts = [example.text for example in (*train, *development)]
        assert len(texts) == len(set(texts)) and not hidden & set(texts)
        assert {example.text for example in rest} >= set(texts)


def test_the_second_test_split_is_disjoint_from_all_other_splits(quotes: str) -> None:
    train, held_out = quality.folds(quotes, quality.SECOND_TEST)
    texts = {example.text for example in held_out}
    assert len(texts) == len(held_out) > 20
    assert not texts & {example.text for example in train}
    for other in (quality.TEST, 1, 2, 3):
        scored = {example.text for example in quality.folds(quotes, other)[1]}
        assert not texts & scored and scored <= {example.text for example in train}


def test_folds_have_different_development_texts(quotes: str) -> None:
    held_out = [{example.text for example in quality.folds(quotes, fold)[1]} for fold in (1, 2, 3)]
    assert len({frozenset(texts) for texts in held_out}) == 3
    assert all(len(a & b) < 0.5 * len(a) for a in held_out for b in held_out if a is not b)


def test_half_of_the_rare_tags_are_dropped_and_no_others() -> None:
    train = [Example(str(n), ("often", f"once{n}")) for n in range(200)] + [Example("alone", ("alone",))]
    kept = quality.subsample(train, quality.Variant("learned", rare=0.5))
    assert all("often" in example.tags for example in kept[:-1]) and kept[-1].tags == ("alone",)
    assert 70 < sum(len(example.tags) > 1 for example in kept) < 130
    assert quality.subsample(train, quality.Variant("learned")) == train


def test_a_share_of_the_texts_is_the_same_each_time() -> None:
    train = [Example(str(n), ("tag",)) for n in range(300)]
    third = quality.subsample(train, quality.Variant("learned", texts=1 / 3))
    assert 70 < len(third) < 130 and third == quality.subsample(train, quality.Variant("learned", texts=1 / 3))


def test_a_training_differs_in_one_group_of_settings() -> None:
    found = quality.trainings(320)
    learned = found["learned"]
    exceptions = {"learned": 0, "recipe": 3, "together": 2, "no dropout, averaged": 2, "loss on all, averaged": 2}
    exceptions["LoRA+ with 16, rate 2.5e-4"] = 2
    for name, groups in found.items():
        changed = [group for group in learned | groups if learned.get(group) != groups.get(group)]
        assert len(changed) == exceptions.get(name, 1), (name, changed)


@pytest.mark.parametrize("name", quality.VARIANTS)
def test_the_settings_of_each_variant_are_valid(name: str) -> None:
    variant = quality.VARIANTS[name]
    settings = Settings.model_validate({**quality.trainings(320)[variant.training], "sample": variant.sample})
    # 320 steps of 16 texts, unless the number of steps or of texts is what the training changes
    texts = settings.train.batch_size * settings.train.gradient_accumulation_steps * settings.train.max_steps
    assert texts == 320 * 16 / (2 if "half the steps" in name else 1)


def test_the_table_joins_folds_and_compares_on_the_same_texts() -> None:
    gold, wrong = [["a"], ["b"]], [["x"], ["y"]]
    common = {"well_formed": [True, True], "invented": [0, 0]}
    records = [
        {"variant": "tfidf", "fold": 1, "gold": gold, "predicted": wrong, **common},
        {"variant": "tfidf", "fold": 2, "gold": gold, "predicted": gold, **common},
        {"variant": "learned, free", "fold": 2, "gold": gold, "predicted": gold, "training_seconds": 3.0, **common},
        {"variant": "learned, free", "fold": 1, "gold": gold, "predicted": gold, "training_seconds": 1.0, **common},
        {"variant": "recipe, free", "fold": 2, "gold": gold, "predicted": gold, **common},
    ]
    [header, _, tfidf, both_folds, one_fold] = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in quality.report(records, "tfidf").splitlines()
    ]
    assert dict(zip(header, tfidf, strict=True))["micro-F1"].startswith("0.500 (")
    assert tfidf[-1] == ""
    assert one_fold[-1].startswith("+0.000 ("), "compared on its own fold alone"
    cells = dict(zip(header, both_folds, strict=True))
    assert cells["folds"] == "2" and cells["micro-F1"].startswith("1.000 (")
    assert cells["training, s"] == "2 (1 to 3)" and cells["micro-F1 minus tfidf"].startswith("+0.500 (")


def test_a_table_names_machines_and_days() -> None:
    days = [("a Xeon", "2026-11-25T08:00:00+00:00"), ("an EPYC", "2026-11-26T08:00:00+00:00")]
    days += [("a Xeon", "2026-11-24T23:00:00+00:00"), ("a Xeon", "2026-11-25T01:00:00+00:00")]
    lines = quality.measured_on([{"machine": machine, "when": when} for machine, when in days])
    assert [line.strip() for line in lines] == ["2026-11-24 to 2026-11-25: a Xeon", "2026-11-26: an EPYC"]


def test_micro_f1_is_listed_by_threshold() -> None:
    scored = [[["a", 0.5], ["x", 0.04]], [["b", 0.6], ["y", 0.02]]]
    record = {"variant": "together, marginal", "fold": 1, "gold": [["a"], ["b"]], "scored": scored}
    [line] = quality.by_threshold([record])
    assert "0.667 at 0.02" in line and "0.800 at 0.03" in line and "1.000 at 0.05" in line


def test_average_precision_equals_scikit_learn_s() -> None:
    from sklearn.metrics import average_precision_score

    gold = [["a", "B c"], ["b"], ["d"]]
    scored = [[("a", 0.9), ("x", 0.8), ("b-c", 0.6)], [("y", 0.6), ("b", 0.6)], [("d", 0.2), ("z", 0.1)]]
    value, (low, high) = quality.average_precision(gold, scored)
    found = [(c, t in ("a", "b", "b-c", "d")) for tags in scored for t, c in tags]
    assert value == pytest.approx(average_precision_score([hit for _, hit in found], [c for c, _ in found]))
    assert low < value < high
    missed, _ = quality.average_precision([*gold[:2], ["d", "never"]], scored)
    assert missed == pytest.approx(value * 4 / 5)


def test_average_precision_counts_spellings_of_a_tag_once() -> None:
    once = quality.average_precision([["love"], ["sea"]], [[("Love", 0.9)], [("x", 0.5)]])
    assert quality.average_precision([["love"], ["sea"]], [[("Love", 0.9), ("love", 0.4)], [("x", 0.5)]]) == once


def test_average_precision_without_answers_is_zero() -> None:
    assert quality.average_precision([["love"], ["sea"]], [[], []]) == (0.0, [0.0, 0.0])


def test_a_second_run_prints_the_kept_records(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sayings.jsonl").write_text("".join(SAYINGS.read_text(encoding="utf-8").splitlines(keepends=True)[:60]))
    options = ["--data", str(tmp_path / "sayings.jsonl"), "--base", str(llama), "--steps", "2", "--folds", "1"]
    variants = ["learned, free", "learned, marginal"]
    monkeypatch.setattr(
        "sys.argv", ["bench.quality", *options, "--variants", *variants, "--work", str(tmp_path / "work")]
    )
    quality.main()
    table = capsys.readouterr().out
    missing = [name for name in (*quality.baselines_here(), *variants) if f"| {name} | 1 |" not in table]
    assert not missing and len(quality.baselines_here()) >= 2
    assert len(list((tmp_path / "work" / "trained").iterdir())) == 1, "the two variants share a training"
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*")}
    quality.main()
    assert capsys.readouterr().out == table
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*")} == written
