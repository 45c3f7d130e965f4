"""Quality gate: decide whether an adapter is good enough to replace the published one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from job import promote, push, quantize, report, results
from job.errors import GateRejected, InvalidInputError, PublishError
from job.hub import client as hub
from job.metrics.bootstrap import f1_difference
from job.runs.run_folder import RunFolder
from job.settings import Eval, Hub, Settings
from job.system.events import event
from job.types import Example, Prediction, Scores, SplitData, Verdict

if TYPE_CHECKING:
    from job.system.device import ComputeSpec

log = logging.getLogger(__name__)

MIN_EXAMPLES = 30
"""Fewest held-out examples for a comparison: bootstrap intervals of fewer are too narrow."""
KEEP_FROM_PUBLISHED = (
    "TAGGER_BASE_QUANTIZE",
    "TAGGER_DATA_SEPARATOR",
    "TAGGER_DATA_MAX_LENGTH",
    "TAGGER_SAMPLE_MAX_NEW_TOKENS",
)
"""Settings with which the published adapter is evaluated as in its own run."""
SPLIT_SETTINGS = ("TAGGER_DATA_DATASET", "TAGGER_DATA_SEED", "TAGGER_DATA_EVAL_SIZE")
"""Settings that decide which examples are held out."""

Outcome = Literal["pass", "fail", "insufficient evidence"]

_OTHER_GATE = "set TAGGER_EVAL_GATE to floor or off"


def check_published(settings: Settings, repo: str | None) -> None:
    """Raise InvalidInputError if a new adapter could not be compared with the published one."""
    if settings.eval.gate != "published" or repo is None:
        return
    try:
        config = hub.published_json(repo, settings.hub.revision, "adapter_config.json")
    except hub.HubFileError as error:
        raise InvalidInputError(
            f"the adapter published in {repo} cannot be read ({error}), so no adapter can be compared with it. Roll it "
            f"back (`tagger-job promote --revision ...`), set TAGGER_HUB_REPO to another repo, or {_OTHER_GATE}"
        ) from None
    if config is None:
        return
    base = config.get("base_model_name_or_path")
    if base not in (settings.base.model, quantize.hub_identity(settings.base)[0]):
        raise InvalidInputError(
            f"the adapter published in {repo} was trained on {base}, not on {settings.base.model}, so they cannot be "
            f"compared. Set TAGGER_BASE_MODEL={base}, set TAGGER_HUB_REPO to another repo, or {_OTHER_GATE}"
        )


def check_split(settings: Settings, examples: SplitData) -> None:
    """Raise InvalidInputError if too few examples are held out for a comparison."""
    n = len(examples.held_out[: settings.eval.limit])
    if settings.eval.gate == "published" and n < MIN_EXAMPLES:
        raise InvalidInputError(
            f"TAGGER_EVAL_GATE=published needs at least {MIN_EXAMPLES} held-out examples to tell two adapters apart, "
            f"and has {n}; raise TAGGER_DATA_EVAL_SIZE (or TAGGER_EVAL_LIMIT), add data, or {_OTHER_GATE}"
        )


def run_gate(run: RunFolder, settings: Settings, repo: str | None, compute: ComputeSpec) -> Verdict:
    """Apply TAGGER_EVAL_GATE to the run's adapter, and record the verdict in metrics.json.

    A run that was already promoted keeps the verdict that it was promoted with. Raises PublishError if the Hub
    cannot be reached.
    """
    from job.inference import fetch_adapter

    scores, predictions = results.scores(run), results.predictions(run)
    parent_commit, adapter, published, load_error = None, None, None, None
    if settings.eval.gate != "off" and repo is not None:
        try:
            with push.publish_errors_for(run, "Run the same command again"):
                promoted = _promoted_verdict(run, settings, repo)
                if promoted is not None:
                    return promoted
                parent_commit = hub.branch_head(repo, settings.hub.revision)
                if settings.eval.gate == "published":
                    adapter = fetch_adapter(repo, parent_commit, 60 * settings.hub.retry_minutes)
            if adapter is not None:
                published = _evaluate_published(run, settings, repo, parent_commit, adapter, predictions, compute)
        except InvalidInputError as error:
            load_error = f"the adapter published in {repo} at {str(parent_commit)[:12]} no longer loads: {error}"
    verdict = compare(
        settings.eval, scores["adapter"], predictions, published, parent_commit=parent_commit, load_error=load_error
    )
    results.save_verdict(run, verdict, None if published is None else published[0])
    extra = event("gate", verdict=verdict.verdict, reason=verdict.reason)
    log.info("gate: %s: %s", verdict.verdict, verdict.reason, extra=extra)
    return verdict


def _promoted_verdict(run: RunFolder, settings: Settings, repo: str) -> Verdict | None:
    """Return the verdict by which this run was promoted; None if it was not."""
    verdict = results.verdict(run)
    if verdict is None or verdict.parent_commit is None:
        return None
    return verdict if promote.was_promoted(run, repo, settings.hub, verdict.parent_commit) else None


def compare(
    settings: Eval,
    scores: Scores,
    predictions: list[Prediction],
    published: tuple[Scores, list[Prediction]] | None,
    *,
    parent_commit: str | None = None,
    load_error: str | None = None,
) -> Verdict:
    """Return the verdict on an adapter with these scores and predictions.

    `fail`: micro-F1 is below TAGGER_EVAL_MIN_F1, or the complete 95% interval of the difference to the published
    adapter's micro-F1 is below -TAGGER_EVAL_TOLERANCE. `pass`: the complete interval is at or above
    -TAGGER_EVAL_TOLERANCE. Between them: `insufficient evidence`, as with fewer than MIN_EXAMPLES examples, or if the
    published adapter cannot be evaluated (`load_error` says why). `parent_commit` is the head of the published branch.
    """

    def decide(verdict: Outcome, reason: str, **comparison: Any) -> Verdict:
        limits: dict[str, Any] = {"min_f1": settings.min_f1, "tolerance": settings.tolerance}
        comparison |= {"f1": scores.f1, "parent_commit": parent_commit}
        return Verdict(settings.gate, verdict, reason, **limits, **comparison)

    if settings.gate == "off":
        return decide("pass", "the gate is off")
    ours = f"the adapter's micro-F1 is {scores.f1:.3f}"
    if scores.f1 < settings.min_f1:
        return decide("fail", f"{ours}, below TAGGER_EVAL_MIN_F1={settings.min_f1:g}")
    floor = f"{ours}, at least TAGGER_EVAL_MIN_F1={settings.min_f1:g}"
    if settings.gate == "floor":
        return decide("pass", floor)
    if load_error is not None:
        return decide("insufficient evidence", f"{load_error}, so nothing can be compared with it")
    if published is None:
        return decide("pass", f"{floor}, and nothing is published yet")
    if scores.n < MIN_EXAMPLES:
        return decide("insufficient evidence", f"{scores.n} held-out examples are too few for a comparison")
    old_scores, old_predictions = published
    gold, new = [entry.gold for entry in predictions], [entry.predicted for entry in predictions]
    difference, interval = f1_difference(gold, new, [entry.predicted for entry in old_predictions])
    verdict, conclusion = _non_inferiority(interval, settings.tolerance)
    numbers = (
        f"{ours} and the published one's {old_scores.f1:.3f} on the same {scores.n} examples: {difference:+.3f} "
        f"({interval[0]:+.3f} to {interval[1]:+.3f}, TAGGER_EVAL_TOLERANCE={settings.tolerance:g})"
    )
    return decide(verdict, numbers + conclusion, published_f1=old_scores.f1, difference=difference, interval=interval)


def _non_inferiority(interval: list[float], tolerance: float) -> tuple[Outcome, str]:
    """Return what the interval of a difference (new minus old) shows, and how to end the reason with it."""
    low, high = interval
    if low >= -tolerance:
        return "pass", ""
    if high < -tolerance:
        return "fail", ", so it is worse"
    return "insufficient evidence", ", which may be chance; hold out more examples, or allow more tolerance"


def reject(run: RunFolder, verdict: Verdict, repo: str | None, settings: Hub) -> NoReturn:
    """Push the adapter to its candidate branch, if there is a repo, and raise GateRejected with the reason."""
    candidate, where = None, f"it is saved in {run.path}"
    if repo is not None and verdict.parent_commit is not None:
        try:
            with run.chapter("push"):
                candidate = push.push(run, repo, settings.model_copy(update={"merge": False}), verdict)
            run.update(candidate=candidate.revision)
            command = f"tagger-job promote --revision {candidate.revision}"
            where = f"it is at {candidate.url}, and `{command}` would publish it"
        except PublishError as error:
            where += f" only, because its branch could not be pushed: {error}"
    report.save_report(run, "refused", candidate)
    raise GateRejected(f"{verdict.verdict}: {verdict.reason}. The adapter was not published; {where}")


def _evaluate_published(
    run: RunFolder,
    settings: Settings,
    repo: str,
    revision: str,
    adapter: Path,
    predictions: list[Prediction],
    compute: ComputeSpec,
) -> tuple[Scores, list[Prediction]]:
    """Return scores and predictions of the published adapter on the texts of `predictions`.

    Raises InvalidInputError if it does not load.
    """
    from job import inference
    from job.evaluate import evaluate

    try:
        old_values = hub.read_manifest(repo, revision).get("settings", {})
    except hub.HubFileError as error:
        raise InvalidInputError(f"its manifest.json cannot be read ({error})") from None
    kept = {name: old_values[name] for name in KEEP_FROM_PUBLISHED if name in old_values}
    # the published adapter's own base model may be older
    own_base = settings.base.model_copy(update={"revision": None})
    old_settings = settings.model_copy(update={"base": own_base}).with_result_values(kept).with_published_decoding()
    if any(name in old_values and old_values[name] != settings.values()[name] for name in SPLIT_SETTINGS):
        log.warning("gate: the published adapter was trained on another split and may have seen held-out texts")
    examples = [Example(prediction.text, prediction.gold) for prediction in predictions]

    def evaluate_old() -> tuple[Scores, list[Prediction]]:
        return evaluate(inference.load(old_settings, adapter, compute, texts=len(examples)), examples)

    return results.cached_evaluation(run, "evaluate_published", revision, evaluate_old)
