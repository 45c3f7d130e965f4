"""Selection finds what is better, and says so only if the answers show it."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import pytest

from job.metrics import selection
from job.metrics.selection import Choice, Trial

TAGS = [f"tag{n}" for n in range(12)]


def scored_search(
    seed: int, quality: Mapping[str, float], seconds: Mapping[str, float] | None = None, texts: int = 120
) -> tuple[Choice, list[list[Trial]]]:
    """Search with a stub: each tag of a text is found with the candidate's quality, else another one is given."""
    draw = random.Random(seed)
    gold = [draw.sample(TAGS, draw.randint(1, 3)) for _ in range(texts)]

    def attempt(name: str, share: float) -> Trial:
        own = random.Random(f"{seed} {name} {share}")
        answers = [
            [tag if own.random() < quality[name] * share**0.2 else own.choice(TAGS) for tag in tags] for tags in gold
        ]
        return Trial(name, share, answers, (seconds or {}).get(name, 10.0) * share)

    rounds = list(selection.search(list(quality), gold, attempt))
    return selection.choose(gold, rounds[-1], len(quality)), rounds


@pytest.mark.parametrize("names", ["ab", "abcd"])
def test_equal_candidates_show_no_difference_in_95_of_100_seeds(names: str) -> None:
    found = [scored_search(seed, dict.fromkeys(names, 0.6))[0] for seed in range(100)]
    assert sum(not choice.is_better for choice in found) >= 95
    assert all("no difference was shown" in choice.reason for choice in found if not choice.is_better)


def test_a_better_candidate_is_found() -> None:
    for seed in range(10):
        choice, rounds = scored_search(seed, {"a": 0.5, "b": 0.5, "good": 0.8, "c": 0.5, "d": 0.4})
        assert choice.winner == "good" and choice.is_better and choice.interval is not None
        assert choice.interval[0] > 0 and choice.reason == "it is better"
        assert [len(trials) for trials in rounds] == [5, 3, 2]
        assert [trials[0].share for trials in rounds] == [0.25, 0.5, 1.0]


def test_of_equals_the_cheaper_is_chosen_although_it_scored_lower() -> None:
    scores = []
    for seed in range(10):
        choice, _ = scored_search(seed, {"dear": 0.6, "cheap": 0.6}, {"dear": 30.0, "cheap": 10.0})
        if not choice.is_better:
            assert choice.winner == "cheap" and choice.reason == "no difference was shown: the cheaper"
            assert choice.interval is not None and choice.difference is not None
            assert choice.interval[0] <= choice.difference <= choice.interval[1]
            scores.append(choice.difference)
    assert len(scores) >= 8
    assert min(scores) < 0 < max(scores)


def test_of_equal_cost_the_first_is_chosen() -> None:
    for order in ("ab", "ba"):
        choice, _ = scored_search(1, dict.fromkeys(order, 0.6), {"a": 10.0, "b": 10.5})
        assert choice.winner == order[0] and "the first that was named" in choice.reason


def test_a_candidate_that_failed_loses_whatever_it_costs() -> None:
    gold = [["a"], ["b"]]
    trials = [Trial("broken", 1.0, [], 1.0, "the loss is not finite"), Trial("works", 1.0, [[], []], 9.0)]
    assert [trial.candidate for trial in selection.rank(gold, trials)] == ["works", "broken"]
    choice = selection.choose(gold, trials, 2)
    assert choice.winner == "works" and not choice.is_better and "the loss is not finite" in choice.reason


@pytest.mark.parametrize(("candidates", "counts"), [(2, [2]), (3, [3, 2]), (4, [4, 2]), (9, [9, 5, 3, 2])])
def test_the_last_two_train_with_all_of_their_steps(candidates: int, counts: Sequence[int]) -> None:
    rungs = selection.rungs(candidates)
    assert [rung.candidates for rung in rungs] == counts
    assert [rung.share for rung in rungs] == [0.5**n for n in reversed(range(len(counts)))]


def test_more_candidates_widen_the_interval() -> None:
    gold, trials = (
        [["a"]] * 60,
        [Trial("x", 1.0, [["a"]] * 40 + [["b"]] * 20, 1.0), Trial("y", 1.0, [["a"], ["b"]] * 30, 1.0)],
    )
    few, many = (selection.choose(gold, trials, n) for n in (2, 16))
    assert few.interval is not None and many.interval is not None
    assert many.interval[0] < few.interval[0] and few.interval[1] < many.interval[1]
