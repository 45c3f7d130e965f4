"""Every tag that is likely to be in a list: place by place a search through the trie of a vocabulary."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import peft
import torch

from job.types import MIN_PROBABILITY

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from job.decoding.constraints import ClosedVocabulary, TrieNode

BEAM_ROWS = 8
"""For each text of a batch, the ways that are followed at once; further ones come after them."""
MIN_CONTINUE_PROB = 0.2
"""How likely a list has to go on for its next place to be looked at: what comes later adds little."""


@dataclass
class TagDistribution:
    """What a text's list may hold."""

    tags: dict[str, float] = field(default_factory=dict)
    """Those that may be in it, each with its confidence."""
    written: list[str] = field(default_factory=list)
    """The likeliest list, as far as it was followed, and its best tag in the last place that was looked at."""
    continue_prob: float = 1.0
    """The probability that it has a tag after those that are written."""

    def add(self, found: dict[str, float]) -> str | None:
        """Take in what may stand in the next place; its likeliest tag, if there is any."""
        new = {tag: value for tag, value in found.items() if value >= MIN_PROBABILITY and tag not in self.written}
        for tag, value in new.items():
            self.tags[tag] = 1 - (1 - self.tags.get(tag, 0.0)) * (1 - min(1.0, value))
        best = max(new, key=new.__getitem__, default=None)
        self.written += [] if best is None else [best]
        return best


def tag_marginals(
    model: PreTrainedModel | peft.PeftModel,
    ids: torch.Tensor,
    mask: torch.Tensor,
    vocabulary: ClosedVocabulary,
    *,
    max_positions: int,
    room: int,
) -> list[TagDistribution]:
    """For each text the tags that its list may hold, and how confident the model is of each.

    The likeliest list as a whole is too sure of its tags. So it is followed, for at most so many places and
    `room` tokens, as long as it goes on with GOES_ON, and in each place every tag is asked for. With h(k) the
    probability that the list goes on to place k and has the tag there, where those before are the likeliest ones, the
    confidence is 1 - (1 - h(1)) (1 - h(2)) ...: the probability that the tag is in one of the places, were these
    independent. A tag that the list is followed through is not asked for again, so that its confidence is rather low;
    an h(k) below MIN_PROBABILITY counts as none. A list that has something else than a tag and a comma does not go on.

    `ids` and `mask` are int64 [texts, width], padded on the left; probabilities are the model's own, over all tokens.
    Lists of unlike length leave holes in the mask, which a model with an attention window counts as tokens, and which
    one whose positions do not follow from the mask or `position_ids` (MPT) takes for distance.
    """
    forward = _Forward(model)
    lists = [TagDistribution() for _ in ids]
    here, used = list(range(len(ids))), [0] * len(ids)
    logits, cache = forward(ids, mask, None, 1)
    for place in range(max_positions):
        start = vocabulary.next_root if place else vocabulary.first
        begin = [(row, start, lists[text].continue_prob, room - used[text]) for row, text in enumerate(here)]
        found = _next_tags(forward, logits, cache, mask, begin)
        rows: list[int] = []
        ways: list[list[int]] = []
        values: list[float] = []
        for row, (text, tags) in enumerate(zip(here, found, strict=True)):
            if (best := lists[text].add(tags)) is not None:
                way = vocabulary.separator_ids[start][best]
                used[text] += len(way)
                if used[text] <= room:
                    rows, ways, values = [*rows, row], [*ways, way], [*values, tags[best]]
        if not rows or place + 1 == max_positions:
            break
        # all of these lists are written on by their likeliest tag, which also says how likely they go on after it
        at = torch.tensor(rows, device=ids.device)
        longest = max(map(len, ways))
        holes = torch.tensor([[0] * (longest - len(way)) + [1] * len(way) for way in ways], device=ids.device)
        tokens = torch.tensor([[0] * (longest - len(way)) + way for way in ways], device=ids.device)
        mask = torch.cat([mask[at], holes], 1)
        before = logits[at, -1:]
        logits, cache = forward(tokens, mask, select_cache_rows(cache, at), longest)
        here = [here[row] for row in rows]
        for text, way, value, one, rest in zip(here, ways, values, before, logits, strict=True):
            steps = torch.cat([one, rest[longest - len(way) : -1]]).float().log_softmax(-1)
            written = steps.gather(1, torch.tensor(way, device=ids.device)[:, None]).sum().exp().item()
            lists[text].continue_prob *= min(1.0, written * lists[text].continue_prob / value)
        on = [row for row, text in enumerate(here) if lists[text].continue_prob >= MIN_CONTINUE_PROB]
        if not on:
            break
        at = torch.tensor(on, device=ids.device)
        here, mask, logits, cache = [here[row] for row in on], mask[at], logits[at, -1:], select_cache_rows(cache, at)
    return lists


