"""Marginal decoding: how likely each tag is to be anywhere in the list, by a search through a trie of tags."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import peft
import torch

from job.types import MIN_PROBABILITY

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from job.decoding.constraints import ClosedVocabulary, TrieNode

MAX_BRANCHES_PER_TEXT = 8
"""Most branches of the trie in one forward pass, for each text of a batch; the others wait."""
MIN_CONTINUE_PROB = 0.2
"""Stop extending the list once P(another tag) falls below this; later positions add little."""


@dataclass
class TagDistribution:
    """The probability of each tag in the list of one text."""

    tags: dict[str, float] = field(default_factory=dict)
    """Confidence of each tag that may be in the list."""
    greedy_tags: list[str] = field(default_factory=list)
    """The list built from the most probable tag at each position, as far as it was extended."""
    continue_prob: float = 1.0
    """P(another tag follows greedy_tags)."""

    def add(self, found: dict[str, float]) -> str | None:
        """Add the probabilities of the tags in the next position; return the best new tag, if there is one."""
        new = {tag: value for tag, value in found.items() if value >= MIN_PROBABILITY and tag not in self.greedy_tags}
        for tag, value in new.items():
            self.tags[tag] = 1 - (1 - self.tags.get(tag, 0.0)) * (1 - min(1.0, value))
        best = max(new, key=new.__getitem__, default=None)
        self.greedy_tags += [] if best is None else [best]
        return best


def tag_marginals(
    model: PreTrainedModel | peft.PeftModel,
    ids: torch.Tensor,
    mask: torch.Tensor,
    vocabulary: ClosedVocabulary,
    *,
    max_positions: int,
    token_budget: int,
) -> list[TagDistribution]:
    """Return for each text the tags that its list may contain, with the model's confidence in each.

    `ids` and `mask` are int64 [texts, width], padded on the left. Probabilities are the model's own, over all tokens.

    The probability of a single list overstates how certain its tags are. Therefore the list built from the most
    probable tag at each position is extended for at most `max_positions` tags and `token_budget` tokens, while
    P(another tag) >= MIN_CONTINUE_PROB, and every tag is scored in each position. With h(k) = P(the list reaches
    position k and has the tag there | the most probable tags before), the confidence is 1 - (1 - h(1)) (1 - h(2)) ...:
    the probability that the tag is in some position, if positions were independent. An h(k) below MIN_PROBABILITY
    counts as 0. A tag that already extends the list is not scored again, so its confidence is rather low. A list that
    continues with anything but a comma has no further tag.

    The tokens that all tags start with (a bracket, a quote) are computed together with what stands before them, so that
    the first forward pass of a position already tells tags apart.

    Lists of different lengths leave gaps in the mask. A model with an attention window counts these as tokens, and one
    that takes its positions neither from the mask nor from `position_ids` (MPT) counts them as distance.
    """
    forward = _Forward(model)
    distributions = [TagDistribution() for _ in ids]
    active = start_lists(forward, ids, mask, distributions, _Start.below(vocabulary.root), token_budget)
    next_start = _Start.below(vocabulary.next_root)
    for position in range(max_positions):
        root = vocabulary.next_root if position else vocabulary.root
        found = expand_position(forward, active)
        extensions = best_extensions(active, found, vocabulary.separator_ids[root])
        if not extensions or position + 1 == max_positions:
            break
        extended = prune(append_best(forward, active, extensions, next_start))
        if extended is None:
            break
        active = extended
    return distributions


class _Start(NamedTuple):
    """The tokens that all tags of a position start with."""

    ids: list[int]
    node: TrieNode
    """The node of the trie after these tokens."""

    @classmethod
    def below(cls, root: TrieNode) -> _Start:
        ids = []
        while len(root.children) == 1 and root.children[root.ids[0]].unique_tag is None:
            ids.append(root.ids[0])
            root = root.children[ids[-1]]
        return cls(ids, root)


@dataclass
class _ActiveBatch:
    """The texts whose list is still being extended, one row each."""

    distributions: list[TagDistribution]
    start: _Start
    """The start of the next tag, which the cache contains."""
    start_prob: list[float]
    """P(the list continues with `start`)."""
    tokens_left: list[int]
    """Tokens that each list may still take, those of `start` included."""
    mask: torch.Tensor
    """int64 [rows, tokens in the cache]."""
    logits: torch.Tensor
    """[rows, vocabulary], of the token after `start`."""
    cache: Any

    def select(self, rows: list[int]) -> _ActiveBatch:
        index = torch.tensor(rows, device=self.mask.device)
        return _ActiveBatch(
            [self.distributions[row] for row in rows],
            self.start,
            [self.start_prob[row] for row in rows],
            [self.tokens_left[row] for row in rows],
            self.mask[index],
            self.logits[index],
            select_cache_rows(self.cache, index),
        )


class _Extension(NamedTuple):
    """The best tag of a row, which extends its list."""

    row: int
    ids: list[int]
    """Token ids of the tag and the comma after it, without the start that the cache contains."""
    probability: float
    """P(the list reaches this position and has the tag there)."""


class _TrieState(NamedTuple):
    """A branch of the search for one position."""

    text: int
    """The row of the text in `_ActiveBatch`."""
    node: TrieNode
    probability: float
    """P(the list reaches this position and starts with the tokens of this branch)."""
    tokens_left: int
    """Tokens that the branch may still take; negative if the start of the list does not fit."""


class _BranchBatch(NamedTuple):
    """Branches that wait for their forward pass, one row each."""

    ids: torch.Tensor
    """The last token of each branch, int64 [rows, 1]."""
    mask: torch.Tensor
    """int64 [rows, tokens in the cache and this one]."""
    cache: Any
    states: list[_TrieState]


class _Forward:
    """A model's forward pass over tokens that follow those in a cache."""

    def __init__(self, model: PreTrainedModel | peft.PeftModel) -> None:
        base: Any = model.get_base_model() if isinstance(model, peft.PeftModel) else model
        self._takes_position_ids = "position_ids" in inspect.signature(base.forward).parameters
        self._model: Any = model

    def __call__(
        self, ids: torch.Tensor, mask: torch.Tensor, cache: Any, logits_to_keep: int
    ) -> tuple[torch.Tensor, Any]:
        """Return logits [rows, logits_to_keep, vocabulary] of the last tokens, and the cache with these tokens.

        `ids` is int64 [rows, tokens], `mask` int64 [rows, tokens in the cache and these].
        """
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = self._model(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=logits_to_keep,
            **({"position_ids": position_ids} if self._takes_position_ids else {}),
        )
        return output.logits, output.past_key_values


