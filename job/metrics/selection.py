"""Choose between candidates by their answers to the same texts: successive halving, then a paired bootstrap."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from job.metrics.bootstrap import CONFIDENCE, f1_difference
from job.metrics.counts import ConfusionCounts

SAME_COST = 0.9
"""A candidate is cheaper than another one if it takes less than this share of its time; times of the same work vary."""
Tags = Sequence[Sequence[str]]
"""The tags of each text."""


@dataclass(frozen=True)
class Trial:
    """A candidate's answers to all texts after a share of its steps, or why it has none."""

    candidate: str
    share: float
    predicted: Tags
    seconds: float
    """What it took to train and to answer."""
    failure: str | None = None


@dataclass(frozen=True)
class Rung:
    """A round of successive halving: how many candidates there are, and what share of their steps they train."""

    candidates: int
    share: float


@dataclass(frozen=True)
class Choice:
    """The candidate that was chosen, and how it compares with the one that was chosen last before it."""

    winner: str
    other: str
    difference: float | None
    """Micro-F1 of the winner minus that of the other; None if the other one failed."""
    interval: list[float] | None
    confidence: float
    is_better: bool
    """Whether the interval of the difference is above zero."""
    reason: str


def rungs(candidates: int) -> list[Rung]:
    """Return the rounds for a number of candidates: half of them are left after each, and the last two train fully.

    Successive halving (Jamieson and Talwalkar, 2016), with twice the steps in each round.
    """
    counts = [candidates]
    while counts[-1] > 2:
        counts.append(max(2, math.ceil(counts[-1] / 2)))
    return [Rung(count, 0.5 ** (len(counts) - 1 - number)) for number, count in enumerate(counts)]


def search(candidates: Sequence[str], gold: Tags, attempt: Callable[[str, float], Trial]) -> Iterator[list[Trial]]:
    """Yield the trials of each round; `attempt` makes one from a candidate and the share of its steps."""
    left = list(candidates)
    for rung in rungs(len(candidates)):
        trials = [attempt(candidate, rung.share) for candidate in left]
        yield trials
        # the order of the candidates decides between those of equal cost
        kept = {trial.candidate for trial in rank(gold, trials)[: max(2, math.ceil(rung.candidates / 2))]}
        left = [candidate for candidate in left if candidate in kept]


def rank(gold: Tags, trials: Sequence[Trial]) -> list[Trial]:
    """Return trials by micro-F1, the best first; of equals the cheapest one first, and at last those that failed."""

    def key(trial: Trial) -> tuple[bool, float, float]:
        failed = trial.failure is not None
        return failed, 0.0 if failed else -micro_f1(gold, trial.predicted), trial.seconds

    return sorted(trials, key=key)


def micro_f1(gold: Tags, predicted: Tags) -> float:
    """Return micro-F1 over all texts."""
    import numpy as np

    return float(ConfusionCounts.from_tags(gold, predicted).micro(np.ones((1, len(gold))))[2][0])


def choose(gold: Tags, finalists: Sequence[Trial], candidates: int) -> Choice:
    """Choose one of the two finalists: the better one if the interval says so, else the cheaper one.

    The interval has a confidence of 1 - 0.05 / `candidates` (Bonferroni), because the best of many candidates
    looks better than it is. Of equally expensive ones, the first one is chosen.
    """
    confidence = 1 - (1 - CONFIDENCE) / candidates
    best, second = rank(gold, finalists)
    if second.failure is not None:
        reason = f"the other one failed: {second.failure}"
        return Choice(best.candidate, second.candidate, None, None, confidence, False, reason)
    difference, ends = f1_difference(gold, best.predicted, second.predicted, confidence)
    if ends[0] > 0:
        return Choice(best.candidate, second.candidate, difference, ends, confidence, True, "it is better")
    first, last = finalists
    winner, other = (last, first) if last.seconds < SAME_COST * first.seconds else (first, last)
    cheaper = winner.seconds < SAME_COST * other.seconds
    reason = f"no difference was shown: {'the cheaper' if cheaper else 'of the same cost, the first that was named'}"
    if winner is not best:
        difference, ends = -difference, [-end for end in reversed(ends)]
    return Choice(winner.candidate, other.candidate, difference, ends, confidence, False, reason)
