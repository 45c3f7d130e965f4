"""Measure what constrained decoding costs: `python -m bench.constraints`. Prints milliseconds per token and text."""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList

from bench.bases import BASES, model_setting
from job import data
from job.dataset.tokenization import AnswerTokenizer
from job.decoding.constraints import ClosedVocabulary, OpenVocabulary, constrain
from job.quantize import load_model, load_tokenizer
from job.settings import Settings
from job.system.device import ComputeSpec

MAX_TAGS = 20


def main() -> None:
    options = _parser().parse_args()
    values: Any = {
        "base": {"model": model_setting(options.base), "quantize": "none"},
        "data": {"dataset": options.data},
    }
    settings = Settings(**values)
    compute = ComputeSpec.resolve("auto", "auto")
    tokenizer, model = load_tokenizer(settings.base), load_model(settings.base, compute)
    examples = data.load(settings.data).train
    tags = {tag: None for example in examples for tag in example.tags}
    prompts = [example.text + settings.data.separator.rstrip() for example in examples[: options.rows]]
    tokenizer.padding_side = "left"
    inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(compute.device)
    answers = AnswerTokenizer(tokenizer, settings.data.separator)
    vocabularies = {
        "unconstrained": None,
        "open": OpenVocabulary(answers, MAX_TAGS),
        "closed": ClosedVocabulary(answers, tags, MAX_TAGS),
    }
    times: dict[str, list[float]] = {name: [] for name in vocabularies}
    for number in range(options.rounds + 1):
        for name, vocabulary in vocabularies.items():
            started = time.monotonic()
            _generate(model, inputs, vocabulary, options.tokens)
            if number:  # round 0 warms up
                times[name].append((time.monotonic() - started) / options.tokens / options.rows)
    for name, seconds in times.items():
        ratios = [own / free for own, free in zip(seconds, times["unconstrained"], strict=True)]
        print(f"{name}: {1000 * statistics.median(seconds):.2f} ms, {statistics.median(ratios):.3f} of unconstrained")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.constraints", description=__doc__)
    parser.add_argument("--base", default="smollm2-135m", help=f"{', '.join(BASES)}, or a TAGGER_BASE_MODEL")
    parser.add_argument("--data", default="package:job/dataset/sayings.jsonl", help="a TAGGER_DATA_DATASET")
    parser.add_argument("--rows", type=int, default=16, help="texts in a batch")
    parser.add_argument("--tokens", type=int, default=24, help="tokens to generate for each text")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each kind, in turns")
    return parser


def _generate(model: Any, inputs: Any, vocabulary: OpenVocabulary | ClosedVocabulary | None, tokens: int) -> None:
    """Generate exactly this many tokens for each text; where a list is complete, start another one."""
    states = [vocabulary.new_state() for _ in inputs.input_ids] if vocabulary is not None else []

    def process(_: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        assert vocabulary is not None
        states[:] = [vocabulary.new_state() if state.closed else state for state in states]
        return constrain(states, logits)

    config = GenerationConfig(do_sample=False, max_new_tokens=tokens, eos_token_id=None, pad_token_id=0)
    processors = LogitsProcessorList([process] if states else [])
    with torch.inference_mode():
        model.generate(**inputs, generation_config=config, logits_processor=processors)


if __name__ == "__main__":
    main()
