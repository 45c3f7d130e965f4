"""Constrained decoding: token by token, allow only lists of distinct tags, of any tags or of known ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import regex
import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUOTES = "'\""


class DecoderState(Protocol):
    """The state of one answer that is being decoded."""

    tags: list[tuple[str, float]]
    """Complete tags, each with its confidence: the product of the model's probabilities of its tokens."""
    closed: bool
    """Whether the list has ended: by its bracket, by max_tags, or before a tag that it already contains.

    A model that repeats a tag has no more to say: other tags in that position are mostly wrong.
    """

    def step(self, logits: torch.Tensor, log_total: torch.Tensor) -> int:
        """Append the most likely allowed token, and return it.

        `logits` is [vocabulary], `log_total` their logsumexp, a scalar.
        """


def constrain(states: Sequence[DecoderState], logits: torch.Tensor) -> torch.Tensor:
    """Advance each state by a token; return logits that allow only this token.

    Logits, given and returned, are [states, vocabulary]; the returned ones are 0 or -inf.
    """
    totals = logits.float().logsumexp(-1)
    tokens = [state.step(row, total) for state, row, total in zip(states, logits, totals, strict=True)]
    constrained = torch.full_like(logits, -torch.inf)
    return constrained.scatter_(1, torch.tensor(tokens, device=logits.device)[:, None], 0.0)


@dataclass(eq=False)
class TrieNode:
    """A node in a trie of token ids, where each leaf is one tag with the punctuation around it."""

    children: dict[int, TrieNode] = field(default_factory=dict)
    tags: set[str] = field(default_factory=set)
    """Tags of the leaves below this node."""
    ends_list: bool = False
    """At a leaf: whether the list ends here."""

    def add(self, ids: Sequence[int], tag: str, *, ends_list: bool) -> None:
        """Add the token ids of a tag."""
        node = self
        node.tags.add(tag)
        for i in ids:
            node = node.children.setdefault(i, TrieNode())
            node.tags.add(tag)
        node.ends_list = ends_list

    @property
    def unique_tag(self) -> str | None:
        """The tag, if only one is left."""
        return next(iter(self.tags)) if len(self.tags) == 1 else None

    @cached_property
    def ids(self) -> list[int]:
        """Token ids of the children."""
        return list(self.children)

    @cached_property
    def index(self) -> torch.Tensor:
        """The same as int64 [children]."""
        return torch.tensor(self.ids)


