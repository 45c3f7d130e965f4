"""Near-duplicates of held-out texts are found, and nothing else is taken for one."""

import random
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest

from job.dataset.near_duplicates import near_duplicates


def left_out(texts: list[str], *held_out: int) -> list[int]:
    mask = np.zeros(len(texts), bool)
    mask[list(held_out)] = True
    return np.flatnonzero(near_duplicates(texts, mask)).tolist()


CHANGES: list[Callable[[str], str]] = [
    lambda text: text.upper() + "!",
    lambda text: text.replace(",", " ,").replace(".", " ..."),
    lambda text: f"{text} And so it goes.",
    lambda text: " ".join(["Well,", *text.split()[1:]]),
    lambda text: text.replace(" the ", " a "),
]


def test_small_changes_make_near_duplicates(rows: list[dict[str, str]]) -> None:
    texts = [row["quote"] for row in rows if len(row["quote"].split()) > 8][:100]
    for number, change in enumerate(CHANGES):
        changed = [change(text) for text in texts]
        assert left_out([*texts, *changed], *range(100)) == list(range(100, 200)), number


def test_different_texts_are_not_duplicates(rows: list[dict[str, str]]) -> None:
    assert left_out([row["quote"] for row in rows], *range(0, 600, 2)) == []


def test_a_long_text_takes_no_short_ones_out(rows: list[dict[str, str]]) -> None:
    texts = [row["quote"] for row in rows[:400]]
    everything = " ".join(texts[:300])
    assert left_out([*texts, everything], 400) == []
    assert left_out([*texts, everything], *range(100)) == []


def test_there_are_no_chains_of_texts() -> None:
    words = [f"word{i}" for i in range(40)]
    chain = [" ".join(words[i : i + 12]) for i in range(0, 28, 3)]
    others = [f"other{i} thing{i} text{i} of its own{i}" for i in range(50)]
    assert left_out([*chain, *others], 0) == [1]


def test_a_template_makes_no_duplicates() -> None:
    texts = [f"user {i} logged in from host {i * 7} at {i} o'clock and left again" for i in range(300)]
    assert left_out(texts, *range(0, 300, 10)) == []


@pytest.mark.parametrize("copies", [3, 12, 60, 200])
def test_copies_of_a_long_text_are_duplicates(rows: list[dict[str, str]], copies: int) -> None:
    beginning = "the harbour master counted every lantern twice before he allowed himself to believe the boats were"
    variants = [f"{beginning} {i}" for i in range(copies)]
    texts = [*variants, *(row["quote"] for row in rows[: 2 * copies])]
    assert left_out(texts, 0) == list(range(1, copies))
    assert left_out(texts, *range(copies // 2)) == list(range(copies // 2, copies))


def test_texts_without_spaces_between_words_are_compared() -> None:
    texts = [
        "今天天气很好我们去公园散步",
        "今天天气很好我们去公园散步吧",
        "明天可能会下雨所以带伞",
        "ฉันรักการอ่านหนังสือมาก",
        "ฉันรักการอ่านหนังสือมากๆ",
    ]
    assert left_out(texts, 0, 3) == [1, 4]


def test_texts_without_words_are_left_alone() -> None:
    assert left_out(["!!!", "???", "a text"], 0) == []
    assert left_out(["one text", "another"], 0) == []


def similarity(left: str, right: str, texts: list[str]) -> float:
    """The definition, computed directly."""

    def features(text: str) -> set[object]:
        words = text.split()
        return {*words, *pairwise(words)}

    sets = [features(text) for text in texts]
    weight = {f: np.log((len(texts) + 1) / sum(f in other for other in sets)) for f in features(left) | features(right)}
    both, either = features(left) & features(right), features(left) | features(right)
    return sum(map(weight.__getitem__, both)) / sum(map(weight.__getitem__, either))


def test_the_index_finds_all_that_the_definition_says() -> None:
    rng = random.Random(1)
    words = [f"w{i}" for i in range(60)]
    texts = [" ".join(rng.choices(words, k=rng.randint(3, 9))) for _ in range(120)]
    texts += [" ".join(text.split()[1:]) for text in texts[:40] if len(text.split()) > 4]
    held = set(range(0, len(texts), 3))
    expected = [
        i
        for i, text in enumerate(texts)
        if i not in held and max(similarity(text, texts[h], texts) for h in held) >= 0.5
    ]
    assert expected
    assert left_out(texts, *held) == expected
