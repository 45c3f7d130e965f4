"""What an answer may be, token by token: a list of tags, none twice and, if wanted, known ones only."""

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
    """The way of one answer through the grammar."""

    tags: list[tuple[str, float]]
    """Each tag that is closed, with its confidence: the probability of its tokens, as the model gives it."""
    closed: bool
    """Whether the list is at its end: by its bracket, by its number of tags, or where a tag would come again.

    A model that begins to repeat itself has said what it knows: other tags in that place are mostly wrong.
    """

    def step(self, logits: torch.Tensor, log_total: torch.Tensor) -> int:
        """Go on with the likeliest token that is allowed, and return it.

        `logits` is [vocabulary], `log_total` the logarithm of the sum of their exponentials.
        """


def constrain(walks: Sequence[DecoderState], logits: torch.Tensor) -> torch.Tensor:
    """Logits, [walks, vocabulary], that leave each answer the likeliest of the tokens that it may go on with."""
    totals = logits.float().logsumexp(-1)
    chosen = [walk.step(row, total) for walk, row, total in zip(walks, logits, totals, strict=True)]
    only = torch.full_like(logits, -torch.inf)
    return only.scatter_(1, torch.tensor(chosen, device=logits.device)[:, None], 0.0)


@dataclass(eq=False)
class TrieNode:
    """A place in a trie of token ids, where each way ends at one tag and what is written around it."""

    children: dict[int, TrieNode] = field(default_factory=dict)
    tags: set[str] = field(default_factory=set)
    """Those that may still come."""
    last: bool = False
    """At a leaf: whether the list ends here."""

    def add(self, ids: Sequence[int], tag: str, *, last: bool) -> None:
        """Add the way of a tag."""
        node = self
        node.tags.add(tag)
        for i in ids:
            node = node.children.setdefault(i, TrieNode())
            node.tags.add(tag)
        node.last = last

    @property
    def only(self) -> str | None:
        """The tag, when there is no other that may come."""
        return next(iter(self.tags)) if len(self.tags) == 1 else None

    @cached_property
    def ids(self) -> list[int]:
        return list(self.children)

    @cached_property
    def index(self) -> torch.Tensor:
        """int64 [children]: their token ids."""
        return torch.tensor(self.ids)


