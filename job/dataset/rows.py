"""Read the rows of the data set that TAGGER_DATA_DATASET names, wherever it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.dataset.columns import used_columns
from job.dataset.readers import Reading, Row, check_columns, label_names, read_file, used_heads, with_label_names
from job.dataset.sources import find_files, is_saved_dataset
from job.errors import InvalidInputError
from job.hub import client as hub
from job.settings import Data
from job.system.paths import DATA_SUFFIXES, exists, is_on_hub, is_remote

if TYPE_CHECKING:
    import datasets


def read_rows(settings: Data) -> Iterator[Row]:
    """Yield the rows of the data set, as far as they are asked for.

    Raises InvalidInputError when it cannot be read, lacks a column, or when a setting is given that it cannot have.
    """
    reading = Reading(tuple(used_columns(settings)))
    loaded = open_dataset(settings)
    if loaded is not None:
        yield from dataset_rows(loaded, settings.dataset, reading)
        return
    for file in find_files(settings.dataset):
        yield from read_file(file, reading)


def open_dataset(settings: Data) -> datasets.Dataset | None:
    """Return a data set of the Hub, or one that `save_to_disk` wrote; None if the setting names data files.

    Raises InvalidInputError when it cannot be read, or when a setting is given that it cannot have.
    """
    if is_on_hub(settings.dataset, DATA_SUFFIXES):
        return _from_hub(settings)
    saved = None if is_remote(settings.dataset) else _saved(settings)
    _refuse_hub_settings(settings, with_split=not isinstance(saved, dict))
    loaded: datasets.Dataset | None = _split_of(saved, settings) if isinstance(saved, dict) else saved
    return loaded


def _refuse_hub_settings(settings: Data, *, with_split: bool) -> None:
    names = {"CONFIG": settings.config, "REVISION": settings.revision} | (
        {"SPLIT": settings.split} if with_split else {}
    )
    if given := [f"TAGGER_DATA_{name}={value}" for name, value in names.items() if value is not None]:
        raise InvalidInputError(
            f"{' and '.join(given)}: files have none, and TAGGER_DATA_DATASET={settings.dataset} names files; unset "
            "it, or name a data set on the Hub"
        )


def _saved(settings: Data) -> Any:
    """Return the Dataset or DatasetDict of a folder that `save_to_disk` wrote; None for anything else."""
    path = Path(settings.dataset)
    if not exists(settings.dataset) or not path.is_dir() or not is_saved_dataset(path):
        return None
    import datasets

    try:
        return datasets.load_from_disk(str(path))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InvalidInputError(
            f"{path} cannot be read as a saved data set: {_detail(error)}; save it again"
        ) from error


def _split_of(saved: Mapping[str, datasets.Dataset], settings: Data) -> datasets.Dataset:
    split = settings.split or "train"
    if split not in saved:
        raise InvalidInputError(
            f"{settings.dataset} has no split {split!r}; it has {', '.join(map(repr, saved))}. Set TAGGER_DATA_SPLIT"
        )
    return saved[split]


def _from_hub(settings: Data) -> datasets.Dataset:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    split = settings.split or "train"
    hub.bound_requests()
    try:
        loaded: datasets.Dataset = datasets.load_dataset(
            settings.dataset,
            settings.config,
            split=split,
            revision=settings.revision,
            token=hub.token() or False,
        )
    except (OSError, ValueError, RuntimeError, HfHubHTTPError, datasets.exceptions.DatasetsError) as error:
        raise _hub_error(settings, split, error) from error
    return loaded


def _hub_error(settings: Data, split: str, error: Exception) -> InvalidInputError:
    name, detail = settings.dataset, _detail(error)
    if "scripts are no longer supported" in detail:
        return InvalidInputError(
            f"the data set {name} is built by a script, and scripts are not run because they can do anything; name a "
            "data set of plain files, or a revision such as refs/convert/parquet (TAGGER_DATA_REVISION)"
        )
    if "Config name is missing" in detail or "BuilderConfig" in detail:
        detail = detail.partition(" Example of usage")[0]
        return InvalidInputError(f"the data set {name} has several configs ({detail}); set TAGGER_DATA_CONFIG to one")
    if "Unknown split" in detail:
        return InvalidInputError(f"the data set {name} has no split {split!r} ({detail}); set TAGGER_DATA_SPLIT")
    at = f" at revision {settings.revision}" if settings.revision else ""
    return InvalidInputError(
        f"data set {name}{at}, split {split}, cannot be read from the Hub: {detail} Check TAGGER_DATA_DATASET, "
        "_CONFIG, _REVISION and _SPLIT, the network, and that HF_TOKEN may read it"
    )


def _detail(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."


def dataset_rows(loaded: datasets.Dataset, name: str, reading: Reading) -> Iterator[Row]:
    """Yield the rows of a loaded data set; raises InvalidInputError when it lacks a column."""
    check_columns(name, loaded.column_names, reading.columns, reading.remedy)
    heads = used_heads(loaded.column_names, reading)
    features = loaded.features.to_dict()
    labels = {column: found for column in heads if (found := label_names(features[column]))}
    number = 0
    for batch in loaded.select_columns(heads).iter(1000):
        for values in zip(*batch.values(), strict=True):
            number += 1
            place = f"{name} row {number}"
            found = dict(zip(batch, values, strict=True))
            yield Row(place, with_label_names(found, labels, place, keep_others=reading.keep_defects))