class ClosedVocabulary:
    """Lists of at most `max_tags` different tags of a vocabulary.

    A tag has four forms: first in the list or after another tag, and followed by another tag or by the end. Each form
    is tokenized with its bracket or comma, because tokenizers may merge these with quotes; no tokenizer merges beyond
    the space that follows a comma. So an answer has exactly the token ids that the tokenizer gives to the list.

    `prefix` is the white space in front of the list. Of tags that the tokenizer cannot tell apart, the first is kept.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tags: Iterable[str], prefix: str, max_tags: int) -> None:
        self.max_tags = max_tags
        self.end: int = tokenizer.eos_token_id
        self.root, self.next_root = TrieNode(), TrieNode()
        """Where the first tag of a list starts, and where each later one does."""
        self.separator_ids: dict[TrieNode, dict[str, list[int]]] = {}
        """For either root: by tag, the token ids of the tag and the comma after it."""
        known = {str(tokenizer(f" {tag!r}]", add_special_tokens=False).input_ids): tag for tag in reversed(list(tags))}
        names = list(known.values())
        for root, before in ((self.root, f"{prefix}["), (self.next_root, " ")):
            for after in ",]":
                texts = [f"{before}{tag!r}{after}" for tag in names]
                ids_by_tag = dict(zip(names, tokenizer(texts, add_special_tokens=False).input_ids, strict=True))
                for tag, ids in ids_by_tag.items():
                    root.add(ids, tag, ends_list=after == "]")
                if after == ",":
                    self.separator_ids[root] = ids_by_tag

    def new_state(self) -> ClosedState:
        """Return the state of an answer without tokens."""
        return ClosedState(self)


class ClosedState:
    """The state of one answer from a ClosedVocabulary."""

    def __init__(self, vocabulary: ClosedVocabulary) -> None:
        self._vocabulary = vocabulary
        self._node = vocabulary.root
        self._confidence = 1.0
        self._decided = False
        """Whether the tag is known already; the tokens after that do not change its confidence."""
        self.tags: list[tuple[str, float]] = []
        self.closed = False

    def step(self, logits: torch.Tensor, log_total: torch.Tensor) -> int:
        if self.closed:
            return self._vocabulary.end
        node = self._node
        values = logits[node.index.to(logits.device)].float()
        best = int(values.argmax())
        child = node.children[node.ids[best]]
        if child.tags <= {tag for tag, _ in self.tags}:
            self.closed = True
            return self._vocabulary.end
        if not self._decided:
            same = [best]
            if child.unique_tag is not None:
                self._decided = True
                same = [n for n, other in enumerate(node.children.values()) if other.unique_tag == child.unique_tag]
            self._confidence *= float((values[same] - log_total).exp().sum())
        self._node = child
        if not child.children:
            self._finish_tag(child)
        return node.ids[best]

    def _finish_tag(self, leaf: TrieNode) -> None:
        (tag,) = leaf.tags
        self.tags.append((tag, self._confidence))
        self.closed = leaf.ends_list or len(self.tags) == self._vocabulary.max_tags
        self._node, self._confidence, self._decided = self._vocabulary.next_root, 1.0, False


class OpenVocabulary:
    """Lists of at most `max_tags` different tags, whatever tags the model writes.

    A tag holds any characters that a Python string literal takes without an escape, and does not start with white
    space. `prefix` is the white space in front of the list.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prefix: str, max_tags: int) -> None:
        self.max_tags = max_tags
        self.end: int = tokenizer.eos_token_id
        self._opening = f"{prefix}["
        tag = "(?P<tag>" + "|".join(rf"{q}[^{q}\\\s\p{{Cc}}][^{q}\\\p{{Cc}}]*{q}" for q in QUOTES) + ")"
        self.pattern = regex.compile(rf"{regex.escape(self._opening)}{tag}(?:, {tag})*\]")
        """Matches a complete list; matches the start of one with `partial=True`."""
        self._tokenizer = tokenizer
        special = set(tokenizer.all_special_ids)
        token_texts = self.decode([[i] for i in range(len(tokenizer))])
        self._token_texts = ["" if i in special else text for i, text in enumerate(token_texts)]
        self._allowed: dict[str, torch.Tensor] = {}
        self._starting_with: dict[str, torch.Tensor] = {}

    def decode(self, answers: list[list[int]]) -> list[str]:
        """Decode token ids as if other tokens came before: some tokenizers drop the first space of a text."""
        ids = [[self.end, *answer] for answer in [[], *answers]]
        [before, *texts] = self._tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)
        return [text.removeprefix(before) for text in texts]

    def allowed(self, text: str) -> torch.Tensor:
        """Return which tokens may follow the start of a list, as bool [tokens]; cached by canonical prefix."""
        prefix = self.canonical_prefix(text)
        if prefix not in self._allowed:
            fits = [
                bool(token) and self.pattern.fullmatch(prefix + token, partial=True) is not None
                for token in self._token_texts
            ]
            self._allowed[prefix] = torch.tensor(fits)
        return self._allowed[prefix]

    def tokens_starting_with(self, text: str) -> torch.Tensor:
        """Return which tokens start with a text, as bool [tokens]."""
        if text not in self._starting_with:
            self._starting_with[text] = torch.tensor([token.startswith(text) for token in self._token_texts])
        return self._starting_with[text]

    def tag_spans(self, text: str) -> list[tuple[int, int]]:
        """Return start and end of each complete tag in the start of a list, quotes included."""
        match = self.pattern.fullmatch(text, partial=True)
        return [] if match is None else match.spans("tag")

    def canonical_prefix(self, text: str) -> str:
        """Return the shortest start of a list that the same tokens may follow.

        Complete tags but the last are left out, and each tag is shortened to `x`.
        """
        spans = self.tag_spans(text)
        rest = text[spans[-1][1] if spans else len(self._opening) :]
        if not text.startswith(self._opening):
            return text
        if spans and not rest.startswith(", "):
            return f"{self._opening}'x'{rest}"
        rest = rest.removeprefix(", ") if spans else rest
        return self._opening + (f"{rest[0]}x" if len(rest) > 1 else rest)

    def new_state(self) -> OpenState:
        """Return the state of an answer without tokens."""
        return OpenState(self)


class OpenState:
    """The state of one answer from an OpenVocabulary."""

    def __init__(self, vocabulary: OpenVocabulary) -> None:
        self._vocabulary = vocabulary
        self._ids: list[int] = []
        self._text = ""
        self._confidence = 1.0
        self.tags: list[tuple[str, float]] = []
        self.closed = False

    def step(self, logits: torch.Tensor, log_total: torch.Tensor) -> int:
        vocabulary = self._vocabulary
        if self.closed:
            return vocabulary.end
        allowed = vocabulary.allowed(self._text).to(logits.device)
        values = logits[: len(allowed)].float().masked_fill(~allowed, -torch.inf)
        best = int(values.argmax())
        [text] = vocabulary.decode([[*self._ids, best]])
        spans = vocabulary.tag_spans(text)
        tags = [text[start + 1 : end - 1].strip() for start, end in spans]
        # no token is allowed where the tokenizer cannot write a list
        if len(set(tags)) < len(tags) or values[best] == -torch.inf:
            self.closed = True
            return vocabulary.end
        if len(tags) == len(self.tags):
            self._confidence *= float((values[best] - log_total).exp())
        else:  # the tag ends with its quote: a comma or bracket in the same token is not part of it
            starting = vocabulary.tokens_starting_with(text[len(self._text) : spans[-1][1]])
            same = starting.to(allowed.device) & allowed
            self.tags.append((tags[-1], self._confidence * float((values[same] - log_total).exp().sum())))
            self._confidence = 1.0
        self._ids.append(best)
        self._text = text
        self.closed = len(tags) == vocabulary.max_tags or vocabulary.pattern.fullmatch(text) is not None
        return best
