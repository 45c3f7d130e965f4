"""Whether an adapter is good enough to take the place of the published one."""

from __future__ import annotations

import logging
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from job import promote, push, quantize, report
from job.decoding import config as decoding
from job.errors import GateRejected, InvalidInputError, PublishError
from job.hub import client as hub
from job.metrics.bootstrap import f1_difference
from job.runs.run_folder import RunFolder
from job.settings import Eval, Hub, Settings
from job.types import Example, Prediction, Scores, SplitData, Verdict

if TYPE_CHECKING:
    from job.system.device import ComputeSpec

log = logging.getLogger(__name__)

MIN_EXAMPLES = 30
"""Held-out examples below which nothing is compared: bootstrap intervals of so few are too narrow."""
KEEP_FROM_PUBLISHED = (
    *("TAGGER_BASE_QUANTIZE", "TAGGER_DATA_SEPARATOR", "TAGGER_DATA_MAX_LENGTH", "TAGGER_SAMPLE_MAX_NEW_TOKENS"),
)
"""What an adapter is evaluated with as its own run had it."""
SPLIT = ("TAGGER_DATA_DATASET", "TAGGER_DATA_SEED", "TAGGER_DATA_EVAL_SIZE")


def check_published(settings: Settings, repo: str | None) -> None:
    """Raise InvalidInputError if the new adapter could not be compared with the published one."""
    if settings.eval.gate != "published" or repo is None:
        return
    away = f"Roll it back (`tagger-job promote --revision ...`), name another TAGGER_HUB_REPO, or {_OTHER_GATE}"
    try:
        config = hub.published_json(repo, settings.hub.revision, "adapter_config.json")
    except hub.HubFileError as error:
        raise InvalidInputError(
            f"the adapter published in {repo} cannot be read ({error}), so none can be compared. {away}"
        ) from None
    if config is None:
        return
    base = config.get("base_model_name_or_path")
    if base not in (settings.base.model, quantize.hub_identity(settings.base)[0]):
        raise InvalidInputError(
            f"the adapter published in {repo} was trained on {base}, not on {settings.base.model}, so they are not "
            f"compared. Set TAGGER_BASE_MODEL={base}, name another TAGGER_HUB_REPO, or {_OTHER_GATE}"
        )


def check_split(settings: Settings, examples: SplitData) -> None:
    """Raise InvalidInputError when too few examples are held out for any comparison."""
    n = len(examples.held_out[: settings.eval.limit])
    if settings.eval.gate == "published" and n < MIN_EXAMPLES:
        raise InvalidInputError(
            f"TAGGER_EVAL_GATE=published needs {MIN_EXAMPLES} held-out examples or more to tell two adapters apart, "
            f"and has {n}; raise TAGGER_DATA_EVAL_SIZE (or TAGGER_EVAL_LIMIT), bring more data, or {_OTHER_GATE}"
        )


_OTHER_GATE = "set TAGGER_EVAL_GATE to floor or off"


def run_gate(run: RunFolder, settings: Settings, repo: str | None, machine: ComputeSpec) -> Verdict:
    """Judge the run's adapter, by TAGGER_EVAL_GATE against what the repo has now, and record the verdict.

    A run that was promoted already keeps the verdict that it was promoted by.
    """
    scores, predictions = report.scores(run), report.predictions(run)
    parent, adapter, published, broken = None, None, None, None
    if settings.eval.gate != "off" and repo is not None:
        try:
            with push.publish_errors_for(run, "the same command again"):
                was = report.verdict(run)
                if (
                    was is not None
                    and was.parent is not None
                    and promote.was_promoted(run, repo, settings.hub, was.parent)
                ):
                    return was
                parent = hub.branch_head(repo, settings.hub.revision)
                if settings.eval.gate == "published":
                    adapter = _fetch_published(repo, parent, 60 * settings.hub.retry_minutes)
            if adapter is not None:
                published = _evaluate_published(run, settings, repo, parent, adapter, predictions, machine)
        except InvalidInputError as refusal:
            broken = f"the adapter published in {repo} at {str(parent)[:12]} no longer loads: {refusal}"
    verdict = compare(settings.eval, scores["adapter"], predictions, published, parent=parent, broken=broken)
    report.save_verdict(run, verdict, None if published is None else published[0])
    log.info("gate: %s: %s", verdict.verdict, verdict.reason)
    return verdict


