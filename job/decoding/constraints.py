"""Constrained decoding: token by token, allow only lists of distinct tags, of any tags or of known ones."""

from __future__ import annotations

import ast
import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import regex
import torch

from job.dataset.tokenization import AnswerTokenizer

ESCAPE = regex.compile(r"""\\(?:[\\'"nrt]|x[0-9a-f]{2}|u(?!d[89a-f])[0-9a-f]{4}|U(?:000[1-9a-f]|0010)[0-9a-f]{4})""")
"""Matches an escape sequence of those that `repr` writes; lone surrogates are no text."""
TAG = "|".join(
    rf"{quote}(?:[^{quote}\\\s\p{{Cc}}]|{ESCAPE.pattern})[^{quote}\\\p{{Cc}}]*"
    rf"(?:{ESCAPE.pattern}[^{quote}\\\p{{Cc}}]*)*{quote}"
    for quote in "'\""
)
"""Matches a tag as `repr` writes it."""
REPLACEMENT = "\ufffd"
"""What decoders write for bytes that are not UTF-8."""


class DecoderState(Protocol):
    """The state of one answer that is being decoded."""

    tags: list[tuple[str, float]]
    """Complete tags, each with its confidence: the product of the model's probabilities of its tokens."""
    closed: bool
    """Whether the list has ended: by its bracket, by max_tags, or before a tag that it already contains.

    A model that repeats a tag has no more to say: other tags in that position are mostly wrong.
    """

    @property
    def end(self) -> int:
        """The token that follows a closed list."""

    def step(self, logits: torch.Tensor, log_total: float) -> int:
        """Append the most likely allowed token, and return it.

        `logits` is [vocabulary], `log_total` their logsumexp.
        """


def constrain(states: Sequence[DecoderState], logits: torch.Tensor) -> torch.Tensor:
    """Advance each state by a token; return logits that allow only this token.

    Logits, given and returned, are [states, vocabulary]; the returned ones are 0 or -inf.
    """
    tokens = [state.end for state in states]
    for kind, step in ((ClosedState, _step_closed), (OpenState, _step_open)):
        rows = [row for row, state in enumerate(states) if isinstance(state, kind) and not state.closed]
        if rows:
            chosen: Any = [states[row] for row in rows]
            for row, token in zip(rows, step(chosen, logits[torch.tensor(rows, device=logits.device)]), strict=True):
                tokens[row] = token
    constrained = torch.full_like(logits, -torch.inf)
    return constrained.scatter_(1, torch.tensor(tokens, device=logits.device)[:, None], 0.0)


def _step_closed(states: Sequence[ClosedState], logits: torch.Tensor) -> list[int]:
    """Advance states by a token each; all logits are fetched at once, because each transfer waits for the device."""
    columns = [state.columns for state in states]
    counts = [len(index) for index in columns]
    rows = torch.arange(len(states)).repeat_interleave(torch.tensor(counts))
    values = logits[rows.to(logits.device), torch.cat(columns).to(logits.device)].float()
    fetched = torch.cat([values, logits.float().logsumexp(-1)]).cpu()
    of_states = torch.split(fetched[: len(values)], counts)
    pairs = zip(states, of_states, fetched[len(values) :].tolist(), strict=True)
    return [state.choose(own, log_total) for state, own, log_total in pairs]


