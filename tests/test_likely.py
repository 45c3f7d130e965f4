"""The search finds each likely tag with the probability that scoring it on its own gives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, make_settings

from job.grammar import Vocabulary
from job.likely import Likely, likely_tags
from job.quantize import load_model, load_tokenizer

TAGS = ("music", "rain", "rainfall", "rain again", "don't", "the sea", "sea", "seaside", "sea salt", "a, b")


@dataclass
class Scorer:
    """A small model that is sure of something, and the probabilities that come of scoring one way at a time."""

    model: Any
    tokenizer: Any
    prompts: list[list[int]]

    def __post_init__(self) -> None:
        self.vocabulary = Vocabulary(self.tokenizer, TAGS, " ", 9)

    def search(self, *, places: int = 1, room: int = 1000) -> list[Likely]:
        width = max(map(len, self.prompts))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in self.prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in self.prompts])
        with torch.inference_mode():
            return likely_tags(self.model, ids, mask, self.vocabulary, places=places, room=room)

    def way(self, tag: str, end: str, *, first: bool) -> list[int]:
        return list(self.tokenizer(f"{' [' if first else ' '}{tag!r}{end}").input_ids)

    def probability(self, prompt: list[int], way: list[int]) -> float:
        with torch.inference_mode():
            logits = self.model(input_ids=torch.tensor([[*prompt, *way]])).logits[0].float().log_softmax(-1)
        return float(sum(logits[len(prompt) + n - 1, i] for n, i in enumerate(way)).exp())

    def next(self, prompt: list[int], *, first: bool) -> dict[str, float]:
        """Each tag's probability, summed over the tokens up to where no other tag is left."""
        ways = {(tag, end): self.way(tag, end, first=first) for tag in TAGS for end in ",]"}
        found = {}
        for tag in TAGS:
            others = [way for (other, _), way in ways.items() if other != tag]
            until = set()
            for way in (ways[tag, end] for end in ",]"):
                n = next(n for n in range(1, len(way) + 1) if not any(other[:n] == way[:n] for other in others))
                until.add(tuple(way[:n]))
            found[tag] = sum(self.probability(prompt, list(way)) for way in until)
        return found

    def along_the_likeliest(self, prompt: list[int], places: int) -> tuple[dict[str, float], list[str], list[float]]:
        """Each tag's probability of being in the list, that list, and how likely it goes on after each of its tags."""
        missed, written, goes_on = dict.fromkeys(TAGS, 1.0), list[str](), [1.0]
        for place in range(places):
            found = self.next(prompt, first=place == 0)
            new = {tag: value for tag, value in found.items() if tag not in written}
            for tag, value in new.items():
                missed[tag] *= 1 - goes_on[-1] * value
            best = max(new, key=lambda tag: new[tag])
            way = self.way(best, ",", first=place == 0)
            goes_on.append(goes_on[-1] * min(1.0, self.probability(prompt, way) / new[best]))
            written.append(best)
            prompt = prompt + way
        return {tag: 1 - value for tag, value in missed.items()}, written, goes_on[1:]


@pytest.fixture(params=["bloom", "llama"])
def scorer(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scorer:
    settings = make_settings(request.getfixturevalue(request.param), tmp_path)
    model, tokenizer = load_model(settings.base, CPU).eval(), load_tokenizer(settings.base)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(5)  # random weights are sure of nothing
    monkeypatch.setattr("job.likely.LEAST", 0.0)
    monkeypatch.setattr("job.likely.GOES_ON", 0.0)
    texts = ("a song ->:", "a much longer text about the rain ->:", "the sea ->:")
    return Scorer(model, tokenizer, [tokenizer(text).input_ids for text in texts])


def test_a_tag_is_as_likely_as_its_ways_of_being_written(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [scorer.next(prompt, first=True) for prompt in scorer.prompts]
    for ways in (8, 1):  # which changes how many are followed at once, and nothing else
        monkeypatch.setattr("job.likely.WAYS", ways)
        for found, scores in zip(scorer.search(), expected, strict=True):
            assert found.tags == pytest.approx(scores, rel=1e-3, abs=0.0)
    for threshold in sorted({value for scores in expected for value in scores.values()}):
        monkeypatch.setattr("job.likely.LEAST", threshold * 0.99)
        assert [set(found.tags) for found in scorer.search()] == [
            {tag for tag, value in scores.items() if value >= threshold * 0.99} for scores in expected
        ]


def test_a_tag_may_be_in_any_place_of_the_likeliest_list(scorer: Scorer) -> None:
    for places in (2, 4):
        for found, prompt in zip(scorer.search(places=places), scorer.prompts, strict=True):
            tags, written, goes_on = scorer.along_the_likeliest(prompt, places)
            assert found.written == written
            assert found.tags == pytest.approx(tags, rel=1e-3, abs=0.0)
            assert found.goes_on == pytest.approx(goes_on[places - 2], rel=1e-3)


def test_a_list_is_followed_until_it_hardly_goes_on(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = [scorer.along_the_likeliest(prompt, 3)[2] for prompt in scorer.prompts]
    for least in sorted(value * 1.01 for goes_on in ends for value in goes_on[:2]):
        monkeypatch.setattr("job.likely.GOES_ON", least)
        followed = [1 + next((n for n, value in enumerate(goes_on[:2]) if value < least), 2) for goes_on in ends]
        assert [len(found.written) for found in scorer.search(places=3)] == followed


def test_a_list_is_not_followed_beyond_the_tokens_there_is_room_for(scorer: Scorer) -> None:
    alone = scorer.search()
    for prompt, found, one in zip(scorer.prompts, scorer.search(places=3, room=1), alone, strict=True):
        assert (found.written, found.tags) == (one.written, pytest.approx(one.tags)), prompt
    ways = [len(scorer.way(found.written[0], ",", first=True)) for found in alone]
    room = min(ways)
    assert [len(found.written) for found in scorer.search(places=2, room=room)] == [1 + (n <= room) for n in ways]


def test_a_tag_s_chances_in_several_places_are_chances_of_one_thing() -> None:
    likely = Likely()
    assert likely.add({"sea": 0.6, "rain": 0.5, "music": 0.009}) == "sea"
    assert likely.add({"sea": 0.9, "rain": 0.5, "music": 0.02}) == "rain"
    assert likely.add({"sea": 0.9, "rain": 0.9}) is None
    assert likely.written == ["sea", "rain"]
    assert likely.tags == pytest.approx({"sea": 0.6, "rain": 0.75, "music": 0.02})
    certain = Likely()
    certain.add({"sea": 1.0000001})  # as sums of rounded numbers may be
    assert certain.tags == {"sea": 1.0}
