"""The job: its chapters in a straight line."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job import notify, preflight, report, reproduce, results
from job.distributed.team import Team
from job.errors import InvalidInputError
from job.hub import client as hub
from job.notify import Ending
from job.preflight import PreflightResult
from job.runs import attempts, budget, run_folder
from job.runs.run_folder import RunFolder
from job.runs.store import stored
from job.runs.trackers import tracked
from job.settings import Settings
from job.system.events import event
from job.system.paths import PACKAGE_PREFIX, WEIGHT_SUFFIXES, is_local
from job.types import EncodedExample, Example, Prediction, Scores, Summary

if TYPE_CHECKING:
    import peft
    from transformers import PreTrainedTokenizerBase

    from job.distributed.group import Group
    from job.distributed.place import Place
    from job.inference import TextsTagger
    from job.metrics.baselines import Baseline
    from job.sample import Tagger
    from job.system.device import ComputeSpec

log = logging.getLogger(__name__)


def run(settings: Settings, on_saved: Callable[[RunFolder], None] | None = None) -> Summary | str:
    """Do the complete job: check, load, train, evaluate, gate, publish, sample.

    Chapters that an earlier attempt completed, up to the complete run, are not repeated if their files are intact.
    `on_saved` is called whenever newer progress is on disk. Returns a sentence where another process has the results.
    Raises a JobError, which has the exit code, unless the run succeeds.
    """
    with notify.notified(settings) as ending:
        return run_checked(preflight.check(settings), ending, on_saved)


def retrain(settings: Settings, on_saved: Callable[[RunFolder], None] | None = None) -> Summary | str:
    """Do the job like `run`, unless base model, data and settings are those of the published adapter.

    The gate `off` is replaced by `published`; to publish without a comparison, use `run`. Returns a sentence when there
    is nothing to do.
    """
    if settings.eval.gate == "off":
        settings = settings.model_copy(update={"eval": settings.eval.model_copy(update={"gate": "published"})})
    with notify.notified(settings) as ending:
        checked = preflight.check(settings)
        if preflight.already_published(checked):
            ending.result = f"nothing to do: {checked.repo} was published with the same base model, data and settings"
            return ending.result
        preflight.skip_known_rejection(checked)
        return run_checked(checked, ending, on_saved)


def reproduce_run(settings: Settings, manifest_file: Path, *, allow_differences: bool = False) -> Summary | str:
    """Do the job as the run of a manifest did it; on the same kind of machine, with bitwise the same adapter.

    Settings that do not change the result, such as where to publish, are those given here. Raises InvalidInputError
    for a manifest that was edited, and for other data, versions or another device unless `allow_differences`.
    """
    with notify.notified(settings) as ending:
        checked = _check_reproducible(settings, manifest_file, allow_differences=allow_differences)
        return run_checked(checked, ending)


def _check_reproducible(settings: Settings, manifest_file: Path, *, allow_differences: bool) -> PreflightResult:
    manifest = reproduce.read(manifest_file)
    checked = preflight.check(reproduce.settings_of(manifest, settings))
    found = list(reproduce.differences(manifest, checked, resolve_compute(checked.settings, Team.find())))
    if found and not allow_differences:
        raise InvalidInputError(
            f"the run of {manifest_file} cannot be reproduced exactly: {'; '.join(found)}. Make them equal, or add "
            "--allow-differences"
        )
    for difference in found:
        log.warning("run: %s; the result may differ from that of %s", difference, manifest_file)
    reproduce.prepare(manifest, checked)
    return checked


def run_checked(
    checked: PreflightResult, ending: Ending, on_saved: Callable[[RunFolder], None] | None = None
) -> Summary | str:
    """Run every chapter after the preflight check, or those that an earlier attempt has not completed."""
    ending.run = checked.run
    with checked.run.released_afterwards():
        team = Team.find()
        if not team.leads:
            return help_train(checked, team)
        run, settings = checked.run, checked.settings.run
        with stored(settings, run), tracked(settings, run), attempts.recorded(run):
            ending.result = summary = _run_chapters(checked, team, on_saved)
            return summary


def _run_chapters(checked: PreflightResult, team: Team, on_saved: Callable[[RunFolder], None] | None) -> Summary | str:
    settings, run = checked.settings, checked.run
    run.on_saved = on_saved
    extra = event("run_started", run_id=run.path.name, path=str(run.path), resumed=run.started)
    log.info("run: %s", run.path, extra=extra)
    if run.complete and (checked.repo is None or run.published):
        log.info("run: already complete, nothing is repeated")
        run.begun()  # there may be something left for its trackers
        dismiss(checked, team)
        return results.summary(run)

    compute = resolve_compute(settings, team)
    seconds = budget.seconds_left(settings.run, run, str(compute), compute.gpus)
    with budget.limited(settings.run, run, seconds):
        if run.started:
            run.lock()
        run.memory = compute
        if run.trained:
            log.info("run: already trained and evaluated")
            attempts.begin(run, checked.started, device=str(compute), gpus=compute.gpus, processes=1)
            dismiss(checked, team)
        else:
            train_together(checked, compute, team)
        return judge_and_publish(checked, compute)


def judge_and_publish(checked: PreflightResult, compute: ComputeSpec) -> Summary:
    """Apply the gate to a run that is trained and evaluated, merge if configured, and publish."""
    from job.gate import run_gate
    from job.merge import merge

    settings, run = checked.settings, checked.run
    verdict = run_gate(run, settings, checked.repo, compute)
    if verdict.passed and settings.hub.merge and not run.is_intact("merged"):
        merge(run, settings, compute)
    run.record_verdict(passed=verdict.passed)
    report.save_report(run, "judged")
    return finish(run, settings, checked.repo, compute)


def resolve_compute(settings: Settings, team: Team) -> ComputeSpec:
    """Return device and precision of this process; in a launcher's processes, each has a GPU of its own."""
    from job.distributed.place import choose_gpu
    from job.system.device import ComputeSpec

    if team.place is not None:
        choose_gpu()
    return ComputeSpec.resolve(settings.run.device, settings.train.precision)


