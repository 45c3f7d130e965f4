"""The job: its chapters in a straight line."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job import preflight, report, results
from job.errors import InvalidInputError
from job.hub import client as hub
from job.preflight import PreflightResult
from job.runs import run_folder
from job.runs.run_folder import RunFolder
from job.settings import Settings
from job.system.paths import PACKAGE_PREFIX, WEIGHT_SUFFIXES, is_local
from job.types import Prediction, Scores, Summary

if TYPE_CHECKING:
    import peft

    from job.sample import Tagger
    from job.system.device import ComputeSpec

log = logging.getLogger(__name__)


def run(settings: Settings, on_saved: Callable[[RunFolder], None] | None = None) -> Summary:
    """Do the complete job: check, load, train, evaluate, gate, publish, sample.

    Chapters that an earlier attempt completed, up to the complete run, are not repeated if their files are intact.
    `on_saved` is called whenever newer progress is on disk.
    Raises a JobError, which has the exit code, unless the run succeeds.
    """
    return run_checked(preflight.check(settings), on_saved)


def retrain(settings: Settings, on_saved: Callable[[RunFolder], None] | None = None) -> Summary | str:
    """Do the job like `run`, unless base model, data and settings are those of the published adapter.

    The gate `off` is replaced by `published`; to publish without a comparison, use `run`. Returns a sentence when there
    is nothing to do.
    """
    if settings.eval.gate == "off":
        settings = settings.model_copy(update={"eval": settings.eval.model_copy(update={"gate": "published"})})
    checked = preflight.check(settings)
    if preflight.already_published(checked):
        return f"nothing to do: {checked.repo} was published with the same base model, data and settings"
    preflight.skip_known_rejection(checked)
    return run_checked(checked, on_saved)


def run_checked(checked: PreflightResult, on_saved: Callable[[RunFolder], None] | None = None) -> Summary:
    """Run every chapter after the preflight check, or those that an earlier attempt has not completed."""
    with checked.run.released_afterwards():
        return _run_chapters(checked, on_saved)


def _run_chapters(checked: PreflightResult, on_saved: Callable[[RunFolder], None] | None) -> Summary:
    settings, run = checked.settings, checked.run
    run.on_saved = on_saved
    log.info("run: %s", run.path)
    if run.complete and (checked.repo is None or run.published):
        log.info("run: already complete, nothing is repeated")
        return results.summary(run)

    # torch and transformers take seconds to import: first finish the checks that need neither
    from job.gate import run_gate
    from job.merge import merge
    from job.system.device import ComputeSpec

    compute = ComputeSpec.resolve(settings.run.device, settings.train.precision)
    if run.started:
        run.lock()
    if run.trained:
        log.info("run: already trained and evaluated")
    else:
        fine_tune(checked, compute)
    verdict = run_gate(run, settings, checked.repo, compute)
    if verdict.passed and settings.hub.merge and not run.is_intact("merged"):
        merge(run, settings, compute)
    run.record_verdict(passed=verdict.passed)
    report.save_report(run, "judged")
    return finish(run, settings, checked.repo, compute)


def fine_tune(checked: PreflightResult, compute: ComputeSpec) -> None:
    """Load, quantize, freeze, add adapters, train, evaluate, and save the adapter with its evaluation."""
    from job.data import inference_texts
    from job.dataset.summary import describe, summarise
    from job.dataset.tags import drop_rare_tags
    from job.dataset.tokenization import encode
    from job.decoding.config import initial_config
    from job.freeze import freeze
    from job.lora import add_adapters, count_parameters, save_adapter
    from job.quantize import check_causal, describe_weights, load_model, load_tokenizer
    from job.sample import Tagger
    from job.train import train

    settings, examples, run = checked.settings, checked.examples, checked.run
    machine = preflight.check_machine(checked)
    for line in (machine.describe()[0], *describe(summarise(examples, settings.data))):
        log.info(line)
    with run.chapter("load"):
        tokenizer = load_tokenizer(settings.base)
        train_examples = drop_rare_tags(examples.train, settings.data.min_tag_count)
        encoded = encode(tokenizer, train_examples, settings)
        log.info("quantize: %s as %s on %s", settings.base.model, settings.base.quantize, compute)
        base = load_model(settings.base, compute)
        check_causal(base, settings.base)
        weights = describe_weights(base)
        freeze(base)
        model = add_adapters(base, settings.lora, seed=settings.train.seed)
        log.info("lora: %s", count_parameters(model))
    run.begin(str(compute), weights)

    with run.chapter("train"):
        trained = train(model, encoded, settings.train, tokenizer=tokenizer, compute=compute, run=run)
    tagger = Tagger(model, tokenizer, settings, compute, initial_config(settings.sample, train_examples))
    scores, predictions = evaluate_adapter(checked, model, tagger)
    results.save_metrics(run, scores, trained, predictions)
    results.save_samples(run, tagger.tag(inference_texts(settings.sample)))
    with run.folder("adapter") as folder:
        save_adapter(model, tokenizer, folder, settings.base)
        tagger.decoding.save(folder)
        report.save_card(folder, settings, scores, run, licence=checked.licence)
    run.update(peak_memory=compute.peak_memory())
    run.record_checksums(*run_folder.RESULTS, *report.CARD_PICTURES)


def evaluate_adapter(
    checked: PreflightResult, model: peft.PeftModel, tagger: Tagger
) -> tuple[dict[str, Scores], list[Prediction]]:
    """Choose the threshold, then score baselines, base model and adapter on the held-out examples.

    Returns the scores of each by name, and the adapter's predictions.
    """
    from job.evaluate import calibrate, evaluate
    from job.lora import digest
    from job.metrics.baselines import score_baselines

    settings, examples, run = checked.settings, checked.examples, checked.run
    held_out = examples.held_out[: settings.eval.limit]
    weights = digest(model)
    if settings.sample.threshold == "auto":
        results.cached_threshold(run, weights, tagger, lambda: calibrate(tagger, examples.calibration))
    threshold = f"threshold {tagger.decoding.threshold}"
    with model.disable_adapter():
        base, _ = results.cached_evaluation(
            run, "evaluate_base", f"none, {threshold}", lambda: evaluate(tagger, held_out)
        )
    log.info("evaluate: the base model, %s", base)
    adapter, predictions = results.cached_evaluation(
        run, "evaluate", f"{weights}, {threshold}", lambda: evaluate(tagger, held_out)
    )
    log.info("evaluate: with the adapter, %s", adapter)
    baselines = score_baselines(examples.train + examples.calibration, held_out)
    return {**baselines, "base": base, "adapter": adapter}, predictions


def finish(run: RunFolder, settings: Settings, repo: str | None, compute: ComputeSpec) -> Summary:
    """Push a run that has a verdict, tag the sample texts again with the pushed adapter, and promote it.

    Raises GateRejected when the gate did not pass; the adapter then stays on its candidate branch.
    """
    from job.gate import reject
    from job.promote import promote
    from job.push import publish_errors_for, push
    from job.sample import load_tagger

    verdict = results.verdict(run)
    assert verdict is not None
    if not verdict.passed:
        reject(run, verdict, repo, settings.hub)
    with run.chapter("push"):
        published = None if repo is None else push(run, repo, settings.hub, verdict)
    as_published = settings.with_published_decoding()
    with run.chapter("sample"):
        results.check_round_trip(run, lambda: load_tagger(as_published, published or run.adapter, compute), settings)
    if published is not None and verdict.parent_commit is not None:
        run.update(candidate=published.revision)
        with run.chapter("promote"), publish_errors_for(run):
            published = promote(published.repo, published.revision, settings.hub, parent_commit=verdict.parent_commit)
    report.save_report(run, "not pushed" if published is None else "published", published)
    run.finish(published)
    return results.summary(run)


def load_tagger_as_trained(settings: Settings, *setting_prefixes: str) -> Tagger:
    """Load the adapter of TAGGER_HUB_REPO, or of a run on disk, with some settings of its training.

    These are the settings whose names start with one of `setting_prefixes`, given without TAGGER_: `BASE`,
    `DATA_SEPARATOR`. What is set here wins over the manifest of a repo.
    """
    return load_adapter(*find_adapter(settings, *setting_prefixes))


def load_adapter(settings: Settings, adapter: str | Path) -> Tagger:
    """Load an adapter for inference on this machine's device."""
    from job.sample import load_tagger
    from job.system.device import ComputeSpec

    return load_tagger(settings, adapter, ComputeSpec.resolve(settings.run.device, settings.train.precision))