def start_lists(
    forward: _Forward,
    ids: torch.Tensor,
    mask: torch.Tensor,
    distributions: list[TagDistribution],
    start: _Start,
    token_budget: int,
) -> _ActiveBatch:
    """Compute the prompts and the start of their lists in one forward pass."""
    rows, length = len(ids), len(start.ids)
    tokens = torch.tensor(start.ids, device=ids.device, dtype=ids.dtype).expand(rows, length)
    mask = torch.nn.functional.pad(mask, (0, length), value=1)
    logits, cache = forward(torch.cat([ids, tokens], 1), mask, None, length + 1)
    start_prob = _log_probs(logits[:, :-1], tokens).sum(1).exp().tolist()
    return _ActiveBatch(distributions, start, start_prob, [token_budget] * rows, mask, logits[:, -1], cache)


def _log_probs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return log P of each token, float32 [..., tokens]; `logits` are [..., tokens, vocabulary] of the same places."""
    return logits.float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def expand_position(forward: _Forward, active: _ActiveBatch) -> list[dict[str, float]]:
    """Return for each row the tags that may come next, each with P(the list reaches this position and has it there).

    Branches less likely than MIN_PROBABILITY are dropped, which bounds their number. A tag has two forms, last in the
    list and before another tag. Where their tokens differ before the tag is the only candidate, a form that is less
    likely than this may be left out of the sum.
    """
    found: list[dict[str, float]] = [{} for _ in active.distributions]
    max_rows = len(found) * MAX_BRANCHES_PER_TEXT
    states = [
        _TrieState(row, active.start.node, distribution.continue_prob * start_prob, left - len(active.start.ids))
        for row, (distribution, start_prob, left) in enumerate(
            zip(active.distributions, active.start_prob, active.tokens_left, strict=True)
        )
    ]
    branches = _expand(states, active.logits, found)
    stack = list(_branch_batches(branches, active.mask, active.cache, max_rows))
    while stack:
        ids, mask, cache, states = stack.pop()
        logits, cache = forward(ids, mask, cache, 1)
        stack += _branch_batches(_expand(states, logits[:, -1], found), mask, cache, max_rows)
    return found


def _expand(
    states: list[_TrieState], logits: torch.Tensor, found: list[dict[str, float]]
) -> list[tuple[int, int, _TrieState]]:
    """Add the tags that are determined by the next token to `found`; return the branches that go deeper.

    `logits` is [states, vocabulary]. A branch is the row of its parent, its token id and its state.
    """
    values = iter(_child_probabilities(states, logits))
    branches: list[tuple[int, int, _TrieState]] = []
    for row, (text, node, _, tokens_left) in enumerate(states):
        for i, child, value in zip(node.ids, node.children.values(), values):  # noqa: B905 - the next row has the rest
            if tokens_left < 0:
                continue
            if (tag := child.unique_tag) is not None:
                found[text][tag] = found[text].get(tag, 0.0) + value
            elif value >= MIN_PROBABILITY and tokens_left > 0:
                branches.append((row, i, _TrieState(text, child, value, tokens_left - 1)))
    return branches


def _child_probabilities(states: list[_TrieState], logits: torch.Tensor) -> list[float]:
    """Return P(the list continues with the token of a child) for all children of all states, one after another.

    They are gathered on the device and fetched at once, because each transfer waits for the device.
    """
    columns = torch.cat([state.node.index for state in states]).to(logits.device)
    counts = torch.tensor([len(state.node.ids) for state in states])
    rows = torch.arange(len(states)).repeat_interleave(counts).to(logits.device)
    weights = torch.tensor([state.probability for state in states], device=logits.device)
    probabilities = logits.float().softmax(-1)[rows, columns] * weights[rows]
    values: list[float] = probabilities.tolist()
    return values


def _branch_batches(
    branches: list[tuple[int, int, _TrieState]], mask: torch.Tensor, cache: Any, max_rows: int
) -> Iterator[_BranchBatch]:
    """Divide branches into batches of at most `max_rows`, each with its rows of the parents' mask and cache."""
    for start in range(0, len(branches), max_rows):
        rows, tokens, states = zip(*branches[start : start + max_rows], strict=True)
        index = torch.tensor(rows, device=mask.device)
        extended_mask = torch.nn.functional.pad(mask[index], (0, 1), value=1)
        ids = torch.tensor(tokens, device=mask.device)[:, None]
        yield _BranchBatch(ids, extended_mask, select_cache_rows(cache, index), list(states))