def _step_open(states: Sequence[OpenState], logits: torch.Tensor) -> list[int]:
    """Advance states by a token each; what is most likely is fetched at once."""
    values = torch.stack([state.allowed_logits(row) for state, row in zip(states, logits, strict=True)])
    highest, best = values.max(-1)
    fetched = torch.stack([best.double(), highest.double(), logits.float().logsumexp(-1).double()], 1).tolist()
    return [
        state.choose(own, int(token), value, log_total)
        for state, own, (token, value, log_total) in zip(states, values, fetched, strict=True)
    ]


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

    A tag has four forms: first in the list or after another tag, and followed by another tag or by the end. An answer
    has exactly the token ids that training uses for the list.
    """

    def __init__(self, answers: AnswerTokenizer, tags: Iterable[str], max_tags: int) -> None:
        self.max_tags = max_tags
        self.end = answers.end
        self.root, self.next_root = TrieNode(), TrieNode()
        """Where the first tag of a list starts, and where each later one does."""
        self.separator_ids: dict[TrieNode, dict[str, list[int]]] = {}
        """For either root: by tag, the token ids of the tag and the comma after it."""
        self.same_tokens: dict[str, str] = {}
        """Tags that are left out, because the tokenizer cannot tell them from the tags that they are mapped to."""
        names = list(dict.fromkeys(tags))
        forms = {
            (first, last): answers.tag_ids(names, first=first, last=last)
            for first in (True, False)
            for last in (True, False)
        }
        known: dict[tuple[bool, bool, tuple[int, ...]], str] = {}
        for n, tag in enumerate(names):
            keys = [(*form, tuple(ids[n])) for form, ids in forms.items()]
            if other := next((known[key] for key in keys if key in known), None):
                self.same_tokens[tag] = other
            else:
                known |= dict.fromkeys(keys, tag)
        for (first, last), ids_by_number in forms.items():
            root = self.root if first else self.next_root
            ids_by_tag = {
                tag: ids for tag, ids in zip(names, ids_by_number, strict=True) if tag not in self.same_tokens
            }
            for tag, ids in ids_by_tag.items():
                root.add(ids, tag, ends_list=last)
            if not last:
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

    @property
    def end(self) -> int:
        return self._vocabulary.end

    @property
    def columns(self) -> torch.Tensor:
        """The tokens that may be next, int64 [tokens]."""
        return self._node.index

    def step(self, logits: torch.Tensor, log_total: float) -> int:
        return self.end if self.closed else self.choose(logits[self.columns].float(), log_total)

    def choose(self, values: torch.Tensor, log_total: float) -> int:
        """Append the most likely token of `columns`, whose logits are `values`, float32 on the CPU; return it."""
        node = self._node
        best = int(values.argmax())
        child = node.children[node.ids[best]]
        if child.tags <= {tag for tag, _ in self.tags}:
            self.closed = True
            return self.end
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

    Tags are written as Python string literals, and do not start with white space.
    """

    def __init__(self, answers: AnswerTokenizer, max_tags: int) -> None:
        self.max_tags = max_tags
        self.end = answers.end
        self.decode = answers.decode
        self._opening = answers.opening
        tag = f"(?P<tag>{TAG})"
        self.pattern = regex.compile(rf"{regex.escape(self._opening)}{tag}(?:, {tag})*\]")
        """Matches a complete list; matches the start of one with `partial=True`."""
        self.byte_values = answers.byte_values
        tokenizer = answers.tokenizer
        token_texts = self.decode([[i] for i in range(answers.num_ids)])
        never = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
        never |= {i for i, value in self.byte_values.items() if incomplete_character(bytes([value])) is None}
        self._token_texts = ["" if i in never else text for i, text in enumerate(token_texts)]
        self._openings = self._partial_openings(answers)
        self._allowed: dict[str | bytes, torch.Tensor] = {}
        self._on_device: dict[int, torch.Tensor] = {}
        self._starting_with: dict[str, torch.Tensor] = {}

    def _partial_openings(self, answers: AnswerTokenizer) -> dict[str, set[int]]:
        """Return what training writes before the opening is complete, each with the tokens that follow it.

        White space of several bytes, or that the tokenizer does not know, has no tokens whose own text is part of it.
        """
        found: dict[str, set[int]] = {}
        for ids in answers.encode([["x"], ["'"]]):  # a tag in either quote
            for n, token in enumerate(ids):
                [text] = self.decode([ids[:n]])
                if text.startswith(self._opening):
                    break
                found.setdefault(text, set()).add(token)
        return found

    def allowed(self, text: str, incomplete: bytes = b"") -> torch.Tensor:
        """Return which tokens may follow the start of a list, as bool [tokens]; cached by canonical prefix.

        `incomplete` are the bytes of an incomplete character at the end of the text.
        """
        if incomplete and text not in self._openings:
            if incomplete not in self._allowed:
                continuing = [
                    i
                    for i, value in self.byte_values.items()
                    if incomplete_character(incomplete + bytes([value])) is not None
                ]
                self._allowed[incomplete] = torch.zeros(len(self._token_texts), dtype=torch.bool)
                self._allowed[incomplete][continuing] = True
            return self._allowed[incomplete]
        prefix = self.canonical_prefix(text)
        if prefix not in self._allowed:
            fits = [
                bool(token) and self.pattern.fullmatch(prefix + token, partial=True) is not None
                for token in self._token_texts
            ]
            self._allowed[prefix] = torch.tensor(fits)
            self._allowed[prefix][list(self._openings.get(text, ()))] = True
        return self._allowed[prefix]

    def allowed_on(self, device: torch.device, text: str, incomplete: bytes = b"") -> torch.Tensor:
        """Return what `allowed` does, on a device; cached there too."""
        found = self.allowed(text, incomplete)
        if device.type == "cpu":
            return found
        if id(found) not in self._on_device:  # `allowed` keeps what it returns, so that the id remains its
            self._on_device[id(found)] = found.to(device)
        return self._on_device[id(found)]

    def tokens_ending_tag(self, token: int, rest: str) -> torch.Tensor:
        """Return which tokens end a tag with the same characters as a token does, as bool [tokens].

        `rest` is what the token writes after the quote of the tag.
        """
        text = self._token_texts[token].removesuffix(rest)
        if text not in self._starting_with:
            self._starting_with[text] = torch.tensor([other.startswith(text) for other in self._token_texts])
        return self._starting_with[text]

    def tag_spans(self, text: str) -> list[tuple[int, int]] | None:
        """Return start and end of each complete tag, quotes included; None if the text does not start a list."""
        match = self.pattern.fullmatch(text, partial=True)
        if match is not None:
            return list(match.spans("tag"))
        return [] if text in self._openings else None

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
        characters, backslash, escape = str(ESCAPE.sub("x", rest[1:])).partition("\\")
        return self._opening + rest[:1] + ("x" if characters else "") + backslash + escape

    def new_state(self) -> OpenState:
        """Return the state of an answer without tokens."""
        return OpenState(self)