def find_adapter(settings: Settings, *setting_prefixes: str) -> tuple[Settings, str | Path]:
    """Return the adapter of TAGGER_HUB_REPO, or of a run on disk, and the settings to load it with.

    Raises InvalidInputError when there is none.
    """
    adapter: str | Path
    if settings.hub.repo is None:
        run = run_folder.find_run(settings.run)
        adapter, trained_with = run.adapter, run.manifest["settings"]
    else:
        adapter = settings.hub.repo
        trained_with = _without_explicit(hub.published_manifest(settings.hub).get("settings", {}), settings, adapter)
    prefixes = tuple(f"TAGGER_{name}" for name in setting_prefixes)
    values = {name: value for name, value in trained_with.items() if name.startswith(prefixes)}
    return settings.with_result_values(values), adapter


def _without_explicit(trained_with: Mapping[str, Any], settings: Settings, repo: str) -> dict[str, Any]:
    """Return the settings in a repo's manifest without those that are set here: a repo never overrides the operator.

    Raises InvalidInputError if the base model is not set here, and the repo names a file or folder as one.
    """
    explicit = settings.explicit_names()
    base = trained_with.get("TAGGER_BASE_MODEL")
    is_path = isinstance(base, str) and is_local(base, WEIGHT_SUFFIXES) and not base.startswith(PACKAGE_PREFIX)
    if is_path and "TAGGER_BASE_MODEL" not in explicit:
        raise InvalidInputError(
            f"the adapter in {repo} was trained on {base}, a file or folder of the machine that trained it; set "
            "TAGGER_BASE_MODEL to that model on this machine"
        )
    for name, value in settings.values().items():
        matters = name.startswith("TAGGER_BASE_") or name in ("TAGGER_DATA_SEPARATOR", "TAGGER_DATA_MAX_LENGTH")
        if matters and name in explicit and name in trained_with and trained_with[name] != value:
            log.warning("%s=%s is used, although the adapter in %s was trained with another value", name, value, repo)
    return {name: value for name, value in trained_with.items() if name not in explicit}
