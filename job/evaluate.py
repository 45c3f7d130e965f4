"""How good the tags are on held-out examples."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from job.decoding.config import MIN_PROBABILITY
from job.types import Example, Prediction, Scores, TagScores

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from job.sample import Tagger

    Floats = NDArray[np.float64]

log = logging.getLogger(__name__)

ScoredTags = Sequence[tuple[str, float]]
"""Tags with their confidences."""
BOOTSTRAP_SAMPLES = 1000
"""Of the held-out examples, drawn with replacement and a fixed seed, for every interval."""
PERCENTILES = (2.5, 97.5)


def evaluate(tagger: Tagger, examples: Sequence[Example]) -> tuple[Scores, list[Prediction]]:
    """Tag the examples' texts by generation and score the answers against their tags."""
    answers = tagger.tag([example.text for example in examples])
    scores = score([e.tags for e in examples], [a.tags for a in answers], [a.well_formed for a in answers])
    predictions = [Prediction(e.text, e.tags, a.tags, a.raw) for e, a in zip(examples, answers, strict=True)]
    return scores, predictions


def normalise_tag(tag: str) -> str:
    """The form in which tags are compared: lower case, white space and hyphens alike as one hyphen."""
    return "-".join(tag.casefold().replace("-", " ").replace("_", " ").split()) or tag.strip()


def score(
    gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]], parsed: Sequence[bool] | None = None
) -> Scores:
    """Precision, recall and F1, micro over all (text, tag) pairs and macro over tags, and how alike the sets are.

    Macro figures are means over the tags that occur, in gold or predicted. Jaccard is the mean over
    texts of shared tags among all tags; exact match the share of texts whose tags are all right and
    none too many. Without `parsed` every answer counts as a whole list. Intervals are percentiles of
    the figures on RESAMPLES bootstrap samples of the texts (Efron and Tibshirani, 1993, ch. 13).
    """
    import numpy as np

    counted = ConfusionCounts.of(gold, predicted)
    whole = np.ones(len(gold)) if parsed is None else np.array(parsed, float)
    drawn = bootstrap_weights(len(gold))
    # the first row is the examples themselves, the others are the samples drawn of them
    weights = np.vstack([np.ones(len(gold)), drawn])
    union = counted.gold + counted.predicted - counted.hits
    a_text = {
        "jaccard": _ratio(counted.hits, union),
        "exact_match": (union == counted.hits).astype(float),
        "well_formed": whole,
    }
    figures = dict(zip(("precision", "recall", "f1"), counted.micro(weights), strict=True))
    figures |= dict(zip(("macro_precision", "macro_recall", "macro_f1"), counted.macro(weights), strict=True))
    figures |= {name: weights @ values / len(gold) for name, values in a_text.items()}
    intervals = {name: interval(values[1:]) for name, values in figures.items()}
    return Scores(n=len(gold), **{name: float(values[0]) for name, values in figures.items()}, intervals=intervals)


