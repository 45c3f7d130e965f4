"""The scores are those that the definitions give."""

from __future__ import annotations

import pytest

from job.evaluate import gate, most_common_tags, normalise_tag, score
from job.results import Example, GateFailed
from job.settings import Eval


def test_micro_scores_and_jaccard_count_pairs_and_sets() -> None:
    scores = score([["a", "b"], ["a"], ["c"]], [["a"], ["a", "d"], []], parse_rate=2 / 3)
    assert (scores.n, scores.parse_rate) == (3, 2 / 3)
    assert scores.precision == pytest.approx(2 / 3)  # of a, a, d: both a
    assert scores.recall == pytest.approx(2 / 4)  # of a, b, a, c: both a
    assert scores.f1 == pytest.approx(2 * (2 / 3) * 0.5 / (2 / 3 + 0.5))
    assert scores.jaccard == pytest.approx((1 / 2 + 1 / 2 + 0) / 3)


def test_order_case_and_spelling_of_white_space_do_not_count() -> None:
    assert score([["Science Fiction", "life"]], [["life", "science-fiction"]], parse_rate=1).f1 == 1
    assert normalise_tag("  Self_Help  Books ") == "self-help-books"


def test_no_answer_at_all_scores_zero() -> None:
    scores = score([["a"], ["b"]], [[], []], parse_rate=0)
    assert (scores.precision, scores.recall, scores.f1, scores.jaccard) == (0, 0, 0, 0)


@pytest.mark.parametrize(("gold", "predicted", "f1"), [("a", "a", 1), ("a", "b", 0), ("a", "-", 0), ("-", "-", 1)])
def test_data_with_a_single_tag_are_scored_too(gold: str, predicted: str, f1: float) -> None:
    assert score([[gold]], [[predicted]], parse_rate=1).f1 == f1


def test_most_common_tags_answers_as_many_as_a_text_has() -> None:
    train = [Example("1", ("a", "b")), Example("2", ("a", "b")), Example("3", ("a", "c"))]
    scores = most_common_tags(train, [Example("4", ("a", "b")), Example("5", ("c",))])
    assert scores.precision == pytest.approx(2 / 4)
    assert scores.recall == pytest.approx(2 / 3)


def test_the_floor_refuses_what_is_below_it() -> None:
    scores = score([["a"], ["b"]], [["a"], ["c"]], parse_rate=1)
    gate(Eval(gate="off", min_f1=0.9), scores)
    gate(Eval(gate="floor", min_f1=0.5), scores)
    with pytest.raises(GateFailed, match="micro-F1 is 0.500, below TAGGER_EVAL_MIN_F1=0.6"):
        gate(Eval(gate="floor", min_f1=0.6), scores)
