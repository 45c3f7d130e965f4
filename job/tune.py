"""Choose settings on folds of the training data: `tagger-job tune`."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from job import data, preflight, trial
from job.config import candidates as config
from job.config.candidates import Candidate
from job.dataset.split import cross_validation_folds
from job.dataset.tags import drop_rare_tags
from job.decoding.config import initial_config
from job.decoding.head import learnable_tags
from job.distributed.team import Team
from job.errors import DivergedError, InvalidInputError, JobError
from job.metrics import selection
from job.metrics.bootstrap import CONFIDENCE
from job.metrics.selection import Choice, Trial
from job.runs import attempts, budget, markup
from job.runs.run_folder import TUNE, RunFolder, utc_now
from job.settings import Settings
from job.system.device import ComputeSpec
from job.types import Example, SplitData

log = logging.getLogger(__name__)

MIN_FOLD_TEXTS = 10
REPORT_FILES = ("report.json", "report.md", "winner.env")
SEED_OFFSET = 2
"""Added to TAGGER_DATA_SEED for the folds: held-out and calibration examples were drawn with the two before."""


@dataclass(frozen=True)
class Plan:
    """What is compared, on which folds, and where it is kept; all of it is checked."""

    settings: Settings
    candidates: list[Candidate]
    folds: list[SplitData]
    run: RunFolder
    """The tune itself: its manifest, report and winner; the trainings are in folders of this one."""
    started: str
    checks: list[preflight.PreflightResult] = field(repr=False)
    """By candidate."""

    @property
    def gold(self) -> list[tuple[str, ...]]:
        """The tags of the texts of all folds."""
        return [example.tags for fold in self.folds for example in self.scored(fold)]

    def scored(self, fold: SplitData) -> Sequence[Example]:
        """Return the texts of a fold that candidates answer."""
        return fold.held_out[: self.settings.eval.limit]

    def candidate(self, name: str) -> Candidate:
        """Return a candidate by its name."""
        return next(candidate for candidate in self.candidates if candidate.name == name)

    def describe(self) -> Iterator[str]:
        """Yield lines that say what will be done."""
        sizes = ", ".join(f"{len(fold.train)} to train and {len(self.scored(fold))} to score" for fold in self.folds)
        yield f"tune: {self.run.path}"
        yield f"folds: {len(self.folds)} of the training examples, {sizes}; no held-out example is used"
        for rung in selection.rungs(len(self.candidates)):
            yield (
                f"round: {rung.candidates} candidates with {rung.share:g} of their steps on each fold, "
                f"{rung.candidates * len(self.folds)} trainings"
            )
        for candidate in self.candidates:
            yield f"candidate: {candidate.name}, {candidate.settings.train.max_steps} steps"


def tune(settings: Settings, recipe: str | None) -> list[str]:
    """Train and score the candidates on folds, choose one, and write report and winner.env; return lines to print.

    Trainings and answers that an earlier attempt finished are not repeated.
    Raises InvalidInputError before anything is written, and JobError if no candidate could be trained.
    """
    plan = check(settings, recipe)
    run = plan.run
    with run.released_afterwards(), attempts.recorded(run):
        if run.is_intact(*REPORT_FILES):
            log.info("tune: already complete, nothing is repeated")
            return _outcome(run)
        compute = ComputeSpec.resolve(settings.run.device, settings.train.precision)
        seconds = budget.seconds_left(settings.run, run, str(compute), compute.gpus)
        for line in plan.describe():
            log.info(line)
        with budget.limited(settings.run, run, seconds):
            run.begin(str(compute))
            attempts.begin(run, plan.started, device=str(compute), gpus=compute.gpus, processes=1)
            run.update(tune=_facts(plan))
            with run.chapter("trials"):
                rounds = list(_rounds(plan))
            choice = selection.choose(plan.gold, rounds[-1], len(plan.candidates))
            _save(plan, rounds, choice)
            run.update(status="complete", finished=utc_now())
    return _outcome(run)


def check(settings: Settings, recipe: str | None) -> Plan:
    """Check candidates, folds, base models, memory and folder; writes nothing.

    Raises InvalidInputError with every problem of the same kind.
    """
    started = utc_now()
    if settings.run.store is not None:
        raise InvalidInputError(
            "tune keeps its trainings in TAGGER_RUN_DIR alone and TAGGER_RUN_STORE is set; remove it for this command"
        )
    _check_alone(settings)
    found = config.find_candidates(settings, recipe)
    checks = _check_each(found)
    settings = settings.with_revisions(base=None, data=checks[0].settings.data.revision)
    examples = data.load(settings.data)
    parts = cross_validation_folds(examples.train, settings.tune.folds, settings.data.seed + SEED_OFFSET)
    folds = [trial.fold_of(train, held_out) for train, held_out in parts]
    _check_folds(folds, found, len(examples.train))
    run = _open(settings, examples, checks)
    found = [replace(candidate, settings=checked.settings) for candidate, checked in zip(found, checks, strict=True)]
    plan = Plan(settings, found, folds, run, started, checks)
    _check_same(plan)
    if settings.run.budget is not None and not run.is_intact(*REPORT_FILES):
        compute = ComputeSpec.resolve(settings.run.device, settings.train.precision)
        budget.seconds_left(settings.run, run, str(compute), compute.gpus)
    return plan


def _without_publishing(settings: Settings) -> Settings:
    return settings.model_copy(
        update={
            "hub": settings.hub.model_copy(update={"push": "never", "merge": False}),
            "eval": settings.eval.model_copy(update={"gate": "off", "embedder": None}),
            "run": settings.run.model_copy(update={"id": None, "budget": None}),
        }
    )


def _check_alone(settings: Settings) -> None:
    if not Team.find().alone or settings.run.processes not in (None, 1):
        raise InvalidInputError(
            "tune trains in one process: start it without a launcher such as torchrun, on one machine, and leave out "
            f"TAGGER_RUN_PROCESSES{'' if settings.run.processes is None else f'={settings.run.processes}'}"
        )


def _check_each(found: Sequence[Candidate]) -> list[preflight.PreflightResult]:
    """Check each candidate as if it was run; a problem that all of them have is named once, without a candidate."""
    checks: list[preflight.PreflightResult] = []
    problems: dict[str, tuple[str, ...]] = {}
    for candidate in found:
        try:
            checks.append(preflight.check(_without_publishing(candidate.settings)))
            preflight.check_machine(checks[-1])
        except InvalidInputError as error:
            problems[candidate.name] = error.problems
    if problems:
        each = list(problems.values())
        common = [problem for problem in each[0] if len(each) == len(found) and all(problem in other for other in each)]
        own = [f"candidate {name}: {p}" for name, entries in problems.items() for p in entries if p not in common]
        raise InvalidInputError(*common, *own)
    return checks


def _check_folds(folds: Sequence[SplitData], found: Sequence[Candidate], examples: int) -> None:
    smallest = min(len(fold.held_out) for fold in folds)
    if smallest < MIN_FOLD_TEXTS or not all(fold.train for fold in folds):
        raise InvalidInputError(
            f"TAGGER_TUNE_FOLDS={len(folds)} leaves {smallest} of {examples} training examples for the smallest fold; "
            f"expected at least {MIN_FOLD_TEXTS}. Lower it, or add more data"
        )
    for candidate in found:
        for fold in folds:
            _check_fold(fold, candidate)


def _check_fold(fold: SplitData, candidate: Candidate) -> None:
    """Raise InvalidInputError if a fold lacks what the complete data has: examples, frequent tags."""
    settings = candidate.settings
    try:
        train = drop_rare_tags(trial.parts_of(fold, settings).train, settings.data.min_tag_count)
        if "head" in (settings.sample.decoding or "") or "tfidf" in (settings.sample.decoding or ""):
            known = initial_config(settings.sample, train).tags
            learnable_tags(train, known)
    except InvalidInputError as error:
        raise InvalidInputError(
            f"candidate {candidate.name} cannot be trained on a fold of TAGGER_TUNE_FOLDS, which has {len(fold.train)} "
            f"of the training examples: {error}"
        ) from error


def _open(settings: Settings, examples: SplitData, checks: Sequence[preflight.PreflightResult]) -> RunFolder:
    """Open the folder of the tune; its name has a digest of everything that decides its result."""
    candidates = [checked.settings.result_values() | {"data": checked.examples.fingerprint} for checked in checks]
    digest = settings.digest(json.dumps([candidates, settings.tune.folds, settings.eval.limit]))
    run_id = settings.run.id or f"tune-{digest}"
    # another fingerprint than a run's, so that no run can have this folder
    marked = replace(examples, fingerprint=TUNE + examples.fingerprint)
    placed = settings.run.model_copy(update={"id": run_id})
    return RunFolder.open(settings.model_copy(update={"run": placed}), marked)


def _facts(plan: Plan) -> dict[str, Any]:
    """Return what decides the result, for the manifest."""
    return {
        "folds": [fold.fingerprint for fold in plan.folds],
        "candidates": {
            candidate.name: candidate.settings.digest(checked.examples.fingerprint)
            for candidate, checked in zip(plan.candidates, plan.checks, strict=True)
        },
    }


def _check_same(plan: Plan) -> None:
    """Raise InvalidInputError if the folder has a tune of other candidates or folds."""
    earlier, now = plan.run.manifest.get("tune"), _facts(plan)
    if earlier is not None and earlier != now:
        what = "folds" if earlier["candidates"] == now["candidates"] else "candidates"
        raise InvalidInputError(
            f"the tune {plan.run.path} was begun with other {what}; change them back, or set TAGGER_RUN_ID to another "
            "name"
        )


def estimate(plan: Plan) -> Iterator[str]:
    """Yield lines that say what the tune takes at most, from a few real steps and answers of each candidate."""
    from job import measure

    seconds: dict[str, tuple[float, float]] = {}
    peak: dict[str, float] = {}
    for candidate in plan.candidates:
        settings, parts, folder = place_of(plan, candidate.name, 1.0, 1)
        run = trial.open_trial(settings, parts, folder)
        found = measure.measure(preflight.PreflightResult(settings, parts, run, None, None, plan.started))
        trial.free_memory()
        fixed = sum(found.seconds.get(name, 0.0) for name in ("load", "calibrate", "evaluate"))
        seconds[candidate.name] = (len(plan.folds) * fixed, len(plan.folds) * found.seconds["train"])
        peak = {name: max(value, peak.get(name, 0.0)) for name, value in found.peak_memory.items()}
        yield f"estimate: {candidate.name}: {sum(seconds[candidate.name]):.0f} s with all of its steps on all folds"
    total = 0.0
    for rung in selection.rungs(len(plan.candidates)):
        costs = sorted((fixed + rung.share * train for fixed, train in seconds.values()), reverse=True)
        total += sum(costs[: rung.candidates])
    compute = ComputeSpec.resolve(plan.settings.run.device, plan.settings.train.precision)
    price = budget.price_per_hour(plan.settings.run, str(compute), compute.gpus)
    dollars = "" if price is None else f", ${price[0] * total / 3600:.2f} ({price[1]})"
    memory = ", ".join(f"{value:.1f} GiB of {name.partition('_')[0]} memory" for name, value in peak.items())
    yield f"estimate: at most {total:.0f} s in all{dollars}, {memory}; measured on {compute}"


def _rounds(plan: Plan) -> Iterator[list[Trial]]:
    names = [candidate.name for candidate in plan.candidates]
    for number, trials in enumerate(selection.search(names, plan.gold, lambda name, share: _try(plan, name, share)), 1):
        if all(entry.failure is not None for entry in trials):
            raise JobError(f"no candidate could be trained: {trials[0].candidate}: {trials[0].failure}")
        for entry in selection.rank(plan.gold, trials):
            log.info("tune: round %d, %s", number, _score_line(plan, entry))
        yield trials


def _score_line(plan: Plan, entry: Trial) -> str:
    if entry.failure is not None:
        return f"{entry.candidate} failed: {entry.failure}"
    f1 = selection.micro_f1(plan.gold, entry.predicted)
    return f"{entry.candidate} has micro-F1 {f1:.3f} with {entry.share:g} of its steps, in {entry.seconds:.0f} s"


def _try(plan: Plan, name: str, share: float) -> Trial:
    """Train a candidate on all folds with a share of its steps, and return its answers to the texts of all of them."""
    predicted: list[list[str]] = []
    seconds = 0.0
    for number, fold in enumerate(plan.folds, 1):
        settings, parts, folder = place_of(plan, name, share, number)
        log.info("tune: %s, fold %d of %d, %d steps", name, number, len(plan.folds), settings.train.max_steps)
        try:
            found = trial.answers(settings, parts, folder, on_saved=lambda _: _sign_of_life(plan.run))
        except DivergedError as error:
            return Trial(name, share, [], seconds, str(error))
        assert len(found.predicted) == len(plan.scored(fold))
        predicted += found.predicted
        seconds += found.seconds
    return Trial(name, share, predicted, seconds)


def place_of(plan: Plan, name: str, share: float, fold: int) -> tuple[Settings, SplitData, Path]:
    """Return settings, examples and folder of a candidate's training on a fold, counted from 1."""
    settings = trial.with_share_of_steps(plan.candidate(name).settings, share)
    parts = trial.parts_of(plan.folds[fold - 1], settings)
    key = settings.with_published_decoding().digest(data.fingerprint(parts.train, parts.held_out))
    return settings, parts, plan.run.path / f"fold-{fold}-{settings.train.max_steps}-steps-{key}"


