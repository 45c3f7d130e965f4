"""True positives, predicted and gold tags of each text, as sparse matrices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from job.dataset.tags import normalise_tag

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ConfusionCounts:
    """The normalised tags that each text has and was given, and their counts.

    Weights are float64 [rows, texts]; each row weights the texts, so that a row can be a bootstrap sample.
    """

    tags: Sequence[str]
    """All tags, sorted: the columns of both matrices."""
    truth: Any
    """Sparse [texts, tags]: 1 where the text has the tag."""
    answer: Any
    """Sparse [texts, tags]: 1 where the tag was predicted for the text."""
    hits: Floats
    """Correct tags of each text, [texts]."""
    gold: Floats
    """Gold tags of each text, [texts]."""
    predicted: Floats
    """Predicted tags of each text, [texts]."""

    @classmethod
    def from_tags(cls, gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> ConfusionCounts:
        """Count gold and predicted tags of each text, compared as normalise_tag has them."""
        import numpy as np

        gold_sets, predicted_sets = (
            [{normalise_tag(tag) for tag in tags} for tags in side] for side in (gold, predicted)
        )
        tags = sorted(set().union(*gold_sets, *predicted_sets))
        column = {tag: i for i, tag in enumerate(tags)}
        truth, answer = _indicators(gold_sets, column), _indicators(predicted_sets, column)
        sums = [np.asarray(side.sum(axis=1)).ravel() for side in (truth * answer, truth, answer)]
        return cls(tags, truth, answer, *sums)

    def micro(self, weights: Floats) -> tuple[Floats, Floats, Floats]:
        """Return precision, recall and F1 over all (text, tag) pairs, each [rows]."""
        hits, truth, answers = weights @ self.hits, weights @ self.gold, weights @ self.predicted
        return ratio(hits, answers), ratio(hits, truth), ratio(2 * hits, answers + truth)

    def macro(self, weights: Floats) -> tuple[Floats, ...]:
        """Return the means of precision, recall and F1 over the tags that occur, each [rows]."""
        import numpy as np

        sums, occurring = np.zeros((3, len(weights))), np.zeros(len(weights))
        for _, (hits, answers, truth) in self.by_tag(weights):
            occurring += (answers + truth > 0).sum(axis=0)
            ratios = (ratio(hits, answers), ratio(hits, truth), ratio(2 * hits, answers + truth))
            sums += [values.sum(axis=0) for values in ratios]
        return tuple(ratio(row, occurring) for row in sums)

    def by_tag(self, weights: Floats) -> Iterator[tuple[int, list[Floats]]]:
        """Yield the counts of 500 tags at a time, to bound memory.

        Each item is the index of the first tag, and hits, predicted and gold counts, each [tags, rows].
        """
        for start in range(0, len(self.tags), 500):
            truth, answer = self.truth[:, start : start + 500], self.answer[:, start : start + 500]
            yield start, [(side.T @ weights.T) for side in (truth * answer, answer, truth)]


def _indicators(tag_sets: list[set[str]], column: dict[str, int]) -> Any:
    """Return a sparse matrix [texts, tags] of ones where a text has a tag."""
    import numpy as np
    from scipy.sparse import csr_array

    entries = [(row, column[tag]) for row, tags in enumerate(tag_sets) for tag in tags]
    rows, columns = np.array(entries, dtype=int).reshape(-1, 2).T
    return csr_array((np.ones(len(entries)), (rows, columns)), shape=(len(tag_sets), len(column)))


def ratio(numerator: Floats, denominator: Floats) -> Floats:
    """Divide element by element; 0 where the denominator is 0."""
    import numpy as np

    return np.divide(numerator, denominator, out=np.zeros(np.shape(denominator)), where=denominator > 0)