def score_tags(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> list[TagScores]:
    """Precision, recall and F1 of each tag that occurs, the most frequent first."""
    import numpy as np

    counted = ConfusionCounts.of(gold, predicted)
    weights = np.vstack([np.ones(len(gold)), bootstrap_weights(len(gold))])
    found: list[TagScores] = []
    for start, (hits, answers, truth) in counted.by_tag(weights):
        precision, recall, f1 = _ratio(hits, answers), _ratio(hits, truth), _ratio(2 * hits, answers + truth)
        for i, tag in enumerate(counted.tags[start : start + len(hits)]):
            p, r, f = (round(float(figure[i, 0]), 4) for figure in (precision, recall, f1))
            found.append(TagScores(tag, int(truth[i, 0]), int(answers[i, 0]), p, r, f, interval(f1[i, 1:])))
    return sorted(found, key=lambda score: (-score.gold, score.tag))


def f1_difference(
    gold: Sequence[Sequence[str]], new: Sequence[Sequence[str]], old: Sequence[Sequence[str]]
) -> tuple[float, list[float]]:
    """The micro-F1 of `new` less that of `old` on the same texts, and its 95% interval by a paired bootstrap.

    Paired: both are measured on the same samples of the texts, so that what is hard for both does not count.
    """
    import numpy as np

    weights = np.vstack([np.ones(len(gold)), bootstrap_weights(len(gold))])
    f1 = [ConfusionCounts.of(gold, predicted).micro(weights)[2] for predicted in (new, old)]
    difference = f1[0] - f1[1]
    return float(difference[0]), interval(difference[1:])


def calibrate(tagger: Tagger, examples: Sequence[Example]) -> None:
    """Give a tagger the threshold that is best on these examples, which it was not trained on."""
    tagger.decoding = replace(tagger.decoding, threshold=0.0)
    answers = tagger.tag([example.text for example in examples])
    ranked = [list(zip(answer.tags, answer.confidences, strict=True)) for answer in answers]
    threshold, f1 = best_threshold([example.tags for example in examples], ranked)
    tagger.decoding = replace(tagger.decoding, threshold=threshold)
    log.info("evaluate: threshold %g, micro-F1 %.3f on %d training examples set aside", threshold, f1, len(examples))


def best_threshold(gold: Sequence[Sequence[str]], ranked: Sequence[ScoredTags]) -> tuple[float, float]:
    """The confidence that tags had best be left out below for the highest micro-F1, and that F1.

    Of several that are as good, the lowest.
    """
    found = f1_curve(gold, ranked)
    best = max(found, key=lambda threshold: found[threshold])
    return best, found[best]


def f1_curve(gold: Sequence[Sequence[str]], ranked: Sequence[ScoredTags]) -> dict[float, float]:
    """The micro-F1 that is left when tags below a confidence are left out, for each one in steps of MIN_PROBABILITY from 0."""
    answers, positives = match_predictions(gold, ranked)
    f1 = {}
    for threshold in (round(MIN_PROBABILITY * n, 4) for n in range(int(1 / MIN_PROBABILITY))):
        kept = [hit for confidence, _, hit in answers if confidence >= threshold]
        f1[threshold] = 2 * sum(kept) / (len(kept) + sum(positives))
    return f1


def match_predictions(
    gold: Sequence[Sequence[str]], ranked: Sequence[ScoredTags]
) -> tuple[list[tuple[float, int, bool]], list[int]]:
    """Confidence, text and rightness of each answer, and the number of right ones that each text has.

    Answers that are compared as one tag are one, as sure as the surest of them.
    """
    answers: list[tuple[float, int, bool]] = []
    true = [{normalise_tag(tag) for tag in tags} for tags in gold]
    for text, tags in enumerate(ranked):
        surest: dict[str, float] = {}
        for tag, confidence in tags:
            surest[normalise_tag(tag)] = max(confidence, surest.get(normalise_tag(tag), 0.0))
        answers += [(confidence, text, tag in true[text]) for tag, confidence in surest.items()]
    return answers, [len(tags) for tags in true]


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


def bootstrap_weights(n: int) -> Floats:
    """How often each of n examples is in each bootstrap sample: RESAMPLES rows that each sum to n."""
    import numpy as np

    drawn = np.random.default_rng(0).integers(n, size=(BOOTSTRAP_SAMPLES, n))
    flat = (drawn + n * np.arange(BOOTSTRAP_SAMPLES)[:, None]).ravel()
    return np.bincount(flat, minlength=BOOTSTRAP_SAMPLES * n).reshape(BOOTSTRAP_SAMPLES, n).astype(float)


def _ratio(part: Floats, whole: Floats) -> Floats:
    """Element by element, 0 where there is nothing."""
    import numpy as np

    return np.divide(part, whole, out=np.zeros(np.shape(whole)), where=whole > 0)


def interval(values: Floats) -> list[float]:
    import numpy as np

    return [round(float(end), 4) for end in np.percentile(values, PERCENTILES)]
