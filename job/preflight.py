"""Everything that can be known before anything is spent."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from job import data, gate, push, quantize, report
from job.dataset import tokenization
from job.dataset.split import split_calibration
from job.dataset.tags import drop_rare_tags
from job.decoding import config as decoding
from job.errors import GateRejected, InvalidInputError
from job.hub import access
from job.hub import client as hub
from job.runs import run_folder
from job.runs.run_folder import RunFolder
from job.settings import Settings
from job.system.paths import DATA_SUFFIXES, WEIGHT_SUFFIXES, is_local
from job.types import HubRevision, SplitData


@dataclass(frozen=True)
class PreflightResult:
    """What the check found, with which the run goes on."""

    settings: Settings
    """As given, but with commit hashes for the revisions of base model and data set."""
    examples: SplitData
    run: RunFolder
    repo: str | None
    """Where the run will be pushed, or None."""
    licence: str | None
    """The base model's, as its page on the Hub has it."""


def check(settings: Settings) -> PreflightResult:
    """Look at token, repo, base model, data and run folder; on disk nothing is written.

    Raises InvalidInputError with every problem found.
    """
    problems: list[str] = []

    def attempt(step: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return step(*arguments)
        except InvalidInputError as refusal:
            problems.extend(refusal.problems)
            return None

    settings = run_folder.with_recorded_revisions(settings)
    base: HubRevision | None = None
    dataset: HubRevision | None = None
    if is_local(settings.base.model, WEIGHT_SUFFIXES):
        attempt(quantize.check_local, settings.base.model)
    elif not hub.is_offline():
        base = attempt(access.resolve_revision, "model", settings.base.model, settings.base.revision)
    if not is_local(settings.data.dataset, DATA_SUFFIXES) and not hub.is_offline():
        dataset = attempt(access.resolve_revision, "dataset", settings.data.dataset, settings.data.revision)
    repo = attempt(push.prepare_repo, settings)
    attempt(gate.check_published, settings, repo)
    attempt(data.inference_texts, settings.sample)
    listed = attempt(decoding.read_vocabulary_file, settings.sample)
    attempt(report.check_output, settings.sample.output, settings.sample.input, settings.data.dataset)
    if problems and not is_local(settings.data.dataset, DATA_SUFFIXES):
        raise InvalidInputError(*problems)  # before a data set is downloaded

    settings = settings.with_revisions(base=base.commit if base else None, data=dataset.commit if dataset else None)
    examples = attempt(data.load, settings.data)
    if examples is None:
        attempt(run_folder.check_writable, settings.run.dir)
        raise InvalidInputError(*problems)
    attempt(gate.check_split, settings, examples)
    if settings.sample.threshold == "auto":
        examples = attempt(split_calibration, examples, settings.data) or examples
    attempt(drop_rare_tags, examples.train, settings.data.min_tag_count)
    if listed:  # the file's name alone would not tell another content
        both = hashlib.sha256(repr((examples.fingerprint, listed)).encode()).hexdigest()
        examples = replace(examples, fingerprint=both)
    run = attempt(RunFolder.open, settings, examples)
    if problems:
        raise InvalidInputError(*problems)
    return PreflightResult(settings, examples, run, repo, base.licence if base else None)


def already_published(checked: PreflightResult) -> bool:
    """Whether what is published was made with these revisions, data and settings, as its manifest has them.

    Not while a run of them is here that has not come to its end: its promotion may still lack the tag.
    """
    begun = checked.run.started and not checked.run.complete
    return not begun and same_inputs(checked, checked.settings.hub.revision)


def skip_known_rejection(checked: PreflightResult) -> None:
    """Raise GateRejected when the same was trained elsewhere, compared with what is published now, and refused.

    A schedule would otherwise train it again and again, on a machine that remembers nothing.
    """
    import httpx2

    repo, settings = checked.repo, checked.settings
    if repo is None or checked.run.started:
        return
    try:
        branch = push.candidate_branch(checked.run, hub.branch_head(repo, settings.hub.revision))
        gate = (hub.published_json(repo, branch, "metrics.json") or {}).get("gate") or {}
    except (httpx2.HTTPError, OSError, hub.HubFileError) as error:
        raise hub.hub_unreachable(error) from None
    same = {"gate": settings.eval.gate, "min_f1": settings.eval.min_f1, "tolerance": settings.eval.tolerance}
    if gate.get("verdict", "pass") != "pass" and same.items() <= gate.items() and same_inputs(checked, branch):
        raise GateRejected(
            f"{gate['verdict']}: {gate['reason']}: it is not published, and not trained again, for nothing has changed "
            f"since; it is on the branch {branch}"
        )


def same_inputs(checked: PreflightResult, revision: str | None) -> bool:
    """Whether the manifest at a revision of the repo has these revisions, data and settings."""
    if checked.repo is None:
        return False
    found = hub.published_manifest(checked.settings.hub.model_copy(update={"repo": checked.repo, "revision": revision}))
    was, now = found.get("settings"), checked.settings.result_values()
    return (
        isinstance(was, dict)
        and {name: was.get(name) for name in now} == now
        and found.get("dataset", {}).get("fingerprint") == checked.examples.fingerprint
    )


def check_machine(checked: PreflightResult) -> list[str]:
    """Look at device, precision, memory, disk and the longest examples; returns a line for each.

    Raises InvalidInputError with every problem found. Imports torch and transformers, and downloads the base
    model's config and tokenizer if they are not there.
    """
    from job import estimate
    from job.system.device import ComputeSpec, gpu_unavailable_reason

    settings, examples = checked.settings, checked.examples
    machine = ComputeSpec.resolve(settings.run.device, settings.train.precision)
    tokenizer = quantize.load_tokenizer(settings.base)
    taught = drop_rare_tags(examples.train, settings.data.min_tag_count)
    longest = sorted(taught, key=lambda e: len(e.text), reverse=True)[:1]  # micro-batches get no smaller
    encoded = tokenization.encode(tokenizer, longest, settings)
    for example in encoded:
        assert example.labels[-1] == tokenizer.eos_token_id, "the end of sequence is a label"
    need = estimate.estimate(settings, machine, encoded)
    problems = [
        *estimate.cpu_problems(need, settings, machine),
        *estimate.memory_problems(need, machine),
        *estimate.disk_problems(need, checked.run.path),
    ]
    if problems:
        raise InvalidInputError(*problems)
    because = (
        f", for {gpu_unavailable_reason()}" if settings.run.device == "auto" and machine.device.type == "cpu" else ""
    )
    return [
        f"device: {machine}{because}",
        f"longest example: {len(encoded[0].input_ids)} tokens",
        f"memory: at least {need}",
    ]
