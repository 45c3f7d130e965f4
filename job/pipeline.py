"""The job: its chapters in a straight line."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from job import preflight, report
from job.hub import client as hub
from job.preflight import PreflightResult
from job.runs import run_folder
from job.runs.run_folder import RunFolder
from job.settings import Settings
from job.types import Summary

if TYPE_CHECKING:
    from job.sample import Tagger
    from job.system.device import ComputeSpec

log = logging.getLogger(__name__)


def run(settings: Settings, on_saved: Callable[[RunFolder], None] | None = None) -> Summary:
    """Quantize, freeze, LoRA, train, evaluate, push, sample; returns how it ended.

    What an attempt before has finished and sealed is not done again, up to a run that is complete.
    `on_saved` is called whenever a resume could go on from further than before.
    Raises JobError for each end that has its own exit code.
    """
    return run_checked(preflight.check(settings), on_saved)


def retrain(settings: Settings, on_saved: Callable[[RunFolder], None] | None = None) -> Summary | str:
    """As `run`, unless what is published was made with the same base model, data and settings: then a sentence.

    A gate that is off is `published` here: what publishes whatever comes is `run`.
    """
    if settings.eval.gate == "off":
        settings = settings.model_copy(update={"eval": settings.eval.model_copy(update={"gate": "published"})})
    checked = preflight.check(settings)
    if preflight.already_published(checked):
        return f"nothing to do: base model, data and settings are those of what {checked.repo} has published"
    preflight.skip_known_rejection(checked)
    return run_checked(checked, on_saved)


def run_checked(checked: PreflightResult, on_saved: Callable[[RunFolder], None] | None = None) -> Summary:
    """The chapters."""
    settings, run = checked.settings, checked.run
    run.on_saved = on_saved
    log.info("run: %s", run.path)
    if run.complete and (checked.repo is None or run.published):
        log.info("run: it is complete already, so nothing is done again")
        return report.summary(run)

    # torch and transformers take seconds to import: not before all is checked that needs neither
    from job.gate import run_gate
    from job.merge import merge
    from job.system.device import ComputeSpec

    machine = ComputeSpec.resolve(settings.run.device, settings.train.precision)
    if run.started:
        run.lock()
    if run.trained:
        log.info("run: it is trained and evaluated already")
    else:
        fine_tune(checked, machine)
    verdict = run_gate(run, settings, checked.repo, machine)
    if verdict.passed and settings.hub.merge and not run.is_intact("merged"):
        merge(run, settings, machine)
    run.record_verdict(passed=verdict.passed)
    report.save_report(run, "judged")
    return finish(run, settings, checked.repo, machine)


def fine_tune(checked: PreflightResult, machine: ComputeSpec) -> None:
    """Everything up to an adapter that is saved with what is known of it."""
    from job.data import inference_texts
    from job.dataset.tags import drop_rare_tags
    from job.dataset.tokenization import encode
    from job.decoding.config import initial_config
    from job.evaluate import calibrate, evaluate
    from job.freeze import freeze
    from job.lora import add_adapters, count_parameters, digest, save_adapter
    from job.metrics.baselines import score_baselines
    from job.quantize import load_model, load_tokenizer
    from job.sample import Tagger
    from job.train import train

    settings, examples, run = checked.settings, checked.examples, checked.run
    device, *_ = preflight.check_machine(checked)
    log.info(device)
    held_out = examples.held_out[: settings.eval.limit]
    with run.chapter("load"):
        tokenizer = load_tokenizer(settings.base)
        taught = drop_rare_tags(examples.train, settings.data.min_tag_count)
        encoded = encode(tokenizer, taught, settings)
        log.info("data: %d examples to train on, %d held out", len(encoded), len(examples.held_out))
        log.info("quantize: %s as %s on %s", settings.base.model, settings.base.quantize, machine)
        base = load_model(settings.base, machine)
        freeze(base)
        model = add_adapters(base, settings.lora, seed=settings.train.seed)
        log.info("lora: %s", count_parameters(model))
    run.begin(str(machine))

    with run.chapter("train"):
        trained = train(model, encoded, settings.train, tokenizer=tokenizer, compute=machine, run=run)
    tagger = Tagger(model, tokenizer, settings, machine, initial_config(settings.sample, taught))
    weights = digest(model)
    if settings.sample.threshold == "auto":
        report.cached_threshold(run, weights, tagger, lambda: calibrate(tagger, examples.calibration))
    at = f"threshold {tagger.decoding.threshold}"
    with model.disable_adapter():
        before, _ = report.cached_evaluation(run, "evaluate_base", f"none, {at}", lambda: evaluate(tagger, held_out))
    log.info("evaluate: the base model, %s", before)
    after, predictions = report.cached_evaluation(
        run, "evaluate", f"{weights}, {at}", lambda: evaluate(tagger, held_out)
    )
    log.info("evaluate: with the adapter, %s", after)

    scores = {**score_baselines(examples.train + examples.calibration, held_out), "base": before, "adapter": after}
    report.save_metrics(run, scores, trained, predictions)
    report.save_samples(run, tagger.tag(inference_texts(settings.sample)))
    with run.folder("adapter") as folder:
        save_adapter(model, tokenizer, folder, settings.base)
        tagger.decoding.save(folder)
        report.save_card(folder, settings, scores, run, licence=checked.licence)
    run.update(peak_memory=machine.peak_memory())
    run.record_checksums(*run_folder.RESULTS)


def finish(run: RunFolder, settings: Settings, repo: str | None, machine: ComputeSpec) -> Summary:
    """Push a run whose adapter is judged, tag the samples anew with what was pushed, and promote it.

    What the gate refused stays on its branch: raises GateRejected.
    """
    from job.gate import reject
    from job.promote import promote
    from job.push import publish_errors_for, push
    from job.sample import load_tagger

    verdict = report.verdict(run)
    assert verdict is not None
    if not verdict.passed:
        reject(run, verdict, repo, settings.hub)
    with run.chapter("push"):
        published = None if repo is None else push(run, repo, settings.hub, verdict)
    as_published = settings.with_published_decoding()
    with run.chapter("sample"):
        report.check_round_trip(run, lambda: load_tagger(as_published, published or run.adapter, machine), settings)
    if published is not None and verdict.parent is not None:
        run.update(candidate=published.revision)
        with run.chapter("promote"), publish_errors_for(run):
            published = promote(published.repo, published.revision, settings.hub, parent=verdict.parent)
    report.save_report(run, "not pushed" if published is None else "published", published)
    run.finish(published)
    return report.summary(run)


def tagger(chosen: Settings, *as_trained: str) -> Tagger:
    """The adapter of TAGGER_HUB_REPO or of a run, used as it was trained in what these groups or knobs say."""
    adapter: str | Path | None = chosen.hub.repo
    if adapter is None:
        run = run_folder.find_run(chosen.run)
        adapter, manifest = run.adapter, run.manifest
    else:
        manifest = hub.published_manifest(chosen.hub)
    trained = manifest.get("settings", {})
    names = tuple(f"TAGGER_{name}" for name in as_trained)
    chosen = chosen.with_result_values({name: value for name, value in trained.items() if name.startswith(names)})

    from job.sample import load_tagger
    from job.system.device import ComputeSpec

    return load_tagger(chosen, adapter, ComputeSpec.resolve(chosen.run.device, chosen.train.precision))
