"""Speed of tagging: one text at a time, the tagger in memory, and `tagger-job tag` with its parts and seals.

    python -m bench.tag --rows 96 --decoding greedy marginal

It takes the adapter of TAGGER_RUN_DIR (train one first, for example with `make run`), and texts of the data that ships
with the project. Answers of the three ways must be equal.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from job import pipeline, tag
from job.config import environment
from job.sample import Tagger
from job.system import logging_setup
from job.tagging.progress import Progress
from job.tagging.worker import finish, work

SAYINGS = Path(__file__).parents[1] / "job" / "dataset" / "sayings.jsonl"
MILLION = 1_000_000


def fastest(steps: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Return the shortest time of each step; they take turns, so that other programs slow down all alike."""
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(rounds):
        for step, taken in zip(steps, times, strict=True):
            started = time.perf_counter()
            step()
            taken.append(time.perf_counter() - started)
    return [min(taken) for taken in times]


def measure(decoding: str, quantize: str, rows: int, alone: int, rounds: int) -> None:
    """Print a line for each way of tagging."""
    settings = environment.load()
    settings = settings.model_copy(update={"sample": settings.sample.model_copy(update={"decoding": decoding})})
    settings, adapter = pipeline.find_adapter(settings, *tag.TRAINED_WITH)
    settings = settings.model_copy(update={"base": settings.base.model_copy(update={"quantize": quantize})})
    tagger: Tagger = pipeline.load_adapter(settings, adapter)
    texts = [json.loads(line)["quote"] for line in SAYINGS.read_text(encoding="utf-8").splitlines()][:rows]
    tagger.tag(texts[:2])  # the first call compiles and allocates

    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder, "in.jsonl")
        given.write_text("".join(json.dumps({"quote": text}) + "\n" for text in texts), encoding="utf-8")
        updates = {"input": str(given), "output": f"{folder}/out.jsonl"}
        job = tag.new_job(settings.model_copy(update={"tag": settings.tag.model_copy(update=updates)}))

        def in_parts() -> None:
            files.append(f"{folder}/{len(files)}.jsonl")
            assert finish(work(replace(job, output=files[-1]), lambda: tagger, Progress()), None) is not None

        files: list[str] = []
        one, memory, parts = fastest(
            [lambda: [tagger.tag([text]) for text in texts[:alone]], lambda: tagger.tag(texts), in_parts], rounds
        )
        one, memory, parts = one / alone, memory / rows, parts / rows
        answers = [json.loads(line) for line in Path(files[0]).read_text(encoding="utf-8").splitlines()]
    expected = tagger.tag(texts)
    assert [answer["tags"] for answer in answers] == [list(answer.tags) for answer in expected]
    tags = sum(len(answer.tags) for answer in expected) / rows
    print(f"{decoding}, {rows} texts, {tags:.2f} tags a text, {torch.get_num_threads()} threads")
    print("| | texts/s | tags/s | hours for a million texts | times one at a time |")
    print("|---|---|---|---|---|")
    for name, took in (("one at a time", one), ("in memory", memory), ("in parts", parts)):
        print(f"| {name} | {1 / took:.2f} | {tags / took:.2f} | {took * MILLION / 3600:.1f} | {one / took:.1f} |")
    print(f"in parts takes {parts / memory:.3f} of the time in memory")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=96, help="texts")
    parser.add_argument("--alone", type=int, default=16, help="texts of them that are tagged one at a time")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions; the shortest time counts")
    parser.add_argument("--decoding", nargs="+", default=["greedy", "marginal"], choices=["greedy", "marginal"])
    parser.add_argument("--quantize", default="none", choices=["none", "int8", "nf4"])
    options = parser.parse_args()
    logging_setup.configure()
    for decoding in options.decoding:
        measure(decoding, options.quantize, options.rows, options.alone, options.rounds)
