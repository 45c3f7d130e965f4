"""The search finds each likely tag with the probability that scoring it on its own gives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, make_settings

from job.decoding.constraints import ClosedVocabulary
from job.decoding.marginals import TagDistribution, tag_marginals
from job.quantize import load_model, load_tokenizer

TAGS = ("music", "rain", "rainfall", "rain again", "don't", "the sea", "sea", "seaside", "sea salt", "a, b")


@dataclass
class Scorer:
    """A small model that is sure of something, and the probabilities that come of scoring one way at a time."""

    model: Any
    tokenizer: Any
    prompts: list[list[int]]
    tags: tuple[str, ...] = TAGS

    def search(self, *, max_positions: int = 1, room: int = 1000) -> list[TagDistribution]:
        vocabulary = ClosedVocabulary(self.tokenizer, self.tags, " ", 9)
        width = max(map(len, self.prompts))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in self.prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in self.prompts])
        with torch.inference_mode():
            return tag_marginals(self.model, ids, mask, vocabulary, max_positions=max_positions, room=room)

    def way(self, tag: str, end: str, *, first: bool) -> list[int]:
        return list(self.tokenizer(f"{' [' if first else ' '}{tag!r}{end}").input_ids)

    def probability(self, prompt: list[int], way: list[int]) -> float:
        with torch.inference_mode():
            logits = self.model(input_ids=torch.tensor([[*prompt, *way]])).logits[0].float().log_softmax(-1)
        return float(sum(logits[len(prompt) + n - 1, i] for n, i in enumerate(way)).exp())

    def next(self, prompt: list[int], *, first: bool, room: int = 1000) -> dict[str, float]:
        """Each tag's probability, summed over the tokens up to where no other tag is left, if there is room for them.

        The last of these need not be written.
        """
        ways = {(tag, end): self.way(tag, end, first=first) for tag in self.tags for end in ",]"}
        found = {}
        for tag in self.tags:
            others = [way for (other, _), way in ways.items() if other != tag]
            until = set()
            for way in (ways[tag, end] for end in ",]"):
                n = next(n for n in range(1, len(way) + 1) if not any(other[:n] == way[:n] for other in others))
                if n - 1 <= room:
                    until.add(tuple(way[:n]))
            if until:
                found[tag] = sum(self.probability(prompt, list(way)) for way in until)
        return found

    def along_the_likeliest(self, prompt: list[int], max_positions: int, room: int = 1000) -> TagDistribution:
        """What the search should find, with how likely the list goes on after each of its tags in `followed`."""
        self.followed: list[float] = []
        missed, written, goes_on = dict[str, float](), list[str](), 1.0
        for place in range(max_positions):
            found = self.next(prompt, first=place == 0, room=room)
            new = {tag: value for tag, value in found.items() if tag not in written}
            for tag, value in new.items():
                missed[tag] = missed.get(tag, 1.0) * (1 - goes_on * value)
            if not new:
                break
            best = max(new, key=lambda tag: new[tag])
            written.append(best)
            way = self.way(best, ",", first=place == 0)
            room -= len(way)
            if room < 0 or place + 1 == max_positions:
                break
            goes_on *= min(1.0, self.probability(prompt, way) / new[best])
            self.followed.append(goes_on)
            prompt = prompt + way
        return TagDistribution({tag: 1 - value for tag, value in missed.items()}, written, goes_on)


@pytest.fixture(params=["bloom", "llama"])
def scorer(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scorer:
    settings = make_settings(request.getfixturevalue(request.param), tmp_path)
    model, tokenizer = load_model(settings.base, CPU).eval(), load_tokenizer(settings.base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim == 2 else 1)  # random weights are sure of nothing, whatever the text
    monkeypatch.setattr("job.decoding.marginals.MIN_PROBABILITY", 0.0)
    monkeypatch.setattr("job.decoding.marginals.MIN_CONTINUE_PROB", 0.0)
    texts = ("a song ->:", "a much longer text about the rain ->:", "x ->:")
    return Scorer(model, tokenizer, [tokenizer(text).input_ids for text in texts])


def test_a_tag_is_as_likely_as_its_ways_of_being_written(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [scorer.next(prompt, first=True) for prompt in scorer.prompts]
    for ways in (8, 1):  # which changes how many are followed at once, and nothing else
        monkeypatch.setattr("job.decoding.marginals.BEAM_ROWS", ways)
        for found, scores in zip(scorer.search(), expected, strict=True):
            assert found.tags == pytest.approx(scores, rel=1e-3, abs=0.0)
    for threshold in sorted({value for scores in expected for value in scores.values()}):
        monkeypatch.setattr("job.decoding.marginals.MIN_PROBABILITY", threshold * 0.99)
        assert [set(found.tags) for found in scorer.search()] == [
            {tag for tag, value in scores.items() if value >= threshold * 0.99} for scores in expected
        ]


def test_a_tag_may_be_in_any_place_of_the_likeliest_list(scorer: Scorer) -> None:
    scorer.tags = tuple(tag for tag in TAGS if "'" not in tag)  # that quote would be the likeliest way to begin
    for places in (2, 4):
        expected = [scorer.along_the_likeliest(prompt, places) for prompt in scorer.prompts]
        lengths = {len(scorer.way(likely.written[0], ",", first=True)) for likely in expected}
        assert len(lengths) > 1, "lists of one length leave no holes"
        for found, likely in zip(scorer.search(max_positions=places), expected, strict=True):
            assert found.written == likely.written
            assert found.tags == pytest.approx(likely.tags, rel=1e-3, abs=0.0)
            assert found.continue_prob == pytest.approx(likely.continue_prob, rel=1e-3)


def test_a_list_is_followed_until_it_hardly_goes_on(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    for prompt in scorer.prompts:
        scorer.along_the_likeliest(prompt, 3)
        ends.append(scorer.followed)
    for least in sorted(value * 1.01 for goes_on in ends for value in goes_on):
        monkeypatch.setattr("job.decoding.marginals.MIN_CONTINUE_PROB", least)
        followed = [1 + next((n for n, value in enumerate(goes_on) if value < least), 2) for goes_on in ends]
        assert [len(found.written) for found in scorer.search(max_positions=3)] == followed


def test_nothing_is_written_beyond_the_tokens_there_is_room_for(scorer: Scorer) -> None:
    for room in range(14):
        for prompt, found in zip(scorer.prompts, scorer.search(max_positions=3, room=room), strict=True):
            expected = scorer.along_the_likeliest(prompt, 3, room)
            assert found.written == expected.written, room
            assert found.tags == pytest.approx(expected.tags, rel=1e-3, abs=0.0)


def test_a_tag_s_chances_in_several_places_are_chances_of_one_thing() -> None:
    likely = TagDistribution()
    assert likely.add({"sea": 0.6, "rain": 0.5, "music": 0.009}) == "sea"
    assert likely.add({"sea": 0.9, "rain": 0.5, "music": 0.02}) == "rain"
    assert likely.add({"sea": 0.9, "rain": 0.9}) is None
    assert likely.written == ["sea", "rain"]
    assert likely.tags == pytest.approx({"sea": 0.6, "rain": 0.75, "music": 0.02})
    certain = TagDistribution()
    certain.add({"sea": 1.0000001})  # as sums of rounded numbers may be
    assert certain.tags == {"sea": 1.0}