def train_together(checked: PreflightResult, compute: ComputeSpec, team: Team) -> None:
    """Fine-tune in this process, with the processes that a launcher started, or in some that this one starts."""
    from job.distributed.group import joined
    from job.system.device import release_memory

    if team.place is not None:
        with joined(team.place, checked.facts(compute), train=True) as group:
            fine_tune(checked, compute, group)
        return
    processes = preflight.count_processes(checked.settings, compute, team.machines.processes)
    if processes == 1 and team.alone:
        fine_tune(checked, compute)
        release_memory(compute.device)  # the gate and the check of what was saved load models too
    else:
        launch(checked, compute, team, processes)


def launch(checked: PreflightResult, compute: ComputeSpec, team: Team, processes: int) -> bool:
    """Start this machine's processes, and wait for them; return whether there was something to train.

    They work offline, with what is checked and downloaded here.
    """
    from job.dataset.summary import describe, summarise
    from job.distributed import launcher
    from job.hub.embedders import resolve_embedder
    from job.hub.weights import resolve_weights

    settings, run = checked.settings, checked.run
    machine = preflight.check_machine(checked, processes)
    resolve_weights(settings.base)
    resolve_embedder(settings.eval)
    for line in (*machine.describe(), *describe(summarise(checked.examples, settings.data))):
        log.info(line)
    store = launcher.meet(team.machines, checked.facts(compute), train=True)
    if store is None:
        return False
    run.release()  # process 0 locks it
    run.begun()
    launcher.launch(
        processes,
        checked.as_json(),
        machines=team.machines,
        store=store,
        virtual_gpus=compute.device.type == "cuda",
        on_progress=run.progress_watcher(),
    )
    if team.leads:
        run.lock()
    return True


def take_part(place: Place, inputs: dict[str, Any]) -> None:
    """Do the part of a process that the job started: process 0 fine-tunes, the others help it."""
    from job.distributed.group import joined
    from job.system.device import ComputeSpec

    checked = PreflightResult.from_json(inputs)
    compute = ComputeSpec.resolve(checked.settings.run.device, checked.settings.train.precision)
    with joined(place, checked.facts(compute), train=True) as group, checked.run.released_afterwards():
        (fine_tune if place.rank == 0 else follow)(checked, compute, group)


