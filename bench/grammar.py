"""What the grammar costs: `python -m bench.grammar`. Seconds a token and text, alternating, with and without it."""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList

from bench.bases import BASES, model_setting
from job import data
from job.decoding.constraints import ClosedVocabulary, OpenVocabulary, constrain
from job.quantize import load_model, load_tokenizer
from job.settings import Settings
from job.system.device import ComputeSpec


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.grammar", description=__doc__)
    parser.add_argument("--base", default="smollm2-135m", help=f"{', '.join(BASES)}, or a TAGGER_BASE_MODEL")
    parser.add_argument("--data", default="package:job/dataset/sayings.jsonl", help="a TAGGER_DATA_DATASET")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    chosen: Any = {
        "base": {"model": model_setting(options.base), "quantize": "none"},
        "data": {"dataset": options.data},
    }
    settings = Settings(**chosen)
    machine = ComputeSpec.resolve("auto", "auto")
    tokenizer, model = load_tokenizer(settings.base), load_model(settings.base, machine)
    examples = data.load(settings.data).train
    tags = {tag: None for example in examples for tag in example.tags}
    prompts = [example.text + settings.data.separator.rstrip() for example in examples[: options.rows]]
    tokenizer.padding_side = "left"
    inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(machine.device)
    grammars = {
        "free": None,
        "open": OpenVocabulary(tokenizer, " ", 20),
        "seen": ClosedVocabulary(tokenizer, tags, " ", 20),
    }
    taken: dict[str, list[float]] = {name: [] for name in grammars}
    for number in range(options.rounds + 1):  # the first warms up
        for name, grammar in grammars.items():
            started = time.monotonic()
            _generate(model, inputs, grammar, options.tokens, settings)
            if number:
                taken[name].append((time.monotonic() - started) / options.tokens / options.rows)
    for name, seconds in taken.items():
        ratios = [mine / free for mine, free in zip(seconds, taken["free"], strict=True)]
        print(f"{name}: {1000 * statistics.median(seconds):.2f} ms, {statistics.median(ratios):.3f} of free")


def _generate(
    model: Any, inputs: Any, grammar: OpenVocabulary | ClosedVocabulary | None, tokens: int, settings: Settings
) -> None:
    """So many tokens for each text, whether or not its list is at its end: a closed one begins anew."""
    walks = [grammar.new_state() for _ in inputs.input_ids] if grammar is not None else []

    def process(_: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        assert grammar is not None
        walks[:] = [grammar.new_state() if walk.closed else walk for walk in walks]
        return constrain(walks, logits)

    config = GenerationConfig(do_sample=False, max_new_tokens=tokens, eos_token_id=None, pad_token_id=0)
    processors = LogitsProcessorList([process] if walks else [])
    with torch.inference_mode():
        model.generate(**inputs, generation_config=config, logits_processor=processors)


if __name__ == "__main__":
    main()