_TrieState = tuple[int, "TrieNode", float, int]
"""Of a row, where in the trie it is, how likely it came there, and how many more tokens there is room for."""


class _Forward:
    """A model's forward pass over tokens that come after those of a cache."""

    def __init__(self, model: PreTrainedModel | peft.PeftModel) -> None:
        base: Any = model.get_base_model() if isinstance(model, peft.PeftModel) else model
        self._positioned = "position_ids" in inspect.signature(base.forward).parameters
        self._model: Any = model

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor, cache: Any, last: int) -> tuple[torch.Tensor, Any]:
        """Logits [rows, last, vocabulary] of the last tokens, and the cache with these tokens.

        `ids` is int64 [rows, tokens], `mask` int64 [rows, tokens of the cache and these].
        """
        places = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = self._model(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=last,
            **({"position_ids": places} if self._positioned else {}),
        )
        return output.logits, output.past_key_values


def _next_tags(
    forward: _Forward, logits: torch.Tensor, cache: Any, mask: torch.Tensor, begin: list[_TrieState]
) -> list[dict[str, float]]:
    """For each row the tags that may be written next, each with its probability times that of getting there.

    `logits` is [rows, tokens, vocabulary], of which the last token counts. A branch is dropped when it is less likely
    than MIN_PROBABILITY, which keeps their number small; if the two spellings of a tag, last in the list and before
    another tag, separate before the tag is the only candidate, one that is below may stay uncounted.
    """
    found: list[dict[str, float]] = [{} for _ in logits]
    most = len(found) * BEAM_ROWS
    ahead: list[Any] = [(None, mask, cache, begin)]
    while ahead:
        ids, mask, cache, ways = ahead.pop()
        if ids is not None:
            logits, cache = forward(ids, mask, cache, 1)
        probabilities = logits[:, -1].float().softmax(-1)
        further: list[tuple[int, int, _TrieState]] = []
        for row, (text, node, likely, left) in enumerate(ways):
            values = (probabilities[row, node.index.to(logits.device)] * likely).tolist()
            for i, child, value in zip(node.ids, node.children.values(), values, strict=True):
                if (tag := child.only) is not None:
                    found[text][tag] = found[text].get(tag, 0.0) + value
                elif value >= MIN_PROBABILITY and left > 0:
                    further.append((row, i, (text, child, value, left - 1)))
        for first in range(0, len(further), most):
            rows, tokens, onward = zip(*further[first : first + most], strict=True)
            at = torch.tensor(rows, device=logits.device)
            longer = torch.nn.functional.pad(mask[at], (0, 1), value=1)
            ids = torch.tensor(tokens, device=logits.device)[:, None]
            ahead.append((ids, longer, select_cache_rows(cache, at), list(onward)))
    return found


def select_cache_rows(cache: Any, rows: torch.Tensor) -> Any:
    """A cache with these rows of another one, which stays as it is."""
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    chosen.batch_select_indices(rows)
    return chosen
