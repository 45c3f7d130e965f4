"""Settings that earlier versions of the job recorded, under the names and values of today."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from job.config.environment import RENAMED, RENAMED_VALUES
from job.settings import changes_result, default_values

FORMER_VALUES: Mapping[str, Mapping[Any, Any]] = {
    **RENAMED_VALUES,
    "TAGGER_TRAIN_COMPLETION_ONLY_LOSS": {"tags": True, "all": False},
}
"""For each setting, former values and what they are called today."""
EQUIVALENT_VALUES: Mapping[str, tuple[Any, ...]] = {
    "TAGGER_DATA_SPLIT": (None, "train"),
    "TAGGER_SAMPLE_BATCH_SIZE": (None, 16),
}
"""Values of a setting that mean the same; earlier versions wrote `train` and 16 where today nothing is set."""
BEFORE_IT_EXISTED: Mapping[str, Any] = {}
"""For a setting that was added later, the value that stands for the behaviour before, where that is not the default."""


def current_settings(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a manifest under the names and values of today.

    A setting that did not exist yet gets the value that stands for the behaviour of that time. One that this version
    does not know stays as it is: see `unknown_settings`.
    """
    renamed = {RENAMED.get(name, name).split()[0]: value for name, value in recorded.items()}
    values = {
        name: former[value] if isinstance(value, str) and value in (former := FORMER_VALUES.get(name, {})) else value
        for name, value in renamed.items()
    }
    return default_values() | dict(BEFORE_IT_EXISTED) | values


def unknown_settings(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recorded settings that changed the result of a run and that this version does not have."""
    known = default_values()
    return {name: value for name, value in recorded.items() if name not in known and changes_result(name)}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names in `new` whose values in `old`, of `current_settings`, mean something else."""
    for name, value in new.items():
        equivalent = EQUIVALENT_VALUES.get(name, ())
        if old.get(name) != value and not (old.get(name) in equivalent and value in equivalent):
            yield name
