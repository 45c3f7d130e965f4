"""The report shows where a tagger is wrong: which tags it confuses, and its clearest answers."""

from __future__ import annotations

from job.metrics.confusions import best_and_worst, confused_tags, possible_label_errors
from job.types import ConfusedTags, PossibleLabelError, Prediction


def test_a_missed_tag_is_paired_with_the_wrong_ones_of_its_texts() -> None:
    gold = [["life", "Hope"], ["life"], ["life", "love"], ["life"], ["rain"]]
    predicted = [["love", "hope"], ["Love"], ["love"], ["life", "sea"], ["sea"]]
    assert confused_tags(gold, predicted) == [ConfusedTags("life", "love", texts=2, gold_texts=4)]
    assert confused_tags(gold, gold) == []


def test_pairs_have_one_order() -> None:
    gold, predicted = [["b"], ["a"], ["c"], ["c"]] * 2, [["x"], ["x"], ["y"], ["x"]] * 2
    found = [(pair.gold, pair.predicted) for pair in confused_tags(gold, predicted)]
    assert found == [("a", "x"), ("b", "x"), ("c", "x"), ("c", "y")]


def test_the_clearest_answers_come_first() -> None:
    def answer(text: str, *tags: tuple[str, float]) -> Prediction:
        names, confidences = zip(*tags, strict=True) if tags else ((), ())
        return Prediction(text, ("a", "b"), names, "", confidences)

    answers = [
        answer("half", ("a", 0.9)),
        answer("empty"),
        answer("surely wrong", ("x", 0.8)),
        answer("right", ("A", 0.5), ("b", 0.5)),
        answer("surely right", ("a", 0.9), ("b", 0.7)),
    ]
    best, worst = best_and_worst(answers, 2)
    assert [prediction.text for prediction in best] == ["surely right", "right"]
    assert [prediction.text for prediction in worst] == ["surely wrong", "empty"]
    best, worst = best_and_worst(answers, 10)
    assert [prediction.text for prediction in best] == ["surely right", "right", "half"]
    assert [prediction.text for prediction in worst] == ["surely wrong", "empty"]
    old = [Prediction("t", ("a",), ("a", "b"), "")]
    assert best_and_worst(old, 1) == (old, [])


def answer(gold: str, *predicted: tuple[str, float]) -> Prediction:
    return Prediction("text", (gold,), tuple(tag for tag, _ in predicted), "", tuple(value for _, value in predicted))


def test_a_wrong_tag_of_high_confidence_may_be_an_error_of_the_data() -> None:
    predictions = [
        answer("sea", ("sea", 0.6), ("rain", 0.59)),
        answer("Big Sky", ("big-sky", 0.8), ("rain", 0.7)),
        answer("sun", ("moon", 0.95)),
        answer("sun", ("moon", 0.3)),
    ]
    assert possible_label_errors(predictions) == [
        PossibleLabelError(3, "moon", 0.95),
        PossibleLabelError(2, "rain", 0.7),  # as sure as it is on average of sea and big sky
    ]


def test_a_tagger_that_is_never_sure_or_never_right_shows_no_label_errors() -> None:
    unsure = [answer("sea", ("sea", 0.1), ("rain", 0.4)), answer("sea", ("rain", 0.49))]
    never_right = [answer("sea", ("rain", 0.99))]
    without_confidences = [Prediction("text", ("sea",), ("sea", "rain"), "")]
    for predictions in (unsure, never_right, without_confidences, []):
        assert possible_label_errors(predictions) == []
