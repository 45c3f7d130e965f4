"""True positives, predictions and gold tags of each text, as sparse matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
from job.dataset.tags import normalise_tag


@dataclass(frozen=True)
class ConfusionCounts:
    """Which tags each text has (`truth`) and was given (`answer`), as sparse matrices of texts by tags."""

    tags: Sequence[str]
    truth: Any
    answer: Any
    hits: Floats
    """For each text the number of tags that are in both; `gold` and `predicted` those in either."""
    gold: Floats
    predicted: Floats

    @classmethod
    def of(cls, gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> ConfusionCounts:
        import numpy as np
        from scipy.sparse import csr_array

        gold_sets, predicted_sets = (
            [{normalise_tag(tag) for tag in tags} for tags in side] for side in (gold, predicted)
        )
        tags = sorted(set().union(*gold_sets, *predicted_sets))
        column = {tag: i for i, tag in enumerate(tags)}

        def matrix(sets: list[set[str]]) -> Any:
            places = [(row, column[tag]) for row, tags in enumerate(sets) for tag in tags]
            rows, columns = np.array(places, dtype=int).reshape(-1, 2).T
            return csr_array((np.ones(len(places)), (rows, columns)), shape=(len(sets), len(tags)))

        truth, answer = matrix(gold_sets), matrix(predicted_sets)
        sums = [np.asarray(side.sum(axis=1)).ravel() for side in (truth * answer, truth, answer)]
        return cls(tags, truth, answer, *sums)

    def micro(self, weights: Floats) -> tuple[Floats, Floats, Floats]:
        """Precision, recall and F1 for each row of weights of the texts."""
        hits, truth, answers = weights @ self.hits, weights @ self.gold, weights @ self.predicted
        return _ratio(hits, answers), _ratio(hits, truth), _ratio(2 * hits, answers + truth)

    def macro(self, weights: Floats) -> tuple[Floats, ...]:
        """The means over tags of precision, recall and F1, for each row of weights of the texts."""
        import numpy as np

        sums, occurring = np.zeros((3, len(weights))), np.zeros(len(weights))
        for _, (hits, answers, truth) in self.by_tag(weights):
            occurring += (answers + truth > 0).sum(axis=0)
            ratios = (_ratio(hits, answers), _ratio(hits, truth), _ratio(2 * hits, answers + truth))
            sums += [ratio.sum(axis=0) for ratio in ratios]
        return tuple(_ratio(row, occurring) for row in sums)

    def by_tag(self, weights: Floats) -> Any:
        """Blocks of tags, for memory: the first's number, and hits, answers and truth (tags by rows of weights)."""
        for start in range(0, len(self.tags), 500):
            truth, answer = self.truth[:, start : start + 500], self.answer[:, start : start + 500]
            yield start, [(side.T @ weights.T) for side in (truth * answer, answer, truth)]


def _ratio(part: Floats, whole: Floats) -> Floats:
    """Element by element, 0 where there is nothing."""
    import numpy as np

    return np.divide(part, whole, out=np.zeros(np.shape(whole)), where=whole > 0)
