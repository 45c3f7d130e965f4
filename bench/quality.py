"""Measure how good the tags are: `python -m bench.quality`, or `make quality`.

A test split is set aside from the start, and each fold takes its development texts and its training texts from the
rest. Variants are compared on the folds; `--test VARIANT` trains on all of the rest and scores the test split, which is
for the end. What is done is kept in `--work`: trained adapters with their checkpoints, and predictions, so that a
killed night of runs goes on where it was.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.bases import SMOLLM2, model_setting
from job import data
from job.results import Example, Examples
from job.settings import Data, Settings

if TYPE_CHECKING:
    from job.device import Machine
    from job.sample import Tagger

TEST_SHARE, TEST_SEED = 0.15, 2026
DEVELOPMENT_SHARE = 0.15
"""Of what the test leaves."""
REFERENCES = ("most_common_tags", "tfidf")
TEST = "test"
COLUMNS = (
    *("variant", "folds", "micro-F1", "95%", "macro-F1", "precision", "recall", "parsed", "invented"),
    *("training, s", "tagging, s", "less TF-IDF", "95%"),
)

Record = dict[str, Any]
Groups = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Variant:
    """How adapters are trained, by name so that variants share them, and how answers are decoded."""

    training: str
    sample: dict[str, Any] = field(default_factory=dict)
    free: bool = False
    """Whether the model may write anything, of which the list is read."""


def trainings(steps: int) -> dict[str, Groups]:
    """Settings of each training, apart from data and base model; `steps` optimizer steps of 16 texts."""
    learned: Groups = {
        "lora": {"targets": ("all-linear",)},
        "data": {"tag_order": "shuffled", "max_length": 256},
        "train": {"learning_rate": 1e-3, "warmup_steps": 20},
    }

    def but(**groups: dict[str, Any]) -> Groups:
        return {name: learned.get(name, {}) | groups.get(name, {}) for name in {**learned, **groups}}

    found = {
        "recipe": {"train": {"warmup_steps": min(100, steps // 2)}, "data": {"max_length": 256}},
        "learned": learned,
        "given order": but(data={"tag_order": "given"}),
        "by frequency": but(data={"tag_order": "frequency"}),
        "rate 2e-4": but(train={"learning_rate": 2e-4}),
        "rate 2e-3": but(train={"learning_rate": 2e-3}),
        "attention only": but(lora={"targets": None}),
        "rank 64": but(lora={"r": 64, "alpha": 128}),
        "no dropout": but(lora={"dropout": 0.0}),
        "8 texts a step": but(train={"batch_size": 8, "accumulation": 1, "max_steps": 2 * steps, "warmup_steps": 40}),
        "half the steps": but(train={"max_steps": steps // 2, "warmup_steps": 10}),
        "loss on all": but(train={"loss_on": "all"}),
        "int8": but(base={"quantize": "int8"}),
        "nf4": but(base={"quantize": "nf4"}),
        "another prompt": but(data={"separator": "\nTags: "}),
    }
    common = {"batch_size": 4, "accumulation": 4, "max_steps": steps, "micro_tokens": 1024}
    return {name: groups | {"train": common | groups.get("train", {})} for name, groups in found.items()}


LIKELY = {"decoding": "likely", "threshold": "auto"}
VARIANTS = {
    "recipe, free": Variant("recipe", free=True),
    "recipe, open list": Variant("recipe"),
    "learned, free": Variant("learned", free=True),
    "learned, open list": Variant("learned"),
    "learned, list of seen tags": Variant("learned", {"vocabulary": "seen"}),
    "learned, list, threshold": Variant("learned", {"vocabulary": "seen", "threshold": "auto"}),
    "learned, likely": Variant("learned", LIKELY),
    "by frequency, free": Variant("by frequency", free=True),
    "by frequency, list of seen tags": Variant("by frequency", {"vocabulary": "seen"}),
    **{f"{name}, likely": Variant(name, LIKELY) for name in trainings(1) if name not in ("recipe", "learned")},
}


def main() -> None:
    options = _parser().parse_args()
    records: list[Record] = []
    for fold in [TEST] if options.test else options.folds:
        train, held_out = folds(options.data, fold)
        for name in REFERENCES:
            records.append(_kept(options, fold, name, partial(_reference, name, train, held_out)))
        for name in [options.test] if options.test else options.variants:
            records.append(_kept(options, fold, name, partial(_measure, options, name, fold, train, held_out)))
    print(report(records))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description="Measure how good the tags are.")
    parser.add_argument("--data", default="package:job/sayings.jsonl", help="a TAGGER_DATA_DATASET")
    parser.add_argument("--base", default=SMOLLM2, help="a base model, as for bench.train, or a TAGGER_BASE_MODEL")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--folds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--test", choices=list(VARIANTS), metavar="VARIANT", help="score this one on the test split")
    parser.add_argument("--work", type=Path, default=Path("runs/quality"), help="what is done is kept here")
    return parser


def folds(dataset: str, fold: int | str) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Training and held-out examples of a fold, or of the test."""
    apart = data.load(Data(dataset=dataset, eval_size=TEST_SHARE, seed=TEST_SEED))
    if fold == TEST:
        return apart.train, apart.held_out
    train, development = data.split(apart.train, Data(eval_size=DEVELOPMENT_SHARE, seed=int(fold)))
    return tuple(train), tuple(development)