def incomplete_character(text: bytes) -> bytes | None:
    """Return the start of a character that UTF-8 ends in, b"" if there is none; None if it is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        decoder.decode(text)
    except UnicodeDecodeError:
        return None
    return decoder.getstate()[0]


class OpenState:
    """The state of one answer from an OpenVocabulary."""

    def __init__(self, vocabulary: OpenVocabulary) -> None:
        self._vocabulary = vocabulary
        self._ids: list[int] = []
        self._text = ""
        self._incomplete = b""
        """The bytes of an incomplete character at the end of the text."""
        self._confidence = 1.0
        self.tags: list[tuple[str, float]] = []
        self.closed = False

    @property
    def end(self) -> int:
        return self._vocabulary.end

    def step(self, logits: torch.Tensor, log_total: float) -> int:
        if self.closed:
            return self.end
        values = self.allowed_logits(logits)
        best = int(values.argmax())
        return self.choose(values, best, float(values[best]), log_total)

    def allowed_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """Return float32 logits [tokens that have a text], -inf where a token may not follow."""
        allowed = self._vocabulary.allowed_on(logits.device, self._text, self._incomplete)[: len(logits)]
        return logits[: len(allowed)].float().masked_fill(~allowed, -torch.inf)

    def choose(self, values: torch.Tensor, best: int, highest: float, log_total: float) -> int:
        """Append the most likely token, and return it.

        `values` are the allowed logits [tokens]; `best` is the place of the largest one, `highest`. Tokens that turn
        out not to be allowed get the value -inf.
        """
        written = None
        while highest != -torch.inf and (written := self._with(best)) is None:
            values[best] = -torch.inf
            best = int(values.argmax())
            highest = float(values[best])
        if written is None or written.tag in dict(self.tags):  # None is allowed where the tokenizer cannot write lists
            self.closed = True
            return self.end
        vocabulary = self._vocabulary
        if written.tag is None:
            self._confidence *= float((torch.tensor(highest) - log_total).exp())
        else:  # the tag ends with its quote: a comma or bracket in the same token is not part of it
            allowed = vocabulary.allowed(self._text, self._incomplete)
            same = (vocabulary.tokens_ending_tag(best, written.rest) & allowed)[: len(values)]
            probability = float((values[same.to(values.device)] - log_total).exp().sum())
            self.tags.append((written.tag, self._confidence * probability))
            self._confidence = 1.0
        self._ids.append(best)
        self._text, self._incomplete = written.text, written.incomplete
        self.closed = len(self.tags) == vocabulary.max_tags or vocabulary.pattern.fullmatch(written.text) is not None
        return best

    def _with(self, token: int) -> _Written | None:
        """Return the answer with one more token; None if that is no list, or changes what was written before.

        The tokens are decoded together: what one writes can depend on those before it.
        """
        vocabulary, ids, incomplete = self._vocabulary, [*self._ids, token], b""
        if token in vocabulary.byte_values:
            incomplete = incomplete_character(self._incomplete + bytes([vocabulary.byte_values[token]])) or b""
        # an incomplete character would make some decoders lose the complete one before it
        [text] = vocabulary.decode([ids[: len(ids) - len(incomplete)]])
        text += REPLACEMENT * len(incomplete)
        spans = vocabulary.tag_spans(text)
        if spans is None or not text.startswith(self._text.rstrip(REPLACEMENT)):
            return None
        if len(spans) == len(self.tags):
            return _Written(text, incomplete, None, "")
        start, end = spans[-1]
        tag = unquote(text[start:end])
        return _Written(text, incomplete, tag, text[end:]) if tag and len(spans) == len(self.tags) + 1 else None


class _Written(NamedTuple):
    """An answer with the token that was added last."""

    text: str
    incomplete: bytes
    tag: str | None
    """The tag that the token has completed."""
    rest: str
    """What follows this tag in the text."""


def unquote(literal: str) -> str:
    """Return the tag that a string literal stands for, without surrounding white space."""
    return str(ast.literal_eval(literal) if "\\" in literal else literal[1:-1]).strip()