def help_train(checked: PreflightResult, team: Team) -> str:
    """Do the part of a process, or of a machine, that does not lead the run; return a sentence about it."""
    from job.distributed.group import joined

    compute = resolve_compute(checked.settings, team)
    if team.place is not None:
        with joined(team.place, checked.facts(compute), train=False) as group:
            if group.trains:
                follow(checked, compute, group)
    else:
        processes = preflight.count_processes(checked.settings, compute, team.machines.processes)
        launch(checked, compute, team, processes)
    return f"{team} has done its part; the first one has the results"


def dismiss(checked: PreflightResult, team: Team) -> None:
    """Tell the others, if there are some, that there is nothing to train."""
    if team.alone:
        return
    from job.distributed import launcher
    from job.distributed.group import joined

    facts = checked.facts(resolve_compute(checked.settings, team))
    if team.place is None:
        launcher.meet(team.machines, facts, train=False)
    else:
        with joined(team.place, facts, train=False):
            pass


def fine_tune(checked: PreflightResult, compute: ComputeSpec, group: Group | None = None) -> None:
    """Load, quantize, freeze, add adapters, train, evaluate, and save the adapter with its evaluation.

    The other processes of a `group` help with training and evaluation (`follow`).
    """
    from job.data import inference_texts
    from job.dataset.summary import describe, summarise
    from job.decoding.config import initial_config
    from job.evaluate import fit
    from job.lora import digest, save_adapter
    from job.metrics.embeddings import load_embedding_baseline
    from job.runs.estimates import find_estimate
    from job.sample import Tagger
    from job.system.device import describe_machine
    from job.train import train

    settings, examples, run = checked.settings, checked.examples, checked.run
    run.memory = compute
    machine = preflight.check_machine(checked)
    for line in (machine.describe()[0], *describe(summarise(examples, settings.data))) if group is None else ():
        log.info(line)
    with run.chapter("load"):
        loaded = load(checked, compute)
        more_baselines = load_embedding_baseline(settings.eval, str(compute.device))
    model, tokenizer = loaded.model, loaded.tokenizer
    run.begin(str(compute), loaded.weights)
    run.update(machine=describe_machine(), estimate=run.manifest.get("estimate") or find_estimate(run.path.name))
    processes = 1 if group is None else group.size  # each with one GPU, where there are GPUs
    gpus = compute.gpus if group is None else min(1, compute.gpus) * processes
    attempts.begin(run, checked.started, device=str(compute), gpus=gpus, processes=processes)
    if group is not None:
        group.start()

    with run.chapter("train"):
        trained = train(
            model, loaded.encoded, settings.train, tokenizer=tokenizer, compute=compute, run=run, exchange=group
        )
    tagger = Tagger(model, tokenizer, settings, compute, initial_config(settings.sample, loaded.examples), group)
    if tagger.decoding.needs_scorers:
        tagger.set_scorers(results.cached_scorers(run, digest(model), lambda: fit(tagger, loaded.examples)))
    scores, predictions = evaluate_adapter(checked, model, tagger, more_baselines)
    results.save_metrics(run, scores, trained, predictions)
    results.save_samples(run, tagger.tag(inference_texts(settings.sample)))
    if group is not None:
        group.send({"do": "end"})
    with run.folder("adapter") as folder:
        save_adapter(model, tokenizer, folder, settings.base)
        tagger.decoding.save(folder)
        tagger.scorers.save(folder)
        report.save_card(folder, settings, scores, run, licence=checked.licence)
    run.record_checksums(*run_folder.RESULTS, *report.CARD_PICTURES)