def _settings(options: argparse.Namespace, variant: Variant) -> Settings:
    groups = trainings(options.steps)[variant.training]
    chosen: Any = {
        **groups,
        "base": {"model": model_setting(options.base), "quantize": "none"} | groups.get("base", {}),
        "data": {"dataset": options.data} | groups.get("data", {}),
        "sample": {"max_new_tokens": 40, "batch_size": 32} | variant.sample,
    }
    return Settings(**chosen)


def _kept(options: argparse.Namespace, fold: int | str, name: str, measure: Callable[[], Record]) -> Record:
    """The record of a measurement: the one that is in the work folder for the same settings, or else made now."""
    from job.whole import write_whole

    settings = Settings(data=Data(dataset=options.data)) if name in REFERENCES else _settings(options, VARIANTS[name])
    file = options.work / "records" / f"{name}, {fold}, {settings.digest()}.json"
    if not file.is_file():
        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        write_whole(file, json.dumps({"variant": name, "fold": fold, "when": started} | measure()))
    record: Record = json.loads(file.read_text(encoding="utf-8"))
    print(_row(name, [record], []), file=sys.stderr, flush=True)
    return record


def _reference(name: str, train: Sequence[Example], held_out: Sequence[Example]) -> Record:
    from job import references

    answers = getattr(references, name)(train, held_out)
    return _record(train, held_out, answers, [True] * len(held_out))


def _record(
    train: Sequence[Example], held_out: Sequence[Example], answers: Sequence[Sequence[str]], parsed: Sequence[bool]
) -> Record:
    known = {tag for example in train for tag in example.tags}
    return {
        "gold": [example.tags for example in held_out],
        "predicted": list(map(list, answers)),
        "parsed": list(parsed),
        "invented": [sum(tag not in known for tag in answer) for answer in answers],
    }


# ---- one measurement -----------------------------------------------------------------------------------------------


def _measure(
    options: argparse.Namespace, name: str, fold: int | str, train: Sequence[Example], held_out: Sequence[Example]
) -> Record:
    from job.decoding import for_training
    from job.device import Machine
    from job.evaluate import calibrate

    variant = VARIANTS[name]
    settings = _settings(options, variant)
    # the same texts are set aside for every variant, so that those of one training can share it
    parts = data.set_aside(Examples(tuple(train), tuple(held_out), 0, ""), settings.data)
    machine = Machine.resolve("auto", "auto")
    untold = settings.decoded_as_published()  # adapters are the same however they are decoded
    folder = options.work / "trained" / f"{variant.training}, {fold}, {untold.digest()}"
    model, tokenizer, seconds = _trained(folder, settings, parts.train, machine)
    decoding = for_training(settings.sample, parts.train)
    tagger = (_free_tagger() if variant.free else _tagger())(model, tokenizer, settings, machine, decoding)
    if settings.sample.threshold == "auto":
        calibrate(tagger, parts.calibration)
    started = time.monotonic()
    answers = tagger.tag([example.text for example in held_out])
    record = _record(parts.train, held_out, [a.tags for a in answers], [a.parsed for a in answers])
    return record | {
        "training_seconds": seconds,
        "tagging_seconds": time.monotonic() - started,
        "threshold": tagger.decoding.threshold,
    }


