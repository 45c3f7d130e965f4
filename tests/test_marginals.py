"""The search gives each tag the probability that scoring its tokens without a cache gives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, make_settings

from job.dataset.tokenization import AnswerTokenizer
from job.decoding.constraints import ClosedVocabulary
from job.decoding.marginals import TagDistribution, tag_marginals
from job.quantize import load_model, load_tokenizer

TAGS = ("music", "rain", "rainfall", "rain again", "don't", "the sea", "sea", "seaside", "sea salt", "a, b")


@dataclass
class Scorer:
    """A small model with peaked probabilities, and the expected results, scored one token sequence at a time."""

    model: Any
    tokenizer: Any
    prompts: list[list[int]]
    tags: tuple[str, ...] = TAGS

    def search(self, *, max_positions: int = 1, token_budget: int = 1000) -> list[TagDistribution]:
        vocabulary = ClosedVocabulary(AnswerTokenizer(self.tokenizer, " ->: "), self.tags, 9)
        width = max(map(len, self.prompts))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in self.prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in self.prompts])
        with torch.inference_mode():
            return tag_marginals(
                self.model, ids, mask, vocabulary, max_positions=max_positions, token_budget=token_budget
            )

    def tag_ids(self, tag: str, end: str, *, first: bool) -> list[int]:
        return list(self.tokenizer(f"{' [' if first else ' '}{tag!r}{end}").input_ids)

    def probability(self, prompt: list[int], ids: list[int]) -> float:
        with torch.inference_mode():
            logits = self.model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0].float().log_softmax(-1)
        return float(sum(logits[len(prompt) + n - 1, i] for n, i in enumerate(ids)).exp())

    def next(self, prompt: list[int], *, first: bool, token_budget: int = 1000) -> dict[str, float]:
        """Return P(tag comes next): the sum over its two forms, up to the token that no other tag has in its place.

        The tokens before this one have to fit into the token budget.
        """
        forms = {(tag, end): self.tag_ids(tag, end, first=first) for tag in self.tags for end in ",]"}
        found = {}
        for tag in self.tags:
            others = [ids for (other, _), ids in forms.items() if other != tag]
            prefixes = set()
            for ids in (forms[tag, end] for end in ",]"):
                n = next(n for n in range(1, len(ids) + 1) if not any(other[:n] == ids[:n] for other in others))
                if n - 1 <= token_budget:
                    prefixes.add(tuple(ids[:n]))
            if prefixes:
                found[tag] = sum(self.probability(prompt, list(ids)) for ids in prefixes)
        return found

    def expected(self, prompt: list[int], max_positions: int, token_budget: int = 1000) -> TagDistribution:
        """Return what the search should find; `continue_probs` has P(another tag) after each tag of the list."""
        self.continue_probs: list[float] = []
        missed, greedy_tags, continue_prob = dict[str, float](), list[str](), 1.0
        for position in range(max_positions):
            found = self.next(prompt, first=position == 0, token_budget=token_budget)
            new = {tag: value for tag, value in found.items() if tag not in greedy_tags}
            for tag, value in new.items():
                missed[tag] = missed.get(tag, 1.0) * (1 - continue_prob * value)
            if not new:
                break
            best = max(new, key=lambda tag: new[tag])
            greedy_tags.append(best)
            ids = self.tag_ids(best, ",", first=position == 0)
            token_budget -= len(ids)
            if token_budget < 0 or position + 1 == max_positions:
                break
            continue_prob *= min(1.0, self.probability(prompt, ids) / new[best])
            self.continue_probs.append(continue_prob)
            prompt = prompt + ids
        return TagDistribution({tag: 1 - value for tag, value in missed.items()}, greedy_tags, continue_prob)


@pytest.fixture(params=["bloom", "llama"])
def scorer(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scorer:
    settings = make_settings(request.getfixturevalue(request.param), tmp_path)
    model, tokenizer = load_model(settings.base, CPU).eval(), load_tokenizer(settings.base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim == 2 else 1)  # random weights alone give nearly equal probabilities
    monkeypatch.setattr("job.decoding.marginals.MIN_PROBABILITY", 0.0)
    monkeypatch.setattr("job.decoding.marginals.MIN_CONTINUE_PROB", 0.0)
    texts = ("a song ->:", "a much longer text about the rain ->:", "x ->:")
    return Scorer(model, tokenizer, [tokenizer(text).input_ids for text in texts])


def test_a_tag_has_the_probability_of_its_token_sequences(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [scorer.next(prompt, first=True) for prompt in scorer.prompts]
    for rows in (8, 1):  # the result does not depend on how many branches share a forward pass
        monkeypatch.setattr("job.decoding.marginals.MAX_BRANCHES_PER_TEXT", rows)
        for found, scores in zip(scorer.search(), expected, strict=True):
            assert found.tags == pytest.approx(scores, rel=1e-3, abs=0.0)
    for threshold in sorted({value for scores in expected for value in scores.values()}):
        monkeypatch.setattr("job.decoding.marginals.MIN_PROBABILITY", threshold * 0.99)
        assert [set(found.tags) for found in scorer.search()] == [
            {tag for tag, value in scores.items() if value >= threshold * 0.99} for scores in expected
        ]


def test_a_tag_may_be_in_any_position_of_the_list(scorer: Scorer) -> None:
    scorer.tags = tuple(tag for tag in TAGS if "'" not in tag)  # else all lists start with this tag's double quote
    for max_positions in (2, 4):
        expected = [scorer.expected(prompt, max_positions) for prompt in scorer.prompts]
        lengths = {len(scorer.tag_ids(wanted.greedy_tags[0], ",", first=True)) for wanted in expected}
        assert len(lengths) > 1, "lists of equal length leave no gaps in the mask"
        for found, wanted in zip(scorer.search(max_positions=max_positions), expected, strict=True):
            assert found.greedy_tags == wanted.greedy_tags
            assert found.tags == pytest.approx(wanted.tags, rel=1e-3, abs=0.0)
            assert found.continue_prob == pytest.approx(wanted.continue_prob, rel=1e-3)


def test_a_list_is_extended_while_another_tag_is_likely(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    continue_probs = []
    for prompt in scorer.prompts:
        scorer.expected(prompt, 3)
        continue_probs.append(scorer.continue_probs)
    for least in sorted(value * 1.01 for values in continue_probs for value in values):
        monkeypatch.setattr("job.decoding.marginals.MIN_CONTINUE_PROB", least)
        lengths = [1 + next((n for n, value in enumerate(values) if value < least), 2) for values in continue_probs]
        assert [len(found.greedy_tags) for found in scorer.search(max_positions=3)] == lengths


def test_a_list_does_not_exceed_its_token_budget(scorer: Scorer) -> None:
    for token_budget in range(14):
        for prompt, found in zip(
            scorer.prompts, scorer.search(max_positions=3, token_budget=token_budget), strict=True
        ):
            expected = scorer.expected(prompt, 3, token_budget)
            assert found.greedy_tags == expected.greedy_tags, token_budget
            assert found.tags == pytest.approx(expected.tags, rel=1e-3, abs=0.0)


def test_probabilities_in_several_positions_are_combined() -> None:
    distribution = TagDistribution()
    assert distribution.add({"sea": 0.6, "rain": 0.5, "music": 0.009}) == "sea"
    assert distribution.add({"sea": 0.9, "rain": 0.5, "music": 0.02}) == "rain"
    assert distribution.add({"sea": 0.9, "rain": 0.9}) is None
    assert distribution.greedy_tags == ["sea", "rain"]
    assert distribution.tags == pytest.approx({"sea": 0.6, "rain": 0.75, "music": 0.02})
    certain = TagDistribution()
    certain.add({"sea": 1.0000001})  # rounding of a sum
    assert certain.tags == {"sea": 1.0}