class ClosedVocabulary:
    """Lists of tags of a vocabulary, each at most once, at most `most` of them.

    A tag is written in four ways: first in the list or after another, and last or before another. Each
    is tokenized whole, with the bracket or comma beside it, for tokenizers may merge them with quotes;
    none merges beyond the space that follows a comma. So what is written is exactly what the tokenizer
    makes of the list.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tags: Iterable[str], space: str, most: int) -> None:
        self.most = most
        self.end: int = tokenizer.eos_token_id
        self.first, self.next_root = TrieNode(), TrieNode()
        self.separator_ids: dict[TrieNode, dict[str, list[int]]] = {}
        """For each of the two the token ids of each tag and the comma after it."""
        known = {str(tokenizer(f" {tag!r}]", add_special_tokens=False).input_ids): tag for tag in reversed(list(tags))}
        names = list(known.values())  # of tags that a tokenizer writes alike the first
        for node, before in ((self.first, f"{space}["), (self.next_root, " ")):
            for after in ",]":
                written = [f"{before}{tag!r}{after}" for tag in names]
                ways = dict(zip(names, tokenizer(written, add_special_tokens=False).input_ids, strict=True))
                for tag, ids in ways.items():
                    node.add(ids, tag, last=after == "]")
                if after == ",":
                    self.separator_ids[node] = ways

    def new_state(self) -> ClosedState:
        return ClosedState(self)


class ClosedState:
    """The way of one answer through a Vocabulary."""

    def __init__(self, vocabulary: ClosedVocabulary) -> None:
        self._vocabulary = vocabulary
        self._node = vocabulary.first
        self._confidence = 1.0
        self._decided = False
        self.tags: list[tuple[str, float]] = []
        self.closed = False

    def step(self, logits: torch.Tensor, log_total: torch.Tensor) -> int:
        if self.closed:
            return self._vocabulary.end
        node = self._node
        values = logits[node.index.to(logits.device)].float()
        chosen = int(values.argmax())
        child = node.children[node.ids[chosen]]
        if child.tags <= {tag for tag, _ in self.tags}:
            self.closed = True
            return self._vocabulary.end
        if not self._decided:
            same = [chosen]
            if child.only is not None:
                self._decided = True
                same = [n for n, other in enumerate(node.children.values()) if other.only == child.only]
            self._confidence *= float((values[same] - log_total).exp().sum())
        self._node = child
        if not child.children:
            (tag,) = child.tags
            self.tags.append((tag, self._confidence))
            self.closed = child.last or len(self.tags) == self._vocabulary.most
            self._node, self._confidence, self._decided = self._vocabulary.next_root, 1.0, False
        return node.ids[chosen]


class OpenVocabulary:
    """Lists of whatever tags the model writes, none twice, at most `most` of them.

    In a tag anything may stand that Python's notation takes as it is; it does not begin with white space.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, space: str, most: int) -> None:
        self.most = most
        self.end: int = tokenizer.eos_token_id
        self.beginning = f"{space}["
        tag = "(?P<tag>" + "|".join(rf"{q}[^{q}\\\s\p{{Cc}}][^{q}\\\p{{Cc}}]*{q}" for q in QUOTES) + ")"
        self.list = regex.compile(rf"{regex.escape(self.beginning)}{tag}(?:, {tag})*\]")
        self._tokenizer = tokenizer
        special = set(tokenizer.all_special_ids)
        self.texts = self.decode([[i] for i in range(len(tokenizer))])
        self.texts = ["" if i in special else text for i, text in enumerate(self.texts)]
        self._allowed: dict[str, torch.Tensor] = {}
        self._beginning_with: dict[str, torch.Tensor] = {}

    def decode(self, answers: list[list[int]]) -> list[str]:
        """The texts of token ids, as they stand after others: alone, some tokenizers take off a first space."""
        ids = [[self.end, *answer] for answer in [[], *answers]]
        [before, *texts] = self._tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)
        return [text.removeprefix(before) for text in texts]

    def allowed(self, written: str) -> torch.Tensor:
        """Bool [tokens]: those that go on with a list, whatever the tags before; for each kind of place found once."""
        place = self.canonical_prefix(written)
        if place not in self._allowed:
            fits = [bool(text) and self.list.fullmatch(place + text, partial=True) is not None for text in self.texts]
            self._allowed[place] = torch.tensor(fits)
        return self._allowed[place]

    def tokens_starting_with(self, text: str) -> torch.Tensor:
        """Bool [tokens]: those whose text begins with this."""
        if text not in self._beginning_with:
            self._beginning_with[text] = torch.tensor([token.startswith(text) for token in self.texts])
        return self._beginning_with[text]

    def tags_in(self, written: str) -> list[tuple[int, int]]:
        """Where in the beginning of a list its whole tags are, quotes included."""
        found = self.list.fullmatch(written, partial=True)
        return [] if found is None else found.spans("tag")

    def canonical_prefix(self, written: str) -> str:
        """The shortest text that is at such a place in a list: a tag is `x`, and those before it are left out."""
        tags = self.tags_in(written)
        rest = written[tags[-1][1] if tags else len(self.beginning) :]
        if not written.startswith(self.beginning):
            return written
        if tags and not rest.startswith(", "):
            return f"{self.beginning}'x'{rest}"
        rest = rest.removeprefix(", ") if tags else rest
        return self.beginning + (f"{rest[0]}x" if len(rest) > 1 else rest)

    def new_state(self) -> OpenState:
        return OpenState(self)


class OpenState:
    """The way of one answer through Open."""

    def __init__(self, grammar: OpenVocabulary) -> None:
        self._grammar = grammar
        self._ids: list[int] = []
        self.try_write = ""
        self._confidence = 1.0
        self.tags: list[tuple[str, float]] = []
        self.closed = False

    def step(self, logits: torch.Tensor, log_total: torch.Tensor) -> int:
        grammar = self._grammar
        if self.closed:
            return grammar.end
        allowed = grammar.allowed(self.try_write).to(logits.device)
        values = logits[: len(allowed)].float().masked_fill(~allowed, -torch.inf)
        chosen = int(values.argmax())
        [written] = grammar.decode([[*self._ids, chosen]])
        found = grammar.tags_in(written)
        tags = [written[start + 1 : end - 1].strip() for start, end in found]
        # the last: of a tokenizer that cannot write a list
        if len(set(tags)) < len(tags) or values[chosen] == -torch.inf:
            self.closed = True
            return grammar.end
        if len(tags) == len(self.tags):
            self._confidence *= float((values[chosen] - log_total).exp())
        else:  # what comes after the tag's quote, a comma or a bracket, is not the tag's
            same = grammar.tokens_starting_with(written[len(self.try_write) : found[-1][1]]) & allowed
            self.tags.append((tags[-1], self._confidence * float((values[same] - log_total).exp().sum())))
            self._confidence = 1.0
        self._ids.append(chosen)
        self.try_write = written
        self.closed = len(tags) == grammar.most or grammar.list.fullmatch(written) is not None
        return chosen