def follow(checked: PreflightResult, compute: ComputeSpec, group: Group) -> None:
    """Help process 0 with training and evaluation, until it needs no more help."""
    from job import train
    from job.decoding.config import initial_config
    from job.sample import Tagger

    settings = checked.settings
    preflight.check_machine(checked)
    loaded = load(checked, compute)
    model, tokenizer = loaded.model, loaded.tokenizer
    group.start()
    train.follow(model, loaded.encoded, settings.train, tokenizer=tokenizer, compute=compute, exchange=group)
    decoding = initial_config(settings.sample, loaded.examples)
    Tagger(model, tokenizer, settings, compute, decoding).follow(group)


@dataclass(frozen=True)
class Loaded:
    """What training starts from."""

    model: peft.PeftModel
    tokenizer: PreTrainedTokenizerBase
    examples: list[Example]
    """The training examples."""
    encoded: list[EncodedExample]
    weights: dict[str, Any]
    """How the base model's weights are stored."""


def load(checked: PreflightResult, compute: ComputeSpec) -> Loaded:
    """Load the base model and its tokenizer, quantize, freeze, add adapters, and encode the training examples."""
    from job.dataset.tags import drop_rare_tags
    from job.dataset.tokenization import encode
    from job.freeze import freeze
    from job.lora import add_adapters, count_parameters
    from job.quantize import check_causal, describe_weights, load_model, load_tokenizer

    settings = checked.settings
    tokenizer = load_tokenizer(settings.base)
    examples = drop_rare_tags(checked.examples.train, settings.data.min_tag_count)
    encoded = encode(tokenizer, examples, settings)
    log.info("quantize: %s as %s on %s", settings.base.model, settings.base.quantize, compute)
    base = load_model(settings.base, compute)
    check_causal(base, settings.base)
    weights = describe_weights(base)
    freeze(base)
    model = add_adapters(base, settings.lora, seed=settings.train.seed)
    log.info("lora: %s", count_parameters(model))
    return Loaded(model, tokenizer, examples, encoded, weights)


def evaluate_adapter(
    checked: PreflightResult, model: peft.PeftModel, tagger: Tagger, more_baselines: Mapping[str, Baseline]
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
    if tagger.decoding.blend is not None:
        threshold += f", {tagger.decoding.blend}"
    with model.disable_adapter(), tagger.without_scorers():
        base, _ = results.cached_evaluation(
            run, "evaluate_base", f"none, {threshold}", lambda: evaluate(tagger, held_out)
        )
    log.info("evaluate: the base model, %s", base, extra=_scores_event("base", base))
    adapter, predictions = results.cached_evaluation(
        run, "evaluate", f"{weights}, {threshold}", lambda: evaluate(tagger, held_out)
    )
    log.info("evaluate: with the adapter, %s", adapter, extra=_scores_event("adapter", adapter))
    baselines = score_baselines(examples.train + examples.calibration, held_out, more_baselines)
    return {**baselines, "base": base, "adapter": adapter}, predictions


def _scores_event(tagger: str, scores: Scores) -> dict[str, Any]:
    low, high = scores.intervals["f1"]
    values = {"precision": scores.precision, "recall": scores.recall, "macro_f1": scores.macro_f1}
    return event("scores", tagger=tagger, micro_f1=scores.f1, low=low, high=high, **values, examples=scores.n)


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
    if published is not None:
        extra = event("published", repo=published.repo, revision=published.revision, url=published.url)
        log.debug("push: %s", published.url, extra=extra)
    report.save_report(run, "not pushed" if published is None else "published", published)
    run.finish(published)
    return results.summary(run)


def load_tagger_as_trained(settings: Settings, *setting_prefixes: str, texts: int) -> TextsTagger:
    """Load the adapter of TAGGER_HUB_REPO, or of a run on disk, with some settings of its training, to tag `texts`.

    The settings are the settings whose names start with one of `setting_prefixes`, given without TAGGER_: `BASE`,
    `DATA_SEPARATOR`. What is set here wins over the manifest of a repo.
    """
    from job import inference
    from job.system.device import ComputeSpec

    settings, adapter = find_adapter(settings, *setting_prefixes)
    compute = ComputeSpec.resolve(settings.run.device, settings.train.precision)
    return inference.load(settings, adapter, compute, texts=texts)


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
