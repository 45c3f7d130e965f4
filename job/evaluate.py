"""How good the tags are on held-out examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from job.results import Example, GateFailed, Prediction, Scores
from job.sample import Tagger
from job.settings import Eval


def evaluate(tagger: Tagger, examples: Sequence[Example]) -> tuple[Scores, list[Prediction]]:
    """Tag the examples' texts by generation and score the answers against their tags."""
    answers = tagger.tag([example.text for example in examples])
    parse_rate = sum(answer.parsed for answer in answers) / len(answers)
    scores = score([e.tags for e in examples], [answer.tags for answer in answers], parse_rate=parse_rate)
    predictions = [Prediction(e.text, e.tags, a.tags, a.raw) for e, a in zip(examples, answers, strict=True)]
    return scores, predictions


def most_common_tags(train: Sequence[Example], examples: Sequence[Example]) -> Scores:
    """The scores of always answering the most common tags: what any tagger has to beat.

    As many tags as a training example has on average, rounded.
    """
    counts = Counter(tag for example in train for tag in {normalise_tag(tag) for tag in example.tags})
    answer = [tag for tag, _ in counts.most_common(max(1, round(counts.total() / len(train))))]
    return score([example.tags for example in examples], [answer] * len(examples), parse_rate=1.0)


def normalise_tag(tag: str) -> str:
    """The form in which tags are compared: lower case, white space and hyphens alike as one hyphen."""
    return "-".join(tag.casefold().replace("-", " ").replace("_", " ").split()) or tag.strip()


def score(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]], *, parse_rate: float) -> Scores:
    """Micro-averaged precision, recall and F1 over all (text, tag) pairs, and the mean Jaccard index of tag sets."""
    from sklearn.metrics import jaccard_score, precision_recall_fscore_support
    from sklearn.preprocessing import MultiLabelBinarizer

    gold_sets = [{normalise_tag(tag) for tag in tags} for tags in gold]
    predicted_sets = [{normalise_tag(tag) for tag in tags} for tags in predicted]
    # two classes that never occur: with fewer than two scikit-learn would not see several labels a text
    binarizer = MultiLabelBinarizer(sparse_output=True).fit([*gold_sets, *predicted_sets, {"", " "}])
    truth, answer = binarizer.transform(gold_sets), binarizer.transform(predicted_sets)
    precision, recall, f1, _ = precision_recall_fscore_support(truth, answer, average="micro", zero_division=0.0)
    jaccard = jaccard_score(truth, answer, average="samples", zero_division=0.0)
    return Scores(len(gold), float(precision), float(recall), float(f1), float(jaccard), parse_rate)


def gate(settings: Eval, scores: Scores) -> None:
    """Raise GateFailed when the adapter is not good enough to be published."""
    if settings.gate == "floor" and scores.f1 < settings.min_f1:
        raise GateFailed(
            f"the adapter's micro-F1 is {scores.f1:.3f}, below TAGGER_EVAL_MIN_F1={settings.min_f1:g}: "
            "it is not published"
        )
