"""Find near-duplicate texts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

NEAR_DUPLICATE_OVERLAP = 0.6
"""Two texts are near-duplicates when they share at least this fraction of the 5-grams of the shorter text."""
BLOCK_ROWS = 500
"""Texts that are compared with all others at once. To compare all pairs at once needs too much memory."""


def normalise_text(text: str) -> str:
    """Return the words of a text in lower case, without punctuation."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def near_duplicate_groups(texts: Sequence[str]) -> list[int]:
    """Return a group number for each text: equal for near-duplicates, and for near-duplicates of those.

    Two texts are near-duplicates when, without case and punctuation, they are equal, or share
    NEAR_DUPLICATE_OVERLAP of the character 5-grams of the shorter text. 5-grams that are common in the
    data set do not count, except for long texts that share nearly all of theirs.
    """
    import numpy as np
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    normalised = [normalise_text(text) for text in texts]
    first_index: dict[str, int] = {}
    pairs = [(first_index.setdefault(text, i), i) for i, text in enumerate(normalised)]
    if any(len(text) >= 5 for text in normalised):
        pairs += _overlapping_pairs(normalised)
    rows, columns = zip(*pairs, strict=True)
    graph = coo_array((np.ones(len(pairs)), (rows, columns)), shape=(len(texts), len(texts)))
    groups: list[int] = connected_components(graph, directed=False)[1].tolist()
    return groups


def _overlapping_pairs(texts: Sequence[str]) -> list[tuple[int, int]]:
    """Return pairs of texts that share enough 5-grams; indirect pairs may be left out."""
    import numpy as np
    from sklearn.feature_extraction.text import CountVectorizer

    # in small data sets a quarter of the texts, so that a shared template does not make all of them near-duplicates
    max_texts = max(3, min(len(texts) // 4, max(50, len(texts) // 20)))
    vectorizer = CountVectorizer(analyzer="char", ngram_range=(5, 5), lowercase=False, binary=True, dtype=np.float32)
    grams = vectorizer.fit_transform(texts).tocsr()
    rare_grams = grams[:, np.asarray(grams.sum(axis=0)).ravel() <= max_texts]
    sizes = np.asarray(rare_grams.sum(axis=1)).ravel()
    pairs = _long_near_copies(grams, sizes)
    for start in range(0, len(texts), BLOCK_ROWS):
        shared = (rare_grams[start : start + BLOCK_ROWS] @ rare_grams.T).tocoo()
        rows, columns = shared.row + start, shared.col
        smaller = np.minimum(sizes[rows], sizes[columns])
        near = (rows < columns) & (smaller >= 8) & (shared.data >= NEAR_DUPLICATE_OVERLAP * smaller)
        pairs += zip(rows[near].tolist(), columns[near].tolist(), strict=True)
    return pairs


def _long_near_copies(grams: Any, rare_sizes: Any) -> list[tuple[int, int]]:
    """Return pairs of long texts that share 90% of their 5-grams, most of which are common in the data set.

    Such texts are the many copies of one text. Each is paired with the first copy only. `grams` is a sparse
    0/1 matrix [texts, 5-grams], and `rare_sizes` counts the 5-grams of each text that are not common.
    """
    import numpy as np

    sizes = np.asarray(grams.sum(axis=1)).ravel()
    pairs = []
    remaining = np.flatnonzero((sizes >= 60) & (rare_sizes < 0.5 * sizes))
    while remaining.size:
        first = remaining[0]
        shared = np.asarray((grams[remaining] @ grams[[first]].T).todense()).ravel()
        near = shared >= 0.9 * np.minimum(sizes[remaining], sizes[first])
        pairs += [(int(first), int(other)) for other in remaining[near]]
        remaining = remaining[~near]
    return pairs