def best_extensions(
    active: _ActiveBatch, found: list[dict[str, float]], separator_ids: dict[str, list[int]]
) -> list[_Extension]:
    """Add what was found to the distributions; return the best new tag of each row that has the tokens for it."""
    extensions: list[_Extension] = []
    for row, (distribution, tags) in enumerate(zip(active.distributions, found, strict=True)):
        best = distribution.add(tags)
        if best is not None and len(separator_ids[best]) <= active.tokens_left[row]:
            extensions.append(_Extension(row, separator_ids[best][len(active.start.ids) :], tags[best]))
    return extensions


def append_best(forward: _Forward, active: _ActiveBatch, extensions: list[_Extension], start: _Start) -> _ActiveBatch:
    """Append the best tag, a comma and the start of another tag to each list that has one; update P(another tag).

    P(tag and comma | position reached) / P(tag | position reached) is the probability that the list continues.
    """
    active = active.select([extension.row for extension in extensions])
    device = active.mask.device
    appended = [extension.ids + start.ids for extension in extensions]
    width = max(map(len, appended))
    left_pad = [width - len(ids) for ids in appended]
    tokens = torch.tensor([[0] * pad + ids for pad, ids in zip(left_pad, appended, strict=True)], device=device)
    present = torch.tensor([[0] * pad + [1] * (width - pad) for pad in left_pad], device=device)
    mask = torch.cat([active.mask, present], 1)
    logits, cache = forward(tokens, mask, active.cache, width)
    log_probs = []
    for row, pad in enumerate(left_pad):
        steps = _log_probs(torch.cat([active.logits[row][None], logits[row, pad:-1]]), tokens[row, pad:])
        tag_and_comma = len(steps) - len(start.ids)
        log_probs.append(torch.stack([steps[:tag_and_comma].sum(), steps[tag_and_comma:].sum()]))
    probabilities = torch.stack(log_probs).exp().tolist()  # at once: each transfer waits for the device
    tokens_left, previous = [], active.start
    for n, (distribution, extension) in enumerate(zip(active.distributions, extensions, strict=True)):
        with_comma = active.start_prob[n] * probabilities[n][0]
        distribution.continue_prob *= min(1.0, with_comma * distribution.continue_prob / extension.probability)
        tokens_left.append(active.tokens_left[n] - len(previous.ids) - len(extension.ids))
    start_prob = [of_start for _, of_start in probabilities]
    return _ActiveBatch(active.distributions, start, start_prob, tokens_left, mask, logits[:, -1], cache)


def prune(active: _ActiveBatch) -> _ActiveBatch | None:
    """Keep the lists that continue with at least MIN_CONTINUE_PROB; None if there are none."""
    rows = [row for row, d in enumerate(active.distributions) if d.continue_prob >= MIN_CONTINUE_PROB]
    return active.select(rows) if rows else None


def select_cache_rows(cache: Any, rows: torch.Tensor) -> Any:
    """Return a cache with these rows of another one, which is not changed."""
    selected = copy.copy(cache)
    selected.layers = [copy.copy(layer) for layer in cache.layers]
    selected.batch_select_indices(rows)
    return selected