def compare(
    settings: Eval,
    scores: Scores,
    predictions: list[Prediction],
    published: tuple[Scores, list[Prediction]] | None,
    *,
    parent: str | None = None,
    broken: str | None = None,
) -> Verdict:
    """The verdict on an adapter that has these scores and predictions.

    It fails below TAGGER_EVAL_MIN_F1. Against a published one it passes when the whole 95% interval of
    the difference is at -TAGGER_EVAL_TOLERANCE or above, and fails when the whole interval is below;
    in between there is insufficient evidence, as with fewer than FEWEST examples, or when the
    published one cannot be evaluated.
    """
    verdict = partial(Verdict, settings.gate, f1=scores.f1, min_f1=settings.min_f1, tolerance=settings.tolerance)
    verdict = partial(verdict, parent=parent)
    if settings.gate == "off":
        return verdict("pass", "nothing is asked of it")
    ours = f"the adapter's micro-F1 is {scores.f1:.3f}"
    if scores.f1 < settings.min_f1:
        return verdict("fail", f"{ours}, below TAGGER_EVAL_MIN_F1={settings.min_f1:g}")
    floor = f"{ours}, at least TAGGER_EVAL_MIN_F1={settings.min_f1:g}"
    if settings.gate == "floor":
        return verdict("pass", floor)
    if broken is not None:
        return verdict("insufficient evidence", f"{broken}, so nothing can be compared with it")
    if published is None:
        return verdict("pass", f"{floor}, and nothing is published yet")
    if scores.n < MIN_EXAMPLES:
        return verdict("insufficient evidence", f"{scores.n} held-out examples are too few to compare by")
    theirs, their_predictions = published
    gold, new = [was.gold for was in predictions], [was.predicted for was in predictions]
    difference, interval = f1_difference(gold, new, [was.predicted for was in their_predictions])
    verdict = partial(verdict, published_f1=theirs.f1, difference=difference, interval=interval)
    low, high = interval
    numbers = (
        f"{ours} and the published one's {theirs.f1:.3f} on the same {scores.n} examples: {difference:+.3f} "
        f"({low:+.3f} to {high:+.3f}, TAGGER_EVAL_TOLERANCE={settings.tolerance:g})"
    )
    if low >= -settings.tolerance:
        return verdict("pass", numbers)
    if high < -settings.tolerance:
        return verdict("fail", f"{numbers}, so it is worse")
    return verdict(
        "insufficient evidence", f"{numbers}, which may be chance; hold out more examples, or allow more tolerance"
    )


def reject(run: RunFolder, verdict: Verdict, repo: str | None, settings: Hub) -> NoReturn:
    """Push the adapter to its candidate branch, if there is a repo, and raise GateRejected with the reason."""
    left, where = None, f"it is saved in {run.path}"
    if repo is not None and verdict.parent is not None:
        try:
            with run.chapter("push"):
                left = push.push(run, repo, settings.model_copy(update={"merge": False}), verdict)
            run.update(candidate=left.revision)
            where = f"it is at {left.url}, and `tagger-job promote --revision {left.revision}` would publish it"
        except PublishError as failure:
            where += f" alone, for its branch could not be pushed: {failure}"
    report.save_report(run, "refused", left)
    raise GateRejected(f"{verdict.verdict}: {verdict.reason}: it is not published; {where}")


def _fetch_published(repo: str, revision: str, seconds: float) -> Path | None:
    """The folder with the adapter that a repo has at a revision; None if it has none.

    Raises InvalidInputError when it has no weights; a Hub that cannot be reached raises the client's own errors.
    """
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        folder = hub.retry(lambda: hub.download(repo, revision, "adapter_config.json"), seconds, "gate").parent
    except RemoteEntryNotFoundError:
        return None
    try:
        hub.retry(lambda: hub.download(repo, revision, "adapter_model.safetensors"), seconds, "gate")
    except RemoteEntryNotFoundError:
        raise InvalidInputError("it has no adapter_model.safetensors") from None
    with suppress(RemoteEntryNotFoundError):  # older ones have none
        hub.retry(lambda: hub.download(repo, revision, decoding.CONFIG_NAME), seconds, "gate")
    return folder


def _evaluate_published(
    run: RunFolder,
    settings: Settings,
    repo: str,
    revision: str | None,
    adapter: Path,
    predictions: list[Prediction],
    machine: ComputeSpec,
) -> tuple[Scores, list[Prediction]]:
    """Return scores and predictions of the published adapter on the texts of `predictions`.

    Raises InvalidInputError when it does not load.
    """
    from job.evaluate import evaluate
    from job.sample import load_tagger

    try:
        trained = (hub.published_json(repo, revision, "manifest.json") or {}).get("settings", {})
        as_trained = settings.with_result_values(
            {name: trained[name] for name in KEEP_FROM_PUBLISHED if name in trained}
        )
        as_trained = as_trained.with_published_decoding()
    except (hub.HubFileError, TypeError, ValueError) as error:
        raise InvalidInputError(f"its manifest.json cannot be read ({error})") from None
    if any(name in trained and trained[name] != settings.values()[name] for name in SPLIT):
        log.warning("gate: the published adapter was trained on another split and may know held-out texts")
    examples = [Example(was.text, was.gold) for was in predictions]
    return report.cached_evaluation(
        run, "evaluate_published", str(revision), lambda: evaluate(load_tagger(as_trained, adapter, machine), examples)
    )
