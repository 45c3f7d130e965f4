"""Find near-duplicate texts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass


NEAR_DUPLICATE_OVERLAP = 0.6
"""Two texts are near-duplicates when they share this part of the shorter one's 5-grams."""


def _normalise(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def near_duplicate_groups(texts: Sequence[str]) -> list[int]:
    """A group number for each text: equal for near-duplicates, and for near-duplicates of those.

    Two texts are near-duplicates when, without case and punctuation, they are equal or share
    SHARED_GRAMS of the shorter one's character 5-grams; 5-grams that are all over the data do
    not count.
    """
    import numpy as np
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components
    from sklearn.feature_extraction.text import CountVectorizer

    normalised = [_normalise(text) for text in texts]
    first: dict[str, int] = {}
    pairs = [(first.setdefault(text, i), i) for i, text in enumerate(normalised)]
    if any(len(text) >= 5 for text in normalised):
        # of small data a quarter, so that a template which all texts are made from does not make them alike
        common = max(3, min(len(texts) // 4, max(50, len(texts) // 20)))
        grams = CountVectorizer(analyzer="char", ngram_range=(5, 5), lowercase=False, binary=True, dtype=np.float32)
        everything = grams.fit_transform(normalised).tocsr()
        present = everything[:, np.asarray(everything.sum(axis=0)).ravel() <= common]
        sizes = np.asarray(present.sum(axis=1)).ravel()
        pairs += _long_duplicates(everything, sizes)
        for start in range(0, len(texts), 500):  # a block at a time: all pairs at once need too much memory
            shared = (present[start : start + 500] @ present.T).tocoo()
            rows, columns = shared.row + start, shared.col
            smaller = np.minimum(sizes[rows], sizes[columns])
            near = (rows < columns) & (smaller >= 8) & (shared.data >= NEAR_DUPLICATE_OVERLAP * smaller)
            pairs += zip(rows[near].tolist(), columns[near].tolist(), strict=True)
    left, right = zip(*pairs, strict=True)
    graph = coo_array((np.ones(len(pairs)), (left, right)), shape=(len(texts), len(texts)))
    groups: list[int] = connected_components(graph, directed=False)[1].tolist()
    return groups


def _long_duplicates(everything: Any, kept: Any) -> list[tuple[int, int]]:
    """Pairs of long texts that are alike to 9 parts in 10, made mostly of 5-grams that are all over the data.

    Those are the many copies of one text; the first of them stands for all in the pairs.
    """
    import numpy as np

    sizes = np.asarray(everything.sum(axis=1)).ravel()
    common = np.flatnonzero((sizes >= 60) & (kept < 0.5 * sizes))
    pairs = []
    left = common
    while left.size:
        shared = np.asarray((everything[left] @ everything[left[:1]].T).todense()).ravel()
        near = shared >= 0.9 * np.minimum(sizes[left], sizes[left[0]])
        pairs += [(int(left[0]), int(other)) for other in left[near]]
        left = left[~near]
    return pairs