def _trained(folder: Path, settings: Settings, train: Sequence[Example], machine: Machine) -> tuple[Any, Any, float]:
    """The base model with the adapter of a folder, which is trained if it is not there, and the seconds that took."""
    import peft

    from job.freeze import freeze
    from job.lora import add_adapters, save_adapter
    from job.quantize import load_model, load_tokenizer
    from job.run_folder import RunFolder
    from job.train import train as train_adapters

    tokenizer = load_tokenizer(settings.base)
    model = load_model(settings.base, machine)
    freeze(model)
    done = folder / "trained.json"
    if done.is_file():
        adapted = peft.PeftModel.from_pretrained(model, str(folder / "adapter"))
        return adapted, tokenizer, float(json.loads(done.read_text())["seconds"])
    new = add_adapters(model, settings.lora, seed=settings.train.seed)
    run = RunFolder(folder, {})
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    encoded = data.encode(tokenizer, train, settings)
    trained = train_adapters(new, encoded, settings.train, tokenizer=tokenizer, machine=machine, run=run)
    with run.folder("adapter") as into:
        save_adapter(new, tokenizer, into, settings.base)
    run.write("trained.json", json.dumps({"seconds": trained.seconds, "losses": trained.last_loss}))
    return new, tokenizer, trained.seconds


def _tagger() -> type[Tagger]:
    from job.sample import Tagger

    return Tagger


def _free_tagger() -> type[Tagger]:
    """A tagger whose model may write what it likes; whole tags are read out of that."""
    from transformers import GenerationConfig

    from job.sample import Tagger

    class Free(Tagger):
        def _lists(self, prompts: list[list[int]]) -> Any:
            ids, mask = self._padded(prompts)
            stop = [i for token, i in self._tokenizer.get_vocab().items() if "]" in token]
            config = GenerationConfig(
                do_sample=False,
                max_new_tokens=self._sample.max_new_tokens,
                eos_token_id=[self._tokenizer.eos_token_id, *stop],
                pad_token_id=self._tokenizer.pad_token_id,
            )
            generate: Any = self._model.generate
            written = generate(input_ids=ids, attention_mask=mask, generation_config=config)
            texts = self._tokenizer.batch_decode(written[:, ids.shape[1] :], skip_special_tokens=True)
            return [(text, [(tag, 1.0) for tag in tags], whole) for text in texts for tags, whole in [_read(text)]]

    return Free


def _read(text: str) -> tuple[list[str], bool]:
    """The tags of an answer that were closed, and whether it was one whole list."""
    whole = data.parse_list(text)
    if whole and all(isinstance(tag, str) for tag in whole):
        return list(dict.fromkeys(whole)), True
    closed = re.findall(r"'([^'\n]+)'|\"([^\"\n]+)\"", text) if text.strip().startswith("[") else []
    return list(dict.fromkeys(one or other for one, other in closed)), False


# ---- the report ----------------------------------------------------------------------------------------------------


def report(records: Sequence[Record]) -> str:
    """A Markdown table: for each variant its folds' texts together, and its difference to TF-IDF on the same."""
    by_name: dict[str, list[Record]] = {}
    for record in records:
        by_name.setdefault(record["variant"], []).append(record)
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    lines += [_row(name, found, by_name["tfidf"]) for name, found in by_name.items()]
    return "\n".join(lines)


def _row(name: str, records: Sequence[Record], tfidf: Sequence[Record]) -> str:
    from job.evaluate import f1_difference, score

    gold, predicted, parsed = (list(_joined(records, what)) for what in ("gold", "predicted", "parsed"))
    scores = score(gold, predicted, parsed)
    invented = sum(_joined(records, "invented")) / max(1, sum(map(len, predicted)))
    cells = [name, str(len(records)), f"{scores.f1:.3f}", _interval(scores.intervals["f1"])]
    cells += [f"{x:.3f}" for x in (scores.macro_f1, scores.precision, scores.recall)]
    cells += [f"{scores.parse_rate:.0%}", f"{invented:.0%}"]
    for what in ("training_seconds", "tagging_seconds"):
        cells.append(f"{sum(r[what] for r in records) / len(records):.0f}" if what in records[0] else "")
    if tfidf and name not in REFERENCES:
        folds_ = {record["fold"] for record in records}
        theirs = list(_joined([record for record in tfidf if record["fold"] in folds_], "predicted"))
        difference, interval = f1_difference(gold, predicted, theirs)
        cells += [f"{difference:+.3f}", _interval(interval)]
    else:
        cells += ["", ""]
    return f"| {' | '.join(cells)} |"


def _joined(records: Sequence[Record], what: str) -> Iterator[Any]:
    for record in sorted(records, key=lambda record: str(record["fold"])):
        yield from record[what]


def _interval(ends: Sequence[float]) -> str:
    return f"{ends[0]:.3f} to {ends[1]:.3f}"


if __name__ == "__main__":
    main()
