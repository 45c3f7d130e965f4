"""The search finds each likely tag with the probability that scoring it on its own gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import CPU, make_settings

from job.grammar import Vocabulary
from job.likely import likely_tags
from job.quantize import load_model, load_tokenizer

TAGS = ("music", "rain", "rainfall", "rain again", "don't", "the sea", "sea", "seaside", "sea salt", "a, b")


@pytest.mark.parametrize("architecture", ["bloom", "llama"])
def test_a_tag_is_as_likely_as_its_ways_of_being_written(
    request: pytest.FixtureRequest, tmp_path: Path, architecture: str
) -> None:
    settings = make_settings(request.getfixturevalue(architecture), tmp_path)
    model, tokenizer = load_model(settings.base, CPU).eval(), load_tokenizer(settings.base)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(5)  # sure of something: random weights are of nothing
    prompts = [tokenizer(text).input_ids for text in ("a song ->:", "a much longer text about the rain ->:")]
    width = max(map(len, prompts))
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    start = Vocabulary(tokenizer, TAGS, " ", 9).first

    def alone(prompt: list[int], tag: str) -> float:
        """Summed over the tokens up to where no other tag is left."""
        others = [tokenizer(f" [{other!r}{end}").input_ids for other in TAGS if other != tag for end in ",]"]
        ways = set()
        for end in ",]":
            way = tokenizer(f" [{tag!r}{end}").input_ids
            n = next(n for n in range(1, len(way) + 1) if not any(other[:n] == way[:n] for other in others))
            ways.add(tuple(way[:n]))
        total = 0.0
        for way in ways:
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([[*prompt, *way]])).logits[0].float().log_softmax(-1)
            total += float(sum(logits[len(prompt) + n - 1, i] for n, i in enumerate(way)).exp())
        return total

    expected = [{tag: alone(prompt, tag) for tag in TAGS} for prompt in prompts]
    with torch.inference_mode():
        everything = likely_tags(model, ids, mask, start, 0.0)
    for found, scores in zip(everything, expected, strict=True):
        assert found == pytest.approx(scores, rel=1e-3, abs=0.0)
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("job.likely.WAYS", 1)  # which changes how many are followed at once, and nothing else
        few_at_once = likely_tags(model, ids, mask, start, 0.0)
    for found, scores in zip(few_at_once, expected, strict=True):
        assert found == pytest.approx(scores, rel=1e-3, abs=0.0)
    for threshold in sorted({value for scores in expected for value in scores.values()}):
        with torch.inference_mode():
            some = likely_tags(model, ids, mask, start, threshold * 0.99)
        assert [set(tags) for tags in some] == [
            {tag for tag, value in scores.items() if value >= threshold * 0.99} for scores in expected
        ]
