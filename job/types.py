"""Define the frozen dataclasses that chapters pass to each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from job.system.printable import printable_line

Decoding = Literal["greedy", "marginal", "head", "head+tfidf", "marginal+head", "marginal+head+tfidf"]
"""How answers are decoded; `+` joins the parts of a blend."""
MIN_PROBABILITY = 0.01
"""Tags with a lower probability are never reported. Thresholds are multiples of this value."""


@dataclass(frozen=True)
class Example:
    """One text and its tags, in the order of the data set."""

    text: str
    tags: tuple[str, ...]


@dataclass(frozen=True)
class SkippedRows:
    """Rows that were left out for one reason."""

    reason: str
    rows: int
    first: str
    """Where the first one is."""


@dataclass(frozen=True)
class DataReport:
    """What became of the rows of a data set."""

    rows: int = 0
    """Rows read."""
    skipped: tuple[SkippedRows, ...] = ()
    merged: int = 0
    """Rows whose text an earlier row has: their tags were added to its."""
    near_duplicates: int = 0
    """Examples in no part, because they are near-duplicates of a held-out one."""
    respelled: tuple[tuple[str, str], ...] = ()
    """Spellings that are compared as one with a more frequent one, and the one that they are written by."""

    @property
    def skipped_rows(self) -> int:
        return sum(entry.rows for entry in self.skipped)


@dataclass(frozen=True)
class SplitData:
    """A split data set: `train` has no text of `held_out` and no near-duplicate of one."""

    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    fingerprint: str
    """SHA-256 of the texts and tags of `train` and `held_out`, in order."""
    calibration: tuple[Example, ...] = ()
    """Examples that the threshold is chosen on; none of them is in `train`."""
    report: DataReport = DataReport()


@dataclass(frozen=True)
class EncodedExample:
    """One training example as token ids; positions with label -100 have no loss."""

    input_ids: list[int]
    labels: list[int]
    permutations: tuple[EncodedExample, ...] = ()
    """The same example with its tags in other orders, one for each epoch after the first."""

    def for_epoch(self, epoch: int) -> EncodedExample:
        """Return the order of tags for an epoch, counted from 0; after the last order, the first follows again."""
        return (self, *self.permutations)[epoch % (1 + len(self.permutations))]


@dataclass(frozen=True)
class ParameterCount:
    """Number of parameters of an adapted model; each value of a packed quantized weight counts."""

    trainable: int
    total: int

    def __str__(self) -> str:
        return (
            f"trainable params: {self.trainable:,} || all params: {self.total:,}"
            f" || trainable%: {100 * self.trainable / self.total:.4f}"
        )


@dataclass(frozen=True)
class TrainResult:
    """Outcome of the training; losses are means over the label tokens since the previous log line."""

    steps: int
    first_loss: float
    last_loss: float
    seconds: float
    tokens: int
    """Tokens of the examples of all steps, without padding."""


@dataclass(frozen=True)
class TaggedText:
    """The tags of one text, and the answer that they were read from."""

    text: str
    prompt: str
    raw: str
    """The generated list, with tags below the threshold and an incomplete last tag included.

    With marginal decoding, the list built from the most probable tag at each position, as far as it was extended; empty
    where the tag head answers, because it generates nothing.
    """
    tags: tuple[str, ...]
    well_formed: bool
    """Whether the answer is a complete list."""
    confidences: tuple[float, ...] = field(compare=False)
    """Probability of each tag: at its position in the list, or else of the text having it."""

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TaggedText:
        """Return the answer from its fields as JSON types."""
        lists = {"tags": tuple(values["tags"]), "confidences": tuple(values["confidences"])}
        return cls(**values | lists)

    def __str__(self) -> str:
        """Return one printable line: the prompt, the tags, and the raw answer if it is not a complete list."""
        malformed = "" if self.well_formed else f"   (not a complete list: {self.raw!r})"
        return printable_line(f"{self.prompt} {list(self.tags)}{malformed}")


@dataclass(frozen=True)
class Scores:
    """Quality on `n` held-out examples; each figure is between 0 and 1. `metrics.scores` computes them."""

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
    """95% bootstrap interval of each figure: lower and upper end."""

    def __str__(self) -> str:
        low, high = self.intervals["f1"]
        return (
            f"micro-F1 {self.f1:.3f} ({low:.3f} to {high:.3f}; precision {self.precision:.3f}, recall "
            f"{self.recall:.3f}), macro-F1 {self.macro_f1:.3f}, Jaccard {self.jaccard:.3f}, well-formed "
            f"{self.well_formed:.0%} of {self.n}"
        )


@dataclass(frozen=True)
class TagScores:
    """A line of tags.jsonl: the quality of one tag."""

    tag: str
    gold: int
    """Number of examples that have the tag."""
    predicted: int
    """Number of examples for which the model predicted the tag."""
    precision: float
    recall: float
    f1: float
    f1_interval: list[float]


@dataclass(frozen=True)
class Prediction:
    """A line of predictions.jsonl: a held-out text, its tags, the predicted tags, and the raw answer."""

    text: str
    gold: tuple[str, ...]
    predicted: tuple[str, ...]
    raw: str
    confidences: tuple[float, ...] = ()
    """Probability of each predicted tag; empty in the files of earlier versions."""


@dataclass(frozen=True)
class ThresholdScores:
    """A line of thresholds.jsonl: micro figures on the calibration examples if this threshold were chosen."""

    threshold: float
    predicted: int
    """Number of predicted tags with at least this confidence."""
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class PossibleLabelError:
    """A held-out example whose text may deserve a tag that the data does not give it."""

    line: int
    """Line of predictions.jsonl, counted from 1."""
    tag: str
    """The tag that was predicted."""
    confidence: float


@dataclass(frozen=True)
class ConfusedTags:
    """Two tags of which one was missed and the other one was predicted wrongly for the same texts."""

    gold: str
    predicted: str
    texts: int
    """Number of texts for which that happened."""
    gold_texts: int
    """Number of texts that have the tag `gold`."""


@dataclass(frozen=True)
class Verdict:
    """Decision of the quality gate on an adapter, with the numbers that it is based on."""

    gate: str
    verdict: Literal["pass", "fail", "insufficient evidence"]
    reason: str
    f1: float
    min_f1: float
    tolerance: float
    parent_commit: str | None = None
    """Commit at the head of the repo's branch: the adapter compared with, and the parent commit of a promotion."""
    published_f1: float | None = None
    difference: float | None = None
    """Micro-F1 of the adapter minus that of the published one."""
    interval: list[float] | None = None
    """95% interval of `difference` by a paired bootstrap: lower and upper end."""

    @property
    def passed(self) -> bool:
        """Whether the adapter may be published."""
        return self.verdict == "pass"


@dataclass(frozen=True)
class TokenInfo:
    """Owner and permissions of a token on the Hub."""

    user: str
    organizations: tuple[str, ...]
    role: str
    """`read`, `write` or `fineGrained`."""
    writable: frozenset[str]
    """Namespaces and repos that a fine-grained token can write to."""


@dataclass(frozen=True)
class HubRevision:
    """The commit that a revision of a repo resolves to, and the licence of the repo."""

    commit: str
    licence: str | None


@dataclass(frozen=True)
class Published:
    """Location of a published adapter."""

    repo: str
    revision: str
    url: str
    tag: str | None = None


@dataclass(frozen=True)
class Summary:
    """Outcome of a run."""

    folder: Path
    adapter: str
    """URL of the adapter's commit, or its folder."""
    pushed: bool

    def __str__(self) -> str:
        return f"the adapter is at {self.adapter}" if self.pushed else f"not pushed; the adapter is in {self.adapter}"