def _sign_of_life(run: RunFolder) -> None:
    """Let the time of an attempt count up to here if its process is killed."""
    (run.path / "log.jsonl").touch()


def _save(plan: Plan, rounds: Sequence[Sequence[Trial]], choice: Choice) -> None:
    """Write report.json, report.md and winner.env."""
    report = report_data(plan, rounds, choice)
    run = plan.run
    run.write("report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    run.write("report.md", markup.render("tune.md.jinja", report=report, table=list(_table(report))))
    run.write("winner.env", _recipe(plan.candidate(choice.winner), choice))
    run.record_checksums(*REPORT_FILES)


def report_data(plan: Plan, rounds: Sequence[Sequence[Trial]], choice: Choice) -> dict[str, Any]:
    """Return the content of report.json."""
    return {
        "schema_version": 1,
        "run_id": plan.run.path.name,
        **asdict(choice),
        "data": {"dataset": plan.settings.data.dataset, "revision": plan.settings.data.revision},
        "folds": [{"train": len(fold.train), "scored": len(plan.scored(fold))} for fold in plan.folds],
        "candidates": [{"name": entry.name, "values": entry.values} for entry in plan.candidates],
        "rounds": [[_trial_data(plan, entry) for entry in selection.rank(plan.gold, trials)] for trials in rounds],
        "seconds": round(sum(entry.seconds for trials in rounds for entry in trials), 1),
    }


def _trial_data(plan: Plan, entry: Trial) -> dict[str, Any]:
    from job.metrics.scores import score

    steps = trial.with_share_of_steps(plan.candidate(entry.candidate).settings, entry.share).train.max_steps
    found = {"candidate": entry.candidate, "steps": steps, "seconds": round(entry.seconds, 1), "failure": entry.failure}
    if entry.failure is not None:
        return found | {"f1": None, "interval": None, "f1_by_fold": None, "trainings": []}
    scores, by_fold, start = score(plan.gold, entry.predicted), [], 0
    for fold in plan.folds:
        end = start + len(plan.scored(fold))
        by_fold.append(round(selection.micro_f1(plan.gold[start:end], entry.predicted[start:end]), 4))
        start = end
    folders = [place_of(plan, entry.candidate, entry.share, n)[2].name for n in range(1, 1 + len(plan.folds))]
    f1 = {"f1": round(scores.f1, 4), "interval": scores.intervals["f1"], "f1_by_fold": by_fold}
    return found | f1 | {"trainings": folders}


def _table(report: dict[str, Any]) -> Iterator[list[str]]:
    yield ["round", "candidate", "steps", "micro-F1", f"{CONFIDENCE:.0%}", "by fold", "seconds"]
    for number, trials in enumerate(report["rounds"], 1):
        for entry in trials:
            f1, interval, by_fold = "failed", entry["failure"], ""
            if entry["failure"] is None:
                f1, interval = f"{entry['f1']:.3f}", "{:.3f} to {:.3f}".format(*entry["interval"])
                by_fold = ", ".join(f"{value:.3f}" for value in entry["f1_by_fold"])
            yield [
                str(number),
                entry["candidate"],
                str(entry["steps"]),
                f1,
                interval,
                by_fold,
                f"{entry['seconds']:.0f}",
            ]


def _recipe(winner: Candidate, choice: Choice) -> str:
    return f"# {_reason(asdict(choice))}.\n{config.env_text(winner.values)}"


def _reason(report: dict[str, Any]) -> str:
    """Return why the winner was chosen, on one line."""
    compared = ""
    if report["interval"] is not None:
        low, high = report["interval"]
        compared = (
            f" (micro-F1 {report['difference']:+.3f} against {report['other']}, {100 * report['confidence']:.4g}% "
            f"interval {low:+.3f} to {high:+.3f})"
        )
    return " ".join(f"{report['winner']}: {report['reason']}{compared}".split())


def _outcome(run: RunFolder) -> list[str]:
    """Return the lines that the command prints at the end."""
    report = json.loads((run.path / "report.json").read_text(encoding="utf-8"))
    return [
        _reason(report),
        f"report: {run.path / 'report.md'}",
        f"winner: tagger-job run --recipe {run.path / 'winner.env'}",
    ]
