"""Tag head: all tags' probabilities from one forward pass, by a logistic regression per tag on the hidden states."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import peft
import torch
from pydantic import BaseModel, ConfigDict, Field

from job.decoding import tensors
from job.errors import DivergedError, InvalidInputError
from job.types import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEAD_NAME = "head.safetensors"
MIN_TAG_COUNT = 2
"""A head learns tags that at least this many training examples have."""
L2 = 0.1
"""Weight of the squared weights, halved, against the log loss summed over the training examples; docs/decoding.md."""
MIN_SCALE = 1e-6
"""Smallest standard deviation to divide by, for a dimension that is the same for all texts."""
MAX_ITERATIONS = 100
TAGS_AT_ONCE = 512
"""Tags that are fitted together, which bounds memory to examples x this x a few float64."""
_TENSORS = ("weight", "bias", "mean", "scale")


class _About(BaseModel):
    """The metadata of head.safetensors."""

    model_config = ConfigDict(extra="forbid")

    tags: Annotated[tuple[str, ...], Field(min_length=1)]


@dataclass(frozen=True)
class TagHead:
    """One logistic regression per tag on standardized hidden states; all tensors are float32 on the CPU."""

    tags: tuple[str, ...]
    weight: torch.Tensor
    """[tags, hidden size]."""
    bias: torch.Tensor
    """[tags]."""
    mean: torch.Tensor
    """[hidden size], of the training texts."""
    scale: torch.Tensor
    """[hidden size], standard deviation over the training texts times the square root of the hidden size."""

    def probabilities(self, states: torch.Tensor) -> torch.Tensor:
        """Return the probability of each tag, float32 [texts, tags]; `states` are those of `mean_hidden_states`.

        Raises InvalidInputError for states of another size or that are not finite.
        """
        if states.shape[1] != len(self.mean):
            raise InvalidInputError(
                f"the adapter's {HEAD_NAME} was fitted on hidden states of size {len(self.mean)}, and the base model "
                f"has {states.shape[1]}; set TAGGER_BASE_MODEL to the model that the adapter was trained on"
            )
        if not torch.isfinite(states).all():
            raise InvalidInputError(
                "the model's hidden states are not finite numbers, so the tag head cannot answer; set "
                "TAGGER_TRAIN_PRECISION to bf16 or fp32, or TAGGER_SAMPLE_DECODING=greedy"
            )
        return torch.sigmoid((states - self.mean) / self.scale @ self.weight.T + self.bias)

    def to_bytes(self) -> bytes:
        """Return the content of head.safetensors; the same head always has the same bytes."""
        return tensors.to_bytes({name: getattr(self, name) for name in _TENSORS}, _About(tags=self.tags))

    @classmethod
    def load(cls, file: Path) -> TagHead:
        """Read head.safetensors; raises OSError, SafetensorError, or ValueError with what is wrong."""
        about, found = tensors.read(file, _About, _TENSORS)
        n, hidden = len(about.tags), found["mean"].numel()
        tensors.check_shapes(found, {"weight": (n, hidden), "bias": (n,), "mean": (hidden,), "scale": (hidden,)})
        if not (found["scale"] > 0).all():
            raise ValueError("scale has values that are not positive")
        return cls(about.tags, **found)


def learnable_tags(examples: Sequence[Example], known: Sequence[str]) -> tuple[str, ...]:
    """Return the known tags that a head can learn from these examples, in their order.

    Raises InvalidInputError when there are none.
    """
    counts = Counter(tag for example in examples for tag in set(example.tags))
    found = tuple(tag for tag in known if counts[tag] >= MIN_TAG_COUNT)
    if not found:
        raise InvalidInputError(
            f"no tag is on {MIN_TAG_COUNT} training examples, so the tag head has nothing to learn; add examples, or "
            "set TAGGER_SAMPLE_DECODING to greedy or marginal"
        )
    return found


def fit_head(states: torch.Tensor, examples: Sequence[Example], known: Sequence[str]) -> TagHead:
    """Fit a head on the hidden states of training examples, float32 [examples, hidden size].

    All tags are fitted together by L-BFGS in float64, because one solver call per tag takes hours for thousands of
    tags. Raises DivergedError for states that are not finite.
    """
    if not torch.isfinite(states).all():
        raise DivergedError(
            "the trained model's hidden states are not finite numbers, so no tag head can be fitted; set "
            "TAGGER_TRAIN_PRECISION to bf16 or fp32, or TAGGER_SAMPLE_DECODING=greedy"
        )
    tags = learnable_tags(examples, known)
    exact = states.double()
    # with the square root of the size, features have a length of about 1 whatever the base model is, and L2 fits all
    deviation = exact.std(0, correction=0).clamp(min=MIN_SCALE) * states.shape[1] ** 0.5
    mean, scale = exact.mean(0).float(), deviation.float()
    features = (exact - mean) / scale
    weights, biases = [], []
    for start in range(0, len(tags), TAGS_AT_ONCE):
        labels = label_matrix(examples, tags[start : start + TAGS_AT_ONCE])
        weight, bias = fit_logistic(features, labels, L2)
        weights.append(weight.float())
        biases.append(bias.float())
    return TagHead(tags, torch.cat(weights), torch.cat(biases), mean, scale)


def label_matrix(examples: Sequence[Example], tags: Sequence[str]) -> torch.Tensor:
    """Return float64 [examples, tags], 1 where an example has a tag."""
    columns = {tag: column for column, tag in enumerate(tags)}
    labels = torch.zeros(len(examples), len(tags), dtype=torch.float64)
    for row, example in enumerate(examples):
        labels[row, [columns[tag] for tag in set(example.tags) & columns.keys()]] = 1
    return labels


def fit_logistic(features: torch.Tensor, labels: torch.Tensor, l2: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights [labels, features] and biases [labels] of one logistic regression per label.

    `features` are float64 [rows, features], `labels` float64 [rows, labels] of zeros and ones. A label that all rows
    have, or none, has no finite optimum: its weights are 0, and its bias is the smoothed log odds.
    """
    positives, rows = labels.sum(0), len(labels)
    bias = torch.log((positives + 0.5) / (rows - positives + 0.5))
    varied = (positives > 0) & (positives < rows)
    weight = torch.zeros(features.shape[1], labels.shape[1], dtype=torch.float64)
    if not varied.any():
        return weight.T, bias
    targets = labels[:, varied]
    parameters = [weight[:, varied].clone().requires_grad_(), bias[varied].clone().requires_grad_()]
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=MAX_ITERATIONS, tolerance_grad=1e-5, tolerance_change=1e-9, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        logits = features @ parameters[0] + parameters[1]
        total = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
        total = total + l2 / 2 * (parameters[0] ** 2).sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    weight[:, varied], bias[varied] = parameters[0].detach(), parameters[1].detach()
    return weight.T, bias


def mean_hidden_states(model: PreTrainedModel | peft.PeftModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the mean over each prompt of the last layer's hidden states, float32 [texts, hidden size] on the CPU.

    `ids` and `mask` are int64 [texts, width], padded on the right: a causal model then computes the same for a text
    whatever the width is, also one that takes no mask or counts positions from the start of the row. Logits are not
    computed.
    """
    causal: Any = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    states = causal.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    present = mask[..., None]
    # padded positions of some kernels are NaN, which 0 times them would stay
    total = states.float().masked_fill(present == 0, 0.0).sum(1)
    mean: torch.Tensor = (total / present.sum(1)).cpu()
    return mean
