"""TF-IDF with a logistic regression per tag, stored with an adapter without pickles, as a part of blends."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field

from job.decoding import tensors
from job.decoding.head import learnable_tags
from job.types import Example

TFIDF_NAME = "tfidf.safetensors"
C = 30
"""Inverse regularization strength, as of the baseline."""
MAX_WORDS = 20_000
MAX_WEIGHTS = 2**26
"""Words are limited so that the weights take at most 256 MiB; the most frequent words are kept."""
_TENSORS = ("weight", "bias", "idf")
_WORD = re.compile(r"\w+")


class _About(BaseModel):
    """The metadata of tfidf.safetensors."""

    model_config = ConfigDict(extra="forbid")

    tags: Annotated[tuple[str, ...], Field(min_length=1)]
    words: tuple[str, ...]


@dataclass(frozen=True)
class Tfidf:
    """One logistic regression per tag on the TF-IDF of the words; all tensors are float32 on the CPU."""

    tags: tuple[str, ...]
    words: tuple[str, ...]
    weight: torch.Tensor
    """[tags, words]."""
    bias: torch.Tensor
    """[tags]."""
    idf: torch.Tensor
    """[words], smoothed inverse document frequency."""

    @cached_property
    def _columns(self) -> dict[str, int]:
        return {word: column for column, word in enumerate(self.words)}

    def probabilities(self, texts: Sequence[str]) -> torch.Tensor:
        """Return the probability of each tag, float32 [texts, tags]."""
        return torch.stack([torch.sigmoid(self._logits(text)) for text in texts])

    def _logits(self, text: str) -> torch.Tensor:
        counts = Counter(word for word in _WORD.findall(text.lower()) if word in self._columns)
        columns = [self._columns[word] for word in counts]
        frequencies = torch.tensor([1 + math.log(count) for count in counts.values()])
        values = frequencies * self.idf[columns]
        values = values / values.norm().clamp(min=1e-12)
        logits: torch.Tensor = self.weight[:, columns] @ values + self.bias
        return logits

    def to_bytes(self) -> bytes:
        """Return the content of tfidf.safetensors; the same values always have the same bytes."""
        about = _About(tags=self.tags, words=self.words)
        return tensors.to_bytes({name: getattr(self, name) for name in _TENSORS}, about)

    @classmethod
    def load(cls, file: Path) -> Tfidf:
        """Read tfidf.safetensors; raises OSError, SafetensorError, or ValueError with what is wrong."""
        about, found = tensors.read(file, _About, _TENSORS)
        n, words = len(about.tags), len(about.words)
        tensors.check_shapes(found, {"weight": (n, words), "bias": (n,), "idf": (words,)})
        return cls(about.tags, about.words, **found)


def fit_tfidf(examples: Sequence[Example], known: Sequence[str]) -> Tfidf:
    """Fit on the texts of training examples, with the features of `metrics.baselines.tfidf`."""
    import numpy as np
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    tags = learnable_tags(examples, known)
    rows_of: dict[str, list[int]] = {tag: [] for tag in tags}
    for row, example in enumerate(examples):
        for tag in set(example.tags) & rows_of.keys():
            rows_of[tag].append(row)
    rows, positives = len(examples), torch.tensor([float(len(found)) for found in rows_of.values()]).double()
    bias = torch.log((positives + 0.5) / (rows - positives + 0.5))
    texts = [example.text for example in examples]
    if not any(map(_WORD.search, texts)):
        return Tfidf(tags, (), torch.zeros(len(tags), 0), bias.float(), torch.zeros(0))
    limit = max(1, min(MAX_WORDS, MAX_WEIGHTS // len(tags)))
    vectorizer = TfidfVectorizer(sublinear_tf=True, token_pattern=r"\w+", max_features=limit)
    features = vectorizer.fit_transform(texts)
    weight = torch.zeros(len(tags), features.shape[1])
    for row, having in enumerate(rows_of.values()):
        if len(having) == rows:  # no other class to tell from: the bias says it
            continue
        present = np.zeros(rows)
        present[having] = 1
        regression = LogisticRegression(C=C, class_weight="balanced", solver="liblinear", random_state=0)
        regression.fit(features, present)
        weight[row] = torch.from_numpy(regression.coef_[0])
        bias[row] = float(regression.intercept_[0])
    words = tuple(map(str, vectorizer.get_feature_names_out()))
    return Tfidf(tags, words, weight, bias.float(), torch.from_numpy(vectorizer.idf_).float())
