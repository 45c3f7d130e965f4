"""Tag texts with a saved adapter, in this process or in several that each have a GPU."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from job.decoding import config as decoding
from job.distributed import launcher
from job.distributed.group import joined
from job.distributed.place import Machines, Place
from job.distributed.team import Team
from job.errors import InvalidInputError
from job.hub import client as hub
from job.hub.weights import resolve_weights
from job.sample import adapter_config, load_tagger
from job.settings import Settings
from job.system import device
from job.system.device import ComputeSpec
from job.types import TaggedText

TASK = "tag"
"""What `worker` is told to do."""


class TextsTagger(Protocol):
    """What tags a list of texts: a `Tagger`, or several processes."""

    def tag(self, texts: Sequence[str]) -> list[TaggedText]:
        """Return the answer for each text, in order."""


def load(settings: Settings, adapter: Path | str, compute: ComputeSpec, *, texts: int) -> TextsTagger:
    """Load an adapter to tag this many texts: in this process, or in one for each GPU if there are enough batches.

    Raises InvalidInputError when the adapter is absent or damaged; with several processes, when they tag.
    """
    batches = -(-texts // device.texts_per_batch(settings.sample.batch_size, compute.device))
    processes = max(1, min(batches, count_processes(settings, compute)))
    if processes == 1:
        return load_tagger(settings, adapter, compute)
    return _Processes(settings, prepare(settings, adapter), compute, processes)


def prepare(settings: Settings, adapter: Path | str) -> Path:
    """Download an adapter and its base model for processes that work offline; return the folder of the adapter.

    Raises InvalidInputError when the adapter is absent or damaged.
    """
    if isinstance(adapter, str):
        adapter = _fetch(adapter, settings.hub.revision)
    config = adapter_config(adapter, None)
    resolve_weights(settings.base.model_copy(update={"revision": settings.base.revision or config.revision}))
    return adapter


def count_processes(settings: Settings, compute: ComputeSpec) -> int:
    """Return how many processes can tag on this machine; 1 within a launcher's process.

    Raises InvalidInputError for more processes than GPUs.
    """
    if Team.find().place is not None:
        return 1
    return device.count_processes(settings.run.processes, compute.device)


class _Processes:
    """A tagger in several processes, which are started for each list of texts."""

    def __init__(self, settings: Settings, adapter: Path, compute: ComputeSpec, processes: int) -> None:
        self._settings, self._adapter, self._compute, self._processes = settings, adapter, compute, processes

    def tag(self, texts: Sequence[str]) -> list[TaggedText]:
        """Return the answer for each text, in order; the batches do not depend on the number of processes."""
        with tempfile.TemporaryDirectory(prefix="tagger-") as folder:
            answers = Path(folder, "answers.json")
            inputs = {
                "task": TASK,
                "settings": self._settings.model_dump(mode="json"),
                "adapter": str(self._adapter.absolute()),
                "texts": list(texts),
                "answers": str(answers),
            }
            store = launcher.meet(Machines(), {}, train=True)
            assert store is not None
            launcher.launch(
                self._processes,
                inputs,
                machines=Machines(),
                store=store,
                virtual_gpus=self._compute.device.type == "cuda",
            )
            return [TaggedText.from_json(answer) for answer in json.loads(answers.read_text(encoding="utf-8"))]


def take_part(place: Place, inputs: dict[str, Any]) -> None:
    """Do the part of a process that the job started: process 0 writes the answers, the others help it."""
    settings = Settings.model_validate(inputs["settings"])
    compute = ComputeSpec.resolve(settings.run.device, settings.train.precision)
    with joined(place, {}, train=True) as group:
        tagger = load_tagger(settings, Path(inputs["adapter"]), compute)
        group.start()
        if place.rank > 0:
            tagger.follow(group)
            return
        answers = tagger.lead(group, inputs["texts"])
        Path(inputs["answers"]).write_text(json.dumps(list(map(asdict, answers))), encoding="utf-8")


def _fetch(repo: str, revision: str | None) -> Path:
    """Return the folder of a repo's adapter, downloaded; raises InvalidInputError if there is none to read."""
    import httpx2

    try:
        folder, problem = fetch_adapter(repo, revision, hub.CHECK_SECONDS), "there is none"
    except InvalidInputError as error:
        folder, problem = None, str(error)
    except (httpx2.HTTPError, OSError) as error:
        folder, problem = None, hub.error_message(error)
    if folder is None:
        raise InvalidInputError(
            f"the adapter in {repo} cannot be read: {problem}. Check TAGGER_HUB_REPO and HF_TOKEN, or train one first"
        )
    return folder


def fetch_adapter(repo: str, revision: str | None, seconds: float) -> Path | None:
    """Return the folder with the adapter of a repo at a revision, downloaded; None if the repo has none.

    Raises InvalidInputError if the adapter has no weights; if the Hub cannot be reached, its client's own errors.
    """
    from huggingface_hub.errors import RemoteEntryNotFoundError

    def fetch(name: str, download: Callable[[str, str | None, str], Path] = hub.download_metadata) -> Path:
        return hub.retry(lambda: download(repo, revision, name), seconds, "hub")

    try:
        folder = fetch("adapter_config.json").parent
    except RemoteEntryNotFoundError:
        return None
    try:
        fetch("adapter_model.safetensors", hub.download)
    except RemoteEntryNotFoundError:
        raise InvalidInputError("it has no adapter_model.safetensors") from None
    with suppress(RemoteEntryNotFoundError):  # older adapters have no decoding configuration
        fetch(decoding.CONFIG_NAME)
        for name in decoding.saved_config(folder, None).files:
            fetch(name, hub.download)
    return folder
