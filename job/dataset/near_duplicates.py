"""Find the texts that are near-duplicates of held-out texts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from job.system.progress import Progress

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Pairs = tuple[NDArray[np.int64], NDArray[np.int64]]

SIMILARITY = 0.5
"""Two texts are near-duplicates from this weighted Jaccard index on."""
MAX_COMPARED = 64
"""Held-out texts that a text is compared with, those first that share its rarest features; more are copies of each
other, or follow one template."""
BLOCK = 200_000
"""Pairs of texts compared at once, which bounds memory."""

# scripts without spaces between words (Thai, Lao, Myanmar, Khmer, kana, ideographs): each character counts as a word
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


def near_duplicates(texts: Sequence[str], held_out: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return for each text, bool [texts], whether it is not held out but a near-duplicate of a held-out text.

    The similarity of two texts is the weighted Jaccard index of their sets of words and pairs of neighbouring words;
    a feature that occurs in d of n texts weighs log((n + 1) / d). So a template that all texts follow makes no
    duplicates, a long text is no duplicate of the short ones that it contains, and there are no chains of texts.

    The pairs to compare are found by prefix filtering (Chaudhuri et al., 2006; Bayardo et al., 2007): two similar
    texts share one of the rarest features that carry more than 1 - SIMILARITY of the weight of either. Apart from
    MAX_COMPARED this misses nothing, and it is nearly linear in the number of texts.
    """
    import numpy as np

    index = _Index(texts)
    found = np.zeros(len(texts), bool)
    features = index.prefix_features(held_out)
    with Progress("near-duplicates", len(features), "features") as progress:
        for done, (held, other) in index.candidates(features, held_out, found):
            found[other[index.similarity(held, other) >= SIMILARITY]] = True
            progress.add(done)
    return found


class _Index:
    """The features of all texts as sparse rows, the rarest feature of each text first."""

    def __init__(self, texts: Sequence[str]) -> None:
        import numpy as np
        from scipy.sparse import csr_array

        keys, size = _features(texts)
        counts = np.bincount(keys % size, minlength=1) if size else np.zeros(1, np.int64)
        by_rarity = np.argsort(counts, kind="stable")  # features are numbered by rarity from here on
        rank = np.empty(len(counts), np.int32)
        rank[by_rarity] = np.arange(len(counts), dtype=np.int32)
        self._counts = counts[by_rarity].astype(np.int32)
        del counts, by_rarity
        owners = (keys // max(size, 1)).astype(np.int32)
        features = rank[keys % max(size, 1)]
        del keys, rank
        weights = np.log((len(texts) + 1) / np.maximum(self._counts, 1)).astype(np.float32)
        self._totals = np.bincount(owners, weights[features], minlength=len(texts))
        # a feature of one text alone is shared with none: it only takes its part of that text's weight
        alone = self._counts[features] == 1
        skipped = np.bincount(owners[alone], weights[features[alone]], minlength=len(texts))
        owners, features = owners[~alone], features[~alone]
        order = np.argsort(owners.astype(np.int64) * len(self._counts) + features, kind="stable")
        self._owners, features = owners, features[order]
        del owners, order, alone
        starts = np.searchsorted(self._owners, np.arange(len(texts) + 1))
        cumulated = np.concatenate([[0.0], np.cumsum(weights[features], dtype=np.float64)])
        self._before = cumulated[:-1] - (cumulated[starts[:-1]] - skipped)[self._owners]
        del cumulated
        # the product of two rows' values at a feature is its weight
        rows = (np.sqrt(weights)[features], features, starts)
        self._rows: Any = csr_array(rows, shape=(len(texts), len(self._counts)))

    def prefix_features(self, held_out: NDArray[np.bool_]) -> list[NDArray[np.int32]]:
        """Return for each feature in the prefixes of held-out and of other texts the texts that have it there."""
        import numpy as np

        features = self._rows.indices
        in_prefix = self._before <= (1 - SIMILARITY) * self._totals[self._owners]
        owners, features = self._owners[in_prefix], features[in_prefix]
        order = np.argsort(features, kind="stable")
        owners, features = owners[order], features[order]
        starts = np.flatnonzero(np.diff(features, prepend=-1))
        sizes = np.diff(np.append(starts, len(features)))
        held = np.add.reduceat(held_out[owners], starts, dtype=np.int64) if len(starts) else sizes
        return [owners[starts[i] : starts[i] + sizes[i]] for i in np.flatnonzero((held > 0) & (held < sizes))]

    def candidates(
        self, features: list[NDArray[np.int32]], held_out: NDArray[np.bool_], found: NDArray[np.bool_]
    ) -> Iterator[tuple[int, Pairs]]:
        """Yield pairs of a held-out text and another that share a feature, and the number of features they cover.

        Texts that the caller marks in `found` in the meantime need no more pairs.
        """
        import numpy as np

        compared = np.zeros(len(held_out), np.int32)
        left: list[NDArray[np.int64]] = []
        right: list[NDArray[np.int64]] = []
        pairs = covered = 0
        for number, owners in enumerate(features, 1):
            held = owners[held_out[owners]][:MAX_COMPARED].astype(np.int64)
            other = owners[~held_out[owners] & ~found[owners] & (compared[owners] < MAX_COMPARED)].astype(np.int64)
            compared[other] += len(held)
            left.append(np.repeat(held, len(other)))
            right.append(np.tile(other, len(held)))
            pairs += len(held) * len(other)
            if pairs >= BLOCK or number == len(features):
                unique = np.unique(np.concatenate(left) * len(held_out) + np.concatenate(right))
                held, other = unique // len(held_out), unique % len(held_out)
                possible = self._totals[held] >= SIMILARITY * self._totals[other]  # else the union is too large
                possible &= self._totals[other] >= SIMILARITY * self._totals[held]
                yield number - covered, (held[possible], other[possible])
                left, right, pairs, covered = [], [], 0, number

    def similarity(self, left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the weighted Jaccard index of each pair of texts, float64 [pairs]."""
        import numpy as np

        found = np.empty(len(left))
        for start in range(0, len(left), BLOCK):
            block = slice(start, start + BLOCK)
            shared = np.asarray(self._rows[left[block]].multiply(self._rows[right[block]]).sum(axis=1)).ravel()
            found[block] = shared / (self._totals[left[block]] + self._totals[right[block]] - shared)
        return found


def _features(texts: Sequence[str]) -> tuple[NDArray[np.int64], int]:
    """Return the distinct features of all texts as ascending `text * size + feature`, int64, and `size`."""
    import numpy as np

    numbers: dict[str, int] = {}
    lengths = np.empty(len(texts), np.int64)
    flat: list[int] = []
    with Progress("near-duplicates", len(texts), "texts") as progress:
        for i, text in enumerate(texts):
            found = _WORD.findall(text.casefold())
            lengths[i] = len(found)
            flat += [numbers.setdefault(word, len(numbers)) for word in found]
            progress.add()
    words = np.array(flat, np.int32)
    del flat
    owners = np.repeat(np.arange(len(texts), dtype=np.int32), lengths)
    neighbours = owners[:-1] == owners[1:]
    pairs = (words[:-1].astype(np.int64) * len(numbers) + words[1:])[neighbours]
    distinct, pairs = np.unique(pairs, return_inverse=True)
    size = len(numbers) + len(distinct)
    keys = np.concatenate([owners, owners[:-1][neighbours]]).astype(np.int64) * size
    keys += np.concatenate([words, len(numbers) + pairs.ravel().astype(np.int32)])
    del distinct, pairs, words, owners, neighbours
    keys.sort()
    return keys[np.diff(keys, prepend=-1) > 0], size
