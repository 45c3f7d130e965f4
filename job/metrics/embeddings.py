"""A baseline from sentence embeddings: one logistic regression for each tag on top of a frozen encoder."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from job.dataset.tags import normalise_tag
from job.errors import InvalidInputError
from job.hub.embedders import resolve_embedder
from job.hub.weights import LOAD_ERRORS, shorten
from job.metrics.baselines import Baseline, learnable_tags
from job.metrics.thresholds import best_threshold, threshold_curve
from job.settings import Eval
from job.types import MIN_PROBABILITY, Example

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger(__name__)

C = 5
"""Inverse regularization strength: of 3 to 40 the best on folds of English quotes (docs/evaluation.md)."""
FOLDS = 3
"""Parts of the training examples; each is scored by a classifier of the others, to choose the threshold."""
BATCH_SIZE = 32


def load_embedding_baseline(settings: Eval, device: str) -> dict[str, Baseline]:
    """Return the baseline on the embedding model of TAGGER_EVAL_EMBEDDER, by name; nothing if there is none.

    Only safetensors are read, and no code of the model is run. Raises InvalidInputError if it cannot embed a text.
    """
    folder = resolve_embedder(settings)
    if folder is None:
        return {}
    from sentence_transformers import SentenceTransformer

    try:
        encoder = SentenceTransformer(
            str(folder), device=device, local_files_only=True, model_kwargs={"use_safetensors": True}
        )
        embed(encoder, ["a text", "a longer text, so that one is padded"])
    except LOAD_ERRORS as error:
        raise InvalidInputError(
            f"the embedding model {settings.embedder} (TAGGER_EVAL_EMBEDDER) cannot be loaded: {shorten(str(error))}; "
            "name a model whose files are complete, or leave it empty"
        ) from error
    return {"embedder": partial(embedder, encoder)}


def embed(encoder: Any, texts: Sequence[str]) -> np.ndarray:
    """Return the embeddings of texts, float32 [texts, dimensions], each of length 1."""
    vectors: np.ndarray = encoder.encode(
        list(texts), batch_size=BATCH_SIZE, normalize_embeddings=True, show_progress_bar=False
    )
    if not (vectors**2).sum() > 0:  # also of NaN
        raise ValueError("its embeddings are not numbers")
    return vectors


def embedder(encoder: Any, train: Sequence[Example], examples: Sequence[Example]) -> list[list[str]]:
    """Predict tags by one logistic regression per tag on embeddings of the texts.

    The threshold is the best one on the training examples, each scored by a classifier that was not fitted on it.
    """
    import numpy as np
    from sklearn.model_selection import KFold

    tags = learnable_tags(train)
    if not tags:
        return [[]] * len(examples)
    features = embed(encoder, [example.text for example in train])
    labels = np.array([[tag in known for tag in tags] for known in map(_normalised, train)])
    unseen = np.zeros(labels.shape)
    for rest, part in KFold(min(FOLDS, len(train)), shuffle=True, random_state=0).split(features):
        unseen[part] = _fit_and_predict(features[rest], labels[rest], features[part])
    gold = [tuple(_normalised(example)) for example in train]
    threshold = best_threshold(threshold_curve(gold, [_scored(tags, row) for row in unseen])).threshold
    log.info("evaluate: the embedding baseline has threshold %g, and learned %d tags", threshold, len(tags))
    found = _fit_and_predict(features, labels, embed(encoder, [example.text for example in examples]))
    return [[tags[i] for i in np.flatnonzero(row >= threshold)] for row in found]


def _fit_and_predict(features: np.ndarray, labels: np.ndarray, unseen: np.ndarray) -> np.ndarray:
    """Return the probability of each tag for each unseen row, float64 [rows, tags]."""
    import numpy as np
    from sklearn.linear_model import LogisticRegression

    probabilities = np.zeros((len(unseen), labels.shape[1]))
    for column, present in enumerate(labels.T):
        if present.all() or not present.any():  # within a fold, a tag may be on all texts or on none
            probabilities[:, column] = float(present.all())
            continue
        regression = LogisticRegression(C=C, max_iter=1000).fit(features, present)
        probabilities[:, column] = regression.predict_proba(unseen)[:, 1]
    return probabilities


def _scored(tags: Sequence[str], probabilities: np.ndarray) -> list[tuple[str, float]]:
    return [(tag, float(value)) for tag, value in zip(tags, probabilities, strict=True) if value >= MIN_PROBABILITY]


def _normalised(example: Example) -> set[str]:
    return {normalise_tag(tag) for tag in example.tags}
