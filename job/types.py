"""What passes between chapters: frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

MIN_PROBABILITY = 0.01
"""Tags less probable than this are never reported; thresholds are searched in steps of this size."""


@dataclass(frozen=True)
class Example:
    """One text and its tags, in the order the data gives them."""

    text: str
    tags: tuple[str, ...]


@dataclass(frozen=True)
class SplitData:
    """The data, split: no text of `held_out`, nor a near-duplicate of one, is in `train`."""

    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    skipped: int
    """Rows left out because they had no text or no tags."""
    fingerprint: str
    """SHA-256 over texts and tags of both parts, in order."""
    calibration: tuple[Example, ...] = ()
    """Set aside from `train`, to choose the threshold with."""
    near_duplicates: int = 0
    """Examples in neither part, because they are near-duplicates of a held-out one."""


@dataclass(frozen=True)
class EncodedExample:
    """One training example as token ids; a label of -100 carries no loss."""

    input_ids: list[int]
    labels: list[int]
    permutations: tuple[EncodedExample, ...] = ()
    """The same with its tags in other orders: what the epochs after the first see, one after the other."""

    def for_epoch(self, epoch: int) -> EncodedExample:
        return (self, *self.permutations)[epoch % (1 + len(self.permutations))]


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of an adapted model, quantized weights counted at their unpacked size."""

    trainable: int
    total: int

    def __str__(self) -> str:
        return (
            f"trainable params: {self.trainable:,} || all params: {self.total:,}"
            f" || trainable%: {100 * self.trainable / self.total:.4f}"
        )


@dataclass(frozen=True)
class TrainResult:
    """What the train chapter did; losses are the mean over label tokens since the log before."""

    steps: int
    first_loss: float
    last_loss: float
    seconds: float


@dataclass(frozen=True)
class TaggedText:
    """The answer for one text."""

    text: str
    prompt: str
    raw: str
    """The list as it was written, with what the threshold leaves out, and with a tag that was not whole by its end.

    Of `likely` the likeliest list, as far as it was followed.
    """
    tags: tuple[str, ...]
    well_formed: bool
    """Whether the list came to its end."""
    confidences: tuple[float, ...] = field(compare=False)
    """For each tag the probability that it is written, as the model gives it; of `likely` see marginals.likely_tags."""

    def __str__(self) -> str:
        """Return the line that is shown: the prompt, the tags, and the raw answer if it is not a complete list."""
        malformed = "" if self.well_formed else f"   (not a complete list: {self.raw!r})"
        return f"{self.prompt} {list(self.tags)}{malformed}"


@dataclass(frozen=True)
class Scores:
    """Quality on `n` held-out examples, each figure between 0 and 1 (see evaluate.score)."""

    n: int
    precision: float
    recall: float
    f1: float
    macro_precision: float
    macro_recall: float
    macro_f1: float
    jaccard: float
    exact_match: float
    well_formed: float
    intervals: dict[str, list[float]]
    """For each figure its 95% bootstrap interval: lower and upper end."""

    def __str__(self) -> str:
        low, high = self.intervals["f1"]
        return (
            f"micro-F1 {self.f1:.3f} ({low:.3f} to {high:.3f}; precision {self.precision:.3f}, recall "
            f"{self.recall:.3f}), macro-F1 {self.macro_f1:.3f}, Jaccard {self.jaccard:.3f}, parsed "
            f"{self.well_formed:.0%} of {self.n}"
        )


@dataclass(frozen=True)
class TagScores:
    """A line of tags.jsonl: how well one tag is found."""

    tag: str
    gold: int
    """Examples that have it."""
    predicted: int
    """Examples that were given it."""
    precision: float
    recall: float
    f1: float
    f1_interval: list[float]


@dataclass(frozen=True)
class Prediction:
    """A line of predictions.jsonl: a held-out text, its tags, those the model gave, and what it wrote."""

    text: str
    gold: tuple[str, ...]
    predicted: tuple[str, ...]
    raw: str


@dataclass(frozen=True)
class Verdict:
    """What the gate says of an adapter, with the numbers that it says it by."""

    gate: str
    verdict: Literal["pass", "fail", "insufficient evidence"]
    reason: str
    f1: float
    min_f1: float
    tolerance: float
    parent: str | None = None
    """The commit at the head of the repo's branch then: what was compared with, and what a promotion stands on."""
    published_f1: float | None = None
    difference: float | None = None
    """The adapter's micro-F1 less that of the published one, with its 95% interval by a paired bootstrap."""
    interval: list[float] | None = None

    @property
    def passed(self) -> bool:
        return self.verdict == "pass"


@dataclass(frozen=True)
class TokenInfo:
    """Who a token is on the Hub, and what it may do."""

    user: str
    organizations: tuple[str, ...]
    role: str
    """`read`, `write` or `fineGrained`."""
    writable: frozenset[str]
    """Namespaces and repos that a fine-grained token may write to."""


@dataclass(frozen=True)
class HubRevision:
    """What a name on the Hub stands for now."""

    commit: str
    licence: str | None


@dataclass(frozen=True)
class Published:
    """Where an adapter was published."""

    repo: str
    revision: str
    url: str
    tag: str | None = None


@dataclass(frozen=True)
class Summary:
    """How a run ended."""

    folder: Path
    adapter: str
    """Where the adapter is: the URL of its commit, or its folder."""
    pushed: bool

    def __str__(self) -> str:
        return f"the adapter is at {self.adapter}" if self.pushed else f"not pushed; the adapter is in {self.adapter}"
