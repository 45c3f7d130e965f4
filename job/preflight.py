"""Checks before anything is spent: token, repo, base model, data, run folder, memory and disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from typing import TYPE_CHECKING, Annotated, Any, Literal, ParamSpec, TypeVar

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from job import data, gate, push, quantize, results
from job.config.earlier_versions import current_settings, differences
from job.dataset import tokenization
from job.dataset.prompts import target
from job.dataset.split import split_calibration
from job.dataset.summary import summarise
from job.dataset.tags import drop_rare_tags
from job.decoding import config as decoding
from job.distributed.team import Team
from job.errors import GateRejected, InvalidInputError
from job.hub import access, embedders, weights
from job.hub import client as hub
from job.runs import run_folder, trackers
from job.runs.run_folder import RunFolder
from job.settings import Base, Data, Eval, Sample, Settings
from job.system.paths import DATA_SUFFIXES, WEIGHT_SUFFIXES, is_local, is_on_hub
from job.types import Example, HubRevision, SplitData

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from job.estimate import MemoryEstimate
    from job.system.device import ComputeSpec

SPECIAL_TOKENS = 8
"""Tokens kept free for those that a tokenizer adds by itself."""
WORTHWHILE_TOKENS = 2000
"""Tokens of a step for each process, below which a GPU spends more time on starting kernels than on computing."""
SAMPLED = 200
"""Examples that are tokenized to estimate the tokens of a step."""
MOST_RISKY = 1000
"""Examples that are tokenized at most to find one whose tags do not fit."""
INHERITED = ("batch_plan", "reproduces")
"""Entries that a new manifest has from the run that it reproduces."""
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class PreflightResult:
    """What the checks found and the run continues with."""

    settings: Settings
    """The given settings, with commit hashes as revisions of base model and data set."""
    examples: SplitData
    run: RunFolder
    repo: str | None
    """The repo that the run will be pushed to, or None."""
    licence: str | None
    """The base model's licence, from its page on the Hub."""
    started: str
    """When the checks began, in UTC: an attempt is counted from then on."""

    @property
    def complete(self) -> bool:
        """Whether the run is complete, on this disk or in TAGGER_RUN_STORE, which has no partial states."""
        if not self.run.in_store:
            return self.run.complete
        return self.run.manifest["status"] == "complete" and "published" in self.run.manifest

    def as_json(self) -> dict[str, Any]:
        """Return what the processes that train need, as JSON types."""
        run = self.settings.run.model_copy(
            update={"dir": self.run.path.parent, "id": self.run.path.name, "store": None}
        )
        settings = self.settings.model_copy(update={"run": run})
        return {
            "task": "train",
            "settings": settings.model_dump(mode="json"),
            "sources": settings.sources,
            "manifest": {name: self.run.manifest[name] for name in INHERITED if name in self.run.manifest},
            "examples": TypeAdapter(SplitData).dump_python(self.examples, mode="json"),
            "licence": self.licence,
            "started": self.started,
        }

    def facts(self, compute: ComputeSpec) -> dict[str, str]:
        """Return what all processes must see alike to train the same adapter."""
        values = self.settings.result_values() | {"data": self.examples.fingerprint, "device": compute.device.type}
        versions = {name: metadata.version(name) for name in run_folder.TRACKED_VERSIONS}
        facts = values | {"precision": compute.precision} | versions
        # 32.0, from an environment, is the default 32
        whole = {name: int(value) for name, value in facts.items() if isinstance(value, float) and value.is_integer()}
        return {name: str(value) for name, value in (facts | whole).items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> PreflightResult:
        """Return the result that `as_json` described; nothing of it will be pushed."""
        settings = Settings.model_validate(values["settings"]).with_sources(values["sources"])
        examples = TypeAdapter(SplitData).validate_python(values["examples"])
        run = RunFolder.open(settings, examples)
        run.manifest.update(values["manifest"])
        return cls(settings, examples, run, None, values["licence"], values["started"])


class _Problems:
    """The problems found so far, so that the user can fix all of them at once."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def collect(self, check: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """Return the result of a check; None if it raised InvalidInputError, whose messages are kept."""
        try:
            return check(*args, **kwargs)
        except InvalidInputError as error:
            # the same problem may stop several checks
            self.messages.extend(problem for problem in error.problems if problem not in self.messages)
            return None

    def raise_if_any(self) -> None:
        if self.messages:
            raise InvalidInputError(*self.messages)


def check(settings: Settings) -> PreflightResult:
    """Check token, repo, base model, data and run folder. Writes nothing to disk except the cache of the Hub's client.

    Raises InvalidInputError with every problem found.
    """
    problems, started = _Problems(), run_folder.utc_now()
    settings = run_folder.with_recorded_revisions(settings)
    base = problems.collect(_check_base_model, settings.base)
    dataset = problems.collect(_resolve_dataset, settings.data)
    embedder = problems.collect(_check_embedder, settings.eval)
    repo = problems.collect(push.prepare_repo, settings)
    problems.collect(gate.check_published, settings, repo)
    problems.collect(trackers.check, settings.run)
    problems.collect(data.inference_texts, settings.sample)
    vocabulary = problems.collect(decoding.read_vocabulary_file, settings.sample)
    problems.collect(results.check_output, settings.sample, settings.data)
    if is_on_hub(settings.data.dataset, DATA_SUFFIXES):
        problems.raise_if_any()  # before a data set is downloaded

    settings = settings.with_revisions(
        base=base.commit if base else None,
        data=dataset.commit if dataset else None,
        embedder=embedder.commit if embedder else None,
    )
    examples = problems.collect(data.load, settings.data)
    if examples is None:
        problems.collect(run_folder.check_writable, settings.run.dir)
        raise InvalidInputError(*problems.messages)
    problems.collect(gate.check_split, settings, examples)
    if settings.sample.threshold == "auto":
        examples = problems.collect(split_calibration, examples, settings.data) or examples
    trained_on = problems.collect(drop_rare_tags, examples.train, settings.data.min_tag_count) or ()
    known_tags = [tag for example in trained_on for tag in example.tags]
    problems.collect(decoding.check_tags, known_tags, "Check TAGGER_DATA_TAG_DELIMITER and TAGGER_DATA_MIN_TAG_COUNT")
    if trained_on and "head" in (settings.sample.decoding or ""):
        from job.decoding.head import learnable_tags  # imports torch

        problems.collect(learnable_tags, trained_on, vocabulary or known_tags)
    problems.collect(_check_blend, settings.sample)
    if vocabulary:  # the settings hold only the file's name, which stays the same when its content changes
        digest = hashlib.sha256(repr((examples.fingerprint, vocabulary)).encode()).hexdigest()
        examples = replace(examples, fingerprint=digest)
    run = problems.collect(RunFolder.open, settings, examples)
    problems.raise_if_any()
    assert run is not None
    return PreflightResult(settings, examples, run, repo, base.licence if base else None, started)


def _check_blend(settings: Sample) -> None:
    """Raise InvalidInputError if there are no examples to find the weights of a blend on."""
    if "+" in (settings.decoding or "") and settings.threshold != "auto":
        raise InvalidInputError(
            f"TAGGER_SAMPLE_DECODING={settings.decoding} finds its weights on calibration examples, which there are "
            "only with TAGGER_SAMPLE_THRESHOLD=auto; set it"
        )


def _check_base_model(settings: Base) -> HubRevision | None:
    """Return the commit of a base model on the Hub; None if it is local (and then checked) or the Hub is offline."""
    if is_local(settings.model, WEIGHT_SUFFIXES):
        weights.check_local(settings.model)
        return None
    return None if hub.is_offline() else access.resolve_revision("model", settings.model, settings.revision)


def _resolve_dataset(settings: Data) -> HubRevision | None:
    """Return the commit of a data set on the Hub; None if it is local or the Hub is offline."""
    if not is_on_hub(settings.dataset, DATA_SUFFIXES) or hub.is_offline():
        return None
    return access.resolve_revision("dataset", settings.dataset, settings.revision)


def _check_embedder(settings: Eval) -> HubRevision | None:
    """Return the commit of an embedding model on the Hub; None if there is none, it is local, or the Hub is offline."""
    name = settings.embedder
    if name is None or is_local(name, ()):
        embedders.resolve_embedder(settings)
        return None
    return None if hub.is_offline() else access.resolve_revision("embedder", name, settings.embedder_revision)


def already_published(checked: PreflightResult) -> bool:
    """Return whether the published adapter was made with these revisions, data and settings.

    Always False while an unfinished run of them is on disk or in the store: the version tag of its promotion may still
    be missing.
    """
    unfinished = checked.run.started and not checked.complete
    return not unfinished and same_inputs(checked, checked.settings.hub.revision)


def skip_known_rejection(checked: PreflightResult) -> None:
    """Raise GateRejected if a run of the same inputs was compared with what is published now, and rejected.

    Otherwise a schedule would train it again each time, on a machine without the run's folder.
    """
    import httpx2

    repo, settings = checked.repo, checked.settings
    if repo is None or checked.run.started:
        return
    try:
        branch = push.candidate_branch(checked.run, hub.branch_head(repo, settings.hub.revision))
        metrics = hub.published_json(repo, branch, "metrics.json") or {}
    except (httpx2.HTTPError, OSError, hub.HubFileError) as error:
        raise hub.hub_unreachable(error) from None
    try:
        gate = _PublishedGate.model_validate(metrics.get("gate") or {"verdict": "pass"})
    except ValidationError:
        raise InvalidInputError(
            f"metrics.json on the branch {branch} of {repo} has no verdict of the gate that can be read; delete the "
            "branch"
        ) from None
    limits = (settings.eval.gate, settings.eval.min_f1, settings.eval.tolerance)
    rejected = gate.verdict != "pass" and (gate.gate, gate.min_f1, gate.tolerance) == limits
    if rejected and same_inputs(checked, branch):
        raise GateRejected(
            f"{gate.verdict}: {gate.reason}. The adapter was not published, and is not trained again, "
            f"because nothing has changed since; it is on the branch {branch}"
        )


class _PublishedGate(BaseModel):
    """The entries of a verdict in a published metrics.json that are used."""

    verdict: Literal["pass", "fail", "insufficient evidence"]
    reason: Annotated[str, Field(max_length=10_000)] = ""
    gate: str = ""
    min_f1: float = 0.0
    tolerance: float = 0.0


def same_inputs(checked: PreflightResult, revision: str | None) -> bool:
    """Return whether the manifest published at a revision of the repo has these revisions, data and settings."""
    if checked.repo is None:
        return False
    published_at = checked.settings.hub.model_copy(update={"repo": checked.repo, "revision": revision})
    manifest = hub.published_manifest(published_at)
    old = manifest.get("settings")
    if not old:
        return False
    changed = differences(current_settings(old), checked.settings.result_values())
    return not any(changed) and manifest.get("dataset", {}).get("fingerprint") == checked.examples.fingerprint


@dataclass(frozen=True)
class StepSize:
    """The size of an optimizer step."""

    examples: int
    tokens: int


@dataclass(frozen=True)
class MachineReport:
    """What the checks of device, memory and the largest examples found."""

    device: str
    fallback: str | None
    """Why `auto` chose the CPU; None if a GPU is used or the CPU was set."""
    longest_example: int
    """Tokens of the longest training example."""
    memory: MemoryEstimate
    processes: int = 1
    """Processes that train on this machine."""
    step: StepSize | None = None
    """What these processes share; None for one process."""

    def describe(self) -> list[str]:
        """Return a line to print for each finding."""
        return [
            f"device: {self.device}{f', because {self.fallback}' if self.fallback else ''}",
            f"longest example: {self.longest_example} tokens",
            f"memory: at least {self.memory}",
            *self._describe_processes(),
        ]

    def _describe_processes(self) -> list[str]:
        if self.step is None:
            return []
        line = f"processes: {self.processes} on this machine; {self.step.examples} examples of a step have about "
        line += f"{self.step.tokens:,} tokens, {self.step.tokens // self.processes:,} for each"
        if self.step.tokens // self.processes < WORTHWHILE_TOKENS:
            line += f": below about {WORTHWHILE_TOKENS:,} more processes bring nothing; raise TAGGER_TRAIN_BATCH_SIZE"
        return [line]


def check_machine(checked: PreflightResult, processes: int = 1) -> MachineReport:
    """Check device, precision, memory, disk, the largest training examples, and that their answers can be decoded.

    `processes` are to train together on this machine.
    Raises InvalidInputError with every problem found. Imports torch and transformers, and downloads config and
    tokenizer of the base model if they are not cached.
    """
    from job import estimate
    from job.decoding.gold_answers import tokenizer_problems
    from job.system.device import ComputeSpec, gpu_unavailable_reason

    settings, examples = checked.settings, checked.examples
    compute = ComputeSpec.resolve(settings.run.device, settings.train.precision)
    tokenizer = quantize.load_tokenizer(settings.base)
    _check_model(settings)
    train_examples = drop_rare_tags(examples.train, settings.data.min_tag_count)
    # a micro-batch holds at least one example, so the longest one decides whether training fits
    encoded = tokenization.encode(tokenizer, _largest(train_examples, settings.data), settings)
    longest = max(encoded, key=lambda example: len(example.input_ids))
    assert longest.labels[-1] == tokenizer.eos_token_id, "the last label must be the end of sequence"
    memory = estimate.estimate(settings, compute, [longest])
    problems = [
        *tokenizer_problems(tokenizer, train_examples, settings),
        *estimate.cpu_problems(memory, settings, compute),
        *estimate.memory_problems(memory, compute, processes),
        *estimate.disk_problems(memory, checked.run.path),
    ]
    if problems:
        raise InvalidInputError(*problems)
    fallback = gpu_unavailable_reason() if settings.run.device == "auto" and compute.device.type == "cpu" else None
    shared = None if processes == 1 else _tokens_per_step(tokenizer, train_examples, settings)
    return MachineReport(str(compute), fallback, len(longest.input_ids), memory, processes, shared)


def processes_here(settings: Settings) -> int:
    """Return how many processes a run would start on this machine."""
    from job.system.device import ComputeSpec

    team = Team.find()
    compute = ComputeSpec.resolve(settings.run.device, settings.train.precision)
    return 1 if team.place is not None else count_processes(settings, compute, team.machines.processes)


def count_processes(settings: Settings, compute: ComputeSpec, from_launcher: int | None = None) -> int:
    """Return how many processes train on this machine; raises InvalidInputError for more than it can have."""
    from job.system import device

    wanted = settings.run.processes or from_launcher
    return device.count_processes(wanted, compute.device, examples_per_step=settings.train.examples_per_step)


def _tokens_per_step(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], settings: Settings) -> StepSize:
    """Estimate the tokens of a step from some of the examples."""
    some = examples[:: max(1, len(examples) // SAMPLED)]
    encoded = tokenization.encode(tokenizer, some, settings)
    mean = sum(len(example.input_ids) for example in encoded) / len(encoded)
    n = settings.train.examples_per_step
    return StepSize(n, round(n * mean))


def _check_model(settings: Settings) -> None:
    """Check the base model's tensors and positions, its decoding, and that adapters can be merged if they are to be.

    Raises InvalidInputError with every problem found.
    """
    from job.decoding.architectures import check_marginal
    from job.merge import merge_problems

    problems = _Problems()
    problems.collect(quantize.check_weights, settings.base)
    problems.collect(quantize.check_positions, settings.base, settings.data.max_length)
    if "marginal" in (settings.sample.decoding or ""):
        problems.collect(check_marginal, quantize.meta_model(settings.base).config.model_type)
    problems.raise_if_any()
    if settings.hub.merge and (found := merge_problems(settings)):
        raise InvalidInputError(*found)


def _largest(examples: Sequence[Example], settings: Data) -> list[Example]:
    """Return the examples with the longest text and the most tags, and those whose tags may not fit.

    A token is at least one byte, so tags of fewer bytes than the limit has tokens always fit.
    """
    answers = {example: len(target(example.tags, settings.separator).encode()) for example in examples}
    room = settings.max_length - len(settings.separator.encode()) - SPECIAL_TOKENS
    risky = sorted((e for e in answers if answers[e] >= room), key=answers.__getitem__, reverse=True)
    extremes = (
        max(examples, key=lambda example: len(example.text)),
        max(answers, key=answers.__getitem__),
        max(examples, key=lambda example: len(example.tags)),
    )
    return list(dict.fromkeys([*extremes, *risky[:MOST_RISKY]]))


def report_as_json(checked: PreflightResult, machine: MachineReport) -> dict[str, Any]:
    """Return what `check --json` prints; its schema is job/runs/check.schema.json."""
    settings = checked.settings
    base = {"model": settings.base.model, "revision": settings.base.revision, "quantize": settings.base.quantize}
    return {
        "schema_version": 1,
        "data": summarise(checked.examples, settings.data),
        "base": {**base, "licence": checked.licence},
        "device": machine.device,
        "processes": machine.processes,
        "longest_example": machine.longest_example,
        "memory": {"bytes": round(machine.memory.memory), "disk_bytes": round(machine.memory.disk)},
        "run": {"path": str(checked.run.path), "complete": checked.complete},
        "repo": checked.repo,
    }
