"""Run again what a manifest describes: its settings, and what differs here from where it was made."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.config.earlier_versions import current_settings
from job.errors import InvalidInputError
from job.hub.client import read_json
from job.preflight import PreflightResult
from job.runs import provenance, schema
from job.settings import Settings, changes_result

if TYPE_CHECKING:
    from job.system.device import ComputeSpec

LOCATIONS = ("TAGGER_BASE_MODEL", "TAGGER_DATA_DATASET", "TAGGER_DATA_EVAL_DATASET")
"""Settings that may be set here to where the same files are on this machine."""


def read(file: Path) -> dict[str, Any]:
    """Read a manifest that is to be reproduced.

    Raises InvalidInputError when it cannot be read, has another schema, or is not as it was written.
    """
    try:
        manifest = read_json(file)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InvalidInputError(f"--from {file} cannot be read: {reason}; expected a run's manifest.json") from None
    if manifest.get("schema_version") != schema.MANIFEST or "settings" not in manifest:
        raise InvalidInputError(
            f"--from {file} has the schema version {manifest.get('schema_version')!r}, and this version of the job "
            f"reads {schema.MANIFEST}; name the manifest.json of a run, or use the version that wrote it "
            f"({schema.written_by(manifest)})"
        )
    if provenance.DIGEST not in manifest:
        raise InvalidInputError(
            f"--from {file} was written by {schema.written_by(manifest)} of the job, which recorded too little to "
            "reproduce the run; set its settings instead"
        )
    if not provenance.is_sealed(manifest):
        raise InvalidInputError(
            f"--from {file} was edited after the job had written it, so it does not say how the run was made; name the "
            "original, or set the settings instead"
        )
    return manifest


def settings_of(manifest: dict[str, Any], settings: Settings) -> Settings:
    """Return the settings to run with: those that change the result from the manifest, all others from here.

    Raises InvalidInputError for a setting that is set here to another value, unless it only says where files are.
    """
    recorded, own = current_settings(manifest["settings"]), settings.values()
    explicit = {name for name in settings.explicit_names() if changes_result(name)}
    conflicts = sorted(name for name in explicit.difference(LOCATIONS) if own[name] != recorded.get(name))
    if conflicts:
        raise InvalidInputError(
            *(
                f"{name}={own[name]} is set and the manifest has {recorded.get(name)!r}; remove it to reproduce the run"
                for name in conflicts
            )
        )
    values = {name: value for name, value in recorded.items() if name not in explicit.intersection(LOCATIONS)}
    sources = manifest.get("sources", {}) | settings.sources
    return settings.with_result_values(values).with_sources(sources)


def differences(manifest: dict[str, Any], checked: PreflightResult, compute: ComputeSpec) -> Iterator[str]:
    """Yield what differs from the run of a manifest and may change the result: data, base model, versions, device."""
    from job.system.device import describe_machine  # imports torch

    run, recorded = checked.run.manifest, current_settings(manifest["settings"])
    if run["dataset"]["fingerprint"] != manifest["dataset"]["fingerprint"]:
        yield f"the contents of {checked.settings.data.dataset} are not those of {recorded['TAGGER_DATA_DATASET']} then"
    if checked.settings.base.model != recorded["TAGGER_BASE_MODEL"]:
        yield f"TAGGER_BASE_MODEL was {recorded['TAGGER_BASE_MODEL']} and is {checked.settings.base.model}"
    for name in sorted(manifest["versions"].keys() | run["versions"].keys()):
        old, new = (versions.get(name, "absent") for versions in (manifest["versions"], run["versions"]))
        if old != new:
            yield f"{name} was {old} and is {new}"
    if (device := manifest.get("device")) not in (None, str(compute)):
        yield f"the device was {device} and is {compute}"
    old, new = manifest.get("machine", {}).get("cpu_capability"), describe_machine()["cpu_capability"]
    if compute.device.type == "cpu" and old not in (None, new):
        yield f"the processor's instructions were {old} and are {new}"


def prepare(manifest: dict[str, Any], checked: PreflightResult) -> None:
    """Let a new run split its steps as the run of a manifest did, because another split rounds differently."""
    if not checked.run.started:
        reproduced = {"run_id": manifest.get("run_id"), provenance.DIGEST: manifest[provenance.DIGEST]}
        checked.run.manifest.update(reproduces=reproduced)
        if plan := manifest.get("batch_plan"):
            checked.run.manifest.update(batch_plan=json.loads(json.dumps(plan)))
