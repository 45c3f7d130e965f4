"""Baselines without a language model, scored on the same split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from job.dataset.tags import normalise_tag
from job.metrics.scores import score
from job.types import Example, Scores

Baseline = Callable[[Sequence[Example], Sequence[Example]], list[list[str]]]
"""Learns from training examples, and predicts the tags of others."""
MIN_TAG_COUNT = 3
"""Baselines learn tags that at least this many training examples have."""
C = 30
"""Inverse regularization strength of TF-IDF's logistic regression."""
THRESHOLD = 0.1
"""Lowest probability of a tag that TF-IDF predicts; docs/evaluation.md compares it with 0.2."""


def score_baselines(
    train: Sequence[Example], examples: Sequence[Example], more: Mapping[str, Baseline] | None = None
) -> dict[str, Scores]:
    """Return the scores of each baseline on the examples, by name; `more` names others than those of this module."""
    gold = [example.tags for example in examples]
    baselines: dict[str, Baseline] = {"most_common_tags": most_common_tags, "tfidf": tfidf, **(more or {})}
    return {name: score(gold, baseline(train, examples)) for name, baseline in baselines.items()}


def most_common_tags(train: Sequence[Example], examples: Sequence[Example]) -> list[list[str]]:
    """Predict the most common tags for each example: as many as a training example has on average, rounded."""
    counts = _counts(train)
    answer = [tag for tag, _ in counts.most_common(max(1, round(counts.total() / len(train))))]
    return [answer] * len(examples)


def tfidf(train: Sequence[Example], examples: Sequence[Example]) -> list[list[str]]:
    """Predict tags by one logistic regression per tag (one versus rest) on the TF-IDF of the words."""
    import numpy as np
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.preprocessing import MultiLabelBinarizer

    tags = learnable_tags(train)
    vectorizer = TfidfVectorizer(sublinear_tf=True, token_pattern=r"\w+")
    if not tags or not any(vectorizer.build_analyzer()(example.text) for example in train):
        return [[]] * len(examples)  # no tag to learn, or no word to learn from
    features = vectorizer.fit_transform([example.text for example in train])
    known = [{normalise_tag(tag) for tag in example.tags} & set(tags) for example in train]
    labels = MultiLabelBinarizer(classes=tags).fit_transform(known)
    regression = LogisticRegression(C=C, class_weight="balanced", solver="liblinear", random_state=0)
    # for a single tag scikit-learn takes a vector, and returns the probabilities of both classes
    classifier = OneVsRestClassifier(regression).fit(features, labels if len(tags) > 1 else labels.ravel())
    unseen = vectorizer.transform([example.text for example in examples])
    probabilities = classifier.predict_proba(unseen)[:, -len(tags) :]
    return [[tags[i] for i in np.flatnonzero(row >= THRESHOLD)] for row in probabilities]


def learnable_tags(train: Sequence[Example]) -> list[str]:
    """Return the normalised tags that at least MIN_TAG_COUNT training examples have, and that not all have."""
    return [tag for tag, count in sorted(_counts(train).items()) if MIN_TAG_COUNT <= count < len(train)]


def _counts(train: Sequence[Example]) -> Counter[str]:
    """Return how many examples have each normalised tag."""
    return Counter(tag for example in train for tag in {normalise_tag(tag) for tag in example.tags})
