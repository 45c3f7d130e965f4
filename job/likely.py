"""Every tag that is likely to begin a list: a search through the trie of a vocabulary."""

from __future__ import annotations

import copy
import inspect
from typing import TYPE_CHECKING, Any

import peft
import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from job.grammar import Node

WAYS = 8
"""For each text of a batch, the ways that are followed at once; further ones come after them."""


def likely_tags(
    model: PreTrainedModel | peft.PeftModel, ids: torch.Tensor, mask: torch.Tensor, start: Node, threshold: float
) -> list[dict[str, float]]:
    """For each text the tags whose probability of being written next is at least the threshold.

    A model that was trained on tags in random order writes first any of a text's tags, so that this
    orders the tags by how likely the text has them, and the threshold can be set for the best F1; the
    likeliest list as a whole is too sure of its tags. `ids` and `mask` are int64 [texts, width], padded
    on the left; probabilities are the model's own, over all tokens. A way is left where it is less
    likely than half the threshold, so that there are few of them; where the two ways of a tag, last and before
    another, part before the tag is the only one left, the less likely one may go uncounted.
    """
    base: Any = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    positioned = "position_ids" in inspect.signature(base.forward).parameters
    found: list[dict[str, float]] = [{} for _ in ids]
    most = len(ids) * WAYS
    ahead = [(ids, mask, None, [(text, start, 1.0) for text in range(len(ids))])]
    while ahead:
        ids, mask, cache, ways = ahead.pop()
        places = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]} if positioned else {}
        output = model(
            input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1, **places
        )
        probabilities = output.logits[:, -1].float().softmax(-1)
        further: list[tuple[int, int, tuple[int, Node, float]]] = []
        for row, (text, node, likely) in enumerate(ways):
            values = (probabilities[row, node.index.to(ids.device)] * likely).tolist()
            for i, child, value in zip(node.ids, node.children.values(), values, strict=True):
                if (tag := child.only) is not None:
                    found[text][tag] = found[text].get(tag, 0.0) + value
                elif value >= threshold / 2:
                    further.append((row, i, (text, child, value)))
        for first in range(0, len(further), most):
            rows, tokens, onward = zip(*further[first : first + most], strict=True)
            at = torch.tensor(rows, device=ids.device)
            longer = torch.nn.functional.pad(mask[at], (0, 1), value=1)
            part = _rows(output.past_key_values, at)
            ahead.append((torch.tensor(tokens, device=ids.device)[:, None], longer, part, list(onward)))
    return [{tag: value for tag, value in tags.items() if value >= threshold} for tags in found]


def _rows(cache: Any, rows: torch.Tensor) -> Any:
    """A cache with these rows of another one, which stays as it is."""
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    chosen.batch_select_indices(rows)
    return chosen
